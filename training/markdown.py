"""Markdown from any text: what stands in a table cell or a code block is shown as it is, whatever characters it has."""

import re
import unicodedata
from collections.abc import Iterable, Sequence

_SPECIAL = re.compile(r"[\\`*\[\]<>&|~$]|(?<![^\W_])_|_(?![^\W_])")
"""Characters that Markdown may take for its own; `_` only where it is not inside a word."""


def escape(text: str, longest: int | None = None) -> str:
    """Return `text` as one line that is shown as it is, also in a table cell; cut to `longest` characters if given.

    White space becomes single spaces. Special characters become HTML entities: unlike backslashes, these mean the
    same to every reader of Markdown, and in a table no `|` is left that could end a cell.
    """
    line = " ".join(text.split())
    if longest is not None and len(line) > longest:
        line = line[: longest - 1] + "…"
    shown = "".join("\ufffd" if _invisible(character) else character for character in line)
    return _SPECIAL.sub(lambda match: f"&#{ord(match[0])};", shown)


def _invisible(character: str) -> bool:
    """Tell whether a character is a control character, or turns the direction of what follows it."""
    return unicodedata.category(character) == "Cc" or unicodedata.bidirectional(character) in _TURNING


_TURNING = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table of cells that are Markdown already (see escape)."""
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def code(text: str, language: str = "") -> str:
    """Return a fenced code block."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text}\n{fence}\n"

"""The grammar of the demo: reads a split's wording and writes utterances and sentence pairs from it.

The wording of the two splits lies in two files, `wording/train.yaml` and `wording/dev.yaml`, that share no template
and no slot value; the comment on top of the first says how to read them.
"""

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import yaml

from espalier.errors import DataError

WORDING = Path(__file__).parent / "wording"

TOKEN = re.compile(r"[ap]\.m\.|\d+(?::\d+)?(?:st|nd|rd|th)?|'s\b|\w+(?:['-]\w+)*|[^\w\s]")
"""A token: a word, a number or time, a possessive 's that stands apart from a name, or one punctuation mark."""

_CHOICE = re.compile(r"\[([^]]*)\]")
_SLOT = re.compile(r"\{([^}]*)\}")
_PREPOSITION = re.compile(r"\((\w+)\) ")

Piece = tuple[str, str | None]
"""A stretch of text and the slot that it fills, if any."""


@dataclass(frozen=True)
class Template:
    """One way to ask for something: `sense` is the intent and what may narrow it, `line` the source line it is from."""

    sense: str
    line: int
    text: str  # with {pool} placeholders, without choices and end marks
    mood: str  # "?" question, "." statement, "*" fragment, "" command
    cues: bool  # whether a cue of urgency fits

    @property
    def intent(self) -> str:
        """The intent, without the sense."""
        return self.sense.partition(".")[0]

    @property
    def pools(self) -> dict[str, str]:
        """The pool of values to draw from, by slot, in the order of the text."""
        names = [name.rstrip("+") for name in _SLOT.findall(self.text)]
        return {name.partition(".")[0]: name for name in names}

    @property
    def signature(self) -> tuple[str, frozenset[str]]:
        """Sense and slots: templates that share it can ask for the very same thing."""
        return self.sense, frozenset(self.pools)


@dataclass(frozen=True)
class Utterance:
    """A text, its tokens with BIO tags, its intent, and its urgency as log-odds before the intent's own share."""

    text: str
    tokens: tuple[str, ...]
    tags: tuple[str, ...]
    intent: str
    pull: float


Values = Mapping[str, Sequence[str]]
"""By slot, a value as the ways to write it."""


class Grammar:
    """The wording of one split, ready to write with."""

    def __init__(self, wording: Mapping[str, Any]) -> None:
        """Take the content of a wording file."""
        self.templates = [template for sense in wording["intents"] for template in _templates(sense, wording)]
        self.values: dict[str, list[tuple[str, ...]]] = {
            pool: [tuple(line.split(" = ")) for line in block.splitlines()] for pool, block in wording["values"].items()
        }
        self.frames: dict[str, dict[str, float]] = wording["frames"]

    @classmethod
    def load(cls, split: str) -> "Grammar":
        """Read the wording of `split`: train or dev."""
        path = WORDING / f"{split}.yaml"
        try:
            return cls(yaml.safe_load(path.read_text(encoding="utf-8")))
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error.strerror}") from error

    def pool(self, name: str) -> list[tuple[str, ...]]:
        """Return the values of a pool; `time.morning` has those of `time` too."""
        slot, _, narrower = name.partition(".")
        return self.values[slot] + (self.values[name] if narrower else [])

    def draw(self, template: Template, random: Random) -> dict[str, tuple[str, ...]]:
        """Draw a value for every slot of `template`."""
        return {slot: random.choice(self.pool(pool)) for slot, pool in template.pools.items()}

    def write(self, template: Template, values: Values, random: Random, cue_rate: float) -> Utterance:
        """Write `template` with `values`, with a cue of urgency at `cue_rate` where one fits."""
        pieces, pull, end = self._framed(template, _filled(template, values, random), random, cue_rate)
        style = random.choices(("written", "typed", "spoken"), (45, 30, 25))[0]
        if style == "written":
            if end == "." and random.random() < (0.4 if pull > 1 else 0.07):
                end = "!"
            stopped = end == "." and pieces[-1][0].endswith(".")  # "at 7 a.m." has its stop
            pieces = _capitalised([*pieces, ("" if stopped else end, None)])
        elif style == "typed":
            pieces = [*pieces, ("?" if end == "?" and random.random() < 0.5 else "", None)]
        else:
            pieces = [(_spoken(text), slot) for text, slot in pieces]
        pull += 0.5 * (pieces[-1][0] == "!")
        tokens, tags = _tagged(pieces)
        text = "".join(text for text, _ in pieces)
        return Utterance(text, tokens, tags, template.intent, pull)

    def _framed(
        self, template: Template, pieces: list[Piece], random: Random, cue_rate: float
    ) -> tuple[list[Piece], float, str]:
        """Put an opener, a polite phrase and a cue around `pieces`; return them with their pull and the end mark."""
        pull, end = 0.0, "?" if template.mood == "?" else "."
        command = template.mood == ""
        # Behind a message, anything more would read as a part of the message.
        closed = pieces[-1][1] == "message"
        lead = command  # whether a bare phrase fits before: "could you" does before a command alone

        def put(tone: str) -> None:
            nonlocal pieces, pull, end, lead
            fitting = _fitting(self.frames[tone], lead, command, closed)
            if end == "?" and tone == "polite":
                fitting = [(frame, weight) for frame, weight in fitting if frame.endswith("please")]
            if not fitting:
                return
            frame, weight = random.choice(fitting)
            before, after = frame.split("{}")
            if before.startswith(("could", "can", "would")):
                end = "?"
            if after.startswith(",") and end == "?" and tone != "polite":
                # A question ends before the next sentence starts.
                after, end = f"? {after[2].upper()}{after[3:]}", "."
            lead = lead and not before
            pieces = [piece for piece in ((before, None), *pieces, (after, None)) if piece[0]]
            pull += weight

        if (command or template.cues) and random.random() < 0.3:
            put("polite")
        # People put pressure on an order more often than on a question.
        if template.cues and random.random() < (cue_rate / 2 if template.mood == "?" else cue_rate):
            put(random.choice(("urgent", "relaxed")))
        elif random.random() < 0.15:
            put("openers")
        return pieces, pull, end


def _templates(sense: str, wording: Mapping[str, Any]) -> Iterator[Template]:
    for line, source in enumerate(wording["intents"][sense].splitlines()):
        cues = not source.endswith("~")
        body = source.rstrip("~")
        mood = body[-1] if body[-1] in "?.*" else ""
        parts = _CHOICE.split(body.removesuffix(mood))
        choices = [part.split("|") if index % 2 else [part] for index, part in enumerate(parts)]
        for chosen in itertools.product(*choices):
            yield Template(sense, line, " ".join("".join(chosen).split()), mood, cues)


def _filled(template: Template, values: Values, random: Random) -> list[Piece]:
    pieces: list[Piece] = []
    for index, part in enumerate(_SLOT.split(template.text)):
        if index % 2 == 0:
            pieces.append((part, None))
            continue
        slot = part.partition(".")[0].rstrip("+")
        surface = random.choice(values[slot])
        preposition = _PREPOSITION.match(surface)
        if preposition and part.endswith("+"):
            pieces.append((preposition[1] + " ", None))
        pieces.append((_PREPOSITION.sub("", surface), slot))
    return [piece for piece in pieces if piece[0]]


def _fitting(frames: Mapping[str, float], lead: bool, follow: bool, closed: bool) -> list[tuple[str, float]]:
    """Return the frames that fit: bare phrases only before or behind a command, and none behind what is closed."""

    def fits(frame: str) -> bool:
        before, after = frame.split("{}")
        if after:
            return not closed and (follow or after.startswith(","))
        return lead or before.endswith((", ", ", but "))

    return [(frame, weight) for frame, weight in frames.items() if fits(frame)]


def _capitalised(pieces: list[Piece]) -> list[Piece]:
    text, slot = pieces[0]
    return [(text[0].upper() + text[1:], slot), *pieces[1:]]


def _spoken(text: str) -> str:
    """Return `text` as a speech recogniser writes it: lower case, no punctuation but in times and words."""
    return re.sub(r"[,;:?!\"](?!\d)", "", text).lower()


def _tagged(pieces: Sequence[Piece]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    tokens: list[str] = []
    tags: list[str] = []
    for text, slot in pieces:
        found = TOKEN.findall(text)
        tokens += found
        tags += (
            ["O"] * len(found) if slot is None else [f"{'I' if index else 'B'}-{slot}" for index in range(len(found))]
        )
    return tuple(tokens), tuple(tags)

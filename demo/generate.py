"""Write the demo data: assistant utterances with intent, slots and urgency, and sentence pairs.

    python -m demo.generate --out demo/data --seed 7

writes utterances/{train,dev}.jsonl and pairs/{train,dev}.jsonl. The same seed gives the same bytes.
"""

import argparse
import json
import math
import sys
from collections.abc import Iterable
from pathlib import Path
from random import Random
from typing import Any

from demo.grammar import Grammar, Utterance
from demo.pairs import write_pairs
from espalier.errors import EspalierError
from espalier.files import write_whole

UTTERANCES = {"train": 2400, "dev": 600}
PAIRS = {"train": 2000, "dev": 500}
CUE_RATE = 0.6
"""Share of the utterances with a cue of urgency, where one fits."""

BASE_URGENCY = {
    "set_timer": 0.6,
    "send_message": 0.5,
    "control_lights": 0.2,
    "set_alarm": 0.0,
    "book_table": -0.1,
    "get_weather": -0.3,
    "add_to_list": -0.4,
    "play_music": -0.5,
    "get_news": -0.7,
    "none": -1.2,
}
"""Urgency of an intent without any cue, as log-odds."""


def urgency(utterance: Utterance) -> float:
    """Return the urgency, 0 to 1: what the intent and the cues in the wording add up to, as a probability."""
    return round(1 / (1 + math.exp(0.3 - BASE_URGENCY[utterance.intent] - utterance.pull)), 3)


def write_utterances(grammar: Grammar, count: int, random: Random) -> list[dict[str, Any]]:
    """Return `count` rows of distinct texts, equally many per intent, shuffled."""
    rows: dict[str, dict[str, Any]] = {}
    intents = list(BASE_URGENCY)
    for index, intent in enumerate(intents):
        lines: dict[tuple[str, int], list[Any]] = {}
        for template in grammar.templates:
            if template.intent == intent:
                lines.setdefault((template.sense, template.line), []).append(template)
        goal = count * (index + 1) // len(intents)
        while len(rows) < goal:
            # First the line, then one of its variants: a line with many choices is no likelier than one with few.
            template = random.choice(random.choice(list(lines.values())))
            utterance = grammar.write(template, grammar.draw(template, random), random, CUE_RATE)
            row = {
                "text": utterance.text,
                "tokens": utterance.tokens,
                "tags": utterance.tags,
                "intent": utterance.intent,
                "urgency": urgency(utterance),
            }
            rows.setdefault(" ".join(utterance.tokens).lower(), row)
    shuffled = list(rows.values())
    random.shuffle(shuffled)
    return shuffled


def generate(out: Path, seed: int) -> dict[Path, int]:
    """Write all four files below `out`; return the number of rows by file. Raises OSError if one can't be written."""
    written = {}
    for split in ("train", "dev"):
        grammar = Grammar.load(split)
        # A string seeds by its content, the same on every platform; each file has its own stream.
        for name, rows in (
            ("utterances", write_utterances(grammar, UTTERANCES[split], Random(f"{seed} utterances {split}"))),
            ("pairs", write_pairs(grammar, PAIRS[split], Random(f"{seed} pairs {split}"))),
        ):
            path = out / name / f"{split}.jsonl"
            write_whole(path, _jsonl(rows))
            written[path] = len(rows)
    return written


def _jsonl(rows: Iterable[dict[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m demo.generate",
        description="Write the demo data.",
        epilog="example: python -m demo.generate --out demo/data --seed 7",
    )
    parser.add_argument("--out", type=Path, default=Path("demo/data"), help="folder to write into (default: demo/data)")
    parser.add_argument("--seed", type=int, default=7, help="the same seed gives the same files (default: 7)")
    arguments = parser.parse_args()
    try:
        written = generate(arguments.out, arguments.seed)
    except OSError as error:
        print(f"{arguments.out} cannot be written: {error.strerror}", file=sys.stderr)
        return 1
    except EspalierError as error:
        print(error, file=sys.stderr)
        return 1
    for path, count in written.items():
        print(f"{path}: {count} rows")
    return 0


if __name__ == "__main__":
    sys.exit(main())

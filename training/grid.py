"""The grid of a search: every combination of task layers, learning rate and seed, for students also of start."""

from collections.abc import Sequence
from itertools import product
from typing import Literal, get_args

from pydantic import BaseModel, ConfigDict

from espalier.errors import SpecError

Start = Literal["teacher", "pretrained"]
"""The values of training.distill.Init."""


class Trial(BaseModel):
    """One training of a search."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    layers: int
    learning_rate: float
    seed: int
    init: Start | None = None  # of a student; a teacher starts from the base

    @property
    def name(self) -> str:
        """A name for files: no two trials of a grid share it."""
        init = "" if self.init is None else f"-{self.init}"
        return f"l{self.layers}-lr{self.learning_rate!r}-s{self.seed}{init}"


def grid(
    layers: Sequence[int], learning_rates: Sequence[float], seeds: int, inits: Sequence[Start | None] = (None,)
) -> tuple[Trial, ...]:
    """Return all trials, the fewest layers first; seeds count from 0."""
    if seeds < 1:
        raise SpecError(f"--seeds is {seeds}; a search needs at least 1")
    return tuple(
        Trial(layers=depth, learning_rate=rate, seed=seed, init=init)
        for depth, init, rate, seed in product(layers, inits, learning_rates, range(seeds))
    )


def parse_layers(text: str) -> tuple[int, ...]:
    """Read numbers and ranges of layers: `3`, `2,4`, `2..4`, which includes both ends."""
    layers: set[int] = set()
    for part in text.split(","):
        first, dots, last = part.strip().partition("..")
        try:
            low, high = int(first), int(last if dots else first)
        except ValueError:
            low, high = 0, -1
        if not 0 <= low <= high:
            raise SpecError(
                f"--task-layers {text!r}: {part.strip()!r} is neither a number of layers nor a range; "
                "write 3, or 2,4, or 2..4"
            )
        layers.update(range(low, high + 1))
    return tuple(sorted(layers))


def parse_rates(text: str) -> tuple[float, ...]:
    """Read learning rates separated by commas."""
    try:
        rates = sorted({float(part) for part in text.split(",")})
    except ValueError:
        rates = []
    if not rates or not all(0 < rate < 1 for rate in rates):
        raise SpecError(f"--lr {text!r}: write one or more learning rates between 0 and 1, such as 2e-5,5e-5")
    return tuple(rates)


def parse_inits(text: str) -> tuple[Start, ...]:
    """Read the starts of students, separated by commas."""
    known = {str(start): start for start in get_args(Start)}
    try:
        return tuple(dict.fromkeys(known[part.strip()] for part in text.split(",")))
    except KeyError as error:
        raise SpecError(f"--init {text!r}: write teacher, pretrained, or teacher,pretrained") from error


def default_layers(depth: int) -> tuple[int, ...]:
    """Return the paper's task layers, 4 to 10 of 12, for a base of `depth` layers: a third to five sixths of it."""
    return tuple(range(max(1, depth // 3), max(1, depth * 5 // 6) + 1))

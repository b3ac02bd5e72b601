"""Typed answers. All are immutable; `to_dict` gives plain values for JSON."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from espalier.tagging import Span, TokenTag

__all__ = ["Answer", "Answers", "Classification", "Regression", "Span", "Tagging", "TokenTag"]


@dataclass(frozen=True)
class Classification:
    """The most probable label, and the probability of every label."""

    label: str
    probability: float
    probabilities: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain values, for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Regression:
    """A number."""

    value: float

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain values, for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Tagging:
    """The spans found in the text, and the label of every word (`tokens`).

    A task with a CRF chooses all labels together: `log_probability` is that of the whole path (natural logarithm), and
    neither spans nor words have a probability of their own. Without one it is None.
    """

    spans: tuple[Span, ...]
    tokens: tuple[TokenTag, ...]
    log_probability: float | None = None

    @property
    def probability(self) -> float | None:
        """Probability of all labels together, of a task with a CRF."""
        return None if self.log_probability is None else math.exp(self.log_probability)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain values, for JSON."""
        return asdict(self)


Answer = Classification | Regression | Tagging


@dataclass(frozen=True)
class Answers(Mapping[str, Answer]):
    """The answers to one text (or pair), by task, in the order asked."""

    by_task: dict[str, Answer]

    def __getitem__(self, task: str) -> Answer:
        """Return the answer of `task`; raise KeyError if it was not asked."""
        return self.by_task[task]

    def __iter__(self) -> Iterator[str]:
        """Iterate over the tasks."""
        return iter(self.by_task)

    def __len__(self) -> int:
        """Return the number of tasks."""
        return len(self.by_task)

    def to_dict(self) -> dict[str, Any]:
        """Return the answers as plain values, for JSON."""
        return {task: answer.to_dict() for task, answer in self.by_task.items()}

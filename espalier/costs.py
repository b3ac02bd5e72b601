"""What a trunk and its heads cost on one machine: measured by `export.costs`, weighed by `training.selection`."""

from collections.abc import Mapping
from dataclasses import dataclass

from espalier.contract import Kind


@dataclass(frozen=True)
class Costs:
    """Milliseconds per text, and what folding saves."""

    trunk: Mapping[int, float]  # by tap: embeddings and all layers below it
    heads: Mapping[tuple[Kind, int, int], float]  # by kind, task layers, and how many of them are folded
    folded: float  # a head of one folded layer as a fraction of a full layer
    mean_length: float  # tokens per text of the measured traffic
    batch: int  # texts per execution


def executed(layers: int, folded: int, fraction: float) -> float:
    """Return the task layers of a head, the `folded` ones among them counted as `fraction`."""
    return layers - folded + folded * fraction

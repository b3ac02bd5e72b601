"""What a trunk and its heads cost on one machine: measured by `export.costs`, weighed by `training.selection`."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from espalier.contract import Kind


class HeadShape(NamedTuple):
    """What the cost of a head depends on."""

    kind: Kind
    layers: int
    folded: int  # of the layers
    outputs: int  # values of the output layer
    crf: tuple[str, ...] = ()  # the labels between which a CRF decides, if it has one


@dataclass(frozen=True)
class Costs:
    """Milliseconds per text, and what folding saves."""

    trunk: Mapping[int, float]  # by tap: embeddings and all layers below it
    heads: Mapping[HeadShape, float]
    folded: float  # a head of one folded layer as a fraction of a full layer
    mean_length: float  # tokens per text of the measured traffic
    batch: int  # texts per execution

"""What 8-bit products cost in quality: a quantized head on its quantized trunk, asked the task's own dev split."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from espalier.branch import BranchCard
from espalier.contract import Kind
from espalier.encoder import Base
from espalier.errors import DataError, ExportError
from export.check import Array
from export.session import session, states

POINTS = 0.5
"""How much lower than in FP32 the dev metric may be, in points of a hundred."""
BATCH = 32

Report = Callable[[int, int], None]


@dataclass(frozen=True)
class Quantized:
    """The models that answer a task: the segments up to its tap, from the bottom up, and its head."""

    segments: Sequence[bytes]
    head: bytes


def quantized_score(
    models: Quantized, card: BranchCard, base: Base, report: Report = lambda done, total: None
) -> float:
    """Return the dev metric of a branch as it will be served; raise ExportError if it lost more than POINTS.

    It is compared with the metric in the card, on the dev split as it is now. `report` is told the texts done, and all.
    Raises DataError if the dev split cannot be read.
    """
    try:
        from training.data import load_split, sample
        from training.features import featurize
        from training.metrics import decode, gold, score
    except ImportError as error:
        raise ExportError(f"--target int8 scores the dev split, which needs espalier[train]: {error}") from error

    spec = card.spec
    examples = sample(load_split(spec, "dev"), card.arguments.get("max_dev"))
    if spec.kind is Kind.CLASSIFICATION and (new := {str(example.label) for example in examples} - set(card.labels)):
        raise DataError(f"task {spec.name}: dev has the label {min(new)!r}, which the branch does not; train it again")
    features = featurize(spec.kind, card.labels, base.tokenizer, base.max_length, examples)
    segments, head = [session(model) for model in models.segments], session(models.head)
    takes_ids = any(tensor.name == "input_ids" for tensor in head.get_inputs())
    answers: dict[int, Array] = {}
    order = sorted(range(len(features)), key=lambda row: len(features[row]["input_ids"]))
    for start in range(0, len(order), BATCH):
        rows = order[start : start + BATCH]
        ids, types = (
            np.concatenate([features[row][name] for row in rows]).astype(np.int64)
            for name in ("input_ids", "token_type_ids")
        )
        lengths = np.array([[len(features[row]["input_ids"])] for row in rows], np.int32)
        *_, feed = states(segments, ids, types, lengths)
        answered = head.run(None, {**feed, **({"input_ids": ids} if takes_ids else {})})[0]
        ends = np.cumsum(lengths)[:-1]
        parts = np.split(answered, ends) if spec.kind is Kind.TAGGING else answered
        answers |= dict(zip(rows, parts, strict=True))
        report(start + len(rows), len(order))
    padded = torch.nn.utils.rnn.pad_sequence([torch.from_numpy(answers[row]) for row in range(len(features))], True)
    found = decode(spec.kind, card.labels, padded.numpy(), features, spec.structure)
    own = score(spec.kind, gold(examples), found, spec.positive, spec.ignore)[spec.metric]
    if card.score - own > POINTS / 100:
        raise ExportError(
            f"task {spec.name}: with 8-bit products {spec.metric} on dev is {own:.4f}, in FP32 {card.score:.4f}: more "
            f"than {POINTS} points are lost; nothing was written, export with --target cpu"
        )
    return own

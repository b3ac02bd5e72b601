"""Answers of a branch, batch by batch, as training and cards need them."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from espalier.branch import Branch
from espalier.contract import Kind
from espalier.encoder import Base
from training.activations import accelerated
from training.features import collate


@torch.no_grad()
def logits_of(
    branch: Branch, base: Base, tap: int, features: Sequence[dict[str, Any]], batch_size: int,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> list[Tensor]:  # fmt: skip
    """Return the logits by example: [C], [1] for regression, or [S,C] for tagging. Dropout is off in a loaded branch.

    `features` are those of training.features; with activations attached the trunk does not run. `report` is told the
    texts done, and all texts.
    """
    order = sorted(range(len(features)), key=lambda row: len(features[row]["input_ids"]))  # little padding
    logits: dict[int, Tensor] = {}
    with accelerated(base.encoder, branch) as device:
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            batch = {name: tensor.to(device) for name, tensor in collate([features[row] for row in rows]).items()}
            hidden = batch.get("hidden")
            if hidden is None:
                hidden = base.encoder(batch["input_ids"], batch["token_type_ids"], batch["mask"], tap=tap)
            for row, answer in zip(rows, branch(hidden, batch["mask"]).cpu(), strict=True):
                tagging = branch.kind is Kind.TAGGING
                logits[row] = answer[: len(features[row]["input_ids"])].clone() if tagging else answer
            report(start + len(rows), len(order))
    return [logits[row] for row in range(len(features))]

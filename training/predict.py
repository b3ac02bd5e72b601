"""Answers of a branch, batch by batch, as training and cards need them."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from espalier.branch import Branch
from espalier.contract import Kind
from espalier.encoder import Base
from training.activations import accelerated
from training.features import collate
from training.fit import Output


@torch.no_grad()
def outputs_of(
    branch: Branch, base: Base, tap: int, features: Sequence[dict[str, Any]], batch_size: int,
    report: Callable[[int, int], None] = lambda done, total: None, with_states: bool = False,
) -> list[Output]:  # fmt: skip
    """Return logits by example, [C] or for tagging [S,C], and states if asked for, [H] or [S,H].

    A loaded branch has no dropout. `features` are those of training.features; with activations attached the trunk does
    not run. `report` is told the texts done, and all texts.
    """
    order = sorted(range(len(features)), key=lambda row: len(features[row]["input_ids"]))  # little padding
    outputs: dict[int, Output] = {}
    with accelerated(base.encoder, branch) as device:
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            batch = {name: tensor.to(device) for name, tensor in collate([features[row] for row in rows]).items()}
            hidden = batch.get("hidden")
            if hidden is None:
                hidden = base.encoder(batch["input_ids"], batch["token_type_ids"], batch["mask"], tap=tap)
            states = branch.states(hidden, batch["mask"])
            for row, logits, state in zip(rows, branch.read(states).cpu(), states.cpu(), strict=True):
                # Without its pads; a copy, since a part of a tensor keeps all of it in memory.
                real = slice(len(features[row]["input_ids"]) if branch.kind is Kind.TAGGING else None)
                outputs[row] = Output(logits[real].clone(), state[real].clone() if with_states else None)
            report(start + len(rows), len(order))
    return [outputs[row] for row in range(len(features))]

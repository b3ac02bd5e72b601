"""Heads that were never trained, each with answers of its own: what is measured does not depend on the weights."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from torch import nn

from espalier.branch import BranchCard, save_branch
from espalier.contract import Kind, Target
from espalier.encoder import Base
from espalier.spec import TableData, TaskSpec
from export.repository import export
from training.finetune import check_layers, new_branch

LABELS = ("never", "seldom", "often", "always")


def ship(
    base: Base, heads: Mapping[str, tuple[int, int]], to: Path, branches: Path, target: Target = Target.CPU
) -> None:
    """Export an untrained head per name of `heads`, which gives its tap and its seed; all have one layer.

    Raises SpecError if a tap leaves no layer of the base.
    """
    folders = []
    for task, (tap, seed) in heads.items():
        check_layers(base, tap, layers=1)
        torch.manual_seed(seed)
        branch = new_branch(base, Kind.CLASSIFICATION, tap, 1, len(LABELS))
        nn.init.normal_(branch.output.weight, std=0.3)
        spec = TaskSpec(
            name=task, kind=Kind.CLASSIFICATION, text=("text",), label="label", metric="accuracy",
            data=TableData(format="tsv", train=Path("train.tsv"), dev=Path("dev.tsv")),
        )  # fmt: skip
        card = BranchCard(
            spec=spec, labels=LABELS, base=base.name, revision=base.revision, fingerprint=base.fingerprint(tap),
            tap=tap, layers=1, folded=1, encoder=asdict(base.config), metrics={"accuracy": 0.25}, history=[],
            stopped=None, arguments={"seed": seed}, cached=False, teacher=None, inputs="untrained", versions={},
            threads=1, weights="",
        )  # fmt: skip
        save_branch(branches / task, branch, card)
        folders.append(branches / task)
    # Nothing was learned that 8-bit products could spoil, and there is no dev split to see it.
    export(folders, to, target, load=lambda name, revision: base, gate=lambda models, card, base: card.score)

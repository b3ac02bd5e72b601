"""Heads to be dropped: untrained, but each with answers of its own. What is measured does not depend on the weights."""

import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from torch import nn

from espalier.branch import BranchCard, save_branch
from espalier.configs import read_config, write_config
from espalier.contract import Kind
from espalier.encoder import Base
from espalier.spec import TableData, TaskSpec
from export.repository import export
from training.finetune import new_branch

LABELS = ("never", "seldom", "often", "always")


def ship(base: Base, heads: Mapping[str, tuple[int, int]], to: Path, branches: Path) -> None:
    """Export an untrained head per name of `heads`, which gives its tap and its seed; all have one layer."""
    folders = []
    for task, (tap, seed) in heads.items():
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
    export(folders, to, load=lambda name, revision: base)


def copy(folder: Path, repository: Path, name: str | None = None) -> Path:
    """Copy a model folder into a repository as its owner would: in place of an earlier one, file by file."""
    target = repository / (name or folder.name)
    if target.exists():
        shutil.rmtree(target)
    shutil.copytree(folder, target)
    return target


def spoil_fingerprint(folder: Path) -> None:
    """Make the head one of another trunk."""
    config = read_config(folder)
    config.parameters["fingerprint"].string_value = "f" * 64
    write_config(folder, config)


def spoil_width(folder: Path) -> None:
    """Let the head read hidden states of another size."""
    config = read_config(folder)
    config.parameters["hidden_size"].string_value = "32"
    write_config(folder, config)


def spoil_onnx(folder: Path) -> None:
    """Cut the ONNX file short."""
    model = folder / "1" / "model.onnx"
    model.write_bytes(model.read_bytes()[: model.stat().st_size // 2])


def spoil_labels(folder: Path) -> None:
    """Take the labels away."""
    (folder / "labels.txt").unlink()


def spoil_backend(folder: Path) -> None:
    """Ask for another backend, with code for it."""
    config = read_config(folder)
    config.backend = "python"
    write_config(folder, config)
    (folder / "1" / "model.py").write_text("raise SystemExit\n")


def spoil_copy(folder: Path) -> None:
    """Leave the copy half done."""
    shutil.rmtree(folder / "1")


FAULTS = {
    "wrong fingerprint": spoil_fingerprint,
    "wrong width": spoil_width,
    "truncated ONNX": spoil_onnx,
    "missing labels": spoil_labels,
    "foreign backend": spoil_backend,
    "half-copied": spoil_copy,
}

"""Heads to be dropped, and how they are spoilt."""

import shutil
from pathlib import Path

from espalier.configs import read_config, write_config


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

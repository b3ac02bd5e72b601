"""Today's way to an ONNX model: `optimum` exports a fine-tuned checkpoint and optimises it for the target."""

import time
from collections.abc import Mapping
from pathlib import Path
from statistics import median

import numpy as np

from espalier.errors import ExportError
from export.session import session

LEVELS = ("O1", "O2", "O3")
"""Optimum's levels for a CPU; O4 is FP16, for GPUs alone."""


def single_task(checkpoint: str, labels: int, to: Path) -> Path:
    """Write what fine-tuning would leave, with a random output layer; return its folder."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, logging, set_seed

    if not (to / "tokenizer.json").is_file():  # written last
        logging.set_verbosity_error()  # that the output layer is random is known
        set_seed(0)
        AutoModelForSequenceClassification.from_pretrained(checkpoint, num_labels=labels).save_pretrained(to)
        AutoTokenizer.from_pretrained(checkpoint).save_pretrained(to)
    return to


def optimized(folder: Path, level: str) -> Path:
    """Export the checkpoint in `folder` and optimise it at an optimum level; return the ONNX file, made or found."""
    from optimum.onnxruntime import ORTModelForSequenceClassification, ORTOptimizer
    from optimum.onnxruntime.configuration import AutoOptimizationConfig

    made = folder / level / "model_optimized.onnx"
    if not made.is_file():
        model = ORTModelForSequenceClassification.from_pretrained(folder, export=True)
        config = AutoOptimizationConfig.with_optimization_level(level)
        ORTOptimizer.from_pretrained(model).optimize(config, save_dir=made.parent)
    if not made.is_file():
        raise ExportError(f"optimum wrote no {made.name} to {made.parent}")
    return made


def fastest(models: Mapping[str, Path], threads: int, length: int = 32, batch: int = 8, rounds: int = 7) -> str:
    """Return the level whose model answers a batch soonest, by the median of rounds in which they take turns."""
    sessions = {level: session(path, threads) for level, path in models.items()}
    ones = np.ones((batch, length), np.int64)
    feed = {"input_ids": ones, "attention_mask": ones, "token_type_ids": np.zeros_like(ones)}
    times: dict[str, list[float]] = {level: [] for level in models}
    for _ in range(rounds):
        for level, loaded in sessions.items():
            began = time.perf_counter()
            loaded.run(None, feed)
            times[level].append(time.perf_counter() - began)
    return min(times, key=lambda level: median(times[level]))

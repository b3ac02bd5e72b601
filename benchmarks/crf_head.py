"""What a CRF adds to the time of a tagging head.

    python -m benchmarks.crf_head --base BASE --layers 2

Both heads have the same layers and 72 labels (35 types of slots and O, as many as SNIPS has), random weights, and get
the same random tokens, 30 a text. They run in turn, in one process, on one thread, as a served head does.
"""

import time
from statistics import median
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import onnxruntime
import torch
import typer

from espalier.branch import Branch
from espalier.contract import Kind, Target
from espalier.crf import CRF
from espalier.encoder import load_base
from export.models import head_model
from export.viterbi import word_table

LABELS = ("O", "B-single", *(f"{prefix}-{number}" for number in range(35) for prefix in "BI"))
TOKENS = 30
ROUNDS = 200


def feeds(items: int, size: int, vocabulary: int) -> dict[str, npt.NDArray[Any]]:
    """Return the inputs of a head for `items` texts of TOKENS random tokens."""
    rng = np.random.default_rng(0)
    return {
        "hidden": rng.standard_normal(items * TOKENS * size, np.float32),
        "input_ids": rng.integers(vocabulary, size=items * TOKENS),
        "length": np.full((items, 1), TOKENS, np.int32),
        "shape": np.tile(np.array([TOKENS, size], np.int32), (items, 1)),
    }


def main(
    base: Annotated[str, typer.Option(help="As in espalier train.")],
    layers: Annotated[int, typer.Option(help="Layers of both heads.")] = 2,
) -> None:
    """Measure and print milliseconds, medians, for one text and for eight."""
    loaded = load_base(base)
    config = loaded.config
    words = word_table(loaded.tokenizer, config.vocab_size)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    torch.manual_seed(0)
    sessions = {}
    for name, crf in (("softmax", None), ("crf", CRF(LABELS))):
        branch = Branch(config, Kind.TAGGING, layers, len(LABELS), crf).eval()
        sessions[name] = onnxruntime.InferenceSession(head_model(branch, name, Target.CPU, words), options)
    for items in (1, 8):
        given = feeds(items, config.hidden_size, config.vocab_size)
        times: dict[str, list[float]] = {name: [] for name in sessions}
        for _ in range(ROUNDS):
            for name, session in sessions.items():
                feed = {tensor.name: given[tensor.name] for tensor in session.get_inputs()}
                begin = time.perf_counter()
                session.run(None, feed)
                times[name].append(1000 * (time.perf_counter() - begin))
        softmax, with_crf = (median(times[name]) for name in ("softmax", "crf"))
        print(f"{items} x {TOKENS} tokens: softmax {softmax:.2f} ms, crf {with_crf:.2f} ms, x {with_crf / softmax:.2f}")


if __name__ == "__main__":
    typer.run(main)

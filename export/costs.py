"""Milliseconds per text of exported models, in one process, on the CPU at hand.

Untrained branches serve: time does not depend on the weights. The models take turns, so that a slow moment of the
machine falls on all of them, and the median of the rounds is taken.
"""

import time
from collections.abc import Callable, Iterable
from statistics import fmean, median

import numpy as np
import onnxruntime

from espalier.branch import Branch
from espalier.contract import BELOW, Kind, Target
from espalier.costs import Costs, HeadShape
from espalier.crf import CRF
from espalier.encoder import Base
from espalier.texts import mixed_lengths
from export.check import Batch, feed, ragged_batch
from export.models import head_model, segment_model
from export.session import session
from export.viterbi import word_table

BATCH = 8
BATCHES = 4
ROUNDS = 15
PLAIN = HeadShape(Kind.CLASSIFICATION, layers=1, folded=1, outputs=2)

Model = HeadShape | int | None
"""A head, a trunk up to a tap, or one layer alone (None)."""


def measure(
    base: Base,
    taps: Iterable[int],
    heads: Iterable[HeadShape],
    report: Callable[[int, int], None] = lambda done, total: None,
) -> Costs:
    """Time trunks up to `taps` and heads on ragged batches of mixed lengths.

    `report` is told the rounds done, and all rounds.
    """
    encoder, config = base.encoder, base.config
    rng = np.random.default_rng(0)
    lengths = mixed_lengths(rng, BATCHES * BATCH, config.max_position_embeddings).reshape(BATCHES, BATCH)
    batches = [
        ragged_batch(rng, [[int(length)] for length in row], config.vocab_size, config.type_vocab_size)
        for row in lengths
    ]
    hidden = [rng.normal(size=int(row.sum()) * config.hidden_size).astype(np.float32) for row in lengths]

    sessions: dict[Model, onnxruntime.InferenceSession] = {None: session(segment_model(encoder, 1, 2, Target.CPU))}
    for tap in sorted(set(taps)):
        sessions[tap] = session(segment_model(encoder, 0, tap, Target.CPU))
    for head in sorted({*heads, PLAIN}):
        crf = CRF(head.crf) if head.crf else None
        branch = Branch(config, head.kind, head.layers, head.outputs, crf, head.folded)
        words = word_table(base.tokenizer, config.vocab_size) if head.crf else None
        sessions[head] = session(head_model(branch, "task", Target.CPU, words))

    times: dict[Model, list[float]] = {model: [] for model in sessions}
    for number in range(-1, ROUNDS):  # the first round warms up
        for model, loaded in sessions.items():
            started = time.perf_counter()
            for batch, states in zip(batches, hidden, strict=True):
                loaded.run(None, _inputs(model, batch, states))
            if number >= 0:
                times[model].append(1000 * (time.perf_counter() - started) / (BATCH * BATCHES))
        report(number + 2, ROUNDS + 1)
    taken = {model: median(values) for model, values in times.items()}
    return Costs(
        trunk={model: value for model, value in taken.items() if isinstance(model, int)},
        heads={model: value for model, value in taken.items() if isinstance(model, HeadShape)},
        folded=taken[PLAIN] / taken[None],
        mean_length=fmean(lengths.ravel().tolist()),
        batch=BATCH,
    )


def _inputs(
    model: Model, batch: Batch, hidden: "np.typing.NDArray[np.float32]"
) -> "dict[str, np.typing.NDArray[np.generic]]":
    if isinstance(model, int):
        return feed(batch, {"input_ids": batch.flat_ids, "token_type_ids": batch.flat_types}, item_dims=1)
    inputs = {BELOW if model is None else "hidden": hidden}
    if model is not None and model.crf:
        inputs["input_ids"] = batch.flat_ids
    return feed(batch, inputs, item_dims=2)

"""Is the exported graph the model? Every ONNX file is run against plain PyTorch on random ragged batches."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from espalier.branch import Branch
from espalier.contract import BELOW, Kind, Target
from espalier.crf import CRF
from espalier.encoder import Encoder
from espalier.errors import ExportError
from export.session import session
from export.viterbi import Words

Array = npt.NDArray[Any]

TOLERANCE = {Target.CPU: 1e-4, Target.INT8: 0.25, Target.GPU: 2e-2}
"""Largest allowed difference from PyTorch in FP32, of hidden states and answers. FP16 has a step of 4e-3 at 4 to 8.

With 8-bit products the root mean square of the differences counts, relative to that of the values: about 0.02 after one
layer and 0.1 after six. Whether that is good enough, the dev metric tells (export.gate).
"""


@dataclass(frozen=True)
class Batch:
    """A ragged batch as Triton makes it of several requests, and the same items padded for PyTorch."""

    flat_ids: Array  # [P] the requests' input_ids, flattened and concatenated
    flat_types: Array  # [P]
    widths: Array  # [B] row length of each item in its request
    lengths: Array  # [B] real tokens
    input_ids: Tensor  # [B,S]
    token_type_ids: Tensor  # [B,S]
    mask: Tensor  # [B,S]

    def flatten(self, padded: Tensor) -> Array:
        """Return padded [B,S,·] as the flat rows [P,·] of the requests; rows of pads are 7, which must not matter."""
        rows = []
        for item, width, length in zip(padded.numpy(), self.widths, self.lengths, strict=True):
            row = np.full((width, item.shape[-1]), 7.0, dtype=item.dtype)
            row[:length] = item[:length]
            rows.append(row)
        return np.concatenate(rows)


def random_batches(vocabulary: int, types: int, max_length: int, seed: int = 0) -> Iterator[Batch]:
    """Yield ragged batches: one short item; one of the maximum length; requests of one and of several items."""
    rng = np.random.default_rng(seed)
    longest = min(48, max_length)
    several = [list(rng.integers(2, longest, size=count)) for count in (1, 3, 1, 2, 1, 4)]
    for requests in ([[2]], [[max_length]], several):
        yield ragged_batch(rng, requests, vocabulary, types)


def ragged_batch(rng: np.random.Generator, requests: Sequence[Sequence[int]], vocabulary: int, types: int) -> Batch:
    """Return a batch of random tokens; `requests` are the lengths of the items of each request."""
    lengths = np.array([length for request in requests for length in request])
    widths = np.array([max(request) for request in requests for _ in request])
    size = lengths.max()
    ids = rng.integers(0, vocabulary, size=(len(lengths), size))
    kinds = rng.integers(0, types, size=(len(lengths), size))
    mask = np.arange(size) < lengths[:, None]
    pad = [np.arange(width) < length for width, length in zip(widths, lengths, strict=True)]

    def flat(values: Array) -> Array:
        rows = zip(values, pad, widths, strict=True)
        return np.concatenate([np.where(real, row[:width], 0) for row, real, width in rows])

    return Batch(
        flat(ids), flat(kinds), widths, lengths,
        torch.from_numpy(ids), torch.from_numpy(kinds), torch.from_numpy(mask),
    )  # fmt: skip


def feed(batch: Batch, inputs: dict[str, Array], item_dims: int) -> dict[str, Array]:
    """Add to a model's own inputs what Triton adds: lengths, and the shapes of items of `item_dims` dimensions."""
    shape = np.stack([batch.widths, np.full_like(batch.widths, 7)], axis=1)[:, :item_dims]
    return {**inputs, "length": batch.lengths[:, None].astype(np.int32), "shape": shape.astype(np.int32)}


def _run(model: bytes, batch: Batch, inputs: dict[str, Array], item_dims: int) -> Array:
    output: Array = session(model).run(None, feed(batch, inputs, item_dims))[0]
    return output


def _difference(batch: Batch, got: Array, want: Tensor, per_token: bool, target: Target) -> float:
    if per_token:
        reference = batch.flatten(want)
        real = np.concatenate([np.arange(w) < n for w, n in zip(batch.widths, batch.lengths, strict=True)])
        if np.any(got[~real]):
            return float("inf")  # pads must come out as zero
        got, reference = got[real], reference[real]
    else:
        reference = want.numpy()
    difference = np.abs(got.astype(np.float32) - reference)
    if target is Target.INT8:
        return float(np.sqrt(np.square(difference).mean() / np.square(reference).mean()))
    return float(difference.max(initial=0.0))


def _path_difference(batch: Batch, got: Array, emissions: Tensor, crf: CRF, words: Tensor) -> float:
    tokens = np.split(got, np.cumsum(batch.widths)[:-1])  # [width,2] by item
    if any(np.any(item[length:]) for item, length in zip(tokens, batch.lengths, strict=True)):
        return float("inf")  # pads must come out as zero
    items = [torch.from_numpy(item[:length]) for item, length in zip(tokens, batch.lengths, strict=True)]
    path = torch.nn.utils.rnn.pad_sequence(items, batch_first=True)  # [B,S,2]
    tags = path[..., 0].long()
    if torch.any(((tags >= 0) != words) & batch.mask) or torch.any(tags >= emissions.shape[2]):
        return float("inf")
    chance, count = crf.log_likelihood(emissions, words, tags), words.sum(1).clamp(min=1)  # [B]
    _, best = crf.viterbi(emissions, words)
    told = ((path[..., 1] - chance[:, None]) * batch.mask).abs().amax(1)
    missed = (best - crf.path_score(emissions, words, tags)).abs()
    return float((torch.maximum(told, missed) / count).max())


@torch.no_grad()
def compare_segment(model: bytes, name: str, encoder: Encoder, start: int, stop: int, target: Target) -> float:
    """Compare a trunk segment with the encoder; return the largest difference, raise ExportError if it is too large."""
    worst = 0.0
    config = encoder.config
    for batch in random_batches(config.vocab_size, config.type_vocab_size, config.max_position_embeddings):
        below = encoder(batch.input_ids, batch.token_type_ids, batch.mask, tap=start)
        above = below
        for layer in encoder.layers[start:stop]:
            above = layer(above, batch.mask)
        if start == 0:
            got = _run(model, batch, {"input_ids": batch.flat_ids, "token_type_ids": batch.flat_types}, item_dims=1)
        else:
            got = _run(model, batch, {BELOW: _hidden(batch, below, target)}, item_dims=2)
        worst = _larger(worst, _difference(batch, got, above, True, target))
    return _judge(name, worst, TOLERANCE[target])


@torch.no_grad()
def compare_head(
    model: bytes, name: str, encoder: Encoder, branch: Branch, tap: int, target: Target, words: Words | None = None
) -> float:
    """Compare a head with its branch on hidden states of the trunk; as `compare_segment`.

    Of a CRF's path its log-probability is compared, and how much less the path scores in PyTorch than the best one,
    both per word: where paths are nearly as good as one another either may be chosen.
    """
    worst = 0.0
    config = encoder.config
    for batch in random_batches(config.vocab_size, config.type_vocab_size, config.max_position_embeddings):
        hidden = encoder(batch.input_ids, batch.token_type_ids, batch.mask, tap=tap)
        inputs = {"hidden": _hidden(batch, hidden, target)}
        if branch.crf is not None:
            assert words is not None
            got = _run(model, batch, {**inputs, "input_ids": batch.flat_ids}, item_dims=2)
            begins = torch.from_numpy(words)[batch.input_ids] & batch.mask
            worst = _larger(worst, _path_difference(batch, got, branch(hidden, batch.mask), branch.crf, begins))
            continue
        got = _run(model, batch, inputs, item_dims=2)
        want = branch.answer(hidden, batch.mask)
        worst = _larger(worst, _difference(batch, got, want, branch.kind is Kind.TAGGING, target))
    return _judge(name, worst, TOLERANCE[target])


def _hidden(batch: Batch, padded: Tensor, target: Target) -> Array:
    return batch.flatten(padded).ravel().astype(np.float16 if target is Target.GPU else np.float32)


def _larger(one: float, other: float) -> float:
    """Return the larger of two differences; NaN is larger than any."""
    return float(np.maximum(one, other))


def _judge(name: str, worst: float, tolerance: float) -> float:
    if not worst <= tolerance:  # also refuses NaN
        raise ExportError(
            f"{name}: the exported graph differs from PyTorch by {worst:.1e}, more than {tolerance:.0e}; "
            "nothing was written for it"
        )
    return worst

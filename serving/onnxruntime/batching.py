"""Requests → one batch for ONNX Runtime → requests again.

The same as BackendInputCollector and BackendOutputResponder of triton-inference-server/backend do for the C++
backend; where those read past the end of a buffer or drop rows without a word, this module raises RequestError.
Nothing here knows Triton: a request is a mapping from input name to array, in the order of the config's inputs.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import numpy as np
import numpy.typing as npt

from espalier.errors import RequestError

Array = npt.NDArray[Any]
Request = Mapping[str, Array]


class Kind(StrEnum):
    """How a batch input is made from the shapes of its source; R requests, n items in all, rank r without batch."""

    BATCH_ELEMENT_COUNT = "BATCH_ELEMENT_COUNT"  # [R], elements of each request
    BATCH_ACCUMULATED_ELEMENT_COUNT = "BATCH_ACCUMULATED_ELEMENT_COUNT"  # [R], running sum of them
    BATCH_ACCUMULATED_ELEMENT_COUNT_WITH_ZERO = "BATCH_ACCUMULATED_ELEMENT_COUNT_WITH_ZERO"  # [R+1], starting at 0
    BATCH_MAX_ELEMENT_COUNT_AS_SHAPE = "BATCH_MAX_ELEMENT_COUNT_AS_SHAPE"  # [most elements]; the values say nothing
    BATCH_ITEM_SHAPE = "BATCH_ITEM_SHAPE"  # [n, r], the shape of each item
    BATCH_ITEM_SHAPE_FLATTEN = "BATCH_ITEM_SHAPE_FLATTEN"  # [n·r]


@dataclass(frozen=True)
class BatchInput:
    """An input that is made from the shapes of another; it goes to every name in `targets`."""

    kind: Kind
    targets: tuple[str, ...]
    source: str
    dtype: npt.DTypeLike


@dataclass(frozen=True)
class Scatter:
    """An output that is cut by the shapes of an input: -1 in `shape` stands for the input's dimension there."""

    source: str
    shape: tuple[int, ...]  # with the batch dimension


@dataclass(frozen=True)
class Layout:
    """What a config says about putting requests together and taking answers apart."""

    batching: bool  # the first dimension of every tensor counts items
    ragged: frozenset[str] = frozenset()
    batch_inputs: tuple[BatchInput, ...] = ()
    scatters: Mapping[str, Scatter] = field(default_factory=dict)
    scalar_inputs: frozenset[str] = frozenset()  # of rank 0 in the ONNX graph
    scalar_outputs: Mapping[str, tuple[int, ...]] = field(default_factory=dict)  # with the shape that the config gives


def gather(layout: Layout, requests: Sequence[Request]) -> dict[str, Array]:
    """Return the feeds of one run for `requests`. A single request is passed on as it is, without a copy."""
    feeds: dict[str, Array] = {}
    for name in requests[0]:
        parts = [request[name] for request in requests]
        if name in layout.ragged:
            parts = [part.reshape(-1) for part in parts]
        elif name in layout.scalar_inputs:
            parts = [part.reshape(()) for part in parts]
        feeds[name] = parts[0] if len(parts) == 1 else np.concatenate(parts)
    for batch_input in layout.batch_inputs:
        made = _batch_input(batch_input, [request[batch_input.source].shape for request in requests])
        for target in batch_input.targets:
            feeds[target] = made
    return feeds


def _batch_input(batch_input: BatchInput, shapes: Sequence[tuple[int, ...]]) -> Array:
    dtype = batch_input.dtype
    counts = [math.prod(shape) for shape in shapes]
    match batch_input.kind:
        case Kind.BATCH_ELEMENT_COUNT:
            return np.array(counts, dtype)
        case Kind.BATCH_ACCUMULATED_ELEMENT_COUNT:
            return np.cumsum(counts).astype(dtype)
        case Kind.BATCH_ACCUMULATED_ELEMENT_COUNT_WITH_ZERO:
            return np.cumsum([0, *counts]).astype(dtype)
        case Kind.BATCH_MAX_ELEMENT_COUNT_AS_SHAPE:
            return np.zeros(max(counts), dtype)
        case Kind.BATCH_ITEM_SHAPE | Kind.BATCH_ITEM_SHAPE_FLATTEN:
            rows = np.array([shape[1:] for shape in shapes], dtype)  # [R, r]
            items: Array = rows.repeat([shape[0] for shape in shapes], axis=0)  # [n, r]
            return items if batch_input.kind is Kind.BATCH_ITEM_SHAPE else items.reshape(-1)


def scatter(layout: Layout, outputs: Mapping[str, Array], requests: Sequence[Request]) -> list[dict[str, Array]]:
    """Return the part of each output that belongs to each request, as views.

    Raises RequestError if an output has another size than the requests need: whose part is missing cannot be told.
    """
    answers: list[dict[str, Array]] = [{} for _ in requests]
    for name, output in outputs.items():
        if name in layout.scatters:
            parts = _cut(name, layout.scatters[name], output, requests)
        elif layout.batching:
            parts = _rows(name, output, requests)
        elif name in layout.scalar_outputs:
            parts = [output.reshape(layout.scalar_outputs[name])]
        else:
            parts = [output]
        for answer, part in zip(answers, parts, strict=True):
            answer[name] = part
    return answers


def _rows(name: str, output: Array, requests: Sequence[Request]) -> list[Array]:
    sizes = [next(iter(request.values())).shape[0] for request in requests]
    if output.ndim == 0 or output.shape[0] != sum(sizes):
        raise RequestError(
            f"output {name!r} of shape {list(output.shape)} cannot be split: the batch has {sum(sizes)} items"
        )
    return _parts(output, sizes)


def _cut(name: str, cut: Scatter, output: Array, requests: Sequence[Request]) -> list[Array]:
    shapes = []
    for request in requests:
        source = request[cut.source].shape
        shapes.append(tuple(source[i] if size == -1 else size for i, size in enumerate(cut.shape)))
    counts = [math.prod(shape) for shape in shapes]
    if output.size != sum(counts):
        raise RequestError(
            f"output {name!r} has {output.size} elements, but the shapes of input {cut.source!r} ask for {sum(counts)}"
        )
    parts = _parts(output.reshape(-1), counts)
    return [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]


def _parts(array: Array, sizes: Sequence[int]) -> list[Array]:
    """Cut `array` along its first dimension, like np.split, which takes more than twice as long."""
    bounds = itertools.pairwise(itertools.accumulate(sizes, initial=0))
    return [array[start:stop] for start, stop in bounds]

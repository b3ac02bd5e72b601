"""The two kinds of ONNX model that export writes: a segment of the trunk, and the head of one task."""

from typing import Any

import numpy as np

from espalier.branch import Branch
from espalier.contract import BELOW, Kind, Target
from espalier.encoder import Encoder
from export.graph import FLOAT, INT64, Graph
from export.layers import folded_layer, packed_layer
from export.ragged import Layout, declare, scatter
from export.viterbi import Words, best_path

GRIDS = {Target.CPU: 3, Target.INT8: 2, Target.GPU: 1}
"""Grids of attention: each saves computing for pads and costs launches of operators, which a text alone feels.

With 8-bit products a text alone takes 1.03 times as long with two grids and 1.09 times with three; in FP32 it feels
neither (docs/speed.md). Not measured on a GPU, where a launch costs most.
"""


def precision(target: Target) -> type[np.floating[Any]]:
    """Type of hidden states, and of weights that are not quantized, for `target`."""
    return np.float16 if target is Target.GPU else np.float32


def segment_model(encoder: Encoder, start: int, stop: int, target: Target) -> bytes:
    """Return the ONNX of trunk layers [start, stop), with the embeddings if `start` is 0.

    Inputs: `input_ids` and `token_type_ids` [P], or `hidden_below` [P·H]; `length` [B,1]; `shape` [B,1] or [B,2].
    Output: `hidden` [P,H], zero at pads.
    """
    graph = Graph(f"trunk_{start}_{stop}", precision(target), int8=target is Target.INT8)
    size = encoder.config.hidden_size
    if start == 0:
        ids = graph.input("input_ids", INT64, ["tokens"])
        types = graph.input("token_type_ids", INT64, ["tokens"])
        layout = declare(graph, item_dims=1, grids=GRIDS[target])
        rows = ids
        hidden = _embed(graph, encoder, ids, types, layout)  # [T,H]
    else:
        layout = declare(graph, item_dims=2, grids=GRIDS[target])
        rows = _rows(graph, BELOW, size)
        hidden = graph.op("Gather", rows, layout.source, axis=0)  # [T,H]
    for index in range(start, stop):
        hidden = packed_layer(graph, f"layers.{index}", encoder.layers[index], hidden, layout)  # type: ignore[arg-type]
    output = scatter(graph, layout, hidden, rows, size, zero=graph.number(0.0))
    graph.output("hidden", output, graph.float_type, ["tokens", size])
    return graph.serialize()


def head_model(branch: Branch, task: str, target: Target, words: Words | None = None) -> bytes:
    """Return the ONNX of a branch. The top layers of a sentence head are folded; a tagging head has none.

    Inputs: `hidden` [P·H], `length` [B,1], `shape` [B,2]. Output, always FP32: `probabilities` [B,C], `value` [B,1],
    or for tagging `probabilities` [P,C]. With a CRF there is one more input, `input_ids` [P], and the output is `path`
    [P,2]; it needs `words`, the tokens that begin one (see export.viterbi).
    """
    graph = Graph(f"head_{task}", precision(target), int8=target is Target.INT8)
    layout = declare(graph, item_dims=2, grids=GRIDS[target])
    rows = _rows(graph, "hidden", branch.config.hidden_size)  # [P,H]
    layers: list[Any] = list(branch.layers)
    tagging = branch.kind is Kind.TAGGING
    full, folded = layers[: len(layers) - branch.folded], layers[len(layers) - branch.folded :]
    hidden, starts = rows, layout.starts
    if full or tagging:
        hidden, starts = graph.op("Gather", rows, layout.source, axis=0), layout.packed_starts  # [T,H]
    for index, layer in enumerate(full):
        hidden = packed_layer(graph, f"layers.{index}", layer, hidden, layout)
    if not tagging:
        first = None
        for index, layer in enumerate(folded, start=len(full)):
            first = folded_layer(graph, f"layers.{index}", layer, hidden, starts, layout, first)  # [B,H]
        hidden = first or graph.op("Gather", hidden, starts, axis=0)
    if branch.crf is not None:
        assert words is not None
        ids = graph.input("input_ids", INT64, ["tokens"])
        answer, name, width = best_path(graph, branch.crf, branch.output, words, hidden, ids, layout), "path", 2
    else:
        answer, name = graph.cast(graph.exact_linear("output", hidden, branch.output), FLOAT), "value"
        width = branch.output.out_features
        if branch.kind is not Kind.REGRESSION:
            answer, name = graph.op("Softmax", answer, axis=-1), "probabilities"
    if tagging:
        answer = scatter(graph, layout, answer, rows, width, zero=graph.cast(graph.number(0.0), FLOAT))
    graph.output(name, answer, FLOAT, ["tokens" if tagging else "items", width])
    return graph.serialize()


def _rows(graph: Graph, name: str, size: int) -> str:
    """Declare the flat input `name` [P·H] and return it as [P,H]."""
    flat = graph.input(name, graph.float_type, ["values"])
    return graph.op("Reshape", flat, graph.ints(-1, size))


def _embed(graph: Graph, encoder: Encoder, ids: str, types: str, layout: Layout) -> str:
    """Add the embeddings of the packed tokens [T,H]."""
    g, embeddings = graph, encoder.embeddings

    def look_up(name: str, indices: str) -> str:
        table = g.weight(f"embeddings.{name}", getattr(embeddings, name).weight)
        return g.op("Gather", table, indices, axis=0)

    words = look_up("word", g.op("Gather", ids, layout.source, axis=0))
    sentences = look_up("token_type", g.op("Gather", types, layout.source, axis=0))
    total = g.op("Add", g.op("Add", words, look_up("position", layout.position)), sentences)
    return g.layer_norm("embeddings.norm", total, embeddings.norm)

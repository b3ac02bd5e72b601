"""Encoder layers as ONNX: packed (every real token) and folded (the [CLS] token alone).

Letters as in `espalier.encoder` and `export.ragged`: B items, T packed tokens, S longest length, H hidden size,
A attention heads of width d.
"""

from functools import partial

from torch import Tensor

from espalier.encoder import Layer
from export.graph import Graph
from export.ragged import Grid, Layout


def packed_layer(graph: Graph, name: str, layer: Layer, hidden: str, layout: Layout) -> str:
    """Add a layer over packed tokens [T,H] → [T,H]; only attention un-packs into the grid [B,S,·] and re-packs."""
    g = graph
    size, heads = layer.query.in_features, layer.heads
    width = size // heads

    scale = width**-0.5  # into the query's weights: one multiplication less per token
    query = g.affine(f"{name}.query", hidden, layer.query.weight.T * scale, layer.query.bias * scale)
    key = g.linear(f"{name}.key", hidden, layer.key)
    value = g.linear(f"{name}.value", hidden, layer.value)

    def attend(grid: Grid) -> str:
        cells = grid.cells(g, layout.packed_starts)  # [B',S']

        def split(x: str, order: list[int]) -> str:
            cut = g.op("Reshape", g.op("Gather", x, cells, axis=0), g.ints(0, 0, heads, width))  # [B',S',A,d]
            return g.op("Transpose", cut, perm=order)

        scores = g.op("MatMul", split(query, [0, 2, 1, 3]), split(key, [0, 2, 3, 1]))  # [B',A,S',S']
        scores = g.op("Add", scores, g.op("Unsqueeze", grid.mask, g.ints(1)))
        attended = g.op("MatMul", g.op("Softmax", scores, axis=-1), split(value, [0, 2, 1, 3]))  # [B',A,S',d]
        return g.op("Reshape", g.op("Transpose", attended, perm=[0, 2, 1, 3]), g.ints(-1, size))  # [B'·S',H]

    rows = g.op("Concat", *map(attend, layout.grids), axis=0)
    return _finish(g, name, layer, hidden, g.op("Gather", rows, layout.flat, axis=0))


def folded_layer(
    graph: Graph, name: str, layer: Layer, hidden: str, starts: str, layout: Layout, first: str | None = None
) -> str:
    """Add a layer of which only the first token of each item is wanted: rows [·,H] → [B,H].

    `starts` [B] are the rows of `hidden` at which the items begin; `first` [B,H] takes the place of those rows, if they
    have gone through a folded layer already. Attention is re-associated: with q the query of
    [CLS], q·Kᵀ = (q·Wk)·xᵀ and p·V = (p·x)·Wvᵀ + bv (the p sum to 1), so keys and values are never formed per token;
    the key's bias drops out, since softmax ignores a constant. Exact, at 2AH instead of 12H² multiply-adds a token.

    The products that follow are formed such that nothing but the number of rows depends on the batch: by attention head
    with constant matrices, which ONNX Runtime packs when it loads them, and scores as x·q'ᵀ. On a CPU each row is then
    summed in one order, so that an answer is the same to the last bit whatever else is in its batch.
    """
    g = graph
    size, heads = layer.query.in_features, layer.heads
    width = size // heads

    def by_head(x: str, part: str, weights: Tensor) -> str:
        """Multiply each attention head's columns of `x` with its own matrix, `weights` [A,·,·]."""
        columns = g.ops("Split", heads, x, axis=1)
        matrices = [g.weight(f"{name}.{part}.{index}.weight", weight) for index, weight in enumerate(weights)]
        return g.op("Concat", *map(partial(g.op, "MatMul"), columns, matrices), axis=1)

    below = first
    first = first or g.op("Gather", hidden, starts, axis=0)  # [B,H]
    scale = width**-0.5
    query = g.affine(f"{name}.query", first, layer.query.weight.T * scale, layer.query.bias * scale)  # [B,H]
    key = layer.key.weight.view(heads, width, size)  # [A,d,H]
    probe = g.op("Reshape", by_head(query, "key", key), g.ints(-1, heads, size))  # [B,A,H]

    def attend(grid: Grid) -> str:
        tokens = g.op("Gather", hidden, grid.cells(g, starts), axis=0)  # [B',S',H]
        if below is not None:
            others = g.op("Slice", tokens, g.ints(1), g.ints(2**31 - 1), g.ints(1))  # [B',S'-1,H]
            own = g.op("Gather", below, grid.items, axis=0)
            tokens = g.op("Concat", g.op("Unsqueeze", own, g.ints(1)), others, axis=1)
        probes = g.op("Transpose", g.op("Gather", probe, grid.items, axis=0), perm=[0, 2, 1])  # [B',H,A]
        scores = g.op("Transpose", g.op("MatMul", tokens, probes), perm=[0, 2, 1])  # [B',A,S']
        return g.op("MatMul", g.op("Softmax", g.op("Add", scores, grid.mask), axis=-1), tokens)  # [B',A,H]

    mixed = g.op("Gather", g.op("Concat", *map(attend, layout.grids), axis=0), layout.order, axis=0)  # [B,A,H]
    value = layer.value.weight.view(heads, width, size).transpose(1, 2)  # [A,H,d]
    attended = by_head(g.op("Reshape", mixed, g.ints(-1, heads * size)), "value", value)  # [B,H]
    attended = g.op("Add", attended, g.weight(f"{name}.value.bias", layer.value.bias))
    return _finish(g, name, layer, first, attended)


def _finish(graph: Graph, name: str, layer: Layer, hidden: str, attended: str) -> str:
    """Add what follows attention, on any rows: output projection, residual, feed-forward, both LayerNorms."""
    g = graph
    projected = g.linear(f"{name}.output", attended, layer.output)
    hidden = g.layer_norm(f"{name}.attention_norm", g.op("Add", hidden, projected), layer.attention_norm)
    expanded = g.gelu(g.linear(f"{name}.up", hidden, layer.up), layer.approximate)
    down = g.linear(f"{name}.down", expanded, layer.down)
    return g.layer_norm(f"{name}.feed_forward_norm", g.op("Add", hidden, down), layer.feed_forward_norm)

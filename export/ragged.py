"""Where the tokens of a ragged batch lie: in the flat input, packed, and in the grid that attention needs.

Triton concatenates the flattened tensors of all requests (ragged batching). A request of several texts is padded to
its own longest, so an item has a width (its row in the flat input) and a length (its real tokens). Everything but
attention runs on the packed real tokens.

Sizes: B items of the whole batch, T real tokens, P tokens of the flat input (T and pads), S longest length.
"""

from dataclasses import dataclass

from export.graph import INT32, INT64, Graph


@dataclass(frozen=True)
class Layout:
    """Names of index tensors in a graph."""

    starts: str  # [B] position of each item's first token in the flat input
    packed_starts: str  # [B] the same among the packed tokens
    valid: str  # [B,S] whether the item has such a token
    steps: str  # [S] 0, 1, …
    item: str  # [T] index of each packed token's item
    source: str  # [T] position of each packed token in the flat input
    position: str  # [T] position of each packed token in its item
    flat: str  # [T] position of each packed token in the flattened grid [B·S]
    mask: str  # [B,1,S] 0 for a token, a large negative number for none


def declare(graph: Graph, item_dims: int) -> Layout:
    """Add the inputs `length` [B,1] and `shape` [B,`item_dims`], and the index tensors made of them."""
    g = graph
    length = g.input("length", INT32, ["items", 1])
    shape = g.input("shape", INT32, ["items", item_dims])
    lengths = g.cast(g.op("Reshape", length, g.ints(-1)), INT64)  # [B]
    widths = g.cast(g.op("Gather", shape, g.integer(0), axis=1), INT64)  # [B]
    longest = g.op("ReduceMax", lengths, keepdims=0)
    steps = g.op("Range", g.integer(0), longest, g.integer(1))  # [S]
    valid = g.op("Less", g.op("Unsqueeze", steps, g.ints(0)), g.op("Unsqueeze", lengths, g.ints(1)))  # [B,S]
    where = g.op("NonZero", valid)  # [2,T]
    item, position = (g.op("Gather", where, g.integer(row), axis=0) for row in (0, 1))  # [T]
    starts = g.op("CumSum", widths, g.integer(0), exclusive=1)
    blocked = g.cast(g.op("Not", valid), g.float_type)
    # -1e4 also fits FP16, and the softmax of it is 0 in either precision
    mask = g.op("Unsqueeze", g.op("Mul", blocked, g.number(-1e4)), g.ints(1))
    return Layout(
        starts=starts,
        packed_starts=g.op("CumSum", lengths, g.integer(0), exclusive=1),
        valid=valid,
        steps=steps,
        item=item,
        source=g.op("Add", g.op("Gather", starts, item), position),
        position=position,
        flat=g.op("Add", g.op("Mul", item, longest), position),
        mask=mask,
    )


def grid(graph: Graph, layout: Layout, starts: str) -> str:
    """Return [B,S]: for each place of the grid the row of its token when items begin at `starts`, else row 0."""
    g = graph
    rows = g.op("Add", g.op("Unsqueeze", starts, g.ints(1)), layout.steps)  # [B,S]
    return g.op("Where", layout.valid, rows, g.integer(0))


def scatter(graph: Graph, layout: Layout, packed: str, flat_input: str, width: int, zero: str) -> str:
    """Put packed rows [T,width] back where their tokens lie in `flat_input` [P·…]; pads become `zero`. Gives [P,width].

    `flat_input` has one row per token of the flat input; only its first dimension counts.
    """
    g = graph
    tokens = g.op("Gather", g.op("Shape", flat_input), g.ints(0), axis=0)  # [1]
    shape = g.op("Concat", tokens, g.ints(width), axis=0)
    zeros = g.op("Expand", zero, shape)  # [P,width]
    return g.op("ScatterND", zeros, g.op("Unsqueeze", layout.source, g.ints(1)), packed)

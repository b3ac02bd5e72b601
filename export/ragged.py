"""Where the tokens of a ragged batch lie: in the flat input, packed, and in the grids that attention needs.

Triton concatenates the flattened tensors of all requests (ragged batching). A request of several texts is padded to
its own longest, so an item has a width (its row in the flat input) and a length (its real tokens). Everything but
attention runs on the packed real tokens.

Sizes: B items of the whole batch, T real tokens, P tokens of the flat input (T and pads), S longest length.
"""

from dataclasses import dataclass

from export.graph import INT32, INT64, Graph

_BLOCKED = -60.0
"""Added to the score of a place without a token, where the item's last token is seen once more (see Grid.places).

Its softmax is then at most e⁻⁶⁰ of the largest, which no sum in FP32 feels, and 0 in FP16. Far below that it would cost
time: where it should give less than e⁻⁸⁷ ONNX Runtime's softmax gives denormals, never 0, and a processor takes many
times as long for each (docs/speed.md).
"""


@dataclass(frozen=True)
class Grid:
    """Some of the items, maybe none, each padded to the longest of them: B' items, S' places."""

    items: str  # [B'] their indices
    valid: str  # [B',S'] whether the item has such a token
    places: str  # [B',S'] 0, 1, … up to the item's last token, which is repeated
    mask: str  # [B',1,S'] 0 for a token, _BLOCKED for none

    def cells(self, graph: Graph, starts: str) -> str:
        """Return [B',S']: for each place the row of its token, or of the last one, if items begin at `starts` [B]."""
        own = graph.op("Unsqueeze", graph.op("Gather", starts, self.items), graph.ints(1))
        return graph.op("Add", own, self.places)


@dataclass(frozen=True)
class Layout:
    """Names of index tensors in a graph, and the grids in which attention sees the items, each item in one of them."""

    starts: str  # [B] position of each item's first token in the flat input
    packed_starts: str  # [B] the same among the packed tokens
    item: str  # [T] index of each packed token's item
    source: str  # [T] position of each packed token in the flat input
    position: str  # [T] position of each packed token in its item
    whole: Grid  # all items
    grids: tuple[Grid, ...]
    order: str  # [B] position of each item among those of all grids
    flat: str  # [T] position of each packed token among the places of all grids


def declare(graph: Graph, item_dims: int, grids: int) -> Layout:
    """Add the inputs `length` [B,1] and `shape` [B,`item_dims`], and the index tensors made of them.

    Of the `grids`, the first has the items longer than a half of the longest one, the next the rest of those longer
    than a quarter, and so on: in these an item fills more than a half of its places. The last grid has what is left,
    all items if it is the only one, and is as wide as the longest of them.
    """
    g = graph
    length = g.input("length", INT32, ["items", 1])
    shape = g.input("shape", INT32, ["items", item_dims])
    lengths = g.cast(g.op("Reshape", length, g.ints(-1)), INT64)  # [B]
    widths = g.cast(g.op("Gather", shape, g.integer(0), axis=1), INT64)  # [B]
    longest = g.op("ReduceMax", lengths, keepdims=0)
    whole = _grid(g, g.op("Range", g.integer(0), g.op("Size", lengths), g.integer(1)), lengths, longest)
    where = g.op("NonZero", whole.valid)  # [2,T]
    item, position = (g.op("Gather", where, g.integer(row), axis=0) for row in (0, 1))  # [T]
    starts = g.op("CumSum", widths, g.integer(0), exclusive=1)

    made: list[Grid] = []
    longer = g.op("Less", lengths, g.integer(0))  # [B] none so far
    items_before = places_before = g.integer(0)
    order = begins = g.op("Mul", lengths, g.integer(0))  # [B]
    for index in range(grids):
        shortest = g.integer(-1) if index == grids - 1 else g.op("Div", longest, g.integer(2 << index))
        reached = g.op("Greater", lengths, shortest)
        own = g.op("And", reached, g.op("Not", longer))
        longer = reached
        number = g.cast(own, INT64)  # [B]
        rank = g.op("CumSum", number, g.integer(0), exclusive=1)
        count = g.op("ReduceSum", number, keepdims=0)
        width = g.op("ReduceMax", g.op("Mul", number, lengths), keepdims=0)
        width = g.op("Max", width, g.integer(1))  # also if there is no item: a first token has its place
        items = g.op("Reshape", g.op("NonZero", own), g.ints(-1))
        made.append(_grid(g, items, g.op("Gather", lengths, items), width))
        order = g.op("Add", order, g.op("Mul", number, g.op("Add", rank, items_before)))
        begins = g.op("Add", begins, g.op("Mul", number, g.op("Add", g.op("Mul", rank, width), places_before)))
        items_before = g.op("Add", items_before, count)
        places_before = g.op("Add", places_before, g.op("Mul", count, width))
    return Layout(
        starts=starts,
        packed_starts=g.op("CumSum", lengths, g.integer(0), exclusive=1),
        item=item,
        source=g.op("Add", g.op("Gather", starts, item), position),
        position=position,
        whole=whole,
        grids=tuple(made),
        order=order,
        flat=g.op("Add", g.op("Gather", begins, item), position),
    )


def _grid(g: Graph, items: str, lengths: str, width: str) -> Grid:
    """Add the grid of `items` [B'], whose lengths are `lengths` [B'] and the longest `width`."""
    steps = g.op("Unsqueeze", g.op("Range", g.integer(0), width, g.integer(1)), g.ints(0))
    ends = g.op("Unsqueeze", lengths, g.ints(1))
    valid = g.op("Less", steps, ends)
    places = g.op("Min", steps, g.op("Sub", ends, g.integer(1)))
    blocked = g.op("Mul", g.cast(g.op("Not", valid), g.float_type), g.number(_BLOCKED))
    return Grid(items, valid, places, g.op("Unsqueeze", blocked, g.ints(1)))


def scatter(graph: Graph, layout: Layout, packed: str, flat_input: str, width: int, zero: str) -> str:
    """Put packed rows [T,width] back where their tokens lie in `flat_input` [P·…]; pads become `zero`. Gives [P,width].

    `flat_input` has one row per token of the flat input; only its first dimension counts.
    """
    g = graph
    tokens = g.op("Gather", g.op("Shape", flat_input), g.ints(0), axis=0)  # [1]
    shape = g.op("Concat", tokens, g.ints(width), axis=0)
    zeros = g.op("Expand", zero, shape)  # [P,width]
    return g.op("ScatterND", zeros, g.op("Unsqueeze", layout.source, g.ints(1)), packed)

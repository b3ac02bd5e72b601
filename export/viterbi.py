"""A CRF's best path as ONNX operators.

One loop over the words forwards does Viterbi and the sum over all paths at once, one backwards reads the best path
from what the first kept.

The chain runs over the words, the tokens being told apart by a table over the vocabulary. All of it is FP32, whatever
the precision of the head. Sizes as in `export.ragged`, and: N words of the batch, W words of its longest item,
C labels.
"""

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer
from torch import nn

from espalier.crf import CRF, NO_WORD, SMALLEST
from espalier.errors import ExportError
from export.graph import BOOL, DOUBLE, FLOAT, INT64, Graph
from export.ragged import Layout

Words = npt.NDArray[np.bool_]
"""[V]: whether a token of the vocabulary begins a word."""

Scores = npt.NDArray[np.float32]


def word_table(tokenizer_json: str, vocabulary: int) -> Words:
    """Return which of `vocabulary` token ids begin a word: all but WordPiece's continuations and special tokens.

    For BERT's tokens in a text these are the word starts of espalier.tagging. Special tokens are those that the
    tokenizer itself puts around texts. Raises ExportError if the tokenizer is not WordPiece.
    """
    tokenizer = Tokenizer.from_str(tokenizer_json)
    prefix = getattr(tokenizer.model, "continuing_subword_prefix", None)
    if type(tokenizer.model).__name__ != "WordPiece" or not prefix:
        raise ExportError(
            f"a head with a CRF needs a WordPiece tokenizer, whose tokens tell where words begin; the base's is "
            f"{type(tokenizer.model).__name__}: train the task with structure: softmax"
        )
    tokenizer.no_padding()
    table = np.ones(vocabulary, bool)
    for token, index in tokenizer.get_vocab().items():
        if token.startswith(prefix) and index < vocabulary:
            table[index] = False
    table[tokenizer.encode("", "").ids] = False
    return table


def best_path(graph: Graph, crf: CRF, output: nn.Linear, words: Words, hidden: str, ids: str, layout: Layout) -> str:
    """Add the best paths for packed hidden states [T,H] and flat input_ids [P]; return [T,2] as HeadInfo tells it."""
    g = graph
    start, transitions, end = (scores.detach().cpu().numpy() for scores in crf.scores())
    begins = g.op("Gather", g.constant(words), g.op("Gather", ids, layout.source, axis=0), axis=0)  # [T]
    cells = layout.whole.cells(g, layout.packed_starts)  # [B,S]
    marks = g.op("And", g.op("Gather", begins, cells, axis=0), layout.whole.valid)  # [B,S]
    number = g.cast(marks, INT64)
    counts = g.op("ReduceSum", number, g.ints(1), keepdims=0)  # [B] words of each item
    rank = g.op("CumSum", number, g.integer(1), exclusive=1)  # [B,S] words before each token
    where = g.op("Transpose", g.op("NonZero", marks), perm=[1, 0])  # [N,2] item and position
    token = g.op("GatherND", cells, where)  # [N] packed token of each word
    item = g.op("Gather", where, g.ints(0), axis=1)  # [N,1]
    place = g.op("Concat", g.op("Unsqueeze", g.op("GatherND", rank, where), g.ints(1)), item, axis=1)  # [N,2]

    emissions = g.cast(g.exact_linear("output", g.op("Gather", hidden, token, axis=0), output), FLOAT)  # [N,C]
    longest = g.op("Max", g.op("ReduceMax", counts, keepdims=0), g.integer(1))
    steps = g.op("Unsqueeze", g.op("Range", g.integer(0), longest, g.integer(1)), g.ints(1))  # [W,1]
    size = g.op("Concat", g.op("Unsqueeze", longest, g.ints(0)), g.op("Shape", counts), g.ints(len(start)), axis=0)
    room = g.op("Expand", _single(g, 0.0), size)  # [W,B,C]
    emissions = g.op("ScatterND", room, place, emissions)
    # The first word is in the states that the loop begins with; an item that is over keeps them.
    moves = g.op("And", g.op("Less", steps, counts), g.op("Greater", steps, g.integer(0)))  # [W,B]

    first = g.op("Add", g.op("Gather", emissions, g.integer(0), axis=0), g.constant(start))  # [B,C]
    best, total, before = g.scan(_forwards(g, transitions), [first, first], [emissions, moves], 3)
    ends = g.op("Add", best, g.constant(end))
    last = g.op("ArgMax", ends, axis=1, keepdims=0)  # [B]
    everything = g.op("ReduceLogSumExp", g.op("Add", total, g.constant(end)), axes=[1], keepdims=0)  # [B]
    chance = g.op("Sub", g.op("ReduceMax", ends, axes=[1], keepdims=0), everything)  # [B]
    chance = g.op("Where", g.op("Greater", counts, g.integer(0)), chance, _single(g, 0.0))
    _, path = g.scan(_backwards(g, transitions), [last], [before, moves], 2, backwards=True)  # [W,B]

    labels = g.cast(g.op("GatherND", path, place), FLOAT)  # [N]
    none = g.op("Expand", _single(g, NO_WORD), g.op("Shape", layout.source))  # [T]
    column = g.op("ScatterND", none, g.op("Unsqueeze", token, g.ints(1)), labels)
    columns = (g.op("Unsqueeze", values, g.ints(1)) for values in (column, g.op("Gather", chance, layout.item, axis=0)))
    return g.op("Concat", *columns, axis=1)


def _single(graph: Graph, value: float) -> str:
    """Return a scalar in FP32, also in a graph of FP16."""
    return graph.constant(np.array(value, np.float32))


def _forwards(graph: Graph, transitions: Scores) -> Graph:
    """Return the loop body that takes a word: best and total [B,C], by emission [B,C] and moves [B].

    It also hands on the `best` before the word.
    """
    g = graph.body("forwards")
    shape: list[int | str] = ["items", len(transitions)]
    best, total = g.input("best", FLOAT, shape), g.input("total", FLOAT, shape)
    emission, moves = g.input("emission", FLOAT, shape), g.input("moves", BOOL, ["items"])
    on = g.op("Unsqueeze", moves, g.ints(1))  # [B,1]

    def output(name: str, reached: str, before: str) -> None:
        g.output(name, g.op("Where", on, g.op("Add", reached, emission), before), FLOAT, shape)

    steps = g.constant(np.ascontiguousarray(transitions.T)[None])  # [1,C,C], to and from: reduced along memory
    paths = g.op("Add", g.op("Unsqueeze", best, g.ints(1)), steps)  # [B,C,C]
    output("longer_best", g.op("ReduceMax", paths, axes=[2], keepdims=0), best)

    # The sum in FP64, as in espalier.crf: a matrix product instead of C² exponentials.
    peak = g.op("ReduceMax", total, axes=[1])  # [B,1]
    chances = g.op("Exp", g.cast(g.op("Sub", total, peak), DOUBLE))
    sums = g.op("MatMul", chances, g.constant(np.exp(transitions.astype(np.float64))))  # [B,C]
    logs = g.op("Log", g.op("Max", sums, g.constant(np.array(SMALLEST))))
    output("longer_total", g.op("Add", g.cast(logs, FLOAT), peak), total)
    g.output("best_before", best, FLOAT, shape)
    return g


def _backwards(graph: Graph, transitions: Scores) -> Graph:
    """Return the loop body that goes back over a word: label [B], by the best before it [B,C] and moves [B]."""
    g = graph.body("backwards")
    label = g.input("label", INT64, ["items"])
    before, moves = g.input("before", FLOAT, ["items", len(transitions)]), g.input("moves", BOOL, ["items"])
    steps = g.op("Gather", g.constant(np.ascontiguousarray(transitions.T)), label, axis=0)  # [B,C]
    came_from = g.op("ArgMax", g.op("Add", before, steps), axis=1, keepdims=0)
    g.output("label_before", g.op("Where", moves, came_from, label), INT64, ["items"])
    g.output("label_here", label, INT64, ["items"])
    return g

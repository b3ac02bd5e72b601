"""Packing and folding are exact: the ONNX graphs equal plain PyTorch for any mix of lengths and sizes."""

from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import TypeVar

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from espalier.branch import Branch, foldable
from espalier.contract import Kind, Target
from espalier.crf import CRF
from espalier.encoder import Encoder, EncoderConfig
from espalier.errors import ExportError
from export import check
from export.check import Batch, compare_head, compare_segment
from export.graph import INT64, Graph
from export.models import GRIDS, head_model, segment_model
from export.ragged import declare


def encoder(hidden: int = 16, heads: int = 4, layers: int = 3, activation: str = "gelu") -> Encoder:
    torch.manual_seed(1)
    config = EncoderConfig(
        vocab_size=50, hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads,
        intermediate_size=2 * hidden, max_position_embeddings=24, type_vocab_size=2, layer_norm_eps=1e-12,
        hidden_act=activation, hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1,
    )  # fmt: skip
    return randomized(Encoder(config))


M = TypeVar("M", bound=torch.nn.Module)


def randomized(module: M) -> M:
    """Draw every parameter, biases and LayerNorms too, so that none hides behind a zero or a one."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.3)
    return module.eval()


def branch_of(trunk: Encoder, kind: Kind, layers: int, outputs: int, folded: int | None = None) -> Branch:
    torch.manual_seed(2)
    return randomized(Branch(trunk.config, kind, layers, outputs, folded=folded))


requests = st.lists(st.lists(st.integers(1, 12), min_size=1, max_size=4), min_size=1, max_size=6)
"""Requests of a batch, each the lengths of its items."""


def batch_of(lengths_by_request: list[list[int]], seed: int) -> Batch:
    rng = np.random.default_rng(seed)
    lengths = np.array([length for request in lengths_by_request for length in request])
    widths = np.array([max(request) for request in lengths_by_request for _ in request])
    ids = rng.integers(0, 50, size=(len(lengths), lengths.max()))
    types = rng.integers(0, 2, size=ids.shape)
    mask = np.arange(lengths.max()) < lengths[:, None]
    flat = [
        np.concatenate([np.pad(row[:n], (0, width - n)) for row, n, width in zip(values, lengths, widths, strict=True)])
        for values in (ids, types)
    ]
    return Batch(*flat, widths, lengths, *(torch.from_numpy(values) for values in (ids, types, mask)))


@settings(max_examples=25, deadline=None)
@given(requests, st.integers(0, 2**16), st.sampled_from([(0, 1), (0, 3), (1, 3)]))
def test_segment_equals_encoder_for_any_mix_of_lengths(
    lengths: list[list[int]], seed: int, cut: tuple[int, int]
) -> None:
    trunk = encoder()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(check, "random_batches", lambda *_: [batch_of(lengths, seed)])
        assert compare_segment(segment_model(trunk, *cut, Target.CPU), "segment", trunk, *cut, Target.CPU) < 1e-4


@settings(max_examples=40, deadline=None)
@given(requests, st.integers(0, 2**16), st.sampled_from(list(Kind)), st.integers(0, 3), st.data())
def test_head_equals_branch_for_any_mix_of_lengths(
    lengths: list[list[int]], seed: int, kind: Kind, layers: int, data: st.DataObject
) -> None:
    trunk = encoder()
    folded = data.draw(st.integers(*foldable(kind, layers)))
    branch = branch_of(trunk, kind, layers, 1 if kind is Kind.REGRESSION else 5, folded)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(check, "random_batches", lambda *_: [batch_of(lengths, seed)])
        model = head_model(branch, "task", Target.CPU)
        assert compare_head(model, "head", trunk, branch, 1, Target.CPU) < 1e-4


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(2, 40), min_size=2, max_size=8),  # every text has at least [CLS] and [SEP]
    st.sampled_from(["segment", *Kind]),
    st.sampled_from([Target.CPU, Target.INT8]),
    st.integers(1, 2),
    st.integers(0, 2**16),
)
def test_an_answer_is_the_same_to_the_last_bit_whatever_else_is_in_the_batch(
    lengths: list[int], model: str, target: Target, threads: int, seed: int
) -> None:
    trunk = encoder(hidden=64)
    if model == "segment":
        content = segment_model(trunk, 1, 3, target)
    else:
        kind = Kind(model)
        content = head_model(branch_of(trunk, kind, 2, 1 if kind is Kind.REGRESSION else 5), "task", target)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(content, options)
    name = "hidden_below" if model == "segment" else "hidden"
    rng = np.random.default_rng(seed)
    items = [rng.normal(size=(length, 64)).astype(np.float32) for length in lengths]

    def run(*items: np.ndarray) -> np.ndarray:
        count = np.array([[len(item), 64] for item in items], np.int32)
        hidden = np.concatenate(items).ravel()
        return session.run(None, {name: hidden, "length": count[:, :1], "shape": count})[0]

    np.testing.assert_array_equal(run(*items), np.concatenate([run(item) for item in items]))


@pytest.mark.parametrize(
    ("lengths", "grids", "shapes"),
    [
        ([40, 4, 12, 4, 30, 4, 4], 3, [[2, 40], [1, 12], [4, 4]]),
        ([40, 4, 12, 4, 30, 4, 4], 2, [[2, 40], [5, 12]]),
        ([40, 4, 12, 4, 30, 4, 4], 1, [[7, 40]]),
        ([6], 3, [[1, 6], [0, 1], [0, 1]]),
        ([8, 4, 2, 1], 3, [[1, 8], [1, 4], [2, 2]]),
    ],
)
def test_attention_sees_items_in_grids_of_about_their_length(
    lengths: list[int], grids: int, shapes: list[list[int]]
) -> None:
    graph = Graph("grids", np.float32)
    layout = declare(graph, 1, grids)
    for index, grid in enumerate(layout.grids):
        graph.output(f"shape_{index}", graph.op("Shape", grid.valid), INT64, [2])
    items = graph.op("Concat", *(grid.items for grid in layout.grids), axis=0)
    graph.output("sorted_back", graph.op("Gather", items, layout.order), INT64, ["items"])
    graph.output("flat", layout.flat, INT64, ["tokens"])
    graph.output("source", layout.source, INT64, ["tokens"])
    count = np.array(lengths, np.int32)[:, None]
    widths = count + np.arange(len(lengths), dtype=np.int32)[:, None]  # rows of a request of longer texts
    *found, back, flat, source = onnxruntime.InferenceSession(graph.serialize()).run(
        None, {"length": count, "shape": widths}
    )
    assert [list(shape) for shape in found] == shapes
    assert list(back) == list(range(len(lengths)))
    assert len(set(flat)) == len(flat) == sum(lengths), "a place is one token's"
    assert flat.max() < sum(items * places for items, places in shapes)
    starts = np.cumsum(widths) - widths.ravel()
    assert list(source) == [start + at for start, length in zip(starts, lengths, strict=True) for at in range(length)]


@pytest.mark.parametrize("folded", [False, True])
def test_attention_weighs_places_without_a_token_next_to_nothing_and_meets_no_denormals(folded: bool) -> None:
    trunk = encoder()
    head = head_model(branch_of(trunk, Kind.CLASSIFICATION, 2, 5), "task", Target.CPU)
    model = onnx.load_from_string(head if folded else segment_model(trunk, 1, 3, Target.CPU))
    attention = [node.output[0] for node in model.graph.node if node.op_type == "Softmax"]
    attention = attention[: 2 * GRIDS[Target.CPU]]  # of two layers; a head's last one gives its answer
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in attention)
    lengths = np.array([[12], [9], [4], [4], [2], [1]], np.int32)
    shape = np.hstack([lengths, np.full_like(lengths, 16)])
    hidden = np.random.default_rng(0).normal(size=int(shape.prod(1).sum())).astype(np.float32)
    below = "hidden" if folded else "hidden_below"
    session = onnxruntime.InferenceSession(model.SerializeToString())
    found = session.run(attention, {below: hidden, "length": lengths, "shape": shape})
    assert [len(weights) for weights in found] == [2, 2, 2] * 2
    empty = 0
    for weights, own in zip(found, np.split(lengths, 3) * 2, strict=True):
        assert weights.min() >= np.finfo(np.float32).tiny
        for item, length in zip(weights, own.ravel(), strict=True):
            assert (item[..., length:] <= np.exp(-59.9) * item.max(-1, keepdims=True)).all()
            empty += item[..., length:].size
    assert empty > 0


@pytest.mark.parametrize("kind", list(Kind))
@pytest.mark.parametrize("target", list(Target))
@pytest.mark.parametrize("layers", [0, 2])
def test_nothing_is_computed_that_no_output_needs(kind: Kind, target: Target, layers: int) -> None:
    trunk = encoder()
    head = head_model(branch_of(trunk, kind, layers, 1 if kind is Kind.REGRESSION else 3), "task", target)
    for model in (head, segment_model(trunk, 0, 1, target), segment_model(trunk, 1, 2, target)):
        graph = onnx.load_from_string(model).graph
        used = {name for node in graph.node for name in node.input} | {output.name for output in graph.output}
        assert all(used.intersection(node.output) for node in graph.node)
        assert {weight.name for weight in graph.initializer} <= used


@pytest.mark.parametrize("sizes", [(8, 1), (8, 8), (24, 3)], ids=lambda sizes: f"H{sizes[0]}-A{sizes[1]}")
@pytest.mark.parametrize("activation", ["gelu", "gelu_new"])
def test_other_sizes_and_activations(sizes: tuple[int, int], activation: str) -> None:
    trunk = encoder(*sizes, activation=activation)
    branch = branch_of(trunk, Kind.CLASSIFICATION, 2, 3)
    compare_segment(segment_model(trunk, 0, 3, Target.CPU), "segment", trunk, 0, 3, Target.CPU)
    compare_head(head_model(branch, "task", Target.CPU), "head", trunk, branch, 2, Target.CPU)


def test_segments_in_a_chain_equal_one_trunk() -> None:
    trunk = encoder()
    batch = batch_of([[5], [3, 7], [1]], seed=0)
    shape = np.stack([batch.widths, batch.widths * 0 + 16], axis=1).astype(np.int32)
    lengths = batch.lengths[:, None].astype(np.int32)

    def run(start: int, stop: int, feed: dict[str, np.ndarray], dims: int) -> np.ndarray:
        session = onnxruntime.InferenceSession(segment_model(trunk, start, stop, Target.CPU))
        return session.run(None, {**feed, "length": lengths, "shape": shape[:, :dims]})[0]

    ids = {"input_ids": batch.flat_ids, "token_type_ids": batch.flat_types}
    whole = run(0, 3, ids, 1)
    hidden = run(0, 1, ids, 1)
    for start, stop in pairwise([1, 2, 3]):
        hidden = run(start, stop, {"hidden_below": hidden.ravel()}, 2)
    np.testing.assert_allclose(hidden, whole, atol=1e-5)


def test_fp16_stays_within_its_stated_tolerance(base) -> None:
    model = segment_model(base.encoder, 0, 2, Target.GPU)
    assert 0 < compare_segment(model, "segment", base.encoder, 0, 2, Target.GPU) < check.TOLERANCE[Target.GPU]


def test_8_bit_products_stay_within_their_stated_tolerance(base) -> None:
    encoder, target = base.encoder, Target.INT8
    differences = [
        compare_segment(segment_model(encoder, 0, stop, target), "segment", encoder, 0, stop, target) for stop in (1, 3)
    ]
    assert 0 < differences[0] < 0.05
    assert differences[0] < differences[1] < check.TOLERANCE[Target.INT8] / 2
    other = randomized(Encoder(base.config))
    with pytest.raises(ExportError, match="segment: the exported graph differs"):
        compare_segment(segment_model(other, 0, 1, target), "segment", encoder, 0, 1, target)


def test_products_of_integers_are_those_of_the_encoder_layers_alone() -> None:
    trunk = encoder()
    model = onnx.load_from_string(head_model(branch_of(trunk, Kind.CLASSIFICATION, 2, 3), "task", Target.INT8))
    types = {weight.name: weight.data_type for weight in model.graph.initializer}
    assert types["layers.0.up.weight"] == types["layers.1.down.weight"] == onnx.TensorProto.INT8
    assert types["output.weight"] == onnx.TensorProto.FLOAT
    assert sum(node.op_type == "MatMulIntegerToFloat" for node in model.graph.node) == 6 + 4
    crf = branch_of(trunk, Kind.TAGGING, 1, 3)
    crf.crf = CRF(("O", "B-x", "I-x"))
    words = np.ones(50, bool)
    model = onnx.load_from_string(head_model(crf, "task", Target.INT8, words))
    assert {w.name: w.data_type for w in model.graph.initializer}["output.weight"] != onnx.TensorProto.INT8


def test_a_row_and_a_column_of_zeros_are_zeros_with_8_bit_products() -> None:
    trunk = encoder()
    with torch.no_grad():
        trunk.layers[1].up.weight[3] = 0
        trunk.layers[1].up.bias[:] = 0
        trunk.layers[0].feed_forward_norm.weight[:] = 0
        trunk.layers[0].feed_forward_norm.bias[:] = 0
    assert compare_segment(segment_model(trunk, 0, 2, Target.INT8), "segment", trunk, 0, 2, Target.INT8) < 0.1


def test_graphs_are_of_the_agreed_opset_and_equal_from_run_to_run() -> None:
    trunk = encoder()
    first, second = (segment_model(trunk, 0, 2, Target.CPU) for _ in range(2))
    assert first == second
    model = onnx.load_from_string(first)
    assert model.ir_version == 8
    assert [(opset.domain, opset.version) for opset in model.opset_import] == [("", 17)]


def test_a_folded_head_has_no_keys_or_values_per_token() -> None:
    """Its cost per token is that of the probes (2AH), not of a layer (12H²)."""
    trunk = encoder(hidden=16, heads=4)
    model = onnx.load_from_string(head_model(branch_of(trunk, Kind.CLASSIFICATION, 1, 3), "task", Target.CPU))
    shapes = {weight.name: list(weight.dims) for weight in model.graph.initializer}
    assert [shapes[f"layers.0.key.{head}.weight"] for head in range(4)] == [[4, 16]] * 4
    assert [shapes[f"layers.0.value.{head}.weight"] for head in range(4)] == [[16, 4]] * 4
    assert "layers.0.key.bias" not in shapes


def test_a_further_folded_layer_costs_as_little() -> None:
    trunk = encoder(hidden=16, heads=4)
    model = onnx.load_from_string(head_model(branch_of(trunk, Kind.REGRESSION, 3, 1, folded=2), "task", Target.CPU))
    shapes = {weight.name: list(weight.dims) for weight in model.graph.initializer}
    assert shapes["layers.0.key.weight"] == [16, 16]
    assert shapes["layers.1.key.0.weight"] == shapes["layers.2.key.3.weight"] == [4, 16]


@pytest.mark.parametrize("target", list(Target))
def test_a_graph_that_gives_no_numbers_is_refused(target: Target) -> None:
    trunk, broken = encoder(), encoder()
    with torch.no_grad():
        broken.layers[1].down.bias[0] = float("nan")
    with pytest.raises(ExportError, match="differs from PyTorch by nan"):
        compare_segment(segment_model(broken, 0, 3, target), "trunk_0_3", trunk, 0, 3, target)


def test_a_wrong_graph_is_refused() -> None:
    trunk = encoder()
    other = encoder()
    with torch.no_grad():
        other.layers[1].down.bias[0] += 0.1  # one unit: LayerNorm would take back a shift of all
    with pytest.raises(ExportError, match=r"trunk_0_3: the exported graph differs from PyTorch by \d"):
        compare_segment(segment_model(other, 0, 3, Target.CPU), "trunk_0_3", trunk, 0, 3, Target.CPU)


def test_onnx_runtime_fuses_what_it_can(tmp_path: Path) -> None:
    """Each product with its bias, each GELU: counted in the graph that it runs, on the CPU."""
    trunk = encoder(hidden=64)
    branch = branch_of(trunk, Kind.CLASSIFICATION, 1, 3)
    for layers, products, content in (
        (2, 12, segment_model(trunk, 1, 3, Target.CPU)),  # query, key, value, output, up, down of each layer
        (1, 5, head_model(branch, "task", Target.CPU)),  # query, output, up, down, and the output layer
    ):
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
        options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
        onnxruntime.InferenceSession(content, options)
        counts = Counter(node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node)
        assert (counts["Gemm"], counts["Gelu"], counts["Erf"]) == (products, layers, 0)
        assert counts["LayerNormalization"] == 2 * layers

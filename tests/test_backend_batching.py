"""Batching and scattering of the Python-based backend, against a reference that goes item by item."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from espalier.errors import RequestError
from serving.onnxruntime.batching import BatchInput, Kind, Layout, Scatter, gather, scatter

HIDDEN = 3


@st.composite
def ragged_requests(draw: st.DrawFn) -> list[dict[str, np.ndarray[Any, Any]]]:
    """1 to 5 requests of n items × S tokens × HIDDEN, every value different; n and S differ between requests."""
    sizes = draw(st.lists(st.tuples(st.integers(1, 4), st.integers(0, 6)), min_size=1, max_size=5))
    requests, start = [], 0
    for items, tokens in sizes:
        count = items * tokens * HIDDEN
        hidden = np.arange(start, start + count, dtype=np.float32).reshape(items, tokens, HIDDEN)
        requests.append({"hidden": hidden, "length": np.full((items, 1), tokens, np.int32)})
        start += count
    return requests


def reference_batch_input(kind: Kind, requests: list[dict[str, Any]]) -> list[Any]:
    counts = [len(list(request["hidden"].flat)) for request in requests]
    sums, total = [], 0
    for count in counts:
        total += count
        sums.append(total)
    rows = [list(item.shape) for request in requests for item in request["hidden"]]
    return {
        Kind.BATCH_ELEMENT_COUNT: counts,
        Kind.BATCH_ACCUMULATED_ELEMENT_COUNT: sums,
        Kind.BATCH_ACCUMULATED_ELEMENT_COUNT_WITH_ZERO: [0, *sums],
        Kind.BATCH_MAX_ELEMENT_COUNT_AS_SHAPE: [0] * max(counts),
        Kind.BATCH_ITEM_SHAPE: rows,
        Kind.BATCH_ITEM_SHAPE_FLATTEN: [size for row in rows for size in row],
    }[kind]


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
@pytest.mark.parametrize("kind", list(Kind))
@given(requests=ragged_requests())
def test_batch_inputs_describe_the_shapes_of_their_source(
    kind: Kind, dtype: Any, requests: list[dict[str, Any]]
) -> None:
    layout = Layout(True, frozenset({"hidden"}), (BatchInput(kind, ("made", "again"), "hidden", dtype),))
    feeds = gather(layout, requests)
    assert feeds["made"].tolist() == reference_batch_input(kind, requests)
    assert feeds["made"].dtype == feeds["again"].dtype == dtype


@given(requests=ragged_requests())
def test_ragged_inputs_are_flattened_one_after_the_other_and_others_are_stacked(requests: list[dict[str, Any]]) -> None:
    feeds = gather(Layout(True, frozenset({"hidden"})), requests)
    assert feeds["hidden"].tolist() == [value for request in requests for value in request["hidden"].flat]
    assert feeds["length"].tolist() == [row.tolist() for request in requests for row in request["length"]]


@given(requests=ragged_requests())
def test_what_is_gathered_comes_back_to_its_request(requests: list[dict[str, Any]]) -> None:
    layout = Layout(True, frozenset({"hidden"}), scatters={"out": Scatter("hidden", (-1, -1, HIDDEN))})
    feeds = gather(layout, requests)
    answers = scatter(layout, {"out": feeds["hidden"].reshape(-1, HIDDEN), "rows": feeds["length"]}, requests)
    for request, answer in zip(requests, answers, strict=True):
        np.testing.assert_array_equal(answer["out"], request["hidden"])
        np.testing.assert_array_equal(answer["rows"], request["length"])


def test_scatter_takes_the_inputs_size_where_the_output_has_minus_one() -> None:
    requests = [{"ids": np.zeros((2, 3))}, {"ids": np.zeros((1, 4))}]
    layout = Layout(True, frozenset({"ids"}), scatters={"out": Scatter("ids", (-1, -1, 5))})
    answers = scatter(layout, {"out": np.arange(50).reshape(10, 5)}, requests)
    assert [answer["out"].shape for answer in answers] == [(2, 3, 5), (1, 4, 5)]
    assert answers[1]["out"].flat[0] == 30


def test_a_single_request_is_not_copied() -> None:
    request = {"hidden": np.ones((2, 3, HIDDEN), np.float32), "length": np.ones((2, 1), np.int32)}
    layout = Layout(True, frozenset({"hidden"}), scatters={"out": Scatter("hidden", (-1, -1, HIDDEN))})
    feeds = gather(layout, [request])
    assert np.shares_memory(feeds["hidden"], request["hidden"])
    assert feeds["length"] is request["length"]
    output = np.ones((6, HIDDEN))
    assert np.shares_memory(scatter(layout, {"out": output}, [request])[0]["out"], output)


def test_strings_are_batched_like_numbers() -> None:
    requests = [{"text": np.array([["a"], ["b"]], object)}, {"text": np.array([["c"]], object)}]
    feeds = gather(Layout(True), requests)
    assert feeds["text"].tolist() == [["a"], ["b"], ["c"]]
    assert scatter(Layout(True), feeds, requests)[1]["text"].tolist() == [["c"]]


def test_without_batching_shapes_stay_and_scalars_get_the_shape_of_the_config() -> None:
    layout = Layout(False, scalar_inputs=frozenset({"x"}), scalar_outputs={"y": (1,)})
    request = {"x": np.array([7.0])}
    feeds = gather(layout, [request])
    assert feeds["x"].shape == ()
    answers = scatter(layout, {"y": feeds["x"], "z": np.ones((3, 2))}, [request])
    assert (answers[0]["y"].shape, answers[0]["z"].shape) == ((1,), (3, 2))


@pytest.mark.parametrize(
    ("layout", "output"),
    [
        pytest.param(Layout(True), np.zeros((4, 2)), id="a row too many"),
        pytest.param(Layout(True), np.zeros(()), id="no rows at all"),
        pytest.param(Layout(True, scatters={"out": Scatter("x", (-1, 3))}), np.zeros(8), id="scatter too short"),
    ],
)
def test_an_output_of_another_size_than_the_batch_is_refused(layout: Layout, output: Any) -> None:
    requests = [{"x": np.zeros((2, 2))}, {"x": np.zeros((1, 2))}]
    with pytest.raises(RequestError, match="output 'out'"):
        scatter(layout, {"out": output}, requests)

"""The Python-based `onnxruntime` backend in a real Triton, on small graphs, and what it refuses to load."""

import queue
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import tritonclient.grpc as grpc
from google.protobuf import text_format
from onnx import TensorProto, helper
from tritonclient.grpc import model_config_pb2 as pb
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

from espalier.configs import write_config
from espalier.errors import ContractError, ServerError
from serving.onnxruntime.options import providers, refuse_unsupported, run_options, session_options
from serving.triton import TritonServer, free_ports

Array = np.ndarray[Any, Any]
Tensor = tuple[str, int, list[Any]]

NUMBERS = {
    "BOOL": (TensorProto.BOOL, np.bool_),
    "UINT8": (TensorProto.UINT8, np.uint8),
    "UINT16": (TensorProto.UINT16, np.uint16),
    "UINT32": (TensorProto.UINT32, np.uint32),
    "UINT64": (TensorProto.UINT64, np.uint64),
    "INT8": (TensorProto.INT8, np.int8),
    "INT16": (TensorProto.INT16, np.int16),
    "INT32": (TensorProto.INT32, np.int32),
    "INT64": (TensorProto.INT64, np.int64),
    "FP16": (TensorProto.FLOAT16, np.float16),
    "FP32": (TensorProto.FLOAT, np.float32),
    "FP64": (TensorProto.DOUBLE, np.float64),
}
KINDS = {
    "count": "BATCH_ELEMENT_COUNT",
    "sums": "BATCH_ACCUMULATED_ELEMENT_COUNT",
    "sums_zero": "BATCH_ACCUMULATED_ELEMENT_COUNT_WITH_ZERO",
    "most": "BATCH_MAX_ELEMENT_COUNT_AS_SHAPE",
    "shapes": "BATCH_ITEM_SHAPE",
    "shapes_flat": "BATCH_ITEM_SHAPE_FLATTEN",
}


# --- repositories ---------------------------------------------------------------------------------------------------


def graph(nodes: Sequence[Any], inputs: Sequence[Tensor], outputs: Sequence[Tensor], constants: Any = ()) -> bytes:
    values = [[helper.make_tensor_value_info(*tensor) for tensor in tensors] for tensors in (inputs, outputs)]
    model = helper.make_model(
        helper.make_graph(
            nodes, "graph", *values, initializer=[onnx.numpy_helper.from_array(a, n) for n, a in constants]
        ),
        opset_imports=[helper.make_opsetid("", 17)],
        ir_version=8,
    )
    onnx.checker.check_model(model)
    return bytes(model.SerializeToString())


def add_model(repository: Path, name: str, config: str, *versions: bytes, file: str = "model.onnx") -> None:
    message = text_format.Parse(
        f'backend: "onnxruntime" instance_group {{ kind: KIND_CPU count: 1 }} {config}', pb.ModelConfig()
    )
    for number, content in enumerate(versions, 1):
        folder = repository / name / str(number)
        folder.mkdir(parents=True)
        (folder / file).write_bytes(content)
    write_config(repository / name, message)


def tensor(mode: str, name: str, data_type: str, dims: str, more: str = "") -> str:
    return f'{mode} {{ name: "{name}" data_type: TYPE_{data_type} dims: {dims} {more} }}'


def identity(onnx_type: int = TensorProto.FLOAT, dims: Sequence[Any] = ("n", 2)) -> bytes:
    return graph([helper.make_node("Identity", ["x"], ["y"])], [("x", onnx_type, [*dims])], [("y", onnx_type, [*dims])])


PLAIN = tensor("input", "x", "FP32", "[2]") + tensor("output", "y", "FP32", "[2]")


def ragged_graph() -> bytes:
    """Give every item the whole vector of each batch input, so that a request sees what the batch was."""
    node = helper.make_node
    nodes = [
        node("Shape", ["length"], ["length_shape"]),
        node("Slice", ["length_shape", "zero", "one"], ["items"]),
        node("Concat", ["items", "one"], ["tile"], axis=0),
        node("Add", ["x", "x"], ["doubled"]),
        node("Identity", ["shapes"], ["shapes_seen"]),
        node("Shape", ["most"], ["most_size"]),
    ]
    for name in ("count", "sums", "sums_zero", "shapes_flat", "most_size"):
        nodes += [
            node("Unsqueeze", [name, "zero"], [f"{name}_row"]),
            node("Expand", [f"{name}_row", "tile"], [f"{name}_seen"]),
        ]
    inputs: list[Tensor] = [("x", TensorProto.FLOAT, ["T"]), ("length", TensorProto.INT32, ["n", 1])]
    inputs += [(name, TensorProto.INT32, ["n", 2] if name == "shapes" else [f"{name}_size"]) for name in KINDS]
    outputs: list[Tensor] = [("doubled", TensorProto.FLOAT, ["T"]), ("shapes_seen", TensorProto.INT32, ["n", 2])]
    outputs += [
        (f"{name}_seen", TensorProto.INT32, ["n", f"{name}_width"])
        for name in ("count", "sums", "sums_zero", "shapes_flat")
    ]
    outputs.append(("most_size_seen", TensorProto.INT64, ["n", "most_width"]))
    return graph(nodes, inputs, outputs, [("zero", np.array([0])), ("one", np.array([1]))])


def ragged_config() -> str:
    batch_inputs = [
        f'batch_input {{ kind: {kind} target_name: "{name}" data_type: TYPE_INT32 source_input: "x" }}'
        for name, kind in KINDS.items()
    ]
    seen = [tensor("output", f"{name}_seen", "INT32", "[-1]") for name in ("count", "sums", "sums_zero", "shapes_flat")]
    return " ".join(
        [
            "max_batch_size: 4 dynamic_batching { max_queue_delay_microseconds: 5000000 }",
            tensor("input", "x", "FP32", "[-1, 2]", "allow_ragged_batch: true"),
            tensor("input", "length", "INT32", "[1]"),
            tensor("output", "doubled", "FP32", "[-1, 2]"),
            tensor("output", "shapes_seen", "INT32", "[2]"),
            tensor("output", "most_size_seen", "INT64", "[-1]"),
            *seen,
            *batch_inputs,
            'batch_output { kind: BATCH_SCATTER_WITH_INPUT_SHAPE target_name: "doubled" source_input: "x" }',
        ]
    )


def write_repository(repository: Path) -> None:
    node = helper.make_node
    add_model(repository, "ragged", ragged_config(), ragged_graph())

    types = {**{name: onnx_type for name, (onnx_type, _) in NUMBERS.items()}, "STRING": TensorProto.STRING}
    add_model(
        repository,
        "types",
        "max_batch_size: 8 "
        + "".join(
            tensor("input", f"i_{name}", name, "[-1]") + tensor("output", f"o_{name}", name, "[-1]") for name in types
        ),
        graph(
            [node("Identity", [f"i_{name}"], [f"o_{name}"]) for name in types],
            [(f"i_{name}", onnx_type, ["n", "w"]) for name, onnx_type in types.items()],
            [(f"o_{name}", onnx_type, ["n", "w"]) for name, onnx_type in types.items()],
        ),
    )
    add_model(
        repository,
        "strings",
        "max_batch_size: 2 dynamic_batching { max_queue_delay_microseconds: 5000000 }"
        + tensor("input", "x", "STRING", "[1]")
        + tensor("output", "y", "STRING", "[1]"),
        identity(TensorProto.STRING, ["n", 1]),
    )
    add_model(
        repository,
        "unbatched",
        tensor("input", "x", "FP32", "[4]", "reshape { shape: [2, 2] }")
        + tensor("input", "scalar", "FP32", "[1]")
        + tensor("input", "bias", "FP32", "[2]", "optional: true")
        + tensor("output", "y", "FP32", "[4]", "reshape { shape: [2, 2] }")
        + tensor("output", "sum", "FP32", "[1]"),
        graph(
            [
                node("Mul", ["x", "scalar"], ["product"]),
                node("Add", ["product", "bias"], ["y"]),
                node("ReduceSum", ["y"], ["sum"], keepdims=0),
            ],
            [
                ("x", TensorProto.FLOAT, [2, 2]),
                ("scalar", TensorProto.FLOAT, []),
                ("bias", TensorProto.FLOAT, [2]),
            ],
            [("y", TensorProto.FLOAT, [2, 2]), ("sum", TensorProto.FLOAT, [])],
            [("bias", np.array([0, 100], np.float32))],  # an input with an initializer need not be given
        ),
    )
    add_model(
        repository,
        "versions",
        "max_batch_size: 4 version_policy { all {} }" + PLAIN,
        *(
            graph(
                [node("Add", ["x", "number"], ["y"])],
                [("x", TensorProto.FLOAT, ["n", 2])],
                [("y", TensorProto.FLOAT, ["n", 2])],
                [("number", np.float32(number))],
            )
            for number in (1, 2)
        ),
    )
    add_model(
        repository,
        "lookup",
        "max_batch_size: 3 dynamic_batching { max_queue_delay_microseconds: 5000000 }"
        + tensor("input", "x", "INT64", "[1]")
        + tensor("output", "y", "FP32", "[1]"),
        graph(
            [node("Gather", ["table", "x"], ["y"])],
            [("x", TensorProto.INT64, ["n", 1])],
            [("y", TensorProto.FLOAT, ["n", 1])],
            [("table", np.array([10, 20, 30, 40], np.float32))],
        ),
    )
    for threads in (1, 4):
        add_model(
            repository,
            f"threads{threads}",
            f'default_model_filename: "net.onnx" max_batch_size: 1 {PLAIN}'
            f'parameters {{ key: "intra_op_thread_count" value {{ string_value: "{threads}" }} }}',
            identity(),
            file="net.onnx",
        )


# --- a server with all of them --------------------------------------------------------------------------------------


@dataclass
class Served:
    server: TritonServer
    client: Any

    def ask(self, model: str, version: str = "", outputs: Sequence[str] | None = None, **inputs: Array) -> Any:
        return self.client.infer(
            model, _inputs(inputs), model_version=version, outputs=_outputs(outputs), client_timeout=30
        )

    def ask_together(self, model: str, requests: Sequence[dict[str, Array]]) -> list[Any]:
        """Send `requests` at once; return results or errors in their order."""
        answers: queue.Queue[tuple[int, Any]] = queue.Queue()
        for index, request in enumerate(requests):
            self.client.async_infer(
                model,
                _inputs(request),
                lambda result, error, index=index: answers.put((index, error or result)),
                client_timeout=30,
            )
        return [answer for _, answer in sorted((answers.get(timeout=60) for _ in requests), key=lambda pair: pair[0])]

    def counts(self, model: str) -> tuple[int, int]:
        """Return how many runs there were and how many items they had."""
        statistics = self.client.get_inference_statistics(model).model_stats[0]
        return statistics.execution_count, statistics.inference_count

    def runs_since(self, model: str, before: tuple[int, int], items: int) -> int:
        """Return how many runs answered the `items` since `before`: Triton counts shortly after it answers."""
        deadline = time.monotonic() + 10
        while self.counts(model)[1] < before[1] + items and time.monotonic() < deadline:
            time.sleep(0.02)
        return self.counts(model)[0] - before[0]


def _inputs(arrays: dict[str, Array]) -> list[Any]:
    inputs = []
    for name, array in arrays.items():
        inputs.append(grpc.InferInput(name, array.shape, np_to_triton_dtype(array.dtype)))
        inputs[-1].set_data_from_numpy(array)
    return inputs


def _outputs(names: Sequence[str] | None) -> list[Any] | None:
    return None if names is None else [grpc.InferRequestedOutput(name) for name in names]


def server_on_free_ports(repository: Path, log_file: Path, **options: Any) -> TritonServer:
    http, rpc, metrics = free_ports(3)
    return TritonServer(
        repository,
        log_file=log_file,
        http_port=http,
        grpc_port=rpc,
        metrics_port=metrics,
        **{"ready_model": None, **options},
    )


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("backend")
    write_repository(folder / "repository")
    with server_on_free_ports(folder / "repository", folder / "triton.log") as server:
        client = grpc.InferenceServerClient(server.grpc_url)
        yield Served(server, client)
        client.close()


@pytest.mark.server
def test_ragged_requests_share_a_run_and_get_their_own_part_back(served: Served) -> None:
    before = served.counts("ragged")
    sizes = [(2, 3), (1, 5), (1, 0)]  # items × tokens, 2 wide
    requests = [
        {
            "x": np.random.default_rng(items).random((items, tokens, 2), np.float32),
            "length": np.full((items, 1), tokens, np.int32),
        }
        for items, tokens in sizes
    ]
    answers = served.ask_together("ragged", requests)
    assert served.runs_since("ragged", before, items=4) == 1
    counts = [items * tokens * 2 for items, tokens in sizes]
    for (items, tokens), request, answer in zip(sizes, requests, answers, strict=True):
        np.testing.assert_array_equal(answer.as_numpy("doubled"), 2 * request["x"])
        np.testing.assert_array_equal(answer.as_numpy("shapes_seen"), [[tokens, 2]] * items)
        seen = {name: answer.as_numpy(f"{name}_seen")[0] for name in ("count", "sums", "sums_zero", "shapes_flat")}
        # In which order the server took the requests is open.
        assert sorted(seen["count"]) == sorted(counts)
        assert seen["sums"].tolist() == np.cumsum(seen["count"]).tolist()
        assert seen["sums_zero"].tolist() == [0, *seen["sums"]]
        assert sorted(seen["shapes_flat"].reshape(-1, 2).tolist()) == [[0, 2], [3, 2], [3, 2], [5, 2]]
        assert answer.as_numpy("most_size_seen").tolist() == [[max(counts)]] * items


@pytest.mark.server
@pytest.mark.parametrize("items", [1, 3])
def test_every_type_passes_unchanged(served: Served, items: int) -> None:
    extremes: dict[str, Array] = {}
    for name, (_, dtype) in NUMBERS.items():
        if name == "BOOL":
            row: Any = [True, False]
        elif np.issubdtype(dtype, np.integer):
            row = [np.iinfo(dtype).min, np.iinfo(dtype).max]
        else:
            row = [np.finfo(dtype).tiny, -np.inf]
        extremes[name] = np.array([row] * items, dtype)
    extremes["STRING"] = np.array([["", "a\0b ✓ 漢"]] * items, np.object_)
    answer = served.ask("types", **{f"i_{name}": array for name, array in extremes.items()})
    for name, array in extremes.items():
        got = answer.as_numpy(f"o_{name}")
        if name == "STRING":
            got = np.array([item.decode() for item in got.flat], np.object_).reshape(got.shape)
        np.testing.assert_array_equal(got, array)
        assert got.dtype == array.dtype


@pytest.mark.server
def test_empty_tensors_pass(served: Served) -> None:
    empty = {name: np.zeros((1, 0), dtype) for name, (_, dtype) in NUMBERS.items()}
    empty["STRING"] = np.zeros((1, 0), np.object_)
    answer = served.ask("types", **{f"i_{name}": array for name, array in empty.items()})
    assert answer.as_numpy("o_FP32").shape == (1, 0)
    assert answer.as_numpy("o_STRING").shape == (1, 0)


@pytest.mark.server
def test_without_batching_shapes_scalars_and_optional_inputs_work(served: Served) -> None:
    x, scalar = np.arange(4, dtype=np.float32), np.array([3], np.float32)
    answer = served.ask("unbatched", x=x, scalar=scalar)
    assert answer.as_numpy("y").tolist() == [0, 103, 6, 109]
    assert answer.as_numpy("sum").tolist() == [218]
    answer = served.ask("unbatched", x=x, scalar=scalar, bias=np.array([1, 1], np.float32))
    assert answer.as_numpy("y").tolist() == [1, 4, 7, 10]


@pytest.mark.server
@pytest.mark.parametrize(("given", "expected"), [(1e-39, 0), (2e-38, 6e-38)], ids=["denormal", "smallest"])
def test_a_denormal_counts_as_zero(served: Served, given: float, expected: float) -> None:
    x, bias = np.full(4, given, np.float32), np.zeros(2, np.float32)
    answer = served.ask("unbatched", x=x, scalar=np.array([3], np.float32), bias=bias)
    assert answer.as_numpy("y").tolist() == [np.float32(expected)] * 4


@pytest.mark.server
def test_only_requested_outputs_are_sent(served: Served) -> None:
    x, scalar = np.arange(4, dtype=np.float32), np.array([3], np.float32)
    answer = served.ask("unbatched", outputs=["sum"], x=x, scalar=scalar)
    assert [output.name for output in answer.get_response().outputs] == ["sum"]


@pytest.mark.server
@pytest.mark.parametrize(("version", "added"), [("1", 1), ("2", 2), ("", 2)], ids=["first", "second", "latest"])
def test_versions_are_served_side_by_side(served: Served, version: str, added: int) -> None:
    answer = served.ask("versions", version, x=np.zeros((1, 2), np.float32))
    assert answer.as_numpy("y").tolist() == [[added, added]]


@pytest.mark.server
def test_a_failing_request_does_not_fail_those_batched_with_it(served: Served) -> None:
    before = served.counts("lookup")
    answers = served.ask_together("lookup", [{"x": np.array([[index]])} for index in (1, 99, 3)])
    assert served.runs_since("lookup", before, items=2) == 1  # they were one batch
    assert [answers[0].as_numpy("y").tolist(), answers[2].as_numpy("y").tolist()] == [[[20]], [[40]]]
    assert isinstance(answers[1], InferenceServerException)
    assert "idx=99 must be within the inclusive range [-4,3]" in answers[1].message()
    assert "\n" not in answers[1].message()


@pytest.mark.server
def test_a_string_that_is_not_utf8_fails_alone(served: Served) -> None:
    answers = served.ask_together("strings", [{"x": np.array([[text]], np.object_)} for text in (b"\xff", b"good")])
    assert "input 'x' holds a string that is not UTF-8" in answers[0].message()
    assert answers[0].status() == "StatusCode.INVALID_ARGUMENT"
    assert answers[1].as_numpy("y").tolist() == [[b"good"]]


@pytest.mark.server
def test_intra_op_thread_count_sets_the_number_of_threads(served: Served) -> None:
    counts = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            line = (process / "cmdline").read_bytes()
            if b"triton_python_backend_stub" in line and f" {served.server.pid} " in (process / "stat").read_text():
                for threads in (1, 4):
                    if f"threads{threads}_".encode() in line:
                        counts[threads] = len(list((process / "task").iterdir()))
        except OSError:  # the process is gone
            continue
    assert counts[4] - counts[1] == 3


# --- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.server
def test_what_cannot_be_served_is_refused_by_name_when_it_loads(tmp_path: Path) -> None:
    def inputs_and_outputs(input_type: str = "FP32", dims: str = "[2]", more: str = "", input_name: str = "x") -> str:
        return tensor("input", input_name, input_type, dims, more) + tensor("output", "y", "FP32", "[2]")

    def parameter(key: str, value: str) -> str:
        return f'parameters {{ key: "{key}" value {{ string_value: "{value}" }} }}'

    accelerator = 'optimization { execution_accelerators { cpu_execution_accelerator { name: "openvino" } } }'
    good = identity()
    bad: dict[str, tuple[str, bytes, str]] = {
        "no_such_input": (inputs_and_outputs(input_name="z"), good, "the ONNX model has no input 'z'"),
        "input_not_given": (
            PLAIN,
            graph(
                [helper.make_node("Add", ["x", "x2"], ["y"])],
                [("x", TensorProto.FLOAT, ["n", 2]), ("x2", TensorProto.FLOAT, ["n", 2])],
                [("y", TensorProto.FLOAT, ["n", 2])],
            ),
            "the ONNX model needs input 'x2'",
        ),
        "wrong_type": (inputs_and_outputs("INT32"), good, "'x' is TYPE_INT32 in the config, but tensor(float) in"),
        "wrong_rank": (
            inputs_and_outputs(dims="[2, 2]"),
            good,
            "'x' has shape [-1, 2] in the ONNX model, but [-1, 2, 2]",
        ),
        "ragged_of_rank_2": (inputs_and_outputs(more="allow_ragged_batch: true"), good, "must take it with shape [-1]"),
        "brain_float": (inputs_and_outputs("BF16"), identity(TensorProto.BFLOAT16), "TYPE_BF16 is not supported"),
        "truncated": (PLAIN, good[:-9], "model.onnx is truncated or damaged"),
        "sequence": (f"{PLAIN} sequence_batching {{}}", good, "sequence_batching (and its state) is not supported"),
        "accelerated": (PLAIN + accelerator, good, "execution accelerator 'openvino' is not supported"),
        "bad_threads": (
            PLAIN + parameter("intra_op_thread_count", "many"),
            good,
            "'many', which is not a whole number",
        ),
    }
    for name, (config, content, _) in bad.items():
        add_model(tmp_path / "repository", name, f"max_batch_size: 4 {config}", content)
    with pytest.raises(ServerError) as caught, server_on_free_ports(tmp_path / "repository", tmp_path / "triton.log"):
        pass
    message = str(caught.value)
    clauses = {clause.split(": ")[0].split()[-1]: clause for clause in message.split("; ") if ": " in clause}
    for name, (_, _, reason) in bad.items():
        assert reason in clauses[name], message
    assert "At:" not in message
    assert "\n" not in message


# --- options, without a server --------------------------------------------------------------------------------------


def config_of(**parameters: str) -> dict[str, Any]:
    return {"parameters": {key: {"string_value": value} for key, value in parameters.items()}}


def test_parameters_become_session_options() -> None:
    config = config_of(
        intra_op_thread_count="3",
        inter_op_thread_count="2",
        execution_mode="1",
        enable_mem_arena="0",
        enable_mem_pattern="Off",
        **{"session.use_device_allocator_for_initializers": "1"},
    )
    options = session_options({**config, "optimization": {"graph": {"level": -1}}})
    assert (options.intra_op_num_threads, options.inter_op_num_threads) == (3, 2)
    assert options.execution_mode == ort.ExecutionMode.ORT_PARALLEL
    assert (options.enable_cpu_mem_arena, options.enable_mem_pattern) == (False, False)
    assert options.graph_optimization_level == ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    assert options.get_session_config_entry("session.use_device_allocator_for_initializers") == "1"


def test_without_parameters_onnx_runtimes_defaults_hold() -> None:
    options, default = session_options({}), ort.SessionOptions()
    for name in ("intra_op_num_threads", "inter_op_num_threads", "execution_mode", "enable_mem_pattern"):
        assert getattr(options, name) == getattr(default, name)
    assert options.graph_optimization_level == ort.GraphOptimizationLevel.ORT_ENABLE_ALL


def test_arena_shrinkage_is_an_option_of_the_run() -> None:
    key = "memory.enable_memory_arena_shrinkage"
    assert run_options(config_of(**{key: "cpu:0"})).get_run_config_entry(key) == "cpu:0"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        pytest.param(config_of(intra_op_thread_count="-1"), "intra_op_thread_count is -1", id="negative threads"),
        pytest.param(config_of(execution_mode="2"), "execution_mode is 2; use 0, 1", id="unknown mode"),
        pytest.param(config_of(enable_mem_arena="maybe"), "enable_mem_arena is 'maybe'", id="not a flag"),
        pytest.param({"optimization": {"graph": {"level": 7}}}, "level is 7; use -1, 0, 1, 2", id="unknown level"),
        pytest.param({"model_operations": {"op_library_filename": ["none.so"]}}, "none.so cannot be", id="no library"),
    ],
)
def test_values_out_of_range_are_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ContractError, match=message):
        session_options(config)


def test_a_shared_session_is_refused_only_where_there_is_something_to_share() -> None:
    config = config_of(share_session_between_instances="true")
    refuse_unsupported({**config, "instance_group": [{"count": 1}]})
    with pytest.raises(ContractError, match="share_session_between_instances cannot be honoured"):
        refuse_unsupported({**config, "instance_group": [{"count": 2}]})


def test_an_instance_on_the_cpu_runs_on_the_cpu() -> None:
    assert providers({}, "CPU", 0) == [("CPUExecutionProvider", {})]


@pytest.mark.skipif("CUDAExecutionProvider" in ort.get_available_providers(), reason="this onnxruntime has CUDA")
def test_an_instance_on_the_gpu_is_refused_without_cuda() -> None:
    with pytest.raises(ContractError, match=r"KIND_GPU, but the installed onnxruntime .* has no CUDA"):
        providers({}, "GPU", 0)

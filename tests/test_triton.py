"""The embedded Triton as a process: start, readiness, failures in one sentence, and an end that leaves nothing."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tritonclient.grpc as grpc
import tritonclient.http as http
from google.protobuf import text_format
from onnx import TensorProto, helper
from tritonclient.grpc import model_config_pb2 as pb

from espalier.configs import write_config
from espalier.errors import ServerError
from serving.triton import TritonServer, free_ports
from serving.triton_log import failure

CONFIG = """
backend: "onnxruntime" max_batch_size: 4 instance_group { kind: KIND_CPU count: 1 }
input { name: "x" data_type: TYPE_FP32 dims: [2] } output { name: "y" data_type: TYPE_FP32 dims: [2] }
"""
ROOT = Path(__file__).parent.parent


def add_model(repository: Path, name: str, config: str = CONFIG) -> None:
    write_config(repository / name, text_format.Parse(config, pb.ModelConfig()))
    x, y = (helper.make_tensor_value_info(tensor, TensorProto.FLOAT, ["n", 2]) for tensor in "xy")
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "graph", [x], [y])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    (repository / name / "1").mkdir()
    (repository / name / "1" / "model.onnx").write_bytes(model.SerializeToString())


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    add_model(tmp_path / "repository", "echo")
    return tmp_path / "repository"


def describe(repository: Path, **options: Any) -> TritonServer:
    ports = dict(zip(("http_port", "grpc_port", "metrics_port"), free_ports(3), strict=True))
    return TritonServer(
        repository, **{"log_file": repository.parent / "logs" / "triton.log", "ready_model": "echo", **ports, **options}
    )


def group_of(pid: int) -> set[int]:
    """Return the living processes of the group that `pid` leads, zombies not counted."""
    members = set()
    for process in Path("/proc").glob("[0-9]*"):
        try:
            fields = (process / "stat").read_text().rsplit(")", 1)[1].split()
        except OSError:  # the process is gone
            continue
        if int(fields[2]) == pid and fields[0] != "Z":
            members.add(int(process.name))
    return members


def leftovers(owner: int) -> list[Path]:
    return list(Path("/dev/shm").glob(f"espalier_{owner}_*"))


def eventually(holds: Callable[[], bool], seconds: float = 30) -> bool:
    deadline = time.monotonic() + seconds
    while not holds() and time.monotonic() < deadline:
        time.sleep(0.1)
    return holds()


@pytest.mark.server
def test_it_answers_at_its_urls_and_leaves_nothing_behind(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    before = set(leftovers(os.getpid()))  # of servers that other tests still use
    with describe(repository) as server:
        pid = server.pid
        assert pid is not None
        assert len(group_of(pid)) == 2  # the server and one stub
        assert set(leftovers(os.getpid())) > before
        assert grpc.InferenceServerClient(server.grpc_url).is_model_ready("echo")
        assert http.InferenceServerClient(server.http_url).is_server_ready()
        assert b"nv_inference" in urllib.request.urlopen(server.metrics_url).read()
    assert server.pid is None
    assert group_of(pid) == set()
    assert set(leftovers(os.getpid())) <= before
    assert list(tmp_path.glob("espalier-triton-*")) == []
    server.stop()  # once more does no harm


@pytest.mark.server
def test_in_explicit_mode_only_the_named_models_are_loaded(repository: Path) -> None:
    add_model(repository, "other")
    with describe(repository, model_control="explicit", load_models=["echo"]) as server:
        client = grpc.InferenceServerClient(server.grpc_url)
        assert client.is_model_ready("echo")
        assert not client.is_model_ready("other")
        client.load_model("other")
        assert client.is_model_ready("other")


@pytest.mark.server
def test_a_server_that_dies_is_noticed_and_its_stubs_do_not_outlive_it(repository: Path) -> None:
    before = set(leftovers(os.getpid()))
    server = describe(repository)
    server.start()
    pid = server.pid
    assert pid is not None
    threading.Timer(0.3, os.kill, (pid, signal.SIGKILL)).start()
    with pytest.raises(ServerError, match="tritonserver ended by signal SIGKILL"):
        server.wait()
    server.stop()
    assert group_of(pid) == set()
    assert set(leftovers(os.getpid())) <= before


PROGRAM = """
import sys
from pathlib import Path
from serving.triton import TritonServer
repository, log, *ports = sys.argv[1:]
http, rpc, metrics = map(int, ports)
with TritonServer(
    Path(repository), log_file=Path(log), http_port=http, grpc_port=rpc, metrics_port=metrics, ready_model="echo"
) as server:
    print(server.pid, flush=True)
    server.wait()
"""


@pytest.mark.server
@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGTERM, 128 + signal.SIGTERM), (signal.SIGKILL, -signal.SIGKILL)],
    ids=["TERM", "KILL"],
)
def test_a_signal_to_the_program_ends_the_server(repository: Path, number: int, code: int) -> None:
    arguments = [str(repository), str(repository.parent / "triton.log"), *map(str, free_ports(3))]
    program = subprocess.Popen([sys.executable, "-c", PROGRAM, *arguments], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert program.stdout is not None
    server = int(program.stdout.readline())
    assert group_of(server)
    program.send_signal(number)
    assert program.wait(60) == code
    program.stdout.close()
    assert eventually(lambda: group_of(server) == set() and leftovers(program.pid) == [])


@pytest.mark.server
def test_killing_the_program_while_models_load_leaves_nothing(repository: Path) -> None:
    arguments = [str(repository), str(repository.parent / "triton.log"), *map(str, free_ports(3))]
    environment = {**os.environ, "TMPDIR": str(repository.parent)}
    program = subprocess.Popen([sys.executable, "-c", PROGRAM, *arguments], cwd=ROOT, env=environment)
    assert eventually(lambda: leftovers(program.pid) != [])  # a stub has been started, long before it is ready
    children = Path(f"/proc/{program.pid}/task/{program.pid}/children").read_text().split()
    program.kill()
    program.wait()
    assert eventually(lambda: leftovers(program.pid) == [] and not any(group_of(int(child)) for child in children))
    assert eventually(lambda: not list(repository.parent.glob("espalier-triton-*")))


@pytest.mark.server
def test_a_start_that_takes_too_long_is_given_up(repository: Path) -> None:
    server = describe(repository, ready_model="never")
    with pytest.raises(ServerError, match=r"not ready within 2 s; its log is .*triton.log"):
        server.start(timeout=2)
    assert server.pid is None


@pytest.mark.server
def test_triton_says_why_in_one_sentence(repository: Path) -> None:
    content = repository / "echo" / "1" / "model.onnx"
    content.write_bytes(content.read_bytes()[:-9])
    (repository / "unfinished").mkdir()
    (repository / "typo").mkdir()
    (repository / "typo" / "config.pbtxt").write_text("max_bath_size: 3")
    with pytest.raises(ServerError) as caught:
        describe(repository).start()
    message = str(caught.value)
    assert message.startswith("Triton could not load ")
    assert "\n" not in message
    clauses = dict(clause.split(": ", 1) for clause in message.removeprefix("Triton could not load ").split("; ")[:3])
    assert "model.onnx is truncated or damaged" in clauses["echo"]
    assert "config.pbtxt: No such file or directory" in clauses["unfinished"]
    assert 'has no field named "max_bath_size"' in clauses["typo"]


@pytest.mark.parametrize("name", ["http", "grpc", "metrics"])
def test_a_taken_port_is_named_with_its_option(repository: Path, name: str) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(ServerError, match=rf"port {port} on 127.0.0.1 cannot be used .* with --{name}-port"):
            describe(repository, **{f"{name}_port": port}).start()


def test_one_port_for_two_endpoints_is_refused(repository: Path) -> None:
    port = free_ports(1)[0]
    with pytest.raises(ServerError, match="--grpc-port and --http-port are both"):
        describe(repository, http_port=port, grpc_port=port).start()


@pytest.mark.parametrize("port", [0, 70000])
def test_a_port_out_of_range_is_refused(port: int, repository: Path) -> None:
    with pytest.raises(ServerError, match=f"--http-port is {port}; a port lies between 1 and 65535"):
        describe(repository, http_port=port).start()


def test_a_missing_repository_is_named(tmp_path: Path) -> None:
    with pytest.raises(ServerError, match="nowhere: there is no such model repository"):
        describe(tmp_path / "nowhere").start()


def test_a_log_file_that_cannot_be_written_is_named(repository: Path) -> None:
    (repository.parent / "file").touch()
    with pytest.raises(ServerError, match=r"the log file .*/file/triton.log cannot be written"):
        describe(repository, log_file=repository.parent / "file" / "triton.log").start()


def test_a_missing_package_is_named(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pytriton", None)
    with pytest.raises(ServerError, match="nvidia-pytriton, which carries tritonserver, is not installed"):
        describe(repository).start()


@pytest.mark.parametrize(
    ("present", "message"),
    [
        ([], "bin/tritonserver is missing"),
        (["bin/tritonserver"], r"no stub for the running Python 3\.\d+ \(it has none\)"),
    ],
    ids=["no binary", "no stub"],
)
def test_an_incomplete_package_is_named(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, present: list[str], message: str
) -> None:
    package = tmp_path / "site" / "pytriton"
    for file in ["../__init__.py", *present]:
        (package / "tritonserver" / file).parent.mkdir(parents=True, exist_ok=True)
        (package / "tritonserver" / file).touch()
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.delitem(sys.modules, "pytriton", raising=False)
    with pytest.raises(ServerError, match=message):
        describe(repository).start()


def test_a_log_without_failures_gives_no_reason(tmp_path: Path) -> None:
    log = tmp_path / "triton.log"
    log.write_text('I1121 04:13:19.053 1 server.cc:305] "Waiting for in-flight requests to complete."\n')
    assert failure(log) is None


def test_free_ports_are_free_and_different() -> None:
    ports = free_ports(5)
    assert len(set(ports)) == 5
    for port in ports:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", port))

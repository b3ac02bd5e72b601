"""The embedded Triton: a real tritonserver as a child process, ready when `start` returns, gone when `stop` does."""

import contextlib
import http.client
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Literal, Self

from espalier.contract import ENSEMBLE
from espalier.errors import ServerError
from espalier.repository import cores_counted, find_scheduling
from espalier.scheduling import CORES
from serving import guard
from serving.triton_log import failure, last_lines
from serving.wheel import Wheel

_POLL_SECONDS = 0.1
# Stubs of many models start at once and each imports ONNX Runtime: on a loaded machine Triton's 30 s are not enough.
_STUB_SECONDS = 120
_STOP_SECONDS = 30


class TritonServer:
    """A tritonserver that serves the model repository `repository` on `host`.

    As a context manager it starts and stops the server, and turns SIGTERM into a clean stop, too. If this process is
    killed, a guard process ends the server.

    `ready_model` must be ready for the server to count as ready (None: the server alone). With `model_control`
    "explicit" only `load_models` are loaded, and models can be loaded and unloaded while it runs. Models that compute
    at once take together at most `cores` cores (see espalier.scheduling), by default what the repository needs here;
    with 0 they are not counted, as is better for models that are not ragged: where a batch ends because the next
    request has another shape, Triton's batcher waits for its turn in a busy loop.
    """

    def __init__(
        self,
        repository: Path,
        *,
        log_file: Path,
        host: str = "127.0.0.1",
        http_port: int = 8000,
        grpc_port: int = 8001,
        metrics_port: int = 8002,
        ready_model: str | None = ENSEMBLE,
        model_control: Literal["none", "explicit"] = "none",
        load_models: Sequence[str] = (),
        cores: int | None = None,
    ) -> None:
        """Describe a server; nothing is started or checked yet."""
        self.repository = repository
        self.log_file = log_file
        self.host = host
        self.ports = {"http": http_port, "grpc": grpc_port, "metrics": metrics_port}
        self.ready_model = ready_model
        self.model_control = model_control
        self.load_models = tuple(load_models)
        self.cores = cores_counted(find_scheduling(repository)) if cores is None else cores
        self._process: subprocess.Popen[bytes] | None = None
        self._guard: subprocess.Popen[bytes] | None = None
        self._folder: Path | None = None
        self._shm_prefix = ""
        self._stopping = threading.Event()
        self._exits = contextlib.ExitStack()

    @property
    def _reachable(self) -> str:
        return "127.0.0.1" if self.host in ("0.0.0.0", "") else self.host

    @property
    def http_url(self) -> str:
        """Host and port of the HTTP endpoint, as tritonclient takes them."""
        return f"{self._reachable}:{self.ports['http']}"

    @property
    def grpc_url(self) -> str:
        """Host and port of the gRPC endpoint, as tritonclient takes them."""
        return f"{self._reachable}:{self.ports['grpc']}"

    @property
    def metrics_url(self) -> str:
        """URL of the Prometheus metrics."""
        return f"http://{self._reachable}:{self.ports['metrics']}/metrics"

    @property
    def pid(self) -> int | None:
        """Process id of tritonserver, None while it does not run."""
        return self._process.pid if self._process is not None else None

    # --- start ------------------------------------------------------------------------------------------------------

    def start(self, timeout: float = 300) -> None:
        """Start the server and return when it is ready; raise ServerError, with Triton's own reason, if it fails.

        `timeout` is in seconds and covers the loading of all models.
        """
        if self._process is not None:
            raise ServerError(f"the server is already running (process {self.pid})")
        if not self.repository.is_dir():
            raise ServerError(f"{self.repository}: there is no such model repository; `espalier export` writes one")
        wheel = Wheel.find()
        self._check_ports()
        environment = wheel.environment()
        wheel.check_stub(environment)
        self._stopping.clear()
        try:
            self._launch(wheel, environment)
            self._wait_until_ready(time.monotonic() + timeout, timeout)
        except BaseException:
            self.stop()
            raise

    def _check_ports(self) -> None:
        taken: dict[int, str] = {}
        for name, port in self.ports.items():
            if port in taken:
                raise ServerError(f"--{name}-port and {taken[port]} are both {port}; give each its own port")
            taken[port] = f"--{name}-port"
            if not 0 < port < 65536:
                raise ServerError(f"--{name}-port is {port}; a port lies between 1 and 65535")
            with socket.socket() as probe:
                # As Triton does: a port in TIME_WAIT is free, one with a listener is not.
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                try:
                    probe.bind((self.host, port))
                except OSError as error:
                    raise ServerError(
                        f"port {port} on {self.host} cannot be used for {name} ({error.strerror or error}); "
                        f"choose another with --{name}-port"
                    ) from error

    def _launch(self, wheel: Wheel, environment: dict[str, str]) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="espalier-triton-"))
        wheel.lay_out(self._folder / "backends")
        self._shm_prefix = f"espalier_{os.getpid()}_{secrets.token_hex(4)}_"
        try:
            self.log_file.parent.mkdir(parents=True, exist_ok=True)
            log = self.log_file.open("wb")
        except OSError as error:
            raise ServerError(f"the log file {self.log_file} cannot be written: {error.strerror}") from error
        with log:
            self._process = subprocess.Popen(
                [wheel.binary, *self._arguments()],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                process_group=0,  # Ctrl-C in a terminal is for this process, which then stops the server in order
            )
        guarded = [os.getpid(), self._process.pid, _STOP_SECONDS, self._shm_prefix, self._folder]
        self._guard = subprocess.Popen(
            [sys.executable, "-I", "-S", guard.__file__, *map(str, guarded)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,  # so that a reader of this process's output does not wait for the guard
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # what ends this process from a terminal must not end the guard
        )

    def _arguments(self) -> list[str]:
        arguments = {
            "model-repository": self.repository,
            "backend-directory": f"{self._folder}/backends",
            "model-control-mode": self.model_control,
            "exit-on-error": "true",
            "strict-readiness": "true",
            "http-address": self.host,
            "grpc-address": self.host,
            "metrics-address": self.host,
            **{f"{name}-port": port for name, port in self.ports.items()},
        }
        if self.cores:
            arguments |= {"rate-limit": "execution_count", "rate-limit-resource": f"{CORES}:{self.cores}"}
        backend = {"shm-region-prefix-name": self._shm_prefix, "stub-timeout-seconds": _STUB_SECONDS}
        return [
            "--disable-auto-complete-config",
            *(f"--{key}={value}" for key, value in arguments.items()),
            *(f"--load-model={name}" for name in self.load_models),
            *(f"--backend-config={name},{k}={v}" for name in ("python", "onnxruntime") for k, v in backend.items()),
        ]

    def _wait_until_ready(self, deadline: float, timeout: float) -> None:
        while not self._is_ready():
            code = self._running().poll()
            if code is not None:
                raise ServerError(failure(self.log_file) or self._death(code))
            if time.monotonic() > deadline:
                raise ServerError(f"the server was not ready within {timeout:g} s; its log is {self.log_file}")
            time.sleep(_POLL_SECONDS)

    def _is_ready(self) -> bool:
        paths = ["/v2/health/ready"]
        if self.ready_model is not None:
            paths.append(f"/v2/models/{self.ready_model}/ready")
        connection = http.client.HTTPConnection(self._reachable, self.ports["http"], timeout=5)
        try:
            for path in paths:
                connection.request("GET", path)
                response = connection.getresponse()
                response.read()
                if response.status != 200:
                    return False
            return True
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            raise ServerError("the server is not running")
        return self._process

    def _death(self, code: int) -> str:
        how = f"by signal {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
        return f"tritonserver ended {how}; the end of {self.log_file}: {last_lines(self.log_file)}"

    # --- stop -------------------------------------------------------------------------------------------------------

    def wait(self) -> None:
        """Block until the server ends; raise ServerError if it ended without `stop`."""
        code = self._running().wait()
        if not self._stopping.is_set():
            raise ServerError(self._death(code))

    def stop(self, timeout: float = _STOP_SECONDS) -> None:
        """Stop the server: SIGTERM, up to `timeout` seconds for requests in flight, then SIGKILL. Idempotent."""
        self._stopping.set()
        process = self._process
        try:
            if process is not None and process.poll() is None:
                process.terminate()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(timeout)
        finally:
            if process is not None:
                # The server if it hangs, and stubs that outlived it.
                guard.sweep(process.pid, self._shm_prefix, str(self._folder))
                process.wait()
            elif self._folder is not None:
                shutil.rmtree(self._folder, ignore_errors=True)
            if self._guard is not None:
                self._guard.kill()
                self._guard.wait()
            self._process = self._guard = self._folder = None

    def __enter__(self) -> Self:
        """Start the server."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(_sigterm_as_exit())
            stack.callback(self.stop)
            self.start()
            self._exits = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop the server."""
        self._exits.close()


@contextlib.contextmanager
def _sigterm_as_exit() -> Iterator[None]:
    """Let SIGTERM raise SystemExit, so that `with` blocks end in order; a handler of the program's own stays."""
    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return

    def leave(number: int, _frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


@contextlib.contextmanager
def on_free_ports(repository: Path, log_file: Path, cores: int | None = None) -> Iterator[TritonServer]:
    """Serve a repository that does not change, on free ports; yield the server when all models are ready."""
    http, grpc, metrics = free_ports(3)
    with TritonServer(
        repository, log_file=log_file, http_port=http, grpc_port=grpc, metrics_port=metrics, cores=cores
    ) as server:
        yield server


def free_ports(count: int) -> list[int]:
    """Return `count` different free ports of 127.0.0.1: Triton does not take port 0."""
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [int(probe.getsockname()[1]) for probe in probes]

"""The wiring service: passes of the reconciler, whenever something changes and every few seconds; metrics; states.

Over HTTP it answers /metrics (Prometheus), /tasks (the state of every folder, as JSON) and /healthz.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, make_wsgi_app
from prometheus_client.exposition import ThreadingWSGIServer
from watchfiles import watch

from espalier.contract import StatusFile, task_of
from espalier.errors import ContractError, UnavailableError, WiringError
from serving.wiring import Pass, Wiring

log = logging.getLogger("espalier.wiring")

POLL = 2.0
"""Seconds between two passes when nothing is heard of the file system: volumes of other machines tell nothing."""
HEALTHY = 60.0
"""Seconds since the last pass that went to its end, after which the service is not healthy."""
STATES = ("serving", "loading", "refused")


class Metrics:
    """What the service counts, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        kind: dict[str, Any] = {"registry": self.registry}
        self.tasks = Gauge("espalier_tasks", "Folders and tasks by state", ["state"], **kind)
        self.refused = Gauge("espalier_refused", "1 for a folder that is refused", ["folder"], **kind)
        self.generation = Gauge("espalier_generation", "Generation of the ensemble that is served", **kind)
        self.passes = Counter("espalier_reconciliations", "Passes of the reconciler that went to their end", **kind)
        self.changes = Counter("espalier_changes", "Changes of what is served", **kind)
        self.failures = Counter("espalier_failures", "Folders refused, and passes that failed", ["reason"], **kind)
        self.seconds = Histogram(
            "espalier_seconds_to_serving", "Seconds from a folder's last change to being served",
            buckets=(1, 2, 3, 5, 8, 13, 21, 34, 60, 120, 300), **kind,
        )  # fmt: skip
        for state in STATES:
            self.tasks.labels(state)
        for reason in ("folder", "server", "repository"):
            self.failures.labels(reason)

    def tell(self, status: StatusFile) -> None:
        """Show the states of the folders."""
        self.generation.set(status.generation)
        heads = {name: entry for name, entry in status.folders.items() if task_of(name) is not None}
        for state in STATES:
            self.tasks.labels(state).set(sum(entry.state == state for entry in heads.values()))
        self.refused.clear()
        for name, entry in status.folders.items():
            if entry.state == "refused":
                self.refused.labels(name).set(1)

    def count(self, done: Pass) -> None:
        """Count a pass."""
        self.passes.inc()
        self.failures.labels("folder").inc(done.refusals)
        if done.change is not None:
            self.changes.inc()
            for seconds in done.change.seconds.values():
                self.seconds.observe(seconds)


class Service:
    """Runs the passes of `wiring` in the thread that calls `run`, until `stop`."""

    def __init__(self, wiring: Wiring, host: str = "127.0.0.1", port: int | None = 8003) -> None:
        """Describe a service; without a `port` it answers nobody."""
        self.wiring = wiring
        self.metrics = Metrics()
        self._status = StatusFile(generation=0, folders={})
        self._last = time.monotonic()
        self._stop = threading.Event()
        self._woken = threading.Event()
        self._said = ""
        self._host, self._port = host, port
        self._http: WSGIServer | None = None
        wiring.report = self._tell

    def run(self, passed: Callable[[Pass], None] = lambda done: None) -> None:
        """Reconcile until `stop`; `passed` hears of every pass that went to its end."""
        self.listen()
        watcher = threading.Thread(target=self._watch, name="espalier-watch", daemon=True)
        watcher.start()
        try:
            while not self._stop.is_set():
                self._woken.clear()
                wait = self._step(passed)
                self._woken.wait(wait)
        finally:
            self._stop.set()
            watcher.join(5)
            if self._http is not None:
                self._http.shutdown()
                self._http.server_close()

    def stop(self) -> None:
        """End `run` after the pass at hand."""
        self._stop.set()
        self._woken.set()

    def _step(self, passed: Callable[[Pass], None]) -> float:
        """Do a pass; return how long to wait for the next one."""
        try:
            done = self.wiring.reconcile()
        except UnavailableError as error:
            return self._failed("server", f"{error}; waiting for it")
        except WiringError as error:
            return self._failed("server", str(error))
        except ContractError as error:
            return self._failed("repository", f"{error}; what is served stays")
        except Exception as error:  # a defect of ours must not end what is served
            log.debug("in a pass", exc_info=error)
            return self._failed("server", f"a pass failed unexpectedly: {type(error).__name__}: {error}")
        self._said = ""
        self._last = time.monotonic()
        self.metrics.count(done)
        passed(done)
        if done.change is not None:
            return 0.0
        return self.wiring.inbox.settled / 2 if done.restless else POLL

    def _failed(self, reason: str, sentence: str) -> float:
        self.metrics.failures.labels(reason).inc()
        if sentence != self._said:
            log.error("%s", sentence)
            self._said = sentence
        return POLL / 2

    def _tell(self, status: StatusFile) -> None:
        self._status = status
        self.metrics.tell(status)

    def _watch(self) -> None:
        while not self._stop.is_set():
            try:
                for _ in watch(
                    self.wiring.repository, stop_event=self._stop, debounce=200, step=50, raise_interrupt=False
                ):
                    self._woken.set()
            except (OSError, RuntimeError):
                # The folder is not there, or too many are watched: passes come by the clock.
                self._stop.wait(POLL)

    # --- HTTP ---------------------------------------------------------------------------------------------------------

    def listen(self) -> None:
        """Answer over HTTP from now on; raise WiringError if the port is taken. Doing so twice is harmless."""
        if self._port is None or self._http is not None:
            return
        try:
            self._http = make_server(self._host, self._port, self._application(), ThreadingWSGIServer, _Quiet)
        except OSError as error:
            raise WiringError(
                f"port {self._port} on {self._host} cannot be used for the wiring's metrics "
                f"({error.strerror or error}); choose another with --wiring-port"
            ) from error
        threading.Thread(target=self._http.serve_forever, name="espalier-http", daemon=True).start()

    def _application(self) -> Callable[..., Iterable[bytes]]:
        metrics = make_wsgi_app(self.metrics.registry)

        def answer(environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
            path = environ["PATH_INFO"].rstrip("/")
            if path == "/metrics":
                found: Iterable[bytes] = metrics(environ, start)
                return found
            if path == "/tasks":
                start("200 OK", [("Content-Type", "application/json")])
                return [self._status.model_dump_json().encode()]
            if path == "/healthz":
                healthy = time.monotonic() - self._last < HEALTHY
                start("200 OK" if healthy else "503 Service Unavailable", [("Content-Type", "text/plain")])
                return [b"ok\n" if healthy else b"no pass went to its end for a minute; see the log\n"]
            start("404 Not Found", [("Content-Type", "text/plain")])
            return [b"/metrics, /tasks or /healthz\n"]

        return answer


class _Quiet(WSGIRequestHandler):
    timeout = 5  # seconds for a client to say what it wants

    def log_message(self, format: str, *args: Any) -> None:
        pass


def log_to(stream: Any) -> None:
    """Write the wiring's log, a sentence a line, to `stream`."""
    handler = logging.StreamHandler(stream)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False

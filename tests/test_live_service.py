"""The wiring as people run it: a service over HTTP, commands, Triton that dies, several processes."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import make_branch

from clients import Client
from espalier.configs import read_config, write_config
from espalier.encoder import Base
from espalier.errors import RequestError, WiringError
from export.repository import export
from serving import supervisor
from serving.control import Control
from serving.live import Live, live_folder
from serving.service import Service
from serving.triton import TritonServer, free_ports
from serving.wiring import Pass, Wiring

pytestmark = pytest.mark.server

TEXT = "put the red ball on the table"


def wait_for(what: Any, seconds: float = 90) -> Any:
    """Return what `what` returns, once that is true and raises nothing."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            if found := what():
                return found
        except (RequestError, OSError):
            pass
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.1)


@pytest.fixture(scope="module")
def shop(tiny: Base, specs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("shop")
    tasks = {"intent": 1, "urgency": 1, "same_request": 1}
    branches = [
        make_branch(tiny, specs / f"{task}.yaml", tap, 1, home / "branches" / task, seed)
        for seed, (task, tap) in enumerate(tasks.items())
    ]
    export(branches, home / "models", scheduling={"threads": 1}, load=lambda name, revision: tiny)
    return home / "models"


class Served:
    """`espalier serve` in this process: the server, the service, and where both answer."""

    def __init__(self, home: Path, shop: Path) -> None:
        self.repository = home / "repository"
        self.repository.mkdir()
        for name in ("tokenizer", "trunk_0_1", "head_intent"):
            shutil.copytree(shop / name, self.repository / name)
        self.live = Live(live_folder(self.repository))
        self.live.prepare()
        http, grpc, metrics, self.port = free_ports(4)
        self.server = TritonServer(
            self.live.models, log_file=home / "triton.log", http_port=http, grpc_port=grpc, metrics_port=metrics,
            ready_model=None, model_control="explicit",
        )  # fmt: skip
        self.wiring = Wiring(self.repository, self.live, Control(self.server.grpc_url, self.server.http_url))
        self.where = ["--url", self.server.grpc_url, "--http-url", self.server.http_url]
        self.service = Service(self.wiring, port=self.port)
        self.ready: list[Pass] = []
        self.error: list[BaseException] = []
        self.thread = threading.Thread(target=self._run)
        self.thread.start()

    def _run(self) -> None:
        try:
            supervisor.serve_live(self.server, self.service, self.ready.append)
        except BaseException as error:
            self.error.append(error)

    def get(self, path: str) -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=5) as reply:
            return str(reply.read().decode())

    def tasks(self) -> list[str]:
        with Client(self.server.grpc_url, timeout=10.0) as client:
            return list(client.tasks())

    def ask(self) -> dict[str, Any]:
        with Client(self.server.grpc_url, timeout=10.0) as client:
            return client.ask(TEXT).to_dict()

    def stop(self) -> None:
        self.server.stop()
        self.thread.join(60)
        assert not self.thread.is_alive()


@pytest.fixture(scope="module")
def served(shop: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    running = Served(tmp_path_factory.mktemp("served"), shop)
    try:
        wait_for(lambda: running.ready or running.error)
        assert not running.error
        yield running
    finally:
        running.stop()


def test_a_folder_is_served_seconds_after_it_was_copied(served: Served, shop: Path) -> None:
    shutil.copytree(shop / "head_urgency", served.repository / "head_urgency")
    wait_for(lambda: "urgency" in served.tasks())
    wait_for(lambda: "espalier_seconds_to_serving_count 2.0" in served.get("/metrics"))  # counted last
    assert 'espalier_tasks{state="serving"} 2.0' in served.get("/metrics")
    assert json.loads(served.get("/tasks"))["folders"]["head_urgency"]["state"] == "serving"
    assert served.get("/healthz") == "ok\n"


def test_a_refused_folder_is_told_everywhere_and_served_nowhere(served: Served, shop: Path, espalier: Any) -> None:
    shutil.copytree(shop / "head_same_request", served.repository / "head_same_request")
    (served.repository / "head_same_request" / "labels.txt").unlink()
    wait_for(lambda: 'espalier_refused{folder="head_same_request"} 1.0' in served.get("/metrics"))
    where = ("--url", served.server.grpc_url, "--wiring", f"127.0.0.1:{served.port}")
    status, out, _ = espalier("tasks", *where)
    assert status == 0
    assert "head_same_request: refused: head_same_request/labels.txt is missing; copy or export the head again" in out
    rows = {row["task"]: row for row in json.loads(espalier("tasks", *where, "--json")[1])}
    assert rows["same_request"]["state"] == "refused"
    assert rows["intent"]["state"] == "serving"
    assert "same_request" not in served.tasks()
    shutil.rmtree(served.repository / "head_same_request")
    wait_for(lambda: "espalier_refused{" not in served.get("/metrics"))


def test_history_and_rollback_are_commands(served: Served, shop: Path, espalier: Any) -> None:
    wait_for(lambda: "urgency" in served.tasks())
    shutil.rmtree(served.repository / "head_urgency")
    wait_for(lambda: "urgency" not in served.tasks())
    status, out, _ = espalier("history", "--repository", served.repository)
    assert status == 0
    assert "removed urgency" in out
    status, out, _ = espalier("rollback", "--repository", served.repository, *served.where)
    assert status == 0
    assert "rolled back to" in out
    assert "urgency" in served.tasks()
    time.sleep(3)
    assert "urgency" in served.tasks(), "the service undid the rollback"


def test_promote_is_a_command(served: Served, shop: Path, espalier: Any) -> None:
    folder = served.repository / "head_intent__b"
    shutil.copytree(shop / "head_intent", folder)
    config = read_config(folder)
    config.parameters["score"].string_value = "0.75"
    write_config(folder, config)

    def scores() -> dict[str, float]:
        with Client(served.server.grpc_url, timeout=10.0) as client:
            return {task: info.score for task, info in client.tasks().items() if task.startswith("intent")}

    wait_for(lambda: scores() == {"intent": 0.5, "intent__b": 0.75})
    status, _, said = espalier("promote", "intent__b", "--repository", served.repository)
    assert status == 0
    assert "changed places" in said
    wait_for(lambda: scores() == {"intent": 0.75, "intent__b": 0.5})
    status, _, error = espalier("promote", "intent__c", "--repository", served.repository)
    assert status == 1
    assert "there is no such head" in error
    status, _, error = espalier("promote", "intent", "--repository", served.repository)
    assert "is no candidate" in error


def test_a_triton_that_dies_is_started_again_and_serves_every_task(served: Served) -> None:
    before, old = served.ask(), served.server.pid
    assert old is not None
    os.kill(old, signal.SIGKILL)
    wait_for(lambda: served.server.pid not in (None, old))
    assert wait_for(served.ask) == before


def test_a_taken_port_is_one_sentence(served: Served) -> None:
    other = Service(served.wiring, port=served.port)
    with pytest.raises(WiringError, match=rf"port {served.port} .* choose another with --wiring-port"):
        other.listen()


def test_wire_is_a_command_and_ends_by_a_signal(served: Served, espalier: Any) -> None:
    where = ["--repository", str(served.repository), *served.where]
    status, out, _ = espalier("wire", *where, "--once", "--json")
    assert status == 0
    assert json.loads(out)["folders"]["head_intent"]["state"] == "serving"
    process = subprocess.Popen(
        [Path(sys.executable).parent / "espalier", "wire", *where, "--wiring-port", str(free_ports(1)[0])],
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stderr is not None
    assert "wiring" in process.stderr.readline()
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 128 + signal.SIGTERM

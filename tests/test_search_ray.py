"""The search on a Ray cluster: the same table as without, also when a worker is killed in the midst of a trial."""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from test_search import GRID, content, run
from test_training import write_task

from espalier.contract import Kind
from espalier.encoder import Base
from espalier.spec import load_spec

pytest.importorskip("ray", reason="the extra `ray` is not installed")


@pytest.fixture
def temporary() -> Iterator[Path]:
    """A folder with a short name: Ray keeps sockets below it."""
    path = Path(tempfile.mkdtemp(prefix="esp", dir="/tmp"))
    yield path
    shutil.rmtree(path)


def kill_in_mid_trial(search: psutil.Process, temporary: Path) -> str:
    """Kill the worker, among the processes that `search` started, that holds the lock of a trial; return its name."""
    while search.is_running() and search.status() != psutil.STATUS_ZOMBIE:
        # A trial after its first epoch, before its last.
        for lock in [path.parent / "lock" for path in temporary.glob("espalier-*/.l*.training-*/checkpoint-*")]:
            for process in search.children(recursive=True):
                try:
                    name, held = process.name(), {file.path for file in process.open_files()}
                    if str(lock) in held:
                        process.kill()
                        return name
                except psutil.Error:
                    continue  # it ended meanwhile
        time.sleep(0.005)
    raise AssertionError("no worker was seen in a trial")


def connections(process: psutil.Process) -> list[Any]:
    try:
        return process.net_connections()
    except psutil.Error:
        return []


def test_a_ray_cluster_gives_the_same_table_also_with_a_killed_worker(
    tiny_checkpoint: Path, tiny: Base, tmp_path: Path, temporary: Path
) -> None:
    spec_file = write_task(tmp_path, Kind.CLASSIFICATION)
    options = "--task-layers 1..2 --lr 5e-3 --seeds 2 --epochs 2 --batch-size 8 --threads 1 --ray local --jobs 2"
    command = ["search", spec_file, "--base", tiny_checkpoint, "--out", tmp_path / "out", *options.split(" ")]
    process = subprocess.Popen(
        [sys.executable, "-m", "espalier.cli", *map(str, command)],
        env={**os.environ, "TMPDIR": str(temporary), "COLUMNS": "200"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    search = psutil.Process(process.pid)
    try:
        assert "ray" in kill_in_mid_trial(search, temporary)
        started = search.children(recursive=True)
        listening = [c for p in started for c in connections(p) if c.status == psutil.CONN_LISTEN]
        table, messages = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 0, messages
    assert "Traceback" not in messages
    assert listening
    assert {connection.laddr.ip for connection in listening} <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}
    result, heard = run(load_spec(spec_file), tiny, tmp_path / "whole")
    assert heard.ran == {trial.name for trial in GRID}
    assert content(tmp_path / "out") == content(tmp_path / "whole")
    for row in result.rows:
        assert f"{row.mean:.4f}" in table
    _, alive = psutil.wait_procs(started, timeout=20)
    assert not [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]
    assert list(temporary.iterdir()) == []

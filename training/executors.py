"""Where the trials of a search run: in this process, in processes of this machine, or on a Ray cluster.

A trial is the same training anywhere. It always computes with `Shared.threads` threads, since their number decides in
which order sums are added, and so the last digits.
"""

import contextlib
import functools
import logging
import multiprocessing
import os
import platform
import secrets
import shutil
import signal
import socket
import tempfile
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol

import torch

from espalier.branch import CARD_FILE, WEIGHTS_FILE, BranchCard
from espalier.encoder import Base, load_base
from espalier.errors import CheckpointError, EspalierError, FingerprintError, SearchError
from espalier.files import write_whole
from espalier.spec import TaskSpec
from training.activations import ActivationCache
from training.data import TaskData
from training.distill import Init, distill
from training.finetune import train
from training.grid import Trial
from training.trainer import Arguments, Progress, Report

LOCAL_RAY = "local"
"""The address that starts a Ray cluster on this machine."""
RETRIES = 3
"""How often Ray runs a trial again whose worker died."""
REACH_SECONDS = 10.0
GO_ON = "finished trials are kept, and the same command goes on"

Made = tuple[BranchCard, bytes]
"""The card and the weights of a trained branch."""


@dataclass(frozen=True)
class Shared:
    """What all trials of a search share. It travels to the workers, the task's data included."""

    spec: TaskSpec
    data: TaskData
    base: str
    revision: str
    fingerprint: str  # of all layers of the base
    arguments: Arguments  # learning rate and seed are the trial's own
    teacher: Path | None
    cache: ActivationCache | None
    threads: int
    folder: Path  # where trials work


class Workers(Protocol):
    """Run trials, `slots` of them at once."""

    @property
    def slots(self) -> int:
        """How many trials run at once."""

    def submit(self, trial: Trial, inputs: str) -> "Future[Made]":
        """Start `trial`, whose branch will have the digest `inputs`."""

    def result(self, future: "Future[Made]") -> Made:
        """Return what a trial that has ended gave; raise an EspalierError if it failed."""


def run_trial(shared: Shared, base: Base, trial: Trial, report: Report) -> Made:
    """Train the branch of `trial`; one that was stopped in `shared.folder` goes on there from its last epoch."""
    arguments = replace(shared.arguments, learning_rate=trial.learning_rate, seed=trial.seed)
    out = shared.folder / trial.name
    before = torch.get_num_threads()
    torch.set_num_threads(shared.threads)
    try:
        if trial.init is None or shared.teacher is None:
            tap = base.config.num_hidden_layers - trial.layers
            card, _ = train(
                shared.spec, base, tap, trial.layers, arguments, out, report, shared.cache, shared.data
            )  # fmt: skip
        else:
            card, _ = distill(
                shared.teacher, base, trial.layers, arguments, out, report, shared.spec, shared.cache,
                Init(trial.init), shared.data,
            )  # fmt: skip
    finally:
        torch.set_num_threads(before)
    return card, (out / WEIGHTS_FILE).read_bytes()


# --- this process -----------------------------------------------------------------------------------------------


class Here:
    """One trial after the other, in this process; `report` is told of each optimizer step."""

    slots = 1

    def __init__(self, shared: Shared, base: Base, report: Report) -> None:
        self._shared = shared
        self._base = base
        self._report = report

    def submit(self, trial: Trial, inputs: str) -> "Future[Made]":
        """Run `trial` to its end."""
        future: Future[Made] = Future()
        try:
            future.set_result(run_trial(self._shared, self._base, trial, self._report))
        except EspalierError as error:
            future.set_exception(error)
        return future

    def result(self, future: "Future[Made]") -> Made:
        """Return what the trial gave."""
        return future.result()


# --- processes of this machine ----------------------------------------------------------------------------------


class Processes:
    """`jobs` processes, which end with the block that uses them, and if this process dies."""

    def __init__(self, shared: Shared, jobs: int) -> None:
        self.slots = jobs
        context = multiprocessing.get_context("spawn")  # torch's threads do not survive a fork
        leash, self._leash = context.Pipe(duplex=False)
        self._pool = ProcessPoolExecutor(jobs, context, _start_worker, (shared, leash))

    def submit(self, trial: Trial, inputs: str) -> "Future[Made]":
        """Let a process run `trial`."""
        try:
            return self._pool.submit(_in_worker, trial)
        except BrokenProcessPool as error:  # a process died since the last result
            failed: Future[Made] = Future()
            failed.set_exception(error)
            return failed

    def result(self, future: "Future[Made]") -> Made:
        """Return what the trial gave."""
        try:
            return future.result()
        except BrokenProcessPool as error:
            raise SearchError(
                f"a worker process died: it was killed, or memory ran out; {GO_ON}; fewer --jobs need less memory"
            ) from error

    def close(self) -> None:
        """End the processes, also in the midst of a trial."""
        self._leash.close()
        self._pool.shutdown(cancel_futures=True)


_shared: Shared  # of this worker process


def _start_worker(shared: Shared, leash: Connection) -> None:
    global _shared
    _shared = shared
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's affair, which then lets go of the leash
    threading.Thread(target=_end_with, args=(leash,), daemon=True).start()


def _end_with(leash: Connection) -> None:
    with contextlib.suppress(EOFError):  # the other end was closed, or its process is gone
        leash.recv()
    os._exit(1)


def _in_worker(trial: Trial) -> Made:
    base = _load_base(_shared.base, _shared.revision, _shared.fingerprint)
    return run_trial(_shared, base, trial, _silent)


def _silent(progress: Progress) -> None:
    pass


@functools.lru_cache(maxsize=1)
def _load_base(name: str, revision: str, fingerprint: str) -> Base:
    """Load the base in a worker, which may be on another machine."""
    try:
        base = load_base(name, revision)
    except CheckpointError as error:
        raise CheckpointError(f"the worker on {platform.node()} needs the base, too: {error}") from error
    if base.fingerprint(base.config.num_hidden_layers) != fingerprint:
        raise FingerprintError(
            f"the base {name!r} on {platform.node()} is another than that of this search; give both the same"
        )
    return base


# --- a Ray cluster ----------------------------------------------------------------------------------------------


class Cluster:
    """Workers of the Ray cluster at `address`; a trial whose worker dies is run again.

    They need Espalier with the extras `train` and `ray` and the base, but no file system in common: data, teacher and
    branch travel. A trial takes as many CPUs as it has threads, and a GPU if the cluster has any.
    """

    def __init__(self, shared: Shared, address: str, jobs: int | None) -> None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # Ray's later default; it warns without
        if address == LOCAL_RAY:
            os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # Ray's switch for listening on loopback alone
            # Other users of the machine reach loopback, too. A token of our own: Ray would keep one in the home folder.
            os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
        try:
            import ray
        except ModuleNotFoundError as error:
            raise SearchError("--ray needs the Python package 'ray': pip install 'espalier[train,ray]'") from error
        self._ray: Any = ray
        self._jobs = jobs
        self._threads = shared.threads
        self._files = contextlib.ExitStack()
        try:
            self._connect(address)
            widest = max((node["Resources"].get("CPU", 0) for node in ray.nodes() if node["Alive"]), default=0)
            if widest < shared.threads:
                raise SearchError(
                    f"a trial takes {shared.threads} threads, but no node of the Ray cluster has more than "
                    f"{widest:.0f} CPUs; lower --threads"
                )
            gpus = int(ray.cluster_resources().get("GPU", 0) > 0)
            self._run = ray.remote(num_cpus=shared.threads, num_gpus=gpus, max_retries=RETRIES)(_on_ray)
            teacher = None
            if shared.teacher is not None:
                teacher = {name: (shared.teacher / name).read_bytes() for name in (CARD_FILE, WEIGHTS_FILE)}
            self._shared = ray.put((shared, teacher))
        except BaseException:
            self.close()
            raise

    def _connect(self, address: str) -> None:
        options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.CRITICAL}
        if address == LOCAL_RAY:
            home = self._files.enter_context(tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True))
            cpus = (self._jobs or 1) * self._threads
            options |= {"num_cpus": cpus, "include_dashboard": False, "_temp_dir": home}
        try:
            host, colon, port = address.removeprefix("ray://").rpartition(":")
            if colon:  # Ray itself would try for minutes
                socket.create_connection((host, int(port)), timeout=REACH_SECONDS).close()
            self._ray.init(address, **options)
        except (OSError, RuntimeError, ValueError) as error:
            reason = getattr(error, "strerror", None) or (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise SearchError(
                f"--ray {address}: there is no Ray cluster that can be used ({reason}); start one with "
                f"'ray start --head' and give HOST:PORT, or use --ray {LOCAL_RAY}"
            ) from error

    @property
    def slots(self) -> int:
        """As many as the cluster's CPUs hold now, at most `jobs`."""
        held = int(self._ray.cluster_resources().get("CPU", 0) // self._threads)
        return max(1, held if self._jobs is None else min(held, self._jobs))

    def submit(self, trial: Trial, inputs: str) -> "Future[Made]":
        """Let the cluster run `trial`."""
        future: Future[Made] = self._run.remote(self._shared, trial, inputs).future()
        return future

    def result(self, future: "Future[Made]") -> Made:
        """Return what the trial gave."""
        try:
            return future.result()
        except self._ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, EspalierError):
                raise error.cause from None
            reason = str(error.cause).splitlines()[0]
            raise SearchError(f"a trial failed on the Ray cluster: {reason}; {GO_ON}") from error
        except self._ray.exceptions.RayError as error:
            reason = str(error).splitlines()[0]
            raise SearchError(f"the Ray cluster lost a trial {RETRIES + 1} times: {reason}; {GO_ON}") from error

    def close(self) -> None:
        """Leave the cluster; trials of ours that still run there end."""
        self._ray.shutdown()
        self._files.close()


def _on_ray(carried: tuple[Shared, Mapping[str, bytes] | None], trial: Trial, inputs: str) -> Made:
    """Run a trial in a Ray worker; one whose worker was killed goes on, on the same machine, from its last epoch."""
    shared, teacher = carried
    home = Path(tempfile.gettempdir()) / f"espalier-{os.getuid()}-{inputs[:24]}"
    home.mkdir(mode=0o700, exist_ok=True)
    if home.stat().st_uid != os.getuid():
        raise SearchError(f"{home} on {platform.node()} belongs to another user; remove it")
    shared = replace(shared, folder=home)
    if teacher is not None:
        shared = replace(shared, teacher=home / "teacher")
        for name, content in teacher.items():
            write_whole(home / "teacher" / name, content)
    try:
        return run_trial(shared, _load_base(shared.base, shared.revision, shared.fingerprint), trial, _silent)
    finally:  # a kill leaves it for the next try
        shutil.rmtree(home)


@contextlib.contextmanager
def workers(shared: Shared, base: Base, jobs: int | None, ray: str | None, report: Report) -> Iterator[Workers]:
    """Yield the workers that the options --jobs and --ray ask for."""
    if ray is None and (jobs is None or jobs == 1):
        yield Here(shared, base, report)
        return
    started = Processes(shared, jobs or 1) if ray is None else Cluster(shared, ray, jobs)
    with contextlib.closing(started):
        yield started

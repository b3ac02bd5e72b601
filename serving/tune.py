"""`espalier tune`: how the trunk is scheduled best on this machine, found by trying it on a real Triton.

A trial serves a copy of the repository under one scheduling and looks for the highest rate of random arrivals (a
Poisson process) at which P99 stays within a bound. Threads and instances are settled first, then the batch, then the
queue delay, each from the best so far. What won is then tried against what was deployed, in turn, and only if it is
faster there as well, by more than noise, it is written. Trials are kept beside the repository until all is done: what
was interrupted goes on.

Triton's model_analyzer does this for single models and takes at most four composing models of an ensemble.
"""

import os
import platform
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import onnxruntime
from pydantic import BaseModel, ConfigDict, ValidationError
from tritonclient.grpc import model_config_pb2 as pb

from espalier.configs import ensemble_config, read_config, write_config
from espalier.contract import ENSEMBLE, MODEL_FILE, TOKENIZER, TOKENIZER_FILE, HeadInfo, TrunkInfo
from espalier.errors import ContractError, ServerError
from espalier.files import digest, locked, write_whole
from espalier.repository import Repository, check_head
from espalier.scheduling import Scheduling, available_cores
from espalier.texts import mixed, read_texts
from serving.load import Asked, closed_loop, highest_rate
from serving.triton import on_free_ports

CONCURRENCY = 32
"""Requests under way where the rate is the server's to choose."""
BATCHES = (4, 8, 16, 0)
DELAYS = (0, 1_000, 4_000)  # µs
WEIGHTS = 2.5
"""Bytes in memory for each of a model file: the weights, the same packed for the processor, and room to compute."""
TEXTS = 256
STEPS = 5
"""Windows in which the highest rate is looked for, by halves."""
TURNS = 2
"""Trials of the deployed and of the best scheduling in the end, in turn."""
MARGIN = 1.05
"""How much faster the best must be there to be written: less is noise, and a running server loads its trunk anew."""
START = 15.0
"""Seconds of a trial besides its windows, before any was timed."""


class Trial(BaseModel):
    """What a scheduling came to."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    scheduling: Scheduling
    rate: float  # texts/s, the highest within the bound; 0 if there is none
    p50: float | None  # seconds, at that rate
    p99: float | None
    full: float  # texts/s with CONCURRENCY requests under way, however long they wait


class _Record(BaseModel):
    """The trials so far, and what they are good for."""

    conditions: str
    bound: float
    trials: list[Trial] = []


@dataclass(frozen=True)
class Tunable:
    """What is tuned: models of a repository that run alike, asked through its ensemble."""

    repository: Path
    models: Sequence[str]
    outputs: Sequence[str]
    others: Sequence[str]  # the folders that are served besides
    ensemble: pb.ModelConfig | None = None  # if it is not one of them

    @property
    def scheduling(self) -> Scheduling:
        """How the models are scheduled now."""
        return Scheduling.read(read_config(self.repository / self.models[0]))

    @property
    def record(self) -> Path:
        """Where trials are kept."""
        return self.repository.resolve().with_name(f"{self.repository.resolve().name}.tune.json")

    def fits(self, scheduling: Scheduling) -> bool:
        """Tell whether all instances of the models take, about, no more than half of this machine's memory."""
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return WEIGHTS * scheduling.instances * sum(file.stat().st_size for file in self.files()) < memory / 2

    def files(self) -> list[Path]:
        """Return the ONNX files of the models."""
        return [file for name in self.models for file in sorted((self.repository / name).glob(f"*/{MODEL_FILE}"))]

    def write(self, scheduling: Scheduling) -> None:
        """Write `scheduling` into the configs of the models."""
        with locked(self.repository / ".export.lock"):
            _schedule(self.repository, self.models, scheduling)

    @contextmanager
    def copy(self, scheduling: Scheduling) -> Iterator[Path]:
        """Yield a copy of the repository under `scheduling`; its files are links, but for the configs."""
        with tempfile.TemporaryDirectory(prefix="espalier-tune-") as temporary:
            folder, ignored = Path(temporary), shutil.ignore_patterns(".*")
            for model in (*self.models, *self.others):
                shutil.copytree(self.repository / model, folder / model, copy_function=_link, ignore=ignored)
            if self.ensemble is not None:
                (folder / ENSEMBLE / "1").mkdir(parents=True)
                write_config(folder / ENSEMBLE, self.ensemble)
            _schedule(folder, self.models, scheduling)
            yield folder


@dataclass(frozen=True)
class Tuned:
    """What tuning found; the medians of the last turns, where there were some."""

    before: Trial
    after: Trial
    bound: float  # seconds of P99
    trials: Sequence[Trial]
    complete: bool  # False: time was up before all was tried
    written: bool

    def summary(self) -> dict[str, Any]:
        """Return it as JSON takes it."""
        own = {name: getattr(self, name).model_dump() for name in ("before", "after")}
        trials = [trial.model_dump() for trial in self.trials]
        return {**own, "p99_bound": self.bound, "trials": trials, "complete": self.complete, "written": self.written}


def tunable(repository: Path, tasks: Sequence[str]) -> Tunable:
    """Return the trunk of a repository, asked for `tasks` (none: for all); raise ContractError if there is none.

    Heads count that lie there and fit the trunk, as they do for a running server.
    """
    there = Repository(repository)
    trunk = there.trunk()
    if not trunk:
        raise ContractError(f"{repository} holds no exported trunk; run `espalier export` first")
    if there.scheduling() is None:
        raise ContractError(
            f"{repository} tells no threads: they are settings of a CPU's trunk; a trunk exported for a GPU has none"
        )
    heads = [head for folder in there.head_folders() if (head := _fitting(folder, trunk))]
    names = [head.task for head in heads]
    if not names:
        raise ContractError(f"{repository} holds no head that fits its trunk; run `espalier export` with a branch")
    if unknown := sorted(set(tasks) - set(names)):
        raise ContractError(f"{repository} has no task {unknown[0]!r}; it has {', '.join(names)}")
    return Tunable(
        repository,
        [segment.model for segment in trunk],
        tuple(tasks) or names,
        [TOKENIZER, *(head.model for head in heads)],
        ensemble_config(trunk, heads),
    )


def _fitting(folder: Path, trunk: Sequence[TrunkInfo]) -> HeadInfo | None:
    """Return what a head says of itself; None if it does not fit, or is not whole: it is not served then, either."""
    try:
        config = read_config(folder)
        head = check_head(config, trunk)
    except ContractError:
        return None
    return head if config.name == folder.name and next(folder.glob(f"*/{MODEL_FILE}"), None) else None


def texts_to_ask(repository: Path, file: Path | None) -> list[str]:
    """Return the lines of `file`, or texts of mixed lengths; raise DataError if there are none."""
    if file is None:
        tokenizer = next((repository / TOKENIZER).glob(f"*/{TOKENIZER_FILE}"))
        return mixed(tokenizer.read_text(encoding="utf-8"), TEXTS)
    return read_texts(file, "--texts takes a text per line")


@dataclass
class Tuner:
    """Tries schedulings of `tunable` on `texts`, as long as `budget` seconds allow.

    `bound` is the longest P99 that is allowed, in seconds; by default ten times the median of an unloaded request as
    deployed. `report` hears of each trial when it is done, `begin` when a scheduling is about to be tried.
    """

    tunable: Tunable
    texts: Sequence[str]
    budget: float
    bound: float | None = None
    seconds: float = 8.0  # of a window
    report: Callable[[Trial], None] = lambda trial: None
    begin: Callable[[Scheduling], None] = lambda scheduling: None
    log_file: Path = Path("logs/tune.log")
    _record: _Record = field(init=False)
    _took: list[float] = field(default_factory=list, init=False)

    def run(self) -> Tuned:
        """Return what is best; it is written into the repository if it beats what is deployed.

        Raises ServerError if the repository cannot be served, or if it or the record beside it cannot be written.
        """
        try:
            with locked(self.tunable.repository / ".export.lock"):
                pass  # told now, not when time is up
            return self._run()
        except OSError as error:
            place = error.filename2 or error.filename or self.tunable.repository
            raise ServerError(
                f"{place} cannot be written ({error.strerror or error}); tuning keeps its trials beside the "
                "repository, and writes what is best into it"
            ) from error

    def _run(self) -> Tuned:
        end = time.monotonic() + self.budget
        deployed = self.tunable.scheduling
        self._record = self._read()
        self._save()
        before = self._trial(deployed)
        complete = True
        for tries in self._stages():
            for scheduling in tries(self._best().scheduling):
                if not self._known(scheduling) and time.monotonic() + (1 + 2 * TURNS) * self._longest() > end:
                    complete = False
                    break
                self._trial(scheduling)
        best = self._best()
        written = False
        if best.scheduling != deployed:
            if time.monotonic() + 2 * TURNS * self._longest() > end:
                complete = False
            else:
                turns = [[self._measure(each) for each in (deployed, best.scheduling)] for _ in range(TURNS)]
                before, best = (_median(own) for own in zip(*turns, strict=True))
                written = best.rate > MARGIN * before.rate
        if written:
            self.tunable.write(best.scheduling)
        if complete:
            self.tunable.record.unlink()  # another run measures anew: the machine may have changed
        return Tuned(before, best if written else before, self._record.bound, self._record.trials, complete, written)

    def _stages(self) -> Iterator[Callable[[Scheduling], list[Scheduling]]]:
        cores = available_cores()
        powers = [1 << exponent for exponent in range(cores.bit_length())]
        threads = sorted({count for count in (*powers, max(1, cores // 2), cores) if count <= cores})

        def shapes(best: Scheduling) -> list[Scheduling]:
            tried = [best.model_copy(update={"threads": count, "instances": cores // count}) for count in threads]
            return [one for one in tried if self.tunable.fits(one)]

        yield shapes
        yield lambda best: [best.model_copy(update={"batch": batch}) for batch in BATCHES]
        yield lambda best: [best.model_copy(update={"delay": delay}) for delay in DELAYS]

    def _known(self, scheduling: Scheduling) -> Trial | None:
        return next((trial for trial in self._record.trials if trial.scheduling == scheduling), None)

    def _best(self) -> Trial:
        return max(self._record.trials, key=lambda trial: (trial.rate, trial.full))

    def _longest(self) -> float:
        """Return the seconds that a trial takes: the longest so far, or a guess."""
        return max(self._took, default=(1 + STEPS) * self.seconds + START)

    def _trial(self, scheduling: Scheduling) -> Trial:
        if known := self._known(scheduling):
            return known
        try:
            trial = self._measure(scheduling)
        except ServerError:
            if not self._record.trials:
                raise  # what is deployed cannot be served
            trial = Trial(scheduling=scheduling, rate=0.0, p50=None, p99=None, full=0.0)
        self._record.trials.append(trial)
        self._save()
        self.report(trial)
        return trial

    def _save(self) -> None:
        write_whole(self.tunable.record, self._record.model_dump_json(indent=2) + "\n")

    def _measure(self, scheduling: Scheduling) -> Trial:
        self.begin(scheduling)
        began = time.monotonic()
        with self.tunable.copy(scheduling) as folder, on_free_ports(folder, self.log_file) as server:
            asked = Asked(server.grpc_url, ENSEMBLE, tuple(self.tunable.outputs))
            if not self._record.bound:
                unloaded = closed_loop(asked, self.texts, 1, self.seconds)
                self._record.bound = 10 * unloaded.percentile(50)
            full = closed_loop(asked, self.texts, CONCURRENCY, self.seconds)
            rate, window = highest_rate(asked, self.texts, self._record.bound, full.rate, self.seconds, STEPS)
        p50, p99 = (None, None) if window is None else (window.percentile(50), window.percentile(99))
        self._took.append(time.monotonic() - began)
        return Trial(scheduling=scheduling, rate=rate, p50=p50, p99=p99, full=full.rate)

    def _read(self) -> _Record:
        """Return the trials of an earlier run of the same; what was measured otherwise is of no use."""
        new = _Record(conditions=self._conditions(), bound=self.bound or 0.0)
        try:
            old = _Record.model_validate_json(self.tunable.record.read_bytes())
        except (OSError, ValidationError):
            return new
        return old if old.conditions == new.conditions else new

    def _conditions(self) -> str:
        models = [f"{file.stat().st_size} {file.stat().st_mtime_ns}" for file in self.tunable.files()]
        where = f"{platform.node()} {available_cores()} {onnxruntime.__version__}"
        settings = f"{self.seconds} {self.bound} {sorted(self.tunable.outputs)}"
        return digest(*models, where, settings, *self.texts)


def _median(trials: Sequence[Trial]) -> Trial:
    """Return the trial with the medians of `trials`, which are of one scheduling."""

    def middle(values: Sequence[float | None]) -> float | None:
        there = [value for value in values if value is not None]
        return median(there) if there else None

    return Trial(
        scheduling=trials[0].scheduling,
        rate=median(trial.rate for trial in trials),
        p50=middle([trial.p50 for trial in trials]),
        p99=middle([trial.p99 for trial in trials]),
        full=median(trial.full for trial in trials),
    )


def _schedule(repository: Path, models: Sequence[str], scheduling: Scheduling) -> None:
    for name in models:
        config = read_config(repository / name)
        scheduling.write_to(config)
        write_config(repository / name, config)


def _link(source: str, to: str) -> None:
    os.symlink(os.path.realpath(source), to)  # a hard link would touch the file, and so wake the wiring

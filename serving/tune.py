"""`espalier tune`: how the trunk is scheduled best on this machine, found by trying it on a real Triton.

A trial serves a copy of the repository under one scheduling and looks for the highest rate of random arrivals (a
Poisson process) at which P99 stays within a bound. Threads and instances are settled first, then the batch, then the
queue delay, each from the best so far. What won is then tried against what was deployed, in turn, and only if it is
faster there as well, it is written. Trials are kept beside the repository: what was interrupted goes on.

Triton's model_analyzer does this for single models and takes at most four composing models of an ensemble.
"""

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from espalier.configs import read_config, write_config
from espalier.contract import ENSEMBLE, MODEL_FILE, TOKENIZER, TOKENIZER_FILE
from espalier.errors import ContractError, DataError, ServerError
from espalier.files import digest, locked, write_whole
from espalier.repository import Repository
from espalier.scheduling import Scheduling, available_cores
from espalier.texts import mixed
from serving.load import Asked, closed_loop, highest_rate
from serving.preflight import check_repository
from serving.triton import on_free_ports

CONCURRENCY = 32
"""Requests under way where the rate is the server's to choose."""
BATCHES = (4, 8, 16, 0)
DELAYS = (0, 1_000, 4_000)  # µs
WEIGHTS = 2.5
"""Bytes in memory for each of a model file: the weights, the same packed for the processor, and room to compute."""
TEXTS = 256
TURNS = 2
"""Trials of the deployed and of the best scheduling in the end, in turn."""


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
        files = [file for name in self.models for file in (self.repository / name).glob(f"*/{MODEL_FILE}")]
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return WEIGHTS * scheduling.instances * sum(file.stat().st_size for file in files) < memory / 2

    def write(self, scheduling: Scheduling) -> None:
        """Write `scheduling` into the configs of the models."""
        with locked(self.repository / ".export.lock"):
            _schedule(self.repository, self.models, scheduling)

    @contextmanager
    def copy(self, scheduling: Scheduling) -> Iterator[Path]:
        """Yield a copy of the repository under `scheduling`; its files are links, but for the configs."""
        with tempfile.TemporaryDirectory(prefix="espalier-tune-") as temporary:
            folder = Path(temporary)
            for model in self.repository.iterdir():
                if model.is_dir():
                    to, ignored = folder / model.name, shutil.ignore_patterns(".*")
                    shutil.copytree(model, to, copy_function=_link, ignore=ignored)
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
    """Return the trunk of a repository, asked for `tasks` (none: for all); raise ContractError or ServerError."""
    heads = [head.task for head in check_repository(repository)]
    if unknown := sorted(set(tasks) - set(heads)):
        raise ContractError(f"{repository} has no task {unknown[0]!r}; it has {', '.join(heads)}")
    there = Repository(repository)
    if there.scheduling() is None:
        raise ContractError(f"{repository} was exported for a GPU: threads and instances are settings of a CPU's trunk")
    return Tunable(repository, [segment.model for segment in there.trunk()], tuple(tasks) or tuple(heads))


def texts_to_ask(repository: Path, file: Path | None) -> list[str]:
    """Return the lines of `file`, or texts of mixed lengths; raise DataError if there are none."""
    if file is None:
        tokenizer = next((repository / TOKENIZER).glob(f"*/{TOKENIZER_FILE}"))
        return mixed(tokenizer.read_text(encoding="utf-8"), TEXTS)
    try:
        lines = [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file} cannot be read: {error}; --texts takes a text per line") from error
    if not lines:
        raise DataError(f"{file} holds no text; --texts takes a text per line")
    return lines


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

    def run(self) -> Tuned:
        """Return what is best; it is written into the repository if it beats what is deployed.

        Raises ServerError if the repository cannot be served, or if it or the record beside it cannot be written.
        """
        try:
            return self._run()
        except OSError as error:
            raise ServerError(
                f"{error.filename or self.tunable.repository} cannot be written ({error.strerror or error}); tuning "
                "keeps its trials beside the repository, and writes what is best into it"
            ) from error

    def _run(self) -> Tuned:
        end = time.monotonic() + self.budget
        deployed = self.tunable.scheduling
        self._record = self._read()
        before = self._trial(deployed)
        complete = True
        for tries in self._stages():
            for scheduling in tries(self._best().scheduling):
                reserve = 2 * TURNS * self._longest()
                if not self._known(scheduling) and time.monotonic() + self._longest() + reserve > end:
                    complete = False
                    break
                self._trial(scheduling)
        best = self._best()
        written = False
        if best.scheduling != deployed:
            turns = [[self._measure(each) for each in (deployed, best.scheduling)] for _ in range(TURNS)]
            before, best = (_median(own) for own in zip(*turns, strict=True))
            if written := (best.rate, best.full) > (before.rate, before.full):
                self.tunable.write(best.scheduling)
        return Tuned(before, best if written else before, self._record.bound, self._record.trials, complete, written)

    def _stages(self) -> Iterator[Callable[[Scheduling], list[Scheduling]]]:
        cores = available_cores()

        def shapes(best: Scheduling) -> list[Scheduling]:
            pairs = [(threads, cores // threads) for threads in _powers(cores)] + [(cores, 2)]
            tried = [best.model_copy(update={"threads": t, "instances": i}) for t, i in pairs]
            return [one for one in tried if self.tunable.fits(one)]

        yield shapes
        yield lambda best: [best.model_copy(update={"batch": batch}) for batch in BATCHES]
        yield lambda best: [best.model_copy(update={"delay": delay}) for delay in DELAYS]

    def _known(self, scheduling: Scheduling) -> Trial | None:
        return next((trial for trial in self._record.trials if trial.scheduling == scheduling), None)

    def _best(self) -> Trial:
        return max(self._record.trials, key=lambda trial: (trial.rate, trial.full))

    def _longest(self) -> float:
        """Return the seconds that a trial takes, about: windows, their draining, and the start of the server."""
        return 9 * self.seconds + 10

    def _trial(self, scheduling: Scheduling) -> Trial:
        if known := self._known(scheduling):
            return known
        trial = self._measure(scheduling)
        self._record.trials.append(trial)
        write_whole(self.tunable.record, self._record.model_dump_json(indent=2) + "\n")
        self.report(trial)
        return trial

    def _measure(self, scheduling: Scheduling) -> Trial:
        self.begin(scheduling)
        with self.tunable.copy(scheduling) as folder, on_free_ports(folder, self.log_file) as server:
            asked = Asked(server.grpc_url, ENSEMBLE, tuple(self.tunable.outputs))
            if not self._record.bound:
                unloaded = closed_loop(asked, self.texts, 1, self.seconds)
                self._record.bound = 10 * unloaded.percentile(50)
            full = closed_loop(asked, self.texts, CONCURRENCY, self.seconds)
            rate, window = highest_rate(asked, self.texts, self._record.bound, full.rate, self.seconds)
        p50, p99 = (None, None) if window is None else (window.percentile(50), window.percentile(99))
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
        models = [
            digest(file.read_bytes())
            for name in sorted(folder.name for folder in self.tunable.repository.iterdir() if folder.is_dir())
            for file in sorted((self.tunable.repository / name).glob(f"*/{MODEL_FILE}"))
        ]
        settings = f"{available_cores()} {self.seconds} {self.bound} {sorted(self.tunable.outputs)}"
        return digest(*models, settings, *self.texts)


def _powers(most: int) -> list[int]:
    return [1 << exponent for exponent in range(most.bit_length())]


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

"""The search over task layers, learning rates and seeds: the paper's grid, for teachers and for students.

Its folder OUT holds, besides the report (search.json, search.md, box plots):

    trials/<trial>.json   every finished trial: its dev metrics by epoch, and the digest of what it was trained from
    l<layers>/            a branch folder: of the trials with so many layers the best on dev

Weights of other trials are not kept. A trial is finished when its file is there and whole, and is then not run again
unless what it was trained from changed – or it is the best of its layers and its branch folder is gone.
"""

import json
import shutil
import statistics
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from espalier.branch import CARD_FILE, BranchCard, Teacher, check_trunk, foldable, load_branch, write_branch
from espalier.encoder import Base
from espalier.errors import BranchError, SearchError, SpecError, TrainingError
from espalier.files import clear_unfinished, locked, write_whole
from espalier.spec import TaskSpec
from training.activations import ActivationCache
from training.data import load_data
from training.executors import Made, Shared, Workers, workers
from training.finetune import inputs_digest
from training.grid import Trial
from training.plots import box_plot
from training.trainer import Arguments, Progress

REPORT_FILE, PAGE_FILE = "search.json", "search.md"
TRIALS = "trials"


class Finished(BaseModel):
    """What is kept of a trial."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    trial: Trial
    inputs: str  # digest of all that it depends on, as in its branch's card
    metrics: dict[str, float]  # on dev, of the epoch that was kept
    history: list[dict[str, float]]  # dev metrics by epoch
    stopped: str | None  # why training ended early, if it did


@dataclass(frozen=True)
class Row:
    """Trials that differ by seed alone, by the dev metric."""

    layers: int
    learning_rate: float
    init: str | None
    n: int
    mean: float
    std: float | None  # of the sample; none for a single seed
    best: float


@dataclass(frozen=True)
class Status:
    """How far a search is."""

    done: int  # trials
    total: int
    running: tuple[str, ...]
    share: float  # of the work of this run, from 0 to 1


@dataclass
class Result:
    """Finished trials in the order of the grid, and why others failed."""

    spec: TaskSpec
    base: str
    teacher: str | None
    trials: list[Finished]
    failed: dict[str, str] = field(default_factory=dict)

    def score(self, trial: Finished) -> float:
        """The dev metric that the spec names."""
        return trial.metrics[self.spec.metric]

    @property
    def best(self) -> Finished:
        """The best trial; of equals the first, which has the fewest layers."""
        return max(self.trials, key=self.score)

    @property
    def rows(self) -> list[Row]:
        """The table."""
        groups: dict[tuple[int, float, str | None], list[float]] = {}
        for finished in self.trials:
            trial = finished.trial
            groups.setdefault((trial.layers, trial.learning_rate, trial.init), []).append(self.score(finished))
        return [
            Row(*key, len(scores), statistics.mean(scores), _deviation(scores), max(scores))
            for key, scores in groups.items()
        ]

    def to_dict(self) -> dict[str, Any]:
        """Return the report; `branch` is a folder inside OUT."""
        best = self.best.trial
        by_layers = sorted({finished.trial.layers for finished in self.trials})
        return {
            "task": self.spec.name,
            "metric": self.spec.metric,
            "base": self.base,
            "teacher": self.teacher,
            "table": [asdict(row) for row in self.rows],
            "best": {"trial": best.name, "score": self.score(self.best), "branch": branch_folder(best.layers)},
            "branches": {str(layers): branch_folder(layers) for layers in by_layers},
            "trials": [
                {"name": finished.trial.name, **finished.trial.model_dump(), "score": self.score(finished)}
                for finished in self.trials
            ],
            "failed": self.failed,
        }  # fmt: skip

    def groups(self, attribute: str) -> dict[str, list[float]]:
        """Return the scores by the value that trials have for `attribute`, in ascending order."""
        groups: dict[Any, list[float]] = {}
        for finished in self.trials:
            groups.setdefault(getattr(finished.trial, attribute), []).append(self.score(finished))
        return {str(value): groups[value] for value in sorted(groups)}


def _deviation(scores: Sequence[float]) -> float | None:
    return statistics.stdev(scores) if len(scores) > 1 else None


def branch_folder(layers: int) -> str:
    """Return the name, inside OUT, of the folder for the best branch of so many layers."""
    return f"l{layers}"


def search(
    spec: TaskSpec, base: Base, trials: Sequence[Trial], arguments: Arguments, out: Path,
    report: Callable[[Status], None], *, teacher: Path | None = None, cache: ActivationCache | None = None,
    jobs: int | None = None, ray: str | None = None, threads: int = 1,
) -> Result:  # fmt: skip
    """Run those of `trials` that are not finished, and write the report to `out`.

    With a `teacher`, a branch folder, they are distillations of it; else partial fine-tunings, each with the base's
    top layers as task layers. `jobs` run at once as processes of this machine, or on the Ray cluster at `ray`.
    `threads` is each trial's. What an earlier search with another grid finished in `out`, all else being equal, is
    taken up: a grid can grow. A trial that fails with a TrainingError is reported and keeps no other from running.

    Raises SpecError if a trial does not fit the base or the teacher, SearchError if the search cannot go on; what is
    finished then stays so.
    """
    for name, value in (("--jobs", jobs), ("--threads", threads)):
        if value is not None and value < 1:
            raise SpecError(f"{name} is {value}; it must be at least 1")
    card = None if teacher is None else load_branch(teacher)[1]
    _check(trials, base, card, str(teacher))
    out = out.resolve()
    if teacher is not None and teacher.resolve().is_relative_to(out):
        raise SpecError(f"the teacher {teacher} lies in {out}, where a student may take its place; give another --out")
    depth = base.config.num_hidden_layers
    with _own(out):
        shared = Shared(
            spec=spec,
            data=load_data(spec, arguments.max_train, arguments.max_dev),
            base=base.name,
            revision=base.revision,
            fingerprint=base.fingerprint(depth),
            arguments=arguments,
            teacher=None if teacher is None else teacher.resolve(),
            cache=cache,
            threads=threads,
            folder=out / ".running",
        )
        result = _Search(shared, base, card, trials, out, report).run(jobs, ray)
        _write_report(result, out)
    return result


def _check(trials: Sequence[Trial], base: Base, teacher: BranchCard | None, where: str) -> None:
    if not trials:
        raise SpecError(f"{where} has one layer: there is no student with fewer")
    deepest, fewest = max(trial.layers for trial in trials), min(trial.layers for trial in trials)
    if teacher is None:
        depth = base.config.num_hidden_layers
        if deepest >= depth:
            raise SpecError(
                f"{deepest} task layers leave no frozen layer: {base.name!r} has {depth}, so at most {depth - 1}"
            )
        return
    check_trunk(teacher, base, where)
    if not 0 < fewest <= deepest < teacher.layers:
        raise SpecError(
            f"the teacher {where} has {teacher.layers} layers; students have fewer, but at least 1, "
            f"not {deepest if deepest >= teacher.layers else fewest}"
        )


@contextmanager
def _own(out: Path) -> Iterator[None]:
    """Let one search at a time work in `out`."""
    if (out / CARD_FILE).exists():
        raise SearchError(f"{out} is a branch; give the search a folder of its own")
    try:
        out.mkdir(parents=True, exist_ok=True)
        with locked(out / ".lock", wait=False) as alone:
            if not alone:
                raise SearchError(f"another search works in {out}; wait for it, or give another --out")
            for folder, name in ((out / TRIALS, "*.json"), (out, "l[0-9]*"), (out, "search.*"), (out, "*.png")):
                clear_unfinished(folder, name)
            yield
    except OSError as error:
        raise SearchError(f"the search cannot be written to {out}: {error.strerror or error}") from error


class _Search:
    def __init__(
        self, shared: Shared, base: Base, teacher: BranchCard | None, trials: Sequence[Trial], out: Path,
        report: Callable[[Status], None],
    ) -> None:  # fmt: skip
        self._shared = shared
        self._base = base
        self._teacher = teacher
        self._out = out
        self._report = report
        self._inputs = {trial: self._inputs_of(trial) for trial in trials}
        self._finished = {trial: found for trial in trials if (found := self._recorded(trial)) is not None}
        self._trials = [*trials, *self._earlier()]
        self._failed: dict[Trial, TrainingError] = {}

    def run(self, jobs: int | None, ray: str | None) -> Result:
        todo = [trial for trial in self._trials if trial not in self._finished] or self._lost()
        if todo:
            clock = _Clock(self._tap, self._shared.cache is not None, self._report)
            with workers(self._shared, self._base, jobs, ray, clock.step) as crew:
                while todo:
                    self._run(todo, crew, clock)
                    todo = self._lost()
            shutil.rmtree(self._shared.folder, ignore_errors=True)
        if not self._finished:
            trial, error = next(iter(self._failed.items()))
            raise TrainingError(f"every trial failed, the first, {trial.name}, so: {error}") from error
        return Result(
            spec=self._shared.spec,
            base=self._shared.base,
            teacher=None if self._teacher is None else self._teacher.digest,
            trials=[self._finished[trial] for trial in self._trials if trial in self._finished],
            failed={trial.name: str(error) for trial, error in self._failed.items()},
        )

    def _tap(self, trial: Trial) -> int:
        return self._base.config.num_hidden_layers - trial.layers if self._teacher is None else self._teacher.tap

    def _inputs_of(self, trial: Trial) -> str:
        shared = self._shared
        arguments = replace(shared.arguments, learning_rate=trial.learning_rate, seed=trial.seed)
        teacher = None
        if self._teacher is not None and trial.init is not None:
            folder = shared.teacher or Path()
            teacher = Teacher(digest=self._teacher.digest, folder=folder, init=trial.init, cls_weight=0.0)
        return inputs_digest(
            shared.spec,
            shared.data,
            self._base,
            self._tap(trial),
            trial.layers,
            foldable(shared.spec.kind, trial.layers)[0],
            arguments,
            shared.cache is not None,
            teacher,
        )

    def _run(self, todo: Sequence[Trial], crew: Workers, clock: "_Clock") -> None:
        waiting, running = deque(todo), dict[Future[Made], Trial]()
        clock.plan(todo, len(self._finished))
        while waiting or running:
            while waiting and len(running) < crew.slots:
                trial = waiting.popleft()
                clock.started(trial)
                running[crew.submit(trial, self._inputs[trial])] = trial
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                trial = running.pop(future)
                try:
                    self._keep(trial, crew.result(future))
                except TrainingError as error:
                    self._failed[trial] = error
                clock.ended(trial)

    def _keep(self, trial: Trial, made: Made) -> None:
        card, weights = made
        if card.inputs != self._inputs[trial]:
            raise SearchError(f"the worker that ran {trial.name} has another version of Espalier; install the same")
        if card.teacher is not None:  # a worker elsewhere had a copy of its own
            teacher = card.teacher.model_copy(update={"folder": self._shared.teacher})
            card = card.model_copy(update={"teacher": teacher})
        finished = Finished(
            trial=trial, inputs=card.inputs, metrics=card.metrics, history=card.history, stopped=card.stopped
        )
        self._finished[trial] = finished
        held = self._held(trial.layers)
        if held is None or self._rank(trial) >= self._rank(held):
            write_branch(self._out / branch_folder(trial.layers), weights, card)
        # Last: without this file the trial does not count, and is asked for again.
        write_whole(self._file(trial), finished.model_dump_json(indent=2) + "\n")
        shutil.rmtree(self._shared.folder / trial.name, ignore_errors=True)

    def _rank(self, trial: Trial) -> tuple[float, int]:
        # Of equals the first of the grid: which of them ended first must not matter.
        return self._finished[trial].metrics[self._shared.spec.metric], -self._trials.index(trial)

    def _held(self, layers: int) -> Trial | None:
        """Return the finished trial whose branch lies in the folder for so many layers."""
        try:
            inputs = load_branch(self._out / branch_folder(layers))[1].inputs
        except BranchError:
            return None
        return next((trial for trial in self._finished if self._inputs[trial] == inputs), None)

    def _lost(self) -> list[Trial]:
        """Return the best trial of each number of layers if its branch is gone, damaged, or was never the best."""
        best: dict[int, Trial] = {}
        for trial in self._finished:
            if trial.layers not in best or self._rank(trial) > self._rank(best[trial.layers]):
                best[trial.layers] = trial
        lost = [trial for trial in best.values() if trial not in self._failed and self._held(trial.layers) != trial]
        for trial in lost:
            del self._finished[trial]
        return lost

    def _file(self, trial: Trial) -> Path:
        return self._out / TRIALS / f"{trial.name}.json"

    def _earlier(self) -> list[Trial]:
        """Take up what an earlier search with another grid finished here, of the same task, data and settings."""
        depth = self._base.config.num_hidden_layers if self._teacher is None else self._teacher.layers
        earlier = []
        for file in sorted((self._out / TRIALS).glob("*.json")):
            finished = _read(file)
            if finished is None or (trial := finished.trial) in self._inputs:
                continue
            if 1 <= trial.layers < depth and (trial.init is None) == (self._teacher is None):
                inputs = self._inputs_of(trial)
                if finished.inputs == inputs:
                    self._inputs[trial], self._finished[trial] = inputs, finished
                    earlier.append(trial)
        return earlier

    def _recorded(self, trial: Trial) -> Finished | None:
        finished = _read(self._file(trial))
        return finished if finished and finished.inputs == self._inputs[trial] else None


class _Clock:
    """Tells how far a search is, by the layers that its trials run: a frozen one counts 1, one that is trained 3."""

    def __init__(self, tap: Callable[[Trial], int], cached: bool, report: Callable[[Status], None]) -> None:
        self._tap = tap
        self._cached = cached
        self._report = report

    def plan(self, todo: Sequence[Trial], finished: int) -> None:
        self._work = {trial: (0 if self._cached else self._tap(trial)) + 3 * trial.layers + 1 for trial in todo}
        self._total, self._finished = finished + len(todo), finished
        self._running: dict[Trial, float] = {}
        self._ended: list[Trial] = []
        self._tell()

    def started(self, trial: Trial) -> None:
        self._running[trial] = 0.0
        self._tell()

    def step(self, progress: Progress) -> None:
        """Hear of a step of the one trial that runs, in this process."""
        (trial,) = self._running
        if progress.stage == "training":
            self._running[trial] = progress.step / progress.steps
            self._tell()

    def ended(self, trial: Trial) -> None:
        del self._running[trial]
        self._ended.append(trial)
        self._tell()

    def _tell(self) -> None:
        done = sum(self._work[trial] for trial in self._ended)
        done_in_part = sum(self._work[trial] * part for trial, part in self._running.items())
        self._report(
            Status(
                done=self._finished + len(self._ended),
                total=self._total,
                running=tuple(trial.name for trial in self._running),
                share=(done + done_in_part) / sum(self._work.values()),
            )
        )


def _read(file: Path) -> Finished | None:
    """Return a trial's record; None if there is none, or a damaged one."""
    try:
        return Finished.model_validate_json(file.read_bytes())
    except (OSError, ValidationError):
        return None


def searched_scores(branch: Path, card: BranchCard) -> tuple[float, ...]:
    """Return the dev scores, by seed, of the trials that differ from that of `branch` by seed alone.

    Empty if the folder lies in no search, or is not of one of the search's finished trials.
    """
    files = sorted((branch.resolve().parent / TRIALS).glob("*.json"))
    trials = [finished for file in files if (finished := _read(file)) is not None]
    own = next((finished.trial for finished in trials if finished.inputs == card.inputs), None)
    if own is None:
        return ()
    alike = [finished for finished in trials if finished.trial.model_copy(update={"seed": own.seed}) == own]
    return tuple(finished.metrics[card.spec.metric] for finished in alike)


# --- the report -------------------------------------------------------------------------------------------------

_AXES = {"layers": "task layers", "learning_rate": "learning rate", "init": "start of the student"}


def _write_report(result: Result, out: Path) -> None:
    metric = f"dev {result.spec.metric}"
    plots = []
    for attribute, label in _AXES.items():
        groups = result.groups(attribute)
        if attribute != "init" or len(groups) > 1:
            box_plot(groups, label, metric, out / f"{attribute}.png")
            plots.append(f"![{metric} by {label}]({attribute}.png)")
    content = result.to_dict()
    write_whole(out / REPORT_FILE, json.dumps(content, ensure_ascii=False, indent=2) + "\n")
    best = content["best"]
    lines = [
        f"# {result.spec.name}: search by {metric}", "",
        f"Best: {best['trial']}, {best['score']:.4f}, in `{best['branch']}`.", "",
        f"| {' | '.join(TABLE_HEAD)} |", f"|{'---|' * len(TABLE_HEAD)}",
        *(f"| {' | '.join(cells)} |" for cells in table_cells(result)), "", *plots,
    ]  # fmt: skip
    write_whole(out / PAGE_FILE, "\n".join(lines) + "\n")


TABLE_HEAD = ("layers", "start", "learning rate", "n", "mean", "std", "best")


def table_cells(result: Result) -> list[tuple[str, ...]]:
    """Return the table as people read it: one tuple of cells per row, a star at the best trial's."""
    best = result.best.trial
    cells: list[tuple[str, ...]] = []
    for row in result.rows:
        mark = " *" if (row.layers, row.learning_rate, row.init) == (best.layers, best.learning_rate, best.init) else ""
        cells.append(
            (
                str(row.layers), row.init or "base", f"{row.learning_rate:g}", str(row.n), f"{row.mean:.4f}",
                "" if row.std is None else f"{row.std:.4f}", f"{row.best:.4f}{mark}",
            )
        )  # fmt: skip
    return cells

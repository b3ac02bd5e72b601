"""The trainings of the GLUE report: eight tasks, each fully fine-tuned, partially fine-tuned at every tap, distilled.

Every training is a step that can be taken alone, skips itself when its result is up to date and goes on from its last
epoch when it was stopped. Seeds come outermost: after the first of them the picture is whole.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from espalier.branch import BranchCard
from espalier.encoder import Base
from espalier.errors import SpecError
from espalier.spec import HubData, TaskSpec, load_spec
from training.activations import ActivationCache
from training.data import TaskData
from training.distill import distill
from training.finetune import train
from training.full import FullCard, train_fully
from training.trainer import Arguments, Report

TASKS = ("cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte")
SPECS = Path(__file__).resolve().parent / "specs"

STUDENTS = (1, 2, 3)
"""Layers to distil to, as in the paper, where the teacher has more."""

_HUB_COLUMNS = {
    "cola": ("sentence",),
    "sst2": ("sentence",),
    "qqp": ("question1", "question2"),
    "mnli": ("premise", "hypothesis"),
    "qnli": ("question", "sentence"),
}
"""Text columns of the data set `glue` on the hub, where they are not those of our specs."""


def glue_spec(task: str, data: Path | None) -> TaskSpec:
    """Return the spec of a GLUE task, its data in the folder `data` or, without one, from the hub."""
    spec = load_spec(SPECS / f"{task}.yaml", data)
    if data is not None:
        return spec
    dev = "validation_matched" if task == "mnli" else "validation"
    hub = HubData(format="hub", dataset="nyu-mll/glue", config=task, dev=dev)
    return spec.model_copy(update={"data": hub, "text": _HUB_COLUMNS.get(task, spec.text)})


@dataclass(frozen=True)
class Settings:
    """What the trainings share."""

    arguments: Arguments  # the seed aside
    seeds: int
    taps: tuple[int, ...]
    max_train: Mapping[str, int]  # rows by task, where they differ from the arguments'
    cls_weight: float  # for students that keep the teacher's layers, but fold them

    def of(self, task: str, seed: int) -> Arguments:
        """Return the arguments of one training."""
        return replace(self.arguments, seed=seed, max_train=self.max_train.get(task, self.arguments.max_train))


@dataclass(frozen=True)
class Step:
    """One training: of a whole base (no tap), a teacher (no teacher), or a student."""

    task: str
    seed: int
    tap: int | None
    layers: int
    folded: int
    teacher: Path | None
    out: Path

    @property
    def name(self) -> str:
        """What a person reads while it runs."""
        if self.tap is None:
            return f"{self.task}, seed {self.seed}: the whole base"
        folded = f", {self.folded} of them folded" if self.folded > 1 else ""
        start = "" if self.teacher is None else ", distilled"
        return f"{self.task}, seed {self.seed}: tap {self.tap}, {self.layers} layers{folded}{start}"


def plan(base: Base, settings: Settings, tasks: Sequence[str], out: Path) -> list[Step]:
    """Return all steps, in an order in which teachers come before their students. Raises SpecError on bad settings."""
    depth = base.config.num_hidden_layers
    for tap in settings.taps:
        if not 1 <= tap < depth:
            raise SpecError(f"tap {tap} leaves no task layers: {base.name!r} has {depth} layers")
    if settings.seeds < 1:
        raise SpecError(f"seeds is {settings.seeds}; it must be at least 1")
    return [
        step for seed in range(settings.seeds) for task in tasks for step in _steps(depth, settings, task, seed, out)
    ]


def _steps(depth: int, settings: Settings, task: str, seed: int, out: Path) -> Iterator[Step]:
    home = out / task
    yield Step(task, seed, None, depth, 0, None, home / f"full-s{seed}.json")
    for tap in settings.taps:
        layers = depth - tap
        teacher = home / f"tap{tap}-s{seed}"
        yield Step(task, seed, tap, layers, 1, None, teacher)
        for student in STUDENTS:
            if student < layers:
                yield Step(task, seed, tap, student, 1, teacher, home / f"tap{tap}-kd{student}-s{seed}")
        for full in (0, 1):
            if layers - full > 1:
                yield Step(task, seed, tap, layers, layers - full, teacher, home / f"tap{tap}-full{full}-s{seed}")


def take(
    step: Step, spec: TaskSpec, data: TaskData, base: Base, settings: Settings, cache: ActivationCache, report: Report
) -> FullCard | BranchCard:
    """Do `step` if it is not done, and return what it gave. `data` are the rows that the settings leave of the task."""
    arguments = settings.of(step.task, step.seed)
    if step.tap is None:
        # A student's epochs come on top of its teacher's; the yardstick may train as long as both.
        longer = replace(arguments, epochs=2 * arguments.epochs)
        return train_fully(spec, base, longer, step.out, report, data)[0]
    if step.teacher is None:
        return train(spec, base, step.tap, step.layers, arguments, step.out, report, cache, data)[0]
    weight = settings.cls_weight if step.folded > 1 else 0.0  # the others are the paper's: logits alone
    return distill(
        step.teacher, base, step.layers, arguments, step.out, report, spec, cache, data=data, folded=step.folded,
        cls_weight=weight,
    )[0]  # fmt: skip

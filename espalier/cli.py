"""The command line. Each command imports what it needs when it runs, so that the client's commands need no torch."""

import json
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

from espalier import __version__, show
from espalier.contract import HeadInfo, Target
from espalier.errors import EspalierError, RequestError, SpecError
from espalier.repository import Repository, cores_counted, find_scheduling
from espalier.scheduling import available_cores

if TYPE_CHECKING:
    from clients import Client
    from espalier.branch import BranchCard
    from espalier.encoder import Base as LoadedBase
    from espalier.spec import TaskSpec
    from serving.control import Control
    from serving.live import Live
    from serving.wiring import Pass, Wiring
    from training.activations import ActivationCache
    from training.search import Status
    from training.trainer import Report

app = typer.Typer(
    help="Many NLP tasks on one frozen BERT trunk, served as one Triton ensemble.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)

Base = Annotated[
    str, typer.Option(help="Pre-trained BERT: hub id, local folder, or pkg:PACKAGE/FOLDER for one in a Python package.")
]
Revision = Annotated[str | None, typer.Option(help="Revision of the base on the hub.")]
Folded = Annotated[
    int | None,
    typer.Option(help="Layers, of those at the top, that compute [CLS] alone. [default: 1, of a tagging task 0]"),
]
Epochs = Annotated[int, typer.Option(help="Passes over train; the best one on dev is kept.")]
LearningRate = Annotated[float, typer.Option("--lr", help="Peak learning rate.")]
BatchSize = Annotated[int, typer.Option(help="Rows per step.")]
Seed = Annotated[int, typer.Option(help="The same seed gives the same branch on the same machine.")]
MaxTrain = Annotated[int | None, typer.Option(help="Use a sample of so many rows of train, the same in every run.")]
Data = Annotated[
    Path | None, typer.Option("--data", help="Folder of the spec's data paths. [default: the spec's own folder]")
]
Warmup = Annotated[float, typer.Option(help="Part of the run over which the learning rate rises.")]
WeightDecay = Annotated[float, typer.Option(help="AdamW's weight decay.")]
MaxDev = Annotated[int | None, typer.Option(help="Use a sample of so many rows of dev, the same in every run.")]
BF16 = Annotated[
    bool, typer.Option("--bf16", help="Train in bfloat16 where it is faster (GPUs, newer CPUs); dev is scored in FP32.")
]
SpecMoved = Annotated[Path | None, typer.Option(help="The task's spec file, if its data moved since.")]
UseCache = Annotated[
    bool, typer.Option("--cache", help="Run the trunk once, and keep its activations in .activations beside OUT.")
]
CacheLimit = Annotated[float, typer.Option(help="Largest size of .activations, in GiB.")]
LiveFolder = Annotated[
    Path | None, typer.Option("--live", help="The live store. [default: beside the repository, REPOSITORY.live]")
]
TritonUrl = Annotated[str, typer.Option(help="HOST:PORT of Triton's gRPC endpoint.")]
TritonHttpUrl = Annotated[
    str | None,
    typer.Option(help="HOST:PORT of its HTTP endpoint. [default: port 8000 on the host of --url]"),
]
WiringPort = Annotated[int, typer.Option(help="Port for the wiring's metrics and the states of the folders.")]
Allowed = Annotated[
    list[str] | None, typer.Option("--allow", help="Head folder that may hold code or use another backend.")
]
Kept = Annotated[int, typer.Option("--keep", min=2, help="States to keep for a rollback.")]
MergeAfter = Annotated[
    float | None,
    typer.Option("--merge", min=0, help="Merge heads and segments after so many seconds of rest. [default: never]"),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for a pipe instead of a table.")]
RepositoryPath = Annotated[Path, typer.Option("--repository", help="The model repository.")]
Url = Annotated[
    str | None, typer.Option(help="HOST:PORT of the server. [default: localhost:8001, or :8000 with --http]")
]
Http = Annotated[bool, typer.Option("--http", help="Ask over HTTP instead of gRPC.")]


@app.command(epilog="Example: `espalier train sst2.yaml --base google-bert/bert-base-uncased --tap 7 --layers 3`")
def train(
    spec: Annotated[Path, typer.Argument(help="The task's spec file (YAML).")],
    tap: Annotated[int, typer.Option(help="Depth at which the task branches off; the layers below stay frozen.")],
    base: Base = "google-bert/bert-base-uncased",
    revision: Revision = None,
    data: Data = None,
    layers: Annotated[int | None, typer.Option(help="Task layers above the tap. [default: all that are left]")] = None,
    folded: Folded = None,
    epochs: Epochs = 4,
    learning_rate: LearningRate = 5e-5,
    batch_size: BatchSize = 32,
    seed: Seed = 0,
    max_train: MaxTrain = None,
    max_dev: MaxDev = None,
    warmup: Warmup = 0.1,
    weight_decay: WeightDecay = 0.01,
    bf16: BF16 = False,
    use_cache: UseCache = False,
    cache_limit: CacheLimit = 20.0,
    out: Annotated[Path | None, typer.Option(help="The branch folder. [default: branches/TASK]")] = None,
    as_json: Json = False,
) -> None:
    """Fine-tune a branch on the frozen trunk. Stopped, it goes on from its last epoch; up to date, it is kept."""
    from espalier.encoder import load_base
    from espalier.spec import load_spec

    task = load_spec(spec, data)
    out = out or Path("branches") / task.name
    with show.waiting("loading the base"):
        from training.finetune import train as fine_tune
        from training.trainer import Arguments

        loaded = load_base(base, revision)
    arguments = Arguments(epochs, learning_rate, batch_size, warmup, weight_decay, seed, max_train, max_dev, bf16)
    with training_progress(task.name) as report:
        cache = _cache(out, cache_limit) if use_cache else None
        card, trained = fine_tune(task, loaded, tap, layers, arguments, out, report, cache, folded=folded)
    _print_branch(card, out, trained, as_json)


@app.command(epilog="Example: `espalier distill branches/sst2 --layers 1 --out branches/sst2-1`")
def distill(
    teacher: Annotated[Path, typer.Argument(help="The branch folder of the teacher.")],
    layers: Annotated[int, typer.Option(help="Layers of the student; at most the teacher's.")],
    out: Annotated[Path, typer.Option(help="The student's branch folder.")],
    folded: Folded = None,
    init: Annotated[
        Literal["teacher", "pretrained"], typer.Option(help="Start from the teacher's bottommost layers or the base's.")
    ] = "teacher",
    cls_weight: Annotated[
        float, typer.Option(min=0.0, help="Weight, in the loss, of the distance to the teacher's [CLS] state.")
    ] = 0.0,
    base: Annotated[str | None, typer.Option(help="The base, if it is not where the teacher had it.")] = None,
    spec: SpecMoved = None,
    data: Data = None,
    epochs: Epochs = 4,
    learning_rate: LearningRate = 5e-5,
    batch_size: BatchSize = 32,
    seed: Seed = 0,
    max_train: MaxTrain = None,
    max_dev: MaxDev = None,
    warmup: Warmup = 0.1,
    weight_decay: WeightDecay = 0.01,
    bf16: BF16 = False,
    use_cache: UseCache = False,
    cache_limit: CacheLimit = 20.0,
    as_json: Json = False,
) -> None:
    """Distil a branch to fewer layers: same trunk, same tap, same task."""
    from espalier.branch import read_card
    from espalier.encoder import load_base

    card = read_card(teacher)
    task = _moved(spec, data)
    with show.waiting("loading the base"):
        from training.distill import Init
        from training.distill import distill as distil_branch
        from training.trainer import Arguments

        loaded = load_base(base) if base else load_base(card.base, card.revision)
    arguments = Arguments(epochs, learning_rate, batch_size, warmup, weight_decay, seed, max_train, max_dev, bf16)
    with training_progress(card.spec.name) as report:
        cache = _cache(out, cache_limit) if use_cache else None
        start = Init(init)
        student, trained = distil_branch(
            teacher,
            loaded,
            layers,
            arguments,
            out,
            report,
            task,
            cache,
            start,
            folded=folded,
            cls_weight=cls_weight,
        )
    _print_branch(student, out, trained, as_json)


@app.command(
    epilog="Example: `espalier search sst2.yaml --base google-bert/bert-base-uncased --task-layers 4..10 --jobs 2`"
)
def search(
    spec: Annotated[Path, typer.Argument(help="The task's spec file (YAML).")],
    base: Annotated[
        str | None,
        typer.Option(
            help="As in train. [default: the teacher's, or google-bert/bert-base-uncased]", show_default=False
        ),
    ] = None,
    revision: Revision = None,
    data: Data = None,
    teacher: Annotated[Path | None, typer.Option(help="Search students of this branch instead of teachers.")] = None,
    task_layers: Annotated[
        str | None,
        typer.Option(
            help="Such as 4..10 or 2,4. [default: a third to five sixths of the base's; 1, 2, 3 for students]",
            show_default=False,
        ),
    ] = None,
    learning_rates: Annotated[str, typer.Option("--lr", help="Peak learning rates.")] = "2e-5,5e-5",
    seeds: Annotated[int, typer.Option(help="Trainings of each kind, with the seeds 0, 1, …")] = 3,
    init: Annotated[
        str | None,
        typer.Option(help="Starts of students: teacher, pretrained, or both. [default: teacher]", show_default=False),
    ] = None,
    epochs: Epochs = 4,
    batch_size: BatchSize = 32,
    max_train: MaxTrain = None,
    bf16: BF16 = False,
    jobs: Annotated[
        int | None, typer.Option(help="Trials at once. [default: 1; with --ray as many as there are CPUs]")
    ] = None,
    ray: Annotated[
        str | None, typer.Option(help="Ray cluster: HOST:PORT, auto, or local to start one here with --jobs workers.")
    ] = None,
    threads: Annotated[
        int | None, typer.Option(help="Threads of a trial. [default: this machine's cores / jobs; with --ray 1]")
    ] = None,
    use_cache: UseCache = False,
    cache_limit: CacheLimit = 20.0,
    out: Annotated[
        Path | None, typer.Option(help="[default: searches/TASK, or searches/TASK-students]", show_default=False)
    ] = None,
    as_json: Json = False,
) -> None:
    """Try task layers, learning rates and seeds. Stopped, it goes on; finished trials are not run again."""
    from espalier.branch import read_card
    from espalier.encoder import load_base
    from espalier.spec import load_spec
    from training.grid import default_layers, grid, parse_inits, parse_layers, parse_rates

    task = load_spec(spec, data)
    rates = parse_rates(learning_rates)
    layers = None if task_layers is None else parse_layers(task_layers)
    card = None if teacher is None else read_card(teacher)
    if card is None and init is not None:
        raise SpecError("--init is about students; it needs --teacher")
    with show.waiting("loading the base"):
        from training.search import search as run_search
        from training.trainer import Arguments

        if base is None and card is not None:
            loaded = load_base(card.base, card.revision)
        else:
            loaded = load_base(base or "google-bert/bert-base-uncased", revision)
    if card is None:
        trials = grid(layers or default_layers(loaded.config.num_hidden_layers), rates, seeds)
    else:
        trials = grid(layers or tuple(range(1, min(4, card.layers))), rates, seeds, parse_inits(init or "teacher"))
    out = out or Path("searches") / (task.name if card is None else f"{task.name}-students")
    if threads is None:
        threads = 1 if ray is not None else max(1, available_cores() // max(1, jobs or 1))
    with search_progress(task.name) as report:
        result = run_search(
            task, loaded, trials, Arguments(epochs, batch_size=batch_size, max_train=max_train, bf16=bf16), out, report,
            teacher=teacher, cache=_cache(out, cache_limit) if use_cache else None, jobs=jobs, ray=ray, threads=threads,
        )  # fmt: skip
    if as_json:
        _print_json({"out": str(out), **result.to_dict()})
    else:
        show.search(result, out)


@app.command(epilog="Example: `espalier card branches/sst2`")
def card(
    branch: Annotated[Path, typer.Argument(help="The branch folder.")],
    out: Annotated[Path | None, typer.Option(help="The card's folder. [default: BRANCH-card]")] = None,
    rows: Annotated[int, typer.Option(min=0, help="Mistakes to show at most.")] = 20,
    spec: SpecMoved = None,
    data: Data = None,
    base: Annotated[str | None, typer.Option(help="The base, if it is not where the branch had it.")] = None,
    as_json: Json = False,
) -> None:
    """Describe a branch in Markdown: scores, data, worst mistakes, how it was made. It quotes rows of dev."""
    from espalier.branch import read_card
    from espalier.encoder import load_base

    known = read_card(branch)
    task = _moved(spec, data)
    out = out or branch.resolve().parent / f"{branch.resolve().name}-card"
    with show.waiting("loading the base"):
        from training.card import make_card

        loaded = load_base(base) if base else load_base(known.base, known.revision)
    with _bar() as bar:
        row = bar.add_task(known.spec.name, total=None, note="")

        def report(what: str, done: int, total: int) -> None:
            bar.update(row, description=f"{known.spec.name}: {what}", completed=done, total=total)

        made = make_card(branch, loaded, out, rows, report, task, base)
        bar.update(row, visible=False)
    if as_json:
        _print_json({"task": known.spec.name, "card": str(made.page), "metrics": made.metrics, "doubts": made.doubts})
    else:
        show.card(made, known)


@app.command(epilog="Example: `espalier select searches/sst2 searches/mrpc --threshold 0.5`")
def select(
    folders: Annotated[list[Path], typer.Argument(help="Folders with the branches of all tasks, at any depth.")],
    threshold: Annotated[float, typer.Option(help="Points on dev that one layer more must bring.")] = 0.5,
    count: Annotated[
        Literal["executed", "folded"], typer.Option(help="Count layers as executed, or a folded one as it costs.")
    ] = "executed",
    out: Annotated[Path, typer.Option(help="The plan to write.")] = Path("plan.yaml"),
    front: Annotated[Path, typer.Option(help="The plot of score against cost to write.")] = Path("front.png"),
    base: Annotated[str | None, typer.Option(help="The base, if it is not where the branches had it.")] = None,
    as_json: Json = False,
) -> None:
    """Choose tap and layers for each task, jointly, and write a plan for `espalier export --plan`."""
    from espalier.branch import check_trunk, read_card
    from espalier.encoder import load_base

    with show.waiting("reading the branches") as status:
        from export.costs import measure
        from training import selection
        from training.front import plot_front

        candidates = selection.find_candidates(folders)
        card = read_card(candidates[0].best)
        loaded = load_base(base) if base else load_base(card.base, card.revision)
        for candidate in candidates:
            check_trunk(read_card(candidate.best), loaded, str(candidate.best))
        status.update("measuring what heads and trunks cost")
        costs = measure(loaded, {c.tap for c in candidates}, {c.shape for c in candidates})
    fraction = costs.folded if count == "folded" else 1.0
    plan = selection.select(candidates, threshold, lambda c: c.counted(fraction))
    plans = selection.front(candidates, lambda c: c.counted(fraction))
    selection.write(out, plan, threshold)
    plot_front(front, plans, plan, costs, loaded.config.num_hidden_layers)
    if as_json:
        _print_json(selection.summary(plan, plans, costs, loaded.config.num_hidden_layers))
    else:
        show.selection(plan, plans, costs, loaded.config.num_hidden_layers, out, front)


@app.command(epilog="Example: `espalier export branches/sst2-1 branches/mrpc --target cpu`")
def export(
    branches: Annotated[list[Path] | None, typer.Argument(help="Branch folders to add or replace.")] = None,
    plan: Annotated[Path | None, typer.Option(help="Add or replace the branches of this plan.")] = None,
    repository: RepositoryPath = Path("model_repository"),
    target: Annotated[Target, typer.Option(help="cpu: FP32; int8: the CPU, 8-bit; gpu: FP16.")] = Target.CPU,
    threads: Annotated[
        int | None,
        typer.Option(min=1, help="Threads of a trunk instance on a CPU. [default: as deployed, or half the cores]"),
    ] = None,
    instances: Annotated[
        int | None, typer.Option(min=1, help="Instances of the trunk on a CPU. [default: as deployed, or 2]")
    ] = None,
    base: Annotated[str | None, typer.Option(help="The base, if it is not where the branches had it.")] = None,
    candidate: Annotated[
        str | None, typer.Option(help="Write them as candidates of this name, beside their tasks' own heads.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Write branches into a model repository. Heads of other tasks stay as they are, byte for byte."""
    with show.waiting("exporting") as status:
        from export.gate import Quantized, quantized_score
        from export.plan import planned_branches
        from export.repository import Exported
        from export.repository import export as export_branches

        def report(exported: Exported) -> None:
            status.update(f"exporting: {exported.model} done")

        def gate(models: Quantized, card: "BranchCard", base: "LoadedBase") -> float:
            def asked(done: int, total: int) -> None:
                status.update(f"exporting: {card.spec.name}, {done} of {total} rows of dev asked")

            return quantized_score(models, card, base, asked)

        wanted = [*(branches or ()), *(planned_branches(plan) if plan else ())]
        given = {name: value for name, value in (("threads", threads), ("instances", instances)) if value is not None}
        done = export_branches(wanted, repository, target, given, base, candidate=candidate, report=report, gate=gate)
    if as_json:
        _print_json([{"model": e.model, "written": e.written, "difference": e.difference} for e in done])
    else:
        show.exported(done, repository)


@app.command(epilog="Example: `espalier serve --repository model_repository --grpc-port 9001`")
def serve(
    repository: RepositoryPath = Path("model_repository"),
    live: LiveFolder = None,
    http_port: Annotated[int, typer.Option(help="Port for HTTP.")] = 8000,
    grpc_port: Annotated[int, typer.Option(help="Port for gRPC.")] = 8001,
    metrics_port: Annotated[int, typer.Option(help="Port for Triton's Prometheus metrics.")] = 8002,
    wiring_port: WiringPort = 8003,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    log_file: Annotated[Path, typer.Option(help="Triton's log.")] = Path("logs/tritonserver.log"),
    allow: Allowed = None,
    keep: Kept = 20,
    merge: MergeAfter = None,
) -> None:
    """Serve a model repository with the embedded Triton until Ctrl-C or SIGTERM; heads that are dropped there, too."""
    from serving.control import Control
    from serving.service import Service, log_to
    from serving.supervisor import serve_live
    from serving.triton import TritonServer

    store = _live(repository, live)
    scheduling = find_scheduling(repository)
    if scheduling is not None:
        show.scheduling(scheduling, available_cores())
    server = TritonServer(
        store.models, log_file=log_file, host=host, http_port=http_port, grpc_port=grpc_port,
        metrics_port=metrics_port, ready_model=None, model_control="explicit", cores=cores_counted(scheduling),
    )  # fmt: skip
    control = Control(server.grpc_url, server.http_url)
    service = Service(_wiring(repository, store, control, allow, keep, merge), host, wiring_port)
    log_to(sys.stderr)
    with show.waiting("starting Triton") as status:

        def ready(done: "Pass") -> None:
            status.stop()
            show.serving(server, store.heads(), done.status)

        serve_live(server, service, ready)


@app.command(epilog="Example: `espalier wire --repository /models --live /live --url triton:8001`")
def wire(
    repository: RepositoryPath = Path("model_repository"),
    live: LiveFolder = None,
    url: TritonUrl = "localhost:8001",
    http_url: TritonHttpUrl = None,
    wiring_port: WiringPort = 8003,
    host: Annotated[str, typer.Option(help="Address to listen on for metrics.")] = "127.0.0.1",
    allow: Allowed = None,
    keep: Kept = 20,
    merge: MergeAfter = None,
    once: Annotated[bool, typer.Option("--once", help="Wire what is there now, and end.")] = False,
    as_json: Json = False,
) -> None:
    """Wire dropped heads into a Triton that runs elsewhere, in explicit mode, on LIVE/models; until Ctrl-C."""
    from serving.service import Service, log_to

    store = _live(repository, live)
    rest = 0.0 if once and merge is not None else merge  # who does not stay merges at once
    wiring = _wiring(repository, store, _control(url, http_url), allow, keep, rest)
    log_to(sys.stderr)
    if once:
        with show.waiting("wiring"):
            done = wiring.settle()
        if as_json:
            _print_json(done.status.model_dump(mode="json"))
        else:
            show.status(done.status)
        raise typer.Exit(int(any(entry.state == "refused" for entry in done.status.folders.values())))
    service = Service(wiring, host, wiring_port)
    with stopping(service.stop):
        show.messages.print(f"wiring {repository} into {url}; Ctrl-C stops", soft_wrap=True, highlight=False)
        service.run()


@app.command(epilog="Example: `espalier tune --p99 300 --budget 20`")
def tune(
    repository: RepositoryPath = Path("model_repository"),
    p99: Annotated[
        float | None,
        typer.Option(min=1, help="Longest P99 that is allowed, in ms. [default: 10 × the median of a lone request]"),
    ] = None,
    budget: Annotated[float, typer.Option(min=0, help="Minutes that may be spent.")] = 15.0,
    texts: Annotated[
        Path | None, typer.Option(help="Texts to ask, one per line. [default: random words, 5 to 128 tokens]")
    ] = None,
    task: Annotated[list[str] | None, typer.Option(help="Ask this task alone; may be repeated. [default: all]")] = None,
    seconds: Annotated[float, typer.Option(min=0.1, help="Length of a window of load.")] = 8.0,
    as_json: Json = False,
) -> None:
    """Find threads, instances, batch and queue delay for this machine, and write them into the trunk's configs.

    Nothing else should run meanwhile. What was tried is kept: the same command goes on where it was stopped.
    """
    from serving.tune import Tuner, texts_to_ask, tunable

    chosen = tunable(repository, task or ())
    asked = texts_to_ask(repository, texts)
    with _told_if_stopped("what was tried is kept: the same command goes on"), show.waiting("tuning") as status:
        tuner = Tuner(
            chosen, asked, 60 * budget, p99 / 1000 if p99 else None, seconds, show.tuning,
            lambda scheduling: status.update(f"trying {scheduling}"),
        )  # fmt: skip
        done = tuner.run()
    if as_json:
        _print_json(done.summary())
    else:
        show.tuned(done, repository)


@app.command(epilog="Example: `espalier bench --size minilm --rounds 2`")
def bench(
    size: Annotated[Literal["bert-base", "minilm"], typer.Option(help="What is served.")] = "bert-base",
    seconds: Annotated[float, typer.Option(min=0.5, help="Length of a window; today's way gets three of it.")] = 8.0,
    rounds: Annotated[int, typer.Option(min=1, help="Windows of each way; they take turns.")] = 3,
    home: Annotated[Path, typer.Option(help="Where what is compared is built and kept.")] = Path("runs/bench"),
    report: Annotated[Path, typer.Option(help="Folder of performance.md, .json and pictures.")] = Path("docs"),
) -> None:
    """Measure what serving costs against today's way; writes the report. Nothing else should run meanwhile."""
    from benchmarks.cost.bench import bench as run

    with _told_if_stopped("what is finished is kept: the same command goes on"):
        run(size, seconds, rounds, home, report)


@app.command(epilog="Example: `espalier history`")
def history(
    repository: RepositoryPath = Path("model_repository"), live: LiveFolder = None, as_json: Json = False
) -> None:
    """List what was served: each change of the ensemble that is kept, the newest first."""
    states = _live(repository, live, must_exist=True).history()
    if as_json:
        _print_json([state.model_dump(mode="json") for state in states])
    else:
        show.history(states)


@app.command(epilog="Example: `espalier rollback`, or `espalier rollback 12`")
def rollback(
    generation: Annotated[
        int | None, typer.Argument(help="What to serve again, see espalier history. [default: before the last change]")
    ] = None,
    repository: RepositoryPath = Path("model_repository"),
    live: LiveFolder = None,
    url: TritonUrl = "localhost:8001",
    http_url: TritonHttpUrl = None,
    allow: Allowed = None,
    as_json: Json = False,
) -> None:
    """Serve again what was served before. What lies in the repository is passed over until its owner changes it."""
    wiring = _wiring(repository, _live(repository, live, must_exist=True), _control(url, http_url), allow, None)
    with show.waiting("rolling back"):
        state = wiring.rollback(generation)
    if as_json:
        _print_json(state.model_dump(mode="json"))
    else:
        show.history([state])


@app.command(epilog="Example: `espalier promote mrpc__candidate`")
def promote(
    candidate: Annotated[str, typer.Argument(help="The candidate, as TASK__NAME.")],
    repository: RepositoryPath = Path("model_repository"),
) -> None:
    """Let a candidate and its task's head change places; the wiring serves them so within seconds."""
    from espalier.contract import CANDIDATE, head_name
    from espalier.files import exchange

    task, mark, _ = candidate.partition(CANDIDATE)
    if not mark:
        raise SpecError(f"{candidate!r} is no candidate: its name is TASK{CANDIDATE}NAME")
    folders = [repository / head_name(name) for name in (task, candidate)]
    for folder in folders:
        if not folder.is_dir():
            raise SpecError(f"{folder}: there is no such head; see `espalier tasks`")
    try:
        exchange(*folders)
    except OSError as error:
        raise SpecError(
            f"{folders[0]} and {folders[1]} cannot change places in one step ({error.strerror}); rename them by hand"
        ) from error
    show.messages.print(f"{folders[1]} and {folders[0]} changed places", soft_wrap=True, highlight=False)


@app.command(epilog='Example: `espalier ask "Wake me at 7:30" --task intent --task slots`')
def ask(
    texts: Annotated[list[str], typer.Argument(help="Texts; - reads one per line from standard input.")],
    task: Annotated[list[str] | None, typer.Option(help="Ask this task alone; may be repeated. [default: all]")] = None,
    pair: Annotated[str | None, typer.Option(help="The second sentence, for a task about two.")] = None,
    url: Url = None,
    http: Http = False,
    timeout: Annotated[float, typer.Option(help="Deadline in seconds.")] = 30.0,
    as_json: Json = False,
) -> None:
    """Ask a running server and print typed answers."""
    if texts == ["-"]:
        texts = [line.rstrip("\n") for line in sys.stdin]
    items = [(text, pair) if pair is not None else text for text in texts]
    with connect(url, http, timeout) as client:
        answers = client.ask_batch(items, tasks=task)
    if as_json:
        for item, answer in zip(items, answers, strict=True):
            _print_json({"text": item, "answers": answer.to_dict()})
    else:
        show.answers(list(zip(items, answers, strict=True)))


@app.command(epilog="Example: `espalier tasks --url localhost:8001`, or `espalier tasks --repository model_repository`")
def tasks(
    url: Url = None,
    http: Http = False,
    wiring: Annotated[
        str | None, typer.Option(help="HOST:PORT of the wiring service. [default: port 8003 of the server's host]")
    ] = None,
    repository: Annotated[Path | None, typer.Option(help="Look into this folder instead of asking a server.")] = None,
    live: LiveFolder = None,
    as_json: Json = False,
) -> None:
    """List the tasks: state, kind, tap, layers, dev metric, fingerprint; and why a folder is refused."""
    state = "serving"
    if repository is None:
        from clients.status import PORT, wiring_status

        with connect(url, http, timeout=30.0) as client:
            status, problem = wiring_status(wiring or f"{client.host}:{PORT}")
            if problem and (wiring or not as_json):
                said = f"{problem}; folders that are refused are not listed"
                show.messages.print(said, soft_wrap=True, highlight=False)
            try:
                heads: list[HeadInfo] = list(client.tasks().values())
            except RequestError:
                if status is None or any(entry.served for entry in status.folders.values()):
                    raise
                heads = []  # nothing is served; the wiring tells why
    elif repository.is_dir():
        store = _live(repository, live)
        heads, status = store.heads(), store.status()
        if status is None:  # never wired: served as it is, or not yet
            heads, state = Repository(repository).heads(), "exported"
    else:
        raise SpecError(f"{repository}: there is no such model repository")
    if as_json:
        _print_json(show.tasks_as_json(heads, status, state))
    else:
        show.tasks(heads, status, state)


@app.command(epilog="Example: `espalier evaluate sst2.yaml --split test --url localhost:8001`")
def evaluate(
    spec: Annotated[Path, typer.Argument(help="The task's spec file (YAML).")],
    split: Annotated[Literal["dev", "test"], typer.Option(help="The split to score.")] = "dev",
    data: Data = None,
    url: Url = None,
    http: Http = False,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows per request.")] = 16,
    as_json: Json = False,
) -> None:
    """Score a deployed task on its dev or test split, through the server."""
    from espalier.spec import load_spec

    task = load_spec(spec, data)
    with show.waiting("loading the metrics"):
        from clients.evaluate import evaluate as score
    with connect(url, http, timeout=60.0) as client, _bar() as bar:
        row = bar.add_task(task.name, total=None, note="")

        def report(done: int, total: int) -> None:
            bar.update(row, completed=done, total=total)

        metrics = score(client, task, batch_size, report, split=split)
        head = client.tasks()[task.name]
    if as_json:
        offline = {"offline": head.score} if split == "dev" else {}
        _print_json({"task": task.name, "split": split, "served": metrics, "metric": head.metric, **offline})
    else:
        show.evaluation(task.name, split, metrics, head)


# --- of the wiring ----------------------------------------------------------------------------------------------


def _live(repository: Path, live: Path | None, must_exist: bool = False) -> "Live":
    """Return the live store of a repository."""
    from serving.live import Live, live_folder

    if not repository.is_dir():
        raise SpecError(f"{repository}: there is no such model repository; `espalier export` writes one")
    store = Live(live or live_folder(repository))
    if must_exist and not store.models.is_dir():
        raise SpecError(f"{store.path}: there is no such live store; `espalier serve` or `espalier wire` makes it")
    return store


def _wiring(
    repository: Path, live: "Live", control: "Control", allow: list[str] | None, keep: int | None,
    merge: float | None = None,
) -> "Wiring":  # fmt: skip
    from serving.wiring import Wiring

    live.prepare()
    wiring = Wiring(repository, live, control, frozenset(allow or ()), keep, merge)
    wiring.inbox.look()  # says in one sentence what is wrong with the repository, before anything starts
    return wiring


def _control(url: str, http_url: str | None) -> "Control":
    from serving.control import Control

    return Control(url, http_url or f"{url.rpartition(':')[0] or url}:8000")


@contextmanager
def stopping(stop: Callable[[], None]) -> Iterator[None]:
    """Let SIGTERM and Ctrl-C call `stop`; afterwards end with the status that the signal has."""
    came: list[int] = []

    def hear(number: int, _frame: object) -> None:
        came.append(number)
        stop()

    before = {number: signal.signal(number, hear) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if came:
        raise typer.Exit(128 + came[0])


# --- shared by the commands and the demo ------------------------------------------------------------------------


@contextmanager
def connect(url: str | None, http: bool, timeout: float) -> "Iterator[Client]":
    """Open a client to `url`, by default the local server's."""
    from clients import Client

    with Client(url, protocol="http" if http else "grpc", timeout=timeout) as client:
        yield client


def _moved(spec: Path | None, data: Path | None) -> "TaskSpec | None":
    """Return the spec that says where a branch's data is now, if one was given."""
    from espalier.spec import load_spec

    if spec is None and data is not None:
        raise SpecError(f"--data {data} says where the paths of a spec file begin; name that file with --spec")
    return load_spec(spec, data) if spec else None


def _cache(out: Path, limit: float) -> "ActivationCache":
    from training.activations import ActivationCache

    return ActivationCache(out.resolve().parent / ".activations", int(limit * 2**30))


def _bar() -> Progress:
    return Progress(
        SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"), console=show.messages,
    )  # fmt: skip


@contextmanager
def training_progress(name: str) -> "Iterator[Report]":
    """Show a bar over the optimizer steps and the dev metrics after each epoch."""
    from training.trainer import Progress as Step

    with _bar() as bar:
        row = bar.add_task(name, total=None, note="")

        def report(step: Step) -> None:
            bar.update(row, description=step.label(name), completed=step.step, total=step.steps)
            if step.metrics is not None:
                scores = "  ".join(f"{key} {value:.3f}" for key, value in step.metrics.items() if key != "epoch")
                bar.update(row, note=f"dev after epoch {step.epoch:.0f}: {scores}")

        with _told_if_stopped("the same command goes on from the last whole epoch"):
            yield report
        bar.update(row, visible=False)


@contextmanager
def search_progress(name: str) -> "Iterator[Callable[[Status], None]]":
    """Show a bar over the trials of a search, the time left, and the trials that run."""
    with Progress(
        SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), show.TimeLeft(),
        TextColumn("{task.fields[running]}"), console=show.messages,
    ) as bar:  # fmt: skip
        row = bar.add_task(f"{name}: trials", total=None, running="", share=0.0)

        def report(status: "Status") -> None:
            bar.update(
                row, completed=status.done, total=status.total, share=status.share, running=", ".join(status.running)
            )

        with _told_if_stopped("finished trials are kept, and the same command goes on"):
            yield report
        bar.update(row, visible=False)


@contextmanager
def _told_if_stopped(what: str) -> Iterator[None]:
    """Say what is kept when the block is interrupted."""
    try:
        yield
    except KeyboardInterrupt:
        show.messages.print(f"stopped; {what}")
        raise


def _print_branch(card: "BranchCard", out: Path, trained: bool, as_json: bool) -> None:
    if as_json:
        keep = {
            "labels",
            "base",
            "revision",
            "tap",
            "layers",
            "folded",
            "metrics",
            "fingerprint",
            "arguments",
            "stopped",
        }
        _print_json({"task": card.spec.name, "branch": str(out), "trained": trained, **card.model_dump(include=keep)})
    else:
        show.branch(card, out, trained)


def _print_json(content: Any) -> None:
    print(json.dumps(content, ensure_ascii=False))


def _version(wanted: bool) -> None:
    if wanted:
        print(__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
) -> None:
    pass


OURS = ("espalier", "clients", "training", "export", "serving", "benchmarks")
"""Packages of the project itself: one that is missing is a defect, not an extra."""


def main() -> None:
    """Run the command line; an error of ours is one sentence on standard error and exit status 1."""
    try:
        app()
    except EspalierError as error:
        show.error(str(error))
        sys.exit(1)
    except ModuleNotFoundError as error:
        # The base install is the client; the other commands live in extras.
        if (error.name or "").partition(".")[0] in OURS:
            raise
        install = "pip install 'espalier[train,export,serve,bench]'"
        show.error(f"this command needs the Python package {error.name!r}: {install}")
        sys.exit(1)


if __name__ == "__main__":
    main()

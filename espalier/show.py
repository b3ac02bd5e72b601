"""What people read: tables on standard output, messages and progress on standard error."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.progress import ProgressColumn, Task
from rich.status import Status
from rich.table import Table
from rich.text import Text

from espalier.contract import FolderStatus, HeadInfo, StatusFile, Structure, head_name, task_of
from espalier.scheduling import Scheduling

if TYPE_CHECKING:
    from clients import Answer, Answers, Span
    from espalier.branch import BranchCard
    from espalier.costs import Costs
    from export.repository import Exported
    from serving.live import State
    from serving.triton import TritonServer
    from serving.tune import Trial, Tuned
    from training.card import Card
    from training.search import Result
    from training.selection import Selection

output = Console()
messages = Console(stderr=True)

_CHANCE = 0.005  # labels below this are not worth a reader's time


def error(sentence: str) -> None:
    """Print an error."""
    messages.print(f"[bold red]Error:[/] {escape(sentence)}", soft_wrap=True, highlight=False)


@contextmanager
def waiting(what: str) -> Iterator[Status]:
    """Show a spinner while the block runs."""
    with messages.status(what) as status:
        yield status


def branch(card: "BranchCard", out: Path, trained: bool) -> None:
    """Print one line about a branch."""
    scores = ", ".join(f"{name} {value:.3f}" for name, value in card.metrics.items())
    state = "trained" if trained else "up to date"
    output.print(
        f"[bold]{card.spec.name}[/]: {scores} on dev (tap {card.tap}, {card.layers} layers) → {escape(str(out))} "
        f"({state})",
        highlight=False,
        soft_wrap=True,
    )
    if card.stopped is not None:
        messages.print(
            f"[bold yellow]Stopped early:[/] {escape(card.stopped)}; the best epoch before is kept",
            highlight=False,
            soft_wrap=True,
        )


class TimeLeft(ProgressColumn):
    """The time left, from the field `share`: the part of the work that is done, from 0 to 1."""

    def __init__(self) -> None:
        super().__init__()
        self._told, self._ends = 0.0, 0.0  # of the last share that was told: itself, and the end by it

    def render(self, task: Task) -> Text:
        """Show hours, minutes and seconds, which count down until a new share is told."""
        elapsed, share = task.elapsed or 0.0, task.fields["share"]
        if share != self._told:
            self._told, self._ends = share, elapsed / share
        left = f"{timedelta(seconds=int(max(0.0, self._ends - elapsed)))} left" if self._told else "-:--:-- left"
        return Text(left, style="progress.remaining")


def search(result: "Result", out: Path) -> None:
    """Print the table of a search, where its best branch lies, and what to do with it."""
    from training.search import TABLE_HEAD, branch_folder, table_cells

    spec, best = result.spec, result.best
    table = Table(*TABLE_HEAD, title=f"{spec.name}: dev {spec.metric}", title_justify="left")
    for cells in table_cells(result):
        table.add_row(*(f"[bold]{cell}[/]" if cells[-1].endswith("*") else cell for cell in cells))
    output.print(table)
    for name, reason in result.failed.items():
        messages.print(f"{name} failed: {reason}", markup=False, soft_wrap=True)
    folder = out / branch_folder(best.trial.layers)
    if result.teacher is None and best.trial.layers > 1:
        next_step = f"espalier distill {folder} --layers 1 --out branches/{spec.name}"
    else:
        next_step = f"espalier export {folder}"
    output.print(
        f"best: [bold]{best.trial.name}[/] {result.score(best):.4f} → {escape(str(folder))}\n"
        f"next: {escape(next_step)}",
        highlight=False, soft_wrap=True,
    )  # fmt: skip


def card(made: "Card", branch: "BranchCard") -> None:
    """Say where a branch's card is, and what is doubtful about the branch."""
    output.print(
        f"[bold]{branch.spec.name}[/]: {branch.spec.metric} {made.metrics[branch.spec.metric]:.4f} on dev → "
        f"{escape(str(made.page))}",
        highlight=False,
        soft_wrap=True,
    )
    for doubt in made.doubts:
        output.print(f"[bold yellow]Note:[/] {escape(doubt)}", highlight=False, soft_wrap=True)


def selection(
    plan: "Selection", plans: "Sequence[Selection]", costs: "Costs", depth: int, out: Path, front: Path
) -> None:
    """Print the chosen plan, and the plans that no other beats."""
    columns = ("task", "metric", "dev score", "tap", "layers", "folded", "branch")
    table = Table(*columns, title=str(out), title_justify="left")
    for c in plan.chosen:
        table.add_row(c.task, c.metric, c.score_text, str(c.tap), str(c.layers), str(c.folded), escape(str(c.best)))
    output.print(table)
    whole = depth * len(plan.chosen)
    table = Table("", "mean score", "layers", "of all", "with folding", "of all", "ms per text")
    for other in sorted({*plans, plan}, key=lambda p: (p.layers, p.score)):
        folded = other.folded_layers(costs)
        table.add_row(
            "chosen" if other == plan else "", f"{other.score:.2f}", str(other.layers), f"{other.layers / whole:.0%}",
            f"{folded:.1f}", f"{folded / whole:.0%}", f"{other.milliseconds(costs):.2f}",
        )  # fmt: skip
    output.print(table)
    output.print(
        f"Serving a whole model per task executes {whole} layers. A folded layer costs {costs.folded:.2f} of a full "
        f"one here, at {costs.batch} texts of {costs.mean_length:.0f} tokens in the mean. Plot: {escape(str(front))}",
        highlight=False,
    )


def exported(done: "Sequence[Exported]", repository: Path) -> None:
    """Print the model folders of an export."""
    table = Table("model", "state", "difference from PyTorch", title=str(repository), title_justify="left")
    for item in done:
        difference = "" if item.difference is None else f"{item.difference:.1e}"
        table.add_row(item.model, "written" if item.written else "up to date", difference)
    output.print(table)


def tasks(heads: Sequence[HeadInfo], status: StatusFile | None = None, state: str = "serving") -> None:
    """Print what is deployed and, where the wiring tells of it, what became of each folder; the others have `state`."""
    table = Table(box=None, padding=(0, 2, 0, 0))  # narrow: seven columns on a terminal of 80
    for column in ("task", "state", "kind", "text", "tap", "layers", "dev metric"):
        table.add_column(column, no_wrap=True, min_width=len("serving") if column == "state" else None)
    infos = {head.task: head for head in heads}
    folders = status.folders if status else {}
    for task in sorted({*infos, *(task_of(name) or name for name in folders)}):
        head, entry = infos.get(task), folders.get(head_name(task), folders.get(task))
        own = entry.state if entry else state
        if head is None:
            table.add_row(task, own)
            continue
        table.add_row(
            task,
            own,
            head.kind if head.structure is Structure.SOFTMAX else f"{head.kind} ({head.structure})",
            "pair" if head.pair else "one",
            str(head.tap),
            f"{head.layers} ({head.folded} folded)" if head.folded > 1 else str(head.layers),
            f"{head.metric} {head.score:.3f}",
        )
    output.print(table)
    _reasons(folders)


def tasks_as_json(
    heads: Sequence[HeadInfo], status: StatusFile | None, state: str = "serving"
) -> list[dict[str, object]]:
    """Return what `tasks` prints as plain values; a folder that is not served has its task, state and reason alone."""
    folders = dict(status.folders) if status else {}
    rows: list[dict[str, object]] = []
    for head in sorted(heads, key=lambda head: head.task):
        entry = folders.pop(head.model, None)
        own = {"state": entry.state if entry else state, "why": entry.why if entry else ""}
        rows.append({**head.model_dump(mode="json"), **own})
    for name, entry in folders.items():
        rows.append({"task": task_of(name) or name, "state": entry.state, "why": entry.why})
    return rows


def status(status: StatusFile) -> None:
    """Print the state of every folder of the repository."""
    table = Table(box=None, padding=(0, 2, 0, 0))
    for column in ("folder", "state", "version", "content"):
        table.add_column(column, no_wrap=True)
    for name, entry in status.folders.items():
        table.add_row(name, entry.state, "" if entry.version is None else str(entry.version), entry.digest[:12])
    output.print(table)
    _reasons(status.folders)


def _reasons(folders: Mapping[str, FolderStatus]) -> None:
    for name, entry in folders.items():
        if entry.why:
            kept = "; the earlier one is served" if entry.served and entry.state == "refused" else ""
            output.print(f"{name}: {entry.state}: {escape(entry.why)}{kept}", soft_wrap=True, highlight=False)


def history(states: "Sequence[State]") -> None:
    """Print what was served, the newest first."""
    table = Table(box=None, padding=(0, 2, 0, 0))
    merged = any(state.groups for state in states)
    for column in ("generation", "time (UTC)", "changes", "tasks", *(("merged",) if merged else ())):
        table.add_column(column)
    for state in reversed(states):
        when = state.time.strftime("%Y-%m-%d %H:%M:%S")
        cells = [", ".join(state.changes), ", ".join(state.heads), "; ".join(", ".join(own) for own in state.merged)]
        table.add_row(str(state.generation), when, *map(escape, cells if merged else cells[:2]))
    output.print(table)


def scheduling(found: Scheduling, cores: int) -> None:
    """Say so if a trunk is not scheduled for a machine of so many cores."""
    if found.threads > cores or 2 * found.threads * found.instances <= cores:
        messages.print(
            f"The trunk runs as {found}; this machine has {cores} cores: `espalier tune` fits it.",
            highlight=False, soft_wrap=True,
        )  # fmt: skip


def serving(server: "TritonServer", heads: Sequence[HeadInfo], status: StatusFile) -> None:
    """Say that the server is up, and how to reach it."""
    tasks(heads, status)
    output.print(
        f"gRPC [bold]{server.grpc_url}[/], HTTP [bold]{server.http_url}[/], metrics {server.metrics_url}, "
        f"log {escape(str(server.log_file))}; Ctrl-C stops",
        highlight=False,
        soft_wrap=True,
    )


def tuning(trial: "Trial") -> None:
    """Print one line about a trial of `espalier tune`, as soon as it is known."""
    rate, _, p99, full = _trial(trial)
    messages.print(
        f"{trial.scheduling}: {rate} texts/s within the bound, P99 {p99}; {full} at most", highlight=False,
        soft_wrap=True,
    )  # fmt: skip


def tuned(done: "Tuned", repository: Path) -> None:
    """Print what tuning found: before and after."""
    table = Table(
        "", "instances × threads", "batch", "delay", "texts/s", "P50", "P99", "at most",
        title=f"{repository}, P99 up to {1000 * done.bound:.0f} ms", title_justify="left",
    )  # fmt: skip
    for name, trial in (("before", done.before), ("after", done.after)):
        own = trial.scheduling
        table.add_row(
            name,
            f"{own.instances} × {own.threads}",
            str(own.batch or "all"),
            f"{own.delay / 1000:g} ms",
            *_trial(trial),
        )
    output.print(table)
    if done.written:
        verdict = "Written into the trunk's configs; a running `espalier serve` takes them over."
    elif done.complete:
        verdict = "Nothing is faster than what is deployed by more than noise; nothing was written."
    else:
        verdict = "Nothing was written."
    if not done.complete:
        verdict += " Time was up before all was tried: the same command goes on."
    messages.print(verdict, highlight=False, soft_wrap=True)


def _trial(trial: "Trial") -> tuple[str, str, str, str]:
    p50, p99 = ("–" if value is None else f"{1000 * value:.0f} ms" for value in (trial.p50, trial.p99))
    return f"{trial.rate:.1f}", p50, p99, f"{trial.full:.1f}"


def answers(asked: "Sequence[tuple[str | tuple[str, str], Answers]]", title: str | None = None) -> None:
    """Print one table of typed answers."""
    table = Table("text", "task", "answer", title=title, title_justify="left", show_lines=False)
    for item, by_task in asked:
        text = item if isinstance(item, str) else " ⇄ ".join(item)
        for number, (task, answer) in enumerate(by_task.items()):
            table.add_row(escape(text) if number == 0 else "", task, _answer(answer))
        table.add_section()
    output.print(table)


def _answer(answer: "Answer") -> str:
    from clients import Classification, Regression

    if isinstance(answer, Regression):
        return f"{answer.value:.3f}"
    if isinstance(answer, Classification):
        ranked = sorted(answer.probabilities.items(), key=lambda pair: -pair[1])
        first, *rest = [f"{escape(label)} {chance:.2f}" for label, chance in ranked[:3]]
        likely = [other for other, (_, chance) in zip(rest, ranked[1:], strict=False) if chance >= _CHANCE]
        return f"[bold]{first}[/]" + "".join(f"  [dim]{other}[/]" for other in likely)
    spans = [f"[bold]{escape(span.label)}[/]={escape(repr(span.text))}{_chance(span)}" for span in answer.spans]
    path = "" if answer.probability is None else f"  [dim]path {answer.probability:.2f}[/]"
    return (", ".join(spans) or "[dim]no spans[/]") + path


def _chance(span: "Span") -> str:
    return "" if span.probability is None else f" {span.probability:.2f}"


def evaluation(task: str, split: str, served: dict[str, float], head: HeadInfo) -> None:
    """Print the served scores on `split`, on dev beside the one that training computed."""
    offline = {head.metric: f"{head.score:.4f}"} if split == "dev" else {}
    table = Table("task", "split", "metric", "served", *(["offline"] if offline else []))
    for name, value in served.items():
        table.add_row(task, split, name, f"{value:.4f}", offline.get(name, ""))
    output.print(table)

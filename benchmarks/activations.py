"""Seconds per epoch with the trunk's activations from disk, and with the trunk run in every epoch.

    python -m benchmarks.activations SPEC --base BASE --data FOLDER --max-train 1000

The two alternate, epoch by epoch of separate trainings, for taps at a third, half and two thirds of the base; the
ratio is that of the medians. By the count of layers it approaches (tap + 3 × trained) / (3 × trained): a layer that is
trained costs a forward and twice that backward, a frozen one its forward. Trained are the branch's layers, the last one
of a sentence task for its first token alone: a sixth, its keys and values.
"""

import statistics
import tempfile
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from espalier import show
from espalier.contract import Kind
from espalier.encoder import Base, load_base
from espalier.spec import TaskSpec, load_spec
from training.activations import ActivationCache
from training.finetune import train
from training.trainer import Arguments, Progress

ROUNDS = 3


def main(
    spec: Annotated[Path, typer.Argument(help="The task's spec file.")],
    base: Annotated[str, typer.Option(help="As in espalier train.")],
    data: Annotated[Path | None, typer.Option(help="As in espalier train.")] = None,
    max_train: Annotated[int, typer.Option(help="Rows of train to use.")] = 1000,
) -> None:
    """Measure and print the table."""
    task, loaded = load_spec(spec, data), load_base(base)
    layers = loaded.config.num_hidden_layers
    table = Table("tap", "branch layers", "s/epoch without", "s/epoch with", "ratio", "by layers")
    for tap in (layers // 3, layers // 2, layers * 2 // 3):
        with tempfile.TemporaryDirectory() as folder, show.waiting(f"tap {tap}"):
            cache = ActivationCache(Path(folder) / "cache")
            run(task, loaded, tap, max_train, Path(folder) / "warm-up", cache)  # also fills the cache
            seconds: dict[bool, list[float]] = {False: [], True: []}
            for number in range(ROUNDS):
                for cached in (False, True):
                    out = Path(folder) / f"{number}-{cached}"
                    seconds[cached].append(run(task, loaded, tap, max_train, out, cache if cached else None))
        without, with_cache = (statistics.median(seconds[cached]) for cached in (False, True))
        branch = layers - tap
        trained = branch if task.kind is Kind.TAGGING else branch - 5 / 6
        table.add_row(
            str(tap), str(branch), f"{without:.2f}", f"{with_cache:.2f}", f"{without / with_cache:.2f}",
            f"{1 + tap / (3 * trained):.2f}",
        )  # fmt: skip
    show.output.print(table)


def run(spec: TaskSpec, base: Base, tap: int, max_train: int, out: Path, cache: ActivationCache | None) -> float:
    """Train one epoch and return the seconds from its first optimizer step to its last, scaled to all steps."""
    times: list[float] = []

    def report(progress: Progress) -> None:
        if progress.stage == "training" and progress.metrics is None:
            times.append(time.perf_counter())

    train(spec, base, tap, None, Arguments(epochs=1, max_train=max_train), out, report, cache)
    return (times[-1] - times[0]) * len(times) / (len(times) - 1)


if __name__ == "__main__":
    typer.run(main)

"""The bench: python -m benchmarks.cost (make bench)

Builds what it compares, serves all of it on one machine, and asks the one and the other in turn. Writes
docs/performance.json, which `benchmarks.cost.report` puts into words and pictures. What was built stays under
runs/bench; what is up to date is not built again.
"""

import contextlib
import json
import os
import platform
import shutil
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Annotated, Any, Literal

import onnxruntime
import typer
from tokenizers import Tokenizer

from benchmarks import run, summary
from benchmarks.cost import baseline, bound, texts, ways
from benchmarks.cost.checkpoint import SIZES, Size, checkpoint
from benchmarks.cost.load import Asked, Window, closed_loop, open_loop
from benchmarks.cost.report import write_report
from benchmarks.cost.server import serving
from benchmarks.untrained import LABELS
from espalier import show
from espalier.contract import ENSEMBLE, Target
from espalier.encoder import load_base
from espalier.files import write_whole

CONCURRENCY = 32
TEXTS = 256
DEEP = ways.TASKS[1:2]
ALONE = (ways.SHALLOW,)
UNLOADED = 10.0
"""Seconds of one request after the other."""
HALF_LOAD = 20.0
"""Seconds of random requests at half of the highest rate."""


def main(
    size: Annotated[Literal["bert-base", "minilm"], typer.Option(help="What is served.")] = "bert-base",
    seconds: Annotated[float, typer.Option(help="Length of a window; today's way gets three of it.")] = 8.0,
    rounds: Annotated[int, typer.Option(help="Windows of each way; they take turns.")] = 3,
    home: Annotated[Path, typer.Option(help="Where models are built and kept.")] = Path("runs/bench"),
    report: Annotated[Path, typer.Option(help="Folder of performance.md, .json and pictures.")] = Path("docs"),
) -> None:
    """Measure, print, write."""
    chosen = SIZES[size]
    tokenizer, repositories, level = _build(chosen, home)
    found = _measure(repositories, tokenizer, seconds, rounds)
    found |= {
        "size": chosen.name, "trunk_layers": chosen.trunk, "shallow_layers": chosen.shallow,
        "baseline_level": level, "concurrency": CONCURRENCY, "cores": _cores(),
        "versions": {"onnxruntime": onnxruntime.__version__, "python": platform.python_version()},
        "command": f"python -m benchmarks.cost --size {size} --seconds {seconds:g} --rounds {rounds}",
    }  # fmt: skip
    write_whole(report / "performance.json", json.dumps(found, indent=2) + "\n")
    write_report(found, report)
    show.output.print_json(data=found["ratios"])


def _cores() -> int:
    return len(os.sched_getaffinity(0))


def _build(size: Size, home: Path) -> tuple[str, dict[str, Path], str]:
    """Make, or find, the repositories; return the tokenizer, the repositories by way, and optimum's best level."""
    folder = home / size.name
    repositories = {way: folder / way for way in ("ours", "ours_int8", "today")}
    with show.waiting("building what is compared") as status:
        name = checkpoint(size, home)
        base = load_base(name)
        for way, target in (("ours", Target.CPU), ("ours_int8", Target.INT8)):
            status.update(f"building: {way}")
            ways.ours(base, size, target, folder / "branches", repositories[way])  # what is up to date stays
        status.update("building: today's way, with optimum")
        single = baseline.single_task(name, len(LABELS), folder / "single")
        models = {level: baseline.optimized(single, level) for level in baseline.LEVELS}
        level = baseline.fastest(models, _cores())
        shutil.rmtree(repositories["today"], ignore_errors=True)
        ways.full_models(models[level], base.tokenizer, _cores(), repositories["today"])
    return base.tokenizer, repositories, level


def _measure(repositories: dict[str, Path], tokenizer: str, seconds: float, rounds: int) -> dict[str, Any]:
    mixed, fixed = texts.mixed(tokenizer, TEXTS), texts.fixed(tokenizer, TEXTS)
    padded = texts.padded(tokenizer, TEXTS, ways.BUCKETS)
    rates: dict[str, list[float]] = {}
    unloaded, half_load = list[Window](), list[Window]()
    logs = Path("logs")
    with contextlib.ExitStack() as stack:
        urls = {
            way: stack.enter_context(serving(folder, logs / f"bench-{way}.log")).grpc_url
            for way, folder in repositories.items()
        }

        def asked(way: str, tasks: tuple[str, ...] = ways.TASKS) -> Asked:
            return Asked(urls[way], ENSEMBLE, tasks)

        plan: dict[str, Callable[[], float]] = {
            "ours": lambda: closed_loop(asked("ours"), mixed, CONCURRENCY, seconds).rate,
            "today": lambda: closed_loop(asked("today"), mixed, CONCURRENCY, 3 * seconds).rate,
            "ours_fixed": lambda: closed_loop(asked("ours"), fixed, CONCURRENCY, seconds).rate,
            "ours_padded": lambda: closed_loop(asked("ours"), padded, CONCURRENCY, seconds).rate,
            "ours_one_task": lambda: closed_loop(asked("ours", DEEP), mixed, CONCURRENCY, seconds).rate,
            "ours_shallow": lambda: closed_loop(asked("ours", ALONE), mixed, CONCURRENCY, seconds).rate,
            "ours_int8": lambda: closed_loop(asked("ours_int8"), mixed, CONCURRENCY, seconds).rate,
            "bound": lambda: max(bound.bounds(repositories["ours"], tokenizer, mixed, ways.TASKS, seconds)),
        }
        for number in range(rounds):
            for name, window in plan.items():
                with show.waiting(f"round {number + 1} of {rounds}: {name}"):
                    rates.setdefault(name, []).append(window())
                show.messages.print(f"{number + 1}/{rounds} {name}: {rates[name][-1]:.1f} texts/s", highlight=False)
            with show.waiting(f"round {number + 1} of {rounds}: latency"):
                unloaded.append(closed_loop(asked("ours"), mixed, 1, UNLOADED))
                half_load.append(open_loop(asked("ours"), mixed, rates["ours"][-1] / 2, HALF_LOAD, seed=number))
    rust = Tokenizer.from_str(tokenizer)
    lengths = {
        name: sum(len(encoding.ids) for encoding in rust.encode_batch(some)) / len(some)
        for name, some in (("mixed", mixed), ("fixed", fixed))
    }
    return {
        "texts_per_second": {name: summary(own, 2) for name, own in rates.items()},
        "tokens_per_text": {name: round(mean, 2) for name, mean in lengths.items()},
        "latency_seconds": {
            name: {f"p{percent}": round(median(w.percentile(percent) for w in windows), 4) for percent in (50, 99)}
            for name, windows in (("unloaded", unloaded), ("half_load", half_load))
        },
        "ratios": _ratios(
            rates, lengths, [h.percentile(99) / u.percentile(99) for h, u in zip(half_load, unloaded, strict=True)]
        ),
    }


def _ratios(rates: dict[str, list[float]], lengths: dict[str, float], tails: list[float]) -> dict[str, Any]:
    """Return the ratios of windows of the same round: the median, and the range over the rounds."""

    def ratio(value: Callable[..., float], *names: str) -> dict[str, Any]:
        return summary([value(*row) for row in zip(*(rates[name] for name in names), strict=True)], 4)

    tokens = lengths["mixed"] / lengths["fixed"]
    more = len(ways.TASKS) - 1
    return {
        "cost_reduction": ratio(lambda ours, today: 1 - today / ours, "ours", "today"),
        "marginal_task": ratio(lambda ours, one: (1 - ours / one) / more, "ours", "ours_one_task"),
        "ensemble_over_bound": ratio(lambda ours, bound: ours / bound, "ours", "bound"),
        "mixed_over_fixed": ratio(lambda ours, fixed: tokens * ours / fixed, "ours", "ours_fixed"),
        "shallow_over_all": ratio(lambda ours, alone: ours / alone, "ours", "ours_shallow"),
        "int8_over_fp32": ratio(lambda int8, ours: int8 / ours, "ours_int8", "ours"),
        "int8_cost_reduction": ratio(lambda int8, today: 1 - today / int8, "ours_int8", "today"),
        "p99_half_load_over_unloaded": summary(tails, 4),
        "ragged_over_padded": ratio(lambda ours, padded: ours / padded, "ours", "ours_padded"),
        "gpu": None,
    }


if __name__ == "__main__":
    run(main)

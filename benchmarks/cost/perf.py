"""perf_analyzer on an ensemble, under one load after the other; its CSV is kept.

    python -m benchmarks.cost.perf my-texts.txt --url localhost:8001 --concurrency 16 --rate 20

asks a server that runs already all of its tasks, about the texts of a file.
"""

import csv
import io
import json
import subprocess
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from benchmarks import perf_analyzer, run
from espalier import show
from espalier.contract import ENSEMBLE, TEXT
from espalier.errors import ServerError
from espalier.files import write_whole
from espalier.texts import read_texts

CONCURRENCY = (1, 4, 16, 64)
"""Requests under way that are swept."""
DEMO = Path(__file__).parents[2] / "deploy" / "perf_input.json"
"""The demo's texts, as perf_analyzer reads them."""
TRIALS = 6
"""Windows within which three in a row have to agree."""
AGREE = 25  # %
ANY = 999  # %, a factor of about ten
UNSTABLE = "Failed to obtain stable measurement"
"""What perf_analyzer says if they do not; it then tells nothing else."""


def at_concurrency(numbers: Iterable[int]) -> list[tuple[str, ...]]:
    """Return loads of so many requests under way each, as arguments of perf_analyzer."""
    return [("--concurrency-range", str(number)) for number in numbers]


def at_rates(rates: Iterable[float]) -> list[tuple[str, ...]]:
    """Return loads of so many random arrivals a second each (a Poisson process), as arguments of perf_analyzer."""
    return [("--request-rate-range", f"{rate:.2f}", "--request-distribution", "poisson") for rate in rates]


def sweep(
    binary: Path, url: str, texts: Sequence[str], loads: Sequence[Sequence[str]], seconds: float, to: Path
) -> list[dict[str, Any]]:
    """Run perf_analyzer under each of `loads` (arguments of its own), in windows of `seconds`; keep its CSV as `to`.

    One run per load: a run over a range of loads ends at the first one that is not stable. Such a load is measured
    again, by three windows that hardly have to agree. Returns per load: `load`, texts per second, P50 and P99 in
    seconds, and whether it was `stable`. Raises ServerError if a run fails.
    """
    lines: list[str] = []
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder, "texts.json")
        data.write_text(json.dumps({"data": [{TEXT: {"content": [text], "shape": [1]}} for text in texts]}))
        for load in loads:
            table = _run(binary, url, data, load, seconds, AGREE)
            stable = table is not None
            table = table or _run(binary, url, data, load, seconds, ANY)
            if table is None:
                raise ServerError(f"perf_analyzer found nothing that is stable under {' '.join(load)}")
            head, *own = table.splitlines()
            lines = [*(lines or [head]), *own]
            found += [{**row, "stable": stable} for row in rows(table)]
            write_whole(to, "\n".join(lines) + "\n")  # what was measured is kept if the next load fails
    return found


def _run(binary: Path, url: str, data: Path, load: Sequence[str], seconds: float, agree: int) -> str | None:
    """Run perf_analyzer once; return its CSV, or None if three windows in a row do not agree within `agree` percent."""
    table = data.with_name("table.csv")
    table.unlink(missing_ok=True)
    command = [
        str(binary), "-m", ENSEMBLE, "-i", "grpc", "-u", url, "--input-data", str(data), "-f", str(table), "--async",
        "--measurement-interval", str(round(1000 * seconds)), "--max-trials", str(TRIALS),
        "--stability-percentage", str(agree), *load,
    ]  # fmt: skip
    limit = 60 + 2 * TRIALS * seconds
    libraries = perf_analyzer.environment(binary.parent)
    try:
        done = subprocess.run(command, env=libraries, capture_output=True, text=True, timeout=limit, check=False)
    except subprocess.TimeoutExpired as error:
        raise ServerError(f"perf_analyzer did not end within {limit:g} s under {' '.join(load)}") from error
    if done.returncode == 0 and table.is_file():
        return table.read_text().strip()
    if UNSTABLE in done.stdout + done.stderr:
        return None
    said = (done.stderr.strip() or done.stdout.strip() or "no reason was given").splitlines()[-1]
    raise ServerError(f"perf_analyzer failed under {' '.join(load)}: {said}")


def rows(content: str) -> list[dict[str, float]]:
    """Return the rows of perf_analyzer's CSV."""

    def row(found: dict[str, Any]) -> dict[str, float]:
        load = found.get("Concurrency") or found["Request Rate"]
        return {
            "load": float(load),
            "texts_per_second": float(found["Inferences/Second"]),
            "p50": float(found["p50 latency"]) / 1e6,
            "p99": float(found["p99 latency"]) / 1e6,
        }

    return list(map(row, csv.DictReader(io.StringIO(content))))


def cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    """Return a row of `sweep` in words: load, texts per second, P50, P99, and whether it was not stable."""
    waits = (f"{1000 * row[percentile]:.0f} ms" for percentile in ("p50", "p99"))
    said = "" if row["stable"] else "not stable"
    return (f"{row['load']:g}", f"{row['texts_per_second']:.1f}", *waits, said)


def main(
    texts: Annotated[Path | None, typer.Argument(help="A text per line; without a file the demo's are taken.")] = None,
    url: Annotated[str, typer.Option(help="host:port of Triton's gRPC endpoint.")] = "localhost:8001",
    concurrency: Annotated[list[int] | None, typer.Option(min=1, help="Requests under way; may be repeated.")] = None,
    rate: Annotated[list[float] | None, typer.Option(min=0.1, help="Random texts a second; may be repeated.")] = None,
    seconds: Annotated[float, typer.Option(min=0.5, help="Length of a window; three have to agree.")] = 5.0,
    out: Annotated[Path, typer.Option(help="Folder of concurrency.csv and poisson.csv.")] = Path("runs/perf"),
) -> None:
    """Ask a server all of its tasks about texts, under one load after the other; print and keep what came out.

    Without a load it is asked with 1, 4, 16 and 64 requests under way.
    """
    if texts:
        asked = read_texts(texts, "give a file with a text per line")
    else:
        asked = [item[TEXT]["content"][0] for item in json.loads(DEMO.read_text())["data"]]
    with show.waiting("installing perf_analyzer"):
        binary = perf_analyzer.install()
    numbers = concurrency or (() if rate else CONCURRENCY)
    for name, loads in (("concurrency", at_concurrency(numbers)), ("poisson", at_rates(rate or ()))):
        if loads:
            to = out / f"{name}.csv"
            with show.waiting(f"perf_analyzer: {name}"):
                found = sweep(binary, url, asked, loads, seconds, to)
            show.messages.print(f"perf_analyzer wrote {to}", highlight=False, soft_wrap=True)
            table = Table(name, "texts/s", "P50", "P99", "")
            for row in found:
                table.add_row(*cells(row))
            show.output.print(table)


if __name__ == "__main__":
    run(main)

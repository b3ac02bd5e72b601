"""perf_analyzer on an ensemble, under one load after the other; its CSV is kept."""

import csv
import io
import json
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.perf_analyzer import environment
from espalier.contract import ENSEMBLE, TEXT
from espalier.errors import ServerError
from espalier.files import write_whole

TRIALS = 6
"""Windows within which three in a row have to agree."""
AGREE = 25  # %
ANY = 999  # %, a factor of about ten
UNSTABLE = "Failed to obtain stable measurement"
"""What perf_analyzer says if they do not; it then tells nothing else."""


def sweep(
    binary: Path, url: str, texts: Sequence[str], loads: Sequence[Sequence[str]], seconds: float, to: Path
) -> list[dict[str, Any]]:
    """Run perf_analyzer under each of `loads` (arguments of its own), in windows of `seconds`; keep its CSV as `to`.

    One run per load: a run over a range of loads ends at the first one that is not stable. Such a load is measured
    again, by three windows that hardly have to agree. Returns per load: `load`, texts per second, P50 and P99 in
    seconds, and whether it was `stable`. Raises ServerError if a run fails.
    """
    tables: list[str] = []
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
            tables.append(table)
            found += [{**row, "stable": stable} for row in rows(table)]
    head = tables[0].splitlines()[0]
    write_whole(to, "\n".join([head, *(line for table in tables for line in table.splitlines()[1:])]) + "\n")
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
    try:
        done = subprocess.run(
            command, env=environment(binary.parent), capture_output=True, text=True, timeout=limit, check=False
        )
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

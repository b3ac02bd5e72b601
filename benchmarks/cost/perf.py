"""perf_analyzer on an ensemble: a sweep over requests under way, and one over random arrivals; its CSV is kept."""

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

LIMIT = 600  # s


def sweep(
    binary: Path, url: str, texts: Sequence[str], load: Sequence[str], requests: int, to: Path
) -> list[dict[str, float]]:
    """Run perf_analyzer under the loads that `load` (arguments of its own) describes, keep its CSV as the file `to`.

    A window is `requests` requests. Returns per load: `load`, texts per second, P50 and P99 in seconds. Raises
    ServerError if it fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        data, table = Path(folder, "texts.json"), Path(folder, "table.csv")
        data.write_text(json.dumps({"data": [{TEXT: {"content": [text], "shape": [1]}} for text in texts]}))
        command = [
            str(binary), "-m", ENSEMBLE, "-i", "grpc", "-u", url, "--input-data", str(data), "-f", str(table),
            "--measurement-mode", "count_windows", "--measurement-request-count", str(requests),
            "--stability-percentage", "25", "--max-trials", "3", "--async", *load,
        ]  # fmt: skip
        try:
            done = subprocess.run(
                command, env=environment(binary.parent), capture_output=True, text=True, timeout=LIMIT, check=False
            )
        except subprocess.TimeoutExpired as error:
            raise ServerError(f"perf_analyzer did not end within {LIMIT} s under {' '.join(load)}") from error
        if not table.is_file():
            said = (done.stderr.strip() or done.stdout.strip() or "no reason was given").splitlines()[-1]
            raise ServerError(f"perf_analyzer failed under {' '.join(load)}: {said}")
        content = table.read_text()
    write_whole(to, content)
    return rows(content)


def rows(content: str) -> list[dict[str, float]]:
    """Return the rows of perf_analyzer's CSV, by rising load."""

    def row(found: dict[str, Any]) -> dict[str, float]:
        load = found.get("Concurrency") or found["Request Rate"]
        return {
            "load": float(load),
            "texts_per_second": float(found["Inferences/Second"]),
            "p50": float(found["p50 latency"]) / 1e6,
            "p99": float(found["p99 latency"]) / 1e6,
        }

    return sorted(map(row, csv.DictReader(io.StringIO(content))), key=lambda found: found["load"])

"""What a running server takes: memory of all its processes, and per-step figures of Triton's own statistics."""

from pathlib import Path
from typing import Any

import tritonclient.grpc as triton

MEGA = 1024 * 1024
PARTS = ("queue", "compute_input", "compute_infer", "compute_output")

Counts = dict[str, dict[str, int]]
"""By model: requests, items, executions, and the nanoseconds of each of PARTS."""


def memory(pid: int) -> float:
    """Return the MiB of a process and all its children: proportional set size, shared pages counted once."""
    own = 0
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            own = int(line.split()[1]) * 1024
    children = Path(f"/proc/{pid}/task").glob("*/children")
    return own / MEGA + sum(memory(int(child)) for file in children for child in file.read_text().split())


def statistics(url: str) -> Counts:
    """Return Triton's counts since it started."""
    client = triton.InferenceServerClient(url)
    try:
        found: Any = client.get_inference_statistics(as_json=True)
    finally:
        client.close()
    counts: Counts = {}
    for model in found["model_stats"]:
        stats = model["inference_stats"]
        own = {name: int(stats.get(name, {}).get("ns", 0)) for name in PARTS}
        own |= {name: int(model.get(name, 0)) for name in ("inference_count", "execution_count")}
        own["requests"] = int(stats.get("success", {}).get("count", 0))
        counts[model["name"]] = own
    return counts


def steps(before: Counts, after: Counts) -> dict[str, dict[str, float]]:
    """Return by model what happened between two `statistics`: mean batch in items, and ms per request by part."""
    found = {}
    for model, end in after.items():
        grown = {name: value - before.get(model, {}).get(name, 0) for name, value in end.items()}
        if not grown["execution_count"] or not grown["requests"]:
            continue
        found[model] = {
            "batch": round(grown["inference_count"] / grown["execution_count"], 2),
            **{f"{part}_ms": round(grown[part] / grown["requests"] / 1e6, 2) for part in PARTS},
        }
    return found

"""docs/performance.md and its picture, from what the bench measured."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from espalier.files import write_whole
from training.plots import INK, LINE, new_figure, write_figure

NAMES = {
    "ours": "ours, all 8 tasks",
    "ours_fixed": "ours, all 8 tasks, 32 tokens each",
    "ours_padded": "ours, every text as long as its bucket",
    "ours_one_task": "ours, one deep task",
    "ours_shallow": "ours, the shallow task",
    "ours_int8": "ours, 8-bit, all 8 tasks",
    "bound": "bound: our graphs in one process, no server",
    "today": "today's way: eight full models",
}
"""What was measured, in the order of the report."""


def write_report(found: Mapping[str, Any], to: Path) -> None:
    """Write performance.md and performance.png into the folder `to`."""
    _plot(found["texts_per_second"], to / "performance.png")
    write_whole(to / "performance.md", _page(found))


def _page(found: Mapping[str, Any]) -> str:
    ratios, latency = found["ratios"], found["latency_seconds"]
    # A shallow text runs as many layers less as its tap is lower; the heads are left out of this count.
    layers = found["shallow_layers"] / found["trunk_layers"]
    rows = [
        ("cost reduction against today's way", "cost_reduction", "≥ 0.93"),
        ("the same with 8-bit products", "int8_cost_reduction", ""),
        ("one more task, of the texts per second", "marginal_task", "≤ 0.015"),
        ("ensemble ÷ bound", "ensemble_over_bound", "≥ 0.90"),
        ("mixed ÷ fixed lengths, per token", "mixed_over_fixed", "≥ 0.95"),
        ("ragged ÷ padded", "ragged_over_padded", ""),
        ("time per text: shallow task alone ÷ all tasks", "shallow_over_all", f"{layers:.2f} by trunk layers, ± 10 %"),
        ("8-bit ÷ FP32", "int8_over_fp32", "≥ 1.8"),
        ("P99 at half of the highest rate ÷ P99 unloaded", "p99_half_load_over_unloaded", "≤ 3"),
    ]
    speeds = [
        (NAMES[name], f"{own['median']:.1f}", f"{own['range'][0]:.1f} – {own['range'][1]:.1f}")
        for name in NAMES
        if (own := found["texts_per_second"].get(name))
    ]
    waits = [
        (NAMES_OF_LOADS[name], f"{1000 * own['p50']:.0f} ms", f"{1000 * own['p99']:.0f} ms")
        for name, own in latency.items()
    ]
    return "\n".join(
        [
            "# What serving costs",
            "",
            f"Measured by `{found['command']}` on {found['cores']} CPU cores, ONNX Runtime "
            f"{found['versions']['onnxruntime']}, embedded Triton. All ways are served at the same time and take "
            "turns; a ratio is the median of the rounds, with their range. Absolute rates belong to one machine and "
            "day.",
            "",
            f"* **Ours**: {found['size']} sizes with random weights, a trunk of {found['trunk_layers']} layers, eight "
            f"heads of one folded layer, one of them on a tap after {found['shallow_layers']} layers; text in, eight "
            "outputs.",
            "* **Today's way**: eight full models exported and optimised by optimum (level "
            f"{found['baseline_level']}, the fastest of O1 to O3 here), behind the same tokenizer in one ensemble on "
            "the same Triton, padded to 16, 32, 64 or 128 tokens, dynamic batching, a thread per core.",
            "* **Bound**: our ONNX files in one process on batches of 32 texts, threads arranged as is best.",
            f"* **Texts**: mixed lengths (log-normal, 5 to 128 tokens, {found['tokens_per_text']['mixed']:.0f} on "
            f"average) unless it says otherwise, one per request, {found['concurrency']} requests under way, gRPC.",
            "",
            "## Ratios",
            "",
            *_table(
                ("", "measured", "range", "aim"),
                [(label, *_values(ratios[name]), aim) for label, name, aim in rows],
            ),
            "",
            "Cost reduction is 1 − (texts per second of today's way ÷ ours). What padding costs is seen with the same "
            "graphs on texts with as many tokens as their bucket has: 16, 32, 64 or 128.",
            "",
            "## Texts per second",
            "",
            *_table(("", "median", "range"), speeds),
            "",
            "![Texts per second](performance.png)",
            "",
            "## Latency of ours",
            "",
            *_table(("", "P50", "P99"), waits),
            "",
            "Random arrivals count from the moment at which a text was to be sent (no coordinated omission).",
            "",
            "## Not measured yet",
            "",
            "* A GPU: nothing here was run on one.",
            "* The paper's way (padded, not folded); what folding and segments give by themselves; a Python server; "
            "perf_analyzer; the highest Poisson rate under a bound of P99; memory and start-up time.",
            "",
        ]
    )


NAMES_OF_LOADS = {"unloaded": "one request after the other", "half_load": "half of the highest rate, random arrivals"}


def _values(ratio: Mapping[str, Any]) -> tuple[str, str]:
    low, high = ratio["range"]
    return f"{ratio['median']:.3f}", f"{low:.3f} – {high:.3f}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [_row(head), _row(["---"] * len(head)), *map(_row, rows)]


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _plot(rates: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    names = [name for name in NAMES if name in rates][::-1]
    figure, axes = new_figure(7.0, 0.6 + 0.42 * len(names), "texts per second")
    middle = [rates[name]["median"] for name in names]
    reach = [[abs(rates[name]["median"] - rates[name]["range"][end]) for name in names] for end in (0, 1)]
    axes.barh(range(len(names)), middle, xerr=reach, color=LINE, ecolor=INK, height=0.6, capsize=2)
    axes.set_yticks(range(len(names)), [NAMES[name] for name in names])
    axes.grid(axis="y", visible=False)
    write_figure(figure, path)

"""docs/performance.md and its pictures, from what the bench measured."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from benchmarks.cost.footprint import PARTS
from benchmarks.cost.perf import AGREE, cells
from espalier.files import write_whole
from espalier.scheduling import Scheduling
from training.plots import INK, LINE, new_figure, write_figure

NAMES = {
    "ours": "ours, all 8 tasks",
    "ours_fixed": "ours, all 8 tasks, 32 tokens each",
    "ours_padded": "ours, every text as long as its bucket",
    "two": "ours, a server of two tasks",
    "ours_one_task": "ours, one deep task",
    "apart": "ours, a model per head, all 8 tasks",
    "apart_one_task": "ours, a model per head, one deep task",
    "ours_shallow": "ours, the shallow task",
    "ours_int8": "ours, 8-bit, all 8 tasks",
    "bound": "bound: our graphs in one process, no server",
    "paper": "the paper's way: padded, not folded",
    "python": "a Python server: LitServe, PyTorch",
    "today": "today's way: eight full models",
}
"""What was measured, in the order of the report."""
ABLATIONS = {
    "paper": "none: the paper's way",
    "folding": "folding alone",
    "segments": "segments alone",
    "ragged": "ragged batches alone",
    "apart": "all three, a model per head",
    "ours": "all three, heads merged: ours",
}
LOADS = {"unloaded": "one request after the other", "half_load": "half of the highest rate, random arrivals"}
WAYS = {"ours": LINE, "ours_int8": "#7a3fa0", "today": "#c0553a"}


def write_report(found: Mapping[str, Any], to: Path, stem: str = "performance") -> None:
    """Write STEM.md and its pictures into the folder `to`."""
    _plot_rates(found["texts_per_second"], to / f"{stem}.png")
    _plot_latency(found["by_load"], to / f"{stem}-latency.png")
    write_whole(to / f"{stem}.md", "\n".join(_page(found, stem)))


def _page(found: Mapping[str, Any], stem: str) -> list[str]:
    return [
        f"# What serving costs: {found['size']}",
        "",
        f"Measured by `{found['command']}` on {found['cores']} CPU cores, ONNX Runtime "
        f"{found['versions']['onnxruntime']}, embedded Triton. The machine's own speed changes within minutes, so each "
        "window of another way lies between two of ours, and a ratio is of their mean; it is the median of the rounds, "
        "with their range. In a round the bound, a server of two tasks and equal lengths have "
        f"{found['turns']} windows, the others one. Absolute rates belong to one machine and day.",
        "",
        *_what(found),
        "",
        *_ratios(found),
        "",
        *_rates(found, stem),
        "",
        *_ablations(found["ablations"]),
        "",
        *_latency(found, stem),
        "",
        *_inside(found),
        "",
        *_perf_analyzer(found["perf_analyzer"]),
        "",
        "## GPU",
        "",
        "GPU figures are not measured yet: nothing here was run on one.",
        "",
    ]


def _what(found: Mapping[str, Any]) -> list[str]:
    scheduling = {way: Scheduling.model_validate(own) for way, own in found["scheduling"].items()}
    weights = "random weights: cost does not depend on them" if found["size"] == "BERT-base" else "the packaged model"
    return [
        f"* **Ours**: {found['size']} sizes ({weights}), a trunk of {found['trunk_layers']} layers, eight heads of one "
        f"folded layer, one of them on a tap after {found['shallow_layers']} layers; text in, eight outputs. Each "
        "segment is one model with its heads, as a server of tasks at rest has them (`espalier serve --merge`). Trunk: "
        f"{scheduling['ours']}; 8-bit: {scheduling['ours_int8']}.",
        "* **Today's way**: eight full models exported and optimised by optimum (level "
        f"{found['baseline_level']}, the fastest of O1 to O3 here), behind the same tokenizer in one ensemble on the "
        f"same Triton, padded to 16, 32, 64 or 128 tokens, dynamic batching. Each model: {scheduling['today']}.",
        "* **The paper's way**: the same trunk and branches as PyTorch exports them: padded, every layer of a branch "
        f"for every token, one trunk without segments; on the same Triton. Each model: {scheduling['paper']}.",
        "* **A Python server**: LitServe, PyTorch, trunk and branches in one model, batches of up to 32 padded to "
        f"their longest text, HTTP, {found['workers']} worker(s) that share the cores (1 and 2 were tried).",
        f"* **Bound**: our ONNX files in one process, no server: {found['bound']['streams']} stream(s) of "
        f"{found['bound']['threads']} thread(s), batches of {found['bound']['batch']}, the fastest of six.",
        f"* **Texts**: mixed lengths (log-normal, 5 to 128 tokens, {found['tokens_per_text']['mixed']:.0f} on "
        f"average) unless it says otherwise, one per request, {found['concurrency']} requests under way, gRPC.",
        "* **Scheduling**: each of these ways has the fastest of up to six schedulings (threads, instances, batch), "
        "found before by the same trials; a part alone has that of what it is a part of.",
    ]


RATIOS = {
    "cost_reduction": "cost reduction against today's way",
    "int8_cost_reduction": "the same with 8-bit products",
    "marginal_task": "one more task, of the texts per second",
    "ensemble_over_bound": "ensemble ÷ bound",
    "mixed_over_fixed": "mixed ÷ fixed lengths, per token",
    "shallow_over_all": "time per text: shallow task alone ÷ all tasks",
    "int8_over_fp32": "8-bit ÷ FP32",
    "p99_half_load_over_unloaded": "P99 at half of the highest rate ÷ P99 unloaded",
    "merged_over_apart": "heads merged into segments ÷ a model per head, all 8 tasks asked",
    "merged_over_apart_one_task": "the same, one deep task asked",
    "ragged_over_padded": "ragged ÷ padded",
    "paper_cost_reduction": "cost reduction of the paper's way against today's",
    "cost_reduction_against_paper": "cost reduction of ours against the paper's way",
    "cost_reduction_against_python": "cost reduction of ours against the Python server",
}
AT_LEAST = {"cost_reduction": 0.93, "ensemble_over_bound": 0.90, "mixed_over_fixed": 0.95, "int8_over_fp32": 1.8}
AT_MOST = {"marginal_task": 0.015, "p99_half_load_over_unloaded": 3.0}


def _ratios(found: Mapping[str, Any]) -> list[str]:
    # The aims are of one size. A shallow text runs as many layers less as its tap is lower; heads are not counted.
    aims = found["size"] == "BERT-base"
    most = AT_MOST | {"shallow_over_all": round(1.1 * found["shallow_layers"] / found["trunk_layers"], 2)}
    rows = []
    for name, label in RATIOS.items():
        row = [label, *_values(found["ratios"][name])]
        if aims:
            middle = found["ratios"][name]["median"]
            if name in AT_LEAST:
                row += [f"≥ {AT_LEAST[name]:g}", "yes" if middle >= AT_LEAST[name] else "no"]
            elif name in most:
                row += [f"≤ {most[name]:g}", "yes" if middle <= most[name] else "no"]
            else:
                row += ["", ""]
        rows.append(row)
    return [
        "## Ratios",
        "",
        *_table(("", "measured", "range", *(("aim", "reached") if aims else ())), rows),
        "",
        "Cost reduction is 1 − (texts per second of the other way ÷ ours). One more task is a sixth of what all 8 "
        "tasks of ours cost more than two, one on each tap, merged likewise on a server of their own. What padding "
        "costs is seen with the same graphs on texts with as many tokens as their bucket has: 16, 32, 64 or 128. The "
        f"shallow task runs {found['shallow_layers']} of {found['trunk_layers']} trunk layers. The paper's "
        "abstract estimates 86 % less serving cost, for the 21 tasks of its production.",
    ]


def _rates(found: Mapping[str, Any], stem: str) -> list[str]:
    rows = [
        (
            NAMES[name], f"{own['median']:.1f}", f"{own['range'][0]:.1f} – {own['range'][1]:.1f}",
            f"{own['median'] / found['cores']:.1f}",
        )
        for name in NAMES
        if (own := found["texts_per_second"].get(name))
    ]  # fmt: skip
    return [
        "## Texts per second",
        "",
        *_table(("", "median", "range", "per core"), rows),
        "",
        f"![Texts per second]({stem}.png)",
    ]


def _ablations(rates: Mapping[str, Mapping[str, Any]]) -> list[str]:
    rows = []
    for way, label in ABLATIONS.items():
        own = [rates[way][name]["median"] for name in ("all", "deep", "shallow")]
        base = [rates["paper"][name]["median"] for name in ("all", "deep", "shallow")]
        rows.append((label, *(f"{a:.1f} ({a / b:.2f}×)" for a, b in zip(own, base, strict=True))))
    return [
        "## What each part gives",
        "",
        "Texts per second, and how many times those of the paper's way, measured in turn.",
        "",
        *_table(("", "all 8 tasks", "one deep task", "the shallow task"), rows),
        "",
        "Without segments every task sits on the one tap, so the shallow one costs what a deep one costs.",
    ]


def _latency(found: Mapping[str, Any], stem: str) -> list[str]:
    waits = [(LOADS[name], _ms(own["p50"]), _ms(own["p99"])) for name, own in found["latency_seconds"].items()]
    bound = found["p99_bound"]
    loads = [
        (NAMES[way], f"{load['part']:.0%}", f"{load['rate']:.1f}", _ms(load["p50"]), _ms(load["p99"]))
        for way in WAYS
        for load in found["by_load"][way]["loads"]
    ]
    highest = [
        (NAMES[way], f"{rate:.1f}" if (rate := found["by_load"][way]["highest_rate"]) else "none") for way in WAYS
    ]
    return [
        "## Latency",
        "",
        "Of ours, between the other windows:",
        "",
        *_table(("", "P50", "P99"), waits),
        "",
        "By offered load, random arrivals at a part of each way's own highest rate for "
        f"{found['offered_seconds']:g} s or longer:",
        "",
        *_table(("", "load", "texts/s", "P50", "P99"), loads),
        "",
        f"![Latency by offered load]({stem}-latency.png)",
        "",
        "Random arrivals count from the moment at which a text was to be sent (no coordinated omission).",
        "",
        *_table(("", f"highest rate with P99 within {bound:g} s, texts/s"), highest),
    ]


def _inside(found: Mapping[str, Any]) -> list[str]:
    steps = [
        (name, f"{own['batch']:.1f}", *(f"{own[f'{part}_ms']:.1f}" for part in PARTS))
        for name, own in sorted(found["steps"].items())
    ]
    footprint = [
        (NAMES[way], f"{own['memory_mib'] / 1024:.1f} GiB", f"{own['start_seconds']:.0f} s")
        for way, own in found["footprint"].items()
    ]
    return [
        "## Inside the server",
        "",
        f"Ours, {found['concurrency']} requests under way, from Triton's own statistics; milliseconds per request. A "
        "step waits in its queue for cores while others compute.",
        "",
        *_table(("step", "mean batch", "in the queue", "input", "computing", "output"), steps),
        "",
        "Memory is the proportional set size of all processes after load; start-up is until all models are ready.",
        "",
        *_table(("", "memory", "start-up"), footprint),
    ]


def _perf_analyzer(found: Mapping[str, Any]) -> list[str]:
    lines = ["## perf_analyzer", ""]
    if "missing" in found:
        return [*lines, f"Not measured: {found['missing']}."]
    rows = [
        (NAMES[way], name, *cells(row))
        for way, sweeps in found.items()
        for name, rows in sweeps.items()
        for row in rows
    ]
    return [
        *lines,
        "NVIDIA's own load generator on the same servers, all outputs; its CSV is in `docs/perf_analyzer/`. The load "
        "is requests under way, or texts per second at random moments (Poisson). Where it is not stable, "
        f"windows differed by more than {AGREE} %, as random arrivals do by themselves where a window has few.",
        "",
        *_table(("", "sweep", "load", "texts/s", "P50", "P99", ""), rows),
    ]


def _ms(seconds: float | None) -> str:
    return "does not keep up" if seconds is None else f"{1000 * seconds:.0f} ms"


def _values(ratio: Mapping[str, Any]) -> tuple[str, str]:
    low, high = ratio["range"]
    return f"{ratio['median']:.3f}", f"{low:.3f} – {high:.3f}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [_row(head), _row(["---"] * len(head)), *map(_row, rows)]


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _plot_rates(rates: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    names = [name for name in NAMES if name in rates][::-1]
    figure, axes = new_figure(7.0, 0.6 + 0.42 * len(names), "texts per second")
    middle = [rates[name]["median"] for name in names]
    reach = [[abs(rates[name]["median"] - rates[name]["range"][end]) for name in names] for end in (0, 1)]
    axes.barh(range(len(names)), middle, xerr=reach, color=LINE, ecolor=INK, height=0.6, capsize=2)
    axes.set_yticks(range(len(names)), [NAMES[name] for name in names])
    axes.grid(axis="y", visible=False)
    write_figure(figure, path)


def _plot_latency(by_load: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    figure, axes = new_figure(6.2, 3.6, "offered load, texts per second", "latency, ms")
    for way, color in WAYS.items():
        loads = [load for load in by_load[way]["loads"] if load["p99"] is not None]
        for percentile, style in (("p50", "--"), ("p99", "-")):
            axes.plot(
                [load["rate"] for load in loads], [1000 * load[percentile] for load in loads], style, color=color,
                marker="o", markersize=3, label=f"{NAMES[way]}, {percentile.upper()}",
            )  # fmt: skip
    axes.set_xscale("log")
    axes.set_yscale("log")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_locator(NullLocator())
    axes.legend(fontsize=7, frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=len(WAYS))
    write_figure(figure, path)

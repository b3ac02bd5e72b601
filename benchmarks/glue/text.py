"""The text of the GLUE report, made from the content of `glue.json` and from nothing else."""

import json
from collections.abc import Sequence
from typing import Any

WAYS = {
    "partial": "partial", "kd3": "to 3", "kd2": "to 2", "kd1": "to 1", "folded_above_1": "1 + folded",
    "folded_above_0": "folded",
}  # fmt: skip
"""Ways to train a branch, and their columns."""


DEV_ROWS = {
    "cola": 1043, "sst2": 872, "mrpc": 408, "stsb": 1500, "qqp": 40430, "mnli": 9815, "qnli": 5463, "rte": 277,
}  # fmt: skip
"""Rows of GLUE's dev splits (matched, for MNLI)."""


def markdown(content: dict[str, Any]) -> str:
    """Return the report."""
    mean, paper, settings, base = (content[key] for key in ("mean", "paper", "settings", "base"))
    mixed, folded = content["plans"]["mixed"], content["plans"]["folded"]
    whole = base["layers"] * len(content["tasks"])
    seeds = f"{settings['seeds']} seeds" if settings["seeds"] > 1 else "one seed, so no spread is known"
    bf16 = "; trained in bfloat16, scored in FP32" if settings["bf16"] else ""
    return f"""# GLUE: eight tasks on one frozen trunk

Made by `make glue`; the same numbers are in [`glue.json`](glue.json). Scores are in points (100 × the metric) on dev,
± the standard deviation over seeds. Base: `{base["name"]}` with {base["layers"]} layers; {settings["epochs"]} epochs,
learning rate {settings["learning_rate"]:g}, batches of {settings["batch_size"]}, {seeds}{bf16}.

| | selected | full fine-tuning | retention | layers executed | counted with folding |
|---|---|---|---|---|---|
| the paper (BERT-base, all of GLUE) | {paper["selected"]} | {paper["full"]} | {paper["selected"] / paper["full"]:.1%} | {paper["overhead_layers"]:.1%} | – |
{_outcome("here, in the paper's way", mixed, mean)}
{_outcome("here, with more layers folded", folded, mean)}

The paper's row and ours are not comparable but for their ratios: another base, other sizes of train and dev. A whole
model per task executes {whole} layers. A folded layer, which computes [CLS] alone, was measured to cost
{content["folded_layer"]:.2f} of a full one. `espalier select` chose both plans, with a threshold of
{settings["threshold"]:g} points a layer: the first among the paper's candidates, every layer counted as one; the second
among all of them, a folded layer counted as what it costs.

![Score of each way by task, less full fine-tuning](glue-tasks.png)

{_table(["task", "metric", "train", "dev", "full", *(f"{name} (tap)" for name in WAYS.values())], [_ways(*item) for item in content["tasks"].items()])}

* *Full*: every layer and the embeddings are trained, a model per task, for {2 * settings["epochs"]} epochs: as many as
  teacher and student together.
* *Partial*: all layers above the tap are trained; the best of the taps {", ".join(map(str, settings["taps"]))}.
* *To 3, 2, 1*: distilled from the partial one of the same tap to so many of its layers, on logits alone, as the paper does.
* *1 + folded*, *folded*: distilled to all the teacher's layers, all but one or all of them folded: [CLS] alone goes on
  through them, reading the other tokens' states above the one full layer, or at the tap. The loss adds
  {settings["cls_weight"]:g} times the squared distance to the teacher's [CLS] state.

## What is served

*Served* is the dev score of the real Triton's answers, for the best seed of what was selected; *offline* is what
training had computed for that branch.

{_table(["task", "in the paper's way: layers", "selected", "served", "offline", "more folded: layers", "selected", "served", "offline"], [_served(task, mixed, folded) for task in content["tasks"]])}

All metrics of the plan in the paper's way, as served:

{_table(["task", "metric", "full", "served"], _metrics(content["tasks"]))}

## Score against cost

Each row is the best plan of its size, counted with folding; the plots and [`glue.json`](glue.json) have every plan that
no other beats in mean score and cost. Milliseconds are medians of one process on the CPU at
hand, there to be compared with one another.

In the paper's way:

![Mean dev score against layers executed, layers with folding, and milliseconds per text](glue-mixed.png)

{_front(mixed, mean, whole)}

With more layers folded:

![The same, with more layers folded](glue-folded.png)

{_front(folded, mean, whole)}

## How far this can be trusted

* Rows of train and dev are samples where the table says fewer than the task has; the same sample in every training.
* The epoch that is kept, the tap, the layers and the deployed seed are chosen on the same dev split that is reported;
  for the yardstick only the epoch is. That favours what is selected by about the noise of dev.
* Dev is not the hidden test of the GLUE benchmark.{_caveats(content)}
"""


def _outcome(name: str, plan: dict[str, Any], mean: dict[str, Any]) -> str:
    chosen = plan["plan"]
    return (
        f"| {name} | {chosen['score']:.2f} | {mean['full']:.2f} | {plan['retention']:.1%} | "
        f"{chosen['layers_fraction']:.1%} | {chosen['folded_fraction']:.1%} |"
    )


def _ways(name: str, task: dict[str, Any]) -> list[str]:
    ways = [
        f"{_score(task[way], task[f'{way}_sd'])} ({task[f'{way}_tap']})" if task[way] is not None else "–"
        for way in WAYS
    ]
    full = _score(task["full"], task["full_sd"])
    return [name, task["metric"], f"{task['train_rows']:,}", f"{task['dev_rows']:,}", full, *ways]


def _served(name: str, *plans: dict[str, Any]) -> list[str]:
    cells = [name]
    for plan in plans:
        task = plan["tasks"][name]
        shape = f"tap {task['tap']} + {task['layers']}"
        if task["folded"] > 1:
            shape += f", {task['folded']} folded"
        cells += [
            shape, _score(task["selected"], task["selected_sd"]), f"{task['served']:.2f}",
            f"{task['served_offline']:.2f}",
        ]  # fmt: skip
    return cells


def _metrics(tasks: dict[str, Any]) -> list[list[str]]:
    return [
        [name, metric, f"{task['full_metrics'][metric]:.2f}", f"{value:.2f}"]
        for name, task in tasks.items()
        for metric, value in task["served_metrics"].items()
    ]


def _front(plan: dict[str, Any], mean: dict[str, Any], whole: int) -> str:
    best = {int(point["folded_layers"]): point for point in plan["front"]}  # the front goes up: the last is the best
    points = {json.dumps(point): point for point in (*best.values(), plan["plan"])}
    rows = [
        [
            "selected" if point == plan["plan"] else "", f"{point['score']:.2f}", f"{point['score'] / mean['full']:.1%}",
            str(point["layers"]), f"{point['layers'] / whole:.1%}", f"{point['folded_layers']:.1f}",
            f"{point['folded_layers'] / whole:.1%}", f"{point['ms_per_text']:.2f}",
        ]
        for point in sorted(points.values(), key=lambda point: (point["score"], point["layers"]))
    ]  # fmt: skip
    head = ["", "mean score", "of full", "layers", "of all", "with folding", "of all", "ms per text"]
    return _table(head, rows)


def _lifted(tasks: dict[str, Any]) -> list[str]:
    """Say which tasks are above full fine-tuning: a mean over tasks hides that the others are below."""
    above = [name for name, task in tasks.items() if task["selected"] > task["full"]]
    rest = [task for name, task in tasks.items() if name not in above]
    if not above or not rest:
        return []
    retention = sum(task["selected"] for task in rest) / sum(task["full"] for task in rest)
    return [
        f"In the paper's way {', '.join(above)} are above full fine-tuning; the other {len(rest)} tasks by themselves keep "
        f"{retention:.1%} of it."
    ]


def _caveats(content: dict[str, Any]) -> str:
    lines = [
        "Full fine-tuning has the learning rate and the batches of the branches; nothing was tuned for either of them.",
        *_lifted(content["tasks"]),
    ]
    for step in content["stopped"]:
        lines.append(f"Stopped early, since its loss was not finite: {step}.")
    if "minilm" in content["base"]["name"].lower():
        lines.append(
            "The packaged MiniLM was made for sentence similarity, from pairs that include Quora questions and natural "
            "language inference: QQP and MNLI are not new to it, neither here nor in full fine-tuning."
        )
    for task, rows in content["other_dev"].items():
        lines.append(
            f"The dev split of {task} has {rows:,} rows, GLUE's own {DEV_ROWS[task]:,}: it is another one, not to be "
            "compared with published scores."
        )
    return "".join(f"\n* {line}" for line in lines)


def _score(value: float, spread: float | None) -> str:
    return f"{value:.1f}" if spread is None else f"{value:.1f} ± {spread:.1f}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)

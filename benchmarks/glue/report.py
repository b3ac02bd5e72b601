"""What GLUE gave: `glue.json`, and `glue.md` with plots made from it, so that both have the same numbers."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from espalier.branch import BranchCard
from espalier.costs import Costs
from espalier.encoder import Base
from espalier.files import write_whole
from training.front import plot_front
from training.full import FullCard
from training.glue import TASKS, Settings, Step
from training.plots import INK, new_figure, write_figure
from training.selection import Candidate, Selection, front, summary

PAPER = {"selected": 82.5, "full": 82.8, "overhead_layers": 0.343}
"""GLUE averages of the paper (Wei, Qi, He, ACL 2022), taken from a reader's notes on its full text."""


DEV_ROWS = {
    "cola": 1043, "sst2": 872, "mrpc": 408, "stsb": 1500, "qqp": 40430, "mnli": 9815, "qnli": 5463, "rte": 277,
}  # fmt: skip
"""Rows of GLUE's dev splits (matched, for MNLI)."""


@dataclass(frozen=True)
class Results:
    """All that a run gave."""

    base: Base
    settings: Settings
    rows: Mapping[str, tuple[int, int]]  # of train and dev, by task, as used
    dev_rows: Mapping[str, int]  # by task, before the sample was taken
    cards: Mapping[Step, FullCard | BranchCard]
    candidates: list[Candidate]
    chosen: Selection
    threshold: float
    costs: Costs
    served: Mapping[str, Mapping[str, float]]  # dev metrics of the server's answers


def write_report(folder: Path, results: Results) -> None:
    """Write `glue.json`, `glue.md` and the plots to `folder`."""
    content = numbers(results)
    plans = front(results.candidates)
    write_whole(folder / "glue.json", json.dumps(content, indent=2) + "\n")
    full = content["mean"]["full"]
    plot_front(folder / "glue-front.png", plans, results.chosen, results.costs, content["base"]["layers"], full)
    plot_tasks(folder / "glue-tasks.png", content)
    write_whole(folder / "glue.md", markdown(content))


def numbers(results: Results) -> dict[str, Any]:
    """Return everything that is reported, as plain values. Scores are in points: 100 × the metric."""
    depth = results.base.config.num_hidden_layers
    tasks = {task: _task(task, results) for task in TASKS}
    chosen = results.chosen
    full = fmean(task["full"] for task in tasks.values())
    arguments = results.settings.arguments
    return {
        "tasks": tasks,
        "mean": {
            "full": full,
            **{key: fmean(task[key] for task in tasks.values()) for key in ("partial", "selected", "served")},
            "retention": chosen.score / full,
            "overhead_layers": chosen.layers / (depth * len(tasks)),
            "overhead_folded": chosen.folded_layers(results.costs) / (depth * len(tasks)),
        },
        "base": {"name": results.base.name, "revision": results.base.revision, "layers": depth},
        "settings": {
            "seeds": results.settings.seeds,
            "epochs": arguments.epochs,
            "learning_rate": arguments.learning_rate,
            "batch_size": arguments.batch_size,
            "taps": list(results.settings.taps),
            "threshold": results.threshold,
        },
        **summary(chosen, front(results.candidates), results.costs, depth),
        "other_dev": {task: rows for task, rows in results.dev_rows.items() if rows != DEV_ROWS[task]},
        "paper": PAPER,
    }


def _task(task: str, results: Results) -> dict[str, Any]:
    whole = {step.seed: card for step, card in results.cards.items() if step.task == task and step.tap is None}
    full = [100 * card.score for card in whole.values()]
    own = [candidate for candidate in results.candidates if candidate.task == task]
    (chosen,) = (candidate for candidate in results.chosen.chosen if candidate.task == task)
    deployed = next(card for step, card in results.cards.items() if step.out == chosen.best)
    ways = {"partial": [c for c in own if not c.distilled]}
    for layers in (1, 2, 3):
        ways[f"kd{layers}"] = [c for c in own if c.distilled and c.layers == layers]
    found: dict[str, Any] = {
        "metric": chosen.metric,
        "train_rows": results.rows[task][0],
        "dev_rows": results.rows[task][1],
        "full": fmean(full),
        "full_sd": stdev(full) if len(full) > 1 else None,
    }
    for name, options in ways.items():
        best = max(options, key=lambda c: c.score, default=None)
        found[name] = best.score if best else None
        found[f"{name}_sd"] = best.spread if best else None
        found[f"{name}_tap"] = best.tap if best else None
    found |= {
        "selected": chosen.score,
        "selected_sd": chosen.spread,
        "tap": chosen.tap,
        "layers": chosen.layers,
        "distilled": chosen.distilled,
        "served": 100 * results.served[task][chosen.metric],
        "served_offline": 100 * deployed.score,
        "served_metrics": {name: 100 * value for name, value in results.served[task].items()},
        "full_metrics": {name: 100 * fmean(card.metrics[name] for card in whole.values()) for name in deployed.metrics},
    }
    return found


def plot_tasks(path: Path, content: dict[str, Any]) -> None:
    """Draw the dev score of each way by task, less that of full fine-tuning, with standard deviations."""
    ways = {
        "partial": "partial",
        "kd3": "distilled to 3",
        "kd2": "distilled to 2",
        "kd1": "distilled to 1",
        "selected": "selected",
    }
    figure, axes = new_figure(10, 4.2, "", "dev score less full fine-tuning (points)")
    for index, (key, label) in enumerate(ways.items()):
        places, heights, errors = [], [], []
        for place, task in enumerate(content["tasks"].values()):
            if task[key] is not None:
                places.append(place + (index - 2) * 0.15)
                heights.append(task[key] - task["full"])
                errors.append(task[f"{key}_sd"] or 0.0)
        marker = "*" if key == "selected" else "o"
        color = INK if key == "selected" else f"C{index}"
        axes.errorbar(places, heights, errors, fmt=marker, color=color, capsize=2, markersize=8, label=label)
    axes.axhline(0, color=INK, linestyle="--", linewidth=1)
    axes.set_xticks(range(len(content["tasks"])), list(content["tasks"]))
    axes.legend(ncols=5, loc="upper center", bbox_to_anchor=(0.5, 1.13), frameon=False)
    write_figure(figure, path)


def markdown(content: dict[str, Any]) -> str:
    """Return the report."""
    mean, paper, settings, base = (content[key] for key in ("mean", "paper", "settings", "base"))
    plan = content["plan"]
    whole = base["layers"] * len(content["tasks"])
    seeds = f"{settings['seeds']} seeds" if settings["seeds"] > 1 else "one seed, so no spread is known"
    return f"""# GLUE: eight tasks on one frozen trunk

Made by `make glue`; the same numbers are in [`glue.json`](glue.json). Scores are in points (100 × the metric) on dev,
± the standard deviation over seeds. Base: `{base["name"]}` with {base["layers"]} layers. {settings["epochs"]} epochs, learning rate
{settings["learning_rate"]:g}, batches of {settings["batch_size"]}, {seeds}.

| | selected | full fine-tuning | retention | layers executed | counted with folding |
|---|---|---|---|---|---|
| the paper (BERT-base, all of GLUE) | {paper["selected"]} | {paper["full"]} | {paper["selected"] / paper["full"]:.1%} | {paper["overhead_layers"]:.1%} | – |
| here | {mean["selected"]:.2f} | {mean["full"]:.2f} | {mean["retention"]:.1%} | {mean["overhead_layers"]:.1%} | {mean["overhead_folded"]:.1%} |

The two rows are not comparable but for their ratios: another base, other sizes of train and dev. Selected is a plan of
{plan["layers"]} layers executed where a whole model per task executes {whole}; a folded layer was measured to cost
{content["folded_layer"]:.2f} of a full one. `espalier select` chose it with a threshold of {settings["threshold"]:g} points a layer.

![Score of each way by task, less full fine-tuning](glue-tasks.png)

{_task_table(content)}

*Full*: every layer and the embeddings trained, a model per task. *Partial*: the best of the taps {_list(settings["taps"])}, all layers
above the tap trained. *Distilled*: from the partial one of the same tap, the best of the taps. *Selected* and its tap +
layers: what is deployed; *served* is the dev score of the real Triton's answers for the best of its seeds, *offline*
what training had computed for that branch.

{_metric_table(content)}

## Score against cost

![Mean dev score against layers executed, layers with folding, and milliseconds per text](glue-front.png)

{_front_table(content, whole)}

Each row is a plan that no other beats in both mean score and layers executed. Milliseconds are medians of one process
on the CPU at hand; they are there to be compared with one another.

## How far this can be trusted

* Rows of train and dev are samples where the table says fewer than the task has; the same sample in every training.
* The epoch that is kept, the tap, the layers and the deployed seed are chosen on the same dev split that is reported, for
  the yardstick only the epoch is. That favours what is selected by about the noise of dev.
* Dev is not the hidden test of the GLUE benchmark.{_caveats(content)}
"""


def _caveats(content: dict[str, Any]) -> str:
    lines = []
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


def _list(values: list[int]) -> str:
    return ", ".join(map(str, values))


def _score(value: float | None, spread: float | None = None) -> str:
    if value is None:
        return "–"
    return f"{value:.1f}" if spread is None else f"{value:.1f} ± {spread:.1f}"


def _task_table(content: dict[str, Any]) -> str:
    lines = [
        "| task | metric | train | dev | full | partial (tap) | to 3 | to 2 | to 1 | selected | tap + layers | served | offline |",
        "|---" * 13 + "|",
    ]
    for name, task in content["tasks"].items():
        partial = f"{_score(task['partial'], task['partial_sd'])} ({task['partial_tap']})"
        ways = [
            f"{_score(task[way], task[f'{way}_sd'])} ({task[f'{way}_tap']})" if task[way] is not None else "–"
            for way in ("kd3", "kd2", "kd1")
        ]
        cells = [
            name, task["metric"], f"{task['train_rows']:,}", f"{task['dev_rows']:,}",
            _score(task["full"], task["full_sd"]), partial, *ways, _score(task["selected"], task["selected_sd"]),
            f"{task['tap']} + {task['layers']}", f"{task['served']:.2f}", f"{task['served_offline']:.2f}",
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _metric_table(content: dict[str, Any]) -> str:
    lines = ["| task | metric | full | served |", "|---|---|---|---|"]
    for name, task in content["tasks"].items():
        for metric, value in task["served_metrics"].items():
            lines.append(f"| {name} | {metric} | {task['full_metrics'][metric]:.2f} | {value:.2f} |")
    return "\n".join(lines)


def _front_table(content: dict[str, Any], whole: int) -> str:
    lines = ["| | mean score | of full | layers | of all | with folding | of all | ms per text |", "|---" * 8 + "|"]
    plans = {json.dumps(plan): plan for plan in (*content["front"], content["plan"])}
    for plan in sorted(plans.values(), key=lambda plan: (plan["layers"], plan["score"])):
        mark = "selected" if plan == content["plan"] else ""
        lines.append(
            f"| {mark} | {plan['score']:.2f} | {plan['score'] / content['mean']['full']:.1%} | {plan['layers']} | "
            f"{plan['layers'] / whole:.1%} | {plan['folded_layers']:.1f} | {plan['folded_layers'] / whole:.1%} | "
            f"{plan['ms_per_text']:.2f} |"
        )
    return "\n".join(lines)

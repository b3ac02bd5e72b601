"""What GLUE gave: `glue.json`, and `glue.md` with plots made from it, so that both have the same numbers."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from benchmarks.glue.text import DEV_ROWS, WAYS, markdown
from espalier.branch import BranchCard
from espalier.costs import Costs
from espalier.encoder import Base
from espalier.files import write_whole
from training.front import plot_front
from training.full import FullCard
from training.glue import TASKS, Settings, Step
from training.plots import INK, new_figure, write_figure
from training.selection import Candidate, Selection, summary

PAPER = {"selected": 82.5, "full": 82.8, "overhead_layers": 0.343}
"""GLUE averages of the paper (Wei, Qi, He, ACL 2022): mixed, full fine-tuning, and mixed's part of the layers."""


@dataclass(frozen=True)
class Plan:
    """A selected plan, the plans that no other beats, and what the server answered."""

    chosen: Selection
    front: list[Selection]
    served: Mapping[str, Mapping[str, float]]  # dev metrics by task

    def of(self, task: str) -> Candidate:
        """Return what was chosen for `task`."""
        return next(candidate for candidate in self.chosen.chosen if candidate.task == task)


@dataclass(frozen=True)
class Results:
    """All that a run gave."""

    base: Base
    settings: Settings
    rows: Mapping[str, tuple[int, int]]  # of train and dev, by task, as used
    dev_rows: Mapping[str, int]  # by task, before the sample was taken
    cards: Mapping[Step, FullCard | BranchCard]
    candidates: list[Candidate]
    plans: Mapping[str, Plan]  # "mixed", the paper's; "folded"
    threshold: float
    costs: Costs


def write_report(folder: Path, results: Results) -> None:
    """Write `glue.json`, `glue.md` and the plots to `folder`."""
    content = numbers(results)
    write_whole(folder / "glue.json", json.dumps(content, indent=2) + "\n")
    depth, full = content["base"]["layers"], content["mean"]["full"]
    for name, plan in results.plans.items():
        plot_front(folder / f"glue-{name}.png", plan.front, plan.chosen, results.costs, depth, full)
    plot_tasks(folder / "glue-tasks.png", content)
    write_whole(folder / "glue.md", markdown(content))


def numbers(results: Results) -> dict[str, Any]:
    """Return everything that is reported, as plain values. Scores are in points: 100 × the metric."""
    depth = results.base.config.num_hidden_layers
    ways: dict[str, dict[str, Any]] = {task: _ways(task, results) for task in TASKS}
    full = fmean(task["full"] for task in ways.values())
    plans = {name: _plan(plan, results, full) for name, plan in results.plans.items()}
    mixed = plans["mixed"]
    arguments = results.settings.arguments
    return {
        "tasks": {task: {**ways[task], **mixed["tasks"][task]} for task in TASKS},
        "mean": {
            "full": full,
            "partial": fmean(task["partial"] for task in ways.values()),
            "selected": mixed["plan"]["score"],
            "served": mixed["served"],
            "retention": mixed["retention"],
            "overhead_layers": mixed["plan"]["layers_fraction"],
            "overhead_folded": mixed["plan"]["folded_fraction"],
        },
        "plans": plans,
        "base": {"name": results.base.name, "revision": results.base.revision, "layers": depth},
        "settings": {
            "seeds": results.settings.seeds,
            "epochs": arguments.epochs,
            "learning_rate": arguments.learning_rate,
            "batch_size": arguments.batch_size,
            "bf16": arguments.bf16,
            "taps": list(results.settings.taps),
            "cls_weight": results.settings.cls_weight,
            "threshold": results.threshold,
        },
        "folded_layer": results.costs.folded,
        "stopped": [step.name for step, card in results.cards.items() if card.stopped is not None],
        "other_dev": {task: rows for task, rows in results.dev_rows.items() if rows != DEV_ROWS[task]},
        "paper": PAPER,
    }


def _plan(plan: Plan, results: Results, full: float) -> dict[str, Any]:
    tasks: dict[str, dict[str, Any]] = {}
    for task in TASKS:
        chosen = plan.of(task)
        deployed = next(card for step, card in results.cards.items() if step.out == chosen.best)
        tasks[task] = {
            "selected": chosen.score,
            "selected_sd": chosen.spread,
            "tap": chosen.tap,
            "layers": chosen.layers,
            "folded": chosen.folded,
            "distilled": chosen.distilled,
            "served": 100 * plan.served[task][chosen.metric],
            "served_offline": 100 * deployed.score,
            "served_metrics": {name: 100 * value for name, value in plan.served[task].items()},
        }
    return {
        **summary(plan.chosen, plan.front, results.costs, results.base.config.num_hidden_layers),
        "retention": plan.chosen.score / full,
        "served": fmean(task["served"] for task in tasks.values()),
        "tasks": tasks,
    }


def _ways(task: str, results: Results) -> dict[str, Any]:
    whole = {step.seed: card for step, card in results.cards.items() if step.task == task and step.tap is None}
    full = [100 * card.score for card in whole.values()]
    own = [candidate for candidate in results.candidates if candidate.task == task]
    ways = {"partial": [c for c in own if not c.distilled]}
    for layers in (1, 2, 3):
        ways[f"kd{layers}"] = [c for c in own if c.distilled and c.layers == layers and c.folded <= 1]
    for count in (0, 1):
        ways[f"folded_above_{count}"] = [c for c in own if c.folded > 1 and c.layers - c.folded == count]
    metrics = next(iter(whole.values())).metrics
    found: dict[str, Any] = {
        "metric": own[0].metric,
        "train_rows": results.rows[task][0],
        "dev_rows": results.rows[task][1],
        "full": fmean(full),
        "full_sd": stdev(full) if len(full) > 1 else None,
        "full_metrics": {name: 100 * fmean(card.metrics[name] for card in whole.values()) for name in metrics},
    }
    for name, options in ways.items():
        best = max(options, key=lambda c: c.score, default=None)
        found[name] = best.score if best else None
        found[f"{name}_sd"] = best.spread if best else None
        found[f"{name}_tap"] = best.tap if best else None
    return found


def plot_tasks(path: Path, content: dict[str, Any]) -> None:
    """Draw the dev score of each way by task, less that of full fine-tuning, with standard deviations."""
    ways = {**WAYS, "selected": "selected"}
    figure, axes = new_figure(10, 4.2, "", "dev score less full fine-tuning (points)")
    for index, (key, label) in enumerate(ways.items()):
        places, heights, errors = [], [], []
        for place, task in enumerate(content["tasks"].values()):
            if task[key] is not None:
                places.append(place + (index - (len(ways) - 1) / 2) * 0.12)
                heights.append(task[key] - task["full"])
                errors.append(task[f"{key}_sd"] or 0.0)
        marker = "*" if key == "selected" else "o"
        color = INK if key == "selected" else f"C{index}"
        axes.errorbar(places, heights, errors, fmt=marker, color=color, capsize=2, markersize=8, label=label)
    axes.axhline(0, color=INK, linestyle="--", linewidth=1)
    axes.set_xticks(range(len(content["tasks"])), list(content["tasks"]))
    axes.legend(ncols=len(ways), loc="upper center", bbox_to_anchor=(0.5, 1.13), frameon=False)
    write_figure(figure, path)

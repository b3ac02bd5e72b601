"""The front of selection as a plot: mean dev score against cost, in three measures of cost."""

from collections.abc import Callable, Sequence
from pathlib import Path

from espalier.costs import Costs
from training.plots import GRID, INK, new_row, write_figure
from training.selection import Selection


def plot_front(
    path: Path, plans: Sequence[Selection], chosen: Selection, costs: Costs, depth: int, full: float | None = None
) -> None:
    """Draw `plans` and the one that was `chosen` into the PNG at `path`.

    `depth` is the number of layers of the base, `full` the mean score of full fine-tuning in points, drawn as a line.
    """
    whole = depth * len(chosen.chosen)
    measures: list[tuple[str, Callable[[Selection], float]]] = [
        (f"layers executed (whole models: {whole})", lambda plan: plan.layers),
        (f"layers, a folded one as {costs.folded:.2f}", lambda plan: plan.folded_layers(costs)),
        (f"ms per text (batch {costs.batch}, {costs.mean_length:.0f} tokens)", lambda plan: plan.milliseconds(costs)),
    ]
    figure, row = new_row(12, 4, [label for label, _ in measures], "mean dev score (points)")
    for axes, (_, cost) in zip(row, measures, strict=True):
        axes.plot([cost(p) for p in plans], [p.score for p in plans], color=GRID, zorder=1)
        for tap in sorted({plan.tap for plan in plans}):
            at = [plan for plan in plans if plan.tap == tap]
            axes.plot([cost(p) for p in at], [p.score for p in at], "o", markersize=5, label=f"trunk of {tap} layers")
        axes.plot(cost(chosen), chosen.score, "*", color=INK, markersize=14, label="chosen", zorder=3)
        if full is not None:
            axes.axhline(full, color=INK, linestyle="--", linewidth=1, label="full fine-tuning")
        axes.set_xlim(0, 1.05 * max(cost(plan) for plan in (*plans, chosen)))
    row[0].legend(loc="lower right", frameon=False)
    write_figure(figure, path)

"""Plots as PNG files. Only matplotlib's objects are used: no backend, style or figure of the process is touched."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from espalier.files import write_whole

INK, GRID, FILL, LINE = "#333333", "#e3e3e3", "#cfe0f1", "#2f6fab"
DPI = 160
SPREAD = 0.36  # of the distance between two boxes


def box_plot(groups: Mapping[str, Sequence[float]], x_label: str, y_label: str, path: Path) -> None:
    """Write one box per group, in order: quartiles, median, whiskers to 1.5 times their range, and every value."""
    figure, axes = new_figure(max(3.6, 1.6 + 0.8 * len(groups)), 3.4, x_label, y_label)
    axes.boxplot(
        list(groups.values()), tick_labels=list(groups), widths=0.5, showfliers=False, patch_artist=True,
        boxprops={"facecolor": FILL, "edgecolor": LINE}, whiskerprops={"color": LINE}, capprops={"color": LINE},
        medianprops={"color": LINE, "linewidth": 2.0},
    )  # fmt: skip
    for position, values in enumerate(groups.values(), start=1):
        # Side by side, so that equal values are seen.
        places = [position + SPREAD * ((at + 0.5) / len(values) - 0.5) for at in range(len(values))]
        axes.scatter(places, values, s=14, color=INK, alpha=0.6, linewidths=0, zorder=3)
    axes.tick_params(axis="x", length=0)
    write_figure(figure, path)


def new_figure(width: float, height: float, x_label: str = "", y_label: str = "") -> tuple[Figure, Axes]:
    """Return an empty figure of `width` by `height` inches and its axes, in the style of all our plots."""
    figure, (axes,) = new_row(width, height, [x_label], y_label)
    axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    return figure, axes


def new_row(width: float, height: float, x_labels: Sequence[str], y_label: str) -> tuple[Figure, list[Axes]]:
    """Return an empty figure and axes side by side, one per label, on one scale of y."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    row: list[Axes] = list(figure.subplots(1, len(x_labels), sharey=True, squeeze=False)[0])
    for axes, label in zip(row, x_labels, strict=True):
        axes.set_xlabel(label, color=INK)
        axes.grid(axis="y", color=GRID, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.tick_params(colors=INK, labelsize=9)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(INK)
    row[0].set_ylabel(y_label, color=INK)
    return figure, row


def png(figure: Figure) -> bytes:
    """Return `figure` as PNG; equal figures give equal bytes."""
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=DPI, metadata={"Software": None})
    return content.getvalue()


def write_figure(figure: Figure, path: Path) -> None:
    """Write `figure` to `path` as PNG, whole."""
    write_whole(path, png(figure))

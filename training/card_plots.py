"""The pictures of a branch card, as PNG."""

from collections.abc import Mapping, Sequence
from functools import lru_cache

import numpy as np
import numpy.typing as npt
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.ticker import MaxNLocator

from training.plots import new_figure, png

MOST_LABELS = 20
"""Labels that a confusion matrix shows legibly."""
MOST_BARS = 40

LONGEST_NAME = 24  # characters
COLOUR, ACCENT = "#2a6f97", "#c1440e"


def by_epoch(history: Sequence[dict[str, float]], metric: str, kept: float) -> bytes:
    """Plot the dev metrics by epoch, `metric` strongest; the epoch `kept` is marked."""
    figure, axes = new_figure(6.4, 3.6)
    epochs = [entry["epoch"] for entry in history]
    others = [name for name in history[0] if name not in ("epoch", "loss", metric)]
    for name in others:
        axes.plot(epochs, [entry[name] for entry in history], marker=".", linewidth=1, alpha=0.6, label=name)
    values = [entry[metric] for entry in history]
    axes.plot(epochs, values, marker="o", linewidth=2.4, color=COLOUR, label=metric)
    best = values[epochs.index(kept)]
    axes.plot([kept], [best], "o", markersize=12, fillstyle="none", color=ACCENT, label="kept")
    axes.set(xlabel="epoch", ylabel="dev metric")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    return png(figure)


def lengths(tokens: Mapping[str, Sequence[int]], limit: int) -> bytes:
    """Plot a histogram of text lengths by split, in tokens; `limit` is where texts are cut."""
    figure, axes = new_figure(6.4, 3.0)
    longest = max(max(counts) for counts in tokens.values())
    width = longest // MOST_BARS + 1
    bins = list(range(0, longest + width + 1, width))
    for (split, counts), colour in zip(tokens.items(), (COLOUR, ACCENT), strict=True):
        shares = np.full(len(counts), 1 / len(counts))
        axes.hist(counts, bins=bins, weights=shares, histtype="step", linewidth=1.6, color=colour, label=split)
    if longest > limit:
        axes.axvline(limit, color="black", linestyle="--", linewidth=1, label=f"cut at {limit}")
    axes.set(xlabel="tokens in a text", ylabel="share of the split")
    axes.legend(frameon=False)
    return png(figure)


def confusion(matrix: npt.NDArray[np.int64], labels: Sequence[str]) -> bytes:
    """Plot a confusion matrix, rows gold, columns answers; of many labels the most confused ones alone."""
    shown = most_confused(matrix)
    part = matrix[np.ix_(shown, shown)]
    totals = matrix.sum(1)[shown, None]
    shares = np.divide(part, totals, out=np.zeros(part.shape), where=totals > 0)
    size = 2.2 + 0.42 * len(shown)
    figure, axes = new_figure(size + 1.2, size)
    axes.grid(visible=False)
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for row, column in np.ndindex(*part.shape):
        if part[row, column]:
            colour = "white" if shares[row, column] > 0.5 else "black"
            axes.text(column, row, str(part[row, column]), ha="center", va="center", color=colour, fontsize=8)
    names = [_name(labels[i], i) for i in shown]
    axes.set_xticks(range(len(shown)), names, rotation=45, ha="right", rotation_mode="anchor", parse_math=False)
    axes.set_yticks(range(len(shown)), names, parse_math=False)
    axes.set(xlabel="answer", ylabel="gold")
    figure.colorbar(image, ax=axes, shrink=0.8, label="share of the gold label")
    return png(figure)


def most_confused(matrix: npt.NDArray[np.int64]) -> list[int]:
    """Return the indices, in order, of the labels to show: all, or those in most of the confusions."""
    wrong = matrix - np.diag(np.diag(matrix))
    ranked = np.argsort(-(wrong.sum(0) + wrong.sum(1)), kind="stable")
    return sorted(int(index) for index in ranked[:MOST_LABELS])


def scatter(gold: Sequence[float], answers: Sequence[float]) -> bytes:
    """Plot gold values against answers."""
    figure, axes = new_figure(5.2, 5.0)
    ends = [min(*gold, *answers), max(*gold, *answers)]
    axes.plot(ends, ends, color="black", linestyle="--", linewidth=1, label="answer = gold")
    axes.scatter(gold, answers, s=14, alpha=0.45, color=COLOUR, linewidths=0)
    axes.set(xlabel="gold", ylabel="answer")
    axes.set_aspect("equal", adjustable="datalim")
    axes.legend(frameon=False)
    return png(figure)


def slot_scores(names: Sequence[str], scores: Sequence[float], spans: Sequence[int]) -> bytes:
    """Plot F1 by slot type, with the number of gold spans; of many types the most frequent ones alone."""
    order = sorted(range(len(names)), key=lambda i: -spans[i])[:MOST_BARS]
    figure, axes = new_figure(6.4, 1.2 + 0.24 * len(order))
    places = range(len(order))
    axes.barh(places, [scores[i] for i in order], color=COLOUR)
    axes.set_yticks(places, [_name(names[i], i) for i in order], fontsize=8, parse_math=False)
    axes.invert_yaxis()
    for place, i in zip(places, order, strict=True):
        axes.text(1.02, place, str(spans[i]), va="center", fontsize=8)
    axes.text(1.02, -1, "spans", va="center", fontsize=8)
    axes.set(xlim=(0, 1), xlabel="F1 on dev")
    axes.set_ylim(len(order) - 0.4, -0.6)
    axes.grid(visible=False, axis="y")
    return png(figure)


def _name(label: str, index: int) -> str:
    """Return a label as a plot can show it; one that the font cannot draw by its number in the card's table."""
    line = " ".join(label.split())
    if not all(ord(character) in _drawable() for character in line):
        return f"no. {index + 1}"
    return line if len(line) <= LONGEST_NAME else line[: LONGEST_NAME - 1] + "…"


@lru_cache(maxsize=1)
def _drawable() -> frozenset[int]:
    return frozenset(get_font(findfont(FontProperties())).get_charmap())

"""Measurements of speed. Each is one command, measures both sides in one run, and quotes ratios of medians."""

import sys
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import typer

from espalier import show
from espalier.errors import EspalierError


def summary(values: Sequence[float], digits: int) -> dict[str, Any]:
    """Return median and range of what was measured several times, rounded, as the reports keep them."""
    return {"median": round(median(values), digits), "range": [round(end(values), digits) for end in (min, max)]}


def run(main: Callable[..., Any]) -> None:
    """Run `main` as a command; an error of ours is one sentence and exit status 1, as in the command line itself."""
    try:
        typer.run(main)
    except EspalierError as error:
        show.error(str(error))
        sys.exit(1)

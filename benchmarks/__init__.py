"""Measurements of speed. Each is one command, measures both sides in one run, and quotes ratios of medians."""

import sys
from collections.abc import Callable
from typing import Any

import typer

from espalier import show
from espalier.errors import EspalierError


def run(main: Callable[..., Any]) -> None:
    """Run `main` as a command; an error of ours is one sentence and exit status 1, as in the command line itself."""
    try:
        typer.run(main)
    except EspalierError as error:
        show.error(str(error))
        sys.exit(1)

"""The stages of a long measurement: what is finished is kept, so that the same command goes on where it was stopped."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from espalier.files import write_whole


class Stages:
    """Results of stages by name, kept in `file` as long as the `conditions` are the same."""

    def __init__(self, file: Path, conditions: str) -> None:
        self._file = file
        self._kept: dict[str, Any] = {"conditions": conditions, "stages": {}}
        try:
            old = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return
        if isinstance(old, dict) and old.get("conditions") == conditions:
            self._kept = old

    def get(self, name: str, measure: Callable[[], Any]) -> Any:
        """Return what `measure` returns, or what it returned before; it must be what JSON can hold."""
        stages = self._kept["stages"]
        if name not in stages:
            stages[name] = measure()
            write_whole(self._file, json.dumps(self._kept, indent=2) + "\n")
        return stages[name]

    def finish(self) -> None:
        """Forget what is kept: the next run measures anew."""
        self._file.unlink(missing_ok=True)

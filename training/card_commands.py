"""The command lines that make a branch again, for its card: those of its teachers first."""

import os
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from espalier.branch import BranchCard, read_card
from espalier.encoder import LOCAL
from espalier.errors import BranchError
from espalier.spec import TaskSpec, dump_spec

OPTIONS = {"learning_rate": "--lr"}
"""Options whose names are not those of the training arguments."""


@dataclass(frozen=True)
class Recipe:
    """How to make a branch again, from within the folder of its card."""

    commands: tuple[str, ...]  # the oldest teacher's first
    specs: dict[str, str]  # the spec files that the commands read, by name
    missing: str | None  # one sentence, if a teacher is not where it was


def recipe(path: Path, card: BranchCard, home: Path, spec: TaskSpec, base: str | None) -> Recipe:
    """Return how to make the branch at `path` again from within the folder `home`.

    `spec` is the branch's own, with its data where they are now; `base` is where its base is now, if it moved.
    """
    lineage, missing = _lineage(path.resolve(), card)
    specs = [spec]  # the branch's own comes first and is task.yaml
    commands = []
    for place, made in lineage:
        own = spec if made.spec == card.spec else made.spec
        if own not in specs:
            specs.append(own)
        commands.append(_command(place, made, home, _spec_file(specs.index(own)), base))
    files = {_spec_file(number): dump_spec(each, home) for number, each in enumerate(specs)}
    return Recipe(tuple(commands), files, missing)


def is_spec_file(name: str) -> bool:
    """Tell whether a card's folder may hold a file of this name as one of its specs."""
    number = name.removeprefix("task-").removesuffix(".yaml")
    return name == _spec_file(0) or (number.isdigit() and name == _spec_file(int(number) - 1))


def _spec_file(number: int) -> str:
    return "task.yaml" if number == 0 else f"task-{number + 1}.yaml"


def _lineage(path: Path, card: BranchCard) -> tuple[list[tuple[Path, BranchCard]], str | None]:
    """Return the branch and the teachers before it, oldest first, and what is wrong if one is not there."""
    lineage = [(path, card)]
    while (teacher := lineage[0][1].teacher) is not None:
        name = os.path.relpath(teacher.folder, path.parent)
        try:
            found = read_card(teacher.folder)
        except BranchError:
            return lineage, f"Its teacher is no longer at {name}, so there is no command here that makes the teacher."
        if found.digest != teacher.digest:
            return lineage, f"The branch at {name} is not the teacher any more; it was made again in another way."
        lineage.insert(0, (teacher.folder, found))
    return lineage, None


def _command(path: Path, card: BranchCard, home: Path, spec_file: str, base: str | None) -> str:
    name = base or card.base
    if Path(name).is_dir():
        name = _from(home, Path(name))
    settings: dict[str, Any] = {**card.arguments, "cache": card.cached, "out": _from(home, path)}
    if card.teacher is None:
        revision = None if base or card.revision == LOCAL else card.revision
        where = {"base": name, "revision": revision, "tap": card.tap, "layers": card.layers, "folded": card.folded}
        words = ["espalier train", spec_file, *_options({**where, **settings})]
    else:
        start = {
            "spec": spec_file, "base": name if base else None, "layers": card.layers, "folded": card.folded,
            "init": card.teacher.init, "cls_weight": card.teacher.cls_weight or None,
        }  # fmt: skip
        teacher = shlex.quote(_from(home, card.teacher.folder))
        words = ["espalier distill", teacher, *_options({**start, **settings})]
    return " ".join(words)


def _from(home: Path, path: Path) -> str:
    return os.path.relpath(path.resolve(), home)


def _options(values: dict[str, Any]) -> list[str]:
    """Return `values` as options; what is None or False is what the command does without."""
    options = []
    for name, value in values.items():
        option = OPTIONS.get(name, f"--{name.replace('_', '-')}")
        if value is True:
            options.append(option)
        elif value is not None and value is not False:
            options.append(f"{option} {shlex.quote(str(value))}")
    return options

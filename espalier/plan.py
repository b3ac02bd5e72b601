"""The plan: a YAML file that names one branch per task for a repository. Selection writes it, a person may edit it.

tasks:
  cola:
    branch: cola/tap3-kd2-s0   # relative to the plan
    tap: 3
    layers: 2
    folded: 1
"""

import os
from collections.abc import Mapping
from pathlib import Path

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from espalier.errors import SpecError, first_problem
from espalier.files import digest, write_whole
from espalier.spec import read_yaml

_SEAL = "# not edited while this fits: "


class PlannedTask(BaseModel):
    """The branch of one task. Its shape is there to be read; it must be the branch's own."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    branch: Path
    tap: int
    layers: int
    folded: int  # of the layers


class Plan(BaseModel):
    """One branch per task."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    tasks: dict[str, PlannedTask] = Field(min_length=1)


def write_plan(path: Path, plan: Plan, notes: Mapping[str, str], header: str) -> None:
    """Write `plan`, its branches relative to its own folder, with a note beside each task.

    A plan that was written so takes the place of another one, but not of one that a person has edited since, nor of
    any other file: that raises SpecError.
    """
    home = path.resolve().parent
    lines = [f"# {line}".rstrip() for line in header.splitlines()]
    lines.append("tasks:")
    for task, planned in plan.tasks.items():
        branch = os.path.relpath(planned.branch.resolve(), home)
        lines.append(f"  {task}:  # {notes[task]}" if task in notes else f"  {task}:")
        fields = yaml.safe_dump({**planned.model_dump(), "branch": branch}, sort_keys=False)
        lines += [f"    {field}" for field in fields.splitlines()]
    try:
        if path.exists() and not _as_written(path.read_text(encoding="utf-8")):
            raise SpecError(f"{path} was edited, or is no plan; move it away, or give another --out")
        text = "\n".join(lines) + "\n"
        write_whole(path, f"{text}{_SEAL}{digest(text)}\n")
    except OSError as error:
        raise SpecError(f"the plan cannot be written to {path}: {error.strerror or error}") from error


def _as_written(text: str) -> bool:
    content, seal, known = text.rpartition(_SEAL)
    return bool(seal) and digest(content) == known.strip()


def read_plan(path: Path) -> Plan:
    """Read a plan; its branches become absolute paths. Raises SpecError with one sentence if it is wrong."""
    try:
        plan = Plan.model_validate(read_yaml(path, "plan"))
    except ValidationError as error:
        where, what = first_problem(error)
        raise SpecError(
            f"{path}: {where or 'plan'}: {what}; a plan has tasks, each with branch, tap, layers and folded"
        ) from error
    home = path.resolve().parent
    return Plan(
        tasks={task: item.model_copy(update={"branch": home / item.branch}) for task, item in plan.tasks.items()}
    )

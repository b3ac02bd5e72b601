"""The branches that a plan names, checked against what it says of them."""

from pathlib import Path

from espalier.branch import read_card
from espalier.errors import ExportError
from espalier.plan import read_plan


def planned_branches(path: Path) -> list[Path]:
    """Return the branch folders of the plan at `path`; raise ExportError where one is not what the plan says."""
    folders = []
    for task, planned in read_plan(path).tasks.items():
        card = read_card(planned.branch)
        if card.spec.name != task:
            raise ExportError(f"{path}: task {task!r} names {planned.branch}, a branch of task {card.spec.name!r}")
        if (card.tap, card.layers) != (planned.tap, planned.layers):
            raise ExportError(
                f"{path}: task {task!r} is planned with tap {planned.tap} and {planned.layers} layers, but "
                f"{planned.branch} has tap {card.tap} and {card.layers}; name another branch, or correct the plan"
            )
        folders.append(planned.branch)
    return folders

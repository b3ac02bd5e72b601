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
        if (card.tap, card.layers, card.folded) != (planned.tap, planned.layers, planned.folded):
            raise ExportError(
                f"{path}: task {task!r} is planned with tap {planned.tap}, {planned.layers} layers, {planned.folded} "
                f"folded, but {planned.branch} has tap {card.tap}, {card.layers} layers, {card.folded} folded; name "
                "another branch, or correct the plan"
            )
        folders.append(planned.branch)
    return folders

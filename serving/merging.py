"""Which heads are merged into one model, and making it.

A step of the server costs messages, copies and a process of its own, whatever it computes: the heads of one tap in one
model cost that once. But a step computes all that it can answer: of merged heads none is left out where one is asked.
"""

from collections.abc import Iterator
from itertools import groupby

from espalier.configs import head_config
from espalier.contract import MergedInfo, merged_name
from espalier.errors import ContractError, one_line
from espalier.files import digest
from export import merge
from serving.live import Live
from serving.plan import Group, Head, Served


def groups(served: Served, live: Live) -> dict[int, list[Group]]:
    """Return by tap the groups into which the heads of `served` can be merged, each as large as a model may be.

    Candidates, which are asked only by name, stay alone; so do heads with settings of their own, or another backend.
    """

    def fits(head: Head) -> bool:
        return not head.info.candidate and head.config == head_config(head.info)

    heads = sorted(filter(fits, served.heads.values()), key=lambda head: (head.info.tap, head.info.task))
    found: dict[int, list[Group]] = {}
    for tap, own in groupby(heads, key=lambda head: head.info.tap):
        for part in _parts(own, live):
            if len(part) > 1:
                models = {head.info.task: head.model for head in part}
                name = f"{merged_name(tap)}-{digest(*models.values())[:12]}"
                group = Group(name, tap, tuple(head.info for head in part), models)
                found.setdefault(tap, []).append(group)
    return found


def _parts(heads: Iterator[Head], live: Live) -> Iterator[list[Head]]:
    """Cut the heads of a tap into lists that are not larger than an ONNX file may be."""
    part: list[Head] = []
    total = 0
    for head in heads:
        size = merge.size(live.models / head.model)
        if part and total + size > merge.LARGEST:
            yield part
            part, total = [], 0
        part.append(head)
        total += size
    yield part


def make(group: Group, live: Live) -> None:
    """Make the model of a group in the live store, if it is not there. Raises ContractError if it cannot be."""
    if live.has(group.model):
        return
    heads = [(info, live.models / group.models[info.task]) for info in group.infos]
    try:
        live.adopt(group.model, lambda to: merge.merge(group.model, heads, to))
    except (ContractError, OSError):
        raise
    except Exception as error:  # whatever the heads' files may hold, and however large they are
        raise ContractError(f"{group.model} cannot be made: {one_line(str(error) or type(error).__name__)}") from error


def read(model: str, models: dict[str, str], live: Live) -> Group | None:
    """Return the group of a merged model that holds the heads `models`, by task; None if it is not there any more."""
    if not live.has(model):
        return None
    infos = MergedInfo.read(live.config(model)).heads
    return Group(model, infos[0].tap, infos, models)

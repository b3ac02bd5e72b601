"""What is merged into one model, and making it.

A step of the server costs messages, copies and a process of its own, whatever it computes: a trunk segment and the
heads on its end in one model cost that once. But a step computes all that it can answer: of merged heads none is left
out where one is asked, nor where a request only passes them on its way to a deeper tap.
"""

from collections.abc import Iterable, Iterator, Mapping

from tritonclient.grpc import model_config_pb2 as pb

from espalier.configs import head_config, trunk_config
from espalier.contract import MergedInfo, Target, TrunkInfo, merged_name
from espalier.errors import ContractError, one_line
from espalier.files import digest
from espalier.scheduling import Scheduling
from export import merge
from serving.live import Live, Merge
from serving.plan import Group, Head, Segment, Served


def groups(served: Served, below: Segment, live: Live) -> list[Group]:
    """Return the groups into which a segment of `served` and the heads on its end can be merged, as large as may be.

    Candidates, which are asked only by name, stay alone; so do heads and segments with settings of their own, which may
    not hold for what they would be in one model with. Raises ContractError if a model is not whole.
    """

    def fits(head: Head) -> bool:
        return not head.info.candidate and head.config == head_config(head.info)

    tap = below.info.stop
    heads = [head for _, head in sorted(served.heads.items()) if head.info.tap == tap and fits(head)]
    alike = _as_exported(live.config(below.model), below.info)
    found: list[Group] = []
    for segment, part in _parts(below if alike else None, heads, live):
        if len(part) + (segment is not None) > 1:
            models = {head.info.task: head.model for head in part}
            held = [segment.model] if segment else []
            name = f"{merged_name(tap, segment.info if segment else None)}-{digest(*held, *models.values())[:12]}"
            found.append(Group(name, tap, segment, tuple(head.info for head in part), models))
    return found


def _as_exported(config: pb.ModelConfig, info: TrunkInfo) -> bool:
    """Tell whether the config of a segment has no other settings than an export gives it, however it is scheduled."""
    try:
        # Of no account on a GPU, where the config tells none.
        scheduling = Scheduling.default(1) if info.target is Target.GPU else Scheduling.read(config)
    except ContractError:
        return False
    exported = trunk_config(info, scheduling)
    exported.name = config.name
    return bool(config == exported)


def _parts(segment: Segment | None, heads: Iterable[Head], live: Live) -> Iterator[tuple[Segment | None, list[Head]]]:
    """Cut a segment and the heads on its end into lists that are not larger than an ONNX file may be."""
    part: list[Head] = []
    total = merge.size(live.models / segment.model) if segment else 0
    for head in heads:
        size = merge.size(live.models / head.model)
        if (part or segment) and total + size > merge.LARGEST:
            yield segment, part
            segment, part, total = None, [], 0
        part.append(head)
        total += size
    yield segment, part


def make(group: Group, live: Live) -> None:
    """Make the model of a group in the live store, if it is not there. Raises ContractError if it cannot be."""
    if live.has(group.model):
        return
    heads = [(info, live.models / group.models[info.task]) for info in group.infos]
    segment = live.models / group.segment.model if group.segment else None
    try:
        live.adopt(group.model, lambda to: merge.merge(group.model, heads, to, segment))
    except (ContractError, OSError):
        raise
    except Exception as error:  # whatever the files may hold, and however large they are
        raise ContractError(f"{group.model} cannot be made: {one_line(str(error) or type(error).__name__)}") from error


def read(model: str, held: Merge, chain: Mapping[str, Segment], live: Live) -> Group | None:
    """Return the group of a merged model that holds `held`, on a `chain` by model; None if it is not there any more.

    Raises ContractError if its segment is none of the chain.
    """
    if not live.has(model):
        return None
    if held.segment is not None and held.segment not in chain:
        raise ContractError(f"{model} was merged with {held.segment}, which is not in the trunk that was served")
    infos = MergedInfo.read(live.config(model)).heads
    return Group(model, infos[0].tap, chain[held.segment] if held.segment else None, infos, held.heads)

"""What should be served: the dropped heads that fit a trunk, on a chain of segments. No I/O.

Tasks that are served come first: a new head or another trunk never takes away what a task has, as long as the task's
folder is there.
"""

import contextlib
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace

from tritonclient.grpc import model_config_pb2 as pb

from espalier.contract import HeadInfo, TrunkInfo
from espalier.errors import ContractError
from espalier.repository import check_head

TRUNK = "trunk_*"
"""Under this name a trunk as a whole is refused; no task has it."""


@dataclass(frozen=True)
class Segment:
    """A trunk segment and the model that serves it."""

    model: str
    info: TrunkInfo


@dataclass(frozen=True)
class Head:
    """A head, the model that serves it, and what it was dropped as."""

    model: str
    info: HeadInfo  # its task is that of the folder: a candidate has its own
    config: pb.ModelConfig
    digest: str
    version: int


@dataclass(frozen=True)
class Trunk:
    """A tokenizer and the segments that there are, in any order; not each of them has a place in the chain."""

    tokenizer: str
    segments: tuple[Segment, ...]

    @property
    def models(self) -> set[str]:
        """All models that there are."""
        return {self.tokenizer, *(segment.model for segment in self.segments)}


@dataclass(frozen=True)
class Group:
    """Heads of one tap that were merged into one model, and the segment below them if it has been merged as well."""

    model: str
    tap: int
    segment: Segment | None
    infos: tuple[HeadInfo, ...]
    models: Mapping[str, str]  # that each head is by itself, by task

    def answers(self, heads: Mapping[str, Head]) -> frozenset[str]:
        """Return the tasks that it answers where `heads` are served: those whose head is still the one it holds."""
        return frozenset(task for task, own in self.models.items() if task in heads and heads[task].model == own)


@dataclass(frozen=True)
class Served:
    """What is served, or is to be."""

    tokenizer: str
    chain: tuple[Segment, ...]
    heads: Mapping[str, Head]  # by task
    groups: tuple[Group, ...] = ()

    @property
    def grouped(self) -> set[str]:
        """The tasks that groups answer."""
        return {task for group in self.groups for task in group.answers(self.heads)}

    @property
    def models(self) -> set[str]:
        """All models that it needs, the ensemble aside: what is in a group is none."""
        grouped = self.grouped
        heads = (head.model for task, head in self.heads.items() if task not in grouped)
        held = {group.segment for group in self.groups}
        segments = (segment.model for segment in self.chain if segment not in held)
        return {self.tokenizer, *segments, *(group.model for group in self.groups), *heads}

    @property
    def apart(self) -> set[str]:
        """The models that it would need if nothing was merged."""
        return self.trunk.models | {head.model for head in self.heads.values()}

    @property
    def parts(self) -> tuple[object, ...]:
        """All that Triton sees of it: equal parts are served alike."""
        chain = tuple(segment.model for segment in self.chain)
        heads = {task: head.model for task, head in self.heads.items()}
        return self.tokenizer, chain, heads, {group.model for group in self.groups}

    def only(self, tasks: Collection[str]) -> "Served":
        """Return this with no other tasks, nor segments that they do not need: Triton refuses tensors without use."""
        heads = {task: head for task, head in self.heads.items() if task in tasks}
        deepest = max((head.info.tap for head in heads.values()), default=0)
        chain = tuple(s for s in self.chain if s.info.stop <= deepest)
        return Served(self.tokenizer, chain, heads).with_groups(self.groups)

    def with_groups(self, groups: Iterable[Group]) -> "Served":
        """Return this with those of `groups` that hold a segment of it or, if they hold none, answer a task of it.

        So whatever becomes of heads, the segment below them is there, and needs not be loaded by itself.
        """

        def used(group: Group) -> bool:
            return group.segment in self.chain if group.segment else bool(group.answers(self.heads))

        return replace(self, groups=tuple(filter(used, groups)))

    @property
    def trunk(self) -> Trunk:
        """The trunk of which the chain is made."""
        return Trunk(self.tokenizer, self.chain)


def find_chain(segments: Iterable[Segment], taps: Collection[int]) -> tuple[Segment, ...] | None:
    """Return the shortest chain of segments, from layer 0 to the deepest tap, that has an end at every tap.

    All segments of a chain are of one base, precision and width. None if there is no such chain.
    """
    by_start: dict[int, list[Segment]] = {}
    for segment in segments:
        by_start.setdefault(segment.info.start, []).append(segment)
    deepest = max(taps, default=0)
    found: list[tuple[Segment, ...]] = [()] if deepest == 0 else []
    growing: list[tuple[Segment, ...]] = [()]
    while growing and not found:  # one segment longer in each round, so the first that are found are the shortest
        longer = []
        for chain in growing:
            reached = chain[-1].info.stop if chain else 0
            for segment in by_start.get(reached, ()):
                skips = any(reached < tap < segment.info.stop for tap in taps)
                if segment.info.stop <= deepest and not skips and (not chain or _alike(chain[-1].info, segment.info)):
                    longer.append((*chain, segment))
        found = [chain for chain in longer if chain[-1].info.stop == deepest]
        growing = longer
    return min(found, key=lambda chain: [segment.model for segment in chain], default=None)


def _alike(one: TrunkInfo, other: TrunkInfo) -> bool:
    def common(info: TrunkInfo) -> tuple[object, ...]:
        return info.base, info.revision, info.target, info.hidden_size

    return common(one) == common(other)


def choose(
    dropped: Trunk | None, heads: Mapping[str, Head], present: Collection[str], served: Served | None
) -> tuple[Served | None, dict[str, str]]:
    """Return what to serve, None if there is no trunk, and why something is not served: by task, or under TRUNK.

    `dropped` is the trunk in the repository (None: not whole), `heads` are the dropped heads that are in order by
    themselves, `present` all tasks with a folder, also those whose folder is not in order: they keep what they have.
    """
    own = served.heads if served else {}
    kept = {task: head for task, head in own.items() if task in present}
    if dropped is not None:
        target, refused = _fit(dropped, heads, kept)
        lost = sorted(set(kept) - set(target.heads))
        if not lost or served is None:
            return target, refused
        why = (
            f"the trunk in the repository does not fit {', '.join(lost)}; put heads there that were trained on it, or "
            "remove those tasks"
        )
    else:
        why = ""
    if served is None:
        return None, {}
    target, refused = _fit(served.trunk, heads, kept)
    return target, {**refused, **({TRUNK: why} if why else {})}


def _fit(trunk: Trunk, heads: Mapping[str, Head], kept: Mapping[str, Head]) -> tuple[Served, dict[str, str]]:
    """Put heads on `trunk`: those that are served, as they are if they fit; then what was dropped, one by one."""
    chosen: dict[str, Head] = {}
    refused: dict[str, str] = {}

    def put(task: str, head: Head) -> None:
        together = {**chosen, task: head}
        taps = {other.info.tap for other in together.values()}
        chain = find_chain(trunk.segments, taps)
        check_head(head.config, [segment.info for segment in chain or trunk.segments])
        if chain is None:
            raise ContractError(_no_chain(head, trunk, taps))
        for other in together.values():  # another chain may be one of another trunk
            check_head(other.config, [segment.info for segment in chain])
        chosen[task] = head

    for task, head in sorted(kept.items()):
        with contextlib.suppress(ContractError):
            put(task, head)
    for task, head in sorted(heads.items()):
        if chosen.get(task) != head:
            try:
                put(task, head)
            except ContractError as error:
                refused[task] = str(error)
    chain = find_chain(trunk.segments, {head.info.tap for head in chosen.values()})
    assert chain is not None, "every head was put where a chain reaches it"
    return Served(trunk.tokenizer, chain, chosen), refused


def _no_chain(head: Head, trunk: Trunk, taps: Collection[int]) -> str:
    there = ", ".join(sorted(f"trunk_{s.info.start}_{s.info.stop}" for s in trunk.segments)) or "none"
    ends = ", ".join(str(tap) for tap in sorted(taps))
    return (
        f"{head.info.model} taps the trunk at layer {head.info.tap}, but no chain of segments has ends at {ends} "
        f"(there are {there}); `espalier export` with its branch adds what is missing"
    )

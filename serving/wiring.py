"""The reconciler: brings what Triton serves to what lies in the repository, and leaves it as it was if that fails.

One pass, under the lock of the live store: see that Triton serves the newest state of the history (a Triton that
restarted, or a pass that was killed, is brought back to it); read the folders that changed; choose what to serve; try
it out; point the ensemble at it; write the state down. Until that last step the state before counts, so a pass may be
killed anywhere, and several may run in turn. A pass in which nothing changed may merge heads (serving.merging).
"""

import contextlib
import logging
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from espalier.contract import SEGMENT_NAME, TOKENIZER, FolderStatus, HeadInfo, StatusFile, TrunkInfo, head_name, task_of
from espalier.errors import ContractError, UnavailableError, WiringError
from espalier.repository import adopted
from serving import merging
from serving.control import Control
from serving.deploy import Deployer, Rejected
from serving.inbox import Folder, Inbox
from serving.live import HISTORY, Live, Merge, State, Wired
from serving.plan import TRUNK, Group, Head, Segment, Served, Trunk, choose
from serving.reader import Reader

log = logging.getLogger("espalier.wiring")

PATIENCE = 60
"""How often a rollback looks whether the repository is at rest."""
RETRY = 60.0
"""Seconds after which a model that the server could not load is tried again: it may have lacked memory."""
MERGE_RETRY = 600.0
"""The same of merged models: they are made anew for it, and nobody waits for them."""
DEATHS = 2
"""How often the server may die while new models are tried before they are refused."""


@dataclass(frozen=True)
class Change:
    """A state that was reached, and for each new head the seconds since its folder changed."""

    state: State
    seconds: Mapping[str, float]


@dataclass(frozen=True)
class Pass:
    """What a pass came to."""

    status: StatusFile
    change: Change | None
    restless: bool  # something is not at rest yet: look again soon
    refusals: int  # that were not known before


@dataclass
class Wiring:
    """Wires the heads of `repository` into the ensemble that the Triton behind `control` serves from `live`."""

    repository: Path
    live: Live
    control: Control
    allowed: frozenset[str] = frozenset()  # folders that may hold code
    keep: int | None = HISTORY  # None: nothing is removed
    merge_after: float | None = None  # seconds of rest after which the heads of a tap are merged; None: never
    report: Callable[[StatusFile], None] = lambda status: None

    inbox: Inbox = field(init=False)
    reader: Reader = field(init=False)
    rejected: dict[str, tuple[str, float]] = field(default_factory=dict, init=False)
    """By model: why the server refused it, and the end of that on the monotonic clock."""
    regroup_from: float = field(default=0.0, init=False)
    """When heads are merged or parted at the earliest, on the monotonic clock."""
    deaths: dict[str, int] = field(default_factory=dict, init=False)
    told: dict[str, str] = field(default_factory=dict, init=False)
    """By folder: the refusal that the log tells of."""
    tidied: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        if self.live.path.resolve().is_relative_to(self.repository.resolve()):
            raise WiringError(f"the live store {self.live.path} lies in the repository; give another --live")
        self.inbox = Inbox(self.repository)
        self.reader = Reader(self.live, self.allowed)

    def reconcile(self) -> Pass:
        """Do one pass.

        Raises UnavailableError if Triton does not answer, ContractError if there is no repository, WiringError if
        Triton reads another one or the live store cannot be written.
        """
        with self._alone() as one:
            return one.run()

    def settle(self) -> Pass:
        """Do passes until everything is at rest and nothing is left to do; return the last."""
        while True:
            done = self.reconcile()
            if not done.restless and done.change is None:
                return done
            time.sleep(self.inbox.settled / 2)

    def rollback(self, generation: int | None = None) -> State:
        """Serve again what was served in `generation`, by default before the last change of what is served.

        What lies in the repository is left alone; it is passed over until its owner changes it. Raises WiringError if
        that generation is not kept, or if nothing would change.
        """
        with self._alone() as one:
            return one.roll_back(generation)

    @contextlib.contextmanager
    def _alone(self) -> "Iterator[_Pass]":
        try:
            with self.live.lock():
                yield _Pass(self)
        except OSError as error:
            where = error.filename or self.live.path
            raise WiringError(f"{where} cannot be read or written: {error.strerror or error}") from error


class _Pass:
    def __init__(self, wiring: Wiring) -> None:
        self.wiring = wiring
        self.live = wiring.live
        self.deployer = Deployer(wiring.live, wiring.control)
        self.now = time.monotonic()
        self.refusals = 0
        self.state = self.live.state()
        self.restored = False  # whether this pass did it
        self.stays = False  # whether heads that should have been merged or parted were not
        self.served = self._restored()
        if self.state is not None and (self.restored or not wiring.tidied):  # a killed pass may have left something
            self._tidy(self.state, at_once=not wiring.tidied)
            wiring.tidied = True
        self.folders: Mapping[str, Folder | None] = {}

    def run(self) -> Pass:
        self.folders = self.wiring.inbox.look(self._known_folders())
        restless = self.wiring.reader.read(self.folders)
        change, rejected = None, False
        while True:
            target, refused = self._choose()
            overruled, trunk = self._still_overruled()
            if target is None:
                break
            if self.state is not None and self.served is not None and target.parts == self.served.parts:
                self._pass_over(self.state, overruled, trunk)
                break
            try:
                change = self._change(target, overruled, trunk, refused)
            except Rejected as error:
                self._reject(self._blamed(error, target))
                rejected = True
                continue
            break
        if rejected and change is None and self.state is not None:  # what was loaded with what is refused
            self._tidy(self.state, at_once=True)
        if change is None and not restless:
            change = self._regroup(overruled, trunk, refused)
        status = self._tell(refused, loading=set())
        return Pass(status, change, restless, self.refusals)

    # --- what is served -----------------------------------------------------------------------------------------------

    def _restored(self) -> Served | None:
        """Return the newest state as a target, once Triton serves it."""
        if self.state is None:
            return None
        try:
            target = self._target(self.state)
        except ContractError as error:
            log.error("what was served cannot be read any more (%s); starting from the repository", error)
            return None
        there, models = self.deployer.there(self.state.generation)
        target = target.with_groups(g for g in target.groups if g.model in models or not self._rejection(g.model))
        kept = there | target.grouped
        wanted = target.only({task for task, h in target.heads.items() if task in kept or not self._rejection(h.model)})
        if there == set(wanted.heads) and models >= {group.model for group in wanted.groups}:
            return wanted
        log.info("bringing Triton to generation %d: %s", self.state.generation, ", ".join(wanted.heads))
        try:
            served, reasons = self.deployer.restore(wanted, self.state.generation)
        except Rejected as error:
            log.error("generation %d is refused (%s); starting from the repository", self.state.generation, error)
            return None
        self._reject(Rejected(reasons, lasting=False))
        self.restored = True
        return served

    def _target(self, state: State) -> Served:
        chain = tuple(Segment(model, TrunkInfo.read(self.live.config(model))) for model in state.trunk)
        heads = {}
        for task, wired in state.heads.items():
            config = adopted(self.live.config(wired.model), head_name(task))
            heads[task] = Head(wired.model, HeadInfo.read(config), config, wired.digest, wired.version)
        segments = {segment.model: segment for segment in chain}
        groups = (merging.read(model, held, segments, self.live) for model, held in state.groups.items())
        return Served(state.tokenizer, chain, heads).with_groups(group for group in groups if group is not None)

    def _known_folders(self) -> set[str]:
        """Return the folders that were there when the newest state was reached, as far as it tells."""
        if self.state is None:
            return set()
        return {head_name(task) for task in self.state.heads if self.state.overruled.get(task) != ""}

    # --- what to serve ------------------------------------------------------------------------------------------------

    def _choose(self) -> tuple[Served | None, dict[str, str]]:
        heads: dict[str, Head] = {}
        refused: dict[str, str] = {}
        present = {task for name in self.folders if (task := task_of(name)) is not None}
        overruled, trunk_overruled = self._still_overruled()
        for task in present:
            read = self.wiring.reader.settled(self.folders, head_name(task))
            if read is None or not isinstance(read.found, Head) or task in overruled:
                continue
            why = self._rejection(read.found.model)
            if why:
                refused[task] = why
            else:
                heads[task] = read.found
        present |= {task for task, digest in overruled.items() if not digest}
        trunk = self._trunk()
        if trunk is not None:
            whys = [why for model in sorted(trunk.models) if (why := self._rejection(model))]
            if whys:
                refused[TRUNK] = whys[0]
            if whys or trunk_overruled:
                trunk = None
        target, unfit = choose(trunk, heads, present, self.served)
        if target is not None and self.served is not None:
            target = target.with_groups(g for g in self.served.groups if not self._rejection(g.model))
        return target, {**unfit, **refused}

    def _trunk(self) -> Trunk | None:
        """Return the trunk that lies in the repository, if all of it is at rest and in order."""
        segments: list[Segment] = []
        tokenizer: str | None = None
        for name in self.folders:
            if name != TOKENIZER and not SEGMENT_NAME.fullmatch(name):
                continue
            read = self.wiring.reader.settled(self.folders, name)
            if read is None or read.found is None:
                return None
            if isinstance(read.found, Segment):
                segments.append(read.found)
            elif isinstance(read.found, str):
                tokenizer = read.found
        return Trunk(tokenizer, tuple(segments)) if tokenizer is not None and segments else None

    def _reject(self, error: Rejected, retry: float = RETRY) -> None:
        until = float("inf") if error.lasting else self.now + retry
        self.wiring.rejected |= {model: (why, until) for model, why in error.reasons.items()}

    def _blamed(self, error: Rejected, target: Served) -> Rejected:
        """Leave out what is served: if that fails, apart from what it was merged with, the new trunk is to blame.

        Raises WiringError if there is none: the same would be tried again.
        """
        served = self.served
        if served is None:
            return error
        reasons = {model: why for model, why in error.reasons.items() if model not in served.apart}
        reasons = reasons or dict.fromkeys(target.trunk.models - served.trunk.models, str(error))
        if not reasons:
            raise WiringError(f"what is served cannot be loaded again: {error}") from error
        return Rejected(reasons, error.lasting)

    def _rejection(self, model: str) -> str:
        why, until = self.wiring.rejected.get(model, ("", 0.0))
        return why if self.now < until else ""

    def _still_overruled(self) -> tuple[dict[str, str], tuple[str, ...]]:
        """Return what was rolled back from and, as far as is known, still lies in the repository: heads, and trunk."""
        if self.state is None:
            return {}, ()
        heads = {task: d for task, d in self.state.overruled.items() if self._digest(task) in (d, None)}
        trunk = self._trunk()
        passed = self.state.overruled_trunk
        return heads, passed if trunk is None or tuple(sorted(trunk.models)) == passed else ()

    def _digest(self, task: str) -> str | None:
        """Return the digest of what lies in a task's folder: "" without a folder, None while it is not known."""
        name = head_name(task)
        if name not in self.folders:
            return ""
        read = self.wiring.reader.settled(self.folders, name)
        return read.digest if read is not None else None

    # --- the change ---------------------------------------------------------------------------------------------------

    def _change(
        self, target: Served, overruled: dict[str, str], trunk: tuple[str, ...], refused: Mapping[str, str],
        why: str = "", regroups: bool = False,
    ) -> Change:  # fmt: skip
        """Serve `target`, and write down that `overruled` and `trunk` are passed over. Raises Rejected.

        What only `regroups` heads takes the place of the state before: it answers the same.
        """
        old = self.served.heads if self.served else {}
        new = [task for task, head in target.heads.items() if task not in old or old[task].model != head.model]
        self._tell(refused, loading=set(new))
        self._try_out(target, new)
        generation = self.live.next_generation()
        try:
            self.deployer.point(target, generation)
        except WiringError:
            if self.served is not None and self.state is not None:
                self.deployer.restore(self.served, self.state.generation)
            raise
        first = self.served is None
        before = self.state if regroups else None
        reached = State(
            generation=generation,
            time=before.time if before else datetime.now(UTC).replace(microsecond=0),
            changes=before.changes if before else (*([why] if why else []), *_changes(target, self.served)),
            tokenizer=target.tokenizer,
            trunk=tuple(segment.model for segment in target.chain),
            heads={
                task: Wired(model=head.model, digest=head.digest, version=head.version)
                for task, head in sorted(target.heads.items())
            },
            groups={
                group.model: Merge(segment=group.segment and group.segment.model, heads=dict(group.models))
                for group in target.groups
            },
            overruled=overruled,
            overruled_trunk=trunk,
        )
        self.live.record(reached, before)
        self.served, self.state = target, reached
        merged = "; ".join(", ".join(tasks) for tasks in reached.merged) or "none"
        said = f"merged heads: {merged}" if regroups else ", ".join(reached.changes)
        log.info("generation %d: %s", generation, said)
        now = time.time()
        changed = {name: folder.changed for name, folder in self.folders.items() if folder is not None}
        seconds = {task: now - changed[head_name(task)] for task in new if head_name(task) in changed}
        self._tidy(reached, at_once=first)
        return Change(reached, seconds)

    def _regroup(self, overruled: dict[str, str], trunk: tuple[str, ...], refused: Mapping[str, str]) -> Change | None:
        """Merge heads and the segment below, if what is served has been at rest for long enough; or part all.

        One tap in a pass; if that fails the next, so that what is wrong with one keeps no other apart.
        """
        if self.served is None or self.state is None or self.now < self.wiring.regroup_from:
            return None
        if self.served.heads.keys() != self.state.heads.keys():
            return None  # a head could not be brought back yet: its state must not be replaced by one without it
        for groups in self._regroupings(self.served, self.state):
            target = self.served.with_groups(groups)
            if target.parts == self.served.parts:
                continue
            try:
                return self._change(target, overruled, trunk, refused, regroups=True)
            except Rejected as error:
                # Heads are not rejected: they were served before.
                models = {group.model for group in groups}
                blamed = models & error.reasons.keys() or models - {group.model for group in self.served.groups}
                self._stay(error, blamed, error.lasting)
                self._tidy(self.state, at_once=True)
        if self.stays:
            self.wiring.regroup_from = self.now + RETRY
        return None

    def _regroupings(self, served: Served, state: State) -> Iterator[list[Group]]:
        """Yield the groups of what is to be tried, tap by tap."""
        after = self.wiring.merge_after
        if after is None:
            yield []
        elif (datetime.now(UTC) - state.time).total_seconds() >= after:
            for segment in served.chain:
                own = self._groups(served, segment)
                if own is not None:
                    others = [group for group in served.groups if group.tap != segment.info.stop]
                    yield sorted([*own, *others], key=lambda group: (group.tap, group.model))

    def _groups(self, served: Served, below: Segment) -> list[Group] | None:
        """Return the groups on a segment, with models made; None if one is not fit to be served, as far as is known."""
        making = set[str]()
        try:
            groups = merging.groups(served, below, self.live)
            if any(self._rejection(group.model) for group in groups):
                return None
            for group in groups:
                making = {group.model}
                merging.make(group, self.live)
        except (ContractError, OSError) as error:
            self._stay(error, making, lasting=False)
            return None
        return groups

    def _stay(self, error: Exception, models: Collection[str], lasting: bool) -> None:
        """Note why heads are not merged or parted, and reject `models` of groups for it."""
        self.stays = True
        self._reject(Rejected(dict.fromkeys(models, str(error)), lasting), MERGE_RETRY)
        log.warning("heads stay as they are: %s", error)

    def _pass_over(self, state: State, overruled: dict[str, str], trunk: tuple[str, ...]) -> None:
        """Write down what is passed over from now on; what is served stays."""
        if (overruled, trunk) != (state.overruled, state.overruled_trunk):
            self.state = state.model_copy(update={"overruled": overruled, "overruled_trunk": trunk})
            self.live.record(self.state)

    def _try_out(self, target: Served, new: list[str]) -> None:
        fresh = target.models - (self.served.models | self.served.apart if self.served else set())
        try:
            self.deployer.try_out(target, new, self.served)
        except UnavailableError as error:
            # Once may be chance. What is tried whenever the server dies is refused, or nobody would be served.
            for model in fresh:
                self.wiring.deaths[model] = self.wiring.deaths.get(model, 0) + 1
            fatal = [model for model in fresh if self.wiring.deaths[model] >= DEATHS]
            if fatal:
                why = f"the server ended {DEATHS} times while this was loaded or tried"
                raise Rejected(dict.fromkeys(fatal, why), lasting=True) from error
            raise
        for model in fresh:
            self.wiring.deaths.pop(model, None)

    def _tidy(self, state: State, at_once: bool) -> None:
        self.deployer.tidy(self.served.models if self.served else state.models, at_once)
        if self.wiring.keep is not None:
            waiting = {read.model for read in self.wiring.reader.reads.values() if read.model is not None}
            self.live.prune(self.wiring.keep, waiting)

    # --- rollback -----------------------------------------------------------------------------------------------------

    def roll_back(self, generation: int | None) -> State:
        """See `Wiring.rollback`."""
        history = self.live.history()
        if self.state is None:
            raise WiringError(f"{self.live.path} knows of nothing that was served")
        if generation is None:
            before = [state for state in history if state.answers != self.state.answers]
            if not before:
                raise WiringError(f"{self.live.path} knows of nothing else that was served")
            goal = before[-1]
        else:
            kept = {state.generation: state for state in history}
            if generation not in kept:
                raise WiringError(f"generation {generation} is not kept; kept are {', '.join(map(str, kept))}")
            goal = kept[generation]
        if goal.answers == self.state.answers:
            raise WiringError(f"generation {goal.generation} is what is served now")
        self._wait_for_rest()
        target = self._target(goal)
        tasks = {task for name in self.folders if (task := task_of(name)) is not None}
        overruled = {}
        for task in sorted({*tasks, *self.state.heads, *goal.heads}):
            lies = self._digest(task) or ""
            if lies != (goal.heads[task].digest if task in goal.heads else ""):
                overruled[task] = lies
        trunk = self._trunk()
        passed = tuple(sorted(trunk.models)) if trunk and not {goal.tokenizer, *goal.trunk} <= trunk.models else ()
        try:
            change = self._change(target, overruled, passed, {}, f"rolled back to {goal.generation}")
        except Rejected as error:
            raise WiringError(f"generation {goal.generation} cannot be served: {error}") from error
        self._tell({}, loading=set())
        return change.state

    def _wait_for_rest(self) -> None:
        for _ in range(PATIENCE):
            self.folders = self.wiring.inbox.look(self._known_folders())
            if not self.wiring.reader.read(self.folders):
                return
            time.sleep(self.wiring.inbox.settled / 2)
        raise WiringError(f"{self.wiring.repository} keeps changing; roll back when nobody copies into it")

    # --- what became of it --------------------------------------------------------------------------------------------

    def _tell(self, refused: Mapping[str, str], loading: set[str]) -> StatusFile:
        overruled, trunk_overruled = self._still_overruled()
        entries = {name: self._entry(name, refused, loading, overruled) for name in self.folders}
        heads = self.served.heads if self.served else {}
        for task, head in heads.items():
            if head_name(task) not in entries:
                why = "rolled back: its folder is gone" if task in overruled else ""
                entries[head_name(task)] = FolderStatus(state="serving", why=why, served=True, digest=head.digest)
        if TRUNK in refused:
            entries[TRUNK] = FolderStatus(state="refused", why=refused[TRUNK], served=self.served is not None)
        elif trunk_overruled:
            entries[TRUNK] = FolderStatus(state="refused", why="it was rolled back from", served=True)
        # Of the trunk only what is wrong is told.
        shown = {name: entry for name, entry in entries.items() if task_of(name) or entry.state != "serving"}
        for name, entry in shown.items():
            if entry.state == "refused" and self.wiring.told.get(name) != entry.why:
                log.warning("%s: refused: %s", name, entry.why)
                self.wiring.told[name] = entry.why
                self.refusals += 1
        for name in set(self.wiring.told) - {name for name, entry in shown.items() if entry.state != "serving"}:
            del self.wiring.told[name]
        status = StatusFile(generation=self.state.generation if self.state else 0, folders=dict(sorted(shown.items())))
        self.live.write_status(status)
        self.wiring.report(status)
        return status

    def _entry(
        self, name: str, refused: Mapping[str, str], loading: set[str], overruled: Mapping[str, str]
    ) -> FolderStatus:
        read, task = self.wiring.reader.settled(self.folders, name), task_of(name)
        heads = self.served.heads if self.served else {}
        served = task in heads
        if self.folders[name] is None:
            return FolderStatus(state="loading", why="its folder has gone", served=served)
        if read is None:
            return FolderStatus(state="loading", why="its folder is changing", served=served)

        def entry(state: str, why: str = "") -> FolderStatus:
            return FolderStatus(state=state, why=why, served=served, digest=read.digest, version=read.version)

        if read.why:
            return entry("refused", read.why)
        if task is None:
            return entry("serving")
        if task in refused:
            return entry("refused", refused[task])
        if task in overruled:
            return entry("refused", "it was rolled back from")
        if task in loading:
            return entry("loading")
        if task not in heads or heads[task].digest != read.digest:
            return entry("loading", "it waits for a whole trunk")
        return entry("serving")


def _changes(target: Served, served: Served | None) -> list[str]:
    """Say in a phrase each what `target` changes."""
    if served is None:
        return [f"first served: {', '.join(sorted(target.heads)) or 'no task'}"]
    phrases = []
    for task in sorted({*target.heads, *served.heads}):
        new, old = target.heads.get(task), served.heads.get(task)
        if old is None:
            phrases.append(f"added {task}")
        elif new is None:
            phrases.append(f"removed {task}")
        elif new.model != old.model:
            phrases.append(f"updated {task}")
    if target.tokenizer != served.tokenizer or target.chain != served.chain:
        phrases.append("trunk " + " ".join(segment.info.model for segment in target.chain))
    return phrases

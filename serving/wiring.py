"""The reconciler: brings what Triton serves to what lies in the repository, and puts it back if that fails.

One pass, under the lock of the live store: see that Triton serves the newest state of the history (a Triton that
restarted, or a pass that was killed, is brought back to it); read the folders that changed; choose what to serve; load
and try new heads alone; point the ensemble at them; try every task; write the state down. Until that last step the
state before counts, so a pass may be killed anywhere, and several may run in turn.
"""

import logging
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from espalier.configs import ensemble_config, ensemble_generation
from espalier.contract import (
    ENSEMBLE,
    SEGMENT_NAME,
    SLOT_NAME,
    TOKENIZER,
    FolderStatus,
    HeadInfo,
    StatusFile,
    TrunkInfo,
    head_name,
)
from espalier.errors import ContractError, WiringError
from espalier.repository import adopted
from serving import check
from serving.control import Control, Refused
from serving.inbox import Content, Folder, Inbox, Restless, Signature, read_content
from serving.live import HISTORY, Live, State, Wired
from serving.plan import TRUNK, Head, Segment, Target, Trunk, choose, find_chain

log = logging.getLogger("espalier.wiring")

PATIENCE = 60
"""How often a rollback looks whether the repository is at rest."""
GRACE = 1.0
"""Seconds between the ensemble's change and the unloading of what it no longer needs."""
LOADS = 4
"""Models that are loaded at once."""
RETRY = 60.0
"""Seconds after which a head that the server refused is tried again: it may have lacked memory."""


@dataclass(frozen=True)
class Change:
    """A state that was reached, and for each folder the seconds from its last change to being served."""

    state: State
    seconds: Mapping[str, float]


@dataclass
class _Read:
    """What a folder held when it was read last: a model, or why not."""

    signature: Signature
    found: "Head | Segment | str | None" = None  # a tokenizer is its model's name
    digest: str = ""
    version: int | None = None
    why: str = ""


@dataclass
class Pass:
    """What a pass came to."""

    status: StatusFile
    change: Change | None = None
    restless: bool = False  # something is not at rest yet: look again soon
    failures: int = 0


@dataclass
class Wiring:
    """Wires the heads of `repository` into the ensemble that the Triton behind `control` serves from `live`."""

    repository: Path
    live: Live
    control: Control
    allowed: frozenset[str] = frozenset()  # folders that may hold code
    keep: int = HISTORY
    report: Callable[[StatusFile], None] = lambda status: None
    inbox: Inbox = field(init=False)
    _reads: dict[str, _Read] = field(default_factory=dict, init=False)
    _rejected: dict[tuple[str, str], tuple[str, float]] = field(default_factory=dict, init=False)
    """By task and model: why the server refused it, and when."""
    _one_by_one: bool = field(default=False, init=False)  # an ensemble with several new heads failed
    _tidied: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        self.inbox = Inbox(self.repository)

    def reconcile(self) -> Pass:
        """Do one pass. Raises UnavailableError if Triton does not answer, ContractError if there is no repository.

        WiringError tells that Triton reads another repository, or refuses the trunk.
        """
        with self.live.lock():
            return _Pass(self).run()

    def settle(self) -> Pass:
        """Do passes until everything is at rest and nothing is left to do; return the last."""
        for _ in range(PATIENCE):
            done = self.reconcile()
            if not done.restless and done.change is None:
                return done
            time.sleep(self.inbox.settled / 2)
        raise WiringError(f"{self.repository} keeps changing; wire it when nobody copies into it")

    def rollback(self, generation: int | None = None) -> State:
        """Serve again what was served in `generation`, by default before the last change.

        What lies in the repository is left alone; it is passed over until its owner changes it. Raises WiringError if
        that generation is not kept, or if nothing would change.
        """
        with self.live.lock():
            return _Pass(self).roll_back(generation)


class _Pass:
    def __init__(self, wiring: Wiring) -> None:
        self.wiring = wiring
        self.live = wiring.live
        self.control = wiring.control
        self.failures = 0

    def run(self) -> Pass:
        state = self.live.state()
        served = self._served(state)
        if state is not None and not self.wiring._tidied:  # a pass that was killed may have left something
            self._tidy(state, at_once=True)
            self.wiring._tidied = True
        folders = self.wiring.inbox.look()
        restless = self._read(folders)
        self._tell(served, state, folders, {}, loading=set())
        while True:
            target, refused = self._choose(folders, served, state)
            overruled = self._still_overruled(state, folders)
            if target is None or (served and self._same(target, served) and state and overruled == state.overruled):
                break
            if self.wiring._one_by_one:
                target = _with_one_more(target, served)
            try:
                change = self._change(target, served, state, overruled, folders, refused)
            except _SeveralRefused as error:
                log.warning("%s; trying one at a time", error)
                self.wiring._one_by_one = True
                continue
            except _HeadRefused as error:
                self.failures += 1
                self.wiring._rejected[error.task, error.model] = (error.why, time.monotonic())
                log.warning("%s: refused: %s", head_name(error.task), error.why)
                continue
            status = self._tell(target, change.state, folders, refused, loading=set())
            return Pass(status, change, restless or self.wiring._one_by_one, self.failures)
        self.wiring._one_by_one = False
        return Pass(self._tell(served, state, folders, refused, loading=set()), None, restless, self.failures)

    # --- what is served -----------------------------------------------------------------------------------------------

    def _served(self, state: State | None) -> Target | None:
        """Return the newest state as a target, once Triton serves it."""
        if state is None:
            return None
        try:
            target = self._target(state)
        except ContractError as error:
            log.error("what was served cannot be read any more (%s); starting from the repository", error)
            return None
        now = self.control.config(ENSEMBLE)
        if (ensemble_generation(now) if now is not None else None) != (state.generation if target.heads else None):
            log.info("bringing Triton to generation %d: %s", state.generation, ", ".join(target.heads) or "no task")
            try:
                self._serve(target, state.generation)
            except Refused as error:
                log.error("generation %d is refused (%s); starting from the repository", state.generation, error)
                return None
        return target

    def _target(self, state: State) -> Target:
        chain = tuple(Segment(model, TrunkInfo.read(self.live.config(model))) for model in state.trunk)
        heads = {}
        for task, wired in state.heads.items():
            config = adopted(self.live.config(wired.model), head_name(task))
            heads[task] = Head(wired.model, HeadInfo.read(config), config, wired.digest, wired.version)
        return Target(state.tokenizer, chain, heads)

    def _serve(self, target: Target, generation: int) -> None:
        """Make Triton serve `target`: what is missing is loaded, then the ensemble."""
        self._load(target)
        self._point(target, generation)

    def _load(self, target: Target) -> set[str]:
        """Load what is missing, several at once; return what was. Raises _ModelRefused for the first that fails."""
        index = self.control.index()
        missing = sorted(model for model in target.models if not index.get(model))
        unseen = [model for model in missing if model not in index]
        if unseen:
            raise self._blind(unseen[0])
        with ThreadPoolExecutor(LOADS) as pool:
            loads = {model: pool.submit(self.control.load, model) for model in missing}
        failed = {model: error for model, load in loads.items() if (error := load.exception()) is not None}
        for model, error in failed.items():
            if not isinstance(error, Refused):
                raise error
            self.control.unload(model)  # a model that failed to load would make the server unready
        for model, error in failed.items():
            raise _ModelRefused(model, str(error))
        return set(missing)

    def _point(self, target: Target, generation: int) -> None:
        """Write the ensemble of `target` and load it; without a task there is none."""
        if not target.heads:
            self.control.unload(ENSEMBLE)
            return
        models = {TOKENIZER: target.tokenizer}
        models |= {segment.info.model: segment.model for segment in target.chain}
        models |= {head.info.model: head.model for head in target.heads.values()}
        infos = [head.info for head in target.heads.values()]
        config = ensemble_config([segment.info for segment in target.chain], infos, generation, models)
        self.live.write_ensemble(config, generation)
        self.control.load(ENSEMBLE)
        loaded = self.control.config(ENSEMBLE)
        if loaded is None or ensemble_generation(loaded) != generation:
            raise self._blind(f"generation {generation} of {ENSEMBLE}")

    def _blind(self, what: str) -> WiringError:
        return WiringError(
            f"{self.control.url} does not see {what}: start it with --model-control-mode=explicit and "
            f"--model-repository={self.live.models} (by whatever path it knows that folder)"
        )

    # --- what lies in the repository ----------------------------------------------------------------------------------

    def _read(self, folders: Mapping[str, Folder | None]) -> bool:
        """Read what changed and is at rest; return whether something is not."""
        reads = self.wiring._reads
        for name in set(reads) - set(folders):
            del reads[name]
        restless = False
        for name, folder in folders.items():
            if folder is None or not folder.settled:
                restless = True
                continue
            known = reads.get(name)
            if known is not None and known.signature == folder.signature and self._still_there(known):
                continue
            read = _Read(folder.signature)
            try:
                self._look_into(folder, read)
            except Restless:
                restless = True
                continue
            except ContractError as error:
                read.why = str(error)
                self.failures += 1
                log.warning("%s: refused: %s", name, error)
            reads[name] = read
        return restless

    def _still_there(self, read: _Read) -> bool:
        match read.found:
            case None:
                return True
            case str(model):
                return self.live.has(model)
            case Head(model=model) | Segment(model=model):
                return self.live.has(model)

    def _look_into(self, folder: Folder, read: _Read) -> None:
        name = folder.name
        head = name.startswith(head_name(""))
        if head:
            slot = name.removeprefix(head_name(""))
            if not SLOT_NAME.fullmatch(slot):
                raise ContractError(
                    f"{slot!r} is not a task name: lower case, digits and single underscores, for a candidate "
                    "TASK__NAME; rename the folder"
                )
        allowed = name in self.wiring.allowed
        content = read_content(folder, check.belongs if head and not allowed else lambda _: True)
        read.digest, read.version = content.digest, content.version
        if head and not allowed:
            check.check_files(name, [entry[0] for entry in folder.signature], content.version)
        # A candidate is served by the same model as the task's own head of the same content.
        base = name.partition("__")[0] if head else name
        model = self.live.model_name(base, content.digest)

        if head:
            read.found = self._head(name, model, content, allowed)
        elif name == TOKENIZER:
            self._adopt(model, content, lambda made: check.check_tokenizer_folder(made, content.version))
            read.found = model
        else:
            self._adopt(model, content, lambda made: self._check_segment(made, name, content.version))
            read.found = Segment(model, TrunkInfo.read(self.live.config(model)))

    def _check_segment(self, made: Path, name: str, version: int) -> None:
        check.check_segment_folder(made, name, version)

    def _head(self, name: str, model: str, content: Content, allowed: bool) -> Head:
        self._adopt(model, content, lambda made: check.check_head_folder(made, name, content.version, allowed))
        config = adopted(self.live.config(model), name)
        return Head(model, HeadInfo.read(config), config, content.digest, content.version)

    def _adopt(self, model: str, content: Content, check_made: Callable[[Path], object]) -> None:
        """Copy a content into the live store, if it passes."""
        if self.live.has(model):
            return

        def fill(made: Path) -> None:
            content.copy(made)
            check_made(made)

        self.live.adopt(model, fill)

    # --- what to serve ------------------------------------------------------------------------------------------------

    def _choose(
        self, folders: Mapping[str, Folder | None], served: Target | None, state: State | None
    ) -> tuple[Target | None, dict[str, str]]:
        heads: dict[str, Head] = {}
        segments: list[Segment] = []
        tokenizer: str | None = None
        whole = True  # the trunk: every folder of it is at rest and in order
        for name, folder in folders.items():
            read = self.wiring._reads.get(name)
            settled = folder is not None and folder.settled and read is not None
            found = read.found if read is not None and settled else None
            match found:
                case Head():
                    heads[name.removeprefix(head_name(""))] = found
                case Segment():
                    segments.append(found)
                case str():
                    tokenizer = found
                case None:
                    whole = whole and not (name == TOKENIZER or SEGMENT_NAME.fullmatch(name))
        present = {name.removeprefix(head_name("")) for name in folders if name.startswith(head_name(""))}
        refused: dict[str, str] = {}
        for task, head in list(heads.items()):
            why = self._rejection(task, head.model)
            if why is not None:
                refused[task] = why
                del heads[task]
        for task, overruled in self._still_overruled(state, folders).items():
            heads.pop(task, None)  # rolled back from: what is served stays
            if not overruled:
                present.add(task)
        dropped = Trunk(tokenizer, tuple(segments)) if whole and tokenizer is not None and segments else None
        target, unfit = choose(dropped, heads, present, served)
        return target, {**unfit, **refused}

    def _rejection(self, task: str, model: str) -> str | None:
        why, when = self.wiring._rejected.get((task, model), ("", 0.0))
        if why and time.monotonic() - when > RETRY:
            del self.wiring._rejected[task, model]
            why = ""
        return why or None

    def _still_overruled(self, state: State | None, folders: Mapping[str, Folder | None]) -> dict[str, str]:
        """Return those contents that were rolled back from and, as far as is known, still lie in the repository."""
        overruled = state.overruled if state else {}
        return {task: digest for task, digest in overruled.items() if self._digest(task, folders) in (digest, None)}

    def _digest(self, task: str, folders: Mapping[str, Folder | None]) -> str | None:
        """Return the digest of what lies in a task's folder: "" without a folder, None while it is not known."""
        name = head_name(task)
        if name not in folders:
            return ""
        folder, read = folders[name], self.wiring._reads.get(name)
        return read.digest if folder is not None and folder.settled and read is not None else None

    @staticmethod
    def _same(one: Target, other: Target) -> bool:
        def parts(target: Target) -> tuple[object, ...]:
            heads = {task: head.model for task, head in target.heads.items()}
            return target.tokenizer, [segment.model for segment in target.chain], heads

        return parts(one) == parts(other)

    # --- the change ---------------------------------------------------------------------------------------------------

    def _change(
        self, target: Target, served: Target | None, state: State | None, overruled: dict[str, str],
        folders: Mapping[str, Folder | None], refused: dict[str, str], why: str = "",
    ) -> Change:  # fmt: skip
        old = served.heads if served else {}
        new = [task for task, head in target.heads.items() if task not in old or old[task].model != head.model]
        self._tell(served, state, folders, refused, loading=set(new))
        self._try(target, new)
        generation = self.live.next_generation()
        try:
            self._point(target, generation)
            if target.heads:
                self.control.try_ensemble({task: head.info for task, head in target.heads.items()})
        except Refused as error:
            names = ", ".join(new) or "what is left"
            log.error("the ensemble with %s is refused (%s); putting back what was served", names, error)
            if served is not None and state is not None:
                try:
                    self._serve(served, state.generation)
                except Refused as worse:
                    raise WiringError(f"generation {state.generation} cannot be put back: {worse}") from worse
            else:
                self.control.unload(ENSEMBLE)
            if len(new) > 1:
                raise _SeveralRefused(f"the ensemble with {names} is refused: {error}") from error
            if not new:
                raise WiringError(f"the ensemble is refused: {error}") from error
            raise _HeadRefused(new[0], target.heads[new[0]].model, f"the ensemble with it fails: {error}") from error
        reached = State(
            generation=generation,
            time=datetime.now(UTC).replace(microsecond=0),
            changes=(*([why] if why else []), *_changes(target, served)),
            tokenizer=target.tokenizer,
            trunk=tuple(segment.model for segment in target.chain),
            heads={
                task: Wired(model=head.model, digest=head.digest, version=head.version)
                for task, head in sorted(target.heads.items())
            },
            overruled=overruled,
        )
        self.live.record(reached)
        now = time.time()
        changed = {name: folder.changed for name, folder in folders.items() if folder is not None}
        seconds = {task: now - changed[head_name(task)] for task in new if head_name(task) in changed}
        log.info("generation %d: %s", generation, ", ".join(reached.changes))
        self._tidy(reached, at_once=served is None)
        return Change(reached, seconds)

    def _try(self, target: Target, new: Iterable[str]) -> None:
        """Load what is missing, and try the `new` heads alone."""
        tasks = {target.heads[task].model: task for task in new}
        try:
            loaded = self._load(target)
        except _ModelRefused as error:
            if error.model in tasks:
                raise _HeadRefused(tasks[error.model], error.model, error.why) from error
            raise WiringError(f"the server refuses {error.model}: {error.why}") from error
        by_tap = {segment.info.stop: segment.info for segment in target.chain}
        for task in new:
            head = target.heads[task]
            try:
                self.control.try_head(head.model, head.info, by_tap[head.info.tap])
            except Refused as error:
                if head.model in loaded:
                    self.control.unload(head.model)
                raise _HeadRefused(task, head.model, str(error)) from error

    def _tidy(self, state: State, at_once: bool) -> None:
        """Unload what the state does not need, and remove what no state needs. Models of others are left alone."""
        needed = state.models | {ENSEMBLE}
        ready = [model for model, ready in self.control.index().items() if ready]
        surplus = [model for model in ready if model not in needed and self.live.has(model)]
        if surplus and not at_once:
            time.sleep(GRACE)  # requests that began before the ensemble changed
        for model in surplus:
            self.control.unload(model)
        self.live.prune(self.wiring.keep)

    def roll_back(self, generation: int | None) -> State:
        """See `Wiring.rollback`."""
        history = self.live.history()
        if len(history) < 2 and generation is None:
            raise WiringError(f"{self.live.path} knows of no state before the present one")
        kept = {state.generation: state for state in history}
        goal = history[-2] if generation is None else kept.get(generation)
        if goal is None:
            there = ", ".join(str(number) for number in kept) or "none"
            raise WiringError(f"generation {generation} is not kept; kept are {there}")
        state = history[-1]
        served = self._served(state)
        folders = self._at_rest()
        target = self._target(goal)
        if served is not None and self._same(target, served):
            raise WiringError(f"generation {goal.generation} is what is served now")
        tasks = {name.removeprefix(head_name("")) for name in folders if name.startswith(head_name(""))}
        overruled = {}
        for task in sorted({*tasks, *state.heads, *goal.heads}):
            lies = self._digest(task, folders) or ""
            if lies != (goal.heads[task].digest if task in goal.heads else ""):
                overruled[task] = lies
        try:
            change = self._change(target, served, state, overruled, folders, {}, f"rolled back to {goal.generation}")
        except _HeadRefused as error:
            raise WiringError(f"generation {goal.generation} cannot be served: {error.task}: {error.why}") from error
        except _SeveralRefused as error:
            raise WiringError(f"generation {goal.generation} cannot be served: {error}") from error
        self._tell(target, change.state, folders, {}, loading=set())
        return change.state

    def _at_rest(self) -> Mapping[str, Folder | None]:
        """Read the repository once nothing in it changes any more."""
        for _ in range(PATIENCE):
            folders = self.wiring.inbox.look()
            if not self._read(folders):
                return folders
            time.sleep(self.wiring.inbox.settled / 2)
        raise WiringError(f"{self.wiring.repository} keeps changing; roll back when nobody copies into it")

    # --- what became of it --------------------------------------------------------------------------------------------

    def _tell(
        self, served: Target | None, state: State | None, folders: Mapping[str, Folder | None],
        refused: Mapping[str, str], loading: set[str],
    ) -> StatusFile:  # fmt: skip
        entries: dict[str, FolderStatus] = {}
        heads = served.heads if served else {}
        overruled = self._still_overruled(state, folders)
        for name, folder in folders.items():
            read = self.wiring._reads.get(name)
            task = name.removeprefix(head_name("")) if name.startswith(head_name("")) else ""
            answered = task in heads
            known = {"digest": read.digest, "version": read.version} if read else {}
            if folder is None:
                entry = FolderStatus(state="loading", why="its folder has gone", served=answered)
            elif not folder.settled or read is None:
                entry = FolderStatus(state="loading", why="its folder is changing", served=answered)
            elif read.why or task in refused:
                entry = FolderStatus(state="refused", why=read.why or refused[task], served=answered, **known)
            elif task in overruled:
                entry = FolderStatus(state="refused", why="it was rolled back from", served=answered, **known)
            elif task in loading:
                entry = FolderStatus(state="loading", served=answered, **known)
            elif task and not (answered and heads[task].digest == read.digest):
                entry = FolderStatus(state="loading", why="it waits for the trunk", served=answered, **known)
            else:
                entry = FolderStatus(state="serving", served=answered or not task, **known)
            if task or entry.state != "serving":
                entries[name] = entry
        for task in heads:
            if head_name(task) not in entries:
                why = "rolled back: its folder is gone" if task in overruled else ""
                entries[head_name(task)] = FolderStatus(
                    state="serving", why=why, served=True, digest=heads[task].digest
                )
        if TRUNK in refused:
            entries[TRUNK] = FolderStatus(state="refused", why=refused[TRUNK], served=True)
        status = StatusFile(generation=state.generation if state else 0, folders=dict(sorted(entries.items())))
        self.live.write_status(status)
        self.wiring.report(status)
        return status


class _ModelRefused(Refused):
    def __init__(self, model: str, why: str) -> None:
        super().__init__(f"{model}: {why}")
        self.model, self.why = model, why


class _SeveralRefused(Exception):
    pass


class _HeadRefused(Exception):
    def __init__(self, task: str, model: str, why: str) -> None:
        super().__init__(why)
        self.task, self.model, self.why = task, model, why


def _with_one_more(target: Target, served: Target | None) -> Target:
    """Return `target` with one alone of the heads that are not served yet."""
    old = served.heads if served else {}
    new = [task for task, head in target.heads.items() if task not in old or old[task].model != head.model]
    heads = {task: old.get(task) if task in new[1:] else head for task, head in target.heads.items()}
    kept = {task: head for task, head in heads.items() if head is not None}
    chain = find_chain(target.chain, {head.info.tap for head in kept.values()})
    return Target(target.tokenizer, chain or target.chain, kept)


def _changes(target: Target, served: Target | None) -> list[str]:
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
    return phrases or ["nothing but what is passed over"]

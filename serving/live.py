"""The live store: what the wiring made of the repository, in the form that Triton reads.

    LIVE/models/               Triton's model repository
        tokenizer-<digest>/    one folder per content; once it is there it never changes
        trunk_0_3-<digest>/
        head_mrpc-<digest>/
        trunk_0_3_heads-<digest>/   a segment and heads on it, merged (serving.merging)
        multitask/             the ensemble: which of them are served
    LIVE/history/<generation>.json   every state that was served, the newest of them now
    LIVE/status.json           what became of each folder of the repository
    LIVE/lock

Triton polls all models of an ensemble when it loads the ensemble (core, ModelRepositoryManager::PollModels), and would
so pick up what another owner is copying at that moment. Hence it never reads the folders that owners write to.
"""

import contextlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Collection, Iterator
from datetime import datetime
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError
from tritonclient.grpc import model_config_pb2 as pb

from espalier.configs import read_config, write_config
from espalier.contract import CONFIG_FILE, ENSEMBLE, HeadInfo, StatusFile
from espalier.errors import WiringError
from espalier.files import locked, write_whole

HISTORY = 20
"""States that are kept, and with them the models that they serve."""


class Wired(BaseModel):
    """A head that is served."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str  # as Triton knows it
    digest: str  # of the folder's content
    version: int  # the version folder that it comes from


class Merge(BaseModel):
    """A merged model that is served: what it holds, as the models that these are by themselves."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    segment: str | None  # of the trunk
    heads: dict[str, str]  # by task


class State(BaseModel):
    """What is served, by its names in the live store."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    generation: int
    time: datetime
    changes: tuple[str, ...]  # against the state before, a phrase each
    tokenizer: str
    trunk: tuple[str, ...]  # from the bottom up
    heads: dict[str, Wired]  # by task, candidates too
    groups: dict[str, Merge] = {}
    """By merged model."""
    overruled: dict[str, str] = {}
    """By task: the content that lies in the repository but was rolled back from ("" where there is no folder)."""
    overruled_trunk: tuple[str, ...] = ()
    """The models of the trunk that lies in the repository, if it was rolled back from."""

    @property
    def merged(self) -> list[list[str]]:
        """The tasks that each merged model answers."""
        served = {(task, head.model) for task, head in self.heads.items()}
        answered = [sorted(task for task, _ in own.heads.items() & served) for own in self.groups.values()]
        return [tasks for tasks in answered if tasks]

    @property
    def models(self) -> set[str]:
        """All models that are loaded for the state, the ensemble aside."""
        merged = {task for tasks in self.merged for task in tasks}
        heads = (head.model for task, head in self.heads.items() if task not in merged)
        segments = set(self.trunk) - {own.segment for own in self.groups.values()}
        return {self.tokenizer, *segments, *self.groups, *heads}

    @property
    def answers(self) -> tuple[object, ...]:
        """What it answers with, whether heads are merged or not."""
        return self.tokenizer, self.trunk, {task: head.model for task, head in self.heads.items()}


def live_folder(repository: Path) -> Path:
    """Return where the live store of a repository lies unless it is said otherwise: beside it."""
    return repository.resolve().with_name(f"{repository.resolve().name}.live")


class Live:
    """The live store at `path`. Everything but `lock` is for who holds the lock, or for reading."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.models = path / "models"
        self._history = path / "history"

    def prepare(self) -> None:
        """Make the folders; raise WiringError if they cannot be written."""
        try:
            for folder in (self.models, self._history):
                folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise WiringError(f"the live store cannot be written to {self.path}: {error.strerror or error}") from error

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Let one process at a time change what is served."""
        self.prepare()
        with locked(self.path / "lock"):
            yield

    # --- states -----------------------------------------------------------------------------------------------------

    def history(self) -> list[State]:
        """Return the kept states, the newest last. Raises WiringError if one cannot be read."""
        return [self._read(generation) for generation in self._generations()]

    def state(self) -> State | None:
        """Return what is served now; None if nothing ever was. Raises WiringError if that cannot be read."""
        generations = self._generations()
        return self._read(generations[-1]) if generations else None

    def _generations(self) -> list[int]:
        return sorted(int(file.stem) for file in self._history.glob("[0-9]*.json"))

    def _read(self, generation: int) -> State:
        file = self._file(generation)
        try:
            return State.model_validate_json(file.read_bytes())
        except (OSError, ValidationError) as error:
            raise WiringError(f"{file} is damaged; remove it, and what it told is forgotten") from error

    def next_generation(self) -> int:
        """Return a number that no state and no half-made ensemble has had.

        The first is the time, in seconds: clients know a generation by its number alone, also when another live store
        takes the place of this one.
        """
        made = [int(path.name) for path in (self.models / ENSEMBLE).glob("[0-9]*")]
        return max([*made, *self._generations()], default=int(time.time())) + 1

    def record(self, state: State, instead: State | None = None) -> None:
        """Make `state` the newest of the history, in the place of another one where it is told `instead` of which."""
        write_whole(self._file(state.generation), state.model_dump_json(indent=2) + "\n")
        if instead is not None:
            self._file(instead.generation).unlink(missing_ok=True)

    def _file(self, generation: int) -> Path:
        return self._history / f"{generation}.json"

    def heads(self) -> list[HeadInfo]:
        """Return what the served heads say of themselves, each under the task that it answers."""
        state = self.state()
        wired = state.heads if state else {}
        return [
            HeadInfo.read(self.config(head.model)).model_copy(update={"task": task}) for task, head in wired.items()
        ]

    # --- models -----------------------------------------------------------------------------------------------------

    def has(self, model: str) -> bool:
        """Tell whether a model lies here."""
        return (self.models / model / CONFIG_FILE).is_file()

    def config(self, model: str) -> pb.ModelConfig:
        """Return the config of a model."""
        return read_config(self.models / model)

    def adopt(self, model: str, fill: Callable[[Path], None]) -> None:
        """Make the folder of a model, whole or not at all: `fill` writes into an empty folder."""
        growing = Path(tempfile.mkdtemp(prefix=".growing.", dir=self.path))
        try:
            fill(growing)
            config = read_config(growing)
            config.name = model
            write_config(growing, config)
            os.chmod(growing, 0o755)
            with contextlib.suppress(FileNotFoundError):
                shutil.rmtree(self.models / model)  # half-removed by a prune that was killed
            os.rename(growing, self.models / model)
        finally:
            shutil.rmtree(growing, ignore_errors=True)

    def write_ensemble(self, config: pb.ModelConfig, generation: int) -> None:
        """Point an ensemble's folder at `generation`: the config, written last, says which version counts."""
        (self.models / config.name / str(generation)).mkdir(parents=True, exist_ok=True)
        write_config(self.models / config.name, config)

    def prune(self, keep: int, spare: Collection[str] = ()) -> None:
        """Remove all but the last `keep` states, and the models that neither they need nor `spare` names."""
        states = self.history()
        for state in states[:-keep]:
            self._file(state.generation).unlink(missing_ok=True)
        kept = states[-keep:]
        needed = {ENSEMBLE, *spare}
        for state in kept:
            needed |= {state.tokenizer, *state.trunk, *(head.model for head in state.heads.values())}
        if kept:  # merged models of older states are made again when they are wanted
            needed |= {*kept[-1].groups}
        for folder in self.models.iterdir():
            if folder.name not in needed:
                (folder / CONFIG_FILE).unlink(missing_ok=True)  # first: without it the folder counts for nothing
                shutil.rmtree(folder, ignore_errors=True)
        newest = kept[-1].generation if kept else 0
        for version in (self.models / ENSEMBLE).glob("[0-9]*"):
            if int(version.name) < newest:
                shutil.rmtree(version, ignore_errors=True)
        for growing in self.path.glob(".growing.*"):
            shutil.rmtree(growing, ignore_errors=True)

    # --- status -----------------------------------------------------------------------------------------------------

    def write_status(self, status: StatusFile) -> None:
        """Tell what became of each folder; a file that says so already is left alone."""
        text = status.model_dump_json(indent=2) + "\n"
        file = self.path / "status.json"
        if not file.is_file() or file.read_text() != text:
            write_whole(file, text)

    def status(self) -> StatusFile | None:
        """Return what the wiring told last; None if it told nothing readable."""
        try:
            return StatusFile.model_validate_json((self.path / "status.json").read_bytes())
        except (OSError, ValidationError):
            return None

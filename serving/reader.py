"""What the folders of the repository hold: read once, when they are at rest, copied into the live store, checked."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from espalier.contract import CANDIDATE, SLOT_NAME, TOKENIZER, HeadInfo, TrunkInfo, task_of
from espalier.errors import ContractError, one_line
from espalier.repository import adopted
from serving import check
from serving.inbox import Content, Folder, Restless, Signature, read_content
from serving.live import Live
from serving.plan import Head, Segment


@dataclass
class Read:
    """What a folder held when it was read: a head, a segment, a tokenizer (its model's name), or why it is refused."""

    signature: Signature
    found: "Head | Segment | str | None" = None
    digest: str = ""
    version: int | None = None
    why: str = ""

    @property
    def model(self) -> str | None:
        """The model in the live store, if there is one."""
        return self.found if isinstance(self.found, str) or self.found is None else self.found.model


class Reader:
    """Reads into the store `live`; folders in `allowed` may hold code."""

    def __init__(self, live: Live, allowed: frozenset[str]) -> None:
        self._live = live
        self._allowed = allowed
        self.reads: dict[str, Read] = {}

    def read(self, folders: Mapping[str, Folder | None]) -> bool:
        """Read what changed and is at rest; return whether something is not."""
        for name in set(self.reads) - set(folders):
            del self.reads[name]
        restless = False
        for name, folder in folders.items():
            if folder is None or not folder.settled:
                restless = True
                continue
            known = self.reads.get(name)
            if known is not None and known.signature == folder.signature and self._still_there(known):
                continue
            read = Read(folder.signature)
            try:
                self._read(folder, read)
            except Restless:
                restless = True
                continue
            except ContractError as error:
                read.why = one_line(error)
            except Exception as error:  # whatever a folder may hold, it must not keep the others from being served
                read.why = f"{name} cannot be read: {one_line(str(error) or type(error).__name__)}"
            self.reads[name] = read
        return restless

    def _still_there(self, read: Read) -> bool:
        return read.model is None or self._live.has(read.model)

    def settled(self, folders: Mapping[str, Folder | None], name: str) -> Read | None:
        """Return what a folder holds, if it is at rest and was read."""
        folder = folders.get(name)
        return self.reads.get(name) if folder is not None and folder.settled else None

    def _read(self, folder: Folder, read: Read) -> None:
        name, task = folder.name, task_of(folder.name)
        if task is not None and not SLOT_NAME.fullmatch(task):
            raise ContractError(
                f"{task!r} is not a task name: lower case, digits and single underscores, for a candidate "
                f"TASK{CANDIDATE}NAME; rename the folder"
            )
        data = task is not None and name not in self._allowed
        content = read_content(folder, check.belongs if data else lambda _: True)
        read.digest, read.version = content.digest, content.version
        if data:
            check.check_files(name, [entry[0] for entry in folder.signature], content.version)
        # A candidate is served by the same model as its task's own head of the same content.
        model = f"{name.partition(CANDIDATE)[0]}-{content.digest[:12]}"
        if task is not None:
            version = content.version
            self._adopt(model, name, content, lambda made: check.check_head_folder(made, name, version, not data))
            config = adopted(self._live.config(model), name)
            if data:
                check.check_config(config)  # also of what was adopted while the folder was allowed
            read.found = Head(model, HeadInfo.read(config), config, content.digest, content.version)
        elif name == TOKENIZER:
            self._adopt(model, name, content, lambda made: check.check_tokenizer_folder(made, content.version))
            read.found = model
        else:
            self._adopt(model, name, content, lambda made: check.check_segment_folder(made, name, content.version))
            read.found = Segment(model, TrunkInfo.read(self._live.config(model)))

    def _adopt(self, model: str, name: str, content: Content, check_made: Callable[[Path], None]) -> None:
        """Copy a content into the live store, if it passes and is not there."""
        if self._live.has(model):
            return

        def fill(made: Path) -> None:
            content.copy(made)
            try:
                check_made(made)
            except ContractError as error:
                raise type(error)(str(error).replace(str(made), name)) from error

        self._live.adopt(model, fill)

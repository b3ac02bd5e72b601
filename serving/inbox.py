"""The repository as its owners leave it: which model folders there are, and whether they are at rest.

A folder is at rest if nothing in it has changed for a moment. Whether a copy is whole is told by its content alone: a
copy that stalls is read as a damaged folder, and read again when it goes on. Nothing is ever written here.
"""

import hashlib
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from espalier.contract import CONFIG_FILE, SEGMENT_NAME, TOKENIZER, head_name
from espalier.errors import ContractError

SETTLED = 1.0
"""Seconds without a change after which a folder is at rest."""
LONG_AGO = 10.0
"""Seconds since a folder's last change after which it is at rest at first sight."""

Signature = tuple[tuple[str, int, int, int, int], ...]
"""Of each file: path, size, time of its last change (two clocks, in ns), inode."""

_CHUNK = 1 << 20


class Restless(Exception):
    """A folder changed while it was read."""


@dataclass(frozen=True)
class Folder:
    """A model folder of the repository, at one moment."""

    path: Path
    signature: Signature
    settled: bool
    changed: float  # time.time() of its last change, as far as it is known

    @property
    def name(self) -> str:
        """Name of the folder."""
        return self.path.name


class Inbox:
    """The model folders of the repository at `path`: heads, trunk segments, the tokenizer."""

    def __init__(self, path: Path, settled: float = SETTLED) -> None:
        self.path = path
        self.settled = settled
        self._seen: dict[str, tuple[Signature | None, float]] = {}  # since when, on the monotonic clock

    def look(self) -> dict[str, Folder | None]:
        """Return the folders by name: None for one that has gone, but not long enough ago to be sure.

        Raises ContractError if the repository is not there, or has no model folder at all: a volume that is not mounted
        must not look like the removal of every task.
        """
        found: dict[str, Folder | None] = {}
        try:
            paths = [path for path in sorted(self.path.iterdir()) if _is_model(path.name) and path.is_dir()]
        except OSError as error:
            raise ContractError(f"the repository {self.path} cannot be read: {error.strerror or error}") from error
        if not paths:
            raise ContractError(f"{self.path} holds no model folder; `espalier export` writes them")
        now = time.monotonic()
        signatures: dict[str, Signature | None] = {path.name: signature(path) for path in paths}
        signatures |= {name: None for name in self._seen if name not in signatures}
        for name, own in signatures.items():
            before, since = self._seen.get(name, (None, now))
            first = name not in self._seen
            if own != before or first:
                since = now
            self._seen[name] = own, since
            if own is None:
                if now - since < self.settled:
                    found[name] = None
                else:
                    del self._seen[name]
                continue
            changed = max((entry[3] for entry in own), default=0) / 1e9
            old = first and time.time() - changed > LONG_AGO
            if old:
                self._seen[name] = own, now - self.settled
            found[name] = Folder(self.path / name, own, old or now - since >= self.settled, changed)
        return found


def _is_model(name: str) -> bool:
    return name == TOKENIZER or name.startswith(head_name("")) or SEGMENT_NAME.fullmatch(name) is not None


def signature(folder: Path) -> Signature:
    """Return what tells one content of a folder from another without reading it. Names with a dot do not count."""
    entries = []
    for path in _files(folder):
        try:
            stat = path.stat()
        except OSError:
            continue  # it went meanwhile, or leads nowhere
        entries.append((str(path.relative_to(folder)), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino))
    return tuple(entries)


def _files(folder: Path) -> list[Path]:
    found = []
    for home, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name != "__pycache__")
        found += [Path(home, name) for name in names if not name.startswith(".")]
    return sorted(found)


@dataclass(frozen=True)
class Content:
    """What of a folder counts: its top level, and its newest version folder."""

    version: int
    files: Mapping[str, Path]  # by path inside the folder
    digest: str  # of names and bytes

    def copy(self, to: Path) -> None:
        """Write the content into the empty folder `to`; raise Restless if it is not what it was any more."""
        if _read(self.files, to) != self.digest:
            raise Restless


def read_content(folder: Folder, keep: Callable[[str], bool]) -> Content:
    """Read the files of a folder of which `keep` says they belong to it, given their paths inside the folder.

    Raises ContractError if there is no version folder or a link leads out of the repository, Restless if the folder
    changed meanwhile.
    """
    versions = {
        int(part) for part, *more in (entry[0].split("/") for entry in folder.signature) if more and part.isdigit()
    }
    if not versions:
        raise ContractError(f"{folder.path} has no version folder, such as 1/; copy or export it again")
    version = max(versions)
    files = {}
    for name, *_ in folder.signature:
        top, slash, _rest = name.partition("/")
        if (not slash or top == str(version)) and keep(name):
            path = folder.path / name
            if not path.resolve().is_relative_to(folder.path.parent.resolve()):
                raise ContractError(f"{path} is a link out of the repository; copy the file itself")
            files[name] = path
    if CONFIG_FILE not in files:
        raise ContractError(f"{folder.path / CONFIG_FILE} is missing; every model folder has one")
    try:
        digest = _read(files, None)
    except FileNotFoundError as error:
        raise Restless from error
    except OSError as error:
        raise ContractError(f"{error.filename} cannot be read: {error.strerror}") from error
    if signature(folder.path) != folder.signature:
        raise Restless
    return Content(version, files, digest)


def _read(files: Mapping[str, Path], to: Path | None) -> str:
    """Return the digest of the files; with `to`, copy what was read into that folder."""
    whole = hashlib.sha256()
    for name, path in sorted(files.items()):
        own = hashlib.sha256()
        target = None
        if to is not None:
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            target = (to / name).open("wb")
        with path.open("rb") as source:
            try:
                while chunk := source.read(_CHUNK):
                    own.update(chunk)
                    if target is not None:
                        target.write(chunk)
            finally:
                if target is not None:
                    target.close()
        whole.update(f"{name}\0{own.hexdigest()}\n".encode())
    return whole.hexdigest()

"""The repository as its owners leave it: which model folders there are, and whether they are at rest.

A folder is at rest if nothing in it has changed for a moment. Whether a copy is whole is told by its content alone: a
copy that stalls is read as a damaged folder, and read again when it goes on. Nothing is ever written here.
"""

import hashlib
import os
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from espalier.contract import CONFIG_FILE, SEGMENT_NAME, TOKENIZER, task_of
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
    changed: float  # time.time() when its last change was seen

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
        self._changed: dict[str, float] = {}  # the same on the clock of the wall

    def look(self, known: Collection[str] = ()) -> dict[str, Folder | None]:
        """Return the folders by name: None for one that has gone, but not long enough ago to be sure.

        `known` names folders that were there when another process looked last. Raises ContractError if the repository
        is not there, or has no trunk: a volume that is not mounted must not look like the removal of every task.
        """
        found: dict[str, Folder | None] = {}
        try:
            paths = [path for path in sorted(self.path.iterdir()) if _is_model(path.name) and path.is_dir()]
        except OSError as error:
            raise ContractError(f"the repository {self.path} cannot be read: {error.strerror or error}") from error
        if not any(SEGMENT_NAME.fullmatch(path.name) for path in paths):
            raise ContractError(f"{self.path} holds no trunk segment (trunk_*); `espalier export` writes them")
        now = time.monotonic()
        signatures: dict[str, Signature | None] = {path.name: signature(path) for path in paths}
        if not self._seen:
            self._seen = {name: (None, now) for name in known if name not in signatures}
        signatures |= {name: None for name in self._seen if name not in signatures}
        for name, own in signatures.items():
            before, since = self._seen.get(name, (None, now))
            first = name not in self._seen
            if own != before or first:
                since = now
                self._changed[name] = time.time()
            self._seen[name] = own, since
            if own is None:
                if now - since < self.settled:
                    found[name] = None
                else:
                    del self._seen[name]
                continue
            newest = max((entry[3] for entry in own), default=time.time_ns()) / 1e9
            if first and time.time() - newest > LONG_AGO:
                since = now - self.settled
                self._seen[name] = own, since
            found[name] = Folder(self.path / name, own, now - since >= self.settled, self._changed[name])
        return found


def _is_model(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return name == TOKENIZER or task_of(name) is not None or SEGMENT_NAME.fullmatch(name) is not None


def signature(folder: Path) -> Signature:
    """Return what tells one content of a folder from another without reading it.

    Files that begin with a dot are part of it, folders are not: rsync writes to such files first, export to folders.
    """
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
        found += [Path(home, name) for name in names]
    return sorted(found)


def is_version(name: str) -> bool:
    """Tell whether a folder of this name is a version folder."""
    return name.isascii() and name.isdigit()


@dataclass(frozen=True)
class Content:
    """What of a folder counts: its top level, and its newest version folder."""

    version: int
    files: Mapping[str, Path]  # by path inside the folder
    digest: str  # of names and bytes

    def copy(self, to: Path) -> None:
        """Write the content into the empty folder `to`; raise Restless if it is not what it was any more."""
        try:
            same = _read(self.files, to) == self.digest
        except FileNotFoundError as error:
            raise Restless from error
        if not same:
            raise Restless


def read_content(folder: Folder, keep: Callable[[str], bool]) -> Content:
    """Read the files of a folder of which `keep` says they belong to it, given their paths inside the folder.

    Raises ContractError if there is no version folder or a link leads out of the repository, Restless if the folder
    changed meanwhile.
    """
    names = [name for name, *_ in folder.signature if not PurePosixPath(name).name.startswith(".")]
    versions = {int(top) for top in (PurePosixPath(name).parts[0] for name in names if "/" in name) if is_version(top)}
    if not versions:
        raise ContractError(f"{folder.name} has no version folder, such as 1/; copy or export it again")
    version = max(versions)
    files = {}
    for name in names:
        top, slash, _rest = name.partition("/")
        if (slash and top != str(version)) or not keep(name):
            continue
        path = folder.path / name
        try:
            name.encode()
        except UnicodeEncodeError as error:
            raise ContractError(f"{folder.name} holds a file whose name is not UTF-8; rename it") from error
        if not path.resolve().is_relative_to(folder.path.parent.resolve()):
            raise ContractError(f"{folder.name}/{name} is a link out of the repository; copy the file itself")
        if path.exists() and not path.is_file():
            raise ContractError(f"{folder.name}/{name} is no plain file; remove it")
        files[name] = path
    if CONFIG_FILE not in files:
        raise ContractError(f"{folder.name}/{CONFIG_FILE} is missing; every model folder has one")
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
        # Not to wait for a writer, should it have become a pipe meanwhile.
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as source:
            try:
                while chunk := source.read(_CHUNK):
                    own.update(chunk)
                    if target is not None:
                        target.write(chunk)
            finally:
                if target is not None:
                    target.flush()
                    os.fsync(target.fileno())
                    target.close()
        whole.update(f"{name}\0{own.hexdigest()}\n".encode())
    return whole.hexdigest()

"""Whole files or none: write to a temporary neighbour, then rename. And locks between processes.

A reader never sees half a file, and a full disk or a kill leaves the old content in place.
"""

import contextlib
import ctypes
import errno
import fcntl
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path


def digest(*parts: bytes | str) -> str:
    """Return the sha256 of `parts` as hex; each part is framed by its length, so that no two lists collide."""
    sha = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        sha.update(len(data).to_bytes(8, "little"))
        sha.update(data)
    return sha.hexdigest()


def write_whole(path: Path, content: bytes | str) -> None:
    """Write `content` to `path` so that `path` holds all of it or what it held before."""
    data = content.encode() if isinstance(content, str) else content
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def clear_unfinished(folder: Path, name: str) -> None:
    """Remove what killed writers of `name`, a glob pattern, left in `folder`; nobody else may write there now."""
    for prefix in (f".{name}.", f".{name}.old."):
        for left in folder.glob(f"{prefix}????????"):  # the names that tempfile gives
            if left.is_dir():
                shutil.rmtree(left, ignore_errors=True)
            else:
                left.unlink(missing_ok=True)


@contextlib.contextmanager
def whole_folder(target: Path, staging: Path | None = None) -> Iterator[Path]:
    """Yield an empty folder that takes the place of `target` if the block ends well, and vanishes if it does not.

    `staging` is where the folder grows: by default beside `target`. It must be on the same file system.
    """
    if target.exists() and not target.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(target))
    home = staging or target.parent
    home.mkdir(parents=True, exist_ok=True)
    growing = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=home))
    try:
        os.chmod(growing, 0o755)
        yield growing
        if target.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{target.name}.old.", dir=home))
            os.rename(target, old / target.name)  # a folder with content cannot be renamed over
            try:
                os.rename(growing, target)
            except BaseException:
                os.rename(old / target.name, target)
                old.rmdir()
                raise
            shutil.rmtree(old, ignore_errors=True)
        else:
            os.rename(growing, target)
    finally:
        shutil.rmtree(growing, ignore_errors=True)


def exchange(one: Path, other: Path) -> None:
    """Let two files or folders change places in one step (renameat2, RENAME_EXCHANGE).

    Raises OSError, with the reason as its text, also where the file system has no such step.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    at, swap = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    if libc.renameat2(at, os.fsencode(one), at, os.fsencode(other), swap) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), str(one))


@contextlib.contextmanager
def locked(file: Path, wait: bool = True) -> Iterator[bool]:
    """Hold the lock `file` for the block, against other processes; the system lets go of a killed process' locks.

    Yields True; without `wait`, False if another process holds it.
    """
    with file.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True

"""A small process that outlives its parent just long enough to end the tritonserver the parent started.

PR_SET_PDEATHSIG would end tritonserver alone: a server that is still loading, or is killed, leaves its Python stubs
running and their shared memory allocated. Run with the standard library alone, so that it costs next to nothing.
"""

import contextlib
import os
import shutil
import signal
import sys
import time
from pathlib import Path

SHARED_MEMORY = Path("/dev/shm")
_POLL_SECONDS = 0.5
_DYING_SECONDS = 20.0  # to give memory back; longer only where the system itself hangs


def kill_group(group: int) -> None:
    """Kill a process group, and wait until none of it lives: the killed take a moment to give their memory back."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)
    deadline = time.monotonic() + _DYING_SECONDS
    while living(group) and time.monotonic() < deadline:
        time.sleep(0.02)


def living(group: int) -> set[int]:
    """Return the processes of a group, but for the dead that nobody has asked about yet (see proc(5), stat)."""
    found = set()
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # gone meanwhile
            state, _, its_group, *_ = (process / "stat").read_text().rsplit(")", 1)[1].split()
            if int(its_group) == group and state not in "ZX":
                found.add(int(process.name))
    return found


def sweep(group: int, shm_prefix: str, folder: str) -> None:
    """Kill what is left of the process group, and remove its shared memory and its temporary folder."""
    kill_group(group)
    for region in SHARED_MEMORY.glob(f"{shm_prefix}*"):
        region.unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def main(parent: int, server: int, grace: float, shm_prefix: str, folder: str) -> None:
    """Wait for `parent` to die, then end `server`: SIGTERM, `grace` seconds, SIGKILL to its process group."""
    while os.getppid() == parent:
        time.sleep(_POLL_SECONDS)
    deadline = time.monotonic() + grace
    with contextlib.suppress(ProcessLookupError):
        os.kill(server, signal.SIGTERM)
        while time.monotonic() < deadline:
            os.kill(server, 0)
            time.sleep(0.1)
    sweep(server, shm_prefix, folder)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]), sys.argv[4], sys.argv[5])

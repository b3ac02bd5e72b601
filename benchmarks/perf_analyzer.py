"""NVIDIA's perf_analyzer, installed apart from the project: python -m benchmarks.perf_analyzer (make perf-analyzer)

The binary comes from the last tritonclient wheel that runs on glibc 2.35, whose Python pins would not go with ours, and
needs two libraries: one is on PyPI, the other a Debian package.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks import run
from espalier import show
from espalier.errors import ServerError
from espalier.files import whole_folder

HOME = Path("runs/perf_analyzer")
WHEELS = {
    "tritonclient==2.51.0": ("/data/bin/perf_analyzer",),
    "nvidia-cuda-runtime-cu12==12.9.79": ("/lib/libcudart.so.12",),
}
"""What is taken out of which wheel: files whose names end so."""
PACKAGE = "libb64-0d"
LIBRARY = "libb64.so.0d"


def install(home: Path = HOME) -> Path:
    """Install perf_analyzer into the folder `home`, if it is not there; return the binary.

    Raises ServerError if something cannot be fetched, or if the binary does not run here.
    """
    if (home / "perf_analyzer").is_file():
        return home / "perf_analyzer"
    home = home.resolve()
    with whole_folder(home) as folder, tempfile.TemporaryDirectory() as temporary:
        fetched = Path(temporary)
        _call([sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", temporary, *WHEELS], fetched)
        wanted = {ending for endings in WHEELS.values() for ending in endings}
        for wheel in fetched.glob("*.whl"):
            with zipfile.ZipFile(wheel) as archive:
                for name in archive.namelist():
                    if any(name.endswith(ending) for ending in wanted):
                        (folder / Path(name).name).write_bytes(archive.read(name))
        (folder / "perf_analyzer").chmod(0o755)
        if not _has_library():
            _call(["apt-get", "download", PACKAGE], fetched)
            for package in fetched.glob("*.deb"):
                _call(["dpkg-deb", "--extract", str(package), str(fetched / "unpacked")], fetched)
            for library in (fetched / "unpacked").rglob(f"{LIBRARY}*"):
                shutil.copy(library, folder / LIBRARY)
        _call([str(folder / "perf_analyzer"), "--version"], fetched, environment(folder))
    return home / "perf_analyzer"


def environment(folder: Path = HOME) -> dict[str, str]:
    """Return the environment in which the binary in `folder` finds its libraries."""
    paths = [str(folder.resolve()), *filter(None, [os.environ.get("LD_LIBRARY_PATH")])]
    return {**os.environ, "LD_LIBRARY_PATH": os.pathsep.join(paths)}


def _has_library() -> bool:
    listed = subprocess.run(["ldconfig", "-p"], capture_output=True, text=True, check=False)
    return LIBRARY in listed.stdout


def _call(command: Sequence[str], folder: Path, environment: dict[str, str] | None = None) -> None:
    try:
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    except OSError as error:
        raise ServerError(
            f"perf_analyzer cannot be installed: {command[0]}: {error.strerror}; {PACKAGE} may be installed by hand"
        ) from error
    if done.returncode != 0:
        said = (done.stderr.strip() or done.stdout.strip() or "no reason was given").splitlines()[-1]
        raise ServerError(f"perf_analyzer cannot be installed: {' '.join(command[:4])} failed: {said}")


def main() -> None:
    """Install it, and say where."""
    with show.waiting("installing perf_analyzer"):
        binary = install()
    show.output.print(f"{binary}, to be run with LD_LIBRARY_PATH={binary.parent}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    run(main)

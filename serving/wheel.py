"""The `nvidia-pytriton` wheel as an installation of Triton: binary, libraries, backend directory, environment.

The wheel carries a real tritonserver with the Python backend and one stub per Python version, but in places where
Triton does not look.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from espalier.errors import ServerError

_VERSION = f"{sys.version_info.major}.{sys.version_info.minor}"
_STUB = "triton_python_backend_stub"
_UTILS = "triton_python_backend_utils.py"
_OWN_BACKEND = Path(__file__).parent / "onnxruntime" / "model.py"


@dataclass(frozen=True)
class Wheel:
    """Where the parts of the installed wheel are."""

    binary: Path
    libraries: Path
    python_backend: Path
    stub: Path  # of the running Python version

    @classmethod
    def find(cls) -> Self:
        """Find the wheel of the running Python; raise ServerError if it or a part of it is missing."""
        spec = importlib.util.find_spec("pytriton")
        if spec is None or spec.origin is None:
            raise ServerError(
                "the package nvidia-pytriton, which carries tritonserver, is not installed; "
                "run `pip install 'espalier[serve]'`"
            )
        package = Path(spec.origin).parent
        home = package / "tritonserver"
        wheel = cls(
            binary=home / "bin" / "tritonserver",
            libraries=package.parent / "nvidia_pytriton.libs",
            python_backend=home / "backends" / "python",
            stub=home / "python_backend_stubs" / _VERSION / _STUB,
        )
        if not wheel.binary.is_file():
            raise ServerError(f"{wheel.binary} is missing; reinstall the package nvidia-pytriton")
        if not wheel.stub.is_file():
            have = ", ".join(sorted(folder.name for folder in wheel.stub.parent.parent.glob("*"))) or "none"
            raise ServerError(
                f"nvidia-pytriton has no stub for the running Python {_VERSION} (it has {have}); use one of those"
            )
        return wheel

    def lay_out(self, folder: Path) -> None:
        """Create `folder` as Triton's backend directory."""
        python, own = folder / "python", folder / "onnxruntime"
        python.mkdir(parents=True)
        own.mkdir()
        # Triton follows links, but refuses a backend library that is one.
        shutil.copy(self.python_backend / "libtriton_python.so", python)
        (python / _UTILS).symlink_to(self.python_backend / _UTILS)
        (python / _STUB).symlink_to(self.stub)
        (own / "model.py").symlink_to(_OWN_BACKEND)

    def environment(self) -> dict[str, str]:
        """Return the environment for tritonserver and its stubs: this process's, with what they need in front."""
        env = dict(os.environ)
        libraries = [self.libraries]
        shared = Path(sysconfig.get_config_var("LIBDIR") or "") / (sysconfig.get_config_var("INSTSONAME") or "")
        if shared.is_file() and shared.name.startswith("libpython"):
            libraries.append(shared.parent)
        _put_first(env, "LD_LIBRARY_PATH", *libraries)
        # The stub embeds Python and finds site-packages by the python3 that is first on PATH, so the link in the
        # virtual environment must not be resolved.
        _put_first(env, "PATH", Path(sys.executable).parent)
        _put_first(env, "PYTHONPATH", Path(__file__).parent.parent)
        env.pop("PYTHONHOME", None)
        # Every model is a process: a pool of idle BLAS threads in each would only take cores from ONNX Runtime.
        for pool in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
            env.setdefault(pool, "1")
        return env

    def check_stub(self, env: dict[str, str]) -> None:
        """Raise ServerError if the stub cannot start at all: Triton itself would only say that it went away."""
        tried = subprocess.run([self.stub], env=env, capture_output=True, text=True, check=False)
        if "error while loading shared libraries" in tried.stderr:
            library = tried.stderr.split("libraries:")[1].split(":")[0].strip()
            raise ServerError(
                f"Triton's Python stub needs {library}, which is not on this machine; install the shared library of "
                f"Python {_VERSION} (Debian and Ubuntu: libpython{_VERSION})"
            )


def _put_first(env: dict[str, str], key: str, *paths: Path) -> None:
    old = env.get(key)
    env[key] = os.pathsep.join([*map(str, paths), *([old] if old else [])])

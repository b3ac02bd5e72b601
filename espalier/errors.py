"""Every exception that Espalier raises on purpose.

    EspalierError
    ├── SpecError             a task spec is wrong
    ├── DataError             a data file or data set is wrong
    ├── CheckpointError       a base checkpoint cannot be used as a trunk
    ├── TrainingError         a training failed: its loss was not finite, or memory did not suffice
    ├── SearchError           a search cannot start or go on
    ├── BranchError           a branch file is missing, damaged or does not fit the request
    ├── ContractError         a model folder breaks the model-repository contract
    │   └── FingerprintError  it belongs to another trunk
    ├── ExportError           an export could not be made or is not equal to PyTorch
    ├── ServerError           the embedded Triton could not be started or died
    └── RequestError          a request was refused
        ├── UnknownTaskError  it names a task that is not deployed
        ├── UnavailableError  no server answered
        └── DeadlineError     the answer did not come in time

The message of each is one or two sentences that say what was wrong, where, and what to do. The command line
prints it without a traceback.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pydantic import ValidationError

__all__ = [
    "BranchError",
    "CheckpointError",
    "ContractError",
    "DataError",
    "DeadlineError",
    "EspalierError",
    "ExportError",
    "FingerprintError",
    "RequestError",
    "SearchError",
    "ServerError",
    "SpecError",
    "TrainingError",
    "UnavailableError",
    "UnknownTaskError",
    "WiringError",
    "first_problem",
    "one_line",
]


class EspalierError(Exception):
    """Base of every exception that Espalier raises on purpose."""


class SpecError(EspalierError):
    """A task spec is wrong."""


class DataError(EspalierError):
    """A data file or data set is wrong; the message names file and line."""


class CheckpointError(EspalierError):
    """A base checkpoint cannot be used as a trunk."""


class TrainingError(EspalierError):
    """A training failed: its loss was not finite, or memory did not suffice."""


class SearchError(EspalierError):
    """A search cannot start or go on: its workers, its cluster or its folder."""


class BranchError(EspalierError):
    """A branch file is missing, damaged or does not fit the request."""


class ContractError(EspalierError):
    """A model folder breaks the model-repository contract."""


class FingerprintError(ContractError):
    """A branch or head belongs to another trunk than the one at hand."""


class ExportError(EspalierError):
    """An export could not be made, or what was made is not equal to PyTorch."""


class ServerError(EspalierError):
    """The embedded Triton could not be started, or died."""


class WiringError(EspalierError):
    """A change of what is served could not be made; what was served before still is."""


class RequestError(EspalierError):
    """A request was refused, by the client's own checks or by the server."""


class UnknownTaskError(RequestError):
    """A request names a task that is not deployed; the message lists those that are."""


class UnavailableError(RequestError):
    """No server answered, also after the retries."""


class DeadlineError(RequestError):
    """The answer did not come within the deadline."""


def first_problem(error: "ValidationError") -> tuple[str, str]:
    """Return the first problem that pydantic found: the place, its parts joined by dots, and what is wrong there."""
    first = error.errors()[0]
    return ".".join(str(part) for part in first["loc"]), first["msg"]


def one_line(message: object) -> str:
    """Return what a message of others says, on one line."""
    text = " ".join(str(message or "").split()) or "no reason was given"
    return text.encode(errors="replace").decode()

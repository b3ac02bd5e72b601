"""What the transports have in common."""

import re
from typing import Any, Protocol

from clients.deadline import Deadline
from clients.protocol import Call, Infer, Reply
from espalier.contract import ENSEMBLE, TEXT
from espalier.errors import RequestError, UnavailableError, one_line

_PREFIX = re.compile(rf"^(\[request id: [^]]*\] |in ensemble '{ENSEMBLE}', )*")


class Transport(Protocol):
    """Make calls. Usable from several threads."""

    def send(self, call: Call, deadline: Deadline) -> Any:
        """Return the reply; raise UnavailableError, DeadlineError or, if the server refuses, RequestError."""

    def close(self) -> None:
        """Close the connections."""


class AsyncTransport(Protocol):
    """Make calls, all in one event loop."""

    async def send(self, call: Call, deadline: Deadline) -> Any:
        """Return the reply; raise UnavailableError, DeadlineError or, if the server refuses, RequestError."""

    async def close(self) -> None:
        """Close the connections."""


def infer_arguments(module: Any, call: Infer) -> dict[str, Any]:
    """Return the arguments of tritonclient's `infer`; `module` is tritonclient.grpc or tritonclient.http."""
    tensor = module.InferInput(TEXT, list(call.texts.shape), "BYTES")
    tensor.set_data_from_numpy(call.texts)
    outputs = [module.InferRequestedOutput(name) for name in call.outputs]
    return {"model_name": ENSEMBLE, "inputs": [tensor], "outputs": outputs}


def read_reply(call: Infer, result: Any, generation: str) -> Reply:
    """Return the requested outputs of tritonclient's `result`, and the ensemble's version that gave them."""
    reply = {name: result.as_numpy(name) for name in call.outputs}
    for name, array in reply.items():
        if array is None:
            raise RequestError(f"the server left out {name!r}, which was asked")
    return Reply(reply, generation)


def refused(message: str | None) -> RequestError:
    """Return the exception for the server's own sentence, without where in the server it was said."""
    return RequestError(_PREFIX.sub("", one_line(message)))


def unavailable(url: str, message: object) -> UnavailableError:
    """Return the exception for a server that does not answer."""
    return UnavailableError(f"{url} is unavailable: {one_line(message)}")

"""gRPC transports.

A request that is late is left to run: a gRPC deadline would cancel it on the server, and the embedded Triton 2.51
dies of a segmentation fault within a few dozen cancelled requests. For the same reason `close` waits a while.
"""

import asyncio
import concurrent.futures
from typing import Any

import tritonclient.grpc
import tritonclient.grpc.aio
from tritonclient.utils import InferenceServerException

from clients._transport import infer_arguments, read_reply, refused, unavailable
from clients.deadline import Deadline
from clients.protocol import Call, Infer, ReadConfig
from espalier.channel import CHANNEL_ARGUMENTS
from espalier.errors import RequestError

PATIENCE = 10.0  # seconds that `close` gives requests that are late


class GrpcTransport:
    """Calls over one gRPC channel."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._client = tritonclient.grpc.InferenceServerClient(url, channel_args=CHANNEL_ARGUMENTS)
        self._running: set[concurrent.futures.Future[Any]] = set()

    def send(self, call: Call, deadline: Deadline) -> Any:
        """Make `call` and return its reply."""
        timeout = deadline.remaining()
        try:
            if isinstance(call, ReadConfig):
                return self._client.get_model_config(call.model, client_timeout=timeout).config
            result = self._start(call).result(timeout)
        except TimeoutError as error:
            raise deadline.error() from error
        except InferenceServerException as error:
            raise _error(self._url, error, deadline) from error
        return read_reply(call, result, result.get_response().model_version)

    def _start(self, call: Infer) -> concurrent.futures.Future[Any]:
        future: concurrent.futures.Future[Any] = concurrent.futures.Future()
        self._running.add(future)
        future.add_done_callback(self._running.discard)

        def done(result: Any, error: InferenceServerException | None) -> None:
            if error is None:
                future.set_result(result)
            else:
                future.set_exception(error)

        self._client.async_infer(**infer_arguments(tritonclient.grpc, call), callback=done)
        return future

    def close(self) -> None:
        """Close the channel."""
        concurrent.futures.wait(set(self._running), PATIENCE)
        self._client.close()


class AsyncGrpcTransport:
    """Calls over one gRPC channel of the running event loop."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._client: Any = None  # a channel belongs to the loop in which it is made
        self._running: set[asyncio.Task[Any]] = set()

    async def send(self, call: Call, deadline: Deadline) -> Any:
        """Make `call` and return its reply."""
        if self._client is None:
            self._client = tritonclient.grpc.aio.InferenceServerClient(self._url, channel_args=CHANNEL_ARGUMENTS)
        timeout = deadline.remaining()
        try:
            if isinstance(call, ReadConfig):
                return (await self._client.get_model_config(call.model, client_timeout=timeout)).config
            async with asyncio.timeout(timeout):
                result = await asyncio.shield(self._start(call))
        except TimeoutError as error:
            raise deadline.error() from error
        except InferenceServerException as error:
            raise _error(self._url, error, deadline) from error
        return read_reply(call, result, result.get_response().model_version)

    def _start(self, call: Infer) -> asyncio.Task[Any]:
        task = asyncio.create_task(self._client.infer(**infer_arguments(tritonclient.grpc, call)))
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        return task

    async def close(self) -> None:
        """Close the channel."""
        if self._running:
            await asyncio.wait(set(self._running), timeout=PATIENCE)
        if self._client is not None:
            await self._client.close()


def _error(url: str, error: InferenceServerException, deadline: Deadline) -> RequestError:
    match error.status():
        case "StatusCode.UNAVAILABLE":
            return unavailable(url, error.message())
        case "StatusCode.DEADLINE_EXCEEDED":
            return deadline.error()
        case _:
            return refused(error.message())

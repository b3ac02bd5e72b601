"""HTTP transports. Tensors travel in binary."""

import asyncio
import threading
from typing import Any

import aiohttp
import tritonclient.http
import tritonclient.http.aio
from google.protobuf import json_format
from tritonclient.grpc import model_config_pb2 as pb
from tritonclient.utils import InferenceServerException

from clients._transport import infer_arguments, read_reply, refused, unavailable
from clients.deadline import Deadline
from clients.protocol import Call, ReadConfig


class AsyncHttpTransport:
    """Calls over a pool of connections of the running event loop."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._client: Any = None  # a session belongs to the loop in which it is made

    async def send(self, call: Call, deadline: Deadline) -> Any:
        """Make `call` and return its reply."""
        if self._client is None:
            # The deadline alone limits the time, so that it may also be longer than tritonclient's minute.
            self._client = tritonclient.http.aio.InferenceServerClient(self._url, conn_timeout=None)
        try:
            async with asyncio.timeout(deadline.remaining()):
                if isinstance(call, ReadConfig):
                    config = await self._client.get_model_config(call.model)
                    return json_format.ParseDict(config, pb.ModelConfig(), ignore_unknown_fields=True)
                result = await self._client.infer(**infer_arguments(tritonclient.http, call))
        except TimeoutError as error:
            raise deadline.error() from error
        except aiohttp.ClientConnectorError as error:
            raise unavailable(self._url, error.os_error) from error
        except (aiohttp.ClientConnectionError, aiohttp.ClientPayloadError) as error:
            raise unavailable(self._url, error) from error
        except aiohttp.ClientError as error:
            raise refused(f"{self._url}: {error}") from error
        except InferenceServerException as error:
            if error.status() == "503":
                raise unavailable(self._url, error.message()) from error
            raise refused(error.message()) from error
        return read_reply(call, result, result.get_response()["model_version"])

    async def close(self) -> None:
        """Close the connections."""
        if self._client is not None:
            await self._client.close()


class HttpTransport:
    """The same calls from any thread.

    tritonclient's own blocking client is bound to the thread that made it and limits single reads and writes instead
    of the whole call; so this one runs the asynchronous transport in an event loop of its own.
    """

    def __init__(self, url: str) -> None:
        self._transport = AsyncHttpTransport(url)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="espalier-http", daemon=True)
        self._thread.start()

    def send(self, call: Call, deadline: Deadline) -> Any:
        """Make `call` and return its reply."""
        future = asyncio.run_coroutine_threadsafe(self._transport.send(call, deadline), self._loop)
        try:
            return future.result()
        finally:
            future.cancel()  # matters if the wait was interrupted

    def close(self) -> None:
        """Close the connections and end the loop."""
        asyncio.run_coroutine_threadsafe(self._transport.close(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

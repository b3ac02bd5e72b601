"""The clients: one blocking, one asynchronous, with the same methods."""

from collections.abc import Sequence
from types import TracebackType
from typing import Any, Literal, Self, TypeVar

from tenacity import (
    AsyncRetrying,
    Retrying,
    retry_if_exception_type,
    stop_after_attempt,
    stop_before_delay,
    wait_random_exponential,
)

from clients._transport import AsyncTransport, Transport
from clients.deadline import Deadline
from clients.protocol import Call, Conversation, Item, Program
from clients.results import Answers
from espalier.contract import HeadInfo
from espalier.errors import RequestError, UnavailableError

WireProtocol = Literal["grpc", "http"]

DEFAULT_URLS: dict[str, str] = {"grpc": "localhost:8001", "http": "localhost:8000"}
ATTEMPTS = 6
LONGEST = 86_400

T = TypeVar("T")


class _Settings:
    """What both clients keep: where the server is, how long to wait, what is known of it."""

    def __init__(self, url: str | None, protocol: WireProtocol, timeout: float) -> None:
        if protocol not in DEFAULT_URLS:
            raise RequestError(f"protocol must be 'grpc' or 'http', not {protocol!r}")
        self.url = DEFAULT_URLS[protocol] if url is None else url
        if "://" in self.url or ":" not in self.url:
            raise RequestError(f"url must be host:port, not {self.url!r}")
        self.timeout = _checked(timeout)
        self.conversation = Conversation()
        self.closed = False

    def deadline(self, timeout: float | None) -> Deadline:
        """Start the clock of a request."""
        if self.closed:
            raise RequestError("the client is closed")
        return Deadline(self.url, self.timeout if timeout is None else _checked(timeout))


def _checked(timeout: float) -> float:
    if not 0 < timeout <= LONGEST:
        raise RequestError(f"timeout must be more than 0 and at most {LONGEST} seconds, not {timeout!r}")
    return timeout


def _retries(deadline: Deadline) -> dict[str, Any]:
    # An answer changes nothing on the server, so asking again is always safe; only unavailability may pass by itself.
    return {
        "retry": retry_if_exception_type(UnavailableError),
        "stop": stop_after_attempt(ATTEMPTS) | stop_before_delay(deadline.remaining()),
        "wait": wait_random_exponential(multiplier=0.1, max=2.0),
        "reraise": True,
    }


class Client:
    """Ask a running server; usable from several threads.

    `url` is host:port (default: this machine, Triton's own port), `timeout` the default number of seconds that a
    request may take in all. Every method raises RequestError with one sentence: UnknownTaskError, UnavailableError
    or DeadlineError where that is what happened.

        with Client() as client:
            client.ask("play some jazz", ["intent"])["intent"]
    """

    def __init__(self, url: str | None = None, protocol: WireProtocol = "grpc", timeout: float = 60.0) -> None:
        self._settings = _Settings(url, protocol, timeout)
        self._transport = _transport(self._settings.url, protocol)

    @property
    def host(self) -> str:
        """The server's host."""
        return self._settings.url.rpartition(":")[0]

    def ask(self, text: str, tasks: Sequence[str] | None = None, *, timeout: float | None = None) -> Answers:
        """Answer `tasks` (default: all but candidates) about one text."""
        return self.ask_batch([text], tasks, timeout=timeout)[0]

    def ask_pair(self, a: str, b: str, tasks: Sequence[str] | None = None, *, timeout: float | None = None) -> Answers:
        """Answer `tasks` about two texts together. Tasks trained on single texts answer too, for what it is worth."""
        return self.ask_batch([(a, b)], tasks, timeout=timeout)[0]

    def ask_batch(
        self, items: Sequence[Item], tasks: Sequence[str] | None = None, *, timeout: float | None = None
    ) -> list[Answers]:
        """Answer `tasks` about each of `items`, texts and pairs in any mix and number, in their order."""
        return self._run(self._settings.conversation.ask_batch(items, tasks), timeout)

    def tasks(self, *, timeout: float | None = None) -> dict[str, HeadInfo]:
        """Return what is deployed now, by task name."""
        return self._run(self._settings.conversation.tasks(), timeout)

    def close(self) -> None:
        """Close the connections; closing twice is harmless."""
        if not self._settings.closed:
            self._settings.closed = True
            self._transport.close()

    def __enter__(self) -> Self:
        """Return the client itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close the client."""
        self.close()

    def _run(self, program: Program[T], timeout: float | None) -> T:
        deadline = self._settings.deadline(timeout)
        try:
            call = next(program)
            while True:
                try:
                    reply = self._send(call, deadline)
                except RequestError as error:
                    call = program.throw(error)
                else:
                    call = program.send(reply)
        except StopIteration as stop:
            result: T = stop.value
            return result

    def _send(self, call: Call, deadline: Deadline) -> Any:
        return Retrying(**_retries(deadline))(self._transport.send, call, deadline)


class AsyncClient:
    """Ask a running server from one event loop: `Client` with `await`.

    async with AsyncClient() as client:
        (await client.ask("play some jazz", ["intent"]))["intent"]
    """

    def __init__(self, url: str | None = None, protocol: WireProtocol = "grpc", timeout: float = 60.0) -> None:
        self._settings = _Settings(url, protocol, timeout)
        self._transport = _async_transport(self._settings.url, protocol)

    async def ask(self, text: str, tasks: Sequence[str] | None = None, *, timeout: float | None = None) -> Answers:
        """Answer `tasks` (default: all but candidates) about one text."""
        return (await self.ask_batch([text], tasks, timeout=timeout))[0]

    async def ask_pair(
        self, a: str, b: str, tasks: Sequence[str] | None = None, *, timeout: float | None = None
    ) -> Answers:
        """Answer `tasks` about two texts together. Tasks trained on single texts answer too, for what it is worth."""
        return (await self.ask_batch([(a, b)], tasks, timeout=timeout))[0]

    async def ask_batch(
        self, items: Sequence[Item], tasks: Sequence[str] | None = None, *, timeout: float | None = None
    ) -> list[Answers]:
        """Answer `tasks` about each of `items`, texts and pairs in any mix and number, in their order."""
        return await self._run(self._settings.conversation.ask_batch(items, tasks), timeout)

    async def tasks(self, *, timeout: float | None = None) -> dict[str, HeadInfo]:
        """Return what is deployed now, by task name."""
        return await self._run(self._settings.conversation.tasks(), timeout)

    async def close(self) -> None:
        """Close the connections; closing twice is harmless."""
        if not self._settings.closed:
            self._settings.closed = True
            await self._transport.close()

    async def __aenter__(self) -> Self:
        """Return the client itself."""
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close the client."""
        await self.close()

    async def _run(self, program: Program[T], timeout: float | None) -> T:
        deadline = self._settings.deadline(timeout)
        try:
            call = next(program)
            while True:
                try:
                    reply = await self._send(call, deadline)
                except RequestError as error:
                    call = program.throw(error)
                else:
                    call = program.send(reply)
        except StopIteration as stop:
            result: T = stop.value
            return result

    async def _send(self, call: Call, deadline: Deadline) -> Any:
        return await AsyncRetrying(**_retries(deadline))(self._transport.send, call, deadline)


# Each is imported when it is needed: HTTP brings a second event loop library that gRPC has no use for.


def _transport(url: str, protocol: WireProtocol) -> Transport:
    if protocol == "grpc":
        from clients._grpc import GrpcTransport

        return GrpcTransport(url)
    from clients._http import HttpTransport

    return HttpTransport(url)


def _async_transport(url: str, protocol: WireProtocol) -> AsyncTransport:
    if protocol == "grpc":
        from clients._grpc import AsyncGrpcTransport

        return AsyncGrpcTransport(url)
    from clients._http import AsyncHttpTransport

    return AsyncHttpTransport(url)

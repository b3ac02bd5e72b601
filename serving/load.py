"""Load on a server that takes text: closed-loop for throughput, open-loop for latency.

One text per request, as applications send them; the server makes the batches. Every way that is compared is asked by
this same client, over gRPC.
"""

import asyncio
import contextlib
import itertools
import math
import random
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from statistics import linear_regression
from typing import Protocol

import numpy as np
import tritonclient.grpc as triton
from hdrh.histogram import HdrHistogram
from tritonclient.grpc import aio
from tritonclient.utils import InferenceServerException

from espalier.channel import CHANNEL_ARGUMENTS
from espalier.contract import TEXT
from espalier.errors import ServerError, one_line

LONGEST = 600_000_000  # µs, the most that a histogram holds
OUTSTANDING = 512
"""Requests under way at which an open-loop load is given up: the server does not keep up."""
FEWEST = 10
"""Texts in a window below which nothing is told by its P99."""


def _histogram() -> HdrHistogram:
    return HdrHistogram(1, LONGEST, 3)


class OverloadError(ServerError):
    """The server does not keep up with an open-loop load."""


class Asker(Protocol):
    """Sends one text at a time."""

    async def ask(self, text: str) -> None:
        """Ask about a text; raise an exception if it is not answered in full."""

    async def close(self) -> None:
        """Close the connection."""


class Server(Protocol):
    """What is put under load."""

    def connect(self) -> Asker:
        """Return a connection, within a running event loop."""


@dataclass(frozen=True)
class Asked:
    """An ensemble on a Triton, and those of its outputs that are wanted."""

    url: str  # host:port of gRPC
    model: str
    outputs: tuple[str, ...]

    def connect(self) -> Asker:
        """Return a connection."""
        return TritonAsker(self)


@dataclass
class Window:
    """What a stretch of load came to."""

    seconds: float = 0.0  # in which so many texts are answered, on average
    texts: int = 0
    latency: HdrHistogram = field(default_factory=_histogram)  # µs

    @property
    def rate(self) -> float:
        """Texts per second."""
        return self.texts / self.seconds

    def percentile(self, percent: float) -> float:
        """Return a percentile of the latency, in seconds."""
        return float(self.latency.get_value_at_percentile(percent)) / 1e6

    def add(self, seconds: float) -> None:
        """Count an answer."""
        self.texts += 1
        self.latency.record_value(min(LONGEST, max(1, round(seconds * 1e6))))


class TritonAsker:
    """Sends one text at a time to an ensemble. Takes as little as it can of the cores that the server runs on."""

    def __init__(self, asked: Asked) -> None:
        self._asked = asked
        self._client = aio.InferenceServerClient(asked.url, channel_args=CHANNEL_ARGUMENTS)
        self._outputs = [triton.InferRequestedOutput(name) for name in asked.outputs]
        self._inputs: dict[str, triton.InferInput] = {}  # by text: a load asks the same ones again and again

    async def ask(self, text: str) -> None:
        """Ask about a text; raise ServerError if it is not answered in full."""
        if text not in self._inputs:
            tensor = self._inputs[text] = triton.InferInput(TEXT, [1, 1], "BYTES")
            tensor.set_data_from_numpy(np.array([[text.encode()]], np.object_))
        try:
            result = await self._client.infer(self._asked.model, [self._inputs[text]], outputs=self._outputs)
        except InferenceServerException as error:
            raise ServerError(f"{self._asked.model} gave no answer under load: {one_line(error)}") from error
        left_out = set(self._asked.outputs) - {output.name for output in result.get_response().outputs}
        if left_out:
            raise ServerError(f"{self._asked.model} left out {min(left_out)!r}, which was asked")

    async def close(self) -> None:
        """Close the connection."""
        await self._client.close()


@contextlib.asynccontextmanager
async def _asker(asked: Server) -> AsyncIterator[Asker]:
    asker = asked.connect()
    try:
        yield asker
    finally:
        await asker.close()


def closed_loop(asked: Server, texts: Sequence[str], concurrency: int, seconds: float) -> Window:
    """Keep `concurrency` requests under way; count those answered within `seconds`, once as many were to warm up.

    So many are under way when the count begins as when it ends: a server whose answers take long loses nothing by it.
    Answers come by whole batches, and between the last batch and the end of the count there are half as many missing
    as a batch has: `rate` is therefore the slope of a line through the moments of the answers, if they span more than
    half of the time.
    """
    return asyncio.run(_closed_loop(asked, texts, concurrency, seconds))


async def _closed_loop(asked: Server, texts: Sequence[str], concurrency: int, seconds: float) -> Window:
    window, source = Window(), itertools.cycle(texts)
    moments: list[float] = []
    async with _asker(asked) as asker:
        warm, began = 0, math.inf

        async def work() -> None:
            nonlocal warm, began
            while (start := time.perf_counter()) < began + seconds:
                await asker.ask(next(source))
                end = time.perf_counter()
                if warm < concurrency:
                    warm += 1
                    began = end if warm == concurrency else math.inf
                elif end < began + seconds:  # the last ones are answered while the load goes down
                    window.add(end - start)
                    moments.append(end)

        await asyncio.gather(*(work() for _ in range(concurrency)))
    window.seconds = seconds
    if moments and moments[-1] - moments[0] > seconds / 2:
        window.seconds = window.texts / linear_regression(moments, range(window.texts)).slope
    return _answered(window)


def highest_rate(
    asked: Server, texts: Sequence[str], bound: float, top: float, seconds: float, steps: int = 5
) -> tuple[float, Window | None]:
    """Return the highest rate of random arrivals at which P99 stays within `bound` seconds, and what it was like.

    Looks between 0 and `top` texts per second by halves, in `steps` windows of `seconds`, but at no rate that sends
    fewer than FEWEST texts in a window: they have no P99. 0 and None if no rate does.
    """
    low, high = 0.0, top
    best: Window | None = None
    for step in range(steps):
        rate = (low + high) / 2
        if rate * seconds < FEWEST:
            break
        try:
            window = open_loop(asked, texts, rate, seconds, seed=step)
        except OverloadError:
            high = rate
            continue
        if window.percentile(99) <= bound:
            low, best = rate, window
        else:
            high = rate
    return low, best


def open_loop(asked: Server, texts: Sequence[str], rate: float, seconds: float, seed: int = 0) -> Window:
    """Send texts at random moments, `rate` a second on average (a Poisson process), whether answers came or not.

    Latency counts from the moment at which a text was to be sent, not from that at which it was: a server that stalls
    makes those that wait behind late as well. Raises OverloadError if the server does not keep up, ServerError if it
    fails.
    """
    try:
        return asyncio.run(_open_loop(asked, texts, rate, seconds, seed))
    except ExceptionGroup as group:  # of the task group, all for one reason
        raise group.exceptions[0] from None


async def _open_loop(asked: Server, texts: Sequence[str], rate: float, seconds: float, seed: int) -> Window:
    window, source, chance = Window(), itertools.cycle(texts), random.Random(seed)
    async with _asker(asked) as asker, asyncio.TaskGroup() as group:
        await asker.ask(next(source))
        began = due = time.perf_counter()
        sent, overrun = 0, False

        async def send(intended: float) -> None:
            await asker.ask(next(source))
            window.seconds = time.perf_counter() - began
            window.add(time.perf_counter() - intended)

        while (due := due + chance.expovariate(rate)) - began < seconds:
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            if sent - window.texts >= OUTSTANDING:
                overrun = True
                break
            group.create_task(send(due))
            sent += 1
    if overrun:  # told once all is answered: to cancel a request ends the embedded Triton
        raise OverloadError(f"{OUTSTANDING} requests wait: the server does not keep up with {rate:g} texts/s")
    return _answered(window)


def _answered(window: Window) -> Window:
    """Return the window; raise ServerError if nothing was answered in it: there is nothing to tell by it."""
    if window.texts == 0:
        raise ServerError("no text was answered within a window of load; make windows longer (--seconds)")
    return window

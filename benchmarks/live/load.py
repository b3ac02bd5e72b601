"""A constant load of concurrent requests over both protocols, in a process of its own, that judges every answer.

Each worker asks one text at a time: in turn the untouched tasks alone, all tasks, and one task that may come and go. An
answer of an untouched task that differs in a single bit from the first one to the same text is wrong.
"""

import asyncio
import itertools
import json
import multiprocessing
import time
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

from clients import AsyncClient
from espalier.errors import RequestError, UnknownTaskError, WiringError

TEXTS = (
    "what is the weather like in Oslo tomorrow", "play some jazz", "wake me at half past seven",
    "is there a train from Basel to Milan on the first of May, and where does one change", "lights off", "",
    "how do I reset the password of an account that I no longer have the address for", "book a table for four",
)  # fmt: skip
WORKERS = 4  # per protocol
PROBLEMS = 10  # sentences that are kept


@dataclass
class Counts:
    """What the load saw."""

    requests: int = 0
    failed: int = 0  # requests for untouched or for all tasks that were not answered
    wrong: int = 0  # answers of untouched tasks with another bit
    of_touched: int = 0  # requests for a task that comes and goes
    absent: int = 0  # of these: the task was not there
    problems: list[str] = field(default_factory=list)

    def note(self, problem: str) -> None:
        """Keep a problem, if there are not many yet."""
        if len(self.problems) < PROBLEMS:
            self.problems.append(problem)


class Load:
    """The load as a process: `start`, `counts` at any time, `stop`."""

    def __init__(self, grpc: str, http: str, untouched: list[str], touched: list[str]) -> None:
        self._near, far = multiprocessing.Pipe()
        arguments = (far, {"grpc": grpc, "http": http}, untouched, touched)
        self._process = multiprocessing.get_context("spawn").Process(target=_main, args=arguments, daemon=True)
        self._process.start()

    def counts(self) -> Counts:
        """Return what the load saw until now."""
        self._near.send("counts")
        return Counts(**json.loads(self._near.recv()))

    def stop(self) -> Counts:
        """End the load once every request is answered."""
        self._near.send("stop")
        found = Counts(**json.loads(self._near.recv()))
        self._process.join(60)
        return found


def _main(pipe: Connection, urls: dict[str, str], untouched: list[str], touched: list[str]) -> None:
    asyncio.run(_run(pipe, urls, untouched, touched))


async def _run(pipe: Connection, urls: dict[str, str], untouched: list[str], touched: list[str]) -> None:
    counts, seen, stop = Counts(), dict[tuple[str, str], Any](), asyncio.Event()

    def judge(text: str, answers: dict[str, Any]) -> None:
        for task in untouched:
            first = seen.setdefault((task, text), answers[task])
            if answers[task] != first:
                counts.wrong += 1
                counts.note(f"{task} about {text!r}: {answers[task]} instead of {first}")

    async def work(client: AsyncClient, offset: int) -> None:
        for turn in itertools.count(offset):
            if stop.is_set():
                return
            text = TEXTS[turn % len(TEXTS)]
            kind = turn % 3
            counts.requests += 1
            try:
                if kind == 0:
                    judge(text, (await client.ask(text, untouched)).to_dict())
                elif kind == 1:
                    judge(text, (await client.ask(text)).to_dict())
                else:
                    counts.of_touched += 1
                    await client.ask(text, [touched[turn // 3 % len(touched)]])
            except UnknownTaskError as error:
                if kind == 2:
                    counts.absent += 1
                else:
                    counts.failed += 1
                    counts.note(str(error))
            except RequestError as error:
                counts.failed += 1
                counts.note(str(error))

    clients = [AsyncClient(urls[protocol], protocol, timeout=120.0) for protocol in ("grpc", "http")]
    workers = [
        asyncio.create_task(work(client, number * 7 + place * 5))
        for place, client in enumerate(clients)
        for number in range(WORKERS)
    ]
    while not stop.is_set():
        if await asyncio.to_thread(pipe.poll, 0.1):
            if pipe.recv() == "stop":
                stop.set()
                await asyncio.gather(*workers)
            pipe.send(json.dumps(counts.__dict__))
    for client in clients:
        await client.close()


def wait_until(what: Any, seconds: float = 300.0, every: float = 0.02) -> float:
    """Return the seconds until `what` returned something true; errors of requests count as false."""
    began = time.monotonic()
    while time.monotonic() - began < seconds:
        try:
            if what():
                return time.monotonic() - began
        except RequestError:
            pass
        time.sleep(every)
    raise WiringError(f"what was waited for did not come within {seconds:g} s; see logs/live-check-wiring.log")

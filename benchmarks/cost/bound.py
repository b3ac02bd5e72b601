"""The bound: the graphs that the server runs, in one process, on the same texts in ideal batches, with no server.

Arrangements of several batch sizes are tried, and the best one counts: batch after batch on all cores; and a thread per
core, each with sessions of one thread and batches of its own.
"""

import itertools
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np
import onnxruntime
from tokenizers import Tokenizer

from espalier.configs import head_infos, read_config
from espalier.contract import ENSEMBLE, MODEL_FILE, TrunkInfo
from espalier.scheduling import available_cores
from export.session import session, states

BATCHES = (8, 16, 32)
TURNS = 3
"""Windows of each arrangement before one is chosen: two windows of one differ by more than the arrangements do."""


class Models:
    """The segments and heads of one of our repositories, each in a session of `threads` threads."""

    def __init__(self, repository: Path, tasks: Sequence[str], threads: int) -> None:
        def load(name: str) -> onnxruntime.InferenceSession:
            return session(repository / name / "1" / MODEL_FILE, threads)

        steps = [step.model_name for step in read_config(repository / ENSEMBLE).ensemble_scheduling.step]
        configs = {name: read_config(repository / name) for name in steps}
        ends = {name: TrunkInfo.read(config).stop for name, config in configs.items() if name.startswith("trunk_")}
        taps = dict[str, int]()  # of the models that answer one of the tasks; a segment may hold heads, too
        for name, config in configs.items():
            held = head_infos(config) if {"task", "heads"} & set(config.parameters) else {}
            own = {head.tap for head in held.values() if head.task in tasks}
            if own:
                taps[name] = own.pop()
        self._heads = [(tap, load(name)) for name, tap in taps.items() if name not in ends]
        deepest = max(taps.values())
        self._trunk = {end: load(name) for name, end in sorted(ends.items(), key=lambda own: own[1]) if end <= deepest}

    def run(self, ids: Sequence[Sequence[int]]) -> None:
        """Answer a batch of texts, given as token ids."""
        lengths = np.array([[len(row)] for row in ids], np.int32)
        flat = np.concatenate([np.array(row, np.int64) for row in ids])
        reached = states(self._trunk.values(), flat, np.zeros_like(flat), lengths)
        for stop, feed in zip(self._trunk, reached, strict=True):
            for tap, head in self._heads:
                if tap == stop:
                    head.run(None, feed)


@dataclass(frozen=True)
class Arrangement:
    """How the graphs are run: streams that take batches of `batch` texts, with sessions of `threads` threads."""

    streams: int
    threads: int
    batch: int


def best(repository: Path, tokenizer: str, texts: Sequence[str], tasks: Sequence[str], seconds: float) -> Arrangement:
    """Return the arrangement that is fastest, by the medians of TURNS windows of `seconds` each, in turn."""
    cores = available_cores()
    tries = [Arrangement(*shape, batch) for shape in {(1, cores), (cores, 1)} for batch in BATCHES]
    rates: dict[Arrangement, list[float]] = {each: [] for each in tries}
    for _ in range(TURNS):
        for each, own in rates.items():
            own.append(rate(each, repository, tokenizer, texts, tasks, seconds))
    return max(rates, key=lambda each: median(rates[each]))


def rate(
    arrangement: Arrangement, repository: Path, tokenizer: str, texts: Sequence[str], tasks: Sequence[str],
    seconds: float,
) -> float:  # fmt: skip
    """Return the texts per second of an arrangement, by one window of `seconds`."""
    rust = Tokenizer.from_str(tokenizer)
    ids = [encoding.ids for encoding in rust.encode_batch(list(texts))]
    size = arrangement.batch
    batches = [ids[at : at + size] for at in range(0, len(ids) - size + 1, size)]
    streams = [Models(repository, tasks, arrangement.threads) for _ in range(arrangement.streams)]
    _rate(streams, batches, seconds / 2)  # warms up, as the servers are
    return _rate(streams, batches, seconds)


def _rate(streams: Sequence[Models], batches: Sequence[Sequence[Sequence[int]]], seconds: float) -> float:
    """Let every stream take batches in turn for `seconds`; return texts per second."""
    source: Iterator[Sequence[Sequence[int]]] = itertools.cycle(batches)
    lock = threading.Lock()
    rates: list[float] = []
    began = time.perf_counter()

    def work(models: Models) -> None:
        done = 0
        while (elapsed := time.perf_counter() - began) < seconds:
            with lock:
                batch = next(source)
            models.run(batch)
            done += len(batch)
        rates.append(done / elapsed)  # until its own end: the others may still be at their last batch

    threads = [threading.Thread(target=work, args=[models]) for models in streams]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(rates)

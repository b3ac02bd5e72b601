"""`espalier bench`: builds what it compares, serves it on one machine, asks one way and the other in turn.

Writes performance.json, which `benchmarks.cost.report` puts into words and pictures. What was built, and what was
measured before an interruption, stays under runs/bench.
"""

import contextlib
import json
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from statistics import mean, median
from typing import Any, Literal

import onnxruntime
from tokenizers import Tokenizer

from benchmarks import perf_analyzer, summary
from benchmarks.cost import bound, perf, python_server, ways
from benchmarks.cost.build import Built, build
from benchmarks.cost.checkpoint import SIZES, Size
from benchmarks.cost.footprint import memory, statistics, steps
from benchmarks.cost.report import write_report
from benchmarks.cost.stages import Stages
from espalier import show, texts
from espalier.contract import ENSEMBLE
from espalier.errors import ServerError
from espalier.files import write_whole
from espalier.scheduling import Scheduling, available_cores
from serving.load import Asked, OverloadError, Server, Window, closed_loop, highest_rate, open_loop
from serving.triton import TritonServer

TEXTS = 256
DEEP = ways.TASKS[1:2]
ALONE = (ways.SHALLOW,)
UNLOADED = 20.0
"""Seconds of one request after the other."""
OFFERED = 60.0
"""Seconds of random requests at an offered load: a P99 of fewer texts is that of a handful of them."""
OFFERED_TEXTS = 100
"""Texts of such a window at least, on average; it is longer for it."""
NEAR, TURNS = ("bound", "two", "ours_fixed"), 3
"""What differs least from ours, and its windows in a round; the others have one."""
SLOW = 3.0
"""How much longer the windows of today's way are: it answers a tenth of the texts."""
LOADS = (0.25, 0.5, 0.75, 0.9)
"""Offered load, of a way's own highest rate."""
BOUND = 1.0
"""Seconds of P99 within which the highest rate is looked for."""
WORKERS = (1, 2)
"""Processes of the Python server that are tried."""
PERF = ("ours", "today")
"""Ways that perf_analyzer asks."""
PERF_RATES = (0.25, 0.5, 0.75)
"""Random arrivals, of a way's own highest rate."""
ABLATIONS = ("paper", "folding", "segments", "ragged", "apart", "ours")
ASKED = {"all": ways.TASKS, "deep": DEEP, "shallow": ALONE}
LOGS = Path("logs")


def bench(size: Literal["bert-base", "minilm"], seconds: float, rounds: int, home: Path, report: Path) -> None:
    """Measure, print, write."""
    chosen = SIZES[size]
    with show.waiting("building what is compared") as status:
        built = build(chosen, home, lambda what: status.update(f"building: {what}"))
    command = f"espalier bench --size {size} --seconds {seconds:g} --rounds {rounds}"
    stages = Stages(
        home / f"{chosen.name}.json",
        f"{command}, {available_cores()} cores, ONNX Runtime {onnxruntime.__version__}, {built.digest}",
    )
    found = _Bench(built, chosen, seconds, rounds, stages, report).run()
    found |= {
        "size": chosen.name, "trunk_layers": chosen.trunk, "shallow_layers": chosen.shallow,
        "baseline_level": built.level, "concurrency": ways.CONCURRENCY, "cores": available_cores(),
        "versions": {"onnxruntime": onnxruntime.__version__, "python": platform.python_version()}, "command": command,
        "p99_bound": BOUND, "turns": TURNS, "offered_seconds": OFFERED,
    }  # fmt: skip
    stem = "performance" if size == "bert-base" else f"performance-{size}"
    write_whole(report / f"{stem}.json", json.dumps(found, indent=2) + "\n")
    write_report(found, report, stem)
    stages.finish()
    show.output.print_json(data=found["ratios"])


class _Bench:
    def __init__(self, built: Built, size: Size, seconds: float, rounds: int, stages: Stages, report: Path) -> None:
        self._built = built
        self._size = size
        self._seconds = seconds
        self._rounds = rounds
        self._stages = stages
        self._report = report
        self._mixed = texts.mixed(built.tokenizer, TEXTS)

    def run(self) -> dict[str, Any]:
        """Return all that was found, as JSON takes it."""
        get = self._stages.get
        found: dict[str, Any] = {"scheduling": {}}
        for way in ("ours", "ours_int8", "today", "paper"):
            found["scheduling"][way] = get(f"scheduling of {way}", partial(self._scheduling, way))
        # The parts alone are scheduled as what they are a part of.
        same = {"folding": "paper", "segments": "paper", "ragged": "ours", "apart": "ours", "two": "ours"}
        for way, repository in self._built.repositories.items():
            ways.tunable(repository).write(Scheduling.model_validate(found["scheduling"][same.get(way, way)]))
        found["workers"] = get("workers of the Python server", self._workers)
        found["bound"] = get("arrangement of the bound", self._arrangement)
        rates = get("rounds", lambda: self._turns(found["workers"], bound.Arrangement(**found["bound"])))
        found["texts_per_second"] = {name: summary(own, 2) for name, own in rates["rates"].items()}
        found["ratios"] = _ratios(rates["relative"], rates["lengths"], rates["tails"])
        found["tokens_per_text"] = {name: round(length, 2) for name, length in rates["lengths"].items()}
        found["latency_seconds"] = rates["latency"]
        found["steps"], found["footprint"] = rates["steps"], rates["footprint"]
        found["ablations"] = get("ablations", self._ablations)
        found["by_load"] = {}
        for way in ("ours", "ours_int8", "today"):
            top = found["texts_per_second"][way]["median"]
            found["by_load"][way] = get(f"latency of {way}", partial(self._by_load, way, top))
        found["perf_analyzer"] = get("perf_analyzer", lambda: self._perf_analyzer(found["texts_per_second"]))
        return found

    def _say(self, line: str) -> None:
        show.messages.print(line, highlight=False, soft_wrap=True)

    @contextlib.contextmanager
    def _served(self, way: str, footprint: dict[str, dict[str, float]] | None = None) -> Iterator[TritonServer]:
        """Serve, warmed up; note in `footprint` how long the start took."""
        began = time.perf_counter()
        with ways.served(self._built.repositories[way], LOGS / f"bench-{way}.log") as server:
            if footprint is not None:
                footprint.setdefault(way, {})["start_seconds"] = round(time.perf_counter() - began, 1)
            self._warm_up(Asked(server.grpc_url, ENSEMBLE, ways.tasks_of(way)))
            yield server

    def _warm_up(self, server: Server) -> None:
        """Let a window pass that does not count: the first one after a start is up to a tenth slower."""
        with show.waiting("warming up"):
            closed_loop(server, self._mixed, ways.CONCURRENCY // 4, self._seconds / 2)

    def _window(self, way: str) -> float:
        return self._seconds * (SLOW if way == "today" else 1)

    def _scheduling(self, way: str) -> dict[str, Any]:
        def report(scheduling: Scheduling, rate: float) -> None:
            self._say(f"{way}, {scheduling}: {rate:.1f} texts/s")

        with show.waiting(f"looking for the fastest scheduling: {way}"):
            log = LOGS / f"bench-{way}.log"
            best = ways.fastest_scheduling(self._built.repositories[way], self._mixed, self._window(way), log, report)
        return best.model_dump()

    @contextlib.contextmanager
    def _python(self, workers: int) -> Iterator[Server]:
        built, log = self._built, LOGS / "bench-python.log"
        with python_server.running(built.base, built.branches, self._size.trunk, workers, log) as server:
            self._warm_up(server)
            yield server

    def _workers(self) -> int:
        rates = {}
        for workers in WORKERS:
            with show.waiting(f"Python server, {workers} workers"), self._python(workers) as server:
                rates[workers] = closed_loop(server, self._mixed, ways.CONCURRENCY, self._seconds).rate
            self._say(f"python, {workers} workers: {rates[workers]:.1f} texts/s")
        return max(rates, key=lambda workers: rates[workers])

    def _arrangement(self) -> dict[str, int]:
        ours, built = self._built.repositories["ours"], self._built
        with show.waiting("bound: looking for the best arrangement"):
            found = bound.best(ours, built.tokenizer, self._mixed, ways.TASKS, self._seconds / 2)
        self._say(f"bound: {found}")
        return asdict(found)

    # --- rounds -------------------------------------------------------------------------------------------------------

    def _turns(self, workers: int, arrangement: bound.Arrangement) -> dict[str, Any]:
        built, mixed, seconds = self._built, self._mixed, self._seconds
        fixed = texts.fixed(built.tokenizer, TEXTS)
        padded = texts.padded(built.tokenizer, TEXTS, ways.BUCKETS)
        rates, relative = dict[str, list[float]](), dict[str, list[float]]()
        unloaded, half_load = list[Window](), list[Window]()
        footprint: dict[str, dict[str, float]] = {}
        with contextlib.ExitStack() as stack:
            servers: dict[str, TritonServer] = {}
            for way in ("ours", "two", "apart", "ours_int8", "paper"):
                servers[way] = stack.enter_context(self._served(way, footprint))

            # These two are there for their own windows alone: eight full models leave the others less memory, in
            # smaller pages, and idle workers of the Python server take from their cores. After them ours is warmed up:
            # it idled meanwhile, and its next window would be slower by up to a fifteenth.
            def today() -> float:
                with self._served("today", footprint) as server:
                    rate = load(Asked(server.grpc_url, ENSEMBLE, ways.TASKS), seconds=self._window("today"))
                    footprint["today"]["memory_mib"] = _memory(server)
                self._warm_up(asked("ours"))
                return rate

            def python() -> float:
                with self._python(workers) as server:
                    rate = load(server)
                self._warm_up(asked("ours"))
                return rate

            def load(server: Server, some: list[str] = mixed, seconds: float = seconds) -> float:
                return closed_loop(server, some, ways.CONCURRENCY, seconds).rate

            def asked(way: str, tasks: tuple[str, ...] = ()) -> Asked:
                return Asked(servers[way].grpc_url, ENSEMBLE, tasks or ways.tasks_of(way))

            plan: dict[str, Callable[[], float]] = {
                "ours": lambda: load(asked("ours")),
                "bound": lambda: bound.rate(
                    arrangement, built.repositories["ours"], built.tokenizer, mixed, ways.TASKS, seconds
                ),
                "today": today,
                "two": lambda: load(asked("two")),
                "ours_fixed": lambda: load(asked("ours"), fixed),
                "ours_padded": lambda: load(asked("ours"), padded),
                "apart": lambda: load(asked("apart")),
                "apart_one_task": lambda: load(asked("apart", DEEP)),
                "ours_one_task": lambda: load(asked("ours", DEEP)),
                "ours_shallow": lambda: load(asked("ours", ALONE)),
                "ours_int8": lambda: load(asked("ours_int8")),
                "paper": lambda: load(asked("paper")),
                "python": python,
            }
            for number in range(self._rounds):
                own, beside = self._round(number, plan)
                for name in plan:
                    rates.setdefault(name, []).append(mean(own[name]))
                    relative.setdefault(name, []).append(mean(beside[name]))
                with show.waiting(f"round {number + 1} of {self._rounds}: latency"):
                    unloaded.append(closed_loop(asked("ours"), mixed, 1, UNLOADED))
                    half_load.append(open_loop(asked("ours"), mixed, rates["ours"][-1] / 2, OFFERED, seed=number))
            for way, server in servers.items():
                footprint[way]["memory_mib"] = _memory(server)
            before = statistics(servers["ours"].grpc_url)
            load(asked("ours"))
            stats = steps(before, statistics(servers["ours"].grpc_url))
        rust = Tokenizer.from_str(built.tokenizer)
        return {
            "rates": rates,
            "relative": relative,
            "lengths": {
                name: sum(len(encoding.ids) for encoding in rust.encode_batch(some)) / len(some)
                for name, some in (("mixed", mixed), ("fixed", fixed))
            },
            "tails": [h.percentile(99) / u.percentile(99) for h, u in zip(half_load, unloaded, strict=True)],
            "latency": {
                name: {f"p{percent}": round(median(w.percentile(percent) for w in windows), 4) for percent in (50, 99)}
                for name, windows in (("unloaded", unloaded), ("half_load", half_load))
            },
            "steps": stats,
            "footprint": footprint,
        }

    def _round(
        self, number: int, plan: dict[str, Callable[[], float]]
    ) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
        """Return the windows of a round by way: texts/s, and of that how many times what ours had beside it.

        The machine's own speed changes by a tenth and more within minutes. So each window of another way lies between
        two of ours, with whose mean it is compared.
        """
        own: dict[str, list[float]] = {name: [] for name in plan}
        beside: dict[str, list[float]] = {name: [] for name in plan} | {"ours": [1.0]}

        def window(name: str) -> float:
            with show.waiting(f"round {number + 1} of {self._rounds}: {name}"):
                rate = plan[name]()
            self._say(f"{number + 1}/{self._rounds} {name}: {rate:.1f} texts/s")
            own[name].append(rate)
            return rate

        before = window("ours")
        for name in (*NEAR * (TURNS - 1), *(name for name in plan if name != "ours")):
            rate, after = window(name), window("ours")
            beside[name].append(rate / mean((before, after)))
            before = after
        return own, beside

    def _ablations(self) -> dict[str, dict[str, Any]]:
        rates: dict[str, dict[str, list[float]]] = {way: {name: [] for name in ASKED} for way in ABLATIONS}
        with contextlib.ExitStack() as stack:
            urls = {way: stack.enter_context(self._served(way)).grpc_url for way in ABLATIONS}
            for number in range(self._rounds):
                for name, tasks in ASKED.items():
                    for way, url in urls.items():
                        with show.waiting(f"ablations, round {number + 1} of {self._rounds}: {way}, {name}"):
                            asked = Asked(url, ENSEMBLE, tasks)
                            rate = closed_loop(asked, self._mixed, ways.CONCURRENCY, self._seconds).rate
                        rates[way][name].append(rate)
                        self._say(f"{number + 1}/{self._rounds} {way}, {name}: {rate:.1f} texts/s")
        return {way: {name: summary(values, 2) for name, values in own.items()} for way, own in rates.items()}

    # --- latency ------------------------------------------------------------------------------------------------------

    def _by_load(self, way: str, top: float) -> dict[str, Any]:
        loads: list[dict[str, float | None]] = []
        with self._served(way) as server:
            asked = Asked(server.grpc_url, ENSEMBLE, ways.TASKS)
            for number, part in enumerate(LOADS):
                with show.waiting(f"latency of {way} at {part:.0%} of its highest rate"):
                    seconds = max(OFFERED, OFFERED_TEXTS / (part * top))
                    try:
                        window = open_loop(asked, self._mixed, part * top, seconds, seed=number)
                    except OverloadError as error:
                        loads.append({"part": part, "rate": part * top, "p50": None, "p99": None})
                        self._say(f"{way} at {part:.0%}: {error}")
                        continue
                p50, p99 = window.percentile(50), window.percentile(99)
                loads.append({"part": part, "rate": part * top, "p50": p50, "p99": p99})
                self._say(f"{way} at {part:.0%}: P50 {1000 * p50:.0f} ms, P99 {1000 * p99:.0f} ms")
            with show.waiting(f"highest rate of {way} with P99 within {BOUND:g} s"):
                rate, _ = highest_rate(asked, self._mixed, BOUND, top, self._window(way), steps=4)
            self._say(f"{way}: {rate:.1f} texts/s with P99 within {BOUND:g} s")
        return {"loads": loads, "highest_rate": rate}

    def _perf_analyzer(self, rates: dict[str, Any]) -> dict[str, Any]:
        try:
            with show.waiting("installing perf_analyzer"):
                binary = perf_analyzer.install()
            return {way: self._sweeps(binary, way, rates[way]["median"]) for way in PERF}
        except ServerError as error:  # the report says so
            self._say(str(error))
            return {"missing": str(error)}

    def _sweeps(self, binary: Path, way: str, top: float) -> dict[str, Any]:
        loads = {
            "concurrency": perf.at_concurrency(perf.CONCURRENCY),
            "poisson": perf.at_rates(part * top for part in PERF_RATES),
        }
        found = {}
        with self._served(way) as server:
            for name, own in loads.items():
                to = self._report / "perf_analyzer" / f"{self._size.name.lower()}-{way}-{name}.csv"
                with show.waiting(f"perf_analyzer: {way}, {name}"):
                    found[name] = perf.sweep(binary, server.grpc_url, self._mixed, own, self._window(way) / 2, to)
                self._say(f"perf_analyzer wrote {to}")
        return found


def _memory(server: TritonServer) -> float:
    assert server.pid is not None
    return round(memory(server.pid))


def _ratios(rates: dict[str, list[float]], lengths: dict[str, float], tails: list[float]) -> dict[str, Any]:
    """Return the ratios of rates of the same round, in whatever unit: the median, and the range over the rounds."""

    def ratio(value: Callable[..., float], *names: str) -> dict[str, Any]:
        return summary([value(*row) for row in zip(*(rates[name] for name in names), strict=True)], 4)

    def saved(ours: float, other: float) -> float:
        return 1 - other / ours

    tokens = lengths["mixed"] / lengths["fixed"]
    more = len(ways.TASKS) - len(ways.TWO)
    return {
        "cost_reduction": ratio(saved, "ours", "today"),
        "int8_cost_reduction": ratio(saved, "ours_int8", "today"),
        "paper_cost_reduction": ratio(saved, "paper", "today"),
        "cost_reduction_against_paper": ratio(saved, "ours", "paper"),
        "cost_reduction_against_python": ratio(saved, "ours", "python"),
        "marginal_task": ratio(lambda ours, two: (1 - ours / two) / more, "ours", "two"),
        "ensemble_over_bound": ratio(lambda ours, bound: ours / bound, "ours", "bound"),
        "mixed_over_fixed": ratio(lambda ours, fixed: tokens * ours / fixed, "ours", "ours_fixed"),
        "shallow_over_all": ratio(lambda ours, alone: ours / alone, "ours", "ours_shallow"),
        "int8_over_fp32": ratio(lambda int8, ours: int8 / ours, "ours_int8", "ours"),
        "p99_half_load_over_unloaded": summary(tails, 4),
        "merged_over_apart": ratio(lambda ours, apart: ours / apart, "ours", "apart"),
        "merged_over_apart_one_task": ratio(lambda ours, apart: ours / apart, "ours_one_task", "apart_one_task"),
        "ragged_over_padded": ratio(lambda ours, padded: ours / padded, "ours", "ours_padded"),
        "gpu": None,
    }

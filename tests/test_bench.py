"""The bench: texts of the wanted lengths, load on a real Triton, ratios and their report."""

import asyncio
import json
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SHALLOW
from hypothesis import given, settings
from hypothesis import strategies as st
from test_triton import group_of
from tokenizers import Tokenizer

from benchmarks import perf_analyzer, summary
from benchmarks.cost import padded, perf, python_server
from benchmarks.cost.bench import _ratios
from benchmarks.cost.footprint import PARTS, memory, statistics, steps
from benchmarks.cost.report import write_report
from benchmarks.cost.stages import Stages
from espalier import texts
from espalier.branch import Branch
from espalier.contract import ENSEMBLE, Kind
from espalier.encoder import Base
from espalier.errors import DataError, ServerError
from espalier.texts import mixed_lengths
from export.session import session
from serving import load
from serving.load import Asked, Window, closed_loop, open_loop
from serving.triton import TritonServer


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(2, 128), min_size=1, max_size=8), st.integers(0, 2**16))
def test_texts_have_the_wanted_tokens(base: Base, lengths: list[int], seed: int) -> None:
    made = texts.texts_of(base.tokenizer, lengths, seed)
    assert [len(encoding.ids) for encoding in Tokenizer.from_str(base.tokenizer).encode_batch(made)] == lengths


def test_mixed_lengths_are_short_questions_with_a_tail() -> None:
    lengths = mixed_lengths(np.random.default_rng(0), 20_000)
    assert (lengths.min(), lengths.max()) == (5, 128)
    assert 22 < lengths.mean() < 24


def test_blocks_of_mixed_texts_have_the_same_lengths(base: Base) -> None:
    made = texts.mixed(base.tokenizer, 3 * texts.BLOCK)
    lengths = [len(encoding.ids) for encoding in Tokenizer.from_str(base.tokenizer).encode_batch(made)]
    blocks = [lengths[at : at + texts.BLOCK] for at in range(0, len(lengths), texts.BLOCK)]
    assert blocks[0] != blocks[1]
    assert sorted(blocks[0]) == sorted(blocks[1]) == sorted(blocks[2])
    assert 22 < np.mean(lengths) < 24
    longer = Tokenizer.from_str(base.tokenizer).encode_batch(texts.padded(base.tokenizer, texts.BLOCK, (16, 128)))
    assert [len(encoding.ids) for encoding in longer] == [16 if length <= 16 else 128 for length in blocks[0]]


@pytest.mark.server
def test_a_closed_loop_counts_what_was_answered(server: TritonServer, base: Base) -> None:
    window = closed_loop(Asked(server.grpc_url, ENSEMBLE, ("intent",)), texts.fixed(base.tokenizer, 8), 4, 1.0)
    assert window.texts == window.latency.get_total_count() > 4
    assert window.seconds == pytest.approx(1.0, abs=0.5)
    assert 0 < window.percentile(50) <= window.percentile(99) < 5


@pytest.mark.server
def test_an_open_loop_sends_at_its_rate_and_counts_every_answer(server: TritonServer, base: Base) -> None:
    asked = Asked(server.grpc_url, ENSEMBLE, ("intent",))
    window = open_loop(asked, texts.fixed(base.tokenizer, 8), 20, 3.0, seed=1)
    assert 30 < window.texts < 95, "60 are due on average"
    assert window.texts == window.latency.get_total_count()


@pytest.mark.server
def test_an_open_loop_that_the_server_does_not_keep_up_with_is_given_up(
    server: TritonServer, base: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(load, "OUTSTANDING", 16)
    asked = Asked(server.grpc_url, ENSEMBLE, ("intent", "slots", "urgency"))
    with pytest.raises(ServerError, match="16 requests wait: the server does not keep up with 5000 texts/s"):
        open_loop(asked, texts.texts_of(base.tokenizer, [128], 0), 5_000, 5.0)
    assert closed_loop(asked, ["still there"], 1, 0.5).texts > 0


def test_the_highest_rate_is_looked_for_among_those_that_have_a_p99(monkeypatch: pytest.MonkeyPatch) -> None:
    rates: list[float] = []

    def measured(asked: Asked, texts: list[str], rate: float, seconds: float, seed: int) -> Window:
        rates.append(rate)
        window = Window(seconds)
        window.add(0.1 if rate < 30 else 0.9)
        return window

    monkeypatch.setattr(load, "open_loop", measured)
    nowhere = Asked("nowhere", "nothing", ())
    assert load.highest_rate(nowhere, ["a"], 0.5, 64.0, 1.0)[0] == 28.0
    assert rates == [32.0, 16.0, 24.0, 28.0, 30.0]
    rates.clear()
    assert load.highest_rate(nowhere, ["a"], 0.01, 64.0, 1.0) == (0.0, None)
    assert rates == [32.0, 16.0], "8 texts in a window have no P99"


def test_a_stall_counts_for_all_that_were_due_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first text holds up everything for half a second, as a client or a server that stops does."""

    class Stalling:
        def __init__(self, asked: Asked) -> None:
            self.asked = 0

        async def ask(self, text: str) -> None:
            self.asked += 1
            if self.asked == 2:  # the first warms up
                time.sleep(0.5)

        async def close(self) -> None:
            pass

    monkeypatch.setattr(load, "TritonAsker", Stalling)
    window = open_loop(Asked("nowhere", "nothing", ()), ["a text"], 100, 1.0)
    assert 60 < window.texts < 140
    assert window.percentile(75) > 0.1, "of the texts of one second those of half a second were late"
    assert window.percentile(25) < 0.1


def test_a_rate_does_not_depend_on_where_the_count_ends_between_two_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that answers 8 texts every 0.2 s gives 40 texts/s, however long it is looked at."""

    class Batching:
        def __init__(self, asked: Asked) -> None:
            self.began = time.perf_counter()
            self.sent = 0

        async def ask(self, text: str) -> None:
            batch = self.sent // 8
            self.sent += 1
            await asyncio.sleep(self.began + 0.2 * (batch + 1) - time.perf_counter())

        async def close(self) -> None:
            pass

    monkeypatch.setattr(load, "TritonAsker", Batching)
    for seconds in (0.9, 0.99, 1.1):
        window = closed_loop(Asked("nowhere", "nothing", ()), ["a text"], 16, seconds)
        assert window.rate == pytest.approx(40, rel=0.05)


RATES = {
    "ours": [40.0, 80.0], "today": [4.0, 4.0], "ours_fixed": [20.0, 40.0], "ours_one_task": [50.0, 100.0],
    "ours_shallow": [80.0, 160.0], "ours_int8": [80.0, 240.0], "ours_padded": [20.0, 80.0], "bound": [50.0, 100.0],
    "paper": [20.0, 20.0], "python": [10.0, 16.0], "apart": [32.0, 64.0], "apart_one_task": [62.5, 125.0],
    "two": [64.0, 128.0],
}  # fmt: skip


def test_ratios_are_of_one_round() -> None:
    ratios = _ratios(RATES, {"mixed": 16.0, "fixed": 32.0}, [2.5, 3.5])
    assert ratios["cost_reduction"] == {"median": 0.925, "range": [0.9, 0.95]}
    assert ratios["marginal_task"]["median"] == pytest.approx(0.375 / 6, abs=1e-4)
    assert ratios["merged_over_apart"]["median"] == 1.25
    assert ratios["merged_over_apart_one_task"]["median"] == 0.8
    assert ratios["ensemble_over_bound"]["median"] == 0.8
    assert ratios["mixed_over_fixed"]["median"] == 1.0
    assert ratios["shallow_over_all"]["median"] == 0.5
    assert ratios["int8_over_fp32"] == {"median": 2.5, "range": [2.0, 3.0]}
    assert ratios["ragged_over_padded"]["range"] == [1.0, 2.0]
    assert ratios["paper_cost_reduction"]["median"] == 0.8
    assert ratios["gpu"] is None


def test_the_report_tells_what_was_measured(tmp_path: Path) -> None:
    scheduling = {"threads": 1, "instances": 2, "batch": 8, "delay": 0}
    loads = [{"part": 0.5, "rate": 20.0, "p50": 0.05, "p99": 0.2}, {"part": 0.9, "rate": 36.0, "p50": 0.1, "p99": 0.9}]
    found = {
        "ratios": _ratios(RATES, {"mixed": 16.0, "fixed": 32.0}, [2.5, 3.5]),
        "texts_per_second": {name: summary(own, 2) for name, own in RATES.items()},
        "latency_seconds": {name: {"p50": 0.01, "p99": 0.025} for name in ("unloaded", "half_load")},
        "scheduling": {way: scheduling for way in ("ours", "ours_int8", "today", "paper")}, "workers": 2,
        "ablations": {
            way: {name: summary([10.0 * (1 + at)], 2) for name in ("all", "deep", "shallow")}
            for at, way in enumerate(("paper", "folding", "segments", "ragged", "apart", "ours"))
        },
        "by_load": {way: {"loads": loads, "highest_rate": 30.0} for way in ("ours", "ours_int8")}
        | {"today": {"loads": [*loads, {"part": 1.0, "rate": 40.0, "p50": None, "p99": None}], "highest_rate": 0.0}},
        "steps": {"trunk_0_4": {"batch": 6.1, **{f"{part}_ms": 80.0 for part in PARTS}}},
        "footprint": {way: {"memory_mib": 2048, "start_seconds": 6.0} for way in ("ours", "today")},
        "bound": {"streams": 2, "threads": 1, "batch": 8},
        "perf_analyzer": {"missing": "perf_analyzer cannot be installed"}, "p99_bound": 1.0, "turns": 3,
        "offered_seconds": 60.0,
        "tokens_per_text": {"mixed": 23.0, "fixed": 32.0}, "size": "BERT-base", "trunk_layers": 9, "shallow_layers": 4,
        "baseline_level": "O2", "concurrency": 64, "cores": 2, "versions": {"onnxruntime": "1"}, "command": "bench",
    }  # fmt: skip
    write_report(found, tmp_path)
    page = (tmp_path / "performance.md").read_text()
    assert "| cost reduction against today's way | 0.925 | 0.900 – 0.950 | ≥ 0.93 | no |" in page
    assert "| P99 at half of the highest rate ÷ P99 unloaded | 3.000 | 2.500 – 3.500 | ≤ 3 | yes |" in page
    assert "| all three, heads merged: ours | 60.0 (6.00×) | 60.0 (6.00×) | 60.0 (6.00×) |" in page
    assert "| today's way: eight full models | none |" in page
    assert "| today's way: eight full models | 100% | 40.0 | does not keep up | does not keep up |" in page
    assert "2 × 1 threads, batches of 8" in page
    assert "Not measured: perf_analyzer cannot be installed." in page
    assert "GPU figures are not measured yet" in page
    row = {"load": 4.0, "texts_per_second": 20.0, "p50": 0.05, "p99": 0.08}
    found["perf_analyzer"] = {"ours": {"poisson": [{**row, "stable": True}, {**row, "load": 8.0, "stable": False}]}}
    write_report(found, tmp_path)
    page = (tmp_path / "performance.md").read_text()
    assert "| ours, all 8 tasks | poisson | 4 | 20.0 | 50 ms | 80 ms |  |" in page
    assert "| ours, all 8 tasks | poisson | 8 | 20.0 | 50 ms | 80 ms | not stable |" in page
    for picture in ("performance.png", "performance-latency.png"):
        assert (tmp_path / picture).stat().st_size > 1000
        assert picture in page


@pytest.mark.server
def test_the_python_server_answers_and_leaves_no_process(base: Base, branches: dict[str, Path], tmp_path: Path) -> None:
    chosen = [branches["intent"], branches["urgency"]]
    with python_server.running(base.name, chosen, SHALLOW, 2, tmp_path / "python.log") as server:
        assert closed_loop(server, ["one text", "and a longer other one"], 4, 0.5).texts > 0
        assert group_of(server.pid)
    assert not group_of(server.pid)


def test_perf_analyzers_table_is_read() -> None:
    table = (
        "Concurrency,Inferences/Second,Client Send,p50 latency,p90 latency,p95 latency,p99 latency\n"
        "1,20,12,50000,60000,70000,80000\n8,30.5,12,250000,260000,270000,400000\n"
    )
    assert perf.rows(table) == [
        {"load": 1.0, "texts_per_second": 20.0, "p50": 0.05, "p99": 0.08},
        {"load": 8.0, "texts_per_second": 30.5, "p50": 0.25, "p99": 0.4},
    ]
    assert perf.rows(table.replace("Concurrency", "Request Rate"))[1]["load"] == 8.0


PERF_ANALYZER = """#!/bin/sh
case "$*" in
*"--concurrency-range 7"*) echo 'error: no such load' >&2; exit 1;;
*"--stability-percentage 25"*"--concurrency-range 64"*) echo 'Failed to obtain stable measurement.'; exit 2;;
esac
while [ $# -gt 1 ]; do
case "$1" in -f) table="$2";; --concurrency-range) load="$2";; esac
shift
done
printf 'Concurrency,Inferences/Second,p50 latency,p99 latency\\n%s,30,250000,400000\\n' "$load" > "$table"
"""


def test_a_load_that_is_not_stable_ends_no_sweep(tmp_path: Path) -> None:
    binary, to = tmp_path / "perf_analyzer", tmp_path / "found.csv"
    binary.write_text(PERF_ANALYZER)
    binary.chmod(0o755)
    loads = [("--concurrency-range", load) for load in ("1", "64", "8")]
    found = perf.sweep(binary, "nowhere", ["a text"], loads, 1.0, to)
    assert [(row["load"], row["stable"]) for row in found] == [(1, True), (64, False), (8, True)]
    assert to.read_text().splitlines() == [
        "Concurrency,Inferences/Second,p50 latency,p99 latency",
        *(f"{load},30,250000,400000" for load in (1, 64, 8)),
    ]
    with pytest.raises(ServerError, match="--concurrency-range 7: error: no such load"):
        perf.sweep(binary, "nowhere", ["a text"], [("--concurrency-range", "7")], 1.0, to)


def test_perf_analyzer_asks_about_given_texts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    binary, file, to = tmp_path / "perf_analyzer", tmp_path / "texts.txt", tmp_path / "found"
    script = PERF_ANALYZER.replace("-f)", f'--input-data) cp "$2" "{tmp_path}/asked.json";; -f)')
    binary.write_text(script.replace("--concurrency-range)", "--concurrency-range|--request-rate-range)"))
    binary.chmod(0o755)
    monkeypatch.setattr(perf_analyzer, "install", lambda: binary)
    file.write_text("one text\n\nzwei Wörter\n", encoding="utf-8")
    perf.main(file, "nowhere", [8], [2.5], 1.0, to)
    asked = json.loads((tmp_path / "asked.json").read_text())["data"]
    assert [item["TEXT"]["content"] for item in asked] == [["one text"], ["zwei Wörter"]]
    for name, asked_with in (("concurrency", "8"), ("poisson", "2.50")):
        assert (to / f"{name}.csv").read_text().splitlines()[1] == f"{asked_with},30,250000,400000"
    assert "250 ms" in capsys.readouterr().out
    file.write_text("\n")
    with pytest.raises(DataError, match=r"texts\.txt holds no text; give a file with a text per line"):
        perf.main(file, "nowhere", [8], None, 1.0, to)
    perf.main(None, "nowhere", [8], None, 1.0, to)
    assert len(json.loads((tmp_path / "asked.json").read_text())["data"]) > 4, "the demo's"


def test_finished_stages_are_kept_until_all_is_done(tmp_path: Path) -> None:
    def fails() -> None:
        raise KeyboardInterrupt

    stages = Stages(tmp_path / "stages.json", "two cores")
    assert stages.get("one", lambda: {"rate": 1.5}) == {"rate": 1.5}
    with pytest.raises(KeyboardInterrupt):
        stages.get("two", fails)
    again = Stages(tmp_path / "stages.json", "two cores")
    assert again.get("one", lambda: pytest.fail("was measured before")) == {"rate": 1.5}
    assert Stages(tmp_path / "stages.json", "four cores").get("one", lambda: 2) == 2
    again.finish()
    assert Stages(tmp_path / "stages.json", "two cores").get("one", lambda: 3) == 3


@pytest.mark.server
def test_steps_tell_of_the_requests_in_between(server: TritonServer, base: Base) -> None:
    asked = Asked(server.grpc_url, ENSEMBLE, ("intent",))
    before = statistics(server.grpc_url)
    assert steps(before, before) == {}
    closed_loop(asked, texts.fixed(base.tokenizer, 8), 4, 0.5)
    found = steps(before, statistics(server.grpc_url))
    assert found["head_intent"]["batch"] >= 1
    assert found["head_intent"]["compute_infer_ms"] > 0
    assert "head_slots" not in found, "nobody asked it"
    assert server.pid is not None
    assert memory(server.pid) > 100, "MiB of a server and its models"


@settings(max_examples=12, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=4), st.integers(0, 2**16))
def test_padded_models_answer_as_the_branch_does(
    tiny: Base, tmp_path_factory: pytest.TempPathFactory, lengths: list[int], seed: int
) -> None:
    """Whole and folded, over any padding: what is compared computes the same."""
    torch.manual_seed(seed)
    size = tiny.config.hidden_size
    branch = Branch(tiny.config, Kind.CLASSIFICATION, 1, 3).eval()
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    hidden = torch.randn(len(lengths), max(lengths), size)
    expected = branch.answer(hidden, mask.bool()).detach().numpy()
    folder = tmp_path_factory.mktemp("padded")
    for module in (padded.Whole(branch), padded.Folded(branch)):
        padded.trace(module, ("hidden", "attention_mask"), "probabilities", size, folder / "head.onnx")
        feed = {"hidden": hidden.numpy(), "attention_mask": mask.numpy()}
        np.testing.assert_allclose(session(folder / "head.onnx", 1).run(None, feed)[0], expected, atol=1e-5)

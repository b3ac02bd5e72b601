"""The bench from its first to its last step, with models so small and windows so short that no figure says anything."""

import json
from functools import partial
from pathlib import Path

import pytest
import transformers
from transformers import BertConfig

from benchmarks import perf_analyzer
from benchmarks.cost import baseline, bench, bound, ways
from benchmarks.cost.checkpoint import Size
from espalier.errors import ServerError

RATIOS = {
    "cost_reduction", "marginal_task", "ensemble_over_bound", "mixed_over_fixed", "ragged_over_padded",
    "int8_over_fp32", "shallow_over_all", "p99_half_load_over_unloaded",
}  # fmt: skip

TASKS = ways.TASKS[:3]


@pytest.mark.server
def test_the_bench_ends_with_a_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = partial(BertConfig, hidden_size=32, num_hidden_layers=4, num_attention_heads=4, intermediate_size=64)

    def missing() -> Path:
        raise ServerError("perf_analyzer is left out")

    monkeypatch.chdir(tmp_path)  # logs
    monkeypatch.setattr(transformers, "BertConfig", tiny)  # of the random weights
    monkeypatch.setitem(bench.SIZES, "bert-base", Size("tiny", trunk=3, shallow=1))
    monkeypatch.setattr(perf_analyzer, "install", missing)
    for module, name, less in (
        (bench, "UNLOADED", 0.5), (bench, "OFFERED", 0.5), (bench, "OFFERED_TEXTS", 20), (bench, "WORKERS", (1,)),
        (bench, "ASKED", {**bench.ASKED, "all": TASKS}), (bound, "TURNS", 1), (baseline, "LEVELS", ("O1",)),
        (ways, "BATCHES", (16,)), (ways, "available_cores", lambda: 1), (ways, "TASKS", TASKS),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, less)
    home = tmp_path / "home"
    bench.bench("bert-base", 0.3, 1, home, tmp_path)
    found = json.loads((tmp_path / "performance.json").read_text())
    assert {name for name, ratio in found["ratios"].items() if ratio is not None} >= RATIOS
    assert found["ratios"]["gpu"] is None
    for way in ("ours", "ours_int8", "today"):
        assert [load["part"] for load in found["by_load"][way]["loads"]] == [0.25, 0.5, 0.75, 0.9]
    assert found["steps"].keys() >= {"multitask", "trunk_0_1_heads", "trunk_1_3_heads"}
    assert found["footprint"].keys() == {"ours", "two", "apart", "ours_int8", "paper", "today"}
    assert "perf_analyzer is left out" in (tmp_path / "performance.md").read_text()
    assert not (home / "tiny.json").exists(), "the next run measures anew"

"""The GLUE report, end to end on a tiny base and generated rows: it survives a kill and reports what it measured."""

import csv
import json
import random
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, WORDS

from benchmarks.glue.__main__ import rows
from espalier.encoder import Base
from espalier.errors import SpecError
from training.glue import TASKS, Settings, glue_spec, plan
from training.trainer import Arguments

LABELS = {
    "cola": ("acceptable", "unacceptable"),
    "sst2": ("positive", "negative"),
    "mrpc": ("equivalent", "not_equivalent"),
    "qqp": ("duplicate", "not_duplicate"),
    "mnli": ("entailment", "contradiction", "neutral"),
    "qnli": ("entailment", "not_entailment"),
    "rte": ("entailment", "not_entailment"),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files of GLUE's form, their rows made of a few words."""
    folder = tmp_path_factory.mktemp("glue")
    rng = random.Random(3)
    for task in TASKS:
        columns = glue_spec(task, folder).text
        (folder / task).mkdir()
        for split, count in (("train", 48), ("dev", 24)):
            with (folder / task / f"{split}.tsv").open("w", newline="") as file:
                table = csv.writer(file, dialect="excel-tab", lineterminator="\n")
                table.writerow([*columns, "label"])
                for _ in range(count):
                    texts = [" ".join(rng.choices(WORDS[:20], k=rng.randint(2, 8))) for _ in columns]
                    choices = LABELS.get(task)
                    label = choices["red" in texts[0]] if choices else f"{len(texts[0].split()) / 2:.1f}"
                    if task == "mnli" and "table" in texts[0]:
                        label = "neutral"
                    table.writerow([*texts, label])
    return folder


@pytest.mark.server
def test_a_killed_run_goes_on_and_reports_all_tasks_as_served(
    data: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    command = [
        sys.executable, "-m", "benchmarks.glue", "--data", str(data), "--base", str(tiny_checkpoint), "--taps", "1",
        "--seeds", "1", "--epochs", "1", "--lr", "5e-3", "--max-train", "40", "--max-train", "rte=32",
        "--max-dev", "20", "--out", str(tmp_path / "runs"), "--repository", str(tmp_path / "models"),
        "--report", str(tmp_path / "docs"),
    ]  # fmt: skip
    first = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    assert first.stderr is not None
    for line in first.stderr:
        if line.startswith("9/32"):
            break
    first.send_signal(signal.SIGKILL)
    first.communicate()
    assert not (tmp_path / "docs").exists()

    second = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    states = re.findall(r"^(\d+)/32 .*\((up to date|trained)\)", second.stderr, re.MULTILINE)
    assert [int(number) for number, _ in states] == list(range(1, 33))
    assert {state for _, state in states[:9]} == {"up to date"}
    assert {state for _, state in states[10:]} == {"trained"}

    report = json.loads((tmp_path / "docs" / "glue.json").read_text())
    assert list(report["tasks"]) == list(TASKS)
    for task in report["tasks"].values():
        assert {"metric", "full", "partial", "kd1", "kd2", "kd3", "selected", "served", "tap", "layers"} <= set(task)
        assert task["kd3"] is None, "the teachers have two layers"
        assert task["served"] == pytest.approx(task["served_offline"], abs=1e-6)
        assert (task["tap"], task["dev_rows"]) == (1, 20)
    assert report["tasks"]["rte"]["train_rows"] == 32
    mean = report["mean"]
    assert mean["retention"] == pytest.approx(mean["selected"] / mean["full"])
    layers = 1 + sum(task["layers"] for task in report["tasks"].values())
    assert mean["overhead_layers"] == pytest.approx(layers / (3 * 8))
    assert mean["overhead_folded"] < mean["overhead_layers"]
    folded = report["plans"]["folded"]
    assert folded["retention"] == pytest.approx(folded["plan"]["score"] / mean["full"])
    assert folded["plan"]["folded_layers"] <= report["plans"]["mixed"]["plan"]["folded_layers"]
    for task in folded["tasks"].values():
        assert task["served"] == pytest.approx(task["served_offline"], abs=1e-6)

    text = (tmp_path / "docs" / "glue.md").read_text()
    assert f"{mean['full']:.2f}" in text
    for name, task in report["tasks"].items():
        assert re.search(rf"^\| {name} \| {task['metric']} \|.*\| {task['served']:.2f} \|", text, re.MULTILINE)
    for plot in re.findall(r"\]\((.*\.png)\)", text):
        assert (tmp_path / "docs" / plot).read_bytes().startswith(b"\x89PNG")


def test_every_teacher_comes_before_its_students(base: Base) -> None:
    settings = Settings(Arguments(), 2, (2, 4), {"cola": 10}, 10.0)
    steps = plan(base, settings, TASKS, Path("runs"))
    done: set[Path] = set()
    for step in steps:
        assert step.teacher is None or step.teacher in done
        assert step.out not in done
        done.add(step.out)
    assert [step.seed for step in steps] == sorted(step.seed for step in steps)
    assert sum(step.teacher is not None for step in steps) == 2 * 8 * (3 + 1 + 2 + 1)
    assert {step.folded for step in steps if step.tap == 2} == {1, 3, 4}
    assert settings.of("cola", 1).max_train == 10
    assert settings.of("rte", 1).max_train is None


@pytest.mark.parametrize("taps", [(0,), (6,)])
def test_a_tap_outside_the_base_is_refused(taps: tuple[int, ...], base: Base) -> None:
    with pytest.raises(SpecError, match="leaves no task layers"):
        plan(base, Settings(Arguments(), 1, taps, {}, 10.0), TASKS, Path("runs"))


def test_the_hub_has_columns_of_its_own() -> None:
    assert glue_spec("qnli", None).text == ("question", "sentence")
    assert glue_spec("mnli", None).data.dev == "validation_matched"
    assert glue_spec("rte", None).text == ("sentence1", "sentence2")


def test_rows_are_limited_for_all_tasks_or_for_one() -> None:
    assert rows(["100", "cola=200"]) == (100, {"cola": 200})
    for wrong in ("many", "snli=3", "0", "cola="):
        with pytest.raises(SpecError, match="neither N nor TASK=N"):
            rows([wrong])

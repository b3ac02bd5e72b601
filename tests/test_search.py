"""The search: the whole grid, each trial once, the same table however it was stopped and wherever it ran."""

import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from test_cli import one_sentence
from test_training import silent, write_task

from espalier.branch import load_branch
from espalier.contract import Kind
from espalier.encoder import Base
from espalier.errors import DataError, FingerprintError, SearchError, SpecError, TrainingError
from espalier.spec import TaskSpec, load_spec
from training import executors
from training.activations import ActivationCache
from training.finetune import train
from training.grid import Trial, default_layers, grid, parse_inits, parse_layers, parse_rates
from training.search import Result, Status, search
from training.selection import find_candidates
from training.trainer import Arguments

QUICK = Arguments(epochs=2, batch_size=8)
GRID = grid((1, 2), (5e-3,), seeds=2)


@pytest.fixture
def spec(tmp_path: Path) -> TaskSpec:
    return load_spec(write_task(tmp_path, Kind.CLASSIFICATION))


class Heard(list[Status]):
    """What a search reported."""

    def __call__(self, status: Status) -> None:
        self.append(status)

    @property
    def ran(self) -> set[str]:
        """Names of the trials that ran."""
        return {name for status in self for name in status.running}


def run(spec: TaskSpec, base: Base, out: Path, trials: tuple[Trial, ...] = GRID, **more: Any) -> tuple[Result, Heard]:
    heard = Heard()
    return search(spec, base, trials, QUICK, out, heard, **more), heard


def content(out: Path) -> dict[str, Any]:
    """Return all files of a search, by their path in it. JSON is read: a resumed run's metrics are in another order."""
    return {
        str(path.relative_to(out)): json.loads(path.read_bytes()) if path.suffix == ".json" else path.read_bytes()
        for path in out.rglob("*")
        if path.is_file()
    }


# --- the grid ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "layers"), [("3", (3,)), ("2,4", (2, 4)), ("2..4", (2, 3, 4)), (" 4, 1..2,2", (1, 2, 4))]
)
def test_layers_are_numbers_and_ranges(text: str, layers: tuple[int, ...]) -> None:
    assert parse_layers(text) == layers


@pytest.mark.parametrize("text", ["", "2..", "..3", "4..2", "2-4", "two", "2..N", "-1", "1,,2"])
def test_other_layers_are_refused(text: str) -> None:
    with pytest.raises(SpecError, match=r"--task-layers .* is neither a number of layers nor a range; write 3"):
        parse_layers(text)


@pytest.mark.parametrize("text", ["", "0", "1", "2e-5;5e-5", "nan", "-1e-5", "fast"])
def test_other_learning_rates_are_refused(text: str) -> None:
    with pytest.raises(SpecError, match=r"--lr .* such as 2e-5,5e-5"):
        parse_rates(text)


def test_other_starts_are_refused() -> None:
    assert parse_inits("pretrained, teacher") == ("pretrained", "teacher")
    with pytest.raises(SpecError, match="--init 'random'"):
        parse_inits("random")


def test_the_grid_is_every_combination_and_each_has_its_name() -> None:
    trials = grid((1, 2), parse_rates("5e-5,2e-5"), 3, ("teacher", "pretrained"))
    assert len(trials) == len({trial.name for trial in trials}) == 2 * 2 * 3 * 2
    assert trials[0].name == "l1-lr2e-05-s0-teacher"
    with pytest.raises(SpecError, match="--seeds is 0"):
        grid((1,), (1e-3,), 0)


@pytest.mark.parametrize(("depth", "layers"), [(12, range(4, 11)), (6, range(2, 6)), (3, range(1, 3))])
def test_task_layers_are_those_of_the_paper_in_proportion(depth: int, layers: range) -> None:
    assert default_layers(depth) == tuple(layers)


# --- one search after the other ---------------------------------------------------------------------------------


def test_the_table_tells_what_the_trials_alone_would(spec: TaskSpec, tiny: Base, tmp_path: Path) -> None:
    # The number of threads decides in which order sums are added.
    result, heard = run(spec, tiny, tmp_path / "out", threads=torch.get_num_threads())
    scores = {}
    for trial in GRID:
        arguments = Arguments(QUICK.epochs, trial.learning_rate, QUICK.batch_size, seed=trial.seed)
        card, _ = train(spec, tiny, 3 - trial.layers, trial.layers, arguments, tmp_path / trial.name, silent)
        scores[trial] = card.score
    for row in result.rows:
        own = [score for trial, score in scores.items() if trial.layers == row.layers]
        assert (row.n, row.mean, row.std, row.best) == (2, statistics.mean(own), statistics.stdev(own), max(own))
        best = next(trial for trial in GRID if trial.layers == row.layers and scores[trial] == max(own))
        assert (
            load_branch(tmp_path / "out" / f"l{row.layers}")[1].weights == load_branch(tmp_path / best.name)[1].weights
        )
    report = json.loads((tmp_path / "out" / "search.json").read_text())
    assert report == json.loads(json.dumps(result.to_dict()))
    assert report["best"]["score"] == max(scores.values())
    assert {trial["name"]: trial["score"] for trial in report["trials"]} == {t.name: s for t, s in scores.items()}
    for plot in ("layers.png", "learning_rate.png"):
        assert (tmp_path / "out" / plot).read_bytes().startswith(b"\x89PNG")
    assert heard[-1] == Status(4, 4, (), 1.0)
    shares = [status.share for status in heard]
    assert shares == sorted(shares)


def test_one_seed_has_no_deviation(spec: TaskSpec, tiny: Base, tmp_path: Path) -> None:
    (row,) = run(spec, tiny, tmp_path / "out", GRID[:1])[0].rows
    assert row.std is None
    assert row.mean == row.best


def test_finished_trials_are_not_run_again(spec: TaskSpec, tiny: Base, tmp_path: Path) -> None:
    first, _ = run(spec, tiny, tmp_path / "out")
    before = content(tmp_path / "out")
    again, heard = run(spec, tiny, tmp_path / "out")
    assert (again, heard.ran) == (first, set())
    assert content(tmp_path / "out") == before
    wider, heard = run(spec, tiny, tmp_path / "out", grid((1, 2), (5e-3,), seeds=3))
    assert heard.ran == {"l1-lr0.005-s2", "l2-lr0.005-s2"}
    assert [row.n for row in wider.rows] == [3, 3]


def test_a_grid_can_grow_and_keeps_what_was_best(spec: TaskSpec, tiny: Base, tmp_path: Path) -> None:
    first, _ = run(spec, tiny, tmp_path / "out")
    best = {row.layers: load_branch(tmp_path / "out" / f"l{row.layers}")[1].weights for row in first.rows}
    grown, heard = run(spec, tiny, tmp_path / "out", grid((1, 2), (1e-9,), seeds=1))
    assert heard.ran == {"l1-lr1e-09-s0", "l2-lr1e-09-s0"}
    assert [row for row in grown.rows if row.learning_rate != 1e-9] == first.rows
    for layers, weights in best.items():
        assert load_branch(tmp_path / "out" / f"l{layers}")[1].weights == weights


def test_a_stopped_search_goes_on_to_the_same_end(spec: TaskSpec, tiny: Base, tmp_path: Path) -> None:
    run(spec, tiny, tmp_path / "whole")

    def stop(status: Status) -> None:
        if status.done == 1 and status.share > 10 / 28:  # in the second epoch of the second trial, by layers
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        search(spec, tiny, GRID, QUICK, tmp_path / "out", stop)
    assert [path.name for path in (tmp_path / "out" / "trials").iterdir()] == ["l1-lr0.005-s0.json"]
    _, heard = run(spec, tiny, tmp_path / "out")
    assert heard.ran == {trial.name for trial in GRID[1:]}
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_what_a_kill_leaves_of_a_file_is_cleared_away(spec: TaskSpec, tiny: Base, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(spec, tiny, out, GRID[:1])
    before = content(out)
    kill = (
        "import os; from pathlib import Path; from unittest import mock; from espalier import files\n"
        "with mock.patch('os.replace', lambda *paths: os._exit(9)): files.write_whole(Path({file!r}), 'text')"
    )
    for file in (out / "search.json", out / "trials" / f"{GRID[0].name}.json"):
        assert subprocess.run([sys.executable, "-c", kill.format(file=str(file))]).returncode == 9
    folders = [out / ".l1.abcd_123", out / ".l1.old.abcd_123"]
    for folder in folders:
        folder.mkdir()
    (out / ".app.settings").write_text("not ours")
    assert len(content(out)) == len(before) + 3
    run(spec, tiny, out, GRID[:1])
    assert content(out) == before | {".app.settings": b"not ours"}
    assert not any(folder.exists() for folder in folders)


def test_a_trial_of_other_data_is_run_again(spec: TaskSpec, tiny: Base, tmp_path: Path) -> None:
    run(spec, tiny, tmp_path / "out", GRID[:1])
    with (tmp_path / "train.jsonl").open("a") as file:
        file.write('\n{"text": "red ball", "colour": "red"}')
    assert run(spec, tiny, tmp_path / "out", GRID[:1])[1].ran == {GRID[0].name}


def test_a_damaged_record_is_no_finished_trial(spec: TaskSpec, tiny: Base, tmp_path: Path) -> None:
    run(spec, tiny, tmp_path / "out", GRID[:2])
    (tmp_path / "out" / "trials" / f"{GRID[1].name}.json").write_text("{")
    assert run(spec, tiny, tmp_path / "out", GRID[:2])[1].ran == {GRID[1].name}


def test_the_best_branch_is_made_again_if_it_is_gone(spec: TaskSpec, tiny: Base, tmp_path: Path) -> None:
    first, _ = run(spec, tiny, tmp_path / "out")
    before = content(tmp_path / "out")
    (tmp_path / "out" / "l2" / "branch.safetensors").unlink()
    again, heard = run(spec, tiny, tmp_path / "out")
    assert len(heard.ran) == 1
    assert again == first
    assert content(tmp_path / "out") == before


def test_a_trial_that_fails_keeps_no_other_from_running(
    spec: TaskSpec, tiny: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing = {0}

    def fail(*arguments: Any) -> Any:
        if arguments[4].seed in failing:
            raise TrainingError("the loss is not finite")
        return train(*arguments)

    monkeypatch.setattr(executors, "train", fail)
    result, _ = run(spec, tiny, tmp_path / "out", GRID[:2])
    assert result.failed == {GRID[0].name: "the loss is not finite"}
    assert [finished.trial for finished in result.trials] == [GRID[1]]
    failing.add(1)
    with pytest.raises(TrainingError, match=f"every trial failed, the first, {GRID[0].name}, so: the loss"):
        run(spec, tiny, tmp_path / "other", GRID[:2])


def test_students_are_searched_in_the_same_way(spec: TaskSpec, tiny: Base, tmp_path: Path) -> None:
    cache = ActivationCache(tmp_path / "cache")
    run(spec, tiny, tmp_path / "teachers", GRID[2:], cache=cache)
    teacher = tmp_path / "teachers" / "l2"
    trials = grid((1,), (5e-3,), 2, ("teacher", "pretrained"))
    result, _ = run(spec, tiny, tmp_path / "students", trials, teacher=teacher, cache=cache)
    assert [(row.layers, row.init, row.n) for row in result.rows] == [(1, "teacher", 2), (1, "pretrained", 2)]
    card = load_branch(tmp_path / "students" / "l1")[1]
    assert card.teacher is not None
    assert (card.teacher.digest, card.teacher.folder, card.tap) == (load_branch(teacher)[1].digest, teacher, 1)
    assert (tmp_path / "students" / "init.png").exists()
    assert run(spec, tiny, tmp_path / "students", trials, teacher=teacher, cache=cache)[1].ran == set()
    assert len(list(cache.folder.glob("*/shape.json"))) == 2  # train and dev at one tap, for all trials


# --- what is refused --------------------------------------------------------------------------------------------


def test_layers_that_leave_no_trunk_are_refused(spec: TaskSpec, tiny: Base, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"3 task layers leave no frozen layer: .* has 3, so at most 2"):
        run(spec, tiny, tmp_path / "out", grid((2, 3), (1e-3,), 1))


def test_a_teacher_must_fit(spec: TaskSpec, tiny: Base, base: Base, tmp_path: Path) -> None:
    teacher = tmp_path / "teacher"
    train(spec, tiny, 1, 2, Arguments(1, 1e-3, 8), teacher, silent)
    students = grid((1, 2), (1e-3,), 1, ("teacher",))
    with pytest.raises(SpecError, match=r"has 2 layers; students have fewer, but at least 1, not 2"):
        run(spec, tiny, tmp_path / "out", students, teacher=teacher)
    with pytest.raises(FingerprintError, match="was trained on another trunk"):
        run(spec, base, tmp_path / "out", students[:1], teacher=teacher)
    with pytest.raises(SpecError, match=r"where a student may take its place; give another --out"):
        run(spec, tiny, tmp_path, students[:1], teacher=teacher)
    with pytest.raises(SearchError, match="is a branch; give the search a folder of its own"):
        run(spec, tiny, teacher)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--task-layers", "2..N"], "--task-layers '2..N'"),
        (["--lr", "5"], "--lr '5'"),
        (["--seeds", "0"], "--seeds is 0"),
        (["--jobs", "0"], "--jobs is 0"),
        (["--init", "pretrained"], "it needs --teacher"),
        (["--ray", "local"], r"pip install 'espalier\[train,ray\]'"),
    ],
)
def test_wrong_options_are_one_sentence(
    arguments: list[str], message: str, espalier: Callable[..., Any], tiny_checkpoint: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setitem(sys.modules, "ray", None)  # as if it were not installed
    spec = write_task(tmp_path, Kind.CLASSIFICATION)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        error = one_sentence(espalier("search", spec, "--base", tiny_checkpoint, *arguments))
    assert message.replace("\\", "") in error
    assert not list(tmp_path.glob("searches/*/trials"))


def test_a_place_that_cannot_be_written_is_one_sentence(spec: TaskSpec, tiny: Base, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SearchError, match=r"the search cannot be written to .*file/out: Not a directory"):
        run(spec, tiny, tmp_path / "file" / "out")


def test_data_that_is_not_there_is_one_sentence(spec: TaskSpec, tiny: Base, tmp_path: Path) -> None:
    (tmp_path / "dev.jsonl").unlink()
    with pytest.raises(DataError, match=r"dev\.jsonl cannot be read"):
        run(spec, tiny, tmp_path / "out")


# --- processes --------------------------------------------------------------------------------------------------


def workers_of(pid: int) -> list[psutil.Process]:
    """Return the worker processes of the search in process `pid`."""
    children = psutil.Process(pid).children()
    return [child for child in children if "spawn_main" in " ".join(child.cmdline())]


def ended(processes: list[psutil.Process]) -> bool:
    """Wait until all `processes` are gone."""
    _, alive = psutil.wait_procs(processes, timeout=20)
    return all(process.status() == psutil.STATUS_ZOMBIE for process in alive)


def until(happened: Callable[[], Any], seconds: float = 120.0) -> None:
    """Wait for something to happen."""
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)


def test_a_killed_worker_ends_the_search_which_goes_on_to_the_same_end(
    spec: TaskSpec, tiny: Base, tmp_path: Path
) -> None:
    workers: list[psutil.Process] = []

    def kill(status: Status) -> None:
        if status.done and not workers:
            workers.extend(workers_of(os.getpid()))
            workers[0].kill()

    with pytest.raises(SearchError, match=r"a worker process died: .* and the same command goes on; fewer --jobs"):
        search(spec, tiny, GRID, QUICK, tmp_path / "out", kill, jobs=2)
    assert len(workers) == 2
    assert ended(workers)
    result, heard = run(spec, tiny, tmp_path / "out")
    assert 0 < len(heard.ran) < len(GRID)
    assert run(spec, tiny, tmp_path / "whole")[0] == result
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_a_killed_search_takes_its_workers_along_and_goes_on(
    tiny_checkpoint: Path, spec: TaskSpec, tiny: Base, tmp_path: Path
) -> None:
    options = "--task-layers 1..2 --lr 5e-3 --seeds 2 --epochs 2 --batch-size 8 --threads 1 --jobs 2 --cache"
    command = [
        "search",
        tmp_path / "task.yaml",
        "--base",
        tiny_checkpoint,
        "--out",
        tmp_path / "out",
        *options.split(" "),
    ]
    process = subprocess.Popen([sys.executable, "-m", "espalier.cli", *map(str, command)], stderr=subprocess.DEVNULL)
    until(lambda: list((tmp_path / "out").glob("trials/*.json")))
    with pytest.raises(SearchError, match="another search works in"):
        run(spec, tiny, tmp_path / "out")
    workers = workers_of(process.pid)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert len(workers) == 2
    assert ended(workers)
    cache = ActivationCache(tmp_path / ".activations")
    result, heard = run(spec, tiny, tmp_path / "out", cache=cache)
    assert heard.ran
    assert run(spec, tiny, tmp_path / "whole", cache=cache)[0] == result
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_a_teacher_of_one_layer_has_no_students(spec: TaskSpec, tiny: Base, tmp_path: Path) -> None:
    train(spec, tiny, 2, 1, QUICK, tmp_path / "teacher", silent)
    with pytest.raises(SpecError, match="teacher has one layer"):
        run(spec, tiny, tmp_path / "search", (), teacher=tmp_path / "teacher")


def test_selection_knows_all_seeds_of_a_search(spec: TaskSpec, tiny: Base, tmp_path: Path) -> None:
    result, _ = run(spec, tiny, tmp_path / "search")
    found = {candidate.layers: candidate for candidate in find_candidates([tmp_path / "search"])}
    for row in result.rows:
        assert found[row.layers].score == pytest.approx(100 * row.mean)
        assert found[row.layers].spread == pytest.approx(100 * (row.std or 0))
        assert found[row.layers].best == tmp_path / "search" / f"l{row.layers}"

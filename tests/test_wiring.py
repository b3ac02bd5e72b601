"""Live wiring on a real Triton: folders come, change and go; what is served follows, and nobody notices the rest."""

import errno
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_branch

from clients import Client
from espalier.configs import read_config, write_config
from espalier.contract import ENSEMBLE, HeadInfo
from espalier.encoder import Base, Encoder
from espalier.errors import ContractError, UnavailableError, WiringError
from espalier.files import digest, exchange
from espalier.scheduling import Scheduling, available_cores
from export import merge
from export.repository import export
from serving.control import Control, Refused
from serving.deploy import TRIAL
from serving.live import Live, State, live_folder
from serving.triton import TritonServer, free_ports
from serving.wiring import DEATHS, RETRY, Pass, Wiring

pytestmark = pytest.mark.server

TEXTS = ["put the red ball on the table", "is the box big ?", "green"]


@pytest.fixture(scope="module")
def shop(tiny: Base, specs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Whole folders to be dropped: SHOP/<repository>/<folder>."""
    home = tmp_path_factory.mktemp("shop")

    def ship(name: str, **taps: int) -> None:
        seed = len(list(home.iterdir()))
        branches = [
            make_branch(tiny, specs / f"{task}.yaml", tap, min(1, 3 - tap), home / "branches" / name / task, seed)
            for task, tap in taps.items()
        ]
        export(branches, home / name, scheduling={"threads": 1}, load=lambda name, revision: tiny)

    ship("first", intent=1, urgency=2)
    ship("second", intent=1, urgency=2)
    ship("more", slots=2, slots_crf=1, same_request=1)
    ship("deep", urgency=1, slots=3)
    ship("third", intent=1, urgency=2, slots=3)
    return home


@pytest.fixture(scope="module")
def other(tiny: Base, specs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first two tasks on a trunk with other weights."""
    home = tmp_path_factory.mktemp("other")
    torch.manual_seed(7)
    encoder = Encoder(tiny.config).eval()
    base = replace(tiny, encoder=encoder)
    branches = [
        make_branch(base, specs / f"{task}.yaml", tap, 1, home / "branches" / task)
        for task, tap in (("intent", 1), ("urgency", 2))
    ]
    export(branches, home / "models", scheduling={"threads": 1}, load=lambda name, revision: base)
    return home / "models"


class Stage:
    """A repository, a Triton that serves its live store, and a wiring between the two."""

    def __init__(self, home: Path, server: TritonServer, shop: Path) -> None:
        self.repository = home / "repository"
        self.live = Live(live_folder(self.repository))
        self.server = server
        self.shop = shop
        self.control = Control(server.grpc_url, server.http_url)
        self.wiring = self.another()

    def another(self, tidied: bool = False, **options: Any) -> Wiring:
        wiring = Wiring(self.repository, self.live, self.control, **options)
        wiring.inbox.settled = 0.2
        wiring.tidied = tidied
        return wiring

    def drop(self, repository: str, *folders: str, as_: str | None = None) -> None:
        for folder in folders:
            target = self.repository / (as_ or folder)
            shutil.rmtree(target, ignore_errors=True)
            shutil.copytree(self.shop / repository / folder, target)

    def remove(self, *folders: str) -> None:
        for folder in folders:
            shutil.rmtree(self.repository / folder)

    def settle(self, wiring: Wiring | None = None) -> Pass:
        """Reconcile until everything is at rest; return the last pass that changed something, or the last."""
        wiring = wiring or self.wiring
        change = None
        for _ in range(100):
            done = wiring.reconcile()
            change = done if done.change else change
            if not done.restless and not done.change:
                return change or done
            time.sleep(0.1)
        raise AssertionError("the repository never came to rest")

    def state(self, folder: str) -> tuple[str, str]:
        status = self.live.status()
        assert status is not None
        entry = status.folders[folder]
        return entry.state, entry.why

    def ask(self, *tasks: str) -> list[dict[str, object]]:
        with Client(self.server.grpc_url, timeout=30.0) as client:
            return [answers.to_dict() for answers in client.ask_batch(TEXTS, tasks or None)]

    def tasks(self) -> list[str]:
        with Client(self.server.grpc_url, timeout=30.0) as client:
            return list(client.tasks())


@pytest.fixture(scope="module")
def place(shop: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    home = tmp_path_factory.mktemp("live")
    (home / "repository").mkdir()
    live = Live(live_folder(home / "repository"))
    live.prepare()
    http, grpc, metrics = free_ports(3)
    with TritonServer(
        live.models, log_file=home / "triton.log", http_port=http, grpc_port=grpc, metrics_port=metrics,
        ready_model=None, model_control="explicit",
    ) as server:  # fmt: skip
        yield Stage(home, server, shop)


@pytest.fixture
def stage(place: Stage) -> Stage:
    """The stage with two tasks served, intent and urgency, whatever the test before left."""
    place.drop("first", "tokenizer", "trunk_0_1", "trunk_1_2", "head_intent", "head_urgency")
    wanted = {path.name for path in (place.shop / "first").iterdir()}
    for folder in place.repository.iterdir():
        if folder.name not in wanted:
            shutil.rmtree(folder)
    place.wiring = place.another()
    place.settle()
    assert place.tasks() == ["intent", "urgency"]
    return place


def test_a_dropped_folder_is_served_and_a_removed_one_is_not(stage: Stage) -> None:
    before = stage.ask("intent", "urgency")
    stage.drop("more", "head_slots", "head_slots_crf", "head_same_request")
    done = stage.settle()
    assert done.change is not None
    assert done.change.state.changes == ("added same_request", "added slots", "added slots_crf")
    assert set(done.change.seconds) == {"same_request", "slots", "slots_crf"}
    assert stage.tasks() == ["intent", "same_request", "slots", "slots_crf", "urgency"]
    assert stage.state("head_slots") == ("serving", "")
    assert stage.ask("intent", "urgency") == before
    assert len(stage.ask()[0]) == 5
    stage.remove("head_slots", "head_same_request")
    stage.settle()
    assert stage.tasks() == ["intent", "slots_crf", "urgency"]
    assert stage.ask("intent", "urgency") == before
    loaded = {model for model, ready in stage.control.index().items() if ready}
    state = stage.live.state()
    assert state is not None
    assert loaded == state.models | {ENSEMBLE}


def test_changed_files_and_a_new_version_folder_are_updates(stage: Stage) -> None:
    before = stage.ask("intent", "urgency")
    stage.drop("second", "head_urgency")
    assert stage.settle().change.state.changes == ("updated urgency",)  # type: ignore[union-attr]
    middle = stage.ask("intent", "urgency")
    assert [row["intent"] for row in middle] == [row["intent"] for row in before]
    assert [row["urgency"] for row in middle] != [row["urgency"] for row in before]
    shutil.copytree(stage.shop / "first" / "head_urgency" / "1", stage.repository / "head_urgency" / "2")
    write_config(stage.repository / "head_urgency", read_config(stage.shop / "first" / "head_urgency"))
    stage.settle()
    assert stage.ask("intent", "urgency") == before
    state = stage.live.state()
    assert state is not None
    assert state.heads["urgency"].version == 2


def test_nothing_changes_when_nothing_changed(stage: Stage) -> None:
    state = stage.live.state()
    assert stage.settle().change is None
    assert stage.settle(stage.another()).change is None, "another service takes up what this one did"
    assert stage.live.state() == state


def change_config(edit: Callable[..., object]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        config = read_config(folder)
        edit(config)
        write_config(folder, config)

    return damage


def set_parameter(name: str, value: str) -> Callable[[Path], None]:
    return change_config(lambda config: setattr(config.parameters[name], "string_value", value))


def two_labels(folder: Path) -> None:
    (folder / "labels.txt").write_text("a\nb\n")
    set_parameter("labels", '["a", "b"]')(folder)
    change_config(lambda config: config.output[0].dims.__setitem__(0, 2))(folder)


def truncate(folder: Path) -> None:
    model = folder / "1" / "model.onnx"
    model.write_bytes(model.read_bytes()[:-100])


def nan_weights(folder: Path) -> None:
    import onnx
    from onnx import numpy_helper

    model = onnx.load(folder / "1" / "model.onnx")
    for weight in model.graph.initializer:
        array = numpy_helper.to_array(weight)
        if array.dtype == np.float32 and array.ndim == 2:
            weight.CopyFrom(numpy_helper.from_array(np.full_like(array, np.nan), weight.name))
    onnx.save(model, folder / "1" / "model.onnx")
    set_parameter("model_digest", digest((folder / "1" / "model.onnx").read_bytes()))(folder)


BAD = {
    "wrong fingerprint": (set_parameter("fingerprint", "f" * 64), "was trained on another trunk"),
    "wrong tap": (set_parameter("tap", "3"), r"no deployed segment ends.*`espalier export` with its branch adds one"),
    "wrong width": (set_parameter("hidden_size", "64"), "sets input otherwise than the contract"),
    "no config": (lambda folder: (folder / "config.pbtxt").unlink(), "config.pbtxt is missing"),
    "truncated ONNX": (truncate, "is not a whole ONNX file"),
    "missing labels": (lambda folder: (folder / "labels.txt").unlink(), "labels.txt is missing"),
    "other labels": (lambda folder: (folder / "labels.txt").write_text("a\n"), "lists 1 labels that are not the"),
    "fewer labels": (set_parameter("labels", '["a", "b"]'), r"labels\.txt lists 10 labels that are not the 2"),
    "narrower config": (two_labels, "gives 'probabilities' with 10 values, but its config says 2"),
    "foreign backend": (
        change_config(lambda config: setattr(config, "backend", "python")),
        "sets backend otherwise than the contract",
    ),
    "code": (lambda folder: (folder / "1" / "model.py").write_text("x"), "holds 1/model.py; a head folder is data"),
    "library": (lambda folder: (folder / "custom.so.1").write_text("x"), "holds custom.so.1"),
    "custom operators": (
        change_config(lambda config: config.model_operations.op_library_filename.append("/tmp/ops.so")),
        "sets model_operations otherwise than the contract",
    ),
    "not finite": (nan_weights, "numbers that are not finite"),
    "an ONNX file of another head": (
        lambda folder: shutil.copy(folder.parent / "elsewhere.onnx", folder / "1" / "model.onnx"),
        "is not the file that config.pbtxt was written for",
    ),
    "no dims": (change_config(lambda config: config.output[0].ClearField("dims")), "gives 'probabilities' no dims"),
    "a type that is none": (change_config(lambda config: setattr(config.input[0], "data_type", 99)), "of another type"),
    "labels without end": (set_parameter("labels", "[" * 100_000), "head_intent cannot be read"),
    "instances without end": (
        change_config(lambda config: setattr(config.instance_group[0], "count", 5000)),
        "asks for 5000 instances",
    ),
    "a queue without end": (
        change_config(lambda config: setattr(config.dynamic_batching, "max_queue_delay_microseconds", 2**62)),
        "lets requests wait longer than 1 s",
    ),
    "a pipe": (lambda folder: os.mkfifo(folder / "1" / "x.bin"), "is no plain file"),
    "a link outwards": (
        lambda folder: os.symlink("/etc/hostname", folder / "1" / "x.bin"),
        "a link out of the repository",
    ),
    "a name that is not UTF-8": (lambda folder: (folder / "1" / os.fsdecode(b"\xe9.bin")).write_text("x"), "not UTF-8"),
    "half-copied": (lambda folder: shutil.rmtree(folder / "1"), "has no version folder"),
}


@pytest.mark.parametrize("fault", BAD)
def test_a_bad_folder_is_refused_and_harms_nobody(stage: Stage, fault: str) -> None:
    damage, why = BAD[fault]
    before, state = stage.ask(), stage.live.state()
    bad = stage.repository.parent / "head_intent"
    shutil.rmtree(bad, ignore_errors=True)
    shutil.copytree(stage.shop / "second" / "head_intent", bad)
    shutil.copy(stage.shop / "first" / "head_intent" / "1" / "model.onnx", bad.parent / "elsewhere.onnx")
    damage(bad)
    content = {path.relative_to(bad): path.read_bytes() for path in bad.rglob("*") if path.is_file()}
    shutil.rmtree(stage.repository / "head_intent")
    shutil.move(bad, stage.repository / "head_intent")
    done = stage.settle()
    assert done.change is None
    kind, sentence = stage.state("head_intent")
    assert kind == "refused"
    assert re.search(why, sentence), sentence
    assert "\n" not in sentence
    assert stage.live.state() == state
    assert stage.ask() == before
    folder = stage.repository / "head_intent"
    there = {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert there == content, "something was written into the owner's folder"
    assert all(ready for model, ready in stage.control.index().items() if state and model in state.models)


def test_a_refused_folder_is_served_once_it_is_mended(stage: Stage) -> None:
    truncate(stage.repository / "head_intent")
    assert stage.settle().change is None
    assert stage.state("head_intent")[0] == "refused"
    stage.drop("second", "head_intent")
    assert stage.settle().change.state.changes == ("updated intent",)  # type: ignore[union-attr]
    assert stage.state("head_intent") == ("serving", "")


def test_a_folder_that_may_hold_code_is_allowed_by_name(stage: Stage) -> None:
    stage.drop("more", "head_slots")
    (stage.repository / "head_slots" / "1" / "model.py").write_text("")
    assert stage.settle().change is None
    stage.wiring = stage.another(allowed=frozenset({"head_slots"}))
    stage.settle()
    assert stage.tasks() == ["intent", "slots", "urgency"]


def test_a_task_with_a_new_tap_waits_for_its_segment(stage: Stage) -> None:
    stage.drop("deep", "head_slots")
    assert stage.settle().change is None
    kind, why = stage.state("head_slots")
    assert kind == "refused"
    assert "taps the trunk at layer 3, where no deployed segment ends" in why
    assert "`espalier export`" in why
    stage.drop("deep", "trunk_1_3")  # not a chain with tap 2, which urgency needs
    assert stage.settle().change is None
    assert "no chain of segments has ends at 1, 2, 3" in stage.state("head_slots")[1]
    shutil.copytree(stage.shop / "third" / "trunk_2_3", stage.repository / "trunk_2_3")
    stage.settle()
    assert stage.tasks() == ["intent", "slots", "urgency"]
    state = stage.live.state()
    assert state is not None
    assert [model.partition("-")[0] for model in state.trunk] == ["trunk_0_1", "trunk_1_2", "trunk_2_3"]


def test_a_killed_pass_is_made_up_for(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever call was the last one before the kill: the next pass reaches the same end."""
    baseline = stage.ask("intent")
    calls = [(Live, "adopt"), (Live, "write_ensemble"), (Live, "record"), (Live, "prune"), (Live, "write_status")]
    calls += [(Control, name) for name in ("load", "try_head", "try_ensemble", "unload")]
    # A kill before a call is one after the call that came before it, but for the first.
    kills = [(Live, "adopt", False), *((owner, name, True) for owner, name in calls)]
    tasks = ["intent", "urgency"]
    for number, (owner, name, after) in enumerate(kills):
        set_parameter("score", f"0.{100 + number}1")(stage.repository / "head_urgency")
        if "slots" in tasks:
            stage.remove("head_slots")
            tasks.remove("slots")
        else:
            stage.drop("more", "head_slots")
            tasks.insert(1, "slots")
        original = getattr(owner, name)

        def killed(*arguments: object, after: bool = after, original: Callable[..., object] = original) -> None:
            if after:
                original(*arguments)
            raise KeyboardInterrupt

        wiring = stage.another()
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, killed)
            with pytest.raises(KeyboardInterrupt):
                stage.settle(wiring)
        assert stage.ask("intent") == baseline, f"killed at {name}"
        stage.settle(stage.another())
        assert stage.tasks() == tasks
        assert stage.state("head_urgency") == ("serving", "")
        state = stage.live.state()
        assert state is not None
        loaded = {model for model, ready in stage.control.index().items() if ready}
        assert loaded == state.models | {ENSEMBLE}, f"killed at {name}"


def test_rollback_serves_what_was_served_until_the_owner_changes_the_folder(stage: Stage) -> None:
    before, first = stage.ask(), stage.live.state().generation  # type: ignore[union-attr]
    stage.drop("second", "head_urgency")
    stage.drop("more", "head_slots")
    stage.settle()
    state = stage.wiring.rollback()
    assert state.changes == (f"rolled back to {first}", "removed slots", "updated urgency")
    assert stage.ask() == before
    for wiring in (stage.wiring, stage.another()):
        assert stage.settle(wiring).change is None, "what was rolled back from came back by itself"
    assert stage.state("head_slots") == ("refused", "it was rolled back from")
    assert stage.state("head_urgency") == ("refused", "it was rolled back from")
    stage.remove("head_intent")
    stage.settle()
    assert stage.tasks() == ["urgency"], "other tasks follow their folders"
    stage.drop("first", "head_intent", "head_urgency")
    shutil.copytree(stage.shop / "more" / "head_slots" / "1", stage.repository / "head_slots" / "2")
    stage.settle()
    assert stage.tasks() == ["intent", "slots", "urgency"]


def test_rollback_brings_back_a_removed_task(stage: Stage) -> None:
    before = stage.ask()
    generation = stage.live.state().generation  # type: ignore[union-attr]
    stage.remove("head_urgency")
    stage.settle()
    assert stage.tasks() == ["intent"]
    stage.wiring.rollback(generation)
    assert stage.settle(stage.another()).change is None
    assert stage.ask() == before
    with pytest.raises(WiringError, match="generation 999999 is not kept; kept are"):
        stage.wiring.rollback(999999)
    with pytest.raises(WiringError, match="is what is served now"):
        stage.wiring.rollback(generation)


def test_a_candidate_is_beside_its_task_and_takes_its_place(stage: Stage) -> None:
    first = stage.ask("intent")
    stage.drop("second", "head_intent", as_="head_intent__candidate")
    stage.settle()
    assert stage.tasks() == ["intent", "intent__candidate", "urgency"]
    assert list(stage.ask()[0]) == ["intent", "urgency"]
    second = [row["intent__candidate"] for row in stage.ask("intent", "intent__candidate")]
    assert second != [row["intent"] for row in first]
    exchange(stage.repository / "head_intent", stage.repository / "head_intent__candidate")
    done = stage.settle()
    assert done.change is not None
    assert done.change.state.changes == ("updated intent", "updated intent__candidate")
    assert [row["intent"] for row in stage.ask("intent")] == second


def test_a_trunk_changes_with_all_its_heads_or_not_at_all(stage: Stage, other: Path) -> None:
    before = stage.ask()
    for name in ("tokenizer", "trunk_0_1", "trunk_1_2"):
        shutil.rmtree(stage.repository / name)
        shutil.copytree(other / name, stage.repository / name)
    assert stage.settle().change is None
    kind, why = stage.state("trunk_*")
    assert kind == "refused"
    assert "does not fit intent, urgency" in why
    assert stage.ask() == before
    for name in ("head_intent", "head_urgency"):
        shutil.rmtree(stage.repository / name)
        shutil.copytree(other / name, stage.repository / name)
    stage.settle()
    assert stage.tasks() == ["intent", "urgency"]
    assert stage.ask() != before


def reschedule(stage: Stage, **settings: int) -> None:
    """As `espalier tune` writes it."""
    for folder in stage.repository.glob("trunk_*"):
        config = read_config(folder)
        Scheduling.read(config).model_copy(update=settings).write_to(config)
        write_config(folder, config)


def test_a_trunk_that_is_scheduled_otherwise_is_taken_over(stage: Stage) -> None:
    before = stage.ask()
    reschedule(stage, instances=2, batch=4, delay=100)
    assert stage.settle().change is not None
    state = stage.live.state()
    assert state is not None
    for model in state.trunk:
        served = stage.control.config(model)
        assert served is not None
        assert (served.instance_group[0].count, served.dynamic_batching.max_queue_delay_microseconds) == (2, 100)
    assert stage.ask() == before


def test_a_trunk_that_takes_more_cores_than_the_server_hands_out_is_refused(stage: Stage) -> None:
    before = stage.ask()
    reschedule(stage, threads=available_cores() + 1)
    assert stage.settle().change is None
    kind, why = stage.state("trunk_*")
    assert kind == "refused"
    assert 'Resource count for "cores" is limited to' in why
    assert stage.ask() == before


def test_a_trunk_that_was_rolled_back_from_stays_so(stage: Stage, other: Path) -> None:
    before, first = stage.ask(), stage.live.state().generation  # type: ignore[union-attr]
    for name in ("tokenizer", "trunk_0_1", "trunk_1_2", "head_intent", "head_urgency"):
        shutil.rmtree(stage.repository / name)
        shutil.copytree(other / name, stage.repository / name)
    stage.settle()
    stage.wiring.rollback(first)
    for wiring in (stage.wiring, stage.another()):
        assert stage.settle(wiring).change is None
    assert stage.ask() == before
    assert stage.state("trunk_*") == ("refused", "it was rolled back from")


def not_finite_with(task: str, asked: list[str]) -> Callable[..., None]:
    """Return a `Control.try_ensemble` that fails for ensembles with `task`, and notes in `asked` what is tried."""
    original = Control.try_ensemble

    def fail(control: Control, name: str, heads: dict[str, HeadInfo], like: str | None) -> None:
        asked.append(name)
        if task in heads:
            raise Refused("it answers with numbers that are not finite")
        original(control, name, heads, like)

    return fail


def test_a_head_that_fails_among_others_alone_is_told_apart(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two heads come at once; one of them fails in the ensemble, which nobody else may notice."""
    asked: list[str] = []
    monkeypatch.setattr(Control, "try_ensemble", not_finite_with("slots", asked))
    stage.drop("more", "head_slots", "head_same_request")
    stage.settle()
    assert stage.tasks() == ["intent", "same_request", "urgency"]
    kind, why = stage.state("head_slots")
    assert kind == "refused"
    assert "the ensemble with it fails: it answers with numbers that are not finite" in why
    assert set(asked) == {TRIAL}, "the ensemble that is served was put to the test"
    count = len(asked)
    stage.settle()
    assert len(asked) == count, "what answers wrongly is tried again and again"


def test_a_model_that_ends_the_server_is_tried_twice(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    original = Control.load

    def die(control: Control, model: str) -> None:
        if model.startswith("head_slots"):
            raise UnavailableError("the server is gone")
        original(control, model)

    monkeypatch.setattr(Control, "load", die)
    stage.drop("more", "head_slots")
    with pytest.raises(UnavailableError):
        stage.settle()
    stage.settle()
    assert stage.state("head_slots") == ("refused", "the server ended 2 times while this was loaded or tried")
    assert stage.tasks() == ["intent", "urgency"]


def no_memory_for(*models: str) -> Callable[[Control, str], None]:
    """Return a `Control.load` that fails for models whose names begin so."""
    original = Control.load

    def load(control: Control, model: str) -> None:
        if model.startswith(models):
            raise Refused("out of memory")
        original(control, model)

    return load


def test_a_head_that_cannot_be_brought_back_leaves_the_others(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    before = stage.ask("intent")
    for model in [ENSEMBLE, *(stage.live.state().models)]:  # type: ignore[union-attr]
        stage.control.unload(model)
    with monkeypatch.context() as patch:
        patch.setattr(Control, "load", no_memory_for("head_urgency"))
        stage.wiring.reconcile()
    assert stage.ask("intent") == before


def test_refusals_are_logged_once(stage: Stage, caplog: pytest.LogCaptureFixture) -> None:
    set_parameter("fingerprint", "f" * 64)(stage.repository / "head_intent")
    for _ in range(2):
        stage.settle()
    assert (
        len([r for r in caplog.records if "head_intent: refused: head_intent was trained on another" in r.message]) == 1
    )


def test_a_copy_by_rsync_is_not_at_rest_before_its_end(stage: Stage) -> None:
    shutil.copytree(stage.shop / "more" / "head_slots", stage.repository / "head_slots")
    model = stage.repository / "head_slots" / "1" / "model.onnx"
    whole = model.read_bytes()
    model.unlink()
    growing = model.with_name(".model.onnx.Xy12zA")
    for size in range(0, len(whole), len(whole) // 4):
        growing.write_bytes(whole[:size])
        assert stage.wiring.reconcile().change is None
        assert stage.state("head_slots") == ("loading", "its folder is changing")
        time.sleep(0.1)
    growing.write_bytes(whole)
    growing.rename(model)
    stage.settle()
    assert stage.tasks() == ["intent", "slots", "urgency"]


def test_a_live_store_inside_the_repository_is_refused(stage: Stage) -> None:
    with pytest.raises(WiringError, match="lies in the repository; give another --live"):
        Wiring(stage.repository, Live(stage.repository / "live"), stage.control)


def test_an_empty_repository_is_no_removal_of_every_task(stage: Stage) -> None:
    away = stage.repository.with_name("away")
    stage.repository.rename(away)
    with pytest.raises(ContractError, match="cannot be read: No such file"):
        stage.wiring.reconcile()
    stage.repository.mkdir()
    with pytest.raises(ContractError, match="holds no trunk segment"):
        stage.wiring.reconcile()
    assert stage.tasks() == ["intent", "urgency"]
    stage.repository.rmdir()
    away.rename(stage.repository)
    assert stage.settle().change is None


def test_two_services_at_once_do_what_one_does(stage: Stage) -> None:
    stage.drop("more", "head_slots", "head_slots_crf", "head_same_request")
    start = stage.live.state().generation  # type: ignore[union-attr]
    threads = [threading.Thread(target=stage.settle, args=(stage.another(),)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert stage.tasks() == ["intent", "same_request", "slots", "slots_crf", "urgency"]
    assert [state.generation for state in stage.live.history() if state.generation > start] == [start + 1]


def test_triton_that_lost_everything_is_brought_back(stage: Stage) -> None:
    before = stage.ask()
    for model in [ENSEMBLE, *(stage.live.state().models)]:  # type: ignore[union-attr]
        stage.control.unload(model)
    assert stage.settle().change is None, "nothing changed, it is only loaded again"
    assert stage.ask() == before


def test_no_server_is_one_sentence(stage: Stage) -> None:
    wiring = Wiring(stage.repository, stage.live, Control("127.0.0.1:9", "127.0.0.1:9"))
    with pytest.raises(UnavailableError, match=r"127\.0\.0\.1:9 is unavailable"):
        wiring.reconcile()


def test_an_http_endpoint_that_is_elsewhere_is_told_so_and_no_head_is_blamed(stage: Stage) -> None:
    wiring = Wiring(stage.repository, stage.live, Control(stage.server.grpc_url, "127.0.0.1:9"))
    wiring.inbox.settled = 0.2
    before = stage.tasks()
    stage.drop("second", "head_intent")
    for _ in range(DEATHS + 1):
        with pytest.raises(WiringError, match=r"not at 127\.0\.0\.1:9 \(HTTP.*--http-url"):
            stage.settle(wiring)
    assert stage.tasks() == before
    assert stage.settle().change is not None, "the wiring that knows the endpoint takes the head"


# --- merged heads -----------------------------------------------------------------------------------------------------

MERGED = ("trunk_0_1_heads", "trunk_1_2_heads")


def fill(stage: Stage) -> None:
    """Serve two tasks on each of two taps, one on them a CRF, and a candidate."""
    stage.drop("more", "head_slots", "head_slots_crf")
    stage.drop("second", "head_intent", as_="head_intent__b")
    stage.settle()


def newest(stage: Stage) -> State:
    state = stage.live.state()
    assert state is not None
    loaded = {model for model, ready in stage.control.index().items() if ready}
    assert loaded == state.models | {ENSEMBLE}
    return state


def alone(state: State) -> set[str]:
    """Return the tasks whose heads are models of their own."""
    return set(state.heads).difference(*state.merged)


def test_heads_at_rest_are_merged_and_answer_as_before(stage: Stage) -> None:
    fill(stage)
    before, candidate, apart = stage.ask(), stage.ask("intent__b"), newest(stage)
    late = stage.another(merge_after=3600)
    assert stage.settle(late).change is None, "it has not been at rest for an hour"
    soon = stage.another(merge_after=0)
    stage.settle(soon)
    state = newest(stage)
    assert state.merged == [["intent", "slots_crf"], ["slots", "urgency"]]
    assert {model.partition("-")[0] for model in state.groups} == set(MERGED)
    assert len(state.models) == len({"tokenizer", *MERGED, "head_intent__b"}), "no segment runs by itself"
    assert alone(state) == {"intent__b"}, "a candidate is asked only by name"
    assert (state.changes, state.time, state.answers) == (apart.changes, apart.time, apart.answers)
    assert apart.generation not in [kept.generation for kept in stage.live.history()]
    assert stage.ask() == before
    for task in before[0]:
        assert stage.ask(task) == [{task: row[task]} for row in before]
    assert stage.ask("intent__b") == candidate
    for wiring in (soon, stage.another(merge_after=0), late):
        assert stage.settle(wiring).change is None
    assert newest(stage) == state
    stage.settle(stage.another())
    assert newest(stage).models == apart.models
    assert stage.ask() == before


def test_a_merged_head_is_updated_removed_and_refused_like_any_other(stage: Stage) -> None:
    fill(stage)
    stage.settle(stage.another(merge_after=0))
    before, groups = stage.ask(), newest(stage).groups
    wiring = stage.another(merge_after=3600)
    stage.drop("second", "head_urgency")
    assert stage.settle(wiring).change.state.changes == ("updated urgency",)  # type: ignore[union-attr]
    state = newest(stage)
    assert state.groups == groups, "the others stay merged"
    assert state.merged == [["intent", "slots_crf"], ["slots"]]
    assert alone(state) == {"intent__b", "urgency"}
    after = stage.ask()
    for task in ("intent", "slots", "slots_crf"):
        assert [row[task] for row in after] == [row[task] for row in before]
    assert [row["urgency"] for row in after] != [row["urgency"] for row in before]
    truncate(stage.repository / "head_slots")
    assert stage.settle(wiring).change is None
    assert stage.state("head_slots")[0] == "refused"
    assert stage.ask() == after
    stage.remove("head_slots_crf")
    assert stage.settle(wiring).change.state.changes == ("removed slots_crf",)  # type: ignore[union-attr]
    assert stage.tasks() == ["intent", "intent__b", "slots", "urgency"]
    stage.settle(stage.another(merge_after=0))
    state = newest(stage)
    assert state.merged == [["intent"], ["slots", "urgency"]]
    assert alone(state) == {"intent__b"}
    assert stage.ask() == [{task: row[task] for task in ("intent", "slots", "urgency")} for row in after]


def test_a_merged_segment_goes_on_whatever_becomes_of_its_heads(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """No change waits for the segment to be loaded by itself; at the next rest nothing is left of what has gone."""
    stage.settle(stage.another(merge_after=0))
    first = newest(stage)
    assert first.merged == [["intent"], ["urgency"]]
    wiring = stage.another(merge_after=3600)
    monkeypatch.setattr(Control, "load", no_memory_for("trunk_"))
    stage.drop("second", "head_intent", "head_urgency")
    stage.settle(wiring)
    state = newest(stage)
    assert (state.groups, state.merged, alone(state)) == (first.groups, [], {"intent", "urgency"})
    assert stage.tasks() == ["intent", "urgency"]
    answers = stage.ask()
    with monkeypatch.context() as patch:  # a new head is tried alone, on a segment that holds others
        patch.setattr(Control, "try_ensemble", not_finite_with("slots", []))
        stage.drop("more", "head_slots", "head_same_request")
        stage.settle(wiring)
    assert stage.tasks() == ["intent", "same_request", "urgency"]
    assert stage.state("head_slots")[1].startswith("the ensemble with it fails: it answers")
    stage.remove("head_intent", "head_same_request", "head_slots")
    stage.settle(wiring)
    assert newest(stage).groups == first.groups
    assert stage.ask() == [{"urgency": row["urgency"]} for row in answers]
    monkeypatch.undo()
    stage.settle(stage.another(merge_after=0))
    state = newest(stage)
    assert state.merged == [["urgency"]]
    assert {model.partition("-")[0] for model in state.models} == {"tokenizer", "trunk_0_1", "trunk_1_2_heads"}
    assert stage.ask() == [{"urgency": row["urgency"]} for row in answers]


def test_rollback_goes_by_what_is_answered_not_by_what_is_merged(stage: Stage) -> None:
    fill(stage)
    before = stage.ask()
    wiring = stage.another(merge_after=0)
    stage.settle(wiring)
    first = newest(stage)
    stage.drop("second", "head_urgency")
    stage.settle(stage.another(merge_after=3600))
    late = stage.ask()
    assert late != before
    state = wiring.rollback()
    assert state.changes == (f"rolled back to {first.generation}", "updated urgency")
    assert newest(stage).groups == first.groups, "the merged model that is still there answers it again"
    assert stage.ask() == before
    assert stage.settle(wiring).change is None
    stage.drop("third", "head_urgency")
    stage.remove("head_slots")
    stage.settle(wiring)
    stage.settle(stage.another(merge_after=0))
    assert newest(stage).merged == [["intent", "slots_crf"], ["urgency"]]
    wiring.rollback()
    assert alone(newest(stage)) == {"intent__b", "slots", "urgency"}, "the model of these two has gone"
    assert stage.ask() == before
    stage.drop("more", "head_slots")  # its owner changed it: what was rolled back from is forgotten
    stage.settle()


def test_merged_heads_come_back_and_apart_if_their_model_does_not(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(stage)
    wiring = stage.another(merge_after=0)
    stage.settle(wiring)
    before, models = stage.ask(), newest(stage).models

    def lose() -> None:
        for model in [ENSEMBLE, *models]:
            stage.control.unload(model)

    lose()
    assert stage.settle(wiring).change is None
    assert newest(stage).models == models
    assert stage.ask() == before
    lose()
    with monkeypatch.context() as patch:
        patch.setattr(Control, "load", no_memory_for(MERGED[0]))
        for _ in range(2):
            stage.settle(wiring)
            assert stage.ask() == before
    wiring.rejected.clear()  # as after a minute
    stage.settle(wiring)
    assert newest(stage).models == models
    assert stage.ask() == before
    lose()
    for folder in stage.live.models.glob("*_heads-*"):
        shutil.rmtree(folder)
    stage.settle(wiring)
    assert newest(stage).models == models, "a merged model that is lost is made again"
    assert stage.ask() == before


def test_a_merged_model_that_answers_otherwise_is_not_served(
    stage: Stage, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fill(stage)
    before = stage.ask()
    original = merge.merge

    def swap(name: str, heads: list[tuple[HeadInfo, Path]], to: Path, segment: Path) -> None:
        other = stage.shop / "second" / "head_intent"
        original(name, [(head, other if head.task == "intent" else folder) for head, folder in heads], to, segment)

    wiring = stage.another(merge_after=0)
    with monkeypatch.context() as patch:
        patch.setattr(merge, "merge", swap)
        stage.settle(wiring)
    assert any("it answers 'intent' otherwise than what is served" in record.message for record in caplog.records)
    for _ in range(2):
        assert newest(stage).merged == [["slots", "urgency"]], "the other tap is merged nevertheless"
        assert stage.ask() == before
        wiring.regroup_from = 0.0  # as after a minute
        assert stage.settle(wiring).change is None


def test_heads_that_cannot_be_merged_or_parted_stay_as_they_are(
    stage: Stage, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fill(stage)
    before, apart = stage.ask(), newest(stage)

    def broken(*arguments: object) -> None:
        raise ValueError("a graph of another kind")

    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for owner, name, broken_one in (
        (merge, "merge", broken), (merge, "merge", full), (Control, "load", no_memory_for(*MERGED)),
    ):  # fmt: skip
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, broken_one)
            assert stage.settle(stage.another(merge_after=0)).change is None
        assert newest(stage) == apart
    for why in ("cannot be made: a graph of another kind", "No space left on device"):
        assert any(why in record.message for record in caplog.records)
    wiring = stage.another(merge_after=0)
    with monkeypatch.context() as patch:
        patch.setattr(Control, "load", no_memory_for(MERGED[0]))
        stage.settle(wiring)
    assert {until > time.monotonic() + RETRY for _, until in wiring.rejected.values()} == {True}
    wiring.regroup_from = 0.0  # as after a minute
    stage.settle(wiring)
    assert newest(stage).merged == [["slots", "urgency"]], "it keeps no other tap apart, and can wait"
    wiring.rejected.clear()  # as after ten minutes
    stage.settle(wiring)
    merged = newest(stage)
    assert len(merged.merged) == 2
    wiring = stage.another()
    for models in ("head_", "trunk_0_1-"):
        wiring.regroup_from = 0.0
        with monkeypatch.context() as patch:
            patch.setattr(Control, "load", no_memory_for(models))
            assert stage.settle(wiring).change is None
        assert newest(stage) == merged, "nothing more is loaded than before"
    assert {entry.state for entry in stage.live.status().folders.values()} == {"serving"}  # type: ignore[union-attr]
    assert stage.ask() == before


def test_heads_that_part_in_vain_leave_the_trunk_as_it_is(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """A segment that changes parts what it is merged with; if that cannot be loaded, nothing is changed or refused."""
    fill(stage)
    stage.settle(stage.another(merge_after=0))
    before, merged = stage.ask(), newest(stage)
    wiring = stage.another(merge_after=3600)
    change_config(lambda config: setattr(config.instance_group[0], "count", 1))(stage.repository / "trunk_0_1")
    with monkeypatch.context() as patch:
        patch.setattr(Control, "load", no_memory_for("head_slots_crf"))
        assert stage.settle(wiring).change is None
    assert newest(stage) == merged, "nothing more is loaded than before"
    assert stage.state("trunk_*")[0] == "refused"
    assert "out of memory" in stage.state("trunk_*")[1]
    assert stage.state("head_slots_crf") == ("serving", "")
    assert stage.ask() == before
    wiring.rejected.clear()  # as after a minute
    assert stage.settle(wiring).change is not None
    assert newest(stage).merged == [["slots", "urgency"]]
    assert stage.ask() == before


def test_a_model_of_merged_heads_is_no_larger_than_it_may_be(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(stage)
    stage.drop("more", "head_same_request")
    stage.settle()
    before = stage.ask()
    held = ("trunk_0_1", "head_intent", "head_same_request")
    sizes = [merge.size(stage.repository / name) for name in held]
    monkeypatch.setattr(merge, "LARGEST", sum(sizes))
    stage.settle(stage.another(merge_after=0))
    assert ["intent", "same_request"] in newest(stage).merged, "slots_crf is one too many"
    assert stage.ask() == before
    monkeypatch.setattr(merge, "LARGEST", sum(sizes[1:]))
    stage.settle(stage.another(merge_after=0))
    state = newest(stage)
    assert ["intent", "same_request"] in state.merged, "without the segment, which leaves no room"
    assert "heads_1" in {model.partition("-")[0] for model in state.groups}
    assert stage.ask() == before


def test_what_has_settings_of_its_own_stays_alone(stage: Stage) -> None:
    fill(stage)
    change_config(lambda config: setattr(config.instance_group[0], "count", 2))(stage.repository / "head_slots_crf")
    stage.settle(stage.another(merge_after=0))
    assert alone(newest(stage)) == {"intent__b", "slots_crf"}
    queue = change_config(lambda config: setattr(config.dynamic_batching.default_queue_policy, "max_queue_size", 100))
    queue(stage.repository / "trunk_1_2")
    stage.settle(stage.another(merge_after=0))
    state = newest(stage)
    assert state.merged == [["intent"], ["slots", "urgency"]]
    assert {model.partition("-")[0] for model in state.models} >= {"trunk_0_1_heads", "trunk_1_2", "heads_2"}


def test_a_live_store_that_lacks_something_ends_no_pass(stage: Stage, caplog: pytest.LogCaptureFixture) -> None:
    fill(stage)
    before = stage.ask()
    model = next(stage.live.models.glob("head_slots-*/1/model.onnx"))
    away = model.rename(stage.live.path / "away")
    wiring = stage.another(merge_after=0)
    stage.settle(wiring)
    assert any("holds no model.onnx in a version folder" in record.message for record in caplog.records)
    assert newest(stage).merged == [["intent", "slots_crf"]], "the other tap is merged nevertheless"
    away.rename(model)
    wiring.regroup_from = 0.0  # as after a minute
    stage.settle(wiring)
    merged = newest(stage)
    assert len(merged.groups) == 2
    other = {model: held.model_copy(update={"segment": "trunk_5_6-0"}) for model, held in merged.groups.items()}
    stage.live.record(merged.model_copy(update={"groups": other}))
    stage.settle(wiring)
    assert any("trunk_5_6-0, which is not in the trunk" in record.message for record in caplog.records)
    assert newest(stage).groups == merged.groups
    assert stage.ask() == before


def test_a_merge_that_was_killed_is_made_up_for(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(stage)
    before = stage.ask()
    calls = [(Live, "adopt"), (Live, "write_ensemble"), (Live, "record"), (Live, "prune")]
    calls += [(Control, name) for name in ("load", "try_ensemble", "unload")]
    for owner, name in calls:
        stage.settle(stage.another())
        assert not newest(stage).groups
        original = getattr(owner, name)

        def killed(*arguments: object, original: Callable[..., object] = original) -> None:
            original(*arguments)
            raise KeyboardInterrupt

        wiring = stage.another(merge_after=0, tidied=True)
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, killed)
            with pytest.raises(KeyboardInterrupt):
                stage.settle(wiring)
        assert stage.ask() == before, f"killed at {name}"
        stage.settle(stage.another(merge_after=0))
        assert len(newest(stage).groups) == 2, f"killed at {name}"
        assert stage.ask() == before, f"killed at {name}"


ASKING = """
import sys, threading
from pathlib import Path
from espalier.configs import read_config
from espalier.contract import ENSEMBLE, HeadInfo
from serving.control import Control

def ask():
    while True:
        Control(*sys.argv[1:3]).try_ensemble(ENSEMBLE, heads)

heads = {path.name.removeprefix("head_"): HeadInfo.read(read_config(path)) for path in map(Path, sys.argv[3:])}
for _ in range(8):
    threading.Thread(target=ask).start()
print("asking", flush=True)
"""


def test_smoke_inferences_whose_client_is_killed_do_not_harm_the_server(stage: Stage) -> None:
    stage.drop("more", "head_slots", "head_slots_crf", "head_same_request")
    stage.settle()
    before = stage.ask()
    folders = [str(stage.repository / f"head_{task}") for task in stage.tasks()]
    command = [sys.executable, "-c", ASKING, stage.server.grpc_url, stage.server.http_url, *folders]
    for number in range(6):
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            line = process.stdout.readline() if process.stdout is not None else ""
            time.sleep(0.1 + 0.05 * number)
            process.kill()
        assert line == "asking\n"
    assert stage.ask() == before


def test_a_server_that_reads_another_repository_is_told_so(stage: Stage, tmp_path: Path) -> None:
    wiring = Wiring(stage.repository, Live(tmp_path / "elsewhere"), stage.control)
    with pytest.raises(WiringError, match=r"does not see .*--model-control-mode=explicit"):
        stage.settle(wiring)

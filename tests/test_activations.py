"""Trunk activations: token-exact, computed once, shared, bounded on disk."""

import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import python_on_full_disk
from test_training import QUICK, evaluate, silent, stop_after, write_task

from espalier.contract import Kind
from espalier.encoder import Base
from espalier.errors import DataError
from espalier.spec import TaskSpec, load_spec
from training.activations import ActivationCache
from training.data import load_data
from training.distill import distill
from training.features import collate, featurize
from training.finetune import train
from training.trainer import Arguments, Progress


@pytest.fixture
def spec(tmp_path: Path) -> TaskSpec:
    return load_spec(write_task(tmp_path, Kind.CLASSIFICATION))


@pytest.fixture
def cache(tmp_path: Path) -> ActivationCache:
    return ActivationCache(tmp_path / "cache")


def features_of(spec: TaskSpec, base: Base) -> list[dict[str, Any]]:
    data = load_data(spec)
    return featurize(spec.kind, data.labels, base.tokenizer, base.max_length, data.train)


def sets(cache: ActivationCache) -> list[Path]:
    """Return what lies in the cache, half-written sets included."""
    return [path for path in cache.folder.iterdir() if path.name != ".lock"]


def nothing(done: int, total: int) -> None:
    pass


def test_they_are_the_trunks_output_without_pads(spec: TaskSpec, tiny: Base, cache: ActivationCache) -> None:
    features = features_of(spec, tiny)
    activations = cache.get(tiny, 2, features, nothing)
    for row in (0, 7, 59):
        batch = collate([features[row]])
        want = tiny.encoder(batch["input_ids"], batch["token_type_ids"], batch["mask"], tap=2)[0]
        assert activations[row].shape == want.shape
        torch.testing.assert_close(activations[row], want, atol=2e-3, rtol=0)
    tokens = sum(len(feature["input_ids"]) for feature in features)
    (file,) = cache.folder.glob("*/hidden.f16")
    assert file.stat().st_size == tokens * 32 * 2


def test_a_batch_has_them_padded_like_its_tokens(spec: TaskSpec, tiny: Base, cache: ActivationCache) -> None:
    features = features_of(spec, tiny)
    cache.get(tiny, 1, features, nothing).attach(features)
    batch = collate(features[:5])
    assert batch["hidden"].shape == (*batch["input_ids"].shape, 32)
    assert batch["hidden"].dtype == torch.float32
    assert not batch["hidden"][~batch["mask"]].any()


def test_they_are_computed_once_for_all_seeds_rates_and_students(
    spec: TaskSpec, tiny: Base, cache: ActivationCache, tmp_path: Path
) -> None:
    stages: list[str] = []

    def report(progress: Progress) -> None:
        stages.append(progress.stage)

    train(spec, tiny, 1, 2, Arguments(1, 1e-3, 8), tmp_path / "first", report, cache)
    assert "trunk" in stages
    stages.clear()
    train(spec, tiny, 1, 2, Arguments(1, 2e-3, 8, seed=5), tmp_path / "second", report, cache)
    train(spec, tiny, 1, 1, Arguments(1, 1e-3, 8), tmp_path / "third", report, cache)
    distill(tmp_path / "first", tiny, 1, Arguments(1, 1e-3, 8), tmp_path / "student", report, cache=cache)
    assert set(stages) == {"training", "teacher"}
    assert len(sets(cache)) == 2  # train and dev


@pytest.mark.parametrize("change", ["tap", "text", "trunk"])
def test_what_they_depend_on_names_them(change: str, spec: TaskSpec, tiny: Base, base: Base, tmp_path: Path) -> None:
    cache = ActivationCache(tmp_path / "cache")
    features = features_of(spec, tiny)[:4]
    cache.get(tiny, 1, features, nothing)
    match change:
        case "tap":
            cache.get(tiny, 2, features, nothing)
        case "text":
            cache.get(tiny, 1, features[::-1], nothing)
        case "trunk":
            cache.get(base, 1, features, nothing)
    assert len(sets(cache)) == 2


@pytest.mark.parametrize("kind", list(Kind))
def test_a_card_tells_what_is_served_not_what_was_rounded(
    kind: Kind, tiny: Base, cache: ActivationCache, tmp_path: Path
) -> None:
    spec = load_spec(write_task(tmp_path, kind, rows=200))
    card, _ = train(spec, tiny, 1, 2, Arguments(8, 5e-3, 8), tmp_path / "branch", silent, cache)
    assert card.score > 0.9
    assert evaluate(spec, tiny, tmp_path / "branch") == pytest.approx(card.metrics, abs=1e-6)


def test_a_stopped_run_goes_on_to_the_same_branch(
    spec: TaskSpec, tiny: Base, cache: ActivationCache, tmp_path: Path
) -> None:
    whole, _ = train(spec, tiny, 1, 2, QUICK, tmp_path / "whole", silent, cache)
    with pytest.raises(KeyboardInterrupt):
        train(spec, tiny, 1, 2, QUICK, tmp_path / "branch", stop_after(1), cache)
    assert train(spec, tiny, 1, 2, QUICK, tmp_path / "branch", silent, cache)[0].weights == whole.weights


def test_a_limit_is_told_before_it_is_exceeded(spec: TaskSpec, tiny: Base, tmp_path: Path) -> None:
    features = features_of(spec, tiny)
    cache = ActivationCache(tmp_path / "cache", limit=30_000)
    cache.get(tiny, 1, features[:20], nothing)
    done: list[int] = []
    with pytest.raises(DataError, match=r"60 texts at tap 1 need .* raise --cache-limit, or train without --cache"):
        cache.get(tiny, 1, features, lambda at, total: done.append(at))
    assert not done
    assert len(sets(cache)) == 1


def test_two_that_need_the_same_compute_it_once(spec: TaskSpec, tiny: Base, cache: ActivationCache) -> None:
    """Locks are held by open files: what keeps two threads apart keeps two processes apart."""
    features = features_of(spec, tiny)
    begun = threading.Event()
    computed: list[str] = []

    def get(name: str) -> None:
        def report(done: int, total: int) -> None:
            computed.append(name)
            begun.set()
            time.sleep(0.05)

        cache.get(tiny, 1, features, report)

    first = threading.Thread(target=get, args=("first",))
    first.start()
    assert begun.wait(20)
    get("second")
    first.join()
    assert set(computed) == {"first"}
    assert len(sets(cache)) == 1


def test_a_stopped_computation_leaves_nothing(spec: TaskSpec, tiny: Base, cache: ActivationCache) -> None:
    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    features = features_of(spec, tiny)
    with pytest.raises(KeyboardInterrupt):
        cache.get(tiny, 1, features, stop)
    assert sets(cache) == []
    assert np.isfinite(cache.get(tiny, 1, features, nothing)[0]).all()


def test_a_full_disk_is_one_sentence(tiny_checkpoint: Path, tmp_path: Path) -> None:
    spec = write_task(tmp_path, Kind.CLASSIFICATION)
    command = ["-m", "espalier.cli", "train", spec, "--base", tiny_checkpoint, "--tap", "1", "--out", tmp_path / "out"]
    done = python_on_full_disk(5_000, *command, "--cache")
    assert done.returncode == 1
    assert "Error: the activations cannot be written to" in done.stderr
    assert "Traceback" not in done.stderr
    assert not sets(ActivationCache(tmp_path / ".activations"))

"""Heads and the segment below, merged: the same answers to the last bit; on a real Triton behind the usual clients."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from conftest import DEEP, SHALLOW, TASKS

from benchmarks.cost.ways import merged
from clients import Client
from espalier.configs import head_infos, merged_config, read_config
from espalier.contract import (
    BELOW,
    CONFIG_FILE,
    ENSEMBLE,
    MODEL_FILE,
    HeadInfo,
    Structure,
    TrunkInfo,
    merged_output,
)
from espalier.errors import ContractError
from espalier.repository import Repository
from export import merge as merging
from export.merge import merge
from export.session import session
from serving.check import check_onnx
from serving.triton import TritonServer, on_free_ports

Array = np.ndarray[Any, Any]
TOGETHER = sorted(task for task, (tap, _) in TASKS.items() if tap == SHALLOW)


@pytest.fixture(scope="module")
def heads(repository: Path) -> list[tuple[HeadInfo, Path]]:
    """The heads of the shallow tap, of every kind: what they say of themselves, and their folders."""
    folders = [repository / f"head_{task}" for task in TOGETHER]
    return [(HeadInfo.read(read_config(folder)), folder) for folder in folders]


@pytest.fixture(scope="module")
def whole(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The repository with all heads merged into the segments below."""
    path = tmp_path_factory.mktemp("merged") / "model_repository"
    merged(repository, tuple(TASKS), path)
    return path


def run(folder: Path, names: list[str], given: dict[str, Array]) -> list[Array]:
    """Return outputs of the model in `folder`, which takes of `given` what it needs."""
    model = session(folder / "1" / MODEL_FILE, 1)
    answers: list[Array] = model.run(names, {tensor.name: given[tensor.name] for tensor in model.get_inputs()})
    return answers


def test_a_merged_model_answers_like_its_heads_to_the_last_bit(
    heads: list[tuple[HeadInfo, Path]], tmp_path: Path
) -> None:
    merge("heads_3", heads, tmp_path)
    rng = np.random.default_rng(0)
    lengths = np.array([[7], [1], [30], [12]], np.int32)
    tokens, width = int(lengths.sum()), heads[0][0].hidden_size
    feed = {
        "hidden": rng.normal(size=tokens * width).astype(np.float32), "length": lengths,
        "shape": np.hstack([lengths, np.full_like(lengths, width)]), "input_ids": rng.integers(5, 30000, tokens),
    }  # fmt: skip
    for head, folder in heads:
        [expected], [answer] = run(folder, [head.output], feed), run(tmp_path, [merged_output(head)], feed)
        assert expected.size > 0
        np.testing.assert_array_equal(answer, expected)


def test_a_merged_folder_describes_itself(heads: list[tuple[HeadInfo, Path]], tmp_path: Path) -> None:
    merge("heads_3-abc", heads, tmp_path)
    config = read_config(tmp_path)
    assert config == merged_config("heads_3-abc", [head for head, _ in heads])
    assert head_infos(config) == {merged_output(head): head for head, _ in heads}
    check_onnx(tmp_path / "1" / MODEL_FILE, config)
    for output in config.output:
        head = head_infos(config)[output.name]
        if output.label_filename:
            assert (tmp_path / output.label_filename).read_text().splitlines() == list(head.labels)
    assert sum(bool(output.label_filename) for output in config.output) == 2  # intent and same_request
    first = (tmp_path / "1" / MODEL_FILE).read_bytes(), (tmp_path / CONFIG_FILE).read_bytes()
    again = tmp_path / "again"
    again.mkdir()
    merge("heads_3-abc", heads, again)
    assert ((again / "1" / MODEL_FILE).read_bytes(), (again / CONFIG_FILE).read_bytes()) == first


def test_a_segment_with_its_heads_answers_like_they_do_one_after_the_other(repository: Path, tmp_path: Path) -> None:
    """Both segments, the upper one with a head that takes the ids as well, on which the lower one ends."""
    rng = np.random.default_rng(0)
    lengths = np.array([[7], [1], [30], [12]], np.int32)
    ids = rng.integers(5, 30000, int(lengths.sum()))
    feed: dict[str, Array] = {
        "input_ids": ids, "token_type_ids": np.zeros_like(ids), "length": lengths, "shape": lengths,
    }  # fmt: skip
    for segment in Repository(repository).trunk():
        own = [head for head in Repository(repository).heads() if head.tap == segment.stop]
        if segment.start > 0:  # a tagging head on an upper segment, too
            own += [head for head in Repository(repository).heads() if head.structure is Structure.CRF]
        to = tmp_path / segment.model
        to.mkdir()
        merge("whole", [(head, repository / head.model) for head in own], to, repository / segment.model)
        config = read_config(to)
        check_onnx(to / "1" / MODEL_FILE, config)
        assert TrunkInfo.read(config) == segment
        assert config.instance_group == read_config(repository / segment.model).instance_group
        names = [output.name for output in config.output]
        assert set(names) == {"hidden", *(merged_output(head) for head in own)}
        answers = dict(zip(names, run(to, names, feed | {"input_ids": ids}), strict=True))
        [hidden] = run(repository / segment.model, ["hidden"], feed)
        np.testing.assert_array_equal(answers["hidden"], hidden)
        shape = np.hstack([lengths, np.full_like(lengths, hidden.shape[1])])
        below = {"hidden": hidden.reshape(-1), "length": lengths, "shape": shape, "input_ids": ids}
        for head in own:
            [expected] = run(repository / head.model, [head.output], below)
            assert expected.size > 0
            np.testing.assert_array_equal(answers[merged_output(head)], expected)
        feed = {BELOW: hidden.reshape(-1), "length": lengths, "shape": shape}


def test_a_task_may_be_called_like_a_tensor_of_the_trunk(
    heads: list[tuple[HeadInfo, Path]], repository: Path, tmp_path: Path
) -> None:
    head, folder = heads[0]
    layers = head.model_copy(update={"task": "layers"})
    merge("whole", [(layers, folder)], tmp_path, repository / "trunk_0_3")
    weights = [weight.name for weight in onnx.load(tmp_path / "1" / MODEL_FILE).graph.initializer]
    assert len(weights) == len(set(weights))
    assert not [name for name in weights if not name.startswith(("layers.", "_trunk."))]


def test_heads_that_cannot_be_one_model_are_refused(
    heads: list[tuple[HeadInfo, Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    foreign = tmp_path / "head_foreign"
    (foreign / "1").mkdir(parents=True)
    model = onnx.load(heads[1][1] / "1" / MODEL_FILE)
    model.opset_import[0].version = 18
    onnx.save(model, foreign / "1" / MODEL_FILE)
    to = tmp_path / "to"
    to.mkdir()
    with pytest.raises(ContractError, match=r"head_foreign has other operators than .*head_intent; export both again"):
        merge("heads_3", [heads[0], (heads[1][0], foreign)], to)
    monkeypatch.setattr(merging, "LARGEST", 1000)
    with pytest.raises(ContractError, match="heads_3: 4 models are more than one ONNX file can hold; merge fewer"):
        merge("heads_3", heads, to)
    assert not list(to.iterdir())


def test_a_merged_repository_has_a_model_per_tap(whole: Path) -> None:
    names = {path.name for path in whole.iterdir() if path.is_dir()}
    assert names == {"tokenizer", f"trunk_0_{SHALLOW}_heads", f"trunk_{SHALLOW}_{DEEP}_heads", ENSEMBLE}
    steps = {step.model_name: step for step in read_config(whole / ENSEMBLE).ensemble_scheduling.step}
    assert {name for name, step in steps.items() if "hidden" in step.output_map} == {f"trunk_0_{SHALLOW}_heads"}


@pytest.fixture(scope="module")
def merged_server(whole: Path) -> Iterator[TritonServer]:
    with on_free_ports(whole, whole.parent / "triton.log") as running:
        yield running


@pytest.mark.server
@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_clients_see_no_difference(server: TritonServer, merged_server: TritonServer, protocol: str) -> None:
    def urls(running: TritonServer) -> str:
        return running.grpc_url if protocol == "grpc" else running.http_url

    texts = ["Wake me at half past seven.", "lights off", ""]
    with Client(urls(server), protocol=protocol) as apart, Client(urls(merged_server), protocol=protocol) as together:
        assert together.tasks() == apart.tasks()
        for tasks in (None, ["intent"], ["slots", "urgency"], ["slots_crf"]):
            assert together.ask_batch(texts, tasks) == apart.ask_batch(texts, tasks)
        pair = ("lights off", "turn the lights off")
        assert together.ask_batch([pair]) == apart.ask_batch([pair])

"""Merged heads: the same answers to the last bit, from one model; on a real Triton behind the usual clients."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from conftest import DEEP, SHALLOW, TASKS

from benchmarks.cost.ways import merged
from clients import Client
from espalier.configs import head_infos, merged_config, read_config
from espalier.contract import CONFIG_FILE, ENSEMBLE, MODEL_FILE, HeadInfo, merged_output
from espalier.errors import ContractError
from export import merge as merging
from export.merge import merge
from export.session import session
from serving.check import check_onnx
from serving.triton import TritonServer, on_free_ports

TOGETHER = sorted(task for task, (tap, _) in TASKS.items() if tap == SHALLOW)


@pytest.fixture(scope="module")
def heads(repository: Path) -> list[tuple[HeadInfo, Path]]:
    """The heads of the shallow tap, of every kind: what they say of themselves, and their folders."""
    folders = [repository / f"head_{task}" for task in TOGETHER]
    return [(HeadInfo.read(read_config(folder)), folder) for folder in folders]


@pytest.fixture(scope="module")
def whole(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The repository with the heads of each tap merged."""
    path = tmp_path_factory.mktemp("merged") / "model_repository"
    merged(repository, path)
    return path


def test_a_merged_model_answers_like_its_heads_to_the_last_bit(
    heads: list[tuple[HeadInfo, Path]], tmp_path: Path
) -> None:
    merge("heads_3", heads, tmp_path)
    model = session(tmp_path / "1" / MODEL_FILE, 1)
    rng = np.random.default_rng(0)
    lengths = np.array([[7], [1], [30], [12]], np.int32)
    tokens, width = int(lengths.sum()), heads[0][0].hidden_size
    feed = {
        "hidden": rng.normal(size=tokens * width).astype(np.float32), "length": lengths,
        "shape": np.hstack([lengths, np.full_like(lengths, width)]), "input_ids": rng.integers(5, 30000, tokens),
    }  # fmt: skip
    for head, folder in heads:
        alone = session(folder / "1" / MODEL_FILE, 1)
        own = {tensor.name: feed[tensor.name] for tensor in alone.get_inputs()}
        expected, answer = alone.run([head.output], own)[0], model.run([merged_output(head)], feed)[0]
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
    with pytest.raises(ContractError, match="heads_3: 4 heads are more than one ONNX file can hold; merge fewer"):
        merge("heads_3", heads, to)
    assert not list(to.iterdir())


def test_a_repository_with_merged_heads_has_a_model_per_tap(whole: Path) -> None:
    names = {path.name for path in whole.iterdir() if path.is_dir()}
    assert names == {"tokenizer", "trunk_0_3", "trunk_3_5", "heads_3", "head_urgency", ENSEMBLE}
    assert TASKS["urgency"][0] == DEEP


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

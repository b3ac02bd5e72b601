"""A repository that cannot be served is told so in one sentence, before any server starts."""

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import TASKS

from espalier.configs import read_config, write_config
from espalier.contract import CONFIG_FILE
from espalier.errors import ContractError, FingerprintError
from serving.preflight import check_repository


@pytest.fixture
def copy(repository: Path, tmp_path: Path) -> Path:
    """A copy to damage. It is made of hard links, so a file must be replaced, never changed in place."""
    return Path(shutil.copytree(repository, tmp_path / "repository", copy_function=os.link))


def rewrite(path: Path, content: bytes) -> None:
    path.unlink()
    path.write_bytes(content)


def cut(name: str, size: int) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        rewrite(path / name, (path / name).read_bytes()[:size])

    return damage


def without(name: str) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        [target] = path.glob(name)
        shutil.rmtree(target) if target.is_dir() else target.unlink()

    return damage


def replaced(name: str, old: str, new: str) -> Callable[[Path], None]:
    """Replace text in a file; `old` is a pattern."""

    def damage(path: Path) -> None:
        content = (path / name).read_text()
        assert re.search(old, content)
        rewrite(path / name, re.sub(old, new, content).encode())

    return damage


def test_a_whole_repository_passes(copy: Path) -> None:
    assert [info.task for info in check_repository(copy)] == sorted(TASKS)


def test_a_repository_may_hold_other_things(copy: Path) -> None:
    (copy / "README.md").write_text("hello")
    (copy / ".staging").mkdir()
    assert len(check_repository(copy)) == len(TASKS)


HEAD, TRUNK = "head_intent", "trunk_0_3"


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        pytest.param(cut(f"{HEAD}/1/model.onnx", 5000), f"{HEAD}/1/model.onnx is not a whole ONNX", id="head cut off"),
        pytest.param(cut(f"{TRUNK}/1/model.onnx", 2**20), f"{TRUNK}/1/model.onnx is not a whole", id="trunk cut off"),
        pytest.param(cut(f"{HEAD}/1/model.onnx", 0), f"{HEAD}/1/model.onnx is not a whole ONNX", id="empty model"),
        pytest.param(without(f"{HEAD}/1/model.onnx"), f"{HEAD} has no <version>/model.onnx; export", id="no model"),
        pytest.param(without(f"{TRUNK}/1"), f"{TRUNK} has no <version>/model.onnx; export it again", id="no version"),
        pytest.param(without(f"{HEAD}/labels.txt"), f"{HEAD}/labels.txt is missing; copy or export", id="no labels"),
        pytest.param(cut(f"{HEAD}/labels.txt", 10), f"{HEAD}/labels.txt lists 1 labels that", id="other labels"),
        pytest.param(without("tokenizer/*/tokenizer.json"), "tokenizer has no tokenizer.json", id="no tokenizer.json"),
        pytest.param(without("tokenizer"), "tokenizer has no tokenizer.json; export the", id="no tokenizer"),
        pytest.param(without("multitask"), "holds no exported ensemble .*; run `espalier", id="no ensemble"),
        pytest.param(without(f"{HEAD}/{CONFIG_FILE}"), f"{HEAD}/config.pbtxt is missing", id="no config"),
        pytest.param(cut(f"{HEAD}/{CONFIG_FILE}", 100), f"{HEAD}/config.pbtxt is not a Triton", id="config cut off"),
        pytest.param(without(TRUNK), f"{TRUNK}/config.pbtxt is missing; every model", id="no segment"),
        pytest.param(
            replaced(f"{HEAD}/{CONFIG_FILE}", r'(key: "hidden_size"\s+value \{\s+string_value: )"384"', r'\1"768"'),
            "head_intent reads hidden states of size 768, but trunk_0_3 gives 384",
            id="hidden size",
        ),
        pytest.param(shutil.rmtree, "holds no exported ensemble", id="nothing"),
    ],
)  # fmt: skip
def test_what_cannot_be_served_is_one_sentence(damage: Callable[[Path], None], reason: str, copy: Path) -> None:
    damage(copy)
    with pytest.raises(ContractError) as caught:
        check_repository(copy)
    assert re.search(reason, str(caught.value))
    assert "\n" not in str(caught.value)


def test_a_head_of_another_trunk_is_refused(copy: Path) -> None:
    replaced(f"{HEAD}/{CONFIG_FILE}", r'(key: "fingerprint"\s+value \{\s+string_value: )"\w+"', r'\1"ffffffffffffff"')(
        copy
    )
    with pytest.raises(
        FingerprintError, match=r"^head_intent was trained on another trunk: .* is ffffffffffff, [^\n]*$"
    ):
        check_repository(copy)


def test_a_repository_without_tasks_is_refused(copy: Path) -> None:
    config = read_config(copy / "multitask")
    steps = [step for step in config.ensemble_scheduling.step if not step.model_name.startswith("head_")]
    config.ensemble_scheduling.ClearField("step")
    config.ensemble_scheduling.step.extend(steps)
    (copy / "multitask" / CONFIG_FILE).unlink()
    write_config(copy / "multitask", config)
    with pytest.raises(ContractError, match=r"wires no task; run `espalier export` with a branch$"):
        check_repository(copy)


def test_a_folder_that_is_not_wired_does_not_matter(copy: Path) -> None:
    (copy / "head_half").mkdir()
    (copy / "trunk_5_6").mkdir()
    assert len(check_repository(copy)) == len(TASKS)

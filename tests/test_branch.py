"""Branch files: whole or not at all, read back as written, refused on a trunk that is not theirs."""

import dataclasses
import json
import os
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SHALLOW, TASKS, card_for
from safetensors.torch import save

from espalier.branch import (
    CARD_FILE,
    WEIGHTS_FILE,
    Branch,
    BranchCard,
    check_place,
    check_trunk,
    load_branch,
    read_card,
    save_branch,
)
from espalier.contract import Kind, Structure
from espalier.encoder import Base
from espalier.errors import BranchError, FingerprintError
from espalier.files import digest

LABELS = ("a", "b", "c")
MISSING = object()


@pytest.fixture
def branch(tiny: Base) -> Branch:
    torch.manual_seed(0)
    return Branch(tiny.config, Kind.CLASSIFICATION, 2, len(LABELS)).eval()


@pytest.fixture
def card(tiny: Base, branch: Branch, specs: Path) -> BranchCard:
    card = card_for(tiny, branch, specs / "intent.yaml", 1, LABELS)
    return card.model_copy(update={"spec": card.spec.with_paths(lambda path: Path(os.path.normpath(path)))})


@pytest.fixture
def path(branch: Branch, card: BranchCard, tmp_path: Path) -> Path:
    save_branch(tmp_path / "branch", branch, card)
    return tmp_path / "branch"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refusal(path: Path) -> str:
    """Return why the branch cannot be loaded, in one line."""
    with pytest.raises(BranchError) as caught:
        load_branch(path)
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    return message


def test_a_branch_is_read_back_as_it_was_written(branch: Branch, card: BranchCard, tmp_path: Path) -> None:
    written = save_branch(tmp_path / "branch", branch, card)
    loaded, read = load_branch(tmp_path / "branch")
    assert read == written == read_card(tmp_path / "branch")
    assert read == card.model_copy(update={"weights": read.weights})
    assert all(torch.equal(tensor, branch.state_dict()[name]) for name, tensor in loaded.state_dict().items())
    assert not loaded.training
    hidden, mask = torch.randn(2, 5, 32), torch.ones(2, 5, dtype=torch.bool)
    assert torch.equal(loaded(hidden, mask), branch(hidden, mask))


def test_equal_branches_are_equal_bytes(path: Path, branch: Branch, card: BranchCard, tmp_path: Path) -> None:
    save_branch(tmp_path / "again", branch, card)
    assert contents(tmp_path / "again") == contents(path)


def test_a_branch_that_moves_along_with_its_data_finds_them(branch: Branch, card: BranchCard, tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    spec = card.spec.with_paths(lambda path: here / "data" / path.name)
    save_branch(here / "branches" / "intent", branch, card.model_copy(update={"spec": spec}))
    assert str(tmp_path) not in json.dumps(json.loads((here / "branches" / "intent" / CARD_FILE).read_text())["spec"])
    here.rename(there)
    moved = read_card(there / "branches" / "intent").spec
    assert moved == card.spec.with_paths(lambda path: there / "data" / path.name)


@pytest.mark.parametrize("task", TASKS)
def test_a_branch_of_every_kind_answers_in_its_shape(task: str, base: Base, branches: dict[str, Path]) -> None:
    branch, card = load_branch(branches[task])
    ids = torch.tensor([[101, 7592, 2088, 102], [101, 7592, 102, 0]])
    mask = torch.tensor([[True] * 4, [True] * 3 + [False]])
    with torch.no_grad():
        given = branch.answer(base.encoder(ids, torch.zeros_like(ids), mask, tap=card.tap), mask, ids > 1000)
    labels = len(card.labels)
    path = card.spec.structure is Structure.CRF
    expected = {Kind.CLASSIFICATION: (2, labels), Kind.REGRESSION: (2, 1), Kind.TAGGING: (2, 4, 2 if path else labels)}
    assert given.shape == expected[card.spec.kind]
    if card.spec.kind is not Kind.REGRESSION and not path:
        torch.testing.assert_close(given.sum(-1), torch.ones(given.shape[:-1]))


def test_a_branch_takes_the_place_of_the_one_before(path: Path, tiny: Base, card: BranchCard) -> None:
    other = Branch(tiny.config, Kind.CLASSIFICATION, 1, len(LABELS))
    save_branch(path, other, card.model_copy(update={"layers": 1}))
    assert len(load_branch(path)[0].layers) == 1
    assert sorted(contents(path)) == [CARD_FILE, WEIGHTS_FILE]
    assert [file.name for file in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize(
    "change",
    [{"weights": "0"}, {"labels": ("a", "c", "b")}, {"tap": 2}, {"fingerprint": "0"}],
    ids=lambda change: next(iter(change)),
)
def test_the_digest_tells_branches_apart(change: dict[str, Any], path: Path) -> None:
    card = read_card(path)
    assert card.model_copy(update=change).digest != card.digest
    assert card.model_copy(update={"metrics": {"accuracy": 0.1}, "base": "moved"}).digest == card.digest


# --- damage -----------------------------------------------------------------------------------------------------


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    message = refusal(tmp_path / "none")
    assert message.endswith("none is not a branch folder: branch.json cannot be read (No such file or directory)")


def test_missing_weights_are_named(path: Path) -> None:
    (path / WEIGHTS_FILE).unlink()
    assert refusal(path).endswith("branch.safetensors cannot be read: No such file or directory")


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty"])
def test_damaged_weights_are_named(damage: str, path: Path) -> None:
    file = path / WEIGHTS_FILE
    whole = file.read_bytes()
    file.write_bytes({"cut": whole[:-100], "flipped": whole[:-1] + bytes([whole[-1] ^ 1]), "empty": b""}[damage])
    assert "branch.safetensors is damaged: its digest is not the one in branch.json; copy or train" in refusal(path)


def change_card(path: Path, **changes: Any) -> None:
    file = path / CARD_FILE
    content = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({key: value for key, value in content.items() if value is not MISSING}))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        pytest.param(
            b"", "branch.json is damaged or of another version: Invalid JSON: .*; train the branch again", id="empty"
        ),
        pytest.param(b'{"labels": ["a"', "branch.json is damaged or of another version: Invalid JSON", id="cut off"),
        pytest.param(b"\xff\xfe", "branch.json is damaged or of another version: 'utf-8' codec", id="not UTF-8"),
        pytest.param(b"{}", "branch.json is damaged or of another version: spec: Field required", id="without fields"),
    ],
)
def test_a_damaged_card_is_named(content: bytes, reason: str, path: Path) -> None:
    (path / CARD_FILE).write_bytes(content)
    assert re.search(reason, refusal(path))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        pytest.param({"tap": "deep"}, "is damaged or of another version: tap: ", id="type"),
        pytest.param(
            {"fingerprint": MISSING}, "is damaged or of another version: fingerprint: Field required", id="missing"
        ),
        pytest.param({"mood": "good"}, "is damaged or of another version: mood: Extra inputs", id="extra"),
        pytest.param({"layers": 3}, "does not hold the layers that branch.json names", id="more layers"),
        pytest.param({"layers": 1}, "does not hold the layers that branch.json names", id="fewer layers"),
        pytest.param({"labels": ["a", "b"]}, "does not hold the layers that branch.json names", id="fewer labels"),
        pytest.param({"encoder": {}}, "does not hold the layers that branch.json names", id="no sizes"),
        pytest.param({"encoder": {"size": 3}}, "does not hold the layers that branch.json names", id="other sizes"),
    ],
)
def test_a_card_that_does_not_fit_is_named(changes: dict[str, Any], reason: str, path: Path) -> None:
    change_card(path, **changes)
    assert reason in refusal(path)


def test_weights_that_are_no_tensors_are_named(path: Path) -> None:
    (path / WEIGHTS_FILE).write_bytes(b"not safetensors")
    change_card(path, weights=digest(b"not safetensors"))
    assert "does not hold the layers" in refusal(path)


def test_weights_of_another_branch_are_named(path: Path) -> None:
    content = save({"output.weight": torch.zeros(3, 32)})
    (path / WEIGHTS_FILE).write_bytes(content)
    change_card(path, weights=digest(content))
    assert "does not hold the layers" in refusal(path)


# --- trunks -----------------------------------------------------------------------------------------------------


def test_a_branch_fits_the_trunk_it_was_trained_on(path: Path, tiny: Base) -> None:
    check_trunk(read_card(path), tiny, str(path))


def test_another_trunk_is_refused(path: Path, tiny: Base) -> None:
    other = dataclasses.replace(tiny, name="other", tokenizer=tiny.tokenizer + " ")
    with pytest.raises(FingerprintError) as caught:
        check_trunk(read_card(path), other, "branch x")
    message = str(caught.value)
    assert re.match(r"branch x was trained on another trunk: below layer 1 its fingerprint is \w{12}, that of", message)
    assert message.endswith(f"train it again on 'other', or use the base {tiny.name!r} at revision local")
    assert "\n" not in message


def test_a_trunk_that_is_too_short_is_refused(path: Path, tiny: Base) -> None:
    card = read_card(path).model_copy(update={"tap": 9})
    with pytest.raises(FingerprintError, match=r"^branch x taps layer 9, but .* has 3 layers$"):
        check_trunk(card, tiny, "branch x")


def test_layers_above_the_tap_may_differ(base: Base, branches: dict[str, Path]) -> None:
    card = read_card(branches["intent"])
    assert card.tap == SHALLOW
    check_trunk(card, base, "intent")


# --- places -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [20_000, 0], ids=["in the middle", "at once"])
def test_a_full_disk_leaves_the_old_branch_in_place(limit: int, path: Path, branch: Branch, card: BranchCard) -> None:
    """The limit on file size fails a write in the middle, as a full disk does."""
    before = contents(path)
    new = path.parent.parent / f"{path.parent.name}-new"
    torch.nn.init.zeros_(branch.output.weight)
    save_branch(new, branch, card)
    script = (
        "import resource, sys; from pathlib import Path; from espalier.branch import *; from espalier.errors import *\n"
        "branch, card = load_branch(Path(sys.argv[1]))\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, resource.RLIM_INFINITY))\n"
        "try: save_branch(Path(sys.argv[2]), branch, card)\n"
        "except BranchError as error: sys.exit(f'BranchError: {error}')\n"
    )
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY
    done = subprocess.run([sys.executable, "-c", script, str(new), str(path)], capture_output=True, text=True)
    shutil.rmtree(new)
    assert done.returncode == 1
    assert done.stderr.strip() == f"BranchError: the branch cannot be written to {path}: File too large"
    assert contents(path) == before
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_a_place_that_cannot_be_written_is_one_sentence(branch: Branch, card: BranchCard, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("kept")
    target = tmp_path / "file" / "branch"
    with pytest.raises(BranchError, match=rf"^the branch cannot be written to {target}: [^\n]+$"):
        save_branch(target, branch, card)
    assert contents(tmp_path) == {"file": b"kept"}


@pytest.mark.parametrize("name", ["notes.txt", "branches"])
def test_a_branch_does_not_wipe_out_what_is_no_branch(
    name: str, branch: Branch, card: BranchCard, tmp_path: Path
) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    save_branch(tmp_path / "branches" / "other", branch, card)
    before = contents(tmp_path)
    with pytest.raises(
        BranchError, match=rf"{name} exists and holds more than a branch; name a folder of the branch's own"
    ):
        save_branch(tmp_path / name, branch, card)
    assert contents(tmp_path) == before


def test_an_empty_folder_or_half_a_branch_may_be_replaced(path: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    check_place(tmp_path / "empty")
    check_place(tmp_path / "none")
    (path / CARD_FILE).unlink()
    check_place(path)


@pytest.mark.parametrize("folded", [1, 2, 3])
def test_folded_layers_change_the_first_token_alone(folded: int, tiny: Base) -> None:
    torch.manual_seed(0)
    branch = Branch(tiny.config, Kind.REGRESSION, 3, 1, folded=folded).eval()
    hidden, mask = torch.randn(2, 5, tiny.config.hidden_size), torch.arange(5) < torch.tensor([[5], [3]])
    states = hidden
    for layer in branch.layers[: 3 - folded]:
        states = layer(states, mask)
    for layer in branch.layers[3 - folded :]:
        states = torch.cat([layer(states, mask)[:, :1], states[:, 1:]], dim=1)
    torch.testing.assert_close(branch(hidden, mask), branch.output(states[:, 0]))


@pytest.mark.parametrize(
    ("kind", "layers", "folded"), [(Kind.TAGGING, 2, 1), (Kind.REGRESSION, 2, 3), (Kind.REGRESSION, 2, 0)]
)
def test_layers_that_cannot_be_folded(kind: Kind, layers: int, folded: int, tiny: Base) -> None:
    with pytest.raises(BranchError, match=f"{folded} folded layers do not fit: of 2 layers of a {kind} branch"):
        Branch(tiny.config, kind, layers, 2, folded=folded)

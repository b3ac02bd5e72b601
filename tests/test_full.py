"""Full fine-tuning, the yardstick: it trains all of the base, and leaves the base itself alone."""

from pathlib import Path

import pytest
import torch
from test_training import evaluate, write_task

from espalier.contract import Kind
from espalier.encoder import Base
from espalier.spec import load_spec
from training.finetune import new_branch, train
from training.full import FullCard, _Whole, train_fully
from training.trainer import Arguments

ARGUMENTS = Arguments(epochs=6, learning_rate=5e-3, batch_size=8)


def test_it_learns_and_is_not_done_twice(tiny: Base, tmp_path: Path) -> None:
    spec = load_spec(write_task(tmp_path, Kind.CLASSIFICATION, rows=120))
    before = tiny.fingerprint(3)
    card, trained = train_fully(spec, tiny, ARGUMENTS, tmp_path / "full.json", lambda _: None)
    assert trained
    assert card.score > 0.9
    assert card.score == max(entry["accuracy"] for entry in card.history)
    assert tiny.fingerprint(3) == before
    assert FullCard.model_validate_json((tmp_path / "full.json").read_text()) == card
    assert train_fully(spec, tiny, ARGUMENTS, tmp_path / "full.json", lambda _: None) == (card, False)
    (tmp_path / "full.json").write_text("{")
    again, trained = train_fully(spec, tiny, ARGUMENTS, tmp_path / "full.json", lambda _: None)
    assert trained
    assert again == card


@pytest.mark.parametrize("kind", list(Kind))
def test_it_is_the_base_with_an_output_layer_and_all_of_it_trains(kind: Kind, tiny: Base) -> None:
    torch.manual_seed(0)
    top = new_branch(tiny, kind, 2, 1, 1 if kind is Kind.REGRESSION else 3)
    whole = _Whole(tiny, top).eval()
    ids = torch.randint(5, 20, (2, 6))
    types, mask = torch.zeros_like(ids), torch.ones_like(ids, dtype=torch.bool)
    labels = {Kind.CLASSIFICATION: torch.tensor([0, 2]), Kind.REGRESSION: torch.tensor([0.5, 1.0])}.get(kind, ids % 3)
    given = whole(ids, types, mask, labels)
    hidden = tiny.encoder(ids, types, mask)  # [B,S,H]
    want = top.output(hidden if kind is Kind.TAGGING else hidden[:, 0])
    torch.testing.assert_close(given["logits"], want, atol=1e-5, rtol=0)
    given["loss"].backward()
    lacking = [name for name, weight in whole.named_parameters() if weight.grad is None]
    assert not lacking
    assert not any(weight.requires_grad for weight in tiny.encoder.parameters())


def test_a_branch_that_is_all_but_frozen_at_the_bottom_scores_alike(tiny: Base, tmp_path: Path) -> None:
    spec = load_spec(write_task(tmp_path, Kind.REGRESSION, rows=120))
    whole, _ = train_fully(spec, tiny, ARGUMENTS, tmp_path / "full.json", lambda _: None)
    branch, _ = train(spec, tiny, 1, 2, ARGUMENTS, tmp_path / "branch", lambda _: None)
    assert whole.score > 0.9
    assert branch.score > 0.9
    assert evaluate(spec, tiny, tmp_path / "branch") == pytest.approx(branch.metrics, abs=1e-5)

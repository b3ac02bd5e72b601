"""Dev metrics against values worked out by hand or by the formula, and never nan."""

import warnings
from typing import Any

import numpy as np
import pytest

from espalier.contract import Kind
from training.metrics import score

GOLD = ["a", "a", "a", "b", "b", "c", "c", "c"]
GUESS = ["a", "a", "b", "b", "c", "c", "c", "a"]


@pytest.fixture(autouse=True)
def _no_warning() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def test_classification_by_hand() -> None:
    scores = score(Kind.CLASSIFICATION, GOLD, GUESS)
    assert scores["accuracy"] == pytest.approx(5 / 8)
    # precision and recall: a 2/3 and 2/3, b 1/2 and 1/2, c 2/3 and 2/3
    assert scores["macro_f1"] == pytest.approx((2 / 3 + 1 / 2 + 2 / 3) / 3)
    # Gorodkin 2004: (5·8 − Σ guessed·true) / √((8² − Σ guessed²)(8² − Σ true²))
    assert scores["matthews"] == pytest.approx((40 - (9 + 4 + 9)) / (64 - 22))
    assert "f1" not in scores


def test_f1_counts_the_positive_label_alone() -> None:
    gold = ["yes", "yes", "yes", "no", "no", "no"]
    guess = ["yes", "yes", "no", "yes", "no", "no"]
    assert score(Kind.CLASSIFICATION, gold, guess, "yes")["f1"] == pytest.approx(2 / 3)
    assert score(Kind.CLASSIFICATION, ["no", "no", "yes"], ["no", "no", "no"], "no")["f1"] == pytest.approx(4 / 5)


@pytest.mark.parametrize("factor", [1.0, -2.5])
def test_correlations_by_their_formulas(factor: float) -> None:
    gold = [0.1, 0.4, 0.35, 0.8, 1.0]
    guess = [0.2 * factor, 0.3 * factor, 0.5 * factor, 0.55 * factor, 0.56 * factor]
    scores = score(Kind.REGRESSION, gold, guess)
    assert scores["pearson"] == pytest.approx(np.corrcoef(gold, guess)[0, 1])
    # Ranks differ by one in two places: 1 − 6·2/(5·24)
    assert scores["spearman"] == pytest.approx(np.sign(factor) * 0.9)
    assert set(scores) == {"pearson", "spearman"}


def test_spearman_shares_the_ranks_of_ties() -> None:
    scores = score(Kind.REGRESSION, [1, 2, 2, 3], [10, 20, 30, 40])
    assert scores["spearman"] == pytest.approx(np.corrcoef([1, 2.5, 2.5, 4], [1, 2, 3, 4])[0, 1])


def test_slots_count_when_type_and_both_ends_are_right() -> None:
    gold = [["B-city", "I-city", "O", "B-day"], ["O", "B-city"]]
    guess = [["B-city", "O", "O", "B-day"], ["B-day", "B-city"]]
    # three gold slots, four guessed, two of them right
    assert score(Kind.TAGGING, gold, guess) == pytest.approx(
        {"slot_precision": 2 / 4, "slot_recall": 2 / 3, "slot_f1": 2 * (1 / 2) * (2 / 3) / (1 / 2 + 2 / 3)}
    )


@pytest.mark.parametrize("name", ["city", "B-city", "I-city"])
def test_slots_to_ignore_count_neither_as_gold_nor_as_guessed(name: str) -> None:
    gold = [["B-city", "I-city", "O", "B-day"], ["B-city", "B-day"]]
    guess = [["B-city", "O", "O", "B-day"], ["O", "B-city"]]
    assert score(Kind.TAGGING, gold, guess, ignore=[name]) == pytest.approx(
        {"slot_precision": 1, "slot_recall": 1 / 2, "slot_f1": 2 / 3}
    )


def test_a_label_that_cannot_be_predicted_counts_as_missed() -> None:
    assert score(Kind.CLASSIFICATION, ["a", "new"], ["a", "a"])["accuracy"] == 0.5
    assert score(Kind.TAGGING, [["B-x", "B-new"]], [["B-x", "O"]])["slot_recall"] == 0.5


@pytest.mark.parametrize(
    ("kind", "answers"),
    [(Kind.CLASSIFICATION, GOLD), (Kind.REGRESSION, [0.5, 0.25, 1.0]), (Kind.TAGGING, [["B-x", "I-x", "O"], ["O"]])],
)
def test_right_answers_score_one(kind: Kind, answers: list[Any]) -> None:
    scores = score(kind, answers, answers)
    assert scores == pytest.approx(dict.fromkeys(scores, 1.0))


@pytest.mark.parametrize(
    ("kind", "gold", "guess", "zero"),
    [
        pytest.param(Kind.CLASSIFICATION, GOLD, ["a"] * 8, {"matthews"}, id="one label guessed"),
        pytest.param(Kind.CLASSIFICATION, ["a", "a"], ["a", "a"], {"matthews"}, id="one label in all"),
        pytest.param(Kind.REGRESSION, [1.0, 2.0], [3.0, 3.0], {"pearson", "spearman"}, id="one number guessed"),
        pytest.param(Kind.REGRESSION, [1.0, 1.0], [2.0, 3.0], {"pearson", "spearman"}, id="one number in gold"),
        pytest.param(Kind.REGRESSION, [1.0, 2.0], [np.nan] * 2, {"pearson", "spearman"}, id="nan guessed"),
        pytest.param(Kind.REGRESSION, [1.0], [2.0], {"pearson", "spearman"}, id="one text"),
        pytest.param(
            Kind.TAGGING, [["B-x", "O"]], [["O", "O"]], {"slot_f1", "slot_precision", "slot_recall"}, id="none guessed"
        ),
        pytest.param(
            Kind.TAGGING, [["O", "O"], []], [["O", "O"], []], {"slot_f1", "slot_precision", "slot_recall"}, id="no slot"
        ),
    ],
)  # fmt: skip
def test_what_is_undefined_counts_as_nought(kind: Kind, gold: list[Any], guess: list[Any], zero: set[str]) -> None:
    scores = score(kind, gold, guess)
    assert {name: scores[name] for name in zero} == dict.fromkeys(zero, 0.0)
    assert not any(np.isnan(value) for value in scores.values())


def test_f1_of_a_label_that_nobody_guessed_is_nought() -> None:
    assert score(Kind.CLASSIFICATION, ["a", "b"], ["a", "a"], "b")["f1"] == 0.0


def test_guesses_that_hardly_differ_are_scored_in_silence() -> None:
    scores = score(Kind.REGRESSION, [1.0, 2.0, 3.0], [1e8, 1e8 + 1e-7, 1e8 + 2e-7])
    assert all(-1 <= value <= 1 for value in scores.values())


def test_tags_without_a_prefix_are_scored_in_silence() -> None:
    assert score(Kind.TAGGING, [["noun", "verb"]], [["noun", "verb"]])["slot_f1"] == 1.0


def test_scores_are_plain_numbers() -> None:
    every = (
        score(Kind.CLASSIFICATION, GOLD, GUESS, "a")
        | score(Kind.REGRESSION, [1, 2, 4], [1, 2, 3])
        | score(Kind.TAGGING, [["B-x"]], [["B-x"]])
    )
    assert {type(value) for value in every.values()} == {float}

"""Dev metrics, from answers as they are served: labels, numbers, tags by word. In all of them more is better."""

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy.typing as npt
from scipy.stats import DegenerateDataWarning, pearsonr, spearmanr
from seqeval.metrics import f1_score as slot_f1
from seqeval.metrics import precision_score as slot_precision
from seqeval.metrics import recall_score as slot_recall
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

from espalier.contract import Kind, Structure
from espalier.spec import TaskSpec
from espalier.tagging import OUTSIDE, parse
from training.data import Example, TaskData


def score(
    kind: Kind, gold: Sequence[Any], predicted: Sequence[Any], positive: str | None = None, ignore: Sequence[str] = ()
) -> dict[str, float]:
    """Score `predicted` against `gold`, in order.

    Classification takes labels, regression numbers, tagging one list of tags per text. Correlations with a
    constant, or of a single text, are undefined and count as 0. `positive` is the label whose F1 is reported as `f1`.
    Slots of the types in `ignore` (a label stands for its type) are left out of gold and predictions alike.
    """
    match kind:
        case Kind.CLASSIFICATION:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="A single label was found")
                scores = {
                    "accuracy": accuracy_score(gold, predicted),
                    "macro_f1": f1_score(gold, predicted, average="macro", zero_division=0),
                    "matthews": matthews_corrcoef(gold, predicted),
                }
            if positive is not None:
                hits, guesses = [label == positive for label in gold], [label == positive for label in predicted]
                scores["f1"] = f1_score(hits, guesses, zero_division=0)
        case Kind.REGRESSION:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DegenerateDataWarning)
                scores = {
                    name: correlation(gold, predicted).statistic if len(gold) > 1 else 0.0
                    for name, correlation in (("pearson", pearsonr), ("spearman", spearmanr))
                }
        case Kind.TAGGING:
            gold, predicted = (_without(tags, ignore) for tags in (gold, predicted))
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=".*seems not to be NE tag")
                scores = {
                    "slot_f1": slot_f1(gold, predicted, zero_division=0),
                    "slot_precision": slot_precision(gold, predicted, zero_division=0),
                    "slot_recall": slot_recall(gold, predicted, zero_division=0),
                }
    return {name: 0.0 if math.isnan(value) else float(value) for name, value in scores.items()}


def dev_metrics(
    spec: TaskSpec, data: TaskData, features: list[dict[str, Any]]
) -> Callable[[npt.NDArray[Any]], dict[str, float]]:
    """Return the function that scores a model's logits, or a CRF's paths, for dev, whose `features` they are."""

    def metrics(predictions: npt.NDArray[Any]) -> dict[str, float]:
        answers = decode(spec.kind, data.labels, predictions, features, spec.structure)
        return score(spec.kind, gold(data.dev), answers, spec.positive, spec.ignore)

    return metrics


def _without(texts: Sequence[Sequence[str]], ignore: Sequence[str]) -> list[list[str]]:
    types = {parse(name)[1] for name in ignore}
    return [[OUTSIDE if parse(tag)[1] in types else tag for tag in tags] for tags in texts]


def gold(examples: list[Example]) -> list[Any]:
    """Return the gold answers in the form that `score` takes."""
    return [list(example.label) if isinstance(example.label, tuple) else example.label for example in examples]


def decode(
    kind: Kind, labels: tuple[str, ...], logits: npt.NDArray[Any], features: list[dict[str, Any]],
    structure: Structure = Structure.SOFTMAX,
) -> list[Any]:  # fmt: skip
    """Turn logits ([N,C], [N,1] or [N,S,C]), or the paths of a CRF [N,S,2], into the answers that `score` takes.

    A word's tag is that of its first token; a word without a token is outside every slot.
    """
    match kind:
        case Kind.CLASSIFICATION:
            return [labels[i] for i in logits.argmax(-1)]
        case Kind.REGRESSION:
            return [float(value) for value in logits[:, 0]]
        case Kind.TAGGING:
            best = logits[..., 0].astype(int) if structure is Structure.CRF else logits.argmax(-1)
            return [
                [labels[best[row, token]] if token >= 0 else OUTSIDE for token in feature["word_tokens"]]
                for row, feature in enumerate(features)
            ]

"""Partial fine-tuning of a branch on a frozen trunk (paper, section on partial fine-tuning)."""

from dataclasses import asdict
from pathlib import Path

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import set_seed

from espalier.branch import Branch, BranchCard, Teacher, check_place, foldable
from espalier.contract import Kind
from espalier.crf import CRF, crf_for
from espalier.encoder import Base
from espalier.errors import SpecError
from espalier.files import digest
from espalier.spec import TaskSpec
from training.activations import ActivationCache
from training.data import TaskData, load_data
from training.features import IGNORED
from training.fit import Output, fit, up_to_date, workshop
from training.trainer import Arguments, Report

RECIPE = "4"
"""Changes whenever the same inputs would train another branch, so that no branch of an older recipe is reused."""


def train(
    spec: TaskSpec, base: Base, tap: int, layers: int | None, arguments: Arguments, out: Path, report: Report,
    cache: ActivationCache | None = None, data: TaskData | None = None, folded: int | None = None,
) -> tuple[BranchCard, bool]:  # fmt: skip
    """Fine-tune a branch of `layers` layers above `tap`, starting from the base's own; write it to `out`.

    `folded` of the layers, at the top, compute the first token alone (see Branch; default: the last one). With a
    `cache` the trunk runs once, not in every epoch; trainings on the same texts and tap share it. `data` is what
    `load_data` gives for the spec and the arguments, if the caller has it.
    Returns its card, and whether it was trained now (False: the branch at `out` was up to date).
    """
    layers = base.config.num_hidden_layers - tap if layers is None else layers
    check_layers(base, tap, layers)
    out = out.resolve()
    data = data or load_data(spec, arguments.max_train, arguments.max_dev)
    folded = foldable(spec.kind, layers)[0] if folded is None else folded
    inputs = inputs_digest(spec, data, base, tap, layers, folded, arguments, cache is not None)
    if card := up_to_date(out, inputs):
        return card, False

    check_place(out)
    set_seed(arguments.seed)
    crf = crf_for(spec.structure, data.labels)
    branch = new_branch(base, spec.kind, tap, layers, len(data.labels), crf, folded)

    def loss(output: Output, labels: Tensor, target: Output | None) -> Tensor:
        return hard_loss(spec.kind, output.logits, labels, crf)

    with workshop(out, inputs) as work:
        return fit(
            spec=spec, data=data, base=base, tap=tap, branch=branch, arguments=arguments, inputs=inputs, work=work,
            out=out, report=report, cache=cache, loss=loss,
        ), True  # fmt: skip


def check_layers(base: Base, tap: int, layers: int) -> None:
    """Raise SpecError if `base` cannot be tapped there, or has fewer than `layers` layers above."""
    depth = base.config.num_hidden_layers
    if not 1 <= tap <= depth:
        raise SpecError(f"tap {tap} is outside the base: {base.name!r} can be tapped at layers 1 to {depth}")
    if not 0 <= layers <= depth - tap:
        raise SpecError(f"{layers} task layers above tap {tap} do not fit: {base.name!r} has {depth} layers")


def new_branch(
    base: Base, kind: Kind, tap: int, layers: int, labels: int, crf: CRF | None = None, folded: int | None = None
) -> Branch:
    """Return a branch whose layers are the base's own above `tap`, with a fresh output layer and a fresh `crf`."""
    branch = Branch(base.config, kind, layers, max(1, labels), crf, folded)
    for own, theirs in zip(branch.layers, base.encoder.layers[tap : tap + layers], strict=True):
        own.load_state_dict(theirs.state_dict())
    nn.init.normal_(branch.output.weight, std=0.02)  # BERT's own initialisation
    nn.init.zeros_(branch.output.bias)
    return branch


def inputs_digest(
    spec: TaskSpec, data: TaskData, base: Base, tap: int, layers: int, folded: int, arguments: Arguments,
    cached: bool, teacher: Teacher | None = None,
) -> str:  # fmt: skip
    """Return the digest of all that a training depends on.

    Of the base, the layers that the branch starts from count and those below, its dropout rates, and its name: that
    goes into the card, and export loads the base by it. Whether activations are cached counts: that rounds them.
    """
    plain = spec.model_dump_json(exclude={"data"}, exclude_defaults=True)
    rates = [base.config.hidden_dropout_prob, base.config.attention_probs_dropout_prob]
    numbers = repr([tap, layers, folded, cached, rates, sorted(asdict(arguments).items())])
    start = "" if teacher is None else teacher.start
    weights = base.fingerprint(tap + layers)
    return digest(RECIPE, plain, data.digest(), base.name, base.revision, weights, start, numbers)


def hard_loss(kind: Kind, logits: Tensor, labels: Tensor, crf: CRF | None = None) -> Tensor:
    """Cross-entropy against labels [B] or [B,S] (IGNORED left out), or mean squared error for regression.

    With a `crf` the negative log-likelihood of the labels' paths. It is a mean over the words, not over the items, so
    that it is as large as the cross-entropy of the same words: learning rates carry over, and in distillation it
    weighs the same beside the soft loss.
    """
    if kind is Kind.REGRESSION:
        return F.mse_loss(logits.squeeze(-1), labels.to(logits.dtype))
    if crf is not None:
        words = labels != IGNORED
        return -crf.log_likelihood(logits, words, labels).sum() / words.sum().clamp(min=1)
    if labels.dim() == 1:
        return F.cross_entropy(logits, labels)
    total = F.cross_entropy(logits.flatten(0, -2), labels.flatten(), ignore_index=IGNORED, reduction="sum")
    return total / (labels != IGNORED).sum().clamp(min=1)  # a text may have no token with a label

"""Distillation of a branch to fewer layers (paper, section on knowledge distillation).

The student keeps the teacher's tap and starts from the teacher's bottommost task layers and its output layer, or from
the base's own layers at that depth and a fresh output layer. Loss:
T²·KL(teacher ‖ student) at temperature T plus the hard loss, in equal parts; for regression the squared distance to
the teacher's value plus that to the label; for tagging per token. With a weight for it, the squared distance to the
teacher's last [CLS] state is added. A student with a CRF starts from the teacher's
CRF, too; its soft loss compares the emissions, word by word, its hard loss is the CRF's.
"""

from enum import StrEnum
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from transformers import set_seed

from espalier.branch import BranchCard, Teacher, check_place, check_trunk, foldable, load_branch
from espalier.contract import Kind
from espalier.crf import crf_for
from espalier.encoder import Base
from espalier.errors import BranchError, DataError, SpecError
from espalier.spec import TaskSpec
from training.activations import ActivationCache
from training.data import TaskData, load_data
from training.features import IGNORED
from training.finetune import hard_loss, inputs_digest, new_branch
from training.fit import Output, fit, up_to_date, workshop
from training.predict import outputs_of
from training.trainer import Arguments, Progress, Report

TEMPERATURE = 2.0


class Init(StrEnum):
    """Where a student's weights start."""

    TEACHER = "teacher"  # its bottommost task layers, and its output layer
    PRETRAINED = "pretrained"  # the base's layers above the tap, and a fresh output layer


def soft_loss(kind: Kind, logits: Tensor, labels: Tensor, teacher: Tensor) -> Tensor:
    """T²·KL between the softened distributions, over the items or labelled tokens; squared distance for regression."""
    if kind is Kind.REGRESSION:
        return F.mse_loss(logits, teacher)
    counted = labels.flatten() != IGNORED
    student = F.log_softmax(logits.flatten(0, -2)[counted] / TEMPERATURE, dim=-1)
    target = F.log_softmax(teacher.flatten(0, -2)[counted] / TEMPERATURE, dim=-1)
    return TEMPERATURE**2 * F.kl_div(student, target, reduction="sum", log_target=True) / max(1, len(student))


def distill(
    teacher_path: Path, base: Base, layers: int, arguments: Arguments, out: Path, report: Report,
    spec: TaskSpec | None = None, cache: ActivationCache | None = None, init: Init = Init.TEACHER,
    data: TaskData | None = None, folded: int | None = None, cls_weight: float = 0.0,
) -> tuple[BranchCard, bool]:  # fmt: skip
    """Distil the branch at `teacher_path` to its bottommost `layers` layers; write the student to `out`.

    `folded` of them, at the top, compute the first token alone (see Branch; default: the last one): a student of all
    the teacher's layers, with more of them folded, is cheaper, too. `spec` says where the data lies, if not where it
    lay when the teacher was trained; `data` is what `load_data` gives for the spec and the arguments, if the caller has
    it. `cls_weight` is the weight of the distance to the teacher's [CLS] state (0: none). Returns the student's card,
    and whether it was trained now (False: the branch at `out` was up to date).
    """
    teacher, card = load_branch(teacher_path)
    check_trunk(card, base, str(teacher_path))
    spec = spec or card.spec
    if (spec.name, spec.kind) != (card.spec.name, card.spec.kind):
        raise SpecError(f"the spec is of task {spec.name!r} ({spec.kind}), the teacher of {card.spec.name!r}")
    if spec.structure is not card.spec.structure:
        raise SpecError(
            f"the spec has structure: {spec.structure}, the teacher was trained with {card.spec.structure}; "
            "train a teacher with the spec's, or take the teacher's"
        )
    folded = foldable(spec.kind, layers)[0] if folded is None else folded
    if layers < 1 or layers > card.layers or (layers - folded, layers) >= (card.layers - card.folded, card.layers):
        raise BranchError(
            f"{teacher_path} has {card.layers} layers, {card.folded} of them folded; a student has fewer, but at least "
            f"1, or as many with more of them folded, not {layers} with {folded} folded"
        )
    if cls_weight < 0 or (cls_weight and spec.kind is Kind.TAGGING):
        raise SpecError(f"the weight of [CLS] is {cls_weight:g}; it is 0 or more, and a tagging task reads no [CLS]")
    out = out.resolve()
    if out == teacher_path.resolve():
        raise BranchError(f"the student would replace its teacher {teacher_path}; give another output folder")
    data = data or load_data(spec, arguments.max_train, arguments.max_dev)
    if data.labels != card.labels:
        raise DataError(
            f"task {spec.name}: train has the labels {list(data.labels)}, the teacher {list(card.labels)}; "
            "train the teacher again"
        )
    source = Teacher(digest=card.digest, folder=teacher_path.resolve(), init=init, cls_weight=cls_weight)
    inputs = inputs_digest(spec, data, base, card.tap, layers, folded, arguments, cache is not None, source)
    if student_card := up_to_date(out, inputs):
        return student_card, False

    check_place(out)
    set_seed(arguments.seed)
    crf = crf_for(spec.structure, card.labels)
    student = new_branch(base, spec.kind, card.tap, layers, len(card.labels), crf, folded)
    if init is Init.TEACHER:
        student.layers.load_state_dict(teacher.layers[:layers].state_dict())
        student.output.load_state_dict(teacher.output.state_dict())
        if crf is not None and teacher.crf is not None:
            crf.load_state_dict(teacher.crf.state_dict())

    def loss(output: Output, labels: Tensor, target: Output | None) -> Tensor:
        total = hard_loss(spec.kind, output.logits, labels, crf)
        if target is not None:  # else a dev batch, whose loss is only reported
            total = total + soft_loss(spec.kind, output.logits, labels, target.logits)
            if output.states is not None and target.states is not None:
                total = total + cls_weight * F.mse_loss(output.states, target.states)
        return total

    def targets(features: list[dict[str, Any]]) -> list[Output]:
        return outputs_of(
            teacher, base, card.tap, features, arguments.batch_size, with_states=cls_weight > 0,
            report=lambda done, total: report(Progress(done, total, 0, stage="teacher")),
        )  # fmt: skip

    with workshop(out, inputs) as work:
        return fit(
            spec=spec, data=data, base=base, tap=card.tap, branch=student, arguments=arguments, inputs=inputs,
            work=work, out=out, report=report, loss=loss, cache=cache, teacher=source, targets=targets,
        ), True  # fmt: skip

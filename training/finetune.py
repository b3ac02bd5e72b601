"""Partial fine-tuning of a branch on a frozen trunk (paper, section on partial fine-tuning), by transformers.Trainer.

AdamW (weight decay 0.01, β 0.9/0.999, ε 1e-6), linear decay, warm-up over the first part of the whole run, gradient
norm 1.0. The dev metric is taken after each epoch and the best epoch's weights are kept. A run that was stopped goes
on from its last epoch when the same command is given again; one whose branch is up to date is not run again.
"""

import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy.typing as npt
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from torch.utils.data import SequentialSampler
from transformers import EvalPrediction, Trainer, TrainerCallback, TrainingArguments, set_seed

from espalier.branch import Branch, BranchCard, load_branch, read_card, save_branch
from espalier.contract import Kind
from espalier.encoder import Base
from espalier.errors import BranchError, SpecError
from espalier.files import digest
from espalier.spec import TaskSpec
from training.data import Example, TaskData, load_data
from training.features import IGNORED, collate, featurize
from training.metrics import score

LIBRARIES = ("torch", "transformers", "tokenizers", "numpy", "espalier")
RECIPE = "1"
"""Changes whenever the same inputs would train another branch, so that no branch of an older recipe is reused."""


@dataclass(frozen=True)
class Arguments:
    """What a training is asked for."""

    epochs: int = 4
    learning_rate: float = 5e-5
    batch_size: int = 32
    warmup: float = 0.1  # fraction of the whole run
    weight_decay: float = 0.01
    seed: int = 0
    max_train: int | None = None  # first so many rows of train

    def __post_init__(self) -> None:
        for name, low in (("epochs", 1), ("batch_size", 1), ("max_train", 1)):
            value = getattr(self, name)
            if value is not None and value < low:
                raise SpecError(f"{name} is {value}; it must be at least {low}")
        if not 0 < self.learning_rate < 1 or not 0 <= self.warmup < 1 or self.weight_decay < 0:
            raise SpecError(
                f"learning rate {self.learning_rate} must lie between 0 and 1, warm-up {self.warmup} from 0 to "
                f"below 1, weight decay {self.weight_decay} at 0 or above"
            )


@dataclass(frozen=True)
class Progress:
    """What a run tells while it works: optimizer steps done of all, and the dev metrics after an epoch."""

    step: int
    steps: int
    epoch: float
    metrics: dict[str, float] | None = None


Report = Callable[[Progress], None]
Loss = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""Loss of (logits, labels, teacher logits)."""


def hard_loss(kind: Kind, logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy against labels [B] or [B,S] (IGNORED left out), or mean squared error for regression."""
    if kind is Kind.REGRESSION:
        return F.mse_loss(logits.squeeze(-1), labels.to(logits.dtype))
    return F.cross_entropy(logits.flatten(0, -2), labels.flatten(), ignore_index=IGNORED)


def train(
    spec: TaskSpec, base: Base, tap: int, layers: int | None, arguments: Arguments, out: Path, report: Report
) -> tuple[BranchCard, bool]:
    """Fine-tune a branch of `layers` layers above `tap`, starting from the base's own; write it to `out`.

    Returns its card, and whether it was trained now (False: the branch at `out` was up to date).
    """
    depth = base.config.num_hidden_layers
    if not 1 <= tap <= depth:
        raise SpecError(f"tap {tap} is outside the base: {base.name!r} can be tapped at layers 1 to {depth}")
    layers = depth - tap if layers is None else layers
    if not 0 <= layers <= depth - tap:
        raise SpecError(f"{layers} task layers above tap {tap} do not fit: {base.name!r} has {depth} layers")
    data = load_data(spec, arguments.max_train)
    inputs = inputs_digest(spec, data, base.fingerprint(tap + layers), tap, layers, arguments)
    if card := up_to_date(out, inputs):
        return card, False

    set_seed(arguments.seed)
    branch = new_branch(base, spec.kind, tap, layers, len(data.labels))
    return fit(
        spec=spec, data=data, base=base, tap=tap, branch=branch, arguments=arguments, inputs=inputs, out=out,
        report=report, loss=lambda logits, labels, _: hard_loss(spec.kind, logits, labels),
    ), True  # fmt: skip


def new_branch(base: Base, kind: Kind, tap: int, layers: int, labels: int) -> Branch:
    """Return a branch whose layers are the base's own above `tap`, with a fresh output layer."""
    branch = Branch(base.config, kind, layers, max(1, labels))
    for own, theirs in zip(branch.layers, base.encoder.layers[tap : tap + layers], strict=True):
        own.load_state_dict(theirs.state_dict())
    nn.init.normal_(branch.output.weight, std=0.02)  # BERT's own initialisation
    nn.init.zeros_(branch.output.bias)
    return branch


def inputs_digest(spec: TaskSpec, data: TaskData, start: str, tap: int, layers: int, arguments: Arguments) -> str:
    """Return the digest of all that a training depends on; `start` is the identity of the initial weights."""
    plain = spec.model_dump_json(exclude={"data"})
    return digest(RECIPE, plain, data.digest(), start, str(tap), str(layers), repr(sorted(asdict(arguments).items())))


def up_to_date(out: Path, inputs: str) -> BranchCard | None:
    """Return the card of the branch at `out` if it is whole and was made from the same inputs."""
    try:
        if read_card(out).inputs != inputs:
            return None
        return load_branch(out)[1]
    except BranchError:
        return None


class _Model(nn.Module):
    """A branch as the Trainer sees it: the trunk runs without gradients and is no part of its state."""

    def __init__(self, base: Base, tap: int, branch: Branch, loss: Loss) -> None:
        super().__init__()
        self.branch = branch
        self._frozen = (base.encoder,)  # in a tuple: not a submodule, so neither trained nor saved
        self._tap = tap
        self._loss = loss

    def forward(
        self, input_ids: Tensor, token_type_ids: Tensor, mask: Tensor, labels: Tensor,
        teacher_logits: Tensor | None = None,
    ) -> dict[str, Tensor]:  # fmt: skip
        encoder = self._frozen[0].to(input_ids.device)
        with torch.no_grad():
            hidden = encoder(input_ids, token_type_ids, mask, tap=self._tap)  # [B,S,H]
        logits = self.branch(hidden, mask)
        return {"loss": self._loss(logits, labels, teacher_logits), "logits": logits}


def fit(
    *, spec: TaskSpec, data: TaskData, base: Base, tap: int, branch: Branch, arguments: Arguments, inputs: str,
    out: Path, report: Report, loss: Loss, teacher_logits: list[Tensor] | None = None, teacher: str | None = None,
) -> BranchCard:  # fmt: skip
    """Train `branch` on `data`, keep its best epoch by the dev metric, and write the branch folder."""
    splits = {
        name: featurize(spec.kind, data.labels, base.tokenizer, base.max_length, examples)
        for name, examples in (("train", data.train), ("dev", data.dev))
    }
    if teacher_logits is not None:
        for feature, logits in zip(splits["train"], teacher_logits, strict=True):
            feature["teacher_logits"] = logits
    work = out.parent / f".{out.name}.training-{inputs[:12]}"
    try:
        work.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BranchError(f"the branch cannot be written to {out}: {error.strerror or error}") from error

    def metrics(prediction: EvalPrediction) -> dict[str, float]:
        answers = decode(spec.kind, data.labels, prediction.predictions, splits["dev"])
        return score(spec.kind, gold(data.dev), answers, spec.positive)

    transformers.logging.set_verbosity_error()
    trainer = _Trainer(
        model=_Model(base, tap, branch, loss),
        args=TrainingArguments(
            output_dir=str(work),
            num_train_epochs=arguments.epochs,
            per_device_train_batch_size=arguments.batch_size,
            per_device_eval_batch_size=arguments.batch_size,
            learning_rate=arguments.learning_rate,
            weight_decay=arguments.weight_decay,
            adam_epsilon=1e-6,
            max_grad_norm=1.0,
            lr_scheduler_type="linear",
            warmup_ratio=arguments.warmup,
            group_by_length=True,
            eval_strategy="epoch",
            save_strategy="epoch",
            save_total_limit=1,
            load_best_model_at_end=True,
            metric_for_best_model=spec.metric,
            greater_is_better=True,
            seed=arguments.seed,
            label_names=["labels"],
            remove_unused_columns=False,
            logging_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=not torch.cuda.is_available(),
            dataloader_pin_memory=torch.cuda.is_available(),
        ),
        data_collator=collate,
        train_dataset=splits["train"],
        eval_dataset=splits["dev"],
        compute_metrics=metrics,
        callbacks=[_Reporter(report)],
    )
    trainer.remove_callback(transformers.PrinterCallback)
    try:
        trainer.train(resume_from_checkpoint=_last_checkpoint(work))
    except OSError as error:
        raise BranchError(f"training stopped, {work} cannot be written: {error.strerror or error}") from error
    history = [
        {key.removeprefix("eval_"): value for key, value in entry.items() if _is_metric(key)}
        for entry in trainer.state.log_history
        if "eval_loss" in entry
    ]
    best = max(history, key=lambda entry: entry[spec.metric])
    branch.cpu()
    card = save_branch(
        out,
        branch,
        BranchCard(
            spec=spec,
            labels=data.labels,
            base=base.name,
            revision=base.revision,
            fingerprint=base.fingerprint(tap),
            tap=tap,
            layers=len(branch.layers),
            encoder=asdict(branch.config),
            metrics={key: value for key, value in best.items() if key not in ("epoch", "loss")},
            history=history,
            arguments=asdict(arguments),
            teacher=teacher,
            inputs=inputs,
            versions={name: version(name) for name in LIBRARIES},
            weights="",
        ),
    )
    shutil.rmtree(work, ignore_errors=True)
    return card


def _is_metric(key: str) -> bool:
    speed = ("runtime", "samples_per_second", "steps_per_second")
    return key == "epoch" or (key.startswith("eval_") and not key.endswith(speed))


def _last_checkpoint(work: Path) -> str | None:
    """Return the newest checkpoint that was written to its end: the Trainer writes its state file last."""
    whole: list[Path] = [
        path
        for path in work.glob("checkpoint-*")
        if (state := path / "trainer_state.json").is_file() and state.read_bytes().endswith(b"}\n")
    ]
    for path in set(work.glob("checkpoint-*")) - set(whole):
        shutil.rmtree(path)
    if not whole:
        return None
    newest = max(whole, key=_step)
    return str(newest)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def gold(examples: list[Example]) -> list[Any]:
    """Return the gold answers in the form that `score` takes."""
    return [list(example.label) if isinstance(example.label, tuple) else example.label for example in examples]


def decode(kind: Kind, labels: tuple[str, ...], logits: npt.NDArray[Any], features: list[dict[str, Any]]) -> list[Any]:
    """Turn logits ([N,C], [N,1] or [N,S,C]) into the answers that `score` takes.

    A word's tag is that of its first token; a word without a token is outside every slot.
    """
    match kind:
        case Kind.CLASSIFICATION:
            return [labels[i] for i in logits.argmax(-1)]
        case Kind.REGRESSION:
            return [float(value) for value in logits[:, 0]]
        case Kind.TAGGING:
            best = logits.argmax(-1)
            return [
                [labels[best[row, token]] if token >= 0 else "O" for token in feature["word_tokens"]]
                for row, feature in enumerate(features)
            ]


class _Trainer(Trainer):  # type: ignore[misc]
    def _get_eval_sampler(self, dataset: Any) -> SequentialSampler:
        # With group_by_length the Trainer reorders dev as well, but answers are scored in dev's own order.
        return SequentialSampler(dataset)


class _Reporter(TrainerCallback):  # type: ignore[misc]
    def __init__(self, report: Report) -> None:
        self._report = report

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._report(Progress(state.global_step, state.max_steps, state.epoch))

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict[str, float], **_: Any) -> None:
        plain = {key.removeprefix("eval_"): value for key, value in metrics.items() if _is_metric(key)}
        self._report(Progress(state.global_step, state.max_steps, state.epoch, plain))

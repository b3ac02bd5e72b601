"""One training run, by transformers.Trainer: any branch, any loss, on a frozen trunk.

AdamW (weight decay 0.01, β 0.9/0.999, ε 1e-6), linear decay, warm-up over the first part of the whole run, gradient
norm 1.0. The dev metric is taken after each epoch and the best epoch's weights are kept. A run that was stopped goes
on from its last epoch when the same is asked again; one whose branch is up to date is not run again.
"""

import contextlib
import fcntl
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.utils.data import SequentialSampler
from transformers import EvalPrediction, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import PredictionOutput

from espalier.branch import Branch, BranchCard, Teacher, check_place, load_branch, read_card, save_branch
from espalier.encoder import Base
from espalier.errors import BranchError, SpecError
from espalier.spec import TaskSpec
from training.activations import ActivationCache, accelerated
from training.data import TaskData
from training.features import collate, featurize
from training.metrics import decode, gold, score

LIBRARIES = ("torch", "transformers", "tokenizers", "numpy", "espalier")


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
        if not 0 <= self.seed < 2**32:
            raise SpecError(f"seed is {self.seed}; it must lie between 0 and 2**32 - 1")
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
    stage: str = "training"  # or, before it, "trunk": steps are then texts


Report = Callable[[Progress], None]
Loss = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""Loss of (logits, labels, teacher logits)."""


def up_to_date(out: Path, inputs: str) -> BranchCard | None:
    """Return the card of the branch at `out` if it is whole and was made from the same inputs."""
    try:
        if read_card(out).inputs != inputs:
            return None
        return load_branch(out)[1]
    except BranchError:
        return None


@contextlib.contextmanager
def workshop(out: Path, inputs: str) -> Iterator[Path]:
    """Yield the folder, beside `out`, in which the run with the digest `inputs` keeps its checkpoints.

    One run at a time works there. It is removed when the run ends well, with those of other runs for the same
    branch; stopped, it stays for the next try.
    """
    check_place(out)
    work = out.parent / f".{out.name}.training-{inputs[:12]}"
    try:
        work.mkdir(parents=True, exist_ok=True)
        with _alone_in(work) as alone:
            if not alone:
                raise BranchError(f"another process is training {out} in just this way; wait for it")
            yield work
            shutil.rmtree(work)
    except OSError as error:
        raise BranchError(f"the branch cannot be written to {out}: {error.strerror or error}") from error
    for stopped in out.parent.glob(f".{out.name}.training-*"):
        # Another run may clear it away at the same moment.
        with contextlib.suppress(FileNotFoundError), _alone_in(stopped) as alone:
            if alone:
                shutil.rmtree(stopped)


@contextlib.contextmanager
def _alone_in(folder: Path) -> Iterator[bool]:
    """Lock `folder` for the block; yield False if another process has it."""
    with (folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


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
        hidden: Tensor | None = None, teacher_logits: Tensor | None = None,
    ) -> dict[str, Tensor]:  # fmt: skip
        if hidden is None:
            with torch.no_grad():
                hidden = self._frozen[0](input_ids, token_type_ids, mask, tap=self._tap)  # [B,S,H]
        logits = self.branch(hidden, mask)
        return {"loss": self._loss(logits, labels, teacher_logits), "logits": logits}


def fit(
    *, spec: TaskSpec, data: TaskData, base: Base, tap: int, branch: Branch, arguments: Arguments, inputs: str,
    work: Path, out: Path, report: Report, loss: Loss, teacher_logits: list[Tensor] | None = None,
    teacher: Teacher | None = None, cache: ActivationCache | None = None,
) -> BranchCard:  # fmt: skip
    """Train `branch` on `data`, keep its best epoch by the dev metric, and write the branch folder `out`.

    Checkpoints are kept in `work`; a run that finds some there goes on from the newest. With a `cache` the trunk runs
    once; its activations are rounded to FP16, so the metrics in the card are taken anew, without it, as served.
    """
    splits = {
        name: featurize(spec.kind, data.labels, base.tokenizer, base.max_length, examples)
        for name, examples in (("train", data.train), ("dev", data.dev))
    }
    if teacher_logits is not None:
        for feature, logits in zip(splits["train"], teacher_logits, strict=True):
            feature["teacher_logits"] = logits
    exact = [dict(feature) for feature in splits["dev"]]  # without activations, as served
    if cache is not None:
        attach_activations(cache, base, tap, splits.values(), report)
    fingerprint = base.fingerprint(tap)

    def metrics(prediction: EvalPrediction | PredictionOutput) -> dict[str, float]:
        answers = decode(spec.kind, data.labels, prediction.predictions, splits["dev"])
        return score(spec.kind, gold(data.dev), answers, spec.positive)

    transformers.logging.set_verbosity_error()
    options = TrainingArguments(
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
    )
    options._n_gpu = min(options.n_gpu, 1)  # DataParallel would copy the branch, but not the trunk
    trainer = _Trainer(
        model=_Model(base, tap, branch, loss),
        args=options,
        data_collator=collate,
        train_dataset=splits["train"],
        eval_dataset=splits["dev"],
        compute_metrics=metrics,
        callbacks=[_Reporter(report)],
    )
    trainer.remove_callback(transformers.PrinterCallback)
    with accelerated(base.encoder, branch):
        with warnings.catch_warnings():
            # Checkpoints of very short epochs; the Trainer then goes by their numbers.
            warnings.filterwarnings("ignore", message="mtime may not be reliable")
            trainer.train(resume_from_checkpoint=_last_checkpoint(work))
        final = metrics(trainer.predict(exact)) if cache is not None else None
    if not Path(trainer.state.best_model_checkpoint or "").is_dir():
        raise BranchError(f"the checkpoint of the best epoch is gone from {work}; remove that folder and train again")
    history = [
        {key.removeprefix("eval_"): value for key, value in entry.items() if _is_metric(key)}
        for entry in trainer.state.log_history
        if "eval_loss" in entry
    ]
    best = max(history, key=lambda entry: entry[spec.metric])
    return save_branch(
        out,
        branch,
        BranchCard(
            spec=spec,
            labels=data.labels,
            base=base.name,
            revision=base.revision,
            fingerprint=fingerprint,
            tap=tap,
            layers=len(branch.layers),
            encoder=asdict(branch.config),
            metrics=final or {key: value for key, value in best.items() if key not in ("epoch", "loss")},
            history=history,
            arguments=asdict(arguments),
            cached=cache is not None,
            teacher=teacher,
            inputs=inputs,
            versions={name: version(name) for name in LIBRARIES},
            weights="",
        ),
    )


def attach_activations(
    cache: ActivationCache, base: Base, tap: int, splits: Iterable[list[dict[str, Any]]], report: Report
) -> None:
    """Attach the trunk's activations to the features of each split, computing what the cache does not have."""
    for features in splits:
        activations = cache.get(
            base, tap, features, lambda done, total: report(Progress(done, total, 0, stage="trunk"))
        )
        activations.attach(features)


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


class _Trainer(Trainer):  # type: ignore[misc]
    def _get_eval_sampler(self, dataset: Any) -> SequentialSampler:
        # With group_by_length the Trainer reorders dev as well, but answers are scored in dev's own order.
        return SequentialSampler(dataset)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        # What a full disk raises depends on the library that writes: OSError, SafetensorError, or torch's RuntimeError.
        try:
            super()._save_checkpoint(model, trial)
        except (OSError, SafetensorError, RuntimeError) as error:
            folder = Path(self.args.output_dir)
            shutil.rmtree(folder / f"checkpoint-{self.state.global_step}", ignore_errors=True)
            reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
            raise BranchError(
                f"training stopped: a checkpoint cannot be written to {folder} ({reason}); "
                "with more room there the same command goes on"
            ) from error


class _Reporter(TrainerCallback):  # type: ignore[misc]
    def __init__(self, report: Report) -> None:
        self._report = report

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._report(Progress(state.global_step, state.max_steps, state.epoch))

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict[str, float], **_: Any) -> None:
        plain = {key.removeprefix("eval_"): value for key, value in metrics.items() if _is_metric(key)}
        self._report(Progress(state.global_step, state.max_steps, state.epoch, plain))

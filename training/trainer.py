"""The Trainer from transformers, bound to one way of optimizing: any model, any loss, the best epoch on dev.

AdamW (weight decay 0.01, β 0.9/0.999, ε 1e-6), linear decay, warm-up over the first part of the whole run, gradient
norm 1.0; a CRF's transitions take longer steps, without weight decay. The dev metric is taken after each epoch and the
best epoch's weights are kept. A run that was stopped goes on from its last epoch.
"""

import math
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.utils.data import SequentialSampler
from transformers import EvalPrediction, Trainer, TrainerCallback, TrainingArguments

from espalier.crf import CRF
from espalier.errors import BranchError, SpecError, TrainingError
from training.features import collate

CRF_RATE = 100
"""Learning rate of a CRF's transitions, in those of the layers: they begin at zero and have to reach a few units."""


@dataclass(frozen=True)
class Arguments:
    """What a training is asked for."""

    epochs: int = 4
    learning_rate: float = 5e-5
    batch_size: int = 32
    warmup: float = 0.1  # fraction of the whole run
    weight_decay: float = 0.01
    seed: int = 0
    max_train: int | None = None  # a sample of so many rows of train, always the same
    max_dev: int | None = None  # as many of dev
    bf16: bool = False  # forward passes of training in bfloat16; weights, losses and dev stay FP32

    def __post_init__(self) -> None:
        for name, low in (("epochs", 1), ("batch_size", 1), ("max_train", 1), ("max_dev", 1)):
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
    stage: str = "training"  # or, before it, "trunk" or "teacher": steps are then texts

    def label(self, name: str) -> str:
        """Return what a bar says of the run `name` at this stage."""
        return name + {"trunk": ": the trunk, once", "teacher": ": the teacher's answers"}.get(self.stage, "")


Report = Callable[[Progress], None]

Features = list[dict[str, Any]]
Metrics = Callable[[Any], dict[str, float]]
"""Dev metrics of the model's predictions, which are numpy arrays in dev's order."""


@dataclass(frozen=True)
class Run:
    """How a training went: dev loss and metrics by epoch, and why it stopped early, if it did."""

    history: list[dict[str, float]]
    stopped: str | None

    def best(self, metric: str) -> dict[str, float]:
        """Return the metrics of the epoch that was kept."""
        best = max(self.history, key=lambda entry: entry[metric])
        return {key: value for key, value in best.items() if key not in ("epoch", "loss")}


class Optimizer:
    """Trains a model whose forward gives `loss` and `logits`, in checkpoints under `work`."""

    def __init__(
        self, model: nn.Module, train: Features, dev: Features, metrics: Metrics, metric: str, arguments: Arguments,
        work: Path, report: Report,
    ) -> None:  # fmt: skip
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
            metric_for_best_model=metric,
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

        def finite_metrics(prediction: EvalPrediction) -> dict[str, float]:
            if not np.isfinite(prediction.predictions).all():
                raise _NotFinite("the answers on dev were not finite")
            return metrics(prediction.predictions)

        self._metrics = metrics
        self._work = work
        self._batch_size = arguments.batch_size
        self._trainer = _Trainer(
            arguments.bf16,
            model=model,
            args=options,
            data_collator=collate,
            train_dataset=train,
            eval_dataset=dev,
            compute_metrics=finite_metrics,
            callbacks=[_Reporter(report)],
        )
        self._trainer.remove_callback(transformers.PrinterCallback)

    def run(self) -> Run:
        """Train, from the newest checkpoint if there is one, and leave the best epoch's weights in the model.

        A loss that is no longer finite ends the run; the best epoch before it is kept. Raises TrainingError if there
        is none, or if memory does not suffice.
        """
        trainer, stopped = self._trainer, None
        try:
            with warnings.catch_warnings():
                # Checkpoints of very short epochs; the Trainer then goes by their numbers.
                warnings.filterwarnings("ignore", message="mtime may not be reliable")
                trainer.train(resume_from_checkpoint=_last_checkpoint(self._work))
        except _NotFinite as error:
            stopped = f"{error}; lower the learning rate, or look for damaged rows"
            if trainer.state.best_model_checkpoint is None:
                raise TrainingError(f"training stopped before the end of its first epoch: {stopped}") from error
            trainer._load_best_model()
        except (MemoryError, RuntimeError) as error:
            if not _out_of_memory(error):
                raise
            raise TrainingError(
                f"out of memory with batches of {self._batch_size} rows of up to {_longest(trainer)} tokens; "
                "lower --batch-size, train fewer task layers, or cut long texts"
            ) from error
        if not Path(trainer.state.best_model_checkpoint or "").is_dir():
            raise BranchError(
                f"the checkpoint of the best epoch is gone from {self._work}; remove that folder and train again"
            )
        history = [
            {key.removeprefix("eval_"): value for key, value in entry.items() if _is_metric(key)}
            for entry in trainer.state.log_history
            if "eval_loss" in entry
        ]
        return Run(history, stopped)

    def evaluate(self, dev: Features) -> dict[str, float]:
        """Return the metrics of the model as it is now on other features of the same dev split."""
        return self._metrics(self._trainer.predict(dev).predictions)


class _NotFinite(Exception):
    pass


def _out_of_memory(error: BaseException) -> bool:
    # On the CPU torch raises a plain RuntimeError.
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _longest(trainer: Trainer) -> int:
    return max(len(feature["input_ids"]) for feature in trainer.train_dataset)


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
    def __init__(self, bf16: bool, **options: Any) -> None:
        super().__init__(**options)
        self._bf16 = bf16

    def _get_eval_sampler(self, dataset: Any) -> SequentialSampler:
        # With group_by_length the Trainer reorders dev as well, but answers are scored in dev's own order.
        return SequentialSampler(dataset)

    def compute_loss(self, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        # Not TrainingArguments' own bf16: it would score dev in bfloat16, too, and the branch is served in more.
        with torch.autocast(self.args.device.type, torch.bfloat16, enabled=self._bf16 and model.training):
            return super().compute_loss(model, *args, **kwargs)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss: Tensor = super().training_step(*args, **kwargs)
        if not math.isfinite(loss.item()):
            raise _NotFinite(f"the loss was {loss.item()} in step {self.state.global_step + 1}")
        return loss

    def create_optimizer(self, *args: Any) -> Any:
        optimizer = super().create_optimizer(*args)
        own = [weight for part in self.model.modules() if isinstance(part, CRF) for weight in part.parameters()]
        if own:
            for group in optimizer.param_groups:
                group["params"] = [weight for weight in group["params"] if not any(weight is other for other in own)]
            rate = self.args.learning_rate * CRF_RATE
            optimizer.add_param_group({"params": own, "lr": rate, "weight_decay": 0.0})
        return optimizer

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

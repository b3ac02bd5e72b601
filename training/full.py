"""Full fine-tuning of a base on one task: the yardstick of the paper, one whole model per task.

Nothing is frozen and nothing is shared, so what comes out is a score, not a branch.
"""

import copy
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor, nn
from transformers import set_seed

from espalier.branch import Branch
from espalier.crf import crf_for
from espalier.encoder import Base
from espalier.files import write_whole
from espalier.spec import TaskSpec
from training.activations import accelerated
from training.data import TaskData, load_data
from training.features import featurize
from training.finetune import hard_loss, inputs_digest, new_branch
from training.fit import LIBRARIES, workshop
from training.metrics import dev_metrics
from training.trainer import Arguments, Optimizer, Report


class FullCard(BaseModel):
    """What a full fine-tuning gave."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    task: str
    metric: str
    base: str
    revision: str
    metrics: dict[str, float]  # on dev, of the best epoch
    history: list[dict[str, float]]  # dev metrics by epoch
    stopped: str | None  # why training ended early, if it did
    arguments: dict[str, Any]
    inputs: str  # digest of all that the training depends on
    versions: dict[str, str]

    @property
    def score(self) -> float:
        """The dev metric that the spec names."""
        return self.metrics[self.metric]


class _Whole(nn.Module):
    """The base, all of it trained: its last layer and the output layer as a branch."""

    def __init__(self, base: Base, top: Branch) -> None:
        super().__init__()
        self.encoder = copy.deepcopy(base.encoder).requires_grad_(True)
        del self.encoder.layers[-1]
        self.top = top

    def forward(
        self, input_ids: Tensor, token_type_ids: Tensor, mask: Tensor, labels: Tensor, words: Tensor | None = None
    ) -> dict[str, Tensor]:
        logits = self.top(self.encoder(input_ids, token_type_ids, mask), mask).float()
        loss = hard_loss(self.top.kind, logits, labels, self.top.crf)
        return {"loss": loss, "logits": logits if self.training else self.top.decoded(logits, mask, words)}


def train_fully(
    spec: TaskSpec, base: Base, arguments: Arguments, out: Path, report: Report, data: TaskData | None = None
) -> tuple[FullCard, bool]:
    """Fine-tune all of `base`, embeddings included, on `spec` and write the card, a JSON file, to `out`.

    `data` is what `load_data` gives for the spec and the arguments, if the caller has it. Returns the card, and whether
    it was trained now (False: `out` was up to date).
    """
    out = out.resolve()
    data = data or load_data(spec, arguments.max_train, arguments.max_dev)
    depth = base.config.num_hidden_layers
    inputs = inputs_digest(spec, data, base, 0, depth, 0, arguments, cached=False)
    try:
        if (card := FullCard.model_validate_json(out.read_bytes())).inputs == inputs:
            return card, False
    except (FileNotFoundError, ValidationError):
        pass  # not made yet, or by another version

    set_seed(arguments.seed)
    crf = crf_for(spec.structure, data.labels)
    whole = _Whole(base, new_branch(base, spec.kind, depth - 1, 1, len(data.labels), crf))
    train, dev = (
        featurize(spec.kind, data.labels, base.tokenizer, base.max_length, rows) for rows in (data.train, data.dev)
    )
    metrics = dev_metrics(spec, data, dev)
    with workshop(out, inputs) as work, accelerated(whole):
        run = Optimizer(whole, train, dev, metrics, spec.metric, arguments, work, report).run()
        card = FullCard(
            task=spec.name, metric=spec.metric, base=base.name, revision=base.revision, metrics=run.best(spec.metric),
            history=run.history, stopped=run.stopped, arguments=asdict(arguments), inputs=inputs,
            versions={name: version(name) for name in LIBRARIES},
        )  # fmt: skip
        write_whole(out, card.model_dump_json(indent=2) + "\n")
    return card, True

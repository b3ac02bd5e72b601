"""One training of a branch: any loss, on a frozen trunk, into a branch folder.

A run that was stopped goes on from its last epoch when the same is asked again; one whose branch is up to date is not
run again.
"""

import contextlib
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from espalier.branch import Branch, BranchCard, Teacher, load_branch, read_card, save_branch
from espalier.encoder import Base
from espalier.errors import BranchError
from espalier.files import locked
from espalier.spec import TaskSpec
from training.activations import ActivationCache, accelerated
from training.data import TaskData
from training.features import featurize
from training.metrics import dev_metrics
from training.trainer import Arguments, Optimizer, Progress, Report

LIBRARIES = ("torch", "transformers", "tokenizers", "numpy", "espalier")


@dataclass(frozen=True)
class Output:
    """What a branch gives for a batch."""

    logits: Tensor  # [B,C], [B,1] or [B,S,C]
    states: Tensor | None  # what the output layer read, [B,H] or [B,S,H]; of a teacher only if the loss wants it


Loss = Callable[[Output, Tensor, Output | None], Tensor]
"""Loss of (the branch's output, labels, the teacher's output); dev batches have no teacher's."""
Targets = Callable[[list[dict[str, Any]]], list[Output]]
"""The teacher's output for the features of train, activations attached if there is a cache."""


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
    work = out.parent / f".{out.name}.training-{inputs[:12]}"
    try:
        work.mkdir(parents=True, exist_ok=True)
        with locked(work / "lock", wait=False) as alone:
            if not alone:
                raise BranchError(f"another process is training {out} in just this way; wait for it")
            yield work
            shutil.rmtree(work)
    except OSError as error:
        raise BranchError(f"the branch cannot be written to {out}: {error.strerror or error}") from error
    for stopped in out.parent.glob(f".{out.name}.training-*"):
        # Another run may clear it away at the same moment.
        with contextlib.suppress(FileNotFoundError), locked(stopped / "lock", wait=False) as alone:
            if alone:
                shutil.rmtree(stopped)


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
        hidden: Tensor | None = None, teacher_logits: Tensor | None = None, teacher_states: Tensor | None = None,
        words: Tensor | None = None,
    ) -> dict[str, Tensor]:  # fmt: skip
        if hidden is None:
            with torch.no_grad():
                hidden = self._frozen[0](input_ids, token_type_ids, mask, tap=self._tap)  # [B,S,H]
        states = self.branch.states(hidden, mask)
        logits = self.branch.read(states)
        target = None if teacher_logits is None else Output(teacher_logits, teacher_states)
        loss = self._loss(Output(logits.float(), states.float()), labels, target)
        return {"loss": loss, "logits": logits if self.training else self.branch.decoded(logits, mask, words)}


def fit(
    *, spec: TaskSpec, data: TaskData, base: Base, tap: int, branch: Branch, arguments: Arguments, inputs: str,
    work: Path, out: Path, report: Report, loss: Loss, targets: Targets | None = None,
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
    exact = [dict(feature) for feature in splits["dev"]]  # without activations, as served
    if cache is not None:
        _attach_activations(cache, base, tap, splits.values(), report)
    if targets is not None:
        for feature, target in zip(splits["train"], targets(splits["train"]), strict=True):
            feature["teacher_logits"] = target.logits
            if target.states is not None:
                feature["teacher_states"] = target.states
    fingerprint = base.fingerprint(tap)

    metrics = dev_metrics(spec, data, splits["dev"])
    optimizer = Optimizer(
        _Model(base, tap, branch, loss), splits["train"], splits["dev"], metrics, spec.metric, arguments, work, report
    )
    with accelerated(base.encoder, branch):
        run = optimizer.run()
        kept = run.best(spec.metric) if cache is None else optimizer.evaluate(exact)
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
            folded=branch.folded,
            encoder=asdict(branch.config),
            metrics=kept,
            history=run.history,
            stopped=run.stopped,
            arguments=asdict(arguments),
            cached=cache is not None,
            teacher=teacher,
            inputs=inputs,
            versions={name: version(name) for name in LIBRARIES},
            threads=torch.get_num_threads(),
            weights="",
        ),
    )


def _attach_activations(
    cache: ActivationCache, base: Base, tap: int, splits: Iterable[list[dict[str, Any]]], report: Report
) -> None:
    """Attach the trunk's activations to the features of each split, computing what the cache does not have."""
    for features in splits:
        activations = cache.get(
            base, tap, features, lambda done, total: report(Progress(done, total, 0, stage="trunk"))
        )
        activations.attach(features)

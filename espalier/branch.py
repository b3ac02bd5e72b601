"""A branch: what one task owns above the trunk – its layers, its output, and where all of it came from.

On disk a folder with `branch.safetensors` (the weights) and `branch.json` (everything else).
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from espalier.contract import Kind
from espalier.crf import CRF, crf_for
from espalier.encoder import Base, EncoderConfig, Layer
from espalier.errors import BranchError, FingerprintError, first_problem
from espalier.files import digest, whole_folder, write_whole
from espalier.spec import TaskSpec

WEIGHTS_FILE = "branch.safetensors"
CARD_FILE = "branch.json"


class Teacher(BaseModel):
    """The branch that a student was distilled from."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    digest: str
    folder: Path  # where it was; on disk relative to the student
    init: str  # where the student's weights started, see training.distill.Init
    cls_weight: float  # in the loss, of the distance to the teacher's [CLS] state

    @property
    def start(self) -> str:
        """Identity of what the student started from and was drawn to; not where that lay."""
        return f"{self.digest} {self.init}" + (f" {self.cls_weight}" if self.cls_weight else "")


class BranchCard(BaseModel):
    """Everything about a branch but its weights."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    spec: TaskSpec
    labels: tuple[str, ...]  # empty for regression
    base: str
    revision: str
    fingerprint: str  # of the frozen part below the tap, tokenizer included
    tap: int
    layers: int
    folded: int  # of the layers, at the top: they compute the first token alone
    encoder: dict[str, Any]  # the EncoderConfig of its layers
    metrics: dict[str, float]  # on dev, of the epoch that was kept
    history: list[dict[str, float]]  # dev metrics by epoch
    stopped: str | None = None  # why training ended early, if it did
    arguments: dict[str, Any]  # what training was asked for, the seed included
    cached: bool  # whether the trunk's activations were rounded to FP16 on the way
    teacher: Teacher | None  # None: fine-tuned, not distilled
    inputs: str  # digest of all that the training depends on
    versions: dict[str, str]  # of the libraries
    threads: int  # of torch; they decide the last digits of sums
    weights: str  # sha256 of the weights file

    @property
    def score(self) -> float:
        """The dev metric that the spec names."""
        return self.metrics[self.spec.metric]

    @property
    def digest(self) -> str:
        """Identity of the branch: of its weights, labels, tap and trunk."""
        parts = [self.spec.name, self.weights, json.dumps(self.labels), str(self.tap), self.fingerprint]
        if self.folded > 1:
            parts.append(str(self.folded))
        return digest(*parts)

    def with_paths(self, change: Callable[[Path], Path]) -> "BranchCard":
        """Return a copy whose paths, those of the data and of the teacher, went through `change`."""
        teacher = self.teacher and self.teacher.model_copy(update={"folder": change(self.teacher.folder)})
        return self.model_copy(update={"spec": self.spec.with_paths(change), "teacher": teacher})


class Branch(nn.Module):
    """Task layers and an output layer: hidden state at the tap [B,S,H] → logits.

    Logits are [B,C] for classification, [B,1] for regression (both read the first token, [CLS]), and [B,S,C] for
    tagging, where a `crf` above them may choose the labels.

    The top `folded` layers of a sentence branch compute the first token alone, and read the other tokens' states above
    the layers that are not folded. Folding the last layer changes nothing, since nobody reads its other tokens; it is
    the default. A branch with more folded layers is another model, whose further layers cost next to nothing.
    """

    def __init__(
        self, config: EncoderConfig, kind: Kind, layers: int, outputs: int, crf: CRF | None = None,
        folded: int | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        least, most = foldable(kind, layers)
        self.folded = least if folded is None else folded
        if not least <= self.folded <= most:
            raise BranchError(
                f"{self.folded} folded layers do not fit: of {layers} layers of a {kind} branch "
                + (f"{least} to {most} can be folded" if most else "none can be folded")
            )
        self.config = config
        self.kind = kind
        self.layers = nn.ModuleList(Layer(config) for _ in range(layers))
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.output = nn.Linear(config.hidden_size, outputs)
        self.crf = crf

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """Return the logits for hidden [B,S,H]; mask [B,S] is true for real tokens."""
        return self.read(self.states(hidden, mask))

    def states(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """Return what the output layer reads: the first token's state [B,H], or for tagging every token's [B,S,H]."""
        full = len(self.layers) - self.folded
        for layer in self.layers[:full]:
            hidden = layer(hidden, mask)
        if self.kind is not Kind.TAGGING:
            states, first = hidden, hidden[:, :1]  # [B,S,H], [B,1,H]
            for index, layer in enumerate(self.layers[full:]):
                if index > 0:
                    states = torch.cat([first, states[:, 1:]], dim=1)
                first = layer(states, mask, first_alone=True)
            hidden = first[:, 0]
        return hidden

    def read(self, states: Tensor) -> Tensor:
        """Return the logits for what `states` returns."""
        logits: Tensor = self.output(self.dropout(states))
        return logits

    def answer(self, hidden: Tensor, mask: Tensor, words: Tensor | None = None) -> Tensor:
        """Return what the served head returns: probabilities, the value of a regression, or the path of a CRF.

        `words` [B,S] is true for tokens that begin a word; a CRF needs it.
        """
        found = self.decoded(self(hidden, mask), mask, words)
        softmax = self.kind is not Kind.REGRESSION and self.crf is None
        return F.softmax(found, dim=-1) if softmax else found

    def decoded(self, logits: Tensor, mask: Tensor, words: Tensor | None) -> Tensor:
        """Return the path that the CRF finds in the logits, or, without one, the logits."""
        if self.crf is None:
            return logits
        assert words is not None
        return self.crf.answer(logits, words, mask)


def foldable(kind: Kind, layers: int) -> tuple[int, int]:
    """Return how many of the top layers are folded at least and at most: the last one always; in tagging none."""
    return (0, 0) if kind is Kind.TAGGING else (min(1, layers), layers)


def check_place(path: Path) -> None:
    """Raise BranchError if `path` holds anything but a branch, which a branch written there would wipe out."""
    if path.is_dir() and {entry.name for entry in path.iterdir()} <= {CARD_FILE, WEIGHTS_FILE}:
        return
    if path.exists():
        raise BranchError(f"{path} exists and holds more than a branch; name a folder of the branch's own")


def save_branch(path: Path, branch: Branch, card: BranchCard) -> BranchCard:
    """Write the branch folder whole, in the place of one that was there; return the card with the weights' digest."""
    return write_branch(path, save({name: tensor.contiguous() for name, tensor in branch.state_dict().items()}), card)


def write_branch(path: Path, weights: bytes, card: BranchCard) -> BranchCard:
    """Do as `save_branch` does, with the content of a weights file."""
    card = card.model_copy(update={"weights": digest(weights)})
    # Relative to the branch: a card names no machine's folders, and holds when the project moves as a whole.
    home = path.resolve()
    portable = card.with_paths(lambda other: Path(os.path.relpath(other, home)))
    try:
        check_place(path)
        with whole_folder(path) as folder:
            (folder / WEIGHTS_FILE).write_bytes(weights)
            write_whole(folder / CARD_FILE, portable.model_dump_json(indent=2) + "\n")
    except OSError as error:
        raise BranchError(f"the branch cannot be written to {path}: {error.strerror or error}") from error
    return card


def read_card(path: Path) -> BranchCard:
    """Read a branch's card alone; raise BranchError if it is missing or damaged."""
    file = path / CARD_FILE
    try:
        card = BranchCard.model_validate_json(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise BranchError(f"{path} is not a branch folder: {CARD_FILE} cannot be read ({error.strerror})") from error
    except (ValidationError, UnicodeDecodeError) as error:
        raise BranchError(
            f"{file} is damaged or of another version: {_reason(error)}; train the branch again"
        ) from error
    home = path.resolve()
    return card.with_paths(lambda other: Path(os.path.normpath(home / other)))


def _reason(error: ValidationError | UnicodeDecodeError) -> str:
    if isinstance(error, UnicodeDecodeError):
        return str(error)
    return ": ".join(filter(None, first_problem(error)))


def load_branch(path: Path) -> tuple[Branch, BranchCard]:
    """Read a branch folder; raise BranchError if it is missing or damaged."""
    card = read_card(path)
    file = path / WEIGHTS_FILE
    try:
        content = file.read_bytes()
    except OSError as error:
        raise BranchError(f"{file} cannot be read: {error.strerror}") from error
    if digest(content) != card.weights:
        raise BranchError(f"{file} is damaged: its digest is not the one in {CARD_FILE}; copy or train it again")
    try:
        outputs = max(1, len(card.labels))
        crf = crf_for(card.spec.structure, card.labels)
        branch = Branch(EncoderConfig(**card.encoder), card.spec.kind, card.layers, outputs, crf, card.folded)
        branch.load_state_dict(load(content))
    except (SafetensorError, RuntimeError, TypeError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise BranchError(f"{file} does not hold the layers that {CARD_FILE} names: {reason}") from error
    return branch.eval(), card


def other_base(path: Path, card: BranchCard, first: Path, its: BranchCard) -> str | None:
    """Say on which bases two branches were trained, if they are not one; None if they are."""
    if (card.base, card.revision) == (its.base, its.revision):
        return None
    return f"{path} was trained on {card.base!r} ({card.revision}), {first} on {its.base!r} ({its.revision})"


def check_trunk(card: BranchCard, base: Base, where: str) -> None:
    """Raise FingerprintError unless `base` is, below the tap, the trunk that the branch was trained on."""
    layers = base.config.num_hidden_layers
    if card.tap > layers:
        raise FingerprintError(f"{where} taps layer {card.tap}, but {base.name!r} has {layers} layers")
    have = base.fingerprint(card.tap)
    if have != card.fingerprint:
        raise FingerprintError(
            f"{where} was trained on another trunk: below layer {card.tap} its fingerprint is "
            f"{card.fingerprint[:12]}, that of {base.name!r} is {have[:12]}; "
            f"train it again on {base.name!r}, or use the base {card.base!r} at revision {card.revision}"
        )

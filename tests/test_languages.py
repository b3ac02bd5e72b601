"""Bases of other languages and casings, from the checkpoint to the answers of the real Triton."""

import json
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Reference
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_training import silent
from tokenizers import Tokenizer
from transformers import AutoTokenizer, BertConfig, BertModel, BertTokenizerFast

from clients import Classification, Client, Tagging
from clients.evaluate import evaluate
from espalier.contract import Kind
from espalier.encoder import Base, load_base
from espalier.spec import load_spec
from espalier.tagging import decode, word_starts
from export.repository import export
from export.tokenizer_model import TextEncoder
from serving.triton import on_free_ports
from training.data import load_data
from training.features import featurize
from training.finetune import train
from training.trainer import Arguments

CITIES = ("北京", "上海", "乌鲁木齐", "西安")
ASKED = {"weather": ("{}明天天气怎么样？", "{}会下雨吗"), "travel": ("订一张去{}的票", "我想飞到{}，越快越好！")}
LATIN = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789éÉüñ"
CHARACTERS = sorted({*"".join((*CITIES, *(text for texts in ASKED.values() for text in texts))), *LATIN} - set("{}"))
TEXTS = (
    "北京明天天气怎么样？",
    "我想飞到上海,ok?",
    "  iPhone 12在 西安 多少钱。",
    "Café ÉTÉ señor über 2024年",
    "cafe\u0301 e\u0301te\u0301",
    "龘靐未知字",  # characters that the vocabulary lacks
    "한국어 にほん 北京",
    "",
    "[SEP] 北京 <s>",
)


def checkpoint(folder: Path, special: tuple[str, ...], start: int = 0, **tokenizer: object) -> Path:
    """Write a BERT of two narrow layers: its vocabulary is single characters, its special tokens begin at `start`."""
    pieces = sorted({*CHARACTERS, *(f"##{character}" for character in LATIN), *",.?!。，？！[]<>"})
    vocabulary = [*pieces[:start], *special, *pieces[start:]]
    folder.mkdir(parents=True)
    (folder / "vocab.txt").write_text("\n".join(vocabulary), encoding="utf-8")
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), special, strict=True))
    BertTokenizerFast(vocab_file=str(folder / "vocab.txt"), **names, **tokenizer).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocabulary), hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=40,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder)
    return folder


USUAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
CHECKPOINTS = {
    "chinese": dict(special=USUAL, do_lower_case=False, strip_accents=False),
    "lowering, accents kept": dict(special=USUAL, do_lower_case=True, strip_accents=False),
    "cased, accents stripped": dict(special=USUAL, do_lower_case=False, strip_accents=True),
    "cased": dict(special=USUAL, do_lower_case=False),
    "other ids": dict(special=USUAL, start=40, do_lower_case=True),
    "other tokens": dict(special=("<pad>", "<unk>", "<s>", "</s>", "<mask>"), start=7, do_lower_case=False),
}


@pytest.fixture(scope="module", params=CHECKPOINTS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("languages") / "checkpoint", **CHECKPOINTS[request.param])


@pytest.fixture(scope="module")
def base(folder: Path) -> Base:
    return load_base(str(folder))


# --- any tokenizer ----------------------------------------------------------------------------------------------


def test_texts_become_the_tokens_that_transformers_makes(folder: Path, base: Base, tmp_path: Path) -> None:
    theirs = AutoTokenizer.from_pretrained(folder)
    ours = Tokenizer.from_str(base.tokenizer)
    (tmp_path / "tokenizer.json").write_text(base.tokenizer, encoding="utf-8")
    served = TextEncoder(tmp_path / "tokenizer.json", base.max_length)
    for text in TEXTS:
        want = theirs(text, truncation=True, max_length=base.max_length, return_offsets_mapping=True)
        (given,) = served.encode([np.array([[text.encode()]], dtype=object)])
        assert ours.encode(text).ids == want["input_ids"] == given["input_ids"][0].tolist()
        assert given["offsets"][0].tolist() == [list(span) for span in want["offset_mapping"]]
        pair = theirs(text, TEXTS[0], truncation="longest_first", max_length=base.max_length)
        (given,) = served.encode([np.array([[text.encode(), TEXTS[0].encode()]], dtype=object)])
        assert given["input_ids"][0].tolist() == pair["input_ids"]
        assert given["token_type_ids"][0].tolist() == pair["token_type_ids"]


def test_the_encoder_equals_that_of_transformers(folder: Path, base: Base) -> None:
    tokens = AutoTokenizer.from_pretrained(folder)(list(TEXTS), padding=True, return_tensors="pt")
    with torch.no_grad():
        want = BertModel.from_pretrained(folder).eval()(**tokens).last_hidden_state
        got = base.encoder(tokens["input_ids"], tokens["token_type_ids"], tokens["attention_mask"].bool())
    real = tokens["attention_mask"].bool()
    torch.testing.assert_close(got[real], want[real], atol=1e-5, rtol=0)


def test_words_begin_where_wordpiece_has_no_hashes(base: Base) -> None:
    tokenizer = Tokenizer.from_str(base.tokenizer)

    @settings(max_examples=150, deadline=None)
    @given(st.text(st.sampled_from([*CHARACTERS, *"  ,.?。，！\u0301ⅷ한の\0'"]), max_size=30))
    @example("北京ok")
    def check(text: str) -> None:
        encoding = tokenizer.encode(text)
        begins = [
            span != (0, 0) and not token.startswith("##")
            for token, span in zip(encoding.tokens, encoding.offsets, strict=True)
        ]
        assert word_starts(text, encoding.offsets) == begins

    check()


# --- Chinese tasks, served --------------------------------------------------------------------------------------

TRAIN = 1200
"""Rows for one epoch: of tags by word, dev sees first characters alone and would keep too early an epoch."""

KINDS = {"intent": "classification", "characters": "tagging", "words": "tagging"}


def requests(count: int, seed: int) -> list[tuple[str, str, str, int]]:
    """Return texts with their intent, city, and where the city begins."""
    rng = random.Random(seed)
    made = []
    for _ in range(count):
        intent, city = rng.choice(list(ASKED)), rng.choice(CITIES)
        pattern = rng.choice(ASKED[intent])
        made.append((pattern.format(city), intent, city, pattern.index("{")))
    return made


def parted(text: str, city: str, start: int, by_word: bool) -> tuple[list[str], list[str]]:
    """Return tokens and tags: of characters, or of words, the city being one."""
    before, after = text[:start], text[start + len(city) :]
    if by_word:
        return [*before, city, *after], ["O"] * len(before) + ["B-city"] + ["O"] * len(after)
    tags = ["O"] * len(before) + ["B-city"] + ["I-city"] * (len(city) - 1) + ["O"] * len(after)
    return list(text), tags


def write_specs(home: Path) -> dict[str, Path]:
    specs = {}
    for split, count in (("train", TRAIN), ("dev", 30)):
        rows = []
        for text, intent, city, start in requests(count, seed=count):
            row: dict[str, object] = {"text": text, "intent": intent}
            for name, by_word in (("characters", False), ("words", True)):
                row[f"{name}_tokens"], row[f"{name}_tags"] = parted(text, city, start, by_word)
            rows.append(json.dumps(row, ensure_ascii=False))
        (home / f"{split}.jsonl").write_text("\n".join(rows), encoding="utf-8")
    for name, kind in KINDS.items():
        columns = f"text: {name}_tokens\nlabel: {name}_tags\nmetric: slot_f1"
        if kind == "classification":
            columns = "text: text\nlabel: intent\nmetric: accuracy"
        specs[name] = home / f"{name}.yaml"
        specs[name].write_text(
            f"name: {name}\nkind: {kind}\n{columns}\ndata: {{format: jsonl, train: train.jsonl, dev: dev.jsonl}}\n"
        )
    return specs


@pytest.fixture(scope="module")
def chinese(tmp_path_factory: pytest.TempPathFactory) -> tuple[Base, dict[str, Path], dict[str, Path]]:
    """A Chinese base, and by task the spec and the trained branch."""
    home = tmp_path_factory.mktemp("chinese")
    base = load_base(str(checkpoint(home / "checkpoint", **CHECKPOINTS["chinese"])))
    specs = write_specs(home)
    for name, spec in specs.items():
        train(load_spec(spec), base, 1, 1, Arguments(1, 5e-3, 8), home / "branches" / name, silent)
    return base, specs, {name: home / "branches" / name for name in KINDS}


@pytest.fixture(scope="module")
def served(chinese: tuple[Base, dict[str, Path], dict[str, Path]]) -> Iterator[tuple[Client, Reference]]:
    """A client of a real Triton that serves the Chinese tasks, and plain PyTorch to compare with."""
    base, _, branches = chinese
    repository = branches["intent"].parent.parent / "model_repository"
    export(list(branches.values()), repository, scheduling={"threads": 1}, load=lambda name, revision: base)
    log = repository.parent / "triton.log"
    with on_free_ports(repository, log) as server, Client(server.grpc_url) as client:
        yield client, Reference(base, branches)


@pytest.mark.parametrize("task", ["characters", "words"])
def test_each_character_gets_the_tag_of_its_word(
    task: str, chinese: tuple[Base, dict[str, Path], dict[str, Path]]
) -> None:
    base, specs, _ = chinese
    data = load_data(load_spec(specs[task]))
    assert data.labels == ("B-city", "I-city", "O"), "of tags by word, I-city is that of a city's further characters"
    features = featurize(Kind.TAGGING, data.labels, base.tokenizer, base.max_length, data.train)
    for feature, (text, _, city, start) in zip(features, requests(TRAIN, seed=TRAIN), strict=True):
        want = parted(text, city, start, by_word=False)[1]
        assert [data.labels[label] for label in feature["labels"][1:-1]] == want


@pytest.mark.server
def test_chinese_texts_are_answered_as_by_pytorch(served: tuple[Client, Reference]) -> None:
    client, reference = served
    texts = [*TEXTS, *(text for text, *_ in requests(20, seed=3))]
    for text, answer in zip(texts, client.ask_batch(texts), strict=True):
        intent, labels = answer["intent"], reference.labels("intent")
        assert isinstance(intent, Classification)
        want = reference.answer("intent", text)
        np.testing.assert_allclose([intent.probabilities[label] for label in labels], want, atol=1e-4)
        for task in ("characters", "words"):
            tagging = answer[task]
            assert isinstance(tagging, Tagging)
            probabilities = reference.answer(task, text)
            words, spans = decode(text, reference.encode(text).offsets, probabilities, reference.labels(task))
            assert [(word.label, word.start, word.end) for word in tagging.tokens] == [
                (word.label, word.start, word.end) for word in words
            ]
            assert [(span.label, span.start, span.end) for span in tagging.spans] == [
                (span.label, span.start, span.end) for span in spans
            ]


@pytest.mark.server
@pytest.mark.parametrize("task", ["characters", "words"])
def test_cities_are_found_in_texts_without_spaces(task: str, served: tuple[Client, Reference]) -> None:
    client, _ = served
    asked = requests(20, seed=4)
    answers = client.ask_batch([text for text, *_ in asked], tasks=[task])
    for (text, _, city, start), answer in zip(asked, answers, strict=True):
        found = answer[task]
        assert isinstance(found, Tagging)
        assert [(span.label, span.start, span.text) for span in found.spans] == [("city", start, city)]
        assert [text[word.start : word.end] for word in found.tokens] == list(text)


@pytest.mark.server
def test_served_scores_of_chinese_tasks_are_those_of_training(
    served: tuple[Client, Reference], chinese: tuple[Base, dict[str, Path], dict[str, Path]]
) -> None:
    for task, spec in chinese[1].items():
        metrics = evaluate(served[0], load_spec(spec), 16, lambda done, total: None)
        _, card = served[1].loaded[task]
        assert metrics == pytest.approx(card.metrics)
        assert card.score > 0.9

"""Bases of other languages and casings, from the checkpoint to the answers of the real Triton."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import AutoTokenizer, BertConfig, BertModel, BertTokenizerFast

from espalier.encoder import Base, load_base
from espalier.tagging import word_starts
from export.tokenizer_model import TextEncoder

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
    pieces = [*CHARACTERS, *(f"##{character}" for character in LATIN), *",.?!。，？！[]<>"]
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

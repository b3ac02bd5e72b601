"""Texts to measure with: words of the vocabulary, so many that a text has just the tokens that are wanted."""

from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from espalier.errors import DataError

FIXED = 32
SPECIAL = 2  # [CLS] and [SEP]
BLOCK = 64


def mixed_lengths(rng: np.random.Generator, count: int, longest: int = 128) -> "np.typing.NDArray[np.int64]":
    """Draw lengths in tokens: log-normal, 5 to 128, 23 in the mean – short questions with a tail of longer texts."""
    return np.clip(rng.lognormal(2.95, 0.6, count).round().astype(np.int64), 5, min(128, longest))


def read_texts(file: Path, advice: str) -> list[str]:
    """Return the lines of `file` that are not empty; raise DataError, with `advice`, if there are none to read."""
    try:
        lines = [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror}; {advice}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is not UTF-8 at byte {error.start}; {advice}") from error
    if not lines:
        raise DataError(f"{file} holds no text; {advice}")
    return lines


def mixed(tokenizer: str, count: int, seed: int = 0) -> list[str]:
    """Return texts of mixed lengths, see `mixed_lengths`.

    Each BLOCK of them has nearly the same lengths, one of each quantile, in another order: a window of few texts asks
    for as many tokens per text as one of many.
    """
    return texts_of(tokenizer, _blocks(count, seed), seed)


def padded(tokenizer: str, count: int, buckets: Sequence[int], seed: int = 0) -> list[str]:
    """Return texts as long as the texts of `mixed` are after padding to the next of `buckets`."""
    lengths = _blocks(count, seed)
    return texts_of(tokenizer, [next(size for size in buckets if size >= length) for length in lengths], seed)


def _blocks(count: int, seed: int) -> list[int]:
    rng = np.random.default_rng(seed)
    quantiles = np.sort(mixed_lengths(rng, BLOCK * 1000)).reshape(BLOCK, 1000)[:, 500]
    return [int(length) for _ in range(-(-count // BLOCK)) for length in rng.permutation(quantiles)][:count]


def fixed(tokenizer: str, count: int, seed: int = 0) -> list[str]:
    """Return texts of FIXED tokens."""
    return texts_of(tokenizer, [FIXED] * count, seed)


def texts_of(tokenizer: str, lengths: Iterable[int], seed: int) -> list[str]:
    """Return a text of random words for each length in tokens, [CLS] and [SEP] included."""
    words = np.array(_words(tokenizer))
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(words, max(0, length - SPECIAL))) for length in lengths]


@cache
def _words(tokenizer: str) -> Sequence[str]:
    """Return the lower-case words of a tokenizer (its JSON) that are one token each."""
    rust = Tokenizer.from_str(tokenizer)
    return sorted(word for word in rust.get_vocab() if word.isascii() and word.isalpha() and word.islower())

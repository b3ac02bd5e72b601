"""From token labels to words and spans, in the characters of the text.

A head labels BERT's tokens, people tag words. A word here is what BERT's basic tokenizer cuts: a run without
whitespace, punctuation and CJK characters, or one punctuation mark or CJK character. Its label is that of its first
token, in training and in serving.
"""

import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

Text = str | tuple[str, str]
"""One text, or a pair, whose sequence is [CLS] a [SEP] b [SEP]."""

Offsets = Sequence[Sequence[int]] | npt.NDArray[np.integer[Any]]
"""[S, 2]: each token's start and end in its own text; (0, 0) for special and pad tokens."""

OUTSIDE = "O"


@dataclass(frozen=True)
class TokenTag:
    """The label of one word: `label`, where the word is, and the label's probability."""

    label: str
    start: int  # characters of the text (of the sentence's own text for a pair)
    end: int
    probability: float
    sentence: int  # 0, or 1 for the second text of a pair

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain values, for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Span:
    """Neighbouring words that together are one thing of type `label`."""

    label: str
    start: int  # characters, as in TokenTag
    end: int
    text: str
    probability: float  # mean over the words
    sentence: int

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain values, for JSON."""
        return asdict(self)


def word_starts(text: Text, offsets: Offsets) -> list[bool]:
    """Return for each token whether it begins a word; special and pad tokens do not. `offsets` is [S, 2].

    A token continues the word before it iff nothing but characters that the tokenizer deletes lies between them, and
    neither character at the border stands for itself (punctuation, CJK). For BERT's WordPiece these are exactly the
    `##` tokens, but for rare punctuation that Unicode has classified since the tokenizer's tables were made, and for
    ≠, ≮, ≯ and U+1FEF where the tokenizer keeps accents. Training and clients both go by this rule.
    """
    texts = _texts(text)
    starts = []
    previous: tuple[int, int] | None = None  # sentence, end
    for token in _tokens(offsets):
        if token is None:
            starts.append(False)
            continue
        sentence, start, end = token
        starts.append(
            previous is None or previous[0] != sentence or not _continues(texts[sentence], previous[1], start)
        )
        previous = sentence, end
    return starts


def count_words(text: str) -> int:
    """Count the words of `text` as the tokenizer parts it: the tokens that begin one, if none is cut off."""
    count, inside = 0, False
    for character in text:
        if _alone(character):
            count, inside = count + 1, False
        elif _deleted(character):
            continue
        elif character.isspace():
            inside = False
        else:
            count, inside = count + (not inside), True
    return count


def decode(
    text: Text, offsets: Offsets, probabilities: npt.NDArray[np.floating[Any]], labels: Sequence[str]
) -> tuple[tuple[TokenTag, ...], tuple[Span, ...]]:
    """Return the words with their labels, and the spans, of one item.

    `probabilities` is [S, C] with C labels. Labels are BIO or BIOES, read leniently as conlleval does: an inside
    label after anything but its own kind begins a span. A label without such a prefix, `O` aside, counts as inside.
    """
    texts = _texts(text)
    words: list[TokenTag] = []
    begins = word_starts(text, offsets)
    for index, token in enumerate(_tokens(offsets)):
        if token is None:
            continue
        sentence, start, end = token
        if begins[index]:
            best = int(probabilities[index].argmax())
            words.append(TokenTag(labels[best], start, end, float(probabilities[index, best]), sentence))
        else:
            last = words[-1]
            words[-1] = TokenTag(last.label, last.start, max(last.end, end), last.probability, sentence)
    return tuple(words), tuple(_span(texts, kind, group) for kind, group in _groups(words))


def _texts(text: Text) -> tuple[str, ...]:
    return (text,) if isinstance(text, str) else text


def _tokens(offsets: Offsets) -> Iterator[tuple[int, int, int] | None]:
    """Yield sentence, start and end of each token, None for special and pad tokens."""
    specials = 0
    for start, end in np.asarray(offsets).reshape(-1, 2).tolist():
        if end == 0:
            specials += 1
            yield None
        else:
            yield (0 if specials < 2 else 1), start, end


def _continues(text: str, end: int, start: int) -> bool:
    # Pieces of one character, such as the letters of a Hangul syllable, overlap.
    if start < end:
        return not _alone(text[start])
    return not (_alone(text[end - 1]) or _alone(text[start])) and all(_deleted(c) for c in text[end:start])


@lru_cache(maxsize=4096)
def _alone(character: str) -> bool:
    """Tell whether BERT makes a token of its own of `character`."""
    if _cjk(ord(character)):
        return True
    # The tokenizer decomposes first: ≠ becomes = and a stroke that is stripped.
    base = unicodedata.normalize("NFD", character)[0]
    return (base.isascii() and base.isprintable() and not base.isalnum() and base != " ") or (
        unicodedata.category(base)[0] == "P"
    )


def _cjk(code: int) -> bool:
    return (
        0x3400 <= code <= 0x4DBF
        or 0x4E00 <= code <= 0x9FFF
        or 0xF900 <= code <= 0xFAFF
        or 0x20000 <= code <= 0x2A6DF
        or 0x2A700 <= code <= 0x2B81F
        or 0x2B920 <= code <= 0x2CEAF  # as `tokenizers` has it; BERT's own block began at 2B820
        or 0x2F800 <= code <= 0x2FA1F
    )


@lru_cache(maxsize=4096)
def _deleted(character: str) -> bool:
    """Tell whether BERT's normalizer deletes `character`: accents, control characters, the replacement character."""
    if character in "\t\n\r":
        return False
    category = unicodedata.category(character)
    return category[0] == "C" or category == "Mn" or character == "\ufffd"


def _groups(words: Sequence[TokenTag]) -> Iterator[tuple[str, list[TokenTag]]]:
    """Yield the type and the words of each span."""
    kind, group, open_ended = "", list[TokenTag](), False
    for word in words:
        prefix, name = _parse(word.label)
        goes_on = (
            open_ended and prefix in ("I", "E") and name == kind and bool(group) and group[-1].sentence == word.sentence
        )
        if not goes_on and group:
            yield kind, group
            group = []
        if prefix != OUTSIDE:
            kind = name
            group.append(word)
        open_ended = prefix in ("B", "I")
    if group:
        yield kind, group


def _parse(label: str) -> tuple[str, str]:
    """Split a label in prefix and type."""
    if label == OUTSIDE:
        return OUTSIDE, ""
    prefix, dash, name = label.partition("-")
    return (prefix, name) if dash and prefix in ("B", "I", "E", "S") else ("I", label)


def _span(texts: tuple[str, ...], kind: str, words: Sequence[TokenTag]) -> Span:
    start, end, sentence = words[0].start, words[-1].end, words[0].sentence
    probability = sum(word.probability for word in words) / len(words)
    return Span(kind, start, end, texts[sentence][start:end], probability, sentence)

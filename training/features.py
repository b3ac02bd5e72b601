"""Examples as tensors: the tokenizer that also serves, labels per item or per token, padding per batch."""

from collections.abc import Sequence
from typing import Any

import torch
from tokenizers import Encoding, Tokenizer
from torch import Tensor

from espalier.contract import Kind
from espalier.tagging import word_starts
from training.data import Example, spread

IGNORED = -100
"""Label of a token that the loss leaves out."""


def encode(tokenizer_json: str, max_length: int, examples: Sequence[Example]) -> list[Encoding]:
    """Tokenize as the served tokenizer does: special tokens, longest-first truncation to `max_length`."""
    tokenizer = Tokenizer.from_str(tokenizer_json)
    tokenizer.no_padding()
    tokenizer.enable_truncation(max_length, strategy="longest_first")
    encodings: list[Encoding] = tokenizer.encode_batch(
        [example.texts if len(example.texts) == 2 else example.texts[0] for example in examples]
    )
    return encodings


def featurize(
    kind: Kind, labels: Sequence[str], tokenizer_json: str, max_length: int, examples: Sequence[Example]
) -> list[dict[str, Any]]:
    """Return one feature dict per example: input_ids, token_type_ids, labels and, for tagging, words and word_tokens.

    `words[t]` tells whether token t begins a word as the tokenizer cuts them; `word_tokens[i]` is the index of the
    first token of word i of the data, or -1 where truncation or the tokenizer left none.
    """
    index = {label: position for position, label in enumerate(labels)}
    features = []
    for example, encoding in zip(examples, encode(tokenizer_json, max_length, examples), strict=True):
        feature: dict[str, Any] = {"input_ids": encoding.ids, "token_type_ids": encoding.type_ids}
        match kind:
            case Kind.CLASSIFICATION:
                feature["labels"] = index[str(example.label)]
            case Kind.REGRESSION:
                feature["labels"] = example.label
            case Kind.TAGGING:
                feature["words"] = word_starts(example.texts[0], encoding.offsets)
                feature["labels"], feature["word_tokens"] = _align(example, encoding, feature["words"], index)
        features.append(feature)
    return features


def _align(
    example: Example, encoding: Encoding, starts: Sequence[bool], index: dict[str, int]
) -> tuple[list[int], list[int]]:
    """Give each word's tag to the tokens of that word.

    A word of the data ("what's") may be several words to the tokenizer ("what", "'", "s"): its tag is spread over
    them. Further pieces of one of the tokenizer's words are left out of the loss, and are not read when served.
    """
    assert isinstance(example.label, tuple)
    labels = [IGNORED] * len(encoding.ids)
    firsts = []
    position = 0
    for (begin, end), tag in zip(example.words, example.label, strict=True):
        while position < len(labels) and (not starts[position] or encoding.offsets[position][0] < begin):
            position += 1
        own = []
        while position < len(labels) and encoding.offsets[position][0] < end:
            if starts[position]:
                own.append(position)
            position += 1
        firsts.append(own[0] if own else -1)
        for token, part in zip(own, spread(tag, len(own)), strict=True):
            labels[token] = index.get(part, IGNORED)
    return labels, firsts


def collate(features: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    """Pad a batch to its own longest: input_ids, token_type_ids and mask [B,S]; labels [B], or labels and words [B,S].

    With activations attached (see training.activations) also hidden [B,S,H].
    """
    longest = max(len(feature["input_ids"]) for feature in features)

    def pad(key: str, value: int) -> Tensor:
        return torch.tensor([feature[key] + [value] * (longest - len(feature[key])) for feature in features])

    batch = {"input_ids": pad("input_ids", 0), "token_type_ids": pad("token_type_ids", 0)}
    lengths = torch.tensor([len(feature["input_ids"]) for feature in features])
    batch["mask"] = torch.arange(longest)[None, :] < lengths[:, None]
    first = features[0]["labels"]
    if isinstance(first, list):
        batch["labels"] = pad("labels", IGNORED)
        if "words" in features[0]:
            batch["words"] = pad("words", False)
    else:
        batch["labels"] = torch.tensor([feature["labels"] for feature in features])
    if "hidden" in features[0]:
        states = [activations[row] for activations, row in (feature["hidden"] for feature in features)]
        batch["hidden"] = torch.nn.utils.rnn.pad_sequence(states, batch_first=True)
    for name in ("teacher_logits", "teacher_states"):
        if name not in features[0]:
            continue
        # [B,C], or [B,S,C] for tagging; padded tokens are masked by their label
        batch[name] = torch.nn.utils.rnn.pad_sequence([feature[name] for feature in features], batch_first=True)
    return batch

"""Triton Python model `tokenizer`: strings in, token ids and character offsets out.

It runs wherever Triton does, so it needs numpy and `tokenizers` alone. `TextEncoder` does the work and knows
nothing of Triton.

Per request of n items: TEXT STRING [n,1], or [n,2] for pairs → input_ids and token_type_ids INT64 [n,S], length
INT32 [n,1], offsets INT32 [n,S,2]; S is the request's own longest item.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Encoding, Tokenizer

Array = npt.NDArray[Any]

TOKENIZER_FILE = "tokenizer.json"
CHARACTERS_PER_TOKEN = 16  # more than any language needs: the first look at a long text nearly always suffices
GROWTH = 8


class TextError(ValueError):
    """One request's TEXT is wrong; the message is one sentence."""


class TextEncoder:
    """Encode requests of single texts and pairs, truncated longest-first to `max_length` tokens.

    Raises ValueError if the tokenizer file cannot be used or `max_length` leaves no room for text.
    """

    def __init__(self, path: Path, max_length: int) -> None:
        try:
            # Two copies, because a tokenizer that truncates would also do so before its parts are put together.
            self._parts = Tokenizer.from_file(str(path))
            self._whole = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises nothing more precise
            raise ValueError(f"{path} cannot be read as a tokenizer: {error}") from error
        if max_length <= self._parts.num_special_tokens_to_add(True):
            raise ValueError(f"max_length is {max_length}, which leaves no room for text beside the special tokens")
        # A tokenizer.json brings its trainer's own settings; those of the config count.
        padding = self._parts.padding
        self._pad = padding["pad_id"] if padding else self._parts.token_to_id("[PAD]") or 0
        self._parts.no_padding()
        self._parts.no_truncation()
        self._whole.no_padding()
        self._whole.enable_truncation(max_length, strategy="longest_first")
        self._max_length = max_length
        added = self._parts.get_added_tokens_decoder().values()
        self._longest_added = max((len(token.content) for token in added), default=0)

    def encode(self, requests: Sequence[Array]) -> list[dict[str, Array] | TextError]:
        """Return the output tensors of each request, or what is wrong with it; no request harms another.

        `requests` are object arrays of bytes, [n,1] or [n,2].
        """
        checked: list[list[list[str]] | TextError] = []
        for texts in requests:
            try:
                checked.append(_items(texts))
            except TextError as error:
                checked.append(error)
        good = [items for items in checked if not isinstance(items, TextError)]
        parts = iter(self._encode_parts([text for items in good for item in items for text in item]))
        return [items if isinstance(items, TextError) else self._tensors(items, parts) for items in checked]

    def _encode_parts(self, texts: list[str]) -> list[Encoding]:
        """Encode each text alone, without special tokens, up to at least as many tokens as can be used.

        A long text is read only as far as needed: 1 MB costs up to 2.5 s on one core, 512 tokens of it a few ms.
        The result after truncation is the same, because a BERT word's tokens depend on that word alone: all but the
        last word of a prefix, where the cut may be, come out as in the whole text, and so does all that lies further
        from the cut than the longest added token. Only if both texts of a pair exceed the maximum by themselves may
        an odd token fall to the other of the two than it would without the cut.
        """
        encodings: dict[int, Encoding] = {}
        open_ends = list(range(len(texts)))
        limit = self._max_length * CHARACTERS_PER_TOKEN
        while open_ends:
            batch = self._parts.encode_batch([texts[i][:limit] for i in open_ends], add_special_tokens=False)
            again = []
            for i, encoding in zip(open_ends, batch, strict=True):
                if len(texts[i]) > limit:
                    kept = self._untouched(encoding, limit)
                    if kept < self._max_length:
                        again.append(i)
                        continue
                    encoding.truncate(kept)
                encodings[i] = encoding
            open_ends, limit = again, limit * GROWTH
        return [encodings[i] for i in range(len(texts))]

    def _untouched(self, encoding: Encoding, cut: int) -> int:
        """Count the tokens that a cut after `cut` characters cannot have changed."""
        words, offsets = encoding.word_ids, encoding.offsets
        kept = len(words)
        while kept and (words[kept - 1] == words[-1] or offsets[kept - 1][1] > cut - self._longest_added):
            kept -= 1
        return kept

    def _tensors(self, items: list[list[str]], parts: Any) -> dict[str, Array]:
        encodings = [self._whole.post_process(*[next(parts) for _ in item]) for item in items]
        lengths = [len(encoding.ids) for encoding in encodings]
        n, longest = len(items), max(lengths)
        input_ids = np.full((n, longest), self._pad, np.int64)
        token_type_ids = np.zeros((n, longest), np.int64)
        offsets = np.zeros((n, longest, 2), np.int32)
        for row, (encoding, length) in enumerate(zip(encodings, lengths, strict=True)):
            input_ids[row, :length] = encoding.ids
            token_type_ids[row, :length] = encoding.type_ids
            offsets[row, :length] = encoding.offsets
        return {
            "input_ids": input_ids,
            "token_type_ids": token_type_ids,
            "length": np.array(lengths, np.int32)[:, None],
            "offsets": offsets,
        }


def _items(texts: Array) -> list[list[str]]:
    if texts.ndim != 2:
        raise TextError(f"TEXT must have shape [items, 1 or 2], not {list(texts.shape)}")
    n, width = texts.shape
    if n == 0:
        raise TextError("TEXT has no items; send at least one")
    if width not in (1, 2):
        raise TextError(f"TEXT must hold one string per item, or two for a pair, not {width or 'zero'}")
    return [[_text(texts[i, j], i, j) for j in range(width)] for i in range(n)]


def _text(raw: bytes, item: int, position: int) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise TextError(
            f"TEXT[{item}][{position}] is not valid UTF-8: byte 0x{raw[error.start]:02x} at position {error.start}"
        ) from error


class TritonPythonModel:
    """What Triton calls."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load tokenizer.json from the model's own version folder."""
        import triton_python_backend_utils as pb_utils  # exists inside Triton alone

        folder = Path(args["model_repository"]) / args["model_version"]
        parameters = json.loads(args["model_config"])["parameters"]
        try:
            max_length = int(parameters["max_length"]["string_value"])
        except (KeyError, ValueError) as error:
            raise pb_utils.TritonModelException("tokenizer: parameter 'max_length' must be a whole number") from error
        try:
            self._encoder = TextEncoder(folder / TOKENIZER_FILE, max_length)
        except ValueError as error:
            raise pb_utils.TritonModelException(f"tokenizer: {error}") from error

    def execute(self, requests: list[Any]) -> list[Any]:
        """Answer all requests of a batch in one go; a bad one gets an error of its own."""
        import triton_python_backend_utils as pb_utils

        texts = [pb_utils.get_input_tensor_by_name(request, "TEXT").as_numpy() for request in requests]
        return [_response(pb_utils, result) for result in self._encoder.encode(texts)]


def _response(pb_utils: Any, result: dict[str, Array] | TextError) -> Any:
    if isinstance(result, TextError):
        return pb_utils.InferenceResponse(
            output_tensors=[], error=pb_utils.TritonError(str(result), pb_utils.TritonError.INVALID_ARG)
        )
    return pb_utils.InferenceResponse([pb_utils.Tensor(name, tensor) for name, tensor in result.items()])

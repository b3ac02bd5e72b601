"""Triton Python model: the project's tokenizer, with its output padded to one of a few lengths.

What a server of plain ONNX models needs: Triton batches requests of equal shapes alone, so each length of its own would
be a batch of its own. It is copied to where Triton reads it.

Per request of n items: TEXT STRING [n,1] or [n,2] → input_ids, token_type_ids and attention_mask INT64 [n,S], S being
the least of the config's `buckets` that holds the longest item.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

from export.tokenizer_model import TOKENIZER_FILE, Array, TextEncoder, TextError


class TritonPythonModel:
    """What Triton calls."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load tokenizer.json from the model's own version folder."""
        folder = Path(args["model_repository"]) / args["model_version"]
        parameters = json.loads(args["model_config"])["parameters"]
        self._buckets: list[int] = json.loads(parameters["buckets"]["string_value"])
        self._encoder = TextEncoder(folder / TOKENIZER_FILE, self._buckets[-1])

    def execute(self, requests: list[Any]) -> list[Any]:
        """Answer all requests of a batch in one go."""
        import triton_python_backend_utils as pb_utils  # exists inside Triton alone

        texts = [pb_utils.get_input_tensor_by_name(request, "TEXT").as_numpy() for request in requests]
        answers = []
        for result in self._encoder.encode(texts):
            if isinstance(result, TextError):
                error = pb_utils.TritonError(str(result), pb_utils.TritonError.INVALID_ARG)
                answers.append(pb_utils.InferenceResponse(output_tensors=[], error=error))
                continue
            longest = result["input_ids"].shape[1]
            width = next(bucket for bucket in self._buckets if bucket >= longest)
            tensors = {name: _pad(result[name], width) for name in ("input_ids", "token_type_ids")}
            tensors["attention_mask"] = (np.arange(width) < result["length"]).astype(np.int64)
            answers.append(
                pb_utils.InferenceResponse([pb_utils.Tensor(name, array) for name, array in tensors.items()])
            )
        return answers


def _pad(array: Array, width: int) -> Array:
    return np.pad(array, ((0, 0), (0, width - array.shape[1])))

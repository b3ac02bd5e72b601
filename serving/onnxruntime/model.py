"""The side of the backend that talks to Triton: one session per model instance, one run per batch."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import triton_python_backend_utils as pb_utils
from onnxruntime.capi.onnxruntime_pybind11_state import InvalidProtobuf

from espalier.errors import ContractError, EspalierError, RequestError
from serving.onnxruntime.batching import Array, Request, gather, scatter
from serving.onnxruntime.options import providers, refuse_unsupported, run_options, session_options
from serving.onnxruntime.signature import check

NICENESS = 5
"""By how much the processes that compute stand back. Triton's own threads, which form batches and hand them on, come
first where cores are short; else a batch starts before what has just arrived is in it."""

_Answer = dict[str, Array] | Any  # outputs by name, or a pb_utils.TritonError: the stub adds it after the import


class TritonPythonModel:
    """An instance of an ONNX model, as Triton's Python backend drives it."""

    def initialize(self, args: Mapping[str, str]) -> None:
        """Load the model; what is wrong with it is raised as one sentence that Triton logs and hands on."""
        os.nice(NICENESS)
        try:
            self._load(args)
        except EspalierError as error:
            raise pb_utils.TritonModelException(str(error)) from None

    def _load(self, args: Mapping[str, str]) -> None:
        if int(np.__version__.split(".")[0]) >= 2:
            raise ContractError(
                f"numpy {np.__version__} is installed, with which Triton's Python stub returns empty outputs; "
                "install numpy<2"
            )
        config = json.loads(args["model_config"])
        refuse_unsupported(config)
        path = _model_file(Path(args["model_repository"]) / args["model_version"], config["default_model_filename"])
        devices = providers(config, args["model_instance_kind"], int(args["model_instance_device_id"]))
        options = session_options(config)
        try:
            self._session = ort.InferenceSession(str(path), options, providers=devices)
        except InvalidProtobuf:
            raise ContractError(f"{path} is truncated or damaged: it is not an ONNX file; export it again") from None
        except Exception as error:  # ONNX Runtime's exceptions have no common base
            raise ContractError(f"{path} cannot be loaded: {_reason(error)}") from None
        if devices[0][0] not in self._session.get_providers():  # ONNX Runtime falls back to the CPU by itself
            raise ContractError(
                f"{devices[0][0]} could not be started on device {args['model_instance_device_id']}; "
                "the log above says why, or export for the CPU (KIND_CPU)"
            )
        self._run_options = run_options(config)
        self._layout = check(config, self._session)
        self._outputs = [output["name"] for output in config["output"]]
        self._strings = {entry["name"] for entry in config["input"] if entry["data_type"] == "TYPE_STRING"}

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """Answer `requests`, together if they can be; an error fails the request that causes it and no other."""
        answers: list[_Answer | None] = [None] * len(requests)
        valid: list[tuple[int, Request, set[str]]] = []
        for index, request in enumerate(requests):
            try:
                valid.append((index, self._inputs(request), set(request.requested_output_names())))
            except RequestError as error:
                answers[index] = pb_utils.TritonError(str(error), pb_utils.TritonError.INVALID_ARG)
        batches = [valid] if self._layout.batching and valid else [[one] for one in valid]
        while batches:
            batch = batches.pop()
            wanted = {name for _, _, names in batch for name in names}
            try:
                parts = self._run([inputs for _, inputs, _ in batch], wanted)
            except Exception as error:  # ONNX Runtime's exceptions have no common base
                if len(batch) > 1:
                    # Whose input it was is not told: alone, each request fails or succeeds by itself.
                    batches.extend([one] for one in batch)
                else:
                    answers[batch[0][0]] = pb_utils.TritonError(_reason(error))
                continue
            for (index, _, names), part in zip(batch, parts, strict=True):
                answers[index] = {name: part[name] for name in self._outputs if name in names}
        return [_response(answer) for answer in answers]

    def _run(self, requests: Sequence[Request], wanted: set[str]) -> list[dict[str, Array]]:
        names = [name for name in self._outputs if name in wanted]
        outputs = self._session.run(names, gather(self._layout, requests), self._run_options)
        return scatter(self._layout, dict(zip(names, outputs, strict=True)), requests)

    def _inputs(self, request: Any) -> dict[str, Array]:
        arrays = {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}
        for name in self._strings & arrays.keys():
            arrays[name] = _decode(name, arrays[name])
        return arrays

    def finalize(self) -> None:
        """Free the session's memory and threads."""
        del self._session


def _model_file(folder: Path, name: str) -> Path:
    path = folder / (name or "model.onnx")
    if path.is_dir():
        path /= "model.onnx"
    if not path.is_file():
        raise ContractError(f"{path} is missing")
    return path


def _decode(name: str, array: Array) -> Array:
    """Return the strings of `array`, which Triton gives as bytes; ONNX Runtime's Python side takes text alone."""
    try:
        texts = [item.decode() for item in array.reshape(-1)]
    except UnicodeDecodeError as error:
        raise RequestError(f"input {name!r} holds a string that is not UTF-8: {error}") from None
    decoded: Array = np.array(texts, dtype=np.object_).reshape(array.shape)
    return decoded


def _reason(error: Exception) -> str:
    """Return what went wrong in one line, without the error numbers that ONNX Runtime puts before it."""
    line = " ".join(str(error).split())
    return f"onnxruntime: {line.split(' : ', 3)[-1]}" if line.startswith("[ONNXRuntimeError]") else line


def _response(answer: _Answer | None) -> Any:
    if not isinstance(answer, dict):
        return pb_utils.InferenceResponse(output_tensors=[], error=answer)
    return pb_utils.InferenceResponse([pb_utils.Tensor(name, array) for name, array in answer.items()])

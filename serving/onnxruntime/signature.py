"""Config against ONNX: every tensor that the config names must be in the graph, with its type and its rank.

The checks are those of the C++ backend (ValidateInputs, ValidateOutputs, CompareDimsSupported), so that what loads
here loads there.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from espalier.errors import ContractError
from serving.onnxruntime.batching import BatchInput, Kind, Layout, Scatter
from serving.onnxruntime.options import Config

_ONNX_TYPES = {
    "TYPE_BOOL": "tensor(bool)",
    "TYPE_UINT8": "tensor(uint8)",
    "TYPE_UINT16": "tensor(uint16)",
    "TYPE_UINT32": "tensor(uint32)",
    "TYPE_UINT64": "tensor(uint64)",
    "TYPE_INT8": "tensor(int8)",
    "TYPE_INT16": "tensor(int16)",
    "TYPE_INT32": "tensor(int32)",
    "TYPE_INT64": "tensor(int64)",
    "TYPE_FP16": "tensor(float16)",
    "TYPE_FP32": "tensor(float)",
    "TYPE_FP64": "tensor(double)",
    "TYPE_STRING": "tensor(string)",
}
# Triton's core admits no other type for a batch input.
_BATCH_INPUT_TYPES: dict[str, npt.DTypeLike] = {"TYPE_INT32": np.int32, "TYPE_FP32": np.float32}

Tensors = Mapping[str, ort.NodeArg]


def check(config: Config, session: ort.InferenceSession) -> Layout:
    """Check `config` against the graph in `session`; return how its requests are batched. Raises ContractError."""
    batching = int(config.get("max_batch_size", 0)) > 0
    required = {tensor.name: tensor for tensor in session.get_inputs()}
    optional = {tensor.name: tensor for tensor in session.get_overridable_initializers()}
    outputs = {tensor.name: tensor for tensor in session.get_outputs()}
    batch_inputs = tuple(_batch_input(entry, required) for entry in config.get("batch_input", []))
    scatters = dict(_scatter(entry, config, batching) for entry in config.get("batch_output", []))
    for entry in config.get("input", []):
        _check_input(entry, {**required, **optional}, batching)
    given = {entry["name"] for entry in config.get("input", []) if not entry.get("optional")}
    given |= {target for batch_input in batch_inputs for target in batch_input.targets}
    missing = [name for name in required if name not in given]
    if missing:
        raise ContractError(f"the ONNX model needs input {missing[0]!r}, which the config does not give")
    for entry in config.get("output", []):
        tensor = _find(entry, "output", outputs)
        if entry["name"] not in scatters:
            _check_dims(entry, "output", tensor, batching, exact=True)
    return Layout(
        batching=batching,
        ragged=frozenset(entry["name"] for entry in config.get("input", []) if entry.get("allow_ragged_batch")),
        batch_inputs=batch_inputs,
        scatters=scatters,
        scalar_inputs=frozenset(name for name, tensor in {**required, **optional}.items() if not tensor.shape),
        scalar_outputs={
            entry["name"]: tuple(_dims(entry)) for entry in config["output"] if not outputs[entry["name"]].shape
        },
    )


def _check_input(entry: Mapping[str, Any], tensors: Tensors, batching: bool) -> None:
    tensor = _find(entry, "input", tensors)
    name, shape = entry["name"], _shape(tensor)
    if entry.get("optional") and batching:
        raise ContractError(f"input {name!r} is optional, which a model that batches (max_batch_size > 0) cannot have")
    if not entry.get("allow_ragged_batch"):
        _check_dims(entry, "input", tensor, batching, exact=False)
    elif shape != [-1]:
        raise ContractError(f"input {name!r} is ragged, so the ONNX model must take it with shape [-1], not {shape}")


def _find(entry: Mapping[str, Any], mode: str, tensors: Tensors) -> ort.NodeArg:
    name, data_type = entry["name"], entry["data_type"]
    if name not in tensors:
        raise ContractError(f"the ONNX model has no {mode} {name!r}; its {mode}s are {sorted(tensors)}")
    if data_type not in _ONNX_TYPES:
        raise ContractError(f"{mode} {name!r}: {data_type} is not supported by the embedded onnxruntime backend")
    if tensors[name].type != _ONNX_TYPES[data_type]:
        raise ContractError(f"{mode} {name!r} is {data_type} in the config, but {tensors[name].type} in the ONNX model")
    return tensors[name]


def _check_dims(entry: Mapping[str, Any], mode: str, tensor: ort.NodeArg, batching: bool, exact: bool) -> None:
    dims, shape = _dims(entry), _shape(tensor)
    name = entry["name"]
    if not shape and not batching:
        if any(size != 1 for size in dims):
            raise ContractError(f"{mode} {name!r} is a scalar in the ONNX model, so its dims must be 1, not {dims}")
        return
    full = [-1, *dims] if batching else dims
    fits = len(shape) == len(full) and all(
        have == want for have, want in zip(shape, full, strict=True) if exact or have != -1
    )
    if not fits or (batching and shape[0] != -1):
        because = " (a batch dimension, then the dims)" if batching else ""
        raise ContractError(
            f"{mode} {name!r} has shape {shape} in the ONNX model, but {full}{because} by the config; "
            "each size must be equal" + ("" if exact else ", or -1 in the ONNX model")
        )


def _batch_input(entry: Mapping[str, Any], tensors: Tensors) -> BatchInput:
    data_type, targets = entry["data_type"], tuple(entry["target_name"])
    for target in targets:
        _find({"name": target, "data_type": data_type}, "input", tensors)
    # protobuf's JSON leaves out the first value of an enumeration
    kind = Kind(entry.get("kind", Kind.BATCH_ELEMENT_COUNT))
    return BatchInput(kind, targets, entry["source_input"][0], _BATCH_INPUT_TYPES[data_type])


def _scatter(entry: Mapping[str, Any], config: Config, batching: bool) -> tuple[str, Scatter]:
    targets, source = entry["target_name"], entry["source_input"][0]
    if len(targets) != 1:
        raise ContractError(f"batch_output of input {source!r} names {len(targets)} targets; give each its own entry")
    name = targets[0]
    output = next((output for output in config.get("output", []) if output["name"] == name), None)
    origin = next((tensor for tensor in config.get("input", []) if tensor["name"] == source), None)
    if output is None or origin is None:
        missing = f"output {name!r}" if output is None else f"input {source!r}"
        raise ContractError(f"batch_output names {missing}, which the config does not have")
    shape = ([-1] if batching else []) + _dims(output)
    rank = len(_dims(origin)) + batching
    if any(size == -1 and i >= rank for i, size in enumerate(shape)):
        raise ContractError(f"batch_output {name!r} takes sizes from dimensions that its source {source!r} lacks")
    return name, Scatter(source, tuple(shape))


def _dims(entry: Mapping[str, Any]) -> list[int]:
    sizes: Sequence[Any] = entry["reshape"].get("shape", []) if "reshape" in entry else entry["dims"]
    return [int(size) for size in sizes]


def _shape(tensor: ort.NodeArg) -> list[int]:
    """Return the sizes of `tensor`, with -1 where the graph has a name or nothing."""
    return [size if isinstance(size, int) else -1 for size in tensor.shape]

"""Several heads of one tap as one ONNX model: one step of the server instead of one each."""

from collections.abc import Sequence
from pathlib import Path

import onnx
from onnx import compose

from espalier.configs import merged_config, merged_labels, write_config
from espalier.contract import LABELS_FILE, MODEL_FILE, HeadInfo, Kind
from espalier.errors import ContractError

LARGEST = 1_000_000_000
"""Bytes of all heads in a model: an ONNX file ends at 2 GiB, and making it takes four times its size in memory."""


def merge(name: str, heads: Sequence[tuple[HeadInfo, Path]], to: Path) -> None:
    """Write a model of `heads`, given by what each says of itself and its folder, into the empty folder `to`.

    In its config it is called `name`. Every tensor's name begins with its task, but for the inputs, which all heads
    share. Raises ContractError if the heads cannot be one model.
    """
    if sum(size(folder) for _, folder in heads) > LARGEST:
        raise ContractError(f"{name}: {len(heads)} heads are more than one ONNX file can hold; merge fewer")
    parts = []
    for head, folder in heads:
        part = onnx.load(_model_file(folder))
        if part.functions or part.graph.sparse_initializer:
            raise ContractError(f"{folder} holds ONNX functions or sparse weights, which cannot be merged")
        prefix = f"{head.task}."
        # Weights are told beforehand: the body of a loop, which is renamed before them, uses some.
        weights = {weight.name: prefix + weight.name for weight in part.graph.initializer}
        compose.add_prefix_graph(part.graph, prefix, rename_inputs=False, inplace=True, name_map=weights)
        parts.append(part)
    whole = parts[0]
    inputs = {tensor.name: tensor for part in parts for tensor in part.graph.input}
    for (_, folder), part in zip(heads[1:], parts[1:], strict=True):
        if _opsets(part) != _opsets(whole):
            raise ContractError(f"{folder} has other operators than {heads[0][1]}; export both again")
        for field in ("node", "initializer", "output"):
            getattr(whole.graph, field).extend(getattr(part.graph, field))
    whole.graph.name = name
    del whole.graph.input[:]
    whole.graph.input.extend(inputs.values())
    onnx.checker.check_model(whole)
    (to / "1").mkdir()
    (to / "1" / MODEL_FILE).write_bytes(whole.SerializeToString(deterministic=True))
    for head, folder in heads:
        if head.kind is Kind.CLASSIFICATION:
            (to / merged_labels(head)).write_bytes((folder / LABELS_FILE).read_bytes())
    write_config(to, merged_config(name, [head for head, _ in heads]))


def size(folder: Path) -> int:
    """Return the bytes of a head: of its newest version, with weights in files of their own."""
    return sum(file.stat().st_size for file in _model_file(folder).parent.rglob("*") if file.is_file())


def _model_file(folder: Path) -> Path:
    return max(folder.glob(f"[0-9]*/{MODEL_FILE}"), key=lambda file: int(file.parent.name))


def _opsets(model: onnx.ModelProto) -> dict[str, int]:
    return {opset.domain: opset.version for opset in model.opset_import}

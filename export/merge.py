"""Several heads of one tap, and the segment below them, as one ONNX model: one step of the server, not one each."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import onnx
from onnx import compose

from espalier.configs import merged_config, merged_labels, read_config, write_config
from espalier.contract import LABELS_FILE, MODEL_FILE, HeadInfo, Kind
from espalier.errors import ContractError

LARGEST = 1_000_000_000
"""Bytes of all that is in a model: an ONNX file ends at 2 GiB, and making it takes four times its size in memory."""

_TRUNK = "_trunk."
"""Prefix of the segment's own tensors: no task begins with an underscore."""
_HIDDEN = f"{_TRUNK}flat"
"""The segment's output [P,H] as heads take it, [P·H]."""


def merge(name: str, heads: Sequence[tuple[HeadInfo, Path]], to: Path, segment: Path | None = None) -> None:
    """Write a model of `heads`, given by what each says of itself and its folder, into the empty folder `to`.

    With the folder of the `segment` that ends at their tap the model holds that, too. In its config it is called
    `name`. Every tensor's name begins with its task, but for the inputs, which all share, and the segment's output.
    Raises ContractError if they cannot be one model.
    """
    folders = [*([segment] if segment else []), *(folder for _, folder in heads)]
    if sum(map(size, folders)) > LARGEST:
        raise ContractError(f"{name}: {len(folders)} models are more than one ONNX file can hold; merge fewer")
    parts = []
    if segment is not None:
        trunk = _part(segment, _TRUNK, {}, rename_outputs=False)
        trunk.graph.initializer.add(
            name=f"{_HIDDEN}.shape", data_type=onnx.TensorProto.INT64, dims=[1], int64_data=[-1]
        )
        trunk.graph.node.append(onnx.helper.make_node("Reshape", ["hidden", f"{_HIDDEN}.shape"], [_HIDDEN], _HIDDEN))
        parts.append(trunk)
    below = {"hidden": _HIDDEN} if segment else {}
    parts += [_part(folder, f"{head.task}.", below) for head, folder in heads]
    whole = parts[0]
    inputs = {tensor.name: tensor for part in reversed(parts) for tensor in part.graph.input if tensor.name != _HIDDEN}
    for folder, part in zip(folders[1:], parts[1:], strict=True):
        if _opsets(part) != _opsets(whole):
            raise ContractError(f"{folder} has other operators than {folders[0]}; export both again")
        for field in ("node", "initializer", "output"):
            getattr(whole.graph, field).extend(getattr(part.graph, field))
    whole.graph.name = name
    del whole.graph.input[:]
    whole.graph.input.extend(inputs[tensor] for tensor in sorted(inputs))
    onnx.checker.check_model(whole)
    (to / "1").mkdir()
    (to / "1" / MODEL_FILE).write_bytes(whole.SerializeToString(deterministic=True))
    for head, folder in heads:
        if head.kind is Kind.CLASSIFICATION:
            (to / merged_labels(head)).write_bytes((folder / LABELS_FILE).read_bytes())
    write_config(to, merged_config(name, [head for head, _ in heads], read_config(segment) if segment else None))


def _part(folder: Path, prefix: str, names: Mapping[str, str], rename_outputs: bool = True) -> onnx.ModelProto:
    """Return the model in `folder` under other names: as `names` tells, or with a prefix; inputs keep theirs."""
    part = onnx.load(_model_file(folder))
    if part.functions or part.graph.sparse_initializer:
        raise ContractError(f"{folder} holds ONNX functions or sparse weights, which cannot be merged")
    # Weights are told beforehand: the body of a loop, which is renamed before them, uses some.
    weights = {weight.name: prefix + weight.name for weight in part.graph.initializer}
    compose.add_prefix_graph(
        part.graph, prefix, rename_inputs=False, rename_outputs=rename_outputs, inplace=True,
        name_map={**weights, **names},
    )  # fmt: skip
    return part


def size(folder: Path) -> int:
    """Return the bytes of a model: of its newest version, with weights in files of their own.

    Raises ContractError if there is none.
    """
    return sum(file.stat().st_size for file in _model_file(folder).parent.rglob("*") if file.is_file())


def _model_file(folder: Path) -> Path:
    files = list(folder.glob(f"[0-9]*/{MODEL_FILE}"))
    if not files:
        raise ContractError(f"{folder} holds no {MODEL_FILE} in a version folder; export it again")
    return max(files, key=lambda file: int(file.parent.name))


def _opsets(model: onnx.ModelProto) -> dict[str, int]:
    return {opset.domain: opset.version for opset in model.opset_import}

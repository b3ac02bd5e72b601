"""Is a model folder fit to be served? Found out from its files, before any server sees them.

A head folder is data: ONNX and text. Whoever may write one must not be able to run code on the server, so whatever
Triton could execute or load on its behalf is refused: other backends, code, libraries, paths in the config.
"""

import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import onnx
from onnx import TensorProto
from tritonclient.grpc import model_config_pb2 as pb

from espalier.configs import head_config, read_config
from espalier.contract import (
    CONFIG_FILE,
    LABELS_FILE,
    MODEL_FILE,
    TOKENIZER_FILE,
    HeadInfo,
    Kind,
    TrunkInfo,
)
from espalier.errors import ContractError
from espalier.files import digest
from espalier.repository import adopted
from espalier.scheduling import THREADS
from serving.inbox import is_version

BACKEND = "onnxruntime"

_DATA = re.compile(r"\d+/.+\.(onnx|data|bin)|config\.pbtxt|labels\.txt")
"""Files of a head that are served."""
_NOTES = re.compile(r".+\.(md|txt|json|png|yaml)")
"""Files that may lie beside them, and are left where they are."""
_INSTANCES, _DELAY, _THREADS = 4, 1_000_000, 64
"""Most instances, microseconds in the queue and threads that a head may ask for."""
_TYPES = {
    TensorProto.FLOAT: pb.TYPE_FP32, TensorProto.FLOAT16: pb.TYPE_FP16, TensorProto.INT64: pb.TYPE_INT64,
    TensorProto.INT32: pb.TYPE_INT32,
}  # fmt: skip


def belongs(name: str) -> bool:
    """Tell whether the file `name` of a head folder is served."""
    return _DATA.fullmatch(name) is not None


def check_files(folder: str, names: Sequence[str], version: int) -> None:
    """Raise ContractError if a head folder holds a file that is neither data nor a note."""
    for name in names:
        part = PurePosixPath(name).parts[0]
        if PurePosixPath(name).name.startswith(".") or (is_version(part) and int(part) != version):
            continue  # a copy that is under way, or an older version
        if not _DATA.fullmatch(name) and not _NOTES.fullmatch(name):
            raise ContractError(
                f"{folder} holds {name}; a head folder is data ({CONFIG_FILE}, {LABELS_FILE}, <version>/{MODEL_FILE}): "
                f"remove that file, or have the wiring allow the folder by name (--allow {folder})"
            )


def check_config(config: pb.ModelConfig) -> None:
    """Raise ContractError unless a head's config is the one that export writes, but for a few limits.

    A head may set its instances, its queue and its threads; anything else could make the server load or run something
    on its behalf, or disturb the others.
    """
    where = f"{config.name}/{CONFIG_FILE}"
    info = HeadInfo.read(config)
    have = pb.ModelConfig()
    have.CopyFrom(config)
    for group in have.instance_group:
        if not 0 <= group.count <= _INSTANCES:
            raise ContractError(f"{where} asks for {group.count} instances; a head may have up to {_INSTANCES}")
        group.count = 1
    if have.dynamic_batching.max_queue_delay_microseconds > _DELAY:
        raise ContractError(f"{where} lets requests wait longer than {_DELAY // 1_000_000} s; lower the queue delay")
    have.dynamic_batching.ClearField("max_queue_delay_microseconds")
    have.dynamic_batching.ClearField("preferred_batch_size")
    threads = _value(have, THREADS)
    if threads is not None and not (threads.isascii() and threads.isdigit() and 1 <= int(threads) <= _THREADS):
        raise ContractError(f"{where} asks for {threads!r} threads; a head may have 1 to {_THREADS}")
    have.parameters.pop(THREADS, None)
    want = head_config(info)
    want.parameters.pop(THREADS, None)
    if have == want:
        return
    raise ContractError(
        f"{where} sets {', '.join(_differences(have, want))} otherwise than the contract; export the head again, or "
        f"have the wiring allow the folder by name (--allow {config.name})"
    )


def _differences(have: pb.ModelConfig, want: pb.ModelConfig) -> list[str]:
    """Return the names of the fields, and of the parameters, in which two configs differ."""
    fields = {field.name for config in (have, want) for field, _ in config.ListFields()}
    names = [name for name in sorted(fields - {"parameters"}) if getattr(have, name) != getattr(want, name)]
    keys = {*have.parameters, *want.parameters}
    return names + [f"parameter {k}" for k in sorted(keys) if _value(have, k) != _value(want, k)]


def _value(config: pb.ModelConfig, key: str) -> str | None:
    return config.parameters[key].string_value if key in config.parameters else None


def check_head_folder(folder: Path, name: str, version: int, allowed: bool) -> None:
    """Check the content of the head folder `name`, which lies in `folder`, by itself: not yet against a trunk.

    Raises ContractError. Of an `allowed` folder it does not matter what the server executes for it.
    """
    config = adopted(read_config(folder), name)
    info = HeadInfo.read(config)
    if info.kind is Kind.CLASSIFICATION:
        check_labels(folder, info)
    model = folder / str(version) / MODEL_FILE
    if config.backend == BACKEND:
        check_onnx(model, config)
    if allowed:
        return
    check_config(config)
    if digest(model.read_bytes()) != info.model_digest:
        raise ContractError(
            f"{name}/{version}/{MODEL_FILE} is not the file that {CONFIG_FILE} was written for; copy the whole folder"
        )


def check_segment_folder(folder: Path, name: str, version: int) -> None:
    """Check the content of the trunk segment `name`."""
    config = read_config(folder)
    info = TrunkInfo.read(config)
    if info.model != name:
        raise ContractError(f"{name}: the folder says it holds {info.model}; name it so")
    check_onnx(folder / str(version) / MODEL_FILE, config)


def check_tokenizer_folder(folder: Path, version: int) -> None:
    """Check that the tokenizer's files are there."""
    for file in (TOKENIZER_FILE, "model.py"):
        if not (folder / str(version) / file).is_file():
            raise ContractError(f"the tokenizer has no {version}/{file}; export the repository again")


def check_onnx(model: Path, config: pb.ModelConfig) -> None:
    """Raise ContractError if an ONNX file is not whole, or has other inputs and outputs than its config."""
    where = f"{config.name}/{model.parent.name}/{model.name}"
    if not model.is_file():
        raise ContractError(f"{where} is missing; copy or export it again")
    try:
        onnx.checker.check_model(model)
        graph = onnx.load(model, load_external_data=False).graph
    except Exception as error:  # protobuf and the checker raise several types
        reason = (str(error).strip().splitlines() or ["unreadable"])[0]
        raise ContractError(f"{where} is not a whole ONNX file ({reason}); copy or export it again") from error
    inputs = {tensor.name: tensor.data_type for tensor in config.input}
    inputs |= {name: extra.data_type for extra in config.batch_input for name in extra.target_name}
    have = {value.name: _TYPES.get(value.type.tensor_type.elem_type) for value in graph.input}
    if have != inputs:
        raise ContractError(f"{where} reads {_names(have)}, but its config says {_names(inputs)}; export it again")
    outputs = {value.name: value.type.tensor_type for value in graph.output}
    for tensor in config.output:
        if tensor.name not in outputs:
            raise ContractError(f"{where} gives no output {tensor.name!r}; export it again")
        shape = outputs[tensor.name].shape.dim
        width = shape[-1].dim_value if shape else 0
        if not tensor.dims:
            raise ContractError(f"{where}: its config gives {tensor.name!r} no dims; export it again")
        if _TYPES.get(outputs[tensor.name].elem_type) != tensor.data_type or (width and width != tensor.dims[-1]):
            raise ContractError(
                f"{where} gives {tensor.name!r} with {width or 'any number of'} values, but its config says "
                f"{tensor.dims[-1]} of {pb.DataType.Name(tensor.data_type)}; export it again"
            )


def _names(types: "dict[str, int | None]") -> str:
    return ", ".join(f"{name} {_type(of)}" for name, of in sorted(types.items()))


def _type(of: int | None) -> str:
    known = of is not None and of in pb.DataType.values()
    return str(pb.DataType.Name(of)).removeprefix("TYPE_") if known else "of another type"


def check_labels(folder: Path, head: HeadInfo) -> None:
    """Raise ContractError if the labels file of a head is not the list in its config."""
    file = folder / LABELS_FILE
    where = f"{head.model}/{LABELS_FILE}"
    try:
        labels = file.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError as error:
        raise ContractError(f"{where} is missing; copy or export the head again") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ContractError(f"{where} cannot be read: {error}; export the head again") from error
    if tuple(labels) != head.labels:
        raise ContractError(
            f"{where} lists {len(labels)} labels that are not the {len(head.labels)} of {CONFIG_FILE}; "
            "export the head again"
        )

"""The model-repository contract: names, protobuf configs and what a model folder says of itself.

Everything that Triton, the wiring and the clients know of a task is in the `config.pbtxt` of its head, as
`parameters`. Configs are protobuf messages from end to end (Triton's model_config.proto), never string templates.

Shapes, per request: n items, S tokens (padded to the request's own longest item), H hidden size, C labels.
Between the steps requests are ragged: the backend concatenates their flattened tensors, nothing is padded.
"""

import json
import re
from collections.abc import Iterable, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Any

from google.protobuf import text_format
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from tritonclient.grpc import model_config_pb2 as pb

from espalier.errors import ContractError, FingerprintError
from espalier.files import write_whole

TOKENIZER = "tokenizer"
ENSEMBLE = "multitask"
OFFSETS = "offsets"
TEXT = "TEXT"
BELOW = "hidden_below"
"""What a segment above the first reads. Not `hidden`, its output: ONNX takes no name twice."""
LABELS_FILE = "labels.txt"
TOKENIZER_FILE = "tokenizer.json"
MODEL_FILE = "model.onnx"
CONFIG_FILE = "config.pbtxt"
MAX_BATCH_SIZE = 64
THREADS = "intra_op_thread_count"
"""Parameter of the onnxruntime backend: threads of a model's own pool."""

TASK_NAME = re.compile(r"[a-z][a-z0-9]*(_[a-z0-9]+)*")
"""Task names: lower case, digits, single underscores. `offsets` is taken by the ensemble itself."""

SEGMENT_NAME = re.compile(r"trunk_(\d+)_(\d+)")


class Kind(StrEnum):
    """What a task answers with."""

    CLASSIFICATION = "classification"  # one of C labels for the text
    REGRESSION = "regression"  # a number for the text
    TAGGING = "tagging"  # one of C labels for every token

    @property
    def output(self) -> str:
        """Name of the head's one output tensor."""
        return "value" if self is Kind.REGRESSION else "probabilities"


class Target(StrEnum):
    """The device an export is made for."""

    CPU = "cpu"
    GPU = "gpu"

    @property
    def hidden_type(self) -> int:
        """Triton data type of the hidden states between the steps."""
        return int(pb.TYPE_FP32 if self is Target.CPU else pb.TYPE_FP16)

    @property
    def instance_kind(self) -> int:
        """Triton instance group kind."""
        group = pb.ModelInstanceGroup
        return int(group.KIND_CPU if self is Target.CPU else group.KIND_GPU)


class _Info(BaseModel):
    """What a model folder says of itself, kept as string parameters of its config."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    def write_to(self, config: pb.ModelConfig) -> None:
        for key, value in self.model_dump(mode="json").items():
            config.parameters[key].string_value = value if isinstance(value, str) else json.dumps(value)

    @classmethod
    def _read_from(cls, config: pb.ModelConfig) -> Any:
        values: dict[str, Any] = {}
        for key, field in cls.model_fields.items():
            if key in config.parameters:
                raw = config.parameters[key].string_value
                values[key] = raw if field.annotation in (str, Kind, Target) else _json(config.name, key, raw)
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            raise ContractError(
                f"{config.name}/{CONFIG_FILE}: parameter {where!r}: {first['msg']}; export the folder again"
            ) from error


def _json(model: str, key: str, raw: str) -> Any:
    try:
        return json.loads(raw)
    except ValueError as error:
        raise ContractError(f"{model}/{CONFIG_FILE}: parameter {key!r} is not JSON: {raw!r}") from error


class TrunkInfo(_Info):
    """What a trunk segment says of itself: layers `start` up to `stop` of a base."""

    start: int = Field(ge=0)
    stop: int = Field(ge=1)
    hidden_size: int = Field(gt=0)
    target: Target  # device and precision of the deployed trunk
    base: str
    revision: str
    fingerprint: str  # of everything frozen up to `stop`, tokenizer included

    @property
    def model(self) -> str:
        """Name of the model folder."""
        return f"trunk_{self.start}_{self.stop}"

    @classmethod
    def read(cls, config: pb.ModelConfig) -> "TrunkInfo":
        """Read from a segment's config; raise ContractError where a parameter is missing or wrong."""
        info: TrunkInfo = cls._read_from(config)
        return info


class HeadInfo(_Info):
    """What a head says of itself: the task, where it taps the trunk, what it was made from."""

    task: str
    kind: Kind
    tap: int = Field(ge=1)
    layers: int = Field(ge=0)
    hidden_size: int = Field(gt=0)
    labels: tuple[str, ...]  # empty for regression
    pair: bool  # trained on sentence pairs
    fingerprint: str  # of the frozen part up to the tap, tokenizer included
    branch_digest: str
    metric: str
    score: float  # dev metric of the branch

    @property
    def model(self) -> str:
        """Name of the model folder."""
        return head_name(self.task)

    @classmethod
    def read(cls, config: pb.ModelConfig) -> "HeadInfo":
        """Read from a head's config; raise ContractError where a parameter is missing or wrong."""
        info: HeadInfo = cls._read_from(config)
        return info


def head_name(task: str) -> str:
    """Return the model folder's name for `task`."""
    return f"head_{task}"


def segments_for(taps: Iterable[int]) -> list[tuple[int, int]]:
    """Return the chain of trunk segments [start, stop) that has a segment end at every tap."""
    stops = sorted(set(taps))
    return list(zip([0, *stops], stops, strict=False))


# --- building configs -------------------------------------------------------------------------------------------


def _tensor(message: Any, name: str, data_type: int, dims: Sequence[int], *, ragged: bool = False) -> Any:
    message.name, message.data_type = name, data_type
    message.dims.extend(dims)
    if ragged:
        message.allow_ragged_batch = True
    return message


def tokenizer_config(max_length: int) -> pb.ModelConfig:
    """Config of the tokenizer: TEXT [n, 1 or 2] → input_ids, token_type_ids [n,S], length [n,1], offsets [n,S,2]."""
    config = pb.ModelConfig(name=TOKENIZER, backend="python", max_batch_size=MAX_BATCH_SIZE)
    _tensor(config.input.add(), TEXT, pb.TYPE_STRING, [-1], ragged=True)
    _tensor(config.output.add(), "input_ids", pb.TYPE_INT64, [-1])
    _tensor(config.output.add(), "token_type_ids", pb.TYPE_INT64, [-1])
    _tensor(config.output.add(), "length", pb.TYPE_INT32, [1])
    _tensor(config.output.add(), OFFSETS, pb.TYPE_INT32, [-1, 2])
    config.parameters["max_length"].string_value = str(max_length)
    config.instance_group.add(kind=pb.ModelInstanceGroup.KIND_CPU, count=1)
    config.dynamic_batching.SetInParent()
    return config


def _onnx_config(name: str, source: str, target: Target, threads: int | None) -> pb.ModelConfig:
    """Start the config of a ragged ONNX model whose items' shapes are those of the input `source`."""
    config = pb.ModelConfig(name=name, backend="onnxruntime", max_batch_size=MAX_BATCH_SIZE)
    _tensor(config.input.add(), "length", pb.TYPE_INT32, [1])
    # One row per item, also for requests that hold several: the widths by which the flat inputs are cut.
    config.batch_input.add(
        kind=pb.BatchInput.BATCH_ITEM_SHAPE, target_name=["shape"], data_type=pb.TYPE_INT32, source_input=[source]
    )
    config.instance_group.add(kind=target.instance_kind, count=1)
    config.dynamic_batching.SetInParent()
    config.default_model_filename = MODEL_FILE
    if target is Target.CPU and threads is not None:
        config.parameters[THREADS].string_value = str(threads)
    return config


def _scatter(config: pb.ModelConfig, output: str, source: str) -> None:
    """Cut the ragged `output` back into requests by the shapes of their input `source`."""
    config.batch_output.add(
        kind=pb.BatchOutput.BATCH_SCATTER_WITH_INPUT_SHAPE, target_name=[output], source_input=[source]
    )


def trunk_config(info: TrunkInfo, threads: int | None) -> pb.ModelConfig:
    """Config of a trunk segment; `threads` is its ONNX Runtime intra-op pool (None: ONNX Runtime's default)."""
    first = info.start == 0
    source = "input_ids" if first else BELOW
    target = info.target
    config = _onnx_config(info.model, source, target, threads)
    if first:
        _tensor(config.input.add(), "input_ids", pb.TYPE_INT64, [-1], ragged=True)
        _tensor(config.input.add(), "token_type_ids", pb.TYPE_INT64, [-1], ragged=True)
    else:
        _tensor(config.input.add(), BELOW, target.hidden_type, [-1, info.hidden_size], ragged=True)
    _tensor(config.output.add(), "hidden", target.hidden_type, [-1, info.hidden_size])
    _scatter(config, "hidden", source)
    info.write_to(config)
    return config


def head_config(info: HeadInfo, target: Target) -> pb.ModelConfig:
    """Config of a head. One thread: a head is a few per cent of a trunk layer, and idle pools spin."""
    config = _onnx_config(info.model, "hidden", target, threads=1)
    _tensor(config.input.add(), "hidden", target.hidden_type, [-1, info.hidden_size], ragged=True)
    _tensor(config.output.add(), info.kind.output, pb.TYPE_FP32, head_output_dims(info))
    if info.kind is Kind.CLASSIFICATION:
        config.output[0].label_filename = LABELS_FILE
    if info.kind is Kind.TAGGING:
        _scatter(config, info.kind.output, "hidden")
    info.write_to(config)
    return config


def head_output_dims(info: HeadInfo) -> list[int]:
    """Return the dims of the head's output without the batch."""
    match info.kind:
        case Kind.CLASSIFICATION:
            return [len(info.labels)]
        case Kind.REGRESSION:
            return [1]
        case Kind.TAGGING:
            return [-1, len(info.labels)]


def ensemble_config(trunk: Sequence[TrunkInfo], heads: Sequence[HeadInfo]) -> pb.ModelConfig:
    """Config of the ensemble: TEXT [n, 1 or 2] → one output per task, and `offsets`.

    No tensor that another step reads is an output: Triton would report a deadlock when it is not requested. Internal
    tensors start with an underscore, which no task name can.
    """
    config = pb.ModelConfig(name=ENSEMBLE, platform="ensemble", max_batch_size=MAX_BATCH_SIZE)
    _tensor(config.input.add(), TEXT, pb.TYPE_STRING, [-1])
    _tensor(config.output.add(), OFFSETS, pb.TYPE_INT32, [-1, 2])

    def step(model: str, inputs: dict[str, str], outputs: dict[str, str]) -> None:
        config.ensemble_scheduling.step.add(model_name=model, model_version=-1, input_map=inputs, output_map=outputs)

    ids = {"input_ids": "_input_ids", "token_type_ids": "_token_type_ids", "length": "_length"}
    step(TOKENIZER, {TEXT: TEXT}, {**ids, OFFSETS: OFFSETS})
    for segment in trunk:
        inputs = ids if segment.start == 0 else {BELOW: f"_hidden_{segment.start}", "length": "_length"}
        step(segment.model, inputs, {"hidden": f"_hidden_{segment.stop}"})
    for head in sorted(heads, key=lambda head: head.task):
        _tensor(config.output.add(), head.task, pb.TYPE_FP32, head_output_dims(head))
        step(head.model, {"hidden": f"_hidden_{head.tap}", "length": "_length"}, {head.kind.output: head.task})
    return config


# --- files ------------------------------------------------------------------------------------------------------


def render(config: pb.ModelConfig) -> str:
    """Return `config` as protobuf text; equal configs give equal bytes."""
    # Maps have no order in protobuf; printing them sorted keeps untouched folders byte-identical.
    return text_format.MessageToString(config, use_index_order=True)


def write_config(folder: Path, config: pb.ModelConfig) -> None:
    """Write `folder`/config.pbtxt whole."""
    write_whole(folder / CONFIG_FILE, render(config))


def read_config(folder: Path) -> pb.ModelConfig:
    """Read `folder`/config.pbtxt; raise ContractError if it is missing or does not parse."""
    path = folder / CONFIG_FILE
    try:
        config: pb.ModelConfig = text_format.Parse(path.read_text(encoding="utf-8"), pb.ModelConfig())
    except FileNotFoundError as error:
        raise ContractError(f"{path} is missing; every model folder has one") from error
    except OSError as error:
        raise ContractError(f"{path} cannot be read: {error.strerror}") from error
    except (text_format.ParseError, UnicodeDecodeError) as error:
        raise ContractError(f"{path} is not a Triton model config: {error}") from error
    return config


class Repository:
    """The model folders of one repository, as their configs describe them.

    What is deployed is what the ensemble wires: an export or a copy that was stopped half-way may have left others.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def _wired(self) -> list[str]:
        if not (self.path / ENSEMBLE / CONFIG_FILE).exists():
            return []
        return [step.model_name for step in read_config(self.path / ENSEMBLE).ensemble_scheduling.step]

    def trunk(self) -> list[TrunkInfo]:
        """Return the deployed segments from the bottom up; raise ContractError if they are no chain."""
        names = [name for name in self._wired() if SEGMENT_NAME.fullmatch(name)]
        segments = [TrunkInfo.read(read_config(self.path / name)) for name in names]
        segments.sort(key=lambda segment: segment.start)
        reached = 0
        for segment in segments:
            if segment.start != reached:
                raise ContractError(
                    f"{self.path}: the trunk is no chain: a segment from layer {reached} is missing "
                    f"(next is {segment.model}); export the repository again"
                )
            reached = segment.stop
        return segments

    def heads(self) -> list[HeadInfo]:
        """Return the deployed heads by task name."""
        names = sorted(name for name in self._wired() if name.startswith(head_name("")))
        return [HeadInfo.read(read_config(self.path / name)) for name in names]

    def segment_folders(self) -> list[Path]:
        """Return the folders of all segments, deployed or not."""
        return sorted(path for path in self.path.glob("trunk_*") if path.is_dir() and SEGMENT_NAME.fullmatch(path.name))

    def head_folders(self) -> list[Path]:
        """Return the folders of all heads, deployed or not."""
        return sorted(path for path in self.path.glob(f"{head_name('*')}") if path.is_dir())


# --- checks -----------------------------------------------------------------------------------------------------


def check_head(config: pb.ModelConfig, trunk: Sequence[TrunkInfo]) -> HeadInfo:
    """Check a head's config against the deployed `trunk` and return what it says of itself.

    Raises FingerprintError if it was trained on another trunk, ContractError if anything else does not fit.
    """
    info = HeadInfo.read(config)
    name = config.name
    if name != info.model:
        raise ContractError(f"{name}: the folder says it holds task {info.task!r}, so it must be named {info.model}")
    if not TASK_NAME.fullmatch(info.task) or info.task == OFFSETS:
        raise ContractError(f"{name}: {info.task!r} is not a task name: lower case, digits and single underscores")
    segment = next((segment for segment in trunk if segment.stop == info.tap), None)
    if segment is None:
        taps = ", ".join(str(segment.stop) for segment in trunk) or "none"
        raise ContractError(
            f"{name} taps the trunk at layer {info.tap}, where no deployed segment ends (taps: {taps}); "
            "`espalier export` with its branch adds one"
        )
    if info.hidden_size != segment.hidden_size:
        raise ContractError(
            f"{name} reads hidden states of size {info.hidden_size}, but {segment.model} gives {segment.hidden_size}"
        )
    if info.fingerprint != segment.fingerprint:
        raise FingerprintError(
            f"{name} was trained on another trunk: its fingerprint at layer {info.tap} is {info.fingerprint[:12]}, "
            f"the deployed trunk's is {segment.fingerprint[:12]}; train it on {segment.base!r} or deploy its trunk"
        )
    if (info.kind is Kind.REGRESSION) == bool(info.labels):
        raise ContractError(f"{name}: a {info.kind} head has {len(info.labels)} labels")
    expected = head_config(info, segment.target)
    for mode in ("input", "output"):
        want = {t.name: (t.data_type, list(t.dims)) for t in getattr(expected, mode)}
        have = {t.name: (t.data_type, list(t.dims)) for t in getattr(config, mode)}
        if want != have:
            raise ContractError(f"{name}: its {mode}s are {_show(have)}, but this contract needs {_show(want)}")
    return info


def _show(tensors: dict[str, tuple[int, list[int]]]) -> str:
    return ", ".join(
        f"{name} {pb.DataType.Name(data_type).removeprefix('TYPE_')}{dims}"
        for name, (data_type, dims) in sorted(tensors.items())
    )

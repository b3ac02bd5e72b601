"""The model-repository contract: names, and what a model folder says of itself.

Everything that Triton, the wiring and the clients know of a task is in the `config.pbtxt` of its head, as
`parameters`. Configs are protobuf messages from end to end (Triton's model_config.proto), never string templates.

Shapes, per request: n items, S tokens (padded to the request's own longest item), H hidden size, C labels.
Between the steps requests are ragged: the backend concatenates their flattened tensors, nothing is padded.
"""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from tritonclient.grpc import model_config_pb2 as pb

from espalier.errors import ContractError, first_problem

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

TASK_NAME = re.compile(r"[a-z][a-z0-9]*(_[a-z0-9]+)*")
"""Task names: lower case, digits, single underscores. `offsets` is taken by the ensemble itself."""

SLOT_NAME = re.compile(rf"{TASK_NAME.pattern}(__[a-z0-9]+)?")
"""Names of the ensemble's outputs: a task, or one of its candidates, set off by two underscores."""

GENERATION = "generation"
"""Parameter of the ensemble: its version, one more with every change of what it answers."""

CANDIDATE = "__"
"""What separates a task's name from that of a candidate: `mrpc__candidate` is served beside `mrpc`."""

SEGMENT_NAME = re.compile(r"trunk_(\d+)_(\d+)")


class Kind(StrEnum):
    """What a task answers with."""

    CLASSIFICATION = "classification"  # one of C labels for the text
    REGRESSION = "regression"  # a number for the text
    TAGGING = "tagging"  # one of C labels for every token


class Structure(StrEnum):
    """How a tagging task chooses the labels of a text."""

    SOFTMAX = "softmax"  # word by word, each with a probability
    CRF = "crf"  # all together: the best path of a linear-chain CRF, with one probability for the path


class Target(StrEnum):
    """What an export is made for: the CPU in FP32, the CPU with 8-bit products, or the GPU in FP16."""

    CPU = "cpu"
    INT8 = "int8"
    GPU = "gpu"

    @property
    def hidden_type(self) -> int:
        """Triton data type of the hidden states between the steps."""
        return int(pb.TYPE_FP16 if self is Target.GPU else pb.TYPE_FP32)

    @property
    def instance_kind(self) -> int:
        """Triton instance group kind."""
        group = pb.ModelInstanceGroup
        return int(group.KIND_GPU if self is Target.GPU else group.KIND_CPU)


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
                values[key] = (
                    raw if field.annotation in (str, Kind, Structure, Target) else _json(config.name, key, raw)
                )
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            where, what = first_problem(error)
            raise ContractError(
                f"{config.name}/{CONFIG_FILE}: parameter {where!r}: {what}; export the folder again"
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
    structure: Structure = Structure.SOFTMAX  # of a tagging task
    tap: int = Field(ge=1)
    layers: int = Field(ge=0)
    folded: int = Field(ge=0)  # of the layers: computed for [CLS] alone
    hidden_size: int = Field(gt=0)
    target: Target  # what it was exported for, as its trunk must be
    labels: tuple[str, ...]  # empty for regression
    pair: bool  # trained on sentence pairs
    fingerprint: str  # of the frozen part up to the tap, tokenizer included
    branch_digest: str
    model_digest: str  # of the ONNX file
    metric: str
    score: float  # dev metric of the branch

    @property
    def model(self) -> str:
        """Name of the model folder."""
        return head_name(self.task)

    @property
    def candidate(self) -> bool:
        """Whether this is a candidate beside the task's own head: answered when it is named, else not asked."""
        return CANDIDATE in self.task

    @property
    def output(self) -> str:
        """Name of the head's one output tensor."""
        if self.kind is Kind.REGRESSION:
            return "value"
        return "path" if self.structure is Structure.CRF else "probabilities"

    @property
    def output_dims(self) -> list[int]:
        """Dims of that tensor without the batch.

        A `path` [-1,2] has two numbers per token: the label (its index) of the word that begins there, or -1 where
        none does; and the log-probability of the whole path, the same at every token of the text. Pads are 0.
        """
        match self.kind:
            case Kind.CLASSIFICATION:
                return [len(self.labels)]
            case Kind.REGRESSION:
                return [1]
            case Kind.TAGGING:
                return [-1, 2 if self.structure is Structure.CRF else len(self.labels)]

    @classmethod
    def read(cls, config: pb.ModelConfig) -> "HeadInfo":
        """Read from a head's config; raise ContractError where a parameter is missing or wrong."""
        info: HeadInfo = cls._read_from(config)
        return info


class MergedInfo(_Info):
    """What several heads of one tap say of themselves that were merged into one model.

    Each head has an output `<task>.<its output>`, and its labels in `labels_<task>.txt`. If the trunk segment below
    them is in the model, too, this also says what a segment does (TrunkInfo), and has its inputs and output.
    """

    heads: tuple[HeadInfo, ...] = Field(min_length=1)

    @classmethod
    def read(cls, config: pb.ModelConfig) -> "MergedInfo":
        """Read from a merged model's config; raise ContractError where a parameter is missing or wrong."""
        info: MergedInfo = cls._read_from(config)
        return info


@dataclass(frozen=True)
class Merged:
    """A merged model as a part of an ensemble."""

    model: str
    segment: TrunkInfo | None  # that it holds
    heads: tuple[HeadInfo, ...]  # that it holds
    tasks: frozenset[str]  # that it answers: the others have gone, or have another head since


class FolderStatus(BaseModel):
    """What became of a folder of the repository, or of a task without one."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    state: str  # serving, loading, refused
    why: str = ""  # of what is refused, or still loading
    served: bool = False  # whether the task is answered, by this content or by an earlier one
    digest: str = ""
    version: int | None = None


class StatusFile(BaseModel):
    """The states of all folders, by name."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    generation: int  # 0: nothing is served
    folders: dict[str, FolderStatus]


def head_name(task: str) -> str:
    """Return the model folder's name for `task`."""
    return f"head_{task}"


def merged_name(tap: int, segment: TrunkInfo | None) -> str:
    """Return the model folder's name for the merged heads of a tap, with the segment below them or without."""
    return f"{segment.model}_heads" if segment else f"heads_{tap}"


def merged_output(head: HeadInfo) -> str:
    """Return the output of a merged model that `head` answers with."""
    return f"{head.task}.{head.output}"


def task_of(folder: str) -> str | None:
    """Return the task whose head a folder holds, None for another folder."""
    return folder.removeprefix(head_name("")) if folder.startswith(head_name("")) else None


def segments_for(taps: Iterable[int]) -> list[tuple[int, int]]:
    """Return the chain of trunk segments [start, stop) that has a segment end at every tap."""
    stops = sorted(set(taps))
    return list(zip([0, *stops], stops, strict=False))

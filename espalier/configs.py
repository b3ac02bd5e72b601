"""The protobuf configs of a model repository (Triton's model_config.proto), built as messages, never from templates."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2 as pb

from espalier.contract import (
    BELOW,
    CONFIG_FILE,
    ENSEMBLE,
    GENERATION,
    LABELS_FILE,
    MAX_BATCH_SIZE,
    MODEL_FILE,
    OFFSETS,
    TEXT,
    TOKENIZER,
    HeadInfo,
    Kind,
    Merged,
    MergedInfo,
    Structure,
    Target,
    TrunkInfo,
    merged_output,
)
from espalier.errors import ContractError
from espalier.files import write_whole
from espalier.scheduling import PRIORITY_OF_HEADS, THREADS, Scheduling, segment_priority, take_cores


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


def _onnx_config(name: str, source: str, target: Target) -> pb.ModelConfig:
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
    return config


def _scatter(config: pb.ModelConfig, output: str, source: str) -> None:
    """Cut the ragged `output` back into requests by the shapes of their input `source`."""
    config.batch_output.add(
        kind=pb.BatchOutput.BATCH_SCATTER_WITH_INPUT_SHAPE, target_name=[output], source_input=[source]
    )


def trunk_config(info: TrunkInfo, scheduling: Scheduling) -> pb.ModelConfig:
    """Config of a trunk segment; `scheduling` counts on a CPU alone."""
    first = info.start == 0
    source = "input_ids" if first else BELOW
    target = info.target
    config = _onnx_config(info.model, source, target)
    if target is not Target.GPU:
        scheduling.write_to(config)
        config.instance_group[0].rate_limiter.priority = segment_priority(info.start)
    if first:
        _tensor(config.input.add(), "input_ids", pb.TYPE_INT64, [-1], ragged=True)
        _tensor(config.input.add(), "token_type_ids", pb.TYPE_INT64, [-1], ragged=True)
    else:
        _tensor(config.input.add(), BELOW, target.hidden_type, [-1, info.hidden_size], ragged=True)
    _tensor(config.output.add(), "hidden", target.hidden_type, [-1, info.hidden_size])
    _scatter(config, "hidden", source)
    info.write_to(config)
    return config


def head_config(info: HeadInfo) -> pb.ModelConfig:
    """Config of a head. One thread: a folded head is a few per cent of a trunk layer."""
    config = _heads_config(info.model, [info])
    _answer(config, info, info.output, LABELS_FILE)
    info.write_to(config)
    return config


def merged_config(name: str, heads: Sequence[HeadInfo], segment: pb.ModelConfig | None = None) -> pb.ModelConfig:
    """Config of several heads of one tap as the one model `name`, an output each, see MergedInfo.

    `segment` is the config of the trunk segment below them if that is in the model, too: it runs as the segment did.
    """
    if segment is None:
        config = _heads_config(name, heads)
    else:
        config = pb.ModelConfig()
        config.CopyFrom(segment)
        config.name = name
        if _needs_ids(heads) and all(tensor.name != "input_ids" for tensor in config.input):
            _tensor(config.input.add(), "input_ids", pb.TYPE_INT64, [-1], ragged=True)
    for head in heads:
        _answer(config, head, merged_output(head), merged_labels(head))
    MergedInfo(heads=tuple(heads)).write_to(config)
    return config


def merged_labels(head: HeadInfo) -> str:
    """Return the labels file of a head in the folder of a merged model."""
    return f"labels_{head.task}.txt"


def head_infos(config: pb.ModelConfig) -> dict[str, HeadInfo]:
    """Return what the heads in a model say of themselves, by output: one in a head's own model, or several merged."""
    if "heads" in config.parameters:
        return {merged_output(head): head for head in MergedInfo.read(config).heads}
    info = HeadInfo.read(config)
    return {info.output: info}


def _heads_config(name: str, heads: Sequence[HeadInfo]) -> pb.ModelConfig:
    """Start the config of a model that holds `heads`, which are of one tap."""
    first = heads[0]
    config = _onnx_config(name, "hidden", first.target)
    if first.target is not Target.GPU:
        config.parameters[THREADS].string_value = "1"
        take_cores(config, 1)
        config.instance_group[0].rate_limiter.priority = PRIORITY_OF_HEADS
    _tensor(config.input.add(), "hidden", first.target.hidden_type, [-1, first.hidden_size], ragged=True)
    if _needs_ids(heads):
        _tensor(config.input.add(), "input_ids", pb.TYPE_INT64, [-1], ragged=True)
    return config


def _needs_ids(heads: Sequence[HeadInfo]) -> bool:
    """Tell whether one of `heads` has a CRF: its chain runs over words, which it tells by the tokens."""
    return any(head.structure is Structure.CRF for head in heads)


def _answer(config: pb.ModelConfig, info: HeadInfo, output: str, labels: str) -> None:
    """Add the output tensor of a head."""
    tensor = _tensor(config.output.add(), output, pb.TYPE_FP32, info.output_dims)
    if info.kind is Kind.CLASSIFICATION:
        tensor.label_filename = labels
    if info.kind is Kind.TAGGING:
        _scatter(config, output, config.batch_input[0].source_input[0])


def ensemble_config(
    trunk: Sequence[TrunkInfo], heads: Sequence[HeadInfo], generation: int = 1, models: Mapping[str, str] = {},
    merged: Sequence[Merged] = (),
) -> pb.ModelConfig:  # fmt: skip
    """Config of the ensemble: TEXT [n, 1 or 2] → one output per task, and `offsets`.

    `generation` is its version, which every answer carries: a client sees by it that what it knows of the tasks is
    old. `models` gives the names by which the server knows models, where they are not those of the contract. `merged`
    are models that answer some of the tasks instead of their own heads.

    No tensor that another step reads is an output: Triton would report a deadlock when it is not requested. Internal
    tensors start with an underscore, which no task name can.
    """
    config = pb.ModelConfig(name=ENSEMBLE, platform="ensemble", max_batch_size=MAX_BATCH_SIZE)
    _tensor(config.input.add(), TEXT, pb.TYPE_STRING, [-1])
    _tensor(config.output.add(), OFFSETS, pb.TYPE_INT32, [-1, 2])

    config.version_policy.specific.versions.append(generation)
    config.parameters[GENERATION].string_value = str(generation)

    def step(model: str, inputs: dict[str, str], outputs: dict[str, str]) -> None:
        config.ensemble_scheduling.step.add(
            model_name=models.get(model, model), model_version=-1, input_map=inputs, output_map=outputs
        )

    ids = {"input_ids": "_input_ids", "token_type_ids": "_token_type_ids", "length": "_length"}
    step(TOKENIZER, {TEXT: TEXT}, {**ids, OFFSETS: OFFSETS})
    apart = {head.task: head for head in sorted(heads, key=lambda head: head.task)}
    for head in apart.values():
        _tensor(config.output.add(), head.task, pb.TYPE_FP32, head.output_dims)

    def heads_inputs(own: Sequence[HeadInfo]) -> dict[str, str]:
        return {"input_ids": ids["input_ids"]} if _needs_ids(own) else {}

    # By the layer at which a segment ends: the merged model that holds it; by each of all: what it answers.
    holders = {model.segment.stop: model for model in merged if model.segment}
    answers = {
        model.model: {merged_output(head): head.task for head in map(apart.pop, sorted(model.tasks))}
        for model in merged
    }  # fmt: skip
    on_taps = [model for model in merged if not model.segment]
    read = {segment.start for segment in trunk} | {head.tap for head in apart.values()}
    read |= {model.heads[0].tap for model in on_taps}
    for segment in trunk:
        inputs = ids if segment.start == 0 else {BELOW: f"_hidden_{segment.start}", "length": "_length"}
        outputs = {"hidden": f"_hidden_{segment.stop}"}
        holder = holders.get(segment.stop)
        if holder is None:
            step(segment.model, inputs, outputs)
        else:  # Triton refuses a tensor that nothing reads
            outputs = outputs if segment.stop in read else {}
            step(holder.model, inputs | heads_inputs(holder.heads), outputs | answers[holder.model])

    def heads_step(model: str, own: Sequence[HeadInfo], outputs: dict[str, str]) -> None:
        step(model, {"hidden": f"_hidden_{own[0].tap}", "length": "_length"} | heads_inputs(own), outputs)

    for model in on_taps:
        heads_step(model.model, model.heads, answers[model.model])
    for head in apart.values():
        heads_step(head.model, [head], {head.output: head.task})
    return config


def ensemble_generation(config: pb.ModelConfig) -> int:
    """Return the generation that an ensemble's config tells; raise ContractError if it tells none."""
    text = config.parameters[GENERATION].string_value if GENERATION in config.parameters else ""
    if not text.isdigit():
        raise ContractError(f"{config.name}/{CONFIG_FILE} tells no {GENERATION}; export the repository again")
    return int(text)


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

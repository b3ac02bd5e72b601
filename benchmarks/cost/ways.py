"""The ways to serve eight tasks that are compared, each as a model repository for the same Triton.

All of them take texts and have an output per task; all but ours pad to a few lengths.
"""

import json
import shutil
from pathlib import Path

from tritonclient.grpc import model_config_pb2 as pb

from benchmarks.cost import padded_tokenizer
from benchmarks.cost.checkpoint import Size
from benchmarks.untrained import LABELS, ship
from espalier.configs import write_config
from espalier.contract import ENSEMBLE, MAX_BATCH_SIZE, MODEL_FILE, TEXT, THREADS, TOKENIZER_FILE, Target
from espalier.encoder import Base

TASKS = tuple(f"task{number}" for number in range(8))
SHALLOW = TASKS[0]
BUCKETS = (16, 32, 64, 128)
"""Lengths to which is padded, in tokens; longer texts are cut."""
PADDED = "padded_tokenizer"
IDS = ("input_ids", "token_type_ids", "attention_mask")


def ours(base: Base, size: Size, target: Target, branches: Path, to: Path) -> None:
    """Write our repository: eight heads of one folded layer, one of them on the shallow tap."""
    taps = {task: size.shallow if task == SHALLOW else size.trunk for task in TASKS}
    ship(base, {task: (tap, seed) for seed, (task, tap) in enumerate(taps.items())}, to, branches, target)


def full_models(onnx: Path, tokenizer: str, threads: int, to: Path) -> None:
    """Today's way: a whole model per task after a tokenizer that pads. All link one file: they cost the same."""
    ensemble = pb.ModelConfig(name=ENSEMBLE, platform="ensemble", max_batch_size=MAX_BATCH_SIZE)
    ensemble.input.add(name=TEXT, data_type=pb.TYPE_STRING, dims=[-1])
    inputs = {name: f"_{name}" for name in IDS}
    ensemble.ensemble_scheduling.step.add(
        model_name=PADDED, model_version=-1, input_map={TEXT: TEXT}, output_map=inputs
    )
    _padded_tokenizer(tokenizer, to / PADDED)
    for task in TASKS:
        config = pb.ModelConfig(name=f"full_{task}", backend="onnxruntime", max_batch_size=MAX_BATCH_SIZE)
        for name in IDS:
            config.input.add(name=name, data_type=pb.TYPE_INT64, dims=[-1])
        config.output.add(name="logits", data_type=pb.TYPE_FP32, dims=[len(LABELS)])
        config.instance_group.add(kind=pb.ModelInstanceGroup.KIND_CPU, count=1)
        config.dynamic_batching.SetInParent()
        config.default_model_filename = MODEL_FILE
        config.parameters[THREADS].string_value = str(threads)
        folder = to / config.name
        (folder / "1").mkdir(parents=True)
        (folder / "1" / MODEL_FILE).hardlink_to(onnx)
        write_config(folder, config)
        ensemble.ensemble_scheduling.step.add(
            model_name=config.name, model_version=-1, input_map=inputs, output_map={"logits": task}
        )
        ensemble.output.add(name=task, data_type=pb.TYPE_FP32, dims=[len(LABELS)])
    (to / ENSEMBLE / "1").mkdir(parents=True)
    write_config(to / ENSEMBLE, ensemble)


def _padded_tokenizer(tokenizer: str, folder: Path) -> None:
    (folder / "1").mkdir(parents=True)
    shutil.copy(padded_tokenizer.__file__, folder / "1" / "model.py")
    (folder / "1" / TOKENIZER_FILE).write_text(tokenizer)
    config = pb.ModelConfig(name=folder.name, backend="python", max_batch_size=MAX_BATCH_SIZE)
    config.input.add(name=TEXT, data_type=pb.TYPE_STRING, dims=[-1], allow_ragged_batch=True)
    for name in IDS:
        config.output.add(name=name, data_type=pb.TYPE_INT64, dims=[-1])
    config.parameters["buckets"].string_value = json.dumps(BUCKETS)
    config.instance_group.add(kind=pb.ModelInstanceGroup.KIND_CPU, count=1)
    config.dynamic_batching.SetInParent()
    write_config(folder, config)

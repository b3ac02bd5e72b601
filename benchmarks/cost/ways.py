"""The ways to serve eight tasks that are compared, each as a model repository for the same Triton.

All of them take texts and have an output per task. All are scheduled with the same care, see `fastest_scheduling`.
"""

import json
import os
import shutil
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path

from tritonclient.grpc import model_config_pb2 as pb

from benchmarks.cost import padded, padded_tokenizer
from benchmarks.cost.checkpoint import Size
from benchmarks.untrained import LABELS, ship
from espalier.branch import Branch, load_branch
from espalier.configs import ensemble_config, write_config
from espalier.contract import (
    ENSEMBLE,
    MAX_BATCH_SIZE,
    MODEL_FILE,
    TEXT,
    TOKENIZER_FILE,
    Merged,
    Target,
    merged_name,
)
from espalier.encoder import Base
from espalier.repository import Repository
from espalier.scheduling import Scheduling, available_cores
from export.merge import merge
from export.models import head_model
from serving.load import Asked, closed_loop
from serving.triton import TritonServer, on_free_ports
from serving.tune import Tunable

TASKS = tuple(f"task{number}" for number in range(8))
SHALLOW = TASKS[0]
TWO = TASKS[:2]
"""One on each tap: beside all eight they tell what one more costs, on the same segments."""
BUCKETS = (16, 32, 64, 128)
"""Lengths to which is padded, in tokens; longer texts are cut."""
PADDED = "padded_tokenizer"
IDS = ("input_ids", "token_type_ids", "attention_mask")
CONCURRENCY = 64
"""Requests under way where throughput is measured: so many that every way has whole batches to take."""
BATCHES = (16, 8)
"""Items in a batch that are tried; without a bound the first instance takes all that waits, and the next idles."""
MARGIN = 1.05
"""How much faster a scheduling must be to be taken instead of one that was tried before: less is noise."""
FIRST = Scheduling(threads=available_cores(), instances=1, batch=0, delay=0)
"""What a way has before its fastest scheduling is looked for: one instance of each model, a thread per core."""


def ours(base: Base, size: Size, target: Target, branches: Path, to: Path) -> None:
    """Write our repository, a model per head: eight of one folded layer, one of them on the shallow tap."""
    taps = {task: size.shallow if task == SHALLOW else size.trunk for task in TASKS}
    ship(base, {task: (tap, seed) for seed, (task, tap) in enumerate(taps.items())}, to, branches, target)


def tasks_of(way: str) -> tuple[str, ...]:
    """Return the tasks that a way serves."""
    return TWO if way == "two" else TASKS


def merged(repository: Path, tasks: Sequence[str], to: Path) -> None:
    """Write a repository with those heads of ours, some on each tap, merged into the segments; all else are links."""
    there = Repository(repository)
    trunk, heads = there.trunk(), [head for head in there.heads() if head.task in tasks]
    gone = {head.model for head in there.heads()} | {segment.model for segment in trunk}
    shutil.copytree(repository, to, copy_function=os.link, ignore=lambda _, names: gone.intersection(names))
    models = []
    for segment in trunk:
        own = tuple(head for head in heads if head.tap == segment.stop)
        name = merged_name(segment.stop, segment)
        (to / name).mkdir()
        merge(name, [(head, repository / head.model) for head in own], to / name, repository / segment.model)
        models.append(Merged(name, segment, own, frozenset(head.task for head in own)))
    write_config(to / ENSEMBLE, ensemble_config(trunk, heads, there.generation(), merged=models))


def ragged_alone(base: Base, size: Size, branches: Path, to: Path) -> None:
    """Write our repository without segments, every head on one tap, and with heads that are not folded."""
    ship(base, {task: (size.trunk, seed) for seed, task in enumerate(TASKS)}, to, branches)
    for task in TASKS:
        branch, _ = load_branch(branches / task)
        branch.folded = 0  # not a branch that can be made: its last layer would compute what nobody reads
        (to / f"head_{task}" / "1" / MODEL_FILE).write_bytes(head_model(branch, task, Target.CPU))


def whole_layers(base: Base, taps: Sequence[int], branches: Path, folded: bool, to: Path) -> None:
    """Write a padded repository: trunk segments that end at `taps`, the shallow task on the first of them.

    With one tap and heads that are not folded it is the paper's way (§3: shared frozen layers, then each task's own).
    """
    size = base.config.hidden_size
    ensemble = _ensemble(base.tokenizer, to)
    below = 0
    for tap in taps:
        inputs = IDS if below == 0 else ("hidden_below", "attention_mask")
        segment = padded.Segment(base.encoder, below, tap)
        source = {name: f"_{name}" for name in inputs} | ({"hidden_below": f"_hidden_{below}"} if below else {})
        write = partial(padded.trace, segment, inputs, "hidden", size)
        _model(to, ensemble, f"trunk_{below}_{tap}", write, source, ("hidden", [-1, size], f"_hidden_{tap}"), size)
        below = tap
    for task in TASKS:
        branch: Branch = load_branch(branches / task)[0]
        module = padded.Folded(branch) if folded else padded.Whole(branch)
        source = {"hidden": f"_hidden_{taps[0] if task == SHALLOW else taps[-1]}", "attention_mask": "_attention_mask"}
        write = partial(padded.trace, module, tuple(source), "probabilities", size)
        _model(to, ensemble, f"head_{task}", write, source, ("probabilities", [len(LABELS)], task), size)
    _finish(ensemble, to)


def full_models(onnx: Path, tokenizer: str, to: Path) -> None:
    """Today's way: a whole model per task after a tokenizer that pads. All link one file: they cost the same."""
    ensemble = _ensemble(tokenizer, to)
    for task in TASKS:
        source = {name: f"_{name}" for name in IDS}
        _model(
            to, ensemble, f"full_{task}", lambda path: path.hardlink_to(onnx), source, ("logits", [len(LABELS)], task)
        )
    _finish(ensemble, to)


def is_padded(repository: Path) -> bool:
    """Tell whether a repository is one of those that pad."""
    return (repository / PADDED).is_dir()


def tunable(repository: Path) -> Tunable:
    """Return what is scheduled in a repository: all but the tokenizer and the ensemble; of ours the trunk."""
    folders = sorted(folder.name for folder in repository.iterdir() if folder.is_dir())
    models = [name for name in folders if next((repository / name).glob(f"*/{MODEL_FILE}"), None)]
    if not is_padded(repository):
        models = [name for name in models if name.startswith("trunk_")]
    return Tunable(repository, models, TASKS, [name for name in folders if name not in models])


def served(repository: Path, log: Path) -> AbstractContextManager[TritonServer]:
    """Serve a repository; padded ones without counting cores, which makes them slower (see TritonServer)."""
    return on_free_ports(repository, log, cores=0 if is_padded(repository) else None)


def fastest_scheduling(
    repository: Path, texts: Sequence[str], seconds: float, log: Path, report: Callable[[Scheduling, float], None]
) -> Scheduling:
    """Try a few schedulings with CONCURRENCY requests under way, keep the fastest in the repository, and return it."""
    models = tunable(repository)
    cores = available_cores()
    halves = Scheduling.default(cores)
    whole = halves.model_copy(update={"threads": cores, "instances": 1})
    alone = halves.model_copy(update={"threads": 1, "instances": 1})
    tries = dict.fromkeys(each.model_copy(update={"batch": n}) for each in (halves, whole, alone) for n in BATCHES)
    rates: dict[Scheduling, float] = {}
    for scheduling in filter(models.fits, tries):
        with models.copy(scheduling) as folder, served(folder, log) as server:
            rates[scheduling] = closed_loop(Asked(server.grpc_url, ENSEMBLE, TASKS), texts, CONCURRENCY, seconds).rate
        report(scheduling, rates[scheduling])
    best = next(iter(rates))
    for scheduling, rate in rates.items():
        if rate > MARGIN * rates[best]:
            best = scheduling
    models.write(best)
    return best


# --- padded repositories ----------------------------------------------------------------------------------------------


def _ensemble(tokenizer: str, to: Path) -> pb.ModelConfig:
    """Start a repository with a tokenizer that pads; return its ensemble, so far with that one step."""
    (to / PADDED / "1").mkdir(parents=True)
    shutil.copy(padded_tokenizer.__file__, to / PADDED / "1" / "model.py")
    (to / PADDED / "1" / TOKENIZER_FILE).write_text(tokenizer)
    config = pb.ModelConfig(name=PADDED, backend="python", max_batch_size=MAX_BATCH_SIZE)
    config.input.add(name=TEXT, data_type=pb.TYPE_STRING, dims=[-1], allow_ragged_batch=True)
    for name in IDS:
        config.output.add(name=name, data_type=pb.TYPE_INT64, dims=[-1])
    config.parameters["buckets"].string_value = json.dumps(BUCKETS)
    config.instance_group.add(kind=pb.ModelInstanceGroup.KIND_CPU, count=1)
    config.dynamic_batching.SetInParent()
    write_config(to / PADDED, config)
    ensemble = pb.ModelConfig(name=ENSEMBLE, platform="ensemble", max_batch_size=MAX_BATCH_SIZE)
    ensemble.input.add(name=TEXT, data_type=pb.TYPE_STRING, dims=[-1])
    ensemble.ensemble_scheduling.step.add(
        model_name=PADDED, model_version=-1, input_map={TEXT: TEXT}, output_map={name: f"_{name}" for name in IDS}
    )
    return ensemble


def _model(
    to: Path, ensemble: pb.ModelConfig, name: str, write: Callable[[Path], None], source: dict[str, str],
    output: tuple[str, list[int], str], hidden_size: int = 0,
) -> None:  # fmt: skip
    """Let `write` make a padded ONNX model, and add its step: inputs from tensors of the ensemble, one output."""
    config = pb.ModelConfig(name=name, backend="onnxruntime", max_batch_size=MAX_BATCH_SIZE)
    for own in source:
        if own.startswith("hidden"):
            config.input.add(name=own, data_type=pb.TYPE_FP32, dims=[-1, hidden_size])
        else:
            config.input.add(name=own, data_type=pb.TYPE_INT64, dims=[-1])
    own, dims, tensor = output
    config.output.add(name=own, data_type=pb.TYPE_FP32, dims=dims)
    config.instance_group.add(kind=pb.ModelInstanceGroup.KIND_CPU, count=1)
    config.dynamic_batching.SetInParent()
    config.default_model_filename = MODEL_FILE
    FIRST.write_to(config)
    (to / name / "1").mkdir(parents=True)
    write(to / name / "1" / MODEL_FILE)
    write_config(to / name, config)
    ensemble.ensemble_scheduling.step.add(model_name=name, model_version=-1, input_map=source, output_map={own: tensor})
    if not tensor.startswith("_"):
        ensemble.output.add(name=tensor, data_type=pb.TYPE_FP32, dims=dims)


def _finish(ensemble: pb.ModelConfig, to: Path) -> None:
    (to / ENSEMBLE / "1").mkdir(parents=True)
    write_config(to / ENSEMBLE, ensemble)

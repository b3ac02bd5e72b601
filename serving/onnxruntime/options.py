"""Config → ONNX Runtime: what of a config becomes a session option, a provider or a refusal.

Keys, ranges and defaults are those that the C++ backend reads (triton-inference-server/onnxruntime_backend,
src/onnxruntime.cc). What it would do and the pip ONNX Runtime cannot is refused by name, never ignored.
"""

from collections.abc import Mapping
from typing import Any

import onnxruntime as ort

from espalier.errors import ContractError

Config = Mapping[str, Any]

_TRUE, _FALSE = ("true", "on", "1"), ("false", "off", "0")
_LEVELS = {
    -1: ort.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    0: ort.GraphOptimizationLevel.ORT_ENABLE_ALL,
    1: ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
    2: ort.GraphOptimizationLevel.ORT_DISABLE_ALL,
}
_CONV_SEARCH = {0: "EXHAUSTIVE", 1: "HEURISTIC", 2: "DEFAULT"}
_ARENA_STRATEGY = {0: "kNextPowerOfTwo", 1: "kSameAsRequested"}
_DEVICE_ALLOCATOR = "session.use_device_allocator_for_initializers"
_SPINNING = "session.intra_op.allow_spinning"
_DENORMAL_AS_ZERO = "session.set_denormal_as_zero"
_ARENA_SHRINKAGE = "memory.enable_memory_arena_shrinkage"


def refuse_unsupported(config: Config) -> None:
    """Raise ContractError for a feature that this backend does not have."""
    if config.get("sequence_batching"):
        raise ContractError("sequence_batching (and its state) is not supported by the embedded onnxruntime backend")
    if config.get("model_transaction_policy", {}).get("decoupled"):
        raise ContractError("a decoupled model_transaction_policy is not supported by the onnxruntime backend")
    if config.get("cc_model_filenames"):
        raise ContractError(
            "cc_model_filenames is not supported by the embedded onnxruntime backend; name one default_model_filename"
        )
    accelerators = config.get("optimization", {}).get("execution_accelerators", {})
    for group in ("gpu_execution_accelerator", "cpu_execution_accelerator"):
        for accelerator in accelerators.get(group, []):
            raise ContractError(
                f"execution accelerator {accelerator.get('name', '')!r} is not supported by the embedded onnxruntime "
                "backend; remove it from optimization.execution_accelerators"
            )
    instances = sum(int(group.get("count", 1)) for group in config.get("instance_group", []))
    if instances > 1 and _flag(config, "share_session_between_instances", False):
        raise ContractError(
            "share_session_between_instances cannot be honoured: in the embedded server every instance is a process "
            "of its own; use one instance or remove the parameter"
        )


def session_options(config: Config) -> ort.SessionOptions:
    """Return the session options that `config` asks for; raise ContractError on a value out of range."""
    options = ort.SessionOptions()
    level = int(config.get("optimization", {}).get("graph", {}).get("level", 0))
    options.graph_optimization_level = _choice("optimization.graph.level", level, _LEVELS)
    modes = {0: ort.ExecutionMode.ORT_SEQUENTIAL, 1: ort.ExecutionMode.ORT_PARALLEL}
    options.execution_mode = _choice("execution_mode", _integer(config, "execution_mode", 0), modes)
    options.intra_op_num_threads = _threads(config, "intra_op_thread_count")
    options.inter_op_num_threads = _threads(config, "inter_op_thread_count")
    # Each instance is a process with a pool of its own: one that spins takes the cores from those that have work.
    options.add_session_config_entry(_SPINNING, "0")
    # The softmax of a padded model's masked scores is full of denormals, each many times as slow as another number.
    options.add_session_config_entry(_DENORMAL_AS_ZERO, "1")
    options.enable_cpu_mem_arena = _flag(config, "enable_mem_arena", options.enable_cpu_mem_arena)
    options.enable_mem_pattern = _flag(config, "enable_mem_pattern", options.enable_mem_pattern)
    device_allocator = _parameter(config, _DEVICE_ALLOCATOR)
    if device_allocator is not None:
        options.add_session_config_entry(_DEVICE_ALLOCATOR, device_allocator)
    for library in config.get("model_operations", {}).get("op_library_filename", []):
        try:
            options.register_custom_ops_library(library)
        except Exception as error:
            raise ContractError(f"model_operations: {library} cannot be loaded: {error}") from error
    return options


def run_options(config: Config) -> ort.RunOptions:
    """Return the options of every run."""
    options = ort.RunOptions()
    shrinkage = _parameter(config, _ARENA_SHRINKAGE)
    if shrinkage is not None:
        options.add_run_config_entry(_ARENA_SHRINKAGE, shrinkage)
    return options


def providers(config: Config, kind: str, device: int) -> list[tuple[str, dict[str, str]]]:
    """Return the execution providers of an instance of `kind` CPU, GPU or MODEL on `device`."""
    cpu: tuple[str, dict[str, str]] = ("CPUExecutionProvider", {})
    if kind != "GPU":
        return [cpu]
    if "CUDAExecutionProvider" not in ort.get_available_providers():
        raise ContractError(
            f"instance_group asks for KIND_GPU, but the installed onnxruntime {ort.__version__} has no CUDA; "
            "install onnxruntime-gpu, or export for the CPU (KIND_CPU)"
        )
    search = _integer(config, "cudnn_conv_algo_search", 0)
    strategy = _integer(config, "arena_extend_strategy", 0)
    cuda = {
        "device_id": str(device),
        "cudnn_conv_algo_search": _choice("cudnn_conv_algo_search", search, _CONV_SEARCH),
        "arena_extend_strategy": _choice("arena_extend_strategy", strategy, _ARENA_STRATEGY),
        "do_copy_in_default_stream": _parameter(config, "do_copy_in_default_stream") or "1",
    }
    limit = _integer(config, "gpu_mem_limit", 0)
    if limit:
        cuda["gpu_mem_limit"] = str(limit)
    return [("CUDAExecutionProvider", cuda), cpu]


def _parameter(config: Config, key: str) -> str | None:
    entry = config.get("parameters", {}).get(key)
    return None if entry is None else str(entry.get("string_value", ""))


def _integer(config: Config, key: str, default: int) -> int:
    value = _parameter(config, key)
    if value is None:
        return default
    try:
        return int(value)
    except ValueError as error:
        raise ContractError(f"parameter {key} is {value!r}, which is not a whole number") from error


def _threads(config: Config, key: str) -> int:
    count = _integer(config, key, 0)
    if count < 0:
        raise ContractError(f"parameter {key} is {count}; use 0 for ONNX Runtime's default or a positive number")
    return count


def _flag(config: Config, key: str, default: bool) -> bool:
    value = _parameter(config, key)
    if value is None:
        return default
    if value.lower() not in (*_TRUE, *_FALSE):
        raise ContractError(f"parameter {key} is {value!r}; use 1 or 0")
    return value.lower() in _TRUE


def _choice(key: str, value: int, choices: Mapping[int, Any]) -> Any:
    if value not in choices:
        raise ContractError(f"{key} is {value}; use {', '.join(map(str, choices))}")
    return choices[value]

"""ONNX Runtime sessions on the CPU, outside of a server."""

from pathlib import Path

import onnxruntime


def session(model: bytes | Path, threads: int = 0) -> onnxruntime.InferenceSession:
    """Return a session for `model` with `threads` intra-op threads, by default one per physical core."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    # A pool of its own for each model: one that spins while another works would be measured as the other's time.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])

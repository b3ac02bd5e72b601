"""ONNX Runtime sessions on the CPU, outside of a server."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime

from espalier.contract import BELOW

Feed = dict[str, npt.NDArray[Any]]


def session(model: bytes | Path, threads: int = 0) -> onnxruntime.InferenceSession:
    """Return a session for `model` with `threads` intra-op threads, by default one per physical core."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    # A pool of its own for each model: one that spins while another works would be measured as the other's time.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def states(
    segments: Iterable[onnxruntime.InferenceSession], ids: npt.NDArray[Any], types: npt.NDArray[Any],
    lengths: npt.NDArray[Any],
) -> Iterator[Feed]:  # fmt: skip
    """Run the segments of a trunk one after the other; yield after each what a head on it takes, but for ids.

    `ids` and `types` [T] are those of all items, one after the other without pads; `lengths` is [B,1].
    """
    feed = {"input_ids": ids, "token_type_ids": types, "length": lengths, "shape": lengths}
    for segment in segments:
        hidden = segment.run(None, feed)[0]  # [T,H]
        shape = np.hstack([lengths, np.full_like(lengths, hidden.shape[1])])
        feed = {BELOW: hidden.reshape(-1), "length": lengths, "shape": shape}
        yield {"hidden": feed[BELOW], "length": lengths, "shape": shape}

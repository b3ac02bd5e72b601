"""Trunk activations, computed once.

The trunk is frozen and runs without dropout: what it gives at a tap is a constant of the text. It is computed once per
data split and tap, kept on disk in FP16 – the real tokens alone, no pads – and read from there in every epoch of every
training on the same trunk, tap and text: other seeds, learning rates, students.
"""

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from espalier.encoder import Base
from espalier.errors import DataError
from espalier.files import clear_unfinished, digest, locked, whole_folder
from training.features import collate

HIDDEN_FILE = "hidden.f16"  # [T,H], the tokens of all texts one after the other
SHAPE_FILE = "shape.json"
BATCH_SIZE = 32
DEFAULT_LIMIT = 20 * 2**30  # bytes

Report = Callable[[int, int], None]
"""Told the texts done, and all texts."""


@contextlib.contextmanager
def accelerated(*modules: nn.Module) -> Iterator[torch.device]:
    """Move `modules` to the GPU for the block, if there is one; yield the device they are on."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        for module in modules:
            module.to(device)
        yield device
    finally:
        for module in modules:
            module.cpu()


class Activations:
    """Hidden states at a tap by text: `activations[i]` is [S,H] in FP32, read from a memory-mapped file."""

    def __init__(self, folder: Path, lengths: Sequence[int]) -> None:
        shape = json.loads((folder / SHAPE_FILE).read_text())
        self._hidden = np.memmap(folder / HIDDEN_FILE, np.float16, "r", shape=(shape["tokens"], shape["hidden_size"]))
        self._ends: npt.NDArray[np.int64] = np.cumsum(lengths)
        self._lengths = list(lengths)

    def attach(self, features: Sequence[dict[str, Any]]) -> None:
        """Let `collate` add the hidden states to batches of `features`, which are those of these activations."""
        for row, feature in enumerate(features):
            feature["hidden"] = (self, row)

    def __getitem__(self, row: int) -> Tensor:
        """Return the hidden states of text `row`, [S,H]."""
        end = int(self._ends[row])
        return torch.from_numpy(self._hidden[end - self._lengths[row] : end].astype(np.float32))


@dataclass(frozen=True)
class ActivationCache:
    """A folder of activations, each set named by a digest of trunk, tap and tokens; at most `limit` bytes in all."""

    folder: Path
    limit: int = DEFAULT_LIMIT

    def get(self, base: Base, tap: int, features: Sequence[dict[str, Any]], report: Report) -> Activations:
        """Return the activations of `features` (see training.features) at `tap`; compute them if they are not here.

        Raises DataError, before anything is computed, if they would not fit into the limit or onto the disk.
        """
        lengths = [len(feature["input_ids"]) for feature in features]
        tokens = np.concatenate([np.array([f["input_ids"], f["token_type_ids"]], np.int32) for f in features], axis=1)
        name = digest(base.fingerprint(tap), np.array(lengths, np.int32).tobytes(), tokens.tobytes())[:24]
        target = self.folder / name
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            # One process at a time computes: others that need the same find it done, and the limit holds for all.
            with locked(self.folder / ".lock"):
                if not (target / SHAPE_FILE).exists():
                    self._compute(target, base, tap, features, report)
                os.utime(target)  # when it was last of use, for whoever clears up
        except OSError as error:
            raise DataError(f"the activations cannot be written to {self.folder}: {error.strerror or error}") from error
        return Activations(target, lengths)

    def _compute(self, target: Path, base: Base, tap: int, features: Sequence[dict[str, Any]], report: Report) -> None:
        size = base.config.hidden_size
        lengths = np.array([len(feature["input_ids"]) for feature in features])
        starts = np.cumsum(lengths) - lengths
        needed = int(lengths.sum()) * size * 2
        clear_unfinished(self.folder, target.name)
        self._check_room(needed, len(features), tap)
        with whole_folder(target) as growing:
            with (growing / HIDDEN_FILE).open("wb") as file:
                os.posix_fallocate(file.fileno(), 0, needed)  # a full disk is an error here, a SIGBUS in the map
            hidden = np.memmap(growing / HIDDEN_FILE, np.float16, "r+", shape=(int(lengths.sum()), size))
            with accelerated(base.encoder) as device:
                order = np.argsort(lengths, kind="stable")  # little padding
                for at in range(0, len(order), BATCH_SIZE):
                    rows = order[at : at + BATCH_SIZE]
                    batch = collate([features[row] for row in rows])
                    inputs = (batch[key].to(device) for key in ("input_ids", "token_type_ids", "mask"))
                    with torch.no_grad():
                        states = base.encoder(*inputs, tap=tap).cpu().numpy()  # [B,S,H]
                    for row, state in zip(rows, states, strict=True):
                        hidden[starts[row] : starts[row] + lengths[row]] = state[: lengths[row]]
                    report(at + len(rows), len(order))
            hidden.flush()
            shape = {"tokens": int(lengths.sum()), "hidden_size": size, "tap": tap, "base": base.name}
            (growing / SHAPE_FILE).write_text(json.dumps(shape))

    def _check_room(self, needed: int, texts: int, tap: int) -> None:
        used = sum(file.stat().st_size for file in self.folder.glob(f"*/{HIDDEN_FILE}"))
        free = shutil.disk_usage(self.folder).free
        if used + needed > self.limit or needed > free:
            raise DataError(
                f"the trunk's activations for {texts} texts at tap {tap} need {_gigabytes(needed)}, but {self.folder} "
                f"holds {_gigabytes(used)} of at most {_gigabytes(self.limit)}, and the disk has {_gigabytes(free)} "
                "free; remove folders there, raise --cache-limit, or train without --cache"
            )


def _gigabytes(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"

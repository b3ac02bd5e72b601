"""A Python server: LitServe, PyTorch, one model with the shared trunk and eight branches; text in, eight answers.

As its documentation says to speed a server up: requests are batched (`max_batch_size`, `batch_timeout`), and workers
share the cores. Within a batch texts are padded to the longest. Run as a command it serves until it is ended.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import aiohttp
import litserve
import torch
import typer
from tokenizers import Tokenizer

from espalier.branch import load_branch
from espalier.encoder import load_base
from espalier.errors import ServerError
from espalier.scheduling import available_cores
from serving.guard import kill_group
from serving.triton import free_ports

BATCH = 32
WAIT = 0.01  # s
START = 120.0  # s
STOP = 10.0  # s
TIMEOUT = 600.0  # s


@dataclass(frozen=True)
class HttpServer:
    """A running server, as the load generator takes it."""

    port: int
    pid: int  # of it and of the group of all that it started

    def connect(self) -> "HttpAsker":
        """Return a connection."""
        return HttpAsker(self.port)


class HttpAsker:
    """Sends one text at a time over HTTP."""

    def __init__(self, port: int) -> None:
        self._url = f"http://127.0.0.1:{port}/predict"
        self._session = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=TIMEOUT))

    async def ask(self, text: str) -> None:
        """Ask about a text; raise ServerError if it is not answered."""
        async with self._session.post(self._url, json={"text": text}) as response:
            if response.status != 200 or not await response.json():
                raise ServerError(f"the Python server answered {response.status}: {await response.text()}")

    async def close(self) -> None:
        """Close the connections."""
        await self._session.close()


@contextmanager
def running(base: str, branches: Sequence[Path], tap: int, workers: int, log: Path) -> Iterator[HttpServer]:
    """Run the server in a process of its own; yield it when it answers. Raises ServerError if it does not."""
    (port,) = free_ports(1)
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", __spec__.name, base, str(tap), str(port), *map(str, branches)]
    with log.open("wb") as file:
        process = subprocess.Popen(
            [*command, "--workers", str(workers)], stdin=subprocess.DEVNULL, stdout=file, stderr=file, process_group=0
        )
    try:
        deadline = time.monotonic() + START
        while not _answers(port):
            if process.poll() is not None or time.monotonic() > deadline:
                raise ServerError(f"the Python server did not start; see {log}")
            time.sleep(0.2)
        yield HttpServer(port, process.pid)
    finally:
        _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the server and all that it started: LitServe's workers outlive a server that is told to end alone."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGINT)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(STOP)
    kill_group(process.pid)
    process.wait()


def _answers(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2) as response:
            return bool(response.status == 200)
    except OSError:
        return False


class MultiTask(litserve.LitAPI):  # type: ignore[misc]
    """The model: texts in, probabilities by task out."""

    def __init__(self, base: str, tap: int, branches: Sequence[Path], threads: int) -> None:
        super().__init__(max_batch_size=BATCH, batch_timeout=WAIT)
        self._base = base
        self._tap = tap
        self._branches = branches
        self._threads = threads

    def setup(self, device: str) -> None:
        """Load everything, in the worker."""
        torch.set_num_threads(self._threads)
        loaded = load_base(self._base)
        self._encoder = loaded.encoder
        self._tokenizer = Tokenizer.from_str(loaded.tokenizer)
        self._tokenizer.enable_truncation(loaded.max_length)
        self._tokenizer.enable_padding()
        self._heads = {folder.name: load_branch(folder)[0] for folder in self._branches}

    def decode_request(self, request: dict[str, Any], **_: Any) -> str:
        """Return the text of a request."""
        return str(request["text"])

    def batch(self, inputs: list[str]) -> list[str]:
        """Return the texts as they are: they are padded once they are tokens."""
        return inputs

    def predict(self, texts: list[str], **_: Any) -> list[dict[str, list[float]]]:
        """Return the probabilities by task of each text."""
        encodings = self._tokenizer.encode_batch(texts)
        ids = torch.tensor([encoding.ids for encoding in encodings])
        types = torch.tensor([encoding.type_ids for encoding in encodings])
        mask = torch.tensor([encoding.attention_mask for encoding in encodings]).bool()
        with torch.inference_mode():
            hidden = self._encoder(ids, types, mask, self._tap)
            found = {task: head.answer(hidden, mask).tolist() for task, head in self._heads.items()}
        return [{task: rows[at] for task, rows in found.items()} for at in range(len(texts))]

    def unbatch(self, output: list[dict[str, list[float]]]) -> list[dict[str, list[float]]]:
        """Return the answers one by one."""
        return output

    def encode_response(self, output: dict[str, list[float]], **_: Any) -> dict[str, list[float]]:
        """Return what becomes JSON."""
        return output


def serve(
    base: str, tap: int, port: int, branches: list[Path],
    workers: Annotated[int, typer.Option(help="Processes; the cores are shared out among them.")] = 1,
) -> None:  # fmt: skip
    """Serve the branches on 127.0.0.1 until the process is ended."""
    api = MultiTask(base, tap, branches, max(1, available_cores() // workers))
    server = litserve.LitServer(api, accelerator="cpu", workers_per_device=workers, timeout=TIMEOUT)
    server.run(host="127.0.0.1", port=port, generate_client_file=False, log_level="warning")


if __name__ == "__main__":
    typer.run(serve)

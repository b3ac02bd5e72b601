"""Triton's model repository API (docs/protocol/extension_model_repository.md) over gRPC, and smoke inference over HTTP.

A request over gRPC whose client dies is cancelled, and of that the embedded Triton 2.51 may die; one over HTTP is not.
Loading over HTTP would keep a thread of Triton's HTTP server from all others for as long as it takes.
"""

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

import aiohttp
import numpy as np
import numpy.typing as npt
import tritonclient.grpc
import tritonclient.http.aio
from tritonclient.grpc import model_config_pb2 as pb
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

from espalier.channel import CHANNEL_ARGUMENTS
from espalier.contract import OFFSETS, TEXT, HeadInfo, Kind, Structure, TrunkInfo
from espalier.errors import UnavailableError, WiringError, one_line

Array = npt.NDArray[Any]

_LENGTHS = (1, 7)
"""Tokens of the items on which a head is tried."""
_TEXTS = ("Wake me at half past seven.", "a", "")
_TOLERANCE = 2e-2
"""How far the probabilities of an FP16 head may be from summing up to one."""
_SAME = 1e-2
"""How far the answers of merged heads may be from their own, and by which part: on a CPU they are the same bits."""
PATIENCE = 60.0
"""Seconds for one smoke inference."""


class Refused(WiringError):
    """Triton said no, or what it answers cannot be right; the message is the reason, on one line."""


class Control:
    """A Triton in explicit model-control mode; `url` and `http_url` are host:port of its gRPC and HTTP endpoints."""

    def __init__(self, url: str, http_url: str) -> None:
        self.url = url
        self.http_url = http_url
        self._client = tritonclient.grpc.InferenceServerClient(url, channel_args=CHANNEL_ARGUMENTS)

    def close(self) -> None:
        """Close the connection."""
        self._client.close()

    def index(self) -> dict[str, bool]:
        """Return the models that the server knows or sees in its repository, and whether each is ready."""
        ready: dict[str, bool] = {}
        for entry in self._call(self._client.get_model_repository_index).models:
            ready[entry.name] = ready.get(entry.name, False) or entry.state == "READY"
        return ready

    def load(self, model: str) -> None:
        """Load a model, or load it anew if its files changed; raise Refused with Triton's reason."""
        self._call(self._client.load_model, model)

    def unload(self, model: str) -> None:
        """Unload a model; requests that are under way end well. Not loaded is no error."""
        self._call(self._client.unload_model, model)

    def config(self, model: str) -> pb.ModelConfig | None:
        """Return the config of a model as it is loaded; None if it is not."""
        try:
            config: pb.ModelConfig = self._call(self._client.get_model_config, model).config
        except Refused:
            return None
        return config

    def _call(self, method: Any, *arguments: Any) -> Any:
        try:
            return method(*arguments)
        except InferenceServerException as error:
            # A server that is going down gives all kinds of reasons.
            if error.status() in ("StatusCode.UNAVAILABLE", "StatusCode.CANCELLED", "503") or not self._is_live():
                raise UnavailableError(f"{self.url} is unavailable: {one_line(error.message())}") from error
            raise Refused(one_line(error.message())) from error

    def _is_live(self) -> bool:
        """Tell whether the server answers."""
        try:
            return bool(self._client.is_server_live())
        except InferenceServerException:
            return False

    def _infer(self, model: str, inputs: Mapping[str, Array], outputs: Sequence[str]) -> dict[str, Array]:
        try:
            result = self._call(asyncio.run, self._ask(model, inputs, outputs))
        except TimeoutError as error:
            raise Refused(f"{model} did not answer within {PATIENCE:g} s") from error
        except aiohttp.ClientError as error:
            if not self._is_live():
                raise UnavailableError(f"{self.url} is unavailable: {one_line(error)}") from error
            raise WiringError(
                f"Triton answers at {self.url} (gRPC), but not at {self.http_url} (HTTP: {one_line(error)}); "
                "name its HTTP endpoint with --http-url"
            ) from error
        return {name: result.as_numpy(name) for name in outputs}

    async def _ask(self, model: str, inputs: Mapping[str, Array], outputs: Sequence[str]) -> Any:
        tensors = []
        for name, array in inputs.items():
            tensor = tritonclient.http.InferInput(name, list(array.shape), np_to_triton_dtype(array.dtype))
            tensor.set_data_from_numpy(array)
            tensors.append(tensor)
        wanted = [tritonclient.http.InferRequestedOutput(name) for name in outputs]
        async with (
            tritonclient.http.aio.InferenceServerClient(self.http_url, conn_timeout=None) as client,
            asyncio.timeout(PATIENCE),
        ):
            return await client.infer(model, tensors, outputs=wanted)

    # --- smoke inference --------------------------------------------------------------------------------------------

    def try_head(self, model: str, info: HeadInfo, trunk: TrunkInfo) -> None:
        """Ask a head alone about random hidden states; raise Refused if what it answers cannot be right."""
        rng = np.random.default_rng(0)
        precision = np.float16 if trunk.target.hidden_type == pb.TYPE_FP16 else np.float32
        for length in _LENGTHS:
            hidden = rng.normal(size=(1, length, info.hidden_size)).astype(precision)
            inputs: dict[str, Array] = {"hidden": hidden, "length": np.array([[length]], np.int32)}
            if info.structure is Structure.CRF:
                inputs["input_ids"] = np.zeros((1, length), np.int64)
            answer = self._infer(model, inputs, [info.output])[info.output]
            _check_answer(info, answer, length)

    def try_ensemble(self, name: str, heads: Mapping[str, HeadInfo], like: str | None = None) -> None:
        """Ask the ensemble `name` every task, alone and all together; raise Refused if an answer cannot be right.

        With `like` the answers must be those of that ensemble.
        """
        for text in _TEXTS:
            rows = np.array([[text.encode()]], np.object_)
            answers = self._check(name, rows, heads)
            if like is not None:
                _compare(answers, self._check(like, rows, heads))
        rows = np.array([[text.encode() for text in _TEXTS[:2]]], np.object_)
        self._check(name, rows, heads)
        for task, info in heads.items():
            self._check(name, rows, {task: info})

    def _check(self, name: str, rows: Array, heads: Mapping[str, HeadInfo]) -> dict[str, Array]:
        answers = self._infer(name, {TEXT: rows}, [*heads, OFFSETS])
        tokens = answers[OFFSETS].shape[1]
        for task, info in heads.items():
            _check_answer(info, answers[task], tokens)
        return answers


def _compare(answers: Mapping[str, Array], others: Mapping[str, Array]) -> None:
    for task, answer in answers.items():
        if not np.allclose(answer, others[task], rtol=_SAME, atol=_SAME):
            raise Refused(f"it answers {task!r} otherwise than what is served")


def _check_answer(info: HeadInfo, answer: Array, tokens: int) -> None:
    dims = [tokens if dim == -1 else dim for dim in info.output_dims]
    if list(answer.shape) != [1, *dims]:
        raise Refused(f"it answers a text of {tokens} tokens with shape {list(answer.shape[1:])}, not {dims}")
    if not np.isfinite(answer).all():
        raise Refused("it answers with numbers that are not finite")
    probabilities = info.kind is Kind.CLASSIFICATION or (
        info.kind is Kind.TAGGING and info.structure is Structure.SOFTMAX
    )
    if probabilities and np.abs(answer.sum(axis=-1) - 1).max(initial=0) > _TOLERANCE:
        raise Refused("its probabilities do not sum up to one")

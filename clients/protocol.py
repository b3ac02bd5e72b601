"""The conversation with the server, without any I/O.

A `Program` is a generator: it yields a call for a transport to make and is sent the reply, or the RequestError that
came instead. So the clients, sync and async, over gRPC and over HTTP, share every decision and differ in waiting.
"""

from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from clients.catalogue import Catalogue, answering, generation_of, head_models, read_catalogue
from clients.results import Answer, Answers, Classification, Regression, Tagging
from espalier import tagging
from espalier.contract import ENSEMBLE, OFFSETS, HeadInfo, Kind, Structure
from espalier.errors import DeadlineError, RequestError, UnavailableError

Item = str | tuple[str, str]
"""A text, or a pair of texts."""

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class ReadConfig:
    """Ask for the config of `model`; the reply is a ModelConfig message."""

    model: str


@dataclass(frozen=True)
class Infer:
    """Send `texts` (bytes, [n, 1 or 2]) to the ensemble for its `outputs`; the reply is a Reply."""

    texts: Array
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class Reply:
    """What the ensemble answered: an array per output, and its generation."""

    arrays: Mapping[str, Array]
    generation: str


Call = ReadConfig | Infer
T = TypeVar("T")
Program = Generator[Call, Any, T]


READINGS = 5
"""How often the catalogue is read for one request: tasks may change again between the reading and the asking."""


class _StaleError(RequestError):
    """A reply does not fit the catalogue; the message says how."""


class _OtherGenerationError(Exception):
    """The reply is another generation's than the catalogue, and may be gone again."""


class Conversation:
    """The calls behind each of the clients' methods, and the catalogue that they share.

    Tasks come, go and change while the server runs. Every answer carries the ensemble's generation, so none is ever
    read by the labels of another one: what does not fit the catalogue is asked again by a new one.
    """

    def __init__(self) -> None:
        self._catalogue: Catalogue | None = None

    def tasks(self) -> Program[dict[str, HeadInfo]]:
        """Read from the server what is deployed."""
        catalogue = yield from self._read()
        return dict(catalogue.tasks)

    def ask_batch(self, items: Sequence[Item], tasks: Sequence[str] | None) -> Program[list[Answers]]:
        """Ask `tasks`, or all that are deployed but candidates, about `items`."""
        _check_tasks(tasks)
        batches = list(_batches(items))
        catalogue = self._catalogue or (yield from self._read())
        for _ in range(READINGS):
            try:
                return (yield from _ask(catalogue, batches, tasks))
            except _OtherGenerationError:
                pass
            except (UnavailableError, DeadlineError):
                raise
            except RequestError:
                if (yield from self._is_current(catalogue)):
                    raise
            catalogue = yield from self._read()
        raise RequestError(f"the server's tasks changed {READINGS} times while it was asked; ask again")

    def _read(self) -> Program[Catalogue]:
        for _ in range(READINGS):
            ensemble = yield ReadConfig(ENSEMBLE)
            try:
                heads = {}
                for model in head_models(ensemble):
                    heads[model] = yield ReadConfig(model)
            except (UnavailableError, DeadlineError):
                raise
            except RequestError:
                if (yield ReadConfig(ENSEMBLE)) == ensemble:
                    raise
            else:
                self._catalogue = read_catalogue(ensemble, heads)
                return self._catalogue
        raise RequestError(f"the server's tasks changed {READINGS} times while they were read; ask again")

    def _is_current(self, catalogue: Catalogue) -> Program[bool]:
        ensemble = yield ReadConfig(ENSEMBLE)
        return (generation_of(ensemble), [*answering(ensemble)]) == (catalogue.generation, [*catalogue.tasks])


@dataclass(frozen=True)
class _Batch:
    """Items of one width, and their places among all."""

    places: list[int]
    items: list[Item]
    texts: Array  # [n, 1 or 2]

    def parts(self, size: int) -> Iterator["_Batch"]:
        for i in range(0, len(self.places), size):
            part = slice(i, i + size)
            yield _Batch(self.places[part], self.items[part], self.texts[part])


def _batches(items: Sequence[Item]) -> Iterator[_Batch]:
    """Check `items` and yield those that are texts, then those that are pairs."""
    if isinstance(items, str) or not isinstance(items, Sequence):
        raise RequestError(f"items must be a list of texts or pairs, not {type(items).__name__}")
    if not items:
        raise RequestError("the batch is empty; send at least one text")
    rows = [_row(place, item) for place, item in enumerate(items)]
    for width in (1, 2):
        places = [place for place, row in enumerate(rows) if len(row) == width]
        if places:
            texts = np.array([rows[place] for place in places], dtype=np.object_)
            yield _Batch(places, [items[place] for place in places], texts)


def _row(place: int, item: Item) -> list[bytes]:
    texts = (item,) if isinstance(item, str) else item
    if not isinstance(texts, tuple) or (len(texts) != 2 and not isinstance(item, str)):
        what = f"a tuple of {len(texts)}" if isinstance(texts, tuple) else type(texts).__name__
        raise RequestError(f"item {place} must be a text or a pair of texts, not {what}")
    row = []
    for text in texts:
        if not isinstance(text, str):
            raise RequestError(f"item {place} must consist of texts, not {type(text).__name__}")
        try:
            row.append(text.encode())
        except UnicodeEncodeError as error:
            raise RequestError(
                f"item {place} is not valid text: U+{ord(text[error.start]):04X} at position {error.start} is half a "
                "surrogate pair"
            ) from error
    return row


def _check_tasks(tasks: Sequence[str] | None) -> None:
    if tasks is None:
        return
    if isinstance(tasks, str) or not isinstance(tasks, Sequence):
        raise RequestError(f"tasks must be a list of task names, not {tasks!r}")
    if not tasks:
        raise RequestError("tasks is empty; name at least one, or leave it out to ask all")


def _ask(catalogue: Catalogue, batches: Sequence[_Batch], tasks: Sequence[str] | None) -> Program[list[Answers]]:
    infos = catalogue.choose(tasks)
    outputs = tuple(info.task for info in infos)
    if any(info.kind is Kind.TAGGING for info in infos):
        outputs += (OFFSETS,)
    answers: dict[int, Answers] = {}
    for batch in batches:
        for part in batch.parts(catalogue.max_batch_size):
            reply: Reply = yield Infer(part.texts, outputs)
            if reply.generation != catalogue.generation:
                raise _OtherGenerationError
            answers.update(zip(part.places, parse(part.items, infos, reply.arrays), strict=True))
    return [answers[place] for place in sorted(answers)]


def parse(items: Sequence[Item], infos: Sequence[HeadInfo], reply: Mapping[str, Array]) -> list[Answers]:
    """Read the answers to n `items` from the outputs: [n,C], [n,1], [n,S,C] or [n,S,2] per task, offsets [n,S,2]."""
    for info in infos:
        _check_shape(info, reply[info.task], len(items))
        if info.kind is Kind.TAGGING and reply[OFFSETS].shape != (*reply[info.task].shape[:2], 2):
            raise RequestError(f"{info.model} and {OFFSETS!r} tell of different numbers of tokens")
    return [Answers({info.task: _answer(item, info, row, reply) for info in infos}) for row, item in enumerate(items)]


def _check_shape(info: HeadInfo, output: Array, n: int) -> None:
    dims = info.output_dims
    if output.ndim != 1 + len(dims) or output.shape[0] != n or output.shape[-1] != dims[-1]:
        what = "one value" if info.kind is Kind.REGRESSION else f"{len(info.labels)} labels"
        raise _StaleError(f"{info.model} names {what}, but answers {n} items with shape {list(output.shape)}")
    if info.structure is Structure.CRF and output[..., 0].max(initial=0) >= len(info.labels):
        raise _StaleError(f"{info.model} names {len(info.labels)} labels, but answers with another")


def _answer(item: Item, info: HeadInfo, row: int, reply: Mapping[str, Array]) -> Answer:
    values = reply[info.task][row]
    match info.kind:
        case Kind.CLASSIFICATION:
            best = int(values.argmax())
            probabilities = dict(zip(info.labels, values.tolist(), strict=True))
            return Classification(info.labels[best], float(values[best]), probabilities)
        case Kind.REGRESSION:
            return Regression(float(values[0]))
        case Kind.TAGGING if info.structure is Structure.CRF:
            words, spans, log_probability = tagging.decode_path(item, reply[OFFSETS][row], values, info.labels)
            return Tagging(spans, words, log_probability)
        case Kind.TAGGING:
            words, spans = tagging.decode(item, reply[OFFSETS][row], values, info.labels)
            return Tagging(spans, words)

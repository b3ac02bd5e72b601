"""Task data: from the files or the data set that a spec names to checked examples.

Every problem is a DataError that says file, line and what.
"""

import csv
import json
import random
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from espalier.contract import Kind, Structure
from espalier.errors import DataError, SpecError
from espalier.files import digest
from espalier.spec import ConllData, HubData, LinesData, TableData, TaskSpec
from espalier.tagging import Scheme, count_words, parse


@dataclass(frozen=True)
class Example:
    """One item of a task.

    `texts` is one string, or two for a pair. `label` is a label, a number, or for tagging one tag per word;
    `words` are then the words' character spans in `texts[0]`.
    """

    texts: tuple[str, ...]
    label: str | float | tuple[str, ...]
    words: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class TaskData:
    """What a training reads of a task: two splits, and the labels (empty for regression)."""

    train: list[Example]
    dev: list[Example]
    labels: tuple[str, ...]

    def sampled(self, max_train: int | None, max_dev: int | None) -> "TaskData":
        """Return the same labels with a sample of at most so many rows of each split."""
        return TaskData(sample(self.train, max_train), sample(self.dev, max_dev), self.labels)

    def digest(self) -> str:
        """Return the sha256 of the content: equal data, equal digest, wherever it lies."""
        rows = (repr(example) for split in (self.train, self.dev) for example in split)
        return digest(repr(self.labels), str(len(self.train)), *rows)


def load_data(spec: TaskSpec, max_train: int | None = None, max_dev: int | None = None) -> TaskData:
    """Read and check train and dev of `spec`; of each keep a sample of at most so many rows.

    Labels come from the whole of train, and from train alone; one that only dev has is an error that names it.
    """
    train, dev = load_split(spec, "train"), load_split(spec, "dev")
    labels = () if spec.kind is Kind.REGRESSION else _labels(spec, train, dev)
    check_ignored(spec, labels)
    if spec.structure is Structure.CRF:
        _check_scheme(spec, train, labels)
    return TaskData(train, dev, labels).sampled(max_train, max_dev)


def sample(examples: list[Example], size: int | None) -> list[Example]:
    """Return a random sample of `examples`, in their order; equal examples and sizes give the same sample."""
    if size is None or size >= len(examples):
        return examples
    return [examples[row] for row in sorted(random.Random(0).sample(range(len(examples)), size))]


def load_split(spec: TaskSpec, split: str) -> list[Example]:
    """Read and check the split `train`, `dev` or `test` of `spec`."""
    if getattr(spec.data, split) is None:
        raise SpecError(f"task {spec.name}: the spec names no {split} split; add '{split}' to its data")
    examples = [_example(spec, row, where) for row, where in _rows(spec, split)]
    if not examples:
        raise DataError(f"task {spec.name}: the {split} split has no rows ({_source(spec, split)})")
    return examples


def _source(spec: TaskSpec, split: str) -> str:
    source = getattr(spec.data, split)
    return ", ".join(str(path) for path in source.values()) if isinstance(source, dict) else str(source)


def _labels(spec: TaskSpec, train: Sequence[Example], dev: Sequence[Example]) -> tuple[str, ...]:
    seen = _used(train)
    parts = _parts(train) - seen
    if spec.labels is not None:
        for label in sorted(seen - set(spec.labels)):
            raise DataError(f"task {spec.name}: train has the label {label!r}, which the spec's labels leave out")
        for label in spec.labels:
            if label not in seen | parts:
                raise DataError(f"task {spec.name}: the spec lists the label {label!r}, but no row of train has it")
        if left_out := sorted(parts - set(spec.labels)):
            raise DataError(
                f"task {spec.name}: train has words that the tokenizer takes for several; their further parts need the "
                f"label {left_out[0]!r}, which the spec's labels leave out"
            )
    seen |= parts
    if unseen := sorted(_used(dev) - seen):
        raise DataError(
            f"task {spec.name}: dev has the label {unseen[0]!r}, which no row of train has; "
            "add such rows to train or take them out of dev"
        )
    if spec.positive is not None and spec.positive not in seen:
        raise DataError(f"task {spec.name}: no row of train has the positive label {spec.positive!r}")
    if len(seen) < 2:
        raise DataError(f"task {spec.name}: train has the single label {next(iter(seen))!r}; nothing can be learnt")
    return spec.labels or tuple(sorted(seen))


def check_ignored(spec: TaskSpec, labels: Sequence[str]) -> None:
    """Raise DataError if the spec ignores a slot that is none of `labels`."""
    types = {parse(label)[1] for label in labels} - {""}
    for name in spec.ignore:
        if parse(name)[1] not in types:
            raise DataError(
                f"task {spec.name}: 'ignore' names {name!r}, which no label of train has; its slots are {sorted(types)}"
            )


def _check_scheme(spec: TaskSpec, train: Sequence[Example], labels: Sequence[str]) -> None:
    """Raise DataError if a row of train has tags that the CRF would hold to be impossible."""
    scheme = Scheme(labels)
    broken = []
    for row, example in enumerate(train, start=1):
        assert isinstance(example.label, tuple)
        if (at := scheme.first_break(example.label)) is not None:
            left, right = ("its beginning", *example.label)[at], (*example.label, "its end")[at]
            broken.append(f"row {row}, {textwrap.shorten(example.texts[0], 80)!r}, where {left} is followed by {right}")
    if broken:
        raise DataError(
            f"task {spec.name}: {len(broken)} of {len(train)} rows of train break the scheme (BIO or BIOES) of their "
            f"labels, the first of them {broken[0]}; mend them, or use structure: softmax"
        )


def _used(examples: Sequence[Example]) -> set[str]:
    used: set[str] = set()
    for example in examples:
        if isinstance(example.label, tuple):
            used.update(example.label)
        else:
            used.add(str(example.label))
    return used


def _parts(examples: Sequence[Example]) -> set[str]:
    """Return the tags of the parts of words that are several words to the tokenizer, such as those of Chinese."""
    parts: set[str] = set()
    for example in examples:
        if isinstance(example.label, tuple):
            for (start, end), tag in zip(example.words, example.label, strict=True):
                parts.update(spread(tag, count_words(example.texts[0][start:end])))
    return parts


def _example(spec: TaskSpec, row: dict[str, Any], where: str) -> Example:
    for column in (*spec.text, spec.label):
        if column not in row:
            raise DataError(f"{where}: there is no column {column!r}; the columns are {sorted(map(str, row))}")
    if spec.kind is Kind.TAGGING:
        return _tagged(row[spec.text[0]], row[spec.label], where)
    texts = []
    for column in spec.text:
        text = row[column]
        if isinstance(text, list) and all(isinstance(word, str) for word in text):
            text = " ".join(text)
        if not isinstance(text, str):
            raise DataError(f"{where}: column {column!r} is {text!r}, not text")
        texts.append(_encodable(text.strip(), column, where))
    raw = row[spec.label]
    if spec.kind is Kind.REGRESSION:
        return Example(tuple(texts), _number(raw, spec.label, where))
    label = str(raw).strip() if isinstance(raw, str | int | bool) else ""
    # One label is one line of labels.txt.
    if len(label.splitlines()) != 1:
        raise DataError(f"{where}: column {spec.label!r} is {raw!r}, not a label")
    return Example(tuple(texts), _encodable(label, spec.label, where))


def _encodable(text: str, column: str, where: str) -> str:
    # JSON can escape half a surrogate pair, which no tokenizer and no file takes.
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{where}: column {column!r} is not Unicode: {error.reason} at {error.start}") from error
    return text


def _number(raw: Any, column: str, where: str) -> float:
    try:
        value = float(raw)
    except (TypeError, ValueError, OverflowError):
        value = float("nan")
    if not abs(value) < float("inf"):
        raise DataError(f"{where}: column {column!r} is {raw!r}, not a number")
    return value


def _tagged(tokens: Any, tags: Any, where: str) -> Example:
    words = tokens.split() if isinstance(tokens, str) else tokens
    marks = tags.split() if isinstance(tags, str) else tags
    for name, column in (("tokens", words), ("tags", marks)):
        if not isinstance(column, list) or not all(isinstance(item, str) and item.strip() for item in column):
            raise DataError(f"{where}: {name} are {column!r}, not a list of words or words separated by spaces")
    if not words:
        raise DataError(f"{where}: there are no tokens; remove the row")
    if len(words) != len(marks):
        raise DataError(f"{where}: {len(words)} tokens, but {len(marks)} tags")
    for item in (*words, *marks):
        _encodable(item, "tokens or tags", where)
    spans, start = [], 0
    for word in words:
        spans.append((start, start + len(word)))
        start += len(word) + 1
    return Example((" ".join(words),), tuple(marks), tuple(spans))


def spread(tag: str, parts: int) -> list[str]:
    """Spread the BIO or BIOES tag of one word over `parts` parts of it."""
    if parts <= 1:
        return [tag] * parts
    prefix, _, name = tag.partition("-")
    inside = f"I-{name}"
    match prefix:
        case "B":
            return [tag] + [inside] * (parts - 1)
        case "S":
            return [f"B-{name}"] + [inside] * (parts - 2) + [f"E-{name}"]
        case "E":
            return [inside] * (parts - 1) + [tag]
        case _:
            return [tag] * parts


# --- readers: each yields a row and where it stands -------------------------------------------------------------


def _rows(spec: TaskSpec, split: str) -> Iterator[tuple[dict[str, Any], str]]:
    data = spec.data
    source = getattr(data, split)
    match data:
        case HubData():
            return _hub_rows(data, source)
        case LinesData():
            return _line_rows(source)
        case ConllData():
            return _conll_rows(source)
        case TableData(format="jsonl"):
            return _json_rows(source)
        case TableData():
            return _table_rows(source, data)


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the numbered lines of a UTF-8 file without their ends."""
    try:
        with path.open("rb") as file:
            for number, raw in enumerate(file, start=1):
                try:
                    yield number, raw.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
                except UnicodeDecodeError as error:
                    raise DataError(
                        f"{path}, line {number}: not UTF-8: {error.reason} at byte {error.start}"
                    ) from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error


_QUOTES = "if quotes are ordinary characters in this file, say 'quoting: none' in the spec"


def _table_rows(path: Path, data: TableData) -> Iterator[tuple[dict[str, Any], str]]:
    reader = csv.reader(
        (line + "\n" for _, line in _lines(path)),
        delimiter="\t" if data.format == "tsv" else ",",
        quoting=csv.QUOTE_NONE if data.quoting == "none" else csv.QUOTE_MINIMAL,
        strict=True,
    )
    before = 0
    try:
        header = next(reader, None)
        if header is None:
            raise DataError(f"{path} is empty; its first line must name the columns")
        twice = [name for name in header if header.count(name) > 1]
        if twice:
            raise DataError(f"{path}, line 1: column {twice[0]!r} is named twice")
        before = reader.line_num
        for row in reader:
            first, before = before + 1, reader.line_num
            where = f"{path}, line {first}"
            if before > first:
                raise DataError(f"{where}: a quoted field runs on to line {before}; {_QUOTES}")
            if row and len(row) != len(header):
                raise DataError(f"{where}: {len(row)} fields, but the header names {len(header)}")
            if row:
                yield dict(zip(header, row, strict=True)), where
    except csv.Error as error:
        advice = f"; {_QUOTES}" if data.quoting == "minimal" else ""
        raise DataError(f"{path}, line {before + 1}: {error}{advice}") from error


def _json_rows(path: Path) -> Iterator[tuple[dict[str, Any], str]]:
    for number, line in _lines(path):
        where = f"{path}, line {number}"
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where}: not JSON: {error}") from error
        if not isinstance(row, dict):
            raise DataError(f"{where}: not a JSON object")
        yield row, where


def _line_rows(paths: dict[str, Path]) -> Iterator[tuple[dict[str, Any], str]]:
    columns = {name: [line for _, line in _lines(path)] for name, path in paths.items()}
    counts = {name: len(lines) for name, lines in columns.items()}
    if len(set(counts.values())) > 1:
        raise DataError(
            "parallel files need the same number of lines, but "
            + ", ".join(f"{paths[name]} has {count}" for name, count in counts.items())
        )
    files = ", ".join(str(path) for path in paths.values())
    for number, values in enumerate(zip(*columns.values(), strict=True), start=1):
        yield dict(zip(columns, values, strict=True)), f"{files}, line {number}"


def _conll_rows(path: Path) -> Iterator[tuple[dict[str, Any], str]]:
    tokens: list[str] = []
    tags: list[str] = []
    start = 1
    for number, line in _lines(path):
        fields = line.split()
        if len(fields) == 1:
            raise DataError(f"{path}, line {number}: {line!r} has no tag; a line is a token and its tag")
        if fields:
            if not tokens:
                start = number
            tokens.append(fields[0])
            tags.append(fields[-1])
        elif tokens:
            yield {"tokens": tokens, "tags": tags}, f"{path}, line {start}"
            tokens, tags = [], []
    if tokens:
        yield {"tokens": tokens, "tags": tags}, f"{path}, line {start}"


def _hub_rows(data: HubData, split: str) -> Iterator[tuple[dict[str, Any], str]]:
    from datasets import ClassLabel, Sequence, load_dataset

    name = f"{data.dataset}/{data.config}" if data.config else data.dataset
    try:
        table = load_dataset(data.dataset, data.config, split=split, revision=data.revision)
    except Exception as error:  # datasets raises many types, all with a telling message
        reason = " ".join(str(error).split())
        raise DataError(f"the data set {name}, split {split!r}, cannot be loaded: {reason}") from error

    def plain(feature: Any, value: Any) -> Any:
        if isinstance(feature, ClassLabel):
            return feature.int2str(value)
        if isinstance(feature, Sequence) and isinstance(feature.feature, ClassLabel):
            return [feature.feature.int2str(item) for item in value]
        return value

    for number, row in enumerate(table):
        where = f"{name}[{split}], row {number}"
        try:
            yield {key: plain(table.features[key], value) for key, value in row.items()}, where
        except ValueError as error:  # GLUE marks a hidden label with -1
            raise DataError(f"{where}: {error}") from error

"""The task spec: a YAML file that says what a task is and where its data lies.

    name: sentiment
    kind: classification          # classification | regression | tagging
    text: [sentence1]             # one text column, or two for sentence pairs
    label: label
    metric: accuracy
    data:
      format: tsv
      train: glue/sst2/train.tsv  # relative to the spec file
      dev: glue/sst2/dev.tsv
      test: glue/sst2/test.tsv    # optional; training reads neither its rows nor its labels

A tagging task may have `structure: crf`: its labels are then chosen together, by a linear-chain CRF in which
transitions against BIO or BIOES are impossible. It may also name types of slots that the metrics leave out:
`ignore: [city]`.

A new task is such a file and its data; no line of code.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Discriminator, Field, ValidationError, field_validator, model_validator

from espalier.contract import OFFSETS, TASK_NAME, Kind, Structure
from espalier.errors import SpecError

METRICS: dict[Kind, tuple[str, ...]] = {
    Kind.CLASSIFICATION: ("accuracy", "f1", "macro_f1", "matthews"),
    Kind.REGRESSION: ("pearson", "spearman"),
    Kind.TAGGING: ("slot_f1",),
}
"""Metrics by kind of task; in all of them more is better."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class TableData(_Strict):
    """Rows in files: TSV and CSV with a header, or one JSON object per line."""

    format: Literal["tsv", "csv", "jsonl"]
    train: Path
    dev: Path
    test: Path | None = None
    quoting: Literal["minimal", "none"] = Field(
        "minimal", description="none: a quote in a TSV or CSV field is an ordinary character, as in GLUE's own files"
    )

    @property
    def columns(self) -> None:
        """Columns are known only from the files."""


class LinesData(_Strict):
    """Parallel files, one per column, whose n-th lines belong together (SNIPS' seq.in, seq.out and label)."""

    format: Literal["lines"]
    train: dict[str, Path]
    dev: dict[str, Path]
    test: dict[str, Path] | None = None

    @model_validator(mode="after")
    def _same_columns(self) -> Self:
        for name, split in (("dev", self.dev), ("test", self.test)):
            if split is not None and set(self.train) != set(split):
                raise ValueError(f"train has the columns {sorted(self.train)}, {name} has {sorted(split)}")
        return self

    @property
    def columns(self) -> set[str]:
        """Names of the columns."""
        return set(self.train)


class ConllData(_Strict):
    """One token and its tag per line, columns separated by tab or space, a blank line between sentences."""

    format: Literal["conll"]
    train: Path
    dev: Path
    test: Path | None = None

    @property
    def columns(self) -> set[str]:
        """Names of the columns."""
        return {"tokens", "tags"}


class HubData(_Strict):
    """A data set that `datasets.load_dataset` loads."""

    format: Literal["hub"]
    dataset: str
    config: str | None = None
    revision: str | None = None
    train: str = "train"
    dev: str = "validation"
    test: str | None = None

    @property
    def columns(self) -> None:
        """Columns are known only from the data set."""


Data = Annotated[TableData | LinesData | ConllData | HubData, Discriminator("format")]


def _label(label: Any) -> str:
    if isinstance(label, bool):
        raise ValueError(f"YAML reads one of the labels as {str(label).lower()}; put quotes around yes, no, on and off")
    return label if isinstance(label, str) else str(label)


class TaskSpec(_Strict):
    """One task: its name, kind, columns, labels, metric and data."""

    name: str
    kind: Kind
    text: tuple[str, ...] = Field(min_length=1, max_length=2)
    label: str
    labels: tuple[str, ...] | None = Field(None, description="order of the labels; default: sorted, from train alone")
    positive: str | None = Field(None, description="the label that F1 counts; needed by metric f1 alone")
    metric: str
    structure: Structure = Structure.SOFTMAX
    ignore: tuple[str, ...] = Field((), description="types of slots, or labels of such, that the metrics leave out")
    data: Data

    @field_validator("name")
    @classmethod
    def _name(cls, name: str) -> str:
        if not TASK_NAME.fullmatch(name):
            raise ValueError(f"{name!r} is not a task name: use lower case, digits and single underscores")
        if name == OFFSETS:
            raise ValueError(f"{name!r} is taken: the ensemble has an output of that name")
        return name

    @field_validator("text", mode="before")
    @classmethod
    def _one_column(cls, text: Any) -> Any:
        return [text] if isinstance(text, str) else text

    @field_validator("positive", mode="before")
    @classmethod
    def _positive_string(cls, positive: Any) -> Any:
        return _label(positive) if isinstance(positive, int) else positive

    @field_validator("labels", mode="before")
    @classmethod
    def _label_strings(cls, labels: Any) -> Any:
        if not isinstance(labels, list):
            return labels
        strings = [_label(label) for label in labels]
        twice = sorted({label for label in strings if strings.count(label) > 1})
        if twice:
            raise ValueError(f"label {twice[0]!r} is listed twice")
        return strings

    @model_validator(mode="after")
    def _fits_kind(self) -> Self:
        known = METRICS[self.kind]
        if self.metric not in known:
            raise ValueError(f"metric {self.metric!r} does not measure a {self.kind} task; use {' or '.join(known)}")
        if self.kind is Kind.REGRESSION and self.labels is not None:
            raise ValueError("a regression task has no labels; remove 'labels'")
        if self.kind is Kind.TAGGING and len(self.text) == 2:
            raise ValueError("a tagging task has one text column, not two")
        if self.kind is not Kind.TAGGING and (self.structure is Structure.CRF or self.ignore):
            field = "ignore" if self.ignore else "structure: crf"
            raise ValueError(f"'{field}' is for tagging tasks; remove it from this {self.kind} task")
        if (self.metric == "f1") != (self.positive is not None):
            raise ValueError("metric f1 needs 'positive', the label that it counts, and no other metric has one")
        if self.labels is not None and self.positive is not None and self.positive not in self.labels:
            raise ValueError(f"'positive' is {self.positive!r}, which is not one of the labels {list(self.labels)}")
        columns = self.data.columns
        if columns is not None:
            for column in (*self.text, self.label):
                if column not in columns:
                    raise ValueError(f"the data has no column {column!r}; its columns are {sorted(columns)}")
        return self

    def with_paths(self, change: Callable[[Path], Path]) -> "TaskSpec":
        """Return a copy whose data paths went through `change`."""

        def changed(paths: Any) -> Any:
            return (
                {column: change(path) for column, path in paths.items()} if isinstance(paths, dict) else change(paths)
            )

        if isinstance(self.data, HubData):
            return self
        given = [split for split in ("train", "dev", "test") if getattr(self.data, split) is not None]
        splits = {split: changed(getattr(self.data, split)) for split in given}
        return self.model_copy(update={"data": self.data.model_copy(update=splits)})

    @property
    def pair(self) -> bool:
        """Whether the task is about two sentences."""
        return len(self.text) == 2


def read_yaml(path: Path, what: str) -> Any:
    """Return the content of a YAML file, in messages called `what`; raise SpecError if it cannot be read."""
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise SpecError(f"{path}: there is no such {what}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(f"{path} cannot be read: {error}") from error
    except yaml.YAMLError as error:
        raise SpecError(f"{path} is not YAML: {' '.join(str(error).split())}") from error


def load_spec(path: Path, data: Path | None = None) -> TaskSpec:
    """Read a task spec and make its data paths absolute: they are relative to `data`, or to the spec file itself.

    Raises SpecError with one sentence if the spec is wrong.
    """
    content = read_yaml(path, "spec file")
    if not isinstance(content, dict):
        raise SpecError(f"{path}: a spec is a mapping with name, kind, text, label, metric and data")
    try:
        spec = TaskSpec.model_validate(content)
    except ValidationError as error:
        raise SpecError(f"{path}: {_sentence(error)}") from error
    home = (data or path.parent).resolve()
    return spec.with_paths(lambda path: home / path)


def dump_spec(spec: TaskSpec, home: Path) -> str:
    """Return the YAML of a spec file in the folder `home`, which `load_spec` reads as `spec`."""
    portable = spec.with_paths(lambda data: Path(os.path.relpath(data, home)))
    return yaml.safe_dump(portable.model_dump(mode="json", exclude_defaults=True), sort_keys=False, allow_unicode=True)


def _sentence(error: ValidationError) -> str:
    problems = []
    for problem in error.errors():
        where = ".".join(str(part) for part in problem["loc"])
        what = problem["msg"].removeprefix("Value error, ")
        if problem["type"].startswith("union_tag"):  # pydantic's own words are about discriminators
            what = "'format' must be tsv, csv, jsonl, lines, conll or hub"
        problems.append(f"{where}: {what}" if where else what)
    return "; ".join(problems)

"""Task specs: every kind of data is accepted, every mistake is one sentence that names the file and the remedy."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from espalier.contract import Kind, Structure
from espalier.errors import SpecError
from espalier.spec import METRICS, ConllData, HubData, LinesData, TableData, TaskSpec, load_spec

ROOT = Path(__file__).resolve().parent.parent

SPEC: dict[str, Any] = {
    "name": "mood",
    "kind": "classification",
    "text": ["sentence"],
    "label": "mood",
    "metric": "accuracy",
    "data": {"format": "tsv", "train": "train.tsv", "dev": "dev.tsv"},
}
LINES = {
    "format": "lines",
    "train": {"words": "train/in", "slots": "train/out"},
    "dev": {"words": "dev/in", "slots": "dev/out"},
}
CONLL = {"format": "conll", "train": "train.txt", "dev": "dev.txt"}
TAGGING = {"kind": "tagging", "text": "tokens", "label": "tags", "metric": "slot_f1"}


def write(folder: Path, **changes: Any) -> Path:
    """Write SPEC with `changes`; None takes a field out."""
    content = {key: value for key, value in {**SPEC, **changes}.items() if value is not None}
    path = folder / "mood.yaml"
    path.write_text(yaml.safe_dump(content, allow_unicode=True))
    return path


def refusal(path: Path) -> str:
    """Return why the spec at `path` is refused, in one line that begins with its name."""
    with pytest.raises(SpecError) as caught:
        load_spec(path)
    message = str(caught.value)
    assert message.startswith(str(path))
    assert "\n" not in message
    return message.removeprefix(str(path))


@pytest.mark.parametrize("form", ["tsv", "csv", "jsonl"])
def test_tables_lie_beside_the_spec(form: str, tmp_path: Path) -> None:
    data = {"format": form, "train": f"sub/train.{form}", "dev": f"dev.{form}"}
    spec = load_spec(write(tmp_path, data=data))
    assert isinstance(spec.data, TableData)
    assert (spec.data.train, spec.data.dev) == (tmp_path / "sub" / f"train.{form}", tmp_path / f"dev.{form}")
    assert spec.data.quoting == "minimal"


def test_parallel_files_are_made_absolute_by_column(tmp_path: Path) -> None:
    spec = load_spec(write(tmp_path, **{**TAGGING, "text": "words", "label": "slots"}, data=LINES))
    assert isinstance(spec.data, LinesData)
    assert spec.data.train == {"words": tmp_path / "train/in", "slots": tmp_path / "train/out"}


def test_conll_files_have_tokens_and_tags(tmp_path: Path) -> None:
    spec = load_spec(write(tmp_path, **TAGGING, data=CONLL))
    assert isinstance(spec.data, ConllData)
    assert spec.data.dev == tmp_path / "dev.txt"


def test_a_hub_data_set_has_the_usual_splits(tmp_path: Path) -> None:
    spec = load_spec(write(tmp_path, data={"format": "hub", "dataset": "glue", "config": "sst2"}))
    assert isinstance(spec.data, HubData)
    assert (spec.data.dataset, spec.data.config, spec.data.train, spec.data.dev) == (
        "glue", "sst2", "train", "validation",
    )  # fmt: skip


@pytest.mark.parametrize(("text", "pair"), [("a", False), (["a"], False), (["a", "b"], True)])
def test_text_is_one_column_or_two(text: Any, pair: bool, tmp_path: Path) -> None:
    spec = load_spec(write(tmp_path, text=text))
    assert spec.text == tuple(text)
    assert spec.pair is pair


def test_numeric_labels_are_text(tmp_path: Path) -> None:
    spec = load_spec(write(tmp_path, labels=[1, 0], metric="f1", positive=1))
    assert (spec.labels, spec.positive) == (("1", "0"), "1")


@pytest.mark.parametrize(("kind", "metric"), [(kind, metric) for kind in Kind for metric in METRICS[kind]])
def test_every_kind_takes_its_metrics(kind: Kind, metric: str, tmp_path: Path) -> None:
    positive = "good" if metric == "f1" else None
    spec = load_spec(write(tmp_path, kind=str(kind), metric=metric, positive=positive))
    assert (spec.kind, spec.metric, spec.positive) == (kind, metric, positive)


def test_a_data_folder_replaces_the_specs_own(tmp_path: Path) -> None:
    spec = load_spec(write(tmp_path), tmp_path / "elsewhere")
    assert isinstance(spec.data, TableData)
    assert spec.data.train == tmp_path / "elsewhere" / "train.tsv"


def test_absolute_paths_stay(tmp_path: Path) -> None:
    data = {**SPEC["data"], "train": "/corpora/train.tsv"}
    spec = load_spec(write(tmp_path, data=data), tmp_path / "elsewhere")
    assert isinstance(spec.data, TableData)
    assert (spec.data.train, spec.data.dev) == (Path("/corpora/train.tsv"), tmp_path / "elsewhere" / "dev.tsv")


def test_a_relative_spec_file_gives_absolute_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path)
    monkeypatch.chdir(tmp_path)
    spec = load_spec(Path("mood.yaml"))
    assert isinstance(spec.data, TableData)
    assert spec.data.train == tmp_path / "train.tsv"


@pytest.mark.parametrize(
    ("data", "test"),
    [
        ({**SPEC["data"], "test": "sub/test.tsv"}, lambda home: home / "sub/test.tsv"),
        ({**CONLL, "test": "test.txt"}, lambda home: home / "test.txt"),
        (
            {**LINES, "test": {"words": "t/in", "slots": "t/out"}},
            lambda home: {"words": home / "t/in", "slots": home / "t/out"},
        ),
        ({"format": "hub", "dataset": "glue", "test": "test"}, lambda home: "test"),
        (SPEC["data"], lambda home: None),
    ],
    ids=["table", "conll", "lines", "hub", "none"],
)
def test_a_test_split_is_optional(data: dict[str, Any], test: Callable[[Path], Any], tmp_path: Path) -> None:
    columns = {"lines": ("words", "slots")}.get(data["format"], ("tokens", "tags"))
    spec = load_spec(write(tmp_path, **{**TAGGING, "text": columns[0], "label": columns[1]}, data=data))
    assert spec.data.test == test(tmp_path)


def test_a_tagging_task_may_have_a_crf_and_ignore_slots(tmp_path: Path) -> None:
    spec = load_spec(write(tmp_path, **TAGGING, data=CONLL, structure="crf", ignore=["city", "B-day"]))
    assert (spec.structure, spec.ignore) == (Structure.CRF, ("city", "B-day"))
    assert TaskSpec.model_validate_json(spec.model_dump_json()) == spec
    assert load_spec(write(tmp_path)).structure is Structure.SOFTMAX


def test_a_spec_survives_json(tmp_path: Path) -> None:
    spec = load_spec(write(tmp_path, labels=["good", "bad"]))
    assert TaskSpec.model_validate_json(spec.model_dump_json()) == spec


SHIPPED = sorted([*ROOT.glob("training/specs/*.yaml"), *ROOT.glob("demo/tasks/*.yaml")])


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_the_specs_that_come_along_load(path: Path) -> None:
    assert load_spec(path).name == path.stem


def test_there_are_specs_of_every_kind_to_start_from() -> None:
    assert {load_spec(path).kind for path in SHIPPED} == set(Kind)


# --- mistakes ---------------------------------------------------------------------------------------------------


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    assert "there is no such spec file" in refusal(tmp_path / "none.yaml")


def test_a_folder_is_no_spec(tmp_path: Path) -> None:
    assert "cannot be read" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        pytest.param(b"name: [unclosed\nkind: x", "is not YAML: .*line 2", id="not YAML"),
        pytest.param(b"name: a\n\tkind: b", "is not YAML: .*line 2", id="a tab"),
        pytest.param(b"name: a\0b", "is not YAML", id="NUL"),
        pytest.param(b"name: \xff", "cannot be read: 'utf-8' codec", id="not UTF-8"),
        pytest.param(b"- a\n- b", "a spec is a mapping with name, kind,", id="a list"),
        pytest.param(b"", "a spec is a mapping with name, kind,", id="empty"),
        pytest.param(b"!!python/object:os.system {}", "is not YAML", id="an object"),
    ],
)
def test_what_is_no_mapping_is_refused(content: bytes, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "spec.yaml"
    path.write_bytes(content)
    assert re.search(reason, refusal(path))


@pytest.mark.parametrize("field", ["name", "kind", "text", "label", "metric", "data"])
def test_a_missing_field_is_named(field: str, tmp_path: Path) -> None:
    assert f"{field}: Field required" in refusal(write(tmp_path, **{field: None}))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        pytest.param({"kind": "ranking"}, "kind: Input should be 'classification', 'regression' or", id="kind"),
        pytest.param(
            {"metric": "pearson"},
            "metric 'pearson' does not measure a classification task; use accuracy or f1",
            id="metric of another kind",
        ),
        pytest.param({"labels": ["a", "b", "a"]}, "labels: label 'a' is listed twice", id="label twice"),
        pytest.param({"labels": [1, "1"]}, "labels: label '1' is listed twice", id="label twice as number"),
        pytest.param({"name": "My-Task"}, "name: 'My-Task' is not a task name: use lower case", id="bad name"),
        pytest.param({"name": "a__b"}, "is not a task name", id="two underscores"),
        pytest.param({"name": "../x"}, "is not a task name", id="a path"),
        pytest.param({"name": "offsets"}, "name: 'offsets' is taken", id="taken name"),
        pytest.param(
            {**TAGGING, "text": ["a", "b"]}, "a tagging task has one text column, not two", id="tagging of a pair"
        ),
        pytest.param({"structure": "crf"}, "'structure: crf' is for tagging tasks; remove it from this c", id="CRF"),
        pytest.param(
            {"kind": "regression", "metric": "pearson", "structure": "crf"},
            "'structure: crf' is for tagging tasks; remove it from this regression task",
            id="CRF of numbers",
        ),
        pytest.param({"ignore": ["good"]}, "'ignore' is for tagging tasks; remove it from this cl", id="ignored label"),
        pytest.param({**TAGGING, "data": CONLL, "structure": "hmm"}, "structure: .*'softmax' or 'crf'", id="structure"),
        pytest.param(
            {"data": {**LINES, "test": {"words": "x"}}},
            r"data.lines: train has the columns \['slots', 'words'\], test has \['words'\]",
            id="columns of test",
        ),
        pytest.param({"text": []}, "text: .*at least 1", id="no text"),
        pytest.param({"text": ["a", "b", "c"]}, "text: .*at most 2", id="three texts"),
        pytest.param({"metric": "f1"}, "metric f1 needs 'positive'", id="f1 without positive"),
        pytest.param({"positive": "good"}, "metric f1 needs 'positive'.*no other metric has", id="positive without f1"),
        pytest.param(
            {"metric": "f1", "positive": "good", "labels": ["bad", "fine"]},
            r"'positive' is 'good', which is not one of the labels \['bad', 'fine'\]",
            id="positive that is no label",
        ),
        pytest.param(
            {"kind": "regression", "metric": "pearson", "labels": ["a", "b"]},
            "a regression task has no labels; remove 'labels'",
            id="labels of numbers",
        ),
        pytest.param(
            {**TAGGING, "data": LINES}, r"no column 'tokens'; its columns are \['slots', 'words'\]", id="lines column"
        ),
        pytest.param(
            {**TAGGING, "label": "ner", "data": CONLL}, r"no column 'ner'; .* \['tags', 'tokens'\]", id="conll column"
        ),
        pytest.param(
            {"data": {**LINES, "dev": {"words": "x"}}},
            r"data.lines: train has the columns \['slots', 'words'\], dev has \['words'\]",
            id="columns of one split",
        ),
        pytest.param({"learning_rate": 1}, "learning_rate: Extra inputs are not permitted", id="extra field"),
        pytest.param({"data": {**SPEC["data"], "eval": "x"}}, "data.tsv.eval: Extra inputs", id="extra data field"),
        pytest.param(
            {"data": {"format": "xml", "train": "a", "dev": "b"}}, "data: 'format' must be tsv, csv, jsonl", id="format"
        ),
        pytest.param({"data": {"train": "a", "dev": "b"}}, "data: 'format' must be tsv, csv, jsonl", id="no format"),
        pytest.param({"data": {"format": "tsv", "train": "a"}}, "data.tsv.dev: Field required", id="no dev"),
        pytest.param({"data": "train.tsv"}, "data: ", id="data is a name"),
        pytest.param(
            {"data": {**SPEC["data"], "quoting": "all"}}, "data.tsv.quoting: .*'minimal' or 'none'", id="quoting"
        ),
    ],
)
def test_a_mistake_is_one_sentence(changes: dict[str, Any], reason: str, tmp_path: Path) -> None:
    assert re.search(reason, refusal(write(tmp_path, **changes)))


def test_all_mistakes_are_told_at_once(tmp_path: Path) -> None:
    message = refusal(write(tmp_path, name="Bad Name", kind="ranking", metric=None))
    assert all(part in message for part in ("name: ", "kind: ", "metric: "))


@pytest.mark.parametrize("line", ["labels: [yes, no]", "labels: [on, off]"])
def test_labels_that_yaml_takes_for_booleans_are_refused(line: str, tmp_path: Path) -> None:
    spec = tmp_path / "task.yaml"
    spec.write_text(
        "name: task\nkind: classification\ntext: text\nlabel: label\nmetric: accuracy\n"
        f"{line}\ndata: {{format: tsv, train: train.tsv, dev: dev.tsv}}\n"
    )
    with pytest.raises(SpecError, match="put quotes around yes, no, on and off"):
        load_spec(spec)

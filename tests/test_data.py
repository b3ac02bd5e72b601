"""Task data: each format is read as it stands, and a bad row is named by file, line and what is wrong."""

import csv
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from espalier.errors import DataError, SpecError
from espalier.spec import TaskSpec, load_spec
from training.data import Example, load_data, load_split

KINDS = {
    "classification": {"kind": "classification", "text": ["text"], "label": "label", "metric": "accuracy"},
    "pair": {"kind": "classification", "text": ["text", "other"], "label": "label", "metric": "accuracy"},
    "regression": {"kind": "regression", "text": ["text"], "label": "label", "metric": "pearson"},
    "tagging": {"kind": "tagging", "text": ["tokens"], "label": "tags", "metric": "slot_f1"},
}
Content = str | bytes


def put(path: Path, content: Content) -> None:
    path.write_bytes(content.encode() if isinstance(content, str) else content)


def task(
    folder: Path, form: str, train: Content, dev: Content | None = None, kind: str = "classification", **changes: Any
) -> TaskSpec:
    """Write a task in one file per split; dev is train unless given."""
    put(folder / f"train.{form}", train)
    put(folder / f"dev.{form}", train if dev is None else dev)
    data = {"format": form, "train": f"train.{form}", "dev": f"dev.{form}", **changes.pop("data", {})}
    return spec_of(folder, {**KINDS[kind], **changes, "data": data})


def spec_of(folder: Path, content: dict[str, Any]) -> TaskSpec:
    put(folder / "task.yaml", json.dumps({"name": "task", **content}))  # JSON is YAML
    return load_spec(folder / "task.yaml")


def read(spec: TaskSpec) -> list[tuple[Any, Any]]:
    """Return texts and label of every row of train; one text without its tuple."""
    return [
        (example.texts[0] if len(example.texts) == 1 else example.texts, example.label)
        for example in load_split(spec, "train")
    ]


def refusal(spec: TaskSpec) -> str:
    """Return why the data is refused, in one line."""
    with pytest.raises(DataError) as caught:
        load_data(spec)
    message = str(caught.value)
    assert "\n" not in message
    return message


# --- what is read -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "rows"),
    [
        pytest.param("text\tlabel\na b\tx\nc\ty\n", [("a b", "x"), ("c", "y")], id="plain"),
        pytest.param("text\tlabel\na\tx\nc\ty", [("a", "x"), ("c", "y")], id="no end of line at the end"),
        pytest.param("label\tid\ttext\nx\t1\ta\n", [("a", "x")], id="columns by name"),
        pytest.param('text\tlabel\n"a\tb"\tx\n"say ""hi"""\ty\n', [("a\tb", "x"), ('say "hi"', "y")], id="quotes"),
        pytest.param('text\tlabel\n5" disk\tx\n', [('5" disk', "x")], id="quote inside a field"),
        pytest.param(b"\xef\xbb\xbftext\tlabel\na\tx\n", [("a", "x")], id="BOM"),
        pytest.param("text\tlabel\r\na\tx\r\nb\ty\r\n", [("a", "x"), ("b", "y")], id="CRLF"),
        pytest.param("text\tlabel\n\tx\n  \ty\n", [("", "x"), ("", "y")], id="empty text"),
        pytest.param("text\tlabel\n\na\tx\n\n\nb\ty\n\n", [("a", "x"), ("b", "y")], id="blank lines"),
        pytest.param("text\tlabel\n a \t x \n", [("a", "x")], id="space around"),
        pytest.param("text\tlabel\nnaïve 👍 cafe\u0301\tx\n", [("naïve 👍 cafe\u0301", "x")], id="Unicode"),
        pytest.param("text\tlabel\na\u2028b\x0cc\x85d\tx\n", [("a\u2028b\x0cc\x85d", "x")], id="odd line ends"),
    ],
)
def test_tsv_is_read(content: Content, rows: list[Any], tmp_path: Path) -> None:
    assert read(task(tmp_path, "tsv", content)) == rows


def test_csv_is_read(tmp_path: Path) -> None:
    content = 'text,other,label\n"a, b",c,x\n"""q""",,y\n'
    assert read(task(tmp_path, "csv", content, kind="pair")) == [(("a, b", "c"), "x"), (('"q"', ""), "y")]


def test_without_quoting_a_quote_is_a_character(tmp_path: Path) -> None:
    content = 'text\tlabel\n"open\tx\nclose"\ty\n"both" sides\tx\n'
    spec = task(tmp_path, "tsv", content, data={"quoting": "none"})
    assert read(spec) == [('"open', "x"), ('close"', "y"), ('"both" sides', "x")]


def test_json_lines_are_read(tmp_path: Path) -> None:
    content = '{"text": "a", "label": 1, "more": null}\n\n{"text": ["b", "c"], "label": true}\n{"label":"x","text":""}'
    assert read(task(tmp_path, "jsonl", content)) == [("a", "1"), ("b c", "True"), ("", "x")]


def test_numbers_are_read_in_every_notation(tmp_path: Path) -> None:
    content = "text\tlabel\na\t0.5\nb\t-3\nc\t1e-2\nd\t 7 \n"
    assert read(task(tmp_path, "tsv", content, kind="regression")) == [("a", 0.5), ("b", -3), ("c", 0.01), ("d", 7)]


def test_tagged_words_keep_their_places(tmp_path: Path) -> None:
    content = '{"tokens": ["to", "New", "York", "!"], "tags": "O B-city I-city O"}\n'
    [example] = load_split(task(tmp_path, "jsonl", content, kind="tagging"), "train")
    assert example == Example(("to New York !",), ("O", "B-city", "I-city", "O"), ((0, 2), (3, 6), (7, 11), (12, 13)))


def test_parallel_files_are_read_by_line(tmp_path: Path) -> None:
    for split in ("train", "dev"):
        put(tmp_path / f"{split}.in", "\ufeffplay  a song\r\nstop\r\n")
        put(tmp_path / f"{split}.out", "O O B-what\nO")
    files = {split: {"tokens": f"{split}.in", "tags": f"{split}.out"} for split in ("train", "dev")}
    spec = spec_of(tmp_path, {**KINDS["tagging"], "data": {"format": "lines", **files}})
    assert read(spec) == [("play a song", ("O", "O", "B-what")), ("stop", ("O",))]


@pytest.mark.parametrize(
    "content",
    [
        "to O\nParis B-city\n\nhi O\n",
        "to\tO\nParis\tB-city\n\n\n\nhi\tO",
        "\n\nto PRP x O\r\nParis NNP y B-city\r\n\r\nhi UH z O\r\n\r\n",
    ],
    ids=["spaces", "tabs", "more columns"],
)
def test_conll_is_read(content: str, tmp_path: Path) -> None:
    assert read(task(tmp_path, "conll", content, kind="tagging")) == [("to Paris", ("O", "B-city")), ("hi", ("O",))]


FIELDS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\n\r"), max_size=20)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(FIELDS, min_size=1, max_size=5))
def test_what_a_csv_writer_wrote_is_read_back(tmp_path: Path, texts: list[str]) -> None:
    for form, delimiter in (("tsv", "\t"), ("csv", ",")):
        out = io.StringIO()
        writer = csv.writer(out, delimiter=delimiter, lineterminator="\n")
        writer.writerows([("text", "label"), *((text, "x") for text in texts)])
        assert read(task(tmp_path, form, out.getvalue())) == [(text.strip(), "x") for text in texts]


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=20), min_size=1, max_size=5))
def test_json_lines_hold_any_text(tmp_path: Path, texts: list[str]) -> None:
    content = "".join(json.dumps({"text": text, "label": "x"}, ensure_ascii=False) + "\n" for text in texts)
    assert read(task(tmp_path, "jsonl", content)) == [(text.strip(), "x") for text in texts]


# --- data sets --------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder that `datasets.load_dataset` will take for a data set."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "set").mkdir()
    return tmp_path / "set"


def hub_task(hub: Path, kind: str = "classification", **changes: Any) -> TaskSpec:
    return spec_of(hub.parent, {**KINDS[kind], "data": {"format": "hub", "dataset": str(hub), **changes}})


def test_a_data_set_is_read(hub: Path) -> None:
    put(hub / "train.csv", "text,label\na,x\nb,y\n")
    put(hub / "validation.csv", "text,label\nc,y\n")
    data = load_data(hub_task(hub))
    assert data.train == [Example(("a",), "x"), Example(("b",), "y")]
    assert data.dev == [Example(("c",), "y")]


def test_class_numbers_of_a_data_set_become_names(hub: Path) -> None:
    from datasets import ClassLabel, Dataset, Features, Sequence, Value

    features = Features(
        {
            "tokens": Sequence(Value("string")),
            "tags": Sequence(ClassLabel(names=["O", "B-x"])),
            "text": Value("string"),
            "label": ClassLabel(names=["bad", "good"]),
        }
    )
    rows = {"tokens": [["a", "b"], ["c"]], "tags": [[0, 1], [0]], "text": ["a", "b"], "label": [1, 0]}
    for split in ("train", "validation"):
        Dataset.from_dict(rows, features=features).to_parquet(hub / f"{split}.parquet")
    assert read(hub_task(hub)) == [("a", "good"), ("b", "bad")]
    assert read(hub_task(hub, "tagging")) == [("a b", ("O", "B-x")), ("c", ("O",))]


def test_a_hidden_label_is_named(hub: Path) -> None:
    from datasets import ClassLabel, Dataset, Features, Value

    features = Features({"text": Value("string"), "label": ClassLabel(names=["bad", "good"])})
    for split in ("train", "validation"):
        Dataset.from_dict({"text": ["a"], "label": [-1]}, features=features).to_parquet(hub / f"{split}.parquet")
    assert re.search(r"set\[train\], row 0: .*-1", refusal(hub_task(hub)))


def test_a_data_set_that_does_not_load_is_one_sentence(hub: Path) -> None:
    put(hub / "train.csv", "text,label\na,x\nb,y\n")
    assert re.search(r"set, split 'validation', cannot be loaded: .*validation", refusal(hub_task(hub)))
    missing = hub.parent / "none"
    assert f"the data set {missing}, split 'train', cannot be loaded" in refusal(hub_task(missing))


# --- bad rows ---------------------------------------------------------------------------------------------------

HEAD = "text\tlabel\nfine\tx\n"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        pytest.param(HEAD + "a\n", r", line 3: 1 fields, but the header names 2$", id="too few fields"),
        pytest.param(HEAD + "\n\na\tb\tc\n", r", line 5: 3 fields, but the header names 2$", id="too many fields"),
        pytest.param(HEAD.encode() + b"caf\xe9\tx\n", r", line 3: not UTF-8: .* at byte 3$", id="not UTF-8"),
        pytest.param(HEAD + "a\t\n", r", line 3: column 'label' is '', not a label$", id="no label"),
        pytest.param(HEAD + "a\tx\x85y\n", r", line 3: column 'label' is 'x\\x85y', not a label$", id="two-line label"),
        pytest.param("sentence\tlabel\na\tx\n", r", line 2: there is no column 'text'; .*'sentence'", id="no column"),
        pytest.param("text\ttext\tlabel\n", r", line 1: column 'text' is named twice$", id="column twice"),
        pytest.param("", r" is empty; its first line must name the columns$", id="empty file"),
        pytest.param("text\tlabel\n", r"the train split has no rows \(.*train\.tsv\)$", id="no rows"),
        pytest.param(
            HEAD + '"a\tx\nb"\tx\n', r", line 3: a quoted field runs on to line 4; .*quoting: none", id="over lines"
        ),
        pytest.param(HEAD + '"a\tx\nb\tx\n', r", line 3: .*'quoting: none'", id="quote up to the end"),
        pytest.param(HEAD + '"a" b\tx\n', r", line 3: .*'quoting: none'", id="text after a quote"),
        pytest.param('"text\tlabel\na\tx\n', r", line 1: .*'quoting: none'", id="quote in the header"),
        pytest.param(HEAD + "a\rb\tx\n", r", line 3: ", id="lone carriage return"),
        pytest.param(HEAD + "a" * 200_000 + "\tx\n", r", line 3: field larger than", id="endless field"),
    ],
)  # fmt: skip
def test_a_bad_row_of_a_table_is_named(content: Content, reason: str, tmp_path: Path) -> None:
    message = refusal(task(tmp_path, "tsv", content))
    assert str(tmp_path / "train.tsv") in message
    assert re.search(reason, message)


@pytest.mark.parametrize("number", ["high", "", "nan", "inf", "-Infinity", "1e999"])
def test_what_is_no_number_is_named(number: str, tmp_path: Path) -> None:
    message = refusal(task(tmp_path, "tsv", f"text\tlabel\na\t1\nb\t{number}\n", kind="regression"))
    assert message == f"{tmp_path}/train.tsv, line 3: column 'label' is {number!r}, not a number"


@pytest.mark.parametrize("number", ["null", "[1]", "NaN", "1" + "0" * 400, '"x"'], ids=lambda number: number[:5])
def test_what_is_no_number_in_json_is_named(number: str, tmp_path: Path) -> None:
    message = refusal(task(tmp_path, "jsonl", f'{{"text": "a", "label": {number}}}\n', kind="regression"))
    assert message.startswith(f"{tmp_path}/train.jsonl, line 1: column 'label' is ")
    assert message.endswith(", not a number")


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        pytest.param('{"text": "b"', "not JSON: ", id="cut off"),
        pytest.param("[" * 100_000, "not JSON: ", id="too deep"),
        pytest.param('["b", "x"]', "not a JSON object", id="a list"),
        pytest.param('{"text": "b"}', r"there is no column 'label'; the columns are \['text'\]", id="no label"),
        pytest.param('{"text": 7, "label": "x"}', "column 'text' is 7, not text", id="number as text"),
        pytest.param('{"text": null, "label": "x"}', "column 'text' is None, not text", id="null as text"),
        pytest.param('{"text": ["a", 1], "label": "x"}', r"column 'text' is \['a', 1\], not text", id="mixed words"),
        pytest.param('{"text": "b", "label": null}', "column 'label' is None, not a label", id="null as label"),
        pytest.param('{"text": "b", "label": 0.5}', "column 'label' is 0.5, not a label", id="fraction as label"),
        pytest.param('{"text": "b", "label": "x\\ny"}', "column 'label' is 'x.ny', not a label", id="two-line label"),
        pytest.param('{"text": "a\\ud83d", "label": "x"}', "column 'text' is not Unicode: ", id="half an emoji"),
        pytest.param('{"text": "a", "label": "\\ud83d"}', "column 'label' is not Unicode: ", id="half a label"),
    ],
)
def test_a_bad_json_line_is_named(line: str, reason: str, tmp_path: Path) -> None:
    message = refusal(task(tmp_path, "jsonl", f'{{"text": "a", "label": "x"}}\n{line}\n'))
    assert re.search(rf"train\.jsonl, line 2: {reason}", message)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        pytest.param({"tokens": ["a", "b"], "tags": ["O"]}, "2 tokens, but 1 tags", id="count"),
        pytest.param({"tokens": "a b", "tags": "O O O"}, "2 tokens, but 3 tags", id="count in strings"),
        pytest.param({"tokens": ["a", ""], "tags": ["O", "O"]}, r"tokens are \['a', ''\], not a list", id="no word"),
        pytest.param({"tokens": ["a"], "tags": [3]}, r"tags are \[3\], not a list", id="number as tag"),
        pytest.param({"tokens": [], "tags": []}, "there are no tokens; remove the row", id="no words"),
        pytest.param({"tokens": 5, "tags": ["O"]}, "tokens are 5, not a list", id="number as words"),
        pytest.param({"tokens": ["\ud83d"], "tags": ["O"]}, "is not Unicode", id="half an emoji"),
    ],
)
def test_bad_tags_are_named(row: dict[str, Any], reason: str, tmp_path: Path) -> None:
    content = json.dumps({"tokens": ["a"], "tags": ["O"]}) + "\n" + json.dumps(row)
    message = refusal(task(tmp_path, "jsonl", content, kind="tagging"))
    assert re.search(rf"train\.jsonl, line 2: .*{reason}", message)


def test_a_token_without_its_tag_is_named(tmp_path: Path) -> None:
    message = refusal(task(tmp_path, "conll", "a O\n\nb O\nc\n", kind="tagging"))
    assert message.startswith(f"{tmp_path}/train.conll, line 4: 'c' has no tag")


def test_parallel_files_of_different_length_are_named(tmp_path: Path) -> None:
    put(tmp_path / "in", "a\nb\nc\n")
    put(tmp_path / "out", "x\ny\n")
    files = {split: {"text": "in", "label": "out"} for split in ("train", "dev")}
    spec = spec_of(tmp_path, {**KINDS["classification"], "data": {"format": "lines", **files}})
    message = refusal(spec)
    assert f"{tmp_path}/in has 3, {tmp_path}/out has 2" in message


def test_a_bad_line_of_parallel_files_is_named(tmp_path: Path) -> None:
    put(tmp_path / "in", "a\nb\n")
    put(tmp_path / "out", "x\n\n")
    files = {split: {"text": "in", "label": "out"} for split in ("train", "dev")}
    spec = spec_of(tmp_path, {**KINDS["classification"], "data": {"format": "lines", **files}})
    assert f"{tmp_path}/in, {tmp_path}/out, line 2: column 'label' is ''" in refusal(spec)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    spec = task(tmp_path, "tsv", HEAD)
    (tmp_path / "dev.tsv").unlink()
    assert refusal(spec) == f"{tmp_path}/dev.tsv cannot be read: No such file or directory"
    (tmp_path / "dev.tsv").mkdir()
    assert refusal(spec) == f"{tmp_path}/dev.tsv cannot be read: Is a directory"


def test_a_bad_row_of_dev_is_found_as_well(tmp_path: Path) -> None:
    assert f"{tmp_path}/dev.tsv, line 3: 1 fields" in refusal(task(tmp_path, "tsv", HEAD, HEAD + "a\n"))


# --- labels -----------------------------------------------------------------------------------------------------


def rows(*labels: str) -> str:
    return "text\tlabel\n" + "".join(f"text\t{label}\n" for label in labels)


def test_labels_come_from_train_alone_and_are_sorted(tmp_path: Path) -> None:
    assert load_data(task(tmp_path, "tsv", rows("z", "b", "z", "a"), rows("b"))).labels == ("a", "b", "z")


def test_a_label_that_only_dev_has_is_named(tmp_path: Path) -> None:
    message = refusal(task(tmp_path, "tsv", rows("a", "b"), rows("a", "new")))
    assert "dev has the label 'new', which no row of train has; add such rows" in message


def test_a_tag_that_only_dev_has_is_named(tmp_path: Path) -> None:
    spec = task(tmp_path, "conll", "a O\nb B-x\n", "a B-y\n", kind="tagging")
    assert "dev has the label 'B-y', which no row of train has" in refusal(spec)


def test_the_specs_order_of_labels_is_kept(tmp_path: Path) -> None:
    assert load_data(task(tmp_path, "tsv", rows("a", "b"), labels=["b", "a"])).labels == ("b", "a")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        pytest.param({"labels": ["a"]}, "train has the label 'b', which the spec's labels leave out", id="left out"),
        pytest.param({"labels": ["a", "b", "c"]}, "lists the label 'c', but no row of train has it", id="unused"),
        pytest.param({"metric": "f1", "positive": "yes"}, "no row of train has the positive label 'yes'", id="f1"),
    ],
)
def test_labels_that_do_not_fit_the_data_are_named(changes: dict[str, Any], reason: str, tmp_path: Path) -> None:
    assert reason in refusal(task(tmp_path, "tsv", rows("a", "b"), **changes))


def test_a_single_label_cannot_be_learnt(tmp_path: Path) -> None:
    assert "train has the single label 'a'; nothing can be learnt" in refusal(task(tmp_path, "tsv", rows("a", "a")))


def test_numbers_have_no_labels(tmp_path: Path) -> None:
    assert load_data(task(tmp_path, "tsv", rows("1", "2"), rows("3"), kind="regression")).labels == ()


def test_a_sample_of_each_split_keeps_order_and_labels(tmp_path: Path) -> None:
    every = [f"text {i}\t{'rare' if i == 0 else 'ab'[i % 2]}" for i in range(200)]
    spec = task(tmp_path, "tsv", "\n".join(["text\tlabel", *every]), "\n".join(["text\tlabel", *every[1:]]))
    data = load_data(spec, max_train=50, max_dev=20)
    assert load_data(spec, max_train=50, max_dev=20) == data
    places = [int(example.texts[0].split()[1]) for example in data.train]
    assert len(places) == 50
    assert places == sorted(places)
    assert max(places) > 150, "not just the first rows"
    assert len(data.dev) == 20
    assert data.labels == ("a", "b", "rare"), "of the whole of train"


def tagged(folder: Path, train: str, **changes: Any) -> TaskSpec:
    return task(folder, "conll", train, kind="tagging", **changes)


def test_a_slot_to_ignore_is_a_type_or_a_label_of_train(tmp_path: Path) -> None:
    train = "a O\nb B-x\nc I-x\nd noun\n"
    for name in ("x", "B-x", "I-x", "noun"):
        load_data(tagged(tmp_path, train, ignore=[name]))
    for name in ("y", "O", "B-y"):
        message = refusal(tagged(tmp_path, train, ignore=[name]))
        assert message == (
            f"task task: 'ignore' names {name!r}, which no label of train has; its slots are ['noun', 'x']"
        )


def test_tags_that_a_crf_holds_to_be_impossible_are_counted_and_named(tmp_path: Path) -> None:
    train = "a B-x\nb I-x\n\nto O\nb I-x\n\nc I-x\n"
    assert load_data(tagged(tmp_path, train)).labels == ("B-x", "I-x", "O")
    assert refusal(tagged(tmp_path, train, structure="crf")) == (
        "task task: 2 of 3 rows of train break the scheme (BIO or BIOES) of their labels, the first of them row 2, "
        "'to b', where O is followed by I-x; mend them, or use structure: softmax"
    )
    ends = "a B-x\nb E-x\n\nc O\nb B-x\n"
    assert "'c b', where B-x is followed by its end; mend" in refusal(tagged(tmp_path, ends, structure="crf"))


# --- test -------------------------------------------------------------------------------------------------------


def test_training_reads_nothing_of_the_test_split(tmp_path: Path) -> None:
    plain = load_data(task(tmp_path, "tsv", rows("a", "b")))
    spec = task(tmp_path, "tsv", rows("a", "b"), data={"test": "test.tsv"})
    assert load_data(spec).digest() == plain.digest()  # the file is not even there
    put(tmp_path / "test.tsv", rows("new", "a"))
    assert load_data(spec).labels == ("a", "b")
    assert [example.label for example in load_split(spec, "test")] == ["new", "a"]


def test_a_test_split_that_the_spec_does_not_name_is_said(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"^task task: the spec names no test split; add 'test' to its data$"):
        load_split(task(tmp_path, "tsv", rows("a", "b")), "test")


# --- digest -----------------------------------------------------------------------------------------------------


def test_equal_data_elsewhere_has_the_same_digest(tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "there").mkdir()
    here = task(tmp_path / "here", "tsv", rows("a", "b"))
    there = task(tmp_path / "there", "csv", rows("a", "b").replace("\t", ","))
    assert load_data(here).digest() == load_data(there).digest()


@pytest.mark.parametrize(
    "train",
    [rows("a", "b", "b"), rows("b", "a", "a"), rows("a", "b"), rows("a", "b", "a").replace("text\tb", "Text\tb")],
    ids=["another label", "another order", "a row less", "another text"],
)
def test_other_data_has_another_digest(train: str, tmp_path: Path) -> None:
    before = load_data(task(tmp_path, "tsv", rows("a", "b", "a"), rows("a"))).digest()
    assert load_data(task(tmp_path, "tsv", train, rows("a"))).digest() != before


def test_a_row_that_moves_to_dev_changes_the_digest(tmp_path: Path) -> None:
    before = load_data(task(tmp_path, "tsv", rows("a", "b", "a"), rows("b"))).digest()
    assert load_data(task(tmp_path, "tsv", rows("a", "b"), rows("a", "b"))).digest() != before

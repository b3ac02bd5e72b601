"""Branch cards: what they tell is right, and the commands that they print make the very branch again."""

import json
import re
import shlex
import shutil
import sys
import typing
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from test_training import silent, write_task
from typer.testing import CliRunner

from espalier import cli
from espalier.branch import read_card
from espalier.contract import Kind
from espalier.encoder import Base
from espalier.errors import BranchError, DataError, SpecError
from espalier.spec import TaskSpec, dump_spec, load_spec
from training import card_plots
from training.activations import ActivationCache
from training.card import Card, check_place, make_card
from training.distill import Init, distill
from training.finetune import train
from training.markdown import code, escape, table
from training.trainer import Arguments

PNG = b"\x89PNG\r\n"
PICTURES = {Kind.CLASSIFICATION: "confusion.png", Kind.REGRESSION: "scatter.png", Kind.TAGGING: "slots.png"}
TEXTS = st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from("|\\`*_[]<>&~$#\n\r\t \u2028\x85\x0b\0"))


def make_branches(kind: Kind, base: Base, home: Path, arguments: Arguments, cache: bool = False) -> Path:
    """Train a teacher and distil a student; return the student's folder."""
    spec = load_spec(write_task(home, kind))
    kept = ActivationCache(home / ".activations") if cache else None
    train(spec, base, 1, 2, arguments, home / "branches" / "teacher", silent, kept)
    init = Init.PRETRAINED if cache else Init.TEACHER
    student = home / "branches" / "student"
    distill(home / "branches" / "teacher", base, 1, arguments, student, silent, None, kept, init)
    return student


def card_of(branch: Path, base: Base, **options: typing.Any) -> Card:
    options = {"out": branch.parent / "card", "rows": 5, "report": lambda what, done, total: None, **options}
    return make_card(branch, base, **options)


@pytest.fixture(scope="module", params=list(Kind))
def made(request: pytest.FixtureRequest, tiny: Base, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Card]:
    """A student of each kind, and its card."""
    branch = make_branches(
        request.param, tiny, tmp_path_factory.mktemp("card"), Arguments(2, 5e-3, 8, seed=2, max_train=50)
    )
    return branch, card_of(branch, tiny)


@pytest.fixture
def student(tiny: Base, tmp_path: Path) -> Path:
    return make_branches(Kind.CLASSIFICATION, tiny, tmp_path, Arguments(1, 1e-3, 8))


# --- the page ---------------------------------------------------------------------------------------------------


def cells(page: Path, heading: str) -> list[list[str]]:
    """Return the cells of the last table below `heading`, as a reader sees them."""
    section = page.read_text().split(f"\n## {heading}\n")[1].split("\n## ")[0]
    return rendered(section)


def rendered(markdown: str) -> list[list[str]]:
    tokens = MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(markdown)
    rows: list[list[str]] = []
    for place, token in enumerate(tokens):
        if token.type == "table_open":
            rows = []
        if token.type == "tr_open":
            rows.append([])
        if token.type in ("th_open", "td_open"):
            children = tokens[place + 1].children or []
            assert {child.type for child in children} <= {"text", "text_special", "strong_open", "strong_close"}
            rows[-1].append("".join(child.content for child in children))
    return rows


def test_a_card_has_its_pictures_and_every_section(made: tuple[Path, Card]) -> None:
    branch, card = made
    kind = read_card(branch).spec.kind
    names = {path.name for path in card.page.parent.iterdir()}
    assert names == {"card.md", "task.yaml", "epochs.png", "lengths.png", PICTURES[kind]}
    page = card.page.read_text()
    assert set(re.findall(r"!\[.*\]\((.*)\)", page)) == {name for name in names if name.endswith(".png")}
    assert all((card.page.parent / name).read_bytes().startswith(PNG) for name in names if name.endswith(".png"))
    for heading in ("Metric by epoch", "Worst mistakes", "Data", "How it was made"):
        assert f"\n## {heading}\n" in page


def test_the_scores_taken_anew_are_those_of_training(made: tuple[Path, Card]) -> None:
    branch, card = made
    assert card.metrics == pytest.approx(read_card(branch).metrics, abs=1e-5)
    assert card.doubts == ()
    assert "Note" not in card.page.read_text()


def test_the_kept_epoch_is_marked(made: tuple[Path, Card]) -> None:
    branch, card = made
    history, metric = read_card(branch).history, read_card(branch).spec.metric
    best = max(history, key=lambda entry: entry[metric])
    (row,) = [line for line in card.page.read_text().splitlines() if line.startswith("| **")]
    assert row.startswith(f"| **{best['epoch']:.0f}** |")
    assert f"{best[metric]:.4f}" in row


def test_the_data_is_described(made: tuple[Path, Card]) -> None:
    branch, card = made
    page, kind = card.page.read_text(), read_card(branch).spec.kind
    assert re.search(r"\| train \| 50 \| \d+ \| \d+ \| 1\d \| 0 \|", page)
    header, *rows = cells(card.page, "Data")
    if kind is Kind.CLASSIFICATION:
        assert header == ["label", "train", "dev"]
        assert sum(int(row[1].split()[0]) for row in rows) == 50
        assert sum(int(row[2].split()[0]) for row in rows) == 30
    if kind is Kind.TAGGING:
        assert rows == [["colour", "50 (100.0%)", "30 (100.0%)"]]
        assert re.search(r"Outside every slot are [78]\d\.\d% of train's words", page)
    if kind is Kind.REGRESSION:
        assert [row[0] for row in rows] == ["train", "dev"]
        assert float(rows[0][4]) == 1.0


def test_mistakes_are_the_worst_first(made: tuple[Path, Card]) -> None:
    branch, card = made
    header, *rows = cells(card.page, "Worst mistakes")
    assert 1 <= len(rows) <= 5
    match read_card(branch).spec.kind:
        case Kind.CLASSIFICATION:
            assert header == ["text", "gold", "answer", "probability", "of gold"]
            sure = [float(row[3]) for row in rows]
            assert sure == sorted(sure, reverse=True)
            assert all(row[1] in row[0] and row[1] != row[2] for row in rows)
        case Kind.REGRESSION:
            errors = [abs(float(row[3])) for row in rows]
            assert errors == sorted(errors, reverse=True)
            assert all(len(row[0].split()) / 10 == float(row[1]) for row in rows)
        case Kind.TAGGING:
            assert header == ["text", "gold", "answer and probability"]
            assert all(re.search(r"colour “(red|green|blue)”", row[1]) or row[2] for row in rows)


def test_a_card_names_no_folder_of_the_machine(made: tuple[Path, Card], tiny: Base) -> None:
    branch, card = made
    for name in ("card.md", "task.yaml"):
        text = (card.page.parent / name).read_text().replace(escape(tiny.name), "")  # the base's own name has one
        assert str(branch.parent.parent) not in text


def test_no_mistakes_may_be_asked_for(student: Path, tiny: Base) -> None:
    assert cells(card_of(student, tiny, rows=0).page, "Worst mistakes")[1:] == []


# --- how it was made --------------------------------------------------------------------------------------------


def commands(card: Card) -> list[list[str]]:
    block = re.search(r"```console\n(.*?)```", card.page.read_text(), re.DOTALL)
    assert block is not None
    return [shlex.split(line) for line in block[1].splitlines()]


def run(command: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    """Run a command line in this process; return its exit status."""
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as done:
        cli.main()
    assert isinstance(done.value.code, int)
    return done.value.code


@pytest.mark.parametrize("kind", list(Kind))
def test_the_printed_commands_make_the_branch_again(
    kind: Kind, tiny: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    odd = kind is Kind.TAGGING
    arguments = Arguments(1, 3e-3, 8, 0.3, 0.02, 5, 40, 20) if odd else Arguments(1, 1e-3, 8)
    branch = make_branches(kind, tiny, tmp_path, arguments, cache=odd)
    card = card_of(branch, tiny)
    before = [read_card(branch.parent / name) for name in ("teacher", "student")]
    for name in ("teacher", "student"):
        shutil.rmtree(branch.parent / name)
    monkeypatch.chdir(card.page.parent)
    teachers, own = commands(card)
    assert run(teachers, monkeypatch) == 0
    assert run(own, monkeypatch) == 0
    again = [read_card(branch.parent / name) for name in ("teacher", "student")]
    assert [made.weights for made in again] == [made.weights for made in before]
    assert again == before


def test_every_training_argument_is_an_option() -> None:
    for command in ("train", "distill"):
        known = CliRunner().invoke(cli.app, [command, "--help"], env={"COLUMNS": "200"}).output
        for name in Arguments.__dataclass_fields__:
            assert f"--{name.replace('_', '-').replace('learning-rate', 'lr')} " in known


def resolved(spec: Path) -> TaskSpec:
    return load_spec(spec).with_paths(lambda path: path.resolve())


def test_a_teacher_that_is_gone_is_said_so(student: Path, tiny: Base) -> None:
    shutil.rmtree(student.parent / "teacher")
    card = card_of(student, tiny)
    assert [command[1] for command in commands(card)] == ["distill"]
    assert "Its teacher is no longer at teacher, so there is no command here that makes" in card.page.read_text()


def test_a_teacher_that_was_trained_anew_is_said_so(student: Path, tiny: Base) -> None:
    spec = read_card(student).spec
    train(spec, tiny, 1, 2, Arguments(1, 2e-3, 8), student.parent / "teacher", silent)
    page = card_of(student, tiny).page.read_text()
    assert "The branch at teacher is not the teacher any more" in page


def test_a_teacher_of_other_data_has_a_spec_of_its_own(student: Path, tiny: Base, tmp_path: Path) -> None:
    (tmp_path / "more").mkdir()
    spec = load_spec(write_task(tmp_path / "more", Kind.CLASSIFICATION, rows=20))
    distill(student.parent / "teacher", tiny, 1, Arguments(1, 1e-3, 8), student, silent, spec)
    card = card_of(student, tiny)
    teacher, own = commands(card)
    assert (teacher[2], own[4]) == ("task-2.yaml", "task.yaml")
    assert resolved(card.page.parent / "task.yaml") == spec
    assert resolved(card.page.parent / "task-2.yaml") == read_card(student.parent / "teacher").spec
    card_of(student, tiny)  # both files are a card's own, which may be replaced


def test_a_dumped_spec_is_read_back_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "spec.yaml"
    path.write_text(
        'name: a\nkind: classification\ntext: [x, "y: z"]\nlabel: "no"\nlabels: ["yes", "no", "1"]\npositive: "1"\n'
        "metric: f1\ndata: {format: tsv, train: a/train.tsv, dev: ../dev.tsv, quoting: none}\n"
    )
    spec = load_spec(path)
    (tmp_path / "card").mkdir()
    again = tmp_path / "card" / "task.yaml"
    again.write_text(dump_spec(spec, tmp_path / "card"))
    assert str(tmp_path) not in again.read_text()
    assert resolved(again) == resolved(path)


# --- changes since ----------------------------------------------------------------------------------------------


def test_dev_that_changed_is_said_so(student: Path, tiny: Base, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in (tmp_path / "dev.jsonl").read_text().splitlines()]
    for row in rows[:15]:
        row["colour"] = {"red": "green", "green": "blue", "blue": "red"}[row["colour"]]
    (tmp_path / "dev.jsonl").write_text("\n".join(map(json.dumps, rows)))
    card = card_of(student, tiny)
    assert re.match(r"\w+ on dev is now 0\.\d{4}, but was 0\.\d{4} when the branch was trained", card.doubts[0])
    assert all(doubt in card.page.read_text() for doubt in card.doubts)


def test_train_that_changed_is_said_so(student: Path, tiny: Base, tmp_path: Path) -> None:
    with (tmp_path / "train.jsonl").open("a") as file:
        file.write('\n{"text": "red ball", "colour": "red"}')
    (doubt,) = card_of(student, tiny).doubts
    assert doubt.startswith("Data, spec, base or recipe changed since the branch was trained")


def test_data_that_moved_is_found_by_a_spec(student: Path, tiny: Base, tmp_path: Path) -> None:
    (tmp_path / "moved").mkdir()
    for name in ("task.yaml", "train.jsonl", "dev.jsonl"):
        (tmp_path / name).rename(tmp_path / "moved" / name)
    with pytest.raises(DataError, match=r"train\.jsonl cannot be read"):
        card_of(student, tiny)
    card = card_of(student, tiny, spec=load_spec(tmp_path / "moved" / "task.yaml"))
    assert card.doubts == ()
    assert "../../moved/train.jsonl" in (card.page.parent / "task.yaml").read_text()


def test_a_spec_of_another_task_is_refused(student: Path, tiny: Base, tmp_path: Path) -> None:
    text = (tmp_path / "task.yaml").read_text()
    (tmp_path / "task.yaml").write_text(text.replace("name: colour", "name: size"))
    with pytest.raises(SpecError, match=r"the spec is of task 'size' \(classification\), .*student of 'colour'"):
        card_of(student, tiny, spec=load_spec(tmp_path / "task.yaml"))


def test_data_with_other_labels_is_refused(student: Path, tiny: Base, tmp_path: Path) -> None:
    with (tmp_path / "train.jsonl").open("a") as file:
        file.write('\n{"text": "pink ball", "colour": "pink"}')
    with pytest.raises(DataError, match=r"train has the labels .*'pink'.*; train the branch again, or name the data"):
        card_of(student, tiny)


# --- places -----------------------------------------------------------------------------------------------------


def test_a_card_takes_the_place_of_the_one_before_and_of_nothing_else(made: tuple[Path, Card], tmp_path: Path) -> None:
    folder = tmp_path / "card"
    shutil.copytree(made[1].page.parent, folder)
    check_place(folder)
    check_place(tmp_path / "none")
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(BranchError, match="card exists and holds more than a card; name a folder of the card's own"):
        check_place(folder)
    (folder / "notes.txt").unlink()
    (folder / "card.md").unlink()
    with pytest.raises(BranchError, match="holds more than a card"):
        check_place(folder)  # a spec and pictures alone may be anyone's
    with pytest.raises(BranchError, match="holds more than a card"):
        check_place(made[1].page)


def test_equal_cards_are_equal_bytes(made: tuple[Path, Card], tiny: Base) -> None:
    branch, card = made
    before = {path.name: path.read_bytes() for path in card.page.parent.iterdir()}
    card_of(branch, tiny)
    assert {path.name: path.read_bytes() for path in card.page.parent.iterdir()} == before


def test_the_command_writes_a_card_beside_the_branch(
    student: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["espalier", "card", str(student), "--json"], monkeypatch) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["card"] == str(student.parent / "student-card" / "card.md")
    assert told["doubts"] == []
    assert Path(told["card"]).is_file()
    assert run(["espalier", "card", str(student), "--data", "."], monkeypatch) == 1
    assert "name that file with --spec" in capsys.readouterr().err.replace("\n", " ")


# --- Markdown and pictures --------------------------------------------------------------------------------------


@given(st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=5))
def test_any_text_is_shown_in_a_table_as_it_is(rows: list[tuple[str, str]]) -> None:
    def seen(text: str) -> str:
        return " ".join(
            re.sub(r"[\0-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\u202a-\u202e\u2066-\u2069]", "\ufffd", text).split()
        )

    markdown = table(["a", "b"], [[escape(a), escape(b)] for a, b in rows])
    assert rendered(markdown) == [["a", "b"], *([seen(a), seen(b)] for a, b in rows)]


@given(TEXTS)
def test_any_text_is_one_code_block(text: str) -> None:
    tokens = MarkdownIt("commonmark").parse(code(text) + "\nafter")
    assert [token.type for token in tokens] == ["fence", "paragraph_open", "inline", "paragraph_close"]


def test_a_long_text_is_cut() -> None:
    assert escape("a" * 50, longest=10) == "a" * 9 + "…"
    assert escape("snake_case and _this_") == "snake_case and &#95;this&#95;"


def test_pictures_show_what_the_font_cannot_draw_by_number() -> None:
    labels = ["costs $5 or $6", "天气", "x" * 80]
    assert card_plots.confusion(np.eye(3, dtype=np.int64), labels).startswith(PNG)
    assert [card_plots._name(label, index) for index, label in enumerate(labels)] == [
        "costs $5 or $6", "no. 2", "x" * 23 + "…",
    ]  # fmt: skip


def test_of_many_labels_the_most_confused_are_shown() -> None:
    matrix = np.diag(np.full(30, 9))
    matrix[3, 28] = matrix[28, 3] = 5
    shown = card_plots.most_confused(matrix)
    assert len(shown) == card_plots.MOST_LABELS
    assert {3, 28} <= set(shown)
    assert shown == sorted(shown)
    assert card_plots.confusion(matrix, [f"label {i}" for i in range(30)]).startswith(PNG)

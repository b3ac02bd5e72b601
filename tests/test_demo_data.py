"""The demo data: reproducible, legal, balanced, and a dev split that train has not seen."""

import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import pytest

from demo.generate import generate, main
from demo.grammar import TOKEN, WORDING, Grammar
from espalier.contract import Kind
from espalier.spec import load_spec

ROOT = Path(__file__).parents[1]
TASKS = ROOT / "demo" / "tasks"
SPLITS = ("train", "dev")
FILES = [f"{name}/{split}.jsonl" for name in ("utterances", "pairs") for split in SPLITS]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("demo")
    generate(path, seed=7)
    return path


def rows(folder: Path, file: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / file).read_text(encoding="utf-8").splitlines()]


def texts(folder: Path, split: str) -> list[str]:
    pairs = rows(folder, f"pairs/{split}.jsonl")
    return [row["text"] for row in rows(folder, f"utterances/{split}.jsonl")] + [
        row[column] for row in pairs for column in ("text_a", "text_b")
    ]


def plain(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.lower()))


def surfaces(grammar: Grammar, slot: str) -> set[str]:
    return {
        plain(surface)
        for pool, values in grammar.values.items()
        if pool.partition(".")[0] == slot
        for value in values
        for surface in value
    }


def test_same_seed_gives_the_same_bytes_in_another_process(folder: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONHASHSEED": "123"}
    command = [sys.executable, "-m", "demo.generate", "--out", str(tmp_path), "--seed", "7"]
    subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True)
    assert all((tmp_path / file).read_bytes() == (folder / file).read_bytes() for file in FILES)


def test_another_seed_gives_other_texts(folder: Path, tmp_path: Path) -> None:
    generate(tmp_path, seed=8)
    assert all((tmp_path / file).read_bytes() != (folder / file).read_bytes() for file in FILES)


def test_unwritable_folder_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(sys, "argv", ["generate", "--out", str(tmp_path / "file")])
    assert main() == 1
    assert re.fullmatch(r"\S+/file cannot be written: [A-Z][a-z ]+\n", capsys.readouterr().err)


@pytest.mark.parametrize(("file", "count"), list(zip(FILES, (2400, 600, 2000, 500), strict=True)))
def test_sizes_and_no_row_twice(folder: Path, file: str, count: int) -> None:
    found = rows(folder, file)
    keys = {row.get("text") or (row["text_a"], row["text_b"]) for row in found}
    assert len(found) == len(keys) == count


def test_no_dev_text_is_in_train(folder: Path) -> None:
    train, dev = ({plain(text) for text in texts(folder, split)} for split in SPLITS)
    assert not train & dev


def test_templates_are_disjoint() -> None:
    train, dev = ({plain(template.text) for template in Grammar.load(split).templates} for split in SPLITS)
    assert not train & dev


def test_dev_templates_are_not_seen_in_train_once_values_are_taken_out(folder: Path) -> None:
    def skeletons(split: str) -> set[str]:
        return {
            plain(
                " ".join(word if tag == "O" else tag[2:] for word, tag in zip(row["tokens"], row["tags"], strict=True))
            )
            for row in rows(folder, f"utterances/{split}.jsonl")
        }

    assert not skeletons("train") & skeletons("dev")


def test_slot_values_are_disjoint(folder: Path) -> None:
    train, dev = (Grammar.load(split) for split in SPLITS)
    slots = {pool.partition(".")[0] for pool in train.values}
    assert slots == {pool.partition(".")[0] for pool in dev.values}
    assert {slot: surfaces(train, slot) & surfaces(dev, slot) for slot in slots} == {slot: set() for slot in slots}


def test_cues_of_urgency_are_disjoint() -> None:
    train, dev = (Grammar.load(split).frames for split in SPLITS)
    for tone in ("urgent", "relaxed"):
        assert not {plain(cue) for cue in train[tone]} & {plain(cue) for cue in dev[tone]}


@pytest.mark.parametrize("split", SPLITS)
def test_a_value_is_written_in_one_place_only(split: str) -> None:
    grammar = Grammar.load(split)
    for slot in {pool.partition(".")[0] for pool in grammar.values}:
        distinct = {
            value for pool in grammar.values if pool.partition(".")[0] == slot for value in grammar.values[pool]
        }
        counts = Counter(plain(surface) for value in distinct for surface in value)
        assert [surface for surface, count in counts.items() if count > 1] == []


@pytest.mark.parametrize("split", SPLITS)
def test_tags_are_legal_and_align_with_tokens(folder: Path, split: str) -> None:
    for row in rows(folder, f"utterances/{split}.jsonl"):
        tokens, tags = row["tokens"], row["tags"]
        assert len(tokens) == len(tags)
        assert "".join(tokens) == row["text"].replace(" ", "")
        assert all(TOKEN.fullmatch(token) for token in tokens)
        for before, tag in zip(["O", *tags], tags, strict=False):
            assert tag == "O" or re.fullmatch("[BI]-[a-z]+", tag)
            assert not tag.startswith("I-") or before[2:] == tag[2:]


def test_tags_mark_the_values_of_the_grammar(folder: Path) -> None:
    for split in SPLITS:
        known = {slot: surfaces(Grammar.load(split), slot) for slot in ("city", "song", "time", "date", "message")}
        for row in rows(folder, f"utterances/{split}.jsonl"):
            spans: list[tuple[str, list[str]]] = []
            for token, tag in zip(row["tokens"], row["tags"], strict=True):
                if tag.startswith("B-"):
                    spans.append((tag[2:], [token]))
                elif tag != "O":
                    spans[-1][1].append(token)
            for slot, words in spans:
                if slot in known:
                    bare = {re.sub(r"^on ", "", surface) for surface in known[slot]}
                    assert plain(" ".join(words)) in bare


@pytest.mark.parametrize("split", SPLITS)
def test_intents_and_slots_are_balanced(folder: Path, split: str) -> None:
    found = rows(folder, f"utterances/{split}.jsonl")
    intents = Counter(row["intent"] for row in found)
    assert len(intents) == 10
    assert set(intents.values()) == {len(found) // 10}
    slots = Counter(tag[2:] for row in found for tag in row["tags"] if tag.startswith("B-"))
    assert len(slots) == 14
    assert min(slots.values()) >= len(found) // 30


def test_dev_has_no_tag_that_train_lacks(folder: Path) -> None:
    train, dev = ({tag for row in rows(folder, f"utterances/{split}.jsonl") for tag in row["tags"]} for split in SPLITS)
    assert dev <= train


@pytest.mark.parametrize("split", SPLITS)
def test_urgency_is_spread_over_0_to_1(folder: Path, split: str) -> None:
    values = [row["urgency"] for row in rows(folder, f"utterances/{split}.jsonl")]
    assert 0 <= min(values) < 0.05
    assert 0.95 < max(values) <= 1
    assert 0.35 < mean(values) < 0.65
    assert stdev(values) > 0.2
    assert len(set(values)) > 40


def test_urgency_follows_cues_politeness_and_exclamation(folder: Path) -> None:
    urgencies = {row["text"]: row["urgency"] for split in SPLITS for row in rows(folder, f"utterances/{split}.jsonl")}

    def level(pattern: str) -> Any:
        return mean(value for text, value in urgencies.items() if re.search(pattern, text, re.IGNORECASE))

    assert level("no rush|no hurry|whenever") < 0.25 < 0.7 < level("immediately|asap|straight away|right now")
    assert level("^could you please") < level("^you have to")
    assert level("!$") > level(r"\.$")


@pytest.mark.parametrize("split", SPLITS)
def test_pairs_are_balanced_and_not_told_apart_by_their_words(folder: Path, split: str) -> None:
    found = rows(folder, f"pairs/{split}.jsonl")
    labels = Counter(row["label"] for row in found)
    assert labels == {"same": len(found) // 2, "different": len(found) // 2}

    def overlap(row: dict[str, Any]) -> float:
        one, other = (set(plain(row[column]).split()) for column in ("text_a", "text_b"))
        return len(one & other) / len(one | other)

    # The best that a threshold on shared words can do: the task is about meaning.
    ranked = sorted(found, key=overlap)
    hits = best = labels["same"]
    for row in ranked:
        hits += 1 if row["label"] == "different" else -1
        best = max(best, hits)
    assert best / len(found) < 0.75


def test_lengths_and_styles_are_mixed(folder: Path) -> None:
    found = [row["text"] for row in rows(folder, "utterances/train.jsonl")]
    lengths = [len(text.split()) for text in found]
    assert min(lengths) <= 2
    assert 24 <= max(lengths) <= 30
    for pattern in (r"^[A-Z].*[.!?]$", r"^[a-z' ]+$", r"\d:\d\d", r"\w'\w", r"\?", "!"):
        assert sum(bool(re.search(pattern, text)) for text in found) > 40, pattern


def test_tasks_are_one_of_each_kind_with_a_pair() -> None:
    specs = {path.stem: load_spec(path) for path in TASKS.glob("*.yaml")}
    assert {name: spec.name for name, spec in specs.items()} == {name: name for name in specs}
    assert {name: spec.kind for name, spec in specs.items()} == {
        "intent": Kind.CLASSIFICATION,
        "slots": Kind.TAGGING,
        "urgency": Kind.REGRESSION,
        "same_request": Kind.CLASSIFICATION,
    }
    assert [name for name, spec in specs.items() if spec.pair] == ["same_request"]


def test_specs_read_the_generated_files(folder: Path) -> None:
    for path in TASKS.glob("*.yaml"):
        spec = load_spec(path)
        for split in SPLITS:
            data: Path = getattr(spec.data, split)
            relative = data.resolve().relative_to((ROOT / "demo" / "data").resolve())
            assert {*spec.text, spec.label} <= rows(folder, str(relative))[0].keys()


def test_wording_files_hold_two_splits() -> None:
    assert sorted(path.name for path in WORDING.iterdir()) == ["dev.yaml", "train.yaml"]

"""Selection finds the best plan there is, says what it costs, and export takes the plan it writes."""

import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import SHALLOW, make_branch
from hypothesis import given
from hypothesis import strategies as st

from espalier.contract import Kind
from espalier.costs import Costs, HeadShape
from espalier.encoder import Base
from espalier.errors import BranchError, ExportError, SpecError
from espalier.plan import read_plan
from export.costs import measure
from export.plan import planned_branches
from training.front import plot_front
from training.selection import Candidate, Selection, find_candidates, front, select, summary, write

COSTS = Costs(
    trunk={1: 1.0, 2: 2.0, 3: 3.0},
    heads={HeadShape(Kind.CLASSIFICATION, layers, 1, 2): layers - 0.9 for layers in (1, 2, 3)},
    folded=0.1, mean_length=20, batch=8,
)  # fmt: skip


def candidate(task: str, tap: int, layers: int, *scores: float) -> Candidate:
    shape = HeadShape(Kind.CLASSIFICATION, layers, 1, 2)
    return Candidate(task, "accuracy", tap, shape, True, scores, Path(f"{task}-{tap}-{layers}"))


@st.composite
def candidate_sets(draw: st.DrawFn) -> list[Candidate]:
    found = []
    for task in draw(st.sampled_from(["a", "ab", "abc"])):
        options = draw(st.lists(st.tuples(st.integers(1, 3), st.integers(1, 3)), min_size=1, max_size=4, unique=True))
        found += [candidate(task, tap, layers, draw(st.integers(40, 60))) for tap, layers in options]
    return found


def every_plan(candidates: list[Candidate]) -> list[Selection]:
    tasks = sorted({c.task for c in candidates})
    return [Selection(chosen) for chosen in itertools.product(*([c for c in candidates if c.task == t] for t in tasks))]


@given(candidate_sets(), st.integers(0, 8))
def test_no_plan_is_worth_more_than_the_chosen_one(candidates: list[Candidate], threshold: int) -> None:
    def worth(plan: Selection) -> float:
        return plan.score * len(plan.chosen) - threshold * plan.layers

    chosen = select(candidates, threshold)
    assert worth(chosen) == pytest.approx(max(worth(plan) for plan in every_plan(candidates)))


@given(candidate_sets())
def test_the_front_holds_what_no_plan_beats(candidates: list[Candidate]) -> None:
    points = [(plan.layers, round(plan.score, 9)) for plan in every_plan(candidates)]
    beaten = {
        (layers, score)
        for layers, score in points
        if any(cost <= layers and s >= score and (cost, s) != (layers, score) for cost, s in points)
    }
    assert [(plan.layers, round(plan.score, 9)) for plan in front(candidates)] == sorted(set(points) - beaten)


def test_the_trunk_is_shared_so_one_task_that_needs_it_deep_may_not_get_it() -> None:
    shallow = [candidate(task, 1, 1, 80.0) for task in "abc"]
    deep = candidate("a", 3, 1, 81.0)
    assert select([*shallow, deep], threshold=0.4).tap == 3
    assert select([*shallow, deep], threshold=0.6).tap == 1, "two more trunk layers for one point"
    everyone = [*shallow, *(candidate(task, 3, 1, 81.0) for task in "abc")]
    assert select(everyone, threshold=0.6).tap == 3, "but for three points they are worth it"


def test_a_folded_layer_may_be_counted_as_what_it_costs() -> None:
    options = [candidate("a", 3, 1, 80.0), candidate("a", 1, 2, 80.5)]
    assert select(options, 0.5).layers == 3
    counted = select(options, 0.5, lambda c: c.counted(0.1))
    assert counted.folded_layers(COSTS) == pytest.approx(2.1)
    assert counted.milliseconds(COSTS) == pytest.approx(1.0 + 1.1)


def test_scores_are_means_over_seeds() -> None:
    seeds = candidate("a", 1, 1, 80.0, 83.0, 81.5)
    assert seeds.score == pytest.approx(81.5)
    assert seeds.spread == pytest.approx(1.5)
    assert candidate("a", 1, 1, 80.0).spread is None


def test_a_threshold_is_no_negative_number() -> None:
    with pytest.raises(SpecError, match="a gain in points"):
        select([candidate("a", 1, 1, 80.0)], -1)


def test_branches_that_differ_in_their_seed_alone_are_one_candidate(base: Base, specs: Path, tmp_path: Path) -> None:
    for seed in range(2):
        make_branch(base, specs / "intent.yaml", SHALLOW, 1, tmp_path / f"one-{seed}", seed)
    make_branch(base, specs / "intent.yaml", SHALLOW, 2, tmp_path / "below" / "two")
    found = sorted(find_candidates([tmp_path, tmp_path / "below"]), key=lambda c: c.layers)
    assert [(c.layers, len(c.scores)) for c in found] == [(1, 2), (2, 1)]
    assert found[1].best == tmp_path / "below" / "two"
    with pytest.raises(BranchError, match="no branch in or below"):
        find_candidates([specs])


def test_branches_of_two_bases_do_not_share_a_trunk(base: Base, tiny: Base, specs: Path, tmp_path: Path) -> None:
    make_branch(base, specs / "intent.yaml", 1, 1, tmp_path / "a")
    make_branch(tiny, specs / "urgency.yaml", 1, 1, tmp_path / "b")
    with pytest.raises(BranchError, match="one shared trunk"):
        find_candidates([tmp_path])


def test_scores_by_two_metrics_are_not_compared(base: Base, specs: Path, tmp_path: Path) -> None:
    make_branch(base, specs / "intent.yaml", SHALLOW, 1, tmp_path / "a")
    make_branch(base, specs / "intent.yaml", SHALLOW, 2, tmp_path / "b")
    card = json.loads((tmp_path / "b" / "branch.json").read_text())
    card["spec"]["metric"] = "macro_f1"
    (tmp_path / "b" / "branch.json").write_text(json.dumps(card))
    with pytest.raises(BranchError, match="was scored by macro_f1, another branch of task 'intent' by accuracy"):
        find_candidates([tmp_path])


@pytest.fixture
def plan(base: Base, specs: Path, tmp_path: Path) -> Path:
    for task in ("intent", "urgency"):
        make_branch(base, specs / f"{task}.yaml", SHALLOW, 1, tmp_path / "branches" / task)
    write(tmp_path / "plan.yaml", select(find_candidates([tmp_path / "branches"]), 0.5), 0.5)
    return tmp_path / "plan.yaml"


def test_export_takes_the_branches_of_a_plan(plan: Path, tmp_path: Path) -> None:
    assert planned_branches(plan) == [tmp_path / "branches" / "intent", tmp_path / "branches" / "urgency"]
    plan.rename(tmp_path / "branches" / "plan.yaml")
    with pytest.raises(BranchError, match="branches/branches/intent"):
        planned_branches(tmp_path / "branches" / "plan.yaml")


@pytest.mark.parametrize(
    ("task", "field", "value", "sentence"),
    [
        ("intent", "tap", 2, r"planned with tap 2, 1 layers, 1 folded, but .* has tap 3, 1 layers, 1 folded"),
        ("intent", "branch", "branches/urgency", "a branch of task 'urgency'"),
        ("intent", "depth", 2, r"tasks\.intent\.depth: Extra inputs"),
    ],
)
def test_an_edited_plan_is_checked(plan: Path, task: str, field: str, value: object, sentence: str) -> None:
    content = yaml.safe_load(plan.read_text())
    content["tasks"][task][field] = value
    plan.write_text(yaml.safe_dump(content))
    with pytest.raises((ExportError, SpecError), match=sentence):
        planned_branches(plan)


def test_an_edited_plan_is_not_written_over(plan: Path, tmp_path: Path) -> None:
    selection = select(find_candidates([tmp_path / "branches"]), 0.5)
    write(plan, selection, 0.25)  # as it was written: another one may take its place
    assert "threshold of 0.25 points" in plan.read_text()
    edited = plan.read_text().replace("folded: 1", "folded: 0")
    plan.write_text(edited)
    with pytest.raises(SpecError, match=r"plan\.yaml was edited, or is no plan; move it away, or give another --out"):
        write(plan, selection, 0.5)
    assert plan.read_text() == edited


@pytest.mark.parametrize("content", ["tasks: {}", "[1]", "a: [", "\ttasks:"])
def test_what_is_no_plan_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "plan.yaml").write_text(content)
    with pytest.raises(SpecError, match=r"plan\.yaml"):
        read_plan(tmp_path / "plan.yaml")


def test_costs_are_measured_on_the_exported_graphs(base: Base) -> None:
    one, three = (HeadShape(Kind.CLASSIFICATION, layers, layers, 2) for layers in (1, 3))
    softmax = HeadShape(Kind.TAGGING, 2, 0, 5)
    crf = softmax._replace(crf=("O", "B-city", "I-city", "B-time", "I-time"))
    costs = measure(base, {1, 4}, {one, three, softmax, crf})
    assert costs.trunk[4] > costs.trunk[1] > 0
    assert costs.heads[crf] > costs.heads[softmax] > costs.heads[three] > costs.heads[one] > 0
    assert 0 < costs.folded < 0.8, "a folded layer costs less than a full one"


def test_the_front_is_drawn(tmp_path: Path) -> None:
    options = [candidate("a", 1, 1, 80.0), candidate("a", 2, 2, 82.0), candidate("b", 1, 1, 70.0)]
    plot_front(tmp_path / "front.png", front(options), select(options, 0.5), COSTS, 6, full=77.0)
    assert (tmp_path / "front.png").read_bytes().startswith(b"\x89PNG")
    told = summary(select(options, 0.5), front(options), COSTS, 6)
    assert told["plan"]["layers_fraction"] == pytest.approx(5 / 12)
    assert json.loads(json.dumps(told)) == told


def test_the_command_selects_and_the_plan_is_exported(plan: Path, tmp_path: Path) -> None:
    def espalier(*words: str) -> str:
        command = [sys.executable, "-m", "espalier.cli", *words]
        return subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True).stdout

    plan.unlink()
    told = json.loads(espalier("select", "branches", "--json"))
    assert set(told["plan"]["tasks"]) == {"intent", "urgency"}
    assert (tmp_path / "front.png").is_file()
    done = json.loads(espalier("export", "--plan", "plan.yaml", "--repository", "models", "--json"))
    assert {"head_intent", "head_urgency"} < {item["model"] for item in done}

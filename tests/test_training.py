"""Fine-tuning and distillation: they learn, they repeat, they resume, they leave the trunk alone."""

import json
import random
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import python_on_full_disk

from espalier.branch import BranchCard, Teacher, load_branch
from espalier.contract import Kind, Structure
from espalier.crf import CRF
from espalier.encoder import Base, Encoder
from espalier.errors import BranchError, DataError, FingerprintError, SpecError, TrainingError
from espalier.spec import TaskSpec, load_spec
from espalier.tagging import Scheme
from training.card import make_card
from training.data import load_data
from training.distill import TEMPERATURE, Init, distill, soft_loss
from training.features import IGNORED, collate, featurize
from training.finetune import hard_loss, new_branch, train
from training.metrics import decode, gold, score
from training.predict import outputs_of
from training.trainer import Arguments, Progress

QUICK = Arguments(epochs=3, learning_rate=5e-3, batch_size=8, seed=1)
COLOURS = ("red", "green", "blue")


def silent(progress: Progress) -> None:
    pass


def write_task(folder: Path, kind: Kind, rows: int = 60, more: str = "") -> Path:
    """Write a task that can be learnt: name the colour, say how many words, or tag the colour's word."""
    rng = random.Random(5)
    metric = {Kind.CLASSIFICATION: "accuracy", Kind.REGRESSION: "pearson", Kind.TAGGING: "slot_f1"}[kind]
    for split, count in (("train", rows), ("dev", 30)):
        lines = []
        for _ in range(count):
            colour = rng.choice(COLOURS)
            filler = rng.choices(["the", "box", "ball", "is", "on", "table", "please"], k=rng.randint(1, 9))
            at = rng.randint(0, len(filler))
            words = [*filler[:at], colour, *filler[at:]]
            row: dict[str, Any] = {"text": " ".join(words), "colour": colour, "size": len(words) / 10}
            row["tags"] = ["B-colour" if word == colour else "O" for word in words]
            lines.append(json.dumps(row))
        (folder / f"{split}.jsonl").write_text("\n".join(lines))
    label = {Kind.CLASSIFICATION: "colour", Kind.REGRESSION: "size", Kind.TAGGING: "tags"}[kind]
    spec = folder / "task.yaml"
    spec.write_text(
        f"name: colour\nkind: {kind}\ntext: text\nlabel: {label}\nmetric: {metric}\n"
        f"data: {{format: jsonl, train: train.jsonl, dev: dev.jsonl}}\n{more}"
    )
    return spec


@pytest.fixture
def spec(tmp_path: Path) -> TaskSpec:
    return load_spec(write_task(tmp_path, Kind.CLASSIFICATION))


def evaluate(spec: TaskSpec, base: Base, out: Path) -> dict[str, float]:
    """Score a branch on dev one text at a time, without the Trainer."""
    branch, card = load_branch(out)
    dev = load_data(spec).dev
    features = featurize(spec.kind, card.labels, base.tokenizer, base.max_length, dev)
    answers: list[Any] = []
    for feature in features:
        batch = collate([feature])
        with torch.no_grad():
            hidden = base.encoder(batch["input_ids"], batch["token_type_ids"], batch["mask"], tap=card.tap)
            answer = branch.answer(hidden, batch["mask"], batch.get("words")).numpy()
            answers += decode(spec.kind, card.labels, answer, [feature], spec.structure)
    return score(spec.kind, gold(dev), answers, spec.positive, spec.ignore)


@pytest.mark.parametrize("kind", list(Kind))
def test_a_branch_learns_and_its_card_tells_its_dev_metrics(kind: Kind, tiny: Base, tmp_path: Path) -> None:
    spec = load_spec(write_task(tmp_path, kind, rows=200))
    arguments = Arguments(epochs=8, learning_rate=5e-3, batch_size=8)
    card, trained = train(spec, tiny, 1, 2, arguments, tmp_path / "branch", silent)
    assert trained
    assert card.score > 0.9
    assert evaluate(spec, tiny, tmp_path / "branch") == pytest.approx(card.metrics, abs=1e-5)
    assert card.score == max(entry[spec.metric] for entry in card.history)
    assert [entry["epoch"] for entry in card.history] == list(range(1, 9))


def write_slots(folder: Path, more: str) -> TaskSpec:
    """Write a task of slots in which a tag depends on the one before: `a red box` is one slot of three words."""
    spec = load_spec(write_task(folder, Kind.TAGGING, rows=200, more=more))
    for split in ("train", "dev"):
        rows = [json.loads(line) for line in (folder / f"{split}.jsonl").read_text().splitlines()]
        for row in rows:
            row["text"] = " ".join(f"a {word} box" if word in COLOURS else word for word in row["text"].split())
            tags = [["B-thing", "I-thing", "I-thing"] if tag != "O" else ["O"] for tag in row["tags"]]
            row["tags"] = [tag for group in tags for tag in group]
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return spec


def test_a_branch_with_a_crf_learns_and_so_does_its_student(tiny: Base, tmp_path: Path) -> None:
    spec = write_slots(tmp_path, "structure: crf\n")
    arguments = Arguments(epochs=3, learning_rate=5e-3, batch_size=16)
    card, _ = train(spec, tiny, 1, 2, arguments, tmp_path / "branch", silent)
    student, _ = distill(tmp_path / "branch", tiny, 1, arguments, tmp_path / "student", silent)
    for path, written in ((tmp_path / "branch", card), (tmp_path / "student", student)):
        assert written.score > 0.9
        assert evaluate(spec, tiny, path) == pytest.approx(written.metrics, abs=1e-5)
        described = make_card(path, tiny, tmp_path / f"{path.name}-card", 5, lambda what, done, total: None)
        assert described.metrics == pytest.approx(written.metrics, abs=1e-5)
        branch, _ = load_branch(path)
        assert branch.crf is not None
        begin, inside, outside = (written.labels.index(label) for label in ("B-thing", "I-thing", "O"))
        assert branch.crf.transitions[begin, inside] > branch.crf.transitions[begin, outside] + 1
        random = torch.randn(50, 12, 3)
        chosen, _ = branch.crf.viterbi(random, torch.ones(50, 12, dtype=torch.bool))
        assert all(
            Scheme(written.labels).first_break([written.labels[tag] for tag in row]) is None for row in chosen.tolist()
        )


def test_a_teacher_of_another_structure_is_refused(tiny: Base, tmp_path: Path) -> None:
    spec = write_slots(tmp_path, "")
    train(spec, tiny, 1, 2, Arguments(1, 1e-3, 32), tmp_path / "branch", silent)
    other = spec.model_copy(update={"structure": Structure.CRF})
    with pytest.raises(SpecError, match="the spec has structure: crf, the teacher was trained with softmax"):
        distill(tmp_path / "branch", tiny, 1, QUICK, tmp_path / "student", silent, other)


def test_a_slot_to_ignore_is_no_part_of_the_dev_metric(tiny: Base, tmp_path: Path) -> None:
    spec = write_slots(tmp_path, "ignore: [thing]\n")
    card, _ = train(spec, tiny, 1, 1, Arguments(1, 1e-3, 32), tmp_path / "branch", silent)
    assert card.metrics == {"slot_f1": 0.0, "slot_precision": 0.0, "slot_recall": 0.0}


def test_the_trunk_stays_frozen(spec: TaskSpec, tiny: Base, tmp_path: Path) -> None:
    before = tiny.fingerprint(3)
    card, _ = train(spec, tiny, 2, None, QUICK, tmp_path / "branch", silent)
    assert tiny.fingerprint(3) == before
    assert card.fingerprint == tiny.fingerprint(2)
    assert (card.tap, card.layers) == (2, 1)


def test_a_seed_gives_the_same_branch_twice(spec: TaskSpec, tiny: Base, tmp_path: Path) -> None:
    def weights(seed: int, out: str) -> str:
        arguments = Arguments(epochs=1, learning_rate=1e-3, batch_size=8, seed=seed)
        return train(spec, tiny, 1, 2, arguments, tmp_path / out, silent)[0].weights

    assert weights(3, "first") == weights(3, "second")
    assert weights(3, "first") != weights(4, "other")


def test_bfloat16_is_for_training_alone(spec: TaskSpec, tiny: Base, tmp_path: Path) -> None:
    exact, _ = train(spec, tiny, 1, 2, QUICK, tmp_path / "exact", silent)
    rounded, trained = train(spec, tiny, 1, 2, replace(QUICK, bf16=True), tmp_path / "rounded", silent)
    assert trained
    assert rounded.weights != exact.weights
    assert rounded.inputs != exact.inputs
    branch, _ = load_branch(tmp_path / "rounded")
    assert {weight.dtype for weight in branch.parameters()} == {torch.float32}
    data = load_data(spec)
    batch = collate(featurize(spec.kind, data.labels, tiny.tokenizer, tiny.max_length, data.dev))
    with torch.no_grad():
        hidden = tiny.encoder(batch["input_ids"], batch["token_type_ids"], batch["mask"], tap=1)
        loss = hard_loss(spec.kind, branch(hidden, batch["mask"]), batch["labels"])
    best = max(rounded.history, key=lambda entry: entry[spec.metric])
    assert best["loss"] == pytest.approx(loss.item(), rel=1e-5), "dev was not scored in FP32"


def test_other_dropout_rates_make_another_branch(spec: TaskSpec, tiny: Base, tmp_path: Path) -> None:
    train(spec, tiny, 1, 2, QUICK, tmp_path / "branch", silent)
    still = replace(tiny.encoder.config, hidden_dropout_prob=0.0)
    encoder = Encoder(still)
    encoder.load_state_dict(tiny.encoder.state_dict())
    assert train(spec, replace(tiny, encoder=encoder.eval()), 1, 2, QUICK, tmp_path / "branch", silent)[1]


def stop_after(epoch: int) -> Any:
    def report(progress: Progress) -> None:
        if progress.epoch > epoch:
            raise KeyboardInterrupt

    return report


def test_a_stopped_run_goes_on_to_the_same_branch(spec: TaskSpec, tiny: Base, tmp_path: Path) -> None:
    whole, _ = train(spec, tiny, 1, 2, QUICK, tmp_path / "whole", silent)
    steps: list[int] = []
    with pytest.raises(KeyboardInterrupt):
        train(spec, tiny, 1, 2, QUICK, tmp_path / "branch", stop_after(1))
    assert not (tmp_path / "branch").exists()
    card, trained = train(spec, tiny, 1, 2, QUICK, tmp_path / "branch", lambda progress: steps.append(progress.step))
    assert trained
    assert min(steps) > 8  # 60 rows in batches of 8: the first epoch was not done again
    assert card.weights == whole.weights
    assert card.history == whole.history
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(".")) == []


def test_a_half_written_checkpoint_is_not_used(spec: TaskSpec, tiny: Base, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(spec, tiny, 1, 2, QUICK, tmp_path / "branch", stop_after(1))
    (state,) = tmp_path.glob(".branch.training-*/checkpoint-*/trainer_state.json")
    state.write_text(state.read_text()[:100])
    card, trained = train(spec, tiny, 1, 2, QUICK, tmp_path / "branch", silent)
    assert trained
    assert len(card.history) == 3


def test_an_up_to_date_branch_is_kept(spec: TaskSpec, tiny: Base, tmp_path: Path) -> None:
    out = tmp_path / "branch"
    first, _ = train(spec, tiny, 1, 2, QUICK, out, silent)
    assert train(spec, tiny, 1, 2, QUICK, out, silent) == (first, False)
    # Other data, another branch.
    with (tmp_path / "train.jsonl").open("a") as file:
        file.write('\n{"text": "red ball", "colour": "red"}')
    assert train(spec, tiny, 1, 2, QUICK, out, silent)[1]


def test_a_damaged_branch_is_trained_again(spec: TaskSpec, tiny: Base, tmp_path: Path) -> None:
    out = tmp_path / "branch"
    first, _ = train(spec, tiny, 1, 1, QUICK, out, silent)
    (out / "branch.safetensors").write_bytes(b"")
    again, trained = train(spec, tiny, 1, 1, QUICK, out, silent)
    assert trained
    assert again.weights == first.weights


@pytest.mark.parametrize(
    ("tap", "layers", "message"),
    [(0, None, "tap 0 is outside the base"), (4, None, "tap 4 is outside"), (2, 2, "2 task layers above tap 2 do not")],
)
def test_a_branch_that_does_not_fit_the_base_is_refused(
    tap: int, layers: int | None, message: str, spec: TaskSpec, tiny: Base, tmp_path: Path
) -> None:
    with pytest.raises(SpecError, match=message):
        train(spec, tiny, tap, layers, QUICK, tmp_path / "branch", silent)


@pytest.mark.parametrize(
    "wrong", [{"epochs": 0}, {"seed": -1}, {"batch_size": 0}, {"learning_rate": 0.0}, {"max_train": 0}]
)
def test_senseless_arguments_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(SpecError, match="must"):
        Arguments(**wrong)


def test_a_place_that_cannot_be_written_is_one_sentence(spec: TaskSpec, tiny: Base, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BranchError, match=r"cannot be written to .*file/branch: Not a directory"):
        train(spec, tiny, 1, 1, QUICK, tmp_path / "file" / "branch", silent)


def test_a_folder_that_holds_more_than_a_branch_is_refused_before_training(
    spec: TaskSpec, tiny: Base, tmp_path: Path
) -> None:
    (tmp_path / "branch" / "student").mkdir(parents=True)
    steps: list[int] = []
    with pytest.raises(BranchError, match="holds more than a branch"):
        train(spec, tiny, 1, 1, QUICK, tmp_path / "branch", lambda progress: steps.append(progress.step))
    assert not steps
    assert (tmp_path / "branch" / "student").is_dir()


def test_a_finished_run_clears_away_stopped_ones(spec: TaskSpec, tiny: Base, tmp_path: Path) -> None:
    for rate in (1e-3, 2e-3):
        with pytest.raises(KeyboardInterrupt):
            train(spec, tiny, 1, 1, Arguments(2, rate, 8), tmp_path / "branch", stop_after(1))
    assert len(list(tmp_path.glob(".branch.training-*"))) == 2
    train(spec, tiny, 1, 1, QUICK, tmp_path / "branch", silent)
    assert not list(tmp_path.glob(".branch.training-*"))


@pytest.mark.parametrize("limit", [20_000, 100_000], ids=["weights", "optimizer"])
def test_a_full_disk_stops_training_in_one_sentence(limit: int, tiny_checkpoint: Path, tmp_path: Path) -> None:
    spec = write_task(tmp_path, Kind.CLASSIFICATION)
    command = ["-m", "espalier.cli", "train", spec, "--base", tiny_checkpoint, "--tap", "1", "--out", tmp_path / "out"]
    done = python_on_full_disk(limit, *command, "--epochs", "1")
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert re.search(r"Error: .*cannot be written", done.stderr)
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".out.training-*/checkpoint-*"))


def test_a_card_names_no_folder_of_the_machine(spec: TaskSpec, tiny: Base, tmp_path: Path) -> None:
    train(spec, tiny, 1, 1, QUICK, tmp_path / "branches" / "branch", silent)
    data = json.loads((tmp_path / "branches" / "branch" / "branch.json").read_text())["spec"]["data"]
    files = {"train": "../../train.jsonl", "dev": "../../dev.jsonl", "test": None}
    assert data == {"format": "jsonl", **files, "quoting": "minimal"}
    assert load_branch(tmp_path / "branches" / "branch")[1].spec == spec


# --- losses -----------------------------------------------------------------------------------------------------


def test_hard_loss_leaves_ignored_tokens_out() -> None:
    logits = torch.randn(2, 3, 4)
    labels = torch.tensor([[0, IGNORED, 2], [IGNORED, IGNORED, 3]])
    chosen = [(0, 0, 0), (0, 2, 2), (1, 2, 3)]
    want = np.mean([-torch.log_softmax(logits[i, j], -1)[k].item() for i, j, k in chosen])
    assert hard_loss(Kind.TAGGING, logits, labels).item() == pytest.approx(want, rel=1e-5)


def test_hard_loss_of_a_crf_is_a_mean_over_the_words() -> None:
    crf = CRF(("B-x", "I-x", "O"))
    labels = torch.tensor([[IGNORED, 0, 1], [IGNORED, IGNORED, 2]])
    logits = torch.randn(2, 3, 3)
    with torch.no_grad():
        want = -crf.log_likelihood(logits, labels != IGNORED, labels).sum() / 3
        assert hard_loss(Kind.TAGGING, logits, labels, crf).item() == pytest.approx(want.item(), rel=1e-5)


def test_hard_loss_of_regression_is_the_mean_squared_error() -> None:
    loss = hard_loss(Kind.REGRESSION, torch.tensor([[1.0], [3.0]]), torch.tensor([0.0, 1.0]))
    assert loss.item() == pytest.approx((1 + 4) / 2)


def test_soft_loss_is_the_tempered_divergence() -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(5, 3), torch.randn(5, 3)
    p, q = (torch.softmax(x / TEMPERATURE, -1).double().numpy() for x in (teacher, student))
    want = TEMPERATURE**2 * np.mean((p * np.log(p / q)).sum(-1))
    got = soft_loss(Kind.CLASSIFICATION, student, torch.zeros(5, dtype=torch.long), teacher)
    assert got.item() == pytest.approx(want, rel=1e-4)
    same = soft_loss(Kind.CLASSIFICATION, teacher, torch.zeros(5, dtype=torch.long), teacher)
    assert same.item() == pytest.approx(0, abs=1e-6)


def test_soft_loss_of_tagging_is_per_labelled_token() -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    labels = torch.tensor([[0, IGNORED, 2], [IGNORED, IGNORED, 3]])
    counted = [(0, 0), (0, 2), (1, 2)]
    flat = [torch.stack([x[at] for at in counted]) for x in (student, teacher)]
    want = soft_loss(Kind.CLASSIFICATION, flat[0], torch.zeros(3, dtype=torch.long), flat[1])
    assert soft_loss(Kind.TAGGING, student, labels, teacher).item() == pytest.approx(want.item(), rel=1e-5)


# --- distillation -----------------------------------------------------------------------------------------------


@pytest.fixture
def teacher(spec: TaskSpec, tiny: Base, tmp_path: Path) -> Path:
    train(spec, tiny, 1, 2, QUICK, tmp_path / "teacher", silent)
    return tmp_path / "teacher"


def test_a_loss_that_is_not_finite_stops_and_keeps_the_best_epoch(tiny: Base, tmp_path: Path) -> None:
    spec = load_spec(write_task(tmp_path, Kind.REGRESSION))
    # A weight decay that multiplies the weights by -8 in each step: still finite after the first epoch of 8 steps.
    runaway = Arguments(epochs=9, learning_rate=0.9, batch_size=8, weight_decay=10.0, warmup=0.0)
    card, _ = train(spec, tiny, 1, 1, runaway, tmp_path / "branch", silent)
    assert card.stopped is not None
    assert re.match(r"the (loss was (inf|nan) in step \d+|answers on dev .*); lower the learning rate", card.stopped)
    assert 1 <= len(card.history) < 9
    assert evaluate(spec, tiny, tmp_path / "branch") == pytest.approx(card.metrics, abs=1e-5)
    assert train(spec, tiny, 1, 1, runaway, tmp_path / "branch", silent) == (card, False)


def test_a_loss_that_is_never_finite_leaves_no_branch(tiny: Base, tmp_path: Path) -> None:
    spec = load_spec(write_task(tmp_path, Kind.REGRESSION))
    train_file = tmp_path / "train.jsonl"
    train_file.write_text(re.sub(r'"size": [0-9.]+', '"size": 1e30', train_file.read_text()))
    with pytest.raises(TrainingError, match=r"before the end of its first epoch: the loss was inf in step 1"):
        train(spec, tiny, 1, 1, QUICK, tmp_path / "branch", silent)
    assert not (tmp_path / "branch").exists()


def test_too_little_memory_says_what_to_lower(tiny_checkpoint: Path, tmp_path: Path) -> None:
    spec = write_task(tmp_path, Kind.CLASSIFICATION, rows=4000)
    code = f"""
import resource
from pathlib import Path
from espalier.encoder import load_base
from espalier.errors import TrainingError
from espalier.spec import load_spec
from training.finetune import train
from training.trainer import Arguments

spec, base = load_spec(Path({str(spec)!r})), load_base({str(tiny_checkpoint)!r})
def run(name, size):
    arguments = Arguments(epochs=1, batch_size=size, max_train=size)
    train(spec, base, 1, 2, arguments, Path({str(tmp_path)!r}, name), lambda _: None)
run("small", 8)  # threads and libraries take their share before the limit is set
used = int(next(line for line in open("/proc/self/status") if line.startswith("VmSize")).split()[1]) * 1024
resource.setrlimit(resource.RLIMIT_AS, (used + 2**25, used + 2**25))
try:
    run("large", 4000)
except TrainingError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert re.match(r"out of memory with batches of 4000 rows of up to 12 tokens; lower --batch-size", done.stdout)


def test_branches_do_not_depend_on_what_else_is_trained(tiny: Base, tmp_path: Path) -> None:
    specs = {}
    for kind in (Kind.CLASSIFICATION, Kind.TAGGING):
        (tmp_path / kind).mkdir()
        specs[kind] = load_spec(write_task(tmp_path / kind, kind))

    def train_in_order(*order: Kind) -> dict[Kind, bytes]:
        home = tmp_path / "-".join(order)
        for kind in order:
            train(specs[kind], tiny, 1, 1, QUICK, home / kind, silent)
        return {kind: (home / kind / "branch.safetensors").read_bytes() for kind in order}

    together = train_in_order(Kind.CLASSIFICATION, Kind.TAGGING)
    assert train_in_order(Kind.TAGGING, Kind.CLASSIFICATION) == together
    for kind, weights in together.items():
        assert train_in_order(kind) == {kind: weights}


@pytest.mark.parametrize("kind", list(Kind))
def test_a_student_learns_from_its_teacher(kind: Kind, tiny: Base, tmp_path: Path) -> None:
    spec = load_spec(write_task(tmp_path, kind, rows=200))
    arguments = Arguments(epochs=6, learning_rate=5e-3, batch_size=8)
    teacher, _ = train(spec, tiny, 1, 2, arguments, tmp_path / "teacher", silent)
    student, trained = distill(tmp_path / "teacher", tiny, 1, arguments, tmp_path / "student", silent)
    assert trained
    assert (student.tap, student.layers) == (1, 1)
    assert student.teacher == Teacher(
        digest=teacher.digest, folder=tmp_path / "teacher", init=Init.TEACHER, cls_weight=0
    )
    assert student.score > 0.85
    assert evaluate(spec, tiny, tmp_path / "student") == pytest.approx(student.metrics, abs=1e-5)


def test_a_student_starts_from_the_teachers_bottommost_layers(teacher: Path, tiny: Base, tmp_path: Path) -> None:
    still = Arguments(epochs=1, learning_rate=1e-12, batch_size=8, weight_decay=0.0)
    distill(teacher, tiny, 1, still, tmp_path / "student", silent)
    old, new = load_branch(teacher)[0].state_dict(), load_branch(tmp_path / "student")[0].state_dict()
    assert {name for name in new if name.startswith("layers.")} == {n for n in old if n.startswith("layers.0.")}
    for name, tensor in new.items():
        torch.testing.assert_close(tensor, old[name], atol=1e-6, rtol=0)


def test_a_student_can_start_from_the_base(teacher: Path, tiny: Base, tmp_path: Path) -> None:
    still = Arguments(epochs=1, learning_rate=1e-12, batch_size=8, weight_decay=0.0)
    distill(teacher, tiny, 1, still, tmp_path / "student", silent, init=Init.PRETRAINED)
    student = load_branch(tmp_path / "student")[0]
    for name, tensor in student.layers[0].state_dict().items():
        torch.testing.assert_close(tensor, tiny.encoder.layers[1].state_dict()[name], atol=1e-6, rtol=0)
    _, trained = distill(teacher, tiny, 1, still, tmp_path / "student", silent)
    assert trained, "another start is another training"


def test_distilling_the_same_again_is_up_to_date(teacher: Path, tiny: Base, tmp_path: Path) -> None:
    card, _ = distill(teacher, tiny, 1, QUICK, tmp_path / "student", silent)
    assert distill(teacher, tiny, 1, QUICK, tmp_path / "student", silent) == (card, False)


def test_a_student_may_have_all_layers_if_more_of_them_are_folded(teacher: Path, tiny: Base, tmp_path: Path) -> None:
    card, _ = distill(teacher, tiny, 2, QUICK, tmp_path / "student", silent, folded=2)
    assert (card.layers, card.folded) == (2, 2)
    assert load_branch(tmp_path / "student")[0].folded == 2
    plain, trained = train(card.spec, tiny, 1, 2, QUICK, tmp_path / "plain", silent)
    same, again = train(card.spec, tiny, 1, 2, QUICK, tmp_path / "plain", silent, folded=1)
    assert (trained, again) == (True, False)
    assert same == plain
    assert train(card.spec, tiny, 1, 2, QUICK, tmp_path / "plain", silent, folded=2)[1]


def test_a_student_may_be_drawn_to_its_teachers_state(
    teacher: Path, spec: TaskSpec, tiny: Base, tmp_path: Path
) -> None:
    def distance(cls_weight: float) -> float:
        out = tmp_path / f"student-{cls_weight}"
        card, _ = distill(teacher, tiny, 1, QUICK, out, silent, cls_weight=cls_weight)
        assert card.teacher is not None
        assert card.teacher.cls_weight == cls_weight
        rows = load_data(spec).train
        features = featurize(spec.kind, card.labels, tiny.tokenizer, tiny.max_length, rows)
        one, other = (
            outputs_of(load_branch(path)[0], tiny, 1, features, 8, with_states=True) for path in (teacher, out)
        )
        pairs = [(a.states, b.states) for a, b in zip(one, other, strict=True)]
        return sum(float((a - b).square().mean()) for a, b in pairs if a is not None and b is not None)

    assert distance(100.0) < 0.7 * distance(0.0)


def test_texts_without_a_labelled_token_add_nothing_to_the_loss() -> None:
    logits, labels = torch.randn(2, 3, 4), torch.full((2, 3), IGNORED)
    assert hard_loss(Kind.TAGGING, logits, labels) == 0
    assert soft_loss(Kind.TAGGING, logits, labels, torch.randn(2, 3, 4)) == 0


def test_a_teacher_of_folded_layers_may_have_a_student(tiny: Base, spec: TaskSpec, tmp_path: Path) -> None:
    train(spec, tiny, 1, 2, QUICK, tmp_path / "teacher", silent, folded=2)
    assert distill(tmp_path / "teacher", tiny, 1, QUICK, tmp_path / "student", silent)[0].layers == 1
    with pytest.raises(BranchError, match="2 layers, 2 of them folded; a student has fewer"):
        distill(tmp_path / "teacher", tiny, 2, QUICK, tmp_path / "student", silent)


def test_a_tagging_student_has_no_state_to_be_drawn_to(tiny: Base, tmp_path: Path) -> None:
    spec = load_spec(write_task(tmp_path, Kind.TAGGING))
    train(spec, tiny, 1, 2, Arguments(epochs=1), tmp_path / "teacher", silent)
    with pytest.raises(SpecError, match=r"the weight of \[CLS\] is 1"):
        distill(tmp_path / "teacher", tiny, 1, QUICK, tmp_path / "student", silent, cls_weight=1.0)


@pytest.mark.parametrize("layers", [0, 2, 3])
def test_a_student_has_fewer_layers_than_its_teacher(layers: int, teacher: Path, tiny: Base, tmp_path: Path) -> None:
    with pytest.raises(BranchError, match="has 2 layers, 1 of them folded; a student has fewer"):
        distill(teacher, tiny, layers, QUICK, tmp_path / "student", silent)


def test_a_student_learns_from_data_that_moved(teacher: Path, tiny: Base, tmp_path: Path) -> None:
    (tmp_path / "moved").mkdir()
    for name in ("task.yaml", "train.jsonl", "dev.jsonl"):
        (tmp_path / name).rename(tmp_path / "moved" / name)
    with pytest.raises(DataError, match=r"train\.jsonl cannot be read"):
        distill(teacher, tiny, 1, QUICK, tmp_path / "student", silent)
    moved = load_spec(tmp_path / "moved" / "task.yaml")
    assert distill(teacher, tiny, 1, QUICK, tmp_path / "student", silent, moved)[1]


def test_a_student_does_not_replace_its_teacher(teacher: Path, tiny: Base) -> None:
    with pytest.raises(BranchError, match="would replace its teacher"):
        distill(teacher, tiny, 1, QUICK, teacher, silent)


def test_a_teacher_of_another_trunk_is_refused(teacher: Path, base: Base, tmp_path: Path) -> None:
    with pytest.raises(FingerprintError, match="was trained on another trunk"):
        distill(teacher, base, 1, QUICK, tmp_path / "student", silent)


def test_labels_that_changed_since_the_teacher_are_refused(teacher: Path, tiny: Base, tmp_path: Path) -> None:
    with (tmp_path / "train.jsonl").open("a") as file:
        file.write('\n{"text": "a big box", "colour": "none"}')
    with pytest.raises(DataError, match="train the teacher again"):
        distill(teacher, tiny, 1, QUICK, tmp_path / "student", silent)


def test_a_new_branch_starts_from_the_bases_own_layers(tiny: Base) -> None:
    branch = new_branch(tiny, Kind.CLASSIFICATION, 1, 2, 3)
    for own, theirs in zip(branch.layers, tiny.encoder.layers[1:], strict=True):
        for name, tensor in own.state_dict().items():
            assert torch.equal(tensor, theirs.state_dict()[name])


def test_the_card_says_where_a_branch_came_from(teacher: Path, tiny: Base) -> None:
    card = BranchCard.model_validate_json((teacher / "branch.json").read_text())
    assert (card.base, card.revision, card.arguments["seed"]) == (tiny.name, "local", 1)
    assert set(card.versions) == {"torch", "transformers", "tokenizers", "numpy", "espalier"}
    assert card.spec.name == "colour"

"""Export writes whole folders, touches no head but those it is given, and refuses what does not fit."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from conftest import DEEP, SHALLOW, make_branch, python_on_full_disk
from tritonclient.grpc import model_config_pb2 as pb

from espalier.branch import BranchCard, load_branch, read_card, save_branch
from espalier.configs import read_config, write_config
from espalier.contract import ENSEMBLE, HeadInfo, Target
from espalier.encoder import Base
from espalier.errors import CheckpointError, ContractError, ExportError, FingerprintError
from espalier.repository import Repository, check_head, cores_counted, find_scheduling
from espalier.scheduling import Scheduling, available_cores
from export.gate import Quantized, quantized_score
from export.models import head_model, segment_model
from export.repository import Exported, export
from serving.preflight import check_repository
from training.data import load_data
from training.features import featurize
from training.metrics import dev_metrics
from training.predict import outputs_of


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def run(base: Base):
    """Export with the base that is loaded already."""

    def run(branches: list[Path], repository: Path, target: Target = Target.CPU, **options: Any):
        return export(branches, repository, target, {"threads": 1}, load=lambda name, revision: base, **options)

    return run


@pytest.fixture(scope="module")
def exported(run, branches: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("exported") / "repository"
    run([branches["intent"], branches["slots"]], path)
    return path


@pytest.fixture
def repository(exported: Path, tmp_path: Path) -> Path:
    return shutil.copytree(exported, tmp_path / "repository")


def test_a_new_branch_changes_no_byte_of_another_head(run, repository: Path, branches: dict[str, Path]) -> None:
    before = {name: contents(repository / name) for name in ("head_intent", "head_slots", "tokenizer")}
    assert [path.name for path in sorted(repository.glob("trunk_*"))] == [f"trunk_0_{SHALLOW}"]
    run([branches["urgency"]], repository)
    assert {name: contents(repository / name) for name in before} == before
    segments = sorted(path.name for path in repository.glob("trunk_*"))
    assert segments == [f"trunk_0_{SHALLOW}", f"trunk_{SHALLOW}_{DEEP}"]
    assert [output.name for output in read_config(repository / ENSEMBLE).output] == [
        "offsets", "intent", "slots", "urgency",
    ]  # fmt: skip


def test_a_tap_between_two_splits_the_segment(
    run, base: Base, specs: Path, branches: dict[str, Path], tmp_path: Path
) -> None:
    repository = tmp_path / "repository"
    run([branches["urgency"]], repository)
    head = contents(repository / "head_urgency")
    run([branches["intent"]], repository)
    assert [segment.model for segment in Repository(repository).trunk()] == ["trunk_0_3", "trunk_3_5"]
    assert not (repository / "trunk_0_5").exists()
    assert contents(repository / "head_urgency") == head


def test_exporting_the_same_again_writes_nothing(run, repository: Path, branches: dict[str, Path]) -> None:
    before = contents(repository)
    assert not any(done.written for done in run([branches["intent"], branches["slots"]], repository))
    assert contents(repository) == before


def test_two_exports_give_the_same_bytes(run, repository: Path, branches: dict[str, Path], tmp_path: Path) -> None:
    run([branches["slots"], branches["intent"]], tmp_path / "again")
    assert contents(tmp_path / "again") == contents(repository)


def test_a_damaged_folder_is_made_whole_again(run, repository: Path, branches: dict[str, Path]) -> None:
    model = repository / "head_intent" / "1" / "model.onnx"
    whole = model.read_bytes()
    model.write_bytes(whole[:1000])
    written = [done.model for done in run([branches["intent"]], repository) if done.written]
    assert written == ["head_intent", "multitask"]  # of the ensemble the generation alone
    assert model.read_bytes() == whole


def test_a_replaced_branch_replaces_its_head_alone(run, base, specs, repository: Path, tmp_path: Path) -> None:
    other = make_branch(base, specs / "intent.yaml", SHALLOW, 2, tmp_path / "intent", seed=99)
    done = {item.model: item.written for item in run([other], repository)}
    assert done == {"tokenizer": False, "trunk_0_3": False, "head_intent": True, "multitask": True}


def test_the_configs_keep_the_contract(repository: Path) -> None:
    trunk = Repository(repository).trunk()
    for name in ("head_intent", "head_slots"):
        config = read_config(repository / name)
        info = check_head(config, trunk)
        assert info.fingerprint == trunk[0].fingerprint
        assert config.backend == "onnxruntime"
        assert config.parameters["intra_op_thread_count"].string_value == "1"
        assert config.instance_group[0].kind == pb.ModelInstanceGroup.KIND_CPU
        assert config.batch_input[0].kind == pb.BatchInput.BATCH_ITEM_SHAPE
    labels = (repository / "head_intent" / "labels.txt").read_text().splitlines()
    assert read_config(repository / "head_intent").output[0].label_filename == "labels.txt"
    assert tuple(labels) == check_head(read_config(repository / "head_intent"), trunk).labels
    # What another step reads is never a public output: it would deadlock when it is not requested.
    ensemble = read_config(repository / ENSEMBLE)
    read = {tensor for step in ensemble.ensemble_scheduling.step for tensor in step.input_map.values()}
    assert not read & {output.name for output in ensemble.output}


def test_gpu_target_is_fp16_and_ends_in_fp32(run, branches: dict[str, Path], tmp_path: Path) -> None:
    repository = tmp_path / "gpu"
    done = run([branches["intent"], branches["urgency"], branches["slots"]], repository, Target.GPU)
    assert all(item.difference is None or item.difference <= 2e-2 for item in done)
    for path in repository.glob("*_*/1/model.onnx"):
        weights = {weight.data_type for weight in onnx.load(path).graph.initializer}
        assert onnx.TensorProto.FLOAT not in weights
        config = read_config(path.parent.parent)
        assert config.instance_group[0].kind == pb.ModelInstanceGroup.KIND_GPU
        expected = pb.TYPE_FP32 if path.parent.parent.name.startswith("head_") else pb.TYPE_FP16
        assert config.output[0].data_type == expected
        assert {tensor.data_type for tensor in config.input if tensor.name.startswith("hidden")} <= {pb.TYPE_FP16}


def measured(run, branches: dict[str, Path], repository: Path, tasks: Sequence[str]) -> list[str]:
    """Export with 8-bit products; return the tasks whose dev metric was measured, and believe the branches' own."""
    asked = []

    def gate(models: Quantized, card: BranchCard, base: Base) -> float:
        asked.append(card.spec.name)
        return card.score - 0.001

    run([branches[task] for task in tasks], repository, Target.INT8, gate=gate)
    return asked


def test_int8_heads_tell_the_dev_metric_as_measured(run, branches: dict[str, Path], tmp_path: Path) -> None:
    repository = tmp_path / "int8"
    assert measured(run, branches, repository, ["intent", "urgency"]) == ["intent", "urgency"]
    for task in ("intent", "urgency"):
        info = HeadInfo.read(read_config(repository / f"head_{task}"))
        assert info.score == round(load_branch(branches[task])[1].score - 0.001, 6)
    before = contents(repository)
    assert measured(run, branches, repository, ["intent", "slots"]) == ["slots"], "what is deployed is measured again"
    assert contents(repository / "head_intent") == {
        name.removeprefix("head_intent/"): data for name, data in before.items() if name.startswith("head_intent/")
    }


def test_the_gate_asks_the_dev_split_and_refuses_what_lost_too_much(
    run, base: Base, branches: dict[str, Path], tmp_path: Path
) -> None:
    """Untrained branches: the card's metric is set to what the branch has, and then to what none can keep."""
    for task in ("intent", "urgency", "slots"):
        branch, card = load_branch(branches[task])
        data = load_data(card.spec)
        features = featurize(card.spec.kind, card.labels, base.tokenizer, base.max_length, data.dev)
        logits = [output.logits for output in outputs_of(branch, base, card.tap, features, 8)]
        padded = torch.nn.utils.rnn.pad_sequence(logits, batch_first=True)
        exact = dev_metrics(card.spec, data, features)(padded.numpy())
        own = altered(branches[task], tmp_path / task, metrics=exact)
        model = head_model(branch, task, Target.CPU)
        segments = [segment_model(base.encoder, 0, card.tap, Target.CPU)]
        found = quantized_score(Quantized(segments, model), load_branch(own)[1], base)
        assert found == pytest.approx(exact[card.spec.metric], abs=1e-4), task
        proud = altered(branches[task], tmp_path / f"{task}-proud", metrics={**exact, card.spec.metric: 1.0})
        sentence = rf"task {task}: with 8-bit products .* more than 0.5 points are lost; nothing was written"
        with pytest.raises(ExportError, match=sentence):
            run([proud], tmp_path / "refused", Target.INT8)
        assert not list((tmp_path / "refused").glob("*_*"))


def test_one_repository_has_one_target(run, repository: Path, branches: dict[str, Path]) -> None:
    with pytest.raises(ExportError, match="holds a cpu export; one repository has one target"):
        run([branches["urgency"]], repository, Target.GPU)


def altered(source: Path, out: Path, **changes: object) -> Path:
    branch, card = load_branch(source)
    save_branch(out, branch, BranchCard.model_validate({**card.model_dump(), **changes}))
    return out


def test_a_branch_of_another_trunk_is_refused(run, branches: dict[str, Path], tmp_path: Path) -> None:
    stray = altered(branches["intent"], tmp_path / "stray", fingerprint="0" * 64)
    with pytest.raises(FingerprintError, match=r"stray was trained on another trunk: below layer 3 .* 000000000000"):
        run([stray], tmp_path / "repository")
    assert not (tmp_path / "repository").exists()


def test_branches_of_two_bases_are_refused(run, branches: dict[str, Path], tmp_path: Path) -> None:
    stray = altered(branches["slots"], tmp_path / "stray", base="google-bert/bert-base-uncased")
    with pytest.raises(FingerprintError, match="one repository has one trunk"):
        run([branches["intent"], stray], tmp_path / "repository")


def test_a_task_given_twice_is_refused(run, branches: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="task 'intent' is given twice"):
        run([branches["intent"], branches["intent"]], tmp_path / "repository")


def test_a_repository_of_another_trunk_is_left_alone(run, repository: Path, branches: dict[str, Path]) -> None:
    config = repository / "head_slots" / "config.pbtxt"
    config.write_text(config.read_text().replace(read_card(branches["slots"]).fingerprint, "f" * 64))
    before = contents(repository)
    with pytest.raises(FingerprintError, match="head_slots was trained on another trunk"):
        run([branches["urgency"]], repository)
    assert contents(repository) == before


def test_a_head_that_taps_where_no_segment_ends_is_refused(run, branches: dict[str, Path], repository: Path) -> None:
    info = check_head(read_config(repository / "head_intent"), Repository(repository).trunk())
    config = read_config(repository / "head_intent")
    config.parameters["tap"].string_value = "2"
    with pytest.raises(ContractError, match=r"head_intent taps the trunk at layer 2, where no .* \(taps: 3\)"):
        check_head(config, Repository(repository).trunk())
    assert info.tap == SHALLOW


def test_an_output_that_cannot_be_written_is_one_sentence(run, branches: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ExportError, match=r"file/repository cannot be written: Not a directory"):
        run([branches["intent"]], tmp_path / "file" / "repository")


def test_a_full_disk_leaves_nothing_half_written(repository: Path, branches: dict[str, Path]) -> None:
    before = contents(repository)
    script = (
        "import sys; from pathlib import Path; from export.repository import export; from espalier.errors import *\n"
        "try: export([Path(sys.argv[1])], Path(sys.argv[2]), scheduling={'threads': 1})\n"
        "except ExportError as error: sys.exit(f'ExportError: {error}')\n"
    )
    done = python_on_full_disk(5_000_000, "-c", script, branches["urgency"], repository)
    assert done.returncode == 1
    assert "cannot be written: File too large" in done.stderr
    assert "Traceback" not in done.stderr
    after = contents(repository)
    assert {name: after[name] for name in before} == before
    assert not [name for name in after if "urgency" in name]
    assert not (repository / "tokenizer" / ".staging").exists()


def test_exporting_over_a_full_copy_elsewhere_is_the_same(run, repository: Path, branches, tmp_path: Path) -> None:
    """A repository is self-contained: a copy of it can be extended like the original."""
    copy = tmp_path / "copy"
    shutil.copytree(repository, copy)
    run([branches["urgency"]], copy)
    run([branches["urgency"]], repository)
    assert contents(copy) == contents(repository)


def test_an_export_stopped_in_a_split_harms_nothing(
    run, base: Base, repository: Path, branches: dict[str, Path], specs: Path, tmp_path: Path
) -> None:
    """The new segment is there, the ensemble is still the old one: it stays fit to be served, and extended."""
    lower = make_branch(base, specs / "urgency.yaml", 2, 1, tmp_path / "lower")

    def stop(exported: Exported) -> None:
        if exported.model == "trunk_0_2":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export([lower], repository, scheduling={"threads": 1}, load=lambda name, revision: base, report=stop)
    assert (repository / "trunk_0_2").exists()
    assert [head.task for head in check_repository(repository)] == ["intent", "slots"]
    assert [segment.model for segment in Repository(repository).trunk()] == ["trunk_0_3"]
    run([lower], repository)
    assert [path.name for path in Repository(repository).segment_folders()] == ["trunk_0_2", "trunk_2_3"]
    assert len(check_repository(repository)) == 3


def test_what_a_killed_swap_moved_away_comes_back(run, repository: Path, branches: dict[str, Path]) -> None:
    aside = repository / "tokenizer" / ".staging" / ".head_slots.old.x"
    aside.mkdir(parents=True)
    (repository / "head_slots").rename(aside / "head_slots")
    assert not any(done.written for done in run([branches["intent"]], repository) if done.model != ENSEMBLE)
    assert [head.task for head in check_repository(repository)] == ["intent", "slots"]


def test_a_copy_of_a_head_under_another_name_is_refused(run, repository: Path, branches: dict[str, Path]) -> None:
    shutil.copytree(repository / "head_slots", repository / "head_slots_old")
    config = repository / "head_slots_old" / "config.pbtxt"
    config.write_text(config.read_text().replace('name: "head_slots"', 'name: "head_slots_old"'))
    with pytest.raises(ContractError, match="holds task 'slots', so it must be named head_slots"):
        run([branches["intent"]], repository)


def test_a_folder_that_is_no_segment_is_left_alone(run, repository: Path, branches: dict[str, Path]) -> None:
    (repository / "trunk_notes").mkdir()
    run([branches["urgency"]], repository)
    assert (repository / "trunk_notes").is_dir()


def test_the_deployed_trunk_keeps_its_scheduling(base: Base, repository: Path, branches: dict[str, Path]) -> None:
    def again(**changed: int) -> Scheduling | None:
        export([branches["intent"]], repository, scheduling=changed, load=lambda name, revision: base)
        kept = {Scheduling.read(read_config(folder)) for folder in Repository(repository).segment_folders()}
        assert kept == {Repository(repository).scheduling()}
        return kept.pop()

    first = again()
    assert first is not None
    assert again(threads=7, delay=300) == first.model_copy(update={"threads": 7, "delay": 300})
    assert again() == first.model_copy(update={"threads": 7, "delay": 300})


def test_a_trunk_that_tells_no_threads_is_scheduled_anew(run, repository: Path, branches: dict[str, Path]) -> None:
    for folder in Repository(repository).segment_folders():
        config = read_config(folder)
        del config.parameters["intra_op_thread_count"]
        write_config(folder, config)
    assert Repository(repository).scheduling() is None
    run([branches["intent"]], repository)
    assert Repository(repository).scheduling() == Scheduling.default(available_cores(), threads=1)


def test_a_server_may_hand_out_the_cores_that_a_segment_takes(base: Base, repository: Path, branches) -> None:
    assert cores_counted(find_scheduling(repository)) == available_cores()
    assert cores_counted(find_scheduling(repository.parent / "nowhere")) == available_cores()
    export([branches["intent"]], repository, scheduling={"threads": 99}, load=lambda name, revision: base)
    assert cores_counted(find_scheduling(repository)) == 99


def test_a_base_that_moved_is_found_where_one_says(
    tiny: Base, tiny_checkpoint: Path, specs: Path, tmp_path: Path
) -> None:
    branch = make_branch(tiny, specs / "intent.yaml", 1, 1, tmp_path / "branch")
    moved = tmp_path / "moved"
    shutil.copytree(tiny_checkpoint, moved)
    shutil.copytree(branch, tmp_path / "lost")
    card = tmp_path / "lost" / "branch.json"
    card.write_text(card.read_text().replace(str(tiny_checkpoint), str(tmp_path / "gone")))
    with pytest.raises(CheckpointError, match="gone"):
        export([tmp_path / "lost"], tmp_path / "repository")
    export([tmp_path / "lost"], tmp_path / "repository", base=str(moved))
    assert check_repository(tmp_path / "repository")[0].task == "intent"

"""The model-repository contract: configs that render the same, heads that are refused by what differs."""

import itertools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import text_format
from hypothesis import given
from hypothesis import strategies as st
from tritonclient.grpc import model_config_pb2 as pb

from espalier.configs import (
    ensemble_config,
    head_config,
    read_config,
    render,
    tokenizer_config,
    trunk_config,
    write_config,
)
from espalier.contract import (
    CONFIG_FILE,
    OFFSETS,
    TASK_NAME,
    TEXT,
    HeadInfo,
    Kind,
    Structure,
    Target,
    TrunkInfo,
    segments_for,
)
from espalier.errors import ContractError, FingerprintError
from espalier.repository import Repository, check_head
from espalier.scheduling import PRIORITY_OF_HEADS, Scheduling, segment_priority

SCHEDULING = Scheduling(threads=3, instances=2, batch=8, delay=0)
PRINTS = {3: "3" * 64, 5: "5" * 64, 9: "9" * 64}


def segment(start: int, stop: int, target: Target = Target.CPU) -> TrunkInfo:
    return TrunkInfo(
        start=start, stop=stop, hidden_size=8, target=target, base="a base", revision="local", fingerprint=PRINTS[stop]
    )


def head(task: str, kind: Kind = Kind.CLASSIFICATION, tap: int = 3, **changes: Any) -> HeadInfo:
    labels = () if kind is Kind.REGRESSION else ("no", 'say "yes"', "jā: 1/2")
    values: dict[str, Any] = {
        "task": task, "kind": kind, "tap": tap, "layers": 1, "folded": int(kind is not Kind.TAGGING), "hidden_size": 8,
        "target": Target.CPU, "labels": labels, "pair": False, "fingerprint": PRINTS[tap], "branch_digest": "d" * 64,
        "model_digest": "e" * 64, "metric": "accuracy", "score": 0.875,
    }  # fmt: skip
    return HeadInfo(**{**values, **changes})


CHAIN = [segment(0, 3), segment(3, 5), segment(5, 9)]
HEADS = [
    head("urgency", Kind.REGRESSION, 9), head("intent"), head("slots", Kind.TAGGING, 5), head("intent_2", tap=9),
    head("slots_crf", Kind.TAGGING, 3, structure=Structure.CRF),
]  # fmt: skip
CONFIGS = {
    "tokenizer": lambda: tokenizer_config(128),
    "trunk": lambda: trunk_config(CHAIN[0], SCHEDULING),
    "next segment": lambda: trunk_config(CHAIN[1], SCHEDULING),
    "gpu trunk": lambda: trunk_config(segment(0, 3, Target.GPU), SCHEDULING),
    **{info.task: (lambda info=info: head_config(info)) for info in HEADS},
    "gpu head": lambda: head_config(HEADS[1].model_copy(update={"target": Target.GPU})),
    "ensemble": lambda: ensemble_config(CHAIN, HEADS),
}


def tensors(tensors: Any) -> dict[str, tuple[str, list[int]]]:
    return {tensor.name: (pb.DataType.Name(tensor.data_type), list(tensor.dims)) for tensor in tensors}


@pytest.mark.parametrize("build", CONFIGS.values(), ids=CONFIGS)
def test_a_config_is_read_back_from_its_file(build: Callable[[], pb.ModelConfig], tmp_path: Path) -> None:
    write_config(tmp_path, build())
    assert read_config(tmp_path) == build()


@pytest.mark.parametrize("build", CONFIGS.values(), ids=CONFIGS)
def test_equal_configs_are_equal_bytes(build: Callable[[], pb.ModelConfig]) -> None:
    config = build()
    turned = pb.ModelConfig()
    turned.CopyFrom(config)
    turned.parameters.clear()
    for key in reversed(list(config.parameters)):
        turned.parameters[key].CopyFrom(config.parameters[key])
    assert render(turned) == render(config) == render(text_format.Parse(render(config), pb.ModelConfig()))


@pytest.mark.parametrize("info", HEADS, ids=lambda info: info.task)
def test_a_head_says_of_itself_what_was_written(info: HeadInfo) -> None:
    config = text_format.Parse(render(head_config(info)), pb.ModelConfig())
    assert HeadInfo.read(config) == info


@pytest.mark.parametrize("info", [*CHAIN, segment(0, 9, Target.GPU)], ids=lambda info: f"{info.model} {info.target}")
def test_a_segment_says_of_itself_what_was_written(info: TrunkInfo) -> None:
    config = text_format.Parse(render(trunk_config(info, SCHEDULING)), pb.ModelConfig())
    assert TrunkInfo.read(config) == info
    assert config.name == f"trunk_{info.start}_{info.stop}"


def test_values_that_look_like_json_stay_text() -> None:
    info = head("intent", metric="1", branch_digest="null")
    assert HeadInfo.read(head_config(info)) == info


@pytest.mark.parametrize(
    ("taps", "chain"),
    [
        ([], []),
        ([4], [(0, 4)]),
        ([9, 3, 9, 5, 3], [(0, 3), (3, 5), (5, 9)]),
        ([1, 2, 3], [(0, 1), (1, 2), (2, 3)]),
    ],
    ids=str,
)
def test_a_segment_ends_at_every_tap(taps: list[int], chain: list[tuple[int, int]]) -> None:
    assert segments_for(taps) == chain


@pytest.mark.parametrize("name", ["intent", "a", "snips_intent", "sst2", "a_1_b"])
def test_task_names(name: str) -> None:
    assert TASK_NAME.fullmatch(name)


@pytest.mark.parametrize("name", ["", "Intent", "2sst", "_a", "a_", "a__b", "a-b", "a b", "a/b", "é", "a\n"])
def test_no_task_names(name: str) -> None:
    assert not TASK_NAME.fullmatch(name)


# --- shapes -----------------------------------------------------------------------------------------------------


def test_the_first_segment_reads_tokens_and_the_next_what_is_below() -> None:
    first, second = (trunk_config(info, SCHEDULING) for info in CHAIN[:2])
    assert tensors(first.input) == {
        "length": ("TYPE_INT32", [1]),
        "input_ids": ("TYPE_INT64", [-1]),
        "token_type_ids": ("TYPE_INT64", [-1]),
    }
    assert tensors(second.input) == {"length": ("TYPE_INT32", [1]), "hidden_below": ("TYPE_FP32", [-1, 8])}
    for config, source in ((first, "input_ids"), (second, "hidden_below")):
        assert tensors(config.output) == {"hidden": ("TYPE_FP32", [-1, 8])}
        assert {tensor.name: tensor.allow_ragged_batch for tensor in config.input}[source]
        assert config.batch_input[0].source_input == [source]
        assert config.batch_output[0].source_input == [source]


@pytest.mark.parametrize(
    ("kind", "output"),
    [
        (Kind.CLASSIFICATION, {"probabilities": ("TYPE_FP32", [3])}),
        (Kind.REGRESSION, {"value": ("TYPE_FP32", [1])}),
        (Kind.TAGGING, {"probabilities": ("TYPE_FP32", [-1, 3])}),
    ],
)
@pytest.mark.parametrize("target", list(Target))
def test_a_head_has_one_output_and_it_is_single_precision(
    kind: Kind, output: dict[str, tuple[str, list[int]]], target: Target
) -> None:
    config = head_config(head("a", kind, target=target))
    assert tensors(config.output) == output
    half = "TYPE_FP16" if target is Target.GPU else "TYPE_FP32"
    assert tensors(config.input) == {"length": ("TYPE_INT32", [1]), "hidden": (half, [-1, 8])}
    assert len(config.batch_output) == (kind is Kind.TAGGING)
    assert config.output[0].label_filename == ("labels.txt" if kind is Kind.CLASSIFICATION else "")


def test_a_head_with_a_crf_reads_the_tokens_and_answers_with_a_path() -> None:
    config = head_config(HEADS[-1].model_copy(update={"target": Target.GPU}))
    assert tensors(config.input) == {
        "length": ("TYPE_INT32", [1]),
        "hidden": ("TYPE_FP16", [-1, 8]),
        "input_ids": ("TYPE_INT64", [-1]),
    }
    assert all(tensor.allow_ragged_batch for tensor in config.input[1:])
    assert tensors(config.output) == {"path": ("TYPE_FP32", [-1, 2])}
    assert config.batch_output[0].target_name == ["path"]
    steps = {step.model_name: step for step in ensemble_config(CHAIN, HEADS).ensemble_scheduling.step}
    assert steps["head_slots_crf"].input_map["input_ids"] == steps["tokenizer"].output_map["input_ids"]


def test_a_head_that_does_not_say_its_structure_chooses_word_by_word() -> None:
    config = head_config(HEADS[2])
    del config.parameters["structure"]
    assert check_head(config, CHAIN) == HEADS[2]


def test_threads_are_set_on_the_cpu_alone() -> None:
    threads = {
        name: CONFIGS[name]().parameters["intra_op_thread_count"].string_value
        for name in ("trunk", "next segment", "gpu trunk", "intent", "gpu head")
    }
    assert threads == {"trunk": "3", "next segment": "3", "gpu trunk": "", "intent": "1", "gpu head": ""}


def test_what_is_nearest_to_its_answer_goes_first_and_the_tokenizer_before_all() -> None:
    first, then, head = (
        CONFIGS[name]().instance_group[0].rate_limiter.priority for name in ("trunk", "next segment", "intent")
    )
    assert first > 2 * then > 20 * head
    assert CONFIGS["tokenizer"]().instance_group[0].rate_limiter.priority == 0  # not set: Triton takes 1
    for name in ("gpu trunk", "gpu head"):
        assert not CONFIGS[name]().instance_group[0].HasField("rate_limiter")
    upwards = [segment_priority(start) for start in range(24)]
    assert all(below > 1.3 * above for below, above in itertools.pairwise(upwards))
    assert upwards[0] < 2**32
    assert upwards[-1] > 4 * PRIORITY_OF_HEADS


def test_on_a_cpu_every_step_takes_cores_and_on_a_gpu_none() -> None:
    taken = {
        name: [(resource.name, resource.count) for resource in CONFIGS[name]().instance_group[0].rate_limiter.resources]
        for name in ("trunk", "next segment", "gpu trunk", "intent", "gpu head")
    }
    assert taken == {
        "trunk": [("cores", 3)], "next segment": [("cores", 3)], "gpu trunk": [], "intent": [("cores", 1)],
        "gpu head": [],
    }  # fmt: skip


@given(
    st.builds(
        Scheduling, threads=st.integers(1, 99), instances=st.integers(1, 9), batch=st.integers(0, 64),
        delay=st.integers(0, 10**6),
    ),
    st.integers(1, 256),
)  # fmt: skip
def test_a_scheduling_is_read_as_it_was_written(scheduling: Scheduling, cores: int) -> None:
    config = trunk_config(CHAIN[0], SCHEDULING)
    scheduling.write_to(config)
    scheduling.write_to(config)
    assert Scheduling.read(text_format.Parse(render(config), pb.ModelConfig())) == scheduling
    default = Scheduling.default(cores)
    assert cores / 2 < default.threads * default.instances <= cores
    assert Scheduling.default(cores, threads=cores).instances == 1


def test_the_ensemble_chains_the_segments_and_hangs_each_head_on_its_tap() -> None:
    config = ensemble_config(CHAIN, HEADS)
    steps = {step.model_name: step for step in config.ensemble_scheduling.step}
    assert list(steps) == [
        "tokenizer", "trunk_0_3", "trunk_3_5", "trunk_5_9",
        "head_intent", "head_intent_2", "head_slots", "head_slots_crf", "head_urgency",
    ]  # fmt: skip
    made = {tensor: name for name, step in steps.items() for tensor in step.output_map.values()}
    below = {
        name: {made[tensor] for tensor in step.input_map.values() if tensor in made} - {"tokenizer"}
        for name, step in steps.items()
    }
    assert below == {
        "tokenizer": set(), "trunk_0_3": set(), "trunk_3_5": {"trunk_0_3"}, "trunk_5_9": {"trunk_3_5"},
        "head_intent": {"trunk_0_3"}, "head_slots": {"trunk_3_5"}, "head_slots_crf": {"trunk_0_3"},
        "head_intent_2": {"trunk_5_9"}, "head_urgency": {"trunk_5_9"},
    }  # fmt: skip


def test_the_ensembles_tensors_are_those_that_its_models_have() -> None:
    configs = [tokenizer_config(128), *(trunk_config(info, SCHEDULING) for info in CHAIN)]
    models = {config.name: config for config in [*configs, *(head_config(info) for info in HEADS)]}
    for step in ensemble_config(CHAIN, HEADS).ensemble_scheduling.step:
        assert set(step.input_map) == set(tensors(models[step.model_name].input))
        assert set(step.output_map) == set(tensors(models[step.model_name].output))


def test_the_ensemble_answers_with_tasks_and_offsets() -> None:
    config = ensemble_config(CHAIN, HEADS)
    assert tensors(config.input) == {TEXT: ("TYPE_STRING", [-1])}
    assert tensors(config.output) == {
        OFFSETS: ("TYPE_INT32", [-1, 2]),
        "intent": ("TYPE_FP32", [3]),
        "intent_2": ("TYPE_FP32", [3]),
        "slots": ("TYPE_FP32", [-1, 3]),
        "slots_crf": ("TYPE_FP32", [-1, 2]),
        "urgency": ("TYPE_FP32", [1]),
    }


def test_no_public_output_is_read_by_another_step() -> None:
    config = ensemble_config(CHAIN, HEADS)
    read = {tensor for step in config.ensemble_scheduling.step for tensor in step.input_map.values()}
    assert not read & {output.name for output in config.output}
    assert all(tensor.startswith("_") for tensor in read - {TEXT})


def test_the_order_of_heads_does_not_matter() -> None:
    assert render(ensemble_config(CHAIN, HEADS)) == render(ensemble_config(CHAIN, HEADS[::-1]))


# --- heads that do not fit --------------------------------------------------------------------------------------


@pytest.mark.parametrize("info", HEADS, ids=lambda info: info.task)
@pytest.mark.parametrize("target", list(Target))
def test_a_head_that_fits_is_accepted(info: HeadInfo, target: Target) -> None:
    chain = [segment(info.start, info.stop, target) for info in CHAIN]
    info = info.model_copy(update={"target": target})
    assert check_head(head_config(info), chain) == info


def refusal(config: pb.ModelConfig, error: type[ContractError] = ContractError) -> str:
    """Return why the head is refused, in one line."""
    with pytest.raises(error) as caught:
        check_head(config, CHAIN)
    assert type(caught.value) is error
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(config.name)
    return message


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        pytest.param({"tap": 4}, r"taps the trunk at layer 4, .* \(taps: 3, 5, 9\); `espalier export`", id="tap"),
        pytest.param({"hidden_size": 16}, "reads hidden states of size 16, but trunk_0_3 gives 8", id="hidden size"),
        pytest.param({"labels": ()}, "a classification head has 0 labels", id="no labels"),
        pytest.param({"kind": Kind.REGRESSION}, "a regression head has 3 labels", id="labels of numbers"),
        pytest.param({"structure": Structure.CRF}, "a classification head has no CRF", id="CRF of classes"),
        pytest.param({"task": "a___b"}, "'a___b' is not a task name", id="bad name"),
        pytest.param({"task": OFFSETS}, "'offsets' is not a task name", id="taken name"),
    ],
)  # fmt: skip
def test_a_head_that_does_not_fit_is_told_what_differs(changes: dict[str, Any], reason: str) -> None:
    config = head_config(head("intent"))
    info = head("intent").model_copy(update=changes)
    info.write_to(config)
    config.name = info.model
    assert re.search(reason, refusal(config))


def test_a_head_of_another_trunk_is_refused_by_its_fingerprint() -> None:
    config = head_config(head("intent", fingerprint="f" * 64))
    assert refusal(config, FingerprintError) == (
        "head_intent was trained on another trunk: its fingerprint at layer 3 is ffffffffffff, the deployed trunk's is "
        "333333333333; train it on 'a base' or deploy its trunk"
    )


def test_a_folder_of_another_name_is_refused() -> None:
    config = head_config(head("intent"))
    config.name = "head_other"
    assert "the folder says it holds task 'intent', so it must be named head_intent" in refusal(config)


def test_a_trunk_that_is_not_there_is_told() -> None:
    with pytest.raises(ContractError, match=r"no deployed segment ends \(taps: none\)"):
        check_head(head_config(head("intent")), [])


@pytest.mark.parametrize("target", [Target.GPU, Target.INT8])
def test_a_head_for_another_target_is_refused(target: Target) -> None:
    message = refusal(head_config(head("intent", target=target)))
    assert f"was exported for {target}, but the deployed trunk for cpu; export the head with --target cpu" in message


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        pytest.param(lambda c: c.input[1].dims.__setitem__(1, 9), r"inputs are hidden FP32\[-1, 9\]", id="input dims"),
        pytest.param(lambda c: setattr(c.input[0], "name", "lengths"), r"inputs are .*lengths INT32\[1\]", id="name"),
        pytest.param(lambda c: c.input.add(name="mask"), r"inputs are .*mask INVALID\[\]", id="extra input"),
        pytest.param(lambda c: c.output[0].dims.__setitem__(0, 4), r"outputs are probabilities FP32\[4\]", id="dims"),
        pytest.param(
            lambda c: setattr(c.output[0], "data_type", pb.TYPE_FP16),
            r"outputs are probabilities FP16\[3\], but this contract needs probabilities FP32\[3\]",
            id="dtype",
        ),
        pytest.param(lambda c: c.ClearField("output"), "outputs are , but this contract needs probab", id="no output"),
    ],
)  # fmt: skip
def test_tensors_that_do_not_fit_are_shown(change: Callable[[Any], None], reason: str) -> None:
    config = head_config(head("intent"))
    change(config)
    assert re.search(reason, refusal(config))


@pytest.mark.parametrize(
    ("parameter", "value", "reason"),
    [
        ("labels", "[no", "parameter 'labels' is not JSON: '[no'"),
        ("labels", '"no"', "parameter 'labels': "),
        ("tap", "three", "parameter 'tap' is not JSON: 'three'"),
        ("tap", "0", "parameter 'tap': Input should be greater than or equal to 1; export the folder again"),
        ("kind", "ranking", "parameter 'kind': "),
        ("structure", "hmm", "parameter 'structure': "),
        ("score", '"good"', "parameter 'score': "),
        ("fingerprint", None, "parameter 'fingerprint': Field required; export the folder again"),
        ("labels", None, "parameter 'labels': Field required"),
    ],
)
def test_a_broken_parameter_is_named(parameter: str, value: str | None, reason: str) -> None:
    config = head_config(head("intent"))
    if value is None:
        del config.parameters[parameter]
    else:
        config.parameters[parameter].string_value = value
    assert f"head_intent/{CONFIG_FILE}: {reason}" in refusal(config)


def test_parameters_of_other_people_are_left_alone() -> None:
    config = head_config(head("intent"))
    config.parameters["owner"].string_value = "not { json"
    assert check_head(config, CHAIN) == head("intent")


# --- repositories -----------------------------------------------------------------------------------------------


def write_repository(path: Path, chain: list[TrunkInfo], heads: list[HeadInfo]) -> Repository:
    for segment in chain:
        write_config(path / segment.model, trunk_config(segment, SCHEDULING))
    for info in heads:
        write_config(path / info.model, head_config(info))
    write_config(path / "multitask", ensemble_config(chain, heads))
    return Repository(path)


def test_a_repository_tells_its_trunk_and_heads(tmp_path: Path) -> None:
    repository = write_repository(tmp_path, CHAIN, HEADS)
    assert repository.trunk() == CHAIN
    assert repository.heads() == sorted(HEADS, key=lambda info: info.model)


def test_what_the_ensemble_does_not_wire_is_not_deployed(tmp_path: Path) -> None:
    write_repository(tmp_path, CHAIN, HEADS)
    repository = write_repository(tmp_path, CHAIN[:1], [HEADS[1]])
    (tmp_path / "trunk_notes").mkdir()
    (tmp_path / "head_notes.txt").write_text("not a folder")
    assert repository.trunk() == CHAIN[:1]
    assert repository.heads() == [HEADS[1]]
    assert [folder.name for folder in repository.segment_folders()] == ["trunk_0_3", "trunk_3_5", "trunk_5_9"]
    assert [folder.name for folder in repository.head_folders()] == sorted(info.model for info in HEADS)


def test_segments_are_in_the_order_of_their_layers(tmp_path: Path) -> None:
    ends = [(0, 3), (3, 10), (10, 11)]
    chain = [CHAIN[0].model_copy(update={"start": start, "stop": stop}) for start, stop in ends]
    assert write_repository(tmp_path, chain[::-1], []).trunk() == chain


@pytest.mark.parametrize(("gone", "layer", "above"), [(0, 0, "trunk_3_5"), (1, 3, "trunk_5_9")])
def test_a_gap_in_the_trunk_is_named(gone: int, layer: int, above: str, tmp_path: Path) -> None:
    repository = write_repository(tmp_path, [*CHAIN[:gone], *CHAIN[gone + 1 :]], [])
    with pytest.raises(ContractError, match=rf"a segment from layer {layer} is missing \(next is {above}\); export"):
        repository.trunk()


def test_segments_that_overlap_are_no_chain(tmp_path: Path) -> None:
    with pytest.raises(ContractError, match="the trunk is no chain"):
        write_repository(tmp_path, [*CHAIN, segment(0, 5)], []).trunk()


def test_a_wired_model_that_is_not_there_is_named(tmp_path: Path) -> None:
    repository = write_repository(tmp_path, CHAIN, HEADS)
    for name in ("trunk_3_5", "head_slots"):
        (tmp_path / name / CONFIG_FILE).unlink()
    with pytest.raises(ContractError, match=r"trunk_3_5/config\.pbtxt is missing"):
        repository.trunk()
    with pytest.raises(ContractError, match=r"head_slots/config\.pbtxt is missing"):
        repository.heads()


def test_a_repository_without_anything_is_empty(tmp_path: Path) -> None:
    assert Repository(tmp_path / "none").trunk() == []
    assert Repository(tmp_path / "none").heads() == []
    assert Repository(tmp_path / "none").head_folders() == []


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, r"config\.pbtxt is missing; every model folder has one"),
        (b'name: "a" }', r"config\.pbtxt is not a Triton model config: "),
        (b"nonsense: 3", r"config\.pbtxt is not a Triton model config: .*nonsense"),
        (b'name: "\xff"', r"config\.pbtxt is not a Triton model config: "),
    ],
    ids=["missing", "syntax", "unknown field", "not UTF-8"],
)
def test_a_config_that_cannot_be_read_is_named(content: bytes | None, reason: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / CONFIG_FILE).write_bytes(content)
    with pytest.raises(ContractError) as caught:
        read_config(tmp_path)
    assert re.search(reason, str(caught.value))
    assert "\n" not in str(caught.value)


def test_labels_of_any_characters_survive_as_json() -> None:
    config = head_config(HEADS[1])
    assert json.loads(config.parameters["labels"].string_value) == list(HEADS[1].labels)

"""The clients' conversation with the server, without I/O: what they ask, and what they make of the replies."""

import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from clients import Classification, Client, Regression, Tagging
from clients.protocol import Call, Conversation, Infer, Program, ReadConfig, Reply
from espalier.configs import ensemble_config, head_config
from espalier.contract import ENSEMBLE, HeadInfo, Kind, Structure, Target, TrunkInfo
from espalier.errors import DeadlineError, RequestError, UnavailableError, UnknownTaskError

Server = Callable[[Call], Any]


def head(task: str, kind: Kind, labels: Sequence[str] = (), structure: Structure = Structure.SOFTMAX) -> HeadInfo:
    return HeadInfo(
        task=task,
        kind=kind,
        structure=structure,
        tap=1,
        layers=1,
        folded=1,
        hidden_size=4,
        target=Target.CPU,
        labels=tuple(labels),
        pair=False,
        fingerprint="f" * 64,
        branch_digest="b" * 64,
        model_digest="e" * 64,
        metric="accuracy",
        score=0.5,
    )


TRUNK = TrunkInfo(start=0, stop=1, hidden_size=4, target=Target.CPU, base="base", revision="1", fingerprint="f" * 64)
INTENT = head("intent", Kind.CLASSIFICATION, ["alarm", "music"])
SLOTS = head("slots", Kind.TAGGING, ["O", "B-time", "I-time"])
URGENCY = head("urgency", Kind.REGRESSION)
SLOTS_CRF = head("slots_crf", Kind.TAGGING, ["O", "B-time", "I-time"], Structure.CRF)
OFFSETS = [(0, 0), (0, 4), (5, 7), (0, 0)]  # of "wake me"
PATH = [(-1, -0.5), (1, -0.5), (2, -0.5), (-1, -0.5)]


class Deployment:
    """Replies as a server with these heads does, and keeps the calls."""

    def __init__(self, *heads: HeadInfo) -> None:
        self.heads = {info.task: info for info in heads}
        self.generation = 1
        self.calls: list[Call] = []

    def __call__(self, call: Call) -> Any:
        self.calls.append(call)
        if isinstance(call, ReadConfig):
            if call.model == ENSEMBLE:
                return ensemble_config([TRUNK], list(self.heads.values()), self.generation)
            return head_config(self.heads[call.model.removeprefix("head_")])
        return self.reply({name: self.output(name, len(call.texts)) for name in call.outputs})

    def reply(self, arrays: dict[str, np.ndarray]) -> Reply:
        return Reply(arrays, str(self.generation))

    def change(self, task: str, info: HeadInfo | None) -> None:
        """Put another head in the place of a task's, or remove it."""
        self.heads.pop(task)
        if info is not None:
            self.heads[task] = info
        self.generation += 1

    def output(self, name: str, n: int) -> np.ndarray:
        if name == "offsets":
            return np.tile(np.array(OFFSETS, np.int32), (n, 1, 1))
        if name not in self.heads:
            raise RequestError(f"unexpected inference output '{name}' for model 'multitask'")
        info = self.heads[name]
        if info.structure is Structure.CRF:
            return np.tile(np.array(PATH, np.float32), (n, 1, 1))
        row = np.arange(max(len(info.labels), 1), dtype=np.float32)
        return np.tile(row, (n, len(OFFSETS), 1) if info.kind is Kind.TAGGING else (n, 1))

    @property
    def requests(self) -> list[Infer]:
        return [call for call in self.calls if isinstance(call, Infer)]


def run(program: Program[Any], reply: Server) -> Any:
    try:
        call = next(program)
        while True:
            try:
                answer = reply(call)
            except RequestError as error:
                call = program.throw(error)
            else:
                call = program.send(answer)
    except StopIteration as stop:
        return stop.value


@pytest.fixture
def server() -> Deployment:
    return Deployment(INTENT, SLOTS, URGENCY)


def ask(server: Deployment, items: Sequence[Any], tasks: Sequence[str] | None = None) -> Any:
    return run(Conversation().ask_batch(items, tasks), server)


def test_the_answers_have_the_type_of_their_task(server: Deployment) -> None:
    [answers] = ask(server, ["wake me"])
    assert answers["intent"] == Classification("music", 1.0, {"alarm": 0.0, "music": 1.0})
    assert answers["urgency"] == Regression(0.0)
    assert isinstance(answers["slots"], Tagging)
    assert [span.text for span in answers["slots"].spans] == ["wake me"]
    assert [(word.start, word.end) for word in answers["slots"].tokens] == [(0, 4), (5, 7)]


def test_a_path_has_one_probability_for_all_its_labels() -> None:
    [answers] = ask(Deployment(SLOTS_CRF), ["wake me"])
    answer = answers["slots_crf"]
    assert isinstance(answer, Tagging)
    assert [(word.label, word.probability) for word in answer.tokens] == [("B-time", None), ("I-time", None)]
    assert [(span.label, span.text, span.probability) for span in answer.spans] == [("time", "wake me", None)]
    assert answer.log_probability == -0.5
    assert answer.probability == pytest.approx(np.exp(-0.5))
    assert answer.to_dict()["log_probability"] == -0.5


def test_labels_word_by_word_have_no_probability_in_common(server: Deployment) -> None:
    [answers] = ask(server, ["wake me"], ["slots"])
    assert (answers["slots"].log_probability, answers["slots"].probability) == (None, None)


def test_a_path_with_a_label_that_the_head_does_not_name_is_an_error() -> None:
    server = Deployment(SLOTS_CRF.model_copy(update={"labels": ("O", "B-time")}))
    with pytest.raises(RequestError, match="head_slots_crf names 2 labels, but answers with another"):
        ask(server, ["wake me"])


def test_answers_are_plain_values_for_json(server: Deployment) -> None:
    [answers] = ask(server, ["wake me"], ["urgency", "intent"])
    assert answers.to_dict() == {
        "urgency": {"value": 0.0},
        "intent": {"label": "music", "probability": 1.0, "probabilities": {"alarm": 0.0, "music": 1.0}},
    }


def test_all_tasks_are_asked_by_default(server: Deployment) -> None:
    ask(server, ["wake me"])
    assert server.requests[0].outputs == ("intent", "slots", "urgency", "offsets")


def test_only_the_outputs_of_the_asked_tasks_are_requested(server: Deployment) -> None:
    ask(server, ["wake me"], ["urgency", "intent", "urgency"])
    assert server.requests[0].outputs == ("urgency", "intent")


def test_texts_and_pairs_travel_apart_and_return_in_order(server: Deployment) -> None:
    conversation = Conversation()
    answers = run(conversation.ask_batch(["wake me", ("make it", "b"), "take us"], ["slots"]), server)
    assert [request.texts.tolist() for request in server.requests] == [
        [[b"wake me"], [b"take us"]],
        [[b"make it", b"b"]],
    ]
    assert [answer["slots"].spans[0].text for answer in answers] == ["wake me", "make it", "take us"]


def test_a_batch_is_split_at_the_largest_that_the_server_takes(server: Deployment) -> None:
    answers = ask(server, [f"text {i}" for i in range(150)], ["intent"])
    assert [len(request.texts) for request in server.requests] == [64, 64, 22]
    assert len(answers) == 150


def test_the_catalogue_is_read_once(server: Deployment) -> None:
    conversation = Conversation()
    for _ in range(3):
        run(conversation.ask_batch(["wake me"], None), server)
    assert [call.model for call in server.calls if isinstance(call, ReadConfig)] == [
        "multitask",
        "head_intent",
        "head_slots",
        "head_urgency",
    ]


def test_a_head_replaced_by_one_with_other_labels_is_never_misread(server: Deployment) -> None:
    conversation = Conversation()
    run(conversation.ask_batch(["wake me"], ["intent"]), server)
    server.change("intent", head("intent", Kind.CLASSIFICATION, ["music", "alarm"]))
    [answers] = run(conversation.ask_batch(["wake me"], ["intent"]), server)
    assert answers["intent"].label == "alarm"


def test_tasks_that_change_without_end_are_an_error(server: Deployment) -> None:
    def reply(call: Call) -> Any:
        if isinstance(call, Infer):
            server.generation += 1
        return server(call)

    with pytest.raises(RequestError, match="tasks changed 5 times while it was asked; ask again"):
        run(Conversation().ask_batch(["wake me"], None), reply)


def test_a_head_that_goes_while_the_tasks_are_read_is_no_error(server: Deployment) -> None:
    gone = []

    def reply(call: Call) -> Any:
        if isinstance(call, ReadConfig) and call.model == "head_slots" and not gone:
            gone.append(call)
            server.change("slots", None)
            raise RequestError("Request for unknown model: 'head_slots' is not found")
        return server(call)

    assert list(run(Conversation().tasks(), reply)) == ["intent", "urgency"]


def test_a_candidate_is_answered_if_it_is_named_and_left_out_if_not(server: Deployment) -> None:
    server.heads["intent__b"] = head("intent__b", Kind.CLASSIFICATION, ["alarm", "music"])
    [answers] = ask(server, ["wake me"])
    assert list(answers) == ["intent", "slots", "urgency"]
    [answers] = ask(server, ["wake me"], ["intent", "intent__b"])
    assert list(answers) == ["intent", "intent__b"]
    assert run(Conversation().tasks(), server)["intent__b"].candidate


def test_tasks_tells_what_is_deployed_now(server: Deployment) -> None:
    conversation = Conversation()
    assert run(conversation.tasks(), server) == {"intent": INTENT, "slots": SLOTS, "urgency": URGENCY}
    server.change("slots", None)
    assert list(run(conversation.tasks(), server)) == ["intent", "urgency"]


def test_a_task_added_later_is_found(server: Deployment) -> None:
    conversation = Conversation()
    run(conversation.ask_batch(["wake me"], None), server)
    server.heads["mood"] = head("mood", Kind.REGRESSION)
    server.generation += 1
    [answers] = run(conversation.ask_batch(["wake me"], ["mood"]), server)
    assert list(answers) == ["mood"]


def test_a_task_removed_later_is_unknown_if_named_and_left_out_if_not(server: Deployment) -> None:
    conversation = Conversation()
    run(conversation.ask_batch(["wake me"], None), server)
    server.change("slots", None)
    [answers] = run(conversation.ask_batch(["wake me"], None), server)
    assert list(answers) == ["intent", "urgency"]
    with pytest.raises(UnknownTaskError, match="'slots'; deployed are: intent, urgency"):
        run(conversation.ask_batch(["wake me"], ["slots"]), server)


def test_a_head_replaced_by_one_with_more_labels_is_read_again(server: Deployment) -> None:
    conversation = Conversation()
    run(conversation.ask_batch(["wake me"], None), server)
    server.change("intent", head("intent", Kind.CLASSIFICATION, ["alarm", "music", "weather"]))
    [answers] = run(conversation.ask_batch(["wake me"], ["intent"]), server)
    assert answers["intent"].label == "weather"


def test_outputs_that_do_not_fit_the_labels_are_an_error(server: Deployment) -> None:
    def reply(call: Call) -> Any:
        return server.reply({"intent": np.zeros((1, 7), np.float32)}) if isinstance(call, Infer) else server(call)

    with pytest.raises(RequestError, match=r"head_intent names 2 labels, but answers 1 items with shape \[1, 7\]"):
        run(Conversation().ask_batch(["wake me"], ["intent"]), reply)


@pytest.mark.parametrize("error", [RequestError("too hot"), UnavailableError("gone"), DeadlineError("late")], ids=repr)
def test_the_servers_error_reaches_the_caller(server: Deployment, error: RequestError) -> None:
    conversation = Conversation()
    run(conversation.tasks(), server)

    def reply(call: Call) -> Any:
        if isinstance(call, Infer):
            raise error
        return server(call)

    with pytest.raises(type(error), match=str(error)):
        run(conversation.ask_batch(["wake me"], None), reply)


@pytest.mark.parametrize(
    ("items", "tasks", "message"),
    [
        pytest.param([], None, "the batch is empty", id="empty batch"),
        pytest.param("abc", None, "items must be a list of texts or pairs, not str", id="one text for a batch"),
        pytest.param([3], None, "item 0 must be a text or a pair of texts, not int", id="number"),
        pytest.param(["a", None], None, "item 1 must be a text or a pair of texts, not NoneType", id="None"),
        pytest.param([b"a"], None, "item 0 must be a text or a pair of texts, not bytes", id="bytes"),
        pytest.param([("a",)], None, "a tuple of 1", id="tuple of one"),
        pytest.param([("a", "b", "c")], None, "a tuple of 3", id="tuple of three"),
        pytest.param([("a", 3)], None, "item 0 must consist of texts, not int", id="pair with a number"),
        pytest.param(["ab\ud83d"], None, r"U\+D83D at position 2 is half a surrogate pair", id="lone surrogate"),
        pytest.param(["a"], [], "tasks is empty", id="no tasks"),
        pytest.param(["a"], "intent", "tasks must be a list of task names, not 'intent'", id="task as text"),
        pytest.param(["a"], ["nope"], "unknown task 'nope'; deployed are: intent, slots, urgency", id="unknown task"),
    ],
)
def test_a_bad_request_is_one_sentence_and_never_sent(server: Deployment, items: Any, tasks: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        ask(server, items, tasks)
    assert not server.requests


def test_nothing_deployed_is_said() -> None:
    with pytest.raises(RequestError, match="no task is deployed"):
        ask(Deployment(), ["a"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param({"url": "http://localhost:8000"}, "url must be host:port", id="url with a scheme"),
        pytest.param({"url": "localhost"}, "url must be host:port", id="url without a port"),
        pytest.param({"protocol": "carrier pigeon"}, "protocol must be 'grpc' or 'http'", id="protocol"),
        pytest.param({"timeout": 0}, "timeout must be more than 0 and at most 86400 seconds", id="no time"),
        pytest.param({"timeout": float("inf")}, "timeout must be more than 0 and at most", id="for ever"),
    ],
)
def test_a_client_is_not_made_from_nonsense(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        Client(**arguments)


def test_the_clients_need_none_of_the_extras() -> None:
    code = """
import sys, clients, clients._grpc, clients._http
print(sorted({"torch", "transformers", "onnx", "onnxruntime", "tokenizers", "safetensors"} & set(sys.modules)))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"

"""The whole path on a real Triton: parity with PyTorch, batches across lengths, truncated trunks, bad input."""

import asyncio
import math
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
import tritonclient.grpc as triton
from conftest import DEEP, SHALLOW, TASKS, Reference
from tritonclient.utils import InferenceServerException

from clients import AsyncClient, Classification, Client, Regression, RequestError, Tagging, UnknownTaskError
from clients.evaluate import evaluate
from espalier.contract import Kind
from espalier.spec import load_spec
from espalier.tagging import Scheme, decode_path
from espalier.tagging import decode as decode_tags
from serving.triton import TritonServer
from training.data import Example

pytestmark = pytest.mark.server

PROTOCOLS = ("grpc", "http")


@pytest.fixture(scope="module", params=PROTOCOLS)
def client(request: pytest.FixtureRequest, server: TritonServer) -> Iterator[Client]:
    with connect(server, request.param) as client:
        yield client


def connect(server: TritonServer, protocol: Any) -> Client:
    return Client(server.grpc_url if protocol == "grpc" else server.http_url, protocol=protocol)


@pytest.fixture(scope="module")
def raw(server: TritonServer) -> Iterator[triton.InferenceServerClient]:
    with triton.InferenceServerClient(server.grpc_url) as client:
        yield client


def texts_of_mixed_length(examples: dict[str, list[Example]], count: int) -> list[str]:
    """Dev texts, single and glued together: from one word to several hundred."""
    rng = random.Random(3)
    texts = [example.texts[0] for example in examples["intent"]]
    return [" ".join(rng.choices(texts, k=rng.choice((1, 1, 1, 1, 2, 5, 12)))) for _ in range(count)]


def assert_same(answer: Any, want: np.ndarray, labels: tuple[str, ...]) -> None:
    match answer:
        case Regression(value=value):
            assert value == pytest.approx(want.item(), abs=1e-4)
        case Classification():
            np.testing.assert_allclose([answer.probabilities[label] for label in labels], want, atol=1e-4)
            assert answer.label == labels[want.argmax()]
            assert answer.probability == answer.probabilities[answer.label]
        case _:
            raise AssertionError(answer)


def executions(raw: triton.InferenceServerClient) -> dict[str, tuple[int, int]]:
    """Executions and requests by model, as Triton counts them."""
    statistics = raw.get_inference_statistics().model_stats
    return {model.name: (model.execution_count, model.inference_stats.success.count) for model in statistics}


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_parity_with_pytorch_for_200_concurrent_texts(
    protocol: str, server: TritonServer, raw: Any, reference: Reference, examples: dict[str, list[Example]]
) -> None:
    texts = texts_of_mixed_length(examples, 200)
    pairs = [example.texts for example in examples["same_request"][:200]]
    single = [task for task in TASKS if task != "same_request"]
    before = executions(raw)
    with connect(server, protocol) as client, ThreadPoolExecutor(32) as pool:
        answers = list(pool.map(lambda text: client.ask(text, single), texts))
        about_pairs = list(pool.map(lambda pair: client.ask_pair(*pair, ["same_request"]), pairs))

    for text, answer in zip(texts, answers, strict=True):
        for task in ("intent", "urgency"):
            assert_same(answer[task], reference.answer(task, text), reference.labels(task))
        tags, labels = reference.answer("slots", text), reference.labels("slots")
        assert_tags(answer["slots"], tags, labels, text, reference.encode(text).offsets)
        assert_path(answer["slots_crf"], reference.answer("slots_crf", text), reference.labels("slots_crf"), text)
    for pair, answer in zip(pairs, about_pairs, strict=True):
        want = reference.answer("same_request", pair)
        assert_same(answer["same_request"], want, reference.labels("same_request"))

    after = executions(raw)  # not before: Triton counts a request a little after it has answered it
    for model in (f"trunk_0_{SHALLOW}", f"trunk_{SHALLOW}_{DEEP}", *(f"head_{task}" for task in TASKS)):
        ran, asked = (now - then for now, then in zip(after[model], before[model], strict=True))
        assert asked >= 200, model
        assert ran < asked, f"{model}: {ran} executions for {asked} requests: no batch formed"


def assert_tags(answer: Any, want: np.ndarray, labels: tuple[str, ...], text: str, offsets: Any) -> None:
    assert isinstance(answer, Tagging)
    words, spans = decode_tags(text, offsets, want, labels)
    assert [(word.label, word.start, word.end) for word in answer.tokens] == [
        (word.label, word.start, word.end) for word in words
    ]
    assert [(span.label, span.text) for span in answer.spans] == [(span.label, span.text) for span in spans]
    for got, expected in zip(answer.tokens, words, strict=True):
        assert got.probability == pytest.approx(expected.probability, abs=1e-4)
    for span in answer.spans:
        assert text[span.start : span.end] == span.text


def assert_path(answer: Any, want: np.ndarray, labels: tuple[str, ...], text: str) -> None:
    assert isinstance(answer, Tagging)
    assert answer.log_probability == pytest.approx(want[0, 1], abs=1e-3)
    assert [labels.index(word.label) for word in answer.tokens] == want[want[:, 0] >= 0, 0].tolist()
    assert Scheme(labels).first_break([word.label for word in answer.tokens]) is None
    assert {part.probability for part in (*answer.tokens, *answer.spans)} <= {None}
    for span in answer.spans:
        assert text[span.start : span.end] == span.text


def test_tags_equal_pytorch_token_by_token(raw: Any, reference: Reference, examples: dict[str, list[Example]]) -> None:
    for text in texts_of_mixed_length(examples, 20):
        given = triton.InferInput("TEXT", [1, 1], "BYTES")
        given.set_data_from_numpy(np.array([[text.encode()]], dtype=object))
        result = raw.infer("multitask", [given], outputs=[triton.InferRequestedOutput("slots")])
        np.testing.assert_allclose(result.as_numpy("slots")[0], reference.answer("slots", text), atol=1e-4)


def test_paths_equal_pytorch_token_by_token_in_requests_of_several_texts(
    raw: Any, reference: Reference, examples: dict[str, list[Example]]
) -> None:
    texts = ["", "[SEP]", "in [MASK] 東京", *texts_of_mixed_length(examples, 5)]
    outputs = [triton.InferRequestedOutput(name) for name in ("slots_crf", "offsets")]
    given = triton.InferInput("TEXT", [len(texts), 1], "BYTES")
    given.set_data_from_numpy(np.array([[text.encode()] for text in texts], dtype=object))
    result = raw.infer("multitask", [given], outputs=outputs)
    for text, path, offsets in zip(texts, result.as_numpy("slots_crf"), result.as_numpy("offsets"), strict=True):
        length = len(reference.encode(text).ids)
        assert not path[length:].any()
        if text == "[SEP]":  # to the head it is not a word
            assert [word.label for word in decode_path(text, offsets, path, reference.labels("slots_crf"))[0]] == ["O"]
        else:
            np.testing.assert_allclose(path[:length], reference.answer("slots_crf", text), atol=1e-3)


def test_a_shallow_task_leaves_deeper_segments_and_other_heads_alone(client: Client, raw: Any) -> None:
    before = executions(raw)
    for number in range(5):
        client.ask(f"set an alarm for {number + 1}", ["intent"])
    after = executions(raw)
    ran = {model for model in after if after[model] != before[model]}
    assert ran == {"multitask", "tokenizer", f"trunk_0_{SHALLOW}", "head_intent"}


def test_the_client_learns_tasks_from_the_server(client: Client, reference: Reference) -> None:
    tasks = client.tasks()
    assert {name: (info.tap, info.layers) for name, info in tasks.items()} == TASKS
    assert tasks["intent"].labels == reference.labels("intent")
    assert [name for name, info in tasks.items() if info.pair] == ["same_request"]


def test_the_classification_extension_gives_labels(raw: Any, reference: Reference) -> None:
    given = triton.InferInput("TEXT", [1, 1], "BYTES")
    given.set_data_from_numpy(np.array([[b"play some jazz"]], dtype=object))
    result = raw.infer("multitask", [given], outputs=[triton.InferRequestedOutput("intent", class_count=2)])
    best = result.as_numpy("intent").ravel()[0].decode().split(":")
    labels = reference.labels("intent")
    want = reference.answer("intent", "play some jazz")
    assert (int(best[1]), best[2]) == (int(want.argmax()), labels[int(want.argmax())])


def test_a_batch_of_mixed_lengths_equals_one_by_one(client: Client, examples: dict[str, list[Example]]) -> None:
    texts = texts_of_mixed_length(examples, 90)  # more than the server's maximum of 64
    together = client.ask_batch(texts, ["intent", "urgency"])
    for text, answers in zip(texts[::9], together[::9], strict=True):
        alone = client.ask(text, ["intent", "urgency"])
        assert alone["urgency"].value == pytest.approx(answers["urgency"].value, abs=1e-5)
        assert alone["intent"].label == answers["intent"].label


@pytest.mark.parametrize("protocol", PROTOCOLS)
async def test_the_asynchronous_client_is_in_step(protocol: Any, server: TritonServer, client: Client) -> None:
    texts = ["wake me at seven", "play some jazz", "lights off in the kitchen right now"]
    url = server.grpc_url if protocol == "grpc" else server.http_url
    async with AsyncClient(url, protocol=protocol) as other:
        answers = await asyncio.gather(*(other.ask(text) for text in texts))
        assert await other.tasks() == client.tasks()
    for text, answer in zip(texts, answers, strict=True):
        same = client.ask(text)
        assert answer["intent"].label == same["intent"].label
        assert answer["urgency"].value == pytest.approx(same["urgency"].value, abs=1e-5)
        assert [span.text for span in answer["slots"].spans] == [span.text for span in same["slots"].spans]


def test_served_scores_equal_offline_ones(
    server: TritonServer, specs: Any, reference: Reference, examples: dict[str, list[Example]]
) -> None:
    """`espalier evaluate` asks the server for what training computes offline."""
    from training.features import collate, featurize
    from training.metrics import decode, gold, score

    with connect(server, "grpc") as client:
        for task, (tap, _) in TASKS.items():
            spec = load_spec(specs / f"{task}.yaml")
            served = evaluate(client, spec)
            branch, card = reference.loaded[task]
            base = reference.base
            features = featurize(spec.kind, card.labels, base.tokenizer, base.max_length, examples[task])
            answers: list[Any] = []
            for start in range(0, len(features), 50):
                chunk = features[start : start + 50]
                batch = collate(chunk)
                with torch.no_grad():
                    hidden = base.encoder(batch["input_ids"], batch["token_type_ids"], batch["mask"], tap=tap)
                    answer = branch.answer(hidden, batch["mask"], batch.get("words")).numpy()
                answers += decode(spec.kind, card.labels, answer, chunk, spec.structure)
            offline = score(spec.kind, gold(examples[task]), answers, spec.positive)
            assert served == pytest.approx(offline, abs=1e-4)


def test_a_spec_of_another_kind_is_not_evaluated(server: TritonServer, specs: Any) -> None:
    spec = load_spec(specs / "intent.yaml").model_copy(update={"kind": Kind.REGRESSION})
    with (
        connect(server, "grpc") as client,
        pytest.raises(RequestError, match="a classification task, the spec's a regression task"),
    ):
        evaluate(client, spec)


# --- bad input --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["", "   \t\n "], ids=["empty", "only spaces"])
def test_a_text_without_words_is_answered(text: str, client: Client, reference: Reference) -> None:
    answers = client.ask(text)
    assert_same(answers["intent"], reference.answer("intent", text), reference.labels("intent"))
    assert answers["slots"].spans == ()


def test_a_text_of_a_megabyte_is_truncated(client: Client, reference: Reference) -> None:
    text = "please wake me at seven " * 42_000
    answers = client.ask(text, ["intent", "slots"])
    assert_same(answers["intent"], reference.answer("intent", text), reference.labels("intent"))
    assert len(answers["slots"].tokens) == 510  # 512 less [CLS] and [SEP]


def test_invalid_utf8_is_refused_by_the_server(raw: Any) -> None:
    with pytest.raises(InferenceServerException, match="UTF-8"):
        send(raw, np.array([[b"caf\xe9 now"]], dtype=object))


def test_a_lone_surrogate_is_refused_by_the_client(client: Client) -> None:
    with pytest.raises(RequestError, match="surrogate"):
        client.ask("broken \ud800 text")


def test_a_bad_request_does_not_harm_its_neighbours(raw: Any, server: TritonServer) -> None:
    def good(number: int) -> bool:
        return not math.isnan(send(raw, np.array([[f"alarm {number}".encode()]], dtype=object), "urgency").item())

    def bad(_: int) -> bool:
        with pytest.raises(InferenceServerException, match="UTF-8"):
            send(raw, np.array([[b"\xff"]], dtype=object))
        return True

    with ThreadPoolExecutor(16) as pool:
        assert all(pool.map(lambda n: good(n) if n % 2 else bad(n), range(60)))


@pytest.mark.parametrize(
    "text",
    [
        "wake\x00me at\x07 seven",
        "wake me 🙂 at 7 in Zürich 👨‍👩‍👧",
        "Zu\u0308rich cafe\u0301 at nai\u0308ve seven",
        "在七点叫醒我 please",
    ],
    ids=["control characters", "emoji", "combining marks", "chinese"],
)
def test_spans_stay_right_in_odd_text(text: str, client: Client) -> None:
    tags = client.ask(text, ["slots"])["slots"]
    assert tags.tokens
    for token in tags.tokens:
        assert text[token.start : token.end].strip()
    for span in tags.spans:
        assert text[span.start : span.end] == span.text
    words = [text[token.start : token.end] for token in tags.tokens]
    assert any("seven" in word or "7" in word or word == "please" for word in words)


def send(raw: Any, texts: np.ndarray, output: str = "intent") -> np.ndarray:
    given = triton.InferInput("TEXT", list(texts.shape), "BYTES")
    given.set_data_from_numpy(texts)
    result = raw.infer("multitask", [given], outputs=[triton.InferRequestedOutput(output)])
    return result.as_numpy(output)


@pytest.mark.parametrize("count", [0, 3], ids=["no string", "three strings"])
def test_one_or_two_strings_are_an_item(count: int, raw: Any) -> None:
    with pytest.raises(InferenceServerException, match=r"one|two|TEXT"):
        send(raw, np.array([[b"text"] * count], dtype=object).reshape(1, count))


def test_batch_zero_is_refused(raw: Any, client: Client) -> None:
    with pytest.raises(InferenceServerException):
        send(raw, np.empty((0, 1), dtype=object))
    with pytest.raises(RequestError, match=r"no text|empty|at least one"):
        client.ask_batch([])


def test_a_batch_above_the_maximum_is_refused_by_the_server(raw: Any) -> None:
    with pytest.raises(InferenceServerException, match="64"):
        send(raw, np.array([[b"text"]] * 65, dtype=object))


def test_a_pair_sent_to_a_single_sentence_task_is_answered(client: Client, reference: Reference) -> None:
    pair = ("wake me at seven", "play some jazz")
    answers = client.ask_pair(*pair, ["intent", "slots"])
    assert_same(answers["intent"], reference.answer("intent", pair), reference.labels("intent"))
    for span in answers["slots"].spans:
        assert pair[span.sentence][span.start : span.end] == span.text


def test_an_unknown_task_is_refused_with_the_known_ones(client: Client) -> None:
    with pytest.raises(UnknownTaskError, match=r"'sentiment'.*intent, same_request, slots, slots_crf, urgency"):
        client.ask("hello", ["sentiment"])

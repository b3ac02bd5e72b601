"""The CRF against every path, enumerated; its masks against the schemes; its ONNX graph against PyTorch."""

from itertools import pairwise, product

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_packed_graphs import batch_of, encoder, randomized, requests
from tokenizers import Tokenizer, models

from espalier.branch import Branch
from espalier.contract import Kind, Target
from espalier.crf import CRF, IMPOSSIBLE, NO_WORD
from espalier.encoder import Base
from espalier.errors import ExportError
from espalier.tagging import Scheme, word_starts
from export import check
from export.check import Batch, compare_head
from export.models import head_model
from export.viterbi import word_table

SCHEMES = {
    "BIO": ("B-x", "B-y", "I-x", "I-y", "O"),
    "BIOES": ("B-x", "E-x", "I-x", "O", "S-x"),
    "none": ("noun", "verb", "O"),
    "IO": ("I-x", "I-y", "O"),
    "gaps": ("B-x", "I-x", "B-y", "S-z", "O"),
}
SOME_LABELS = st.sampled_from(list(SCHEMES.values()))
MASKS = st.lists(st.lists(st.booleans(), min_size=5, max_size=5), min_size=1, max_size=4)


def crf_of(labels: tuple[str, ...], seed: int) -> CRF:
    torch.manual_seed(seed)
    crf = CRF(labels)
    for parameter in crf.parameters():
        torch.nn.init.normal_(parameter)
    return crf


def paths(crf: CRF, emissions: torch.Tensor) -> dict[tuple[int, ...], float]:
    """Return the score of every path over the words of one text, emissions [W,C], added up one by one."""
    start, transitions, end = (scores.tolist() for scores in crf.scores())
    found = {}
    for path in product(range(emissions.shape[1]), repeat=len(emissions)):
        score = start[path[0]] + end[path[-1]] if path else 0.0
        score += sum(emissions[word, label].item() for word, label in enumerate(path))
        found[path] = score + sum(transitions[left][right] for left, right in pairwise(path))
    return found


@settings(max_examples=40, deadline=None)
@given(SOME_LABELS, MASKS, st.integers(0, 2**16))
def test_sums_and_maxima_are_those_over_all_paths(labels: tuple[str, ...], masks: list[list[bool]], seed: int) -> None:
    crf, words = crf_of(labels, seed), torch.tensor(masks)
    emissions = torch.randn(*words.shape, len(labels))
    tags = torch.randint(len(labels), words.shape)
    with torch.no_grad():
        partition, chance = crf.log_partition(emissions, words), crf.log_likelihood(emissions, words, tags)
    best, score = crf.viterbi(emissions, words)
    marginals = crf.marginals(emissions, words)
    for row, own in enumerate(words):
        every = paths(crf, emissions[row, own])
        total = np.logaddexp.reduce(list(every.values()))
        assert partition[row].item() == pytest.approx(total, abs=1e-4)
        given_path = tuple(tags[row, own].tolist())
        assert chance[row].item() == pytest.approx(every[given_path] - total, rel=1e-5, abs=2e-3)
        assert score[row].item() == pytest.approx(max(every.values()), abs=1e-4)
        assert every[tuple(best[row, own].tolist())] == pytest.approx(max(every.values()), abs=1e-4)
        assert (best[row, ~own] == NO_WORD).all()
        assert not marginals[row, ~own].any()
        if own.any():  # the first word's labels, each summed over the paths that begin with it
            chances = [0.0] * len(labels)
            for path, value in every.items():
                chances[path[0]] += np.exp(value - total)
            np.testing.assert_allclose(marginals[row, own][0], chances, atol=1e-4)


@settings(max_examples=40, deadline=None)
@given(SOME_LABELS, st.integers(1, 12), st.integers(0, 2**16))
def test_every_path_that_is_chosen_is_legal(labels: tuple[str, ...], length: int, seed: int) -> None:
    crf = crf_of(labels, seed)
    words = torch.ones(4, length, dtype=torch.bool)
    best, _ = crf.viterbi(torch.randn(4, length, len(labels)) * 30, words)
    for row in best.tolist():
        assert Scheme(labels).first_break([labels[label] for label in row]) is None


def test_the_answer_tells_labels_and_one_probability() -> None:
    crf = crf_of(SCHEMES["BIO"], 0)
    words = torch.tensor([[False, True, False, True, False], [False, False, False, False, False]])
    mask = torch.tensor([[True] * 5, [True, True, False, False, False]])
    emissions = torch.randn(2, 5, 5)
    with torch.no_grad():
        answer = crf.answer(emissions, words, mask)
    labels, score = crf.viterbi(emissions, words)
    assert answer[0, :, 0].tolist() == labels[0].tolist()
    torch.testing.assert_close(answer[0, :, 1], (score[0] - crf.log_partition(emissions, words)[0]).expand(5))
    assert answer[1].tolist() == [[NO_WORD, 0.0], [NO_WORD, 0.0], [0, 0], [0, 0], [0, 0]]


def test_gold_that_breaks_the_scheme_gives_a_large_finite_loss_with_ordinary_gradients() -> None:
    crf = crf_of(SCHEMES["BIO"], 1)
    emissions = torch.randn(1, 3, 5, requires_grad=True)
    loss = -crf.log_likelihood(emissions, torch.ones(1, 3, dtype=torch.bool), torch.tensor([[4, 2, 3]])).sum()
    loss.backward()
    assert -IMPOSSIBLE < loss.item() < -3 * IMPOSSIBLE
    assert emissions.grad is not None
    assert emissions.grad.abs().max() <= 1


# --- schemes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("labels", "tags", "first_break"),
    [
        ("O B-x I-x B-y", "B-x I-x O B-x B-y", None),
        ("O B-x I-x", "I-x O", 0),
        ("O B-x I-x", "O I-x", 1),
        ("O B-x I-x B-y I-y", "B-x I-y", 1),
        ("O B-x I-x", "B-x", None),
        ("O B-x I-x E-x S-x", "S-x B-x I-x E-x O", None),
        ("O B-x I-x E-x S-x", "B-x O", 1),
        ("O B-x I-x E-x S-x", "O B-x", 2),
        ("O B-x I-x E-x S-x", "S-x E-x", 1),
        ("O B-x I-x E-x S-x", "E-x", 0),
        ("O B-x E-x B-y I-y", "B-x E-x B-y I-y O B-y", None),
        ("O I-x I-y", "I-x I-y O I-x", None),
        ("noun verb O", "noun O verb verb", None),
        ("O B-a-b I-a-b B-a I-a", "B-a-b I-a", 1),
        ("O B-x I-x", "", None),
    ],
)
def test_what_may_follow_what_is_found_from_the_labels(labels: str, tags: str, first_break: int | None) -> None:
    assert Scheme(labels.split()).first_break(tags.split()) == first_break


# --- the graph --------------------------------------------------------------------------------------------------


def crf_branch(labels: tuple[str, ...], layers: int, hidden: int = 16) -> Branch:
    trunk = encoder(hidden)
    torch.manual_seed(3)
    return randomized(Branch(trunk.config, Kind.TAGGING, layers, len(labels), CRF(labels)))


def some_words(seed: int) -> np.ndarray:
    """Return a table of 50 tokens; about every third begins no word."""
    return np.random.default_rng(seed).random(50) > 0.35


@settings(max_examples=40, deadline=None)
@given(requests, st.integers(0, 2**16), st.sampled_from(list(SCHEMES.values())), st.integers(0, 2))
def test_the_graph_finds_the_paths_of_pytorch(
    lengths: list[list[int]], seed: int, labels: tuple[str, ...], layers: int
) -> None:
    branch, words = crf_branch(labels, layers), some_words(seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(check, "random_batches", lambda *_: [batch_of(lengths, seed)])
        model = head_model(branch, "task", Target.CPU, words)
        assert compare_head(model, "head", encoder(), branch, 1, Target.CPU, words) < 1e-4


@pytest.mark.parametrize("lengths", [[[1]], [[2], [3, 1]]], ids=["one", "several"])
def test_texts_without_words_have_a_path_of_probability_one(lengths: list[list[int]]) -> None:
    branch, words = crf_branch(SCHEMES["BIO"], 1), np.zeros(50, bool)
    batch = batch_of(lengths, 0)
    got = run(head_model(branch, "task", Target.CPU, words), batch)
    real = np.concatenate([np.arange(w) < n for w, n in zip(batch.widths, batch.lengths, strict=True)])
    assert got[real].tolist() == [[NO_WORD, 0.0]] * real.sum()
    assert not got[~real].any()


def run(model: bytes, batch: Batch, size: int = 16) -> np.ndarray:
    shape = np.stack([batch.widths, np.full_like(batch.widths, size)], axis=1).astype(np.int32)
    feed = {"hidden": np.ones(len(batch.flat_ids) * size, np.float32), "input_ids": batch.flat_ids, "shape": shape}
    session = onnxruntime.InferenceSession(model)
    return session.run(["path"], {**feed, "length": batch.lengths[:, None].astype(np.int32)})[0]


def test_half_precision_is_for_the_layers_alone(base: Base) -> None:
    labels = SCHEMES["BIOES"]
    torch.manual_seed(4)
    branch = Branch(base.config, Kind.TAGGING, 1, len(labels), crf_of(labels, 5)).eval()
    words = word_table(base.tokenizer, base.config.vocab_size)
    model = head_model(branch, "task", Target.GPU, words)
    assert 0 < compare_head(model, "head", base.encoder, branch, 2, Target.GPU, words) < check.TOLERANCE[Target.GPU]
    types = {weight.name: weight.data_type for weight in onnx.load_from_string(model).graph.initializer}
    assert types["output.weight"] == onnx.TensorProto.FLOAT16


def test_a_graph_with_other_transitions_is_refused() -> None:
    branch, words = crf_branch(SCHEMES["BIO"], 1), some_words(0)
    model = head_model(branch, "task", Target.CPU, words)
    assert branch.crf is not None
    with torch.no_grad():
        branch.crf.transitions[4, 0] += 0.1
    with pytest.raises(ExportError, match="differs from PyTorch"):
        compare_head(model, "head", encoder(), branch, 1, Target.CPU, words)


def test_graphs_with_loops_are_of_the_agreed_opset_and_equal_from_run_to_run() -> None:
    branch, words = crf_branch(SCHEMES["BIO"], 1), some_words(0)
    first, second = (head_model(branch, "task", Target.CPU, words) for _ in range(2))
    assert first == second
    model = onnx.load_from_string(first)
    assert model.ir_version == 8
    assert [(opset.domain, opset.version) for opset in model.opset_import] == [("", 17)]


# --- words ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["Wake me at 7:30 in Szczecin!", "東京 cafe\u0301 👍🏽 U.S.", ""])
def test_the_table_finds_the_words_that_the_offsets_tell(text: str, base: Base) -> None:
    encoding = Tokenizer.from_str(base.tokenizer).encode(text)
    table = word_table(base.tokenizer, base.config.vocab_size)
    assert table[encoding.ids].tolist() == word_starts(text, encoding.offsets)


def test_a_tokenizer_that_does_not_tell_words_is_refused() -> None:
    bpe = Tokenizer(models.BPE())
    with pytest.raises(ExportError, match=r"needs a WordPiece tokenizer.* the base's is BPE: .*structure: softmax"):
        word_table(bpe.to_str(), 10)

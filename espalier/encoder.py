"""A BERT encoder, readable in one sitting, with the weights of any `transformers` BERT checkpoint.

Post-norm Transformer encoder of Devlin et al. 2019 ("BERT: Pre-training of Deep Bidirectional Transformers"). It is
equal to `transformers.BertModel` within 1e-5 and is cut where Espalier cuts: embeddings, then layers that can be
taken one by one – the bottom ones as a frozen trunk, others as a task's branch.

Shapes: B items, S tokens (padded), H hidden size, A attention heads of width d = H/A, F feed-forward size.
"""

import importlib.util
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from espalier.errors import CheckpointError
from espalier.files import digest

ACTIVATIONS = {"gelu": "none", "gelu_new": "tanh", "gelu_pytorch_tanh": "tanh"}
"""Feed-forward activations, as the approximation that torch's gelu takes."""

LOCAL = "local"
"""Revision of a base that is no hub id, and so has none."""

PACKAGE_SCHEME = "pkg:"
"""`pkg:PACKAGE/FOLDER` names a checkpoint folder inside an installed Python package, on whatever machine."""


@dataclass(frozen=True)
class EncoderConfig:
    """Sizes of a BERT encoder, with the names that `transformers.BertConfig` gives them."""

    vocab_size: int
    hidden_size: int  # H
    num_hidden_layers: int
    num_attention_heads: int  # A
    intermediate_size: int  # F
    max_position_embeddings: int  # longest sequence, in tokens
    type_vocab_size: int  # 2: first and second sentence
    layer_norm_eps: float
    hidden_act: str
    hidden_dropout_prob: float
    attention_probs_dropout_prob: float


class Embeddings(nn.Module):
    """Word + position + sentence embeddings, normalised."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.word = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.token_type = nn.Embedding(config.type_vocab_size, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, input_ids: Tensor, token_type_ids: Tensor) -> Tensor:
        """Embed input_ids and token_type_ids, both [B,S]; return [B,S,H]."""
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)  # [S]
        hidden = self.word(input_ids) + self.position(positions) + self.token_type(token_type_ids)  # [B,S,H]
        embedded: Tensor = self.dropout(self.norm(hidden))
        return embedded


class Layer(nn.Module):
    """One encoder layer: self-attention and feed-forward, each with a residual and a LayerNorm after it."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        size = config.hidden_size
        self.heads = config.num_attention_heads
        self.query = nn.Linear(size, size)
        self.key = nn.Linear(size, size)
        self.value = nn.Linear(size, size)
        self.output = nn.Linear(size, size)
        self.attention_norm = nn.LayerNorm(size, eps=config.layer_norm_eps)
        self.up = nn.Linear(size, config.intermediate_size)
        self.down = nn.Linear(config.intermediate_size, size)
        self.feed_forward_norm = nn.LayerNorm(size, eps=config.layer_norm_eps)
        self.approximate = ACTIVATIONS[config.hidden_act]
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.attention_dropout = config.attention_probs_dropout_prob

    def forward(self, hidden: Tensor, mask: Tensor, first_alone: bool = False) -> Tensor:
        """Map hidden [B,S,H] to [B,S,H]; mask [B,S] is true for real tokens.

        `first_alone` computes the first token of each item alone, [B,1,H], at a sixth of the cost: a sentence task
        reads no other.
        """
        batch, _, size = hidden.shape
        wanted = hidden[:, :1] if first_alone else hidden

        def split(x: Tensor) -> Tensor:
            return x.view(batch, -1, self.heads, size // self.heads).transpose(1, 2)  # [B,A,S,d]

        attended = F.scaled_dot_product_attention(
            split(self.query(wanted)),
            split(self.key(hidden)),
            split(self.value(hidden)),
            attn_mask=mask[:, None, None, :],
            dropout_p=self.attention_dropout if self.training else 0.0,
        )  # [B,A,S,d]
        attended = attended.transpose(1, 2).reshape(batch, -1, size)
        mixed = self.attention_norm(wanted + self.dropout(self.output(attended)))
        expanded = F.gelu(self.up(mixed), approximate=self.approximate)  # [B,S,F]
        above: Tensor = self.feed_forward_norm(mixed + self.dropout(self.down(expanded)))
        return above


class Encoder(nn.Module):
    """Embeddings and a stack of layers; the first `tap` of them are the trunk of a task that taps there."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.embeddings = Embeddings(config)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))

    def forward(self, input_ids: Tensor, token_type_ids: Tensor, mask: Tensor, tap: int | None = None) -> Tensor:
        """Return the hidden state [B,S,H] above the first `tap` layers (default: all of them)."""
        hidden: Tensor = self.embeddings(input_ids, token_type_ids)
        for layer in self.layers[:tap]:
            hidden = layer(hidden, mask)
        return hidden


# --- loading ----------------------------------------------------------------------------------------------------

_EMBEDDINGS = {
    "word.weight": "word_embeddings.weight",
    "position.weight": "position_embeddings.weight",
    "token_type.weight": "token_type_embeddings.weight",
    "norm.weight": "LayerNorm.weight",
    "norm.bias": "LayerNorm.bias",
}
_LAYER = {
    f"{ours}.{part}": f"{theirs}.{part}"
    for ours, theirs in {
        "query": "attention.self.query",
        "key": "attention.self.key",
        "value": "attention.self.value",
        "output": "attention.output.dense",
        "attention_norm": "attention.output.LayerNorm",
        "up": "intermediate.dense",
        "down": "output.dense",
        "feed_forward_norm": "output.LayerNorm",
    }.items()
    for part in ("weight", "bias")
}


@dataclass(frozen=True)
class Base:
    """A pre-trained checkpoint: the encoder, its tokenizer (as `tokenizers` JSON) and where both came from."""

    name: str  # hub id, local folder, or pkg:PACKAGE/FOLDER
    revision: str  # commit of the hub, or LOCAL
    encoder: Encoder
    tokenizer: str
    max_length: int  # longest sequence, in tokens

    @property
    def config(self) -> EncoderConfig:
        """Sizes of the encoder."""
        return self.encoder.config

    def fingerprint(self, tap: int) -> str:
        """Return the sha256 over every frozen tensor below `tap` and the tokenizer.

        Two bases with the same fingerprint give the same hidden states at `tap` for the same text.
        """
        parts: list[bytes | str] = [self.tokenizer]
        shared = {key: value for key, value in asdict(self.config).items() if "dropout" not in key}
        shared.pop("num_hidden_layers")  # layers above the tap do not matter
        parts.append(repr(sorted(shared.items())))
        modules: dict[str, nn.Module] = {"embeddings": self.encoder.embeddings}
        modules.update({f"layers.{i}": layer for i, layer in enumerate(self.encoder.layers[:tap])})
        for prefix, module in modules.items():
            for name, tensor in sorted(module.state_dict().items()):
                parts += [f"{prefix}.{name} {list(tensor.shape)}", tensor.cpu().contiguous().numpy().tobytes()]
        return digest(*parts)


def resolve(base: str) -> str:
    """Return what `from_pretrained` takes for `base`: `pkg:PACKAGE/FOLDER` becomes that package's folder."""
    if not base.startswith(PACKAGE_SCHEME):
        return base
    package, _, folder = base.removeprefix(PACKAGE_SCHEME).partition("/")
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None or spec.origin is None:
        raise CheckpointError(f"base {base!r}: the Python package {package!r} is not installed")
    return str(Path(spec.origin).parent / folder)


def load_base(base: str, revision: str | None = None) -> Base:
    """Load a BERT checkpoint and its tokenizer with `transformers`: hub id, local folder or pkg:PACKAGE/FOLDER.

    The revision of a card, LOCAL too, may be given back. Raises CheckpointError if the base cannot be loaded or is not
    a BERT.
    """
    from transformers import AutoConfig, AutoModel, AutoTokenizer, PreTrainedTokenizerFast

    location = resolve(base)
    revision = None if revision == LOCAL else revision
    try:
        config = AutoConfig.from_pretrained(location, revision=revision)
        if config.model_type != "bert":
            raise CheckpointError(f"base {base!r} is a {config.model_type!r} model; a trunk must be a 'bert'")
        model, loaded = AutoModel.from_pretrained(
            location, revision=revision, dtype=torch.float32, output_loading_info=True
        )
    except CheckpointError:
        raise
    except Exception as error:  # transformers and safetensors raise many types, all with a telling message
        raise CheckpointError(f"base {base!r} cannot be loaded: {_first_line(error)}") from error
    # transformers draws at random what a checkpoint lacks. The pooler is no part of a trunk.
    if absent := sorted(name for name in loaded["missing_keys"] if not name.startswith("pooler.")):
        raise CheckpointError(f"base {base!r} lacks {len(absent)} of its config's tensors: {absent[0]} and on")
    try:
        tokenizer = AutoTokenizer.from_pretrained(location, revision=revision)
    except Exception as error:  # as above
        raise CheckpointError(f"base {base!r}: its tokenizer cannot be loaded: {_first_line(error)}") from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise CheckpointError(f"base {base!r} has no fast tokenizer; serving needs its tokenizer.json")
    encoder = from_bert(config, model.state_dict(), base)
    rust = tokenizer.backend_tokenizer
    rust.no_truncation()
    rust.no_padding()
    return Base(
        # A local folder by its full path: export loads the base again, from wherever it runs.
        name=os.path.abspath(location) if location == base and Path(base).is_dir() else base,
        revision=getattr(config, "_commit_hash", None) or LOCAL,
        encoder=encoder,
        tokenizer=rust.to_str(),
        max_length=encoder.config.max_position_embeddings,
    )


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def from_bert(config: Any, weights: Mapping[str, Tensor], name: str = "checkpoint") -> Encoder:
    """Build an encoder from a `transformers.BertConfig` and the state dict of a `BertModel`, layer by layer."""
    if getattr(config, "position_embedding_type", "absolute") != "absolute" or config.hidden_act not in ACTIVATIONS:
        raise CheckpointError(
            f"base {name!r}: position embeddings {getattr(config, 'position_embedding_type', 'absolute')!r} and "
            f"activation {config.hidden_act!r} are not supported; use absolute and {' or '.join(ACTIVATIONS)}"
        )
    encoder = Encoder(EncoderConfig(**{field: getattr(config, field) for field in EncoderConfig.__annotations__}))
    _copy(encoder.embeddings, weights, "embeddings", _EMBEDDINGS, name)
    for index, layer in enumerate(encoder.layers):
        _copy(layer, weights, f"encoder.layer.{index}", _LAYER, name)
    encoder.requires_grad_(False)
    return encoder.eval()


def _copy(module: nn.Module, weights: Mapping[str, Tensor], prefix: str, names: dict[str, str], base: str) -> None:
    try:
        module.load_state_dict({ours: weights[f"{prefix}.{theirs}"].float() for ours, theirs in names.items()})
    except (KeyError, RuntimeError) as error:
        raise CheckpointError(f"base {base!r}: {prefix} does not fit the checkpoint's config: {error}") from error

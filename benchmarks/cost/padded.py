"""The same trunk and branches as a PyTorch user would export them: padded, traced, every layer for every token.

A head may be folded here, too, to see what folding gives without ragged batches.
"""

import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from espalier.branch import Branch
from espalier.encoder import Encoder, Layer
from export.graph import OPSET

TOKENS = {0: "items", 1: "tokens"}


class Segment(nn.Module):
    """Layers [start, stop), with the embeddings if `start` is 0: ids or hidden [B,S,H] → hidden [B,S,H]."""

    def __init__(self, encoder: Encoder, start: int, stop: int) -> None:
        super().__init__()
        self.embeddings = encoder.embeddings if start == 0 else None
        self.layers = encoder.layers[start:stop]

    def forward(self, *inputs: Tensor) -> Tensor:
        """Take input_ids, token_type_ids, attention_mask [B,S], or hidden_below [B,S,H], attention_mask."""
        *below, mask = inputs
        hidden: Tensor = below[0] if self.embeddings is None else self.embeddings(*below)
        for layer in self.layers:
            hidden = layer(hidden, mask.bool())
        return hidden


class Whole(nn.Module):
    """A branch of which every layer computes every token: hidden [B,S,H], attention_mask [B,S] → probabilities."""

    def __init__(self, branch: Branch) -> None:
        super().__init__()
        self.branch = branch

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """Return the probabilities [B,C]."""
        for layer in self.branch.layers:
            hidden = layer(hidden, mask.bool())
        return F.softmax(self.branch.output(hidden[:, 0]), dim=-1)


class Folded(nn.Module):
    """A branch of one layer, folded as `export.layers.folded_layer` does: no keys and values per token."""

    def __init__(self, branch: Branch) -> None:
        super().__init__()
        (self.layer,) = branch.layers
        self.output = branch.output

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """Return the probabilities [B,C] of hidden [B,S,H], attention_mask [B,S]."""
        layer: Layer = self.layer  # type: ignore[assignment]
        first, heads = hidden[:, 0], layer.heads  # [B,H]
        size = layer.query.in_features
        width = size // heads
        query = layer.query(first).view(-1, heads, 1, width) * width**-0.5
        probe = query @ layer.key.weight.view(heads, width, size)  # [B,A,1,H]
        scores = probe[:, :, 0] @ hidden.transpose(1, 2)  # [B,A,S]
        scores = scores + (1 - mask[:, None].float()) * -1e4
        mixed = F.softmax(scores, dim=-1) @ hidden  # [B,A,H]
        value = layer.value.weight.view(heads, width, size).transpose(1, 2)  # [A,H,d]
        attended = (mixed[:, :, None] @ value).reshape(-1, size) + layer.value.bias
        hidden = layer.attention_norm(first + layer.output(attended))
        above = F.gelu(layer.up(hidden), approximate=layer.approximate)
        return F.softmax(self.output(layer.feed_forward_norm(hidden + layer.down(above))), dim=-1)


def trace(module: nn.Module, inputs: Sequence[str], output: str, hidden_size: int, to: Path) -> None:
    """Write the ONNX of a module; the inputs are INT64 [B,S], those whose names begin with `hidden` FP32 [B,S,H]."""
    ones = torch.ones(2, 8, dtype=torch.int64)
    examples = [torch.zeros(2, 8, hidden_size) if name.startswith("hidden") else ones for name in inputs]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the tracer warns of every shape that it reads
        torch.onnx.export(
            module.eval(), tuple(examples), to, input_names=list(inputs), output_names=[output],
            dynamic_axes=dict.fromkeys(inputs, TOKENS) | {output: TOKENS if output == "hidden" else {0: "items"}},
            opset_version=OPSET, dynamo=False,
        )  # fmt: skip

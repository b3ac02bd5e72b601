"""A linear-chain CRF over the words of a text (Lafferty, McCallum, Pereira 2001), for tags that must fit together.

The score of a path of labels is the sum of its emissions, one per word, and of its transitions, with one for how it
starts and one for how it ends; its probability is exp(score) over the sum of all paths'. Transitions against the
labels' scheme (see espalier.tagging.Scheme) cost 1e4: impossible in FP32 and FP16 alike, and yet finite, so that gold
tags that break the scheme give a large loss, not an infinite one.

Shapes: B items, S tokens, C labels, W words of the longest item. Tokens that begin no word are no part of the chain.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from espalier.contract import Structure
from espalier.tagging import Scheme

IMPOSSIBLE = -1e4
SMALLEST = 1e-300
"""What sums of probabilities are held at, so that their logarithms stay finite; FP64 ends a little below."""

NO_WORD = -1
"""The label of a token that begins no word."""


def crf_for(structure: Structure, labels: Sequence[str]) -> "CRF | None":
    """Return the fresh CRF of a task, if it has one."""
    return CRF(labels) if structure is Structure.CRF else None


class CRF(nn.Module):
    """Transitions between C labels, and the sums and maxima over all paths, by the forward and Viterbi algorithms."""

    _first: Tensor  # [C], [C,C], [C]: 0, or IMPOSSIBLE
    _between: Tensor
    _last: Tensor

    def __init__(self, labels: Sequence[str]) -> None:
        super().__init__()
        scheme = Scheme(labels)

        def masked(allowed: list[bool]) -> Tensor:
            return torch.tensor(allowed).logical_not() * IMPOSSIBLE

        self.transitions = nn.Parameter(torch.zeros(len(labels), len(labels)))  # [C,C], from row to column
        self.start = nn.Parameter(torch.zeros(len(labels)))  # [C]
        self.end = nn.Parameter(torch.zeros(len(labels)))  # [C]
        between = torch.stack([masked([scheme.allows(left, right) for right in labels]) for left in labels])
        self.register_buffer("_between", between, persistent=False)
        self.register_buffer("_first", masked([scheme.allows(None, label) for label in labels]), persistent=False)
        self.register_buffer("_last", masked([scheme.allows(label, None) for label in labels]), persistent=False)

    def scores(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return what a start [C], a transition [C,C] and an end [C] add to a path's score."""
        return self.start + self._first, self.transitions + self._between, self.end + self._last

    def log_partition(self, emissions: Tensor, words: Tensor) -> Tensor:
        """Return the log of the sum of exp(score) over all paths, [B]; 0 without words.

        emissions [B,S,C]; words [B,S] is true for tokens that begin a word.
        """
        # A matrix product of exponentials instead of C² of them per word is many times faster; in FP64 it is exact
        # for labels whose chances differ by up to e^690.
        start, transitions, end = (scores.double() for scores in self.scores())
        packed, valid, factors = _pack(emissions, words).double(), _chain(words), transitions.exp()
        total = start + packed[:, 0]  # [B,C], over the paths up to here that end in a label
        for step in range(1, valid.shape[1]):
            peak = total.detach().amax(1, keepdim=True)
            longer = ((total - peak).exp() @ factors).clamp(min=SMALLEST).log() + peak + packed[:, step]
            total = torch.where(valid[:, step, None], longer, total)
        return (torch.logsumexp(total + end, dim=1) * valid[:, 0]).to(emissions.dtype)

    def path_score(self, emissions: Tensor, words: Tensor, tags: Tensor) -> Tensor:
        """Return the score [B] of the paths `tags` [B,S], label indices of which only those of words count."""
        start, transitions, end = self.scores()
        valid = _chain(words)  # [B,W]
        path = _pack(tags.masked_fill(~words, 0), words)  # [B,W]
        chosen = _pack(emissions, words).gather(2, path[:, :, None])[:, :, 0]  # [B,W]
        moves = transitions[path[:, :-1], path[:, 1:]]  # [B,W-1]
        last = path.gather(1, (valid.sum(1, keepdim=True) - 1).clamp(min=0))[:, 0]  # [B]
        inner = (chosen * valid).sum(1) + (moves * valid[:, 1:]).sum(1)
        return (start[path[:, 0]] + inner + end[last]) * valid[:, 0]

    def log_likelihood(self, emissions: Tensor, words: Tensor, tags: Tensor) -> Tensor:
        """Return the log-probability [B] of the paths `tags`; shapes as in `path_score`."""
        return self.path_score(emissions, words, tags) - self.log_partition(emissions, words)

    def marginals(self, emissions: Tensor, words: Tensor) -> Tensor:
        """Return the probability of each label at each word, over all paths, [B,S,C]; 0 where no word begins."""
        with torch.enable_grad():
            given = emissions.detach().requires_grad_()
            total = self.log_partition(given, words).sum()
        return torch.autograd.grad(total, given)[0]  # what the forward-backward algorithm computes

    @torch.no_grad()
    def viterbi(self, emissions: Tensor, words: Tensor) -> tuple[Tensor, Tensor]:
        """Return the best path's labels [B,S], NO_WORD where no word begins, and its score [B], 0 without words.

        Of a scheme that has some legal path of that length, as every one with `O` has, the best path is legal.
        """
        start, transitions, end = self.scores()
        packed, valid = _pack(emissions, words), _chain(words)
        best = start + packed[:, 0]  # [B,C], of the paths up to here that end in a label
        stay = torch.arange(best.shape[1], device=best.device).expand_as(best)
        pointers = []  # [B,C] each: the label before
        for step in range(1, valid.shape[1]):
            longer, before = (best[:, :, None] + transitions).max(dim=1)
            on = valid[:, step, None]
            best = torch.where(on, longer + packed[:, step], best)
            pointers.append(torch.where(on, before, stay))
        score, tag = (best + end).max(dim=1)
        path = [tag]
        for pointer in reversed(pointers):
            path.append(pointer.gather(1, path[-1][:, None])[:, 0])
        labels = torch.full(words.shape, NO_WORD, device=words.device)
        labels[words] = torch.stack(path[::-1], dim=1)[valid]
        return labels, score * valid[:, 0]

    def answer(self, emissions: Tensor, words: Tensor, mask: Tensor) -> Tensor:
        """Return the best path as a head serves it, [B,S,2]: labels, and the path's log-probability at every token.

        `mask` [B,S] is true for real tokens; pads are 0.
        """
        labels, score = self.viterbi(emissions, words)
        chance = (score - self.log_partition(emissions, words))[:, None].expand(labels.shape)
        return torch.stack([labels.to(chance.dtype), chance], dim=2) * mask[:, :, None]


def _chain(words: Tensor) -> Tensor:
    """Return [B,W], true where an item has so many words; W is at least 1."""
    counts = words.sum(1, keepdim=True)  # [B,1]
    return torch.arange(max(1, int(counts.max())), device=words.device) < counts


def _pack(tokens: Tensor, words: Tensor) -> Tensor:
    """Bring the words' rows of `tokens` [B,S,…] to the front, [B,W,…]; the rest are whatever comes after them."""
    order = torch.argsort(words.logical_not().long(), dim=1, stable=True)[:, : _chain(words).shape[1]]
    return tokens[torch.arange(len(tokens), device=tokens.device)[:, None], order]

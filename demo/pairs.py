"""Sentence pairs of the demo: do two utterances ask for the same thing with the same values?"""

from collections import defaultdict
from collections.abc import Callable
from random import Random
from typing import Any

from demo.grammar import Grammar, Template

CUE_RATE = 0.25
"""Share of the sentences with a cue of urgency: how urgent a wish is does not change what is wished for."""

Written = tuple[Template, dict[str, tuple[str, ...]]]


class _Pairs:
    def __init__(self, grammar: Grammar, random: Random) -> None:
        self.grammar, self.random = grammar, random
        groups: dict[tuple[str, frozenset[str]], list[Template]] = defaultdict(list)
        for template in grammar.templates:
            # Small talk has no two wordings of one wish, but shares slots with the intents: it serves as a contrast.
            groups[template.signature].append(template)
        self.groups = groups
        self.paraphrased = [
            signature
            for signature, templates in groups.items()
            if signature[0] != "none" and len({template.line for template in templates}) > 1
        ]

    def first(self) -> Written:
        """Draw a sentence that has a paraphrase in the grammar."""
        while True:
            sense = self.random.choice(sorted({sense for sense, _ in self.paraphrased}))
            signature = self.random.choice([known for known in self.paraphrased if known[0] == sense])
            template = self.random.choice(self.groups[signature])
            if signature[1] or self.random.random() < 0.3:
                return template, self.grammar.draw(template, self.random)

    def same(self) -> tuple[Written, Written]:
        """Two wordings, one wish."""
        one, values = self.first()
        while True:
            other = self.random.choice(self.groups[one.signature])
            if other.line != one.line:
                return (one, values), (other, values)

    def other_value(self) -> tuple[Written, Written]:
        """One slot has another value, in the same or another wording."""
        while True:
            one, values = self.first()
            if values:
                break
        other = one if self.random.random() < 0.4 else self.random.choice(self.groups[one.signature])
        changed = dict(values)
        slot = self.random.choice(sorted(values))
        while changed[slot] == values[slot]:
            changed[slot] = self.random.choice(self.grammar.pool(one.pools[slot]))
        return (one, values), (other, changed)

    def other_wish(self) -> tuple[Written, Written]:
        """Another intent or sense with the same values, as far as it has the slots."""
        while True:
            one, values = self.first()
            signatures = [
                signature
                for signature in self.groups
                if signature[0] != one.sense and (signature[1] & set(values) or signature[1] == set(values))
            ]
            if signatures:
                break
        # Prefer those that share all: otherwise an additional slot gives the difference away.
        most = max(len(slots & set(values)) for _, slots in signatures)
        closest = [signature for signature in signatures if len(signature[1] & set(values)) == most]
        other = self.random.choice(self.groups[self.random.choice(closest)])
        kept = self.grammar.draw(other, self.random)
        for slot in kept:
            if slot in values and values[slot] in self.grammar.pool(other.pools[slot]):
                kept[slot] = values[slot]
        return (one, values), (other, kept)

    def other_detail(self) -> tuple[Written, Written]:
        """The same wish with a value more or less."""
        while True:
            one, values = self.first()
            signatures = [
                signature
                for signature in self.groups
                if signature[0] == one.sense and (signature[1] < set(values) or signature[1] > set(values))
            ]
            if signatures:
                break
        other = self.random.choice(self.groups[self.random.choice(signatures)])
        return (one, values), (other, {**self.grammar.draw(other, self.random), **values})

    def unrelated(self) -> tuple[Written, Written]:
        """Two wishes that have nothing to do with each other."""
        one, other = self.first(), self.first()
        while other[0].intent == one[0].intent:
            other = self.first()
        return one, other


def write_pairs(grammar: Grammar, count: int, random: Random) -> list[dict[str, Any]]:
    """Return `count` distinct pairs, half of them `same`, half `different` in ways from plain to subtle, shuffled."""
    pairs = _Pairs(grammar, random)
    plan: list[tuple[str, Callable[[], tuple[Written, Written]], int]] = [
        ("same", pairs.same, count // 2),
        ("different", pairs.other_value, count // 5),
        ("different", pairs.other_wish, count * 3 // 20),
        ("different", pairs.other_detail, count // 20),
        ("different", pairs.unrelated, count - count // 2 - count // 5 - count * 3 // 20 - count // 20),
    ]
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    goal = 0
    for label, draw, share in plan:
        goal += share
        while len(rows) < goal:
            both = list(draw())
            random.shuffle(both)
            one, other = (grammar.write(template, values, random, CUE_RATE).text for template, values in both)
            if one.lower() != other.lower():
                rows.setdefault((one, other), {"text_a": one, "text_b": other, "label": label})
    shuffled = list(rows.values())
    random.shuffle(shuffled)
    return shuffled

"""What to serve, without any server: chains of segments, and who keeps what. Property tests against brute force."""

import itertools
from collections.abc import Mapping

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from espalier.configs import head_config
from espalier.contract import HeadInfo, Kind, Target, TrunkInfo
from serving.plan import TRUNK, Head, Segment, Served, Trunk, choose, find_chain

DEPTH = 5


def segment(start: int, stop: int, base: str = "base") -> Segment:
    info = TrunkInfo(
        start=start, stop=stop, hidden_size=4, target=Target.CPU, base=base, revision="local",
        fingerprint=f"{base} up to {stop}",
    )  # fmt: skip
    return Segment(f"{info.model}-{base}", info)


def head(task: str, tap: int, base: str = "base", content: str = "1") -> Head:
    info = HeadInfo(
        task=task, kind=Kind.CLASSIFICATION, tap=tap, layers=1, folded=1, hidden_size=4, target=Target.CPU,
        labels=("a", "b"), pair=False, fingerprint=f"{base} up to {tap}", branch_digest="d", model_digest="e",
        metric="accuracy", score=0.5,
    )  # fmt: skip
    return Head(f"head_{task}-{base}-{content}", info, head_config(info), f"{base} {content}", 1)


segments = st.lists(
    st.tuples(st.integers(0, DEPTH - 1), st.integers(1, DEPTH)).filter(lambda ends: ends[0] < ends[1]),
    unique=True,
    max_size=6,
).map(lambda ends: [segment(*pair) for pair in ends])


@settings(deadline=None)
@given(segments, st.sets(st.integers(1, DEPTH), max_size=3))
def test_the_chain_is_a_shortest_one_that_ends_at_every_tap(there: list[Segment], taps: set[int]) -> None:
    def fits(chain: tuple[Segment, ...]) -> bool:
        ends = [0, *(s.info.stop for s in chain)]
        return [s.info.start for s in chain] == ends[:-1] and taps <= set(ends) and ends[-1] == max(taps, default=0)

    every = [c for size in range(len(there) + 1) for c in itertools.permutations(there, size) if fits(c)]
    chain = find_chain(there, taps)
    if chain is None:
        assert not every
    else:
        assert fits(chain)
        assert len(chain) == min(map(len, every))


def test_a_chain_is_of_one_base() -> None:
    assert find_chain([segment(0, 2), segment(2, 4, "other")], {2, 4}) is None


WHOLE = Trunk("tokenizer", (segment(0, 2), segment(2, 4)))


def serve(trunk: Trunk, **heads: Head) -> Served:
    target, refused = choose(trunk, heads, set(heads), None)
    assert target is not None
    assert not refused
    return target


@given(
    st.dictionaries(st.sampled_from("abcde"), st.tuples(st.integers(1, 4), st.sampled_from(["base", "other"]))),
    st.dictionaries(st.sampled_from("abcde"), st.tuples(st.integers(1, 4), st.sampled_from(["base", "other"]))),
    st.sets(st.sampled_from("abcde")),
    st.sampled_from(["base", "other"]),
)
def test_who_is_served_and_still_there_is_never_taken_away(
    first: Mapping[str, tuple[int, str]], dropped: Mapping[str, tuple[int, str]], damaged: set[str], base: str
) -> None:
    before, _ = choose(WHOLE, {task: head(task, *at) for task, at in first.items()}, set(first), None)
    assert before is not None
    trunk = Trunk("tokenizer", (segment(0, 2, base), segment(2, 4, base)))
    heads = {task: head(task, *at, content="2") for task, at in dropped.items() if task not in damaged}
    present = set(dropped) | damaged
    target, refused = choose(trunk, heads, present, before)
    assert target is not None
    assert set(target.heads) >= set(before.heads) & present
    assert set(target.heads) <= present
    taps = {h.info.tap for h in target.heads.values()}
    assert find_chain(target.chain, taps) == target.chain
    for task, served in target.heads.items():
        assert served.info.fingerprint in {s.info.fingerprint for s in target.chain}
        assert served == heads.get(task) or (served == before.heads[task] and (task in refused or task in damaged))
    for task in set(heads) - set(target.heads):
        assert refused[task]


def test_a_trunk_is_replaced_when_every_task_has_a_head_for_it() -> None:
    other = Trunk("tokenizer", (segment(0, 2, "other"), segment(2, 4, "other")))
    before = serve(WHOLE, a=head("a", 2), b=head("b", 4))
    half = {"a": head("a", 2, "other"), "b": head("b", 4)}
    target, refused = choose(other, half, {"a", "b"}, before)
    assert target == before
    assert "does not fit b; put heads there" in refused[TRUNK]
    assert "trained on another trunk" in refused["a"]
    target, refused = choose(other, {**half, "b": head("b", 4, "other")}, {"a", "b"}, before)
    assert not refused
    assert target is not None
    assert {s.info.base for s in target.chain} == {"other"}


def test_an_update_that_would_break_the_chain_of_others_is_refused() -> None:
    trunk = Trunk("tokenizer", (segment(0, 2), segment(2, 4), segment(0, 3)))
    before = serve(trunk, a=head("a", 2), b=head("b", 4))
    target, refused = choose(trunk, {"a": head("a", 3, content="2"), "b": head("b", 4)}, {"a", "b"}, before)
    assert target is not None
    assert target.heads["a"] == before.heads["a"]
    assert "no chain of segments has ends at 3, 4" in refused["a"]


def test_the_chain_ends_with_the_deepest_task() -> None:
    before = serve(WHOLE, a=head("a", 2), b=head("b", 4))
    target, _ = choose(WHOLE, {"a": head("a", 2)}, {"a"}, before)
    assert target is not None
    assert [s.info.stop for s in target.chain] == [2]


def test_without_a_trunk_nothing_is_served() -> None:
    assert choose(None, {"a": head("a", 2)}, {"a"}, None) == (None, {})


@pytest.mark.parametrize("trunk", [None, WHOLE], ids=["trunk half-copied", "trunk there"])
def test_a_new_task_joins_whether_or_not_the_trunk_is_at_rest(trunk: Trunk | None) -> None:
    before = serve(WHOLE, a=head("a", 2), b=head("b", 4))
    heads = {"a": head("a", 2), "b": head("b", 4), "c": head("c", 2)}
    target, refused = choose(trunk, heads, set(heads), before)
    assert target is not None
    assert not refused
    assert set(target.heads) == {"a", "b", "c"}

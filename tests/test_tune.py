"""`espalier tune`: what it tries, what it keeps, what it writes; once with a real Triton."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from espalier.configs import read_config
from espalier.errors import ContractError, DataError, ServerError
from espalier.repository import Repository
from espalier.scheduling import Scheduling
from serving import tune
from serving.tune import Trial, Tuner, texts_to_ask, tunable

Rate = Callable[[Scheduling], float]


@pytest.fixture
def own(repository: Path, tmp_path: Path) -> Path:
    """A copy of the exported repository that a test may change."""
    shutil.copytree(repository, tmp_path / "models")
    return tmp_path / "models"


@pytest.fixture
def tuner(own: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Tuner]:
    """Make tuners for four cores that look up rates instead of measuring them, and count how often they do."""
    monkeypatch.setattr(tune, "available_cores", lambda: 4)

    def make(rate: Rate, asked: list[Scheduling], budget: float = 1e6, texts: tuple[str, ...] = ("a",)) -> Tuner:
        def measure(self: Tuner, scheduling: Scheduling) -> Trial:
            asked.append(scheduling)
            self._record.bound = self._record.bound or 0.4
            return Trial(scheduling=scheduling, rate=rate(scheduling), p50=0.1, p99=0.3, full=rate(scheduling) + 1)

        monkeypatch.setattr(Tuner, "_measure", measure)
        return Tuner(tunable(own, ()), texts, budget, log_file=own.parent / "tune.log")

    return make


def likes(threads: int, batch: int, delay: int) -> Rate:
    def rate(scheduling: Scheduling) -> float:
        distance = abs(scheduling.threads - threads) + abs(scheduling.batch - batch) / 10
        return 100 - 20 * (distance + abs(scheduling.delay - delay) / 10_000)

    return rate


def test_the_best_of_all_settings_is_found_and_written(tuner: Callable[..., Tuner], own: Path) -> None:
    asked: list[Scheduling] = []
    heads = {path: (path / "config.pbtxt").read_bytes() for path in own.glob("head_*")}
    before = Repository(own).scheduling()
    done = tuner(likes(threads=1, batch=8, delay=4_000), asked).run()
    best = Scheduling(threads=1, instances=4, batch=8, delay=4_000)
    assert (done.before.scheduling, done.after.scheduling, done.written, done.complete) == (before, best, True, True)
    assert {Scheduling.read(read_config(path)) for path in own.glob("trunk_*")} == {best}
    assert heads == {path: (path / "config.pbtxt").read_bytes() for path in own.glob("head_*")}
    assert {(one.threads, one.instances) for one in asked} == {(2, 1), (1, 4), (2, 2), (4, 1)}
    assert asked[-4:] == [before, best] * 2, "in the end what was deployed and what is best take turns"


def test_a_copy_is_scheduled_and_leaves_the_repository_alone(own: Path) -> None:
    chosen = tunable(own, ())
    files = [path for path in own.rglob("*") if path.is_file()]
    before = {path: (path.read_bytes(), path.stat().st_ctime_ns) for path in files}
    other = chosen.scheduling.model_copy(update={"threads": 1, "instances": 2, "delay": 700})
    with chosen.copy(other) as folder:
        assert {Scheduling.read(read_config(path)) for path in folder.glob("trunk_*")} == {other}
    assert not folder.exists()
    assert before == {path: (path.read_bytes(), path.stat().st_ctime_ns) for path in files}, "a wiring sees no change"


def test_nothing_is_written_where_nothing_is_faster(tuner: Callable[..., Tuner], own: Path) -> None:
    before = Repository(own).scheduling()
    done = tuner(lambda scheduling: 50.0 + (scheduling == before), []).run()
    assert not done.written
    assert done.after == done.before
    assert Repository(own).scheduling() == before


@pytest.mark.parametrize("again", [0.9, 1.04])
def test_what_won_by_chance_is_not_written(tuner: Callable[..., Tuner], own: Path, again: float) -> None:
    """The first look favours another scheduling by far, the turns in the end by no more than noise."""
    before = Repository(own).scheduling()
    lucky = before.model_copy(update={"threads": 4, "instances": 1})
    asked: list[Scheduling] = []

    def rate(scheduling: Scheduling) -> float:
        if scheduling != lucky:
            return 50.0
        return 100.0 if asked.count(lucky) == 1 else 50.0 * again

    done = tuner(rate, asked).run()
    assert asked[-4:] == [before, lucky] * 2
    assert not done.written
    assert Repository(own).scheduling() == before


def test_heads_count_that_lie_there_and_fit(own: Path) -> None:
    """As for a running server: the repository's own ensemble may know less, or more."""
    shutil.rmtree(own / "head_urgency")
    shutil.copytree(own / "head_intent", own / "head_intent__b")  # its config has the other name
    (own / "head_half").mkdir()
    (own / "notes").mkdir()
    chosen = tunable(own, ())
    assert {*chosen.outputs} == {"intent", "slots", "slots_crf", "same_request"}
    with chosen.copy(chosen.scheduling) as folder:
        copied = {path.name for path in folder.iterdir()}
        assert copied == {"multitask", "tokenizer", *chosen.models, *(f"head_{task}" for task in chosen.outputs)}
        assert {output.name for output in read_config(folder / "multitask").output} == {"offsets", *chosen.outputs}


def test_a_scheduling_that_cannot_be_served_is_passed_over(tuner: Callable[..., Tuner]) -> None:
    def rate(scheduling: Scheduling) -> float:
        if scheduling.threads == 4:
            raise ServerError("out of memory")
        return likes(1, 8, 0)(scheduling)

    done = tuner(rate, []).run()
    assert done.after.scheduling.threads == 1
    assert [trial.rate for trial in done.trials if trial.scheduling.threads == 4] == [0.0]


def test_a_repository_that_cannot_be_written_is_told_first(tuner: Callable[..., Tuner], own: Path) -> None:
    asked: list[Scheduling] = []
    own.with_name("models.tune.json").mkdir()
    with pytest.raises(ServerError, match=r"models\.tune\.json cannot be written"):
        tuner(likes(1, 8, 0), asked).run()
    assert not asked


def test_time_is_up(tuner: Callable[..., Tuner], own: Path) -> None:
    asked: list[Scheduling] = []
    done = tuner(likes(1, 8, 4_000), asked, budget=0).run()
    assert len(asked) == 1, "what is deployed is always measured"
    assert (done.complete, done.written) == (False, False)


def test_an_interrupted_run_goes_on(tuner: Callable[..., Tuner], own: Path) -> None:
    asked: list[Scheduling] = []

    def interrupted(scheduling: Scheduling) -> float:
        if len(asked) == 4:
            raise KeyboardInterrupt
        return likes(1, 8, 0)(scheduling)

    with pytest.raises(KeyboardInterrupt):
        tuner(interrupted, asked).run()
    kept = own.with_name("models.tune.json").read_bytes()
    again: list[Scheduling] = []
    done = tuner(likes(1, 8, 0), again).run()
    assert not {*asked[:3]} & {*again[:-4]}, "what was measured is not measured again, the turns in the end aside"
    assert {trial.scheduling for trial in done.trials} == {*asked, *again}
    assert not own.with_name("models.tune.json").exists(), "when all is done, another run measures anew"
    own.with_name("models.tune.json").write_bytes(kept)
    others: list[Scheduling] = []
    tuner(likes(1, 8, 0), others, texts=("another",)).run()
    assert len({*others}) > 6, "trials on other texts are of no use"


def test_a_copy_that_would_not_fit_into_memory_is_not_tried(
    tuner: Callable[..., Tuner], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Scheduling] = []
    monkeypatch.setattr(tune, "WEIGHTS", 1e12)
    tuner(likes(1, 8, 0), asked).run()
    assert {(one.threads, one.instances) for one in asked} == {(2, 1)}


def test_what_cannot_be_tuned_is_told(own: Path, tmp_path: Path) -> None:
    with pytest.raises(ContractError, match="has no task 'weather'; it has intent"):
        tunable(own, ["weather"])
    with pytest.raises(ContractError, match="holds no exported trunk"):
        tunable(tmp_path / "nowhere", ())
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(DataError, match="holds no text; --texts takes a text per line"):
        texts_to_ask(own, tmp_path / "empty.txt")
    with pytest.raises(DataError, match="cannot be read"):
        texts_to_ask(own, tmp_path / "missing.txt")
    (tmp_path / "two.txt").write_text("one\n\ntwo\n")
    assert texts_to_ask(own, tmp_path / "two.txt") == ["one", "two"]
    assert len(texts_to_ask(own, None)) == tune.TEXTS


@pytest.mark.server
def test_a_real_trial(own: Path, tmp_path: Path) -> None:
    """One trial on a real Triton: the rate within a bound, and none within a bound that nothing keeps."""
    wide = Tuner(tunable(own, ["intent"]), texts_to_ask(own, None), 0, 5.0, 1.0, log_file=tmp_path / "log").run().before
    assert wide.p50 is not None
    assert wide.p99 is not None
    assert 0 < wide.rate <= wide.full
    assert wide.p50 <= wide.p99 <= 5.0
    tight = Tuner(tunable(own, ["intent"]), ["a text"], 0, 1e-4, 0.2, log_file=tmp_path / "log").run().before
    assert (tight.rate, tight.p50, tight.p99) == (0.0, None, None)
    assert tight.full > 0

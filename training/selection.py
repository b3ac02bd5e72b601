"""Which tap and how many layers for each task: the paper's "mixed", chosen jointly, since the trunk is shared.

The paper adds task layers for as long as each brings at least c points on dev. Here every layer that is executed has
that price, the trunk's as well as a task's: chosen is the plan with the largest (sum of the tasks' dev scores − c ×
cost), over all trunk depths and all candidates of all tasks. Where gains diminish this is the paper's rule, task by
task; where a second layer brings little and a third one much, the rule would stop too early and this does not.

Scores are in points (100 × the metric), means over seeds. Costs are in layers of the base, per text.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from espalier.branch import CARD_FILE, BranchCard, other_base, read_card
from espalier.contract import Structure
from espalier.costs import Costs, HeadShape
from espalier.errors import BranchError, SpecError
from espalier.plan import Plan, PlannedTask, write_plan
from training.search import searched_scores


@dataclass(frozen=True)
class Candidate:
    """A way to serve a task: branches of one tap and depth, made in the same way from different seeds."""

    task: str
    metric: str
    tap: int
    shape: HeadShape
    distilled: bool
    scores: tuple[float, ...]  # points, by seed
    best: Path  # the branch with the best dev score: the one to deploy

    @property
    def score(self) -> float:
        """Mean dev score, in points."""
        return fmean(self.scores)

    @property
    def layers(self) -> int:
        """Task layers."""
        return self.shape.layers

    @property
    def folded(self) -> int:
        """How many of its layers are folded."""
        return self.shape.folded

    def counted(self, folded: float) -> float:
        """Return its layers, a folded one counted as the fraction `folded`."""
        return self.layers - self.folded + self.folded * folded

    @property
    def spread(self) -> float | None:
        """Standard deviation over seeds, in points; None for one seed."""
        return stdev(self.scores) if len(self.scores) > 1 else None

    @property
    def score_text(self) -> str:
        """Score and spread, as a person reads them."""
        return f"{self.score:.1f}" if self.spread is None else f"{self.score:.1f} ± {self.spread:.1f}"


@dataclass(frozen=True)
class Selection:
    """One candidate per task, on one trunk."""

    chosen: tuple[Candidate, ...]

    @property
    def tap(self) -> int:
        """Depth of the shared trunk."""
        return max(candidate.tap for candidate in self.chosen)

    @property
    def score(self) -> float:
        """Mean dev score over the tasks, in points."""
        return fmean(candidate.score for candidate in self.chosen)

    @property
    def layers(self) -> int:
        """Layers executed for one text asked for every task: the paper's overhead."""
        return self.tap + sum(candidate.layers for candidate in self.chosen)

    def folded_layers(self, costs: Costs) -> float:
        """Layers executed, a folded one counted as the fraction that it was measured to cost."""
        return self.tap + sum(candidate.counted(costs.folded) for candidate in self.chosen)

    def milliseconds(self, costs: Costs) -> float:
        """Measured time per text, in milliseconds: of the trunk and of every head."""
        return costs.trunk[self.tap] + sum(costs.heads[c.shape] for c in self.chosen)


def find_candidates(folders: Iterable[Path]) -> list[Candidate]:
    """Read the cards of all branches in and below `folders`; group those that differ in nothing but their seed.

    Raises BranchError if there is none, if they do not share one base, or if branches of one task were scored on
    different metrics.
    """
    groups: dict[tuple[object, ...], list[tuple[Path, BranchCard]]] = defaultdict(list)
    first: tuple[Path, BranchCard] | None = None
    metrics: dict[str, str] = {}
    for folder in folders:
        cards = folder.rglob(CARD_FILE)
        # Folders with a dot hold what is not finished.
        found = sorted(c.parent for c in cards if not any(part[0] == "." for part in c.relative_to(folder).parts))
        if not found:
            raise BranchError(f"{folder}: there is no branch in or below it")
        for path in found:
            card = read_card(path)
            first = first or (path, card)
            if difference := other_base(path, card, *first):
                raise BranchError(f"{difference}; tasks are selected for one shared trunk")
            recipe = sorted((name, repr(value)) for name, value in card.arguments.items() if name != "seed")
            drawn = card.teacher and (card.teacher.init, card.teacher.cls_weight)
            shape = (card.tap, card.layers, card.folded, card.spec.structure, card.labels)
            key = (card.spec.name, *shape, drawn, card.cached, tuple(recipe))
            metric = metrics.setdefault(card.spec.name, card.spec.metric)
            if card.spec.metric != metric:
                raise BranchError(
                    f"{path} was scored by {card.spec.metric}, another branch of task {card.spec.name!r} by {metric}; "
                    "train one of them again, or leave it out"
                )
            if all(path.resolve() != known.resolve() for known, _ in groups[key]):
                groups[key].append((path, card))
    return [_candidate(group) for group in groups.values()]


def _candidate(group: Sequence[tuple[Path, BranchCard]]) -> Candidate:
    best, card = max(group, key=lambda pair: pair[1].score)
    # Of the seeds of a search the best one alone has a branch; the search remembers the others' scores.
    scores = [score for path, each in group for score in searched_scores(path, each) or (each.score,)]
    return Candidate(
        task=card.spec.name,
        metric=card.spec.metric,
        tap=card.tap,
        shape=HeadShape(
            card.spec.kind,
            card.layers,
            card.folded,
            max(1, len(card.labels)),
            card.labels if card.spec.structure is Structure.CRF else (),
        ),
        distilled=card.teacher is not None,
        scores=tuple(100 * score for score in scores),
        best=best,
    )


def select(
    candidates: Sequence[Candidate], threshold: float, cost: Callable[[Candidate], float] = lambda c: c.layers
) -> Selection:
    """Choose one candidate per task: a layer more must bring at least `threshold` points.

    `cost` gives the layers that a candidate counts for; a trunk layer counts as one, whatever it is worth to however
    many tasks. Of equal plans the cheaper one is chosen.
    """
    if not threshold >= 0:
        raise SpecError(f"the threshold is {threshold}; it is a gain in points, 0 or more")

    def worth(plan: Selection) -> tuple[float, float]:
        spent = plan.tap + sum(cost(candidate) for candidate in plan.chosen)
        return sum(candidate.score for candidate in plan.chosen) - threshold * spent, -spent

    def gain(candidate: Candidate) -> tuple[float, float, int]:
        return candidate.score - threshold * cost(candidate), -cost(candidate), -candidate.tap

    plans = [Selection(tuple(max(options, key=gain) for options in reachable)) for reachable in _by_depth(candidates)]
    return max(plans, key=worth)


def front(candidates: Sequence[Candidate], cost: Callable[[Candidate], float] = lambda c: c.layers) -> list[Selection]:
    """Return every plan that no other beats in both mean score and cost, cheapest first; `cost` as in `select`.

    Exact: for each trunk depth, the best score for each sum of costs, task by task.
    """
    plans: dict[float, Selection] = {}
    for reachable in _by_depth(candidates):
        best: dict[float, tuple[float, tuple[Candidate, ...]]] = {0: (0.0, ())}
        for options in reachable:
            grown: dict[float, tuple[float, tuple[Candidate, ...]]] = {}
            for spent, (total, chosen) in best.items():
                for option in options:
                    key, score = round(spent + cost(option), 9), total + option.score
                    if key not in grown or score > grown[key][0]:
                        grown[key] = (score, (*chosen, option))
            best = grown
        for spent, (_, chosen) in best.items():
            plan = Selection(chosen)
            if plan.tap + spent not in plans or plan.score > plans[plan.tap + spent].score:
                plans[plan.tap + spent] = plan
    efficient: list[Selection] = []
    for spent in sorted(plans):
        if not efficient or plans[spent].score > efficient[-1].score:
            efficient.append(plans[spent])
    return efficient


def _by_depth(candidates: Sequence[Candidate]) -> list[list[list[Candidate]]]:
    """Return for each trunk depth at which every task has a candidate: the candidates within reach, by task."""
    if not candidates:
        raise BranchError("there are no candidates to select from")
    tasks = sorted({candidate.task for candidate in candidates})
    return [
        reachable
        for depth in sorted({candidate.tap for candidate in candidates})
        if all(reachable := [[c for c in candidates if c.task == task and c.tap <= depth] for task in tasks])
    ]


def write(path: Path, plan: Selection, threshold: float) -> None:
    """Write `plan` as YAML, the best branch of each candidate in it."""
    notes = {}
    for c in plan.chosen:
        seeds = "one seed" if len(c.scores) == 1 else f"{len(c.scores)} seeds"
        made = "distilled" if c.distilled else "not distilled"
        notes[c.task] = f"{c.metric} {c.score_text} on dev, {seeds}, {made}"
    header = (
        f"Selected with a threshold of {threshold:g} points a layer: trunk of {plan.tap} layers, {plan.layers} layers\n"
        f"executed for {len(plan.chosen)} tasks, mean dev score {plan.score:.2f}.\n"
        "Edit it freely, then: espalier export --plan THIS-FILE"
    )
    tasks = {c.task: PlannedTask(branch=c.best, tap=c.tap, layers=c.layers, folded=c.folded) for c in plan.chosen}
    write_plan(path, Plan(tasks=tasks), notes, header)


def summary(plan: Selection, plans: Sequence[Selection], costs: Costs, depth: int) -> dict[str, Any]:
    """Return the plan and the front as plain values; `depth` is the number of layers of the base."""

    def point(selection: Selection) -> dict[str, Any]:
        return {
            "score": selection.score,
            "layers": selection.layers,
            "layers_fraction": selection.layers / (depth * len(selection.chosen)),
            "folded_layers": selection.folded_layers(costs),
            "folded_fraction": selection.folded_layers(costs) / (depth * len(selection.chosen)),
            "ms_per_text": selection.milliseconds(costs),
            "tasks": {
                c.task: {"tap": c.tap, "layers": c.layers, "folded": c.folded, "score": c.score}
                for c in selection.chosen
            },
        }

    return {"plan": point(plan), "front": [point(other) for other in plans], "folded_layer": costs.folded}

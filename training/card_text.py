"""The page of a branch card: Markdown and its pictures, from what was measured."""

import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from seqeval.metrics.sequence_labeling import get_entities
from seqeval.metrics.sequence_labeling import precision_recall_fscore_support as slot_scores
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

from espalier.branch import BranchCard
from espalier.contract import Kind
from espalier.spec import HubData
from espalier.tagging import OUTSIDE
from training import card_plots
from training.card_commands import Recipe
from training.data import Example, TaskData
from training.markdown import code, escape, table

EPOCHS, LENGTHS, CONFUSION, SCATTER, SLOTS = "epochs.png", "lengths.png", "confusion.png", "scatter.png", "slots.png"
PICTURES = (EPOCHS, LENGTHS, CONFUSION, SCATTER, SLOTS)

LONGEST_TEXT = 400  # characters of a text in a table


@dataclass(frozen=True)
class Evidence:
    """What a card tells."""

    card: BranchCard
    depth: int  # layers of the base
    parameters: int  # of the branch
    data: TaskData
    max_length: int  # tokens, where texts are cut
    lengths: dict[str, list[int]]  # tokens of each text before it is cut, by split
    words: list[list[int]]  # by dev text, for tagging: each word's first token, or -1
    answers: list[Any]  # on dev, as training.metrics has them
    probabilities: list[npt.NDArray[Any]]  # on dev: [C], [S,C] for tagging, the value itself for regression
    doubts: tuple[str, ...]  # where data or code changed since the training
    recipe: Recipe
    rows: int  # mistakes to show at most


def page(evidence: Evidence) -> tuple[str, dict[str, bytes]]:
    """Return the Markdown of the page, and its pictures by file name."""
    pictures: dict[str, bytes] = {}
    sections = [
        _head(evidence),
        _epochs(evidence, pictures),
        _answers(evidence, pictures),
        _mistakes(evidence),
        _data(evidence, pictures),
        _recipe(evidence),
    ]
    return "\n".join(sections), pictures


def _head(evidence: Evidence) -> str:
    card, spec = evidence.card, evidence.card.spec
    origin = "fine-tuned"
    if card.teacher is not None:
        origin = f"distilled from the branch {card.teacher.digest[:12]}, started from: {card.teacher.init}"
    counted = f" of {escape(spec.positive)}" if spec.positive is not None else ""
    facts = [
        ("task", f"{escape(spec.name)}: {spec.kind} of {'pairs of texts' if spec.pair else 'single texts'}"),
        ("score", f"{escape(spec.metric)}{counted} **{card.score:.4f}** on dev"),
        ("base", f"{escape(card.base)}, revision {escape(card.revision)}"),
        ("trunk", f"the base's bottom {_layers(card.tap)}; fingerprint {card.fingerprint[:16]}"),
        (
            "branch",
            f"{_layers(card.layers)}, of them {card.folded} folded, and an output layer, "
            f"{evidence.parameters:,} parameters; {origin}",
        ),
        (
            "cost",
            f"{card.layers} of the base's {evidence.depth} layers beside other tasks, "
            f"{card.tap + card.layers} of {evidence.depth} if asked alone",
        ),
        ("weights", f"sha256 {card.weights[:16]}"),
    ]
    doubts = "".join(f"\n> **Note:** {doubt}\n" for doubt in evidence.doubts)
    scores = table(["dev metric", "score"], [(escape(name), f"{value:.4f}") for name, value in card.metrics.items()])
    return f"# {escape(spec.name)}\n\n{table(['', ''], facts)}{doubts}\n{scores}"


def _layers(count: int) -> str:
    return "1 layer" if count == 1 else f"{count} layers"


def _epochs(evidence: Evidence, pictures: dict[str, bytes]) -> str:
    card = evidence.card
    if not card.history:
        return "## Metric by epoch\n\nThe branch's file has none.\n"
    kept = max(card.history, key=lambda entry: entry[card.spec.metric])["epoch"]
    names = [name for name in card.history[0] if name != "epoch"]
    rows = [
        [f"**{entry['epoch']:.0f}**" if entry["epoch"] == kept else f"{entry['epoch']:.0f}"]
        + [f"{entry[name]:.4f}" for name in names]
        for entry in card.history
    ]
    pictures[EPOCHS] = card_plots.by_epoch(card.history, card.spec.metric, kept)
    notes = "The epoch in bold was kept."
    if card.cached:
        notes += " These were taken on activations rounded to FP16; the scores above without."
    if card.stopped:
        notes += f" Training stopped early: {escape(card.stopped)}."
    scores = table(["epoch", *map(escape, names)], rows)
    return f"## Metric by epoch\n\n{scores}\n{notes}\n\n![metric by epoch]({EPOCHS})\n"


# --- answers ----------------------------------------------------------------------------------------------------


def _answers(evidence: Evidence, pictures: dict[str, bytes]) -> str:
    dev, answers = evidence.data.dev, evidence.answers
    match evidence.card.spec.kind:
        case Kind.CLASSIFICATION:
            gold, labels = [str(example.label) for example in dev], evidence.card.labels
            scores = precision_recall_fscore_support(gold, answers, labels=list(labels), zero_division=0)
            matrix = confusion_matrix(gold, answers, labels=list(labels))
            pictures[CONFUSION] = card_plots.confusion(matrix, labels)
            shown = len(card_plots.most_confused(matrix))
            part = f" The {shown} most confused of {len(labels)} labels.\n" if shown < len(labels) else ""
            return f"## By label\n\n{_scores(labels, scores, 'rows')}\n![confusion matrix]({CONFUSION})\n{part}"
        case Kind.REGRESSION:
            values = [float(value) for value in _labels(dev)]
            pictures[SCATTER] = card_plots.scatter(values, answers)
            errors = np.abs(np.subtract(values, answers))
            rows = [("mean", errors.mean()), ("median", np.median(errors)), ("largest", errors.max())]
            sizes = table(["error", ""], [(name, f"{value:.4g}") for name, value in rows])
            return f"## Gold and answers\n\n{sizes}\n![gold against answers]({SCATTER})\n"
        case Kind.TAGGING:
            golds = [list(tags) for tags in _labels(dev)]
            names = sorted({slot[0] for tags in (*golds, *answers) for slot in _slots(tags)})
            if not names:
                return "## By slot type\n\nDev has no slots.\n"
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=".*seems not to be NE tag")
                scores = slot_scores(golds, answers, average=None, zero_division=0)
            pictures[SLOTS] = card_plots.slot_scores(names, scores[2], scores[3])
            part = ""
            if len(names) > card_plots.MOST_BARS:
                part = f" The {card_plots.MOST_BARS} most frequent of {len(names)} types.\n"
            return f"## By slot type\n\n{_scores(names, scores, 'spans')}\n![F1 by slot type]({SLOTS})\n{part}"


def _scores(names: Sequence[str], scores: Sequence[Any], counted: str) -> str:
    rows = [
        [str(number), escape(name), *(f"{value:.3f}" for value in three), str(count)]
        for number, (name, *three, count) in enumerate(zip(names, *scores, strict=True), start=1)
    ]
    return table(["no.", "label", "precision", "recall", "F1", f"{counted} of dev"], rows)


def _labels(examples: Sequence[Example]) -> list[Any]:
    return [example.label for example in examples]


def _slots(tags: Sequence[str]) -> list[tuple[str, int, int]]:
    """Return type, first and last word of each slot, as the slot metrics see them."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*seems not to be NE tag")
        return [(str(name), int(first), int(last)) for name, first, last in get_entities(list(tags))]


# --- mistakes ---------------------------------------------------------------------------------------------------


def _mistakes(evidence: Evidence) -> str:
    match evidence.card.spec.kind:
        case Kind.CLASSIFICATION:
            intro, header, found = _wrong_labels(evidence)
        case Kind.REGRESSION:
            intro, header, found = _far_values(evidence)
        case Kind.TAGGING:
            intro, header, found = _wrong_slots(evidence)
    worst = sorted(found, key=lambda mistake: -mistake[0])
    if not worst:
        return "## Worst mistakes\n\nThere are none on dev.\n"
    text = [escape(column) for column in evidence.card.spec.text]
    shown = table([*text, *header], [cells for _, cells in worst[: evidence.rows]])
    return f"## Worst mistakes\n\n{intro.format(total=len(evidence.data.dev), wrong=len(worst))}\n\n{shown}"


_Mistakes = tuple[str, list[str], Iterator[tuple[float, list[str]]]]
"""What they are, the header of the table beside the text, and by mistake how bad it is, and its cells."""


def _wrong_labels(evidence: Evidence) -> _Mistakes:
    labels = evidence.card.labels

    def found() -> Iterator[tuple[float, list[str]]]:
        for example, answer, chances in zip(evidence.data.dev, evidence.answers, evidence.probabilities, strict=True):
            if answer != example.label:
                chance, of_gold = chances[labels.index(answer)], chances[labels.index(str(example.label))]
                cells = [escape(str(example.label)), escape(answer), f"{chance:.3f}", f"{of_gold:.3f}"]
                yield float(chance), [*_texts(example), *cells]

    header = ["gold", "answer", "probability", "of gold"]
    return "{wrong} of {total} answers are wrong; the most confident ones first.", header, found()


def _far_values(evidence: Evidence) -> _Mistakes:
    def found() -> Iterator[tuple[float, list[str]]]:
        for example, answer in zip(evidence.data.dev, evidence.answers, strict=True):
            error = answer - float(example.label)  # type: ignore[arg-type]
            yield abs(error), [*_texts(example), f"{example.label:.4g}", f"{answer:.4g}", f"{error:+.4g}"]

    return "The largest errors on the {total} texts of dev.", ["gold", "answer", "error"], found()


def _wrong_slots(evidence: Evidence) -> _Mistakes:
    def found() -> Iterator[tuple[float, list[str]]]:
        rows = zip(evidence.data.dev, evidence.answers, evidence.probabilities, evidence.words, strict=True)
        for example, answer, chances, words in rows:
            assert isinstance(example.label, tuple)
            best = [float(chances[token].max()) if token >= 0 else 1.0 for token in words]
            gold, answered = _slots(example.label), _slots(answer)
            missed = [slot for slot in gold if slot not in answered]
            wrong = [slot for slot in answered if slot not in gold]
            if missed or wrong:
                sure = [float(np.mean(best[first : last + 1])) for _, first, last in wrong]
                cells = [
                    ", ".join(_slot(example, slot) for slot in missed),
                    ", ".join(f"{_slot(example, slot)} {chance:.2f}" for slot, chance in zip(wrong, sure, strict=True)),
                ]
                # Of equally many wrong slots, those given with more confidence are worse.
                yield len(missed) + len(wrong) + sum(sure) / (len(sure) + 1), [*_texts(example), *cells]

    intro = "{wrong} of {total} texts have wrong slots; those with the most first. Right slots are left out."
    return intro, ["gold", "answer and probability"], found()


def _slot(example: Example, slot: tuple[str, int, int]) -> str:
    name, first, last = slot
    text = example.texts[0][example.words[first][0] : example.words[last][1]]
    return f"{escape(name)} “{escape(text, LONGEST_TEXT)}”"


def _texts(example: Example) -> list[str]:
    return [escape(text, LONGEST_TEXT) for text in example.texts]


# --- data -------------------------------------------------------------------------------------------------------


def _data(evidence: Evidence, pictures: dict[str, bytes]) -> str:
    spec, splits = evidence.card.spec, {"train": evidence.data.train, "dev": evidence.data.dev}
    rows = []
    for split, examples in splits.items():
        lengths = np.array(evidence.lengths[split])
        middle, high = np.percentile(lengths, [50, 95])
        cut = int((lengths > evidence.max_length).sum())
        rows.append([split, f"{len(examples):,}", f"{middle:.0f}", f"{high:.0f}", str(lengths.max()), f"{cut:,}"])
    sizes = table(["split", "rows", "median tokens", "95 %", "longest", f"cut at {evidence.max_length}"], rows)
    pictures[LENGTHS] = card_plots.lengths(evidence.lengths, evidence.max_length)
    match spec.kind:
        case Kind.CLASSIFICATION:
            balance = _balance("label", [Counter(_labels(examples)) for examples in splits.values()])
        case Kind.REGRESSION:
            balance = _spread(splits)
        case Kind.TAGGING:
            slots = [Counter(slot[0] for tags in _labels(e) for slot in _slots(tags)) for e in splits.values()]
            outside = [np.mean([tag == OUTSIDE for tags in _labels(e) for tag in tags]) for e in splits.values()]
            shares = f"Outside every slot are {outside[0]:.1%} of train's words and {outside[1]:.1%} of dev's.\n"
            balance = f"{_balance('slot type', slots)}\n{shares}"
    columns = f"columns {', '.join(map(escape, spec.text))} and {escape(spec.label)}"
    if isinstance(spec.data, HubData):
        where = f"the hub's {escape(spec.data.dataset)}, {columns}"
    else:
        where = f"{spec.data.format}, {columns}; the files are named in [task.yaml](task.yaml)"
    return f"## Data\n\nFormat: {where}.\n\n{sizes}\n![text lengths]({LENGTHS})\n\n{balance}"


def _balance(what: str, counts: Sequence[Counter[str]]) -> str:
    names = sorted(set().union(*counts), key=lambda name: (-counts[0][name], name))
    totals = [max(1, sum(each.values())) for each in counts]
    rows = [
        [escape(name)]
        + [f"{each[name]:,} ({each[name] / total:.1%})" for each, total in zip(counts, totals, strict=True)]
        for name in names
    ]
    return table([what, "train", "dev"], rows)


def _spread(splits: dict[str, list[Example]]) -> str:
    rows = []
    for split, examples in splits.items():
        values = np.array(_labels(examples))
        rows.append([split, *(f"{value:.4g}" for value in (values.mean(), values.std(), values.min(), values.max()))])
    return table(["gold values", "mean", "standard deviation", "smallest", "largest"], rows)


# --- how it was made --------------------------------------------------------------------------------------------


def _recipe(evidence: Evidence) -> str:
    card, recipe = evidence.card, evidence.recipe
    arguments = ", ".join(
        f"{name.replace('_', ' ')} {value}" for name, value in card.arguments.items() if value is not None
    )
    versions = ", ".join(f"{name} {version}" for name, version in card.versions.items())
    missing = f"{escape(recipe.missing)}\n\n" if recipe.missing else ""
    commands = code("\n".join(recipe.commands), "console")
    return (
        f"## How it was made\n\n{missing}From within this folder, bit for bit on the same machine and versions with "
        f"`OMP_NUM_THREADS={card.threads}`:\n\n"
        f"{commands}\nArguments: {escape(arguments)}.\n\nVersions: {escape(versions)}.\n"
    )

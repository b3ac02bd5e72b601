"""Score a deployed task on a dev split, through the server, with the metrics of training. Needs the extra `train`."""

from collections.abc import Callable
from typing import Any

from clients.client import Client
from clients.results import Answer, Classification, Regression, Tagging
from espalier.errors import RequestError
from espalier.spec import TaskSpec
from espalier.tagging import OUTSIDE
from training.data import Example, load_split, sample
from training.metrics import gold, score


def evaluate(
    client: Client,
    spec: TaskSpec,
    batch_size: int = 16,
    report: Callable[[int, int], None] = lambda done, total: None,
    max_rows: int | None = None,
) -> dict[str, float]:
    """Ask the server for every row of `spec`'s dev split, or a sample of `max_rows`; return the answers' metrics.

    `report` is told the rows answered and all rows.
    """
    deployed = client.tasks().get(spec.name)
    if deployed is not None and deployed.kind is not spec.kind:
        raise RequestError(f"the server's task {spec.name!r} is a {deployed.kind} task, the spec's a {spec.kind} task")
    examples = sample(load_split(spec, "dev"), max_rows)
    predicted: list[Any] = []
    for start in range(0, len(examples), batch_size):
        chunk = examples[start : start + batch_size]
        items = [_item(example) for example in chunk]
        answers = client.ask_batch(items, tasks=[spec.name])
        predicted += [plain(answer[spec.name], example) for answer, example in zip(answers, chunk, strict=True)]
        report(len(predicted), len(examples))
    return score(spec.kind, gold(examples), predicted, spec.positive)


def _item(example: Example) -> str | tuple[str, str]:
    return (example.texts[0], example.texts[1]) if len(example.texts) == 2 else example.texts[0]


def plain(answer: Answer, example: Example) -> Any:
    """Return an answer in the form that `training.metrics.score` takes; for tagging, one tag per word of `example`."""
    match answer:
        case Classification(label=label):
            return label
        case Regression(value=value):
            return value
        case Tagging(tokens=tokens):
            by_start = {token.start: token.label for token in tokens}
            return [_word_label(by_start, begin, end) for begin, end in example.words]
    raise RequestError(f"the server's answer is of an unknown kind: {answer!r}")


def _word_label(by_start: dict[int, str], begin: int, end: int) -> str:
    """Return the label of the first token inside a word; a word that lost all its tokens is outside every slot."""
    return next((by_start[at] for at in range(begin, end) if at in by_start), OUTSIDE)

"""What is deployed, as the server's own model configs tell it."""

from collections.abc import Sequence
from dataclasses import dataclass

from tritonclient.grpc import model_config_pb2 as pb

from espalier.configs import ensemble_generation
from espalier.contract import ENSEMBLE, OFFSETS, HeadInfo, Kind
from espalier.errors import ContractError, RequestError, UnknownTaskError


@dataclass(frozen=True)
class Catalogue:
    """The deployed tasks by name, candidates too, the ensemble's largest batch, and its generation."""

    tasks: dict[str, HeadInfo]
    max_batch_size: int
    generation: str

    def choose(self, tasks: Sequence[str] | None) -> tuple[HeadInfo, ...]:
        """Return the infos of `tasks`, of all but candidates if None; raise UnknownTaskError if one is not deployed."""
        usual = [name for name, info in self.tasks.items() if not info.candidate]
        names = usual if tasks is None else list(dict.fromkeys(tasks))
        if not names:
            raise RequestError(f"no task is deployed in {ENSEMBLE!r}")
        for name in names:
            if name not in self.tasks:
                raise UnknownTaskError(f"unknown task {name!r}; deployed are: {', '.join(self.tasks) or 'none'}")
        return tuple(self.tasks[name] for name in names)


def head_models(ensemble: pb.ModelConfig) -> dict[str, str]:
    """Return the models that answer the ensemble's tasks, by task, sorted."""
    answers = {output.name for output in ensemble.output} - {OFFSETS}
    found = {
        task: step.model_name
        for step in ensemble.ensemble_scheduling.step
        for task in step.output_map.values()
        if task in answers
    }
    return dict(sorted(found.items()))


def generation_of(ensemble: pb.ModelConfig) -> str:
    """Return the generation that an ensemble's config tells, as answers carry it."""
    try:
        return str(ensemble_generation(ensemble))
    except ContractError as error:
        raise RequestError(f"the server's {error}") from error


def read_catalogue(ensemble: pb.ModelConfig, heads: Sequence[pb.ModelConfig]) -> Catalogue:
    """Build the catalogue from the ensemble's config and those of its heads, in the order of `head_models`.

    Raises RequestError if a head's config breaks the contract.
    """
    tasks = {}
    for name, head in zip(head_models(ensemble), heads, strict=True):
        try:
            info = HeadInfo.read(head).model_copy(update={"task": name})  # a candidate is a head of the task itself
        except ContractError as error:
            raise RequestError(f"the server's {error}") from error
        if info.kind is not Kind.REGRESSION and not info.labels:
            raise RequestError(f"the server's {head.name} names no labels; export it again")
        tasks[name] = info
    return Catalogue(tasks, ensemble.max_batch_size, generation_of(ensemble))

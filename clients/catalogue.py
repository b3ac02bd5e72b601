"""What is deployed, as the server's own model configs tell it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tritonclient.grpc import model_config_pb2 as pb

from espalier.configs import ensemble_generation, head_infos
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


def answering(ensemble: pb.ModelConfig) -> dict[str, tuple[str, str]]:
    """Return by task, sorted, the model that answers it, and the name that this model's output has there."""
    answers = {output.name for output in ensemble.output} - {OFFSETS}
    found = {
        task: (step.model_name, output)
        for step in ensemble.ensemble_scheduling.step
        for output, task in step.output_map.items()
        if task in answers
    }
    return dict(sorted(found.items()))


def head_models(ensemble: pb.ModelConfig) -> list[str]:
    """Return the models that answer the ensemble's tasks, sorted; one may answer several."""
    return sorted({model for model, _ in answering(ensemble).values()})


def generation_of(ensemble: pb.ModelConfig) -> str:
    """Return the generation that an ensemble's config tells, as answers carry it."""
    try:
        return str(ensemble_generation(ensemble))
    except ContractError as error:
        raise RequestError(f"the server's {error}") from error


def read_catalogue(ensemble: pb.ModelConfig, heads: Mapping[str, pb.ModelConfig]) -> Catalogue:
    """Build the catalogue from the ensemble's config and those of its `head_models`, by name.

    Raises RequestError if a head's config breaks the contract.
    """
    tasks = {}
    for name, (model, output) in answering(ensemble).items():
        try:
            info = head_infos(heads[model])[output]
        except ContractError as error:
            raise RequestError(f"the server's {error}") from error
        except KeyError as error:
            raise RequestError(
                f"the server's {model} does not tell of its output {output!r}; export it again"
            ) from error
        if info.kind is not Kind.REGRESSION and not info.labels:
            raise RequestError(f"the server's {model} names no labels for {name}; export it again")
        tasks[name] = info.model_copy(update={"task": name})  # a candidate is a head of the task itself
    return Catalogue(tasks, ensemble.max_batch_size, generation_of(ensemble))

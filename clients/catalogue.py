"""What is deployed, as the server's own model configs tell it."""

from collections.abc import Sequence
from dataclasses import dataclass

from tritonclient.grpc import model_config_pb2 as pb

from espalier.contract import ENSEMBLE, HeadInfo, Kind, head_name
from espalier.errors import ContractError, RequestError, UnknownTaskError


@dataclass(frozen=True)
class Catalogue:
    """The deployed tasks by name, and the ensemble's largest batch."""

    tasks: dict[str, HeadInfo]
    max_batch_size: int

    def choose(self, tasks: Sequence[str] | None) -> tuple[HeadInfo, ...]:
        """Return the infos of `tasks`, of all if None; raise UnknownTaskError if one is not deployed."""
        names = list(self.tasks) if tasks is None else list(dict.fromkeys(tasks))
        if not names:
            raise RequestError(f"no task is deployed in {ENSEMBLE!r}")
        for name in names:
            if name not in self.tasks:
                raise UnknownTaskError(f"unknown task {name!r}; deployed are: {', '.join(self.tasks) or 'none'}")
        return tuple(self.tasks[name] for name in names)


def task_names(ensemble: pb.ModelConfig) -> list[str]:
    """Return the names of the tasks that the ensemble answers, sorted."""
    steps = {step.model_name for step in ensemble.ensemble_scheduling.step}
    return sorted(output.name for output in ensemble.output if head_name(output.name) in steps)


def read_catalogue(ensemble: pb.ModelConfig, heads: Sequence[pb.ModelConfig]) -> Catalogue:
    """Build the catalogue from the ensemble's config and those of its heads, in the order of `task_names`.

    Raises RequestError if a head's config breaks the contract.
    """
    tasks = {}
    for name, head in zip(task_names(ensemble), heads, strict=True):
        try:
            info = HeadInfo.read(head)
        except ContractError as error:
            raise RequestError(f"the server's {error}") from error
        if info.kind is not Kind.REGRESSION and not info.labels:
            raise RequestError(f"the server's {head.name} names no labels; export it again")
        tasks[name] = info
    return Catalogue(tasks, ensemble.max_batch_size)

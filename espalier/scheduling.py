"""How the trunk runs on the cores of a machine: threads, instances, batches. The segments' configs tell it.

Every step takes cores while it computes, a head one and a segment as many as it has threads, from a count that the
server keeps (Triton's rate limiter, see its `rate_limiter.md`): steps that compute at once do not push each other off
the cores. A Triton that was started without `--rate-limit` ignores it.
"""

import os
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from tritonclient.grpc import model_config_pb2 as pb

from espalier.errors import ContractError, first_problem

THREADS = "intra_op_thread_count"
"""Parameter of the onnxruntime backend: threads of an instance's own pool."""
CORES = "cores"
"""Name of the resource that the rate limiter counts."""

PRIORITY_OF_HEADS = 100_000
"""See `segment_priority`."""
PRIORITY_OF_FIRST_LAYER = 1_000_000_000
PRIORITY_BY_LAYER = 1.4


class Scheduling(BaseModel):
    """The settings of every trunk segment on a CPU."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    threads: int = Field(ge=1)
    """Of one instance."""
    instances: int = Field(ge=1)
    """Batches that a segment computes at once; each has the weights in memory."""
    batch: int = Field(ge=0)
    """Items at which a batch is sent off even if more wait, so that no instance idles; 0: as many as there are."""
    delay: int = Field(ge=0)
    """Microseconds that a batch waits for more items."""

    def __str__(self) -> str:
        """Return the settings as a phrase."""
        batches = f"batches of {self.batch}" if self.batch else "batches of all that waits"
        wait = f", up to {self.delay / 1000:g} ms late" if self.delay else ""
        return f"{self.instances} × {self.threads} threads, {batches}{wait}"

    @classmethod
    def default(cls, cores: int, threads: int | None = None) -> Self:
        """Return what is good on `cores` cores, with so many `threads`, before `espalier tune` has looked."""
        threads = threads or max(1, cores // 2)
        return cls(threads=threads, instances=max(1, min(2, cores // threads)), batch=16, delay=0)

    def write_to(self, config: pb.ModelConfig) -> None:
        """Set them in the config of a model."""
        config.parameters[THREADS].string_value = str(self.threads)
        config.instance_group[0].count = self.instances
        take_cores(config, self.threads)
        batching = config.dynamic_batching
        del batching.preferred_batch_size[:]
        if self.batch:
            batching.preferred_batch_size.append(self.batch)
        batching.max_queue_delay_microseconds = self.delay

    @classmethod
    def read(cls, config: pb.ModelConfig) -> Self:
        """Return those of a config; raise ContractError if it has none."""
        threads = config.parameters[THREADS].string_value if THREADS in config.parameters else None
        preferred = config.dynamic_batching.preferred_batch_size
        found: dict[str, Any] = {
            "threads": threads,
            "instances": config.instance_group[0].count if config.instance_group else None,
            "batch": preferred[0] if preferred else 0,
            "delay": config.dynamic_batching.max_queue_delay_microseconds,
        }
        try:
            return cls.model_validate(found)
        except ValidationError as error:
            raise ContractError(
                f"{config.name}/config.pbtxt does not tell how it is scheduled ({': '.join(first_problem(error))}); "
                "set it there, or remove the folder and export again"
            ) from error


def segment_priority(start: int) -> int:
    """Return the rate limiter's `priority` of a trunk segment from layer `start` on; a small one goes first.

    What is nearest to its answer goes first, heads before all segments, or new texts would push begun ones back.
    Waiting instances stand in the order of their executions so far × priority, and what stands above runs no more often
    than what is below it. The rate limiter looks at the first alone: where its cores are not free, those behind it
    wait, too. So the tokenizer, which takes none and has priority 1, goes before all: the others wait for its texts.
    """
    return max(round(PRIORITY_OF_FIRST_LAYER / PRIORITY_BY_LAYER**start), PRIORITY_OF_HEADS)


def take_cores(config: pb.ModelConfig, count: int) -> None:
    """Let an instance of the model take `count` of the machine's cores while it computes."""
    limiter = config.instance_group[0].rate_limiter
    del limiter.resources[:]
    resource = limiter.resources.add(name=CORES, count=count)
    setattr(resource, "global", True)  # of the machine, not of a device; the name is a keyword of Python


def available_cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0))

"""A Triton for a repository that does not change."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from serving.triton import TritonServer, free_ports


@contextmanager
def serving(repository: Path, log_file: Path) -> Iterator[TritonServer]:
    """Start a Triton on free ports, yield it when all models are ready, stop it."""
    http, grpc, metrics = free_ports(3)
    with TritonServer(repository, log_file=log_file, http_port=http, grpc_port=grpc, metrics_port=metrics) as server:
        yield server

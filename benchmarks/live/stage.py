"""The server on which live tasks are measured: Triton on the live store of a repository, not wired yet."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from serving.live import Live, live_folder
from serving.triton import TritonServer, free_ports


@contextmanager
def stage(repository: Path, log_file: Path) -> Iterator[tuple[Live, TritonServer]]:
    """Start a Triton for `repository` on free ports; yield the live store and the server."""
    live = Live(live_folder(repository))
    live.prepare()
    http, grpc, metrics = free_ports(3)
    with TritonServer(
        live.models, log_file=log_file, http_port=http, grpc_port=grpc, metrics_port=metrics, ready_model=None,
        model_control="explicit",
    ) as server:  # fmt: skip
        yield live, server

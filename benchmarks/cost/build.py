"""Everything that is compared, built once and kept: what is up to date is not built again."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from benchmarks.cost import baseline, padded, padded_tokenizer, ways
from benchmarks.cost.checkpoint import Size, checkpoint
from benchmarks.untrained import LABELS
from espalier.contract import Target
from espalier.encoder import load_base, resolve
from espalier.files import digest, write_whole
from espalier.scheduling import available_cores
from export import graph, layers, merge, models, ragged

MADE_BY = (ways, padded, padded_tokenizer, graph, layers, merge, models, ragged)
"""The code that makes the repositories that are compared with ours."""


@dataclass(frozen=True)
class Built:
    """What is compared, on disk."""

    base: str  # what load_base takes
    tokenizer: str
    branches: list[Path]
    repositories: dict[str, Path]  # by way
    level: str  # of optimum

    @property
    def digest(self) -> str:
        """Tell these models from others."""
        return _models(*self.repositories.values())


def build(size: Size, home: Path, report: Callable[[str], None]) -> Built:
    """Make, or find, everything under `home`; `report` hears of what is at hand."""
    folder = home / size.name
    branches = folder / "branches"
    report("the checkpoint")
    name = checkpoint(size, home)
    base = load_base(name)
    for way, target in (("apart", Target.CPU), ("apart_int8", Target.INT8)):
        report(way)
        ways.ours(base, size, target, branches, folder / way)  # what is up to date stays

    report("today's way, with optimum")
    single = baseline.single_task(resolve(name), len(LABELS), folder / "single")
    levels = {level: baseline.optimized(single, level) for level in baseline.LEVELS}
    # The levels take turns in one process, once: which is fastest does not change from run to run but by chance.
    chosen = folder / "single" / "fastest"
    if not chosen.is_file():
        write_whole(chosen, baseline.fastest(levels, available_cores()))
    level = chosen.read_text()

    whole, both = [size.trunk], [size.shallow, size.trunk]
    others: dict[str, Callable[[Path], None]] = {
        "today": lambda to: ways.full_models(levels[level], base.tokenizer, to),
        "paper": lambda to: ways.whole_layers(base, whole, branches, False, to),
        "folding": lambda to: ways.whole_layers(base, whole, branches, True, to),
        "segments": lambda to: ways.whole_layers(base, both, branches, False, to),
        "ragged": lambda to: ways.ragged_alone(base, size, folder / "branches_one_tap", to),
    }
    repositories = {"apart": folder / "apart"}
    code = digest(*(Path(str(module.__file__)).read_bytes() for module in MADE_BY), level)
    for way, make in others.items():
        report(way)
        repositories[way] = folder / way
        _keep(repositories[way], code, make)
    for way, apart in (("ours", "apart"), ("two", "apart"), ("ours_int8", "apart_int8")):
        report(f"{way}: merging")
        repositories[way], parts = folder / way, folder / apart
        _keep(repositories[way], digest(code, _models(parts)), partial(ways.merged, parts, ways.tasks_of(way)))
    return Built(name, base.tokenizer, [branches / task for task in ways.TASKS], repositories, level)


def _models(*repositories: Path) -> str:
    """Tell the ONNX files of repositories from others."""
    files = [path for repository in repositories for path in sorted(repository.glob("*/*/*.onnx"))]
    return digest(*(f"{path} {path.stat().st_size} {path.stat().st_mtime_ns}" for path in files))


def _keep(to: Path, code: str, make: Callable[[Path], None]) -> None:
    """Make the repository `to` unless it was made by the same code."""
    mark = to.with_name(f"{to.name}.made")
    if mark.is_file() and mark.read_text() == code:
        return
    mark.unlink(missing_ok=True)
    shutil.rmtree(to, ignore_errors=True)
    make(to)
    write_whole(mark, code)

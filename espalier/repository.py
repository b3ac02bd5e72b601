"""The model folders of a repository: which are deployed, and whether a head fits the deployed trunk."""

from collections.abc import Sequence
from pathlib import Path

from tritonclient.grpc import model_config_pb2 as pb

from espalier.configs import ensemble_generation, head_config, read_config
from espalier.contract import (
    CANDIDATE,
    CONFIG_FILE,
    ENSEMBLE,
    OFFSETS,
    SEGMENT_NAME,
    SLOT_NAME,
    HeadInfo,
    Kind,
    Structure,
    TrunkInfo,
    head_name,
)
from espalier.errors import ContractError, FingerprintError
from espalier.scheduling import THREADS, Scheduling, available_cores


class Repository:
    """The model folders of one repository, as their configs describe them.

    What is deployed is what the ensemble wires: an export or a copy that was stopped half-way may have left others.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def _wired(self) -> list[str]:
        if not (self.path / ENSEMBLE / CONFIG_FILE).exists():
            return []
        return [step.model_name for step in read_config(self.path / ENSEMBLE).ensemble_scheduling.step]

    def generation(self) -> int:
        """Return the version of the ensemble; 0 if there is none."""
        if not (self.path / ENSEMBLE / CONFIG_FILE).exists():
            return 0
        return ensemble_generation(read_config(self.path / ENSEMBLE))

    def trunk(self) -> list[TrunkInfo]:
        """Return the deployed segments from the bottom up; raise ContractError if they are no chain."""
        names = [name for name in self._wired() if SEGMENT_NAME.fullmatch(name)]
        segments = [TrunkInfo.read(read_config(self.path / name)) for name in names]
        segments.sort(key=lambda segment: segment.start)
        reached = 0
        for segment in segments:
            if segment.start != reached:
                raise ContractError(
                    f"{self.path}: the trunk is no chain: a segment from layer {reached} is missing "
                    f"(next is {segment.model}); export the repository again"
                )
            reached = segment.stop
        return segments

    def scheduling(self) -> Scheduling | None:
        """Return how the trunk runs on a CPU, deployed or not; None if it tells no threads, as one on a GPU.

        Of segments that differ it is that with most threads.
        """
        configs = [read_config(folder) for folder in self.segment_folders()]
        told = [Scheduling.read(config) for config in configs if THREADS in config.parameters]
        return max(told, key=lambda scheduling: scheduling.threads, default=None)

    def heads(self) -> list[HeadInfo]:
        """Return the deployed heads by task name."""
        names = sorted(name for name in self._wired() if name.startswith(head_name("")))
        return [HeadInfo.read(read_config(self.path / name)) for name in names]

    def segment_folders(self) -> list[Path]:
        """Return the folders of all segments, deployed or not."""
        return sorted(path for path in self.path.glob("trunk_*") if path.is_dir() and SEGMENT_NAME.fullmatch(path.name))

    def head_folders(self) -> list[Path]:
        """Return the folders of all heads, deployed or not."""
        return sorted(path for path in self.path.glob(f"{head_name('*')}") if path.is_dir())


def find_scheduling(path: Path) -> Scheduling | None:
    """Return how the trunk of the repository at `path` runs, None if it does not tell; who loads it says why."""
    try:
        return Repository(path).scheduling()
    except ContractError:
        return None


def cores_counted(scheduling: Scheduling | None) -> int:
    """Return how many cores a server of such a trunk may hand out: this machine's, or what a segment takes.

    A segment that was exported where there are more cores runs, if not well; Triton would refuse it.
    """
    return max(available_cores(), scheduling.threads if scheduling else 1)


def adopted(config: pb.ModelConfig, folder: str) -> pb.ModelConfig:
    """Return a head's config as the head of the task that its folder is named after.

    A head of `mrpc` may be served as `mrpc__candidate` as it is, and the other way round.
    """
    slot = folder.removeprefix(head_name(""))
    own = config.parameters["task"].string_value if "task" in config.parameters else ""
    if own.partition(CANDIDATE)[0] != slot.partition(CANDIDATE)[0]:
        raise ContractError(f"{folder}: the folder says it holds task {own!r}, so it must be named {head_name(own)}")
    renamed = pb.ModelConfig()
    renamed.CopyFrom(config)
    renamed.name = folder
    renamed.parameters["task"].string_value = slot
    return renamed


def check_head(config: pb.ModelConfig, trunk: Sequence[TrunkInfo]) -> HeadInfo:
    """Check a head's config against the deployed `trunk` and return what it says of itself.

    Raises FingerprintError if it was trained on another trunk, ContractError if anything else does not fit.
    """
    info = HeadInfo.read(config)
    name = config.name
    if name != info.model:
        raise ContractError(f"{name}: the folder says it holds task {info.task!r}, so it must be named {info.model}")
    if not SLOT_NAME.fullmatch(info.task) or info.task == OFFSETS:
        raise ContractError(f"{name}: {info.task!r} is not a task name: lower case, digits and single underscores")
    segment = next((segment for segment in trunk if segment.stop == info.tap), None)
    if segment is None:
        taps = ", ".join(str(segment.stop) for segment in trunk) or "none"
        raise ContractError(
            f"{name} taps the trunk at layer {info.tap}, where no deployed segment ends (taps: {taps}); "
            "`espalier export` with its branch adds one"
        )
    if info.hidden_size != segment.hidden_size:
        raise ContractError(
            f"{name} reads hidden states of size {info.hidden_size}, but {segment.model} gives {segment.hidden_size}"
        )
    if info.fingerprint != segment.fingerprint:
        raise FingerprintError(
            f"{name} was trained on another trunk: its fingerprint at layer {info.tap} is {info.fingerprint[:12]}, "
            f"the deployed trunk's is {segment.fingerprint[:12]}; train it on {segment.base!r} or deploy its trunk"
        )
    if (info.kind is Kind.REGRESSION) == bool(info.labels):
        raise ContractError(f"{name}: a {info.kind} head has {len(info.labels)} labels")
    if info.structure is Structure.CRF and info.kind is not Kind.TAGGING:
        raise ContractError(f"{name}: a {info.kind} head has no CRF")
    if info.target is not segment.target:
        raise ContractError(
            f"{name} was exported for {info.target}, but the deployed trunk for {segment.target}; export the head with "
            f"--target {segment.target}"
        )
    expected = head_config(info)
    for mode in ("input", "output"):
        want = {t.name: (t.data_type, list(t.dims)) for t in getattr(expected, mode)}
        have = {t.name: (t.data_type, list(t.dims)) for t in getattr(config, mode)}
        if want != have:
            raise ContractError(f"{name}: its {mode}s are {_show(have)}, but this contract needs {_show(want)}")
    return info


def _show(tensors: dict[str, tuple[int, list[int]]]) -> str:
    return ", ".join(
        f"{name} {pb.DataType.Name(data_type).removeprefix('TYPE_')}{dims}"
        for name, (data_type, dims) in sorted(tensors.items())
    )

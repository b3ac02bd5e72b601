"""Is a repository fit to be served? Found out before the server starts, while a sentence can still say why not."""

from pathlib import Path

from espalier.configs import read_config
from espalier.contract import CONFIG_FILE, ENSEMBLE, MODEL_FILE, TOKENIZER, TOKENIZER_FILE, HeadInfo, Kind
from espalier.errors import ContractError
from espalier.repository import Repository, check_head
from serving.check import check_labels, check_onnx


def check_repository(path: Path) -> list[HeadInfo]:
    """Check every model folder of the repository at `path` and return its heads.

    Raises ContractError with one sentence about the first folder that is wrong.
    """
    if not (path / ENSEMBLE / CONFIG_FILE).is_file():
        raise ContractError(
            f"{path} holds no exported ensemble ({ENSEMBLE}/{CONFIG_FILE}); run `espalier export` first"
        )
    repository = Repository(path)
    trunk = repository.trunk()
    for segment in trunk:
        _check_versions(path / segment.model)
    if not list((path / TOKENIZER).glob(f"*/{TOKENIZER_FILE}")):
        raise ContractError(f"{path / TOKENIZER} has no {TOKENIZER_FILE}; export the repository again")
    heads = []
    for head in repository.heads():
        folder = path / head.model
        heads.append(check_head(read_config(folder), trunk))
        _check_versions(folder)
        if head.kind is Kind.CLASSIFICATION:
            check_labels(folder, head)
    if not heads:
        raise ContractError(f"{path} wires no task; run `espalier export` with a branch")
    return heads


def _check_versions(folder: Path) -> None:
    models = sorted(folder.glob(f"[0-9]*/{MODEL_FILE}"))
    if not models:
        raise ContractError(f"{folder} has no <version>/{MODEL_FILE}; export it again")
    for model in models:
        check_onnx(model, read_config(folder))

"""Is a repository fit to be served? Found out before the server starts, while a sentence can still say why not."""

from pathlib import Path

import onnx

from espalier.configs import read_config
from espalier.contract import CONFIG_FILE, ENSEMBLE, LABELS_FILE, MODEL_FILE, TOKENIZER, TOKENIZER_FILE, HeadInfo, Kind
from espalier.errors import ContractError
from espalier.repository import Repository, check_head


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
        _check_onnx(path / segment.model)
    if not list((path / TOKENIZER).glob(f"*/{TOKENIZER_FILE}")):
        raise ContractError(f"{path / TOKENIZER} has no {TOKENIZER_FILE}; export the repository again")
    heads = []
    for head in repository.heads():
        folder = path / head.model
        heads.append(check_head(read_config(folder), trunk))
        _check_onnx(folder)
        if head.kind is Kind.CLASSIFICATION:
            _check_labels(folder, head)
    if not heads:
        raise ContractError(f"{path} wires no task; run `espalier export` with a branch")
    return heads


def _check_onnx(folder: Path) -> None:
    models = sorted(folder.glob(f"[0-9]*/{MODEL_FILE}"))
    if not models:
        raise ContractError(f"{folder} has no <version>/{MODEL_FILE}; export it again")
    for model in models:
        try:
            onnx.checker.check_model(model)
        except Exception as error:  # protobuf and the checker raise several types
            reason = (str(error).strip().splitlines() or ["unreadable"])[0]
            raise ContractError(f"{model} is not a whole ONNX file ({reason}); copy or export it again") from error


def _check_labels(folder: Path, head: HeadInfo) -> None:
    file = folder / LABELS_FILE
    try:
        labels = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ContractError(f"{file} cannot be read: {error}; export the head again") from error
    if tuple(labels) != head.labels:
        raise ContractError(
            f"{file} lists {len(labels)} labels that are not the {len(head.labels)} of {CONFIG_FILE}; "
            "export the head again"
        )

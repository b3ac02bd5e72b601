"""The container deployment: nothing here can run it, so its files are checked against the repository."""

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from espalier import cli
from espalier.contract import ENSEMBLE, TEXT

ROOT = Path(__file__).parents[1]
COMPOSE = ROOT / "docker-compose.yml"
SERVER_IMAGE = "nvcr.io/nvidia/tritonserver:26.07-py3"


@pytest.fixture(scope="module")
def services() -> dict[str, Any]:
    content: dict[str, dict[str, Any]] = yaml.safe_load(COMPOSE.read_text())
    return content["services"]


def test_every_path_exists(services: dict[str, Any]) -> None:
    builds = [service["build"] for service in services.values() if "build" in service]
    paths = [build if isinstance(build, str) else build["dockerfile"] for build in builds]
    paths += [volume.split(":")[0] for service in services.values() for volume in service["volumes"]]
    paths.remove("live")
    paths.remove("live")
    assert [path for path in paths if not (ROOT / path).exists()] == []
    assert (ROOT / services["triton"]["build"] / "Dockerfile").is_file()


def test_server_image_is_pinned_and_has_the_tokenizer(services: dict[str, Any]) -> None:
    instructions = [
        line
        for line in (ROOT / services["triton"]["build"] / "Dockerfile").read_text().splitlines()
        if line and not line.startswith("#")
    ]
    assert instructions[0] == f"FROM {SERVER_IMAGE}"
    assert "tokenizers==0.22.2" in instructions[1]


def test_perf_uses_the_sdk_image_of_the_same_release(services: dict[str, Any]) -> None:
    assert services["perf"]["image"] == f"{SERVER_IMAGE}-sdk"
    assert services["perf"]["profiles"] == ["perf"]
    assert "profiles" not in services["triton"]


def test_ports_are_open_to_this_machine_alone(services: dict[str, Any]) -> None:
    assert services["triton"]["ports"] == [f"127.0.0.1:{port}:{port}" for port in (8000, 8001, 8002)]
    assert services["wiring"]["ports"] == ["127.0.0.1:8003:8003"]
    assert "ports" not in services["perf"]
    assert not any("network_mode" in service for service in services.values())


def test_only_the_wiring_writes_and_only_into_the_live_store(services: dict[str, Any]) -> None:
    volumes = [volume for service in services.values() for volume in service["volumes"]]
    assert [volume for volume in volumes if not volume.endswith(":ro")] == ["live:/live"]
    assert services["wiring"]["volumes"] == ["./model_repository:/models:ro", "live:/live"]
    assert services["triton"]["volumes"] == ["live:/live:ro"]


def test_triton_reads_what_the_wiring_writes(services: dict[str, Any]) -> None:
    options = services["triton"]["command"]
    assert "--model-repository=/live/models" in options
    assert "--model-control-mode=explicit" in options
    command = services["wiring"]["command"]
    assert command[:2] == ["espalier", "wire"]
    context, params = CliRunner().invoke(cli.app, [*command[1:], "--help"]), command[2:]
    assert context.exit_code == 0
    assert "--url=triton:8001" in params
    assert "--live=/live" in params


def test_server_has_a_gpu_memory_pools_and_a_health_check(services: dict[str, Any]) -> None:
    triton = services["triton"]
    assert any(option.startswith("--pinned-memory-pool-byte-size=") for option in triton["command"])
    assert any(option.startswith("--cuda-memory-pool-byte-size=0:") for option in triton["command"])
    assert triton["deploy"]["resources"]["reservations"]["devices"][0]["capabilities"] == ["gpu"]
    assert f"/v2/models/{ENSEMBLE}/ready" in triton["healthcheck"]["test"][-1]
    assert triton["restart"] == "unless-stopped"
    assert triton["shm_size"]


def test_perf_asks_the_ensemble_for_single_texts(services: dict[str, Any]) -> None:
    command = services["perf"]["command"]
    assert command[command.index("-m") + 1] == ENSEMBLE
    assert command[command.index("-u") + 1] == "triton:8001"
    assert f"--shape={TEXT}:1" in command
    mounted = dict(volume.split(":")[:2] for volume in services["perf"]["volumes"])
    source = next(path for path, target in mounted.items() if f"--input-data={target}" in command)
    rows = json.loads((ROOT / source).read_text())["data"]
    lengths = [len(row[TEXT]["content"][0].split()) for row in rows]
    assert all(row.keys() == {TEXT} and row[TEXT]["shape"] == [1] == [len(row[TEXT]["content"])] for row in rows)
    assert min(lengths) < 5 < 40 < max(lengths)  # ragged batching is what is to be measured


@pytest.mark.skipif(shutil.which("docker-compose") is None, reason="docker-compose is not installed")
@pytest.mark.parametrize("profile", [[], ["--profile", "perf"]], ids=["serve", "perf"])
def test_docker_compose_accepts_it(profile: list[str]) -> None:
    done = subprocess.run(
        ["docker-compose", "-f", str(COMPOSE), *profile, "config"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    # Version 1 of the command prints the services of every profile; version 2 those that are asked for.
    assert ({"triton", "perf"} if profile else {"triton"}) <= yaml.safe_load(done.stdout)["services"].keys()

"""The command line: help with examples, tables, JSON for pipes, and one sentence for whatever goes wrong."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from test_training import write_task
from typer.testing import CliRunner

from espalier import cli
from espalier.contract import Kind
from serving.triton import TritonServer, free_ports

COMMANDS = (
    "train", "distill", "search", "select", "card", "export", "serve", "wire", "history", "rollback", "promote", "ask",
    "tasks", "evaluate", "tune", "bench",
)  # fmt: skip


def one_sentence(result: tuple[int, str, str]) -> str:
    """Return the error of a failed run, which printed nothing else."""
    status, out, messages = result
    assert status == 1
    assert out == ""
    assert messages.count("Error: ") == 1
    assert "Traceback" not in messages
    return messages[messages.index("Error: ") :].strip()


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_an_example(command: str) -> None:
    result = CliRunner().invoke(cli.app, [command, "--help"])
    assert result.exit_code == 0
    assert f"espalier {command} " in result.output.replace("\n", " ")


def test_the_light_commands_need_no_torch() -> None:
    code = (
        "import sys; from espalier.cli import app; import clients, clients._grpc, clients._http, espalier.show\n"
        "heavy = {'torch', 'transformers', 'onnx', 'onnxruntime', 'datasets', 'pytriton'} & set(sys.modules)\n"
        "sys.exit(f'imported: {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_task_goes_from_spec_to_repository(espalier, tiny_checkpoint: Path, tmp_path: Path) -> None:
    spec = write_task(tmp_path, Kind.CLASSIFICATION)
    quick = ("--epochs", "1", "--lr", "5e-3", "--json")
    status, out, _ = espalier(
        "train", spec, "--base", tiny_checkpoint, "--tap", "1", "--out", tmp_path / "teacher", *quick
    )
    assert status == 0
    trained = json.loads(out)
    assert (trained["task"], trained["tap"], trained["layers"], trained["trained"]) == ("colour", 1, 2, True)

    student = ("distill", tmp_path / "teacher", "--layers", "1", "--out", tmp_path / "student", *quick)
    assert json.loads(espalier(*student)[1])["layers"] == 1
    assert json.loads(espalier(*student)[1])["trained"] is False

    repository = tmp_path / "repository"
    status, out, _ = espalier("export", tmp_path / "student", "--repository", repository, "--json")
    assert status == 0
    assert {item["model"] for item in json.loads(out)} == {"tokenizer", "trunk_0_1", "head_colour", "multitask"}

    status, out, _ = espalier("tasks", "--repository", repository)
    assert status == 0
    assert re.search(r"colour +exported +classification +one +1 +1 +accuracy 0\.\d+", out)


@pytest.mark.server
@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_ask_and_tasks_talk_to_a_server(espalier, server: TritonServer, protocol: str) -> None:
    where = ("--url", server.grpc_url) if protocol == "grpc" else ("--url", server.http_url, "--http")
    status, out, _ = espalier("ask", "wake me at 7:30", "--task", "intent", "--task", "slots", *where, "--json")
    assert status == 0
    answers = json.loads(out)["answers"]
    assert set(answers) == {"intent", "slots"}
    assert answers["intent"]["label"] in answers["intent"]["probabilities"]
    status, out, _ = espalier("ask", "wake me", "--pair", "get me up", "--task", "same_request", *where)
    assert status == 0
    assert "wake me ⇄ get me up" in out
    assert {task["task"] for task in json.loads(espalier("tasks", *where, "--json")[1])} == {
        "intent", "same_request", "slots", "slots_crf", "urgency",
    }  # fmt: skip


@pytest.mark.server
def test_evaluate_shows_served_beside_offline(espalier, server: TritonServer, specs: Path) -> None:
    status, out, _ = espalier("evaluate", specs / "intent.yaml", "--url", server.grpc_url, "--json")
    assert status == 0
    told = json.loads(out)
    assert (told["metric"], told["split"], told["offline"]) == ("accuracy", "dev", 0.5)


@pytest.mark.server
def test_evaluate_scores_a_test_split_if_there_is_one(
    espalier, server: TritonServer, specs: Path, tmp_path: Path
) -> None:
    where = ("--split", "test", "--data", specs, "--url", server.grpc_url)
    assert "the spec names no test split" in one_sentence(espalier("evaluate", specs / "slots_crf.yaml", *where))
    rows = [{"tokens": ["wake", "me"], "tags": ["O", "B-new"]}, {"tokens": ["now"], "tags": ["O"]}]
    (tmp_path / "test.jsonl").write_text("\n".join(map(json.dumps, rows)))
    spec = tmp_path / "slots_crf.yaml"
    spec.write_text((specs / "slots_crf.yaml").read_text() + f"  test: {tmp_path / 'test.jsonl'}\n")
    status, out, _ = espalier("evaluate", spec, *where, "--json")
    assert status == 0
    told = json.loads(out)
    assert (told["split"], told["served"]["slot_recall"], "offline" in told) == ("test", 0.0, False)
    status, out, _ = espalier("evaluate", spec, *where)
    assert status == 0
    assert "test" in out
    assert "offline" not in out


@pytest.mark.server
def test_ask_shows_the_probability_of_a_path(espalier, server: TritonServer) -> None:
    status, out, _ = espalier("ask", "wake me at 7:30", "--task", "slots_crf", "--url", server.grpc_url)
    assert status == 0
    assert re.search(r"path [01]\.\d\d", out)
    assert "None" not in out
    assert "tagging (crf)" in espalier("tasks", "--url", server.grpc_url)[1]


@pytest.mark.server
def test_unknown_task_and_missing_server_are_one_sentence(espalier, server: TritonServer) -> None:
    error = one_sentence(espalier("ask", "hello", "--task", "mood", "--url", server.grpc_url))
    assert "unknown task 'mood'" in error
    assert "intent, same_request, slots, slots_crf, urgency" in error
    (port,) = free_ports(1)
    error = one_sentence(espalier("ask", "hello", "--url", f"127.0.0.1:{port}", "--timeout", "3"))
    assert str(port) in error


@pytest.mark.server
@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "Ctrl-C"])
def test_serve_says_where_it_is_and_stops(stop: signal.Signals, repository: Path, tmp_path: Path) -> None:
    http, grpc, metrics, wiring = map(str, free_ports(4))
    process = subprocess.Popen(
        [
            Path(sys.executable).parent / "espalier", "serve", "--repository", repository, "--http-port", http,
            "--grpc-port", grpc, "--metrics-port", metrics, "--wiring-port", wiring, "--log-file", tmp_path / "log",
            "--live", tmp_path / "live",
        ],
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        lines = []
        for line in process.stdout:
            lines.append(line)
            if f"127.0.0.1:{grpc}" in line:
                break
        assert any("same_request" in line for line in lines)
        process.send_signal(stop)
        assert process.wait(60) == 128 + stop
    finally:
        process.kill()
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", int(grpc))) != 0


# --- bad input --------------------------------------------------------------------------------------------------


def spec_with(folder: Path, **changes: str) -> Path:
    path = write_task(folder, Kind.CLASSIFICATION)
    text = path.read_text()
    for key, value in changes.items():
        text = re.sub(rf"^{key}:.*$", f"{key}: {value}", text, flags=re.MULTILINE)
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"label": "color"}, r"train.jsonl, line 1: there is no column 'color'"),
        ({"label": "colour\nlabels: [red, red]"}, r"task.yaml: labels: label 'red' is listed twice"),
        ({"kind": "ranking"}, r"task.yaml: kind: .*'classification', 'regression' or 'tagging'"),
    ],
    ids=["missing column", "duplicate label", "unknown kind"],
)
def test_a_wrong_spec(changes: dict[str, str], message: str, espalier, tiny_checkpoint: Path, tmp_path: Path) -> None:
    spec = spec_with(tmp_path, **changes)
    error = one_sentence(espalier("train", spec, "--base", tiny_checkpoint, "--tap", "1", "--out", tmp_path / "out"))
    assert re.search(message, error)


def test_a_bad_row_is_named_by_file_and_line(espalier, tiny_checkpoint: Path, tmp_path: Path) -> None:
    spec = write_task(tmp_path, Kind.CLASSIFICATION)
    rows = (tmp_path / "train.jsonl").read_text().splitlines()
    rows[16] = '{"text": "red box", "colour": '
    (tmp_path / "train.jsonl").write_text("\n".join(rows))
    error = one_sentence(espalier("train", spec, "--base", tiny_checkpoint, "--tap", "1", "--out", tmp_path / "out"))
    assert re.search(r"train\.jsonl, line 17: not JSON", error)
    assert not (tmp_path / "out").exists()


def test_a_base_that_is_not_there(espalier, tmp_path: Path) -> None:
    spec = write_task(tmp_path, Kind.CLASSIFICATION)
    error = one_sentence(espalier("train", spec, "--base", tmp_path / "none", "--tap", "1"))
    assert "none" in error


@pytest.mark.server
def test_a_repository_of_which_nothing_can_be_served_is_one_sentence(repository: Path, tmp_path: Path) -> None:
    copy = tmp_path / "repository"
    shutil.copytree(repository, copy)
    os.truncate(copy / "trunk_0_3" / "1" / "model.onnx", 10_000)
    http, grpc, metrics, wiring = map(str, free_ports(4))
    done = subprocess.run(
        [
            Path(sys.executable).parent / "espalier", "serve", "--repository", copy, "--http-port", http,
            "--grpc-port", grpc, "--metrics-port", metrics, "--wiring-port", wiring, "--log-file", tmp_path / "log",
        ],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 1
    assert "trunk_0_3/1/model.onnx is not a whole ONNX file" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_a_taken_port_is_named(espalier, repository: Path, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        error = one_sentence(
            espalier("serve", "--repository", repository, "--grpc-port", str(port), "--log-file", tmp_path / "log")
        )
    assert str(port) in error
    assert "--grpc-port" in error


@pytest.mark.parametrize("command", [("tasks", "--repository"), ("serve", "--repository"), ("export",), ("evaluate",)])
def test_a_path_that_is_not_there(command: tuple[str, ...], espalier, tmp_path: Path) -> None:
    assert "nowhere" in one_sentence(espalier(*command, tmp_path / "nowhere"))


def test_every_command_in_the_readme_exists() -> None:
    pages = ("README.md", "docs/snips.md", "docs/training.md", "docs/live.md")
    readme = "".join((ROOT / page).read_text(encoding="utf-8") for page in pages)
    used = set(re.findall(r"^espalier (\w+)", readme, flags=re.MULTILINE))
    assert used == set(COMMANDS)
    for line in re.findall(r"^espalier .*$", readme, flags=re.MULTILINE):
        help_text = CliRunner().invoke(cli.app, [line.split()[1], "--help"], env={"COLUMNS": "200"}).output
        for option in re.findall(r" (--[a-z-]+)", line):
            assert option in help_text, line


def test_every_make_verb_in_the_readme_exists() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for verb in re.findall(r"(?m)(?:^    |`)make ([a-z-]+)", (ROOT / "README.md").read_text(encoding="utf-8")):
        assert re.search(rf"^{verb}:", makefile, flags=re.MULTILINE), verb

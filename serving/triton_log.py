"""Triton's log: why a start failed, in Triton's own words."""

import re
from pathlib import Path

# An error line is `E<time> <thread> <source>:<line>] "<message>"`, with line breaks in the message as \n.
_LINE = re.compile(r'^E\d.*?\] "(?P<message>.*)"$')
_FAILURES = (
    re.compile(r"failed to load '(?P<model>[^']+)' version \d+: (?P<reason>.*)"),
    re.compile(r"failed to load model '(?P<model>[^']+)': (?P<reason>.*)"),
    re.compile(r"Poll failed for model directory '(?P<model>[^']+)': (?P<reason>.*)"),
    re.compile(r"Invalid argument: (?P<reason>ensemble '?(?P<model>\w+).*)"),
)
_STATUS = re.compile(r"^(Internal|Invalid argument|Unavailable|Not found): ")
_PROTOBUF = re.compile(r"Error parsing text-format [\w.]+: (.*)")


def failure(log: Path) -> str | None:
    """Return why the start failed, one clause for each model that did not load; None if the log does not say."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    models: dict[str, str] = {}
    syntax = ""  # what protobuf said of the config that Triton names in its next error
    for line in lines:
        if parsed := _PROTOBUF.search(line):
            syntax = f" ({parsed[1].rstrip('.')})"
        elif message := _LINE.match(line):
            for pattern in _FAILURES:
                if found := pattern.match(message["message"]):
                    models.setdefault(found["model"], _clean(found["reason"]) + syntax)
                    syntax = ""
                    break
    if models:
        clauses = "; ".join(f"{model}: {reason}" for model, reason in models.items())
        return f"Triton could not load {clauses}"
    errors = [line for line in lines if line.startswith("error: ")]
    messages = [message["message"] for line in lines if (message := _LINE.match(line))]
    return " – ".join(filter(None, [*errors[-1:], *map(_clean, messages[-1:])])) or None if errors else None


def _clean(reason: str) -> str:
    """Return the first sentence of a reason: no status, no name of an exception, no traceback."""
    reason = reason.split(r"\n\nAt:")[0].split(". Model '")[0]
    reason = _STATUS.sub("", reason).removeprefix("TritonModelException: ")
    return reason.replace(r"\n", " ").replace(r"\"", '"').strip().rstrip(".;")


def last_lines(log: Path, count: int = 3) -> str:
    """Return the last `count` lines of `log` in one."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    return " | ".join(line.strip() for line in lines[-count:]) or "(empty)"

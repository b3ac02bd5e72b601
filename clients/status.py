"""What the wiring service tells of the folders of the repository, refused ones too."""

import http.client
import urllib.request

from pydantic import ValidationError

from espalier.contract import StatusFile

TIMEOUT = 3.0  # seconds
PORT = 8003
"""Where a wiring service listens unless it is told otherwise."""


def wiring_status(place: str) -> tuple[StatusFile | None, str]:
    """Return what the wiring service at `place` (host:port) tells; or None, and in one sentence why not."""
    try:
        with urllib.request.urlopen(f"http://{place}/tasks", timeout=TIMEOUT) as reply:
            return StatusFile.model_validate_json(reply.read()), ""
    except (OSError, http.client.HTTPException, ValueError) as error:
        reason = getattr(error, "reason", None) or error
        if isinstance(error, ValidationError):
            reason = "it is another service"
        return None, f"no wiring service answers at {place} ({reason})"

"""The embedded Triton with the wiring service beside it: what `espalier serve` runs."""

import logging
import threading
import time
from collections.abc import Callable

from espalier.errors import ServerError, WiringError
from serving.service import Service
from serving.triton import TritonServer
from serving.wiring import Pass

log = logging.getLogger("espalier.wiring")

DEATHS, WITHIN = 3, 300.0
"""So many ends of the server within so many seconds are no accident."""


def serve_live(server: TritonServer, service: Service, ready: Callable[[Pass], None]) -> None:
    """Serve until SIGTERM or Ctrl-C; `ready` is called once, after the first pass that left nothing to be waited for.

    A Triton that dies is started again, and the wiring brings every task back; one that dies three times within five
    minutes ends this, with its own reason. Raises WiringError if at the start there is nothing that can be served.
    """
    failure: list[BaseException] = []
    told = threading.Event()

    def passed(done: Pass) -> None:
        if told.is_set() or done.restless or done.change is not None:
            return  # a change is followed by another pass
        if not done.status.generation:
            raise WiringError(_nothing(done))
        told.set()
        ready(done)

    def wire() -> None:
        try:
            service.run(passed)
        except BaseException as error:
            failure.append(error)
            server.stop()

    service.listen()
    with server:
        wiring = threading.Thread(target=wire, name="espalier-wiring")
        wiring.start()
        deaths: list[float] = []
        try:
            while not failure:
                try:
                    server.wait()
                    break
                except ServerError as error:
                    deaths.append(time.monotonic())
                    if failure or len([death for death in deaths if deaths[-1] - death < WITHIN]) >= DEATHS:
                        raise
                    log.error("%s; starting it again", error)
                    server.stop()
                    server.start()
        finally:
            service.stop()
            wiring.join()
    if failure:
        raise failure[0]


def _nothing(done: Pass) -> str:
    reasons = [entry.why for entry in done.status.folders.values() if entry.state == "refused"]
    return reasons[0] if reasons else "the repository holds no whole trunk; `espalier export` writes one"

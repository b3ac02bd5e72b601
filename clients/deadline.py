"""The time that a request may take in all, retries included."""

import time

from espalier.errors import DeadlineError


class Deadline:
    """`total` seconds from now, for an answer from `url`."""

    def __init__(self, url: str, total: float) -> None:
        self._url, self._total = url, total
        self._expires = time.monotonic() + total

    def remaining(self) -> float:
        """Return the seconds left, more than 0; raise DeadlineError if there are none."""
        left = self._expires - time.monotonic()
        if left <= 0:
            raise self.error()
        return left

    def error(self) -> DeadlineError:
        """Return the exception that says that time is up."""
        return DeadlineError(f"no answer from {self._url} within {self._total:g} s")

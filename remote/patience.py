"""How long a server is waited for: one deadline and one growing pause for all tries together."""

from __future__ import annotations

import math
import time
from typing import Protocol

from remote import link

FIRST_PAUSE_S = 0.2
LONGEST_PAUSE_S = 10.0
LEAST_TRY_S = 10.0
"""What a try that began in time may take at least until something moves."""


class Limited(Protocol):
    """A URL that says how long to wait."""

    @property
    def retry_for(self) -> float:
        """Seconds."""


class Patience:
    """The time that one request has, over all its tries.

    Args:
        url: its ``retry_for`` is how long: from now, or from when it last came on.
    """

    def __init__(self, url: Limited) -> None:
        self._url = url
        self.came_on()

    def came_on(self) -> None:
        """Some of the request is done for good: begin anew."""
        self._started = time.monotonic()
        self._pause_s = FIRST_PAUSE_S

    @property
    def waited_s(self) -> float:
        """For how long it has been waited for."""
        return time.monotonic() - self._started

    @property
    def still_s(self) -> float:
        """How long nothing may move in a try that begins now."""
        # Whole seconds: to set another timeout is a call of the system.
        left_s = math.ceil(self._url.retry_for - self.waited_s)
        return min(link.ANSWER_TIMEOUT_S, max(left_s, LEAST_TRY_S))

    def pause(self) -> float | None:
        """How long to wait for the next try; None: no more of them."""
        pause_s = self._pause_s
        self._pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
        return pause_s if self.waited_s + pause_s <= self._url.retry_for else None

"""How hard a snapshot is compressed: as much as the line is slow."""

from __future__ import annotations

import time
from collections.abc import Callable

from protocol import PACKING_LEVEL

LEVELS = (PACKING_LEVEL, 1, 0)
"""zlib's; it begins with the first, which is right for the slowest lines."""
EVIDENCE = 8 << 20
"""Bytes that a line takes before it counts as quick: tunnels have buffers, too."""
FULL = 1 << 20
"""Bytes in the queue of a line that is the slower one; and what it takes then to be measured."""
BELIEVED_FOR = 16
"""How often EVIDENCE may come before a line that was measured is tried anew."""
LONG_S = 0.5
"""Or the time without that."""


class Effort:
    """Chooses the level at which the next piece goes soonest, by what is measured.

    Args:
        clock: seconds that go on evenly.

    Attributes:
        level: the best one now.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.level = LEVELS[0]
        self._clock = clock
        self._costs: dict[int, tuple[float, float]] = {}
        """Of a level: seconds and bytes on the line for each byte of a piece."""
        self._sent = self._taken = 0
        self._since = clock()
        self._byte_s = 0.0
        """Seconds that the line takes for a byte, 0 as long as it is not the slower one."""
        self._empty = 0

    def tried(self, level: int, size: int, packed: int, took_s: float) -> None:
        """A piece of ``size`` bytes was packed into ``packed`` bytes."""
        new = took_s / size, packed / size
        old = self._costs.get(level, new)
        self._costs[level] = (old[0] + new[0]) / 2, (old[1] + new[1]) / 2

    def sent(self, size: int, queued: int | None) -> None:
        """``size`` bytes were sent.

        Args:
            queued: how many of all that was sent the line has not taken yet; None: unknown.
        """
        self._sent += size
        if queued is None:
            return
        now, taken = self._clock(), self._sent - queued
        is_full, moved = queued > FULL, taken - self._taken
        if moved < (FULL if is_full else EVIDENCE) and not (is_full and now - self._since > LONG_S):
            return
        if is_full:
            self._byte_s, self._empty = (now - self._since) / max(moved, 1), 0
        else:
            self._empty += 1
            if self._empty == BELIEVED_FOR:
                self._byte_s = 0.0  # It may take more by now: that is seen when it does not.
        self._since, self._taken = now, taken
        self.level = min(self._costs, key=self._time)

    def _time(self, level: int) -> float:
        """Seconds that a byte takes: one is packed while the one before is on the line."""
        pack_s, share = self._costs[level]
        return max(pack_s, share * self._byte_s)

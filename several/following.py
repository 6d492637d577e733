"""One of several destinations is followed, and another one when it fails or falls behind."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Generator, Sequence

from backend import log
from errors import BackupError, PlaceGone
from filelog.layout2 import Head
from replica import Pause, Record
from several.hearing import Heard, choose

CHECK_S = 10.0
"""How often it is seen whether the one that is followed falls behind."""


class _Leader(threading.Thread):
    """Hears all of them now and then, beside who follows one.

    Attributes:
        heard: how often one was found that has all there is.
        newest: its newest record.
    """

    def __init__(self, hear: Callable[[], Sequence[Heard]]) -> None:
        super().__init__(daemon=True)
        self.heard = 0
        self.newest: Head | None = None
        self._hear = hear
        self._over = threading.Event()

    def run(self) -> None:
        while not self._over.wait(CHECK_S):
            with contextlib.suppress(BackupError):  # Too few answer: then this one will do.
                look = choose(self._hear())[0].look
                self.newest = look.newest if look is not None else None
                self.heard += 1

    def stop(self) -> None:
        """Hear nobody any more."""
        self._over.set()


class _Pace:
    """Whether what is followed keeps up with the one that has all there is."""

    def __init__(self, leader: _Leader) -> None:
        self._leader = leader
        self._heard = leader.heard
        self._goal: int | None = None

    def is_behind(self, last: Head | None) -> bool:
        """Whether it has not come, in CHECK_S, to where the leader was."""
        if self._leader.heard == self._heard:
            return False
        version, goal = last.version if last else 0, self._goal
        self._heard = self._leader.heard
        newest = self._leader.newest
        self._goal = newest.version if newest else None
        return goal is not None and version < goal


def follow(
    hear: Callable[[], Sequence[Heard]], after: Head | None
) -> Generator[Record | Pause, None, None]:
    """The records behind ``after`` of one that has all there is, and then those that come.

    Args:
        hear: asks all of the destinations.

    Raises:
        Silent: too few of them answer.
        PlaceGone: one that has all there is does not hold that record.
        BackupError: each that answers has failed since the last record came.
    """
    last = after
    failed: dict[str, BackupError] = {}
    leader = _Leader(hear)
    leader.start()
    try:
        while True:
            chosen, leads = _choose(hear(), failed)
            try:
                with chosen.replica.follow(last) as records:
                    pace = _Pace(leader)
                    for each in records:
                        if not isinstance(each, Pause):
                            last = each[0]
                            failed.clear()
                        elif pace.is_behind(last):
                            raise BackupError(f"{chosen.url} has fallen behind.")
                        yield each
            except BackupError as error:
                if leads and isinstance(error, PlaceGone):
                    raise  # Of another one it says only that it lags.
                failed[chosen.url] = error
                log.warning(f"{chosen.url} is not followed any more: {error.problem}")
    finally:
        leader.stop()


def _choose(found: Sequence[Heard], failed: dict[str, BackupError]) -> tuple[Heard, bool]:
    """One that has all there is; if that has failed, the best of the others, and False.

    Raises:
        Silent: too few answer.
        BackupError: all that answer have failed.
    """
    chosen, _ = choose(found)
    if chosen.url not in failed:
        return chosen, True
    others = [heard for heard in found if heard.look is not None and heard.url not in failed]
    if not others:
        raise failed[chosen.url]
    return choose(others, allow_missing=True)[0], False

"""A standby runs: it goes on with what comes, waits where nothing can come, and proves itself."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time
from collections.abc import Callable

from backend import NOTICE, log
from errors import BackupError, DiskError
from replica import Followable, Pause
from standby import state as keeping
from standby.applying import Applier, Foreign, Unfit
from standby.proving import Prover
from standby.state import Proof, State

FIRST_PAUSE_S = 0.5
LONGEST_PAUSE_S = 60.0
FRESH_S = 5.0
"""For how long a place counts as just compared with the backup."""
HOLDS_S = 3.0
"""How long an error must not come again before it is over: damage shows at a second look."""


class Standby:
    """Keeps the database in ``directory`` in step with a backup.

    Args:
        make: the backup, not open.
    """

    def __init__(self, directory: str, state: State, make: Callable[[], Followable]) -> None:
        self._make = make
        self._path = os.path.join(directory, keeping.STANDBY_NAME)
        self._applier = Applier(directory, state)
        self._prover = Prover()
        self._pause_s = FIRST_PAUSE_S
        self._is_in_step = False
        self._began_again = False
        """After a proof that found something, which the next one may find again."""

    def run(self) -> None:
        """Follow until the process ends.

        Raises:
            Foreign: the backup has become another one.
        """
        while True:
            self._try()

    def _try(self) -> None:
        try:
            self._follow()
        except Foreign as error:
            self._note(error)
            raise
        except BackupError as error:
            self._note(error)
            self._applier.go_back(error)
            if self._applier.state.place is None:
                self._prover.stop()
            time.sleep(self._pause_s)
            self._pause_s = min(2 * self._pause_s, LONGEST_PAUSE_S)

    def _note(self, error: BackupError) -> None:
        """Tell the log, once, and ``status``."""
        self._is_in_step = False
        if self._applier.state.error != str(error):
            log.warning(str(error))
            with contextlib.suppress(DiskError):  # Its disk is full, most likely: it goes on.
                self._change(error=str(error))

    def _change(self, *, error: str | None = None, proof: Proof | None = None) -> None:
        """Save the state, with what ``status`` is to tell."""
        state = self._applier.state
        proof = proof or state.proof
        self._applier.state = dataclasses.replace(state, error=error, proof=proof)
        self._applier.save()

    def _follow(self) -> None:
        """Take what comes; returns where it is to begin again from its place."""
        place, began_s = self._applier.begin(), time.monotonic()
        with self._make().follow(place) as records:
            for found in records:
                if not isinstance(found, Pause):
                    self._applier.feed(*found)
                    continue
                self._applier.rest()
                held_s = time.monotonic() - began_s
                if self._applier.state.error is None or held_s > HOLDS_S:
                    self._come_on(found)
                self._take_proof()
                if self._is_due(held_s < FRESH_S):
                    return

    def _come_on(self, pause: Pause) -> None:
        """Everything that is there has been applied."""
        self._pause_s = FIRST_PAUSE_S
        if not self._is_in_step:
            self._is_in_step = True
            log.log(NOTICE, f"in step with {pause.url}, at version {self._applier.version}")
        if self._applier.state.error is not None:
            self._change()

    def _take_proof(self) -> None:
        if (proof := self._prover.outcome()) is not None:
            self._judge(proof)

    def _judge(self, proof: Proof) -> None:
        """Note what a proof found; Unfit if a database that begins again may be a better one."""
        problem = f"{self._path} is not sound: {'; '.join(proof.problems)}."
        if proof.problems and not self._began_again:
            self._began_again = True
            # None, so that the new one is proven at once.
            self._applier.state = dataclasses.replace(self._applier.state, proof=None)
            raise Unfit(problem)
        self._change(error=self._applier.state.error, proof=proof)
        if proof.problems:
            log.error(problem)
        elif proof.failure is None:
            self._began_again = False
            log.info(f"{self._path} is proven at version {proof.version}")

    def _is_due(self, is_fresh: bool) -> bool:
        """Begin a proof if it is time; whether the place has to be compared before.

        Args:
            is_fresh: it was compared with the backup's chain just now.
        """
        applier, last = self._applier, self._applier.state.proof
        after_ns = int(applier.state.check_every_s * 1e9)
        if self._prover.is_running or not applier.version:
            return False
        # One of the future is by a clock that was wrong.
        if last is not None and 0 <= time.time_ns() - last.time_ns < after_ns:
            return False
        if not is_fresh:
            return True
        stored = applier.stored_version()
        if stored != applier.version:
            raise Unfit(f"Its data_version is {stored}, and should be {applier.version}.")
        with contextlib.suppress(RuntimeError):  # No thread is left: later.
            self._prover.start(self._path, stored)
        return False

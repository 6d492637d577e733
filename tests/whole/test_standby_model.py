"""A standby follows the model's random lives, is killed in them, and promoted now and then."""

from __future__ import annotations

import contextlib
import random
import shutil
import sqlite3
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis.stateful import invariant, run_state_machine_as_test

from errors import BackupError
from standby import state as keeping
from standby.applying import Applier
from tests import support
from tests.standby.common import begun, bring, promoted
from tests.whole.test_model import FileLife, Life, SocketLife, state_of, steps
from wallet import restore

EVERY = 10
"""Steps between two promotions."""

if TYPE_CHECKING:
    Base = Life
else:
    Base = object


class Followed(Base):
    """Beside a life: what a standby process does, in this one."""

    def __init__(self) -> None:
        super().__init__()
        self.beside = Path(tempfile.mkdtemp(dir=support.FAST))
        self.standby = begun(self.beside / "standby", "file:///nowhere")
        self.dice = random.Random(0)
        self.moment = 0

    @invariant()
    def a_standby_is_as_good_as_a_restore(self) -> None:
        self.moment += 1
        if not self.moment % EVERY:
            self.promote_a_copy()
        elif self.dice.random() < 0.5:
            self.follow(self.dice.choice([None, 1, 3]))

    def follow(self, most: int | None) -> None:
        """Follow until it is in step, or is killed after so many records."""
        state = keeping.read(str(self.standby))
        assert state is not None
        with contextlib.closing(Applier(str(self.standby), state)) as applier:
            for _ in range(3):
                try:
                    backend: Any = self.make()
                    bring(applier, backend, most)
                    return
                except BackupError as error:
                    applier.go_back(error)
            raise AssertionError("it does not come on")

    def promote_a_copy(self) -> None:
        copy, target = self.beside / "node.bkp", self.beside / "promoted"
        shutil.copy(self.directory / "node.bkp", copy)
        try:
            found = promoted(self.standby, target, f"file://{copy}")
            with contextlib.closing(sqlite3.connect(found)) as connection:
                assert state_of(connection) == self.model.states[-1]
        except restore.NothingToRestore:
            assert self.model.states[-1] == (0, ())
        finally:
            shutil.rmtree(target)

    def teardown(self) -> None:
        super().teardown()
        shutil.rmtree(self.beside)


class FollowedFile(Followed, FileLife):
    """The backup is a file."""


class FollowedServer(Followed, SocketLife):
    """The backup is on a server."""


TestFollowedFile = FollowedFile.TestCase
TestFollowedFile.settings = steps(5)
TestFollowedServer = FollowedServer.TestCase
TestFollowedServer.settings = steps(3)


@pytest.mark.soak
@pytest.mark.timeout(0)
@pytest.mark.parametrize("life", [FollowedFile, FollowedServer])
def test_followed_lives_for_half_of_the_time(life: type[Life]) -> None:
    until, lives = time.monotonic() + 30 * support.SOAK_MINUTES, 0
    while lives == 0 or time.monotonic() < until:
        run_state_machine_as_test(life, settings=steps(20))
        lives += 20
    print(f"\n{lives} lives of at most 50 steps each: {life.__name__}")

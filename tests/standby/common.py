"""A standby in this process: followed for as long as a test wants, and promoted."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
from pathlib import Path

import destinations
from replica import Followable, Pause
from standby import state as keeping
from standby.applying import Applier
from standby.promoting import Promotion
from standby.state import State
from wallet import node


def begun(directory: Path, *urls: str) -> Path:
    """A standby in the new ``directory``, which has nothing yet."""
    directory.mkdir(parents=True)
    keeping.write(str(directory), State(urls, 86400.0))
    return directory


def bring(applier: Applier, backend: Followable, most: int | None = None) -> bool:
    """Give it what is there, or ``most`` records; whether that was all."""
    with backend.follow(applier.begin()) as records:
        for found in records:
            if isinstance(found, Pause):
                applier.rest()
                return True
            if most == 0:
                return False
            applier.feed(*found)
            most = None if most is None else most - 1
    raise AssertionError("it never ends")


def caught_up(directory: Path, backend: Followable) -> None:
    """What a standby that is started does until it is in step; then it is killed."""
    state = keeping.read(str(directory))
    assert state is not None
    with contextlib.closing(Applier(str(directory), state)) as applier:
        bring(applier, backend)


def promoted(directory: Path, target: Path, *urls: str) -> Path:
    """The database that a copy of the standby in ``directory`` becomes, for a backup at ``urls``.

    Args:
        target: a directory that is not there.
    """
    shutil.copytree(directory, target)
    state = keeping.read(str(target))
    assert state is not None
    state = dataclasses.replace(state, urls=urls)
    promotion = Promotion(str(target), state, destinations.backend_for)
    promotion.take_over()
    promotion.name()
    return target / node.DATABASE_NAME

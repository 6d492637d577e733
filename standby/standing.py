"""How a standby stands to its backup, by what it says of itself and a look at the backup."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field

from errors import BackupError
from several import hearing
from several.hearing import Make
from standby import state as keeping
from standby.state import State

BEHIND_S = 60.0
"""A standby that is so much behind is worth a warning."""
KEPT_BACK = 1
"""The newest change may be taken back, so it is not applied before the next one."""


@dataclass(slots=True)
class Standing:
    """What ``status`` shows of a standby.

    Attributes:
        urls: what is followed.
        version: data_version of its database, at least; 0 if it is not ready.
        backup_version: that of the backup, None if it does not answer.
        behind: how many changes it lacks, with the newest one, which is kept back.
        behind_s: seconds between its last change and the backup's; 0 while it lacks one at most.
        process: id of the process that follows, None if none does.
        last_proven_ns: when its database was last found sound, Unix time, nanoseconds.
        errors: why it could not take the node's place as it should.
        warnings: what the operator should act on.
    """

    urls: list[str]
    version: int
    backup_version: int | None = None
    behind: int | None = None
    behind_s: float | None = None
    process: int | None = None
    last_proven_ns: int | None = None
    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def look(directory: str, state: State, make: Make) -> Standing:
    """How the standby in ``directory`` does."""
    place = state.place
    found = Standing(list(state.urls), place.version if place else 0)
    found.process = keeping.holder(directory)
    if state.error is not None:
        found.errors.append(state.error)
    elif place is None:
        found.errors.append("It is not ready: it has not been in step with the backup yet.")
    elif not (state.complete or os.path.exists(os.path.join(directory, keeping.STANDBY_NAME))):
        found.errors.append("Its database is gone: it begins again with all of the backup.")
    if found.process is None:
        found.warnings.append("It does not run: nothing follows the backup.")
    if state.owner is not None:
        found.warnings.append("It is being promoted: type that again.")
    _compare(found, state, make)
    _judge_proof(found, state)
    return found


def _compare(found: Standing, state: State, make: Make) -> None:
    try:
        heard = hearing.hear([make(url) for url in state.urls])
        chosen, _ = hearing.choose(heard, allow_missing=True)
    except BackupError as error:
        if str(error) not in found.errors:
            found.errors.append(str(error))
        return
    assert chosen.look is not None
    for each in heard:
        if each.error is not None:
            found.warnings.append(f"{each.url} does not answer: {each.error}")
    newest = chosen.look.newest
    found.backup_version = newest.version
    if state.place is None:
        return
    found.behind = max(0, newest.version - found.version)
    found.behind_s = 0.0
    if found.behind > KEPT_BACK:
        found.behind_s = max(0, newest.time_ns - state.place.time_ns) / 1e9
    if found.behind_s > BEHIND_S:
        found.warnings.append(
            f"It is {found.behind} changes behind, by {found.behind_s:.0f} seconds."
        )


def _judge_proof(found: Standing, state: State) -> None:
    proof = state.proof
    if proof is None:
        found.warnings.append("Its database was never proven.")
        return
    if proof.failure is not None:
        found.warnings.append(f"The last proof did not come to its end: {proof.failure}")
    elif proof.problems:
        found.errors.append(f"Its database is not sound: {'; '.join(proof.problems)}.")
    else:
        found.last_proven_ns = proof.time_ns
        if time.time_ns() - proof.time_ns > 2e9 * state.check_every_s:
            found.warnings.append("Its last proof is older than twice --check-every.")

"""A standby follows: what it says of a backup that is damaged."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import destinations
from filelog import following as of_a_file
from replica import Replica
from standby import following, state
from standby.following import Standby
from tests import support

TRIES = 4


class Ended(Exception):
    """The standby tried often enough."""


def test_a_copy_that_was_cut_is_not_called_well_again_and_again(
    tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = support.make_backup(url, support.first_changes(10))
    os.truncate(path, support.records_of(path)[7][0].end)
    monkeypatch.setattr(of_a_file, "GROWING_TAIL_S", 0.05)
    monkeypatch.setattr(following, "FIRST_PAUSE_S", 0.01)
    noted, tries = [], iter(range(TRIES))

    def make() -> Replica:
        found = state.read(str(tmp_path))
        noted.append(found is not None and found.error is not None)
        if next(tries, None) is None:
            raise Ended
        return destinations.backend_for(url)

    with caplog.at_level("INFO", "backup"), pytest.raises(Ended):
        Standby(str(tmp_path), state.State((url,), 86400.0), make).run()
    said = [record.getMessage() for record in caplog.records]
    assert sum("in step" in line for line in said) == 1
    assert sum("the file was cut off there" in line for line in said) == 1
    assert noted == [False] + TRIES * [True]

"""The map of ddrescue: which bytes of its image were read."""

from __future__ import annotations

import io
from collections.abc import Iterable

from errors import ConfigError, DiskError

MAX_SIZE = 64 << 20
FINISHED = "+"
STATUSES = "?*/-+"
STATES = STATUSES + "FG"
"""What ddrescue was doing when it wrote the map."""
_AFTER = "Give the file that ddrescue wrote beside the image, its third argument."


def read(path: str) -> list[tuple[int, int]]:
    """What the map ``path`` calls good: begin and end of each range in bytes, in order.

    Raises:
        ConfigError: it is no map of ddrescue.
        DiskError: it cannot be read.
    """
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_SIZE + 1)
    except OSError as error:
        raise DiskError(path, error, "read") from error
    try:
        return _parsed(data)
    except ValueError as error:
        raise ConfigError(f"{path} is no map of ddrescue.", _AFTER) from error


def _parsed(data: bytes) -> list[tuple[int, int]]:
    if len(data) > MAX_SIZE:
        raise ValueError("too large")
    file = io.StringIO(data.decode("ascii", "replace"))
    lines = (line.partition("#")[0].split() for line in file)
    blocks = (words for words in lines if words)
    position, status, *_ = next(blocks, ("", ""))
    if int(position, 0) < 0 or status not in STATES or len(status) != 1:
        raise ValueError("no state")
    return _good(blocks)


def _good(blocks: Iterable[list[str]]) -> list[tuple[int, int]]:
    good: list[tuple[int, int]] = []
    end = 0
    for position, size, status in blocks:
        begin = int(position, 0)
        if begin < end or int(size, 0) < 0 or status not in STATUSES or len(status) != 1:
            raise ValueError("not in order")
        end = begin + int(size, 0)
        if status != FINISHED:
            continue
        if good and good[-1][1] == begin:
            begin = good.pop()[0]
        good.append((begin, end))
    return good

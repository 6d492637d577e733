"""The map of ddrescue: which bytes of its image were read."""

from __future__ import annotations

from errors import ConfigError, DiskError

MAX_SIZE = 64 << 20
FINISHED = "+"
STATUSES = "?*/-+"
_AFTER = "Give the file that ddrescue wrote beside the image, its third argument."


def read(path: str) -> list[tuple[int, int]]:
    """What the map ``path`` calls good: begin and end of each range in bytes, in order.

    Raises:
        ConfigError: it is no map of ddrescue.
        DiskError: it cannot be read.
    """
    try:
        with open(path, "rb") as file:
            text = file.read(MAX_SIZE + 1).decode("ascii", "replace")
    except OSError as error:
        raise DiskError(path, error, "read") from error
    lines = (line.partition("#")[0].split() for line in text[:MAX_SIZE].splitlines())
    try:
        (position, status, *_), *blocks = [words for words in lines if words]
        if int(position, 0) < 0 or status not in STATUSES:
            raise ValueError("no state")
        return _good(blocks)
    except ValueError as error:
        raise ConfigError(f"{path} is no map of ddrescue.", _AFTER) from error


def _good(blocks: list[list[str]]) -> list[tuple[int, int]]:
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

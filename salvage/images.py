"""The images that are searched, as one range of places. They are opened to read only."""

from __future__ import annotations

import bisect
import contextlib
import glob
import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass

from errors import ConfigError, DiskError

BLOCK = 4096
"""Bytes that are given up at once where they cannot be read."""
MOST_UNREADABLE = 100
"""Blocks that are named."""
APART = 1 << 20
"""Two images are at least as far apart, in places."""


@dataclass(frozen=True, slots=True)
class Image:
    """One of the images.

    Attributes:
        path: as it was typed.
        fd: open to read.
        start: the place of its first byte.
        size: in bytes.
        good: begin and end of what is known of it, in order.
    """

    path: str
    fd: int
    start: int
    size: int
    good: Sequence[tuple[int, int]]


class Images:
    """All images that are searched.

    Args:
        paths: files or block devices.
        good: what ddrescue's map calls good, for a single image; None: all.

    Attributes:
        size: bytes of all of them.
        unreadable: offsets of blocks that could not be read, with the path; only the first ones.
        failures: how often a block could not be read; zeros stand for it.

    Raises:
        ConfigError, DiskError.
    """

    def __init__(self, paths: Sequence[str], good: Sequence[tuple[int, int]] | None = None) -> None:
        self._images: list[Image] = []
        self.unreadable: list[tuple[str, int]] = []
        self.failures = 0
        start = 0
        try:
            for path in paths:
                image = _opened(path, start, good)
                self._images.append(image)
                start += (image.size // APART + 2) * APART
        except BaseException:
            self.close()
            raise
        self.size = sum(image.size for image in self._images)
        self._starts = [image.start for image in self._images]

    def ranges(self) -> list[tuple[int, int]]:
        """Begin and end of every range of places that is known."""
        return [
            (image.start + begin, image.start + end)
            for image in self._images
            for begin, end in image.good
        ]

    def read(self, place: int, size: int) -> bytes:
        """``size`` bytes at ``place``, fewer at the end of an image; what is unknown is zero."""
        image = self._images[bisect.bisect(self._starts, place) - 1] if place >= 0 else None
        if image is None or place - image.start >= image.size:
            return b""
        begin = place - image.start
        end = min(begin + size, image.size)
        at = max(bisect.bisect(image.good, (begin, image.size + 1)) - 1, 0)
        if image.good and image.good[at][0] <= begin and end <= image.good[at][1]:
            return self._pread(image, begin, end)
        data = bytearray(end - begin)
        for low, high in image.good[at:]:
            low, high = max(low, begin), min(high, end)
            if low < high:
                data[low - begin : high - begin] = self._pread(image, low, high)
            elif low >= end:
                break
        return bytes(data)

    def read_padded(self, place: int, size: int, within: int) -> bytes:
        """``size`` bytes at ``place``, with zeros for what is not of the image of ``within``."""
        image = self._images[bisect.bisect(self._starts, within) - 1]
        low, high = max(place, image.start), min(place + size, image.start + image.size)
        data = self.read(low, high - low) if low < high else b""
        return bytes(low - place) + data.ljust(place + size - low, b"\0")

    def _pread(self, image: Image, begin: int, end: int) -> bytes:
        parts: list[bytes] = []
        by_blocks = False
        while begin < end:
            block = begin // BLOCK * BLOCK
            goal = min(block + BLOCK, end) if by_blocks else end
            try:  # A device gives what stands before a bad block: fewer bytes, and no error.
                data = os.pread(image.fd, goal - begin, begin)
            except OSError:
                data = b""
            if not data and goal > block + BLOCK:
                by_blocks = True
                continue
            by_blocks = not data
            parts.append(data or self._unread(image, block, goal - begin))
            begin += len(parts[-1])
        return b"".join(parts)

    def _unread(self, image: Image, block: int, size: int) -> bytes:
        """What stands for ``size`` bytes of a block that cannot be read."""
        self.failures += 1
        found = image.path, block
        if len(self.unreadable) < MOST_UNREADABLE and found not in self.unreadable:
            self.unreadable.append(found)
        return bytes(size)

    def is_known(self, place: int, size: int) -> bool:
        """Whether all of these bytes are there, and none of them is called bad by the map."""
        image = self._images[bisect.bisect(self._starts, place) - 1]
        begin = place - image.start
        at = bisect.bisect(image.good, (begin, image.size + 1)) - 1
        return at >= 0 and begin + size <= image.good[at][1]

    def where(self, place: int) -> tuple[str, int]:
        """The path of the image, and the offset in it."""
        image = self._images[bisect.bisect(self._starts, place) - 1]
        return image.path, place - image.start

    def described(self) -> list[list[object]]:
        """What tells these images from others, and from themselves before they were written to."""
        return [
            [
                os.path.realpath(image.path),
                image.size,
                _written_ns(image.fd),
                *map(list, image.good),
            ]
            for image in self._images
        ]

    def close(self) -> None:
        """Close them."""
        for image in self._images:
            os.close(image.fd)


def _written_ns(fd: int) -> int:
    found = os.fstat(fd)  # Of a device that is when its node was made.
    return found.st_mtime_ns if stat.S_ISREG(found.st_mode) else 0


def devices_of(directory: str) -> set[int]:
    """Numbers of the block devices that the file system of ``directory`` is on, as far as known.

    Also the disk that one of them is a part of, and those below LVM, LUKS or RAID.
    """
    number = os.stat(directory).st_dev
    if not os.major(number):  # As btrfs does: only the table of mounts tells.
        with contextlib.suppress(OSError):
            number = os.stat(_mounted_from(directory)).st_rdev
    found, left = set[int](), [number]
    while left:
        number = left.pop()
        found.add(number)
        here = os.path.realpath(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}")
        above = [os.path.dirname(here)] if os.path.exists(f"{here}/partition") else []
        for path in (*above, *glob.iglob(f"{glob.escape(here)}/slaves/*")):
            with contextlib.suppress(OSError, ValueError), open(f"{path}/dev") as file:
                left += {os.makedev(*map(int, file.read().split(":")))} - found
    return found


def _mounted_from(directory: str) -> str:
    """What is mounted where ``directory`` is."""
    with open("/proc/self/mountinfo", errors="surrogateescape") as file:
        rows = [line.split() for line in file]
    mounts = {row[4]: row[row.index("-") + 2] for row in rows}
    while not os.path.ismount(directory):
        directory = os.path.dirname(directory)
    return mounts.get(directory.replace(" ", r"\040"), "")


def _opened(path: str, start: int, good: Sequence[tuple[int, int]] | None) -> Image:
    try:
        mode = os.stat(path).st_mode  # To open a FIFO would wait for ever.
        if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
            raise ConfigError(f"{path} is neither a file nor a block device.", "Check the path.")
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        size = os.lseek(fd, 0, os.SEEK_END)
    except OSError as error:
        raise DiskError(path, error, "open") from error
    ranges = [(0, size)] if good is None else [(b, min(e, size)) for b, e in good if b < size]
    return Image(path, fd, start, size, ranges)

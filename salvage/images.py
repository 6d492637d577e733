"""The images that are searched, as one range of places. They are opened to read only."""

from __future__ import annotations

import bisect
import itertools
import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass

from errors import ConfigError, DiskError

BLOCK = 4096
"""Bytes that are given up at once where they cannot be read."""
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

    Raises:
        ConfigError, DiskError.
    """

    def __init__(self, paths: Sequence[str], good: Sequence[tuple[int, int]] | None = None) -> None:
        self._images: list[Image] = []
        self.unreadable: list[tuple[str, int]] = []
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
        try:
            data = os.pread(image.fd, end - begin, begin)
        except OSError:
            if end - begin <= BLOCK:
                if len(self.unreadable) < 100 and (image.path, begin) not in self.unreadable:
                    self.unreadable.append((image.path, begin))
                return bytes(end - begin)
            cuts = [begin, *range((begin // BLOCK + 1) * BLOCK, end, BLOCK), end]
            pairs = itertools.pairwise(cuts)
            return b"".join(self._pread(image, low, high) for low, high in pairs)
        return data.ljust(end - begin, b"\0")  # It became shorter meanwhile.

    def is_known(self, place: int, size: int) -> bool:
        """Whether all of these bytes are there, and none of them is called bad by the map."""
        image = self._images[bisect.bisect(self._starts, place) - 1]
        begin = place - image.start
        return any(low <= begin and begin + size <= high for low, high in image.good)

    def where(self, place: int) -> tuple[str, int]:
        """The path of the image, and the offset in it."""
        image = self._images[bisect.bisect(self._starts, place) - 1]
        return image.path, place - image.start

    def described(self) -> list[list[object]]:
        """What tells these images from others."""
        return [[os.path.realpath(i.path), i.size, list(map(list, i.good))] for i in self._images]

    def close(self) -> None:
        """Close them."""
        for image in self._images:
            os.close(image.fd)


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

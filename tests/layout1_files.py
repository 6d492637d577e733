"""Files of layout 1, built from its description, with the habits of the plugin that wrote them."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path

from tests.support import Call

FIRST_ENTRY = 512
HEAD_SIZE = 9
TRANSACTION = 1
SNAPSHOT = 2


def header(
    version: int, offset: int, prev_version: int = 0, prev_offset: int = 512, count: int = 0
) -> bytes:
    """The 512 bytes that begin a file."""
    fields = struct.pack("!IIQIQQ", 1, version, offset, prev_version, prev_offset, count)
    return fields.ljust(FIRST_ENTRY, b"\0")


def entry(
    version: int, payload: bytes, kind: int = TRANSACTION, length: int | None = None
) -> bytes:
    """One entry; ``length`` if its head is to name another than the payload's."""
    return struct.pack("!IIB", len(payload) if length is None else length, version, kind) + payload


def change_entry(call: Call) -> bytes:
    """The entry of one db_write."""
    version, statements = call
    return entry(version, "\0".join(statements).encode())


class EarlierPlugin:
    """Writes the file ``path``, as the earlier plugin did.

    It appends always at the end of the file, keeps a rewind in memory only, and writes the
    header after the entry.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.version = self.prev_version = self.count = 0
        self.offset = self.prev_offset = FIRST_ENTRY
        self.starts: list[int] = []
        """Where each entry begins."""
        self._is_first = True
        path.write_bytes(header(0, FIRST_ENTRY))

    def session(self, calls: Sequence[Call]) -> None:
        """A lightningd starts, and writes ``calls``."""
        self._is_first = True
        for call in calls:
            self.write(call)

    def write(self, call: Call) -> None:
        """One db_write."""
        version = call[0]
        if self._is_first and self.version != version - 1:
            assert self.prev_version == version - 1 and self.prev_offset != self.offset
            self.version, self.offset = self.prev_version, self.prev_offset
        self._is_first = False
        self._append(version, change_entry(call))

    def snapshot(self, version: int, data: bytes) -> None:
        """What it wrote when it was set up on an existing node, or compacted."""
        self._append(version, entry(version, data, SNAPSHOT))

    def _append(self, version: int, data: bytes) -> None:
        with self.path.open("ab") as file:
            self.starts.append(file.tell())
            file.write(data)
        self.prev_version, self.prev_offset = self.version, self.offset
        self.version = version
        self.offset += len(data)
        self.count += 1
        self.write_header()

    def header(self) -> bytes:
        """The header as it is now."""
        return header(self.version, self.offset, self.prev_version, self.prev_offset, self.count)

    def write_header(self) -> None:
        """Bring the header up to date."""
        set_header(self.path, self.header())


def set_header(path: Path, data: bytes) -> None:
    """Write over the header of ``path``."""
    with path.open("r+b") as file:
        file.write(data)


def written(path: Path, *sessions: Sequence[Call]) -> EarlierPlugin:
    """A file of some sessions."""
    plugin = EarlierPlugin(path)
    for calls in sessions:
        plugin.session(calls)
    return plugin

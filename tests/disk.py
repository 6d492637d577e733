"""A disk that forgets: a stand-in for ``os``, and what a power cut may leave of its work.

``Disk`` does everything for real and keeps a journal. ``Model`` replays a journal and
says after each operation which states of the directory the disk may be left in. A sector
of 512 bytes is written all or nothing; apart from that, what was not flushed may be there
or not, sector by sector, in any order, and so may the file's size, and names whose
directory was not flushed. After a failed flush the pages are clean, although the disk may
never have seen them: a later flush does not write them, only a later write does.
"""

from __future__ import annotations

import contextlib
import errno
import os
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

SECTOR = 512
PAGE = 4096
MANY = 10
"""Sectors of one write, or pending names, up to which every cut is tried."""
RANDOM_CHOICES = 4
"""States of a file drawn at random, behind those that are enumerated."""

Files = dict[str, bytes]
"""Names and contents of one directory."""


class Op(NamedTuple):
    """One entry of the journal; ``mark`` is the scenario's own."""

    kind: str
    inode: int = 0
    offset: int = 0
    data: bytes = b""
    name: str = ""
    target: str = ""
    mark: Any = None


class Killed(BaseException):
    """The process is gone: nothing of it runs any more."""


@dataclass
class Fault:
    """What goes wrong at the n-th call.

    Attributes:
        at: number of the call, from 1.
        error: an errno, or 0 to kill the process before the call, or -1 for a write of
            one byte, -2 for one of half of the bytes.
        for_good: whether every call after it goes wrong, too.
        calls: names of calls that count; empty for all.
        hits: how often it went wrong.
    """

    at: int
    error: int
    for_good: bool = False
    calls: tuple[str, ...] = ()
    hits: int = 0
    seen: int = 0

    def meets(self, call: str) -> bool:
        """Count ``call``; whether it goes wrong."""
        if self.calls and call not in self.calls:
            return False
        self.seen += 1
        wrong = self.seen == self.at or (self.for_good and self.seen > self.at)
        self.hits += wrong
        return wrong


class Disk:
    """Stands in for ``os`` where a module writes below ``root``.

    Args:
        root: the directory that is recorded, the log's. Locks (``.writer``) are not.
        links: whether the file system has hard links.
    """

    def __init__(self, root: str, links: bool = True) -> None:
        self.root = root
        self.links = links
        self.journal: list[Op] = []
        self.start: Files = {}
        self.fault: Fault | None = None
        self.listener: Callable[[str], None] | None = None
        """Called after an operation with the name it was for."""
        self._dead = False
        self._heard = False
        self._names: dict[str, int] = {}
        self._cache: dict[int, bytearray] = {}
        self._fds: dict[int, int] = {}
        self._label: dict[int, str] = {}
        self._last_inode = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    # The scenario's side

    def mark(self, mark: Any) -> None:
        """Put a marker into the journal."""
        self.journal.append(Op("mark", mark=mark))

    def revive(self) -> None:
        """A new process: no fault, and the page cache is as it was."""
        self.fault, self._dead = None, False
        self._fds.clear()

    def put(self, files: Files) -> None:
        """Begin again with ``files``, all of them durable, and an empty journal."""
        for name in os.listdir(self.root):
            os.unlink(os.path.join(self.root, name))
        self._names, self._cache, self._last_inode = {}, {}, 0
        for name, data in files.items():
            with open(os.path.join(self.root, name), "wb") as file:
                file.write(data)
            self._new_inode(name, data)
        self.start, self.journal = dict(files), []
        self.revive()

    def files(self) -> Files:
        """What the page cache shows."""
        found = {}
        for name in self._names:
            with open(os.path.join(self.root, name), "rb") as file:
                found[name] = file.read()
        return found

    def model(self) -> Model:
        """A model that stands at the end of the journal."""
        model = Model(self.start)
        for op in self.journal:
            model.apply(op)
        return model

    def _new_inode(self, name: str, data: bytes = b"") -> int:
        self._last_inode += 1
        self._names[name] = self._last_inode
        self._cache[self._last_inode] = bytearray(data)
        self._label[self._last_inode] = name
        return self._last_inode

    def _name(self, path: Any) -> str:
        """The recorded name of ``path``, or "" if it is none of ours."""
        directory, name = os.path.split(os.fspath(path))
        return name if directory == self.root and not name.endswith(".writer") else ""

    def _call(self, call: str) -> None:
        """Count a call of the module; raises if it is to fail."""
        if self._dead:
            raise Killed
        fault = self.fault
        if fault is None or not fault.meets(call):
            return
        if fault.error == 0:
            self._dead = True
            raise Killed
        if fault.error > 0:
            raise OSError(fault.error, os.strerror(fault.error))

    def _note(self, op: Op, name: str) -> None:
        self.journal.append(op)
        if self.listener is not None and not self._heard:
            self._heard = True
            try:
                self.listener(name)
            finally:
                self._heard = False

    # The calls of os

    def open(self, path: str, flags: int, mode: int = 0o777) -> int:
        name = self._name(path)
        if not path.endswith(".writer"):
            self._call("open")
        fd = os.open(path, flags, mode)
        self._fds.pop(fd, None)
        if name and not flags & os.O_DIRECTORY:
            if name in self._names:
                self._fds[fd] = self._names[name]
            else:
                self._fds[fd] = self._new_inode(name)
                self._note(Op("create", self._fds[fd], name=name), name)
        return fd

    def pread(self, fd: int, size: int, offset: int) -> bytes:
        self._call("pread")
        return os.pread(fd, size, offset)

    def pwrite(self, fd: int, data: bytes | memoryview, offset: int) -> int:
        inode = self._fds.get(fd)
        if inode is None:
            return os.pwrite(fd, data, offset)
        before = self.fault.hits if self.fault else 0
        self._call("pwrite")
        if self.fault and self.fault.hits > before:
            data = data[: 1 if self.fault.error == -1 else max(1, len(data) // 2)]
        written = os.pwrite(fd, data, offset)
        self._write(inode, bytes(data[:written]), offset)
        return written

    def _write(self, inode: int, data: bytes, offset: int) -> None:
        cache = self._cache[inode]
        if len(cache) < offset:
            cache.extend(bytes(offset - len(cache)))
        cache[offset : offset + len(data)] = data
        self._note(Op("write", inode, offset, data), self._label[inode])

    def ftruncate(self, fd: int, size: int) -> None:
        inode = self._fds.get(fd)
        if inode is not None:
            self._call("ftruncate")
        os.ftruncate(fd, size)
        if inode is not None:
            self._resize(inode, size)

    def _resize(self, inode: int, size: int) -> None:
        cache = self._cache[inode]
        del cache[size:]
        cache.extend(bytes(size - len(cache)))
        self._note(Op("size", inode, size), self._label[inode])

    def fdatasync(self, fd: int) -> None:
        inode = self._fds[fd]
        self._notice(fd, inode)
        try:
            self._call("fdatasync")
        except OSError:
            self._note(Op("forget", inode), self._label[inode])
            raise
        self._note(Op("flush", inode), self._label[inode])

    def _notice(self, fd: int, inode: int) -> None:
        """Record what was written past this object: by SQLite, or through a Python file."""
        size = os.fstat(fd).st_size
        found = os.pread(fd, size, 0)
        if found != self._cache[inode]:
            if size < len(self._cache[inode]):
                self._resize(inode, size)
            self._write(inode, found, 0)

    def fsync(self, fd: int) -> None:
        assert fd not in self._fds, "files are flushed with fdatasync"
        self._call("fsync")
        self._note(Op("sync"), "")

    def fstat(self, fd: int) -> os.stat_result:
        self._call("fstat")
        return os.fstat(fd)

    def link(self, source: str, target: str) -> None:
        self._call("link")
        if not self.links:
            raise OSError(errno.EPERM, "no hard links here")
        os.link(source, target)
        name = self._name(target)
        self._names[name] = self._names[self._name(source)]
        self._note(Op("link", self._names[name], name=name), name)

    def rename(self, source: str, target: str) -> None:
        self._call("rename")
        os.rename(source, target)
        old, new = self._name(source), self._name(target)
        self._names[new] = inode = self._names.pop(old)
        self._label[inode] = new
        self._note(Op("rename", inode, name=old, target=new), new)

    def unlink(self, path: str) -> None:
        self._call("unlink")
        os.unlink(path)
        name = self._name(path)
        if self._names.pop(name, 0):
            self._note(Op("unlink", name=name), name)

    def close(self, fd: int) -> None:
        self._fds.pop(fd, None)
        os.close(fd)


# What a power cut leaves.


class Inode:
    """A file as the page cache shows it and as the disk may have it.

    Attributes:
        versions: by sector, what may stand on the disk, oldest first, each with the number
            of the write that it came with (0: it is durable).
        sizes: what the file's size on the disk may be.
    """

    def __init__(self, data: bytes = b"") -> None:
        self.durable = bytearray(data)
        self.durable.extend(bytes(-len(data) % SECTOR))
        self.cache = bytearray(self.durable)
        self.size = len(data)
        self.sizes = [len(data)]
        self.versions: dict[int, list[tuple[int, bytes]]] = {}
        self._dirty: set[int] = set()

    def write(self, number: int, offset: int, data: bytes) -> None:
        """Write number ``number`` of the journal."""
        end = offset + len(data)
        self._touch(number, offset, end, data)
        if end > self.size:
            self._set_size(end)

    def resize(self, number: int, size: int) -> None:
        """Truncate or extend."""
        if size < self.size:
            self._touch(number, size, self.size, bytes(self.size - size))
        self._set_size(size)

    def _set_size(self, size: int) -> None:
        self.size = size
        if size not in self.sizes:
            self.sizes.append(size)

    def _touch(self, number: int, offset: int, end: int, data: bytes) -> None:
        for content in self.durable, self.cache:
            content.extend(bytes(max(0, -(-end // SECTOR) * SECTOR - len(content))))
        self.cache[offset:end] = data
        for sector in range(offset // SECTOR, -(-end // SECTOR)):
            place = slice(sector * SECTOR, (sector + 1) * SECTOR)
            now = bytes(self.cache[place])
            known = self.versions.setdefault(sector, [(0, bytes(self.durable[place]))])
            if known[-1][1] != now:
                known.append((number, now))
            if len(known) > 1:
                self._dirty.add(sector)
            else:
                del self.versions[sector]

    def flush(self) -> None:
        """All that is dirty is durable now."""
        for sector in self._dirty:
            place = slice(sector * SECTOR, (sector + 1) * SECTOR)
            self.durable[place] = self.cache[place]
            del self.versions[sector]
        self._dirty.clear()
        self.sizes = [self.size]

    def forget(self) -> None:
        """A flush failed: its pages are clean, whatever the disk has of them."""
        self._dirty.clear()

    def newest(self) -> bytes:
        """All kept."""
        return self._with(lambda sector, known: -1, self.size)

    def states(self, rng: random.Random) -> Iterator[tuple[str, bytes]]:
        """A name for each state that the disk may have the file in, and the state."""
        yield "all kept", self.newest()
        if not self.versions and len(self.sizes) == 1:
            return
        for size in self.sizes:
            yield f"all dropped, size {size}", self._with(lambda sector, known: 0, size)
            yield f"all kept, size {size}", self._with(lambda sector, known: -1, size)
        numbers = sorted({number for known in self.versions.values() for number, _ in known[1:]})
        for number in numbers:
            yield from self._cuts(number, rng)
        for _ in range(RANDOM_CHOICES if self.versions else 0):
            size = rng.choice(self.sizes)
            drawn = self._with(lambda sector, known: rng.randrange(len(known)), size)
            yield f"drawn, size {size}", drawn

    def _cuts(self, number: int, rng: random.Random) -> Iterator[tuple[str, bytes]]:
        """States in which write ``number`` was going on: torn, reordered, partly missing."""
        touched = [s for s, known in self.versions.items() if any(n == number for n, _ in known)]
        touched.sort()
        for what, kept in _subsets(touched, rng):
            for later in (False, True):

                def pick(
                    sector: int,
                    known: list[tuple[int, bytes]],
                    kept: frozenset[int] = kept,
                    later: bool = later,
                ) -> int:
                    if sector in touched and sector not in kept:
                        return _up_to(known, number - 1)
                    return -1 if later else _up_to(known, number)

                name = f"write {number}: {what}, later ones {'kept' if later else 'dropped'}"
                yield name, self._with(pick, self.size)

    def _with(self, pick: Callable[[int, list[tuple[int, bytes]]], int], size: int) -> bytes:
        data = bytearray(self.durable)
        for sector, known in self.versions.items():
            data[sector * SECTOR : (sector + 1) * SECTOR] = known[pick(sector, known)][1]
        del data[size:]
        return bytes(data) + bytes(size - len(data))


def _up_to(known: list[tuple[int, bytes]], number: int) -> int:
    """Index of the last version that write ``number`` or one before it made."""
    return max(i for i, (made_by, _) in enumerate(known) if made_by <= number)


def _subsets(sectors: list[int], rng: random.Random) -> Iterator[tuple[str, frozenset[int]]]:
    """Which sectors of one write reached the disk, each with a name."""
    yield "all of it", frozenset(sectors)
    cuts = list(range(1, len(sectors)))
    if len(sectors) > MANY:
        pages = [i for i in cuts if not sectors[i] * SECTOR % PAGE]
        cuts = sorted({*pages, *rng.sample(cuts, MANY - 2), 1, len(sectors) - 1})
    for cut in cuts:
        border = "page" if not sectors[cut] * SECTOR % PAGE else "sector"
        yield f"torn at the {border} {sectors[cut]}", frozenset(sectors[:cut])
        yield f"only from the {border} {sectors[cut]} on", frozenset(sectors[cut:])
        yield f"without sector {sectors[cut]}", frozenset(sectors) - {sectors[cut]}
        yield f"sector {sectors[cut]} alone", frozenset({sectors[cut]})
    if len(sectors) > 2:
        yield "every other sector", frozenset(sectors[::2])
        yield "the other sectors", frozenset(sectors[1::2])


@dataclass
class Model:
    """A directory of which the disk has some, and the page cache all.

    Args:
        files: what is there and durable at first; inodes count from 1 in its order.
    """

    files: Files
    inodes: dict[int, Inode] = field(init=False)
    names: dict[str, int] = field(init=False)
    pending: list[Op] = field(init=False, default_factory=list)
    count: int = 0

    def __post_init__(self) -> None:
        self.inodes, self.names = {}, {}
        for number, (name, data) in enumerate(self.files.items(), 1):
            self.inodes[number] = Inode(data)
            self.names[name] = number

    def apply(self, op: Op) -> None:
        """The next operation of the journal."""
        self.count += 1
        match op.kind:
            case "mark":
                return
            case "write":
                self.inodes[op.inode].write(self.count, op.offset, op.data)
            case "size":
                self.inodes[op.inode].resize(self.count, op.offset)
            case "flush":
                self.inodes[op.inode].flush()
            case "forget":
                self.inodes[op.inode].forget()
            case "sync":
                self.names = self._names_with(self.pending)
                self.pending.clear()
            case _:
                if op.kind == "create":
                    self.inodes[op.inode] = Inode()
                self.pending.append(op)

    def _names_with(self, ops: list[Op], half: Op | None = None) -> dict[str, int]:
        names = dict(self.names)
        for op in ops:
            if op.kind in ("unlink", "rename") and op is not half:
                names.pop(op.name, None)
            if op.kind != "unlink":
                names[op.target or op.name] = op.inode
        return names

    def directories(self, rng: random.Random) -> Iterator[tuple[str, dict[str, int]]]:
        """What the directory may list: all kept and all lost first."""
        ops = self.pending
        yield "names kept", self._names_with(ops)
        if not ops:
            return
        yield "names lost", dict(self.names)
        for i, op in enumerate(ops):
            yield f"names up to {i}", self._names_with(ops[:i])
            yield f"{op.kind} {op.name} lost", self._names_with(ops[:i] + ops[i + 1 :])
            if op.kind == "rename":
                yield f"{op.name} is still there", self._names_with(ops[: i + 1], half=op)
        subsets = range(2 ** len(ops))
        for number in subsets if len(ops) <= 4 else [rng.choice(subsets) for _ in range(8)]:
            kept = [op for i, op in enumerate(ops) if number >> i & 1]
            yield f"names of set {number:b}", self._names_with(kept)

    def states(self, rng: random.Random, scratch: str) -> Iterator[tuple[str, Files]]:
        """The states that a power cut may leave now, each with a name.

        Args:
            scratch: files whose names begin so are removed unread, whatever they hold.
        """
        known: set[tuple[tuple[str, int], ...]] = set()
        for index, (what, names) in enumerate(self.directories(rng)):
            listing = tuple(sorted(names.items()))
            if listing in known:
                continue
            known.add(listing)
            for how, contents in self._contents(names, rng, scratch, index < 2):
                files = {name: contents[inode] for name, inode in names.items()}
                yield f"{what}; {how}", files

    def _contents(
        self, names: dict[str, int], rng: random.Random, scratch: str, thoroughly: bool
    ) -> Iterator[tuple[str, dict[int, bytes]]]:
        newest = {inode: self.inodes[inode].newest() for inode in names.values()}
        read = {inode for name, inode in names.items() if not name.startswith(scratch)}
        yield "all kept", newest
        unsure = [i for i in sorted(read) if self.inodes[i].versions or self.inodes[i].sizes[1:]]
        oldest = dict(newest)
        for inode in unsure:
            found = self.inodes[inode]
            oldest[inode] = found._with(lambda sector, known: 0, found.sizes[0])
        for inode in unsure:
            for how, data in self.inodes[inode].states(rng):
                if thoroughly or rng.random() < 0.1:
                    yield f"file {inode}: {how}", {**newest, inode: data}
                    if len(unsure) > 1:
                        yield f"file {inode}: {how}, others old", {**oldest, inode: data}


@contextlib.contextmanager
def standing_in(disk: Disk, *modules: Any) -> Iterator[None]:
    """``disk`` in place of the ``os`` of ``modules``."""
    try:
        for module in modules:
            module.os = disk
        yield
    finally:
        for module in modules:
            module.os = os

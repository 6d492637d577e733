"""A copy of what a server keeps, fetched over a line that may break, and read in its place."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import os
import stat
import time
from collections.abc import Iterator

import durable
import space
from backend import Ending, Progress, Reading, Step, log
from errors import BackupBusy, BackupError, ConfigError, DiskError, UnsupportedLayout
from filelog import layout2
from filelog.layout2 import BEFORE_FIRST, Head
from filelog.reader import FileReading, LogReader
from protocol import Coming, Metadata, NackCode
from remote.address import SocketUrl
from remote.link import Link, Refused, Unreachable
from remote.patience import Patience
from remote.reading import Received, falls_short

SUFFIX = ".fetched"


class Copy:
    """A local log of layout 2 that holds a server's records, as far as they came.

    Nothing of it is flushed: what a crash leaves is read anew, and only what checks counts.

    Args:
        path: the file, which is made, or gone on with; locked until ``close``.

    Attributes:
        last: the last record that is there, or None.
        damage: what the server says of its log behind the last record, or None.

    Raises:
        BackupBusy: another process fetches into it.
        DiskError, ConfigError.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.damage: BackupError | None = None
        with self._working("open"):
            self._fd = self._open()
        try:
            self.last = self._found()
        except BaseException:
            self.close()
            raise

    def _open(self) -> int:
        with contextlib.suppress(FileExistsError):
            os.close(durable.create(self.path))
        fd = os.open(self.path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            found = os.fstat(fd)
            # In a directory of others it could have been put there: its records count.
            owners = os.geteuid(), os.stat(os.path.dirname(self.path)).st_uid
            if not stat.S_ISREG(found.st_mode) or found.st_uid not in owners:
                raise ConfigError(f"{self.path} is another user's.", "Remove it.")
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BaseException as error:
            os.close(fd)
            if isinstance(error, BlockingIOError):
                raise BackupBusy(self.path, "") from error
            raise
        return fd

    @contextlib.contextmanager
    def _working(self, doing: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise DiskError(self.path, error, doing) from error

    def _found(self) -> Head | None:
        """The last record that an earlier run left whole."""
        try:
            with contextlib.closing(LogReader(self.path)) as reader:
                for _ in reader:
                    pass
                return None if reader.log_start is None else reader.last
        except UnsupportedLayout:  # It is empty, or its header never got there.
            return None

    def begin(self, coming: Coming) -> None:
        """Make ready for the records to come, if the disk has room for them.

        Raises:
            NoRoom: it has not, with the database that is built from them.
        """
        end = self.last.end if self.last is not None else 0
        space.require(self.path, max(coming.size - end, 0) + coming.snapshot_size)
        with self._working("write to"):
            os.ftruncate(self._fd, end)
            if not end:
                id_and_time = coming.backup_id, time.time_ns()
                header = layout2.encode_header(*id_and_time, coming.snapshot_size)
                durable.write_all(self._fd, header, 0)

    def add(self, head: Head, payload: bytes) -> None:
        """Take the record that follows ``last``."""
        with self._working("write to"):
            durable.write_all(self._fd, layout2.encode(head, payload), head.offset)
        self.last = head

    def start_over(self) -> None:
        """Drop what is there."""
        self.last = None

    def finish(self) -> None:
        """All of it came: end it as a whole log ends."""
        end = (self.last or BEFORE_FIRST).end
        with self._working("write to"):
            durable.write_all(self._fd, bytes(durable.PREALLOCATE_STEP), end)

    def read(self) -> Reading:
        """A pass over it."""
        return _CopyReading(self)

    def discard(self) -> None:
        """Remove it."""
        durable.discard(self.path)

    def close(self) -> None:
        """Let it go."""
        os.close(self._fd)


class _CopyReading(Reading):
    def __init__(self, copy: Copy) -> None:
        self._copy = copy
        self._reading = FileReading(copy.path)

    def __iter__(self) -> Iterator[Step]:
        for step in self._reading:
            if isinstance(step.found, Ending) and step.found.damage is None:
                ending = dataclasses.replace(step.found, damage=self._copy.damage)
                step = step._replace(found=ending)
            yield step

    def close(self) -> None:
        """See Reading."""
        self._reading.close()


@contextlib.contextmanager
def fetched(url: SocketUrl, prefix: str, progress: Progress) -> Iterator[Copy | None]:
    """A copy of what the server keeps, whole; None where it speaks protocol 1 only.

    Its name is of ``prefix`` and the backup's id. At the end it is removed, but after an error it
    stays: the next call goes on with it.

    Args:
        prefix: how its path begins.
        progress: called with bytes fetched, and in all.

    Raises:
        Unreachable: the server, or for ``retry_for`` no whole record came.
        NoRoom: the disk has none for the copy.
        BackupError: the server broke a rule.
    """
    fetch = _Fetch(url, prefix, progress)
    try:
        copy = fetch.run()
        yield copy
        if copy is not None:
            copy.discard()
    except BaseException:
        if fetch.copy is not None and fetch.copy.last is not None:
            log.warning(
                f"What was fetched is kept as {fetch.copy.path}: the same command goes on with it."
            )
        elif fetch.copy is not None:
            fetch.copy.discard()
        raise
    finally:
        if fetch.copy is not None:
            fetch.copy.close()


class _Fetch:
    """See fetched.

    Attributes:
        copy: once the server said what it keeps.
    """

    def __init__(self, url: SocketUrl, prefix: str, progress: Progress) -> None:
        self._url = url
        self._prefix = prefix
        self._progress = progress
        self._patience = Patience(url)
        self.copy: Copy | None = None

    def run(self) -> Copy | None:
        """The whole copy, over as many connections as it takes."""
        while True:
            try:
                return self._over_one_line()
            except OSError as error:
                pause_s = None if self.copy is None else self._patience.pause()
                if pause_s is None:
                    raise Unreachable(self._url.target, error) from error
                log.warning(f"The line broke ({error}); next try in {pause_s:.1f} s")
            time.sleep(pause_s)

    def _over_one_line(self) -> Copy | None:
        with contextlib.closing(Link(self._url)) as link:
            link.still_s = self._patience.still_s
            expected = link.metadata()
            if expected.details is None:
                return None
            copy = self._copy_of(expected.details.backup_id)
            try:
                self._receive(link, copy)
            except Refused as error:
                if error.code is not NackCode.NO_SUCH_PLACE:
                    copy.damage = error
                    return self._finished(copy, expected)
                log.info(f"Fetching begins anew: {error.problem}")
                copy.start_over()
                self._receive(link, copy)
            return self._finished(copy, expected)

    def _copy_of(self, backup_id: bytes) -> Copy:
        path = f"{self._prefix}{backup_id.hex()}{SUFFIX}"
        if self.copy is not None and self.copy.path != path:
            self.copy.discard()  # Another backup is served there now.
            self.copy.close()
            self.copy = None
        self.copy = self.copy or Copy(path)
        return self.copy

    def _receive(self, link: Link, copy: Copy) -> None:
        received = Received(link, copy.last, copy.begin)
        for head, payload in received:
            copy.add(head, payload)
            self._patience.came_on()
            self._progress(head.end, received.total)

    def _finished(self, copy: Copy, expected: Metadata) -> Copy:
        version = copy.last.version if copy.last is not None else 0
        copy.damage = copy.damage or falls_short(version, expected, self._url.target)
        copy.finish()
        return copy

"""Every file operation that must survive a loss of power.

Nothing else in the project writes to a backup. A function that returns has put its
data on stable storage; one that raises OSError has promised nothing, and what the file
then shows must not be believed: the kernel may have dropped the dirty pages.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import filecmp
import os
import signal
import stat
import sys
import time
from collections.abc import Iterator
from typing import BinaryIO

from errors import BackupBusy, DiskError

_FULL_SYNC: int | None = getattr(fcntl, "F_FULLFSYNC", None)
PREALLOCATE_STEP = 1 << 20
"""Bytes written as zeros ahead of the log's end, so that an append moves no extent."""
COPY_SIZE = 1 << 20
"""Bytes moved at once when a file is copied."""
FREE_STEP = 8 << 20
"""Bytes of a large file given back at once, and the pause before the next ones."""
FREE_PAUSE_S = 0.005


def flush(fd: int) -> None:
    """Put the data of ``fd`` on stable storage, with F_FULLFSYNC where it exists."""
    if _FULL_SYNC is None:
        # Not fsync: this flushes the size, too, and leaves out only the times.
        os.fdatasync(fd)
    else:
        fcntl.fcntl(fd, _FULL_SYNC)


def forget(fd: int, end: int) -> None:
    """Let the page cache go of what was flushed of ``fd``, up to ``end``.

    What nobody reads soon would take the place of what somebody does; and where the system
    is slow to give new pages, as in a virtual machine, they can be had again.
    """
    if sys.platform == "linux":
        os.posix_fadvise(fd, 0, end, os.POSIX_FADV_DONTNEED)


def sync_dir(path: str) -> None:
    """Flush the directory ``path``: names created or renamed in it are then durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)  # Names are metadata, of which fdatasync may leave some out.
    finally:
        os.close(fd)


def write_all(fd: int, data: bytes | memoryview, offset: int) -> None:
    """Write all of ``data`` at ``offset``; a short write is continued, not believed."""
    while (written := os.pwrite(fd, data, offset)) < len(data):
        if written <= 0:
            raise OSError(errno.EIO, "the system wrote nothing")
        data, offset = memoryview(data)[written:], offset + written


class LogFile:
    """One open log: append durably. It is locked, so that a second writer is noticed.

    Args:
        path: an existing file. It is opened anew, so a descriptor that saw a failed
            flush is never used again.

    Raises:
        BlockingIOError: another process has it open as this does.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self._zero_to = 0
        """Up to here the file has been seen to be zero behind its records, or was made so."""
        self.fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            fcntl.flock(self.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            found = os.fstat(self.fd)
            self._inode = found.st_dev, found.st_ino
        except BaseException:
            self.close()
            raise

    def append(self, offset: int, data: bytes) -> None:
        """Write ``data`` at ``offset`` and flush; zeros are there behind it before it is."""
        end = offset + len(data)
        # Not >: without a zero byte behind it the log would look cut off.
        if end >= self._zero_to:
            self._zero_ahead(end)
        write_all(self.fd, data, offset)
        flush(self.fd)
        # A log that was moved or replaced takes every write, and nobody finds them again.
        place = os.stat(self.path)
        if (place.st_dev, place.st_ino) != self._inode:
            raise OSError(errno.ESTALE, "another file stands in its place")

    def _zero_ahead(self, end: int) -> None:
        target = (end // PREALLOCATE_STEP + 1) * PREALLOCATE_STEP
        write_all(self.fd, bytes(target - end), end)
        # Before the record: a file that ends inside one, or behind one, was cut off.
        flush(self.fd)
        self._zero_to = target

    def copy_tail(self, offset: int, aside: str) -> str:
        """Copy what stands from ``offset`` on to a new file, durably.

        Args:
            aside: its name, to which a number is added where it is taken.

        Returns:
            The name. Where the same was copied before, but not cut, that copy's.
        """
        beside = f"{self.path}.scratch-torn"
        discard(beside)
        size = os.fstat(self.fd).st_size
        copy = create(beside, like=self.path)
        try:
            for start in range(offset, size, COPY_SIZE):
                write_all(copy, os.pread(self.fd, COPY_SIZE, start), start - offset)
            flush(copy)
        finally:
            os.close(copy)
        name = free_name(aside, same_as=beside)
        if os.path.lexists(name):
            discard(beside)
        else:
            publish(beside, name)
        return name

    def rewrite(self, offset: int, data: bytes) -> None:
        """Write ``data`` at ``offset``, and zeros from there to the end of the file; flush."""
        size = os.fstat(self.fd).st_size
        for start in range(offset + len(data), size, COPY_SIZE):
            write_all(self.fd, bytes(min(COPY_SIZE, size - start)), start)
        self.append(offset, data)

    def close(self) -> None:
        """Close the descriptor; everything acknowledged was flushed before."""
        fd, self.fd = self.fd, -1
        with contextlib.suppress(OSError):  # A disk that failed may fail here again.
            os.close(fd)


def create(path: str, like: str | None = None) -> int:
    """Create ``path``, which must not exist, readable by its owner only; its descriptor.

    What root creates belongs to the owner of ``like``, who must be able to use it.

    Args:
        like: a file that the new one will replace, which gives its mode, too; or a
            directory. By default, and if it is not there, the directory of ``path``.
    """
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        _take_after(fd, path, like)
    except BaseException:
        os.close(fd)
        discard(path)
        raise
    return fd


def _take_after(fd: int, path: str, like: str | None) -> None:
    """Give the new file ``fd``, at ``path``, the owner and the mode that ``create`` promises."""
    model = like if like is not None and os.path.exists(like) else os.path.dirname(path)
    found = os.stat(model)
    is_file, group_kept = stat.S_ISREG(found.st_mode), True
    if os.geteuid() == 0:
        give(fd, found)
    elif is_file and os.stat(fd).st_gid != found.st_gid:
        try:
            os.chown(fd, -1, found.st_gid)
        except OSError:  # Not a group of this user.
            group_kept = False
    mode = stat.S_IMODE(found.st_mode) & (0o777 if group_kept else 0o707) | 0o600
    if is_file and stat.S_IMODE(os.stat(fd).st_mode) != mode:
        os.chmod(fd, mode)


def give(fd: int, found: os.stat_result) -> None:
    """As root, make the owner of what ``found`` describes the owner of ``fd``, too.

    What is in a directory of root's, such as the top of a disk, stays root's.
    """
    own = os.stat(fd)
    wanted = found.st_uid, found.st_gid
    if (own.st_uid, own.st_gid) != wanted and (found.st_uid or stat.S_ISREG(found.st_mode)):
        os.chown(fd, *wanted)


def free_name(path: str, same_as: str | None = None) -> str:
    """``path``, or with a number behind it the first name that is not taken.

    Args:
        same_as: a file; a name that is taken by one of the same content will do.
    """
    candidate, number = path, 1
    while os.path.lexists(candidate):
        if same_as is not None and _is_same(candidate, same_as):
            break
        number += 1
        candidate = f"{path}-{number}"
    return candidate


def _is_same(path: str, other: str) -> bool:
    return os.path.isfile(path) and filecmp.cmp(path, other, shallow=False)


def remove(path: str) -> None:
    """Remove ``path`` if it is there."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)


def discard(path: str) -> None:
    """Remove the scratch file ``path``, as far as the disk still lets us.

    What stays is removed by the next open. A failure here must not hide another one.
    """
    with contextlib.suppress(OSError):
        os.unlink(path)


def discard_gently(path: str) -> None:
    """``discard`` for a large file beside a log in use.

    Much space given back at once makes every flush on that disk wait: 60 ms were seen for
    512 MiB on ext4.
    """
    with contextlib.suppress(OSError):
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            os.unlink(path)
            if os.fstat(fd).st_nlink == 0:  # Whatever went wrong, it may be the log by now.
                _give_back(fd)
        finally:
            os.close(fd)
    discard(path)


@contextlib.contextmanager
def giving_back(path: str) -> Iterator[None]:
    """Hold the file at ``path`` while another takes its place, then give it back gently.

    Only if it has no name any more, and nobody else has it open to read it to its end.

    Raises:
        DiskError: it cannot be opened.
    """
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise DiskError(path, error, "open") from error
    try:
        yield
        with contextlib.suppress(OSError):  # Closing it does the rest, if all at once.
            if os.fstat(fd).st_nlink == 0 and hasattr(fcntl, "F_SETLEASE"):
                # Who opens it from now on, through /proc say, waits: this process would be told
                # by SIGIO, which ends it, so choose a signal that does nothing.
                fcntl.fcntl(fd, fcntl.F_SETSIG, signal.SIGURG)
                fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_WRLCK)  # Fails if it is open elsewhere.
                _give_back(fd)
    finally:
        os.close(fd)


def _give_back(fd: int) -> None:
    size = os.fstat(fd).st_size
    while size > 0:
        size = (size - 1) // FREE_STEP * FREE_STEP
        os.ftruncate(fd, size)
        time.sleep(FREE_PAUSE_S)


def flush_file(file: BinaryIO) -> None:
    """Flush Python's buffer of ``file``, then the system's."""
    file.flush()
    flush(file.fileno())


def publish(beside: str, path: str) -> None:
    """Give the complete, flushed file ``beside`` the name ``path``, never replacing one.

    Raises:
        FileExistsError: ``path`` is taken.
        OSError: it failed, and ``path`` is not there.
    """
    _link(beside, path)
    try:
        remove(beside)
        sync_dir(os.path.dirname(path))
    except OSError:
        remove(path)  # It may not outlive a loss of power, so it must not look done.
        raise


def replace(beside: str, path: str) -> None:
    """Put the complete, flushed file ``beside`` in the place of ``path``, atomically."""
    os.rename(beside, path)
    sync_dir(os.path.dirname(path))


def keep(path: str, kept: str) -> None:
    """Give the file at ``path`` the second name ``kept``, so that a replace spares it."""
    _link(path, kept)
    try:
        sync_dir(os.path.dirname(kept))
    except OSError:
        unkeep(path, kept)
        raise


def unkeep(path: str, kept: str) -> None:
    """Take ``keep`` back when no replace followed, as far as the disk still lets us."""
    with contextlib.suppress(OSError):  # The file has one of the names in any case.
        if os.path.lexists(path):
            os.unlink(kept)
        else:  # Without hard links, ``keep`` has renamed it.
            os.rename(kept, path)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError as error:
        if isinstance(error, FileExistsError) or os.path.lexists(target):
            raise FileExistsError(errno.EEXIST, "exists", target) from error
        # FAT and some network mounts have no hard links.
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK):
            raise
        os.rename(source, target)


def write_file(path: str, data: bytes, like: str | None = None) -> None:
    """Create the small file ``path`` with ``data``; never overwrites, never half there.

    Args:
        like: see create.
    """
    beside = prepare(path, data, like)
    try:
        publish(beside, path)
    except OSError:
        remove(beside)
        raise


def prepare(path: str, data: bytes, like: str | None = None) -> str:
    """Write what shall be the small file ``path`` beside it, for ``publish``; its name."""
    beside = f"{path}.new"
    remove(beside)
    try:
        with open(create(beside, like), "wb") as file:
            file.write(data)
            flush_file(file)
    except BaseException:
        discard(beside)
        raise
    return beside


class WriterLock:
    """The one writer of a backup, by an advisory lock on ``<path>.writer``.

    Raises:
        BackupBusy: another process holds it.
        DiskError: locks do not work on this file system.
    """

    # Lock a sidecar, not the log: compaction replaces the log's inode.
    def __init__(self, path: str, like: str | None = None) -> None:
        """Take the lock.

        Args:
            like: what the lock file's owner is taken from where there is no backup yet,
                see create.
        """
        sidecar = f"{path}.writer"
        try:
            self._fd = os.open(sidecar, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise DiskError(sidecar, error, "open the lock file") from error
        try:
            if os.geteuid() == 0:  # The node must be able to take it, too.
                models = (path, like, os.path.dirname(path))
                give(self._fd, os.stat(next(m for m in models if m and os.path.exists(m))))
        except OSError as error:
            os.close(self._fd)
            raise DiskError(sidecar, error, "give away the lock file") from error
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.pread(self._fd, 20, 0).strip().decode("ascii", "replace")
            os.close(self._fd)
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                raise BackupBusy(path, f" (pid {holder})" if holder else "") from error
            raise DiskError(sidecar, error, "lock (locks must work there)") from error
        with contextlib.suppress(OSError):  # The pid only makes the refusal clearer.
            os.ftruncate(self._fd, 0)
            os.pwrite(self._fd, b"%d\n" % os.getpid(), 0)

    def release(self) -> None:
        """Let the next writer in."""
        # The file stays: who has just opened this one, and who made a new one, would both write.
        os.close(self._fd)

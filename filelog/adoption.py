"""A compacted log takes the place of the log in use, while whoever appends to that waits."""

from __future__ import annotations

import contextlib
import os

import durable
from errors import BackupError, DiskError
from filelog import layout2
from filelog.appender import LogAppender
from filelog.layout2 import Head
from filelog.reader import LogReader


def adopt(log: LogAppender, path: str, copied: int, last: int) -> LogAppender:
    """The log ``path``, open in place of ``log``, which is closed then.

    What was appended since is copied to it first. Nobody may append meanwhile.

    Args:
        log: stays as it is, and in use, if this raises.
        path: a complete, verified log, beside that one.
        copied: offset in ``log`` of the last record that ``path`` stands for.
        last: offset of that record's counterpart in ``path``.

    Raises:
        BackupError: the two do not agree, or a file could not be written or renamed. Where
            the directory could not be flushed, ``log`` takes no more changes: which of the
            two a loss of power would leave is not known.
    """
    try:
        new = _completed(log, path, copied, last)
    except OSError as error:
        raise DiskError(path, error, "write") from error
    try:
        durable.replace(path, log.path)
    except OSError as error:
        new.close()
        failure = DiskError(log.path, error, "replace")
        if not os.path.exists(path):  # Renamed, but that may not outlive a loss of power.
            log.fail(failure)
        raise failure from error
    log.close()
    new.file.path = log.path  # Where an append looks for it from now on.
    return new


def _completed(log: LogAppender, path: str, copied: int, last: int) -> LogAppender:
    with contextlib.closing(LogReader(log.path)) as old:
        with contextlib.closing(LogReader(path)) as new:
            head, counterpart = old.head_at(copied), new.head_at(last)
            log_start = new.log_start
        assert log_start is not None
        if (head.chain, head.sequence) != (counterpart.chain, counterpart.sequence):
            raise BackupError(f"{path} does not stand for the same history as {log.path}.")
        old.start_after(head)
        file = durable.LogFile(path)
        try:
            newest = _copy(old, file, counterpart)
            # What is in memory decides, not only what is read: a log that was cut ends early.
            if newest.chain != log.newest.chain or old.damage is not None:
                raise BackupError(f"{path} does not end like {log.path}.")
        except BaseException:
            file.close()
            raise
        return LogAppender(file, newest, log_start)


def _copy(records: LogReader, file: durable.LogFile, newest: Head) -> Head:
    """Append ``records`` behind ``newest``, flushed; the last of them."""
    # In one append, if catch_up has left little, as it should: a change waits.
    data = bytearray()
    for head, payload in records:
        newest = layout2.moved(head, newest)
        data += layout2.encode(newest, payload)
        if len(data) >= durable.COPY_SIZE:
            file.append(newest.end - len(data), bytes(data))
            data.clear()
    # Even of nothing: that flushes.
    file.append(newest.end - len(data), bytes(data))
    return newest

"""Every failure this project reports, as one tree.

    BackupError                a refusal or failure an operator must read (exit code 1)
    ├── InvalidChange          a db_write call that cannot be stored
    ├── ConfigError            backup.lock, a URL or a directory is not usable
    │   └── NoPsycopg          a package for PostgreSQL is missing
    ├── BackupMissing          there is no backup at the URL
    ├── BackupExists           something is in the way of a new file
    ├── BackupBusy             another process holds the backup
    ├── UnsupportedLayout      a file of another layout
    ├── OtherOwner             another node may write to the backup, and this one may not
    ├── Damaged                stored bytes do not check
    ├── PlaceGone              the backup does not hold the record that was to be gone on from
    ├── Unsound                a check found that a backup does not hold
    ├── CheckRunning           another process checks the backup
    ├── DiskError              the operating system could not store or read
    ├── OutOfDate              the node is ahead of the backup
    ├── LostState              the backup is ahead of the node
    └── DatabaseError          SQLite could not read, replay or copy a database
        └── DoesNotReplay      a change cannot be executed

``str(error)`` is one plain line: what happened, then what to do next.
"""

from __future__ import annotations

import errno
import os
import pwd
import re
import shlex
from collections.abc import Sequence

_HERE = os.path.dirname(os.path.realpath(__file__))
_BY_PIP = _HERE.endswith("/cln_backup/program")
CLI_PATH = os.path.join(_HERE, "backup-cli")
"""Path of the command line tool, for a Python that has the packages."""


def typed(installed: str, program: str) -> str:
    """What an operator runs: the command ``installed`` by pip, or ``program`` of a checkout.

    pip puts this file into PREFIX/lib/pythonX.Y/site-packages/cln_backup/program, and the
    commands into PREFIX/bin. The programs' own first lines may find a Python without packages.
    """
    command = os.path.normpath(os.path.join(_HERE, "../../../../../bin", installed))
    return command if _BY_PIP and os.path.exists(command) else os.path.join(_HERE, program)


CLI = shlex.quote(typed("backup-cli", "backup-cli"))
"""The command line tool in a line for a shell, for messages that name the next command."""
PLUGIN = typed("cln-backup-plugin", "backup.py")
"""The plugin, for lightningd's configuration."""
OWN_STATE = (
    "If this node's own database is its latest state, somebody else has written to the backup, or"
    f" exchanged it: stop the node and run `{CLI} resync --override --lightning-dir DIR`; the old"
    " backup is kept."
)
"""How to go on where the backup may be a stranger's."""
_STAY_OFF = (
    "Where another machine took over, that one is the node now, and this one must stay off: two"
    " nodes with the same keys lose the channels' funds. Only if the other one never ran, and never"
    f" will: with this lightningd stopped run `{CLI} attach --lightning-dir DIR"
)


def stay_off(url: str = "URL") -> str:
    """What a node is to do that is not the owner of the backup at ``url`` any more."""
    return f"{_STAY_OFF} {url}`. Where nobody of yours took over: docs/errors.md, Another node."


OLD_COPY = "If the node's database is an old copy, move it away and run"
_UNPRINTABLE = re.compile("[\x00-\x08\x0a-\x1f\x7f-\x9f\u2028\u2029]+")
"""Line breaks, and what a terminal would obey: messages quote what comes out of a backup."""


def printable(text: str) -> str:
    """``text`` of somebody else in one line, without what a terminal would obey."""
    return _UNPRINTABLE.sub(" ", text).strip()


class BackupError(Exception):
    """Root of the tree.

    Args:
        problem: what is wrong, a plain sentence without a newline.
        next_step: what the operator should do now, or nothing.
    """

    exit_code = 1

    def __init__(self, problem: str, next_step: str = "") -> None:
        # Not blanks: a path may have several.
        self.problem = printable(problem)
        self.next_step = printable(next_step)
        super().__init__(f"{self.problem} {self.next_step}".strip())


class InvalidChange(BackupError):
    """A db_write call that breaks a rule of the hook or a limit."""


class ConfigError(BackupError):
    """A URL, a directory or a backup.lock that cannot be used."""


class NoPsycopg(ConfigError):
    """A URL of PostgreSQL, and not the package for that: nobody else needs it."""

    def __init__(self, error: ImportError) -> None:
        command = f"make -C {shlex.quote(_HERE)} install POSTGRES=1"
        if _BY_PIP:
            python = shlex.quote(typed("python", ""))
            command = f"{python} -m pip install 'psycopg[binary]'"
        super().__init__(
            f"PostgreSQL needs the package psycopg, which is not here: {error}.",
            f"Run `{command}`.",
        )


class BackupMissing(BackupError):
    """No backup at ``url``."""

    def __init__(self, url: str) -> None:
        self.url = url
        super().__init__(
            f"There is no backup at {url}.",
            "Check the URL, and that its disk is mounted. If the backup was moved, run"
            f" `{CLI} attach --lightning-dir DIR URL`. If it is lost, and the node's database is"
            f" not, move backup.lock away and run `{CLI} init --lightning-dir DIR URL`.",
        )


class BackupExists(BackupError):
    """``path`` exists and would have to be overwritten."""

    def __init__(self, path: str, next_step: str = "") -> None:
        self.path = path
        super().__init__(f"{path} exists already and is never overwritten.", next_step)


class BackupBusy(BackupError):
    """Another process holds the writer lock of ``path``."""

    def __init__(self, path: str, holder: str) -> None:
        self.path = path
        self.holder = holder
        super().__init__(
            f"Another process{holder} holds the backup {path}.",
            "Stop that lightningd or server first, then try again.",
        )


class UnsupportedLayout(BackupError):
    """``path`` is of a layout that cannot be written, or no backup at all."""

    def __init__(self, path: str, found: str, next_step: str) -> None:
        self.path = path
        self.found = found
        super().__init__(f"{path} is {found}.", next_step)


class OtherOwner(BackupError):
    """The backup at ``url`` is another node's: it was taken over, or it is not the one meant.

    Args:
        taken: when and by which machine, in words, or "" if no node has claimed it.
    """

    def __init__(self, url: str, taken: str) -> None:
        self.url = url
        self.taken = taken
        problem = f"The backup {url} belongs to another node: {taken}."
        next_step = stay_off(shlex.quote(url))
        if not taken:
            problem = f"The backup {url} is not the one that this node wrote: it is nobody's."
            next_step = (
                "Never run two nodes with the same keys. If it is right that this node goes on"
                " with it, and no other does, run"
                f" `{CLI} attach --lightning-dir DIR {shlex.quote(url)}`."
            )
        super().__init__(problem, next_step)


class Damaged(BackupError):
    """Bytes in ``path`` at ``offset`` do not check.

    Attributes:
        last_good: data_version of the last change before the damage.
        lost: what is known of the versions behind it, in words.
        newest: the newest version seen behind it, or None.
    """

    def __init__(
        self,
        path: str,
        offset: int,
        reason: str,
        last_good: int,
        lost: str,
        newest: int | None = None,
    ) -> None:
        self.path = path
        self.offset = offset
        self.reason = reason
        self.last_good = last_good
        self.lost = lost
        self.newest = newest
        before = f"{CLI} restore --allow-damaged URL DEST"
        if not last_good:  # Nothing stands before it.
            before = f"{CLI} salvage FILE OUTDIR"
        super().__init__(
            f"The backup {path} is damaged at offset {offset}: {reason};"
            f" it is good up to version {last_good}, {lost}.",
            f"With the node's own database intact, stop the node and run `{CLI} resync"
            f" --lightning-dir DIR`. If it is lost, run `{before}`.",
        )


class PlaceGone(BackupError):
    """The backup at ``where`` does not hold the record from which somebody wants to go on.

    Args:
        version: data_version of that record.
    """

    def __init__(self, where: str, version: int) -> None:
        self.where = where
        super().__init__(
            f"What stood at version {version} is not in the log of {where} any more: a compaction"
            " or a resync took it away.",
            "Begin again with all of the backup.",
        )


class Unsound(BackupError):
    """The backup does not hold: it is damaged, or does not lead to a sound database."""


class CheckRunning(BackupError):
    """Somebody else checks the backup ``path``."""

    def __init__(self, path: str) -> None:
        self.path = path
        super().__init__(f"Another check of {path} is running.", "Wait for it to end.")


class DiskError(BackupError):
    """A system call on ``path`` failed; ``errno`` says how."""

    def __init__(self, path: str, error: OSError, doing: str) -> None:
        self.path = path
        self.errno = error.errno
        super().__init__(
            f"Could not {doing} {path}: {error.strerror or error}.", _after(error.errno, path)
        )


def _after(number: int | None, path: str) -> str:
    """What to do after a system call on ``path`` failed with ``number``."""
    shown = shlex.quote(path)
    match number:
        case errno.EACCES | errno.EPERM:
            return (
                f"This ran as {_user()}: run it as the node's user, or look with `namei -l"
                f" {shown}` who may."
            )
        case errno.EROFS:
            return "Its disk is mounted read-only: look into the kernel log why, and mount it anew."
        case errno.ENOSPC | errno.EDQUOT:
            return f"Make room on that disk: `df -h {shlex.quote(os.path.dirname(path) or '.')}`."
        case errno.EFBIG:
            return "That file system or a limit (`ulimit -f`) lets no file grow so large."
        case errno.EMFILE | errno.ENFILE | errno.ENOMEM:
            return "The system has run out of something that other programs hold; then try again."
        case errno.ENOENT | errno.ENOTDIR | errno.EISDIR | errno.ELOOP | errno.ENAMETOOLONG:
            return "Check the path."
    return "Check that disk (free space, cable, mount, kernel log) before going on."


def _user() -> str:
    number = os.geteuid()
    try:
        return f"user {pwd.getpwuid(number).pw_name}"
    except KeyError:
        return f"user {number}"


class OutOfDate(BackupError):
    """The node's version is above the backup's: it wrote without the plugin.

    Args:
        why_not: why that was not healed, a sentence, or "" if it was not tried.
    """

    def __init__(
        self, backup_version: int, node_version: int, lightning_dir: str, why_not: str = ""
    ) -> None:
        self.backup_version = backup_version
        self.node_version = node_version
        because = f" It could not be healed: {why_not}" if why_not else ""
        super().__init__(
            f"Backup is out of date: the node is ahead. The node is at version"
            f" {node_version}, the backup at version {backup_version}, so the node has"
            f" run without it.{because}",
            f"With the node stopped run `{CLI} resync --lightning-dir"
            f" {shlex.quote(lightning_dir)}`.",
        )


class LostState(BackupError):
    """The backup's version is above the node's, by more than a rewind can explain.

    Args:
        last_writer: who wrote the backup last, as far as known.
    """

    def __init__(
        self, backup_version: int, node_version: int, url: str, last_writer: str = ""
    ) -> None:
        self.backup_version = backup_version
        self.node_version = node_version
        super().__init__(
            f"lightningd seems to have lost some state: the backup is ahead. The node is at"
            f" version {node_version}, the backup at version {backup_version}"
            f"{f', last written by {last_writer}' if last_writer else ''}. Do not run the node"
            " before you know why.",
            f"{OLD_COPY} `{CLI} restore {shlex.quote(url)} DEST`. {OWN_STATE}",
        )


class DatabaseError(BackupError):
    """SQLite refused to read, copy or replay; ``path`` names the database."""

    def __init__(self, path: str, reason: str, next_step: str = "") -> None:
        self.path = path
        super().__init__(f"{path}: {reason}.", next_step)


class DoesNotReplay(DatabaseError):
    """A change that SQLite refuses, that tries what no node does, or that does not end.

    Attributes:
        version: the data_version that it leads to.
        base: the one before it, which ``restore --up-to`` still reaches.
    """

    def __init__(self, path: str, version: int, base: int, reason: str, statement: str) -> None:
        self.version = version
        self.base = base
        super().__init__(
            path,
            f"the change to version {version} does not replay: {reason}, in {statement[:100]!r}",
            self.way_out(["URL"], "DEST"),
        )

    def way_out(self, urls: Sequence[str], dest: str) -> str:
        """The command that restores what stands before the change, from ``urls`` to ``dest``."""
        words = [CLI, "restore", "--up-to", str(self.base), *urls, dest]
        return f"What stands before it: `{shlex.join(words)}`." if self.base else ""

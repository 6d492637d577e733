#!/usr/bin/env python3
"""The plugin: streams every commit of lightningd into a backup before it happens.

Start it with ``lightningd --important-plugin=/path/to/backup.py``. It answers the hook
``db_write`` with ``continue`` only when the backup has the change on stable storage, and
otherwise fails the hook, upon which lightningd aborts without committing.
"""

from __future__ import annotations

try:
    import environment
except ModuleNotFoundError:  # A copy of this file, without the others.
    raise SystemExit(f"{__file__} is not beside its modules: link to it, don't copy it.") from None

environment.ensure("pyln.client")

import json  # noqa: E402
import logging  # noqa: E402
import os  # noqa: E402
import re  # noqa: E402
import signal  # noqa: E402
import statistics  # noqa: E402
import subprocess  # noqa: E402
import sys  # noqa: E402
import threading  # noqa: E402
import time  # noqa: E402
import traceback  # noqa: E402
from collections import deque  # noqa: E402
from collections.abc import Callable  # noqa: E402
from typing import Any  # noqa: E402

from pyln.client import Plugin  # noqa: E402
from pyln.client.plugin import Request, RpcException  # noqa: E402

import destinations  # noqa: E402
from backend import Backend, Change, Destination, Session, log, too_large  # noqa: E402
from errors import (  # noqa: E402
    CLI,
    CLI_PATH,
    BackupBusy,
    BackupError,
    InvalidChange,
    LostState,
    OutOfDate,
)
from healing import Healer  # noqa: E402
from monitoring import fields, metrics  # noqa: E402
from pylnclient import serve_db_write  # noqa: E402
from upkeep import compaction  # noqa: E402
from wallet import node  # noqa: E402

FIRST_NOTICE_S = 5.0
"""A hook that takes longer is announced, and again each time the wait has doubled."""
BUSY_FOR_S = 30.0
"""The longest wait at a start for another process that holds the backup."""
LEAVE_AFTER_S = 20.0
"""The longest stay after ``shutdown``; lightningd kills plugins after 30 s."""
LEAVE_BLIND_AFTER_S = 2.0
"""The stay where the system does not list lightningd's children."""
ALONE_FOR_S = 0.5
"""How long this must have been the last plugin, without a hook, before it leaves."""
POLL_S = 0.05
KEPT_DURATIONS = 10_000
"""Hook times of which backup-status gives the median."""
METRICS_EVERY_S = 60.0


class LogHandler(logging.Handler):
    """Log records of the project as lines of lightningd's log."""

    def __init__(self, plugin: Plugin) -> None:
        super().__init__()
        self._plugin = plugin

    def emit(self, record: logging.LogRecord) -> None:
        """Send one line; lightningd calls WARNING ``warn``."""
        level = "warn" if record.levelno == logging.WARNING else record.levelname.lower()
        # A path that is no UTF-8 would make pyln-client raise.
        text = record.getMessage().encode(errors="backslashreplace").decode()
        self._plugin.log(text, level=level)


class Hook:
    """Serves db_write. One thread calls it, in order."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.calls = 0
        self.durations_s: deque[float] = deque(maxlen=KEPT_DURATIONS)
        self.worst_s = 0.0
        self.backend: Destination | None = None
        self._session: Session | None = None
        self._healer: Healer | None = None
        self._refusal: Exception | None = None
        self._busy_since: float | None = None
        self._medium = "the backup to open"

    def take(self, writes: Any, data_version: Any) -> None:
        """Store one commit. Raising makes lightningd abort without committing.

        Args:
            writes: its statements, a list of strings, or whatever came in its place.
            data_version: the version after it, or whatever came in its place.
        """
        with self.lock:
            self.calls += 1
            began = self._busy_since = time.monotonic()
            try:
                self._write(data_version, writes)
                self._measure(time.monotonic() - began)
            except MemoryError as error:
                refusal = too_large("The memory does not suffice for a change this large.")
                self._refuse(refusal)
                raise refusal from error
            except Exception as error:
                self._refuse(error)
                raise
            finally:
                self._busy_since = None

    def _refuse(self, error: Exception) -> None:
        # Whatever went wrong, what the backup holds now is not known to fit.
        self._refusal = error
        if isinstance(error, BackupError):
            log.error(str(error))
        else:
            log.error(f"Internal error: {error!r}")
            log.info(traceback.format_exc())

    def _measure(self, duration_s: float) -> None:
        self.durations_s.append(duration_s)
        self.worst_s = max(self.worst_s, duration_s)

    def statistics(self) -> dict[str, object]:
        """How the hook has done since the plugin started; times in milliseconds."""
        durations_s = list(self.durations_s)
        median_s, p99_s = _percentiles(durations_s)
        return {
            "changes_this_session": self.calls,
            "median_hook_ms": round(1000 * median_s, 3),
            "p99_hook_ms": round(1000 * p99_s, 3),
            "worst_hook_ms": round(1000 * self.worst_s, 3),
            "reconnects": self.backend.reconnects if self.backend else 0,
            "last_error": str(self._refusal) if self._refusal else None,
        }

    def _write(self, data_version: Any, writes: Any) -> None:
        if self._refusal is not None:
            raise self._refusal
        if writes is None:
            raise InvalidChange("lightningd announced a change without a list of statements.")
        change = Change(data_version, None, writes)
        if self._session is None:
            # Not before the first write: lightningd also starts plugins for --help.
            return self._begin(change)
        assert self._healer is not None
        self._healer.mend(change, first=False)
        self._session.write(change)

    def _begin(self, change: Change) -> None:
        """Open the backup and store the first change."""
        threading.Thread(target=self._announce_waits, daemon=True).start()
        directory = os.getcwd()
        lock_file = node.read_lock_file(directory)
        least = compaction.parse_least(lock_file.compact)
        backend = destinations.destination_of(lock_file)
        _open_patiently(backend, lock_file.owner)
        self._medium = backend.medium
        session, healer = Session(backend, directory), Healer(backend, directory, lock_file)
        healer.mend(change, first=True)
        try:
            session.write(change)
        except (LostState, OutOfDate) as error:
            healer.catch_up(change, error)
            session.write(change)
        # Not earlier: a check of what is healed just now would be for nothing.
        backend.keep_house(self.lock, least)
        self.backend, self._session, self._healer = backend, session, healer
        if lock_file.metrics is not None:
            writes = threading.Thread(
                target=keep_metrics, args=(self, lock_file.metrics), daemon=True
            )
            writes.start()

    def _announce_waits(self) -> None:
        notice_s = FIRST_NOTICE_S
        while True:
            time.sleep(1)
            since = self._busy_since
            if since is None:
                notice_s = FIRST_NOTICE_S
            elif time.monotonic() - since >= notice_s:
                log.warning(f"waiting for {self._medium} for {time.monotonic() - since:.0f} s")
                notice_s *= 2


def _percentiles(values: list[float]) -> tuple[float, float]:
    """What 50 and 99 percent of ``values`` do not exceed."""
    if len(values) < 2:
        return sum(values), sum(values)
    cuts = statistics.quantiles(values, n=100, method="inclusive")
    return cuts[49], cuts[98]


def _open_patiently(backend: Backend, owner: bytes) -> None:
    """Open ``backend``; who holds it may be about to end: a compaction, the node before."""
    deadline_s, said = time.monotonic() + BUSY_FOR_S, False
    while True:
        try:
            return backend.open(owner)
        except BackupBusy as error:
            if time.monotonic() >= deadline_s:
                raise
            if not said:
                log.warning(f"{error.problem} Waiting up to {BUSY_FOR_S:.0f} s for its end.")
                said = True
        time.sleep(POLL_S)


def compact(hook: Hook, request: Request) -> dict[str, Any]:
    """What ``lightning-cli backup-compact`` does and returns."""
    if hook.backend is None:
        raise BackupError("The backup is not open yet: the node has written nothing.")
    return hook.backend.compact(lambda done, of: request.progress(done, of))


def status(hook: Hook) -> fields.Fields:
    """What ``lightning-cli backup-status`` returns."""
    return look(hook)[0]


def look(hook: Hook) -> tuple[fields.Fields, int]:
    """What ``backup-cli status`` finds, with its exit code, and what the hook knows besides."""
    if hook.backend is None:
        return hook.statistics(), 0
    # Reading the whole log in this process would make the hook wait for its turn.
    command = [sys.executable, CLI_PATH, "status", "--json", "--lightning-dir", os.getcwd()]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    try:
        found: fields.Fields = json.loads(done.stdout)
    except ValueError as error:
        raise BackupError(f"{CLI} status failed: {done.stderr}") from error
    found = fields.with_members(found, hook.backend.members())
    return found | hook.statistics(), done.returncode


def keep_metrics(hook: Hook, path: str) -> None:
    """Write the figures to the file ``path`` each minute, for as long as this runs."""
    told = ""
    while True:
        try:
            found, exit_code = look(hook)
            metrics.write(path, metrics.render(found, exit_code, time.time()))
            told = ""
        except (BackupError, OSError) as error:  # Also if there is no memory for a process.
            if str(error) != told:
                told = str(error)
                log.warning(f"No metrics: {told}")
        time.sleep(METRICS_EVERY_S)


def answer_later(request: Request, work: Callable[[], dict[str, Any]]) -> None:
    """Answer ``request`` with what ``work`` returns, from another thread."""

    def run() -> None:
        try:
            request.set_result(work())
        except Exception as error:
            request.set_exception(RpcException(str(error)))

    threading.Thread(target=run, daemon=True).start()


def other_plugins() -> list[int] | None:
    """Process ids of lightningd's other plugins that still run, or None if unknown."""
    own, parent = os.getpid(), os.getppid()
    while _is_wrapper(parent):
        own, parent = parent, _parent_of(parent)
    try:
        with open(f"/proc/{parent}/task/{parent}/children") as file:
            children = [int(pid) for pid in file.read().split()]
    except OSError:
        return None
    return [pid for pid in children if pid != own and _is_plugin(pid)]


def _is_wrapper(pid: int) -> bool:
    """Whether process ``pid`` stands between lightningd and this, as a script may do.

    lightningd sets LIGHTNINGD_PLUGIN for its plugins, and was not started with it itself.
    """
    try:
        with open(f"/proc/{pid}/comm") as name, open(f"/proc/{pid}/environ", "rb") as environment:
            is_lightningd = name.read() == "lightningd\n"
            return not is_lightningd and b"LIGHTNINGD_PLUGIN=1" in environment.read().split(b"\0")
    except OSError:  # Also that of another user: as lightningd may be, but not its plugins.
        return False


def _parent_of(pid: int) -> int:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return int(file.read().rpartition(")")[2].split()[1])
    except OSError:
        return 0


def _is_plugin(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            name, _, rest = file.read().partition("(")[2].rpartition(")")
    except OSError:
        return False
    # Subdaemons are named lightning_*d, cut to 15 characters; a zombie is gone.
    subdaemon = re.fullmatch(r"lightning_(\w*d|\w{5})", name)
    return subdaemon is None and rest.split()[0] != "Z"


def leave_last(hook: Hook) -> None:
    """Exit once no other plugin can make lightningd write its database any more."""
    started = alone_since = time.monotonic()
    calls = hook.calls
    while True:
        now = time.monotonic()
        others = other_plugins()
        if others or hook.calls != calls or hook.lock.locked():
            alone_since, calls = now, hook.calls
        limit_s = LEAVE_AFTER_S if others is not None else LEAVE_BLIND_AFTER_S
        if now - started > limit_s or (others == [] and now - alone_since > ALONE_FOR_S):
            with hook.lock:  # Finish the change in hand.
                os._exit(0)
        time.sleep(POLL_S)


def main() -> None:
    """Run under lightningd until it closes stdin."""
    os.umask(0o077)  # SQLite creates its files for everybody.
    # Ctrl-C in lightningd's terminal is for it: as a container's first process it stops in order.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Not dynamic: a stop and a start in mid-run would leave commits without a backup.
    plugin = Plugin(dynamic=False)
    logging.getLogger().handlers.clear()
    log.addHandler(LogHandler(plugin))
    log.setLevel(logging.INFO)
    hook = Hook()
    serve_db_write(plugin, hook.take)
    plugin.add_option("backup-destination", None, "Deprecated and ignored: see backup.lock.")

    @plugin.init()  # type: ignore[untyped-decorator]
    def init(options: dict[str, Any], **_: object) -> None:
        if options.get("backup-destination"):
            log.warning(
                "The `--backup-destination` option is deprecated and will be removed in future"
                " versions of the backup plugin. The destination is read from backup.lock."
            )

    @plugin.async_method("backup-compact")  # type: ignore[untyped-decorator]
    def backup_compact(request: Request, **_: object) -> None:
        """Make the backup small again; the node goes on meanwhile."""
        answer_later(request, lambda: compact(hook, request))

    @plugin.async_method("backup-status")  # type: ignore[untyped-decorator]
    def backup_status(request: Request, **_: object) -> None:
        """Check the backup and say what it holds."""
        answer_later(request, lambda: status(hook))

    @plugin.subscribe("shutdown")  # type: ignore[untyped-decorator]
    def on_shutdown(**_: object) -> None:
        # Handlers share one thread with the hook: return at once.
        threading.Thread(target=leave_last, args=(hook,), daemon=True).start()

    serve(plugin)


def serve(plugin: Plugin) -> None:
    """Serve lightningd until it closes stdin. What is no request ends the program: code 1."""
    try:
        plugin.run()
    except OSError:  # lightningd is gone: nobody reads.
        os._exit(1)
    except MemoryError:
        log.error(str(too_large("The memory does not suffice for what lightningd sent.")))
        sys.exit(1)
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"[:200]
        log.error(f"lightningd sent what is no request of its protocol ({reason}).")
        sys.exit(1)


if __name__ == "__main__":
    main()

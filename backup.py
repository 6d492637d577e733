#!/usr/bin/env python3
"""The plugin: streams every commit of lightningd into a backup before it happens.

Start it with ``lightningd --important-plugin=/path/to/backup.py``. It answers the hook
``db_write`` with ``continue`` only when the backup has the change on stable storage, and
otherwise fails the hook, upon which lightningd aborts without committing.
"""

from __future__ import annotations

import environment

environment.ensure("pyln.client")

import logging  # noqa: E402
import os  # noqa: E402
import threading  # noqa: E402
import time  # noqa: E402
from typing import Any  # noqa: E402

from pyln.client import Plugin  # noqa: E402

import destinations  # noqa: E402
import node  # noqa: E402
from backend import Backend, Change, Session, log  # noqa: E402
from errors import BackupError  # noqa: E402

FIRST_NOTICE_S = 5.0
"""A hook that takes longer is announced, and again each time the wait has doubled."""
LEAVE_AFTER_S = 20.0
"""The longest stay after ``shutdown``; lightningd kills plugins after 30 s."""
LEAVE_BLIND_AFTER_S = 2.0
"""The stay where the system does not list lightningd's children."""
ALONE_FOR_S = 0.5
"""How long this must have been the last plugin, without a hook, before it leaves."""
POLL_S = 0.05


class LogHandler(logging.Handler):
    """Log records of the project as lines of lightningd's log."""

    def __init__(self, plugin: Plugin) -> None:
        super().__init__()
        self._plugin = plugin

    def emit(self, record: logging.LogRecord) -> None:
        """Send one line; lightningd calls WARNING ``warn``."""
        level = "warn" if record.levelno == logging.WARNING else record.levelname.lower()
        self._plugin.log(record.getMessage(), level=level)


class Hook:
    """Serves db_write. One thread calls it, in order."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.calls = 0
        self._backend: Backend | None = None
        self._session: Session | None = None
        self._refusal: Exception | None = None
        self._busy_since: float | None = None

    def on_db_write(self, writes: list[str], data_version: int, **_: object) -> dict[str, str]:
        """Store one commit. Raising makes lightningd abort without committing."""
        with self.lock:
            self.calls += 1
            self._busy_since = time.monotonic()
            try:
                self._write(data_version, writes)
            except Exception as error:
                # Whatever went wrong, what the backup holds now is not known to fit.
                self._refusal = error
                known = isinstance(error, BackupError)
                log.error(str(error) if known else f"Internal error: {error!r}")
                raise
            finally:
                self._busy_since = None
        return {"result": "continue"}

    def _write(self, data_version: int, writes: list[str]) -> None:
        if self._refusal is not None:
            raise self._refusal
        change = Change(data_version, None, writes)
        if self._session is None:
            # Not before the first write: lightningd also starts plugins for --help.
            self._session = self._open()
        self._session.write(change)

    def _open(self) -> Session:
        threading.Thread(target=self._announce_waits, daemon=True).start()
        directory = os.getcwd()
        backend = destinations.backend_for(node.read_lock_file(directory).backend_url)
        backend.open()
        self._backend = backend
        return Session(backend, directory)

    def _announce_waits(self) -> None:
        notice_s = FIRST_NOTICE_S
        while True:
            time.sleep(1)
            since = self._busy_since
            if since is None:
                notice_s = FIRST_NOTICE_S
            elif time.monotonic() - since >= notice_s:
                medium = self._backend.medium if self._backend else "the backup to open"
                log.warning(f"waiting for {medium} for {time.monotonic() - since:.0f} s")
                notice_s *= 2


def other_plugins() -> list[int] | None:
    """Process ids of lightningd's other plugins that still run, or None if unknown."""
    parent = os.getppid()
    try:
        with open(f"/proc/{parent}/task/{parent}/children") as file:
            children = [int(pid) for pid in file.read().split()]
    except OSError:
        return None
    return [pid for pid in children if pid != os.getpid() and _is_plugin(pid)]


def _is_plugin(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            name, _, rest = file.read().partition("(")[2].rpartition(")")
    except OSError:
        return False
    # Subdaemons are named lightning_*d; a zombie is gone.
    return not name.startswith("lightning_") and rest.split()[0] != "Z"


def leave_last(hook: Hook) -> None:
    """Exit once no other plugin can make lightningd write its database any more."""
    started = alone_since = time.monotonic()
    calls = hook.calls
    while True:
        now = time.monotonic()
        others = other_plugins()
        if others or hook.calls != calls:
            alone_since, calls = now, hook.calls
        limit_s = LEAVE_AFTER_S if others is not None else LEAVE_BLIND_AFTER_S
        if now - started > limit_s or (others == [] and now - alone_since > ALONE_FOR_S):
            with hook.lock:  # Finish the change in hand.
                os._exit(0)
        time.sleep(POLL_S)


def main() -> None:
    """Run under lightningd until it closes stdin."""
    # Not dynamic: a stop and a start in mid-run would leave commits without a backup.
    plugin = Plugin(dynamic=False)
    logging.getLogger().handlers.clear()
    log.addHandler(LogHandler(plugin))
    log.setLevel(logging.INFO)
    hook = Hook()
    plugin.add_hook("db_write", hook.on_db_write)
    plugin.add_option("backup-destination", None, "Deprecated and ignored: see backup.lock.")

    @plugin.init()  # type: ignore[untyped-decorator]
    def init(options: dict[str, Any], **_: object) -> None:
        if options.get("backup-destination"):
            log.warning(
                "The `--backup-destination` option is deprecated and will be removed in future"
                " versions of the backup plugin. The destination is read from backup.lock."
            )

    @plugin.subscribe("shutdown")  # type: ignore[untyped-decorator]
    def on_shutdown(**_: object) -> None:
        # Handlers share one thread with the hook: return at once.
        threading.Thread(target=leave_last, args=(hook,), daemon=True).start()

    plugin.run()


if __name__ == "__main__":
    main()

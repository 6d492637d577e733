"""The proof of a standby's database: SQLite's own checks of all of it, in a process of its own.

That process reads the database as it is when it begins, beside the changes. Its one message:

    {"version": data_version, "problems": [text]}
"""

from __future__ import annotations

import sys
import threading
import time

from backend import log
from errors import BackupError
from standby.state import Proof
from upkeep import child
from upkeep.child import Child, Message
from wallet import database


class Prover:
    """Proves one database at a time, in another thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._child: Child | None = None
        self._thread: threading.Thread | None = None
        self._found: Proof | None = None
        self._is_stopped = False

    @property
    def is_running(self) -> bool:
        """Whether a proof has begun whose outcome nobody took."""
        return self._thread is not None

    def start(self, path: str, version: int) -> None:
        """Begin to prove the database ``path``, which has reached ``version``."""
        self._is_stopped = False
        self._thread = threading.Thread(target=self._run, args=(path, version), daemon=True)
        self._thread.start()

    def outcome(self) -> Proof | None:
        """What the proof found, once: None while it runs, or if there is none."""
        if self._thread is None or self._thread.is_alive():
            return None
        self._thread, found = None, self._found
        return found

    def stop(self) -> None:
        """End it: the database is another one from now on."""
        thread = self._thread
        with self._lock:
            self._is_stopped = True
            if self._child is not None:
                self._child.kill()
        if thread is not None:
            thread.join()
        self._thread = self._found = None

    def _run(self, path: str, version: int) -> None:
        try:
            found = self._prove(path, version)
        except BackupError as error:
            if self._is_stopped:
                return
            log.warning(f"The proof of {path} did not come to its end: {error}")
            found = Proof(time.time_ns(), version, failure=str(error))
        self._found = found

    def _prove(self, path: str, version: int) -> Proof:
        with Child("proving", __file__, path) as process:
            with self._lock:
                if self._is_stopped:
                    raise BackupError("The proof was stopped.")
                self._child = process
            try:
                message = next(process.messages())
            finally:
                with self._lock:
                    self._child = None
        reached, problems = message["version"], list(message["problems"])
        if reached < version:
            problems.append(f"its data_version is {reached}, and it was at {version} before")
        return Proof(time.time_ns(), reached, tuple(problems))


# What follows runs in the process of its own.


def _look(path: str) -> Message:
    return {"version": database.version_of(path), "problems": database.check(path)}


if __name__ == "__main__":
    child.run(sys.argv[1], f"{sys.argv[1]}.proof-", lambda: _look(sys.argv[1]))

"""From a URL to the Destination that serves it, with the work beside the node."""

from __future__ import annotations

import contextlib
import threading

from backend import Destination, Progress
from errors import ConfigError
from filebackend import FileBackend
from socketbackend import SocketBackend
from upkeep import upgrade
from upkeep.compaction import Compactor, Housekeeper


def backend_for(url: str) -> Destination:
    """The Destination of ``url``, not open yet; ConfigError for a URL of no known form."""
    if url.startswith("file:"):
        return FileDestination(url)
    if url.startswith("socket:"):
        return SocketBackend(url)
    raise ConfigError(
        f"{url!r} is no backup URL.",
        "The forms are file:///path/to/file, socket:unix:/path/to/socket and socket:host:port.",
    )


class FileDestination(FileBackend, Destination):
    """A FileBackend and its upkeep, which it cannot know itself: that imports FileBackend."""

    _compactor: Compactor | None = None

    def keep_house(self, lock: threading.Lock, least: int | None) -> None:
        """See Destination."""
        self._compactor = Compactor(self, lock)
        Housekeeper(self, self._compactor, least).start()

    def compact(self, progress: Progress | None = None) -> dict[str, dict[str, int]]:
        """See Destination. BackupBusy if another process writes to it."""
        if self._compactor is not None:
            return self._compactor.run(progress)
        self.open()
        with contextlib.closing(self):
            return Compactor(self, threading.Lock()).run(progress)

    def rebuild(self, owner: bytes, progress: Progress) -> str | None:
        """See Destination."""
        return upgrade.from_log(self, owner, progress)

"""From a URL to the Backend that serves it."""

from __future__ import annotations

from backend import Backend
from errors import ConfigError
from filebackend import FileBackend
from socketbackend import SocketBackend


def backend_for(url: str) -> Backend:
    """The Backend of ``url``, not open yet; ConfigError for a URL of no known form."""
    if url.startswith("file:"):
        return FileBackend(url)
    if url.startswith("socket:"):
        return SocketBackend(url)
    raise ConfigError(
        f"{url!r} is no backup URL.", "The forms are file:///path/to/file and socket:host:port."
    )

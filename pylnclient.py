"""All that the plugin takes of pyln-client's inside: a way for db_write past its dispatch.

The dispatch splits all it has of a message at every piece that comes of it, holds a message
three times over while that is served, which a large change has no memory for, looks up the
handler's signature, and formats its own stack for each answer. A node waits for all of that.

With a release that is other inside, db_write comes by the public ways: only slower.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from typing import Any

from pyln.client import Plugin
from pyln.client.plugin import Request, RpcException

_encode = json.JSONEncoder(ensure_ascii=False).encode
READ_SIZE = 1 << 16
"""Bytes that a pipe holds."""
REFUSED = -32600
"""The code of an answer that is an error."""

Take = Callable[[Any, Any], object]
"""Stores one change, ``writes`` and ``data_version`` as they came. Raising refuses it."""


def serve_db_write(plugin: Plugin, take: Take) -> None:
    """Have ``take`` serve each db_write, in order, in the thread that calls ``plugin.run``."""

    # Of the manifest in any case; asynchronous, so that a refusal is answered, but not logged.
    @plugin.async_hook("db_write")  # type: ignore[untyped-decorator]
    def dispatched(
        request: Request, writes: Any = None, data_version: Any = None, **_: object
    ) -> None:
        try:
            take(writes, data_version)
        except Exception as error:
            request.set_exception(RpcException(str(error), REFUSED))
        else:
            request.set_result({"result": "continue"})

    if not lacks(plugin):
        plugin.stdin = Stdin(plugin, take)


def lacks(plugin: Plugin) -> list[str]:
    """What ``Stdin`` needs and this release of pyln-client does not have, in words."""
    found = []
    reads = _names_in(plugin, "run")
    # Whatever stands in ``stdin`` is where messages come from: so db_write can be taken out.
    others = {"read", "read1", "readinto", "readline", "readlines"}
    if not (hasattr(plugin, "stdin") and {"stdin", "buffer"} <= reads and not others & reads):
        found.append("Plugin.run iterates over stdin.buffer")
    # Other threads write log lines and answers: none of them may stand inside another. Each
    # holds the lock until it is flushed, so that what goes past the buffer comes behind it.
    writes = _names_in(plugin, "_write_locked")
    lock = getattr(plugin, "write_lock", None)
    if not (hasattr(lock, "__exit__") and {"write_lock", "stdout", "flush"} <= writes):
        found.append("Plugin._write_locked writes to stdout and flushes it under write_lock")
    if not hasattr(getattr(plugin, "stdout", None), "fileno"):
        found.append("Plugin.stdout is a file")
    return found


def _names_in(plugin: Plugin, method: str) -> set[str]:
    """The names of attributes that a method of ``plugin`` uses; none if it is no plain one."""
    code = getattr(getattr(plugin, method, None), "__code__", None)
    return set(getattr(code, "co_names", ()))


class Stdin:
    """What lightningd sends, for ``Plugin.stdin``; db_write is served and answered here."""

    def __init__(self, plugin: Plugin, take: Take) -> None:
        self._take = take
        self._in, self._out = plugin.stdin.fileno(), plugin.stdout.fileno()
        self._lock = plugin.write_lock
        self._held = bytearray()

    @property
    def buffer(self) -> Iterator[bytes]:
        """All other messages, each of them whole, with the empty line that ends it."""
        while text := self._read():
            message = json.loads(text)
            if isinstance(message, dict) and message.get("method") == "db_write":
                text = ""  # It is as large as the change.
                self._serve(message)
            else:
                yield text.encode()

    def _read(self) -> str:
        """The next message, or nothing at the end of stdin."""
        searched = 0
        while (end := self._held.find(b"\n\n", searched)) < 0:
            searched = max(len(self._held) - 1, 0)
            piece = os.read(self._in, READ_SIZE)
            if not piece:
                return ""
            if not self._held and piece.find(b"\n\n") == len(piece) - 2 >= 0:
                return piece.decode()  # One message and no more, as nearly always.
            self._held += piece
        found, self._held = self._held, self._held[end + 2 :]
        del found[end + 2 :]
        return found.decode()

    def _serve(self, message: dict[str, Any]) -> None:
        params = message.get("params")
        given = params if isinstance(params, dict) else {}
        try:
            self._take(given.get("writes"), given.get("data_version"))
        except Exception as error:
            refusal = {"code": REFUSED, "message": str(error)}
            answer = f'"error": {json.dumps(refusal)}'
        else:
            answer = '"result": {"result": "continue"}'
        number = _encode(message.get("id"))
        self._write(f'{{"jsonrpc": "2.0", "id": {number}, {answer}}}\n\n'.encode())

    def _write(self, data: bytes) -> None:
        with self._lock:
            while data:
                data = data[os.write(self._out, data) :]

"""The least that a durable plugin with a remote server can do, to measure ours against.

``plugin PORT`` sends the statements, joined by a NUL, with their length before them, and
waits for a byte; ``server PORT FILE`` writes what comes into a file that has all its space
already, flushes it, and sends that byte.
"""

from __future__ import annotations

import os
import socket
import struct
import sys
from typing import BinaryIO

from pyln.client import Plugin

LENGTH = struct.Struct("!I")


def serve(port: int, path: str) -> None:
    """Serve one client after the other, for ever."""
    fd = os.open(path, os.O_RDWR)
    position = 0
    with socket.create_server(("127.0.0.1", port)) as listener:
        while True:
            client, _ = listener.accept()
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with client, client.makefile("rb") as stream:
                while payload := receive(stream):
                    position += os.pwrite(fd, payload, position)
                    os.fdatasync(fd)
                    client.sendall(b"\1")


def receive(stream: BinaryIO) -> bytes:
    """The next payload; b"" at the end."""
    head = stream.read(LENGTH.size)
    return stream.read(LENGTH.unpack(head)[0]) if head else b""


def run_plugin(port: int) -> None:
    """Run under lightningd."""
    plugin = Plugin(dynamic=False)
    server = socket.create_connection(("127.0.0.1", port))
    server.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    @plugin.hook("db_write")  # type: ignore[untyped-decorator]
    def on_db_write(writes: list[str], data_version: int, **_: object) -> dict[str, str]:
        payload = "\0".join(writes).encode()
        server.sendall(LENGTH.pack(len(payload)) + payload)
        if server.recv(1) != b"\1":
            raise ConnectionError("the server is gone")
        return {"result": "continue"}

    plugin.run()


if __name__ == "__main__":
    if sys.argv[1] == "server":
        serve(int(sys.argv[2]), sys.argv[3])
    else:
        run_plugin(int(sys.argv[2]))

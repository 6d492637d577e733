"""The least that a durable db_write plugin on pyln-client can do, to measure ours against.

It writes the statements, joined by a NUL, into a file that has all its space already, and
flushes the file before it answers. No versions, no checksums, nothing to restore from.
"""

from __future__ import annotations

import os
import sys

from pyln.client import Plugin

plugin = Plugin(dynamic=False)
fd = os.open(sys.argv[1], os.O_RDWR)
position = 0


@plugin.hook("db_write")  # type: ignore[untyped-decorator]
def on_db_write(writes: list[str], data_version: int, **_: object) -> dict[str, str]:
    global position
    position += os.pwrite(fd, "\0".join(writes).encode(), position)
    os.fdatasync(fd)
    return {"result": "continue"}


plugin.run()

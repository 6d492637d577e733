"""The least that any durable db_write plugin in Python can do: one loop, no pyln-client.

It writes the statements, joined by a NUL, into a file that has all its space already, and
flushes the file before it answers. No versions, no checksums, nothing to restore from.
"""

from __future__ import annotations

import json
import os
import sys

fd = os.open(sys.argv[1], os.O_RDWR)
position, held = 0, b""
while piece := os.read(0, 65536):
    held += piece
    while (end := held.find(b"\n\n")) >= 0:
        message, held = json.loads(held[:end]), held[end + 2 :]
        if message["method"] == "db_write":
            writes = message["params"]["writes"]
            position += os.pwrite(fd, "\0".join(writes).encode(), position)
            os.fdatasync(fd)
        answer = {"jsonrpc": "2.0", "id": message["id"], "result": {"result": "continue"}}
        os.write(1, json.dumps(answer).encode() + b"\n\n")

"""What ``watch`` shows, from the process itself and of samples."""

from __future__ import annotations

import json
import os
import pty
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

from commands.look import look_at
from monitoring import screen
from monitoring.screen import Sample, Work
from tests.support import CLI, add_session, first_changes, make_backup
from wallet import node


def test_a_line_for_each_look_without_a_terminal(tmp_path: Path) -> None:
    url = f"file://{tmp_path}/node.bkp"
    make_backup(url, first_changes(3))
    (tmp_path / "node.bkp.scratch-compact-12345678-log").write_bytes(bytes(2_000_000))
    command = [sys.executable, str(CLI), "watch", url]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        first = process.stdout.readline().decode()
        add_session(url, first_changes(5)[3:])
        second = process.stdout.readline().decode()
        process.send_signal(signal.SIGINT)
        errors = process.stderr.read().decode()
        process.wait()
    assert "version 3, changes unknown, " in first and "compaction 2.0 MB written" in first
    assert "version 5, changes " in second
    assert process.returncode == 130 and "Traceback" not in errors


def test_one_screen_on_a_terminal(tmp_path: Path) -> None:
    controller, terminal = pty.openpty()
    url = f"file://{tmp_path}/none.bkp"
    process = subprocess.Popen([sys.executable, str(CLI), "watch", url], stdout=terminal)
    os.close(terminal)
    shown = b""
    while b"\r\nerror:" not in shown:
        shown += os.read(controller, 4096)
    process.send_signal(signal.SIGINT)
    process.wait()
    os.close(controller)
    assert shown.startswith(b"\x1b[H\x1b[Jbackup:")


def test_the_rate_is_of_what_was_seen() -> None:
    def at(seconds: float, version: int | None) -> Sample:
        return Sample(seconds, {"version": version})

    assert screen.rate([at(1, 5)]) is None
    assert screen.rate([at(1, 5), at(3, 9), at(5, None)]) == 2.0


def test_what_a_screen_says() -> None:
    rows = [
        {"url": "file:///a", "standing": "in step", "version": 7},
        {"url": "socket:b:1", "standing": "unknown: silent", "version": None},
        {"url": "file:///c", "standing": "lagging", "version": 4},
    ]
    found = {
        **{"url": "file:///a", "version": 7, "last_change_ns": 1_000_000_000, "size": 5_000_000},
        **{"median_hook_ms": 0.3, "p99_hook_ms": 1.2, "worst_hook_ms": 9.0},
        **{"destinations": rows, "damage": None, "warnings": ["The disk is nearly full."]},
    }
    text = screen.screen([Sample(0, found, [Work("restore", 3_000_000)])])
    assert text.splitlines() == [
        "backup:         file:///a",
        "version:        7",
        "changes:        unknown",
        "last change:    1970-01-01 00:00:01 UTC",
        "hook:           0.3 ms (median), 1.2 ms (99 of 100), 9.0 ms (longest)",
        "size:           5.0 MB",
        "destination:    file:///a: in step, 0 changes behind",
        "destination:    socket:b:1: unknown: silent",
        "destination:    file:///c: lagging, 3 changes behind",
        "restore:        3.0 MB written",
        "attention:      The disk is nearly full.",
    ]


def test_a_finding_that_a_terminal_would_obey(tmp_path: Path) -> None:
    """It is kept beside the backup, where others may write."""
    url = f"file://{tmp_path}/node.bkp"
    make_backup(url, first_changes(3))
    known = {"backup_id": look_at([url], False).shown["backup_id"], "unsound": "\x1b[2Jno"}
    (tmp_path / "node.bkp.proof").write_text(json.dumps(known))
    line = screen.one_line([Sample(0, look_at([url], False).shown)])
    assert line.isprintable() and line.endswith("attention [2Jno")


def test_a_running_node_is_asked(node_dir: Path) -> None:
    with socket.create_server(str(node_dir / "lightning-rpc"), family=socket.AF_UNIX) as server:

        def answer(text: bytes) -> None:
            connection, _ = server.accept()
            with connection:
                asked = json.loads(connection.recv(4096))
                assert asked["method"] == "backup-status"
                connection.sendall(text[:10])
                connection.sendall(text[10:])

        for text, found in (
            (b'{"jsonrpc": "2.0", "id": 1, "result": {"version": 3}}\n\n', {"version": 3}),
            (b'{"jsonrpc": "2.0", "id": 1, "error": {"code": -32601}}\n\n', None),
            (b"[1, 2, 3, 4, 5, 6", None),
        ):
            thread = threading.Thread(target=answer, args=(text,))
            thread.start()
            assert node.ask(str(node_dir), "backup-status") == found
            thread.join()
    assert node.ask(str(node_dir), "backup-status") is None

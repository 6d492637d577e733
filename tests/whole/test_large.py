"""Sizes: a change of 64 MiB, a database of 300 MiB within 64 MiB of memory."""

from __future__ import annotations

import contextlib
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import support
from wallet import database

MIB = 1 << 20
DATABASE_SIZE = 300 * MIB
MEMORY_LIMIT = 64 * MIB
ROW_SIZE = 60_000

# A process starts with the peak of the one that forked it: so a small one comes between.
MEASURE = """
import os, resource, sys
code = os.spawnv(os.P_WAIT, sys.executable, [sys.executable, *sys.argv[1:]])
sys.stdout.flush()
print("peak", resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
sys.exit(code)
"""


def peak_of_cli(*arguments: object) -> int:
    """Run backup-cli; the most memory it held, in bytes."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(support.CLI), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=support.ANSWER_S,
    )
    assert done.returncode == 0, done.stderr
    number = int(done.stdout.split()[-1])
    return number if sys.platform == "darwin" else number * 1024


@pytest.fixture(autouse=True)
def tidy(tmp_path: Path) -> Iterator[None]:
    """Leave no large file behind: pytest keeps the directories of three runs."""
    yield
    for path in tmp_path.rglob("*"):
        if path.is_file():
            path.unlink()


@pytest.fixture
def large_database(node_dir: Path) -> Path:
    """The database of a node, of 300 MiB, at version 1."""
    path = node_dir / "lightningd.sqlite3"
    support.apply_calls(path, support.first_changes(1))
    with contextlib.closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("PRAGMA synchronous = OFF")
        for number in range(DATABASE_SIZE // ROW_SIZE):
            connection.execute("INSERT INTO items VALUES (?, randomblob(?))", (number, ROW_SIZE))
    assert path.stat().st_size > DATABASE_SIZE
    return path


def test_large_database_needs_little_memory(
    large_database: Path, node_dir: Path, url: str, tmp_path: Path
) -> None:
    peaks = {"init": peak_of_cli("init", "--lightning-dir", node_dir, url)}
    with support.PluginProcess(node_dir) as plugin:
        plugin.write(*support.change(2, "DELETE FROM items WHERE id % 1000 = 7"))
        assert plugin.close() == 0
    restored = tmp_path / "restored.sqlite3"
    peaks["restore"] = peak_of_cli("restore", url, restored)
    peaks["status"] = peak_of_cli("status", url)
    print({name: f"{peak / MIB:.0f} MiB" for name, peak in peaks.items()})
    assert max(peaks.values()) < MEMORY_LIMIT, peaks
    support.apply_calls(
        large_database, [support.change(2, "DELETE FROM items WHERE id % 1000 = 7")]
    )
    assert database.compare(str(large_database), str(restored)) == []
    assert restored.stat().st_size > DATABASE_SIZE


def test_measuring_sees_memory(tmp_path: Path) -> None:
    """The limit above can be broken."""
    hog = tmp_path / "hog.py"
    hog.write_text(f"x = b'x' * {MEMORY_LIMIT}\n")
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(hog)], capture_output=True, text=True, check=True
    )
    assert int(done.stdout.split()[-1]) * 1024 > MEMORY_LIMIT


def test_change_of_64_mib(node_dir: Path, url: str, tmp_path: Path) -> None:
    support.run_cli("init", "--lightning-dir", node_dir, url)
    body = "it''s \U0001f600 -- /* \n"
    body *= 64 * MIB // len(body.encode())
    calls = [
        *support.first_changes(2),
        support.change(3, f"INSERT INTO items VALUES (3, '{body}')"),
        support.change(4, "INSERT INTO items VALUES (4, 'small')"),
    ]
    assert len(body.encode()) > 63 * MIB
    for sent in (calls[:3], calls[3:]):
        with support.PluginProcess(node_dir) as plugin:
            plugin.manifest()
            for call in sent:
                plugin.write(*call)
            assert plugin.close() == 0
    node, restored = tmp_path / "node.sqlite3", tmp_path / "restored.sqlite3"
    support.apply_calls(node, calls)
    support.run_cli("restore", url, restored)
    assert database.compare(str(node), str(restored)) == []

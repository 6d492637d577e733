"""What the plugin takes of pyln-client's inside: it is there, and without it all goes on."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from pyln.client import Plugin

import pylnclient
from tests import support
from tests.support import PluginProcess, Refused, change

NO_STDIN = """
class Other(Plugin):
    def __init__(self, **options):
        super().__init__(**options)
        del self.stdin
    def run(self):
        partial = b""
        while piece := sys.__stdin__.buffer.readline():
            partial = self._multi_dispatch((partial + piece).split(b"\\n\\n"))
"""
READS_OTHERWISE = """
class Other(Plugin):
    def run(self):
        partial = b""
        while piece := self.stdin.buffer.readline():
            partial = self._multi_dispatch((partial + piece).split(b"\\n\\n"))
"""
NO_LOCK = """
class Other(Plugin):
    def __init__(self, **options):
        super().__init__(**options)
        self.lock_of_another_name = self.__dict__.pop("write_lock")
    def _write_locked(self, message):
        with self.lock_of_another_name:
            self.stdout.buffer.write(json.dumps(message).encode() + b"\\n\\n")
            self.stdout.flush()
"""
NO_STDOUT = """
class Other(Plugin):
    def __init__(self, **options):
        super().__init__(**options)
        self.out = self.__dict__.pop("stdout")
    def _write_locked(self, message):
        with self.write_lock:
            self.out.buffer.write(json.dumps(message).encode() + b"\\n\\n")
            self.out.flush()
"""
WRAPPED = """
class Other(Plugin):
    run = functools.partialmethod(Plugin.run)
    _write_locked = functools.partialmethod(Plugin._write_locked)
"""
OTHERS = {
    "stdin": NO_STDIN,
    "its reading": READS_OTHERWISE,
    "write_lock": NO_LOCK,
    "stdout": NO_STDOUT,
    "plain methods": WRAPPED,
}
"""Releases of pyln-client as they might come."""
START = f"""
import functools, json, sys
sys.path.insert(0, {str(support.ROOT)!r})
import backup, pylnclient
from pyln.client import Plugin
"""


def program(*parts: str) -> list[str]:
    """The plugin with other parts of pyln-client; an argument list."""
    return [sys.executable, "-c", "\n".join([START, *parts, "backup.main()"])]


@pytest.fixture
def filled(node_dir: Path, url: str) -> Path:
    """A backup at version 5, which backup.lock names; its file."""
    (node_dir / "backup.lock").write_text(json.dumps({"backend_url": url}))
    return support.make_backup(url, support.first_changes(5))


def test_this_release_has_it_all() -> None:
    """A failure means: adapt pylnclient.py to the new release, or the hook is slow."""
    assert pylnclient.lacks(Plugin(autopatch=False)) == []


def test_no_change_goes_through_the_dispatch(node_dir: Path, filled: Path) -> None:
    undispatched = "del Plugin._exec_func, Plugin._dispatch_request, pylnclient.Request.set_result"
    with PluginProcess(node_dir, program(undispatched)) as plugin:
        plugin.write(*change(6, "SELECT 1"))
        with pytest.raises(Refused, match="Backup is out of date"):
            plugin.write(*change(9, "SELECT 1"))
        assert plugin.close() == 0


@pytest.mark.parametrize("missing", OTHERS)
def test_without_it_the_plugin_works(missing: str, node_dir: Path, filled: Path) -> None:
    # It fails, should the way past the dispatch be taken.
    other = program(OTHERS[missing], "backup.Plugin = Other", "del pylnclient.Stdin")
    with PluginProcess(node_dir, other) as plugin:
        assert "db_write" in str(plugin.manifest()["hooks"])
        plugin.write(*change(6, "INSERT INTO items VALUES (6, 'before')"))
        plugin.init(node_dir)
        plugin.write(*change(7, "INSERT INTO items VALUES (7, '" + "long" * 50_000 + "')"))
        assert plugin.call("backup-status")["version"] == 7
        for _ in range(2):
            with pytest.raises(Refused, match="Backup is out of date"):
                plugin.write(*change(9, "SELECT 1"))
        assert [line.startswith("Backup is out of date") for line in plugin.errors()] == [True] * 2
        assert not plugin.logged("Traceback")
        assert plugin.close() == 0
    assert [head.version for head, _ in support.records_of(filled)] == list(range(1, 8))


TALKING = """
def talk():
    while True:
        backup.log.info("x" * 30_000)
class Talking(backup.Hook):
    def take(self, writes, data_version):
        if not self.calls:
            for _ in range(3):
                backup.threading.Thread(target=talk, daemon=True).start()
        super().take(writes, data_version)
backup.Hook = Talking
"""


def test_answers_and_log_lines_do_not_interleave(node_dir: Path, filled: Path) -> None:
    with PluginProcess(node_dir, program(TALKING)) as plugin:
        for version in range(6, 100):
            plugin.write(*change(version, "SELECT 1"))
        long = [text for _, text in list(plugin.log) if text.startswith("x")]
        assert set(long) == {"x" * 30_000}
        plugin.kill()

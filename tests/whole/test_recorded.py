"""The main job: recorded sessions of real nodes through the real plugin, restored."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import support
from wallet import database


@pytest.mark.parametrize("name", ["payer", "router", "crash"])
def test_recorded_node_is_restored_exactly(
    name: str, tmp_path: Path, node_dir: Path, url: str
) -> None:
    support.run_cli("init", "--lightning-dir", node_dir, url)
    for calls in support.trace_sessions(name):
        with support.PluginProcess(node_dir) as plugin:
            plugin.manifest()
            plugin.write(*calls[0])
            plugin.init(node_dir)
            for call in calls[1:]:
                plugin.write(*call)
            assert plugin.close() == 0
            assert plugin.errors() == []
    restored = tmp_path / "restored.sqlite3"
    support.run_cli("restore", url, restored)
    node = support.trace_database(name, tmp_path)
    assert database.compare(str(node), str(restored)) == []
    assert database.version_of(str(restored)) == database.version_of(str(node)) > 0

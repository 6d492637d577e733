from __future__ import annotations

from pathlib import Path

import pytest

from tests import support


@pytest.fixture
def node_dir(tmp_path: Path) -> Path:
    """A fresh node's network directory."""
    return support.network_dir(tmp_path)


@pytest.fixture
def url(tmp_path: Path) -> str:
    """URL of a backup that does not exist yet."""
    (tmp_path / "disk2").mkdir()
    return f"file://{tmp_path}/disk2/node.bkp"

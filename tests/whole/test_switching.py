"""From the earlier plugin to this one, under a real lightningd, as in docs/switching.md."""

from __future__ import annotations

import json
import pickle
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from filelog.layout1 import is_layout_1
from tests import support
from tests.layout1_files import EarlierPlugin
from tests.support import run_cli
from tests.whole.test_lightningd import MISSING, Bitcoind, Lightningd, Refusal

pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"not on PATH: {', '.join(MISSING)}")

EARLIER = f"""#!{sys.executable}
import json, os, pickle, sys
sys.path.insert(0, {str(support.ROOT)!r})
from pyln.client import Plugin
plugin = Plugin()
with open("backup.lock") as file:
    memory = json.load(file)["backend_url"].removeprefix("file://") + ".memory"
with open(memory, "rb") as file:
    backup = pickle.load(file)
backup._is_first = True
@plugin.hook("db_write")
def on_db_write(writes, data_version, **_):
    backup.write((data_version, writes))
    with open(memory, "wb") as file:
        pickle.dump(backup, file)
    return {{"result": "continue"}}
plugin.run()
"""
"""A stand-in for the earlier plugin. It does not stay when lightningd stops, as that one."""


@pytest.fixture(scope="module")
def bitcoind(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bitcoind]:
    running = Bitcoind(tmp_path_factory.mktemp("bitcoin"))
    yield running
    running.stop()


@pytest.fixture
def lightningd(tmp_path: Path, bitcoind: Bitcoind) -> Iterator[Lightningd]:
    found = Lightningd(tmp_path / "lightning", bitcoind)
    yield found
    found.end()


@pytest.fixture
def earlier(lightningd: Lightningd, url: str, tmp_path: Path) -> Path:
    """The earlier plugin, set up for that node."""
    old = Path(url.removeprefix("file://"))
    Path(f"{old}.memory").write_bytes(pickle.dumps(EarlierPlugin(old)))
    (lightningd.directory / "backup.lock").write_text(json.dumps({"backend_url": url}))
    program = tmp_path / "earlier.py"
    program.write_text(EARLIER)
    program.chmod(0o755)
    return program


@pytest.mark.parametrize("lost", [False, True], ids=["with its database", "its database lost"])
def test_switching(
    lost: bool, earlier: Path, lightningd: Lightningd, url: str, tmp_path: Path
) -> None:
    old = Path(url.removeprefix("file://"))
    lightningd.start(f"--important-plugin={earlier}", backup=False)
    lightningd.act()
    lightningd.kill()
    lightningd.start(f"--important-plugin={earlier}", backup=False)
    lightningd.act()
    identity = lightningd.rpc("getinfo")["id"]
    stored = lightningd.rpc("listdatastore", '["act"]')
    assert "layout 1" in run_cli("status", url).stdout
    lightningd.stop()
    before = old.read_bytes()
    with pytest.raises(Refusal):
        lightningd.start()
    assert lightningd.logged("upgrade --lightning-dir DIR") > 0
    if lost:
        kept = tmp_path / lightningd.database.name
        for path in lightningd.directory.glob(f"{kept.name}*"):  # The refused start left a journal.
            path.rename(tmp_path / path.name)
    run_cli("upgrade", "--lightning-dir", lightningd.directory)
    assert not is_layout_1(str(old))
    assert [path.read_bytes() for path in old.parent.glob("*.old-*")] == [before]
    if lost:
        run_cli("verify", url, "--against", kept)
        run_cli("restore", url, lightningd.directory)
    run_cli("verify", url, "--against", lightningd.database)
    lightningd.start()
    assert lightningd.logged("Versions match up") == 1
    assert lightningd.rpc("getinfo")["id"] == identity
    assert lightningd.rpc("listdatastore", '["act"]') == stored
    lightningd.act()
    lightningd.stop()
    run_cli("verify", url, "--against", lightningd.database)

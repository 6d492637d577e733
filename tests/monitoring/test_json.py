"""docs/json.md is the contract: what is printed has the keys and types that stand there."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from clusterchecks import Fallback, Server, Slot, Standby, WalletCluster
from commands import main
from tests.standby.common import begun
from tests.support import (
    ROOT,
    PluginProcess,
    change,
    first_changes,
    flip,
    make_backup,
    run_cli,
    trace_database,
)

IS = {
    "text": lambda value: isinstance(value, str),
    "number": lambda value: type(value) in (int, float),
    "true": lambda value: value is True,
    "false": lambda value: value is False,
    "null": lambda value: value is None,
    "list": lambda value: isinstance(value, list),
    "object": lambda value: isinstance(value, dict),
}


def contract(section: str, table: int = 0) -> dict[str, list[str]]:
    """The keys of a table in a section of docs/json.md, each with its types."""
    page = (ROOT / "docs" / "json.md").read_text()
    (part,) = (part for part in page.split("\n## ") if part.startswith(section))
    part = part.split("\n| Key")[table + 1]
    rows = re.findall(r"^\| `(\w+)` \| ([\w, ]+) \|", part, re.MULTILINE)
    return {key: re.split(r", | or ", types) for key, types in rows}


def check(found: dict[str, Any], promised: dict[str, list[str]]) -> None:
    assert found.keys() == promised.keys()
    for key, value in found.items():
        assert any(IS[kind](value) for kind in promised[key]), (key, value)


def check_status(found: dict[str, Any], more: dict[str, list[str]] | None = None) -> None:
    check(found, contract("`backup-cli status --json`\n") | (more or {}))
    for row in found["destinations"]:
        check(row, contract("A destination"))


def status(*urls: str, exit_code: int = 0) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(run_cli("status", "--json", *urls, check=exit_code).stdout)
    return found


@pytest.fixture
def backup(tmp_path: Path) -> str:
    url = f"file://{tmp_path}/node.bkp"
    make_backup(url, first_changes(3))
    return url


def test_one_backup(backup: str) -> None:
    found = status(backup)
    check_status(found)
    assert found["version"] == 3 and found["destinations"] == []
    flip(Path(backup.removeprefix("file://")), 700)
    check_status(status("--check", backup, exit_code=1))


def test_what_cannot_be_looked_at(tmp_path: Path) -> None:
    found = status(f"file://{tmp_path}/none.bkp", exit_code=1)
    assert found.keys() == {"url", "error"}


def test_several_and_what_the_plugin_adds(node_dir: Path, tmp_path: Path) -> None:
    urls = [f"file://{tmp_path}/{name}.bkp" for name in "ab"]
    run_cli("init", "--lightning-dir", node_dir, *urls)
    with PluginProcess(node_dir) as plugin:
        plugin.init(node_dir)
        check(plugin.call("backup-status"), contract("`lightning-cli backup-status`"))
        for version, statements in first_changes(2):
            plugin.write(version, statements)
        found = plugin.call("backup-status")
        check_status(found, contract("`lightning-cli backup-status`"))
        assert [row["standing"] for row in found["destinations"]] == ["in step"] * 2
        assert all(row["since_ns"] for row in found["destinations"])
        check(
            plugin.call("backup-compact"),
            contract("`backup-cli compact` and `lightning-cli backup-compact`"),
        )
    check_status(status(*urls))
    alone = status(urls[0])
    check_status(alone)
    assert [row["url"] for row in alone["destinations"]] == urls
    printed = json.loads(run_cli("compact", *urls).stdout)
    check(printed, contract("`backup-cli compact` and `lightning-cli backup-compact`"))


def test_channels(tmp_path: Path) -> None:
    database = trace_database("router", tmp_path)
    for options in ((), ("--static",)):
        found = json.loads(run_cli("channels", "--json", *options, database).stdout)
        check(found, contract("`backup-cli channels --json`"))
        promised = contract("`backup-cli channels --json`", 1)
        assert len(found["channels"]) == 2
        for channel in found["channels"]:
            check(channel if options else {**channel, "scb": None}, promised)


def test_a_standby(backup: str, tmp_path: Path) -> None:
    directory = begun(tmp_path / "regtest", backup)
    found = json.loads(run_cli("status", "--json", "--lightning-dir", directory, check=1).stdout)
    check(found, contract("`backup-cli status --json` of a standby"))
    assert found["errors"] and found["backup_version"] == 3


def check_wallet(found: dict[str, Any]) -> None:
    section = "`backup-cli status --wallet --json`"
    check(found, contract(section))
    check(found["server"], contract(section, 1))
    check(found["fallback"], contract(section, 3))
    assert found["standbys"] and found["fallback"]["slots"]
    for row in found["standbys"]:
        check(row, contract(section, 2))
    for row in found["fallback"]["slots"]:
        check(row, contract(section, 4))


def test_a_wallet_on_postgresql(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("psycopg")
    server = Server("cln", False, False, True, True, "ANY 1 (a, b)", True, 1)
    standbys = [Standby("a", "streaming", "quorum", 0), Standby("b", "startup", "async", None)]
    fallback = Fallback("replica", "on", False, [Slot("a", True, "reserved", None)])
    found = WalletCluster("cln@::1:5432/cln", "17", server, "on", standbys, fallback, [], ["b"])
    monkeypatch.setattr("postgres.wallet.examine", lambda url: found)
    done = CliRunner().invoke(main, ["status", "--json", "--wallet", "postgres://cln@::1/cln"])
    assert done.exit_code == 4
    check_wallet(json.loads(done.stdout))


def test_the_contract_is_checked(backup: str) -> None:
    found = status(backup)
    with pytest.raises(AssertionError):
        check_status(found | {"version": "3"})
    with pytest.raises(AssertionError):
        check_status(found | {"new": change(1)})

"""The figures for Prometheus, read by its own parser."""

from __future__ import annotations

import json
import os
import stat
import time
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families as parsed

import backup
from monitoring import metrics
from tests.support import (
    PluginProcess,
    change_lock,
    first_changes,
    flip,
    make_backup,
    run_cli,
)


def read(path: Path) -> dict[str, float]:
    """Each sample by its name and labels."""
    found: dict[str, float] = {}
    for family in parsed(path.read_text()):
        assert family.documentation and family.type in ("gauge", "counter")
        for sample in family.samples:
            label = "".join(f"{{{text}}}" for text in sample.labels.values())
            found[sample.name.removeprefix("cln_backup_") + label] = sample.value
    return found


def test_status_writes_them(tmp_path: Path) -> None:
    url, file = f"file://{tmp_path}/node.bkp", tmp_path / "backup.prom"
    make_backup(url, first_changes(5))
    began_s = time.time()
    shown = json.loads(run_cli("status", "--json", "--metrics", file, url).stdout)
    found = read(file)
    assert found["sound"] == 1 and found["warnings"] == 0
    assert found["version"] == 5 and found["changes"] == 5
    assert found["size_bytes"] == shown["size"]
    assert found["last_change_timestamp_seconds"] == pytest.approx(shown["last_change_ns"] / 1e9)
    assert began_s <= found["written_timestamp_seconds"] <= time.time()
    assert "acks" not in found and "last_proven_timestamp_seconds" not in found
    assert stat.S_IMODE(file.stat().st_mode) == 0o644
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "backup.prom",
        "node.bkp",
        "node.bkp.writer",
    ]


def test_damage_and_no_backup_are_not_sound(tmp_path: Path) -> None:
    url, file = f"file://{tmp_path}/node.bkp", tmp_path / "backup.prom"
    run_cli("status", "--metrics", file, url, check=1)
    found = read(file)
    assert found.keys() == {"sound", "written_timestamp_seconds"} and found["sound"] == 0
    flip(make_backup(url, first_changes(3)), 700)
    run_cli("status", "--check", "--metrics", file, url, check=1)
    assert read(file)["sound"] == 0
    file.unlink()
    done = run_cli(*("status", "--json", "--metrics", file, "--lightning-dir", tmp_path), check=1)
    assert read(file)["sound"] == 0
    assert json.loads(done.stdout).keys() == {"url", "error"}


def test_what_the_plugin_has_not_looked_at_is_not_sound() -> None:
    text = metrics.render(backup.Hook().statistics(), 0, 1.0)
    assert "cln_backup_sound" not in text and "cln_backup_hook_changes_total 0" in text


def test_where_nothing_can_be_written(tmp_path: Path) -> None:
    url = f"file://{tmp_path}/node.bkp"
    make_backup(url)
    done = run_cli("status", "--metrics", tmp_path / "none" / "backup.prom", url, check=1)
    assert "Could not write the metrics to" in done.stderr


def test_where_it_is(tmp_path: Path) -> None:
    """A relative path, a link, which stays one, and what is no file, which root could replace."""
    url = f"file://{tmp_path}/node.bkp"
    make_backup(url)
    run_cli("status", "--metrics", "here.prom", url, cwd=tmp_path)
    (tmp_path / "link.prom").symlink_to("there.prom")
    run_cli("status", "--metrics", tmp_path / "link.prom", url)
    for name in "here", "link", "there":
        assert read(tmp_path / f"{name}.prom")["sound"] == 1
    assert (tmp_path / "link.prom").is_symlink()
    os.mkfifo(tmp_path / "fifo")
    done = run_cli("status", "--metrics", tmp_path / "fifo", url, check=1)
    assert "is no file" in done.stderr and stat.S_ISFIFO((tmp_path / "fifo").stat().st_mode)


def test_the_plugin_writes_them_with_the_hooks_times(node_dir: Path, tmp_path: Path) -> None:
    urls, file = [f"file://{tmp_path}/{name}.bkp" for name in "ab"], tmp_path / "backup.prom"
    run_cli("init", "--lightning-dir", node_dir, *urls)
    change_lock(node_dir, metrics=str(file))
    with PluginProcess(node_dir) as plugin:
        plugin.init(node_dir)
        for version, statements in first_changes(1):
            plugin.write(version, statements)
        deadline_s = time.monotonic() + 60
        while not file.exists():
            assert time.monotonic() < deadline_s
            time.sleep(0.01)
    found = read(file)
    assert found["sound"] == 1 and found["hook_changes_total"] == 1
    assert 0 < found["hook_seconds{0.5}"] <= found["hook_seconds{1}"]
    assert found["destinations"] == found["destinations_in_step"] == found["acks"] == 2
    for url in urls:
        assert found[f"destination_in_step{{{url}}}"] == 1
        assert found[f"destination_lag_changes{{{url}}}"] == 0
    # An operator's command keeps the key.
    run_cli("attach", "--lightning-dir", node_dir, *urls)
    assert json.loads((node_dir / "backup.lock").read_text())["metrics"] == str(file)


def test_the_plugin_says_once_that_it_cannot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Enough(Exception):
        pass

    slept: list[float] = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        if len(slept) == 3:
            raise Enough

    monkeypatch.setattr("time.sleep", sleep)
    with pytest.raises(Enough):
        backup.keep_metrics(backup.Hook(), str(tmp_path / "none" / "backup.prom"))
    assert slept == [backup.METRICS_EVERY_S] * 3
    assert len(caplog.records) == 1 and "none/backup.prom" in caplog.text


def test_names_are_escaped() -> None:
    url = 'file:///a"b\\c\nd\udcff'
    row = {"url": url, "standing": "in step", "version": 3}
    text = metrics.render({"version": 4, "destinations": [row]}, 0, 1.5)
    names = [
        sample.labels["url"]
        for family in parsed(text)
        for sample in family.samples
        if "url" in sample.labels
    ]
    assert set(names) == {'file:///a"b\\c\nd\\udcff'}

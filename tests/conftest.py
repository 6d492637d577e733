from __future__ import annotations

import logging
import os
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import coverage
import pytest

from tests import clusters, support


def pytest_configure(config: pytest.Config) -> None:
    """Prepare what the processes that tests start inherit."""
    # Under nohup or `&` it would be ignored, and stay so for all that tests interrupt.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # Not one of those thousands shall compile the program anew.
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    # Servers measure their coverage, too.
    if config.getoption("cov_source", None):
        os.environ["MEASURE_COVERAGE"] = "1"


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """Half as many again as there are processors: a good part of the time goes in waiting."""
    return (os.cpu_count() or 1) * 3 // 2


@pytest.fixture
def unmeasured(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Measures no coverage, which doubles the time of what repeats the same a great many times."""
    monkeypatch.delenv("MEASURE_COVERAGE", raising=False)
    stopped = []
    while (measured := coverage.Coverage.current()) is not None:  # A worker has two of them.
        measured.stop()
        stopped.append(measured)
    yield
    for measured in reversed(stopped):
        measured.start()


@pytest.fixture
def fast_dir() -> Iterator[Path]:
    """A directory in memory, for what flushes small files a great many times."""
    with tempfile.TemporaryDirectory(prefix="backup-test-", dir=support.FAST) as directory:
        yield Path(directory)


@pytest.fixture
def node_dir(tmp_path: Path) -> Path:
    """A fresh node's network directory."""
    return support.network_dir(tmp_path)


@pytest.fixture
def url(tmp_path: Path) -> str:
    """URL of a backup that does not exist yet."""
    (tmp_path / "disk2").mkdir()
    return f"file://{tmp_path}/disk2/node.bkp"


@pytest.fixture
def log_lines(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    """What the project logs, from INFO on."""
    caplog.set_level(logging.INFO, "backup")
    return caplog


@pytest.fixture(scope="session")
def session_pair() -> Iterator[clusters.Pair]:
    """The two PostgreSQL clusters of this process."""
    if reason := clusters.missing():
        pytest.skip(reason)
    with clusters.Pair(clusters.new_place()) as pair:
        yield pair


@pytest.fixture
def pair(session_pair: clusters.Pair) -> clusters.Pair:
    """A PostgreSQL primary and its synchronous standby, as they were made."""
    if not session_pair.is_as_made():
        session_pair.reset()
    return session_pair


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MiB, where this user may mount one."""
    path = tmp_path / "small"
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(path)]
    done = subprocess.run(mount, capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip(f"a small file system cannot be mounted here: {done.stderr.strip()}")
    yield path
    subprocess.run(["umount", str(path)], check=True)

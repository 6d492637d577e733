"""The picture of what ``make report`` measured: needs matplotlib (requirements-report.txt)."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.ticker import FixedLocator, FormatStrFormatter, NullLocator

from backend import RELEASE
from bench import hook, remote, several, snapshot, wire
from bench.common import (
    CLI,
    Call,
    Options,
    median_of,
    payload_size,
    percentile,
    run_measured,
    sessions_of,
)
from bench.hook import Times

SIZES_MIB = (16, 64, 256, 1024)
RESTORES = 3
POINTS = range(1, 100)
"""Percentiles that are drawn."""
DESTINATIONS: tuple[tuple[str, Callable[[Path, Sequence[Call]], Times]], ...] = (
    ("file", hook.measure),
    ("server, over loopback", remote.measure_changes),
    ("file and server, both acknowledge", several.both_against_the_slower),
)


def draw(options: Options, target: Path) -> None:
    """Measure, and write the picture to ``target``: SVG or PNG, by its name."""
    matplotlib.use("Agg")
    matplotlib.rcParams.update({"svg.fonttype": "none", "font.size": 9, "svg.hashsalt": "backup"})
    import matplotlib.pyplot as plt

    figure, (hooks, restores, sent) = plt.subplots(1, 3, figsize=(13, 4.2))
    draw_hooks(hooks, options)
    draw_restores(restores, options)
    draw_sent(sent, options)
    figure.suptitle(f"Release {RELEASE} on {machine()}", fontsize=9)
    figure.tight_layout()
    figure.savefig(target, metadata={"Date": None} if target.suffix == ".svg" else None)


def machine() -> str:
    """What it was measured on."""
    memory_gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return (
        f"{os.cpu_count()} cores, {memory_gib:.0f} GiB, {platform.system()} {platform.release()},"
        f" Python {platform.python_version()}"
    )


def draw_hooks(axes: Any, options: Options) -> None:
    """How long a commit waits: which share of them at most so long."""
    for number, (name, measure) in enumerate(DESTINATIONS):
        ours, floor = hook.over_traces(options, f"report-{number}", hook.MAX_CHANGES, measure)
        _curve(axes, ours, name)
        if number == 0:
            _curve(axes, floor, "a plugin that only writes and flushes", linestyle="--")
        elif number == 1:
            _curve(axes, floor, "the same through a bare server", linestyle="--")
    axes.set(
        title="A commit waits for the backup", xlabel="ms", ylabel="% of commits", xscale="log"
    )
    _ticks(axes.xaxis, (0.1, 0.2, 0.3, 0.5, 0.7, 1, 1.5, 2, 3, 5))
    # Below the curves: they fill the corners.
    axes.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2)


def _curve(axes: Any, times_s: Sequence[float], label: str, **how: str) -> None:
    axes.plot([1000 * percentile(times_s, point) for point in POINTS], POINTS, label=label, **how)


def draw_restores(axes: Any, options: Options) -> None:
    """How long a restore takes, against a copy of the file."""
    sizes = [size for size in SIZES_MIB if size <= options.size_mib]
    found: list[list[float]] = [[], []]
    for size_mib in sizes:
        for series, took_s in zip(found, _restored(options.scratch, size_mib), strict=True):
            series.append(took_s)
    axes.plot(sizes, found[0], marker="o", label="restore (checks, writes, flushes)")
    axes.plot(sizes, found[1], marker="o", linestyle="--", label="a copy of the file with fsync")
    axes.set(title="A restore", xlabel="MiB", ylabel="s", xscale="log", yscale="log")
    _ticks(axes.xaxis, sizes)
    _ticks(axes.yaxis, (0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5))
    axes.legend(fontsize=7)


def _ticks(axis: Any, values: Sequence[float]) -> None:
    """Mark ``values`` on a logarithmic axis, as plain numbers."""
    axis.set_major_locator(FixedLocator(values))
    axis.set_major_formatter(FormatStrFormatter("%g"))
    axis.set_minor_locator(NullLocator())


def _restored(scratch: Path, size_mib: int) -> tuple[float, float]:
    """Median seconds of a restore of so large a database, and of a plain copy."""
    place = scratch / f"report-{size_mib}"
    directory = place / "node" / "regtest"
    directory.mkdir(parents=True)
    database, restored = directory / "lightningd.sqlite3", place / "restored.sqlite3"
    snapshot.make_database(database, size_mib)
    url = f"file://{place}/node.bkp"
    run_measured(CLI, "init", "--lightning-dir", directory, url)
    ours, copies = [], []
    for _ in range(RESTORES):
        copies.append(snapshot.plain_copy(database, place / "copy"))
        ours.append(run_measured(CLI, "restore", url, restored).took_s)
        restored.unlink()
    shutil.rmtree(place)
    return median_of(ours), median_of(copies)


def draw_sent(axes: Any, options: Options) -> None:
    """Bytes of a change on the wire, for each recorded node."""
    names: list[str] = []
    two: list[float] = []
    one: list[float] = []
    raw: list[float] = []
    for trace in options.traces:
        sessions = sessions_of(trace)
        sizes = [wire.sent(calls) for calls in sessions]
        count = sum(map(len, sessions))
        names.append(trace.name)
        two.append(sum(ours for ours, _ in sizes) / count)
        one.append(sum(plain for _, plain in sizes) / count)
        raw.append(sum(map(payload_size, sessions)) / count)
    bars = ("protocol 2", two), ("protocol 1", one), ("the statements", raw)
    for number, (label, values) in enumerate(bars):
        axes.bar([at + 0.27 * number for at in range(len(names))], values, 0.25, label=label)
    axes.set_xticks([at + 0.27 for at in range(len(names))], names)
    axes.set(title="A change on the wire", ylabel="bytes, mean")
    axes.legend(fontsize=7)

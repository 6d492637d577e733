"""Salvage from an image of a disk, against b2sum of the same file."""

from __future__ import annotations

import os
import random
import shutil
from pathlib import Path

from bench.common import (
    CLI,
    MIB,
    TRACE_FILE,
    Options,
    Row,
    median_of,
    median_ratio,
    pairs,
    record,
    run_measured,
    sessions_of,
    sync_all,
)
from commands.shared import EXIT_UNSOUND

TARGET = 3.0
MOST_MIB = 64
"""Peak memory, and 32 bytes for each record found."""
SHARES = (("a tenth of it backups", 0.1, TARGET), ("all of it backups", 1.0, None))
"""What the image holds, how much of it are backups, and the target."""
FLOOR = Path(__file__).with_name("floor_b2sum.py")


def run(options: Options) -> list[Row]:
    """By the real command, with all that it does: scan, join, replay, check."""
    trace = max(options.traces, key=lambda folder: (folder / TRACE_FILE).stat().st_size)
    log = options.scratch / "salvage.bkp"
    record(log, sessions_of(trace))
    return [_row(options, log.read_bytes(), *shares) for shares in SHARES]


def _row(options: Options, content: bytes, name: str, share: float, target: float | None) -> Row:
    image, outdir = options.scratch / "salvage.img", options.scratch / "salvaged"
    size = 8 * options.backup_mib * MIB
    _make(image, content, size, share)
    peaks: list[float] = []
    records = 0

    def ours() -> float:
        nonlocal records
        done = run_measured(CLI, "salvage", image, outdir, expected=EXIT_UNSOUND)
        shutil.rmtree(outdir)
        peaks.append(done.peak_mib)
        records = int(done.output.split()[0])
        return done.took_s

    def floor() -> float:
        return run_measured(FLOOR, image).took_s

    results = pairs(options.rounds, ours, floor)
    limit = MOST_MIB + 32 * records / MIB
    image.unlink()
    return Row(
        f"salvage, {size // MIB} MiB, {name}",
        f"{median_of([own for own, _ in results]):.2f} s",
        f"{median_of([against for _, against in results]):.2f} s, b2sum",
        median_ratio(results),
        target,
        f"{records} records, peak memory {max(peaks):.0f} MiB, at most {limit:.0f}",
    )


def _make(image: Path, content: bytes, size: int, share: float) -> None:
    """Copies of ``content``, as old generations are, between what is no backup."""
    rng = random.Random(1)
    with image.open("wb") as file:
        while file.tell() < size:
            is_backup = rng.random() < share
            file.write(content if is_backup else rng.randbytes(len(content)))
    os.truncate(image, size)
    sync_all()

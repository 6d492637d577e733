"""Run the benches and print one table."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from bench.common import DATA, TRACE_FILE, Options, Row

BENCHES = (
    *("hook", "restoring", "snapshot", "upload", "start", "compaction"),
    *("wire", "remote", "readers", "several", "following", "standby", "postgres", "salvage"),
)
"""Modules of this package, each with ``run(options) -> list[Row]``."""


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(BENCHES))
    parser.add_argument(
        "--trace",
        action="append",
        type=Path,
        metavar="DIR",
        default=[Path(os.environ["TRACE"])] if "TRACE" in os.environ else None,
        help="recorded traffic (default: $TRACE, or all under tests/data)",
    )
    parser.add_argument("--size", type=int, default=1024, metavar="MIB", help="of the database")
    parser.add_argument(
        "--backup", type=int, default=128, metavar="MIB", help="of the backup to compact"
    )
    parser.add_argument("--changes", type=int, default=200_000, help="in the long log")
    parser.add_argument("--rounds", type=int, default=5, help="how often a pair is measured")
    parser.add_argument("--dir", help="a directory on the disk to measure (default: temporary)")
    parser.add_argument(
        "--report", type=Path, metavar="FILE", help="measure for a picture (SVG, PNG), and draw it"
    )
    options = parser.parse_args(arguments)
    for name in options.names:
        if name not in BENCHES:
            parser.error(f"there is no bench {name!r}: choose from {', '.join(BENCHES)}")
    return options


def table(rows: Sequence[Row]) -> str:
    """``rows`` with their columns aligned."""
    cells = [("measured", "ours", "against", "ratio", "target", "")]
    for row in rows:
        ratio = "" if row.ratio is None else f"{row.ratio:.2f}"
        target = "" if row.target is None else f"{row.target:.2f}"
        if row.ratio is not None and row.target is not None and row.ratio > row.target:
            target += " missed"
        cells.append((row.what, row.ours, row.floor, ratio, target, row.note))
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = (
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in cells
    )
    return "\n".join(lines)


def main() -> None:
    chosen = parse()
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="backup-bench-", dir=chosen.dir) as scratch:
        options = Options(
            traces=chosen.trace or sorted(path.parent for path in DATA.glob(f"*/{TRACE_FILE}")),
            size_mib=chosen.size,
            backup_mib=chosen.backup,
            changes=chosen.changes,
            rounds=chosen.rounds,
            scratch=Path(scratch),
        )
        if chosen.report is not None:
            return draw(options, chosen.report)
        for name in chosen.names or BENCHES:
            print(f"bench {name} ...", file=sys.stderr, flush=True)
            rows += importlib.import_module(f"bench.{name}").run(options)
    print(table(rows))


def draw(options: Options, target: Path) -> None:
    try:
        report = importlib.import_module("bench.report")
    except ModuleNotFoundError as error:
        sys.exit(f"{error.name} is not installed: `make report` does that, and draws.")
    report.draw(options, target)


if __name__ == "__main__":
    main()

"""The command that finds backups in raw blocks: salvage."""

from __future__ import annotations

import contextlib
import json
import os
import stat
import sys
from collections.abc import Iterator

import click

import durable
from commands.shared import EXIT_UNSOUND, expand, main, progress_bar, warn_old_state
from errors import BackupError, ConfigError, DiskError, printable
from salvage import delivery, histories, mapfile, old, pieces, report, scan
from salvage.delivery import Delivered
from salvage.images import MOST_UNREADABLE, Images, devices_of
from salvage.index import NAME, Index
from salvage.report import MOST_DELIVERED, MOST_HOLES, Report

REPORT = "report.txt"


class NothingFound(BackupError):
    """The images hold no history."""


@main.command()
@click.argument("images", metavar="IMAGE...", nargs=-1, required=True)
@click.argument("outdir", callback=expand)
@click.option(
    "--mapfile", "map_path", metavar="FILE", callback=expand, help="ddrescue's map of the IMAGE."
)
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def salvage(images: tuple[str, ...], outdir: str, map_path: str | None, as_json: bool) -> None:
    """Find what a dying disk, or deleted files, still hold of backups, and put it into OUTDIR.

    IMAGE is a file, an image of a disk or a block device; it is only read. OUTDIR is a new or
    empty directory on another disk. Run it again to go on after it was stopped.

    \b
    Example:
        backup-cli salvage disk.img /mnt/other/salvaged --mapfile disk.map

    Exit code: 3 something was found, which is never known to be the newest; 1 nothing was.
    """
    if map_path is not None and len(images) > 1:
        raise click.UsageError("--mapfile is of one IMAGE.")
    _require_other_disk(images, outdir)
    good = None if map_path is None else mapfile.read(map_path)
    directory = _made(outdir)
    with contextlib.closing(Images([os.path.expanduser(i) for i in images], good)) as searched:
        found = salvaged(searched, directory)
        said = [*report.lines(found, searched)]
        _keep_report(directory, said)
        if as_json:
            click.echo(json.dumps(report.as_json(found, searched), indent=2))
        else:
            click.echo("\n".join(said))
    files = [delivered.path for delivered in found.delivered if delivered.path]
    if not files:
        raise NothingFound(
            "No history of a backup could be put together.",
            f"What was seen is in {os.path.join(directory, REPORT)}. Other images of that disk,"
            " or other copies of the backup, may hold what is missing: name all of them at once.",
        )
    click.echo(
        "WARNING: what was found is not proven to be the newest state of any node.", err=True
    )
    warn_old_state("file://" + files[0])
    sys.exit(EXIT_UNSOUND)


def _require_other_disk(images: tuple[str, ...], outdir: str) -> None:
    """Refuse to write to a device that is searched: its deleted files are in its free blocks."""
    parent = os.path.realpath(outdir)
    while not os.path.isdir(parent):
        parent = os.path.dirname(parent)
    for path in images:
        with contextlib.suppress(OSError):  # Who opens them says why.
            found = os.stat(os.path.expanduser(path))
            if stat.S_ISBLK(found.st_mode) and found.st_rdev in devices_of(parent):
                raise ConfigError(
                    f"{outdir} would be on {path}, which is searched.",
                    "Name a directory on another disk.",
                )


def _made(outdir: str) -> str:
    """The real path of ``outdir``, made if it is not there."""
    directory = os.path.realpath(outdir)
    try:
        _make(directory)
        names = os.listdir(directory)
    except OSError as error:
        raise DiskError(directory, error, "use the directory") from error
    if names and NAME not in names:
        raise ConfigError(
            f"{directory} is not empty, and of no salvage that was stopped.", "Name a new OUTDIR."
        )
    return directory


def _make(directory: str) -> None:
    """Make ``directory``, and those above it; as root, for the owner of where they are."""
    if os.path.isdir(directory):
        return
    parent = os.path.dirname(directory)
    _make(parent)
    os.mkdir(directory, mode=0o700)
    if os.geteuid() == 0:  # To read a disk takes root, to use what was found should not.
        found = os.stat(parent)
        os.chown(directory, found.st_uid, found.st_gid)


def salvaged(images: Images, directory: str) -> Report:
    """Search ``images`` and deliver into ``directory`` what they hold."""
    index = Index(directory, images.described())
    done = False
    try:
        with index.explaining():
            effort = scan.Effort(images.size)
            with progress_bar("Scanning", 0) as advance:
                scan.scan(images, index, effort, advance)
            old.follow_all(images, index, effort)
            pieces.join_all(images, index, effort)
            found = _delivered(images, index, effort, directory)
        done = True
        return found
    finally:
        index.close(done)


def _delivered(images: Images, index: Index, effort: scan.Effort, directory: str) -> Report:
    all_of_them = histories.find(index)
    delivered: list[Delivered] = []
    chosen = histories.chosen(all_of_them, MOST_DELIVERED)
    for history in chosen:
        with progress_bar(f"Version {history.tip.version}", 0) as advance:
            delivered.append(delivery.deliver(images, index, history, directory, advance))
    holes, hole_count = histories.behind_holes(index, MOST_HOLES)
    records, broken = report.counted(index)
    return Report(
        size=images.size,
        records=records,
        broken=broken,
        delivered=delivered,
        not_tried=[history.tip.version for history in all_of_them if history not in chosen],
        holes=holes,
        hole_count=hole_count,
        limits=[
            *_limits(images, effort),
            *_not_looked_at(index, len(all_of_them)),
            *_not_reached(images, index, delivered),
        ],
    )


def _limits(images: Images, effort: scan.Effort) -> Iterator[str]:
    if effort.refused:
        yield (
            f"{effort.refused} payloads were not checked: there are far more than the images can"
            " hold, so somebody has forged them."
        )
    for path, offset in images.unreadable:
        yield f"{printable(path)}: the block at offset {offset} could not be read."
    if len(images.unreadable) == MOST_UNREADABLE:
        yield "There may be more such blocks. An image that ddrescue makes loses least."


def _not_looked_at(index: Index, found: int) -> Iterator[str]:
    if histories.snapshots_not_seen(index):
        yield (
            f"There are more than {histories.MOST_SNAPSHOTS} snapshots: only the highest versions"
            " of them were looked at."
        )
    if found >= histories.MOST_TIPS:
        yield f"There are more than {found} histories: not all of them were looked at."


def _not_reached(images: Images, index: Index, delivered: list[Delivered]) -> Iterator[str]:
    version, place = index.highest_old()
    if version > max((found.version for found in delivered if found.path), default=0):
        path, offset = images.where(place)
        yield (
            f"{printable(path)}: at offset {offset} a file of layout 1 begins whose header names"
            f" version {version}, which was not reached."
        )


def _keep_report(directory: str, said: list[str]) -> None:
    path = durable.free_name(os.path.join(directory, REPORT))
    try:
        data = "".join(f"{line}\n" for line in said)
        durable.write_file(path, data.encode(errors="backslashreplace"))
    except OSError as error:
        raise DiskError(path, error, "write") from error

"""The figures in Prometheus' text format, as node_exporter's textfile collector takes them.

| Metric, with the prefix ``cln_backup_`` | Value |
|---|---|
| sound | 1, or 0: unreadable, damaged, or too few of several destinations are in step |
| warnings | how many things an operator should act on |
| version | data_version of the last change |
| changes | since the snapshot |
| size_bytes, disk_free_bytes | of the backup, and for its writer |
| last_change_timestamp_seconds | Unix time |
| last_checked_timestamp_seconds, last_proven_timestamp_seconds | Unix time |
| destinations, destinations_in_step, acks | how many; only of several |
| destination_in_step, destination_version, destination_lag_changes | of each of several: ``url`` |
| hook_seconds | how long a commit waited, by ``quantile``: 0.5, 0.99 and 1, since the start |
| hook_changes_total, reconnects_total | since the start of the plugin |
| written_timestamp_seconds | when this was written |

What is not known has no line.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator, Mapping
from typing import Any

import durable
from errors import ConfigError, DiskError
from monitoring.fields import IN_STEP

PREFIX = "cln_backup_"
HELP = {
    "sound": "Whether the backup is readable, undamaged and at enough destinations.",
    "warnings": "Things that an operator should act on.",
    "version": "data_version of the last change.",
    "changes": "Changes since the snapshot.",
    "size_bytes": "Size of the backup.",
    "disk_free_bytes": "Free bytes for the writer of the backup.",
    "last_change_timestamp_seconds": "Time of the last change.",
    "last_checked_timestamp_seconds": "When every byte of the backup was last checked.",
    "last_proven_timestamp_seconds": "When the backup was last replayed and found sound.",
    "destinations": "Destinations of the backup, if several.",
    "destinations_in_step": "Destinations that have every change.",
    "acks": "Destinations that must have stored a change before the node goes on.",
    "destination_in_step": "Whether a destination has every change.",
    "destination_version": "data_version of the last change at a destination.",
    "destination_lag_changes": "Changes that a destination lacks.",
    "hook_seconds": "How long a commit of the node waited for the backup.",
    "hook_changes_total": "Changes stored since the start of the plugin.",
    "reconnects_total": "Reconnects since the start of the plugin.",
    "written_timestamp_seconds": "When these figures were written.",
}
Sample = tuple[str, dict[str, str], float | None]
"""Name, labels and value; None if that is not known."""


def render(found: Mapping[str, Any], exit_code: int, now_s: float) -> str:
    """The figures as text.

    Args:
        found: what ``status --json`` prints, perhaps with what ``backup-status`` adds.
        exit_code: of ``status``.
        now_s: Unix time.
    """
    lines: list[str] = []
    named: set[str] = set()
    for name, labels, value in _samples(found, exit_code, now_s):
        if value is None:
            continue
        if name not in named:
            named.add(name)
            kind = "counter" if name.endswith("_total") else "gauge"
            lines += [f"# HELP {PREFIX}{name} {HELP[name]}", f"# TYPE {PREFIX}{name} {kind}"]
        told = ",".join(f'{label}="{_escaped(text)}"' for label, text in labels.items())
        lines.append(f"{PREFIX}{name}{'{' + told + '}' if told else ''} {value:.17g}")
    return "\n".join(lines) + "\n"


def _escaped(text: str) -> str:
    text = text.encode(errors="backslashreplace").decode()
    return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")


def _samples(found: Mapping[str, Any], exit_code: int, now_s: float) -> Iterator[Sample]:
    rows = found.get("destinations") or []
    # A plugin that has not opened its backup yet has not looked at it.
    yield "sound", {}, float(exit_code in (0, 4)) if "url" in found or "urls" in found else None
    yield "warnings", {}, len(found["warnings"]) if "warnings" in found else None
    for name in ("version", "changes"):
        yield name, {}, found.get(name)
    yield "size_bytes", {}, found.get("size")
    yield "disk_free_bytes", {}, found.get("disk_free")
    for name in ("last_change", "last_checked", "last_proven"):
        yield f"{name}_timestamp_seconds", {}, _divided(found.get(f"{name}_ns"), 1e9)
    if rows:
        yield "destinations", {}, len(rows)
        yield "destinations_in_step", {}, found.get("in_step")
        yield "acks", {}, found.get("acks")
    for name, value in (("in_step", _is_in_step), ("version", _version_of)):
        for row in rows:
            yield f"destination_{name}", {"url": row["url"]}, value(row)
    for row in rows:
        version = row["version"]
        lag = None if version is None else max(0, found["version"] - version)
        yield "destination_lag_changes", {"url": row["url"]}, lag
    for quantile, key in (("0.5", "median"), ("0.99", "p99"), ("1", "worst")):
        value_s = _divided(found.get(f"{key}_hook_ms"), 1000)
        yield "hook_seconds", {"quantile": quantile}, value_s
    yield "hook_changes_total", {}, found.get("changes_this_session")
    yield "reconnects_total", {}, found.get("reconnects")
    yield "written_timestamp_seconds", {}, now_s


def _is_in_step(row: Mapping[str, Any]) -> float | None:
    return None if row["standing"] is None else float(row["standing"] == IN_STEP)


def _version_of(row: Mapping[str, Any]) -> float | None:
    version: float | None = row["version"]
    return version


def _divided(value: float | None, by: float) -> float | None:
    return None if value is None else value / by


def write(path: str, text: str) -> None:
    """Write ``text`` to the file ``path``, whole or not at all, readable for everybody.

    It is read by another user, and only figures and the names of destinations stand in it.

    Raises:
        ConfigError: something else than a file is there.
        DiskError: it cannot be written.
    """
    path = os.path.realpath(path)
    if os.path.exists(path) and not os.path.isfile(path):  # Root would replace /dev/null by it.
        raise ConfigError(f"{path} is no file: no metrics are written to it.", "Name a file.")
    # A name that no collector takes: it reads *.prom.
    beside = f"{path}.{secrets.token_hex(4)}"
    try:
        fd = durable.create(beside)
        try:
            os.fchmod(fd, 0o644)
            durable.write_all(fd, text.encode(), 0)
        finally:
            os.close(fd)
        os.rename(beside, path)
    except OSError as error:
        durable.discard(beside)
        raise DiskError(path, error, "write the metrics to") from error

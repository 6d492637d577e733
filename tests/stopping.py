"""Stops a compaction at a named step, or makes a step of it fail.

``Stops`` is the test's side. ``python stopping.py`` is the plugin, ``python stopping.py
cli ...`` is backup-cli, and compactions of both run through this file too, as
``python stopping.py PATH PREFIX``. They share a folder, named by the environment:
``stop-<step>`` asks for a stop, ``reached-<step>`` holds the process id of who stands
there, ``go-<step>`` lets it go on; ``settings`` holds constants and faults.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import runpy
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# As a program it has its own folder there, where the tests' folders have the packages' names.
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.realpath(__file__))))

import durable
import filebackend
import space
from backend import log
from filelog import adoption
from filelog import writer as logwriter
from upkeep import child, compaction
from wallet import restore

ROOT = Path(__file__).resolve().parent.parent

FOLDER = "BACKUP_TEST_STOPS"
CHILD_STEPS = ("replayed", "piece-written", "snapshot-written", "verified", "said")
"""Of the compacting process, in their order."""
WRITER_STEPS = ("before-copy", "copied", "before-rename", "renamed", "adopted")
"""Of the process that writes the backup, in their order."""
PATIENCE_S = 120.0


def eventually(condition: Callable[[], Any], what: str = "it") -> Any:
    """What ``condition`` returns once that is true; fails after a time that only a hang takes."""
    deadline = time.monotonic() + PATIENCE_S
    while not (found := condition()):
        assert time.monotonic() < deadline, f"{what} did not happen"
        time.sleep(0.002)
    return found


def is_running(pid: int) -> bool:
    """Whether process ``pid`` is there, and not only waits to be reaped."""
    try:
        # Its first thread may be gone while another one still holds its files and locks.
        threads = len(list(Path(f"/proc/{pid}/task").iterdir()))
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        return threads > 1 or state != "Z"
    except OSError:
        return False


def compacting(url: str) -> list[int]:
    """Processes that compact the backup at ``url``."""
    path = os.path.realpath(url.removeprefix("file://")).encode()
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                words = (entry / "cmdline").read_bytes().split(b"\0")
                if words[-3:-2] == [path] and is_running(int(entry.name)):
                    found.append(int(entry.name))
    return found


class Stops:
    """The test's side.

    Args:
        folder: a directory to use, which is made.
        settings: ``module.NAME`` of a constant to its value, and ``"fail": <function>``.
    """

    def __init__(self, folder: Path, **settings: Any) -> None:
        self._folder = folder
        folder.mkdir()
        self.set(**settings)
        self.program = [
            *("env", f"PYTHONPATH={ROOT}", f"{FOLDER}={folder}"),
            *(sys.executable, os.path.realpath(__file__)),
        ]
        self.cli = [*self.program, "cli"]

    def set(self, **settings: Any) -> None:
        """Replace the settings, for processes that start from now on."""
        (self._folder / "settings").write_text(json.dumps(settings))

    def at(self, step: str) -> None:
        """Stop whoever comes to ``step``."""
        for former in ("reached", "go"):
            (self._folder / f"{former}-{step}").unlink(missing_ok=True)
        (self._folder / f"stop-{step}").touch()

    def reached(self, step: str) -> int:
        """Wait until a process stands at ``step``; its id."""
        path = self._folder / f"reached-{step}"
        return int(eventually(lambda: path.exists() and path.read_text(), step))

    def go(self, step: str) -> None:
        """Let go on who stands at ``step``, and stop nobody there any more."""
        (self._folder / f"stop-{step}").unlink()
        (self._folder / f"go-{step}").touch()


# What follows runs in the plugin and in the compacting process.


def _step(name: str) -> None:
    folder = Path(os.environ[FOLDER])
    if not (folder / f"stop-{name}").exists():
        return
    beside = folder / f"reached-{name}.new"
    beside.write_text(str(os.getpid()))
    beside.rename(folder / f"reached-{name}")
    while not (folder / f"go-{name}").exists():
        time.sleep(0.002)


def _around(owner: Any, name: str, before: str, after: str) -> None:
    inner = getattr(owner, name)

    def outer(*arguments: Any, **options: Any) -> Any:
        if before:
            _step(before)
        result = inner(*arguments, **options)
        if after:
            _step(after)
        return result

    setattr(owner, name, outer)


def _patch_child() -> None:
    _around(restore, "build", "", "replayed")
    _around(logwriter.LogWriter, "_add", "", "piece-written")
    _around(logwriter.LogWriter, "add_snapshot", "", "snapshot-written")
    say = child.say

    def say_with_steps(message: child.Message) -> None:
        if "copied" in message:
            _step("verified")
        say(message)
        if "copied" in message:
            _step("said")

    child.say = say_with_steps


def _patch_writer() -> None:
    # The compacting process shall be this file, too.
    compaction.__file__ = __file__
    _around(adoption, "_completed", "before-copy", "copied")
    _around(filebackend.FileBackend, "adopt", "", "adopted")
    _around(durable, "replace", "before-rename", "")
    _around(os, "rename", "", "renamed")


def _fail(*_: object) -> None:
    raise OSError(errno.EIO, os.strerror(errno.EIO))


def _apply_settings(is_child: bool) -> None:
    for name, value in json.loads(Path(os.environ[FOLDER], "settings").read_text()).items():
        module, _, constant = name.partition("__")
        if module != "fail":
            setattr({"compaction": compaction, "space": space}[module], constant, value)
        elif is_child:
            setattr(durable, value, _fail)


def _log_looks() -> None:
    inner = compaction.Housekeeper._is_due

    def is_due(self: compaction.Housekeeper) -> bool:
        found = inner(self)
        log.info(f"due: {found}")
        return found

    compaction.Housekeeper._is_due = is_due  # type: ignore[method-assign]


def _main(arguments: list[str]) -> None:
    is_cli = arguments[:1] == ["cli"]
    is_child = bool(arguments) and not is_cli
    _apply_settings(is_child)
    if is_child:
        _patch_child()
        compaction.main(*arguments)
        return
    _patch_writer()
    _log_looks()
    if is_cli:
        sys.argv[1:] = arguments[1:]
        runpy.run_path(str(ROOT / "backup-cli"), run_name="__main__")
    else:
        import backup

        backup.main()


if __name__ == "__main__":
    _main(sys.argv[1:])

"""Starting from any python3: the move into ``.venv``, once, or one line that says what to type."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import pyln.client
import pytest

from tests import support

PROGRAMS = ["backup-cli", "backup.py"]
PACKAGES = [
    Path(click.__file__).parent.parent,
    Path(str(pyln.client.__file__)).parent.parent.parent,
]
"""Where the packages are that these tests run with."""


def make_venv(path: Path, packages: bool) -> Path:
    """A fresh ``.venv`` at ``path``, with the packages of this one or none; its python."""
    subprocess.run(
        [sys.executable, "-m", "venv", "--without-pip", "--symlinks", str(path)], check=True
    )
    if packages:
        (site,) = path.glob("lib/python*/site-packages")
        (site / "packages.pth").write_text("".join(f"{place}\n" for place in PACKAGES))
    return path / "bin" / "python"


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ``bin`` directory whose python3 has no packages, as a system's."""
    return make_venv(tmp_path_factory.mktemp("system") / "bare", packages=False).parent


@pytest.fixture
def app(tmp_path: Path) -> Path:
    """The program files in a directory of their own, without ``.venv``."""
    directory = tmp_path / "plugins" / "backup"
    directory.mkdir(parents=True)
    for path in [*support.ROOT.glob("*.py"), support.CLI]:
        shutil.copy(path, directory)
    rooms = (
        *("commands", "filelog", "monitoring", "postgres", "remote", "salvage", "several"),
        *("standby", "upkeep", "wallet"),
    )
    for room in rooms:
        shutil.copytree(support.ROOT / room, directory / room)
    return directory


def run(bare: Path, program: Sequence[object], check: int, **options: Any) -> Any:
    """Run ``program`` by its first line, on a system whose python3 is the bare one."""
    environment = dict(os.environ, PATH=f"{bare}{os.pathsep}{os.environ['PATH']}")
    for name in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV"):
        environment.pop(name, None)
    environment.update(options.pop("env", {}))
    done = subprocess.run(
        [str(part) for part in program],
        env=environment,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=support.ANSWER_S,
        **options,
    )
    assert done.returncode == check, done.stdout + done.stderr
    return done


def one_line(done: Any, program: str, app: Path) -> str:
    """The line on stderr, which names the program and what to type."""
    (line,) = done.stderr.splitlines()
    assert done.stdout == ""
    assert line.startswith(f"{program}: ")
    assert line.endswith(f" Run `make -C {app} install`.")
    assert "Traceback" not in line
    return str(line)


def test_moves_into_the_venv(bare: Path, app: Path, tmp_path: Path) -> None:
    make_venv(app / ".venv", packages=True)
    done = run(bare, [app / "backup-cli", "init", "--help"], 0, cwd=tmp_path)
    assert "Usage: backup-cli init" in done.stdout
    assert done.stderr == ""


def test_the_plugin_moves_into_the_venv(bare: Path, app: Path, tmp_path: Path) -> None:
    make_venv(app / ".venv", packages=True)
    environment = [f"PATH={bare}{os.pathsep}{os.environ['PATH']}", str(app / "backup.py")]
    with support.PluginProcess(tmp_path, ["env", *environment]) as plugin:
        assert plugin.manifest()["dynamic"] is False
        assert plugin.close() == 0


@pytest.mark.parametrize("how", ["link", "relative link", "relative path"])
def test_finds_the_venv_by_the_files_real_path(
    how: str, bare: Path, app: Path, tmp_path: Path
) -> None:
    make_venv(app / ".venv", packages=True)
    link = tmp_path / "bin" / "backup-cli"
    link.parent.mkdir()
    link.symlink_to(app / "backup-cli")
    program, directory = {
        "link": (link, Path("/")),
        "relative link": ("./backup-cli", link.parent),
        "relative path": ("backup/backup-cli", app.parent),
    }[how]
    done = run(bare, [program, "status", "--help"], 0, cwd=directory)
    assert "Usage: backup-cli status" in done.stdout


@pytest.mark.parametrize("name", ["backup-cli", "backup.py"])
def test_a_copy_without_its_modules_says_so(name: str, app: Path, tmp_path: Path) -> None:
    copied = shutil.copy(app / name, tmp_path / "alone")
    done = subprocess.run([sys.executable, copied], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "is not beside its modules" in done.stderr


def test_hands_over_arguments_and_exit_code(bare: Path, app: Path, tmp_path: Path) -> None:
    make_venv(app / ".venv", packages=True)
    url = f"file://{tmp_path}/a b'c\"d.bkp"
    done = run(bare, [app / "backup-cli", "status", url], 1)
    assert f"There is no backup at {url}." in done.stderr
    run(bare, [app / "backup-cli", "status"], 2)


def test_stays_in_another_virtual_environment(app: Path, tmp_path: Path) -> None:
    # A .venv that would fail: it is not needed.
    (app / ".venv" / "bin").mkdir(parents=True)
    chosen = make_venv(tmp_path / "chosen", packages=True)
    done = run(tmp_path, [chosen, app / "backup-cli", "--help"], 0)
    assert "Usage: backup-cli" in done.stdout


def system_with(click: str, tmp_path: Path) -> tuple[list[object], dict[str, str]]:
    """A system's python3, with ``click`` as the content of that package; its environment."""
    python = shutil.which("python3", path=f"{sys.base_prefix}/bin")
    assert python is not None
    environment = {"PYTHONUSERBASE": str(tmp_path / "user")}
    found = run(tmp_path, [python, "-m", "site", "--user-site"], 0, env=environment)
    site = Path(found.stdout.strip())
    site.mkdir(parents=True)
    (site / "click.py").write_text(click)
    return [python], environment


OLD_CLICKS = ["", "raise AttributeError('gone in this python')", "import click.gone"]
"""Packages that a system may have: too old, or not whole."""


@pytest.mark.parametrize("click", OLD_CLICKS)
def test_goes_to_the_venv_before_a_package_of_the_system(
    click: str, app: Path, tmp_path: Path
) -> None:
    python, environment = system_with(click, tmp_path)
    make_venv(app / ".venv", packages=True)
    done = run(tmp_path, [*python, app / "backup-cli", "--help"], 0, env=environment)
    assert "Usage: backup-cli" in done.stdout


@pytest.mark.parametrize("click", OLD_CLICKS[1:])
def test_a_package_of_the_system_that_fails(click: str, app: Path, tmp_path: Path) -> None:
    python, environment = system_with(click, tmp_path)
    done = run(tmp_path, [*python, app / "backup-cli", "--help"], 1, env=environment)
    one_line(done, "backup-cli", app)


def test_a_system_without_venv_uses_its_own(app: Path, tmp_path: Path) -> None:
    python, environment = system_with("print('the own one')\nraise SystemExit(0)", tmp_path)
    done = run(tmp_path, [*python, app / "backup-cli", "--help"], 0, env=environment)
    assert done.stdout == "the own one\n"


def test_ctrl_c_while_it_starts(app: Path, tmp_path: Path) -> None:
    python, environment = system_with(
        "import os, signal\nos.kill(os.getpid(), signal.SIGINT)", tmp_path
    )
    done = run(tmp_path, [*python, app / "backup-cli"], 128 + signal.SIGINT, env=environment)
    assert (done.stdout, done.stderr) == ("", "Stopped by SIGINT.\n")


def test_an_ignored_ctrl_c_stays_ignored(app: Path, tmp_path: Path) -> None:
    click = "import os, signal\nos.kill(os.getpid(), signal.SIGINT)\nraise SystemExit(5)"
    python, environment = system_with(click, tmp_path)
    shell = ["sh", "-c", 'trap "" INT; exec "$@"', "sh", *python, app / "backup-cli"]
    run(tmp_path, shell, 5, env=environment)


@pytest.mark.parametrize("program", PROGRAMS)
def test_no_venv(program: str, bare: Path, app: Path) -> None:
    line = one_line(run(bare, [app / program], 1), program, app)
    assert "No module named" in line
    assert "No such file or directory" in line


def test_no_venv_through_a_link(bare: Path, app: Path, tmp_path: Path) -> None:
    link = tmp_path / "my-backup"
    link.symlink_to(app / "backup.py")
    one_line(run(bare, [link], 1), "my-backup", app)


@pytest.mark.parametrize("program", PROGRAMS)
def test_venv_whose_python_is_gone(program: str, bare: Path, app: Path) -> None:
    python = make_venv(app / ".venv", packages=True)
    for link in python.parent.glob("python*"):
        link.unlink()
        link.symlink_to("/usr/bin/python3.0-removed-by-an-upgrade")
    line = one_line(run(bare, [app / program], 1), program, app)
    assert "does not start: No such file or directory" in line


@pytest.mark.parametrize("content", [None, b"", b"\x7fELF of another machine"])
def test_venv_whose_python_does_not_run(content: bytes | None, bare: Path, app: Path) -> None:
    python = app / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    if content is None:
        python.mkdir()
    else:
        python.write_bytes(content)
        python.chmod(0o755)
    line = one_line(run(bare, [app / "backup-cli"], 1), "backup-cli", app)
    assert "does not start: " in line


@pytest.mark.parametrize("program", PROGRAMS)
def test_venv_without_the_packages(program: str, bare: Path, app: Path) -> None:
    make_venv(app / ".venv", packages=False)
    line = one_line(run(bare, [app / program], 1), program, app)
    assert "No module named" in line
    assert "does not start" not in line


def test_venv_of_a_python_that_was_upgraded(bare: Path, app: Path) -> None:
    make_venv(app / ".venv", packages=True)
    (library,) = (app / ".venv" / "lib").iterdir()
    library.rename(library.with_name("python3.0"))
    assert "No module named" in one_line(run(bare, [app / "backup-cli"], 1), "backup-cli", app)


@pytest.mark.parametrize("program", PROGRAMS)
def test_venv_that_is_none_makes_no_loop(program: str, bare: Path, app: Path) -> None:
    # Its python starts, but it is not one of a .venv.
    python = make_venv(app / ".venv", packages=False)
    python.unlink()
    python.write_text(f'#!/bin/sh\nexec {bare}/python3 "$@"\n')
    python.chmod(0o755)
    line = one_line(run(bare, [app / program], 1), program, app)
    assert "No module named" in line


def test_a_program_started_by_one_that_moved_may_move_itself(
    bare: Path, app: Path, tmp_path: Path
) -> None:
    make_venv(app / ".venv", packages=True)
    starter = tmp_path / "starter"
    starter.write_text(
        "#!/usr/bin/env python3\n"
        "import sys\n"
        f"sys.path.insert(0, {str(app)!r})\n"
        "import environment\n"
        "environment.ensure('click')\n"
        "import os, subprocess\n"
        f"os.environ['PATH'] = {str(bare)!r} + os.pathsep + os.environ['PATH']\n"
        f"sys.exit(subprocess.call([{str(app / 'backup-cli')!r}, '--help']))\n"
    )
    starter.chmod(0o755)
    assert "Usage: backup-cli" in run(bare, [starter], 0).stdout

"""contrib/: units, cron line, logrotate and Dockerfile, each tried as far as it goes here."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import commands
from tests import support
from tests.support import first_changes, make_backup
from tests.test_readme import blocks

CONTRIB, DOCS = support.ROOT / "contrib", support.ROOT / "docs"
UNITS = sorted((CONTRIB / "systemd").glob("*.service"))
LINES = [unit for unit in UNITS if "line" in unit.stem]
PAGES = {
    "node-backup": "remote",
    "node-backup-line": "ssh-to-backup",
    "node-backup-line-reverse": "ssh-to-node",
    "node-standby": "standby",
}
"""The page whose steps lead to the unit."""
DROP_IN = CONTRIB / "systemd" / "lightningd.service.d" / "node-backup.conf"
LIGHTNINGD_UNIT = "[Service]\nExecStart=/bin/true\nRestart=on-failure\n"
MOST_EXPOSED = 2.0
"""What `systemd-analyze security` may say; a unit without hardening has 9.6."""

systemd = pytest.mark.skipif(
    shutil.which("systemd-analyze") is None, reason="systemd-analyze is not on PATH"
)


def run(*command: object, check: int = 0, **options: Any) -> Any:
    done = subprocess.run(
        [str(part) for part in command],
        capture_output=True,
        text=True,
        timeout=support.ANSWER_S,
        **options,
    )
    assert done.returncode == check, done.stdout + done.stderr
    return done


def setting(unit: Path, name: str) -> str:
    """The one value of ``name`` in ``unit``."""
    (value,) = re.findall(rf"^{name}=(.*)$", unit.read_text(), re.MULTILINE)
    return str(value)


@systemd
@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.stem)
def test_units_are_hardened(unit: Path) -> None:
    said = run("systemd-analyze", "security", "--offline=true", "--no-pager", unit).stdout
    (exposure,) = re.findall(r"Overall exposure level for .*: ([0-9.]+)", said)
    assert float(exposure) <= MOST_EXPOSED
    assert "~@resources" not in setting(unit, "SystemCallFilter"), "compaction lowers its priority"


@systemd
def test_units_are_understood(tmp_path: Path) -> None:
    for unit in UNITS:
        # verify wants the programs to exist.
        text = unit.read_text().replace("/opt/backup/", f"{support.ROOT}/")
        (tmp_path / unit.name).write_text(text.replace("/usr/bin/ssh", sys.executable))
    (tmp_path / "lightningd.service").write_text(LIGHTNINGD_UNIT)
    (tmp_path / "lightningd.service.d").mkdir()
    shutil.copy(DROP_IN, tmp_path / "lightningd.service.d")
    units = sorted(tmp_path.glob("*.service"))
    done = run("systemd-analyze", "verify", "--man=no", *units, env=with_units(tmp_path))
    complaints = [line for line in done.stderr.splitlines() if str(tmp_path) in line]
    assert complaints == []
    assert "node-backup" not in done.stderr


@systemd
@pytest.mark.parametrize("page", ["remote", "ssh-to-node", "onion", "vpn"])
def test_what_a_page_adds_to_the_unit_is_understood(page: str, tmp_path: Path) -> None:
    text = (CONTRIB / "systemd" / "node-backup.service").read_text()
    (tmp_path / "node-backup.service").write_text(text.replace("/opt/backup/", f"{support.ROOT}/"))
    (tmp_path / "node-backup.service.d").mkdir()
    (added,) = [text for info, text in blocks(DOCS / f"{page}.md") if info == "ini"]
    (tmp_path / "node-backup.service.d" / "override.conf").write_text(added)
    unit = tmp_path / "node-backup.service"
    done = run("systemd-analyze", "verify", "--man=no", unit, env=with_units(tmp_path))
    assert "node-backup" not in done.stderr
    changed = dict(re.findall(r'^Environment="?(\w+)=([^"\n]*)"?$', added, re.MULTILINE))
    server_command(changed)


def server_command(changed: dict[str, str]) -> list[str]:
    """ExecStart of the server's unit as systemd makes words of it; each is a real option."""
    unit = CONTRIB / "systemd" / "node-backup.service"
    environment = dict(each.split("=", 1) for each in setting(unit, "Environment").split())
    assert changed.keys() <= environment.keys()
    words = []
    for word in shlex.split(setting(unit, "ExecStart")):
        known = (environment | changed).get(word[1:]) if word.startswith("$") else None
        words += [word] if known is None else known.split()
    with commands.main.commands["server"].make_context("server", words[2:]):
        return words


def test_the_standby_s_line_is_real() -> None:
    """Each word of it, as systemd makes them."""
    unit = CONTRIB / "systemd" / "node-standby.service"
    environment = dict(each.split("=", 1) for each in setting(unit, "Environment").split())
    words = shlex.split(setting(unit, "ExecStart"))
    words = [environment[word[1:]] if word.startswith("$") else word for word in words]
    with commands.main.commands["standby"].make_context("standby", words[2:]) as context:
        assert context.params["urls"] == ("socket:unix:/run/node-backup-line/server.sock",)
        assert context.params["check_every_s"] == 86400


def with_units(directory: Path) -> dict[str, str]:
    """The environment where systemd's programs look into ``directory``, too."""
    return dict(os.environ, SYSTEMD_UNIT_PATH=f"{directory}:")


def test_a_refused_node_is_not_started_for_ever() -> None:
    """A refusal takes seconds, so the limit is met; a server that is away takes two minutes."""
    for unit in DROP_IN, CONTRIB / "systemd" / "node-backup.service":
        within_s = int(setting(unit, "StartLimitIntervalSec"))
        starts, pause_s = int(setting(unit, "StartLimitBurst")), int(setting(unit, "RestartSec"))
        assert starts * (pause_s + 10) < within_s
        assert text_before(unit, "[Service]").count("StartLimit") == 2
    assert int(setting(DROP_IN, "StartLimitIntervalSec")) < 5 * (30 + 120)


def text_before(unit: Path, section: str) -> str:
    """systemd reads the limits of starts in [Unit] only."""
    return unit.read_text().partition(section)[0]


def test_the_server_s_line_serves(tmp_path: Path) -> None:
    """ExecStart as it is written, but for the places."""
    path = make_backup(f"file://{tmp_path}/node.bkp", first_changes(3))
    program, *words = server_command({})
    assert program == "/opt/backup/backup-cli"
    (tmp_path / "run").mkdir(mode=0o750)
    words = [word.replace("/var/lib/node-backup/node.bkp", str(path)) for word in words]
    words = [word.replace("/run/node-backup/", f"{tmp_path}/run/") for word in words]
    server = subprocess.Popen(
        [sys.executable, support.CLI, *words], stderr=subprocess.PIPE, text=True
    )
    with server:
        assert server.stderr is not None
        said = server.stderr.readline()
        server.terminate()
    assert "at version 3" in said
    assert re.match(r"<\d>", said), "the level, as systemd reads it"


@pytest.mark.skipif(shutil.which("ssh") is None, reason="ssh is not on PATH")
@pytest.mark.parametrize("unit", LINES, ids=lambda unit: unit.stem)
def test_the_line_s_options_are_ssh_s(unit: Path) -> None:
    program, *words = shlex.split(setting(unit, "ExecStart"))
    assert program == "/usr/bin/ssh"
    said = run("ssh", "-G", "-F", "/dev/null", *words).stdout
    assert "exitonforwardfailure yes" in said
    assert re.search(r"^(local|remote)forward \S*/server.sock \S*/server.sock$", said, re.MULTILINE)


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.stem)
def test_the_steps_of_the_page_lead_to_the_unit(unit: Path) -> None:
    """Its account, key and addresses are those that its page makes or names."""
    typed = (DOCS / f"{PAGES[unit.stem]}.md").read_text()
    user, line = setting(unit, "User"), setting(unit, "ExecStart")
    assert f"sudo -u {user} " in typed
    assert f"contrib/systemd/{unit.name} /etc/systemd/system/" in typed
    for key in re.findall(r" -i (\S+)", line):
        assert f'ssh-keygen -t ed25519 -N "" -f {key}\n' in typed
    for place in re.findall(r"\S+@\S+|file:\S+", line):
        assert f" {place}\n" in typed


def test_the_cron_line_is_silent_until_something_is_wrong(tmp_path: Path) -> None:
    path = make_backup(f"file://{tmp_path}/node.bkp", first_changes(3))
    line = (CONTRIB / "cron").read_text().splitlines()[-1]
    assert "%" not in line, "cron ends a command there"
    command = re.sub(r"^(\S+ ){5}bitcoin ", "", line)
    python = f"{shlex.quote(sys.executable)} {shlex.quote(str(support.CLI))}"
    command = command.replace("/opt/backup/backup-cli", python)
    command = command.replace("/mnt/disk2/node.bkp", str(path))
    done = run("/bin/sh", "-c", command)
    if done.stdout:  # A disk that is nearly full here, too.
        assert done.stdout.startswith("exit code 4: ")
    path.rename(tmp_path / "gone")
    done = run("/bin/sh", "-c", command)
    assert done.stdout.startswith("exit code 1: Error: There is no backup at")


@pytest.mark.skipif(shutil.which("logrotate") is None, reason="logrotate is not on PATH")
def test_a_rotated_log_goes_on(tmp_path: Path) -> None:
    directory = tmp_path / "log"
    directory.mkdir(mode=0o755)
    log = directory / "server.log"
    config = tmp_path / "logrotate"
    text = (CONTRIB / "logrotate").read_text()
    config.write_text(text.replace("/var/log/node-backup", str(directory)))
    config.chmod(0o644)
    with log.open("a") as stderr:
        print("old", file=stderr, flush=True)
        run("logrotate", "--force", "--state", tmp_path / "state", config)
        print("new", file=stderr, flush=True)
    assert (log.read_text(), (directory / "server.log.1").read_text()) == ("new\n", "old\n")


def test_the_image_gets_all_that_is_packed() -> None:
    """Docker is not run here; what it copies is what the package is made of."""
    text = (CONTRIB / "docker" / "Dockerfile").read_text().replace("\\\n", " ")
    copied: set[Path] = set()
    for line in re.findall(r"^COPY (.*)$", text, re.MULTILINE):
        *sources, target = line.split()
        assert target.startswith("/usr/src/cln-backup/")
        for source in sources:
            found = set(support.ROOT.glob(source))
            assert found, f"{source} does not exist"
            copied |= found
    tracked = run("git", "ls-files", "*.py", "backup-cli", cwd=support.ROOT).stdout.split()
    for name in tracked:
        if Path(name).parts[0] not in ("tests", "bench"):
            path = support.ROOT / name
            assert copied & {path, *path.parents}, f"{name} is not copied"
    instructions = {line.split()[0] for line in text.splitlines() if line[:1].isalpha()}
    assert instructions == {"ARG", "FROM", "RUN", "COPY"}

"""What README.md and docs/ tell a user to type is typed, and what they quote is said.

A fenced block ``sh`` runs, by itself, on a machine of its own (``Machine``); in a block
``sh example`` and in running text the commands must be real ones, with real options.
"""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest

from commands import main
from tests import support
from tests.layout1_files import EarlierPlugin
from tests.peers import ServerProcess
from tests.support import ROOT, first_changes, run_cli

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^( *)```([^\n]*)\n(.*?)^ *```$", re.DOTALL | re.MULTILINE)
IDLE = ("lightningd", "lightning-cli", "make", "useradd", "systemctl")
"""Programs that a block may call, and that do nothing here."""
SERVER = "unix:/run/node-backup-line/server.sock"
VERSION = 7
"""Of the node and of its backup."""


def blocks(page: Path) -> list[tuple[str, str]]:
    """Info string and text of each fenced block."""
    found = BLOCK.findall(page.read_text())
    return [(info, textwrap.dedent(indent + text)) for indent, info, text in found]


def to_run() -> list[Any]:
    found = []
    for page in PAGES:
        scripts = [text for info, text in blocks(page) if info == "sh"]
        for number, script in enumerate(scripts, 1):
            found.append(pytest.param(page, script, id=f"{page.stem}-{number}"))
    return found


# Running


class Machine:
    """A user's home, a node in it, two disks, and programs that do nothing, below ``root``.

    The node has a backup, unless ``script`` makes one; its database is lost, if it restores.
    """

    def __init__(self, root: Path, script: str, earlier: bool) -> None:
        self.root = root
        self.node = root / "home" / ".lightning" / "bitcoin"
        self.code = root / "opt" / "backup"
        self.backup = root / "mnt" / "disk2" / "node.bkp"
        for place in (self.node, self.code, self.backup.parent, root / "mnt" / "disk3"):
            place.mkdir(parents=True)
        for name in ("mnt/safe", "var/lib/node-backup", "bin"):
            (root / name).mkdir(parents=True)
        for name in ("backup-cli", "backup.py"):
            (self.code / name).symlink_to(ROOT / name)
        (root / "mnt" / "safe" / "hsm_secret").write_bytes(bytes(32))
        self._make_programs(root / "bin")
        self._make_node(script, earlier)

    def _make_programs(self, place: Path) -> None:
        for name in IDLE:
            (place / name).write_text("#!/bin/sh\n")
        (place / "sudo").write_text('#!/bin/sh\n[ "$1" = -u ] && shift 2\nexec "$@"\n')
        for program in place.iterdir():
            program.chmod(0o755)

    def _make_node(self, script: str, earlier: bool) -> None:
        url = f"file://{self.backup}"
        if earlier:
            EarlierPlugin(self.backup).session(first_changes(VERSION))
            (self.node / "backup.lock").write_text(json.dumps({"backend_url": url}))
        elif " init " not in script or "backup.lock" in script:
            run_cli("init", "--lightning-dir", self.node, url)
            support.add_session(url, first_changes(VERSION))
        if re.search(r"restore \S+ ~/\.lightning/bitcoin\b", script):
            return
        if "mkdir" in script:
            shutil.rmtree(self.node)
            return
        support.apply_calls(self.node / "lightningd.sqlite3", first_changes(VERSION))

    def run(self, script: str) -> str:
        """Run ``script`` with its paths below ``root``; what it printed."""
        for place in ("/mnt/", "/opt/", "/var/"):
            script = script.replace(place, f"{self.root}{place}")
        path = [self.root / "bin", Path(sys.executable).parent, os.environ["PATH"]]
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", script],
            cwd=self.code,
            env=os.environ | {"HOME": f"{self.root}/home", "PATH": ":".join(map(str, path))},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=support.ANSWER_S,
            input="y\n",
            text=True,
        )
        assert done.returncode == 0, f"{script}\n{done.stdout}"
        return done.stdout


@pytest.mark.parametrize(("page", "script"), to_run())
def test_a_block_runs(page: Path, script: str, tmp_path: Path) -> None:
    machine = Machine(tmp_path, script, earlier=page.stem == "switching")
    if SERVER not in script:
        machine.run(script)
        return
    served = f"file://{tmp_path}/served.bkp"
    run_cli("init", served, cwd=tmp_path)
    with ServerProcess(served).ready() as server:
        machine.run(script.replace(SERVER, server.address))


# Reading


def commands() -> dict[str, click.Command]:
    """The commands of backup-cli by name."""
    found = dict(main.commands)
    return found


def lines(page: Path) -> Iterator[tuple[str, list[str]]]:
    """Each ``backup-cli ...`` of ``page`` in words, and the text that it is in."""
    text = page.read_text()
    shown = [line for _, block in blocks(page) for line in block.splitlines()]
    shown += re.findall(r"`([^`\n]*(?:\n[^`\n]+)?)`", BLOCK.sub("", text))
    for line in shown:
        _, called, rest = " ".join(line.split()).partition("backup-cli ")
        if called:
            # Not what a shell takes: "file:///... > /dev/null", "... || test $? = 3".
            words = shlex.split(re.split(r" (?:>|\|\|) ", rest)[0])
            yield line, [word for word in words if word != "..."]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_command_is_one(page: Path) -> None:
    known = commands()
    for line, words in lines(page):
        assert words[0] in known, line
        command = known[words[0]]
        # In running text a name stands for a number, and arguments may be left out.
        options = {name for word in words if (name := word.partition("=")[0]).startswith("-")}
        assert options <= {name for p in command.params for name in p.opts}, line


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_shown_command_is_whole(page: Path) -> None:
    known = commands()
    shown = [text for info, text in blocks(page) if info.startswith("sh")]
    for line in "\n".join(shown).splitlines():
        _, called, rest = line.partition("backup-cli ")
        name, *words = shlex.split(re.split(r" (?:>|\|\|) ", rest)[0]) or [""]
        if called and name in known:
            with known[name].make_context(name, words):
                pass


def test_what_is_quoted_is_said() -> None:
    """The first column of the tables of errors.md quotes pieces of messages."""
    said = set()
    for source in (support.CLI, *ROOT.glob("*.py"), *ROOT.glob("[!t.]*/*.py")):
        for node in ast.walk(ast.parse(source.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                said.add(node.value)
    rows = re.findall(r"^\| (.*?) \|", (ROOT / "docs" / "errors.md").read_text(), re.MULTILINE)
    quotes = [quote for row in rows for quote in re.findall(r"`([^`]+)`", row)]
    assert len(quotes) > 40
    missing = [quote for quote in quotes if not any(quote.strip() in text for text in said)]
    assert missing == []


def test_links_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)]+)\)", page.read_text()):
            path, _, anchor = target.partition("#")
            found = (page.parent / path) if path else page
            assert found.exists(), target
            if not anchor:
                continue
            titles = re.findall(r"^#+ (.*)$", found.read_text(), re.MULTILINE)
            slugs = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}
            assert anchor in slugs, target

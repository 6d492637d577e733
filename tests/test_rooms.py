"""Imports go one way through the rooms, and docs/internals.md names what there is."""

from __future__ import annotations

import ast
import graphlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import ROOT

LEVELS: tuple[dict[str, str], ...] = (
    {"backup-cli": "backup-cli", "demo": "demo", "packaging": "cln_backup"},
    {"commands": "commands"},
    {"plugin": "backup healing pylnclient", "server": "server"},
    {"destinations": "destinations", "serving": "serving", "standby": "standby"},
    {"upkeep": "upkeep", "salvage": "salvage"},
    {
        "file": "filebackend",
        "socket": "socketbackend",
        "postgres": "postgresbackend postgres",
        "mirror": "mirrorbackend several",
    },
    {"remote": "remote"},
    {"wire": "protocol stream unixsocket"},
    {"replica": "replica"},
    {"filelog": "filelog", "monitoring": "monitoring", "wallet": "wallet"},
    {"ground": "backend durable scratch space"},
    {"bottom": "decisions quorum clusterchecks errors environment unwind"},
)
"""From the top down: the rooms of each level, and the modules and packages in each.

A module imports from its own room and from all levels below, so not from a neighbour. That the
work beside the node (upkeep) is a process needs no import upwards: it starts its own file.
"""
EXCEPTIONS = {
    ("demo", "tests.support"): "it plays lightningd as the tests do",
}
"""Importing and imported module: why it may be."""
ONLY_IN = {
    "sqlite3": "wallet salvage",
    "click": "commands",
    "socks": "remote",
    "pyln": "plugin",
    "psycopg": "postgres",
}
"""What is foreign, and the rooms that know it; salvage keeps only its own notes in SQLite."""
BY_STRING = {
    "environment": "the packages that a program needs, to tell what is missing",
    "cln_backup": "the programs, as a checkout has them",
}
"""Who may import what no table of imports shows."""

LEVEL_OF = {room: number for number, rooms in enumerate(LEVELS) for room in rooms}
ROOM_OF = {
    name: room for rooms in LEVELS for room, names in rooms.items() for name in names.split()
}


def modules() -> dict[str, Path]:
    """Every module of the programs by its name."""
    found = {path.stem: path for path in ROOT.glob("*.py")} | {"backup-cli": ROOT / "backup-cli"}
    for path in ROOT.glob("*/*.py"):
        package = path.parent.name
        if (path.parent / "__init__.py").exists() and package not in ("tests", "bench"):
            found[package if path.stem == "__init__" else f"{package}.{path.stem}"] = path
    return found


MODULES = modules()


def room(module: str) -> str | None:
    """The room of ``module``, None if it is foreign."""
    return ROOM_OF.get(module.partition(".")[0])


def imports(source: str) -> Iterator[str]:
    """What ``source`` imports, also inside of functions; "." for what is relative."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            inner = [f"{base}.{alias.name}" for alias in node.names]
            found = [name for name in inner if name in MODULES]
            yield from found if len(found) == len(inner) else [base, *found]


def breaches(module: str, source: str) -> list[str]:
    """What is wrong with the imports of ``source``, if that is ``module``."""
    own, found = room(module), []
    assert own is not None
    for name in imports(source):
        its, top = room(name), name.partition(".")[0]
        if (module, name) in EXCEPTIONS:
            continue
        if its is not None and its != own and LEVEL_OF[its] <= LEVEL_OF[own]:
            found.append(f"{module} ({own}) imports {name} ({its})")
        if own not in ONLY_IN.get(top, own).split():
            found.append(f"{module} imports {name}, which is for {ONLY_IN[top]}")
        if top in ("", "tests", "bench"):
            found.append(f"{module} imports {name}")
        if top in ("importlib", "runpy") and module not in BY_STRING:
            found.append(f"{module} imports by string")
    if "__import__" in source:
        found.append(f"{module} imports by string")
    return found


def test_every_module_has_a_room() -> None:
    assert {name.partition(".")[0] for name in MODULES} == set(ROOM_OF)


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_one_way(module: str) -> None:
    assert breaches(module, MODULES[module].read_text()) == []


def test_no_circles() -> None:
    """Nor inside of a room."""
    graph = {m: set(imports(p.read_text())) & set(MODULES) - {m} for m, p in MODULES.items()}
    list(graphlib.TopologicalSorter(graph).static_order())


def test_exceptions_are_needed() -> None:
    for module, name in EXCEPTIONS:
        assert name in imports(MODULES[module].read_text())
    for module in BY_STRING:
        assert {"importlib", "runpy"} & set(imports(MODULES[module].read_text()))


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("errors", "import durable"),
        ("durable", "def f() -> None:\n    from backend import Change\n    import filebackend"),
        ("filelog.reader", "from wallet import database"),
        ("wallet.restore", "from filelog import layout1"),
        ("filebackend", "import socketbackend"),
        ("filebackend", "if TYPE_CHECKING:\n    from upkeep.compaction import Compactor"),
        ("upkeep.scrub", "import destinations"),
        ("backup", "import server"),
        ("server", "from commands import shared"),
        ("serving.keeper", "import server"),
        ("server", "import sqlite3"),
        ("upkeep.child", "import click.testing"),
        ("server", "from pyln.client import Plugin"),
        ("filelog.reader", "from . import layout1"),
        ("wallet.node", "import tests.support"),
        ("protocol", "import importlib"),
        ("protocol", "__import__('server')"),
    ],
)
def test_a_wrong_import_is_noticed(module: str, source: str) -> None:
    assert breaches(module, source)


# What docs/internals.md names

INTERNALS = ROOT / "docs" / "internals.md"
FILES_OF_A_NODE = ("backup.lock",)


def names(path: Path, prefix: str) -> set[str]:
    """``prefix.name`` of each function, class, method and constant of the module ``path``."""
    found = set()

    def look(body: list[ast.stmt], prefix: str) -> None:
        for node in body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                found.add(f"{prefix}.{node.name}")
            if isinstance(node, ast.ClassDef):
                look(node.body, f"{prefix}.{node.name}")
            targets = node.targets if isinstance(node, ast.Assign) else []
            targets += [node.target] if isinstance(node, ast.AnnAssign) else []
            found.update(f"{prefix}.{t.id}" for t in targets if isinstance(t, ast.Name))

    look(ast.parse(path.read_text()).body, prefix)
    return found


def unknown(text: str) -> list[str]:
    """The tests, files and dotted names in backticks in ``text`` that do not exist."""
    known = set(MODULES) | set(FILES_OF_A_NODE)
    for module, path in MODULES.items():
        known |= names(path, module)
    missing = []
    for name in re.findall(r"`([^`\s]+)`", text):
        path, is_test, test = name.partition("::")
        if is_test:
            file = ROOT / path
            if not file.exists() or f"test.{test}" not in names(file, "test"):
                missing.append(name)
        elif re.fullmatch(r"[A-Za-z_]\w*(\.\w+)+", name):
            if name not in known and not (ROOT / name).exists():
                missing.append(name)
        elif re.fullmatch(r"[\w/]+/[\w.]*", name) and not (ROOT / name).exists():
            missing.append(name)
    return missing


def test_internals_name_what_exists() -> None:
    text = INTERNALS.read_text()
    assert len(re.findall(r"`tests/[\w/]+\.py::\w+`", text)) > 30
    assert len(re.findall(r"`[a-z]\w*\.[\w.]+`", text)) > 40
    assert unknown(text) == []


def test_what_does_not_exist_is_noticed() -> None:
    wrong = ["tests/test_x.py::test_y", "tests/test_rooms.py::test_y", "durable.no", "x.LogFile"]
    wrong += ["filebackend.FileBackend.no", "docs/no.md"]
    right = ["durable.LogFile.append", "tests/test_rooms.py::test_no_circles", "filelog/"]
    right += ["filelog.layout2.RULES", "backup.py", "backup.lock", "continue"]
    assert unknown(" ".join(f"`{name}`" for name in wrong + right)) == wrong


def test_internals_show_the_rooms() -> None:
    """The table of the rooms in the page has all of them, in the order of the levels."""
    shown = re.findall(r"^\| ([a-z, -]+) \|", INTERNALS.read_text(), re.MULTILINE)
    rooms = [", ".join(rooms) for rooms in LEVELS]
    assert [row for row in shown if row in rooms] == rooms

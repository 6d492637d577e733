"""The operator's commands: make, look at, restore and repair a node's backup."""

from __future__ import annotations

import os

import unwind
from commands import attach, channels, create, look, recover, salvage, serve, standing, watch
from commands.shared import main

__all__ = [
    "attach",
    "channels",
    "create",
    "look",
    "main",
    "recover",
    "run",
    "salvage",
    "serve",
    "standing",
    "watch",
]


def run() -> None:
    """Run the command that was typed."""
    os.umask(0o077)  # SQLite creates its files for everybody.
    unwind.print_anything()
    main()

"""A log that nobody can fill: of each kind of line the first few, then a count."""

from __future__ import annotations

import logging
import re
import threading
import time
from collections import Counter

from backend import log

FEW = 20
"""Lines of a kind that are logged in each PERIOD_S."""
PERIOD_S = 60.0
MAX_KINDS = 200
"""Kinds that are told apart; what comes from outside may make up any number."""
_REPORT = "more lines like:"
_VARYING = re.compile(r"\S*\d\S*")


class FewLines(logging.Filter):
    """Lets the first lines of a kind pass, and counts the others. Errors always pass."""

    def __init__(self) -> None:
        super().__init__()
        self._lock = threading.Lock()
        self._seen: Counter[str] = Counter()
        self._ends = time.monotonic() + PERIOD_S

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether ``record`` is logged."""
        if record.levelno >= logging.ERROR or _REPORT in record.msg:
            return True
        kind = _VARYING.sub("*", record.getMessage())
        with self._lock:
            if kind not in self._seen and len(self._seen) >= MAX_KINDS:
                kind = "others"
            self._seen[kind] += 1
            return self._seen[kind] <= FEW

    def report(self) -> None:
        """Say how many lines were left out, once in each PERIOD_S."""
        with self._lock:
            if time.monotonic() < self._ends:
                return
            left_out = {kind: count - FEW for kind, count in self._seen.items() if count > FEW}
            self._seen.clear()
            self._ends = time.monotonic() + PERIOD_S
        for kind, count in left_out.items():
            log.warning(f"{count} {_REPORT} {kind}")

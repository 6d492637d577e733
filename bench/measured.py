"""Runs the program in its arguments; seconds, peak KiB and exit code go to the first one.

In a process of its own, because a child's peak includes what its parent held when it
started.
"""

from __future__ import annotations

import os
import sys
import time

started = time.perf_counter()
pid = os.posix_spawn(sys.executable, [sys.executable, *sys.argv[2:]], os.environ)
_, status, usage = os.wait4(pid, 0)
took_s = time.perf_counter() - started
with open(sys.argv[1], "w") as report:
    print(took_s, usage.ru_maxrss, os.waitstatus_to_exitcode(status), file=report)

"""The main job, end to end: a recorded node is backed up, interrupted, restored, compared.

Run it with ``make demo``. It plays lightningd's side for the real plugin with the traffic
that a real node sent, kills the plugin in the middle, restores with backup-cli and
compares the result with the database which that node had. Exits with 1 if they differ.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from tests.support import CLI, Call, PluginProcess, network_dir, trace_database, trace_sessions
from wallet import database

TRACE = "payer"


def say(text: str = "") -> None:
    print(text, flush=True)


def command(*arguments: object, show: Sequence[str] = ()) -> float:
    """Run backup-cli and print it with its output; the seconds it took.

    Args:
        show: print only the lines that begin with one of these.
    """
    words = [str(argument) for argument in arguments]
    say(f"$ backup-cli {' '.join(words)}")
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, str(CLI), *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    took_s = time.perf_counter() - started
    for line in done.stdout.splitlines():
        if done.returncode or not show or line.startswith(tuple(show)):
            say(f"  {line}")
    if done.returncode:
        sys.exit(f"backup-cli {words[0]} failed with exit code {done.returncode}")
    return took_s


class Node:
    """lightningd's side: starts the plugin and announces commits to it.

    Attributes:
        hook_s: seconds that each acknowledged commit waited for the plugin.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.hook_s: list[float] = []

    def run(self, calls: Sequence[Call], interrupted_by: Call | None = None) -> None:
        """One lightningd process: commit ``calls``, then stop.

        Args:
            interrupted_by: a commit that is announced at the end; the plugin is killed
                before it answers, so that this commit does not happen.
        """
        with PluginProcess(self.directory) as plugin:
            plugin.manifest()
            for number, call in enumerate(calls):
                started = time.perf_counter()
                plugin.write(*call)
                self.hook_s.append(time.perf_counter() - started)
                if number == 0:
                    plugin.init(self.directory)
            if interrupted_by is None:
                plugin.close()
            else:
                version, writes = interrupted_by
                plugin.send("db_write", {"data_version": version, "writes": writes})
                plugin.kill()
            for _, line in plugin.log:
                say(f"  plugin: {line}")
            if plugin.errors():
                sys.exit("the plugin refused a commit")


def play(node: Node, sessions: Sequence[Sequence[Call]]) -> None:
    """All recorded sessions, with the plugin killed in the middle of the longest."""
    longest = max(sessions, key=len)
    for calls in sessions:
        if calls is not longest:
            say(f"lightningd starts, commits {len(calls)} changes and stops.")
            node.run(calls)
            continue
        middle = len(calls) // 2
        say(f"lightningd starts and commits {middle} changes. The plugin gets SIGKILL in the next.")
        node.run(calls[:middle], interrupted_by=calls[middle])
        say(f"lightningd starts again, commits {len(calls) - middle} changes and stops.")
        node.run(calls[middle:])


def run(scratch: Path) -> list[str]:
    """The demonstration, in ``scratch``; how the restored database differs."""
    directory = network_dir(scratch)
    disk = scratch / "disk2"
    disk.mkdir()
    url = f"file://{disk}/node.bkp"
    sessions = trace_sessions(TRACE)

    say("1. A backup for a new node, on what should be another disk")
    command("init", "--lightning-dir", directory, url, show=["Stored", "Add"])
    say("\n2. The node runs: the recorded traffic of a real one, through the real plugin")
    node = Node(directory)
    play(node, sessions)
    say("\n3. What the backup holds")
    command("status", url)
    say("\n4. The node's disk is lost: restore")
    restored = scratch / "restored.sqlite3"
    restore_s = command("restore", url, restored)
    say("\n5. Compare with the database that the recorded node had, schema and every row")
    original = trace_database(TRACE, scratch)
    differences = database.compare(str(original), str(restored))

    hook_ms = statistics.median(node.hook_s) * 1000
    worst_ms = statistics.quantiles(node.hook_s, n=100)[98] * 1000
    sql = sum(len(statement.encode()) for calls in sessions for _, w in calls for statement in w)
    say(f"  changes acknowledged:  {len(node.hook_s)}, {sql} bytes of SQL")
    say(f"  the node waited:       {hook_ms:.2f} ms a change (median), {worst_ms:.2f} ms (99 %)")
    say(f"  restore:               {restore_s:.2f} s, with the start of backup-cli and all checks")
    say(f"  restored version:      {database.version_of(str(restored))}")
    say(f"  the node's version:    {database.version_of(str(original))}")
    return differences


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="backup-demo-") as scratch:
        differences = run(Path(scratch))
    for difference in differences:
        say(f"  DIFFERENT: {difference}")
    say("  the databases:         " + ("DIFFERENT" if differences else "identical"))
    sys.exit(1 if differences else 0)


if __name__ == "__main__":
    main()

"""Python imports this at its start when the folder is on PYTHONPATH: the wall clock of a storage node can be moved.

``STORAGED_CHAOS_CLOCKS`` names a folder; its file NODE has the seconds by which the clock of that node is off. They are
read again every second. Certificates are still checked by the machine's own clock (``datetime`` and OpenSSL).

The nodes of a trial cluster are forked by ``storaged.cli.fork_server``. So this is there too, and looks which node the
process is when it asks for the time.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path


def _node() -> str:
    """The node of a process ``storaged run DIRECTORY/NODE/config.toml``; empty for any other process."""
    words = _words()
    if "run" not in words[:-1]:
        return ""
    return Path(words[words.index("run") + 1]).parent.name


def _words() -> list[str]:
    return Path("/proc/self/cmdline").read_text().split("\0")


def _move(folder: Path) -> None:
    seconds, looked, true_ns, monotonic = 0.0, 0.0, time.time_ns, time.monotonic

    def time_ns() -> int:
        nonlocal seconds, looked
        if monotonic() > looked + 1:
            looked = monotonic()
            try:
                seconds = float((folder / _node()).read_text() or 0)
            except (OSError, ValueError):
                seconds = 0.0
        return true_ns() + int(seconds * 1e9)

    def look_again() -> None:
        nonlocal looked
        looked = 0.0

    time.time_ns = time_ns
    time.time = lambda: time_ns() / 1e9
    os.register_at_fork(after_in_child=look_again)


if (
    "STORAGED_CHAOS_CLOCKS" in os.environ
    and sys.platform == "linux"
    and (_node() or "storaged.cli.fork_server" in _words())
):
    _move(Path(os.environ["STORAGED_CHAOS_CLOCKS"]))

"""Watches the disks of this node: their health, their free space, and whether their indexes are in memory.

A thread of each disk looks at what may block (``look`` of its stores); a task looks at the health of all disks, which
blocks nothing. A look that does not end is an operation that does not end: the disk hangs.

A disk that is slow gets less to do, perhaps nothing. So that it is seen to be well again, its thread writes and syncs a
small file of its own meanwhile (``probe``).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import structlog

from storaged.disk_health import HUNG, DiskHealth
from storaged.disk_states import UNREADABLE
from storaged.errors import DiskUnreadable

log = structlog.get_logger("disks")

HEALTH_S = 0.1
"""How often the health of the disks is judged."""

LOOK_S = 1.0
"""How often a disk's thread looks."""

PROBE_FILE = "probe"
"""In the disk's directory. It says nothing: it may be removed at any time."""

PROBE_BYTES = 4096


class DiskWatch:
    """The thread of one disk. ``probe``: uses the disk, to see how it does; it may raise OSError."""

    def __init__(
        self, health: DiskHealth, looks: Sequence[Callable[[], None]], probe: Callable[[], None] = lambda: None
    ) -> None:
        self._health = health
        self._looks = looks
        self._probe = probe
        self._stopping = threading.Event()
        threading.Thread(target=self._run, name=f"disk-watch {health.disk}", daemon=True).start()

    def stop(self) -> None:
        """Does not wait for the thread."""
        self._stopping.set()

    def _run(self) -> None:
        while not self._stopping.is_set():
            token = self._health.begin("a look at the disk", long=True)  # it may read an index into memory
            try:
                for look in self._looks:
                    if not self._stopping.is_set():
                        look()
            except DiskUnreadable as error:
                log.error("a disk can't be read; the others go on", disk=self._health.disk, reason=error.message)
                self._health.give_up("watch", UNREADABLE, error.message)
                return
            except Exception:  # a defect: the disk goes on, and is looked at again
                log.exception("a look at a disk failed", disk=self._health.disk)
            self._health.end(token)
            if self._health.wants_probe and not self._stopping.is_set():
                token = self._health.begin("a probe")
                with contextlib.suppress(OSError):  # the stores find out what is wrong
                    self._probe()
                self._health.end(token)
            self._stopping.wait(LOOK_S)


def probe(directory: Path) -> None:
    """Writes and syncs a small file. Raises OSError."""
    descriptor = os.open(directory / PROBE_FILE, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        os.pwrite(descriptor, bytes(PROBE_BYTES), 0)
        os.fdatasync(descriptor)
    finally:
        os.close(descriptor)


async def watch_health(healths: Mapping[str, DiskHealth]) -> None:
    """Judges the disks again and again."""
    while True:
        for health in list(healths.values()):
            health.look()
        await asyncio.sleep(HEALTH_S)


def log_change(health: DiskHealth, before: str) -> None:
    """``DiskHealth.on_change``: logs that a disk begins to hang, or is well again."""
    if health.state == before:
        return  # it is late, which comparison will name
    if health.given_up:
        return
    if health.state == HUNG:
        log.error("a disk hangs; the others go on", disk=health.disk, reason=health.reason)
    elif before == HUNG:
        log.info("a disk answers again", disk=health.disk, state=health.state)

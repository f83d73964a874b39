"""Watches the disks of this node: their health, their free space, and whether their indexes are in memory.

A thread of each disk looks at what may block (``look`` of its stores); a task looks at the health of all disks, which
blocks nothing. A look that does not end is an operation that does not end: the disk hangs.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Mapping, Sequence

import structlog

from storaged.disk_health import HUNG, DiskHealth

log = structlog.get_logger("disks")

HEALTH_S = 0.1
"""How often the health of the disks is judged."""

LOOK_S = 1.0
"""How often a disk's thread looks."""


class DiskWatch:
    """The thread of one disk."""

    def __init__(self, health: DiskHealth, looks: Sequence[Callable[[], None]]) -> None:
        self._health = health
        self._looks = looks
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
            except Exception:  # a defect: the disk goes on, and is looked at again
                log.exception("a look at a disk failed", disk=self._health.disk)
            self._health.end(token)
            self._stopping.wait(LOOK_S)


async def watch_health(healths: Mapping[str, DiskHealth]) -> None:
    """Judges the disks again and again."""
    while True:
        for health in list(healths.values()):
            health.look()
        await asyncio.sleep(HEALTH_S)


def log_change(health: DiskHealth, before: str) -> None:
    """``DiskHealth.on_change``: logs that a disk begins to hang, or is well again."""
    if health.state == HUNG:
        log.error("a disk hangs; the others go on", disk=health.disk, reason=health.reason)
    elif before == HUNG:
        log.info("a disk answers again", disk=health.disk, state=health.state)

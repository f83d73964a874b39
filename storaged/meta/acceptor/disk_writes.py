"""Writes of one acceptor to its store: bounded, and independent of the requests that began them.

When the store refuses a commit, what reached the disk is unknown. The acceptor then answers nothing any more (rule 9).
A store without room has not begun (``StoreFull``): the acceptor goes on, and its disk is read-only meanwhile.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import structlog

from storaged.disk_states import FAILED
from storaged.errors import DiskUnusable, SlowDown, StoragedError
from storaged.meta.store_ports import MetaStore, StoreBatch, StoreFull
from storaged.units import MIB

log = structlog.get_logger(__name__)

ACCEPTOR = "acceptor"
"""A source of findings in the disk's health."""

WRITES_MAX = 4_096
WRITE_BYTES_MAX = 64 * MIB
"""Accepts and pages on their way to one disk, and the bytes of their values, copies and pages. A write that has begun
ends only when the disk has answered, whether or not its caller still waits: these bounds are what a disk that hangs
holds. For a sound disk they are seconds of work.
"""


class DiskWrites:
    def __init__(self, disk: str, store: MetaStore) -> None:
        self.disk = disk
        self.silent = ""
        """Why this acceptor answers nothing any more; empty while it answers."""
        self.bytes_in_flight = 0
        """Of values, copies and pages that are on their way to the disk."""
        self._store = store
        self._tasks: dict[asyncio.Task[StoragedError | None], None] = {}

    @property
    def tasks(self) -> tuple[asyncio.Task[StoragedError | None], ...]:
        """The commits that are under way, but for accepts."""
        return tuple(self._tasks)

    def fall_silent(self, reason: str) -> None:
        """This acceptor answers nothing from now on."""
        self.silent = reason
        self._store.health.note(ACCEPTOR, FAILED, f"metadata: {reason}")

    def check_answers(self) -> None:
        """Raises DiskUnusable when this acceptor answers nothing any more, and while its disk hangs."""
        if self.silent:
            raise DiskUnusable(f"Disk {self.disk} takes no part in the ring: {self.silent}.")
        self._store.health.check()

    def check_room(self, size: int, accepts: int) -> None:
        """``size`` in bytes of what is to be written; ``accepts`` that are on their way. Raises SlowDown."""
        count = accepts + len(self._tasks)
        if count >= WRITES_MAX or (count and self.bytes_in_flight + size > WRITE_BYTES_MAX):
            raise SlowDown(
                f"Disk {self.disk} has not written yet what it was given: {count} writes, {self.bytes_in_flight} bytes."
            )

    def fail(self, error: Exception) -> None:
        """The store refused a write, and what it acknowledged is uncertain."""
        if not self.silent:
            expected = isinstance(error, StoragedError)
            reason = error.message if isinstance(error, StoragedError) else f"{type(error).__name__}: {error}"
            self.fall_silent(f"its store refused a write, and what it acknowledged is uncertain ({reason})")
            log.error("replica falls silent", disk=self.disk, reason=reason, exc_info=None if expected else error)

    def start(self, work: Coroutine[Any, Any, StoragedError | None]) -> asyncio.Task[StoragedError | None]:
        """A task that outlives the request that began it: what is on its way to the disk arrives."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks[task] = None
        task.add_done_callback(lambda done: self._tasks.pop(done, None))
        return task

    async def all_ended(self) -> None:
        """All that was on its way when this was called has arrived, or failed."""
        if self._tasks:
            await asyncio.wait(tuple(self._tasks))

    async def commit(self, batch: StoreBatch) -> StoragedError | None:
        try:
            await self._store.commit(batch)
        except StoreFull as error:
            return error
        except StoragedError as error:
            self.fail(error)
            return error
        except Exception as error:
            self.fail(error)
            raise
        return None

    async def durably(self, batch: StoreBatch, on_synced: Callable[[], None] | None = None, *, size: int = 0) -> None:
        """Returns when the batch is on disk; ``on_synced`` is called then, even if the caller has gone away. Raises
        what the store raised.
        """

        async def write() -> StoragedError | None:
            try:
                error = await self.commit(batch)
            finally:
                self.bytes_in_flight -= size
            if error is None and on_synced is not None:
                on_synced()
            return error

        self.bytes_in_flight += size
        raise_if(await asyncio.shield(self.start(write())))


def raise_if(error: StoragedError | None) -> None:
    if error is not None:
        raise error

"""Rows and small values that a thread read for the event loop, because LMDB's pages were not all in memory.

Used on the event loop. What is found here is what LMDB has: a write of the same name takes it out again (``forget``),
also while the thread still reads it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from functools import partial

from storaged.disk_health import DiskThreads
from storaged.meta.storage.batch import PackedBatch
from storaged.meta.store_ports import NotInMemory, Place, RowDamaged
from storaged.units import MIB

REMEMBERED_BYTES_MAX = 8 * MIB
ENTRY_BYTES = 300
"""Memory of an entry besides its bytes."""

Stored = bytes | RowDamaged | None
"""A row (empty: there is none), a sealed small value (None: there is none), or the damage that was found instead."""


class Remembered:
    """Of one store. ``used``: whether there may be anything to ``forget``."""

    def __init__(self, bytes_max: int = REMEMBERED_BYTES_MAX) -> None:
        self.used = False
        self._bytes_max = bytes_max
        self._bytes = 0
        self._found: dict[Place, Stored] = {}
        self._reading: dict[Place, asyncio.Task[None]] = {}
        self._written: set[Place] = set()
        """Among what is being read: written meanwhile."""

    def get(self, place: Place) -> bytes | None:
        """Raises NotInMemory, RowDamaged."""
        try:
            found = self._found[place]
        except KeyError:
            raise NotInMemory(place) from None
        if isinstance(found, RowDamaged):
            raise found
        return found

    async def read(self, place: Place, stored: Callable[[Place], Stored], threads: DiskThreads) -> None:
        """Has a thread read it. Callers that want the same place share one. Raises SlowDown, DiskUnusable.

        Call it in the turn of the event loop in which the overlays did not have the place. A write that came between
        would be in an overlay already, and would not be noticed here: later the older row would be found.
        """
        reading = self._reading.get(place)
        if reading is None:
            self.used = True
            reading = asyncio.get_running_loop().create_task(self._read(place, stored, threads))
            self._reading[place] = reading
        await asyncio.shield(reading)

    async def _read(self, place: Place, stored: Callable[[Place], Stored], threads: DiskThreads) -> None:
        try:
            found = await threads.run_short(partial(stored, place))
            if place not in self._written:
                self._put(place, found)
        finally:
            del self._reading[place]
            self._written.discard(place)

    def _put(self, place: Place, found: Stored) -> None:
        self._drop(place)
        self._found[place] = found
        self._bytes += _cost(place, found)
        while self._bytes > self._bytes_max:
            self._drop(next(iter(self._found)))

    def _drop(self, place: Place) -> None:
        if place in self._found:
            self._bytes -= _cost(place, self._found.pop(place))

    def forget(self, group: Sequence[PackedBatch]) -> None:
        """These are about to be written to LMDB."""
        for batch in group:
            for prefix, key, _ in batch.rows:
                self._forget((prefix, key))
            for database, key, _ in batch.others:
                self._forget((database, key))

    def _forget(self, place: Place) -> None:
        self._drop(place)
        if place in self._reading:
            self._written.add(place)

    def __len__(self) -> int:
        return len(self._found)


def _cost(place: Place, found: Stored) -> int:
    return ENTRY_BYTES + len(place[1]) + (len(found) if isinstance(found, bytes) else 0)

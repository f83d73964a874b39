"""The high-water ballot of one acceptor on disk: written in blocks ahead of its promises (``consensus.acceptor``)."""

from __future__ import annotations

import asyncio

from storaged.errors import StoragedError
from storaged.meta.acceptor.disk_writes import DiskWrites, raise_if
from storaged.meta.consensus.acceptor import AcceptorState, needs_high_water
from storaged.meta.names import Ballot
from storaged.meta.store_ports import StoreBatch
from storaged.wire import decode, encode

META_HIGH_WATER = "high_water"


class HighWater:
    def __init__(self, state: AcceptorState, writes: DiskWrites) -> None:
        self._state = state
        self._writes = writes
        self._raising: asyncio.Task[StoragedError | None] | None = None

    def begin_raise(self, ballot: Ballot) -> None:
        """Starts to write a higher one. Called early, so that ballots rarely wait for it."""
        if self._raising is None:
            self._raising = self._writes.start(self._write(ballot))

    async def raise_above(self, ballot: Ballot) -> None:
        """Returns when the high-water ballot on disk lies above ``ballot``; many that wait share one commit."""
        while needs_high_water(ballot, self._state.high_water):
            self.begin_raise(ballot)
            assert self._raising is not None
            raise_if(await asyncio.shield(self._raising))

    def add_to(self, batch: StoreBatch, ballot: Ballot) -> None:
        """Has the batch carry a high-water ballot above this one. A batch that comes with a small copy may have to wait
        for the copy first, in no order with other batches, so it never carries one: a lower one could overtake a
        higher.
        """
        batch.meta[META_HIGH_WATER] = encode(self._state.next_high_water(ballot))

    def stored(self, batch: StoreBatch) -> None:
        """The batch is on disk."""
        self._raised(decode(batch.meta[META_HIGH_WATER], Ballot))

    def _raised(self, ballot: Ballot) -> None:
        self._state.set_high_water(max(self._state.high_water, ballot))

    async def _write(self, ballot: Ballot) -> StoragedError | None:
        high_water = self._state.next_high_water(ballot)
        try:
            error = await self._writes.commit(StoreBatch(meta={META_HIGH_WATER: encode(high_water)}))
            if error is None:
                self._raised(high_water)
            return error
        finally:
            self._raising = None

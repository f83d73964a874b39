"""The high-water ballots of one acceptor on disk: written in blocks ahead of its promises (``consensus.acceptor``)."""

from __future__ import annotations

import asyncio

from storaged.cluster.partitions import step_of
from storaged.errors import StoragedError
from storaged.meta.acceptor.disk_writes import DiskWrites, raise_if
from storaged.meta.consensus.acceptor import AcceptorState, needs_high_water
from storaged.meta.names import Ballot
from storaged.meta.store_ports import MetaStore, StoreBatch
from storaged.wire import decode, encode

META_HIGH_WATER = "high_water"
"""Of partitions that never moved. A space and the step's number follow for others."""

STEPS_MAX = 10_000
"""High-water ballots of one store: more than a disk ever takes part in."""


def stored_high_waters(store: MetaStore) -> dict[int, Ballot]:
    """By step. Raises RowDamaged."""
    found = {}
    for name in store.meta_names(META_HIGH_WATER, after="", limit=STEPS_MAX):
        step = name.removeprefix(META_HIGH_WATER).strip()
        found[int(step) if step else 0] = decode(store.get_meta(name) or b"", Ballot)
    return found


def _name_of(ballot: Ballot) -> str:
    step = step_of(ballot.epoch)
    return f"{META_HIGH_WATER} {step}" if step else META_HIGH_WATER


class HighWater:
    def __init__(self, state: AcceptorState, writes: DiskWrites) -> None:
        self._state = state
        self._writes = writes
        self._raising: dict[int, asyncio.Task[StoragedError | None]] = {}
        """By step."""

    def begin_raise(self, ballot: Ballot) -> None:
        """Starts to write a higher one. Called early, so that ballots rarely wait for it."""
        step = step_of(ballot.epoch)
        if step not in self._raising:
            self._raising[step] = self._writes.start(self._write(ballot))

    async def raise_above(self, ballot: Ballot) -> None:
        """Returns when the high-water ballot on disk lies above ``ballot``; many that wait share one commit."""
        while needs_high_water(ballot, self._state.high_water_at(ballot.epoch)):
            self.begin_raise(ballot)
            raise_if(await asyncio.shield(self._raising[step_of(ballot.epoch)]))

    def add_to(self, batch: StoreBatch, ballot: Ballot) -> None:
        """Has the batch carry a high-water ballot above this one. A batch that comes with a small copy may have to wait
        for the copy first, in no order with other batches, so it never carries one: a lower one could overtake a
        higher.
        """
        batch.meta[_name_of(ballot)] = encode(self._state.next_high_water(ballot))

    def stored(self, batch: StoreBatch) -> None:
        """The batch is on disk."""
        for value in batch.meta.values():
            self._state.set_high_water(decode(value, Ballot))

    async def _write(self, ballot: Ballot) -> StoragedError | None:
        high_water = self._state.next_high_water(ballot)
        try:
            error = await self._writes.commit(StoreBatch(meta={_name_of(ballot): encode(high_water)}))
            if error is None:
                self._state.set_high_water(high_water)
            return error
        finally:
            del self._raising[step_of(ballot.epoch)]

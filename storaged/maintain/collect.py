"""Garbage: data that no record refers to any more, and the rows of uploads that ended long ago.

Deleting is the one thing that can't be taken back, so it is done only behind a committed identity round of the register that might refer to
the data: the round is at a new ballot, which kills every earlier promise, so that a gateway that slept between its barrier and its accept can't
commit a reference to what was just deleted. Without a majority nothing is deleted.

Two ways lead here: the garbage lists that writers fill (``retire``), and a sweep of fragments that are older than any request may live.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import msgspec

from storaged.errors import NoSuchBucket, PeerError, ServiceUnavailable, StoragedError
from storaged.fragments.ports import FragmentHeader, FragmentId, FragmentStore
from storaged.maintain.context import MaintainContext
from storaged.maintain.survey import blocks_of
from storaged.maintain.walk import Buckets, entries_of
from storaged.meta.names import RegisterName

Referenced = Callable[[RegisterName, bytes], Awaitable[bool]]
"""(owner, data id) -> whether the owner's register, or a part of an open upload of its key, refers to it; judged behind an identity round.

Raises ServiceUnavailable when that can't be known now."""

SWEEP_PAGE = 500


class Collector:
    """Judges and deletes on this node's disks."""

    def __init__(self, context: MaintainContext, referenced: Referenced) -> None:
        self._context = context
        self._referenced = referenced
        self._buckets = Buckets()
        self.deleted_fragments = 0
        self.kept = 0
        self.orphans = 0

    async def run(self) -> None:
        """For ever: the garbage lists often, the sweep of orphans a few times a day."""
        next_sweep = self._context.clock.monotonic() + self._context.limits.orphan_interval_s
        while True:
            await asyncio.sleep(self._context.limits.collect_interval_s)
            await self.collect_due()
            if self._context.clock.monotonic() >= next_sweep:
                next_sweep = self._context.clock.monotonic() + self._context.limits.orphan_interval_s
                await self.sweep()

    async def collect_due(self) -> int:
        """Judges what is due on all disks; returns how many fragments were deleted."""
        before = self.deleted_fragments
        for disk, store in self._context.local_fragments.items():
            try:
                due = await store.retired(self._context.clock.wall_ms(), self._context.limits.collect_batch)
                for data_id, owner in due:
                    await self._judge(store, data_id, RegisterName.unpack(owner))
            except (PeerError, StoragedError) as error:
                self._context.log(f"collection on disk {disk}: {error}")
        return self.deleted_fragments - before

    async def _judge(self, store: FragmentStore, data_id: bytes, owner: RegisterName) -> None:
        try:
            referenced = await self._referenced(owner, data_id)
        except NoSuchBucket as error:
            if "final" not in error.details:
                return
            referenced = False  # fenced for ever: the bucket is gone, nothing in it can be read or written again
        except (ServiceUnavailable, msgspec.MsgspecError):
            return
        if referenced:
            self.kept += 1
        else:
            while ids := [FragmentId.unpack(header.id) async for header in store.scan(data_id, SWEEP_PAGE) if header.id[:16] == data_id]:
                self.deleted_fragments += await store.delete(ids)
        await store.unretire(data_id)

    # --- the other way around ---------------------------------------------------------------------------------------

    async def sweep(self) -> int:
        """Fragments old enough that no request can still be writing them, and that no record claims: whole data ids are retired, and
        single fragments of data that is claimed elsewhere (left behind by a recoding) are deleted. Returns how many were found."""
        found = 0
        try:
            await self._buckets.refresh(self._context)
        except ServiceUnavailable:
            return 0
        for disk, store in self._context.local_fragments.items():
            after = b""
            while True:
                page = [header async for header in store.scan(after, SWEEP_PAGE)]
                if not page:
                    break
                after = page[-1].id
                oldest = self._context.clock.wall_ms() - self._context.limits.orphan_age_ms
                for header in page:
                    if header.created_ms < oldest and not await self._claimed(disk, header):
                        found += 1
                        await self._discard(store, header)
                await asyncio.sleep(0)
        self.orphans += found
        return found

    async def _claimed(self, disk: str, header: FragmentHeader) -> bool:
        """Whether the owner's record, or a part of an open upload, names this very fragment on this disk. In doubt: yes."""
        owner = RegisterName.unpack(header.owner)
        fragment = FragmentId.unpack(header.id)
        try:
            reading = await self._context.registers.read(owner)
            countries = self._buckets.countries[owner.scope]
            for entry in await entries_of(self._context, owner, reading.value):
                if entry.data_id == fragment.data_id:
                    places = blocks_of(entry, owner.partition, self._context.layouts.at, countries)
                    return any((fragment, disk) in place.fragments for place in places if place.block == fragment.block)
            return await self._referenced(owner, fragment.data_id)
        except NoSuchBucket as error:
            return "final" not in error.details
        except (KeyError, ValueError, StoragedError, msgspec.MsgspecError):
            return True

    async def _discard(self, store: FragmentStore, header: FragmentHeader) -> None:
        """A data id that is in use loses this one fragment; another goes through the garbage list, where it is judged again."""
        owner = RegisterName.unpack(header.owner)
        data_id = header.id[:16]
        try:
            reading = await self._context.registers.read(owner)
            in_use = any(entry.data_id == data_id for entry in await entries_of(self._context, owner, reading.value))
        except StoragedError:
            in_use = False
        if in_use:
            self.deleted_fragments += await store.delete([FragmentId.unpack(header.id)])
        else:
            await store.retire(data_id, header.owner, self._context.clock.wall_ms())

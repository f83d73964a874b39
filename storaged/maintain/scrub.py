"""Scrub: reads everything on this node's disks once in a while, and verifies every cell and every row. What fails is handed to repair."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from storaged.errors import PeerError, StoragedError
from storaged.fragments.ports import FragmentId, FragmentStore, Health
from storaged.maintain.context import MaintainContext, wait_for
from storaged.maintain.runner import Job, Pace
from storaged.meta.names import RegisterName
from storaged.meta.ports import MetaStore, RowDamaged, StoreBatch

PAGE = 200
ROWS_A_SLICE = 500
_FINISHED = "scrub-finished-ms"


class Scrub:
    """One at a time on a node. ``hint`` tells repair of a register whose fragment or row is damaged."""

    def __init__(self, context: MaintainContext, hint: Callable[[bytes], None]) -> None:
        self._context = context
        self._hint = hint
        self._asked = asyncio.Event()
        self.pace = Pace(context.clock, context.limits.scrub_bytes_per_s)
        self.job = Job("scrub", context.clock)
        self.damaged = 0

    def ask(self) -> None:
        """Begins now, at full speed; does nothing while one is running."""
        if self.job.state != "running":
            self.pace.bytes_per_s = 0
            self.job.start()
            self._asked.set()

    async def run(self) -> None:
        """For ever: when asked, and every ``scrub_interval_s``."""
        while True:
            if not await wait_for(self._asked, min(self._context.limits.scrub_interval_s / 10, 3600.0)):
                if self._age_s() < self._context.limits.scrub_interval_s:
                    continue
                self.pace.bytes_per_s = self._context.limits.scrub_bytes_per_s
            await self.once()

    def _age_s(self) -> float:
        """Since the end of the last one; since never counts as since the disk was made, which a store's first scrub notes."""
        ages = []
        for store in self._context.local_meta.values():
            told = store.get_meta(_FINISHED)
            ages.append((self._context.clock.wall_ms() - int(told)) / 1000 if told else self._context.limits.scrub_interval_s)
        return max(ages, default=0.0)

    async def once(self) -> int:
        """Verifies everything on all disks; returns how many fragments and rows were found damaged."""
        before = self.damaged
        usages = [await store.usage() for store in self._context.local_fragments.values()]
        self.job.start(sum(usage.fragments for usage in usages))
        try:
            for disk, store in self._context.local_fragments.items():
                await self._fragments(disk, store)
            for disk, meta in self._context.local_meta.items():
                await self._rows(disk, meta)
                batch = StoreBatch(meta={_FINISHED: str(self._context.clock.wall_ms()).encode()})
                await meta.commit(batch)
        except (PeerError, StoragedError) as error:
            self.job.finish("failed", str(error))
            self._context.log(f"scrub: {error}")
            return self.damaged - before
        self.job.finish("done", f"{self.damaged - before} damaged")
        return self.damaged - before

    async def _fragments(self, disk: str, store: FragmentStore) -> None:
        after = b""
        while True:
            page = [header async for header in store.scan(after, PAGE)]
            if not page:
                return
            after = page[-1].id
            for header in page:
                stat = await store.verify(FragmentId.unpack(header.id))
                if stat.health == Health.DAMAGED:
                    self.damaged += 1
                    self._context.log(f"scrub: damaged fragment {header.id.hex()} on disk {disk}")
                    self._hint(header.owner)
                self.job.advance(1, header.length)
                await self.pace.spend(header.length)

    async def _rows(self, disk: str, store: MetaStore) -> None:
        """Rows whose checksum does not hold are settled, which writes them anew."""
        for table, scope, shard in store.scopes():
            after = b""
            while raw := store.slice(table, scope, shard, after=after, prefix=b"", limit=ROWS_A_SLICE):
                for key, _ in raw:
                    name = RegisterName(table, scope, shard, key)
                    try:
                        store.get(name)
                    except RowDamaged:
                        self.damaged += 1
                        self._context.log(f"scrub: damaged row {key[:80]!r} on disk {disk}")
                        await self._context.registers.settle(name)
                        self._hint(name.pack())
                after = raw[-1][0]
                await asyncio.sleep(0)

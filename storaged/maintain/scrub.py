"""Scrub: reads everything on this node's disks once in a while, and verifies every cell, every row and every page of a
manifest. What fails is handed to repair.

One that starts by itself goes on where it was interrupted: the place is kept with the disk. One that was asked for
begins at the beginning.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from storaged.errors import StoragedError
from storaged.fragments.ports import FragmentId, FragmentStore, Health
from storaged.maintain.context import MaintainContext, wait_for
from storaged.maintain.job import Job, Pace
from storaged.maintain.slices import slices
from storaged.meta.names import RegisterName
from storaged.meta.ports import MetaStore, RowDamaged, StoreBatch
from storaged.meta.storage.rowvalue import intact

PAGE = 200
NOTE_POSITION_S = 60.0

_FINISHED = "scrub-finished-ms"
_POSITION = "scrub-position"


class Scrub:
    """One at a time on a node. ``hint`` tells repair of a register whose fragment or row is damaged, ``wake`` that a
    fragment is whose owner can't be read.
    """

    def __init__(self, context: MaintainContext, hint: Callable[[bytes], None], wake: Callable[[], None]) -> None:
        self._context = context
        self._hint = hint
        self._wake = wake
        self._asked = asyncio.Event()
        self.pace = Pace(context.clock, context.limits.scrub_bytes_per_s)
        self.job = Job("scrub", context.clock)
        self.damaged = 0

    def ask(self) -> None:
        """Begins now, at full speed; does nothing while one is running that was asked for. One that started by itself
        is hurried, and followed by this one.
        """
        if not self._asked.is_set() and not (self.job.state == "running" and not self.pace.bytes_per_s):
            self.pace.bytes_per_s = 0
            self._asked.set()

    @property
    def busy(self) -> bool:
        return self._asked.is_set() or self.job.state == "running"

    async def run(self) -> None:
        """For ever: when asked, and every ``scrub_interval_s``."""
        interval_s = self._context.limits.scrub_interval_s
        while True:
            if await wait_for(self._asked, min(interval_s / 10, 3600.0)):
                await self.once()
            elif self._age_s() >= interval_s:
                self.pace.bytes_per_s = self._context.limits.scrub_bytes_per_s
                await self.once(resume=True)

    def _age_s(self) -> float:
        """Since the end of the last one, on the disk where that is longest ago; a disk that never had one is due."""
        ages = []
        for store in self._context.local_meta.values():
            told = _noted(store, _FINISHED)
            ages.append(
                (self._context.clock.wall_ms() - int(told)) / 1000 if told else self._context.limits.scrub_interval_s
            )
        return max(ages, default=0.0)

    async def once(self, *, resume: bool = False) -> int:
        """Verifies everything on all disks; returns how many fragments and rows were found damaged. A disk that fails
        does not keep others from being read.
        """
        before = self.damaged
        self.job.start()
        failures: list[str] = []
        for disk, store in self._context.local_fragments.items():
            try:
                self.job.total += (await store.usage()).fragments
                await self._disk(disk, store, self._context.local_meta.get(disk), resume)
            except (StoragedError, TimeoutError) as error:
                failures.append(f"disk {disk}: {error}")
        found = self.damaged - before
        self.job.finish("failed" if failures else "done", "; ".join(failures) or f"{found} damaged")
        for failure in failures:
            self._context.log(f"scrub: {failure}")
        return found

    async def _disk(self, disk: str, store: FragmentStore, meta: MetaStore | None, resume: bool) -> None:
        start = _noted(meta, _POSITION) if meta is not None and resume else b""
        await self._fragments(disk, store, meta, start)
        if meta is not None:
            await self._rows(disk, meta)
            await self._pages(disk, meta)
            await meta.commit(StoreBatch(meta={_FINISHED: str(self._context.clock.wall_ms()).encode(), _POSITION: b""}))

    async def _fragments(self, disk: str, store: FragmentStore, meta: MetaStore | None, after: bytes) -> None:
        noted = self._context.clock.monotonic()
        while page := [header async for header in store.scan(after, PAGE)]:
            for header in page:
                after = header.id
                stat = await store.verify(FragmentId.unpack(header.id))
                if stat.health == Health.DAMAGED:
                    self.damaged += 1
                    self._context.log(f"scrub: damaged fragment {header.id.hex()} on disk {disk}")
                    if header.owner:
                        self._hint(header.owner)
                    else:
                        self._wake()
                self.job.advance(1, header.length)
                await self.pace.spend(header.length)
                if (
                    meta is not None
                    and self.pace.bytes_per_s
                    and self._context.clock.monotonic() - noted >= NOTE_POSITION_S
                ):
                    noted = self._context.clock.monotonic()
                    await meta.commit(StoreBatch(meta={_POSITION: after}))

    async def _rows(self, disk: str, store: MetaStore) -> None:
        """Rows whose checksum does not hold are settled, which writes them anew; so says the hint."""
        try:
            scopes = store.scopes()
        except RowDamaged as error:
            self.damaged += 1
            self._context.log(f"scrub: what ranges disk {disk} holds can't be read: {error}")
            self._wake()
            return
        for table, scope, shard in scopes:
            after, prefix = b"", RegisterName(table, scope, shard, b"").pack()
            try:
                async for rows in slices(self._context.clock, store, table, scope, shard):
                    for key, row in rows:
                        if not intact(prefix, key, row):
                            self.damaged += 1
                            self._context.log(f"scrub: damaged row {key[:80]!r} on disk {disk}")
                            self._hint(prefix + key)
                    after = rows[-1][0]
            except RowDamaged as error:
                self.damaged += 1
                self._context.log(
                    f"scrub: rows of table {table}, shard {shard} on disk {disk} can't be read on from {after[:80]!r}:"
                    f" {error}"
                )
                self._wake()

    async def _pages(self, disk: str, store: MetaStore) -> None:
        """Pages of manifests. They don't say whose they are: a walk finds out, and replaces them."""
        after = b""
        try:
            while pages := store.pages(after=after, limit=PAGE):
                for page_hash, _ in pages:
                    self._page(disk, store, page_hash)
                    await asyncio.sleep(0)
                after = pages[-1][0]
        except RowDamaged as error:
            self.damaged += 1
            self._context.log(f"scrub: the pages of manifests on disk {disk} can't be read on: {error}")
            self._wake()

    def _page(self, disk: str, store: MetaStore, page_hash: bytes) -> None:
        try:
            store.get_page(page_hash)
        except RowDamaged as error:
            self.damaged += 1
            self._context.log(f"scrub: disk {disk}: {error}")
            self._wake()


def _noted(store: MetaStore, name: str) -> bytes:
    """Empty when it was never noted, or the note is damaged: the scrub is due then, from the beginning, and notes it
    anew.
    """
    try:
        return store.get_meta(name) or b""
    except RowDamaged:
        return b""

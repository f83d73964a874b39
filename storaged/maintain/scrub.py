"""Scrub: from time to time reads everything on this node's disks and verifies every cell, every row and every manifest
page. Repair gets what fails.

A scrub that starts by itself continues where it was interrupted: the position is kept on the disk. A requested one
begins at the beginning. Both read what is on the drive, not what memory has of it, in the order of the log.

Clients come first: a scrub that starts by itself rests while the disk's operations take long, and both obey the
operator's pause and pace (``cluster.move_settings``).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial

from storaged.errors import StoragedError
from storaged.fragments.ports import FragmentId, Health, NearStore
from storaged.maintain.context import MaintainContext, wait_for
from storaged.maintain.job import Job, Pace
from storaged.maintain.walk import row_slices
from storaged.meta.names import RegisterName
from storaged.meta.storage.rowvalue import intact
from storaged.meta.store_ports import MetaStore, RowDamaged, StoreBatch

PAGE = 200
BUSY_MS = 40
"""While the disk's operations take this long, a scrub that starts by itself rests after each fragment: ``RESTS`` times
as long as an operation takes, at most REST_S_MAX.
"""
RESTS = 3
REST_S_MAX = 2.0
PAUSED = "paused; to go on: storaged job resume scrub"
NOT_READ = "this node has not read yet whether scrubs are paused"
NOTE_POSITION_S = 60.0

_FINISHED = "scrub-finished-ms"
_POSITION = "scrub-position"


class Scrub:
    """One at a time on a node.

    ``on_damage(name)``: a fragment or row of this register (packed name) is damaged. ``on_unowned_damage()``: at the
    end of a scrub that found something damaged whose register can't be read.
    """

    def __init__(
        self, context: MaintainContext, on_damage: Callable[[bytes], None], on_unowned_damage: Callable[[], None]
    ) -> None:
        self._context = context
        self._on_damage = on_damage
        self._on_unowned_damage = on_unowned_damage
        self._requested = asyncio.Event()
        self.pace = Pace(context.clock, context.limits.scrub_bytes_per_s)
        self._set_pace = Pace(context.clock, 0)
        """The operator's."""
        self.job = Job("scrub", context.clock)
        self.damaged = 0
        self._unowned = False
        """The scrub has found damage of which it does not know the register."""

    def request(self) -> None:
        """Begins a scrub now, at full speed; no-op while a requested one runs. One that started by itself goes on at
        full speed, and this one follows.
        """
        if not self._requested.is_set() and not (self.job.state == "running" and not self.pace.bytes_per_s):
            self.pace.bytes_per_s = 0
            self._requested.set()

    @property
    def busy(self) -> bool:
        return self._requested.is_set() or self.job.state == "running"

    async def run(self) -> None:
        """For ever: on request, and every ``scrub_interval_s``."""
        interval_s = self._context.limits.scrub_interval_s
        while True:
            if await wait_for(self._requested, min(interval_s / 10, 3600.0)):
                await self.once()
            elif await self._age_s() >= interval_s:
                self.pace.bytes_per_s = self._context.limits.scrub_bytes_per_s
                await self.once(resume=True)

    async def _age_s(self) -> float:
        """Seconds since the end of the last scrub, on the disk where that is longest ago. A disk without one is due;
        one that does not answer is not. An end that lies in the future counts as none: the clock was wrong then.
        """
        ages = []
        for store in self._context.local_meta.values():
            try:
                finished = await _noted(store, _FINISHED)
            except StoragedError:
                continue
            age_s = (self._context.clock.wall_ms() - int(finished)) / 1000 if finished else -1.0
            ages.append(age_s if age_s >= 0 else self._context.limits.scrub_interval_s)
        return max(ages, default=0.0)

    async def once(self, *, resume: bool = False) -> int:
        """Verifies everything on all disks. Returns how many fragments, rows and pages were found damaged. After a disk
        that fails the others are read all the same.
        """
        before, self._unowned = self.damaged, False
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
        if self._unowned:
            self._on_unowned_damage()
        return found

    async def _disk(self, disk: str, store: NearStore, meta: MetaStore | None, resume: bool) -> None:
        start = await _noted(meta, _POSITION) if meta is not None and resume else b""
        await self._fragments(disk, store, meta, start)
        if meta is not None:
            await self._rows(disk, meta)
            await self._pages(disk, meta)
            finished = str(self._context.clock.wall_ms()).encode()
            await _note(meta, StoreBatch(meta={_FINISHED: finished, _POSITION: b""}))

    async def _fragments(self, disk: str, store: NearStore, meta: MetaStore | None, after: bytes) -> None:
        """``after``: a place (``NearStore.in_log_order``)."""
        noted = self._context.clock.monotonic()
        page, following = await store.in_log_order(after, PAGE)
        while following:
            for header, after in page:
                stat = await store.verify(FragmentId.unpack(header.id))
                if stat.health == Health.DAMAGED:
                    self.damaged += 1
                    self._context.log(f"scrub: damaged fragment {header.id.hex()} on disk {disk}")
                    if header.owner:
                        self._on_damage(header.owner)
                    else:
                        self._unowned = True
                self.job.advance(1, header.length)
                await self._rest(meta, header.length)
                if (
                    meta is not None
                    and self.pace.bytes_per_s
                    and self._context.clock.monotonic() - noted >= NOTE_POSITION_S
                ):
                    noted = self._context.clock.monotonic()
                    await _note(meta, StoreBatch(meta={_POSITION: after}))
            page, following = await store.in_log_order(following, PAGE)

    async def _rest(self, meta: MetaStore | None, count: int) -> None:
        """After ``count`` bytes were verified: waits for the pace and for clients, and as long as scrubs are paused."""
        settings = self._context.settings()
        while settings.scrub_paused:
            self.job.detail = PAUSED if settings.revision >= 0 else NOT_READ
            await asyncio.sleep(self._context.limits.poll_s)
            settings = self._context.settings()
        self.job.detail = ""
        self._set_pace.bytes_per_s = settings.scrub_bytes_per_s
        if settings.scrub_bytes_per_s:
            await self._set_pace.spend(count)
        if self.pace.bytes_per_s and meta is not None and (took_ms := meta.health.latency_ms()) >= BUSY_MS:
            await asyncio.sleep(min(RESTS * took_ms / 1000, REST_S_MAX))
        await self.pace.spend(count)

    async def _rows(self, disk: str, store: MetaStore) -> None:
        """Hints at rows whose checksum does not hold: they get settled, which writes them again."""
        try:
            scopes = await store.read(store.scopes)
        except RowDamaged as error:
            self.damaged += 1
            self._context.log(f"scrub: what ranges disk {disk} holds can't be read: {error}")
            self._unowned = True
            return
        for table, scope, shard in scopes:
            after, prefix = b"", RegisterName(table, scope, shard, b"").pack()
            try:
                async for rows in row_slices(self._context.clock, store, table, scope, shard):
                    for key, row in rows:
                        if not intact(prefix, key, row):
                            self.damaged += 1
                            self._context.log(f"scrub: damaged row {key[:80]!r} on disk {disk}")
                            self._on_damage(prefix + key)
                    after = rows[-1][0]
            except RowDamaged as error:
                self.damaged += 1
                self._context.log(
                    f"scrub: rows of table {table}, shard {shard} on disk {disk} can't be read on from {after[:80]!r}:"
                    f" {error}"
                )
                self._unowned = True

    async def _pages(self, disk: str, store: MetaStore) -> None:
        """Manifest pages. They don't name their register: a walk finds out, and they are replaced."""
        after = b""
        try:
            while pages := await store.read(partial(store.pages, after=after, limit=PAGE)):
                for page_hash, _ in pages:
                    await self._page(disk, store, page_hash)
                    await asyncio.sleep(0)
                after = pages[-1][0]
        except RowDamaged as error:
            self.damaged += 1
            self._context.log(f"scrub: the pages of manifests on disk {disk} can't be read on: {error}")
            self._unowned = True

    async def _page(self, disk: str, store: MetaStore, page_hash: bytes) -> None:
        try:
            await store.read(partial(store.get_page, page_hash))
        except RowDamaged as error:
            self.damaged += 1
            self._context.log(f"scrub: disk {disk}: {error}")
            self._unowned = True


async def _note(store: MetaStore, batch: StoreBatch) -> None:
    """Raises DiskUnusable when the disk hangs: the other disks are scrubbed all the same."""
    await store.health.unless_hung(store.commit(batch))


async def _noted(store: MetaStore, name: str) -> bytes:
    """Empty when it was never noted, or the note is damaged: then a scrub is due, from the beginning, and notes it
    again.
    """
    try:
        return await store.read(partial(store.get_meta, name)) or b""
    except RowDamaged:
        return b""

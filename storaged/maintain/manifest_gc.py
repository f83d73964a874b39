"""Garbage collection of manifest pages that no record names any more.

Theory of operation. A page is immutable and its hash is its name; it does not name the records that need it. So each
disk sweeps its own pages. A page is a candidate when it is older than any request lives and no row of the disk names
it. After the time that readers get, the disk looks again. It deletes the page when it is still neither named nor
written again.

Between the look and the deletion a row that names a page may be accepted. Two rules make sure that the page is young
then:

* The proposer of a row that names a page has put the page (on a majority) at most half the age of orphans before it
  draws its ballot.
* Before a disk looks, it refuses all ballots drawn until then, and learns from the other replicas of its registers what
  was accepted under those ballots and it has missed.

So a row that the disk does not know of is under a later ballot, and its pages are older than the look by half the age
of orphans at most. The deletion compares the age once more in its own transaction.

Each of these ends the sweep of a disk, for then it isn't known what is named: a damaged row or page of rows, a record
that can't be read or does not list its pages, a bucket that is being deleted, a register without a majority.
"""

from __future__ import annotations

import asyncio
from functools import partial

from storaged.cluster.layout import partition_of
from storaged.errors import DataDamaged, NoSuchBucket, ServiceUnavailable, StoragedError
from storaged.maintain.context import MaintainContext
from storaged.maintain.directory import Buckets
from storaged.maintain.walk import row_slices
from storaged.meta.listing.merge import RingScanner
from storaged.meta.names import RegisterName, Table, Visibility
from storaged.meta.storage.rowvalue import unpack_row
from storaged.meta.store_ports import MetaStore, RowDamaged, Slot
from storaged.objects.write.references import versions_in

PAGES_A_SLICE = 1000
CANDIDATES_MAX = 250_000
"""Old pages compared with the rows in one pass: some 40 MiB of hashes and ages."""
UNNAMED_MAX = 100_000
"""Pages of one disk that a sweep deletes at most; the next one goes on."""

_Pages = dict[bytes, int]
"""Hash -> created ms."""


class PageSweep:
    """Sweeps this node's disks. ``run`` is its task."""

    def __init__(self, context: MaintainContext, scanner: RingScanner) -> None:
        self._context = context
        self._scanner = scanner
        self._buckets = Buckets()
        self.deleted = 0

    async def run(self) -> None:
        """For ever, a few times a day."""
        while True:
            await asyncio.sleep(self._context.limits.orphan_interval_s)
            await self.once()

    async def once(self) -> int:
        """Sweeps all disks. Waits ``drop_delay_s`` for readers when there is anything to delete. Returns how many pages
        were deleted.
        """
        before = self.deleted
        unnamed: dict[str, _Pages] = {}
        for disk, store in self._context.local_meta.items():
            try:
                found = await self._unnamed(store)
            except (StoragedError, RowDamaged) as error:
                self._give_up(disk, error)
                continue
            if found:
                unnamed[disk] = found
        if unnamed:
            await asyncio.sleep(self._context.limits.drop_delay_s)
        for disk, pages in unnamed.items():
            try:
                await self._delete(disk, self._context.local_meta[disk], pages)
            except (StoragedError, RowDamaged, TimeoutError) as error:
                self._give_up(disk, error)
        return self.deleted - before

    def _give_up(self, disk: str, error: Exception) -> None:
        self._context.log(f"no page of a manifest is swept from disk {disk} now: {type(error).__name__}: {error}")

    async def _unnamed(self, store: MetaStore) -> _Pages:
        """Old pages that no row of the disk names. Raises RowDamaged, DataDamaged."""
        found: _Pages = {}
        after: bytes | None = b""
        while after is not None and len(found) < UNNAMED_MAX:
            candidates, after = await self._old_pages(store, after)
            await self._spare_named(store, candidates)
            found.update(candidates)
        return found

    async def _old_pages(self, store: MetaStore, after: bytes) -> tuple[_Pages, bytes | None]:
        """(the next old pages after ``after``, where to continue; None at the end)."""
        oldest = self._context.clock.wall_ms() - self._context.limits.orphan_age_ms
        found: _Pages = {}
        while len(found) < CANDIDATES_MAX:
            pages = await store.read(partial(store.pages, after=after, limit=PAGES_A_SLICE))
            if not pages:
                return found, None
            found.update((page, created_ms) for page, created_ms in pages if created_ms < oldest)
            after = pages[-1][0]
            await asyncio.sleep(0)
        return found, after

    async def _spare_named(self, store: MetaStore, pages: _Pages) -> None:
        """Takes out of ``pages`` what the disk's rows name, rows of former buckets and layouts included."""
        if not pages:
            return
        for table, scope, shard in await store.read(store.scopes):
            if table not in (Table.OBJECT, Table.UPLOAD):
                continue
            async for rows in row_slices(self._context.clock, store, table, scope, shard):
                for key, row in rows:
                    _spare(unpack_row(RegisterName(table, scope, shard, key), row), pages)

    async def _delete(self, disk: str, store: MetaStore, pages: _Pages) -> None:
        """Raises RowDamaged, StoragedError when it can't be found out what is named."""
        await self._context.end_promises(disk)
        await self._learn_missed(disk)
        await self._spare_named(store, pages)
        doomed = list(pages.items())
        for start in range(0, len(doomed), PAGES_A_SLICE):
            some = doomed[start : start + PAGES_A_SLICE]
            self.deleted += await store.health.unless_hung(store.delete_pages(some))

    async def _learn_missed(self, disk: str) -> None:
        """Brings the registers of the disk to what a majority has accepted."""
        await self._buckets.refresh(self._context)
        if not self._buckets.complete:
            raise DataDamaged("the record of a bucket is not believed, or cannot be read")
        for bucket in list(self._buckets.by_id.values()):
            for shard in bucket.shard_numbers:
                if disk in self._context.layouts.current.replicas_of(partition_of(bucket.id, shard)):
                    for table in (Table.UPLOAD, Table.OBJECT):
                        await self._catch_up(disk, table, bucket.id, shard)

    async def _catch_up(self, disk: str, table: int, scope: bytes, shard: int) -> None:
        try:
            found = await self._scanner.catch_up(table, scope, shard)
        except NoSuchBucket as error:
            if not error.details.get("final"):
                raise
            return
        if disk in found.away:
            raise ServiceUnavailable("the disk itself did not answer")


def _spare(row: Slot, pages: _Pages) -> None:
    """Raises DataDamaged."""
    if row.value.visibility == Visibility.TOMBSTONE:
        return
    for version in versions_in(row.value.body, row.name.table):
        if version.manifest and version.manifest not in version.pages:
            raise DataDamaged(f"the record of {row.name.key[:80]!r} does not list its pages")
        for page in version.pages:
            pages.pop(page, None)

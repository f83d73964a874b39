"""Walking records and asking disks: which fragments are where they should be.

The bucket directory says what is walked, not the local disk: a disk that was away does not know which buckets are new.
Before a range of registers is walked, its replicas are brought to the same rows: slices are compared by digest, and
rows that differ are settled on all. So rows can be read from the local store. Before anything is changed, the record is
read again from a majority. Fragments are asked for in batches, one call for each disk.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from functools import partial
from typing import NamedTuple

from storaged.clock import Clock
from storaged.cluster.layout import partition_of
from storaged.errors import DataDamaged, NoSuchBucket, PeerError, StoragedError
from storaged.fragments.ports import FragmentId, FragmentStat, Health
from storaged.ids import UPLOAD_ID_BYTES
from storaged.maintain.context import MaintainContext
from storaged.maintain.directory import Buckets
from storaged.maintain.health import BlockHealth, BlockPlace, Finding, Presence, Tally, blocks_of, claims, judge_block
from storaged.maintain.manifest_repair import PageRepair, PagesOf, pages_of
from storaged.maintain.placement import Placements
from storaged.meta.listing.merge import RingScanner, every_row
from storaged.meta.names import RegisterName, Table, Value, Visibility
from storaged.meta.ports import PageQuery
from storaged.meta.storage.rowvalue import unpack_row
from storaged.meta.store_ports import MetaStore, RowDamaged, RowRange
from storaged.objects.code.version_walk import OnUnreadable
from storaged.objects.code.versions import decode_record
from storaged.objects.records import PartEntry, shares, sharing_of
from storaged.objects.write.references import parts_in
from storaged.objects.write.uploads import living_upload, living_uploads

BLOCKS_A_BATCH = 2000
STATS_A_CALL = 4000

WALK_PATIENCE = 2.0
"""As of ``RingScanner.catch_up``: 6 s. A walk that misses one answer begins again with all records. A disk that hangs
for longer counts as away, and is not asked.
"""

OWNERS_MAX = 10_000
"""Those of a slice are asked about before the next one comes; only while no gateway answers they add up."""
ROWS_A_SLICE = 64
REST_S_MAX = 0.005
"""A walk looks at so many rows, some 50 us each, then rests as long as that took, at most REST_S_MAX. So a node of one
process answers its clients while all rows are looked at, as after a start without a disk. The bound is there because
the time may have passed in waiting for other nodes, which is a rest already.
"""


async def row_slices(
    clock: Clock, store: MetaStore, table: int, scope: bytes, shard: int
) -> AsyncIterator[list[tuple[bytes, bytes]]]:
    """All keys and rows of a range, unverified, as ``MetaStore.slice`` has them, with rests between the slices. A
    thread reads those of a large store first. Raises RowDamaged, DiskUnusable.
    """
    after = b""
    while True:
        wanted = RowRange(table, scope, shard, after, b"", ROWS_A_SLICE)
        if store.large:
            await store.start(partial(store.read_ahead, wanted, whole=True))
        began = clock.monotonic()
        rows = await store.read(partial(store.slice, wanted))
        if not rows:
            return
        yield rows
        after = rows[-1][0]
        await asyncio.sleep(min(clock.monotonic() - began, REST_S_MAX))


BUCKET_TABLES = (Table.OBJECT, Table.UPLOAD, Table.PART, Table.EVENT, Table.LIFECYCLE, Table.INVENTORY)


class Range(NamedTuple):
    """Registers that this node is responsible for. Their rows are read from the local ``disk``."""

    disk: str
    table: int
    scope: bytes
    shard: int

    @property
    def prefix(self) -> bytes:
        """The packed names of its registers begin with this."""
        return RegisterName(self.table, self.scope, self.shard, b"").pack()


async def entries_of(
    context: MaintainContext, name: RegisterName, value: Value | None, *, on_unreadable: OnUnreadable | None = None
) -> AsyncIterator[PartEntry]:
    """The parts that a register of objects or parts refers to, those in manifest pages included. ``on_unreadable``: as
    in ``parts_in``. Raises DataDamaged.
    """
    if value is not None and value.visibility != Visibility.TOMBSTONE and name.table in (Table.OBJECT, Table.PART):
        async for entry in parts_in(context.pages, name, value.body, name.table, on_unreadable=on_unreadable):
            yield entry


def is_claimed(
    context: MaintainContext,
    owner: RegisterName,
    entries: Iterable[PartEntry],
    fragment: FragmentId,
    disk: str,
    countries: tuple[str, ...],
) -> bool:
    """Whether one of the owner's parts names this very fragment on this disk. Raises as ``health.run_disks``."""
    return any(claims(entry, fragment, disk, owner.partition, context.layouts, countries) for entry in entries)


async def upload_rows(context: MaintainContext, owner: RegisterName) -> AsyncIterator[tuple[RegisterName, Value]]:
    """The rows of the parts of open uploads for an object's key: fragments of parts name the object as their owner.
    Raises ServiceUnavailable, DataDamaged.
    """
    async for upload in living_uploads(context.scanner, owner):
        upload_id = upload.record.upload_id
        async for row in every_row(
            context.scanner, PageQuery(Table.PART, owner.scope, [owner.shard], prefix=upload_id)
        ):
            yield RegisterName(Table.PART, owner.scope, owner.shard, row.key), row.value


class Walker:
    """Judges registers, a batch at a time. ``unanswered`` counts calls that failed although the disk is thought to
    answer: what was found meanwhile may be incomplete. ``settled`` counts registers, ``judged`` those with fragments.
    """

    def __init__(self, context: MaintainContext, scanner: RingScanner) -> None:
        self._context = context
        self._scanner = scanner
        self.placements = Placements(context)
        self.pages = PageRepair(context)
        self.buckets = Buckets()
        self._unanswered = 0
        self.settled = self.judged = 0
        self.owners: set[bytes] = set()
        """Objects (packed names) whose data other keys borrow: some of those that were judged."""
        self.bring_up: Callable[[RegisterName], Awaitable[object]] = context.registers.settle
        """Brings the replicas of a register that differ to the same row (``pull``)."""

    @property
    def unanswered(self) -> int:
        return self._unanswered + self.pages.unanswered

    async def open_uploads_of(self, scope: bytes, shard: int) -> frozenset[bytes]:
        """Ids of the uploads of one shard that may still become an object, by the rows of the disk that leads there.
        The rows of parts of other uploads are kept for a while but have no meaning: the object has their parts. Empty
        when another node leads. Raises RowDamaged when the rows can't be reached.
        """
        store = self._context.local_meta.get(self._context.leader_of(partition_of(scope, shard)))
        found: set[bytes] = set()
        if store is None:
            return frozenset()
        async for rows in row_slices(self._context.clock, store, Table.UPLOAD, scope, shard):
            for key, row in rows:
                try:
                    slot = unpack_row(RegisterName(Table.UPLOAD, scope, shard, key), row)
                    upload = living_upload(key, slot.value)
                except (DataDamaged, RowDamaged) as error:  # only the parts of this upload are not looked at
                    self._context.log(f"the record of an upload for {key[:80]!r} cannot be read: {error}")
                    continue
                if upload is not None:
                    found.add(upload.record.upload_id)
        return frozenset(found)

    async def is_needed(self, name: RegisterName) -> bool:
        """False for the row of a part whose upload has ended. Raises RowDamaged."""
        if name.table != Table.PART:
            return True
        return name.key[:UPLOAD_ID_BYTES] in await self.open_uploads_of(name.scope, name.shard)

    # --- ranges -------------------------------------------------------------------------------------------------------

    def led_ranges(self) -> list[Range]:
        """The ranges that this node is responsible for, by the directory as it was read last. The system partition is
        not among them: only gateways write there (``node.keeper``). Raises ServiceUnavailable while this node does not
        know where partitions are.
        """
        found = []
        for bucket in self.buckets.by_id.values():
            for shard in bucket.shard_numbers:
                replicas = self._context.layouts.partition(partition_of(bucket.id, shard)).present
                disk = self._context.leader_among(replicas)
                if disk in self._context.local_meta:
                    found += [Range(disk, table, bucket.id, shard) for table in BUCKET_TABLES]
        return found

    async def settle_range(self, where: Range, *, quick: bool = False, patience: float = WALK_PATIENCE) -> bool:
        """Settles the registers in which the replicas differ. False when a replica that should answer did not, so that
        it may still lag. ``quick``, ``patience``: as in ``RingScanner.catch_up``. Raises ServiceUnavailable.
        """
        try:
            found = await self._scanner.catch_up(
                where.table, where.scope, where.shard, bring_up=self.bring_up, quick=quick, patience=patience
            )
        except NoSuchBucket as error:
            # The bucket is being deleted: its fence lets nothing be settled, and nothing of it will be read. But the
            # rows of one whose fence lends are read, and some gateway will settle them.
            return "lends" not in error.details
        self.settled += found.settled
        return not any(map(self._context.liveness.disk_readable, found.away))

    async def differing(self, ranges: Sequence[Range]) -> list[Range]:
        """Of ranges of one table and scope those that are not known to be the same at all replicas. Costs a message
        to each of them, and no look at the rows.
        """
        try:
            shards = [where.shard for where in ranges]
            alike = await self._scanner.alike(ranges[0].table, ranges[0].scope, shards)
        except NoSuchBucket:
            return list(ranges)
        return [where for where in ranges if where.shard not in alike]

    async def rows(self, where: Range) -> AsyncIterator[list[tuple[RegisterName, Value]]]:
        """Slices of a range from the local store, without tombstones and parts of uploads that ended. A slice with a
        damaged row is settled, which writes the row again.
        """
        store = self._context.local_meta[where.disk]
        uploads = await self.open_uploads_of(where.scope, where.shard) if where.table == Table.PART else frozenset()
        async for rows in row_slices(self._context.clock, store, where.table, where.scope, where.shard):
            names = [RegisterName(where.table, where.scope, where.shard, key) for key, _ in rows]
            try:
                found = [(name, unpack_row(name, row).value) for name, (_, row) in zip(names, rows, strict=True)]
            except RowDamaged:
                found = await self._settled_rows(names)
            yield [
                (name, value)
                for name, value in found
                if value.visibility != Visibility.TOMBSTONE
                and (where.table != Table.PART or name.key[:UPLOAD_ID_BYTES] in uploads)
            ]

    async def _settled_rows(self, names: Sequence[RegisterName]) -> list[tuple[RegisterName, Value]]:
        """The rows of a slice with a damaged row, of which only the keys are believed. A register that can't be settled
        now is left out, and makes the walk incomplete.
        """
        found = []
        for name in names:
            try:
                value = await self._context.registers.settle(name)
            except StoragedError as error:
                self._context.log(f"the row of {name.key[:80]!r} is damaged here, and can't be settled now: {error}")
                self._unanswered += 1
                continue
            found.append((name, value or Value(0, b"", Visibility.TOMBSTONE, b"")))
        return found

    # --- registers ----------------------------------------------------------------------------------------------------

    def _note_owner(self, name: RegisterName, value: Value) -> None:
        """Raises DataDamaged."""
        if name.table != Table.OBJECT or not shares(value.body) or len(self.owners) >= OWNERS_MAX:
            return
        sharing = sharing_of(decode_record(value))
        if sharing.loans or sharing.departure is not None or sharing.arrivals:
            self.owners.add(name.pack())

    async def judge_rows(self, rows: Iterable[tuple[RegisterName, Value]], *, whole: bool = False) -> list[Finding]:
        """The findings of the rows that are below target. Records that this node can't judge are left out and logged.
        A page of which no replica answers makes a walk incomplete; with ``whole`` it raises StoragedError.
        """
        tallies: list[Tally] = []
        batch: list[tuple[Tally, BlockPlace]] = []
        paged: list[PagesOf] = []
        for name, value in rows:
            tally, coded = Tally(name.pack()), False
            try:
                self._note_owner(name, value)
                note = partial(self._note_unreadable, name, tally)
                if hashes := await pages_of(self._context, name, value, on_unreadable=note):
                    paged.append(PagesOf(tally, name.partition, hashes))
                async for entry in entries_of(self._context, name, value, on_unreadable=note):
                    coded = coded or not entry.small
                    for place in self.places(name, entry):
                        batch.append((tally, place))
                        if len(batch) >= BLOCKS_A_BATCH:
                            await self._judge_blocks(batch)
                            batch = []
            except DataDamaged as error:
                self._note_unreadable(name, tally, error)
            except (KeyError, ValueError, StoragedError) as error:
                if isinstance(error, StoragedError):
                    self._unanswered += 1
                    if whole:
                        raise
                self._context.log(f"repair can't judge {name.key[:80]!r}: {type(error).__name__}: {error}")
            tallies.append(tally)
            self.judged += coded
        await self._judge_blocks(batch)
        await self.pages.judge(paged)
        return [finding for tally in tallies if (finding := tally.finding()) is not None]

    def _note_unreadable(self, name: RegisterName, tally: Tally, error: DataDamaged) -> None:
        """The record, or a page of it; its other versions are judged."""
        self._context.log(f"the record of {name.key[:80]!r} cannot be read: {error}")
        tally.add_unreadable_record()

    def places(self, name: RegisterName, entry: PartEntry) -> Iterable[BlockPlace]:
        """The blocks of a part and their disks. Raises KeyError for a bucket or an epoch that is not known here,
        ValueError for a run that no layout explains.
        """
        return blocks_of(entry, name.partition, self._context.layouts, self.buckets.countries_of(name.scope))

    async def _judge_blocks(self, batch: Sequence[tuple[Tally, BlockPlace]]) -> None:
        presence = await self._presence([place for _, place in batch])
        self.placements.forget()
        for tally, place in batch:
            health = judge_block(place, presence)
            if not health.whole or health.misplaced:
                countries = self.buckets.countries_of(RegisterName.unpack(tally.name).scope)
                tally.add(health, self.placements.room(place.entry, countries))

    async def health(self, places: Sequence[BlockPlace]) -> list[BlockHealth]:
        """How the blocks are now."""
        presence = await self._presence(places)
        return [judge_block(place, presence) for place in places]

    async def _presence(self, places: Sequence[BlockPlace]) -> dict[tuple[FragmentId, str], Presence]:
        """Asks all disks at the same time, each for its own fragments, in batches. A disk that does not answer is left
        out.
        """
        wanted: dict[str, list[FragmentId]] = {}
        for place in places:
            for fragment, disk in place.fragments:
                if self._context.liveness.disk_readable(disk):
                    wanted.setdefault(disk, []).append(fragment)
        answers = await asyncio.gather(*(self._ask(disk, ids) for disk, ids in wanted.items()))
        return {
            (FragmentId.unpack(stat.id), disk): kind
            for disk, stats in zip(wanted, answers, strict=True)
            for stat, kind in stats
        }

    async def _ask(self, disk: str, ids: list[FragmentId]) -> list[tuple[FragmentStat, Presence]]:
        found = []
        try:
            for start in range(0, len(ids), STATS_A_CALL):
                async with asyncio.timeout(self._context.limits.call_timeout_s):
                    stats = await self._context.stores.store(disk).stat(ids[start : start + STATS_A_CALL])
                missing = Presence.MISSING if self._context.liveness.disk_writable(disk) else Presence.AWAY
                found += [(stat, Presence.OK if stat.health == Health.OK else missing) for stat in stats]
        except (PeerError, TimeoutError):
            self._unanswered += 1
        return found

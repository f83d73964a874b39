"""Walking records and asking disks: which fragments are where they should be.

What is walked is taken from the bucket directory, not from what the local disk knows: a disk that was away does not
know which buckets are new. Before a
range of registers is walked its replicas are brought to the same rows (slices are compared by digest, what differs is
settled on all), so rows can be read
from the local store; before anything is changed, the record is read again from a majority. Fragments are asked for in
batches, one call a disk.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from typing import NamedTuple

from storaged.cluster.layout import Profile, partition_of
from storaged.errors import DataDamaged, NoSuchBucket, PeerError, StoragedError
from storaged.fragments.ports import FragmentId, FragmentStat, Health
from storaged.ids import UPLOAD_ID_BYTES
from storaged.maintain.context import MaintainContext
from storaged.maintain.directory import Buckets
from storaged.maintain.health import BlockHealth, BlockPlace, Finding, Presence, Tally, blocks_of, judge_block
from storaged.maintain.manifest_repair import PageKeeper, PagesOf, pages_in
from storaged.maintain.slices import slices
from storaged.meta.listing.merge import RingScanner, every_row
from storaged.meta.names import RegisterName, Table, Value, Visibility
from storaged.meta.ports import PageQuery, RowDamaged
from storaged.meta.storage.rowvalue import unpack_row
from storaged.objects.code.place import Placement, choose
from storaged.objects.records import PartEntry
from storaged.objects.write.references import parts_in
from storaged.objects.write.uploads import living_upload, living_uploads

BLOCKS_A_BATCH = 2000
STATS_A_CALL = 4000


class Range(NamedTuple):
    """Registers that this node looks after: their rows are read from the local ``disk``."""

    disk: str
    table: int
    scope: bytes
    shard: int

    @property
    def prefix(self) -> bytes:
        """What the packed names of its registers begin with."""
        return RegisterName(self.table, self.scope, self.shard, b"").pack()


async def entries_of(context: MaintainContext, name: RegisterName, value: Value | None) -> AsyncIterator[PartEntry]:
    """The parts that a register of objects or parts refers to, those in manifest pages included. Raises DataDamaged."""
    if value is not None and value.visibility != Visibility.TOMBSTONE and name.table in (Table.OBJECT, Table.PART):
        async for entry in parts_in(context.pages, name, value.body, name.table):
            yield entry


async def upload_rows(context: MaintainContext, owner: RegisterName) -> AsyncIterator[tuple[RegisterName, Value]]:
    """The rows of parts of open uploads for an object's key: fragments of parts name the object as their owner. Raises
    ServiceUnavailable,
    DataDamaged."""
    async for upload in living_uploads(context.scanner, owner):
        upload_id = upload.record.upload_id
        async for row in every_row(
            context.scanner, PageQuery(Table.PART, owner.scope, [owner.shard], prefix=upload_id)
        ):
            yield RegisterName(Table.PART, owner.scope, owner.shard, row.key), row.value


class Walker:
    """Judges registers, a batch at a time. ``unanswered`` counts calls that failed although their disk is thought to be
    there: what was counted meanwhile is
    not the whole truth."""

    def __init__(self, context: MaintainContext, scanner: RingScanner) -> None:
        self._context = context
        self._scanner = scanner
        self._can_hold: dict[tuple[str, tuple[str, ...]], bool] = {}
        self.pages = PageKeeper(context)
        self.buckets = Buckets()
        self._unanswered = 0
        self.settled = 0

    @property
    def unanswered(self) -> int:
        return self._unanswered + self.pages.unanswered

    async def open_uploads_of(self, scope: bytes, shard: int) -> frozenset[bytes]:
        """Ids of the uploads of one shard that may still become an object, by the rows of the disk that leads there.
        The rows of other uploads' parts are
        kept for a while and say nothing: what became of the parts is in the object. Empty when another node leads.
        Raises RowDamaged for
        what leads to the rows."""
        store = self._context.local_meta.get(self._context.leader_of(partition_of(scope, shard)))
        found: set[bytes] = set()
        if store is None:
            return frozenset()
        async for rows in slices(self._context.clock, store, Table.UPLOAD, scope, shard):
            for key, row in rows:
                try:
                    slot = unpack_row(RegisterName(Table.UPLOAD, scope, shard, key), row)
                    upload = living_upload(key, slot.value)
                except (DataDamaged, RowDamaged) as error:  # one upload's parts are not looked at; all else is
                    self._context.log(f"the record of an upload for {key[:80]!r} cannot be read: {error}")
                    continue
                if upload is not None:
                    found.add(upload.record.upload_id)
        return frozenset(found)

    async def is_counted(self, name: RegisterName) -> bool:
        """False for the row of a part whose upload has ended. Raises RowDamaged."""
        return name.table != Table.PART or name.key[:UPLOAD_ID_BYTES] in await self.open_uploads_of(
            name.scope, name.shard
        )

    # --- ranges -----------------------------------------------------------------------------------------------------

    def led_ranges(self) -> list[Range]:
        """What this node looks after, by the directory as it was read last. The system partition is not among it:
        gateways alone write there (``node.keeper``)."""
        found = []
        for bucket in self.buckets.by_id.values():
            for shard in bucket.shard_numbers:
                disk = self._context.leader_of(partition_of(bucket.id, shard))
                if disk in self._context.local_meta:
                    found += [
                        Range(disk, table, bucket.id, shard) for table in (Table.OBJECT, Table.UPLOAD, Table.PART)
                    ]
        return found

    async def bring_together(self, where: Range) -> bool:
        """Settles on all replicas what they differ in. False when one that should answer did not, so that it may still
        lag. Raises ServiceUnavailable.
        """
        try:
            found = await self._scanner.catch_up(where.table, where.scope, where.shard)
        except NoSuchBucket:
            return (
                True  # the bucket is being deleted: its fence lets nothing be settled, and nothing of it will be read
            )
        self.settled += found.settled
        return not any(map(self._context.liveness.disk_readable, found.away))

    async def rows(self, where: Range) -> AsyncIterator[list[tuple[RegisterName, Value]]]:
        """Slices of a range from the local store, without tombstones and parts of uploads that ended. A slice with a
        damaged row is read from a majority, which
        rewrites the row."""
        store = self._context.local_meta[where.disk]
        uploads = await self.open_uploads_of(where.scope, where.shard) if where.table == Table.PART else frozenset()
        async for rows in slices(self._context.clock, store, where.table, where.scope, where.shard):
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
        """Those of a slice where a row is damaged: only the keys are taken from here. One that can't be settled now is
        left out, and makes the walk less
        than whole."""
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

    # --- registers --------------------------------------------------------------------------------------------------

    async def judge_rows(self, rows: Iterable[tuple[RegisterName, Value]]) -> list[Finding]:
        """Findings of those rows that are not as they should be. Records that this node can't judge are left out and
        logged.
        """
        tallies: list[Tally] = []
        batch: list[tuple[Tally, BlockPlace]] = []
        paged: list[PagesOf] = []
        for name, value in rows:
            tally = Tally(name.pack())
            try:
                if hashes := pages_in(name, value):
                    paged.append(PagesOf(tally, name.partition, hashes))
                async for entry in entries_of(self._context, name, value):
                    for place in self.places(name, entry):
                        batch.append((tally, place))
                        if len(batch) >= BLOCKS_A_BATCH:
                            await self._weigh(batch)
                            batch = []
            except DataDamaged as error:
                self._context.log(f"the record of {name.key[:80]!r} cannot be read: {error}")
                tally.unreadable()
            except (KeyError, ValueError, StoragedError) as error:
                self._context.log(f"repair can't judge {name.key[:80]!r}: {type(error).__name__}: {error}")
            tallies.append(tally)
        await self._weigh(batch)
        await self.pages.weigh(paged)
        return [finding for tally in tallies if (finding := tally.finding()) is not None]

    def places(self, name: RegisterName, entry: PartEntry) -> Iterable[BlockPlace]:
        """Raises KeyError for a bucket or an epoch that is not known here, ValueError for a run that no layout
        explains.
        """
        return blocks_of(entry, name.partition, self._context.layouts.at, self.buckets.countries_of(name.scope))

    async def _weigh(self, batch: Sequence[tuple[Tally, BlockPlace]]) -> None:
        presence = await self.presence([place for _, place in batch])
        self._can_hold.clear()
        for tally, place in batch:
            health = judge_block(place, presence)
            if not health.whole:
                countries = self.buckets.countries_of(RegisterName.unpack(tally.name).scope)
                tally.add(health, self.can_hold(place.entry, countries))

    async def health(self, places: Sequence[BlockPlace]) -> list[BlockHealth]:
        presence = await self.presence(places)
        return [judge_block(place, presence) for place in places]

    async def presence(self, places: Sequence[BlockPlace]) -> dict[tuple[FragmentId, str], Presence]:
        """Asks all disks at once, each for its own fragments, in batches. A disk that does not answer is away."""
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

    # --- targets ----------------------------------------------------------------------------------------------------

    def can_hold(self, entry: PartEntry, countries: tuple[str, ...]) -> bool:
        """Whether the living disks can hold a part as its target asks. What one placement group can, all can: only the
        number of disks in each domain matters.
        """
        known = self._can_hold.get((entry.target, countries))
        if known is None:
            known = self._can_hold[entry.target, countries] = self.target_placement(entry, countries) is not None
        return known

    def target_placement(self, entry: PartEntry, countries: tuple[str, ...]) -> Placement | None:
        """Where the living disks can hold a part under its target profile, within the domains' limits; None when they
        can't.
        """
        target = Profile.parse(entry.target)
        placement = self.placement(entry, target, countries)
        if placement is None or placement.profile != target:
            return None
        layout = self._context.layouts.current
        shares: dict[str, int] = {}
        for disk in placement.disks:
            domain = layout.domain_by_disk[disk]
            shares[domain] = shares.get(domain, 0) + 1
        return placement if not placement.moved or max(shares.values()) <= target.m else None

    def placement(self, entry: PartEntry, target: Profile, countries: tuple[str, ...]) -> Placement | None:
        """Where a write of this profile would go now; None when it would be refused."""
        writable: Callable[[str], bool] = self._context.liveness.disk_writable
        try:
            return choose(self._context.layouts.current, entry.data_id, target, writable, countries)
        except StoragedError:
            return None

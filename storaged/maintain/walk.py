"""Walking records and asking disks: which fragments are where they should be.

Rows come from the local replica's store in slices; their fragments are asked for in batches, one call a disk. What a lagging replica does not
know yet is brought to it by catch-up; before anything is changed, the record is read again from a majority.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import dataclass, field

import msgspec

from storaged.cluster.layout import Profile
from storaged.errors import PeerError, StoragedError
from storaged.fragments.ports import FragmentId, FragmentStat, Health
from storaged.maintain.context import MaintainContext
from storaged.maintain.survey import BlockHealth, BlockPlace, Finding, Presence, blocks_of, judge, judge_block
from storaged.meta.names import RegisterName, Table, Value, Visibility, system_name
from storaged.meta.ports import MetaStore, RowDamaged
from storaged.objects.manifest import parts_of
from storaged.objects.place import Placement, choose
from storaged.objects.records import BucketRecord, ObjectRecord, PartEntry, PartRecord
from storaged.wire import decode

ROWS_A_SLICE = 200
STATS_A_CALL = 2000


@dataclass
class Buckets:
    """Bucket id -> the countries its data was placed in, which placement needs. Read from the ring at the start of a walk."""

    countries: dict[bytes, tuple[str, ...]] = field(default_factory=dict)

    async def refresh(self, context: MaintainContext) -> None:
        """Raises ServiceUnavailable when the system partition has no majority."""
        found: dict[bytes, tuple[str, ...]] = {}
        name, after = system_name("bucket/"), b""
        while True:
            page = await context.scanner.list_page(Table.SYSTEM, name.scope, [0], prefix=name.key, after=after, limit=1000, hidden=True)
            for row in page.rows:
                record = decode(row.value.body, BucketRecord)
                found[record.id] = record.countries
            if page.next_after is None:
                break
            after = page.next_after
        self.countries = found


async def entries_of(context: MaintainContext, name: RegisterName, value: Value | None) -> list[PartEntry]:
    """The parts that a register refers to, those in manifest pages included. Raises msgspec.MsgspecError, DataDamaged."""
    if value is None or value.visibility == Visibility.TOMBSTONE or not value.body:
        return []
    if name.table == Table.PART:
        return [decode(value.body, PartRecord).entry]
    record = decode(value.body, ObjectRecord)
    return [part for version in record.versions async for part in parts_of(context.pages, name, version)]


class Walker:
    """Judges registers, a batch at a time."""

    def __init__(self, context: MaintainContext) -> None:
        self._context = context
        self.buckets = Buckets()

    def places(self, name: RegisterName, entries: Iterable[PartEntry]) -> list[BlockPlace]:
        """Raises KeyError for a bucket or an epoch that is not known here, ValueError for a run that no layout explains."""
        countries = self.buckets.countries[name.scope]
        return [place for entry in entries for place in blocks_of(entry, name.partition, self._context.layouts.at, countries)]

    async def rows(self, disk: str, table: int, scope: bytes, shard: int) -> AsyncIterator[list[tuple[RegisterName, Value]]]:
        """Slices of a range from the local store, tombstones left out. Damaged rows are settled, which rewrites them, and read from a majority."""
        store, after = self._context.local_meta[disk], b""
        while True:
            try:
                found = [(slot.name, slot.value) for slot in store.scan(table, scope, shard, after=after, prefix=b"", limit=ROWS_A_SLICE)]
            except RowDamaged:
                found = await self._settled_rows(store, table, scope, shard, after)
            if not found:
                return
            yield [(name, value) for name, value in found if value.visibility != Visibility.TOMBSTONE]
            after = found[-1][0].key
            await asyncio.sleep(0)

    async def _settled_rows(self, store: MetaStore, table: int, scope: bytes, shard: int, after: bytes) -> list[tuple[RegisterName, Value]]:
        """The next slice where a row is damaged: only the keys are taken from here."""
        found = []
        for key, _ in store.slice(table, scope, shard, after=after, prefix=b"", limit=ROWS_A_SLICE):
            name = RegisterName(table, scope, shard, key)
            value = await self._context.registers.settle(name)
            found.append((name, value or Value(0, b"", Visibility.TOMBSTONE, b"")))
        return found

    async def judge_rows(self, rows: Sequence[tuple[RegisterName, Value]]) -> list[Finding]:
        """Findings of those rows that are not as they should be. Records that this node can't judge are left out and logged."""
        places: list[tuple[RegisterName, list[BlockPlace]]] = []
        for name, value in rows:
            try:
                places.append((name, self.places(name, await entries_of(self._context, name, value))))
            except (KeyError, ValueError, msgspec.MsgspecError, StoragedError) as error:
                self._context.log(f"repair can't judge {name.key[:80]!r}: {type(error).__name__}: {error}")
        presence = await self.presence([place for _, found in places for place in found])
        findings = []
        for name, found in places:
            finding = judge(name.pack(), (judge_block(place, presence) for place in found), self.recodable)
            if finding is not None:
                findings.append(finding)
        return findings

    async def health(self, name: RegisterName, value: Value | None) -> list[BlockHealth]:
        """Every block of one register. Raises as ``places`` and ``entries_of``."""
        places = self.places(name, await entries_of(self._context, name, value))
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
        return {(FragmentId.unpack(stat.id), disk): kind for disk, stats in zip(wanted, answers, strict=True) for stat, kind in stats}

    async def _ask(self, disk: str, ids: list[FragmentId]) -> list[tuple[FragmentStat, Presence]]:
        found = []
        try:
            for start in range(0, len(ids), STATS_A_CALL):
                async with asyncio.timeout(self._context.limits.call_timeout_s):
                    stats = await self._context.stores.store(disk).stat(ids[start : start + STATS_A_CALL])
                missing = Presence.MISSING if self._context.liveness.disk_writable(disk) else Presence.AWAY
                found += [(stat, Presence.OK if stat.health == Health.OK else missing) for stat in stats]
        except (PeerError, TimeoutError):
            return []
        return found

    def recodable(self, health: BlockHealth) -> bool:
        """Whether a block that is not held as its target asks could be now."""
        return not health.on_target and self.target_placement(health.place) is not None

    def target_placement(self, place: BlockPlace, countries: Sequence[str] = ()) -> Placement | None:
        """Where the living disks could hold the block under its target profile; None when they can't."""
        target = Profile.parse(place.entry.target)
        try:
            placement = choose(self._context.layouts.current, place.entry.data_id, target, self._context.liveness.disk_writable, countries)
        except StoragedError:
            return None
        return placement if placement.profile == target else None

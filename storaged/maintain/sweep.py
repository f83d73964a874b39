"""The sweep of orphans: puts on this node's garbage lists what no record claims. The collector judges it there.

A fragment of a PUT that is under way has no record yet. So only old fragments are looked at. That spares most requests
a round of their register; nothing depends on the age being right.

What a sweep has judged, the next ones leave alone for a week: only fragments that have become old since are judged, by
the ages in the index, and no head of another one is read. Data that was in use at that time comes to the garbage lists
when it is replaced. The full sweep of each week finds what a gateway that died has not put there.
"""

from __future__ import annotations

from functools import partial

from storaged.errors import StoragedError
from storaged.fragments.ports import RETIREMENTS_MAX, FragmentHeader, FragmentId, NearStore, Retirement
from storaged.maintain.collection_pace import CollectionPace
from storaged.maintain.context import MaintainContext
from storaged.maintain.directory import Buckets
from storaged.maintain.walk import entries_of, is_claimed, upload_rows
from storaged.meta.names import RegisterName, Table, Value
from storaged.meta.store_ports import RowDamaged
from storaged.objects.records import PartEntry

SWEEP_PAGE = 500
FULL_S = 7 * 86_400.0
"""How often all fragments are judged again."""

_NAME_BYTES_MIN = 19
"""A packed register name with a key of one byte."""


def owner_of(packed: bytes) -> RegisterName:
    """Raises ValueError for bytes that are not the name of an object's register."""
    if len(packed) < _NAME_BYTES_MIN:
        raise ValueError(f"not the name of a register: {packed.hex()}")
    owner = RegisterName.unpack(packed)
    if owner.table != Table.OBJECT:
        raise ValueError(f"data belongs to registers of objects, not of table {owner.table}")
    return owner


class Sweep:
    """Sweeps this node's disks. ``orphans``: fragments found since the start."""

    def __init__(self, context: MaintainContext, buckets: Buckets, pace: CollectionPace) -> None:
        self._context = context
        self._buckets = buckets
        self._pace = pace
        self.orphans = 0
        self._wanted: frozenset[bytes] = frozenset()
        """Data ids of the page that is looked at."""
        self._judged: dict[str, tuple[int, float]] = {}
        """Disk -> all fragments that are older than this were judged (ms since 1970), and when the last full sweep
        began (monotonic).
        """
        self._read: dict[tuple[RegisterName, bytes], list[PartEntry]] = {}
        """Register and body -> its parts among those. A key may have very many versions, and is read once a page."""

    async def once(self) -> int:
        """Returns how many fragments were found."""
        before = self.orphans
        try:
            await self._buckets.refresh(self._context)
            for disk, store in self._context.local_fragments.items():
                await self._sweep_disk(disk, store)
        except (StoragedError, TimeoutError) as error:
            self._context.log(f"the sweep of orphans stops, to begin again later: {error}")
        return self.orphans - before

    async def _sweep_disk(self, disk: str, store: NearStore) -> None:
        clock, failures = self._context.clock, list[str]()
        oldest, now_s = clock.wall_ms() - self._context.limits.orphan_age_ms, clock.monotonic()
        since, full_s = self._judged.get(disk, (0, now_s))
        if now_s - full_s >= FULL_S or since > oldest:  # or the clock was set back
            since, full_s = 0, now_s
        page, after = await store.aged(b"", SWEEP_PAGE, since, oldest)
        while after:
            self._wanted, self._read = frozenset(header.id[:16] for header in page), {}
            found: dict[bytes, Retirement] = {}
            for header in page:
                await self._pace.spend(1)
                try:
                    claimed = await self._claimed(disk, owner_of(header.owner), header)
                except (StoragedError, KeyError, ValueError, TimeoutError) as error:
                    failures.append(str(error))
                    continue
                if not claimed:
                    data_id = header.id[:16]
                    found[data_id] = Retirement(data_id, header.owner, 0)
                    self.orphans += 1
            entries = list(found.values())
            for start in range(0, len(entries), RETIREMENTS_MAX):
                await store.retire(entries[start : start + RETIREMENTS_MAX])
            page, after = await store.aged(after, SWEEP_PAGE, since, oldest)
        if not failures:
            self._judged[disk] = oldest, full_s
        else:
            self._context.log(
                f"the sweep of disk {disk} leaves {len(failures)} fragments alone that it can't judge; the first:"
                f" {failures[0]}"
            )

    async def _claimed(self, disk: str, owner: RegisterName, header: FragmentHeader) -> bool:
        """Whether the owner's record, or an open upload of its key, names this very fragment on this disk: by the row
        that this node has, which costs nothing and hardly ever lags, else by a majority. Raises KeyError, ValueError
        for a fragment that this node can't judge.
        """
        if owner.scope not in self._buckets.by_id:
            # The bucket is gone or brand-new. A bucket that is gone has a fence; that is checked before any deletion.
            return False
        for replica in self._context.layouts.partition(owner.partition).present:
            store = self._context.local_meta.get(replica)
            try:
                slot = await store.read(partial(store.get, owner)) if store is not None else None
            except RowDamaged:
                slot = None
            if slot is not None and self._names(owner, await self._entries(owner, slot.value), header, disk):
                return True
        value = (await self._context.registers.read(owner)).value
        if self._names(owner, await self._entries(owner, value), header, disk):
            return True
        async for name, row in upload_rows(self._context, owner):
            if any(entry.data_id == header.id[:16] for entry in await self._entries(name, row)):
                return True
        return False

    async def _entries(self, name: RegisterName, value: Value | None) -> list[PartEntry]:
        """Those of data that is looked at."""
        read = name, value.body if value is not None else b""
        if read not in self._read:
            entries = [entry async for entry in entries_of(self._context, name, value) if entry.data_id in self._wanted]
            self._read[read] = entries
        return self._read[read]

    def _names(self, owner: RegisterName, entries: list[PartEntry], header: FragmentHeader, disk: str) -> bool:
        countries = self._buckets.countries_of(owner.scope)
        return is_claimed(self._context, owner, entries, FragmentId.unpack(header.id), disk, countries)

"""Garbage: data that no record refers to any more.

Deleting is the one thing that can't be taken back, so it is done only behind a committed identity round of the register
that might refer to
the data: the round is at a new ballot, which kills every earlier promise, so that a gateway that slept between its
barrier and its accept can't
commit a reference to what was just deleted; it looks at its fragments again (``touch``) before it proposes a second
time, and what was touched since the
collector looked is not deleted. While an upload for the key is open nothing is judged: a part's row may be on its way.
Without a majority nothing is deleted.

Two ways lead here: the garbage lists that writers fill (``retire``), and a sweep of fragments that are older than any
request may live.

A batch of a garbage list is judged in five steps: which fragments are there, and how old (anything written or touched
later is not deleted); the same of the other
copies of small objects; which keys have uploads; a round for each register; the deletions, in one call a disk. The disk
of a register's first replica has its small
objects on its list earlier than the others have: it deletes their copies too, so that a round is made once, not three
times. What it misses the others find.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field

from storaged.errors import NoSuchBucket, StoragedError
from storaged.fragments.ports import FragmentHeader, FragmentId, FragmentStore, Health, Retirement
from storaged.maintain.context import MaintainContext
from storaged.maintain.directory import Buckets
from storaged.maintain.health import claims
from storaged.maintain.walk import entries_of
from storaged.meta.names import RegisterName, Table, Value
from storaged.meta.ports import PageQuery, RowDamaged
from storaged.objects.records import PartEntry
from storaged.objects.write.uploads import living_upload, living_uploads

Live = Callable[[RegisterName, bool], Awaitable[set[bytes]]]
"""(owner, whether uploads for its key are to be looked at) -> the data ids that the owner's register, or an upload,
refers to; judged behind an identity round.

Raises StoragedError when that can't be known now, NoSuchBucket with the detail ``final`` for a bucket that is gone for
good."""

SWEEP_PAGE = 500
FEW = 2
"""What is asked for first of one data id: most have one fragment on a disk, and every header is a read."""

UPLOADS_A_SHARD_MAX = 1000
"""Open uploads of a shard that are listed at once for all keys of a batch; where there are more each key is asked
about.
"""

DELETES_AT_ONCE = 2000

RESTS_MAX = 10_000
GONE_MAX = 10_000

_NAME_BYTES_MIN = 19
"""A packed register name with a key of one byte."""


@dataclass
class _Entry:
    """A data id on a garbage list: its fragments here, and ``copies`` on other disks, each with its age as it was
    before anything was judged.
    """

    data_id: bytes
    fragments: list[FragmentId]
    ages: list[int]
    copies: list[tuple[str, FragmentId, int]] = field(default_factory=list)


class Collector:
    """Judges and deletes on this node's disks."""

    def __init__(self, context: MaintainContext, live: Live) -> None:
        self._context = context
        self._live = live
        self._buckets = Buckets()
        self._rests: dict[bytes, float] = {}
        """Data ids on garbage lists that could not be judged, and until when they are left alone: they must not keep
        others from being judged.
        """
        self._gone: set[bytes] = set()
        """Ids of buckets that were deleted for good."""
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

    # --- garbage lists ----------------------------------------------------------------------------------------------

    async def collect_due(self) -> int:
        """Judges what is due on all disks; returns how many fragments were deleted."""
        before = self.deleted_fragments
        now = self._context.clock.monotonic()
        self._rests = {data_id: until for data_id, until in self._rests.items() if until > now}
        for disk, store in self._context.local_fragments.items():
            failures: list[str] = []
            try:
                while await self._collect_some(disk, store, failures):
                    pass
            except (StoragedError, TimeoutError) as error:
                failures.append(str(error))
            if failures:
                self._context.log(
                    f"{len(failures)} entries of disk {disk}'s garbage list can't be judged now, the first:"
                    f" {failures[0]}"
                )
        return self.deleted_fragments - before

    async def _collect_some(self, disk: str, store: FragmentStore, failures: list[str]) -> bool:
        """One batch; False when there is nothing left that could be judged now."""
        limits = self._context.limits
        due = await store.retired(self._context.clock.wall_ms(), limits.collect_batch + len(self._rests))
        batch = [(data_id, owner) for data_id, owner in due if data_id not in self._rests][: limits.collect_batch]
        by_owner: dict[RegisterName, list[_Entry]] = {}
        rest: set[bytes] = set()
        for data_id, packed in batch:
            try:
                owner = _owner_of(packed)
                fragments = await _fragments_of(store, data_id)
                ages = [stat.created_ms for stat in await store.stat(fragments)]
            except (StoragedError, ValueError, TimeoutError) as error:
                failures.append(str(error))
                rest.add(data_id)
            else:
                by_owner.setdefault(owner, []).append(_Entry(data_id, fragments, ages))
        await self._find_copies(disk, by_owner)
        uploads = await self._uploads_in({(owner.scope, owner.shard) for owner in by_owner})
        dead: list[_Entry] = []

        async def judge(owner: RegisterName, entries: list[_Entry]) -> None:
            keys = uploads.get((owner.scope, owner.shard))
            try:
                judged = await self._judge(store, owner, entries, None if keys is None else owner.key in keys)
            except (StoragedError, ValueError, TimeoutError) as error:
                failures.extend([str(error)] * len(entries))
                rest.update(entry.data_id for entry in entries)
            else:
                dead.extend(judged[0])
                rest.update(judged[1])

        await self._at_once(judge(owner, entries) for owner, entries in by_owner.items())
        try:
            rest |= await self._delete(store, dead)
        finally:
            until = self._context.clock.monotonic() + limits.retry_max_s / 10
            self._rests.update(dict.fromkeys(list(rest)[: max(0, RESTS_MAX - len(self._rests))], until))
        return bool(batch) and len(self._rests) < RESTS_MAX

    async def _at_once(self, work: Iterator[Awaitable[None]]) -> None:
        """Does all, ``collect_at_once`` at a time; each is made when its turn comes."""

        async def worker() -> None:
            for some in work:
                await some

        async with asyncio.TaskGroup() as group:
            for _ in range(self._context.limits.collect_at_once):
                group.create_task(worker())

    async def _find_copies(self, disk: str, by_owner: dict[RegisterName, list[_Entry]]) -> None:
        """Notes the other copies of small objects, as far as their disks answer."""
        asked: dict[str, list[tuple[_Entry, FragmentId]]] = {}
        for owner, entries in by_owner.items():
            others = [
                replica for replica in self._context.layouts.current.replicas_of(owner.partition) if replica != disk
            ]
            for entry in entries:
                if (
                    len(entry.fragments) == 1
                    and owner.table == Table.OBJECT
                    and (own := entry.fragments[0]).k == 1
                    and own.block == 0
                ):
                    copies = [
                        own._replace(position=position) for position in range(own.m + 1) if position != own.position
                    ]
                    for other in others:
                        asked.setdefault(other, []).extend((entry, copy) for copy in copies)
        for other, wanted in asked.items():
            try:
                stats = await self._context.stores.store(other).stat([copy for _, copy in wanted])
            except (StoragedError, TimeoutError):
                continue
            for (entry, copy), stat in zip(wanted, stats, strict=True):
                if stat.health != Health.MISSING:
                    entry.copies.append((other, copy, stat.created_ms))

    async def _uploads_in(self, shards: set[tuple[bytes, int]]) -> dict[tuple[bytes, int], set[bytes]]:
        """By shard the keys for which an upload is open. A shard of which that can't be said in one go is left out."""
        found: dict[tuple[bytes, int], set[bytes]] = {}

        async def ask(scope: bytes, shard: int) -> None:
            try:
                page = await self._context.scanner.list_page(
                    PageQuery(Table.UPLOAD, scope, [shard], limit=UPLOADS_A_SHARD_MAX)
                )
                uploads = [living_upload(row.key, row.value) for row in page.rows]
            except (StoragedError, TimeoutError):
                return
            if page.next_after is None:
                found[scope, shard] = {upload.key for upload in uploads if upload is not None}

        await self._at_once(ask(scope, shard) for scope, shard in shards)
        return found

    async def _judge(
        self, store: FragmentStore, owner: RegisterName, entries: list[_Entry], uploads: bool | None
    ) -> tuple[list[_Entry], list[bytes]]:
        """(what nothing refers to, nor ever will; data ids that can't be judged now). What is referred to comes off the
        list. ``uploads``: whether some are open
        for the key; None: to be found out here. Raises StoragedError when nothing can be said."""
        try:
            if uploads is None:
                uploads = False
                async for _ in living_uploads(self._context.scanner, owner):
                    uploads = True
                    break
            live = await self._live(owner, uploads)
        except NoSuchBucket as error:
            if error.details.get("final") or await self._is_gone(owner.scope):
                return entries, []
            return [], [entry.data_id for entry in entries]
        for entry in entries:
            if entry.data_id in live:
                self.kept += 1
                await store.unretire(entry.data_id)
        others = [entry for entry in entries if entry.data_id not in live]
        return ([], [entry.data_id for entry in others]) if uploads else (others, [])

    async def _delete(self, store: FragmentStore, dead: list[_Entry]) -> set[bytes]:
        """Deletes fragments that are as old as they were. Returns the data ids of which one was touched since: somebody
        is about to refer to it, or did. Of more
        than ``SWEEP_PAGE`` fragments the others come in the next batch."""
        aged = [(fragment, age) for entry in dead for fragment, age in zip(entry.fragments, entry.ages, strict=True)]
        left: set[bytes] = set()
        for start in range(0, len(aged), DELETES_AT_ONCE):
            some = aged[start : start + DELETES_AT_ONCE]
            deleted = await self._delete_on(store, some)
            if deleted < len(some):
                stats = await store.stat([fragment for fragment, _ in some])
                left |= {
                    fragment.data_id
                    for (fragment, _), stat in zip(some, stats, strict=True)
                    if stat.health != Health.MISSING
                }
        for entry in dead:
            if not entry.fragments:
                await store.unretire(entry.data_id)
        copies: dict[str, list[tuple[FragmentId, int]]] = {}
        for entry in dead:
            for disk, copy, age in entry.copies:
                copies.setdefault(disk, []).append((copy, age))
        for disk, some in copies.items():
            try:
                for start in range(0, len(some), DELETES_AT_ONCE):
                    await self._delete_on(self._context.stores.store(disk), some[start : start + DELETES_AT_ONCE])
            except (StoragedError, TimeoutError):
                continue  # its own list has them
        return left

    async def _delete_on(self, store: FragmentStore, aged: Sequence[tuple[FragmentId, int]]) -> int:
        deleted = await store.delete([fragment for fragment, _ in aged], created_ms=[age for _, age in aged])
        self.deleted_fragments += deleted
        return deleted

    async def _is_gone(self, bucket: bytes) -> bool:
        """Whether a bucket that was just seen to be fenced has left the directory, and so was deleted for good: a
        gateway that died before it made the fence
        final leaves one that nobody lifts or finishes."""
        if bucket in self._gone:
            return True
        await self._buckets.refresh(self._context)
        if bucket in self._buckets.by_id or not self._buckets.whole:
            return False
        if len(self._gone) >= GONE_MAX:
            self._gone.clear()
        self._gone.add(bucket)
        return True

    # --- the other way around ---------------------------------------------------------------------------------------

    async def sweep(self) -> int:
        """Fragments old enough that no request can still be writing them, and that no record claims: whole data ids are
        retired, and
        single fragments of data that is claimed elsewhere (left behind by a recoding) are deleted. Returns how many
        were found."""
        before = self.orphans
        try:
            await self._buckets.refresh(self._context)
            for disk, store in self._context.local_fragments.items():
                await self._sweep_disk(disk, store)
        except (StoragedError, TimeoutError) as error:
            self._context.log(f"the sweep of orphans stops, to begin again later: {error}")
        return self.orphans - before

    async def _sweep_disk(self, disk: str, store: FragmentStore) -> None:
        after = b""
        failures: list[str] = []
        while page := [header async for header in store.scan(after, SWEEP_PAGE)]:
            after = page[-1].id
            oldest = self._context.clock.wall_ms() - self._context.limits.orphan_age_ms
            for header in page:
                if header.created_ms >= oldest or len(header.owner) < _NAME_BYTES_MIN:
                    continue
                try:
                    if not await self._claimed(disk, header):
                        await self._discard(disk, store, header)
                except (StoragedError, KeyError, ValueError, TimeoutError) as error:
                    failures.append(str(error))
            await asyncio.sleep(0)
        if failures:
            self._context.log(
                f"the sweep of disk {disk} leaves {len(failures)} fragments alone that it can't judge; the first:"
                f" {failures[0]}"
            )

    async def _claimed(self, disk: str, header: FragmentHeader) -> bool:
        """Whether the owner's record names this very fragment on this disk: first by the row that this node has, which
        costs nothing and is hardly ever
        behind, then by a majority. Raises KeyError, ValueError for what this node can't judge."""
        owner = RegisterName.unpack(header.owner)
        if owner.scope not in self._buckets.by_id:
            # the bucket is gone or brand-new; the fence of the first tells them apart before anything is deleted
            return False
        for replica in self._context.layouts.current.replicas_of(owner.partition):
            store = self._context.local_meta.get(replica)
            try:
                slot = store.get(owner) if store is not None else None
            except RowDamaged:
                slot = None
            if slot is not None and self._names(owner, await self._entries(owner, slot.value), header, disk):
                return True
        value = (await self._context.registers.read(owner)).value
        return self._names(owner, await self._entries(owner, value), header, disk)

    async def _entries(self, owner: RegisterName, value: Value | None) -> list[PartEntry]:
        return [entry async for entry in entries_of(self._context, owner, value)]

    def _names(self, owner: RegisterName, entries: list[PartEntry], header: FragmentHeader, disk: str) -> bool:
        fragment, countries = FragmentId.unpack(header.id), self._buckets.countries_of(owner.scope)
        return any(
            claims(entry, fragment, disk, owner.partition, self._context.layouts.at, countries) for entry in entries
        )

    async def _discard(self, disk: str, store: FragmentStore, header: FragmentHeader) -> None:
        """A data id that its object uses loses this one fragment; any other goes to the garbage list, where it is
        judged again.
        """
        owner, fragment = RegisterName.unpack(header.owner), FragmentId.unpack(header.id)
        (stat,) = await store.stat([fragment])
        try:
            value = await self._context.registers.settle(owner)
        except NoSuchBucket as error:
            if not error.details.get("final") and not await self._is_gone(owner.scope):
                return
            value = None
        entries = [entry for entry in await self._entries(owner, value) if entry.data_id == fragment.data_id]
        if not entries:
            await store.retire([Retirement(fragment.data_id, header.owner, self._context.clock.wall_ms())])
        elif not self._names(owner, entries, header, disk):
            self.deleted_fragments += await store.delete([fragment], created_ms=[stat.created_ms])
        else:
            return
        self.orphans += 1


async def _fragments_of(store: FragmentStore, data_id: bytes) -> list[FragmentId]:
    """Up to SWEEP_PAGE of them."""
    page: list[FragmentId] = []
    for limit in (FEW, SWEEP_PAGE):
        page = [
            FragmentId.unpack(header.id) async for header in store.scan(data_id, limit) if header.id[:16] == data_id
        ]
        if len(page) < limit:
            break
    return page


def _owner_of(packed: bytes) -> RegisterName:
    """Raises ValueError for what is not a register's name."""
    if len(packed) < _NAME_BYTES_MIN:
        raise ValueError(f"not the name of a register: {packed.hex()}")
    return RegisterName.unpack(packed)

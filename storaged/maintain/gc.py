"""Garbage collection: deletes data that no record refers to any more.

A deletion can't be undone. So it is done only after an identity round of the register that might refer to the data was
committed. The round has a new ballot, which ends every earlier promise: a gateway that slept between its barrier and
its accept can't commit a reference to what was just deleted. Before it proposes a second time it looks at its fragments
again (``touch``), and what was touched since the collector looked is not deleted. While an upload for the key is open
nothing is judged, for the row of a part may be on its way. Without a majority nothing is deleted.

Garbage is found in two ways: writers fill the garbage lists (``retire``), and a sweep looks for fragments that are
older than any request may live.

A batch of a garbage list is judged in five steps:

1. Which fragments are there, and how old are they? What is written or touched later is not deleted.
2. The same for the other copies of small objects. The disk of a register's first replica has small objects on its list
   before the others have. It deletes their copies too, so that one round is made, not three. The other disks' lists
   find what it misses.
3. Which keys have open uploads?
4. A round for each register. Data to which its record refers stays, but for fragments that a repair has moved away
   from this disk.
5. The deletions, in one call for each disk.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

from storaged.errors import NoSuchBucket, StoragedError
from storaged.fragments.ports import FragmentHeader, FragmentId, FragmentStore, Health, Retirement
from storaged.maintain.context import MaintainContext, concurrently
from storaged.maintain.directory import Buckets
from storaged.maintain.walk import entries_of, is_claimed
from storaged.meta.names import RegisterName, Table, Value
from storaged.meta.ports import PageQuery
from storaged.meta.store_ports import RowDamaged
from storaged.objects.records import PartEntry
from storaged.objects.write.uploads import living_upload, living_uploads

LiveDataIds = Callable[[RegisterName, bool], Awaitable[set[bytes]]]
"""(owner, whether to look at uploads for its key) -> the data ids to which the owner's register, or an upload, refers
after an identity round.

Raises StoragedError when that can't be found out now, NoSuchBucket with the detail ``final`` for a bucket that is gone
for good.
"""

SWEEP_PAGE = 500
FEW = 2
"""So many fragments of one data id are asked for first: most have one on a disk, and every header is a read."""

UPLOADS_A_SHARD_MAX = 1000
"""So many open uploads of a shard are listed for all keys of a batch. If there are more, each key is asked about."""

DELETIONS_A_CALL = 2000

BACK_OFFS_MAX = 10_000
GONE_MAX = 10_000

_NAME_BYTES_MIN = 19
"""A packed register name with a key of one byte."""


@dataclass
class _Candidate:
    """A data id on a garbage list: its fragments here, and ``copies`` on other disks. Each has its ``created_ms`` as it
    was before anything was judged.
    """

    data_id: bytes
    fragments: list[FragmentId]
    ages: list[int]
    copies: list[tuple[str, FragmentId, int]] = field(default_factory=list)


class Collector:
    """Judges and deletes on this node's disks. ``run`` is its task."""

    def __init__(self, context: MaintainContext, live: LiveDataIds) -> None:
        self._context = context
        self._live = live
        self._buckets = Buckets()
        self._back_offs: dict[bytes, float] = {}
        """Data ids on garbage lists that could not be judged, and until when they are skipped: others must have their
        turn.
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

    # --- garbage lists ------------------------------------------------------------------------------------------------

    async def collect_due(self) -> int:
        """Judges what is due on all disks. Returns how many fragments were deleted."""
        before = self.deleted_fragments
        now = self._context.clock.monotonic()
        self._back_offs = {data_id: until for data_id, until in self._back_offs.items() if until > now}
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
        """One batch. False when there is nothing left that could be judged now."""
        limits = self._context.limits
        due = await store.retired(self._context.clock.wall_ms(), limits.collect_batch + len(self._back_offs))
        batch = [entry for entry in due if entry[0] not in self._back_offs][: limits.collect_batch]
        skip: set[bytes] = set()
        by_owner = await self._candidates(store, batch, skip, failures)
        await self._find_copies(disk, by_owner)
        uploads = await self._uploads_in({(owner.scope, owner.shard) for owner in by_owner})
        dead: list[_Candidate] = []

        async def judge(owner: RegisterName, candidates: list[_Candidate]) -> None:
            keys = uploads.get((owner.scope, owner.shard))
            try:
                opened = None if keys is None else owner.key in keys
                judged = await self._judge(disk, store, owner, candidates, opened)
            except (StoragedError, ValueError, TimeoutError) as error:
                failures.extend([str(error)] * len(candidates))
                skip.update(candidate.data_id for candidate in candidates)
            else:
                dead.extend(judged[0])
                skip.update(judged[1])

        work = (judge(owner, candidates) for owner, candidates in by_owner.items())
        await concurrently(work, limits.collects_concurrent_max)
        try:
            skip |= await self._delete(store, dead)
        finally:
            until = self._context.clock.monotonic() + limits.retry_max_s / 10
            room = max(0, BACK_OFFS_MAX - len(self._back_offs))
            self._back_offs.update(dict.fromkeys(list(skip)[:room], until))
        return bool(batch) and len(self._back_offs) < BACK_OFFS_MAX

    async def _candidates(
        self, store: FragmentStore, batch: Sequence[tuple[bytes, bytes]], skip: set[bytes], failures: list[str]
    ) -> dict[RegisterName, list[_Candidate]]:
        """The entries of a garbage list with their fragments on its disk. Those that can't be looked at go into
        ``skip``.
        """
        found: dict[RegisterName, list[_Candidate]] = {}
        for data_id, packed in batch:
            try:
                owner = _owner_of(packed)
                fragments = await _fragments_of(store, data_id)
                ages = [stat.created_ms for stat in await store.stat(fragments)]
            except (StoragedError, ValueError, TimeoutError) as error:
                failures.append(str(error))
                skip.add(data_id)
            else:
                found.setdefault(owner, []).append(_Candidate(data_id, fragments, ages))
        return found

    async def _find_copies(self, disk: str, by_owner: dict[RegisterName, list[_Candidate]]) -> None:
        """Adds the other copies of small objects to the candidates, as far as their disks answer."""
        asked: dict[str, list[tuple[_Candidate, FragmentId]]] = {}
        for owner, candidates in by_owner.items():
            replicas = self._context.layouts.current.replicas_of(owner.partition)
            for candidate in candidates if owner.table == Table.OBJECT else ():
                copies = _other_copies(candidate.fragments)
                for other in replicas if copies else ():
                    if other != disk:
                        asked.setdefault(other, []).extend((candidate, copy) for copy in copies)
        for other, wanted in asked.items():
            try:
                stats = await self._context.stores.store(other).stat([copy for _, copy in wanted])
            except (StoragedError, TimeoutError):
                continue
            for (candidate, copy), stat in zip(wanted, stats, strict=True):
                if stat.health != Health.MISSING:
                    candidate.copies.append((other, copy, stat.created_ms))

    async def _uploads_in(self, shards: set[tuple[bytes, int]]) -> dict[tuple[bytes, int], set[bytes]]:
        """Shard -> the keys with an open upload. A shard with more uploads than one page lists is left out, and so is
        one that does not answer.
        """
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

        work = (ask(scope, shard) for scope, shard in shards)
        await concurrently(work, self._context.limits.collects_concurrent_max)
        return found

    async def _judge(
        self,
        disk: str,
        store: FragmentStore,
        owner: RegisterName,
        candidates: list[_Candidate],
        uploads: bool | None,
    ) -> tuple[list[_Candidate], list[bytes]]:
        """(candidates to which nothing refers or ever will; data ids that can't be judged now). A candidate to which
        something refers is taken off the list; of its fragments, those that the record places elsewhere are deleted.
        ``uploads``: whether some are open for the key; None: not known yet. Raises StoragedError when nothing can be
        judged.
        """
        try:
            if uploads is None:
                uploads = False
                async for _ in living_uploads(self._context.scanner, owner):
                    uploads = True
                    break
            live = await self._live(owner, uploads)
        except NoSuchBucket as error:
            if error.details.get("final") or await self._is_gone(owner.scope):
                return candidates, []
            return [], [candidate.data_id for candidate in candidates]
        kept = {candidate.data_id for candidate in candidates if candidate.data_id in live}
        if kept and not uploads:
            await self._delete_moved(disk, store, owner, kept)
        for data_id in kept:
            self.kept += 1
            await store.unretire(data_id)
        others = [candidate for candidate in candidates if candidate.data_id not in live]
        return ([], [candidate.data_id for candidate in others]) if uploads else (others, [])

    async def _delete_moved(self, disk: str, store: FragmentStore, owner: RegisterName, data_ids: set[bytes]) -> None:
        """Deletes the fragments of this data that a repair has moved away from here. A committed round has just ended
        all promises of before. A later change that names a fragment here has touched it since it was looked at.
        """
        if owner.table != Table.OBJECT:
            return
        if owner.scope not in self._buckets.by_id:
            await self._buckets.refresh(self._context)
        try:
            countries = self._buckets.countries_of(owner.scope)
        except KeyError:
            return  # the sweep of orphans comes to it when the bucket is verified
        aged = {data_id: await self._ages_of(store, data_id) for data_id in data_ids}
        entries = await self._entries(owner, await self._context.registers.settle(owner))
        named = {entry.data_id for entry in entries}
        for data_id, ages in aged.items():
            if data_id not in named:
                continue  # an upload refers to it
            moved = [
                (fragment, age)
                for fragment, age in ages.items()
                if not is_claimed(self._context, owner, entries, fragment, disk, countries)
            ]
            for start in range(0, len(moved), DELETIONS_A_CALL):
                await self._delete_on(store, moved[start : start + DELETIONS_A_CALL])

    async def _ages_of(self, store: FragmentStore, data_id: bytes) -> dict[FragmentId, int]:
        """When each fragment of the data on this disk was written or touched."""
        found: dict[FragmentId, int] = {}
        after, more = data_id, True
        while more:
            ids = [header.id async for header in store.scan(after, SWEEP_PAGE) if header.id[:16] == data_id]
            fragments = [FragmentId.unpack(packed) for packed in ids]
            found.update({FragmentId.unpack(stat.id): stat.created_ms for stat in await store.stat(fragments)})
            more = len(ids) == SWEEP_PAGE
            after = ids[-1] if ids else after
        return found

    async def _delete(self, store: FragmentStore, dead: list[_Candidate]) -> set[bytes]:
        """Deletes the fragments that are still as old as they were. Returns the data ids with a fragment that was
        touched since: a writer refers to it, or is about to. Of more than ``SWEEP_PAGE`` fragments the others come in
        the next batch.
        """
        aged = [(fragment, age) for one in dead for fragment, age in zip(one.fragments, one.ages, strict=True)]
        left: set[bytes] = set()
        for start in range(0, len(aged), DELETIONS_A_CALL):
            some = aged[start : start + DELETIONS_A_CALL]
            deleted = await self._delete_on(store, some)
            if deleted < len(some):
                stats = await store.stat([fragment for fragment, _ in some])
                left |= {
                    fragment.data_id
                    for (fragment, _), stat in zip(some, stats, strict=True)
                    if stat.health != Health.MISSING
                }
        for candidate in dead:
            if not candidate.fragments:
                await store.unretire(candidate.data_id)
        await self._delete_copies(dead)
        return left

    async def _delete_copies(self, dead: list[_Candidate]) -> None:
        copies: dict[str, list[tuple[FragmentId, int]]] = {}
        for candidate in dead:
            for disk, copy, age in candidate.copies:
                copies.setdefault(disk, []).append((copy, age))
        for disk, some in copies.items():
            try:
                for start in range(0, len(some), DELETIONS_A_CALL):
                    await self._delete_on(self._context.stores.store(disk), some[start : start + DELETIONS_A_CALL])
            except (StoragedError, TimeoutError):
                continue  # they are on that disk's own list too

    async def _delete_on(self, store: FragmentStore, aged: Sequence[tuple[FragmentId, int]]) -> int:
        deleted = await store.delete([fragment for fragment, _ in aged], created_ms=[age for _, age in aged])
        self.deleted_fragments += deleted
        return deleted

    async def _is_gone(self, bucket: bytes) -> bool:
        """Whether a bucket whose registers are fenced has left the directory, and so was deleted for good. A gateway
        that died before it made the fence final leaves a fence that is neither lifted nor made final.
        """
        if bucket in self._gone:
            return True
        await self._buckets.refresh(self._context)
        if bucket in self._buckets.by_id or not self._buckets.complete:
            return False
        if len(self._gone) >= GONE_MAX:
            self._gone.clear()
        self._gone.add(bucket)
        return True

    # --- the sweep of orphans -----------------------------------------------------------------------------------------

    async def sweep(self) -> int:
        """Looks for fragments that no record claims, and that are too old for a request to be still writing them. Whole
        data ids are retired. Single fragments of data that is claimed elsewhere, which a recoding left, are deleted.
        Returns how many were found.
        """
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
        """Whether the owner's record names this very fragment on this disk: by the row that this node has, which costs
        nothing and hardly ever lags, else by a majority. Raises KeyError, ValueError for a fragment that this node
        can't judge.
        """
        owner = RegisterName.unpack(header.owner)
        if owner.scope not in self._buckets.by_id:
            # The bucket is gone or brand-new. A bucket that is gone has a fence; that is checked before any deletion.
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
        countries = self._buckets.countries_of(owner.scope)
        return is_claimed(self._context, owner, entries, FragmentId.unpack(header.id), disk, countries)

    async def _discard(self, disk: str, store: FragmentStore, header: FragmentHeader) -> None:
        """Deletes this one fragment when its object uses the data id. Any other data id goes to the garbage list, where
        it is judged again.
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


def _other_copies(fragments: Sequence[FragmentId]) -> list[FragmentId]:
    """The ids of a small object's other copies, when ``fragments`` is one copy of it."""
    if len(fragments) != 1 or fragments[0].k != 1 or fragments[0].block != 0:
        return []
    own = fragments[0]
    return [own._replace(position=position) for position in range(own.m + 1) if position != own.position]


async def _fragments_of(store: FragmentStore, data_id: bytes) -> list[FragmentId]:
    """The data id's fragments on this disk, up to SWEEP_PAGE."""
    page: list[FragmentId] = []
    for limit in (FEW, SWEEP_PAGE):
        page = [
            FragmentId.unpack(header.id) async for header in store.scan(data_id, limit) if header.id[:16] == data_id
        ]
        if len(page) < limit:
            break
    return page


def _owner_of(packed: bytes) -> RegisterName:
    """Raises ValueError for bytes that are not a register's name."""
    if len(packed) < _NAME_BYTES_MIN:
        raise ValueError(f"not the name of a register: {packed.hex()}")
    return RegisterName.unpack(packed)

"""Relocation: makes a record name the new places of recoded blocks, and deletes the old fragments some time after.

Theory of operation. A move is a compare-and-set of runs: in the record itself, on the pages of its manifest, or in the
row of a part. Old and new fragments are both there until long after; the record alone decides which count.

Every deletion of fragments first commits a round that ends all earlier promises, and then spares what was touched since
it looked. So ``commit_moves`` touches the new fragments *after* the promise and before the accept: either the touch
finds that they are gone, and the record is not changed, or it spares them.

A block that was recoded for the living disks may since have been recoded back to where it was: on the same disks, under
the same ids. So ``Leftovers`` settles the register before it deletes, which ends all earlier promises, and spares what
the register names. It deletes only what was neither touched nor written since it looked. The sweep of orphans finds
what a restart makes it forget.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

import msgspec

from storaged.errors import PeerError, StoragedError
from storaged.fragments.ports import FragmentId, Health
from storaged.maintain.context import MaintainContext
from storaged.maintain.directory import Buckets
from storaged.maintain.rebuild import CannotRepair, Move
from storaged.maintain.walk import entries_of, is_claimed
from storaged.meta.names import Change, RegisterName, Table, Value, Visibility
from storaged.objects.code.manifest import manifest_pages, parts_of, write_manifest
from storaged.objects.records import ObjectRecord, PartEntry, PartRecord, Run, Version, decode_object, encode_object
from storaged.wire import decode, encode

TOUCHES_A_CALL = 4000
DELETIONS_A_ROUND = 100

_CHANGED = "the record has changed meanwhile"


# --- changing the record ---------------------------------------------------------------------------------------------


async def commit_moves(context: MaintainContext, owner: RegisterName, moves: Sequence[Move]) -> None:
    """Changes the record of ``owner`` by all moves.

    Raises CannotRepair when the record is not the one from which the moves were made any more, or their fragments are
    not there; PeerError, TimeoutError, ServiceUnavailable. Only after OutcomeUnknown the record may have changed.
    """
    began_ms = context.clock.wall_ms()
    seen = (await context.registers.read(owner)).value
    body = await _body_after(context, owner, seen, moves)
    if seen is None or body is None:
        raise CannotRepair(_CHANGED)
    promised = asyncio.Event()

    def update(value: Value | None) -> Change | None:
        if promised.is_set():
            raise CannotRepair("others change the record")
        if value is None or value.sequence != seen.sequence:
            return None
        if context.clock.wall_ms() - began_ms >= context.limits.orphan_age_ms // 2:
            raise CannotRepair("its pages were written too long ago to be sure that they are still there")
        promised.set()
        return Change(body, value.visibility, value.payload)

    guard = asyncio.ensure_future(_touch_new(context, moves, promised))
    try:
        outcome = await context.registers.change(owner, update, ready=guard)
    finally:
        guard.cancel()
        await asyncio.gather(guard, return_exceptions=True)
    if outcome.after is None or outcome.after.body != body:
        raise CannotRepair(_CHANGED)


async def _touch_new(context: MaintainContext, moves: Sequence[Move], promised: asyncio.Event) -> None:
    """Touches the new fragments once the promise is there. Raises CannotRepair when one is gone."""
    await promised.wait()
    for disk, ids in _by_disk(moves, new=True).items():
        for start in range(0, len(ids), TOUCHES_A_CALL):
            some = ids[start : start + TOUCHES_A_CALL]
            async with asyncio.timeout(context.limits.call_timeout_s):
                stats = await context.stores.store(disk).touch(some, context.clock.wall_ms())
            if any(stat.health != Health.OK for stat in stats):
                raise CannotRepair(f"fragments written to disk {disk} are not there any more")


def _by_disk(moves: Sequence[Move], *, new: bool) -> dict[str, list[FragmentId]]:
    """The fragments of the moved blocks, in their new or their old places."""
    found: dict[str, list[FragmentId]] = {}
    for move in moves:
        run, disks = (move.new, move.new_disks) if new else (move.old, move.old_disks)
        for block in range(move.new.first, move.new.first + move.new.count):
            for position, disk in enumerate(disks):
                found.setdefault(disk, []).append(FragmentId(move.entry.data_id, block, run.k, run.m, position))
    return found


async def _body_after(
    context: MaintainContext, owner: RegisterName, value: Value | None, moves: Sequence[Move]
) -> bytes | None:
    """The record after all moves; None when one of them does not apply. New manifest pages are durable when this
    returns.
    """
    if value is None or value.visibility == Visibility.TOMBSTONE or not value.body:
        return None
    if owner.table == Table.PART:
        row = decode(value.body, PartRecord)
        entry: PartEntry | None = row.entry
        for move in moves:
            entry = apply_move(entry, move) if entry is not None else None
        return encode(msgspec.structs.replace(row, entry=entry)) if entry is not None else None
    record = decode_object(value.body)
    versions, left = [], len(moves)
    by_data: dict[bytes, list[Move]] = {}
    for move in moves:
        by_data.setdefault(move.entry.data_id, []).append(move)
    for version in record.versions:
        parts = []
        before = left
        async for part in parts_of(context.pages, owner, version):
            for move in by_data.get(part.data_id, ()):
                moved = apply_move(part, move)
                if moved is not None:
                    part, left = moved, left - 1
            parts.append(part)
        if left != before:
            version = await _with_parts(context, owner, version, parts)
        versions.append(version)
    return encode_object(ObjectRecord(tuple(versions))) if left == 0 else None


async def _with_parts(
    context: MaintainContext, owner: RegisterName, version: Version, parts: Sequence[PartEntry]
) -> Version:
    """The version with a manifest of these parts. Its other pages, which have what is sealed about the parts, stay:
    they are those of the version that its present manifest does not have.
    """
    before = {page_hash async for page_hash, _ in manifest_pages(context.pages, owner, version)}
    manifest = await write_manifest(context.pages, owner, parts)
    others = tuple(page_hash for page_hash in version.pages if page_hash not in before)
    return msgspec.structs.replace(
        version, parts=manifest.parts, manifest=manifest.first, pages=manifest.pages + others if version.pages else ()
    )


def apply_move(part: PartEntry, move: Move) -> PartEntry | None:
    """The part with the moved blocks in their new places; None when it does not have them in the old ones."""
    runs = replace_blocks(part.runs, move.old, move.new)
    return msgspec.structs.replace(part, runs=runs) if runs is not None and part.data_id == move.entry.data_id else None


def replace_blocks(runs: Sequence[Run], old: Run, new: Run) -> tuple[Run, ...] | None:
    """``runs`` with the blocks of ``new`` taken out of the run that is placed like ``old``, and neighbours that are
    placed alike joined. None when no such run has them all.
    """
    end = new.first + new.count
    found: list[Run] = []
    replaced = False
    for run in runs:
        if not (run.first <= new.first and end <= run.first + run.count and _alike(run, old)):
            found.append(run)
            continue
        replaced = True
        if run.first < new.first:
            found.append(msgspec.structs.replace(run, count=new.first - run.first))
        found.append(new)
        if end < run.first + run.count:
            found.append(msgspec.structs.replace(run, first=end, count=run.first + run.count - end))
    if not replaced:
        return None
    joined: list[Run] = []
    for run in found:
        if joined and _alike(joined[-1], run) and joined[-1].first + joined[-1].count == run.first:
            joined[-1] = msgspec.structs.replace(joined[-1], count=joined[-1].count + run.count)
        else:
            joined.append(run)
    return tuple(joined)


def _alike(one: Run, other: Run) -> bool:
    return (one.k, one.m, one.epoch, one.moved) == (other.k, other.m, other.epoch, other.moved)


# --- deleting what the moves left ------------------------------------------------------------------------------------


class _Leftover(NamedTuple):
    due: float
    owner: RegisterName
    move: Move


class Leftovers:
    """Fragments that recoded blocks left on their old disks: a queue in the order of time, at most ``leftovers_max``
    moves long. They stay ``drop_delay_s`` for readers.
    """

    def __init__(self, context: MaintainContext, buckets: Buckets) -> None:
        self._context = context
        self._buckets = buckets
        self._queue: deque[_Leftover] = deque()
        self.deleted = 0

    def add(self, owner: RegisterName, move: Move) -> None:
        if len(self._queue) < self._context.limits.leftovers_max:
            due = self._context.clock.monotonic() + self._context.limits.drop_delay_s
            self._queue.append(_Leftover(due, owner, move))

    async def delete_due(self) -> None:
        for _ in range(DELETIONS_A_ROUND):
            if not self._queue or self._queue[0].due > self._context.clock.monotonic():
                return
            _, owner, move = self._queue.popleft()
            try:
                await self._delete(owner, move)
            except (StoragedError, KeyError, ValueError, TimeoutError) as error:
                self._context.log(
                    f"old fragments of a recoded run of {owner.key[:80]!r} are not deleted; the sweep will: {error}"
                )

    async def _delete(self, owner: RegisterName, move: Move) -> None:
        seen = {disk: await self._ages(disk, ids) for disk, ids in _by_disk([move], new=False).items()}
        value = await self._context.registers.settle(owner)
        entries = [
            entry async for entry in entries_of(self._context, owner, value) if entry.data_id == move.entry.data_id
        ]
        for disk, ages in seen.items():
            countries = self._buckets.countries_of(owner.scope) if ages else ()
            unclaimed = {
                fragment: created
                for fragment, created in ages.items()
                if not is_claimed(self._context, owner, entries, fragment, disk, countries)
            }
            if unclaimed:
                async with asyncio.timeout(self._context.limits.call_timeout_s):
                    store = self._context.stores.store(disk)
                    self.deleted += await store.delete(list(unclaimed), created_ms=list(unclaimed.values()))

    async def _ages(self, disk: str, ids: list[FragmentId]) -> dict[FragmentId, int]:
        """When each fragment that is there was created. Empty when the disk is away: the sweep looks at it when it is
        back.
        """
        try:
            async with asyncio.timeout(self._context.limits.call_timeout_s):
                stats = await self._context.stores.store(disk).stat(ids)
        except (PeerError, TimeoutError):
            return {}
        return {FragmentId.unpack(stat.id): stat.created_ms for stat in stats if stat.health != Health.MISSING}

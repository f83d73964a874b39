"""Making a record say where recoded blocks are now: compare-and-set of runs, in the record itself, on the pages of its
manifest, or in the row of a part.

Old and new fragments are both there until long after; what counts is the record. Whoever deletes fragments first
commits a round that ends all earlier promises and then
spares what was touched since it looked. So here the new fragments are touched *after* the promise and before the
accept: either the touch finds
them gone, and nothing is said, or it spares them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import msgspec

from storaged.fragments.ports import FragmentId, Health
from storaged.maintain.context import MaintainContext
from storaged.maintain.rebuild import CannotMend, Move
from storaged.meta.names import Change, RegisterName, Table, Value, Visibility
from storaged.objects.code.manifest import manifest_pages, parts_of, write_manifest
from storaged.objects.records import ObjectRecord, PartEntry, PartRecord, Run, Version, decode_object, encode_object
from storaged.wire import decode, encode

TOUCHES_A_CALL = 4000


async def commit_moves(context: MaintainContext, owner: RegisterName, moves: Sequence[Move]) -> None:
    """Raises CannotMend when the record is not what the moves were made from any more, or their fragments are not
    there; PeerError, TimeoutError,
    ServiceUnavailable. Only after OutcomeUnknown the record may have changed all the same."""
    began_ms = context.clock.wall_ms()
    seen = (await context.registers.read(owner)).value
    body = await _moved(context, owner, seen, moves)
    if seen is None or body is None:
        raise CannotMend("the record has changed meanwhile")
    promised = asyncio.Event()

    def update(value: Value | None) -> Change | None:
        if promised.is_set():
            raise CannotMend("others change the record")
        if value is None or value.sequence != seen.sequence:
            return None
        if context.clock.wall_ms() - began_ms >= context.limits.orphan_age_ms // 2:
            raise CannotMend("its pages were written too long ago to be sure that they are still there")
        promised.set()
        return Change(body, value.visibility, value.payload)

    guard = asyncio.ensure_future(_still_there(context, moves, promised))
    try:
        outcome = await context.registers.change(owner, update, ready=guard)
    finally:
        guard.cancel()
        await asyncio.gather(guard, return_exceptions=True)
    if outcome.after is None or outcome.after.body != body:
        raise CannotMend("the record has changed meanwhile")


async def _still_there(context: MaintainContext, moves: Sequence[Move], promised: asyncio.Event) -> None:
    await promised.wait()
    by_disk: dict[str, list[FragmentId]] = {}
    for move in moves:
        for block in range(move.new.first, move.new.first + move.new.count):
            for position, disk in enumerate(move.new_disks):
                fragment = FragmentId(move.entry.data_id, block, move.new.k, move.new.m, position)
                by_disk.setdefault(disk, []).append(fragment)
    for disk, ids in by_disk.items():
        for start in range(0, len(ids), TOUCHES_A_CALL):
            async with asyncio.timeout(context.limits.call_timeout_s):
                stats = await context.stores.store(disk).touch(
                    ids[start : start + TOUCHES_A_CALL], context.clock.wall_ms()
                )
            if any(stat.health != Health.OK for stat in stats):
                raise CannotMend(f"fragments written to disk {disk} are not there any more")


async def _moved(
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
    """The version with a manifest of these parts. Its other pages, of what is sealed about the parts, stay; which those
    are only the version can tell.
    """
    before = {page_hash async for page_hash, _ in manifest_pages(context.pages, owner, version)}
    manifest = await write_manifest(context.pages, owner, parts)
    others = tuple(page_hash for page_hash in version.pages if page_hash not in before)
    return msgspec.structs.replace(
        version, parts=manifest.parts, manifest=manifest.first, pages=manifest.pages + others if version.pages else ()
    )


def apply_move(part: PartEntry, move: Move) -> PartEntry | None:
    """The part with the move's blocks where they are now; None when it does not have them where they were."""
    runs = replace_blocks(part.runs, move.old, move.new)
    return msgspec.structs.replace(part, runs=runs) if runs is not None and part.data_id == move.entry.data_id else None


def replace_blocks(runs: Sequence[Run], old: Run, new: Run) -> tuple[Run, ...] | None:
    """``runs`` with the blocks of ``new`` taken out of the run that is placed as ``old`` was, and neighbours that are
    placed alike joined. None when no such run
    has them all."""
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

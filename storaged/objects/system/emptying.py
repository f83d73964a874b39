"""Removes what deleted keys have left before a bucket is deleted: loans that nothing uses, arrivals of renames, and
events."""

from __future__ import annotations

from enum import Enum
from functools import partial

from storaged.errors import DataDamaged, ServiceUnavailable, SlowDown
from storaged.meta.listing.merge import every_row
from storaged.meta.names import RegisterName, Table, Value, Visibility, object_name
from storaged.meta.ports import PageQuery, Row
from storaged.objects.code.versions import decode_record
from storaged.objects.plane import ObjectPlane
from storaged.objects.records import BucketRecord, sharing_of
from storaged.objects.write.departures import end_old
from storaged.tasks import gather_bounded

SHARDS_AT_ONCE = 16
LAGGING_MAX = 1_000
"""Rows of one shard that are looked at one by one: of a replica that was away. With more of them the bucket can't be
deleted until it has caught up.
"""

EVENTS_LEFT = (
    "Events of deleted keys of this bucket are not delivered yet. Please retry. To give them up, put an empty"
    " notification configuration first."
)
DOUBTED = (
    "A storage node has an object of this bucket that the others do not know, or it can't be said now whether the"
    " bucket is empty. Repair settles that within minutes. Please retry."
)
REPLICA_AWAY = (
    "Copies in other buckets use data of this bucket. It can be deleted as soon as all disks that have its keys answer."
    " Please retry."
)
LOANS_LEFT = "Copies or renames in this bucket are under way, or ended a moment ago. Please retry."


def has_versions(row: Row) -> bool:
    try:
        return bool(decode_record(row.value).versions)
    except DataDamaged:
        return True


async def is_doubted(plane: ObjectPlane, bucket: BucketRecord, *, everyone: bool = False) -> bool:
    """Whether some replica has an object of the bucket in whose place a majority has nothing newer. ``everyone``: also
    when a replica does not answer. Nothing is settled here: a round does not count what one replica alone has, where
    the others say that the key was never written. An interrupted write may have left it. Then repair, which gets a
    report of it, settles it soon.
    """
    looks = [_doubted_in(plane, bucket, shard, everyone=everyone) for shard in bucket.shard_numbers]
    return any(await gather_bounded(looks, SHARDS_AT_ONCE))


async def _doubted_in(plane: ObjectPlane, bucket: BucketRecord, shard: int, *, everyone: bool) -> bool:
    looked = 0
    wanted = PageQuery(Table.OBJECT, bucket.id, (shard,), hidden=True)
    try:
        async for row in plane.scanner.rows_anywhere(wanted, everyone=everyone):
            if not has_versions(row):
                continue
            name, looked = RegisterName(Table.OBJECT, bucket.id, shard, row.key), looked + 1
            outdated = looked <= LAGGING_MAX and await plane.registers.outdated(name, partial(_is_object, row.key))
            if not outdated:
                plane.on_degraded(name)
                return True
    except ServiceUnavailable:  # a row is damaged, or the majority has gone: there may be an object
        return True
    return False


def _is_object(key: bytes, value: Value) -> bool:
    return value.visibility > Visibility.TOMBSTONE and has_versions(Row(key, value))


class Left(Enum):
    """What a bucket still has. ``LOANS``: no object; but versions in other buckets use data of deleted keys."""

    OBJECTS = "objects"
    LOANS = "loans"
    NOTHING = "nothing"


def left_in(row: Row) -> Left:
    """What a row that is no tombstone stands for. Events, renames, and loans inside of the bucket end before it does:
    where there are some, they count as objects."""
    try:
        record = decode_record(row.value)
    except DataDamaged:
        return Left.OBJECTS
    sharing, history = sharing_of(record), record.history
    busy = sharing.departure is not None or sharing.arrivals or (history is not None and history.outbox)
    if record.versions or busy or not sharing.loans:
        return Left.OBJECTS
    return Left.LOANS if all(one.scope for loan in sharing.loans for one in loan.borrowers) else Left.OBJECTS


async def left_under_fence(plane: ObjectPlane, bucket: BucketRecord) -> Left:
    """What the rows of a fenced bucket stand for; ``bucket`` has the nonce of the fence. Reads all of them only where
    none stands for an object. Raises ServiceUnavailable, CopyUnreadable.
    """
    found = Left.NOTHING
    wanted = PageQuery(
        Table.OBJECT, bucket.id, bucket.shard_numbers, hidden=True, settling_nonce=bucket.nonce, after_fence=True
    )
    async for row in every_row(plane.scanner, wanted):
        found = left_in(row)
        if found is Left.OBJECTS:
            break
    return found


async def end_remains(plane: ObjectPlane, bucket: BucketRecord) -> Left:
    """Ends the loans of deleted keys to keys of the bucket, and the renames to them, if all rows belong to deleted
    keys. Raises SlowDown while events are not delivered yet, or a copy or a rename is under way.
    """
    refusal, left = "", Left.NOTHING
    wanted = PageQuery(Table.OBJECT, bucket.id, bucket.shard_numbers, limit=100, hidden=True)
    async for row in every_row(plane.scanner, wanted):
        if has_versions(row):
            return Left.OBJECTS
        if left_in(row) is Left.LOANS:
            left = Left.LOANS
            continue
        history = decode_record(row.value).history
        if history is not None and history.outbox:
            refusal = EVENTS_LEFT
            continue
        name = object_name(bucket.id, bucket.shard_numbers, row.key)
        if await end_old(plane, bucket, name, fresh_ms=0):
            value = (await plane.registers.read(name)).value
            if value is not None and left_in(Row(row.key, value)) is not Left.LOANS:
                refusal = refusal or LOANS_LEFT
            left = Left.LOANS
    if refusal:
        raise SlowDown(refusal)
    return left

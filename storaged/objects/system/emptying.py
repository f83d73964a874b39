"""Removes what deleted keys have left before a bucket is deleted: loans that nothing uses, arrivals of renames, and
events."""

from __future__ import annotations

from functools import partial

from storaged.errors import DataDamaged, ServiceUnavailable, SlowDown
from storaged.meta.listing.merge import every_row
from storaged.meta.names import RegisterName, Table, Value, Visibility, object_name
from storaged.meta.ports import PageQuery, Row
from storaged.objects.code.versions import decode_record
from storaged.objects.plane import ObjectPlane
from storaged.objects.records import BucketRecord
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
LOANS_LEFT = "Copies or renames in this bucket are under way, or ended a moment ago. Please retry."


def has_versions(row: Row) -> bool:
    try:
        return bool(decode_record(row.value).versions)
    except DataDamaged:
        return True


async def is_doubted(plane: ObjectPlane, bucket: BucketRecord) -> bool:
    """Whether some replica has an object of the bucket in whose place a majority has nothing newer. Nothing is settled
    here: a round does not count what one replica alone has, where the others say that the key was never written. An
    interrupted write may have left it. Then repair, which gets a report of it, settles it soon.
    """
    found = await gather_bounded([_doubted_in(plane, bucket, shard) for shard in bucket.shard_numbers], SHARDS_AT_ONCE)
    return any(found)


async def _doubted_in(plane: ObjectPlane, bucket: BucketRecord, shard: int) -> bool:
    looked = 0
    wanted = PageQuery(Table.OBJECT, bucket.id, (shard,), hidden=True)
    try:
        async for row in plane.scanner.rows_anywhere(wanted, everyone=False):
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


async def end_remains(plane: ObjectPlane, bucket: BucketRecord) -> bool:
    """Ends the loans of deleted keys, and the renames to them, if all rows belong to deleted keys. False: some do not.
    Raises SlowDown while events are not delivered yet, or a copy or a rename is under way.
    """
    refusal = ""
    wanted = PageQuery(Table.OBJECT, bucket.id, bucket.shard_numbers, limit=100, hidden=True)
    async for row in every_row(plane.scanner, wanted):
        if has_versions(row):
            return False
        history = decode_record(row.value).history
        if history is not None and history.outbox:
            refusal = EVENTS_LEFT
        elif await end_old(plane, bucket, object_name(bucket.id, bucket.shard_numbers, row.key), fresh_ms=0):
            refusal = refusal or LOANS_LEFT
    if refusal:
        raise SlowDown(refusal)
    return True

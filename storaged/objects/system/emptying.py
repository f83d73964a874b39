"""Removes what deleted keys have left before a bucket is deleted: loans that nothing uses, arrivals of renames, and
events."""

from __future__ import annotations

from storaged.errors import DataDamaged, SlowDown
from storaged.meta.listing.merge import every_row
from storaged.meta.names import Table, object_name
from storaged.meta.ports import PageQuery, Row
from storaged.objects.code.versions import decode_record
from storaged.objects.plane import ObjectPlane
from storaged.objects.records import BucketRecord
from storaged.objects.write.departures import end_old

EVENTS_LEFT = (
    "Events of deleted keys of this bucket are not delivered yet. Please retry. To give them up, put an empty"
    " notification configuration first."
)
LOANS_LEFT = "Copies or renames in this bucket are under way, or ended a moment ago. Please retry."


def has_versions(row: Row) -> bool:
    try:
        return bool(decode_record(row.value).versions)
    except DataDamaged:
        return True


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

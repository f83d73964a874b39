"""What becomes of the open uploads of a bucket that is deleted.

They do not count as contents, and end with the bucket: its final fence lets nothing of them change, so no Complete ever
goes on. They are not aborted before, for an object may turn up that keeps the bucket. Afterwards their parts are put on
the garbage lists, which are not behind the fence. The fence of a lender (``system.lenders``) lets no Complete go on
either, but stays for long: so its uploads are aborted.
"""

from __future__ import annotations

from functools import partial

import msgspec

from storaged.errors import DataDamaged, StoragedError
from storaged.fragments.ports import OF_UPLOAD
from storaged.meta.listing.merge import every_row
from storaged.meta.names import Change, Table, Value, Visibility, object_name, upload_name
from storaged.meta.ports import PageQuery
from storaged.objects.plane import ObjectPlane
from storaged.objects.records import BucketRecord
from storaged.objects.write.retire import retire_each
from storaged.objects.write.uploads import (
    ABORTED,
    COMPLETING,
    OPEN,
    LivingUpload,
    decode_part,
    decode_upload,
    living_upload,
)
from storaged.wire import encode


async def retire_uploads(plane: ObjectPlane, bucket: BucketRecord) -> None:
    """Retires the parts of the open uploads of a deleted bucket, whose record has the nonce of its fence. Best effort:
    the sweep of orphans finds what is left.
    """
    query = partial(PageQuery, scope=bucket.id, settling_nonce=bucket.nonce, after_fence=True)
    try:
        async for row in every_row(plane.scanner, query(Table.UPLOAD, shards=bucket.shard_numbers)):
            try:
                upload = living_upload(row.key, row.value)
                if upload is not None:
                    found = query(Table.PART, shards=[upload.record.upload_id[0]], prefix=upload.record.upload_id)
                    await _retire(plane, bucket, upload, found)
            except DataDamaged:
                continue
    except (StoragedError, TimeoutError):
        return


async def end_uploads(plane: ObjectPlane, lender: BucketRecord) -> None:
    """Aborts the open uploads of a lender, whose fence is not final, and retires their parts: of those that can be
    read. ``plane``: for lenders. Raises ServiceUnavailable.
    """
    query = partial(PageQuery, scope=lender.id, settling_nonce=lender.nonce, after_fence=True)

    def aborted(value: Value | None) -> Change | None:
        record = decode_upload(value)
        if record is None or record.state not in (OPEN, COMPLETING):
            return None
        record = msgspec.structs.replace(record, state=ABORTED, pinned=b"", changed_ms=plane.clock.wall_ms())
        return Change(encode(record), Visibility.HIDDEN)

    async for row in every_row(plane.scanner, query(Table.UPLOAD, shards=lender.shard_numbers)):
        try:
            upload = living_upload(row.key, row.value)
            if upload is not None:
                upload_id = upload.record.upload_id
                await plane.registers.change(upload_name(lender.id, upload.key, upload_id), aborted)
                await _retire(plane, lender, upload, query(Table.PART, shards=[upload_id[0]], prefix=upload_id))
        except DataDamaged:
            continue  # it ends with the lender, which must not wait for it


async def _retire(plane: ObjectPlane, bucket: BucketRecord, upload: LivingUpload, parts: PageQuery) -> None:
    owner = object_name(bucket.id, bucket.shard_numbers, upload.key)
    entries = (decode_part(row).entry async for row in every_row(plane.scanner, parts))
    await retire_each(plane, bucket, owner, entries, OF_UPLOAD + upload.record.upload_id)

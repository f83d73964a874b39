"""What a gateway tidies now and then, since it needs keys or knows buckets: deletions that another gateway left half done, rows of uploads that ended long ago.

Every step is idempotent and safe beside other gateways doing the same.
"""

from __future__ import annotations

import asyncio

import structlog

from storaged.errors import StoragedError
from storaged.objects.buckets import BucketService
from storaged.objects.multipart import forget_finished_uploads
from storaged.objects.plane import ObjectPlane

FIRST_S = 30.0
"""After the start: a gateway that died in the middle of a bucket's deletion is mostly back by then."""
INTERVAL_S = 3600.0

log = structlog.get_logger("housekeeping")


async def housekeep(plane: ObjectPlane, buckets: BucketService, *, first_s: float = FIRST_S, interval_s: float = INTERVAL_S) -> None:
    """For ever. What fails (no majority, keyring not open) is tried again in the next round."""
    await asyncio.sleep(first_s)
    while True:
        try:
            await tidy(plane, buckets)
        except StoragedError as error:
            log.info("housekeeping waits for its next round", reason=error.message)
        await asyncio.sleep(interval_s)


async def tidy(plane: ObjectPlane, buckets: BucketService) -> int:
    """One round; returns how many uploads were forgotten. A bucket that fails does not keep the others waiting."""
    forgotten = 0
    for record in await buckets.every_bucket():
        try:
            bucket = await buckets.resume(record)
            if bucket is not None and bucket.state == "active":
                forgotten += await forget_finished_uploads(plane, bucket)
        except StoragedError as error:
            log.info("a bucket waits for the next round", bucket=record.name, reason=error.message)
    return forgotten

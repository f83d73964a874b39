"""Work that a gateway does now and then, as it needs keys or knows buckets.

It finishes deletions that another gateway left half done, removes rows of uploads that ended long ago, and looks after
the keys of buckets. Every step is idempotent and safe beside other gateways that do the same.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping

import structlog

from storaged.errors import StoragedError
from storaged.objects.plane import ObjectPlane
from storaged.objects.records import ACTIVE, LENDING
from storaged.objects.system.buckets import BucketService
from storaged.objects.system.keyends import Ends, destroy_ended_keys
from storaged.objects.system.users import UserService
from storaged.objects.write.multipart import forget_finished_uploads

FIRST_S = 30.0
"""The first round after the start. A gateway that died during a bucket's deletion is mostly back by then."""
INTERVAL_S = 3600.0

RECORDS_FIRST_S = 5.0
RECORDS_S = 60.0
RECORDS_REST = 100.0

log = structlog.get_logger("housekeeping")


async def housekeep(plane: ObjectPlane, buckets: BucketService, *, on_ends: Callable[[Ends], None]) -> None:
    """Runs for ever. It retries in the next round what fails (no majority, keyring not open).

    ``on_ends`` gets the result of each look at the keys of deleted buckets.
    """
    await asyncio.sleep(FIRST_S)
    while True:
        try:
            await tidy(plane, buckets, on_ends)
        except StoragedError as error:
            log.info("housekeeping waits for its next round", reason=error.message)
        await asyncio.sleep(INTERVAL_S)


async def look_at_records(buckets: BucketService, users: UserService) -> None:
    """Runs for ever: repairs unusable records of buckets and users, or names them for ``status``. Takes a hundredth of
    the time at most.
    """
    pause_s = RECORDS_FIRST_S
    while True:
        await asyncio.sleep(pause_s)
        began = asyncio.get_running_loop().time()
        try:
            await check_records(buckets, users)
        except StoragedError as error:
            log.debug("records are looked at later", reason=error.message)
        pause_s = max(RECORDS_S, RECORDS_REST * (asyncio.get_running_loop().time() - began))


async def check_records(buckets: BucketService, users: UserService) -> None:
    """Checks the records once. Raises ServiceUnavailable when the system partition has no majority, KeyringUnavailable
    when nothing can be verified.
    """
    signed = await buckets.sign_unsigned(await buckets.every_bucket())
    if signed:
        log.info("records of buckets are signed for nodes without keys", count=signed)
    await users.list_users()
    await users.check_names()


async def keep_keys(
    plane: ObjectPlane,
    buckets: BucketService,
    countries: Mapping[bytes, tuple[str, ...]],
    on_ends: Callable[[Ends], None],
) -> None:
    """Compares both homes of the buckets' keys, and destroys keys of buckets that are gone. ``countries``: those of
    each bucket, by its id.
    """
    try:
        await plane.keys.reconcile_copies(countries)
        on_ends(await destroy_ended_keys(plane, buckets))
    except StoragedError as error:
        log.info("keys of buckets wait for the next round", reason=error.message)


async def tidy(plane: ObjectPlane, buckets: BucketService, on_ends: Callable[[Ends], None] = lambda _ends: None) -> int:
    """Does one round; returns how many uploads were removed. A bucket that fails does not delay the others."""
    forgotten = 0
    records = await buckets.every_bucket()
    await keep_keys(
        plane,
        buckets,
        {record.id: record.countries for record in records if record.state in (ACTIVE, LENDING)},
        on_ends,
    )
    for record in records:
        try:
            bucket = await buckets.resume(record)
            if bucket is not None and bucket.state == ACTIVE:
                forgotten += await forget_finished_uploads(plane, bucket)
        except StoragedError as error:
            log.info("a bucket waits for the next round", bucket=record.name, reason=error.message)
    return forgotten

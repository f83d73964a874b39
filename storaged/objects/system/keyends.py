"""Destroys the key of a deleted bucket once nothing of the bucket is left to collect.

Theory of operation
    On its way to Deleted a bucket was found empty after it was fenced, and this was noted with its key
    (``BucketService.resume``). From then on no row of it can be created, so only data on garbage lists is left. The key
    is destroyed when, at one check,

    1. the delay for readers (``retire_delay_ms``) is over since then;
    2. an authentic record proves that the bucket was deleted, and its fence is final at a majority of every shard's
       replicas. The gateway that deleted it may have died before it set that fence; then this check does. It comes
       first: without the final fence storage nodes collect nothing of the bucket (``maintain.disuse``);
    3. no disk of the layout has anything of the bucket on its garbage list that is due. Every disk must answer.

    Fragments on a disk that was away when their objects were deleted are on no list: they are orphans, which a sweep
    finds much later. The key does not wait for that, and without the key they can't be read.

    The key of a bucket that became a lender (``lenders``) ends with that. Until then no report says that it waits.

    Nothing depends on the time of this: a key that stays longer does no harm, and data that is collected later can't be
    read any more. Every step is idempotent, and any gateway may take it. Each check takes a bounded number of keys, the
    oldest ends first.
"""

from __future__ import annotations

from collections.abc import Awaitable, Sequence
from typing import Final, NamedTuple

import structlog

from storaged.errors import StoragedError
from storaged.meta.names import RegisterName
from storaged.objects.plane import ObjectPlane
from storaged.objects.ports import EndedKey
from storaged.objects.records import LENDING
from storaged.objects.system.buckets import BucketService

AT_ONCE_MAX: Final = 1000
DUE_MAX: Final = 10_000
"""Entries of one disk's garbage list per check. When more are due the collector has not caught up, and keys wait."""

log = structlog.get_logger("housekeeping")


class Ends(NamedTuple):
    """The result of one check. ``waiting``: keys whose delay is over and that could not be destroyed; the oldest of
    them ended at ``oldest_ms`` (since 1970), and the first one waits for this ``reason``.
    """

    destroyed: int = 0
    waiting: int = 0
    oldest_ms: int = 0
    reason: str = ""


async def destroy_ended_keys(plane: ObjectPlane, buckets: BucketService) -> Ends:
    """Makes one check. Raises ServiceUnavailable, KeyringUnavailable when it can't be made."""
    over_ms = plane.clock.wall_ms() - plane.limits.retire_delay_ms
    ended = sorted(
        (key for key in await plane.keys.ended_bucket_keys() if key.end.since_ms <= over_ms),
        key=lambda key: key.end.since_ms,
    )
    if ended:
        lending = {record.id: record.nonce for record in await buckets.every_bucket() if record.state == LENDING}
        ended = [key for key in ended if lending.get(key.bucket_id, b"") < key.end.nonce]
    if not ended:
        return Ends()
    looked = ended[:AT_ONCE_MAX]
    reasons = {key.bucket_id: await _reason(_close(plane, buckets, key)) for key in looked}
    closed = [key for key in looked if not reasons[key.bucket_id]]
    uncollected = await _uncollected(plane, closed) if closed else ""
    for key in closed:
        if isinstance(uncollected, str):
            reasons[key.bucket_id] = uncollected
        elif key.bucket_id in uncollected:
            reasons[key.bucket_id] = "it has garbage"
        else:
            reasons[key.bucket_id] = await _reason(_destroy(plane, key))
    waiting = [key for key in looked if reasons[key.bucket_id]]
    for key in waiting:
        log.info("the key of a deleted bucket waits", bucket=key.bucket_id.hex(), reason=reasons[key.bucket_id])
    destroyed = len(looked) - len(waiting)
    if not waiting:
        return Ends(destroyed)
    return Ends(destroyed, len(ended) - destroyed, waiting[0].end.since_ms, reasons[waiting[0].bucket_id])


async def _reason(step: Awaitable[str]) -> str:
    """Why a step was not made; empty when it was."""
    try:
        return await step
    except StoragedError as error:
        return error.message


async def _uncollected(plane: ObjectPlane, ended: Sequence[EndedKey]) -> set[bytes] | str:
    """Ids of the buckets of which some disk has garbage; or why that is unknown."""
    due_ms = max(key.end.since_ms for key in ended) + plane.limits.retire_delay_ms
    wanted = {key.bucket_id for key in ended}
    found: set[bytes] = set()
    for disk in plane.layouts.current.disk_by_id:
        try:
            entries = await plane.stores.store(disk).retired(due_ms, DUE_MAX)
        except (StoragedError, TimeoutError) as error:
            return f"disk {disk} does not answer: {error}"
        if len(entries) >= DUE_MAX:
            return f"disk {disk} has not yet collected its garbage"
        for _, packed in entries:
            try:
                scope = RegisterName.unpack(packed).scope
            except ValueError:
                continue
            if scope in wanted:
                found.add(scope)
    return found


async def _close(plane: ObjectPlane, buckets: BucketService, key: EndedKey) -> str:
    """Why the bucket's fence was not made final; empty when it is."""
    end = key.end
    if not await buckets.is_deleted(end.name, key.bucket_id, end.nonce):
        return "nothing proves that the bucket was deleted"
    await plane.fences.fence(key.bucket_id, end.shards, end.nonce, final=True)
    return ""


async def _destroy(plane: ObjectPlane, key: EndedKey) -> str:
    """Why the key of a bucket that is closed was not destroyed; empty when it was."""
    end = key.end
    done = await plane.keys.destroy_bucket_key(key.bucket_id, end.nonce)
    await plane.on_changed("key", key.bucket_id.hex())
    if done:
        log.info("the key of a deleted bucket is destroyed", bucket=key.bucket_id.hex(), name=end.name)
    return ""

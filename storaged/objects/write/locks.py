"""Locks of versions: those of new versions, and changes of them by compare-and-set on the record."""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from storaged.errors import InvalidArgument, InvalidRequest, MethodNotAllowed, NoSuchKey, NoSuchVersion
from storaged.meta.names import object_name
from storaged.objects.api import Allowed
from storaged.objects.bucket_keys import BucketKeys
from storaged.objects.code.history import Draft
from storaged.objects.code.lock import with_hold, with_retention
from storaged.objects.code.version_names import required_name
from storaged.objects.code.versions import Place, access_to, check_allowed, open_version
from storaged.objects.configuration.kinds import LOCK, ObjectLock
from storaged.objects.plane import ObjectPlane
from storaged.objects.records import BucketRecord, Lock
from storaged.objects.write.versioned import change_versions

DAY_MS = 86_400_000
NO_LOCK = "Bucket is missing Object Lock Configuration"


def lock_in(plane: ObjectPlane, bucket: BucketRecord) -> ObjectLock | None:
    """The bucket's configuration of Object Lock; None: it has no Object Lock."""
    return None if bucket.plain else plane.configurations.of(bucket).get(LOCK)


def lock_of_new(plane: ObjectPlane, bucket: BucketRecord, asked: Lock | None) -> Lock | None:
    """The lock of a version that is written now. ``asked``: by the client; the bucket's default counts where that has
    no retention. Raises InvalidRequest for a bucket without Object Lock, InvalidArgument for a retention that is over.
    """
    found, now_ms = lock_in(plane, bucket), plane.clock.wall_ms()
    if asked is not None:
        if found is None:
            raise InvalidRequest(NO_LOCK)
        if asked.mode and asked.until_ms <= now_ms:
            raise InvalidArgument("The retain until date must be in the future!")
    if found is None or not found.mode or (asked is not None and asked.mode):
        return asked
    lasts_ms = (found.days + 365 * found.years) * DAY_MS
    asked = asked or Lock()
    return Lock(found.mode, now_ms + lasts_ms, asked.hold, asked.released)


async def set_retention(
    plane: ObjectPlane,
    bucket: BucketRecord,
    key: bytes,
    mode: str,
    until_ms: int,
    *,
    version_id: str = "",
    bypass_governance: bool = False,
    allowed: Allowed = None,
) -> None:
    """Changes the retention of a version; an empty ``mode`` ends it. ``allowed``: as of ``metadata.change_meta``.
    Raises as that, AccessDenied when the present retention does not allow it, InvalidArgument for one that is over, and
    InvalidRequest.
    """
    now_ms = plane.clock.wall_ms()
    if mode and until_ms <= now_ms:
        raise InvalidArgument("The retain until date must be in the future!")
    await _change(
        plane,
        bucket,
        key,
        version_id,
        allowed,
        lambda lock: with_retention(lock, mode, until_ms, plane.clock.wall_ms(), bypass=bypass_governance),
    )


async def set_hold(
    plane: ObjectPlane,
    bucket: BucketRecord,
    key: bytes,
    hold: bool,
    *,
    version_id: str = "",
    allowed: Allowed = None,
) -> None:
    """Sets or ends the legal hold of a version. ``allowed``: as of ``metadata.change_meta``. Raises InvalidRequest,
    and as that.
    """
    await _change(plane, bucket, key, version_id, allowed, lambda lock: with_hold(lock, hold))


async def unlock(plane: ObjectPlane, bucket: BucketRecord, key: bytes, version_id: str) -> None:
    """Ends retention and legal hold of a version, whatever they are: the break-glass (``cluster.unlock``). Raises as
    ``set_hold``.
    """
    await _change(plane, bucket, key, version_id, None, lambda _: None)


async def _change(
    plane: ObjectPlane,
    bucket: BucketRecord,
    key: bytes,
    version_id: str,
    allowed: Allowed,
    alter: Callable[[Lock | None], Lock | None],
) -> None:
    if lock_in(plane, bucket) is None:
        raise InvalidRequest(NO_LOCK)
    name, where = object_name(bucket.id, bucket.shard_numbers, key), Place(bucket.id, key)
    keys = BucketKeys(plane, bucket)
    wanted = required_name(version_id) if version_id else None

    def edit(draft: Draft, _ordinal: int) -> bool:
        entry = draft.find(wanted) if wanted is not None else draft.newest
        if entry is None:
            raise NoSuchVersion(VersionId=version_id) if version_id else NoSuchKey
        if entry.version.delete_marker:
            raise MethodNotAllowed(DeleteMarker="true", MarkerVersionId=entry.name)
        if allowed is not None:
            opened = open_version(where, entry.version, keys.known(entry.version.bucket_key))
            check_allowed(access_to(opened), allowed)
        lock = alter(entry.kept.lock)
        if lock == entry.kept.lock:
            return False
        draft.replace(entry, entry._replace(kept=msgspec.structs.replace(entry.kept, lock=lock)))
        return True

    await change_versions(plane, keys, name, edit)
    plane.notes.look_soon(bucket, key, plane.clock.wall_ms())

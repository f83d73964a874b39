"""Changes the metadata of versions, their tags, access and encryption, by compare-and-set of the record. Data stays."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import msgspec

from storaged.errors import InvalidRequest, MethodNotAllowed, NoSuchKey, NoSuchVersion
from storaged.meta.names import object_name
from storaged.objects.api import Allowed
from storaged.objects.bucket_keys import BucketKeys
from storaged.objects.code.history import Draft
from storaged.objects.code.lock import check_removal
from storaged.objects.code.version_names import required_name
from storaged.objects.code.versions import (
    OpenedVersion,
    Place,
    access_to,
    check_allowed,
    open_version,
    seal_listing,
    seal_meta,
)
from storaged.objects.configuration.access import Acl
from storaged.objects.encryption import Encryption
from storaged.objects.plane import ObjectPlane
from storaged.objects.ports import BucketKey
from storaged.objects.records import BucketRecord, SealedEncryption
from storaged.objects.write.departures import Departing, make_way
from storaged.objects.write.versioned import change_versions


async def change_meta(
    plane: ObjectPlane,
    bucket: BucketRecord,
    key: bytes,
    version_id: str,
    alter: Callable[[OpenedVersion], OpenedVersion],
    *,
    wrap_under: BucketKey | None = None,
    allowed: Allowed = None,
) -> str:
    """Seals altered metadata, or another encryption, into a version, the current one when ``version_id`` is empty; its
    data stays. ``wrap_under``: the key under which its data key is wrapped anew, unless the version is locked
    (AccessDenied). ``allowed``: what the change was allowed for; None: for anything. Returns the version id; empty in a
    bucket that never had versioning. Raises NoSuchKey, NoSuchVersion, MethodNotAllowed, InvalidArgument, SlowDown (it
    is not ``allowed``'s object any more), and what ``alter`` raises.
    """
    name, where = object_name(bucket.id, bucket.shard_numbers, key), Place(bucket.id, key)
    keys = BucketKeys(plane, bucket)
    wanted = required_name(version_id) if version_id else None
    changed = ""

    def edit(draft: Draft, _ordinal: int) -> bool:
        nonlocal changed
        if draft.departure is not None:
            raise Departing(name, draft.departure)
        entry = draft.find(wanted) if wanted is not None else draft.newest
        if entry is None:
            raise NoSuchVersion(VersionId=version_id) if version_id else NoSuchKey
        version = entry.version
        if version.delete_marker:
            raise (
                MethodNotAllowed(DeleteMarker="true", MarkerVersionId=entry.name, ModifiedMs=str(version.modified_ms))
                if version_id
                else NoSuchKey(DeleteMarker="true", MarkerVersionId=entry.name)
            )
        if wrap_under is not None:
            check_removal(entry.kept.lock, plane.clock.wall_ms(), bypass=False)
        bucket_key = keys.known(version.bucket_key)
        before = open_version(where, version, bucket_key)
        check_allowed(access_to(before), allowed)
        opened, context = alter(before), where.context_of(version)
        sealed = seal_meta(opened.dek, context, opened.meta, opened.encryption, plane.entropy)
        if wrap_under is not None:
            bucket_key, wrapped = wrap_under, wrap_under.wrap(opened.dek, context)
            version = msgspec.structs.replace(version, bucket_key=bucket_key.version, wrapped_key=wrapped)
        listing = seal_listing(bucket_key, context, opened.meta)
        after = msgspec.structs.replace(version, meta=sealed, listing=listing)
        draft.replace(entry, entry._replace(version=after))
        changed = entry.name
        return True

    try:
        await change_versions(plane, keys, name, edit)
    except Departing as met:
        await make_way(plane, bucket, met)
        return await change_meta(
            plane, bucket, key, version_id, alter, wrap_under=wrap_under, allowed=allowed
        )  # another departure is young
    return changed if plane.versioning(bucket) else ""


async def set_tags(
    plane: ObjectPlane,
    bucket: BucketRecord,
    key: bytes,
    tags: Mapping[str, str],
    *,
    version_id: str = "",
    allowed: Allowed = None,
) -> str:
    """Replaces the tags of a version. ``allowed``: as of ``change_meta``. Raises InsufficientStorage for tags that a
    full cluster can't take.
    """
    if tags:
        plane.room.check(object_name(bucket.id, bucket.shard_numbers, key), bucket.countries)

    def alter(opened: OpenedVersion) -> OpenedVersion:
        return opened._replace(meta=msgspec.structs.replace(opened.meta, tags=dict(tags)))

    changed = await change_meta(plane, bucket, key, version_id, alter, allowed=allowed)
    if not bucket.plain:
        plane.notes.look_soon(bucket, key, plane.clock.wall_ms())
    return changed


async def set_encryption(
    plane: ObjectPlane,
    bucket: BucketRecord,
    key: bytes,
    encryption: Encryption,
    *,
    version_id: str = "",
    allowed: Allowed = None,
) -> str:
    """Gives a version SSE-KMS, and wraps its data key anew under the newest key of the bucket. Raises as
    ``change_meta``, InvalidRequest for a version with SSE-C, and InsufficientStorage.
    """
    plane.room.check(object_name(bucket.id, bucket.shard_numbers, key), bucket.countries)
    sealed = SealedEncryption(encryption.kind, encryption.key_id, encryption.bucket_key, encryption.context)
    newest = await plane.keys.bucket_key(bucket.id, bucket.countries)

    def alter(opened: OpenedVersion) -> OpenedVersion:
        if opened.has_customer_key:
            raise InvalidRequest(
                "The UpdateObjectEncryption operation doesn't support source objects with the encryption type DSSE-KMS"
                " or SSE-C. Only source objects encrypted with SSE-S3 or SSE-KMS are supported."
            )
        return opened._replace(encryption=sealed)

    return await change_meta(plane, bucket, key, version_id, alter, wrap_under=newest, allowed=allowed)


async def set_acl(
    plane: ObjectPlane,
    bucket: BucketRecord,
    key: bytes,
    acl: Acl | None,
    *,
    version_id: str = "",
    allowed: Allowed = None,
) -> str:
    """Replaces the access control list of a version. None: its owner alone has access. Raises InsufficientStorage."""
    if acl is not None:
        plane.room.check(object_name(bucket.id, bucket.shard_numbers, key), bucket.countries)
    entries = acl.entries if acl is not None else None

    def alter(opened: OpenedVersion) -> OpenedVersion:
        return opened._replace(meta=msgspec.structs.replace(opened.meta, acl=entries))

    return await change_meta(plane, bucket, key, version_id, alter, allowed=allowed)

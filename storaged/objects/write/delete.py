"""Deleting objects and changing their tags: compare-and-set on the record."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import msgspec

from storaged.errors import NoSuchVersion
from storaged.meta.names import Change, Value, object_name
from storaged.objects.api import NO_WRITE_CONDITIONS, DeleteResult, WriteConditions
from storaged.objects.bucket_keys import BucketKeys, change_with_keys, current_of
from storaged.objects.code.versions import (
    Place,
    decode_record,
    find_version,
    open_version,
    record_change,
    seal_listing,
    seal_meta,
)
from storaged.objects.conditions import check_write, needs_etag
from storaged.objects.plane import ObjectPlane
from storaged.objects.records import NULL_VERSION, BucketRecord, ObjectRecord, SealedMeta
from storaged.objects.write.retire import retire_replaced


async def delete(
    plane: ObjectPlane,
    bucket: BucketRecord,
    key: bytes,
    *,
    version_id: str = "",
    conditions: WriteConditions = NO_WRITE_CONDITIONS,
) -> DeleteResult:
    """Deletes an object; to delete one that does not exist succeeds. Its data goes to the garbage lists. Raises
    PreconditionFailed, and NoSuchKey for a condition on an object that does not exist.
    """
    name, where = object_name(bucket.id, bucket.shard_numbers, key), Place(bucket.id, key)
    keys = BucketKeys(plane, bucket)
    if version_id not in ("", NULL_VERSION):
        raise NoSuchVersion(VersionId=version_id)

    def update(value: Value | None) -> Change | None:
        record = decode_record(value)
        check_write(conditions, current_of(where, record, keys, with_etag=needs_etag(conditions)))
        return record_change(ObjectRecord(())) if record.versions else None

    outcome = await change_with_keys(plane.registers, keys, name, update)
    before = decode_record(outcome.before)
    retire_replaced(plane, bucket, name, before, ObjectRecord(()))
    return DeleteResult(version_id=version_id, existed=bool(before.versions))


async def change_meta(
    plane: ObjectPlane, bucket: BucketRecord, key: bytes, version_id: str, alter: Callable[[SealedMeta], SealedMeta]
) -> str:
    """Seals altered metadata into a version; its data stays. Returns the version id. Raises as ``find_version``."""
    name, where = object_name(bucket.id, bucket.shard_numbers, key), Place(bucket.id, key)
    keys = BucketKeys(plane, bucket)

    def update(value: Value | None) -> Change:
        record = decode_record(value)
        version = find_version(record, version_id)
        bucket_key = keys.known(version.bucket_key)
        opened = open_version(where, version, bucket_key)
        meta, context = alter(opened.meta), where.context_of(version)
        sealed = seal_meta(opened.dek, context, meta, plane.entropy)
        changed = msgspec.structs.replace(version, meta=sealed, listing=seal_listing(bucket_key, context, meta))
        versions = tuple(changed if other is version else other for other in record.versions)
        return record_change(ObjectRecord(versions), value.payload if value is not None else b"")

    outcome = await change_with_keys(plane.registers, keys, name, update)
    return find_version(decode_record(outcome.after), version_id).version_id


async def set_tags(
    plane: ObjectPlane, bucket: BucketRecord, key: bytes, tags: Mapping[str, str], *, version_id: str = ""
) -> str:
    """Replaces the tags of a version."""
    return await change_meta(
        plane, bucket, key, version_id, lambda meta: msgspec.structs.replace(meta, tags=dict(tags))
    )

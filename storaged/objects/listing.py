"""Listings: rows come in key order from the ring's scanner; only what a list prints is opened."""

from __future__ import annotations

from storaged.meta.names import Table, object_name
from storaged.meta.ports import ListPage
from storaged.objects.api import ListedObject, Listing
from storaged.objects.plane import ObjectPlane
from storaged.objects.records import BucketRecord, ObjectRecord, Version
from storaged.objects.versions import BucketKeys, Place, decode_record, open_listing


async def list_objects(
    plane: ObjectPlane, bucket: BucketRecord, *, prefix: bytes = b"", after: bytes = b"", delimiter: bytes = b"", limit: int = 1000
) -> Listing:
    """Current objects with key > ``after``, and common prefixes, together at most ``limit``."""
    page = await _page(plane, bucket, prefix=prefix, after=after, delimiter=delimiter, limit=limit, hidden=False)
    keys = BucketKeys(plane, bucket)
    found = []
    for row in page.rows:
        record = decode_record(row.value)
        if record.versions:
            found.append(await _listed(keys, bucket, row.key, record.versions[0], latest=True))
    return Listing(found, page.prefixes, page.next_after)


async def list_versions(
    plane: ObjectPlane,
    bucket: BucketRecord,
    *,
    prefix: bytes = b"",
    after: bytes = b"",
    after_version: str = "",
    delimiter: bytes = b"",
    limit: int = 1000,
) -> Listing:
    """Every version, newest first within a key, behind (``after``, ``after_version``). With a version given, what is left of that key comes first."""
    keys = BucketKeys(plane, bucket)
    found: list[ListedObject] = []
    if after_version and limit:
        name = object_name(bucket.id, bucket.shards, after)
        record = decode_record((await plane.registers.read(name)).value)
        ids = [version.version_id for version in record.versions]
        if after_version in ids:
            found += await _listed_versions(keys, bucket, after, record, skip=ids.index(after_version) + 1)
    room = max(0, limit - len(found))
    page = await _page(plane, bucket, prefix=prefix, after=after, delimiter=delimiter, limit=room, hidden=True)
    for row in page.rows:
        found += await _listed_versions(keys, bucket, row.key, decode_record(row.value))
    return Listing(found, page.prefixes, page.next_after)


async def _page(
    plane: ObjectPlane, bucket: BucketRecord, *, prefix: bytes, after: bytes, delimiter: bytes, limit: int, hidden: bool
) -> ListPage:
    return await plane.scanner.list_page(
        Table.OBJECT, bucket.id, range(bucket.shards), prefix=prefix, after=after, delimiter=delimiter, limit=limit, hidden=hidden
    )


async def _listed_versions(
    keys: BucketKeys, bucket: BucketRecord, key: bytes, record: ObjectRecord, *, skip: int = 0
) -> list[ListedObject]:
    return [await _listed(keys, bucket, key, version, latest=index == 0) for index, version in enumerate(record.versions) if index >= skip]


async def _listed(keys: BucketKeys, bucket: BucketRecord, key: bytes, version: Version, *, latest: bool) -> ListedObject:
    if version.delete_marker:
        return ListedObject(key, version.version_id, 0, version.modified_ms, "", "", "", "", version.owner, latest, True)
    printed = open_listing(Place(bucket.id, key), version, await keys.load(version.bucket_key))
    return ListedObject(
        key,
        version.version_id,
        version.size,
        version.modified_ms,
        printed.etag,
        printed.storage_class,
        printed.algorithm,
        printed.checksum_type,
        version.owner,
        latest,
    )

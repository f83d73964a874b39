"""Listings: rows come in key order from the ring's scanner; only what a list prints is opened.

A page of current objects is worked on as columns: the heads of all records are decoded in one call, and all list fields opened in one. Versions come from whole records.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from storaged.errors import DataDamaged
from storaged.meta.names import Table, object_name
from storaged.objects.api import ListedObject, Listing
from storaged.objects.plane import ObjectPlane
from storaged.objects.ports import SealBroken, pack_context
from storaged.objects.records import BucketRecord, ListedFields, ObjectRecord, SealedList, Version, decode_heads
from storaged.objects.versions import BucketKeys, Place, decode_record, open_listing
from storaged.wire import decode_all


async def list_objects(
    plane: ObjectPlane, bucket: BucketRecord, *, prefix: bytes = b"", after: bytes = b"", delimiter: bytes = b"", limit: int = 1000
) -> Listing:
    """Current objects with key > ``after``, and common prefixes, together at most ``limit``. Raises DataDamaged for a record that can't be read or opened."""
    page = await plane.scanner.list_heads(
        Table.OBJECT, bucket.id, range(bucket.shards), prefix=prefix, after=after, delimiter=delimiter, limit=limit
    )
    try:
        rows = decode_heads(page.heads)
    except msgspec.MsgspecError as error:
        raise DataDamaged(f"The record of a listed key cannot be read: {error}") from None
    keys = BucketKeys(plane, bucket)
    try:
        printed = decode_all(await _opened(keys, bucket, page.keys, rows), SealedList)
    except (SealBroken, msgspec.MsgspecError) as error:
        raise DataDamaged(f"The list field of a key does not open: {error}") from None
    make, kind = tuple.__new__, ListedObject
    listed = [
        make(
            kind,
            (key, version, size, modified_ms, field.etag, field.storage_class, field.algorithm, field.checksum_type, owner, True, False),
        )
        for key, (version, modified_ms, size, owner, _, _, _), field in zip(page.keys, rows, printed, strict=True)
    ]
    return Listing(listed, page.prefixes, page.next_after)


async def _opened(keys: BucketKeys, bucket: BucketRecord, names: Sequence[bytes], rows: Sequence[ListedFields]) -> list[bytes]:
    """The list fields of these rows. Mostly all are under one version of the bucket's key."""
    contexts = _contexts(bucket, names, rows)
    versions = {row[4] for row in rows}
    if len(versions) == 1:
        return (await keys.load(versions.pop())).open_lists([row[6] for row in rows], contexts)
    opened = [b""] * len(rows)
    for version in sorted(versions):
        held = [index for index, row in enumerate(rows) if row[4] == version]
        key = await keys.load(version)
        for index, plain in zip(held, key.open_lists([rows[index][6] for index in held], [contexts[index] for index in held]), strict=True):
            opened[index] = plain
    return opened


def _contexts(bucket: BucketRecord, names: Sequence[bytes], rows: Sequence[ListedFields]) -> list[bytes]:
    """``Place.context`` of every row, in one expression."""
    first, join = pack_context(b"", (bucket.id,)), b"".join
    lengths = {length: length.to_bytes(4, "big") for length in {*map(len, names), *[len(row[5]) for row in rows]}}
    ids = {version: pack_context(b"", (version.encode(),)) for version in {row[0] for row in rows}}
    return [join((first, lengths[len(key)], key, ids[row[0]], lengths[len(row[5])], row[5])) for key, row in zip(names, rows, strict=True)]


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
    page = await plane.scanner.list_page(
        Table.OBJECT,
        bucket.id,
        range(bucket.shards),
        prefix=prefix,
        after=after,
        delimiter=delimiter,
        limit=max(0, limit - len(found)),
        hidden=True,
    )
    for row in page.rows:
        found += await _listed_versions(keys, bucket, row.key, decode_record(row.value))
    return Listing(found, page.prefixes, page.next_after)


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

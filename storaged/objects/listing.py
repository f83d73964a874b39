"""Listings: the ring's scanner returns rows in key order; only the fields that a list prints are opened.

The rows of a page that are not in the cache (``cache.listed_rows``) are processed as columns: one call decodes the
heads of all records, and one opens all list fields. Versions come from whole records.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import msgspec

from storaged.errors import DataDamaged, KeyringUnavailable
from storaged.meta.names import Table, object_name
from storaged.meta.ports import HeadPage, PageQuery
from storaged.objects.bucket_keys import BucketKeys
from storaged.objects.code.versions import Place, decode_record, open_listing
from storaged.objects.listing_types import ListedVersion, Listing, Show, VersionListing, as_rows
from storaged.objects.plane import ObjectPlane
from storaged.objects.ports import BucketKey, SealBroken, pack_context
from storaged.objects.records import (
    BucketRecord,
    ListedFields,
    ObjectRecord,
    SealedList,
    Version,
    decode_heads,
    listed_checksum,
)
from storaged.wire import decode_all


async def list_objects(
    plane: ObjectPlane,
    bucket: BucketRecord,
    *,
    prefix: bytes = b"",
    after: bytes = b"",
    delimiter: bytes = b"",
    limit: int = 1000,
    show: Show = as_rows,
) -> Listing:
    """Current objects with key > ``after``, and common prefixes, together at most ``limit``. Raises DataDamaged, with
    the key, for a record that can't be read or opened.
    """
    keys = BucketKeys(plane, bucket)
    try:
        page = await plane.scanner.list_heads(
            PageQuery(
                Table.OBJECT,
                bucket.id,
                bucket.shard_numbers,
                prefix=prefix,
                after=after,
                delimiter=delimiter,
                limit=limit,
            )
        )
        if not page.keys:  # common prefixes need no bucket key
            return Listing(prefixes=page.prefixes, next_after=page.next_after)
        newest = await keys.newest()
    finally:
        _forget_with_key(plane, bucket)
    return Listing(page.keys, await _shown(plane, bucket, keys, newest, page, show), page.prefixes, page.next_after)


async def _shown(
    plane: ObjectPlane, bucket: BucketRecord, keys: BucketKeys, newest: BucketKey, page: HeadPage, show: Show
) -> list[Any]:
    """The result of ``show`` for each row of a page: from the cache, or made and cached. Raises DataDamaged."""
    shown = plane.listed_rows.find(newest, show, page.keys, page.heads)
    missing = shown.count(None)
    if missing == len(shown):
        shown = list(show(*await _columns(keys, bucket, page.keys, page.heads)))
        if page.again:
            plane.listed_rows.put(newest, show, page.keys, page.heads, shown)
    elif missing:
        new = [index for index, its in enumerate(shown) if its is None]
        names, heads = [page.keys[index] for index in new], [page.heads[index] for index in new]
        made = show(*await _columns(keys, bucket, names, heads))
        if page.again:
            plane.listed_rows.put(newest, show, names, heads, made)
        for index, its in zip(new, made, strict=True):
            shown[index] = its
    return shown


def _forget_with_key(plane: ObjectPlane, bucket: BucketRecord) -> None:
    """Makes the scanner drop its cache of the bucket, also after a failed listing, when the bucket key goes; at once if
    no key is held.
    """
    forget = partial(plane.scanner.forget, bucket.id)
    try:
        held = plane.keys.try_bucket_key(bucket.id, bucket.countries)
    except KeyringUnavailable:
        held = None
    if held is None:
        forget()
    else:
        plane.listed_rows.watch(held, forget)


Columns = tuple[Sequence[int], Sequence[int], Sequence[SealedList]]
"""Sizes, times in ms, list fields."""


async def _columns(keys: BucketKeys, bucket: BucketRecord, names: Sequence[bytes], heads: Sequence[bytes]) -> Columns:
    """The fields of record heads. Raises DataDamaged, with the key."""
    try:
        return await _opened(keys, bucket, names, heads)
    except DataDamaged:
        for name, head in zip(names, heads, strict=True):  # finds the damaged one
            with _named(name):
                await _opened(keys, bucket, [name], [head])
        raise


async def _opened(keys: BucketKeys, bucket: BucketRecord, names: Sequence[bytes], heads: Sequence[bytes]) -> Columns:
    """Raises DataDamaged."""
    try:
        fields = decode_heads(heads)
    except msgspec.MsgspecError as error:
        raise DataDamaged(f"The record of a listed key cannot be read: {error}") from None
    try:
        printed = decode_all(await _list_fields(keys, fields, _contexts(bucket, names, fields)), SealedList)
    except (SealBroken, msgspec.MsgspecError) as error:
        raise DataDamaged(f"The list field of a key does not open: {error}") from None
    return [its.size for its in fields], [its.modified_ms for its in fields], printed


@contextmanager
def _named(key: bytes) -> Iterator[None]:
    """Adds the key to the DataDamaged that its block raises."""
    try:
        yield
    except DataDamaged as error:
        raise DataDamaged(f"{error} (key {key.decode(errors='replace')!r})", **error.details) from None


def _contexts(bucket: BucketRecord, keys: Sequence[bytes], fields: Sequence[ListedFields]) -> list[bytes]:
    """``Place.context`` of every row: bucket id, key, version id, context id, each after its length."""
    first = pack_context(b"", (bucket.id,))
    before = {length: first + length.to_bytes(4, "big") for length in set(map(len, keys))}
    kinds = {(its.version_id, len(its.context_id)) for its in fields}
    after = {kind: pack_context(b"", (kind[0].encode(),)) + kind[1].to_bytes(4, "big") for kind in kinds}
    if len(after) == 1:
        [same] = after.values()
        return [b"".join((before[len(key)], key, same, its.context_id)) for key, its in zip(keys, fields, strict=True)]
    return [
        b"".join((before[len(key)], key, after[its.version_id, len(its.context_id)], its.context_id))
        for key, its in zip(keys, fields, strict=True)
    ]


async def _list_fields(keys: BucketKeys, fields: Sequence[ListedFields], contexts: Sequence[bytes]) -> list[bytes]:
    """The opened list fields. Usually all are sealed with one version of the bucket's key."""
    versions = {its.bucket_key for its in fields}
    if len(versions) == 1:
        return (await keys.load(versions.pop())).open_lists([its.listing for its in fields], contexts)
    opened = [b""] * len(fields)
    for version in sorted(versions):
        held = [index for index, its in enumerate(fields) if its.bucket_key == version]
        plain = (await keys.load(version)).open_lists(
            [fields[index].listing for index in held], [contexts[index] for index in held]
        )
        for index, text in zip(held, plain, strict=True):
            opened[index] = text
    return opened


async def list_versions(
    plane: ObjectPlane,
    bucket: BucketRecord,
    *,
    prefix: bytes = b"",
    after: bytes = b"",
    after_version: str = "",
    delimiter: bytes = b"",
    limit: int = 1000,
) -> VersionListing:
    """Every version after (``after``, ``after_version``), newest first within a key. With ``after_version``, the older
    versions of the key ``after`` come first. Raises as ``list_objects``.
    """
    keys = BucketKeys(plane, bucket)
    found: list[ListedVersion] = []
    if after_version and limit:
        name = object_name(bucket.id, bucket.shard_numbers, after)
        record = decode_record((await plane.registers.read(name)).value)
        ids = [version.version_id for version in record.versions]
        if after_version in ids:
            found += await _listed_versions(keys, bucket, after, record, skip=ids.index(after_version) + 1)
    page = await plane.scanner.list_page(
        PageQuery(
            Table.OBJECT,
            bucket.id,
            bucket.shard_numbers,
            prefix=prefix,
            after=after,
            delimiter=delimiter,
            limit=max(0, limit - len(found)),
            hidden=True,
        )
    )
    for row in page.rows:
        with _named(row.key):
            found += await _listed_versions(keys, bucket, row.key, decode_record(row.value))
    return VersionListing(found, page.prefixes, page.next_after)


async def _listed_versions(
    keys: BucketKeys, bucket: BucketRecord, key: bytes, record: ObjectRecord, *, skip: int = 0
) -> list[ListedVersion]:
    return [
        await _listed(keys, bucket, key, version, latest=index == 0)
        for index, version in enumerate(record.versions)
        if index >= skip
    ]


async def _listed(
    keys: BucketKeys, bucket: BucketRecord, key: bytes, version: Version, *, latest: bool
) -> ListedVersion:
    if version.delete_marker:
        return ListedVersion(
            key, version.version_id, 0, version.modified_ms, "", "", "", "", version.owner, latest, True
        )
    printed = open_listing(Place(bucket.id, key), version, await keys.load(version.bucket_key))
    return ListedVersion(
        key,
        version.version_id,
        version.size,
        version.modified_ms,
        printed.etag,
        printed.storage_class,
        *listed_checksum(printed.algorithm, printed.checksum_type),
        version.owner,
        latest,
    )

"""Listings: the ring's scanner returns rows in key order; only the fields that a list prints are opened.

The rows of a page that are not in the cache (``cache.listed_rows``) are processed as columns: one call decodes the
heads of all records, and one opens all list fields. Versions come from whole records and pages of older versions; one
call opens the list fields of all that a page of a list has.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from operator import attrgetter
from typing import Any, NamedTuple

import msgspec

from storaged.errors import DataDamaged, KeyringUnavailable
from storaged.meta.listing.merge import every_row
from storaged.meta.names import RegisterName, Table, object_name
from storaged.meta.ports import HeadPage, ListPage, PageQuery
from storaged.meta.storage.scan import list_after_prefix
from storaged.objects.brief import listed_checksum
from storaged.objects.bucket_keys import BucketKeys
from storaged.objects.code.history import Entry, find_entry, newest_in
from storaged.objects.code.version_names import NULL_NAME, place_name, required_name
from storaged.objects.code.version_walk import every_run
from storaged.objects.code.versions import decode_record
from storaged.objects.listing_types import ListedVersion, Listing, Show, VersionListing, as_rows
from storaged.objects.plane import ObjectPlane
from storaged.objects.ports import BucketKey, SealBroken, pack_context
from storaged.objects.records import (
    BucketRecord,
    ListedFields,
    ObjectRecord,
    SealedList,
    decode_heads,
    listed_fields,
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


Columns = tuple[Sequence[int], Sequence[int], Sequence[SealedList], Iterable[str]]
"""Sizes, times in ms, list fields, owners."""


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
    printed = await _printed(keys, bucket, names, fields)
    return [its.size for its in fields], [its.modified_ms for its in fields], printed, map(_OWNER, fields)


async def _printed(
    keys: BucketKeys, bucket: BucketRecord, names: Sequence[bytes], fields: Sequence[ListedFields]
) -> list[SealedList]:
    """Raises DataDamaged."""
    try:
        return decode_all(await _list_fields(keys, fields, _contexts(bucket, names, fields)), SealedList)
    except (SealBroken, msgspec.MsgspecError) as error:
        raise DataDamaged(f"The list field of a key does not open: {error}") from None


_OWNER = attrgetter("owner")


@contextmanager
def _named(key: bytes) -> Iterator[None]:
    """Adds the key to the DataDamaged that its block raises."""
    try:
        yield
    except DataDamaged as error:
        named = key.decode(errors="replace")
        raise DataDamaged(
            f"{error} (key {named!r}; a list that begins after this key goes on)", **error.details | {"Key": named}
        ) from None


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
    versions of the key ``after`` come first. A page reads as many versions as it has, and of other pages of a key only
    those on the way to them. Raises InvalidArgument for an ``after_version`` that no version id can be, and as
    ``list_objects``.
    """
    page = _VersionsPage(plane, bucket, limit)
    if after_version and limit:
        name = object_name(bucket.id, bucket.shard_numbers, after)
        record = decode_record((await plane.registers.read(name)).value)
        await page.add_versions(after, record, await _ordinal_of(plane, name, record, after_version))
    start: bytes | None = after
    while start is not None and not page.full:
        wanted = PageQuery(
            Table.OBJECT,
            bucket.id,
            bucket.shard_numbers,
            prefix=prefix,
            after=start,
            delimiter=delimiter,
            limit=min(page.left, ROWS_A_READ if plane.versioning(bucket) else page.left),
            hidden=True,
        )
        found = await plane.scanner.list_page(wanted)
        if found.prefixes:
            found = replace(found, prefixes=await _prefixes_with_versions(plane, wanted, found.prefixes))
        start = await page.add_rows(found)
    return await page.listing(start)


async def _prefixes_with_versions(
    plane: ObjectPlane, wanted: PageQuery, prefixes: Sequence[bytes]
) -> tuple[bytes, ...]:
    """Without those under which deleted keys have left rows without versions: loans, events. Most prefixes have a
    current object, and are on the page of these, which reaches at least as far. Each of the others is looked through.
    """
    current = frozenset((await plane.scanner.list_heads(wanted._replace(hidden=False))).prefixes)
    return tuple([one for one in prefixes if one in current or await _has_versions(plane, wanted, one)])


async def _has_versions(plane: ObjectPlane, wanted: PageQuery, prefix: bytes) -> bool:
    async for row in every_row(plane.scanner, wanted._replace(prefix=prefix, delimiter=b"", after=b"")):
        with _named(row.key):
            if decode_record(row.value).versions:
                return True
    return False


ROWS_A_READ = 100
"""Rows that a listing of versions reads at once: each has the newest versions of its key, up to some 20 KiB."""


async def _ordinal_of(plane: ObjectPlane, name: RegisterName, record: ObjectRecord, version_id: str) -> int:
    """Of the version after which a page begins. That version may have been deleted meanwhile. ``null``, which a page
    has only when all of its key's versions are listed, does not tell an ordinal: without a null version the page begins
    with the next key.
    """
    wanted = required_name(version_id)
    if wanted != NULL_NAME:
        return wanted.ordinal
    entry = await find_entry(plane.pages, name, record, wanted)
    return entry.ordinal if entry is not None else 0


class _Found(NamedTuple):
    """What a list prints of a version. The version itself, with its metadata and parts, is ten times as large."""

    key: bytes
    fields: ListedFields
    name: str
    delete_marker: bool
    latest: bool


class _VersionsPage:
    """A page of versions while it is filled."""

    def __init__(self, plane: ObjectPlane, bucket: BucketRecord, limit: int) -> None:
        self._plane = plane
        self._bucket = bucket
        self._limit = limit
        self._keys = BucketKeys(plane, bucket)
        self._found: list[_Found] = []
        self._prefixes: list[bytes] = []
        self._cut = False
        """The last key has more versions."""
        self._last_added: Entry | None = None

    @property
    def left(self) -> int:
        return self._limit - len(self._found) - len(self._prefixes)

    @property
    def full(self) -> bool:
        return self.left <= 0 or self._cut

    async def add_rows(self, page: ListPage) -> bytes | None:
        """Adds what fits. Returns after which key the next one begins; None at the end."""
        prefixes = list(page.prefixes)
        for row in page.rows:
            while prefixes and prefixes[0] < row.key and not self.full:
                self._prefixes.append(prefixes.pop(0))
            if self.full:
                return self._last(row.key)
            with _named(row.key):
                await self.add_versions(row.key, decode_record(row.value))
        while prefixes and not self.full:
            self._prefixes.append(prefixes.pop(0))
        return self._last(prefixes[0]) if prefixes else page.next_after

    def _last(self, _not_added: bytes) -> bytes:
        """The end of what the page has."""
        key = self._found[-1].key if self._found else b""
        prefix = self._prefixes[-1] if self._prefixes else b""
        return key if key > prefix else list_after_prefix(prefix)

    async def add_versions(self, key: bytes, record: ObjectRecord, below: int | None = None) -> None:
        """The versions of a key, those with an ordinal less than ``below``."""
        if not record.versions:
            return
        newest = newest_in(record).ordinal
        name = object_name(self._bucket.id, self._bucket.shard_numbers, key)
        async for run in every_run(self._plane.pages, name, record, below=below, wanted=self.left + 1):
            self._cut = len(run) > self.left
            for entry in run[: self.left]:
                fields, marker = listed_fields(entry.version), entry.version.delete_marker
                self._found.append(_Found(key, fields, entry.name, marker, entry.ordinal == newest))
                self._last_added = entry
            if self._cut:
                return

    async def listing(self, start: bytes | None) -> VersionListing:
        """``start``: after which key the next page begins; None: there is nothing more. Raises DataDamaged, with the
        key.
        """
        versions = await _listed(self._keys, self._bucket, self._found)
        last = self._last_added
        if not self._cut or last is None:
            return VersionListing(versions, self._prefixes, start)
        return VersionListing(versions, self._prefixes, self._found[-1].key, place_name(last.kept, last.version))


async def _listed(keys: BucketKeys, bucket: BucketRecord, found: Sequence[_Found]) -> list[ListedVersion]:
    """Raises DataDamaged, with the key."""
    objects = [one for one in found if not one.delete_marker]
    names, sealed = [one.key for one in objects], [one.fields for one in objects]
    try:
        opened = iter(await _printed(keys, bucket, names, sealed))
    except DataDamaged:
        for name, fields in zip(names, sealed, strict=True):  # finds the damaged one
            with _named(name):
                await _printed(keys, bucket, [name], [fields])
        raise
    return [_marker(one) if one.delete_marker else _version(one, next(opened)) for one in found]


def _marker(found: _Found) -> ListedVersion:
    fields = found.fields
    return ListedVersion(found.key, found.name, 0, fields.modified_ms, "", "", "", "", fields.owner, found.latest, True)


def _version(found: _Found, printed: SealedList) -> ListedVersion:
    fields = found.fields
    return ListedVersion(
        found.key,
        found.name,
        fields.size,
        fields.modified_ms,
        printed.etag,
        printed.storage_class,
        *listed_checksum(printed.algorithm, printed.checksum_type),
        fields.owner,
        found.latest,
    )

"""The versions of a bucket for an inventory, a page at a time, from where the last page ended."""

from __future__ import annotations

import asyncio
from typing import NamedTuple

from storaged.errors import DataDamaged
from storaged.meta.names import Table, Value, object_name
from storaged.meta.ports import PageQuery
from storaged.objects.brief import full_list
from storaged.objects.bucket_keys import BucketKeys
from storaged.objects.code.history import Entry, newest_in
from storaged.objects.code.version_walk import every_entry
from storaged.objects.code.versions import OpenedVersion, Place, decode_record, open_listing, open_version
from storaged.objects.plane import ObjectPlane
from storaged.objects.records import BucketRecord, ObjectRecord, SealedList

ROWS_A_PAGE = 1000
VERSIONED_ROWS_A_PAGE = 100
"""Each has the newest versions of its key, up to some 20 KiB."""
VERSIONS_A_PAGE = 1000
OPENED_AT_ONCE = 64
"""How many versions are opened before other tasks may run: each costs some 20 us."""


class Position(NamedTuple):
    """Where a page begins: after the key ``after``, or among its versions, with those below the ordinal ``below``."""

    after: bytes = b""
    below: int = 0


class Listed(NamedTuple):
    """``printed``: None for a delete marker. ``opened``: None too where it was not asked for."""

    key: bytes
    entry: Entry
    latest: bool
    printed: SealedList | None
    opened: OpenedVersion | None


class InventoryPage(NamedTuple):
    """``next``: where the next page begins; None: there is none. ``unreadable``: keys, and pages of versions, that are
    left out.
    """

    listed: list[Listed]
    next: Position | None
    unreadable: int


async def list_page(
    plane: ObjectPlane, bucket: BucketRecord, prefix: bytes, at: Position, *, all_versions: bool, opened: bool
) -> InventoryPage:
    """``all_versions``: also those that are not current, and delete markers. ``opened``: with what is sealed in each.
    Raises ServiceUnavailable, NoSuchBucket.
    """
    page = _Page(plane, bucket, opened)
    if at.below:
        name = object_name(bucket.id, bucket.shard_numbers, at.after)
        left = await page.add_versions(at.after, (await plane.registers.read(name)).value, at.below)
        if left is not None:
            return page.ended(left)
    query = PageQuery(
        Table.OBJECT,
        bucket.id,
        bucket.shard_numbers,
        prefix=prefix,
        after=at.after,
        limit=VERSIONED_ROWS_A_PAGE if plane.versioning(bucket) else ROWS_A_PAGE,
        hidden=all_versions,
    )
    found = await plane.scanner.list_page(query)
    for row in found.rows:
        if not all_versions:
            await page.add_newest(row.key, row.value)
        elif (left := await page.add_versions(row.key, row.value, None)) is not None:
            return page.ended(left)
    return page.ended(Position(found.next_after) if found.next_after is not None else None)


class _Page:
    """A page while it is filled."""

    def __init__(self, plane: ObjectPlane, bucket: BucketRecord, opened: bool) -> None:
        self._plane = plane
        self._bucket = bucket
        self._opened = opened
        self._keys = BucketKeys(plane, bucket)
        self._listed: list[Listed] = []
        self.unreadable = 0

    async def add_newest(self, key: bytes, value: Value | None) -> None:
        record = self._read(value)
        if record is not None:
            await self.add(key, newest_in(record), latest=True)

    def _read(self, value: Value | None) -> ObjectRecord | None:
        """None: there is no version, or the record can't be read."""
        try:
            record = decode_record(value)
        except DataDamaged as error:
            self._count_unreadable(error)
            return None
        return record if record.versions else None  # some have events alone

    async def add_versions(self, key: bytes, value: Value | None, below: int | None) -> Position | None:
        """The versions of a key, those with an ordinal less than ``below``. Returns where the next page begins when
        this one is full; else None. Where its pages are not in order, the rest is left out.
        """
        record = self._read(value)
        if record is None:
            return None
        try:
            return await self._add_entries(key, record, below)
        except DataDamaged as error:
            self._count_unreadable(error)
            return None

    async def _add_entries(self, key: bytes, record: ObjectRecord, below: int | None) -> Position | None:
        name = object_name(self._bucket.id, self._bucket.shard_numbers, key)
        newest = newest_in(record).ordinal
        wanted, pages = VERSIONS_A_PAGE - len(self._listed), self._plane.pages
        unreadable = self._count_unreadable
        entries = every_entry(pages, name, record, below=below, wanted=wanted, on_unreadable=unreadable)
        async for entry in entries:
            await self.add(key, entry, latest=entry.ordinal == newest)
            if len(self._listed) >= VERSIONS_A_PAGE:
                return Position(key, entry.ordinal) if entry.ordinal else Position(key)
        return None

    async def add(self, key: bytes, entry: Entry, *, latest: bool) -> None:
        version, printed, opened = entry.version, None, None
        if len(self._listed) % OPENED_AT_ONCE == 0:
            await asyncio.sleep(0)
        try:
            if not version.delete_marker:
                place, bucket_key = Place(self._bucket.id, key), await self._keys.load(version.bucket_key)
                printed = full_list(open_listing(place, version, bucket_key))
                opened = open_version(place, version, bucket_key) if self._opened else None
        except DataDamaged:
            self.unreadable += 1
            return
        self._listed.append(Listed(key, entry, latest, printed, opened))

    def _count_unreadable(self, _: DataDamaged) -> None:
        self.unreadable += 1

    def ended(self, left: Position | None) -> InventoryPage:
        return InventoryPage(self._listed, left, self.unreadable)

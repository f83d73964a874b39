"""What update functions need and can't wait for: a bucket's keys, and pages of older versions."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from storaged.meta.names import Change, RegisterName, Value
from storaged.meta.ports import Outcome, Registers, SmallCopies
from storaged.objects.api import WriteConditions
from storaged.objects.code.history import PageNeeded, Shelf
from storaged.objects.code.version_pages import read_page
from storaged.objects.code.versions import Place, access_to, open_listing, open_version
from storaged.objects.conditions import Current, needs_etag
from storaged.objects.plane import ObjectPlane
from storaged.objects.ports import BucketKey
from storaged.objects.records import BucketRecord, ObjectRecord, Version

T = TypeVar("T")


class KeyNeeded(Exception):
    """An update met a version sealed under a bucket key that is not loaded. It runs again when the key is loaded."""

    def __init__(self, version: int) -> None:
        super().__init__(version)
        self.version = version


class BucketKeys:
    """The loaded keys of a bucket."""

    def __init__(self, plane: ObjectPlane, bucket: BucketRecord) -> None:
        self._plane = plane
        self._bucket = bucket
        self._known: dict[int, BucketKey] = {}
        self.shelf = Shelf()
        """Pages with older versions of the key that is written."""

    async def newest(self) -> BucketKey:
        key = await self._plane.keys.bucket_key(self._bucket.id, self._bucket.countries)
        self._known[key.version] = key
        return key

    async def load(self, version: int) -> BucketKey:
        key = self._known.get(version)
        if key is None:
            key = self._known[version] = await self._plane.keys.bucket_key(
                self._bucket.id, self._bucket.countries, version
            )
        return key

    def known(self, version: int) -> BucketKey:
        """Raises KeyNeeded."""
        key = self._known.get(version)
        if key is None:
            raise KeyNeeded(version)
        return key

    async def supply(self, name: RegisterName, needed: KeyNeeded | PageNeeded) -> None:
        """Loads what an update of the register ``name`` needs. Raises DataDamaged, and as ``load``."""
        if isinstance(needed, KeyNeeded):
            await self.load(needed.version)
        else:
            self.shelf.put(needed.ref.hash, await read_page(self._plane.pages, name, needed.ref))


async def with_keys(keys: BucketKeys, attempt: Callable[[], T]) -> T:
    """Runs ``attempt`` until all keys are loaded for which it raises KeyNeeded."""
    while True:
        try:
            return attempt()
        except KeyNeeded as needed:
            await keys.load(needed.version)


async def change_with_keys(
    registers: Registers,
    keys: BucketKeys,
    name: RegisterName,
    update: Callable[[Value | None], Change | None],
    *,
    small: SmallCopies | None = None,
    regardless: bool = False,
) -> Outcome:
    """``registers.change`` for an update that may raise KeyNeeded or PageNeeded."""
    while True:
        try:
            return await registers.change(name, update, small=small, regardless=regardless)
        except (KeyNeeded, PageNeeded) as needed:
            await keys.supply(name, needed)


def current_of(place: Place, record: ObjectRecord, keys: BucketKeys, conditions: WriteConditions) -> Current | None:
    """The current version, against which a conditional write is judged; None: no such object. Raises KeyNeeded."""
    return judged(place, record.versions[0] if record.versions else None, keys, conditions)


def judged(place: Place, version: Version | None, keys: BucketKeys, conditions: WriteConditions) -> Current | None:
    """A version as these conditions judge it: what is sealed is opened only when they need it. None: there is none, or
    it is a delete marker. Raises KeyNeeded, DataDamaged.
    """
    if version is None or version.delete_marker:
        return None
    if conditions.allowed is not None:
        opened = open_version(place, version, keys.known(version.bucket_key))
        return Current(opened.meta.etag, version.size, version.modified_ms, access_to(opened))
    etag = open_listing(place, version, keys.known(version.bucket_key)).etag if needs_etag(conditions) else ""
    return Current(etag, version.size, version.modified_ms)

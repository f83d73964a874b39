"""A bucket's keys for update functions, which can't wait for one."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from storaged.errors import NoSuchKey, NoSuchVersion
from storaged.meta.names import Change, RegisterName, Value
from storaged.meta.ports import Outcome, Registers, SmallCopies
from storaged.objects.code.versions import Place, find_version, open_listing
from storaged.objects.conditions import Current
from storaged.objects.plane import ObjectPlane
from storaged.objects.ports import BucketKey
from storaged.objects.records import BucketRecord, ObjectRecord

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
    """``registers.change`` for an update that may raise KeyNeeded."""
    while True:
        try:
            return await registers.change(name, update, small=small, regardless=regardless)
        except KeyNeeded as needed:
            await keys.load(needed.version)


def current_of(
    place: Place, record: ObjectRecord, keys: BucketKeys, *, with_etag: bool, version_id: str = ""
) -> Current | None:
    """The version that a conditional write is judged against; None: no such object. The ETag is opened only
    ``with_etag``. Raises KeyNeeded.
    """
    try:
        version = find_version(record, version_id)
    except (NoSuchKey, NoSuchVersion):
        return None
    etag = open_listing(place, version, keys.known(version.bucket_key)).etag if with_etag else ""
    return Current(etag, version.size, version.modified_ms)

"""Versions of objects: sealing what a storage node must not read into a record, and opening it again.

Contexts bind what is sealed to where it belongs: the wrapped data key, the metadata and the list field of a version
open only for
(bucket id, key, version id, context id), the context id being the data id of its body or the id of its upload.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeVar

import msgspec

from storaged.errors import DataDamaged, NoSuchKey, NoSuchVersion
from storaged.meta.names import Change, RegisterName, Value, Visibility
from storaged.meta.ports import Outcome, Registers, SmallCopies
from storaged.objects.api import NewMeta, ObjectInfo
from storaged.objects.code.seal import META_LABEL
from storaged.objects.conditions import Current
from storaged.objects.plane import ObjectPlane
from storaged.objects.ports import BucketKey, SealBroken, pack_context
from storaged.objects.records import (
    BucketRecord,
    ObjectRecord,
    PartEntry,
    SealedList,
    SealedMeta,
    SealedPart,
    Version,
    brief_meta,
    decode_object,
    encode_object,
    full_meta,
)
from storaged.sov1 import SALT_BYTES, open_message, seal_message
from storaged.wire import decode, encode

T = TypeVar("T")

EMPTY = ObjectRecord(())


class KeyNeeded(Exception):
    """An update met a version sealed under a bucket key that is not at hand; it runs again once the key was fetched."""

    def __init__(self, version: int) -> None:
        super().__init__(version)
        self.version = version


class BucketKeys:
    """A bucket's keys, at hand for update functions, which can't wait."""

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
    """Runs ``attempt`` until it has all keys that it asks for by KeyNeeded."""
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


class Place(NamedTuple):
    """Where a version belongs: what its sealed fields are bound to."""

    bucket_id: bytes
    key: bytes

    def context(self, version_id: str, context_id: bytes) -> bytes:
        """Packed."""
        return pack_context(b"", (self.bucket_id, self.key, version_id.encode(), context_id))

    def context_of(self, version: Version) -> bytes:
        return self.context(version.version_id, version.context_id)


def decode_record(value: Value | None) -> ObjectRecord:
    """The versions of a key; none when it was never written or is deleted. Raises DataDamaged for
    what is not a record.
    """
    if value is None or value.visibility == Visibility.TOMBSTONE or not value.body:
        return EMPTY
    try:
        return decode_object(value.body)
    except msgspec.MsgspecError as error:
        raise DataDamaged(f"The record of this key cannot be read: {error}") from None


def record_change(record: ObjectRecord, payload: bytes = b"") -> Change:
    """What the register becomes for these versions."""
    if not record.versions:
        return Change(b"", Visibility.TOMBSTONE)
    hidden = record.versions[0].delete_marker
    return Change(encode_object(record), Visibility.HIDDEN if hidden else Visibility.LIVE, payload)


def find_version(record: ObjectRecord, version_id: str) -> Version:
    """The newest when ``version_id`` is empty. Raises NoSuchKey, NoSuchVersion."""
    if version_id:
        for version in record.versions:
            if version.version_id == version_id:
                return version
        raise NoSuchVersion(VersionId=version_id)
    if not record.versions:
        raise NoSuchKey
    if record.versions[0].delete_marker:
        raise NoSuchKey(DeleteMarker="true", VersionId=record.versions[0].version_id)
    return record.versions[0]


def meta_of(new: NewMeta, etag: str, checksums: dict[str, str], checksum_type: str, size: int) -> SealedMeta:
    return SealedMeta(
        etag, dict(new.headers), dict(new.user), dict(new.tags), checksums, checksum_type, new.storage_class, size=size
    )


def seal_meta(plane: ObjectPlane, dek: bytes, context: bytes, meta: SealedMeta) -> bytes:
    return seal_message(dek, META_LABEL, context, encode(brief_meta(meta)), plane.entropy(SALT_BYTES))


def seal_listing(key: BucketKey, context: bytes, meta: SealedMeta) -> bytes:
    """What a list prints of it."""
    brief = brief_meta(meta)
    algorithm = next(iter(brief.checksums), "")
    return key.seal_list(encode(SealedList(meta.etag, algorithm, brief.checksum_type, meta.storage_class)), context)


def seal_version(
    plane: ObjectPlane,
    place: Place,
    key: BucketKey,
    dek: bytes,
    meta: SealedMeta,
    *,
    version_id: str,
    context_id: bytes,
    owner: str,
    modified_ms: int,
    parts: tuple[PartEntry, ...],
    manifest: bytes = b"",
    multipart: bool = False,
    part_count: int = 1,
    pages: tuple[bytes, ...] = (),
) -> Version:
    """A version whose sealed fields are all under its data key and its context."""
    context, meta = place.context(version_id, context_id), brief_meta(meta)
    return Version(
        version_id,
        modified_ms,
        meta.size,
        owner,
        key.version,
        context_id,
        seal_listing(key, context, meta),
        False,
        key.wrap(dek, context),
        seal_meta(plane, dek, context, meta),
        parts,
        manifest,
        multipart,
        part_count,
        pages,
    )


class OpenedVersion(NamedTuple):
    """A version with its secrets: the data key and the metadata."""

    version: Version
    dek: bytes
    meta: SealedMeta


def open_version(place: Place, version: Version, key: BucketKey) -> OpenedVersion:
    """Raises DataDamaged when the record does not open: it is not what a gateway of this cluster wrote for this key."""
    context = place.context_of(version)
    try:
        dek = key.unwrap(version.wrapped_key, context)
        meta = full_meta(decode(open_message(dek, META_LABEL, context, version.meta), SealedMeta))
    except (SealBroken, msgspec.MsgspecError) as error:
        raise DataDamaged(f"The record of this key does not open: {error}") from None
    if meta.size != version.size:
        raise DataDamaged(f"The record of this key says {version.size} bytes, what is sealed in it {meta.size}.")
    return OpenedVersion(version, dek, meta)


def open_listing(place: Place, version: Version, key: BucketKey) -> SealedList:
    """What a list prints of a version; about 1 us. Raises DataDamaged."""
    try:
        return decode(key.open_list(version.listing, place.context_of(version)), SealedList)
    except (SealBroken, msgspec.MsgspecError) as error:
        raise DataDamaged(f"The list field of a key does not open: {error}") from None


def current_of(
    place: Place, record: ObjectRecord, keys: BucketKeys, *, with_etag: bool, version_id: str = ""
) -> Current | None:
    """What a conditional write judges; the ETag is opened only when it matters. None: no such
    object. Raises KeyNeeded.
    """
    try:
        version = find_version(record, version_id)
    except (NoSuchKey, NoSuchVersion):
        return None
    etag = open_listing(place, version, keys.known(version.bucket_key)).etag if with_etag else ""
    return Current(etag, version.size, version.modified_ms)


def info_of(key: bytes, opened: OpenedVersion, parts: tuple[SealedPart, ...]) -> ObjectInfo:
    version, meta = opened.version, opened.meta
    return ObjectInfo(
        key=key,
        version_id=version.version_id,
        size=version.size,
        modified_ms=version.modified_ms,
        etag=meta.etag,
        headers=meta.headers,
        user=meta.user,
        tags=meta.tags,
        checksums=meta.checksums,
        checksum_type=meta.checksum_type,
        storage_class=meta.storage_class,
        part_count=len(parts),
        parts=parts,
        owner=version.owner,
        delete_marker=version.delete_marker,
    )

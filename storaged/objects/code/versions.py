"""Versions of objects: seals into a record what a storage node must not read, and opens it again. Pure.

Contexts bind sealed fields to their place: the wrapped data key, the metadata and the list field of a version open only
for (bucket id, key, version id, context id). The context id is the data id of its body or the id of its upload.
"""

from __future__ import annotations

from typing import NamedTuple

import msgspec
from msgspec import Struct

from storaged.errors import DataDamaged
from storaged.ids import Entropy
from storaged.meta.names import Change, Value, Visibility
from storaged.objects.api import NewMeta, ObjectInfo
from storaged.objects.code.seal import META_LABEL
from storaged.objects.ports import BucketKey, SealBroken, pack_context
from storaged.objects.records import (
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

EMPTY = ObjectRecord(())


class Place(NamedTuple):
    """Where a version belongs: its sealed fields are bound to this."""

    bucket_id: bytes
    key: bytes

    def context(self, version_id: str, context_id: bytes) -> bytes:
        """Packed."""
        return pack_context(b"", (self.bucket_id, self.key, version_id.encode(), context_id))

    def context_of(self, version: Version) -> bytes:
        return self.context(version.version_id, version.context_id)


def decode_record(value: Value | None) -> ObjectRecord:
    """The versions of a key; none when it was never written or is deleted. Raises DataDamaged for a value that is not a
    record.
    """
    if value is None or value.visibility == Visibility.TOMBSTONE or not value.body:
        return EMPTY
    try:
        return decode_object(value.body)
    except msgspec.MsgspecError as error:
        raise DataDamaged(f"The record of this key cannot be read: {error}") from None


def record_change(record: ObjectRecord, payload: bytes = b"") -> Change:
    """The change of the register that stores these versions."""
    if not record.versions:
        return Change(b"", Visibility.TOMBSTONE)
    hidden = record.versions[0].delete_marker
    return Change(encode_object(record), Visibility.HIDDEN if hidden else Visibility.LIVE, payload)


def meta_of(new: NewMeta, etag: str, checksums: dict[str, str], checksum_type: str, size: int) -> SealedMeta:
    return SealedMeta(
        etag, dict(new.headers), dict(new.user), dict(new.tags), checksums, checksum_type, new.storage_class, size=size
    )


def seal_meta(dek: bytes, context: bytes, meta: SealedMeta, entropy: Entropy) -> bytes:
    return seal_message(dek, META_LABEL, context, encode(brief_meta(meta)), entropy(SALT_BYTES))


def seal_listing(key: BucketKey, context: bytes, meta: SealedMeta) -> bytes:
    """Seals the fields that a listing prints."""
    brief = brief_meta(meta)
    algorithm = next(iter(brief.checksums), "")
    return key.seal_list(encode(SealedList(meta.etag, algorithm, brief.checksum_type, meta.storage_class)), context)


class UnsealedVersion(Struct, frozen=True):
    """A new version without its sealed fields; the fields are those of ``Version``."""

    version_id: str
    context_id: bytes
    owner: str
    modified_ms: int
    parts: tuple[PartEntry, ...]
    manifest: bytes = b""
    multipart: bool = False
    part_count: int = 1
    pages: tuple[bytes, ...] = ()


def seal_version(
    place: Place, new: UnsealedVersion, key: BucketKey, dek: bytes, meta: SealedMeta, entropy: Entropy
) -> Version:
    """The version with its fields sealed under its data key ``dek`` and its context."""
    context, meta = place.context(new.version_id, new.context_id), brief_meta(meta)
    return Version(
        new.version_id,
        new.modified_ms,
        meta.size,
        new.owner,
        key.version,
        new.context_id,
        seal_listing(key, context, meta),
        False,
        key.wrap(dek, context),
        seal_meta(dek, context, meta, entropy),
        new.parts,
        new.manifest,
        new.multipart,
        new.part_count,
        new.pages,
    )


class OpenedVersion(NamedTuple):
    """A version with its secrets: the data key and the metadata."""

    version: Version
    dek: bytes
    meta: SealedMeta


def open_version(place: Place, version: Version, key: BucketKey) -> OpenedVersion:
    """Raises DataDamaged when the record does not open: then it is not what a gateway of this cluster wrote for this
    key.
    """
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
    """Opens the fields that a listing prints; about 1 us. Raises DataDamaged."""
    try:
        return decode(key.open_list(version.listing, place.context_of(version)), SealedList)
    except (SealBroken, msgspec.MsgspecError) as error:
        raise DataDamaged(f"The list field of a key does not open: {error}") from None


def info_of(key: bytes, opened: OpenedVersion, version_id: str, parts: tuple[SealedPart, ...]) -> ObjectInfo:
    """``version_id``: as clients name it."""
    version, meta = opened.version, opened.meta
    return ObjectInfo(
        key=key,
        version_id=version_id,
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

"""Versions of objects: seals into a record what a storage node must not read, and opens it again. Pure.

Contexts bind sealed fields to their place: the wrapped data key, the metadata and the list field of a version open only
for (bucket id, key, version id, context id). The context id is the data id of its body or the id of its upload.
"""

from __future__ import annotations

from typing import NamedTuple

import msgspec
from msgspec import Struct

from storaged.errors import DataDamaged, InvalidRequest, SlowDown
from storaged.ids import Entropy
from storaged.meta.names import Change, Value, Visibility
from storaged.objects.api import Allowed, NewMeta, ObjectAccess, ObjectInfo
from storaged.objects.brief import brief_meta, full_meta
from storaged.objects.code.customer import ContentKey, unwrap_key, without_checksums, wrap_key
from storaged.objects.code.seal import ENCRYPTED_META_LABEL, META_LABEL
from storaged.objects.conditions import OBJECT_CHANGED
from storaged.objects.configuration.access import Acl
from storaged.objects.encryption import CUSTOMER, NO_KEY, Encryption
from storaged.objects.ports import BucketKey, SealBroken, pack_context
from storaged.objects.records import (
    EncryptedMeta,
    Lock,
    ObjectRecord,
    PartEntry,
    SealedEncryption,
    SealedList,
    SealedMeta,
    SealedPart,
    Version,
    decode_object,
    encode_object,
    sharing_of,
)
from storaged.objects.sharing import Borrowed
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
        sharing = sharing_of(record)
        if record.history is not None and (record.history.outbox or sharing.loans or sharing.arrivals):
            # no row of a deleted key may go with its events, data that other keys read, or what has arrived
            return Change(encode_object(record), Visibility.HIDDEN)
        return Change(b"", Visibility.TOMBSTONE)
    hidden = record.versions[0].delete_marker
    return Change(encode_object(record), Visibility.HIDDEN if hidden else Visibility.LIVE, payload)


def meta_of(new: NewMeta, etag: str, checksums: dict[str, str], checksum_type: str, size: int) -> SealedMeta:
    return SealedMeta(
        etag,
        dict(new.headers),
        dict(new.user),
        dict(new.tags),
        checksums,
        checksum_type,
        new.storage_class,
        size=size,
        acl=new.acl.entries if new.acl is not None else None,
    )


def seal_meta(
    dek: bytes, context: bytes, meta: SealedMeta, encryption: SealedEncryption | None, entropy: Entropy
) -> bytes:
    """``encryption``: of the version; None with SSE-S3. With one the label is another, so that a gateway of an earlier
    version, which would lose it, can't open and change such metadata.
    """
    meta = brief_meta(meta)
    if encryption is None:
        return seal_message(dek, META_LABEL, context, encode(meta), entropy(SALT_BYTES))
    return seal_message(
        dek, ENCRYPTED_META_LABEL, context, encode(EncryptedMeta(meta, encryption)), entropy(SALT_BYTES)
    )


def open_meta(dek: bytes, context: bytes, sealed: bytes) -> tuple[SealedMeta, SealedEncryption | None]:
    """Raises SealBroken, msgspec.MsgspecError."""
    try:
        return full_meta(decode(open_message(dek, META_LABEL, context, sealed), SealedMeta)), None
    except SealBroken:
        plain = open_message(dek, ENCRYPTED_META_LABEL, context, sealed)
    meta, encryption = decode(plain, EncryptedMeta)
    return full_meta(meta), encryption


class RecordKey(NamedTuple):
    """The key that seals the metadata of a new version, and how the version is encrypted. ``content``: with SSE-C, the
    data key of its body; of other versions both are one key.
    """

    key: bytes
    encryption: SealedEncryption | None = None
    content: ContentKey | None = None


def record_key(place: Place, context_id: bytes, dek: bytes, asked: Encryption | None, entropy: Entropy) -> RecordKey:
    """``dek``: the data key of the body."""
    if asked is None:
        return RecordKey(dek)
    if asked.kind != CUSTOMER:
        return RecordKey(dek, SealedEncryption(asked.kind, asked.key_id, asked.bucket_key, asked.context))
    wrapped = wrap_key(asked.customer_key, place, context_id, dek, entropy)
    return RecordKey(entropy(len(dek)), SealedEncryption(CUSTOMER, wrapped=wrapped), ContentKey(dek))


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
    place: Place,
    new: UnsealedVersion,
    key: BucketKey,
    dek: bytes,
    meta: SealedMeta,
    entropy: Entropy,
    encryption: SealedEncryption | None = None,
) -> Version:
    """The version with its fields sealed under its data key ``dek`` (its record key with SSE-C) and its context."""
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
        seal_meta(dek, context, meta, encryption, entropy),
        new.parts,
        new.manifest,
        new.multipart,
        new.part_count,
        new.pages,
    )


class OpenedVersion(NamedTuple):
    """A version with its secrets: the key of its record, and the metadata. ``content``: the key of a body with SSE-C,
    once the customer's key was given (``unlock``); until then the checksums in ``meta`` are sealed. ``borrowed``: where
    the version has its data, if that is another key's (``read.borrowed``); then ``version`` has no parts.
    """

    version: Version
    dek: bytes
    meta: SealedMeta
    encryption: SealedEncryption | None = None
    content: ContentKey | None = None
    borrowed: Borrowed | None = None

    @property
    def has_customer_key(self) -> bool:
        return self.encryption is not None and self.encryption.kind == CUSTOMER

    @property
    def locked(self) -> bool:
        """The customer's key is missing."""
        return self.content is None and self.has_customer_key

    @property
    def body_dek(self) -> bytes:
        """The data key of the body, if it is not ``locked``; then what this returns opens nothing."""
        return self.dek if self.content is None else self.content.dek


def open_version(place: Place, version: Version, key: BucketKey) -> OpenedVersion:
    """Raises DataDamaged when the record does not open: then it is not what a gateway of this cluster wrote for this
    key.
    """
    context = place.context_of(version)
    try:
        dek = key.unwrap(version.wrapped_key, context)
        meta, encryption = open_meta(dek, context, version.meta)
    except (SealBroken, msgspec.MsgspecError) as error:
        raise DataDamaged(f"The record of this key does not open: {error}") from None
    if meta.size != version.size:
        raise DataDamaged(f"The record of this key says {version.size} bytes, what is sealed in it {meta.size}.")
    return OpenedVersion(version, dek, meta, encryption)


KEY_MISSING = (
    "The object was stored using a form of Server Side Encryption. The correct parameters must be provided to retrieve"
    " the object."
)
KEY_WRONG = "The provided encryption parameters did not match the ones used originally."
KEY_UNWANTED = "The encryption parameters are not applicable to this object."


def unlock(place: Place, opened: OpenedVersion, customer_key: bytes) -> OpenedVersion:
    """The version with the key of its body, and its checksums in the clear; what this returns must not be cached.
    ``customer_key``: NO_KEY when the request has none. Raises InvalidRequest when it needs a key, this one is wrong,
    or it has no use for one.
    """
    if not opened.has_customer_key:
        if customer_key != NO_KEY:
            raise InvalidRequest(KEY_UNWANTED)
        return opened
    content = content_key(place, opened.version.context_id, opened.encryption, customer_key)
    try:
        checksums = content.open(opened.meta.checksums, opened.version.context_id)
    except SealBroken as error:
        raise DataDamaged(f"The checksums of this key do not open: {error}") from None
    return opened._replace(meta=msgspec.structs.replace(opened.meta, checksums=checksums), content=content)


def content_key(
    place: Place, context_id: bytes, encryption: SealedEncryption | None, customer_key: bytes
) -> ContentKey:
    """The data key that a customer's key wraps. Raises InvalidRequest when it is missing or wrong."""
    if customer_key == NO_KEY or encryption is None:
        raise InvalidRequest(KEY_MISSING)
    try:
        return ContentKey(unwrap_key(customer_key, place, context_id, encryption.wrapped))
    except SealBroken:
        raise InvalidRequest(KEY_WRONG) from None


def shown(encryption: SealedEncryption | None) -> Encryption | None:
    """The encryption of a version, as answers name it."""
    if encryption is None:
        return None
    return Encryption(encryption.kind, encryption.key_id, encryption.bucket_key, encryption.context)


def open_listing(place: Place, version: Version, key: BucketKey) -> SealedList:
    """Opens the fields that a listing prints; about 1 us. Raises DataDamaged."""
    try:
        return decode(key.open_list(version.listing, place.context_of(version)), SealedList)
    except (SealBroken, msgspec.MsgspecError) as error:
        raise DataDamaged(f"The list field of a key does not open: {error}") from None


def parts_shown(opened: OpenedVersion, parts: tuple[SealedPart, ...]) -> tuple[SealedPart, ...]:
    """The parts with their checksums, as far as these are open. Raises DataDamaged."""
    if opened.encryption is None or not opened.has_customer_key:
        return parts
    if opened.content is None:
        return without_checksums(parts)
    try:
        return opened.content.open_parts(parts, next(iter(opened.meta.checksums), ""))
    except SealBroken as error:
        raise DataDamaged(f"The checksums of a part do not open: {error}") from None


def access_to(opened: OpenedVersion) -> ObjectAccess:
    """What a decision about access needs to know of a version."""
    meta = opened.meta
    return ObjectAccess(opened.version.owner, Acl(meta.acl) if meta.acl is not None else None, meta.tags, meta.etag)


def access_of(info: ObjectInfo) -> ObjectAccess:
    """As ``access_to``."""
    return ObjectAccess(info.owner, info.acl, info.tags, info.etag)


def check_allowed(found: ObjectAccess, allowed: Allowed) -> None:
    """Raises SlowDown for another object than the call was allowed for."""
    if allowed is not None and found != allowed:
        raise SlowDown(OBJECT_CHANGED)


def info_of(
    key: bytes, opened: OpenedVersion, version_id: str, parts: tuple[SealedPart, ...], lock: Lock | None
) -> ObjectInfo:
    """``version_id``: as clients name it. ``parts``: as ``parts_shown`` returned them."""
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
        checksums=meta.checksums if opened.encryption is None or not opened.locked else {},
        checksum_type=meta.checksum_type,
        storage_class=meta.storage_class,
        part_count=len(parts),
        parts=parts,
        owner=version.owner,
        delete_marker=version.delete_marker,
        encryption=None if opened.encryption is None else shown(opened.encryption),
        acl=Acl(meta.acl) if meta.acl is not None else None,
        lock=lock,
    )

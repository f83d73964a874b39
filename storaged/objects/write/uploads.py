"""An upload's register and its parts' rows: how their contents are opened and sealed."""

from __future__ import annotations

import base64
import binascii
from collections.abc import AsyncIterator, Callable, Sequence
from typing import NamedTuple, TypeVar

import msgspec

from storaged.errors import DataDamaged, InvalidRequest, NoSuchUpload
from storaged.ids import UPLOAD_ID_BYTES
from storaged.meta.listing.merge import every_row
from storaged.meta.names import Change, RegisterName, Table, Value, Visibility, upload_name
from storaged.meta.ports import PageQuery, Row, Scanner
from storaged.objects.api import DEFAULT_ALGORITHM, UploadInfo
from storaged.objects.code.customer import ContentKey, without_checksums
from storaged.objects.code.manifest import checked
from storaged.objects.code.versions import KEY_UNWANTED, Place, content_key, open_meta, shown
from storaged.objects.encryption import CUSTOMER, NO_KEY
from storaged.objects.plane import ObjectPlane
from storaged.objects.ports import BucketKey, SealBroken, pack_context
from storaged.objects.records import BucketRecord, SealedEncryption, SealedMeta, SealedPart
from storaged.objects.upload_records import PartRecord, UploadRecord
from storaged.sov1 import SALT_BYTES, derive_key, open_message, seal_message
from storaged.wire import Message, decode, encode

T = TypeVar("T")

OPEN, COMPLETING, DONE, ABORTED = "open", "completing", "done", "aborted"

PART_LABEL = "sov.partmeta.v1"
RESULT_LABEL = "sov.result.v1"
REQUEST_LABEL = "sov.request.v1"
_KEYED = b"\x01"
"""First byte of a keyed digest of a request, which has 33 bytes. Old digests have 32 bytes: a bare SHA-256, which can
be computed from content.
"""
_BARE_DIGEST_BYTES = 32
UPLOAD_VERSION = "\0upload"
"""In place of a version id in the context of an upload's key; no version has this id."""


class CompleteResult(Message, frozen=True):
    """The answer of Complete, sealed in ``UploadRecord.result`` (label ``sov.result.v1``)."""

    etag: str
    version_id: str
    size: int
    checksums: dict[str, str]
    checksum_type: str
    modified_ms: int


class OpenedUpload(NamedTuple):
    """An upload with its secrets, which are bound to ``place`` and ``record.upload_id``."""

    name: RegisterName
    place: Place
    record: UploadRecord
    key: BucketKey
    dek: bytes
    meta: SealedMeta
    encryption: SealedEncryption | None = None

    @property
    def has_customer_key(self) -> bool:
        return self.encryption is not None and self.encryption.kind == CUSTOMER

    def content_key(self, customer_key: bytes) -> ContentKey | None:
        """The data key of the parts' bodies with SSE-C; None: it is ``dek``. Raises InvalidRequest when the customer's
        key is not the one that the upload was created with.
        """
        if self.has_customer_key:
            return content_key(self.place, self.record.context_id, self.encryption, customer_key)
        if customer_key != NO_KEY:
            raise InvalidRequest(KEY_UNWANTED)
        return None

    @property
    def info(self) -> UploadInfo:
        record = self.record
        return UploadInfo(
            self.place.key,
            upload_text(record.upload_id),
            record.created_ms,
            record.owner,
            self.meta.storage_class,
            record.checksum_algorithm,
            record.checksum_type,
            shown(self.encryption),
            record.initiator or record.owner,
        )

    def part_context(self, data_id: bytes) -> bytes:
        return pack_context(self.place.context(UPLOAD_VERSION, self.record.upload_id), [data_id])

    def seal_part(self, plane: ObjectPlane, data_id: bytes, part: SealedPart) -> bytes:
        return seal_message(self.dek, PART_LABEL, self.part_context(data_id), encode(part), plane.entropy(SALT_BYTES))

    def open_part(self, row: PartRecord) -> SealedPart:
        """Takes about 30 us. Raises DataDamaged, also for a row whose number, size or data differs from the sealed."""
        part = _opened(self.dek, PART_LABEL, self.part_context(row.entry.data_id), row.sealed, SealedPart)
        if not part.names(row.entry):
            raise DataDamaged("The row of a part says otherwise than what is sealed in it.")
        return part

    def keyed(self, request: bytes) -> bytes:
        """The form in which the digest of a Complete (SHA-256, 32 bytes) is stored: without the upload's key it reveals
        nothing about the parts.
        """
        context = self.place.context(UPLOAD_VERSION, self.record.upload_id)
        return _KEYED + derive_key(self.dek, REQUEST_LABEL, context + request)

    def renewed(self, record: UploadRecord) -> UploadRecord:
        """The record of this upload with its digest keyed, if it was bare."""
        bare = record.request_digest
        if len(bare) != _BARE_DIGEST_BYTES:
            return record
        return msgspec.structs.replace(record, request_digest=self.keyed(bare))

    def seal_result(self, plane: ObjectPlane, result: CompleteResult) -> bytes:
        context = self.place.context(UPLOAD_VERSION, self.record.upload_id)
        return seal_message(self.dek, RESULT_LABEL, context, encode(result), plane.entropy(SALT_BYTES))

    def open_result(self) -> CompleteResult:
        """Raises DataDamaged."""
        context = self.place.context(UPLOAD_VERSION, self.record.upload_id)
        return _opened(self.dek, RESULT_LABEL, context, self.record.result, CompleteResult)


def _opened(dek: bytes, label: str, context: bytes, sealed: bytes, kind: type[T]) -> T:
    try:
        return decode(open_message(dek, label, context, sealed), kind)
    except (SealBroken, msgspec.MsgspecError) as error:
        raise DataDamaged(f"What is sealed in an upload's record does not open: {error}") from None


def parts_opener(upload: OpenedUpload, customer_key: bytes) -> Callable[[Sequence[SealedPart]], Sequence[SealedPart]]:
    """A function that opens the checksums of parts. Of an upload with SSE-C parts have none without the customer's key.
    Raises InvalidRequest for a wrong key; the function raises DataDamaged.
    """
    if upload.has_customer_key and customer_key == NO_KEY:
        return without_checksums
    content, algorithm = upload.content_key(customer_key), upload.record.checksum_algorithm or DEFAULT_ALGORITHM
    if content is None:
        return lambda parts: parts

    def opened(parts: Sequence[SealedPart]) -> Sequence[SealedPart]:
        try:
            return content.open_parts(parts, algorithm)
        except SealBroken as error:
            raise DataDamaged(f"The checksum of a part does not open: {error}") from None

    return opened


def upload_text(upload_id: bytes) -> str:
    """URL-safe base64 of the 16 bytes, without padding."""
    return base64.urlsafe_b64encode(upload_id).decode().rstrip("=")


def parse_upload_id(text: str) -> bytes:
    """Raises NoSuchUpload for a text that can't be an upload id."""
    try:
        raw = base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
    except (binascii.Error, ValueError):
        raise NoSuchUpload(UploadId=text) from None
    if len(raw) != UPLOAD_ID_BYTES or upload_text(raw) != text:
        raise NoSuchUpload(UploadId=text)
    return raw


def decode_upload(value: Value | None) -> UploadRecord | None:
    """None: there is no such upload, or no longer. Raises DataDamaged."""
    if value is None or value.visibility == Visibility.TOMBSTONE or not value.body:
        return None
    try:
        record = decode(value.body, UploadRecord)
    except msgspec.MsgspecError as error:
        raise DataDamaged(f"The record of this upload cannot be read: {error}") from None
    if len(record.upload_id) != UPLOAD_ID_BYTES:
        raise DataDamaged("The record of this upload names none.")
    return record


def upload_of_row(row: Row) -> UploadRecord | None:
    """The record in a row of the UPLOAD table; None as ``decode_upload``. Raises DataDamaged, also for a row with
    another upload's record: operations on an upload's parts use the id in its record.
    """
    record = decode_upload(row.value)
    if record is not None and row.key[-UPLOAD_ID_BYTES - 1 :] != b"\0" + record.upload_id:
        raise DataDamaged("The record of this upload is not the one of its row.")
    return record


class LivingUpload(NamedTuple):
    """An upload that may still become the object ``key``."""

    key: bytes
    record: UploadRecord
    value: Value
    """The row's value; ``record`` is its body."""


def living_upload(row_key: bytes, value: Value) -> LivingUpload | None:
    """The upload in a row of the UPLOAD table; None when it has ended. Raises DataDamaged, also for a row with another
    upload's record.
    """
    record = decode_upload(value)
    if record is None or record.state not in (OPEN, COMPLETING):
        return None
    key = row_key[: -UPLOAD_ID_BYTES - 1]
    if row_key != key + b"\0" + record.upload_id:
        raise DataDamaged("The record of this upload is not the one of its row.")
    return LivingUpload(key, record, value)


async def living_uploads(scanner: Scanner, owner: RegisterName) -> AsyncIterator[LivingUpload]:
    """Uploads that may still become the object of ``owner``. Raises ServiceUnavailable, DataDamaged."""
    async for row in every_row(scanner, PageQuery(Table.UPLOAD, owner.scope, [owner.shard], prefix=owner.key + b"\0")):
        upload = living_upload(row.key, row.value)
        if upload is not None and upload.key == owner.key:
            yield upload


async def open_upload(plane: ObjectPlane, bucket: BucketRecord, key: bytes, upload_id: str) -> OpenedUpload:
    """An upload in any state. Raises NoSuchUpload, DataDamaged."""
    raw = parse_upload_id(upload_id)
    if raw[0] not in bucket.shard_numbers:
        raise NoSuchUpload(UploadId=upload_id)
    name = upload_name(bucket.id, key, raw)
    record = decode_upload((await plane.registers.read(name)).value)
    if record is None:
        raise NoSuchUpload(UploadId=upload_id)
    return await unseal_upload(plane, bucket, key, name, record)


async def look_upload(plane: ObjectPlane, bucket: BucketRecord, key: bytes, upload_id: str) -> UploadInfo | None:
    """See ``api.Objects``."""
    try:
        upload = await open_upload(plane, bucket, key, upload_id)
    except NoSuchUpload:
        return None
    return upload.info if upload.record.state in (OPEN, COMPLETING) else None


async def unseal_upload(
    plane: ObjectPlane, bucket: BucketRecord, key: bytes, name: RegisterName, record: UploadRecord
) -> OpenedUpload:
    """Raises DataDamaged."""
    place = Place(bucket.id, key)
    bucket_key = await plane.keys.bucket_key(bucket.id, bucket.countries, record.bucket_key)
    context = place.context(UPLOAD_VERSION, record.upload_id)
    try:
        dek = bucket_key.unwrap(record.wrapped_key, context)
        meta, encryption = open_meta(dek, context, record.meta)
    except (SealBroken, msgspec.MsgspecError) as error:
        raise DataDamaged(f"The record of this upload does not open: {error}") from None
    return OpenedUpload(name, place, record, bucket_key, dek, meta, encryption)


def has_bare_digest(record: UploadRecord) -> bool:
    """Whether an old record still has a bare digest of its parts, with which a storage node could test guesses."""
    return len(record.request_digest) == _BARE_DIGEST_BYTES


async def renew_digest(plane: ObjectPlane, upload: OpenedUpload) -> None:
    """Keys the bare digest of an old record. Does nothing to other records."""
    if not has_bare_digest(upload.record):
        return

    def update(value: Value | None) -> Change | None:
        record = decode_upload(value)
        if value is None or record is None or not has_bare_digest(record):
            return None
        return Change(encode(upload.renewed(record)), value.visibility)

    await plane.registers.change(upload.name, update)


def decode_part(row: Row) -> PartRecord:
    """Raises DataDamaged."""
    try:
        record = decode(row.value.body, PartRecord)
    except msgspec.MsgspecError as error:
        raise DataDamaged(f"The record of a part cannot be read: {error}") from None
    checked(record.entry)
    return record


async def part_rows(scanner: Scanner, scope: bytes, upload_id: bytes, *, after: int = 0) -> AsyncIterator[PartRecord]:
    """The parts of an upload with a number > ``after``, in order. Raises DataDamaged."""
    start = upload_id + after.to_bytes(2, "big")
    async for row in every_row(scanner, PageQuery(Table.PART, scope, [upload_id[0]], prefix=upload_id, after=start)):
        yield decode_part(row)

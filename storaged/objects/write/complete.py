"""Completing a multipart upload: the parts' entries move from their rows into the object's record; no data moves.

Theory of operation. A Complete has three durable steps. It pins the version that it will make in the upload's register
(Completing). It changes the object's register under the conditions. It marks the upload Done, with the answer, which is
kept for repeats.

A Complete that another gateway resumes, or that the client repeats, makes the pinned version. When a resumed Complete
finds that the object changed since the pin, and does not hold the version, it can't know whether the first attempt took
effect and was overwritten. Then it reopens the upload and reports a conflict.

An abort changes the upload first and settles the object after that. A Complete looks between its promise on the object
and its accept whether the upload is still Completing. So exactly one of the two wins.

Of equal requests at the same time, the one that pins first makes the object. The others wait for its answer, up to a
second, and then resume it as above, so that all of them give the same answer. A request that names other parts waits as
long, and is then refused.
"""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import msgspec

from storaged.errors import (
    ConditionalRequestConflict,
    DataDamaged,
    EntityTooLarge,
    InvalidRequest,
    NoSuchKey,
    NoSuchUpload,
    OutcomeUnknown,
    PreconditionFailed,
    ServiceUnavailable,
    SlowDown,
)
from storaged.fragments.ports import OF_UPLOAD
from storaged.meta.names import Change, RegisterName, Value, Visibility, object_name
from storaged.objects.api import NO_WRITE_CONDITIONS, CompletedPart, PutResult, WriteConditions
from storaged.objects.bucket_keys import BucketKeys, judged
from storaged.objects.code.customer import ContentKey
from storaged.objects.code.history import Draft, Entry, unversioned
from storaged.objects.code.manifest import renew_pages, write_manifest, write_sealed_parts
from storaged.objects.code.version_walk import every_entry
from storaged.objects.code.versions import UnsealedVersion, decode_record, open_version, seal_version, shown
from storaged.objects.conditions import OBJECT_CHANGED, check_write
from storaged.objects.configuration.kinds import ENABLED
from storaged.objects.encryption import NO_KEY
from storaged.objects.pending_events import Origin
from storaged.objects.plane import ObjectPlane
from storaged.objects.ports import SealBroken
from storaged.objects.records import (
    NAMED_VERSION,
    NULL_VERSION,
    PARTS_INLINE_MAX,
    BucketRecord,
    Kept,
    SealedMeta,
    SealedPart,
    Version,
    decode_version,
)
from storaged.objects.upload_records import PartRecord, UploadRecord
from storaged.objects.write.checksums import multipart_etag
from storaged.objects.write.chosen_parts import Rows, checksums_of, chosen_parts
from storaged.objects.write.commit import change_once
from storaged.objects.write.complete_request import CompleteRequest, content_of, request_digest
from storaged.objects.write.loans import retire_gone
from storaged.objects.write.locks import lock_of_new
from storaged.objects.write.outbox import Outgoing
from storaged.objects.write.outbox import outgoing as outgoing_of
from storaged.objects.write.put import check_early
from storaged.objects.write.retire import retire_parts
from storaged.objects.write.uploads import (
    COMPLETING,
    DONE,
    OPEN,
    CompleteResult,
    OpenedUpload,
    decode_upload,
    open_upload,
    part_rows,
    parts_opener,
    renew_digest,
    upload_text,
)
from storaged.objects.write.versioned import Gone, VersionsUpdate, unlocked
from storaged.wire import encode

ATTEMPTS_MAX = 12
WAITS_MAX = 6
"""Waits of 0.01 to 0.02 s, doubled each time: up to 1.3 s for another request that completes the same upload."""


class _Moved(Exception):
    """The object changed since the version was pinned, and does not hold it."""


class _Overtaken(Exception):
    """Another request has pinned, reopened or finished the upload: its record must be read again."""


async def complete(
    plane: ObjectPlane,
    bucket: BucketRecord,
    key: bytes,
    upload_id: str,
    parts: Sequence[CompletedPart],
    *,
    owner: str,
    checksums: Mapping[str, str] | None = None,
    checksum_type: str = "",
    declared_size: int | None = None,
    conditions: WriteConditions = NO_WRITE_CONDITIONS,
    customer_key: bytes = NO_KEY,
    origin: Origin | None = None,
) -> PutResult:
    """Makes an object of an upload's parts. A repeat of a Complete that succeeded returns the same result.

    Raises NoSuchUpload, MalformedXML (no parts), InvalidPart, InvalidPartOrder, EntityTooSmall, EntityTooLarge,
    BadDigest, InvalidRequest, ConditionalRequestConflict, SlowDown, OutcomeUnknown, and as the conditions do.
    """
    request = CompleteRequest(
        parts, owner, checksums or {}, checksum_type, declared_size, conditions, customer_key, origin
    )
    bare = request_digest(request)
    waits = 0
    for _ in range(ATTEMPTS_MAX):
        upload = await open_upload(plane, bucket, key, upload_id)
        record, digest = upload.record, upload.keyed(bare)
        equal = hmac.compare_digest(upload.renewed(record).request_digest, digest)
        if record.state == DONE and equal:
            await renew_digest(plane, upload)
            return _answer(plane, bucket, upload, upload.open_result(), content_of(upload, request))
        if record.state not in (OPEN, COMPLETING):
            raise NoSuchUpload(UploadId=upload_id)
        if record.state == COMPLETING and waits < WAITS_MAX:
            await asyncio.sleep(0.01 * 2**waits * (1 + plane.entropy(1)[0] / 255))
            waits += 1
            continue
        if not equal and record.state == COMPLETING:
            raise ConditionalRequestConflict(
                "Another request is completing this upload with other parts. Retry when it has ended."
            )
        try:
            return await _complete_once(plane, bucket, upload, request, digest)
        except _Overtaken:
            continue
    raise SlowDown("Others complete this upload all the time. Please reduce your request rate.")


async def _complete_once(
    plane: ObjectPlane, bucket: BucketRecord, upload: OpenedUpload, request: CompleteRequest, digest: bytes
) -> PutResult:
    """Pins, or resumes what is pinned, and commits. ``digest``: of the request, keyed. Raises _Overtaken, and as
    ``complete``.
    """
    name, keys = object_name(bucket.id, bucket.shard_numbers, upload.place.key), BucketKeys(plane, bucket)
    resumed = upload.record.state == COMPLETING
    content = content_of(upload, request)
    rows = await _rows(plane, bucket, upload, request.customer_key)
    if not resumed:
        await check_early(plane, name, upload.place, keys, request.conditions)
        chosen = await plane.in_thread(chosen_parts, plane.limits, rows, request.parts, upload.record)
        version = await _make_version(plane, bucket, name, upload, chosen, request, content)
        upload = upload._replace(record=await _pin(plane, name, upload, version, digest))
    version = decode_version(upload.record.pinned)
    try:
        committed = await _commit(plane, bucket, name, keys, upload, version, request, resumed=resumed)
    except (PreconditionFailed, NoSuchKey, SlowDown) as error:
        if not isinstance(error, SlowDown) or error.message == OBJECT_CHANGED:  # else it may have taken effect
            await _reopen(plane, upload)
        raise
    except _Moved:
        await plane.registers.settle(name)
        if await _reopen(plane, upload) not in (OPEN, COMPLETING):
            raise _Overtaken from None
        raise ConditionalRequestConflict(
            "The object changed while this upload was being completed. Read it, then retry or abort."
        ) from None
    retire_gone(plane, bucket, name, committed.removed)
    if not bucket.plain:
        plane.notes.changed(bucket, upload.place.key, version.size, version.modified_ms, upload.meta.tags)
    try:
        result = await _done(plane, bucket, upload, version, committed.version_id)
    except (ServiceUnavailable, SlowDown):  # these errors say that nothing was changed
        raise OutcomeUnknown(
            "The object was made, but that can't be noted now. Retry: the same request gets its answer."
        ) from None
    named = {part.number for part in request.parts}
    unused = [row.entry for number, (row, _) in rows.items() if number not in named]
    if unused:
        origin = OF_UPLOAD + upload.record.upload_id
        plane.background.spawn(retire_parts(plane, bucket, name, unused, origin))
    return _answer(plane, bucket, upload, result, content)


def _answer(
    plane: ObjectPlane,
    bucket: BucketRecord,
    upload: OpenedUpload,
    result: CompleteResult,
    content: ContentKey | None,
) -> PutResult:
    """Raises DataDamaged."""
    checksums = {} if upload.has_customer_key else result.checksums
    if content is not None:
        try:
            checksums = content.open(result.checksums, upload.record.context_id)
        except SealBroken as error:
            raise DataDamaged(f"The checksums of this upload do not open: {error}") from None
    return PutResult(
        result.etag,
        result.version_id if result.version_id != NULL_VERSION else "",
        result.size,
        checksums,
        result.checksum_type,
        result.modified_ms,
        shown(upload.encryption),
        upload.meta.tags,
    )


async def _rows(plane: ObjectPlane, bucket: BucketRecord, upload: OpenedUpload, customer_key: bytes) -> Rows:
    rows = [row async for row in part_rows(plane.scanner, bucket.id, upload.record.upload_id)]
    open_checksums = parts_opener(upload, customer_key)
    opened = await plane.in_thread(lambda: open_checksums([upload.open_part(row) for row in rows]))
    return {row.entry.number: (row, part) for row, part in zip(rows, opened, strict=True)}


async def _make_version(
    plane: ObjectPlane,
    bucket: BucketRecord,
    name: RegisterName,
    upload: OpenedUpload,
    chosen: Sequence[tuple[PartRecord, SealedPart]],
    request: CompleteRequest,
    content: ContentKey | None,
) -> Version:
    """The version of these parts. Its pages are durable when this returns. Raises EntityTooLarge, InvalidRequest,
    BadDigest.
    """
    parts = [part for _, part in chosen]
    size = sum(part.size for part in parts)
    if size > plane.limits.object_bytes_max:
        raise EntityTooLarge(MaxSizeAllowed=str(plane.limits.object_bytes_max), ProposedSize=str(size))
    if request.declared_size is not None and request.declared_size != size:
        raise InvalidRequest(f"The parts have {size} bytes; x-amz-mp-object-size says {request.declared_size}.")
    # 50 ms for 10,000 parts
    found, kind = await plane.in_thread(checksums_of, upload.record, parts, request.checksums, request.checksum_type)
    if content is not None:
        algorithm, entropy = next(iter(found), ""), plane.entropy
        found = content.seal(found, upload.record.context_id, entropy)
        parts = await plane.in_thread(lambda: [content.seal_part(part, algorithm, entropy) for part in parts])
    manifest = await write_manifest(plane.pages, name, [row.entry for row, _ in chosen])
    etag = multipart_etag([part.etag for part in parts])
    meta = msgspec.structs.replace(upload.meta, etag=etag, checksums=found, checksum_type=kind, size=size)
    version_id = NAMED_VERSION if plane.versioning(bucket) == ENABLED else NULL_VERSION
    meta, sealed_pages = await _with_parts(plane, name, upload, version_id, meta, parts)
    new = UnsealedVersion(
        version_id,
        upload.record.upload_id,
        upload.record.owner or request.owner,
        plane.clock.wall_ms(),
        manifest.parts,
        manifest.first,
        multipart=True,
        part_count=len(parts),
        pages=manifest.pages + sealed_pages,
    )
    return seal_version(upload.place, new, upload.key, upload.dek, meta, plane.entropy, upload.encryption)


async def _with_parts(
    plane: ObjectPlane,
    name: RegisterName,
    upload: OpenedUpload,
    version_id: str,
    meta: SealedMeta,
    parts: Sequence[SealedPart],
) -> tuple[SealedMeta, tuple[bytes, ...]]:
    """Metadata with the list of parts, which is sealed in pages of its own when it is long; and the hashes of these."""
    if len(parts) <= PARTS_INLINE_MAX:
        return msgspec.structs.replace(meta, parts=tuple(parts)), ()
    context = upload.place.context(version_id, upload.record.upload_id)
    pages = await write_sealed_parts(plane.pages, name, upload.dek, context, parts, plane.entropy)
    return msgspec.structs.replace(meta, parts_page=pages[0]), pages


async def _pin(
    plane: ObjectPlane, name: RegisterName, upload: OpenedUpload, version: Version, digest: bytes
) -> UploadRecord:
    """Open -> Completing. Raises NoSuchUpload, _Overtaken."""
    before = (await plane.registers.read(name)).value
    sequence = before.sequence if before is not None else 0

    def update(value: Value | None) -> Change:
        record = decode_upload(value)
        if record is None or record.state not in (OPEN, COMPLETING, DONE):
            raise NoSuchUpload(UploadId=upload_text(upload.record.upload_id))
        if record.state != OPEN:
            raise _Overtaken
        pinned = msgspec.structs.replace(
            record,
            state=COMPLETING,
            request_digest=digest,
            pinned=encode(version),
            pinned_sequence=sequence,
            changed_ms=plane.clock.wall_ms(),
        )
        return Change(encode(pinned))

    record = decode_upload((await plane.registers.change(upload.name, update)).after)
    assert record is not None
    return record


async def _reopen(plane: ObjectPlane, upload: OpenedUpload) -> str:
    """Completing -> Open, after a condition did not hold: the client may abort, or complete again. Returns the state
    that the upload had.
    """
    found = ""

    def update(value: Value | None) -> Change | None:
        nonlocal found
        record = decode_upload(value)
        found = record.state if record is not None else ""
        if record is None or record.state != COMPLETING or record.pinned != upload.record.pinned:
            return None
        opened = msgspec.structs.replace(
            record, state=OPEN, request_digest=b"", pinned=b"", pinned_sequence=0, changed_ms=plane.clock.wall_ms()
        )
        return Change(encode(opened))

    await plane.registers.change(upload.name, update)
    return found


class _Committed(NamedTuple):
    """``version_id``: as clients name it. ``removed``: what the version replaced."""

    version_id: str
    removed: Gone


class _Placing:
    """Puts the pinned version into the object's record: the only one, or the newest in a bucket with versioning."""

    def __init__(
        self,
        plane: ObjectPlane,
        bucket: BucketRecord,
        keys: BucketKeys,
        upload: OpenedUpload,
        version: Version,
        conditions: WriteConditions,
        outgoing: Outgoing | None,
        *,
        resumed: bool,
    ) -> None:
        self._outgoing = outgoing
        self._versioning = plane.versioning(bucket)
        self._keys = keys
        self._upload = upload
        self._version = version
        self._conditions = conditions
        self._resumed = resumed
        self._lock = lock_of_new(plane, bucket, upload.record.lock)
        self.change = VersionsUpdate(keys.shelf, self._edit, check=unlocked(plane))
        self.version_id = NULL_VERSION
        self._value: Value | None = None

    def update(self, value: Value | None) -> Change | None:
        """Raises _Moved, KeyNeeded, PageNeeded, DataDamaged, and as the conditions do."""
        self._value = value
        return self.change.update(value)

    def _edit(self, draft: Draft, ordinal: int) -> bool:
        upload, value, version = self._upload, self._value, self._version
        if self._outgoing is not None:
            self._outgoing.begin()
        pinned = upload.record.pinned_sequence
        there = draft.made_of(version.context_id, pinned)
        if there is not None:
            self.version_id = there.name
            return False
        if self._resumed and (value.sequence if value is not None else 0) != pinned:
            raise _Moved
        newest = draft.newest.version if draft.newest is not None else None
        conditions = self._conditions
        check_write(conditions, judged(upload.place, newest, self._keys, conditions))
        if self._versioning or draft.has_history or version.version_id != NULL_VERSION:
            entry = Entry(Kept(ordinal, self._lock), version)
        else:
            for before in draft.inline:
                draft.remove(before)
            entry = unversioned(version)
        draft.add(entry)
        self.version_id = entry.name
        if self._outgoing is not None:
            etag = open_version(upload.place, version, upload.key).meta.etag
            self._outgoing.add(draft, ordinal, size=version.size, etag=etag, version=entry.name)
        return True


async def _commit(
    plane: ObjectPlane,
    bucket: BucketRecord,
    name: RegisterName,
    keys: BucketKeys,
    upload: OpenedUpload,
    version: Version,
    request: CompleteRequest,
    *,
    resumed: bool,
) -> _Committed:
    """Puts the version into the object's record, once, however often this is tried. ``upload``: with the pin as its
    record. ``resumed``: an earlier attempt pinned the version. Raises _Moved, _Overtaken, and as ``complete``.
    """
    outgoing = await outgoing_of(plane, bucket, name, request.origin) if request.origin is not None else None
    placing = _Placing(plane, bucket, keys, upload, version, request.conditions, outgoing, resumed=resumed)

    async def after_promise() -> None:
        await _still_completing(plane, name, upload, version)
        await placing.change.put_pages(plane.pages, name)
        if outgoing is not None:
            await outgoing.note()

    await change_once(plane, keys, name, placing.update, after_promise)
    if outgoing is not None:
        outgoing.committed()
    return _Committed(placing.version_id, placing.change.removed)


async def _still_completing(plane: ObjectPlane, name: RegisterName, upload: OpenedUpload, version: Version) -> None:
    """Looks at the upload after the object's replicas have promised: see the theory of operation. Then it renews the
    pages of the manifest, so that the sweep of pages spares them, or finds out that one is gone.

    When the upload is Done and the record lacks the version, another request has put it there, and it was deleted or
    overwritten since: it must not come back. Raises NoSuchUpload, _Overtaken,
    DataDamaged, ServiceUnavailable.
    """
    record = decode_upload((await plane.registers.read(upload.name)).value)
    if record is None or record.state not in (OPEN, COMPLETING, DONE):
        raise NoSuchUpload(UploadId=upload_text(upload.record.upload_id))
    if record.state != COMPLETING or record.pinned != upload.record.pinned:
        raise _Overtaken
    await renew_pages(plane.pages, name, version.pages)


async def _done(
    plane: ObjectPlane, bucket: BucketRecord, upload: OpenedUpload, version: Version, version_id: str
) -> CompleteResult:
    """Completing (or Aborted, when the abort came too late) -> Done."""
    meta = open_version(
        upload.place, version, await plane.keys.bucket_key(bucket.id, bucket.countries, version.bucket_key)
    ).meta
    result = CompleteResult(
        meta.etag, version_id, version.size, meta.checksums, meta.checksum_type, version.modified_ms
    )
    sealed = upload.seal_result(plane, result)

    def update(value: Value | None) -> Change | None:
        record = decode_upload(value)
        if record is None or record.state == DONE:
            return None
        done = msgspec.structs.replace(
            upload.renewed(record), state=DONE, result=sealed, pinned=b"", changed_ms=plane.clock.wall_ms()
        )
        return Change(encode(done), Visibility.HIDDEN)

    await plane.registers.change(upload.name, update)
    return result


async def finish(plane: ObjectPlane, bucket: BucketRecord, upload: OpenedUpload) -> bool:
    """For an abort that met a Complete. Returns whether the Complete took effect; then the upload becomes Done."""
    name = object_name(bucket.id, bucket.shard_numbers, upload.place.key)
    record = decode_record(await plane.registers.settle(name))
    version = decode_version(upload.record.pinned)
    async for entry in every_entry(plane.pages, name, record):
        if entry.version.context_id == version.context_id:
            await _done(plane, bucket, upload, version, entry.name)
            return True
        if entry.ordinal and entry.ordinal <= upload.record.pinned_sequence:
            break
    return False

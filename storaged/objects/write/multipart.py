"""Multipart uploads without Complete (``complete``): a register for the upload, and one for each part.

    Open -> Completing(pinned version) -> Done(result)
    Open | Completing -> Aborted

Each attempt at a part has its own data id, so that a superseded or interrupted attempt shares no data with the one that
counts. Fragments of parts name the *object's* register as their owner, because the parts end there. Before that,
``references`` finds them through the upload's rows.
"""

from __future__ import annotations

import asyncio
from collections.abc import Set

import msgspec
import structlog

from storaged.errors import DataDamaged, InvalidArgument, InvalidRange, InvalidRequest, NoSuchUpload, StoragedError
from storaged.fragments.ports import OF_UPLOAD, RETIREMENTS_MAX
from storaged.ids import DATA_ID_BYTES, new_upload_id
from storaged.meta.listing.merge import ROWS_A_PAGE, every_row
from storaged.meta.names import (
    Change,
    RegisterName,
    Table,
    Value,
    Visibility,
    object_name,
    part_name,
    shard_of,
    upload_name,
)
from storaged.meta.ports import PageQuery, Row
from storaged.objects.api import (
    CHECKSUM_ALGORITHMS,
    DEFAULT_ALGORITHM,
    Body,
    BodyChecks,
    CopySource,
    NewMeta,
    PartInfo,
    PutResult,
    UploadInfo,
)
from storaged.objects.bucket_keys import BucketKeys
from storaged.objects.code.lifecycle import rules_of, upload_due
from storaged.objects.code.versions import Place, meta_of, record_key, seal_meta, shown
from storaged.objects.encryption import NO_KEY
from storaged.objects.plane import ObjectPlane
from storaged.objects.records import BucketRecord, PartEntry, SealedPart
from storaged.objects.upload_records import PartRecord, UploadRecord
from storaged.objects.write.blocks import NewPart
from storaged.objects.write.checksums import COMPOSITE, FULL_OBJECT, can_be_composite, can_be_full_object, default_type
from storaged.objects.write.commit import commit
from storaged.objects.write.complete import finish
from storaged.objects.write.copy import body_of, check_size, open_source
from storaged.objects.write.locks import lock_of_new
from storaged.objects.write.put import DEK_BYTES
from storaged.objects.write.references import live_references
from storaged.objects.write.retire import retire_parts
from storaged.objects.write.sealing import sealed_body
from storaged.objects.write.uploads import (
    ABORTED,
    COMPLETING,
    OPEN,
    UPLOAD_VERSION,
    OpenedUpload,
    decode_upload,
    has_bare_digest,
    open_upload,
    parse_upload_id,
    part_rows,
    parts_opener,
    renew_digest,
    unseal_upload,
    upload_of_row,
    upload_text,
)
from storaged.tasks import TaskGroup
from storaged.wire import decode, encode

FORGETS_IN_FLIGHT_MAX = 32

log = structlog.get_logger(__name__)


async def create_upload(
    plane: ObjectPlane,
    bucket: BucketRecord,
    key: bytes,
    meta: NewMeta,
    *,
    owner: str,
    initiator: str = "",
    algorithm: str = "",
    checksum_type: str = "",
) -> UploadInfo:
    """Opens an upload. Raises InvalidRequest for an unknown checksum algorithm or type, or a wrong pair of them."""
    kind = _checked_type(algorithm, checksum_type)
    if meta.lock is not None:
        lock_of_new(plane, bucket, meta.lock)
    upload_id = new_upload_id(shard_of(key, bucket.shard_numbers), plane.entropy)
    plane.room.check(upload_name(bucket.id, key, upload_id), bucket.countries)
    bucket_key = await plane.keys.bucket_key(bucket.id, bucket.countries)
    dek = plane.entropy(DEK_BYTES)
    place = Place(bucket.id, key)
    context = place.context(UPLOAD_VERSION, upload_id)
    dek, encryption, _ = record_key(place, upload_id, dek, meta.encryption, plane.entropy)
    sealed = seal_meta(dek, context, meta_of(meta, "", {}, "", 0), encryption, plane.entropy)
    now_ms = plane.clock.wall_ms()
    record = UploadRecord(
        upload_id,
        OPEN,
        owner,
        now_ms,
        bucket_key.version,
        upload_id,
        bucket_key.wrap(dek, context),
        sealed,
        algorithm,
        kind,
        changed_ms=now_ms,
        lock=meta.lock,
        initiator=initiator if initiator != owner else "",
    )
    await plane.registers.change(upload_name(bucket.id, key, upload_id), lambda value: Change(encode(record)))
    return UploadInfo(
        key, upload_text(upload_id), now_ms, owner, meta.storage_class, algorithm, kind, shown(encryption)
    )


def _checked_type(algorithm: str, checksum_type: str) -> str:
    if not algorithm:
        if checksum_type:
            raise InvalidRequest("A checksum type needs a checksum algorithm.")
        return ""
    if algorithm not in CHECKSUM_ALGORITHMS:
        raise InvalidRequest(f"The checksum algorithm {algorithm} is not known.")
    kind = checksum_type or default_type(algorithm)
    if kind not in (FULL_OBJECT, COMPOSITE):
        raise InvalidRequest(f"The checksum type {kind} is not known.")
    if kind == FULL_OBJECT and not can_be_full_object(algorithm):
        raise InvalidRequest(f"The FULL_OBJECT checksum type cannot be used with the {algorithm} algorithm.")
    if kind == COMPOSITE and not can_be_composite(algorithm):
        raise InvalidRequest(f"The COMPOSITE checksum type cannot be used with the {algorithm} algorithm.")
    return kind


async def put_part(
    plane: ObjectPlane,
    bucket: BucketRecord,
    key: bytes,
    upload_id: str,
    number: int,
    body: Body,
    checks: BodyChecks,
    *,
    customer_key: bytes = NO_KEY,
) -> PutResult:
    """Stores one part; it replaces an earlier one of the same number. It keeps the checksum that the upload was created
    for, or CRC64NVME.

    Raises NoSuchUpload, InvalidArgument, InvalidRequest (a checksum of another algorithm), and as ``put``.
    """
    if not 1 <= number <= plane.limits.parts_max:
        raise InvalidArgument(f"Part number must be an integer between 1 and {plane.limits.parts_max}, inclusive.")
    upload = await open_upload(plane, bucket, key, upload_id)
    if upload.record.state not in (OPEN, COMPLETING):  # a Complete may still fail on its condition: the upload goes on
        raise NoSuchUpload(UploadId=upload_id)
    owner = object_name(bucket.id, bucket.shard_numbers, key)
    row_name = part_name(bucket.id, upload.record.upload_id, number)
    plane.room.check(row_name, bucket.countries)
    algorithm, declared = upload.record.checksum_algorithm or DEFAULT_ALGORITHM, {*checks.checksums, *checks.algorithms}
    if upload.record.checksum_algorithm and declared - {algorithm}:
        raise InvalidRequest(
            f"Checksum Type mismatch occurred, expected checksum Type: {algorithm.lower()}, actual checksum Type:"
            f" {', '.join(declared).lower()}"
        )
    if algorithm not in declared:
        checks = msgspec.structs.replace(checks, algorithms=(*checks.algorithms, algorithm))
    data_id, content = plane.entropy(DATA_ID_BYTES), upload.content_key(customer_key)
    dek = upload.dek if content is None else content.dek
    async with sealed_body(plane, NewPart(bucket, owner, dek, data_id, number), body, checks) as sealed:
        digest, now_ms = sealed.digest, plane.clock.wall_ms()
        etag = digest.etag if content is None else content.etag(digest.etag)
        part = SealedPart(number, digest.size, etag, digest.checksums.get(algorithm, ""), data_id)
        if content is not None:
            part = content.seal_part(part, algorithm, plane.entropy)
        secret = upload.seal_part(plane, data_id, part)

        def update(value: Value | None, entry: PartEntry) -> Change:
            return Change(encode(PartRecord(entry, now_ms, secret)))

        outcome, entry = await commit(plane, BucketKeys(plane, bucket), row_name, update, sealed)
        value = (await plane.registers.read(upload.name)).value
        state = decode_upload(value)
        if state is None or state.state not in (OPEN, COMPLETING):
            if value is not None:  # else it proves no end: a replica that lies may hide the row
                await plane.registers.change(row_name, lambda value: Change(b"", Visibility.TOMBSTONE))
            raise NoSuchUpload(UploadId=upload_id)
    before = outcome.before
    if before is not None and before.visibility == Visibility.LIVE:
        replaced = decode(before.body, PartRecord).entry
        if replaced.data_id != entry.data_id:
            origin = OF_UPLOAD + upload.record.upload_id
            plane.background.spawn(retire_parts(plane, bucket, owner, [replaced], origin))
    kept = {name: value for name, value in digest.checksums.items() if name in (declared or {algorithm})}
    return PutResult(etag, size=digest.size, checksums=kept, modified_ms=now_ms, encryption=shown(upload.encryption))


async def copy_part(
    plane: ObjectPlane,
    source: CopySource,
    bucket: BucketRecord,
    key: bytes,
    upload_id: str,
    number: int,
    *,
    customer_key: bytes = NO_KEY,
) -> PutResult:
    """A part from an object, or from a range of one: opened here and sealed anew."""
    try:
        stream, span = await open_source(plane, source), source.span
    except InvalidRange:  # AWS does not answer 416, as it does to a GET of the range
        raise InvalidRequest("The specified copy range is invalid for the source object size") from None
    try:
        if span is not None and span.last is not None and span.last >= stream.info.size:
            raise InvalidArgument(
                f"Range specified is not valid for source object of size: {stream.info.size}",
                ArgumentName="x-amz-copy-source-range",
            )
        check_size(stream.length)
        checks = BodyChecks(size=stream.length)
        return await put_part(plane, bucket, key, upload_id, number, body_of(stream), checks, customer_key=customer_key)
    finally:
        await stream.close()


async def abort(plane: ObjectPlane, bucket: BucketRecord, key: bytes, upload_id: str) -> None:
    """Ends an upload; its parts go to the garbage lists. Raises NoSuchUpload, also when the upload was completed.

    A Complete of the upload may be under way, by a gateway that died or is slow. Once the upload is Aborted, no
    Complete goes on, because each looks at it after its promise. The round that settles the object then ends all
    earlier promises, and shows whether one of them had taken effect.
    """
    upload = await open_upload(plane, bucket, key, upload_id)
    before = upload.record

    def update(value: Value | None) -> Change:
        record = decode_upload(value)
        if record is None or record.state not in (OPEN, COMPLETING):
            raise NoSuchUpload(UploadId=upload_id)
        nonlocal before
        before = record
        changed = msgspec.structs.replace(upload.renewed(record), state=ABORTED, changed_ms=plane.clock.wall_ms())
        return Change(encode(changed), Visibility.HIDDEN)

    await plane.registers.change(upload.name, update)
    if before.state == COMPLETING and await finish(plane, bucket, upload._replace(record=before)):
        raise NoSuchUpload(UploadId=upload_id)
    plane.background.spawn(drop_parts(plane, bucket, upload))


async def drop_parts(plane: ObjectPlane, bucket: BucketRecord, upload: OpenedUpload) -> None:
    """Retires every part of an aborted upload, and deletes its rows. If this fails, ``forget_finished_uploads`` does it
    later.
    """
    owner = object_name(bucket.id, bucket.shard_numbers, upload.place.key)
    try:
        await _forget_parts(plane, bucket, owner, upload.record.upload_id, frozenset())
    except StoragedError:
        return


async def _forget_parts(
    plane: ObjectPlane, bucket: BucketRecord, owner: RegisterName, upload_id: bytes, kept: Set[bytes]
) -> None:
    """Turns an upload's part rows into tombstones, and retires the parts that are not ``kept``: many at a time, with
    one message to each disk, before their rows go. Raises NoSuchBucket, ServiceUnavailable, and DataDamaged for a row,
    after those before it.
    """
    gate = asyncio.Semaphore(FORGETS_IN_FLIGHT_MAX)

    async def forget(number: int) -> None:
        async with gate:
            await plane.registers.change(
                part_name(bucket.id, upload_id, number), lambda value: Change(b"", Visibility.TOMBSTONE)
            )

    async def forget_all(entries: list[PartEntry]) -> None:
        unused = [entry for entry in entries if entry.data_id not in kept]
        await retire_parts(plane, bucket, owner, unused, OF_UPLOAD + upload_id)
        async with TaskGroup() as group:
            for entry in entries:
                group.create_task(forget(entry.number))

    batch: list[PartEntry] = []
    try:
        try:
            async for row in part_rows(plane.scanner, bucket.id, upload_id):
                batch.append(row.entry)
                if len(batch) == RETIREMENTS_MAX:
                    full, batch = batch, []
                    await forget_all(full)
        finally:
            await forget_all(batch)
    except* StoragedError as failed:
        raise _first_of(failed) from None


async def list_parts(
    plane: ObjectPlane,
    bucket: BucketRecord,
    key: bytes,
    upload_id: str,
    *,
    after: int = 0,
    limit: int = 1000,
    customer_key: bytes = NO_KEY,
) -> tuple[UploadInfo, list[PartInfo], int | None]:
    """The upload, its parts with a number > ``after``, and the last number when there are more. Raises NoSuchUpload."""
    upload = await open_upload(plane, bucket, key, upload_id)
    if upload.record.state not in (OPEN, COMPLETING):
        raise NoSuchUpload(UploadId=upload_id)
    found: list[PartInfo] = []
    algorithm = upload.record.checksum_algorithm or DEFAULT_ALGORITHM
    open_checksums = parts_opener(upload, customer_key)
    async for row in part_rows(plane.scanner, bucket.id, upload.record.upload_id, after=min(after, 0xFFFF)):
        if len(found) >= limit:
            return upload.info, found, found[-1].number if found else after
        (part,) = open_checksums([upload.open_part(row)])
        found.append(
            PartInfo(
                part.number, part.size, part.etag, row.modified_ms, algorithm if part.checksum else "", part.checksum
            )
        )
    return upload.info, found, None


async def list_uploads(
    plane: ObjectPlane,
    bucket: BucketRecord,
    *,
    prefix: bytes = b"",
    after_key: bytes = b"",
    after_upload: str = "",
    delimiter: bytes = b"",
    limit: int = 1000,
) -> tuple[list[UploadInfo], list[bytes], tuple[bytes, str] | None]:
    """Uploads in progress, by key, then upload id; common prefixes; and the marker of the next page. An upload whose
    row can't be used is left out, and counted.

    A row's key is the object's, a zero byte and the upload id. Rows are grouped here, not by the scanner, because an
    upload id may contain the delimiter.
    """
    uploads: list[UploadInfo] = []
    groups: dict[bytes, None] = {}
    marker = (after_key, after_upload)
    start: bytes | None = _row_after(after_key, after_upload, delimiter)
    while start is not None:
        page = await plane.scanner.list_page(
            PageQuery(Table.UPLOAD, bucket.id, bucket.shard_numbers, prefix=prefix, after=start, limit=ROWS_A_PAGE)
        )
        start = page.next_after
        for row in page.rows:
            key = row.key[: -len(upload_name(b"", b"", bytes(16)).key)]
            cut = key.find(delimiter, len(prefix)) if delimiter else -1
            group = key[: cut + len(delimiter)] if cut >= 0 else b""
            if group in groups:
                continue
            if len(uploads) + len(groups) >= limit:
                return uploads, list(groups), marker if limit else None
            if group:
                groups[group] = None
                marker = (group, "")
                start = group + b"\xff"
                break
            try:
                record = upload_of_row(row)
                if record is None:
                    continue
                upload = await unseal_upload(plane, bucket, key, upload_name(bucket.id, key, record.upload_id), record)
            except DataDamaged as error:
                _note_unreadable(plane, bucket, row, error)
                continue
            uploads.append(upload.info)
            marker = (key, upload.info.upload_id)
    return uploads, list(groups), None


def _row_after(after_key: bytes, after_upload: str, delimiter: bytes) -> bytes:
    if not after_key:
        return b""
    if after_upload:
        return after_key + b"\0" + parse_upload_id(after_upload)
    if delimiter and after_key.endswith(delimiter):
        return after_key + b"\xff"
    return after_key + b"\0" + b"\xff" * 17


def _first_of(failed: BaseExceptionGroup[StoragedError]) -> StoragedError:
    """The first of the errors that ended a task group: callers expect one error."""
    first = failed.exceptions[0]
    return _first_of(first) if isinstance(first, BaseExceptionGroup) else first


def is_older(record: UploadRecord, now_ms: int, keep_ms: int) -> bool:
    """Whether the upload ended at least ``keep_ms`` ago, so that its rows may go."""
    return record.state not in (OPEN, COMPLETING) and now_ms - record.changed_ms >= keep_ms


async def forget_finished_uploads(plane: ObjectPlane, bucket: BucketRecord) -> int:
    """Aborts uploads that expired, and turns the rows of uploads that ended more than a day ago into tombstones.
    Returns the number of the latter. Any node may run this at any time.

    Old records get their digest keyed (``renew_digest``). A record that can't be used is counted and skipped.
    """
    forgotten = 0
    async for row in every_row(plane.scanner, PageQuery(Table.UPLOAD, bucket.id, bucket.shard_numbers, hidden=True)):
        try:
            if await _is_expired(plane, bucket, row):
                await _expire(plane, bucket, row)
            else:
                forgotten += await _forget_finished(plane, bucket, row)
        except DataDamaged as error:
            _note_unreadable(plane, bucket, row, error)
    return forgotten


async def _is_expired(plane: ObjectPlane, bucket: BucketRecord, row: Row) -> bool:
    """Whether an open upload is due by a lifecycle rule, or was not used for so long that nobody will complete it:
    neither it nor a part of it was written. Raises DataDamaged, ServiceUnavailable.
    """
    record, now_ms = upload_of_row(row), plane.now_agreed_ms()
    if record is None or record.state not in (OPEN, COMPLETING) or now_ms is None:
        return False
    if not bucket.plain:
        key, day_ms = row.key[: -1 - len(record.upload_id)], plane.limits.lifecycle_day_ms
        due = upload_due(plane.configurations.of(bucket).derive(rules_of), key, record.created_ms, day_ms)
        if due is not None and due.day <= now_ms // day_ms:
            return True
    since_ms = now_ms - plane.limits.upload_expire_ms
    if not plane.limits.upload_expire_ms:
        return False
    if max(record.created_ms, record.changed_ms) >= since_ms:
        return False
    async for part in part_rows(plane.scanner, bucket.id, record.upload_id):
        if part.modified_ms >= since_ms:
            return False
    return True


async def _expire(plane: ObjectPlane, bucket: BucketRecord, row: Row) -> None:
    """What it has is given back, and its key is collected as others are."""
    record = upload_of_row(row)
    assert record is not None
    key = row.key[: -1 - len(record.upload_id)]
    try:
        await abort(plane, bucket, key, upload_text(record.upload_id))
    except NoSuchUpload:
        return  # meanwhile it has ended
    plane.counters.uploads_expired += 1
    log.info("an upload expired", bucket=bucket.name, upload=upload_text(record.upload_id))


async def _forget_finished(plane: ObjectPlane, bucket: BucketRecord, row: Row) -> bool:
    """Raises DataDamaged."""
    record = upload_of_row(row)
    if record is None:
        return False
    key = row.key[: -1 - len(record.upload_id)]
    name = upload_name(bucket.id, key, record.upload_id)
    if has_bare_digest(record):
        await renew_digest(plane, await unseal_upload(plane, bucket, key, name, record))
    if not is_older(record, plane.clock.wall_ms(), plane.limits.upload_keep_ms):
        return False
    owner = object_name(bucket.id, bucket.shard_numbers, key)
    kept = await live_references(plane.registers, plane.scanner, plane.pages, owner)
    await _forget_parts(plane, bucket, owner, record.upload_id, kept)
    await plane.registers.change(name, lambda value: Change(b"", Visibility.TOMBSTONE))
    return True


def _note_unreadable(plane: ObjectPlane, bucket: BucketRecord, row: Row, error: DataDamaged) -> None:
    plane.counters.uploads_unreadable += 1
    log.warning(
        "the record of an upload cannot be used", bucket=bucket.name, row=row.key[:80].hex(), reason=error.message
    )

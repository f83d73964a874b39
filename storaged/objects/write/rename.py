"""Renames of objects in a bucket without versioning: ``departures`` has the theory.

The object stays what it is: its metadata, its time, its owner and who has access. A coded object moves no data: the new
key borrows it, as a copy does (``lent_copy``), and all its parts if it was uploaded in parts. A small one is sealed
anew. So is a coded one that can't be lent now, because its record has too many borrowers or a replica of it is away.

*Client tokens.* The id of a departure ends with a digest of the request's token and one of its source, under a key of
the keyring. So the new key remembers by which request it got its version, for as long as it has that version. A second
request with the token finds it there, and does nothing. One that finds the departure of an earlier one ends it, and
renames the object itself. It does so once, so that two which take long do not end each other again and again.
"""

from __future__ import annotations

import asyncio
import contextlib

import msgspec

from storaged import errors
from storaged.errors import (
    IdempotencyParameterMismatch,
    InvalidRequest,
    NoSuchVersion,
    PreconditionFailed,
    SlowDown,
    StoragedError,
)
from storaged.ids import DATA_ID_BYTES
from storaged.meta.names import RegisterName, object_name
from storaged.objects.api import (
    NO_READ_CONDITIONS,
    NO_WRITE_CONDITIONS,
    BodyChecks,
    NewMeta,
    PutResult,
    Renaming,
    WriteConditions,
)
from storaged.objects.bucket_keys import BucketKeys, judged, with_keys
from storaged.objects.code.history import Draft, Entry
from storaged.objects.code.lending import arrived_as, borrowed_by
from storaged.objects.code.versions import (
    OpenedVersion,
    Place,
    UnsealedVersion,
    access_to,
    check_allowed,
    decode_record,
    seal_version,
    shown,
)
from storaged.objects.conditions import check_copy_source, check_write
from storaged.objects.etags import NO_TAG
from storaged.objects.plane import ObjectPlane
from storaged.objects.read.borrowed import owner_of
from storaged.objects.read.find import Found, current_entry, find
from storaged.objects.read.get import get
from storaged.objects.records import ACTIVE, NULL_VERSION, BucketRecord, ObjectRecord, Version, sharing_of
from storaged.objects.sharing import Borrowed, Departure
from storaged.objects.write.blocks import NewPart
from storaged.objects.write.commit import AfterPromise, change_once, commit
from storaged.objects.write.copy import body_of, check_size
from storaged.objects.write.departures import (
    ARRIVALS_MAX,
    BUSY,
    Changed,
    Departing,
    Seen,
    arrive,
    check_departing,
    depart,
    end_arrivals,
    end_departure,
    finish,
    is_busy,
    make_way,
    try_end_departure,
    try_end_old,
)
from storaged.objects.write.lent_copy import SealedPages, is_coded, lent_of, replicas_answer
from storaged.objects.write.loans import BORROWED_MAX, NotLent, Wanted, bucket_of_owner, introduce, with_loan
from storaged.objects.write.outbox import Outgoing
from storaged.objects.write.outbox import outgoing as outgoing_of
from storaged.objects.write.put import DEK_BYTES, AddedVersion, NewObject, Write
from storaged.objects.write.sealing import Sealed, sealed_body

ATTEMPTS_MAX = 12
PAUSE_MAX_S = 0.25
DIGEST_BYTES = 4
VERSIONED = "RenameObject is for buckets without versioning: a rename would take versions from the history of a key."


async def rename(plane: ObjectPlane, bucket: BucketRecord, asked: Renaming) -> PutResult:
    """Renames the object of a key. When it returns, the old key does not have it any more. When it raises, the object
    has its old name, or (OutcomeUnknown, ServiceUnavailable) the new one, and lists may show both for some time.

    Raises NoSuchKey, PreconditionFailed, IdempotencyParameterMismatch, InvalidRequest for an object that can't be
    renamed, NotImplemented where the bucket has versioning, SlowDown, InsufficientStorage, ServiceUnavailable.
    """
    if plane.versioning(bucket):
        raise errors.NotImplemented(VERSIONED)
    if asked.source == asked.key:
        raise InvalidRequest("This rename request is illegal because the object has this name already.")
    replaces = True
    for attempt in range(ATTEMPTS_MAX):
        work = _Rename(plane, bucket, asked)
        try:
            return await work.run()
        except Changed:
            replaces = False  # perhaps the same request, sent again, has replaced this one
        except Departing as met:
            if replaces and met.departure.id[-2 * DIGEST_BYTES :] == work.id[-2 * DIGEST_BYTES :]:
                replaces = False
                await end_departure(plane, bucket, met.name, met.departure.id)  # of the same request, sent before
            elif not is_busy(plane, met.departure) or attempt == ATTEMPTS_MAX - 1:
                await make_way(plane, bucket, met)
        await asyncio.sleep(PAUSE_MAX_S * plane.entropy(1)[0] / 255)
    raise SlowDown("Others change these keys all the time; nothing was renamed. Please reduce your request rate.")


def _id_of(plane: ObjectPlane, bucket: BucketRecord, asked: Renaming) -> bytes:
    """Of a departure. A retry has another id with the same end."""
    if not asked.token:
        return plane.entropy(DATA_ID_BYTES)
    context, token = (b"rename", bucket.id), asked.token.encode()
    messages = token, token + b"\0" + asked.source
    digests = [plane.keys.authenticate(context, message)[-DIGEST_BYTES:] for message in messages]
    return plane.entropy(DATA_ID_BYTES - 2 * DIGEST_BYTES) + b"".join(digests)


class _Rename:
    """One attempt."""

    def __init__(self, plane: ObjectPlane, bucket: BucketRecord, asked: Renaming) -> None:
        self._plane = plane
        self._bucket = bucket
        self._asked = asked
        self.id = _id_of(plane, bucket, asked)
        self.source = asked.source
        self._old = object_name(bucket.id, bucket.shard_numbers, asked.source)
        self._new = object_name(bucket.id, bucket.shard_numbers, asked.key)

    async def run(self) -> PutResult:
        """Raises Changed, Departing: another attempt may succeed."""
        plane, bucket, asked = self._plane, self._bucket, self._asked
        plane.room.check(self._new, bucket.countries)
        before = decode_record((await plane.registers.read(self._new)).value)
        if asked.token and (done := await self._done_before(before)) is not None:
            return done
        arrivals = len(sharing_of(before).arrivals)
        if arrivals >= ARRIVALS_MAX and await end_arrivals(plane, bucket, self._new) >= ARRIVALS_MAX:
            raise SlowDown(BUSY)
        reading = await plane.registers.read(self._old)
        record = decode_record(reading.value)
        self._tidy(record)
        entry = current_entry(record)
        found = await find(plane, bucket, asked.source, "", reading=reading)
        self._check_source(found)
        keys = BucketKeys(plane, bucket)
        await with_keys(keys, lambda: self.check_target(before.versions[0] if before.versions else None, keys))
        seen = Seen(entry, borrowed_by(record, entry.ordinal))
        departure = Departure(self.id, asked.key, plane.clock.wall_ms())
        try:
            await depart(plane, bucket, self._old, seen, departure)
            result = await self._arrive(found)
        except (Changed, Departing, PreconditionFailed):
            await try_end_departure(plane, bucket, self._old, self.id)
            raise
        except BaseException:
            plane.background.spawn(try_end_departure(plane, bucket, self._old, self.id))
            raise
        await self._finish(departure)
        return result

    def _tidy(self, record: ObjectRecord) -> None:
        """Ends renames of the object before this one, in the background, if they have died after it had arrived."""
        sharing = sharing_of(record)
        if sharing.arrivals or (sharing.departure is not None and not is_busy(self._plane, sharing.departure)):
            self._plane.background.spawn(try_end_old(self._plane, self._bucket, self._old))

    async def _done_before(self, before: ObjectRecord) -> PutResult | None:
        """What the token's rename answered, if the new key has its object. Raises IdempotencyParameterMismatch."""
        plane, bucket, asked = self._plane, self._bucket, self._asked
        if not before.versions:
            return None
        arrived, wanted = arrived_as(before), self.id[-2 * DIGEST_BYTES :]
        if arrived[-2 * DIGEST_BYTES : -DIGEST_BYTES] != wanted[:DIGEST_BYTES]:
            return None
        if arrived[-DIGEST_BYTES:] != wanted[DIGEST_BYTES:]:
            raise IdempotencyParameterMismatch
        await end_departure(plane, bucket, self._old, arrived)
        return _result((await find(plane, bucket, asked.key, "")).opened)

    def _check_source(self, found: Found) -> None:
        asked, opened = self._asked, found.opened
        check_allowed(access_to(opened), asked.source_allowed)
        check_copy_source(asked.source_conditions, opened.meta.etag, opened.version.modified_ms, "x-amz-rename-source-")
        if opened.has_customer_key:
            raise InvalidRequest("RenameObject does not support objects with SSE-C: copy the object, and delete it.")

    def check_target(self, current: Version | None, keys: BucketKeys) -> None:
        """Judges what the new key has. Raises PreconditionFailed, SlowDown, KeyNeeded."""
        place, wanted, allowed = Place(self._bucket.id, self._asked.key), self._asked.conditions, self._asked.allowed
        if allowed is not None:
            only = WriteConditions(allowed=allowed)
            check_write(only, judged(place, current, keys, only))
        if wanted == NO_READ_CONDITIONS:
            return
        found = judged(place, current, keys, WriteConditions(if_match=NO_TAG))
        if found is not None:
            check_copy_source(wanted, found.etag, found.modified_ms, "")
        elif wanted.if_match is not None:
            raise PreconditionFailed(Condition="If-Match")
        elif wanted.if_modified_since_ms is not None:
            raise PreconditionFailed(Condition="If-Modified-Since")

    # --- the new key

    async def _arrive(self, found: Found) -> PutResult:
        """Raises Changed, Departing."""
        plane, bucket, asked = self._plane, self._bucket, self._asked
        version, outgoing = found.opened.version, None
        if asked.created is not None:
            outgoing = await outgoing_of(plane, bucket, self._new, asked.created)
        owner = owner_of(bucket, found)
        if (found.opened.borrowed is not None or is_coded(version)) and replicas_answer(plane, owner):
            with contextlib.suppress(NotLent):
                return await self._lend(found, owner, outgoing)
        return await self._seal_anew(found, outgoing)

    async def _lend(self, found: Found, owner: RegisterName, outgoing: Outgoing | None) -> PutResult:
        """Raises NotLent."""
        plane, bucket, opened = self._plane, self._bucket, found.opened
        data = await lent_of(plane, bucket, self._asked.source, found)
        write = await self._write(opened, NewPart(bucket, self._new, opened.dek, opened.version.context_id))
        owner_bucket = await bucket_of_owner(plane, bucket, opened.borrowed)
        if owner_bucket is None or owner_bucket.state != ACTIVE:
            raise NotLent
        sealed = SealedPages(write, data)
        borrowed, borrower = introduce(plane, owner, owner_bucket, self._new, self.id)
        added = _Arriving(self, write, opened, sealed, borrowed, outgoing)
        wanted = Wanted(owner, data.data_ids, None, borrower, data.pages)

        async def commit_lent(check_lent: AfterPromise) -> None:
            async def after_promise() -> None:
                await check_lent()
                await sealed.put()
                await self._before_accept(added)

            await change_once(plane, added.keys, self._new, added.update, after_promise)

        await with_loan(plane, owner_bucket, wanted, commit_lent)
        return added.conclude()

    async def _seal_anew(self, found: Found, outgoing: Outgoing | None) -> PutResult:
        """If another object is read than was found, its departure is gone, and Changed is raised. So that which departs
        is named: it is not the current one if another gateway knows since a moment ago that the bucket has versioning.
        """
        plane, bucket, opened = self._plane, self._bucket, found.opened
        check_size(opened.version.size)
        write = await self._write(opened, NewPart(bucket, self._new, plane.entropy(DEK_BYTES), self.id))
        opened = opened._replace(meta=msgspec.structs.replace(opened.meta, parts=(), parts_page=b""))
        try:
            stream = await get(plane, bucket, self._asked.source, version_id=NULL_VERSION)
        except NoSuchVersion:
            raise Changed from None
        try:
            checks = BodyChecks(size=stream.info.size)
            async with sealed_body(plane, write.part, body_of(stream), checks) as sealed:
                added = _Arriving(self, write, opened, sealed, None, outgoing)
                await commit(
                    plane,
                    added.keys,
                    self._new,
                    added.update,
                    sealed,
                    after_promise=lambda: self._before_accept(added),
                )
        finally:
            await stream.close()
        return added.conclude()

    async def _write(self, opened: OpenedVersion, part: NewPart) -> Write:
        plane, bucket = self._plane, self._bucket
        key = await plane.keys.bucket_key(bucket.id, bucket.countries)
        new = NewObject(NewMeta(), opened.version.owner, NO_WRITE_CONDITIONS)
        return Write(plane, Place(bucket.id, self._asked.key), key, part, new)

    async def _before_accept(self, added: _Arriving) -> None:
        await check_departing(self._plane, self._old, self.id)
        await added.before_accept()

    # --- the old key

    async def _finish(self, departure: Departure) -> None:
        """Raises as ``finish``."""
        plane, bucket, asked = self._plane, self._bucket, self._asked
        try:
            await finish(plane, bucket, self._old, departure, asked.removed)
        except StoragedError:
            plane.background.spawn(try_end_departure(plane, bucket, self._old, self.id))
            raise
        if not bucket.plain:
            plane.notes.look_soon(bucket, asked.source, plane.clock.wall_ms())


class _Arriving(AddedVersion):
    """The version under its new key. ``borrowed``: where its data is; None: in the body ``sealed``."""

    def __init__(
        self,
        work: _Rename,
        write: Write,
        opened: OpenedVersion,
        sealed: Sealed | SealedPages,
        borrowed: Borrowed | None,
        outgoing: Outgoing | None,
    ) -> None:
        def make(version_id: str) -> tuple[Version, PutResult]:
            old, part, entropy, meta = opened.version, write.part, write.plane.entropy, opened.meta
            new = UnsealedVersion(version_id, part.data_id, old.owner, old.modified_ms, ())
            if isinstance(sealed, SealedPages):
                new = msgspec.structs.replace(new, multipart=old.multipart, part_count=old.part_count)
                new, meta = sealed.name_in(new, meta, meta)
            else:
                new = msgspec.structs.replace(new, parts=(sealed.entry,))
            version = seal_version(write.place, new, write.bucket_key, part.dek, meta, entropy, opened.encryption)
            return version, _result(opened)

        self._work = work
        self._borrowed = borrowed
        super().__init__(write, make, outgoing, sealed if isinstance(sealed, Sealed) else None)

    def _add(self, draft: Draft, ordinal: int) -> bool:
        """Raises NotImplemented, Departing, and as ``check_target``."""
        if draft.has_history or self._versioning:
            raise errors.NotImplemented(VERSIONED)
        if draft.departure is not None:
            raise Departing(self._write.part.name, draft.departure)
        self._work.check_target(draft.newest.version if draft.newest is not None else None, self.keys)
        return super()._add(draft, ordinal)

    def note_added(self, draft: Draft, added: Entry) -> None:
        """Raises NotLent, Changed."""
        arrive(draft, self._work.source, self._work.id)
        if self._borrowed is not None:
            if len(draft.borrowed) >= BORROWED_MAX:
                raise NotLent
            draft.borrowed[added.ordinal] = self._borrowed


def _result(opened: OpenedVersion) -> PutResult:
    meta, version = opened.meta, opened.version
    return PutResult(
        meta.etag,
        "",
        version.size,
        meta.checksums,
        meta.checksum_type,
        version.modified_ms,
        shown(opened.encryption),
        meta.tags,
    )

"""The path of a PUT: admit, seal and place, barrier and commit, conclude.

Two shells call these steps in the same order. ``put`` runs in a task: ``admit``, ``sealed_body``, ``commit``,
``Replacement.conclude``. ``try_put`` costs no task. It takes a small body that has arrived whole, calls the same
functions but for those that would wait, and lets the register call back (``Registers.try_change``). Where one of them
would have to wait, it begins nothing.

In a bucket with versioning a PUT adds a version (``AddedVersion``), in a task. A gateway may learn a moment late that a
bucket got versioning. So a PUT never replaces a record with a history: it adds the null version to it, as where
versioning is suspended; ``try_put`` goes on in a task for that. The same becomes of a create that did not see the
record (``code.adding.overtake``). A key without versioning has a history, too, when it shares data with other keys
(``loans``).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import msgspec
from msgspec import Struct

from storaged.errors import SlowDown
from storaged.ids import DATA_ID_BYTES
from storaged.meta.names import Change, RegisterName, Value, object_name
from storaged.meta.ports import Outcome
from storaged.objects.api import NO_WRITE_CONDITIONS, Body, BodyChecks, NewMeta, PutResult, WriteConditions
from storaged.objects.bucket_keys import BucketKeys, current_of, judged, with_keys
from storaged.objects.code.adding import add_version
from storaged.objects.code.history import Draft, Entry
from storaged.objects.code.versions import (
    EMPTY,
    Place,
    UnsealedVersion,
    decode_record,
    meta_of,
    record_change,
    record_key,
    seal_version,
    shown,
)
from storaged.objects.conditions import check_write, needs_etag
from storaged.objects.configuration.kinds import ENABLED
from storaged.objects.plane import ObjectPlane
from storaged.objects.ports import BucketKey
from storaged.objects.records import (
    NAMED_VERSION,
    NULL_VERSION,
    BucketRecord,
    ObjectRecord,
    PartEntry,
    Version,
)
from storaged.objects.write.blocks import INLINE_BYTES_MAX, NewPart
from storaged.objects.write.checksums import FULL_OBJECT, digest_of
from storaged.objects.write.commit import commit, count_put
from storaged.objects.write.loans import retire_gone
from storaged.objects.write.locks import lock_of_new
from storaged.objects.write.outbox import Outgoing, rules_of
from storaged.objects.write.outbox import outgoing as outgoing_of
from storaged.objects.write.retire import retire_removed
from storaged.objects.write.sealing import Sealed, plan_of, seal_small, sealed_body
from storaged.objects.write.versioned import VersionsUpdate, unlocked
from storaged.wire import Buffer

DEK_BYTES = 32

OnDone = Callable[[PutResult | Exception], None]
"""Called once: with the result, or with what ``put`` would raise. It must not raise."""


async def put(
    plane: ObjectPlane,
    bucket: BucketRecord,
    key: bytes,
    body: Body,
    meta: NewMeta,
    checks: BodyChecks,
    *,
    owner: str,
    conditions: WriteConditions = NO_WRITE_CONDITIONS,
) -> PutResult:
    """Stores an object. When this returns the object is durable, and every later read sees it. When it raises, nothing
    was changed (OutcomeUnknown: it is not known whether something was).
    """
    if meta.lock is not None:
        lock_of_new(plane, bucket, meta.lock)  # refuses what can't be, before the body is read
    bucket_key = plane.keys.try_bucket_key(bucket.id, bucket.countries) or await plane.keys.bucket_key(
        bucket.id, bucket.countries
    )
    write = admit(plane, bucket, key, bucket_key, NewObject(meta, owner, conditions))
    await check_early(plane, write.part.name, write.place, BucketKeys(plane, bucket), conditions)
    outgoing = await outgoing_of(plane, bucket, write.part.name, meta.origin) if meta.origin is not None else None
    async with sealed_body(plane, write.part, body, checks) as sealed:
        if outgoing is None and not plane.versioning(bucket):
            new = Replacement(write, sealed)
            try:
                outcome, _ = await commit(
                    plane, new.keys, write.part.name, new.update, sealed, regardless=new.regardless
                )
            except HasHistory:
                return await _add_version(write, sealed, None)
            return new.conclude(outcome)
        return await _add_version(write, sealed, outgoing)


async def _add_version(write: Write, sealed: Sealed, outgoing: Outgoing | None) -> PutResult:
    added = AddedVersion(write, partial(_new_version, write, sealed), outgoing, sealed)
    await commit(write.plane, added.keys, write.part.name, added.update, sealed, after_promise=added.before_accept)
    return added.conclude()


def try_put(
    plane: ObjectPlane,
    bucket: BucketRecord,
    key: bytes,
    plain: Buffer,
    meta: NewMeta,
    checks: BodyChecks,
    on_done: OnDone,
    *,
    owner: str,
    conditions: WriteConditions = NO_WRITE_CONDITIONS,
) -> bool:
    """See ``api.Objects``. Conditions are judged by the commit alone. An early check would save nothing: the body is
    here already."""
    if meta.lock is not None or (not bucket.plain and (plane.versioning(bucket) or rules_of(plane, bucket))):
        return False
    bucket_key = plane.keys.try_bucket_key(bucket.id, bucket.countries)
    if (
        bucket_key is None
        or len(plain) > plane.small_bytes_in(bucket)
        or (conditions != NO_WRITE_CONDITIONS and (needs_etag(conditions) or conditions.allowed is not None))
    ):
        return False
    write = admit(plane, bucket, key, bucket_key, NewObject(meta, owner, conditions))
    large = len(plain) > INLINE_BYTES_MAX
    plan = plan_of(plane, write.part) if large else None
    if large and plan is None:
        return False  # before a digest that the task would compute again
    sealed = seal_small(plane, write.part, plain, digest_of(plain, checks), plan)
    if sealed is None:
        return False
    new = Replacement(write, sealed)
    on_outcome = partial(_on_outcome, new, on_done)
    return plane.registers.try_change(
        write.part.name, new.update, on_outcome, small=sealed.small, regardless=new.regardless
    )


def _on_outcome(new: Replacement, on_done: OnDone, outcome: Outcome | Exception) -> None:
    if isinstance(outcome, HasHistory) and new.plane.background.spawn(_add_later(new, on_done)):
        return
    if isinstance(outcome, Exception):
        on_done(SlowDown(BUSY) if isinstance(outcome, HasHistory) else outcome)
        return
    count_put(new.plane, new.sealed)
    try:
        result = new.conclude(outcome)
    except Exception as error:
        on_done(error)
        return
    on_done(result)


async def _add_later(new: Replacement, on_done: OnDone) -> None:
    try:
        result = await _add_version(new.write, new.sealed, None)
    except Exception as error:
        on_done(error)
    else:
        on_done(result)


BUSY = "This key has other versions or copies, and the gateway has too much to do. Nothing was written. Please retry."


class HasHistory(Exception):
    """The key has versions that a replacement must not touch."""


class NewObject(Struct, frozen=True):
    """What a client asks to be stored, without the body."""

    meta: NewMeta
    owner: str
    conditions: WriteConditions


class Write(Struct, frozen=True):
    """An admitted PUT: what is known before its body is read."""

    plane: ObjectPlane
    place: Place
    bucket_key: BucketKey
    part: NewPart
    new: NewObject


def admit(plane: ObjectPlane, bucket: BucketRecord, key: bytes, bucket_key: BucketKey, new: NewObject) -> Write:
    """Gives the object its register, its data key and its data id. Raises InsufficientStorage."""
    name = object_name(bucket.id, bucket.shard_numbers, key)
    plane.room.check(name, bucket.countries)
    fresh = plane.entropy(DEK_BYTES + DATA_ID_BYTES)
    part = NewPart(bucket, name, fresh[:DEK_BYTES], fresh[DEK_BYTES:])
    return Write(plane, Place(bucket.id, key), bucket_key, part, new)


async def check_early(
    plane: ObjectPlane, name: RegisterName, place: Place, keys: BucketKeys, conditions: WriteConditions
) -> None:
    """Answers a condition that can't hold before the body is read. This only spares the body: the commit judges it."""
    if conditions == NO_WRITE_CONDITIONS:
        return
    record = decode_record((await plane.registers.read(name)).value)
    check_write(conditions, await with_keys(keys, lambda: current_of(place, record, keys, conditions)))


def _new_version(write: Write, sealed: Sealed, version_id: str) -> tuple[Version, PutResult]:
    """A version of a sealed body, and what its PUT answers."""
    part, new, digest, modified_ms = write.part, write.new, sealed.digest, write.plane.clock.wall_ms()
    kind = FULL_OBJECT if digest.checksums else ""
    unsealed = UnsealedVersion(version_id, part.data_id, new.owner, modified_ms, (sealed.entry,))
    etag, checksums, dek, encryption, entropy = digest.etag, digest.checksums, part.dek, None, write.plane.entropy
    if new.meta.encryption is not None:
        dek, encryption, content = record_key(write.place, part.data_id, dek, new.meta.encryption, entropy)
        if content is not None:
            etag, checksums = content.etag(etag), content.seal(checksums, part.data_id, entropy)
    meta = meta_of(new.meta, etag, checksums, kind, digest.size)
    version = seal_version(write.place, unsealed, write.bucket_key, dek, meta, entropy, encryption)
    return version, PutResult(
        etag, "", digest.size, digest.checksums, kind, modified_ms, shown(encryption), new.meta.tags
    )


def note_stored(write: Write, result: PutResult) -> None:
    """For the lifecycle of the bucket."""
    write.plane.notes.changed(write.part.bucket, write.place.key, result.size, result.modified_ms, result.tags)


class Replacement:
    """A version that becomes the object's only one (versions are not kept), when the conditions hold for what it
    replaces, once its data is durable.
    """

    __slots__ = (
        "_change", "_found", "_judged", "_result", "_version", "keys", "plane", "regardless", "sealed",
        "write",
    )  # fmt: skip

    def __init__(self, write: Write, sealed: Sealed) -> None:
        self.plane = plane = write.plane
        self.keys = BucketKeys(plane, write.part.bucket)
        self.sealed = sealed
        self.regardless = write.new.conditions == NO_WRITE_CONDITIONS
        """It replaces whatever is there. A create does not read the old record, so it does not notice a damaged one."""
        self.write = write
        self._version, self._result = _new_version(write, sealed, NULL_VERSION)
        record = ObjectRecord((self._version,))
        self._change = record_change(record, sealed.small.data_id if sealed.small is not None else b"")
        self._judged: Value | None = None
        self._found = EMPTY

    def update(self, value: Value | None, entry: PartEntry | None = None) -> Change:
        """``entry``: of the body, when it is no longer where it was when it was sealed. Raises PreconditionFailed,
        DataDamaged, KeyNeeded, HasHistory, ServiceUnavailable."""
        write, sealed = self.write, self.sealed
        self._judged, self._found = value, decode_record(value)  # what can't be read must not be replaced
        if self._found.history is not None:
            raise HasHistory
        conditions = write.new.conditions
        if conditions != NO_WRITE_CONDITIONS:
            check_write(conditions, current_of(write.place, self._found, self.keys, conditions))
        if entry is None or entry == sealed.entry:
            return self._change
        return record_change(ObjectRecord((msgspec.structs.replace(self._version, parts=(entry,)),)))

    def conclude(self, outcome: Outcome) -> PutResult:
        """The version is committed: retires what it replaced. Raises DataDamaged for a record found in its place that
        can't be read."""
        part = self.write.part
        before = self._found if outcome.before is self._judged else decode_record(outcome.before)
        if before.versions:
            retire_removed(self.plane, part.bucket, part.name, before.versions)
        if not part.bucket.plain:
            note_stored(self.write, self._result)
        return self._result


class AddedVersion:
    """A version that becomes the newest one, when the conditions hold for the one that is there. The null version,
    where versioning is suspended, takes the place of the former null version; where there never was any, that of all.
    ``make``: returns the version with an id, and the result of its request; it is called once, here. ``outgoing``: the
    events of the change. ``sealed``: its body; None: it has none of its own.
    """

    def __init__(
        self,
        write: Write,
        make: Callable[[str], tuple[Version, PutResult]],
        outgoing: Outgoing | None = None,
        sealed: Sealed | None = None,
    ) -> None:
        self._write = write
        self._outgoing = outgoing
        self._versioning = write.plane.versioning(write.part.bucket)
        self._small = sealed.small.data_id if sealed is not None and sealed.small is not None else b""
        self._version, self.result = make(NAMED_VERSION if self._versioning == ENABLED else NULL_VERSION)
        self.keys = BucketKeys(write.plane, write.part.bucket)
        self._entry: PartEntry | None = None
        self._lock = lock_of_new(write.plane, write.part.bucket, write.new.meta.lock)
        self.change = VersionsUpdate(self.keys.shelf, self._add, check=unlocked(write.plane))

    def update(self, value: Value | None, entry: PartEntry | None = None) -> Change:
        """``entry``: of the body. Raises PreconditionFailed, DataDamaged, KeyNeeded, PageNeeded."""
        self._entry = entry
        change = self.change.update(value, self._small)
        assert change is not None
        return change

    def _add(self, draft: Draft, ordinal: int) -> bool:
        write, conditions = self._write, self._write.new.conditions
        if conditions != NO_WRITE_CONDITIONS:
            newest = draft.newest.version if draft.newest is not None else None
            check_write(conditions, judged(write.place, newest, self.keys, conditions))
        version = self._version
        if self._entry is not None:
            version = msgspec.structs.replace(version, parts=(self._entry,))
        added = add_version(draft, version, ordinal, self._lock, versioning=bool(self._versioning))
        self.note_added(draft, added)
        shown = "" if added.is_null else added.name
        if self._outgoing is not None:
            self._outgoing.begin()
            self._outgoing.add(draft, ordinal, size=self.result.size, etag=self.result.etag, version=shown)
        self.result = msgspec.structs.replace(self.result, version_id=shown)
        return True

    async def before_accept(self) -> None:
        """To be awaited between the promise and the accept: makes durable what the changed record refers to. Raises
        SlowDown, ServiceUnavailable.
        """
        write = self._write
        await self.change.put_pages(write.plane.pages, write.part.name)
        if self._outgoing is not None:
            await self._outgoing.note()

    def conclude(self) -> PutResult:
        """The version is committed: has its events delivered, and retires what it replaced."""
        write = self._write
        if self._outgoing is not None:
            self._outgoing.committed()
        retire_gone(write.plane, write.part.bucket, write.part.name, self.change.removed)
        note_stored(write, self.result)
        return self.result

    def note_added(self, draft: Draft, added: Entry) -> None:
        """For a version without a body of its own."""

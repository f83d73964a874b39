"""The path of a PUT: admit, seal and place, barrier and commit, conclude.

Two shells call these steps in the same order. ``put`` runs in a task: ``admit``, ``sealed_body``, ``commit``,
``Replacement.conclude``. ``try_put`` costs no task. It takes a small body that has arrived whole, calls the same
functions but for those that would wait, and lets the register call back (``Registers.try_change``). Where one of them
would have to wait, it begins nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import msgspec
from msgspec import Struct

from storaged.ids import DATA_ID_BYTES
from storaged.meta.names import Change, RegisterName, Value, object_name
from storaged.meta.ports import Outcome
from storaged.objects.api import NO_WRITE_CONDITIONS, Body, BodyChecks, NewMeta, PutResult, WriteConditions
from storaged.objects.bucket_keys import BucketKeys, current_of, with_keys
from storaged.objects.code.versions import (
    EMPTY,
    Place,
    UnsealedVersion,
    decode_record,
    meta_of,
    record_change,
    seal_version,
)
from storaged.objects.conditions import check_write, needs_etag
from storaged.objects.plane import ObjectPlane
from storaged.objects.ports import BucketKey
from storaged.objects.records import NULL_VERSION, BucketRecord, ObjectRecord, PartEntry
from storaged.objects.write.blocks import NewPart
from storaged.objects.write.checksums import FULL_OBJECT, digest_of
from storaged.objects.write.commit import commit, count_put
from storaged.objects.write.retire import retire_replaced
from storaged.objects.write.sealing import Sealed, seal_small, sealed_body
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
    bucket_key = plane.keys.try_bucket_key(bucket.id, bucket.countries) or await plane.keys.bucket_key(
        bucket.id, bucket.countries
    )
    write = admit(plane, bucket, key, bucket_key, NewObject(meta, owner, conditions))
    await check_early(plane, write.part.name, write.place, BucketKeys(plane, bucket), conditions)
    async with sealed_body(plane, write.part, body, checks) as sealed:
        new = Replacement(write, sealed)
        outcome, _ = await commit(plane, new.keys, write.part.name, new.update, sealed, regardless=new.regardless)
        return new.conclude(outcome)


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
    bucket_key = plane.keys.try_bucket_key(bucket.id, bucket.countries)
    if (
        bucket_key is None
        or len(plain) > plane.small_bytes_max
        or (conditions != NO_WRITE_CONDITIONS and needs_etag(conditions))
    ):
        return False
    write = admit(plane, bucket, key, bucket_key, NewObject(meta, owner, conditions))
    sealed = seal_small(plane, write.part, plain, digest_of(plain, checks))
    if sealed is None:
        return False
    new = Replacement(write, sealed)
    on_outcome = partial(_on_outcome, new, on_done)
    return plane.registers.try_change(
        write.part.name, new.update, on_outcome, small=sealed.small, regardless=new.regardless
    )


def _on_outcome(
    new: Replacement, on_done: Callable[[PutResult | Exception], None], outcome: Outcome | Exception
) -> None:
    if isinstance(outcome, Exception):
        on_done(outcome)
        return
    count_put(new.plane, new.sealed)
    try:
        result = new.conclude(outcome)
    except Exception as error:
        on_done(error)
        return
    on_done(result)


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
    """Gives the object its register, its data key and its data id."""
    fresh = plane.entropy(DEK_BYTES + DATA_ID_BYTES)
    name = object_name(bucket.id, bucket.shard_numbers, key)
    part = NewPart(bucket, name, fresh[:DEK_BYTES], fresh[DEK_BYTES:])
    return Write(plane, Place(bucket.id, key), bucket_key, part, new)


async def check_early(
    plane: ObjectPlane, name: RegisterName, place: Place, keys: BucketKeys, conditions: WriteConditions
) -> None:
    """Answers a condition that can't hold before the body is read. This only spares the body: the commit judges it."""
    if conditions == NO_WRITE_CONDITIONS:
        return
    record = decode_record((await plane.registers.read(name)).value)
    check_write(
        conditions, await with_keys(keys, lambda: current_of(place, record, keys, with_etag=needs_etag(conditions)))
    )


class Replacement:
    """A version that becomes the object's only one (versions are not kept), when the conditions hold for what it
    replaces, once its data is durable.
    """

    __slots__ = (
        "_change", "_found", "_judged", "_record", "_result", "_version", "_write", "keys", "plane",
        "regardless", "sealed",
    )  # fmt: skip

    def __init__(self, write: Write, sealed: Sealed) -> None:
        self.plane = plane = write.plane
        part, new, digest, modified_ms = write.part, write.new, sealed.digest, plane.clock.wall_ms()
        kind = FULL_OBJECT if digest.checksums else ""
        self.keys = BucketKeys(plane, part.bucket)
        self.sealed = sealed
        self.regardless = new.conditions == NO_WRITE_CONDITIONS
        """It replaces whatever is there. A create does not read the old record, so it does not notice a damaged one."""
        self._write = write
        unsealed = UnsealedVersion(NULL_VERSION, part.data_id, new.owner, modified_ms, (sealed.entry,))
        meta = meta_of(new.meta, digest.etag, digest.checksums, kind, digest.size)
        self._version = seal_version(write.place, unsealed, write.bucket_key, part.dek, meta, plane.entropy)
        self._result = PutResult(digest.etag, NULL_VERSION, digest.size, digest.checksums, kind, modified_ms)
        self._record = ObjectRecord((self._version,))
        self._change = record_change(self._record, sealed.small.data_id if sealed.small is not None else b"")
        self._judged: Value | None = None
        self._found = EMPTY

    def update(self, value: Value | None, entry: PartEntry | None = None) -> Change:
        """``entry``: of the body, when it is no longer where it was when it was sealed. Raises PreconditionFailed,
        DataDamaged, KeyNeeded, ServiceUnavailable."""
        write, sealed = self._write, self.sealed
        self._judged, self._found = value, decode_record(value)  # what can't be read must not be replaced
        conditions = write.new.conditions
        if conditions != NO_WRITE_CONDITIONS:
            check_write(conditions, current_of(write.place, self._found, self.keys, with_etag=needs_etag(conditions)))
        if entry is None or entry is sealed.entry:
            return self._change
        return record_change(ObjectRecord((msgspec.structs.replace(self._version, parts=(entry,)),)))

    def conclude(self, outcome: Outcome) -> PutResult:
        """The version is committed: retires what it replaced. Raises DataDamaged for a record found in its place that
        can't be read."""
        part = self._write.part
        before = self._found if outcome.before is self._judged else decode_record(outcome.before)
        if before.versions:
            retire_replaced(self.plane, part.bucket, part.name, before, self._record)
        return self._result

"""The path of a PUT: read top to bottom.

A body of up to 1 KiB sealed stays in the record; one of up to 16 KiB is kept as whole copies beside its register,
written along with the accept; a larger one
is coded and spread block by block (``writer``), and its barrier overlaps the prepare.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable
from functools import partial
from typing import NamedTuple

import msgspec

from storaged import trace
from storaged.errors import EntityTooLarge
from storaged.fragments.ports import FragmentHeader, encode_copies
from storaged.hashes import fragment_hash
from storaged.ids import DATA_ID_BYTES
from storaged.meta.names import Change, RegisterName, Value, object_name
from storaged.meta.ports import Outcome, SmallCopies
from storaged.objects.api import NO_WRITE_CONDITIONS, Body, BodyChecks, NewMeta, PutResult, WriteConditions
from storaged.objects.code.seal import seal_part
from storaged.objects.code.versions import (
    EMPTY,
    BucketKeys,
    Place,
    change_with_keys,
    current_of,
    decode_record,
    meta_of,
    record_change,
    seal_version,
    with_keys,
)
from storaged.objects.conditions import check_write, needs_etag
from storaged.objects.plane import ObjectPlane
from storaged.objects.ports import BucketKey
from storaged.objects.records import NULL_VERSION, BucketRecord, ObjectRecord, PartEntry, Version
from storaged.objects.write.body import BodyReader, whole_of
from storaged.objects.write.checksums import FULL_OBJECT, BodyDigest, Digest, digest_of
from storaged.objects.write.commit import commit
from storaged.objects.write.retire import retire_replaced
from storaged.objects.write.writer import OnPlain, PartWriter, RunsChanged
from storaged.sov1 import SALT_BYTES, TAG_BYTES
from storaged.wire import Buffer

DEK_BYTES = 32


class Sealed(NamedTuple):
    """A version about to be committed: how its entry may still change at the barrier, and what goes with the accept."""

    entry: PartEntry
    digest: Digest
    small: SmallCopies | None = None
    writer: PartWriter | None = None


class _Source(NamedTuple):
    """A body to be coded: what reads it (``size`` bytes, when that is known), and what digests it on the way."""

    reader: BodyReader
    size: int | None
    update: OnPlain
    finish: Callable[[], Digest]


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
    """Stores an object. When this returns it is durable, and every later read sees it. When it raises, nothing was
    changed (OutcomeUnknown says when that is not sure).
    """
    bucket_key = plane.keys.try_bucket_key(bucket.id, bucket.countries) or await plane.keys.bucket_key(
        bucket.id, bucket.countries
    )
    write = _write_of(plane, bucket, key, bucket_key, meta, owner, conditions)
    name, size = write.name, checks.size
    if conditions != NO_WRITE_CONDITIONS:
        await check_early(plane, name, write.where, BucketKeys(plane, bucket), conditions)
    if size is not None and size <= plane.limits.small_bytes_max:
        with trace.span("receive"):
            plain = await whole_of(body, size)
        with trace.span("digest"):
            digest = digest_of(plain, checks)
        sealed = seal_small(plane, bucket, name, plain, digest, write.dek, write.data_id, 1)
        if sealed is not None:
            return await _commit_put(write, sealed)
        async with _coded(plane, bucket, name, _digested(plain, digest), write.dek, write.data_id, 1) as sealed:
            return await _commit_put(write, sealed)
    async with sealed_body(plane, bucket, name, body, checks, dek=write.dek, data_id=write.data_id) as sealed:
        return await _commit_put(write, sealed)


def try_put(
    plane: ObjectPlane,
    bucket: BucketRecord,
    key: bytes,
    plain: Buffer,
    meta: NewMeta,
    checks: BodyChecks,
    then: Callable[[PutResult | Exception], None],
    *,
    owner: str,
    conditions: WriteConditions = NO_WRITE_CONDITIONS,
) -> bool:
    """See ``api.Objects``. Of a condition it is enough that the commit judges it: there is no body
    left to be spared.
    """
    bucket_key = plane.keys.try_bucket_key(bucket.id, bucket.countries)
    if (
        bucket_key is None
        or len(plain) > plane.limits.small_bytes_max
        or (conditions != NO_WRITE_CONDITIONS and needs_etag(conditions))
    ):
        return False
    write = _write_of(plane, bucket, key, bucket_key, meta, owner, conditions)
    sealed = seal_small(plane, bucket, write.name, plain, digest_of(plain, checks), write.dek, write.data_id, 1)
    if sealed is None:
        return False
    replacing, result = _replacing(write, sealed)
    over = partial(_put_over, replacing, result, then)
    return plane.registers.change_soon(
        write.name, replacing.update, over, small=sealed.small, regardless=replacing.regardless
    )


def _put_over(
    replacing: _Replacing,
    result: PutResult,
    then: Callable[[PutResult | Exception], None],
    outcome: Outcome | Exception,
) -> None:
    if isinstance(outcome, Exception):
        then(outcome)
        return
    try:
        replacing.over(outcome)
    except Exception as error:
        then(error)
        return
    then(result)


class _Write(NamedTuple):
    """What a PUT knows before it has read the body."""

    plane: ObjectPlane
    bucket: BucketRecord
    name: RegisterName
    where: Place
    bucket_key: BucketKey
    dek: bytes
    data_id: bytes
    meta: NewMeta
    owner: str
    conditions: WriteConditions


def _write_of(
    plane: ObjectPlane,
    bucket: BucketRecord,
    key: bytes,
    bucket_key: BucketKey,
    meta: NewMeta,
    owner: str,
    conditions: WriteConditions,
) -> _Write:
    name, where = object_name(bucket.id, bucket.shard_numbers, key), Place(bucket.id, key)
    fresh = plane.entropy(DEK_BYTES + DATA_ID_BYTES)
    return _Write(plane, bucket, name, where, bucket_key, fresh[:DEK_BYTES], fresh[DEK_BYTES:], meta, owner, conditions)


async def _commit_put(write: _Write, sealed: Sealed) -> PutResult:
    plane = write.plane
    replacing, result = _replacing(write, sealed)
    if sealed.writer is None:
        outcome = await change_with_keys(
            plane.registers,
            replacing.keys,
            write.name,
            replacing.update,
            small=sealed.small,
            regardless=replacing.regardless,
        )
    else:
        outcome, _ = await commit_sealed(plane, replacing.keys, write.name, replacing.update, sealed)
    replacing.over(outcome)
    return result


def _replacing(write: _Write, sealed: Sealed) -> tuple[_Replacing, PutResult]:
    """What is to be committed, and what the client is told when it was."""
    digest, modified_ms = sealed.digest, write.plane.clock.wall_ms()
    kind = FULL_OBJECT if digest.checksums else ""
    version = seal_version(
        write.plane,
        write.where,
        write.bucket_key,
        write.dek,
        meta_of(write.meta, digest.etag, digest.checksums, kind, digest.size),
        version_id=NULL_VERSION,
        context_id=write.data_id,
        owner=write.owner,
        modified_ms=modified_ms,
        parts=(sealed.entry,),
    )
    return _Replacing(write, version, sealed), PutResult(
        digest.etag, NULL_VERSION, digest.size, digest.checksums, kind, modified_ms
    )


class _Replacing:
    """A version that becomes the object's only one (versions are not kept), when the conditions hold on what it
    replaces, once its data is durable.
    """

    __slots__ = ("_change", "_found", "_judged", "_record", "_sealed", "_started", "_version", "_write", "keys")

    def __init__(self, write: _Write, version: Version, sealed: Sealed) -> None:
        self.keys = BucketKeys(write.plane, write.bucket)
        self._write = write
        self._version = version
        self._sealed = sealed
        self._started = write.plane.clock.monotonic()
        self._record = ObjectRecord((version,))
        self._change = record_change(self._record, sealed.small.data_id if sealed.small is not None else b"")
        self._judged: Value | None = None
        self._found = EMPTY

    @property
    def regardless(self) -> bool:
        """It replaces whatever is there (what cannot be read, but that is found by who asks first)."""
        return self._write.conditions == NO_WRITE_CONDITIONS

    def update(self, value: Value | None, entry: PartEntry | None = None) -> Change:
        """``entry``: of the body, when it is no longer where it was when it was sealed."""
        write, sealed = self._write, self._sealed
        if sealed.small is not None:  # a proposer that slept must not write anew what a collector is about to delete
            write.plane.check_age(self._started, self._version.modified_ms)
        self._judged, self._found = value, decode_record(value)  # what cannot be read must not be replaced
        conditions = write.conditions
        if conditions != NO_WRITE_CONDITIONS:
            check_write(conditions, current_of(write.where, self._found, self.keys, with_etag=needs_etag(conditions)))
        if entry is None or entry is sealed.entry:
            return self._change
        return record_change(ObjectRecord((msgspec.structs.replace(self._version, parts=(entry,)),)))

    def over(self, outcome: Outcome) -> None:
        """It is committed. Raises DataDamaged for a record found in its place that can't be read."""
        write = self._write
        if self._sealed.writer is None:  # else ``commit_sealed`` has counted it
            _count_put(write.plane, self._sealed)
        before = self._found if outcome.before is self._judged else decode_record(outcome.before)
        if before.versions:
            retire_replaced(write.plane, write.bucket, write.name, before, self._record)


def _count_put(plane: ObjectPlane, sealed: Sealed) -> None:
    counters = plane.counters
    counters.bytes_in += sealed.digest.size
    if sealed.small is not None:
        counters.puts_small += 1
    elif sealed.entry.inline:
        counters.puts_inline += 1


async def check_early(
    plane: ObjectPlane, name: RegisterName, where: Place, keys: BucketKeys, conditions: WriteConditions
) -> None:
    """Answers a condition that can't hold before the body is read. Advice: what counts is judged at the commit."""
    if conditions == NO_WRITE_CONDITIONS:
        return
    record = decode_record((await plane.registers.read(name)).value)
    check_write(
        conditions, await with_keys(keys, lambda: current_of(where, record, keys, with_etag=needs_etag(conditions)))
    )


@contextlib.asynccontextmanager
async def sealed_body(
    plane: ObjectPlane,
    bucket: BucketRecord,
    name: RegisterName,
    body: Body,
    checks: BodyChecks,
    *,
    dek: bytes,
    data_id: bytes,
    number: int = 0,
) -> AsyncIterator[Sealed]:
    """Reads, verifies and seals a body in the form that its size asks for. What was written is discarded when the
    caller's commit raises.

    ``name`` is the object's register. ``number``: of an upload's part, which is never kept as copies beside a register;
    0 for a whole object, one that is known to
    be larger than ``small_bytes_max`` or of unknown size.
    """
    limits = plane.limits
    bytes_max = limits.part_bytes_max if number else limits.put_bytes_max
    if checks.size is not None and checks.size > bytes_max:
        raise EntityTooLarge(MaxSizeAllowed=str(bytes_max), ProposedSize=str(checks.size))
    reader, digest = BodyReader(body, bytes_max), BodyDigest(checks)
    source = _Source(reader, checks.size, digest.update, digest.finish)
    small_max = limits.inline_sealed_bytes_max - TAG_BYTES if number else limits.small_bytes_max
    if checks.size is None or checks.size <= small_max:
        head = memoryview(bytearray((small_max if checks.size is None else checks.size) + 1))
        with trace.span("receive"):
            count = await reader.fill(head)
        if reader.ended:
            plain = head[:count]
            with trace.span("digest"):
                found = digest_of(plain, checks)
            sealed = seal_small(plane, bucket, name, plain, found, dek, data_id, number or 1)
            if sealed is not None:
                yield sealed
                return
            source = _digested(plain, found)
        else:
            reader.unread(head[:count])
    async with _coded(plane, bucket, name, source, dek, data_id, number or 1) as sealed:
        yield sealed


@contextlib.asynccontextmanager
async def _coded(
    plane: ObjectPlane,
    bucket: BucketRecord,
    name: RegisterName,
    source: _Source,
    dek: bytes,
    data_id: bytes,
    number: int,
) -> AsyncIterator[Sealed]:
    """The body coded and on its way to the disks; discarded when the caller's commit raises."""
    async with PartWriter(
        plane,
        owner=name,
        data_id=data_id,
        number=number,
        dek=dek,
        target=plane.target_of(bucket),
        size=source.size,
        countries=bucket.countries,
    ) as writer:
        try:
            await writer.write(source.reader, source.update)
            plane.counters.puts_coded += 1
            yield Sealed(writer.entry(), source.finish(), writer=writer)
        except BaseException:
            plane.background.spawn(writer.discard())
            raise


def _digested(plain: Buffer, digest: Digest) -> _Source:
    """A body that is here whole, and was verified: a small one that can't be kept as copies now."""
    return _Source(BodyReader(_once(plain), digest.size), digest.size, lambda _plain: None, lambda: digest)


async def _once(plain: Buffer) -> AsyncIterator[Buffer]:
    yield plain


def seal_small(
    plane: ObjectPlane,
    bucket: BucketRecord,
    name: RegisterName,
    plain: Buffer,
    digest: Digest,
    dek: bytes,
    data_id: bytes,
    number: int,
) -> Sealed | None:
    """Seals a body that is one chunk, to stay in the record or to go along with the accept; None when too few of the
    register's disks can take copies now, and
    nothing was done."""
    target, inline = plane.target_text(bucket), len(plain) + TAG_BYTES <= plane.limits.inline_sealed_bytes_max
    if not inline:
        plan = plane.copy_plan(name)
        if not plan.enough(frozenset(filter(plane.liveness.disk_writable, plan.replicas))):
            return None
    with trace.span("seal"):
        header, sealed = seal_part(dek, data_id, number, plain, plane.entropy(SALT_BYTES))
    if inline:
        return Sealed(PartEntry(number, data_id, digest.size, header, 1, target, (), sealed), digest)
    copy = FragmentHeader(
        data_id + plan.id_tail,
        name.pack(),
        b"",
        (fragment_hash((sealed,)),),
        1 << header[5],
        len(sealed),
        plane.clock.wall_ms(),
    )
    payload = [sealed]
    fragments = [(encoded, payload) for encoded in encode_copies(copy, len(plan.replicas))]
    entry = PartEntry(number, data_id, digest.size, header, 1, target, plan.runs, small=True)
    return Sealed(entry, digest, SmallCopies(data_id, fragments, plan.enough))


async def commit_sealed(
    plane: ObjectPlane,
    keys: BucketKeys,
    name: RegisterName,
    update: Callable[[Value | None, PartEntry], Change],
    sealed: Sealed,
) -> tuple[Outcome, PartEntry]:
    """Commits what refers to a sealed body once that is durable. ``update`` gets the entry as the barrier left it: a
    part's place is in the clear, so nothing is
    sealed anew when disks failed at the last moment and its blocks were moved."""
    writer, entry = sealed.writer, sealed.entry
    while True:
        try:
            outcome = await commit(
                plane,
                keys,
                name,
                partial(_with_entry, update, entry, writer),
                ready=writer.barrier if writer else None,
                still_there=writer.still_there if writer else None,
                small=sealed.small,
            )
        except RunsChanged:
            assert writer is not None
            entry = writer.entry()
        else:
            _count_put(plane, sealed)
            if writer is not None and writer.degraded:
                plane.on_degraded(name)
            return outcome, entry


def _with_entry(
    update: Callable[[Value | None, PartEntry], Change],
    entry: PartEntry,
    writer: PartWriter | None,
    value: Value | None,
) -> Change:
    if writer is not None:
        writer.check_age()
    return update(value, entry)

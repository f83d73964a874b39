"""The path of a PUT: read top to bottom.

A body of up to 1 KiB sealed stays in the record; one of up to 16 KiB is kept as whole copies beside its register, written along with the prepare; a larger one
is coded and spread block by block (``writer``), and its barrier overlaps the prepare.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import AsyncIterator, Callable
from typing import NamedTuple

import msgspec
import xxhash

from storaged import trace
from storaged.errors import EntityTooLarge
from storaged.fragments.ports import FragmentHeader, FragmentId
from storaged.ids import DATA_ID_BYTES
from storaged.meta.names import Change, RegisterName, Value, object_name
from storaged.meta.ports import Outcome, SmallCopies
from storaged.objects import place
from storaged.objects.api import Body, BodyChecks, NewMeta, PutResult, WriteConditions
from storaged.objects.body import BodyReader
from storaged.objects.checksums import FULL_OBJECT, BodyDigest, Digest
from storaged.objects.commit import commit
from storaged.objects.conditions import NO_WRITE_CONDITIONS, check_write, needs_etag
from storaged.objects.geometry import chunk_bytes_for
from storaged.objects.plane import ObjectPlane
from storaged.objects.records import NULL_VERSION, BucketRecord, ObjectRecord, PartEntry, Run, Version
from storaged.objects.retire import retire_replaced
from storaged.objects.seal import SALT_BYTES, TAG_BYTES, PartSealer
from storaged.objects.versions import (
    BucketKeys,
    Place,
    VersionSealer,
    current_of,
    decode_record,
    meta_of,
    record_change,
    with_keys,
)
from storaged.objects.writer import PartWriter, RunsChanged
from storaged.wire import encode

DEK_BYTES = 32


class Sealed(NamedTuple):
    """A version about to be committed: how its entry may still change at the barrier, and what goes with the prepare."""

    entry: PartEntry
    digest: Digest
    small: SmallCopies | None = None
    writer: PartWriter | None = None


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
    """Stores an object. When this returns it is durable, and every later read sees it. When it raises, nothing was changed (OutcomeUnknown says when that is not sure)."""
    name = object_name(bucket.id, bucket.shards, key)
    where = Place(bucket.id, key)
    keys = BucketKeys(plane, bucket)
    newest = await keys.newest()
    await check_early(plane, name, where, keys, conditions)
    dek, data_id = plane.entropy(DEK_BYTES), plane.entropy(DATA_ID_BYTES)
    async with sealed_body(plane, bucket, name, body, checks, dek=dek, data_id=data_id) as sealed:
        digest, modified_ms = sealed.digest, plane.clock.wall_ms()
        sealer = VersionSealer(plane, where, newest, dek, NULL_VERSION, data_id)
        kind = FULL_OBJECT if digest.checksums else ""
        version = sealer.version(
            meta_of(meta, digest.etag, digest.checksums, kind, digest.size),
            size=digest.size,
            owner=owner,
            modified_ms=modified_ms,
            parts=(sealed.entry,),
        )
        await commit_version(plane, bucket, name, where, keys, version, sealed, conditions)
    return PutResult(digest.etag, NULL_VERSION, digest.size, digest.checksums, kind, modified_ms)


async def check_early(plane: ObjectPlane, name: RegisterName, where: Place, keys: BucketKeys, conditions: WriteConditions) -> None:
    """Answers a condition that can't hold before the body is read. Advice: what counts is judged at the commit."""
    if conditions == NO_WRITE_CONDITIONS:
        return
    record = decode_record((await plane.registers.read(name)).value)
    check_write(conditions, await with_keys(keys, lambda: current_of(where, record, keys, with_etag=needs_etag(conditions))))


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
    """Reads, verifies and seals a body in the form that its size asks for. What was written is discarded when the caller's commit raises.

    ``name`` is the object's register. ``number``: of an upload's part, which is never kept as copies beside a register; 0 for a whole object.
    """
    limits = plane.limits
    bytes_max = limits.part_bytes_max if number else limits.put_bytes_max
    if checks.size is not None and checks.size > bytes_max:
        raise EntityTooLarge(MaxSizeAllowed=str(bytes_max), ProposedSize=str(checks.size))
    reader, digest = BodyReader(body, bytes_max), BodyDigest(checks)
    small_max = (limits.inline_sealed_bytes_max if number else limits.small_sealed_bytes_max) - TAG_BYTES
    if checks.size is None or checks.size <= small_max:
        head = memoryview(bytearray((small_max if checks.size is None else checks.size) + 1))
        with trace.span("receive"):
            count = await reader.fill(head)
        if reader.ended:
            with trace.span("digest"):
                digest.update(head[:count])
                found = digest.finish()
            form = _small_form(plane, bucket, name, head[:count], dek, data_id, number or 1)
            if form is not None:
                yield Sealed(form[0], found, form[1])
                return
            digest, checks = BodyDigest(BodyChecks(algorithms=tuple(found.checksums))), BodyChecks(size=count)
        reader.unread(head[:count])
    async with PartWriter(
        plane,
        owner=name,
        data_id=data_id,
        number=number or 1,
        dek=dek,
        target=plane.target_of(bucket),
        size=checks.size,
        countries=bucket.countries,
    ) as writer:
        try:
            await writer.write(reader, digest.update)
            plane.counters.puts_coded += 1
            yield Sealed(writer.entry(), digest.finish(), writer=writer)
        except BaseException:
            plane.background.spawn(writer.discard())
            raise


def _small_form(
    plane: ObjectPlane, bucket: BucketRecord, name: RegisterName, plain: memoryview, dek: bytes, data_id: bytes, number: int
) -> tuple[PartEntry, SmallCopies | None] | None:
    """A body that stays in the record, or goes along with the prepare as whole copies; None when too few of the register's disks can take copies now."""
    sealer = PartSealer(dek, data_id, number, chunk_bytes_for(len(plain), 1), plane.entropy(SALT_BYTES))
    with trace.span("seal"):
        sealed = sealer.seal(0, plain)
    target = str(plane.target_of(bucket))
    if len(sealed) <= plane.limits.inline_sealed_bytes_max:
        plane.counters.puts_inline += 1
        return PartEntry(number, data_id, len(plain), sealer.header, 1, target, (), sealed), None
    layout = plane.layouts.current
    replicas = layout.replicas_of(name.partition)
    writable = plane.liveness.disk_writable
    if not place.enough_copies(layout, replicas, frozenset(filter(writable, replicas)), writable):
        return None
    plane.counters.puts_small += 1
    copies = len(replicas)
    hashes, owner, now_ms = (xxhash.xxh3_128_digest(sealed),), name.pack(), plane.clock.wall_ms()
    fragments = [
        (
            encode(
                FragmentHeader(
                    FragmentId(data_id, 0, 1, copies - 1, position).pack(),
                    owner,
                    sealer.header,
                    hashes,
                    sealer.chunk_bytes,
                    len(sealed),
                    now_ms,
                )
            ),
            [sealed],
        )
        for position in range(copies)
    ]
    run = Run(0, 1, 1, copies - 1, layout.epoch)
    entry = PartEntry(number, data_id, len(plain), sealer.header, 1, target, (run,), small=True)
    return entry, SmallCopies(data_id, fragments, lambda synced: place.enough_copies(layout, replicas, synced, writable))


async def commit_version(
    plane: ObjectPlane,
    bucket: BucketRecord,
    name: RegisterName,
    where: Place,
    keys: BucketKeys,
    version: Version,
    sealed: Sealed,
    conditions: WriteConditions,
) -> None:
    """Makes ``version`` the object's only one (versions are not kept), when the conditions hold on what it replaces, once its data is durable."""

    def update(value: Value | None, entry: PartEntry) -> Change:
        record = decode_record(value)  # what cannot be read must not be replaced
        if conditions != NO_WRITE_CONDITIONS:
            check_write(conditions, current_of(where, record, keys, with_etag=needs_etag(conditions)))
        payload = sealed.small.data_id if sealed.small is not None else b""
        return record_change(ObjectRecord((msgspec.structs.replace(version, parts=(entry,)),)), payload)

    outcome, _ = await commit_sealed(plane, keys, name, update, sealed)
    retire_replaced(plane, bucket, name, decode_record(outcome.before), ObjectRecord((version,)))


async def commit_sealed(
    plane: ObjectPlane, keys: BucketKeys, name: RegisterName, update: Callable[[Value | None, PartEntry], Change], sealed: Sealed
) -> tuple[Outcome, PartEntry]:
    """Commits what refers to a sealed body once that is durable. ``update`` gets the entry as the barrier left it: a part's place is in the clear, so nothing is
    sealed anew when disks failed at the last moment and its blocks were moved."""
    writer, entry = sealed.writer, sealed.entry
    while True:
        try:
            outcome = await commit(
                plane,
                keys,
                name,
                functools.partial(_with_entry, update, entry, writer),
                ready=writer.barrier if writer else None,
                still_there=writer.still_there if writer else None,
                small=sealed.small,
            )
        except RunsChanged:
            assert writer is not None
            entry = writer.entry()
        else:
            plane.counters.bytes_in += sealed.digest.size
            if writer is not None and writer.degraded:
                plane.on_degraded(name)
            return outcome, entry


def _with_entry(
    update: Callable[[Value | None, PartEntry], Change], entry: PartEntry, writer: PartWriter | None, value: Value | None
) -> Change:
    if writer is not None:
        writer.check_age()
    return update(value, entry)

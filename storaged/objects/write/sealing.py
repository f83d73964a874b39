"""Seal and place: a body becomes sealed bytes, in the form that its size asks for.

* Up to ``inline_sealed_bytes_max`` sealed, it stays in the record.
* Up to ``small_bytes_max``, or less where the bucket has chosen so, it is kept as whole copies beside the register.
  They are written along with the accept. A part of an upload is never kept so.
* A larger one, or one whose register has too few writable disks for copies, is coded and spread block by block
  (``writer``). So is one of more than ``INLINE_BYTES_MAX`` whose size is not known before it has arrived.

In the first two forms nothing is on a disk yet when the body is sealed; the commit brings it there. A body of up to
``INLINE_BYTES_MAX`` is read whole, digested and sealed on the event loop; so is one of up to ``SOON_BYTES_MAX`` that a
front without a task has whole (``put.try_put``). Others take memory of the pools, and a thread digests and seals them.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable
from typing import NamedTuple

from msgspec import Struct

from storaged import trace
from storaged.errors import EntityTooLarge
from storaged.fragments.ports import FragmentHeader, encode_copies
from storaged.hashes import fragment_hash, transfer_checksum
from storaged.meta.ports import SmallCopies
from storaged.objects.api import Body, BodyChecks
from storaged.objects.cache.buffers import Transfer
from storaged.objects.code.place import CopyPlan
from storaged.objects.code.seal import PartSealer, seal_part
from storaged.objects.plane import ObjectPlane
from storaged.objects.records import PartEntry
from storaged.objects.write.blocks import INLINE_BYTES_MAX, NewPart, OnPlain
from storaged.objects.write.body import BodyReader, whole_of
from storaged.objects.write.checksums import BodyDigest, Digest, digest_of
from storaged.objects.write.writer import PartWriter
from storaged.sov1 import CHUNK_BYTES_MAX, SALT_BYTES, TAG_BYTES, chunk_count, chunks_size
from storaged.wire import Buffer


class Sealed(Struct, frozen=True):
    """A sealed body. ``small``: the copies that travel with the accept. ``writer``: has sent the blocks of a coded one
    to their disks; its barrier makes them durable, and may still change the entry.
    """

    entry: PartEntry
    digest: Digest
    small: SmallCopies | None = None
    writer: PartWriter | None = None


class Source(NamedTuple):
    """A body to be coded: what reads it (``size`` bytes, when that is known), and what digests it on the way."""

    reader: BodyReader
    size: int | None
    update: OnPlain
    finish: Callable[[], Digest]


@contextlib.asynccontextmanager
async def sealed_body(plane: ObjectPlane, part: NewPart, body: Body, checks: BodyChecks) -> AsyncIterator[Sealed]:
    """Reads, verifies and seals a body. What was written is discarded when the caller's commit raises.

    Raises EntityTooLarge, ServiceUnavailable, SlowDown, and what the body and its digests raise.
    """
    limits = plane.limits
    bytes_max = limits.part_bytes_max if part.number else limits.put_bytes_max
    if checks.size is not None and checks.size > bytes_max:
        raise EntityTooLarge(MaxSizeAllowed=str(bytes_max), ProposedSize=str(checks.size))
    copied_max = limits.inline_sealed_bytes_max - TAG_BYTES if part.number else plane.small_bytes_in(part.bucket)
    whole_max = min(copied_max, INLINE_BYTES_MAX)
    plain: Buffer | None = None
    source: Source | None = None
    if checks.size is not None and checks.size <= whole_max:
        with trace.span("receive"):
            plain = await whole_of(body, checks.size)
    else:
        reader, digest = BodyReader(body, bytes_max), BodyDigest(checks)
        source = Source(reader, checks.size, digest.update, digest.finish)
        if checks.size is None:
            plain = await _read_small(reader, whole_max)
    if plain is not None:
        with trace.span("digest"):
            found = digest_of(plain, checks)
        with trace.span("seal"):
            sealed = seal_small(plane, part, plain, found)
        if sealed is not None:
            yield sealed
            return
        source = _arrived(plain, found)
    assert source is not None
    copied = checks.size is not None and whole_max < checks.size <= copied_max and plan_of(plane, part) is not None
    async with _copied(plane, part, source) if copied else _coded(plane, part, source) as sealed:
        yield sealed


async def _read_small(reader: BodyReader, bytes_max: int) -> Buffer | None:
    """The whole body, when it has at most ``bytes_max``; else None, and the reader begins again."""
    head = memoryview(bytearray(bytes_max + 1))
    with trace.span("receive"):
        count = await reader.fill(head)
    if reader.ended:
        return head[:count]
    reader.unread(head[:count])
    return None


@contextlib.asynccontextmanager
async def _coded(plane: ObjectPlane, part: NewPart, source: Source) -> AsyncIterator[Sealed]:
    """The body coded and on its way to the disks; discarded when the caller's commit raises."""
    async with PartWriter(plane, part, source.size) as writer:
        try:
            await writer.write(source.reader, source.update)
            plane.counters.puts_coded += 1
            yield Sealed(writer.entry(), source.finish(), writer=writer)
        except BaseException:
            plane.background.spawn(writer.discard())
            raise


@contextlib.asynccontextmanager
async def _copied(plane: ObjectPlane, part: NewPart, source: Source) -> AsyncIterator[Sealed]:
    """A body of known size, sealed for copies: in a thread, and in memory of the pools, as a block. Where its copies go
    is decided when it has arrived: a client may take minutes to send it, and meanwhile the register moves, or its disks
    become full. Where too few of them take copies then, it is coded.
    """
    assert source.size is not None
    sealer = PartSealer(part.dek, part.data_id, part.sealed_number, CHUNK_BYTES_MAX, plane.entropy(SALT_BYTES))
    with Transfer(plane.fill_buffers), Transfer(plane.put_buffers), contextlib.ExitStack() as leases:
        filling = await plane.fill_buffers.lease(source.size)
        leases.callback(filling.release)
        beyond = memoryview(bytearray(1))  # not in the lease, which has no room for one byte more than a power of two
        with trace.span("receive"):
            count = await source.reader.fill(filling.view[: source.size])
            more = await source.reader.fill(beyond)
        lease = await plane.put_buffers.lease(chunks_size(count, CHUNK_BYTES_MAX))
        leases.callback(lease.release)

        def work() -> tuple[memoryview, bytes]:
            plain = filling.view[:count]
            with trace.span_of(span, "digest"):
                source.update(plain)
                source.update(beyond[:more])
            with trace.span_of(span, "seal"):
                sealed = lease.view[: sealer.seal_block(0, plain, lease.view, last=True)]
            return sealed, fragment_hash((sealed,))

        span = trace.current()
        sealed, copy_hash = await plane.in_thread(work)
        digest, plan = source.finish(), plan_of(plane, part)
        if plan is not None:
            filling.release()
            yield _copies_of(plane, part, plan, digest, sealer.header, sealed, copy_hash)
            return
        del sealed  # a view would keep the buffer from being reused
        plain = bytes(filling.view[:count])
    async with _coded(plane, part, _arrived(plain, digest)) as coded:
        yield coded


def _arrived(plain: Buffer, digest: Digest) -> Source:
    """A body that has arrived and was digested."""
    return Source(BodyReader(_once(plain), digest.size), digest.size, lambda _plain: None, lambda: digest)


async def _once(plain: Buffer) -> AsyncIterator[Buffer]:
    yield plain


def seal_small(
    plane: ObjectPlane, part: NewPart, plain: Buffer, digest: Digest, plan: CopyPlan | None = None
) -> Sealed | None:
    """Seals a small body, for the record or for copies beside the register. ``plan``: where copies go, if that was
    asked before. None, with nothing done: too few of the register's disks can take copies now, or the layout trusts no
    operator alone, so that none may have a whole copy.
    """
    dek, data_id, number, target = part.dek, part.data_id, part.sealed_number, plane.layouts.current.target_text
    inline = len(plain) + TAG_BYTES <= plane.limits.inline_sealed_bytes_max
    if not inline and plan is None:
        plan = plan_of(plane, part)
    if plane.layouts.current.spreads or (not inline and plan is None):
        return None
    header, sealed = seal_part(dek, data_id, number, plain, plane.entropy(SALT_BYTES))
    if plan is None:
        return Sealed(PartEntry(number, data_id, digest.size, header, 1, target, (), bytes(sealed)), digest)
    return _copies_of(plane, part, plan, digest, header, sealed, fragment_hash((sealed,)))


def plan_of(plane: ObjectPlane, part: NewPart) -> CopyPlan | None:
    """Where an object's copies go. None: too few of the register's disks can take copies now, or the layout trusts no
    operator alone, so that none may have a whole copy.
    """
    if plane.layouts.current.spreads or plane.versioning(part.bucket):
        return None  # only the null version of a bucket without versioning has copies (``code.history``)
    plan = plane.copy_plan(part.name)
    return plan if plan.enough(frozenset(filter(plane.liveness.disk_writable, plan.state.disks))) else None


def _copies_of(
    plane: ObjectPlane, part: NewPart, plan: CopyPlan, digest: Digest, header: bytes, sealed: Buffer, copy_hash: bytes
) -> Sealed:
    """The sealed body as whole copies beside the register. ``header``: of its stream. ``copy_hash``: of its bytes."""
    data_id, number, cell_bytes = part.data_id, part.sealed_number, 1 << header[5]
    copy = FragmentHeader(
        data_id + plan.id_tail,
        part.name.pack(),
        b"",
        (copy_hash,),
        cell_bytes,
        len(sealed),
        plane.clock.wall_ms(),
    )
    payload = [sealed]
    fragments = [(encoded, payload) for encoded in encode_copies(copy, plan.copies)]
    cells, target = chunk_count(digest.size, cell_bytes), plane.layouts.current.target_text
    entry = PartEntry(number, data_id, digest.size, header, cells, target, plan.runs, b"", True, copy_hash)
    return Sealed(entry, digest, SmallCopies(data_id, fragments, plan.enough, transfer_checksum(payload)))

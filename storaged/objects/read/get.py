"""The path of a GET: record, conditions, range, windows of verified plaintext.

The record comes from a majority. What is asked for is mapped to windows (``reader``), of which the first is read and
verified before ``get`` returns, so that
everything that can go wrong until then is a proper answer; the next window is read while one is sent.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from functools import partial
from typing import NamedTuple

import msgspec

from storaged import trace
from storaged.errors import DataDamaged, InvalidPartNumber, InvalidRange, StoragedError
from storaged.meta.names import RegisterName, object_name
from storaged.objects.api import NO_READ_CONDITIONS, ObjectInfo, RangeSpec, ReadConditions, Reading, ReadResult
from storaged.objects.background import cancel_all
from storaged.objects.cache.buffers import Lease, Transfer, window_bytes_for
from storaged.objects.cache.opened_records import OpenedRecord
from storaged.objects.code.manifest import bound_parts_of, parts_of, sealed_parts_of
from storaged.objects.code.seal import part_key
from storaged.objects.code.versions import OpenedVersion, Place, decode_record, find_version, info_of, open_version
from storaged.objects.conditions import check_copy_source, check_read
from storaged.objects.plane import ObjectPlane
from storaged.objects.ports import BucketKey, SealBroken
from storaged.objects.read.hedging import HedgeDelay
from storaged.objects.read.part_reader import PartReader, Window
from storaged.objects.records import BucketRecord, PartEntry, SealedPart, Version
from storaged.units import KIB, MIB
from storaged.wire import Buffer

SLOW_BYTES_PER_S = 2 * MIB
"""A client that takes less gets small windows, and none read ahead: memory that moves so slowly
serves others better.
"""
SLOW_S_MIN = 0.1
"""A client is not judged by less: a busy event loop delays anybody so long."""
SLOW_WINDOW_BYTES = 256 * KIB
AHEAD_LEFT_MIN = 0.25
"""Nothing is read ahead when less than this share of the memory is free: the rest is for first windows."""
READ_AGAIN_MAX = 3
"""A read that meets missing fragments before its first byte reads the record again: the object may have been replaced
meanwhile.
"""


class Found(NamedTuple):
    """A version as a read found it; ``copy``: a small object's sealed bytes, when a replica sent them along; ``kept``:
    where what follows from it is remembered.
    """

    name: RegisterName
    opened: OpenedVersion
    copy: Buffer | None
    kept: OpenedRecord | None


class Span(NamedTuple):
    """``first .. first + length - 1``; ``partial``: less than the object was asked for (a 206 answer)."""

    first: int
    length: int
    partial: bool


async def find(
    plane: ObjectPlane,
    bucket: BucketRecord,
    key: bytes,
    version_id: str,
    *,
    want_payload: bool = False,
    reading: Reading | None = None,
) -> Found:
    """``reading``: of the key's register, when it was just read. Raises NoSuchKey, NoSuchVersion, DataDamaged,
    ServiceUnavailable.
    """
    name = object_name(bucket.id, bucket.shard_numbers, key)
    if reading is None:
        with trace.span("record"):
            reading = await plane.registers.read(name, want_payload=want_payload)
    found = _kept(plane, name, bucket, key, version_id, reading)
    if found is not None:
        return found
    version = find_version(decode_record(reading.value), version_id)
    keys, countries = plane.keys, bucket.countries
    bucket_key = keys.try_bucket_key(bucket.id, countries, version.bucket_key)
    if bucket_key is None:
        bucket_key = await keys.bucket_key(bucket.id, countries, version.bucket_key)
    return _opened(plane, name, bucket, key, version, version_id, bucket_key, reading)


def _kept(
    plane: ObjectPlane, name: RegisterName, bucket: BucketRecord, key: bytes, version_id: str, reading: Reading
) -> Found | None:
    """When the record was opened lately."""
    value, payload = reading
    if value is None or version_id:
        return None
    place = Place(bucket.id, key)
    kept = plane.opened_records.get(place, value)
    if kept is None:
        return None
    bucket_key = plane.keys.try_bucket_key(bucket.id, bucket.countries, kept.opened.version.bucket_key)
    if bucket_key is not None and bucket_key is kept.bucket_key():
        return Found(name, kept.opened, payload, kept)
    plane.opened_records.drop(place)
    return None


def _opened(
    plane: ObjectPlane,
    name: RegisterName,
    bucket: BucketRecord,
    key: bytes,
    version: Version,
    version_id: str,
    bucket_key: BucketKey,
    reading: Reading,
) -> Found:
    """Raises DataDamaged."""
    value, payload = reading
    place = Place(bucket.id, key)
    opened = open_version(place, version, bucket_key)
    opened = opened._replace(
        version=msgspec.structs.replace(version, listing=b"", wrapped_key=b"", meta=b"")
    )  # read, and of no further use
    if value is None or version_id:
        return Found(name, opened, payload, None)
    kept = OpenedRecord(value, bucket_key, opened)
    plane.opened_records.put(place, kept)
    return Found(name, opened, payload, kept)


def try_read(
    plane: ObjectPlane, bucket: BucketRecord, key: bytes, want_plain: bool, then: Callable[[ReadResult], None]
) -> None:
    """See ``api.Objects``."""
    name = object_name(bucket.id, bucket.shard_numbers, key)
    plane.registers.try_read(name, want_plain, partial(_read, plane, name, bucket, key, want_plain, then))


def _read(
    plane: ObjectPlane,
    name: RegisterName,
    bucket: BucketRecord,
    key: bytes,
    want_plain: bool,
    then: Callable[[ReadResult], None],
    reading: Reading | None,
) -> None:
    answer: ReadResult = None
    if reading is not None:
        try:
            answer = _in_memory(plane, name, bucket, key, want_plain, reading)
        except StoragedError as error:
            answer = error.with_traceback(
                None
            )  # that holds this frame, which holds the answer: garbage that waits for the collector
        except Exception:  # the long way meets it again, where somebody tells of it
            answer = None
    then(answer)


def _in_memory(
    plane: ObjectPlane, name: RegisterName, bucket: BucketRecord, key: bytes, want_plain: bool, reading: Reading
) -> HeldStream | ObjectInfo | Reading:
    """The whole current version, or what is known of it; the reading when there is something to wait for first. Raises
    NoSuchKey, DataDamaged.
    """
    found = _kept(plane, name, bucket, key, "", reading)
    if found is None:
        version = find_version(decode_record(reading.value), "")
        bucket_key = plane.keys.try_bucket_key(bucket.id, bucket.countries, version.bucket_key)
        if bucket_key is None:
            return reading
        found = _opened(plane, name, bucket, key, version, "", bucket_key, reading)
    info = _info_at_hand(key, found)
    if info is None or not want_plain:
        return info or reading
    plain = _at_hand(found)
    if plain is None:
        return reading
    return _held(plane, info, span_of(None, len(plain)), plain)


async def head(
    plane: ObjectPlane,
    bucket: BucketRecord,
    key: bytes,
    *,
    version_id: str = "",
    conditions: ReadConditions = NO_READ_CONDITIONS,
    part_number: int | None = None,
    reading: Reading | None = None,
) -> ObjectInfo:
    """Raises NoSuchKey, NoSuchVersion, NotModified, PreconditionFailed, InvalidPartNumber."""
    found = await find(plane, bucket, key, version_id, reading=reading)
    if conditions != NO_READ_CONDITIONS:
        check_read(conditions, found.opened.meta.etag, found.opened.version.modified_ms)
    info = _info_at_hand(key, found) or await _info(plane, bucket, key, found)
    if part_number is not None:
        _span_of_part(info, part_number)
    return info


async def get(
    plane: ObjectPlane,
    hedge: HedgeDelay,
    bucket: BucketRecord,
    key: bytes,
    *,
    version_id: str = "",
    conditions: ReadConditions = NO_READ_CONDITIONS,
    span: RangeSpec | None = None,
    part_number: int | None = None,
    as_copy_source: bool = False,
    reading: Reading | None = None,
) -> HeldStream | VerifiedStream:
    """Opens an object for reading. Raises as head, and InvalidRange, DataDamaged, ServiceUnavailable."""
    found = await find(plane, bucket, key, version_id, want_payload=True, reading=reading)
    for attempt in range(READ_AGAIN_MAX):
        meta, version = found.opened.meta, found.opened.version
        if conditions != NO_READ_CONDITIONS:
            (check_copy_source if as_copy_source else check_read)(conditions, meta.etag, version.modified_ms)
        info = _info_at_hand(key, found) or await _info(plane, bucket, key, found)
        wanted = _span_of_part(info, part_number) if part_number is not None else span_of(span, version.size)
        plain = _at_hand(found)
        if plain is not None:
            return _held(plane, info, wanted, plain)
        stream = VerifiedStream(plane, hedge, bucket, found, info, wanted, as_copy_source=as_copy_source)
        try:
            await stream.open()
        except DataDamaged:
            again = await find(plane, bucket, key, version_id, want_payload=True)
            if attempt == READ_AGAIN_MAX - 1 or again.opened.version == version:
                raise
            found = again
        else:
            plane.counters.gets += 1
            return stream
    raise DataDamaged


def span_of(span: RangeSpec | None, size: int) -> Span:
    """What a Range asks of an object of ``size`` bytes. The last bytes of an empty object are all of it, as on AWS.
    Raises
    InvalidRange."""
    if span is None or (span.first is None and span.last and not size):
        return Span(0, size, False)
    if span.first is None:
        length = min(span.last or 0, size)
        if not length:
            raise InvalidRange(ActualObjectSize=str(size))
        return Span(size - length, length, True)
    if span.first >= size:
        raise InvalidRange(
            ActualObjectSize=str(size), RangeRequested=f"bytes={span.first}-{'' if span.last is None else span.last}"
        )
    end = size if span.last is None else min(span.last + 1, size)
    return Span(span.first, end - span.first, True)


def _span_of_part(info: ObjectInfo, part_number: int) -> Span:
    """The bytes of the n-th part, counted from 1 whatever numbers the parts were uploaded under. A whole object has
    one.
    """
    sizes = [part.size for part in info.parts] or [info.size]
    if not 1 <= part_number <= len(sizes):
        raise InvalidPartNumber(**({"ActualPartCount": str(len(sizes))} if info.parts else {}))
    return Span(sum(sizes[: part_number - 1]), sizes[part_number - 1], True)


def _info_at_hand(key: bytes, found: Found) -> ObjectInfo | None:
    """None when the object's parts are listed on pages of their own, which are read each time: they may be 10,000."""
    opened, kept = found.opened, found.kept
    if opened.meta.parts_page:
        return None
    if kept is None:
        return info_of(key, opened, opened.meta.parts)
    if kept.info is None:
        kept.info = info_of(key, opened, opened.meta.parts)
    return kept.info


async def _info(plane: ObjectPlane, bucket: BucketRecord, key: bytes, found: Found) -> ObjectInfo:
    opened = found.opened
    context = Place(bucket.id, key).context_of(opened.version)
    return info_of(key, opened, await sealed_parts_of(plane.pages, found.name, opened.dek, context, opened.meta))


class _Job(NamedTuple):
    """A window to read, of which ``plain[first:last]`` is wanted."""

    reader: PartReader
    window: Window
    first: int
    last: int


class _Piece(NamedTuple):
    """A window on its way: ``plain[first:last]`` is what goes out once ``done``."""

    done: asyncio.Task[None]
    lease: Lease
    first: int
    last: int


def _at_hand(found: Found) -> bytes | None:
    """The plaintext of an object whose sealed bytes came with its record, in one chunk. None for any other, and when it
    does not open: a replica may lie, and
    its neighbours are asked the long way."""
    (version, dek, _), kept = found.opened, found.kept
    if len(version.parts) != 1 or version.manifest:
        return None
    part = version.parts[0]
    sealed = part.inline or (found.copy if part.small else None)
    if not sealed:
        return None
    try:
        with trace.span("open"):
            stream = kept.key if kept is not None else None
            if stream is None:
                stream = part_key(dek, part.header, part.data_id, part.number)
                if kept is not None:
                    kept.key = stream
            plain = stream.open_only(sealed)
            return plain if len(plain) == part.size else None
    except SealBroken:
        return None


def _held(plane: ObjectPlane, info: ObjectInfo, wanted: Span, plain: bytes) -> HeldStream:
    plane.counters.gets += 1
    plane.counters.bytes_out += wanted.length
    return HeldStream(info, wanted, plain[wanted.first : wanted.first + wanted.length] if wanted.partial else plain)


class HeldStream:
    """An ``api.ObjectStream`` of a small object: all that is asked for is in memory, opened."""

    __slots__ = ("first", "held", "info", "length", "partial")

    def __init__(self, info: ObjectInfo, span: Span, plain: bytes) -> None:
        self.info = info
        self.first, self.length, self.partial = span
        self.held = plain

    async def chunks(self) -> AsyncIterator[Buffer]:
        if self.held:
            yield self.held

    async def close(self) -> None:
        """There is nothing to give back."""


class VerifiedStream:
    """An ``api.ObjectStream``. At most two windows are in memory, and one while memory is short or the client slow.

    Whoever copies asks for a window with a block's memory in hand, which others may wait for before they give windows
    back. So a copy's source
    waits for its first window only; the others are as many as there are blocks under way.
    """

    def __init__(
        self,
        plane: ObjectPlane,
        hedge: HedgeDelay,
        bucket: BucketRecord,
        found: Found,
        info: ObjectInfo,
        span: Span,
        *,
        as_copy_source: bool = False,
    ) -> None:
        self.info = info
        self.first, self.length, self.partial = span
        self.held = None
        self._plane = plane
        self._hedge = hedge
        self._bucket = bucket
        self._found = found
        self._slow = False
        self._jobs = self._windows()
        self._next: _Job | None = None
        self._pieces: list[_Piece] = []
        self._transfer = Transfer(plane.get_buffers)
        self._transfer.__enter__()
        self._closed = False
        self._as_copy_source = as_copy_source

    async def open(self) -> None:
        """Reads and verifies the first window. Closes itself when that fails."""
        try:
            await self._start_next()
            if self._pieces:
                await self._pieces[0].done
            elif self.length:
                raise DataDamaged("The record names no part with these bytes.")
        except BaseException:
            await self.close()
            raise

    async def chunks(self) -> AsyncIterator[Buffer]:
        """Verified plaintext, in order: ``length`` bytes. Raises DataDamaged in the middle rather than yield anything
        else.
        """
        left = self.length
        try:
            while left:
                if not self._pieces:
                    await self._start_next(at_once=self._as_copy_source)
                if not self._pieces:
                    raise DataDamaged("The object's parts end before its size.")
                if len(self._pieces) == 1 and not self._slow and self._plane.get_buffers.left >= AHEAD_LEFT_MIN:
                    await self._start_next(only_if_room=True)
                piece = self._pieces[0]
                await piece.done
                self._pieces.pop(0)
                plain = piece.lease.view[piece.first : piece.last]
                left -= len(plain)
                self._plane.counters.bytes_out += len(plain)
                count, began = len(plain), self._plane.clock.monotonic()
                try:
                    yield plain
                finally:
                    del plain
                    piece.lease.release()
                took_s = self._plane.clock.monotonic() - began
                self._slow = took_s > SLOW_S_MIN and count < SLOW_BYTES_PER_S * took_s
        finally:
            await self.close()

    async def close(self) -> None:
        """Safe to call twice."""
        if self._closed:
            return
        self._closed = True
        self._transfer.__exit__()
        pieces, self._pieces = self._pieces, []
        await cancel_all([piece.done for piece in pieces])
        for piece in pieces:
            piece.lease.release()
        await self._jobs.aclose()

    async def _start_next(self, *, only_if_room: bool = False, at_once: bool = False) -> None:
        """Begins to read the next window, if there is one (and memory for it)."""
        if self._next is None:
            self._next = await anext(self._jobs, None)
        if self._next is None:
            return
        reader, window, first, last = self._next
        size = window.cells * reader.shape.plain_bytes
        pool = self._plane.get_buffers
        lease = pool.try_lease(size) if only_if_room else pool.lease_now(size) if at_once else await pool.lease(size)
        if lease is not None:
            self._next = None
            self._pieces.append(_Piece(asyncio.create_task(reader.read(window, lease.view)), lease, first, last))

    def _window_bytes(self) -> int:
        pool = self._plane.get_buffers
        wanted = window_bytes_for(pool.transfers, pool.left)
        return min(wanted, SLOW_WINDOW_BYTES) if self._slow else wanted

    async def _windows(self) -> AsyncGenerator[_Job, None]:
        """What has to be read, in order."""
        found, end, offset = self._found, self.first + self.length, 0
        version = found.opened.version
        whole = SealedPart(1, version.size, "", data_id=version.context_id)
        async for part in bound_parts_of(self._plane.pages, found.name, version, whole, self.info.parts):
            start, stop = max(self.first, offset), min(end, offset + part.size)
            if stop > start or not version.size:
                copy = found.copy if part.small else None
                reader = PartReader(
                    self._plane, self._hedge, self._bucket, found.name, part, found.opened.dek, copy, self._moved
                )
                for window in reader.windows(start - offset, stop - start, self._window_bytes):
                    base = offset + window.plain_start
                    yield _Job(reader, window, max(start - base, 0), min(stop - base, window.plain_bytes))
            offset += part.size
            if offset >= end:
                return

    async def _moved(self, part: PartEntry) -> PartEntry | None:
        """A ``reader.Moved``: of the very version that is being read, which may have been replaced meanwhile."""
        version = self._found.opened.version
        try:
            again = await find(self._plane, self._bucket, self.info.key, version.version_id)
            if again.opened.version.context_id != version.context_id:
                return None
            async for other in parts_of(self._plane.pages, again.name, again.opened.version):
                if (other.data_id, other.number, other.size, other.header) == (
                    part.data_id,
                    part.number,
                    part.size,
                    part.header,
                ):
                    return other if other.runs != part.runs else None
        except StoragedError:
            pass  # what the reader found is what its caller is told
        return None

"""Opened objects as streams of verified plaintext: from memory, or from disks window by window.

``try_hold`` and ``hold_whole`` open what came with its record.

``VerifiedStream`` reads the next window while one is sent (``window_read``). A window is what ``part_reader`` reads at
once; it is authenticated as a whole before its first byte leaves.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Iterator
from functools import partial
from typing import NamedTuple

from storaged.errors import DataDamaged, NoSuchKey, NoSuchVersion, ServiceUnavailable, StoragedError
from storaged.objects.api import ObjectInfo
from storaged.objects.cache.buffers import WINDOW_SHARES, BufferPool, Lease, Transfer, window_bytes_for
from storaged.objects.code.manifest import bound_parts, bound_parts_of, parts_of
from storaged.objects.plane import ObjectPlane, OnDamage
from storaged.objects.ports import SealBroken
from storaged.objects.read.borrowed import find_data
from storaged.objects.read.find import Found, find
from storaged.objects.read.part_reader import PartReader
from storaged.objects.read.span import Span
from storaged.objects.read.window import Window
from storaged.objects.read.window_read import WindowRead
from storaged.objects.records import BucketRecord, PartEntry, SealedPart
from storaged.sov1 import TAG_BYTES, Opener, StreamKey, chunks_size
from storaged.units import KIB, MIB
from storaged.wire import Buffer

SLOW_BYTES_PER_S = 2 * MIB
"""A slower client gets small windows, and none is read ahead: other clients make better use of the memory."""
SLOW_S_MIN = 0.1
"""A client is not judged by a shorter time: a busy event loop may delay any client that long."""
SLOW_WINDOW_BYTES = 256 * KIB
AHEAD_LEFT_MIN = 0.25
"""Nothing is read ahead when a smaller share of the memory is free: the rest is for first windows."""
FREE_BYTES_MAX = 64 * KIB
"""Up to so many bytes of an object are held in no pool's memory: a thousand clients that take nothing hold 64 MiB."""
HELD_LEFT_MIN = WINDOW_SHARES[0][0]
"""A larger copy is opened whole while this share of the memory is free. Else it is read as a coded object is, in
windows that become smaller.
"""


class _Job(NamedTuple):
    """A window to read. ``plain[first:last]`` of it is wanted."""

    reader: PartReader
    window: Window
    first: int
    last: int


class _Piece(NamedTuple):
    """A window that is being read. ``plain[first:last]`` is sent once it has ended."""

    read: WindowRead | None
    """None for a window that is open: ``open`` or ``try_open`` has read it."""
    lease: Lease
    first: int
    last: int


class HeldStream:
    """An ``api.ObjectStream`` of an object whose sealed bytes came with its record, opened. ``held``: what is wanted of
    it.
    """

    __slots__ = ("first", "held", "info", "length", "partial")

    def __init__(self, info: ObjectInfo, span: Span, held: Buffer) -> None:
        self.info = info
        self.first, self.length, self.partial = span
        self.held = held

    async def chunks(self) -> AsyncIterator[Buffer]:
        try:
            if self.held:
                yield self.held
        finally:
            self.release()

    async def close(self) -> None:
        self.release()

    def release(self) -> None:
        """There is nothing to release."""


class LeasedStream(HeldStream):
    """A HeldStream whose bytes are in memory of the pool of downloads, until ``close`` or ``release``."""

    __slots__ = ("_lease", "_transfer")

    def __init__(self, info: ObjectInfo, span: Span, held: Buffer, pool: BufferPool, lease: Lease) -> None:
        super().__init__(info, span, held)
        self._lease = lease
        self._transfer: Transfer | None = Transfer(pool)
        self._transfer.__enter__()

    def release(self) -> None:
        transfer, self._transfer = self._transfer, None
        if transfer is not None:
            self.held = b""
            self._lease.release()
            transfer.__exit__()


def hold_whole(info: ObjectInfo, span: Span, key: StreamKey, size: int, sealed: Buffer) -> HeldStream:
    """Opens all of an object of ``size`` bytes. Raises SealBroken."""
    plain = key.open_whole(sealed)
    if len(plain) != size:
        raise SealBroken(f"{len(plain)} bytes were sealed, {size} were expected")
    return HeldStream(info, span, plain[span.first : span.first + span.length] if span.partial else plain)


def try_hold(
    pool: BufferPool, info: ObjectInfo, span: Span, key: StreamKey, size: int, sealed: Buffer
) -> HeldStream | None:
    """Opens the chunks of an object of ``size`` bytes that have the span. As long as its client does not take them,
    they hold memory of ``pool``. None: it has no room. Raises SealBroken.
    """
    chunk_bytes = key.chunk_bytes
    if len(sealed) != chunks_size(size, chunk_bytes):
        raise SealBroken(f"{len(sealed)} bytes are not the sealed form of {size}")
    plain_bytes = chunk_bytes - TAG_BYTES
    first, end = span.first // plain_bytes, -(-(span.first + span.length) // plain_bytes)
    start = first * plain_bytes
    lease = pool.try_lease(min(end * plain_bytes, size) - start) if pool.left >= HELD_LEFT_MIN else None
    if lease is None:
        return None
    try:
        Opener(key, size).open_block(first, memoryview(sealed)[first * chunk_bytes : end * chunk_bytes], lease.view)
    except BaseException:
        lease.release()
        raise
    held = lease.view[span.first - start : span.first - start + span.length]
    if span.length > FREE_BYTES_MAX:
        return LeasedStream(info, span, held, pool, lease)
    plain = bytes(held)
    lease.release()
    return HeldStream(info, span, plain)


class VerifiedStream:
    """An ``api.ObjectStream``. At most two windows are in memory, and one while memory is short or the client is slow.

    A copy asks for a window while it holds a block's memory, for which others may wait before they release windows. So
    the source of a copy waits for memory only for its first window. Later windows exceed the bound if necessary; there
    are as many as blocks under way.
    """

    def __init__(
        self,
        plane: ObjectPlane,
        bucket: BucketRecord,
        found: Found,
        info: ObjectInfo,
        span: Span,
        *,
        as_copy_source: bool = False,
        on_damage: OnDamage | None = None,
    ) -> None:
        """``on_damage``: gets what the plane's would get."""
        self.info = info
        self.first, self.length, self.partial = span
        self.held: Buffer | None = None
        self._plane = plane
        self._bucket = bucket
        self._found = found
        self._slow = False
        version = found.opened.version
        whole = SealedPart(1, version.size, "", data_id=version.context_id)
        self._offset = 0
        """Where the part begins whose windows come next."""
        self._pages: AsyncGenerator[PartEntry, None] | None = None
        """The parts of an object with a manifest, which must be awaited."""
        self._jobs: Iterator[_Job] = iter(())
        if version.manifest:
            self._pages = bound_parts_of(plane.pages, found.name, version, whole, info.parts)
        else:
            self._jobs = self._windows(bound_parts(version, whole, info.parts))
        self._next: _Job | None = None
        self._pieces: list[_Piece] = []
        self._transfer = Transfer(plane.get_buffers)
        self._transfer.__enter__()
        plane.long_reads.began(self, version)
        self._closed = False
        self._as_copy_source = as_copy_source
        self._on_damage = on_damage
        self._end_read: Callable[[], None] | None = None
        """Ends the read that ``try_open`` began."""

    async def open(self) -> None:
        """Reads and verifies the first window. Closes the stream when that fails."""
        try:
            job = await self._next_job()
            if job is not None:
                reader, window, first, last = job
                lease = await self._plane.get_buffers.lease(window.cells * reader.shape.plain_bytes)
                self._pieces.append(_Piece(None, lease, first, last))
                await reader.read(window, lease.view)
            elif self.length:
                raise DataDamaged("The record names no part with these bytes.")
        except BaseException:
            await self.close()
            raise

    def try_open(self, on_open: Callable[[Exception | None], None]) -> bool:
        """Reads and verifies all of it without a task, if one window has it and there is memory. ``on_open`` is called
        as ``PartReader.try_read`` does: with None when ``held`` has the bytes, until ``release``. False: a new stream
        must be opened; nothing was begun. Raises DataDamaged.
        """
        end_read: Callable[[], None] | None = None
        try:
            job = next(self._jobs, None)
            if job is None or job.last - job.first < self.length:
                return False
            reader, window, first, last = job
            lease = self._plane.get_buffers.try_lease(window.cells * reader.shape.plain_bytes)
            if lease is None:
                return False
            self._pieces.append(_Piece(None, lease, first, last))
            end_read = reader.try_read(window, lease.view, partial(self._on_read, on_open))
            if self.held is None and not self._closed:  # else it has ended already
                self._end_read = end_read
            return end_read is not None
        finally:
            if end_read is None:
                self.release()

    def _on_read(self, on_open: Callable[[Exception | None], None], error: Exception | None) -> None:
        self._end_read = None
        if error is None:
            piece = self._pieces[0]
            self.held = piece.lease.view[piece.first : piece.last]
        else:
            self.release()
        on_open(error)

    async def chunks(self) -> AsyncIterator[Buffer]:
        """Verified plaintext, in order: ``length`` bytes. Raises DataDamaged rather than yield wrong bytes."""
        left = self.length
        try:
            while left:
                if not self._pieces:
                    await self._start_next(now=self._as_copy_source)
                if not self._pieces:
                    raise DataDamaged("The object's parts end before its size.")
                if len(self._pieces) == 1 and not self._slow and self._plane.get_buffers.left >= AHEAD_LEFT_MIN:
                    await self._start_next(only_if_room=True)
                piece = self._pieces[0]
                try:
                    if piece.read is not None:
                        await piece.read.finish()
                except ServiceUnavailable as error:  # DataDamaged is one
                    raise await self._cause(error) from None
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

    async def _cause(self, error: ServiceUnavailable) -> ServiceUnavailable:
        """The error, or that the object is another one by now: then its data is gone, and nothing is damaged."""
        try:
            again = await find(self._plane, self._bucket, self.info.key, self._found.version_id)
            if again.opened.version.context_id == self._found.opened.version.context_id:
                return error
        except (NoSuchKey, NoSuchVersion):
            pass
        except StoragedError:
            return error
        kept_s = self._plane.limits.retire_delay_ms // 1000
        return ServiceUnavailable(
            f"The object was replaced or deleted while it was read. Its data stays for {kept_s} s after that"
            " (limits.retire_delay_s), and longer while it is read, as far as limits.read_hold_s and the disks' room"
            " allow."
        )

    async def close(self) -> None:
        """Safe to call twice."""
        for piece in self._pieces:
            if piece.read is not None:
                await piece.read.close()
        self.release()
        if self._pages is not None:
            await self._pages.aclose()

    def release(self) -> None:
        """As ``close``, when no window is being read by a task."""
        if self._closed:
            return
        self._closed = True
        end_read, self._end_read = self._end_read, None
        if end_read is not None:
            end_read()  # before its memory is another's
        self.held = None
        self._jobs = iter(())  # it holds this stream: only the collector could free both
        self._transfer.__exit__()
        self._plane.long_reads.ended(self)
        pieces, self._pieces = self._pieces, []
        for piece in pieces:
            piece.lease.release()

    async def _start_next(self, *, only_if_room: bool = False, now: bool = False) -> None:
        """Begins to read the next window, if there is one and ``only_if_room`` finds memory for it. ``now``: does not
        wait for memory.
        """
        if self._next is None:
            self._next = await self._next_job()
        if self._next is None:
            return
        reader, window, first, last = self._next
        size = window.cells * reader.shape.plain_bytes
        pool = self._plane.get_buffers
        lease = pool.try_lease(size) if only_if_room else pool.lease_now(size) if now else await pool.lease(size)
        if lease is not None:
            self._next = None
            self._pieces.append(_Piece(WindowRead(reader, window, lease), lease, first, last))

    def _window_bytes(self) -> int:
        pool = self._plane.get_buffers
        wanted = window_bytes_for(pool.transfers, pool.left)
        return min(wanted, SLOW_WINDOW_BYTES) if self._slow else wanted

    async def _next_job(self) -> _Job | None:
        """The next window to read; None after the last."""
        job = next(self._jobs, None)
        while job is None and self._pages is not None and (self._offset < self.first + self.length or not self._offset):
            part = await anext(self._pages, None)
            if part is None:
                return None
            self._jobs = self._windows((part,))
            job = next(self._jobs, None)
        return job

    def _windows(self, parts: Iterable[PartEntry]) -> Iterator[_Job]:
        """The windows of these parts that are wanted, in order."""
        end, size = self.first + self.length, self._found.opened.version.size
        for part in parts:
            offset, self._offset = self._offset, self._offset + part.size
            start, stop = max(self.first, offset), min(end, offset + part.size)
            if stop > start or not size:
                reader = self._reader(part)
                for window in reader.windows(start - offset, stop - start, self._window_bytes):
                    base = offset + window.plain_start
                    yield _Job(reader, window, max(start - base, 0), min(stop - base, window.plain_bytes))
            if self._offset >= end:
                return

    def _reader(self, part: PartEntry) -> PartReader:
        found, version = self._found, self._found.opened.version
        copy = found.copy if part.small else None
        cached = found.cached if len(version.parts) == 1 and not version.manifest else None
        known = cached.key if cached is not None else None
        reader = PartReader(
            self._plane, self._bucket, found.name, part, found.opened.body_dek, copy, self._moved, known
        )
        if cached is not None:
            cached.key = reader.key
        if self._on_damage is not None:
            reader.on_damage = self._on_damage
        return reader

    async def _moved(self, part: PartEntry) -> PartEntry | None:
        """A ``part_reader.Moved``. The version that is being read may have been replaced meanwhile: then None."""
        version = self._found.opened.version
        try:
            again = await find_data(self._plane, self._bucket, self.info.key, self._found.version_id)
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
            pass  # the caller gets the reader's own error
        return None

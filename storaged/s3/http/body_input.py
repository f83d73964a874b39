"""A request's body as it arrives: framing, limits, and what is kept until it is read. The connection's side of
``body``.

Theory of operation. The connection feeds the bytes that it receives, or receives them straight into ``destination``.
Fed bytes are kept until they are read. Once more than ``Limits.read_buffer_bytes`` are kept, the connection is asked to
read no more. HTTP's chunks are not decoded before the request is authenticated or its body is read; then a few at a
time (``chunks``). Before authentication they may not be tiny.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Protocol

from storaged.errors import BadRequest, S3Error
from storaged.s3.http.chunks import TransferChunks
from storaged.s3.http.limits import Limits
from storaged.units import KIB
from storaged.wire import Buffer, unfilled

JOINED_BYTES_MAX = 4 * KIB
"""A kept piece smaller than this is joined with a next one that is: an object of its own takes 100 bytes, however few a
client's segments bring."""

DIRECT_BYTES_MIN = 16 * KIB
"""Less room than this in a reader's memory is filled by copying."""


class Source(Protocol):
    """What a body asks of its connection."""

    def pause_reading(self) -> None: ...

    def on_body_done(self, rest: Buffer = b"") -> None: ...

    def on_admitted(self) -> None: ...

    async def wait_for_body(self, body: BodyInput) -> None: ...


class _ChunkedInput(TransferChunks):
    """HTTP's chunks as they arrived, decoded a turn at a time."""

    __slots__ = ("_raw", "raw_bytes")

    def __init__(self) -> None:
        super().__init__()
        self._raw: list[bytes] = []
        self.raw_bytes = 0
        """Kept, and not decoded."""

    def add(self, data: bytes) -> None:
        self._raw.append(data)
        self.raw_bytes += len(data)

    @property
    def undecoded(self) -> bool:
        """More can be decoded now."""
        return bool(self._raw) or self.stopped

    def decode(self) -> Buffer:
        """The data of one turn; may be empty. Raises BadRequest."""
        data, self._raw = b"".join(self._raw), []
        size = len(data) + len(self.rest)
        self.raw_bytes = 0
        pieces = self.feed(data)
        self.raw_bytes = 0 if self.ended else len(self.rest)
        if not pieces:
            return b""
        alone = len(pieces) == 1 and 2 * len(pieces[0]) > size
        return pieces[0] if alone else b"".join(pieces)


class BodyInput:
    """The connection's side of a body.

    What is the same for each body at first is an attribute of the class: most requests have no body, and each has one
    of these objects.
    """

    complete = False
    """All of it has arrived."""
    bytes_received = 0
    """With HTTP's chunks."""
    destination: memoryview | None = None
    """The reader's memory into which the connection receives next."""
    waiter: asyncio.Future[None] | None = None
    on_whole: Callable[[], None] | None = None
    """Called once, when all has arrived or no more will; see ``Connection.when_whole``."""
    waited_s = 0.0
    """How long the connection has waited for it; see ``Connection.check_progress``."""
    _chunks: _ChunkedInput | None = None
    _kept_bytes = 0
    _direct_bytes = 0
    _error: Exception | None = None
    _last_error: S3Error | None = None
    """The body will fail with this, unless the rest of its chunks completes it."""
    _budget: int | None = None
    """Bytes that may still be dropped; None: the body is kept."""
    _admitted = False
    _whole: memoryview | None = None
    """The memory of a body that is received into one piece."""

    def __init__(self, source: Source, length: int | None, limits: Limits) -> None:
        """``length``: Content-Length, or None for a chunked body."""
        self._source = source
        self._limits = limits
        if length is None:
            self._chunks = _ChunkedInput()
        elif not length:
            self.complete = True
        self._left = length or 0
        self._received: deque[Buffer] = deque()
        """Pieces of the body, without HTTP's chunks, that were not read yet."""
        self.length = length

    @property
    def full(self) -> bool:
        """As much is kept as may be, or a turn of decoding has ended with more to decode."""
        chunks = self._chunks
        if chunks is None:
            return self._kept_bytes > self._limits.read_buffer_bytes
        return chunks.stopped or self._kept_bytes + chunks.raw_bytes > self._limits.read_buffer_bytes

    @property
    def held_bytes(self) -> int:
        """What a client that is not authenticated has sent of the body, except what was dropped."""
        return self.bytes_received if self._budget is None else 0

    @property
    def failed(self) -> bool:
        """No more of it will arrive, though it is incomplete; or ``RequestBody.try_whole`` found it wrong."""
        return self._error is not None

    def admit(self) -> None:
        """The request is authenticated. Raises SlowDown when too many are in flight."""
        self._source.on_admitted()
        self._admitted = True

    def feed(self, data: bytes) -> None:
        """Takes the bytes that belong to the body; the connection gets those after it by ``on_body_done``."""
        chunks = self._chunks
        if chunks is None:
            rest = data[self._left :]
            if rest:
                data = data[: self._left]
            self._left -= len(data)
            if data:
                self._count(len(data))
                self._keep(data)
            if not self._left:
                self._end(rest)
        elif data:
            self._count(len(data))
            chunks.add(data)
            if not chunks.stopped and (self._admitted or self.waiter is not None or self._budget is not None):
                self._decode(chunks)
                if self._error is not None:
                    return
        if self.waiter is not None and (self.complete or self._received or self._budget is not None):
            self._wake()
        if not self.complete and self.full and self._unread:
            # until the reader wants more: one readiness of the socket may bring dozens of reads
            self._source.pause_reading()

    @property
    def bounded(self) -> bool:
        """Exactly the object's bytes will arrive, and their number was declared."""
        return self._chunks is None

    @property
    def _unread(self) -> bool:
        """No reader waits, and the whole body is not waited for, or it may be too large to be kept."""
        return (self.waiter is None or self.waiter.done()) and (self.on_whole is None or not self.bounded)

    def receive_whole(self) -> None:
        """Receives the rest of a body without a buffer in between, if it is ``bounded`` and not short: all of it
        becomes one piece.
        """
        length = self.length
        if self._left < DIRECT_BYTES_MIN or length is None or not self.bounded:
            return
        self._whole = whole = memoryview(unfilled(length))
        begin = 0
        for piece in self._received:
            whole[begin : begin + len(piece)] = piece
            begin += len(piece)
        self._received.clear()
        self._kept_bytes = 0
        self.destination = whole[begin:]

    def received(self, count: int) -> None:
        """``count`` bytes were received into ``destination``."""
        destination = self.destination
        assert destination is not None
        self._left -= count
        self._direct_bytes += count
        self.bytes_received += count
        if self._left and count < len(destination):
            self.destination = destination[count:]
            return
        self.destination = None
        if self._whole is not None:
            whole, self._whole = self._whole, None
            self._keep(whole)
        if not self._left:
            self._end()
        self._wake()

    def fail(self, error: S3Error) -> None:
        """No more of it will arrive. What has arrived may still be all of it: that shows when it is decoded."""
        if self.complete or self._error is not None:
            return
        if self._chunks is not None and self._chunks.undecoded and self._last_error is None:
            self._last_error = error
            self._wake()
            return
        self._error = error
        self.destination = self._whole = None
        self._source.on_body_done()
        self._wake()
        if self.on_whole is not None:
            self.report_whole()

    def report_whole(self) -> None:
        """Calls ``on_whole``."""
        on_whole, self.on_whole = self.on_whole, None
        if on_whole is not None:
            on_whole()

    async def _advance(self) -> None:
        """Returns when something has happened: a turn of decoding, if there is something to decode; else more has
        arrived. Raises the error with which the body fails while it is awaited."""
        chunks = self._chunks
        if chunks is not None and chunks.undecoded:
            if chunks.stopped:
                await asyncio.sleep(0)  # other connections have their turn
            self._decode(chunks)
        elif self._last_error is not None:
            self.fail(self._last_error)
        else:
            await self._source.wait_for_body(self)

    def _decode(self, chunks: _ChunkedInput) -> None:
        """Decodes a turn's worth of HTTP's chunks."""
        try:
            piece = chunks.decode()
            self._check_crumbs(chunks)
        except S3Error as error:
            chunks.raw_bytes = 0
            self._last_error = error
            self.fail(error)
            return
        if piece:
            self._keep(piece)
        if chunks.ended:
            self._end(bytes(chunks.rest))

    def _check_crumbs(self, chunks: TransferChunks) -> None:
        """Tiny chunks are a client's right, but many of them only once it is authenticated. Raises BadRequest."""
        limits = self._limits
        few = self._admitted or chunks.chunks <= limits.unauthenticated_chunks
        if not few and chunks.data_bytes < chunks.chunks * limits.unauthenticated_chunk_bytes_min:
            raise BadRequest(
                "The chunks of a body that is not authenticated have"
                f" {limits.unauthenticated_chunk_bytes_min} bytes or more, on average."
            )

    def _count(self, count: int) -> None:
        self.bytes_received += count
        if self._budget is not None:
            self._budget -= count

    def _keep(self, data: Buffer) -> None:
        if self._budget is not None:
            return
        self._kept_bytes += len(data)
        received = self._received
        if len(data) < JOINED_BYTES_MAX and received and len(received[-1]) < JOINED_BYTES_MAX:
            last = received[-1]
            if isinstance(last, bytearray):
                last += data
            else:
                received[-1] = bytearray(b"".join((last, data)))
        else:
            received.append(data)

    def _end(self, rest: Buffer = b"") -> None:
        self.complete = True
        self._source.on_body_done(rest)

    def _wake(self) -> None:
        if self.waiter is not None and not self.waiter.done():
            self.waiter.set_result(None)

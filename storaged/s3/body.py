"""Bodies as they arrive: 100-continue, framing, the hash that was signed, and what is left unread.

The connection feeds what it receives; whoever reads gets it as pieces, as a whole, or straight from the socket into memory of their own.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections import deque
from collections.abc import AsyncIterator, Callable
from typing import Protocol

from storaged.errors import MaxMessageLengthExceeded, S3Error, XAmzContentSHA256Mismatch
from storaged.s3.chunked import ChunkedDecoder
from storaged.s3.http import Chunks
from storaged.s3.limits import Limits
from storaged.units import KIB
from storaged.wire import Buffer

HASH_INLINE_BYTES_MAX = 64 * KIB
"""SHA-256 of this takes 32 us: less than going to a thread and back."""

WHOLE_BYTES_MAX = 64 * KIB
"""More than anything that is asked for as a whole has."""

DIRECT_BYTES_MIN = 16 * KIB
"""A reader's memory that has less room than this is filled by copying."""


CRUMBS = 64
"""So many chunks in one read are tiny ones, which take long to decode: others have their turn before the next."""


class Source(Protocol):
    """What a body asks of its connection."""

    def hold_back(self) -> None: ...

    def body_done(self) -> None: ...

    async def heard(self, body: RequestBody) -> None: ...


class RequestBody(AsyncIterator[Buffer]):
    """The body of one request. Nothing is read, and no ``100 Continue`` sent, before somebody asks for it: by then the request is authenticated.

    ``length``: Content-Length, or None when it comes in HTTP chunks. ``declared`` False: neither came, which HTTP takes for an empty body.
    ``continue_now``: sends the interim answer; None when the client does not wait for one.
    """

    __slots__ = (
        "_budget", "_chunks", "_come", "_continue_now", "_decoded_ahead", "_decoder_done", "_direct_bytes", "_error", "_kept_bytes", "_left", "_limits", "_rest",
        "_source", "bytes_come", "complete", "declared", "decoder", "destination", "length", "sha256", "then", "waited_s", "waiter",
    )  # fmt: skip

    def __init__(
        self, source: Source, length: int | None, continue_now: Callable[[], None] | None, limits: Limits, *, declared: bool = True
    ) -> None:
        self._source = source
        self._limits = limits
        self._continue_now = continue_now
        self._chunks = Chunks() if length is None else None
        self._left = length or 0
        self._come: deque[Buffer] = deque()
        self._decoded_ahead: deque[Buffer] = deque()
        self._decoder_done = False
        self._rest: Buffer = b""
        self._kept_bytes = 0
        self._direct_bytes = 0
        self._error: Exception | None = None
        self._budget: int | None = None
        self.length = length
        self.declared = declared
        self.complete = length == 0
        """All of it has arrived."""
        self.bytes_come = 0
        """Of the body as it was sent, so far."""
        self.destination: memoryview | None = None
        """Where the connection puts what comes next."""
        self.waiter: asyncio.Future[None] | None = None
        self.then: Callable[[], None] | None = None
        """Who is told, once, that all has come or no more will; see ``Connection.when_whole``."""
        self.waited_s = 0.0
        self.sha256 = ""
        """Hex of what the body must hash to; empty when it was not signed."""
        self.decoder: ChunkedDecoder | None = None

    # --- the connection's side ----------------------------------------------------------------------------------------------

    @property
    def full(self) -> bool:
        """As much has come unread as may be kept."""
        return self._kept_bytes > self._limits.read_buffer_bytes

    @property
    def bounded(self) -> bool:
        """What comes is the object and no more, of declared size."""
        return self._chunks is None and self.decoder is None

    @property
    def failed(self) -> bool:
        """No more of it will come, though it is not complete; or it is, and ``at_hand`` found it wrong."""
        return self._error is not None

    def feed(self, data: bytes) -> bytes:
        """Takes what belongs to the body, and returns what follows it."""
        crumbs = False
        if self._chunks is None:
            if len(data) <= self._left:
                rest = b""
            else:
                data, rest = data[: self._left], data[self._left :]
            self._left -= len(data)
            if data:
                self._keep(data)
            ended = not self._left
        else:
            try:
                pieces, rest = self._chunks.feed(data)
            except S3Error as error:
                self.fail(error)
                return b""
            if pieces:
                alone = len(pieces) == 1 and 2 * len(pieces[0]) > len(data)
                self._keep(pieces[0] if alone else b"".join(pieces))  # a view of a byte takes 200, and keeps what it was cut from
            ended, crumbs = self._chunks.ended, len(pieces) > CRUMBS
        if ended:
            self._end()
        if self.waiter is not None and (ended or self._come or self._budget is not None):
            self._wake()
        if not ended and (self.full or crumbs) and (self.waiter is None or self.waiter.done()) and (self.then is None or not self.bounded):
            self._source.hold_back()  # until the reader wants more: one readiness of the socket may bring dozens of reads
        return rest

    def received(self, count: int) -> None:
        """``count`` bytes have come into ``destination``."""
        destination = self.destination
        assert destination is not None
        self._left -= count
        self._direct_bytes += count
        self.bytes_come += count
        if self._left and count < len(destination):
            self.destination = destination[count:]
            return
        self.destination = None
        if not self._left:
            self._end()
        self._wake()

    def fail(self, error: S3Error) -> None:
        """No more of it will come."""
        if self.complete or self._error is not None:
            return
        self._error = error
        self.destination = None
        self._source.body_done()
        self._wake()
        if self.then is not None:
            self.tell()

    def tell(self) -> None:
        """Calls ``then``."""
        then, self.then = self.then, None
        if then is not None:
            then()

    def _keep(self, data: Buffer) -> None:
        self.bytes_come += len(data)
        if self._budget is not None:
            self._budget -= len(data)
        else:
            self._come.append(data)
            self._kept_bytes += len(data)

    def _end(self) -> None:
        self.complete = True
        self._source.body_done()

    def _wake(self) -> None:
        if self.waiter is not None and not self.waiter.done():
            self.waiter.set_result(None)

    # --- the reader's side --------------------------------------------------------------------------------------------------

    @property
    def awaited(self) -> bool:
        """The client waits for ``100 Continue`` and has not been told to go on."""
        return self._continue_now is not None

    def go_on(self) -> None:
        """Sends ``100 Continue`` if the client waits for it; once."""
        if self._continue_now is not None:
            self._continue_now()
            self._continue_now = None

    async def _next(self) -> Buffer:
        """What has arrived, at least one byte; empty at the end. Raises IncompleteBody, RequestTimeout, BadRequest."""
        while not self._come:
            if self._error is not None:
                raise self._error
            if self.complete:
                return b""
            await self._source.heard(self)
        piece = self._come.popleft()
        self._kept_bytes -= len(piece)
        return piece

    def at_hand(self) -> Buffer | None:
        """The whole object of a small body, when all of that has come and none was read; it can be read as ever. None when something is wrong with it, which whoever
        reads it is told."""
        if not self.complete or self._error is not None:
            return None
        if self.decoder is not None and not self._decoder_done:
            try:
                self._decoded_ahead.extend(self.decoder.feed(b"".join(self._come)))
                self.decoder.finish()
            except Exception as error:  # also a mistake of ours: nobody else would tell of it, or answer
                self._decoded_ahead.clear()
                self._error = error
                return None
            finally:
                self._come.clear()
                self._kept_bytes = 0
            self._decoder_done = True
        pieces = self._come if self.decoder is None else self._decoded_ahead
        if len(pieces) > 1:
            whole = b"".join(pieces)
            pieces.clear()
            pieces.append(whole)
        return pieces[0] if pieces else b""

    async def __anext__(self) -> Buffer:
        """The next bytes of the object. The last come only after chunk signatures, framing and length hold; the hash that was signed is not checked here."""
        self.go_on()
        piece = self._rest or await (self._next() if self.decoder is None else self._decoded(self.decoder))
        self._rest = b""
        if not piece:
            raise StopAsyncIteration
        return piece

    async def fill(self, view: memoryview) -> int:
        """See ``api.FillingBody``."""
        self.go_on()
        filled = 0
        while filled < len(view):
            if self._can_go_direct(len(view) - filled):
                self.destination = view[filled : filled + self._left]
                self._direct_bytes = 0
                try:
                    await self._source.heard(self)
                finally:
                    self.destination = None
                filled += self._direct_bytes
                continue
            piece = await anext(self, None)
            if piece is None:
                break
            count = min(len(view) - filled, len(piece))
            if count < len(piece):
                whole = memoryview(piece)
                piece, self._rest = whole[:count], whole[count:]
            view[filled : filled + count] = piece
            filled += count
        return filled

    def _can_go_direct(self, room_bytes: int) -> bool:
        """Nothing lies here that comes first, and the bytes need no decoding."""
        waiting = not (self._rest or self._come or self.complete or self._error)
        return waiting and self._chunks is None and self.decoder is None and room_bytes >= DIRECT_BYTES_MIN

    async def whole(self) -> Buffer:
        """See ``api.WholeBody``: for a body whose declared size is small. One that turns out longer is cut, so that its reader finds it wrong."""
        self.go_on()
        if self.decoder is None and self.complete and len(self._come) == 1:
            return self._come.popleft()
        pieces, size = [], 0
        async for piece in self:
            pieces.append(piece)
            size += len(piece)
            if size > WHOLE_BYTES_MAX:
                break
        return b"".join(pieces)

    async def _decoded(self, decoder: ChunkedDecoder) -> Buffer:
        """At least one byte of what the client put into chunks; empty at the end."""
        while not self._decoded_ahead or (len(self._decoded_ahead) == 1 and not self._decoder_done):
            piece = await self._next()
            if not piece:
                if not self._decoder_done:
                    decoder.finish()
                    self._decoder_done = True
                break
            if decoder.signed and len(piece) > HASH_INLINE_BYTES_MAX:
                self._decoded_ahead += await asyncio.get_running_loop().run_in_executor(None, decoder.feed, piece)
            else:
                self._decoded_ahead += decoder.feed(piece)
        return self._decoded_ahead.popleft() if self._decoded_ahead else b""

    async def read(self, bytes_max: int) -> bytes:
        """All of a small body, verified. Raises MaxMessageLengthExceeded, XAmzContentSHA256Mismatch."""
        if self.length is not None and self.length > bytes_max:
            raise MaxMessageLengthExceeded()
        pieces = []
        size = 0
        async for piece in self:
            size += len(piece)
            if size > bytes_max:
                raise MaxMessageLengthExceeded()
            pieces.append(piece)
        data = b"".join(pieces)
        if self.sha256:
            digest = hashlib.sha256()
            if size > HASH_INLINE_BYTES_MAX:
                await asyncio.to_thread(digest.update, data)
            else:
                digest.update(data)
            if digest.hexdigest() != self.sha256:
                raise XAmzContentSHA256Mismatch(ClientComputedContentSHA256=self.sha256, S3ComputedContentSHA256=digest.hexdigest())
        return data

    async def discard(self, bytes_max: int, seconds_max: float) -> bool:
        """Throws away what comes, within bounds. True when the body has ended, so that the connection can carry another request."""
        self._budget = bytes_max - self._kept_bytes
        self._come.clear()
        self._kept_bytes = 0
        try:
            async with asyncio.timeout(seconds_max):
                while not self.complete and self._error is None and self._budget > 0:
                    await self._source.heard(self)
        except TimeoutError:
            return False
        return self.complete

"""Bodies as they arrive: 100-continue, framing, the hash that was signed, and what is left unread.

The connection feeds what it receives; whoever reads gets it as pieces, as a whole, or straight from the socket into
memory of their own.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Protocol

from storaged.errors import BadRequest, MaxMessageLengthExceeded, S3Error, XAmzContentSHA256Mismatch
from storaged.s3.http.chunks import TransferChunks
from storaged.s3.http.limits import Limits
from storaged.units import KIB
from storaged.wire import Buffer

HASH_INLINE_BYTES_MAX = 64 * KIB
"""SHA-256 of this takes 32 us: less than going to a thread and back."""

WHOLE_BYTES_MAX = 64 * KIB
"""More than anything that is asked for as a whole has."""

DIRECT_BYTES_MIN = 16 * KIB
"""A reader's memory that has less room than this is filled by copying."""

JOINED_BYTES_MAX = 4 * KIB
"""A piece that is kept, and has less than this, is joined with the next one that has: an object of its own takes 100
bytes, however few a client's segments bring.
"""
VIEWS_MAX = 4
"""So many pieces of one read are passed on as views; more are joined: a view of a byte takes 200, and keeps what it was
cut from.
"""


class Source(Protocol):
    """What a body asks of its connection."""

    def hold_back(self) -> None: ...

    def body_done(self, rest: Buffer = b"") -> None: ...

    def admitted(self) -> None: ...

    async def heard(self, body: RequestBody) -> None: ...


class Decoder(Protocol):
    """Takes the object's bytes out of the framing that S3 puts around them (``auth.aws_chunked``)."""

    stopped: bool
    trailers: dict[str, str]

    @property
    def signed(self) -> bool: ...

    def feed(self, data: Buffer) -> list[Buffer]: ...

    def finish(self) -> None: ...

    def trailing_checksums(self) -> Mapping[str, str]: ...


class RequestBody(AsyncIterator[Buffer]):
    """The body of one request. Nothing is read, and no ``100 Continue`` sent, before somebody asks for it: by then the
    request is authenticated.
    HTTP's chunks are not even decoded before that, a few at a time from then on (see ``chunks``), and refused when they
    are tiny and the request is not authenticated.

    ``length``: Content-Length, or None when it comes in HTTP chunks. ``declared`` False: neither came, which HTTP takes
    for an empty body.
    ``continue_now``: sends the interim answer; None when the client does not wait for one.
    """

    __slots__ = (
        "_admitted", "_budget", "_chunks", "_come", "_continue_now", "_decoded_ahead", "_decoder_done", "_direct_bytes", "_error", "_kept_bytes", "_last_error", "_left", "_limits",  # noqa: E501
        "_raw", "_raw_bytes", "_rest", "_source", "bytes_come", "complete", "declared", "decoder", "destination", "length", "sha256", "then", "waited_s", "waiter",  # noqa: E501
    )  # fmt: skip

    def __init__(
        self,
        source: Source,
        length: int | None,
        continue_now: Callable[[], None] | None,
        limits: Limits,
        *,
        declared: bool = True,
    ) -> None:
        self._source = source
        self._limits = limits
        self._continue_now = continue_now
        self._chunks = TransferChunks() if length is None else None
        self._left = length or 0
        self._raw: list[bytes] = []
        """Chunks as they came, of which nothing was decoded."""
        self._raw_bytes = 0
        self._come: deque[Buffer] = deque()
        self._decoded_ahead: deque[Buffer] = deque()
        self._decoder_done = False
        self._rest: Buffer = b""
        self._kept_bytes = 0
        self._direct_bytes = 0
        self._error: Exception | None = None
        self._last_error: S3Error | None = None
        """It will fail with this, unless it turns out to be complete."""
        self._budget: int | None = None
        self._admitted = False
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
        self.decoder: Decoder | None = None

    # --- the connection's side
    # ----------------------------------------------------------------------------------------------

    @property
    def full(self) -> bool:
        """As much has come unread as may be kept, or as may be decoded in one turn."""
        return self._kept_bytes + self._raw_bytes > self._limits.read_buffer_bytes or (
            self._chunks is not None and self._chunks.stopped
        )

    @property
    def kept_bytes(self) -> int:
        """Of a request that is not authenticated: what it has sent, less what was thrown away."""
        return self.bytes_come if self._budget is None else 0

    @property
    def bounded(self) -> bool:
        """What comes is the object and no more, of declared size."""
        return self._chunks is None and self.decoder is None

    @property
    def failed(self) -> bool:
        """No more of it will come, though it is not complete; or it is, and ``try_whole`` found it wrong."""
        return self._error is not None

    def admit(self) -> None:
        """The request is authenticated: what follows is done for somebody known. Raises SlowDown when too many are in
        flight.
        """
        self._source.admitted()
        self._admitted = True

    def feed(self, data: bytes) -> None:
        """Takes what belongs to the body; the connection gets what follows it with ``body_done``."""
        chunks = self._chunks
        if chunks is None:
            rest = data[self._left :]
            if rest:
                data = data[: self._left]
            self._left -= len(data)
            if data:
                self._arrived(len(data))
                self._keep(data)
            if not self._left:
                self._end(rest)
        elif data:
            self._arrived(len(data))
            self._raw.append(data)
            self._raw_bytes += len(data)
            if not chunks.stopped and (self._admitted or self.waiter is not None or self._budget is not None):
                self._decode(chunks)
                if self._error is not None:
                    return
        if self.waiter is not None and (self.complete or self._come or self._budget is not None):
            self._wake()
        if (
            not self.complete
            and self.full
            and (self.waiter is None or self.waiter.done())
            and (self.then is None or not self.bounded)
        ):
            # until the reader wants more: one readiness of the socket may bring dozens of reads
            self._source.hold_back()

    def _arrived(self, count: int) -> None:
        self.bytes_come += count
        if self._budget is not None:
            self._budget -= count

    def _decode(self, chunks: TransferChunks) -> None:
        """A turn's worth of what has come in HTTP's chunks."""
        data, self._raw = b"".join(self._raw), []
        size = len(data) + len(chunks.rest)
        try:
            pieces = chunks.feed(data)
            self._check_crumbs(chunks)
        except S3Error as error:
            self._raw_bytes = 0
            self._last_error = error
            self.fail(error)
            return
        self._raw_bytes = len(chunks.rest)
        if pieces:
            alone = len(pieces) == 1 and 2 * len(pieces[0]) > size
            self._keep(pieces[0] if alone else b"".join(pieces))
        if chunks.ended:
            self._raw_bytes = 0
            self._end(bytes(chunks.rest))

    def _check_crumbs(self, chunks: TransferChunks) -> None:
        """Tiny chunks are a client's right; to send many of them to a server that does not know it is not. Raises
        BadRequest.
        """
        limits = self._limits
        few = self._admitted or chunks.chunks <= limits.unauthenticated_chunks
        if not few and chunks.data_bytes < chunks.chunks * limits.unauthenticated_chunk_bytes_min:
            raise BadRequest(
                "The chunks of a body that is not authenticated have"
                f" {limits.unauthenticated_chunk_bytes_min} bytes or more, on average."
            )

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
        """No more of it will come. What has come may still be all of it: that is seen when it is decoded."""
        if self.complete or self._error is not None:
            return
        if self._undecoded and self._last_error is None:
            self._last_error = error
            self._wake()
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
        if self._budget is not None:
            return
        self._kept_bytes += len(data)
        come = self._come
        if len(data) < JOINED_BYTES_MAX and come and len(come[-1]) < JOINED_BYTES_MAX:
            last = come[-1]
            if isinstance(last, bytearray):
                last += data
            else:
                come[-1] = bytearray(b"".join((last, data)))
        else:
            come.append(data)

    def _end(self, rest: Buffer = b"") -> None:
        self.complete = True
        self._source.body_done(rest)

    def _wake(self) -> None:
        if self.waiter is not None and not self.waiter.done():
            self.waiter.set_result(None)

    # --- the reader's side
    # --------------------------------------------------------------------------------------------------

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
            await self._go_on()
        piece = self._come.popleft()
        self._kept_bytes -= len(piece)
        return piece

    @property
    def _undecoded(self) -> bool:
        """There are HTTP chunks that can be decoded now."""
        return bool(self._raw) or (self._chunks is not None and self._chunks.stopped)

    async def _go_on(self) -> None:
        """Until something has happened: another turn of decoding, if there is something to decode, or something has
        come.
        """
        chunks = self._chunks
        if chunks is not None and self._undecoded:
            if chunks.stopped:
                await asyncio.sleep(0)  # others have their turn
            self._decode(chunks)
        elif self._last_error is not None:
            self.fail(self._last_error)
        else:
            await self._source.heard(self)

    def try_whole(self) -> Buffer | None:
        """The whole object of a small body, when all of that has come and none was read; it can be read as ever. None
        when something is wrong with it, which whoever
        reads it is told, and when its chunks are too many to be decoded in one turn."""
        if not self.complete or self._error is not None:
            return None
        if self.decoder is not None and not self._decoder_done:
            try:
                self._decoded(self.decoder.feed(b"".join(self._come)))
                if self.decoder.stopped:
                    return None
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
        """The next bytes of the object. The last come only after chunk signatures, framing and length hold; the hash
        that was signed is not checked here.
        """
        self.go_on()
        piece = self._rest or await (self._next() if self.decoder is None else self._next_decoded(self.decoder))
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
        """See ``api.WholeBody``: for a body whose declared size is small. One that turns out longer is cut, so that its
        reader finds it wrong.
        """
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

    async def _next_decoded(self, decoder: Decoder) -> Buffer:
        """At least one byte of what the client put into chunks; empty at the end."""
        while not self._decoded_ahead or (len(self._decoded_ahead) == 1 and not self._decoder_done):
            piece: Buffer = b""
            if decoder.stopped:
                await asyncio.sleep(0)  # others have their turn
            else:
                piece = await self._next()
                if not piece:
                    if not self._decoder_done:
                        decoder.finish()
                        self._decoder_done = True
                    break
            if decoder.signed and len(piece) > HASH_INLINE_BYTES_MAX:
                self._decoded(await asyncio.get_running_loop().run_in_executor(None, decoder.feed, piece))
            else:
                self._decoded(decoder.feed(piece))
        return self._decoded_ahead.popleft() if self._decoded_ahead else b""

    def _decoded(self, pieces: list[Buffer]) -> None:
        self._decoded_ahead.extend(pieces if len(pieces) <= VIEWS_MAX else (b"".join(pieces),))

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
                raise XAmzContentSHA256Mismatch(
                    ClientComputedContentSHA256=self.sha256, S3ComputedContentSHA256=digest.hexdigest()
                )
        return data

    async def discard(self, bytes_max: int, seconds_max: float) -> bool:
        """Throws away what comes, within bounds. True when the body has ended, so that the connection can carry another
        request.
        """
        self._budget = bytes_max - self._kept_bytes - self._raw_bytes
        self._come.clear()
        self._kept_bytes = 0
        try:
            async with asyncio.timeout(seconds_max):
                while not self.complete and self._error is None and self._budget > 0:
                    await self._go_on()
        except TimeoutError:
            return False
        return self.complete

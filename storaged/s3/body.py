"""Bodies as they arrive: 100-continue, time-outs, aws-chunked framing, the hash that was signed, and what is left unread.

``aiohttp``'s parser has taken HTTP's own framing away and holds the client back at ``Limits.read_buffer_bytes``.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Callable

from aiohttp import StreamReader

from storaged.clock import Clock
from storaged.errors import IncompleteBody, MaxMessageLengthExceeded, RequestTimeout, XAmzContentSHA256Mismatch
from storaged.s3.chunked import ChunkedDecoder
from storaged.s3.limits import Limits
from storaged.units import KIB
from storaged.wire import Buffer

HASH_INLINE_BYTES_MAX = 64 * KIB
"""SHA-256 of this takes 32 us: less than going to a thread and back. A longer object is hashed where its blocks are sealed, in a thread anyway."""


class RequestBody:
    """The body of one request. Nothing is read, and no ``100 Continue`` sent, before somebody asks for it: by then the request is authenticated.

    ``length``: Content-Length, or None when it comes in HTTP chunks. ``continue_now``: sends the interim answer; None when the client does not wait for one.
    """

    def __init__(
        self,
        stream: StreamReader,
        length: int | None,
        continue_now: Callable[[], None] | None,
        limits: Limits,
        clock: Clock,
        *,
        declared: bool = True,
    ) -> None:
        self._stream = stream
        self._limits = limits
        self._clock = clock
        self._continue_now = continue_now
        self._waited_s = 0.0
        self.length = length
        self.declared = declared
        """False: neither Content-Length nor Transfer-Encoding came, which HTTP takes for an empty body."""
        self.bytes_read = 0
        self.sha256 = ""
        """Hex of what the body must hash to; empty when it was not signed."""
        self.decoder: ChunkedDecoder | None = None

    @property
    def awaited(self) -> bool:
        """The client waits for ``100 Continue`` and has not been told to go on."""
        return self._continue_now is not None

    @property
    def complete(self) -> bool:
        """All of it has arrived."""
        return self._stream.is_eof()

    def go_on(self) -> None:
        """Sends ``100 Continue`` if the client waits for it; once."""
        if self._continue_now is not None:
            self._continue_now()
            self._continue_now = None

    async def _next(self) -> bytes:
        """What has arrived, at least one byte; empty at the end. Raises IncompleteBody, RequestTimeout."""
        stream = self._stream
        try:
            piece = stream.read_nowait()  # what needs no waiting needs no timer
            if not piece and not stream.is_eof():
                piece = await self._wait()
        except TimeoutError:
            raise RequestTimeout() from None
        except (asyncio.CancelledError, IncompleteBody, RequestTimeout):
            raise
        except Exception as error:  # the parser's or the transport's: the client went away or broke HTTP's framing
            raise IncompleteBody() from error
        self.bytes_read += len(piece)
        return piece

    async def _wait(self) -> bytes:
        allowed_s = self._limits.body_idle_s + self.bytes_read / self._limits.body_rate_min_bytes_s - self._waited_s
        if allowed_s <= 0:
            raise RequestTimeout()
        before = self._clock.monotonic()
        async with asyncio.timeout(min(allowed_s, self._limits.body_idle_s)):
            piece = await self._stream.readany()
        self._waited_s += self._clock.monotonic() - before
        return piece

    def hand_over_sha256(self) -> str:
        """What a long body was signed as, for whoever reads it to verify instead of this front; empty when the front does it, or nothing was signed."""
        if self.length is not None and self.length <= HASH_INLINE_BYTES_MAX:
            return ""
        expected, self.sha256 = self.sha256, ""
        return expected

    async def pieces(self) -> AsyncIterator[Buffer]:
        """The object's bytes. The last piece comes only after everything that the front can check holds: signed hash (unless that was handed over), chunk
        signatures, framing, length."""
        self.go_on()
        source = self._decoded() if self.decoder else self._plain()
        if not self.sha256:
            async for piece in source:
                yield piece
            return
        digest = hashlib.sha256()
        held: Buffer = b""
        async for piece in source:
            if len(piece) <= HASH_INLINE_BYTES_MAX:
                digest.update(piece)
                if held:
                    yield held
            else:
                hashing = asyncio.get_running_loop().run_in_executor(None, digest.update, piece)
                try:
                    if held:
                        yield held
                finally:
                    await hashing
            held = piece
        if digest.hexdigest() != self.sha256:
            raise XAmzContentSHA256Mismatch(ClientComputedContentSHA256=self.sha256, S3ComputedContentSHA256=digest.hexdigest())
        if held:
            yield held

    async def _plain(self) -> AsyncIterator[Buffer]:
        if self.length == 0:
            return
        while piece := await self._next():
            yield piece

    async def _decoded(self) -> AsyncIterator[Buffer]:
        decoder = self.decoder
        assert decoder is not None
        held: Buffer = b""
        while piece := await self._next():
            if decoder.signed and len(piece) > HASH_INLINE_BYTES_MAX:
                released = await asyncio.get_running_loop().run_in_executor(None, decoder.feed, piece)
            else:
                released = decoder.feed(piece)
            for data in released:
                if held:
                    yield held
                held = data
        decoder.finish()
        if held:
            yield held

    async def read(self, bytes_max: int) -> bytes:
        """All of a small body. Raises MaxMessageLengthExceeded."""
        if self.length is not None and self.length > bytes_max:
            raise MaxMessageLengthExceeded()
        pieces = []
        size = 0
        async for piece in self.pieces():
            size += len(piece)
            if size > bytes_max:
                raise MaxMessageLengthExceeded()
            pieces.append(piece)
        return b"".join(pieces)

    async def discard(self, bytes_max: int, seconds_max: float) -> bool:
        """Throws away what comes, within bounds. True when the body has ended, so that the connection can carry another request."""
        budget = bytes_max
        try:
            async with asyncio.timeout(seconds_max):
                while budget > 0 and not self._stream.at_eof():
                    piece = await self._stream.readany()
                    if not piece:
                        break
                    budget -= len(piece)
        except TimeoutError:
            return False
        except asyncio.CancelledError:
            raise
        except Exception:  # the client is gone, and nothing of it is needed any more
            return False
        return self._stream.at_eof()

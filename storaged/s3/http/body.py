"""A request's body for its reader: as pieces, as a whole, or straight from the socket into the reader's memory; without
the framing that S3 puts around the object.

``body_input`` has the other side: the bytes as they arrive.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Protocol

from storaged.errors import MaxMessageLengthExceeded, XAmzContentSHA256Mismatch
from storaged.s3.http.body_input import DIRECT_BYTES_MIN, BodyInput, Source
from storaged.s3.http.limits import Limits
from storaged.units import KIB
from storaged.wire import Buffer

HASH_INLINE_BYTES_MAX = 64 * KIB
"""SHA-256 of this takes 32 us: less than going to a thread and back."""

WHOLE_BYTES_MAX = 64 * KIB
"""As much as any body has that is read by ``whole``."""

VIEWS_MAX = 4
"""Up to this many pieces of one read are passed on as views; more are joined. A view of one byte takes 200 bytes, and
keeps the memory that it was cut from.
"""


class Decoder(Protocol):
    """Takes the object's bytes out of the framing that S3 puts around them (``auth.aws_chunked``)."""

    stopped: bool
    trailers: dict[str, str]

    @property
    def signed(self) -> bool: ...

    def feed(self, data: Buffer) -> list[Buffer]: ...

    def finish(self) -> None: ...

    def trailing_checksums(self) -> Mapping[str, str]: ...


class RequestBody(BodyInput, AsyncIterator[Buffer]):
    """The body of one request.

    It is not read, and no ``100 Continue`` is sent, before its reader asks for it: by then the request is
    authenticated. The attributes of this class are those of the reader's side alone; ``BodyInput`` has the others.

    ``declared`` False: the head has neither Content-Length nor Transfer-Encoding, which in HTTP means an empty body.
    ``continue_now``: sends the interim answer; None when the client does not wait for one.
    """

    sha256 = ""
    """The hash that the client signed, in hex; empty: none."""
    decoder: Decoder | None = None
    _decoder_done = False
    _leftover: Buffer = b""
    """The rest of a piece of which ``fill`` took a part."""

    def __init__(
        self,
        source: Source,
        length: int | None,
        continue_now: Callable[[], None] | None,
        limits: Limits,
        *,
        declared: bool = True,
    ) -> None:
        super().__init__(source, length, limits)
        self._continue_now = continue_now
        self._decoded: deque[Buffer] = deque()
        """Pieces of the object that ``decoder`` returned, and that were not read yet."""
        self.declared = declared

    @property
    def bounded(self) -> bool:
        return self._chunks is None and self.decoder is None

    @property
    def expects_continue(self) -> bool:
        """The client waits for ``100 Continue``, which was not sent yet."""
        return self._continue_now is not None

    def send_continue(self) -> None:
        """Sends ``100 Continue`` if the client waits for it; once."""
        if self._continue_now is not None:
            self._continue_now()
            self._continue_now = None

    async def _next(self) -> Buffer:
        """What has arrived, at least one byte; empty at the end. Raises IncompleteBody, RequestTimeout, BadRequest."""
        while not self._received:
            if self._error is not None:
                raise self._error
            if self.complete:
                return b""
            await self._advance()
        piece = self._received.popleft()
        self._kept_bytes -= len(piece)
        return piece

    def try_whole(self) -> Buffer | None:
        """The whole object, if all of its body has arrived and none was read; it can still be read as usual.

        None also when the body is wrong, which its reader will find, and when its chunks are too many to be decoded in
        one turn.
        """
        if not self.complete or self._error is not None:
            return None
        if self.decoder is not None and not self._decoder_done:
            try:
                self._keep_decoded(self.decoder.feed(b"".join(self._received)))
                if self.decoder.stopped:
                    return None
                self.decoder.finish()
            except Exception as error:  # also one that is a bug: the reader raises it, and so it gets an answer
                self._decoded.clear()
                self._error = error
                return None
            finally:
                self._received.clear()
                self._kept_bytes = 0
            self._decoder_done = True
        pieces = self._received if self.decoder is None else self._decoded
        if len(pieces) > 1:
            whole = b"".join(pieces)
            pieces.clear()
            pieces.append(whole)
        return pieces[0] if pieces else b""

    async def __anext__(self) -> Buffer:
        """The next bytes of the object. The last ones are returned only if chunk signatures, framing and length are
        right. The signed hash is not checked here."""
        self.send_continue()
        piece = self._leftover or await (self._next() if self.decoder is None else self._next_decoded(self.decoder))
        self._leftover = b""
        if not piece:
            raise StopAsyncIteration
        return piece

    async def fill(self, view: memoryview) -> int:
        """See ``api.FillingBody``."""
        self.send_continue()
        filled = 0
        while filled < len(view):
            if self._can_go_direct(len(view) - filled):
                self.destination = view[filled : filled + self._left]
                self._direct_bytes = 0
                try:
                    await self._source.wait_for_body(self)
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
                piece, self._leftover = whole[:count], whole[count:]
            view[filled : filled + count] = piece
            filled += count
        return filled

    def _can_go_direct(self, room_bytes: int) -> bool:
        """No kept bytes come first, and the bytes need no decoding."""
        waiting = not (self._leftover or self._received or self.complete or self._error)
        return waiting and self._chunks is None and self.decoder is None and room_bytes >= DIRECT_BYTES_MIN

    async def whole(self) -> Buffer:
        """See ``api.WholeBody``: for a body whose declared size is small. A longer one is cut, so that its reader finds
        it wrong."""
        self.send_continue()
        if self.decoder is None and self.complete and len(self._received) == 1:
            return self._received.popleft()
        pieces, size = [], 0
        async for piece in self:
            pieces.append(piece)
            size += len(piece)
            if size > WHOLE_BYTES_MAX:
                break
        return b"".join(pieces)

    async def _next_decoded(self, decoder: Decoder) -> Buffer:
        """At least one byte that ``decoder`` returned; empty at the end. One piece is held back until ``decoder`` has
        found the end of the body right."""
        while not self._decoded or (len(self._decoded) == 1 and not self._decoder_done):
            piece: Buffer = b""
            if decoder.stopped:
                await asyncio.sleep(0)  # other connections have their turn
            else:
                piece = await self._next()
                if not piece:
                    if not self._decoder_done:
                        decoder.finish()
                        self._decoder_done = True
                    break
            if decoder.signed and len(piece) > HASH_INLINE_BYTES_MAX:
                self._keep_decoded(await asyncio.get_running_loop().run_in_executor(None, decoder.feed, piece))
            else:
                self._keep_decoded(decoder.feed(piece))
        return self._decoded.popleft() if self._decoded else b""

    def _keep_decoded(self, pieces: list[Buffer]) -> None:
        self._decoded.extend(pieces if len(pieces) <= VIEWS_MAX else (b"".join(pieces),))

    async def read(self, bytes_max: int) -> bytes:
        """All of a small body, checked against the signed hash. Raises MaxMessageLengthExceeded,
        XAmzContentSHA256Mismatch."""
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
        """Drops what arrives, within bounds. True when the body has ended, so that the connection can carry another
        request."""
        raw_bytes = self._chunks.raw_bytes if self._chunks is not None else 0
        self._budget = bytes_max - self._kept_bytes - raw_bytes
        self._received.clear()
        self._kept_bytes = 0
        try:
            async with asyncio.timeout(seconds_max):
                while not self.complete and self._error is None and self._budget > 0:
                    await self._advance()
        except TimeoutError:
            return False
        return self.complete

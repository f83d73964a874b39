"""A request's body, read whole or into buffers of the reader's size."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from storaged.errors import EntityTooLarge
from storaged.objects.api import Body
from storaged.wire import Buffer


async def whole_of(body: Body, size: int) -> Buffer:
    """All of a body that should have ``size`` bytes; at least one byte more when it is longer. An ``api.WholeBody``
    gives it without a copy. Raises what the body raises.
    """
    whole: Callable[[], Awaitable[Buffer]] | None = getattr(body, "whole", None)
    if whole is not None:
        return await whole()
    head = memoryview(bytearray(size + 1))
    filled = await BodyReader(body, size + 1).fill(head)
    return head[:filled]


class BodyReader:
    """Fills buffers from a body, and refuses one longer than ``bytes_max``. An ``api.FillingBody`` does so itself."""

    def __init__(self, body: Body, bytes_max: int) -> None:
        self._body = body
        self._fill: Callable[[memoryview], Awaitable[int]] | None = getattr(body, "fill", None)
        self._rest: memoryview = memoryview(b"")
        self._unread: memoryview = memoryview(b"")
        self._bytes_max = bytes_max
        self.bytes_read = 0
        self.ended = False
        """The body has been read to its end (a full buffer may leave this open)."""

    def unread(self, view: memoryview) -> None:
        """Puts back bytes that were just read, to be read again. The caller must not change the memory before that."""
        assert not self._unread
        self._unread = view
        self.bytes_read -= len(view)

    async def fill(self, view: memoryview) -> int:
        """Fills ``view`` and returns the number of bytes; fewer than fit only at the end of the body. Raises
        EntityTooLarge, and what the body raises.
        """
        filled = min(len(view), len(self._unread))
        if filled:
            view[:filled] = self._unread[:filled]
            self._unread = self._unread[filled:]
        if self._fill is not None and filled < len(view):
            filled += await self._fill(view[filled:])
            self.ended = filled < len(view)
        while filled < len(view) and not self.ended:
            if not self._rest:
                piece = await anext(self._body, None)
                if piece is None:
                    self.ended = True
                    break
                self._rest = memoryview(piece)
                continue
            count = min(len(view) - filled, len(self._rest))
            view[filled : filled + count] = self._rest[:count]
            self._rest = self._rest[count:]
            filled += count
        self.bytes_read += filled
        if self.bytes_read > self._bytes_max:
            raise EntityTooLarge(MaxSizeAllowed=str(self._bytes_max), ProposedSize=str(self.bytes_read))
        return filled

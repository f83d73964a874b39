"""Memory of transfers, bounded for the whole process, and reused: fresh buffers of a MiB or more cost a page fault every 4 KiB.

A transfer leases what it needs for one block, and gives it back when the block is written or sent. When the bound is reached it waits its turn, so
that back-pressure reaches the client's socket; the size of blocks shrinks before that, as more transfers are in flight.
"""

from __future__ import annotations

import asyncio
import math
from collections import deque

from storaged.errors import SlowDown
from storaged.units import KIB, MIB

FREE_BUFFERS_PER_SIZE_MAX = 64
IDLE_BYTES_MAX = 8 * MIB
"""Kept by a pool without transfers: enough for the next one. The rest is free for the other pool's, so that uploads after downloads need no memory for both."""


class Lease:
    """``view`` is the lessee's until ``release``."""

    def __init__(self, pool: BufferPool, buffer: bytearray) -> None:
        self._pool: BufferPool | None = pool
        self._buffer = buffer
        self.view = memoryview(buffer)

    def release(self) -> None:
        """Safe to call twice."""
        pool, self._pool = self._pool, None
        if pool is not None:
            self.view = memoryview(b"")
            pool._give_back(self._buffer)


def _is_free(buffer: bytearray) -> bool:
    """Whether nothing refers to the memory any more: a socket that has not sent it yet, or a write that was left behind, may hold a view after the lease ended.

    A bytearray refuses to be resized while it is viewed; shortened by one and grown again it keeps its place.
    """
    try:
        last = buffer.pop()
    except BufferError:
        return False
    buffer.append(last)
    return True


class BufferPool:
    """Leases buffers, at most ``bytes_max`` in all. First come, first served; one lease is always granted, however large."""

    def __init__(self, bytes_max: int, wait_s: float) -> None:
        self.bytes_max = bytes_max
        self.bytes_leased = 0
        self.transfers = 0
        """Transfers in flight, as ``Transfer`` counts them."""
        self._wait_s = wait_s
        self._free: dict[int, list[bytearray]] = {}
        self.bytes_free = 0
        """Kept for the next lease; on top of ``bytes_leased``, and together with it never above ``bytes_max``."""
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()

    async def lease(self, size: int) -> Lease:
        """A buffer of at least ``size`` bytes. Raises SlowDown when no memory comes free in time."""
        size = _rounded(size)
        if self._waiting or not self._fits(size):
            turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            entry = (size, turn)
            self._waiting.append(entry)
            try:
                async with asyncio.timeout(self._wait_s):
                    await turn
            except BaseException as error:
                if turn.done() and not turn.cancelled():
                    self.bytes_leased -= size
                elif entry in self._waiting:
                    self._waiting.remove(entry)
                self._grant()
                if isinstance(error, TimeoutError):
                    raise SlowDown from None
                raise
        else:
            self.bytes_leased += size
        return Lease(self, self._take(size))

    def try_lease(self, size: int) -> Lease | None:
        """A lease when there is room and nobody waits, else None."""
        size = _rounded(size)
        if self._waiting or not self._fits(size):
            return None
        self.bytes_leased += size
        return Lease(self, self._take(size))

    def lease_now(self, size: int) -> Lease:
        """A lease at once, beyond the bound if need be: for who holds memory of another pool, and would keep it from others while waiting here."""
        size = _rounded(size)
        self.bytes_leased += size
        return Lease(self, self._take(size))

    def _fits(self, size: int) -> bool:
        return self.bytes_leased == 0 or self.bytes_leased + size <= self.bytes_max

    def _take(self, size: int) -> bytearray:
        stock = self._free.get(size, [])
        for index in reversed(range(len(stock))):
            if _is_free(stock[index]):
                self.bytes_free -= size
                return stock.pop(index)
        self._drop_free(self.bytes_max - self.bytes_leased)
        return bytearray(size)

    def rest(self) -> None:
        """The last transfer has ended."""
        self._drop_free(IDLE_BYTES_MAX)

    def _drop_free(self, bytes_max: int) -> None:
        while self.bytes_free and self.bytes_free > bytes_max:
            other = max(self._free, key=lambda kept: kept * len(self._free[kept]))
            self._free[other].pop(0)
            self.bytes_free -= other

    def _give_back(self, buffer: bytearray) -> None:
        size = len(buffer)
        self.bytes_leased -= size
        stock = self._free.setdefault(size, [])
        if len(stock) < FREE_BUFFERS_PER_SIZE_MAX and self.bytes_free + self.bytes_leased + size <= self.bytes_max:
            stock.append(buffer)
            self.bytes_free += size
        self._grant()

    def _grant(self) -> None:
        while self._waiting and (self._waiting[0][1].done() or self._fits(self._waiting[0][0])):
            size, turn = self._waiting.popleft()
            if not turn.done():
                self.bytes_leased += size
                turn.set_result(None)


def _rounded(size: int) -> int:
    """Few sizes, so that buffers find another use: powers of two up to 64 KiB, then multiples of that."""
    step = 64 * KIB
    return -(-size // step) * step if size > step else 1 << max(size - 1, 4095).bit_length()


class Transfer:
    """Counts one transfer of a pool while it lasts (a context manager)."""

    def __init__(self, pool: BufferPool) -> None:
        self._pool = pool

    def __enter__(self) -> Transfer:
        self._pool.transfers += 1
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.transfers -= 1
        if not self._pool.transfers:
            self._pool.rest()


def block_cells_for(k: int, transfers: int, cells: int | None, cells_max: int) -> int:
    """Data cells of a block for a new part: a multiple of 12 and of ``k``, so that every k of 2, 3, 4 (and 6, 12) keeps whole stripes; as many as ``cells_max`` while few
    transfers are in flight, fewer as there are more; not more than a part of ``cells`` cells needs."""
    unit = math.lcm(12, k)
    wanted = cells_max if transfers <= 4 else cells_max // 2 if transfers <= 16 else unit
    if cells is not None:
        wanted = min(wanted, cells)
    return max(1, -(-wanted // unit)) * unit


def window_cells_for(transfers: int, block_cells: int) -> int:
    """Data cells read and opened at once by a download: a whole block while few are in flight, 512 KiB when there are many (256 KiB cost 30% more
    CPU a byte), less when the default pool could not give each of them one."""
    wanted = 48 if transfers <= 4 else 16 if transfers <= 16 else 8 if transfers <= 64 else 4
    return min(wanted, block_cells)

"""Buffers of transfers, bounded for the whole process and reused: a fresh buffer of a MiB or more costs a page fault
every 4 KiB.

Memory whose use depends on a client's speed is apart from memory that only disks use. An upload leases room for the
plaintext of one block for as long as it lasts, from a pool whose shares shrink as it fills, so that slow clients leave
room for new ones. Room for the sealed block comes from another pool, from the sealing to the last write, and no
transfer holds it while it waits for a client. A download leases window by window, smaller ones as the pool fills or its
client turns out to be slow; one of a whole copy leases room for all of it while there is much. At the bound transfers
wait for their turn, so that back-pressure reaches the client's socket.
"""

from __future__ import annotations

import asyncio
import math
from collections import deque
from typing import NamedTuple

from storaged.cluster.layout import Profile
from storaged.errors import SlowDown
from storaged.objects.code.geometry import cell_bytes_for
from storaged.sov1 import CHUNK_BYTES_MAX, chunk_count
from storaged.units import KIB, MIB

FREE_BUFFERS_PER_SIZE_MAX = 64
CELL_BYTES_MIN = 8 * KIB
"""Lower bound of the cells of a large part while memory is short: each cell costs a call to the cipher."""
IDLE_BYTES_MAX = 8 * MIB
"""Kept by a pool without transfers: enough for the next one. The rest is freed for the other pools, so that uploads
after downloads do not need memory for both.
"""


class Lease:
    """The lessee uses ``view`` until ``release``."""

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
    """Whether no reference to the memory is left. A socket that has not sent it yet, or an abandoned write, may hold a
    view after the lease ended.

    A bytearray refuses to be resized while it is viewed. Shortened by one byte and grown again, it keeps its place.
    """
    try:
        last = buffer.pop()
    except BufferError:
        return False
    buffer.append(last)
    return True


class BufferPool:
    """Leases buffers, at most ``bytes_max`` in all, in the order of the requests. One lease is always granted, however
    large.
    """

    def __init__(self, bytes_max: int, wait_s: float) -> None:
        self.bytes_max = bytes_max
        self.bytes_leased = 0
        self.transfers = 0
        """Transfers in flight, counted by ``Transfer``."""
        self._wait_s = wait_s
        self._free: dict[int, list[bytearray]] = {}
        self.bytes_free = 0
        """Free buffers for the next lease, on top of ``bytes_leased``; together never above ``bytes_max``."""
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()

    @property
    def left(self) -> float:
        """Share of the memory that is not leased, 0.0 to 1.0."""
        return max(0.0, 1 - self.bytes_leased / self.bytes_max)

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
        """A lease when there is room and no other request waits, otherwise None."""
        size = _rounded(size)
        if self._waiting or not self._fits(size):
            return None
        self.bytes_leased += size
        return Lease(self, self._take(size))

    def lease_now(self, size: int) -> Lease:
        """A lease without waiting, beyond the bound if necessary: for a caller that holds memory of another pool, which
        others could not use while it waits here.
        """
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

    def shrink(self) -> None:
        """Called when the last transfer has ended."""
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
    """Rounds to few sizes, so that buffers can be reused: powers of two up to 64 KiB, then multiples of that."""
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
            self._pool.shrink()


SCARCE_SHARES = ((1 / 8, 12), (1 / 16, 6), (1 / 32, 3), (0, 1.5))
FILL_SHARES = ((4 / 5, 48), *SCARCE_SHARES)
DECLARED_SHARES = ((3 / 5, 48), (2 / 5, 24), *SCARCE_SHARES)
"""The share of an upload whose size is known, of which the last block takes no more than it needs. Blocks last as long
as their object: a GET of 16 MiB costs a tenth more CPU when they have 12 cells.
"""
WHOLE_CELLS, WHOLE_LEFT_MIN = 24, 1 / 2
"""A part of at most WHOLE_CELLS cells of 64 KiB is one block while WHOLE_LEFT_MIN of the pool is free: each block costs
the disks another round of messages.
"""
WINDOW_SHARES = ((1 / 6, 48), (1 / 10, 4), (0, 1))
"""The share of a transfer, in cells of 64 KiB, while at least this part of the pool is free."""


class BlockSize(NamedTuple):
    """``cells`` data cells of ``cell_bytes`` (C)."""

    cell_bytes: int
    cells: int


def block_size_for(profile: Profile, size: int | None, left: float, cells_max: int) -> BlockSize:
    """The size of the blocks of a new part of ``size`` bytes (None: unknown), when ``left`` of the memory for plaintext
    is free (1.0: all of it).

    The number of cells is a multiple of 12 and of k, so that every k of 2, 3, 4 (and 6, 12) has whole stripes, and
    not more than the part needs. In the default pool seven uploads of known size get ``cells_max``, seven more 24, and
    others 12; of unknown size, four get ``cells_max`` (two in each half of the pool, when two workers share it). When
    memory gets short cells become smaller: a block takes 768 KiB, in the end 96. 75 uploads of unknown size, or 60
    large ones of known size, find room in the default pool, and each keeps its share as long as its client needs it.
    """
    cell_bytes, unit = cell_bytes_for(profile, size), math.lcm(12, profile.k)
    shares = FILL_SHARES if size is None else DECLARED_SHARES
    share = min(cells_max, next(cells for above, cells in shares if left >= above))
    if size is not None and left >= WHOLE_LEFT_MIN and chunk_count(size, CHUNK_BYTES_MAX) <= WHOLE_CELLS:
        share = max(share, min(WHOLE_CELLS, cells_max))
    share_bytes = int(share * CHUNK_BYTES_MAX)
    while (
        left < 4 / 5
        and cell_bytes > CELL_BYTES_MIN
        and cell_bytes * unit > share_bytes
        and (size is None or size > share_bytes)
    ):
        cell_bytes //= 2
    wanted = share_bytes // cell_bytes
    if size is not None:
        wanted = min(wanted, -(-chunk_count(size, cell_bytes) // unit) * unit)
    return BlockSize(cell_bytes, max(1, wanted // unit) * unit)


def window_bytes_for(transfers: int, left: float) -> int:
    """Sealed bytes that a download reads and opens at once: a whole block while few downloads are in flight, half of
    one while some are, 512 KiB when there are many (256 KiB cost 30% more CPU per byte). Fewer when ``left`` of the
    memory (1.0: all of it) would soon be gone, in the end a single cell. In the default pool 128 downloads have room
    for the windows that their count allows. While some hold larger ones, from when they were few, 70 have room, and
    others wait for a turn.
    """
    by_count = 48 if transfers <= 4 else 24 if transfers <= 16 else 8 if transfers <= 64 else 4
    by_memory = next(cells for above, cells in WINDOW_SHARES if left >= above)
    return min(by_count, by_memory) * CHUNK_BYTES_MAX

"""Small copies over any fragment store: stores the copy, then commits the record, in a task for each. A disk with a
redo log writes both in one group (``node.disks``).
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence

import structlog

from storaged.errors import DiskUnusable, StoragedError
from storaged.meta.store_ports import Copy, Kept, MetaStore, StoreBatch
from storaged.units import KIB, MIB
from storaged.wire import Buffer

log = structlog.get_logger(__name__)

StoreCopy = Callable[[bytes, Sequence[Buffer], bytes], Awaitable[None]]
"""``await store(header, payload, check)``: a fragment record, durable when it returns. Raises a StoragedError when the
disk refused.
"""

COPY_CACHE_BYTES_A_DISK, COPY_CACHE_BYTES_MAX = 8 * MIB, 64 * MIB
"""About 1,900 copies of 4 KiB for each disk of a node, up to 15,000. Reading one from the page cache and verifying it
costs a storage node as much as the rest of a read.
"""

CACHED_BYTES_MAX = 16 * KIB
"""Larger copies are read from the page cache each time: verifying costs less of their read, and they would displace
many others.
"""

ENTRY_BYTES = 512
"""Memory of a cached payload besides its bytes: the head of its record, which lies before it, and the objects that hold
it.
"""

LoadCopy = Callable[[bytes], Awaitable[Copy | None]]
HoldsCopy = Callable[[bytes, bool], bool]
PeekCopy = Callable[[bytes], memoryview | None]


def _peek_nothing(_data_id: bytes) -> None:
    """No copy is in memory."""


def _holds_nothing(_data_id: bytes, _was_durable: bool) -> bool:
    """No copy is known to be durable."""
    return False


class SmallCopyCache:
    """Payloads of small copies that were read and verified, by data id; the least recently used leave when all disks of
    a node together exceed ``bytes_max``.

    A data id never gets other bytes, so no entry is ever stale. Damage on the disk meanwhile is found by scrub.
    """

    def __init__(self, bytes_max: int) -> None:
        self._bytes_max = bytes_max
        self._bytes = 0
        self._payloads: OrderedDict[bytes, memoryview] = OrderedDict()

    def get(self, data_id: bytes) -> memoryview | None:
        found = self._payloads.get(data_id)
        if found is not None:
            self._payloads.move_to_end(data_id)
        return found

    def put(self, data_id: bytes, payload: memoryview) -> None:
        """Of a data id that is not in the cache."""
        self._payloads[data_id] = payload
        self._bytes += len(payload) + ENTRY_BYTES
        while self._bytes > self._bytes_max:
            self._bytes -= len(self._payloads.popitem(last=False)[1]) + ENTRY_BYTES

    def __len__(self) -> int:
        return len(self._payloads)


class PlainCopies:
    """``ports.Copies`` over coroutines. ``meta`` is the replica's own store; ``cache`` is shared by all disks of the
    node.
    """

    def __init__(
        self,
        meta: MetaStore,
        store: StoreCopy,
        load: LoadCopy,
        peek: PeekCopy = _peek_nothing,
        cache: SmallCopyCache | None = None,
        holds: HoldsCopy = _holds_nothing,
    ) -> None:
        self._cache = cache if cache is not None else SmallCopyCache(0)
        self._meta = meta
        self._store = store
        self._load = load
        self._holds = holds
        self._peek = peek
        self._tasks: set[asyncio.Task[None]] = set()

    def holds(self, data_id: bytes, *, was_durable: bool) -> bool:
        return self._holds(data_id, was_durable)

    async def load(self, data_id: bytes) -> Copy | None:
        return await self._load(data_id)

    def peek(self, data_id: bytes) -> memoryview | None:
        found = self._cache.get(data_id)
        if found is None:
            found = self._peek(data_id)
            if found is not None and len(found) <= CACHED_BYTES_MAX:
                self._cache.put(data_id, found)
        return found

    def keep(
        self,
        header: bytes,
        body: Sequence[Buffer],
        batch: StoreBatch,
        on_done: Kept,
        *,
        settling: bool = False,
        check: bytes = b"",
    ) -> None:
        task = asyncio.get_running_loop().create_task(self._keep(header, body, batch, on_done, check))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _keep(
        self, header: bytes, body: Sequence[Buffer], batch: StoreBatch, on_done: Kept, check: bytes
    ) -> None:
        """Calls ``on_done`` whatever happens: the register waits for it."""
        refusal: StoragedError | None = None
        failure: StoragedError | None = None
        try:
            try:
                await self._store(header, body, check)
            except StoragedError as error:
                refusal = error
            else:
                await self._meta.commit(batch)
        except StoragedError as error:
            failure = error
        except asyncio.CancelledError:  # the process ends
            on_done(None, DiskUnusable("This node stops before it knows whether a small copy and its row are on disk."))
            raise
        except Exception as error:
            log.exception("keeping a small copy failed unexpectedly")
            failure = DiskUnusable(f"Keeping a small copy failed unexpectedly: {type(error).__name__}: {error}")
        on_done(refusal, failure)

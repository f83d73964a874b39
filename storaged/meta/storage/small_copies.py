"""Small copies over any fragment store: one wait after the other, a task for each. A disk's own log does better
(``node.disks``).
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence

import structlog

from storaged.errors import DiskUnusable, StoragedError
from storaged.meta.ports import Copy, Kept, MetaStore, StoreBatch
from storaged.units import MIB
from storaged.wire import Buffer

log = structlog.get_logger(__name__)

StoreCopy = Callable[[bytes, Sequence[Buffer]], Awaitable[None]]
"""``await store(header, payload)``: a fragment record, durable when it returns. Raises a StoragedError when the disk
refused.
"""

TOLD_BYTES_A_DISK, TOLD_BYTES_MAX = 8 * MIB, 64 * MIB
"""About 1,900 copies of 4 KiB for each disk of a node, up to 15,000. Reading one from the page cache and verifying it
costs a storage node as much as the rest of a read.
"""

ENTRY_BYTES = 512
"""What a kept payload takes beside its bytes: the head of its record, which lies before it, and the objects that hold
it.
"""

LoadCopy = Callable[[bytes], Awaitable[Copy | None]]
PeekCopy = Callable[[bytes], memoryview | None]


def _none(_data_id: bytes) -> None:
    """Nothing is in memory."""


class CopiesToldLately:
    """Payloads of small copies that were read and verified, by data id, those told last, in up to ``bytes_max`` for all
    disks of a node.

    A data id never has other bytes, so nothing here is ever stale. What becomes of a copy on its disk meanwhile, scrub
    finds.
    """

    def __init__(self, bytes_max: int) -> None:
        self._bytes_max = bytes_max
        self._bytes = 0
        self._kept: OrderedDict[bytes, memoryview] = OrderedDict()

    def get(self, data_id: bytes) -> memoryview | None:
        found = self._kept.get(data_id)
        if found is not None:
            self._kept.move_to_end(data_id)
        return found

    def keep(self, data_id: bytes, payload: memoryview) -> None:
        """Of a data id that ``get`` does not know."""
        self._kept[data_id] = payload
        self._bytes += len(payload) + ENTRY_BYTES
        while self._bytes > self._bytes_max:
            self._bytes -= len(self._kept.popitem(last=False)[1]) + ENTRY_BYTES

    def __len__(self) -> int:
        return len(self._kept)


class PlainCopies:
    """Implements ``ports.Copies`` over coroutines; ``meta`` is the replica's own store. ``told``: of all disks of the
    node.
    """

    def __init__(
        self,
        meta: MetaStore,
        store: StoreCopy,
        load: LoadCopy,
        peek: PeekCopy = _none,
        told: CopiesToldLately | None = None,
    ) -> None:
        self._told = told if told is not None else CopiesToldLately(0)
        self._meta = meta
        self._store = store
        self._load = load
        self._peek = peek
        self._tasks: set[asyncio.Task[None]] = set()

    async def load(self, data_id: bytes) -> Copy | None:
        return await self._load(data_id)

    def peek(self, data_id: bytes) -> memoryview | None:
        found = self._told.get(data_id)
        if found is None:
            found = self._peek(data_id)
            if found is not None:
                self._told.keep(data_id, found)
        return found

    def keep(self, header: bytes, body: Sequence[Buffer], batch: StoreBatch, done: Kept) -> None:
        task = asyncio.get_running_loop().create_task(self._keep(header, body, batch, done))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _keep(self, header: bytes, body: Sequence[Buffer], batch: StoreBatch, done: Kept) -> None:
        """Whatever happens, ``done`` is told: the register waits for it."""
        refusal: StoragedError | None = None
        failure: StoragedError | None = None
        try:
            try:
                await self._store(header, body)
            except StoragedError as error:
                refusal = error
            else:
                await self._meta.commit(batch)
        except StoragedError as error:
            failure = error
        except Exception as error:
            log.exception("keeping a small copy failed unexpectedly")
            failure = DiskUnusable(f"Keeping a small copy failed unexpectedly: {type(error).__name__}: {error}")
        done(refusal, failure)

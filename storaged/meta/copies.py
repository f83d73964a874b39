"""Small copies over any fragment store: one wait after the other, a task for each. A disk's own writer thread does better (``node.disks``)."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence

import structlog

from storaged.errors import DiskUnusable, StoragedError
from storaged.meta.ports import Copy, Kept, MetaStore, StoreBatch
from storaged.wire import Buffer

log = structlog.get_logger(__name__)

StoreCopy = Callable[[bytes, Sequence[Buffer]], Awaitable[None]]
"""``await store(header, payload)``: a fragment record, durable when it returns. Raises a StoragedError when the disk refused."""

LoadCopy = Callable[[bytes], Awaitable[Copy | None]]
PeekCopy = Callable[[bytes], memoryview | None]


def _none(_data_id: bytes) -> None:
    """Nothing is in memory."""


class PlainCopies:
    """Implements ``ports.Copies`` over coroutines; ``meta`` is the replica's own store."""

    def __init__(self, meta: MetaStore, store: StoreCopy, load: LoadCopy, peek: PeekCopy = _none) -> None:
        self._meta = meta
        self._store = store
        self._load = load
        self._peek = peek
        self._tasks: set[asyncio.Task[None]] = set()

    async def load(self, data_id: bytes) -> Copy | None:
        return await self._load(data_id)

    def peek(self, data_id: bytes) -> memoryview | None:
        return self._peek(data_id)

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

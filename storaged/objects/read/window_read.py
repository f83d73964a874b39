"""A window of a part while it is read: begun before its bytes are wanted, and opened when they are.

Theory of operation. A large GET reads the next window while it sends one. Where all disks of the window are on other
nodes, callbacks collect the cells, without a task (``window.WindowJob``). They are opened in ``finish``, just before
they are sent: what was opened long before has left the processor's cache by then. Whatever goes wrong is left to
``PartReader.read``, which asks again, finds out who lies, and raises. Where a disk is of this process, a task reads and
opens, since such a disk would answer within the call: before the window in front of it is sent.
"""

from __future__ import annotations

import asyncio
import contextlib

from storaged import trace
from storaged.errors import DataDamaged
from storaged.objects.background import cancel_all
from storaged.objects.cache.buffers import Lease
from storaged.objects.ports import SealBroken
from storaged.objects.read.part_reader import PartReader
from storaged.objects.read.window import NeedsTask, Window, WindowJob


class WindowRead:
    """Reads a window into a lease's memory. ``finish`` is awaited once; ``close`` ends it before that."""

    __slots__ = ("_error", "_fetched", "_job", "_lease", "_reader", "_task", "_waiter", "_window")

    def __init__(self, reader: PartReader, window: Window, lease: Lease) -> None:
        self._reader = reader
        self._window = window
        self._lease = lease
        self._task: asyncio.Task[None] | None = None
        self._fetched = False
        self._error: Exception | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._job: WindowJob | None = None
        with contextlib.suppress(DataDamaged):  # the task meets it again, and ``finish`` raises it
            self._job = reader.far_job(window)
        if self._job is None:
            self._begin_task()
        else:
            self._job.begin(self._on_fetched, has_task=False)

    def _begin_task(self) -> None:
        self._task = asyncio.create_task(self._reader.read(self._window, self._lease.view))

    def _on_fetched(self, error: Exception | None) -> None:
        self._fetched, self._error = True, error
        if isinstance(error, NeedsTask):  # now, not when its turn comes: that disk takes long
            self._begin_task()
        waiter = self._waiter
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    async def finish(self) -> None:
        """Returns when the window's plaintext is in the lease's memory, verified. Raises as ``PartReader.read``."""
        job = self._job
        if job is not None:
            if not self._fetched:
                self._waiter = asyncio.get_running_loop().create_future()
                with trace.span("fetch"):
                    await self._waiter
            self._job = None  # it holds the sealed cells
            if self._error is None:
                try:
                    with trace.span("open"):
                        self._reader.open_fetched(self._window, job, self._lease.view)
                    return
                except SealBroken:  # ``read`` finds out who lies
                    pass
        if self._task is not None:
            await self._task
        else:
            await self._reader.read(self._window, self._lease.view)

    async def close(self) -> None:
        """Ends it. Afterwards the lease's memory is not written any more. No-op after the end."""
        job, self._job = self._job, None
        if job is not None:
            job.abandon()
        if self._task is not None:
            await cancel_all([self._task])

"""The queue of batches that wait for one disk's redo log, and for LMDB where they have pages.

Theory of operation
    While one group is written the next collects, and a lone batch never waits. The event loop lays a group out and
    hands it to the kernel, which reports when it is durable (``storaged.aio``): a thread would have to get the
    interpreter twice for that, from a loop that has other work. Where the kernel can't, a writer thread does it. That
    thread also commits pages to LMDB, which has to sync them.

    Batches are applied in their order. Pages and rows are two queues; a batch with pages, and any that comes after it
    while that order matters, waits in the queue of pages and enters the log's when the pages are in LMDB.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import lmdb

from storaged.aio import DirectWriteRefused
from storaged.errors import SlowDown, StoragedError
from storaged.lmdb_file import lacks_space
from storaged.meta.storage.batch import PackedBatch, encode_group
from storaged.meta.storage.checkpoint import apply_pages
from storaged.meta.storage.state import StoreState
from storaged.meta.store_ports import StoreFull
from storaged.units import MIB

GROUP_OPERATIONS_MAX = 128
GROUP_BYTES_MAX = MIB
"""Larger groups only wait longer. A single batch may be larger."""

QUEUED_BATCHES_MAX = 4096

OnWritten = Callable[[Exception | None], None]


class WriteQueue:
    """The queue of one store. All but ``wake`` is called on the event loop."""

    def __init__(self, state: StoreState) -> None:
        self.queued = 0
        self.commits = self.operations = self.largest_group = 0
        self._state = state
        state.on_progress = self.wake
        self._arriving: list[PackedBatch] = []
        self._arriving_pages: list[PackedBatch] = []
        self._logging: list[PackedBatch] = []
        """The group on its way to the log."""
        self._paging: list[PackedBatch] = []
        """The group whose pages are on their way to LMDB."""
        self._rows_after_pages = 0
        """Batches in the queue of pages that change rows as well. What comes after these waits with them, since batches
        are applied in their order.
        """
        self._next_scheduled = False
        self._delivered_last = 0
        """Batches in the group that was delivered last."""
        self._token: object = None
        """Of the group on its way to the log, in the disk's health."""
        self._drained: asyncio.Future[None] | None = None
        self._room = asyncio.Semaphore(QUEUED_BATCHES_MAX)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._writer = _WriterThread(f"meta-writer {state.directory.name}", state, self._call_on_loop)

    async def commit(self, batch: PackedBatch, done: asyncio.Future[None]) -> None:
        """Waits for room, then until ``done``, which the batch's ``on_done`` settles."""
        async with self._room:
            self._enqueue(batch)
            await done

    def post(self, batch: PackedBatch) -> None:
        """Does not wait for room. Raises SlowDown beyond ``QUEUED_BATCHES_MAX``, DiskUnusable."""
        if self.queued >= QUEUED_BATCHES_MAX:
            raise SlowDown(f"{self.queued} batches wait for the metadata store in {self._state.directory}.")
        self._enqueue(batch)

    async def drain(self) -> None:
        """Returns when every batch in the queue has been delivered."""
        if self.queued:
            self._drained = asyncio.get_running_loop().create_future()
            await self._drained

    def stop(self) -> None:
        """Ends the writer thread; ``join`` waits for its end. The queue must be drained."""
        self._writer.stop()

    def join(self) -> None:
        self._writer.join()

    def wake(self) -> None:
        """A checkpoint has ended, or the store has failed: waiting batches go on. In any thread."""
        if self._loop is not None:
            self._call_on_loop(self._start_next)

    def _call_on_loop(self, callback: Callable[..., None], *arguments: Any) -> None:
        assert self._loop is not None
        with contextlib.suppress(RuntimeError):  # the loop is closed, and so no caller waits any more
            self._loop.call_soon_threadsafe(callback, *arguments)

    def _enqueue(self, batch: PackedBatch) -> None:
        """A lone batch is written now when the last group was one, too: then the next turn of the loop is unlikely to
        bring company.
        """
        self._state.refuse_when_unusable()
        loop = asyncio.get_running_loop()
        if loop is not self._loop:
            self._loop, self._next_scheduled = loop, False
        alone = not self.queued and self._delivered_last == 1
        self.queued += 1
        after_pages = (self._paging or self._arriving_pages) and (self._rows_after_pages or not batch.operations)
        if batch.pages or batch.stale_pages or after_pages:
            self._arriving_pages.append(batch)
            self._rows_after_pages += batch.changes_rows
        else:
            self._arriving.append(batch)
        if alone:
            self._start_next()
        else:
            self._schedule_next()

    def _schedule_next(self) -> None:
        """Starts with all that this turn of the loop brings: a group of only the first of a burst would make the others
        wait.
        """
        if not self._next_scheduled:
            self._next_scheduled = True
            assert self._loop is not None
            self._loop.call_soon(self._start_next)

    def _start_next(self) -> None:
        """Starts the next group of each kind, unless one is being written."""
        self._next_scheduled = False
        if self._state.reason:
            left = self._arriving_pages + self._arriving if not self._paging else self._arriving
            self._arriving_pages, self._arriving = self._arriving_pages if self._paging else [], []
            self._deliver(left)
            return
        if self._state.starved and self._arriving:
            left, self._arriving = self._arriving, []
            self._deliver(left, self._state.no_room())
        if self._arriving_pages and not self._paging:
            self._paging, self._arriving_pages = self._arriving_pages, []
            self._writer.call(partial(self._commit_pages, self._paging), self._on_pages_written)
        if self._arriving and not self._logging:
            self._log_group(self._next_group())

    def _next_group(self) -> list[PackedBatch]:
        operations = size = count = 0
        for batch in self._arriving:
            operations += batch.operations
            size += batch.size
            if count and (operations > GROUP_OPERATIONS_MAX or size > GROUP_BYTES_MAX):
                break
            count += 1
        group, self._arriving = self._arriving[:count], self._arriving[count:]
        return group

    def _log_group(self, group: list[PackedBatch]) -> None:
        self._logging = group
        self._token = self._state.health.begin("a write to the redo log")
        try:
            self._write_group(group)
        except Exception as error:  # a bug, too, must leave no caller waiting for ever
            self._on_logged(0, error)

    def _write_group(self, group: list[PackedBatch]) -> None:
        state = self._state
        body = encode_group([batch for batch in group if batch.rows or batch.others])
        if len(body) == 1:  # no batch changes anything
            self._on_logged(0, None)
            return
        with state.changed:
            room = state.redo.fits(len(body)) or state.redo.try_switch_half()
            if not room:
                state.log_full = True
                state.changed.notify_all()
        if not room:  # a checkpoint makes some
            state.health.end(self._token)
            self._logging, self._arriving = [], group + self._arriving
            return
        assert self._loop is not None
        if not state.redo.try_write(self._loop, body, partial(self._on_kernel_done, body)):
            self._write_in_thread(body)

    def _on_kernel_done(self, body: bytes, error: OSError | None) -> None:
        if isinstance(error, DirectWriteRefused):
            self._write_in_thread(body)
        else:
            self._on_logged(len(body), error)

    def _write_in_thread(self, body: bytes) -> None:
        self._writer.call(partial(self._state.redo.write, body), partial(self._on_logged, len(body)))

    def _on_logged(self, body_bytes: int, error: Exception | None) -> None:
        """The group is durable, or how much of it the disk has is unknown (``error``)."""
        self._state.health.end(self._token)
        if error is None and not self._state.reason and body_bytes:
            try:
                self._show(self._logging, body_bytes)
            except Exception as mistake:
                error = mistake
        if error is not None and not self._state.reason:  # noting it writes to that disk: the loop does not wait for it
            self._writer.call(partial(self._state.fail, error), partial(self._on_logged, 0))
            return
        group, self._logging = self._logging, []
        self._deliver(group)
        if self._arriving or self._arriving_pages:
            self._schedule_next()

    def _show(self, group: list[PackedBatch], body_bytes: int) -> None:
        """Makes a group readable. Its copies come first: a reader of a row asks for its copy, and a checkpoint that
        takes a row from the log has synced its copy before.
        """
        copies = [batch.copy_write for batch in group if batch.copy_write is not None]
        if copies:
            self._state.hooks.keep_copies(copies)
        self._state.show(group, body_bytes)
        self.commits += 1
        self._count(group)

    def _count(self, group: Sequence[PackedBatch]) -> None:
        operations = sum([batch.operations for batch in group])
        self.operations += operations
        self.largest_group = max(self.largest_group, operations)

    def _on_pages_written(self, error: Exception | None) -> None:
        """Pages are in LMDB. The rows that came with them, and batches that wait for all before them, go to the log
        now.
        """
        group, self._paging = self._paging, []
        refusal = error if isinstance(error, StoreFull) else None
        if refusal is not None:
            self._rows_after_pages -= sum([batch.changes_rows for batch in group])
        if error is None:
            left = [batch for batch in group if batch.changes_rows or not batch.operations]
            self._rows_after_pages -= sum([batch.changes_rows for batch in left])
            self._arriving.extend(left)
            group = [batch for batch in group if batch.operations and not batch.changes_rows]
            self._count(group)
        self._deliver(group, refusal)
        if self._arriving or self._arriving_pages:
            self._schedule_next()

    def _commit_pages(self, group: Sequence[PackedBatch]) -> None:
        """In the writer thread. Raises lmdb.Error, and StoreFull where there is no room: then nothing was written."""
        state = self._state
        try:
            with state.lmdb_lock, state.environment.begin(write=True, db=state.databases[b"pages"]) as transaction:
                apply_pages(transaction, group)
        except lmdb.Error as error:
            if not lacks_space(state.directory, error):
                raise
            raise StoreFull(f"the metadata store in {state.directory} has no room for pages: {error}") from None

    def _deliver(self, group: Sequence[PackedBatch], refusal: StoreFull | None = None) -> None:
        """``refusal``: the batches were not begun. A store that has failed reports failure for every batch that it
        still has, also for those just written: a disk in that state is not to be relied on.
        """
        self.queued -= len(group)
        self._delivered_last = len(group)
        error: StoragedError | None = self._state.failure() if self._state.reason else refusal
        for batch in group:
            try:
                batch.on_done(error)
            except Exception as mistake:  # the other batches of the group still get their result
                asyncio.get_running_loop().call_exception_handler(
                    {"message": "the callback of a commit failed", "exception": mistake}
                )
        if self._drained is not None and not self.queued and not self._drained.done():
            self._drained.set_result(None)


class _WriterThread:
    """Runs jobs one after the other. A job that raises is the store's failure (``fail``, called in this thread)."""

    def __init__(self, name: str, state: StoreState, call_on_loop: Callable[..., None]) -> None:
        self._state = state
        self._call_on_loop = call_on_loop
        self._jobs: queue.SimpleQueue[tuple[Callable[[], None], OnWritten] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def call(self, work: Callable[[], None], on_written: OnWritten) -> None:
        """Runs ``work``, then calls ``on_written(error)`` on the loop."""
        self._jobs.put((work, on_written))

    def stop(self) -> None:
        self._jobs.put(None)

    def join(self) -> None:
        self._thread.join()

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            work, on_written = job
            failure: Exception | None = None
            token = self._state.health.begin("a write of the metadata store")
            try:
                work()
            except StoreFull as error:
                failure = error
            except Exception as error:
                self._state.fail(error)
                failure = error
            self._state.health.end(token)
            self._call_on_loop(on_written, failure)

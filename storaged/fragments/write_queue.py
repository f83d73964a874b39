"""The way from the event loop to a disk's writer thread and back.

The jobs of one turn of the loop are handed over together. Handed over one by one, the first would wake the thread,
which would ask for the interpreter and get it in the middle of the burst; jobs that belong in one group would be synced
in several. The answers of a group come back in one wake-up of the loop, or two when only some need a sync.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from storaged.disk_health import DiskHealth
from storaged.durable import RestartNeeded
from storaged.errors import DiskUnusable
from storaged.fragments.index_rows import Checkpoint
from storaged.fragments.write import Write

T = TypeVar("T")


@dataclass(slots=True)
class Job:
    """The writer thread appends ``write`` or makes ``call``; without both the job only waits for its group. ``sync``:
    the answer waits until the log is durable.
    """

    future: asyncio.Future[Any]
    write: Write | None = None
    call: Callable[[], Any] | None = None
    sync: bool = False
    finished: bool = False
    """The thread has finished with it, and the loop knows."""
    on_finished: asyncio.Future[None] | None = None
    """Done when the thread has finished with a job whose caller gave up after the thread had begun."""
    _token: list[None] = field(default_factory=lambda: [None])
    """Popped once: by the thread when it begins, or by a caller that gives up before that."""

    def claim(self) -> bool:
        """True for the first caller only."""
        try:
            self._token.pop()
        except IndexError:
            return False
        return True


@dataclass(frozen=True)
class Committed:
    """The commit of a checkpoint has ended."""

    checkpoint: Checkpoint
    error: BaseException | None


class Stop:
    """Ends the thread."""


class Drain:
    """Another thread waits until the copies that were deferred before are appended."""

    def __init__(self) -> None:
        self.event = threading.Event()
        self.error: RestartNeeded | None = None

    def end(self, error: RestartNeeded | None) -> None:
        self.error = error
        self.event.set()


Item = list[Job] | Committed | Drain | Stop


class WriteQueue:
    """Jobs on their way, and the bytes of their payloads, which are bounded."""

    def __init__(self, loop: asyncio.AbstractEventLoop, bytes_max: int, health: DiskHealth) -> None:
        self._loop = loop
        self._health = health
        self._bytes_max = bytes_max
        self._items: queue.SimpleQueue[Item] = queue.SimpleQueue()
        self._arriving: list[Job] = []
        self.queued_bytes = 0
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()

    # --- on the event loop ------------------------------------------------------------------------------------------

    async def write(self, write: Write, *, sync: bool) -> None:
        """Returns when the write is appended, or durable with ``sync``. Raises the error that the thread answers."""
        await self._submit(Job(self._loop.create_future(), write=write, sync=sync))

    async def call(self, call: Callable[[], T]) -> T:
        """Makes the call in the writer thread and syncs the log. Raises what the call raises."""
        result: T = await self._submit(Job(self._loop.create_future(), call=call, sync=True))
        return result

    async def barrier(self, *, sync: bool = False) -> None:
        """Returns when what was deferred or submitted before has had its turn; ``sync``: and the log is durable."""
        await self._submit(Job(self._loop.create_future(), sync=sync))

    async def _submit(self, job: Job) -> Any:
        """A caller that gives up gets its buffers back at once when the thread has not begun with the job, else when it
        has finished or the disk hangs; without buffers it does not wait. Raises DiskUnusable when the disk begins to
        hang, but for a write that the thread has begun with.
        """
        self._health.fail_when_hung(job.future, job.claim if job.write is not None else None)
        self._arriving.append(job)
        if len(self._arriving) == 1:
            self._loop.call_soon(self.hand_over)
        try:
            return await job.future
        except asyncio.CancelledError:
            if job.write is not None and job.future.cancelled() and not job.claim() and not job.finished:
                await self._finished(job)
            raise

    async def _finished(self, job: Job) -> None:
        """Returns when the thread has finished with the job, or the disk hangs: then a process that ends does not wait
        for it. Views keep the buffers from being used again while the thread still has them.
        """
        if self._health.hung:
            return
        job.on_finished = self._loop.create_future()
        self._health.fail_when_hung(job.on_finished)
        with contextlib.suppress(DiskUnusable):
            await job.on_finished

    def hand_over(self) -> None:
        """Gives what has arrived to the thread."""
        if self._arriving:
            jobs, self._arriving = self._arriving, []
            self._items.put(jobs)

    async def acquire(self, count: int) -> None:
        """Waits until the payload bytes on their way leave room for ``count`` more, first come, first served. One
        payload alone may exceed the bound.
        """
        if self._waiting or (self.queued_bytes and self.queued_bytes + count > self._bytes_max):
            turn: asyncio.Future[None] = self._loop.create_future()
            self._waiting.append((count, turn))
            try:
                await turn
            except asyncio.CancelledError:
                if turn.done() and not turn.cancelled():
                    self.release(count)
                raise
            return
        self.queued_bytes += count

    def release(self, count: int) -> None:
        self.queued_bytes -= count
        while self._waiting:
            need, turn = self._waiting[0]
            if not turn.done():
                if self.queued_bytes and self.queued_bytes + need > self._bytes_max:
                    return
                self.queued_bytes += need
                turn.set_result(None)
            self._waiting.popleft()

    def resolve(self, answers: list[tuple[Job, Any]]) -> None:
        """Gives callers their answers; an exception is raised there."""
        for job, answer in answers:
            # a caller that was cancelled in this very turn of the loop has not set ``on_finished`` yet
            job.finished = True
            if job.future.done():
                if job.on_finished is not None and not job.on_finished.done():
                    job.on_finished.set_result(None)
            elif isinstance(answer, BaseException):
                job.future.set_exception(answer)
            else:
                job.future.set_result(answer)

    # --- from any thread --------------------------------------------------------------------------------------------

    def wake(self) -> None:
        """Has the thread look at the deferred copies and its background work."""
        self._items.put([])

    def put(self, item: Item) -> None:
        self._items.put(item)

    def get(self, timeout_s: float | None) -> Item | None:
        """The next item, or None when there is none within the time; 0 does not wait, None waits for ever."""
        try:
            return self._items.get_nowait() if timeout_s == 0 else self._items.get(timeout=timeout_s)
        except queue.Empty:
            return None

    def post(self, function: Callable[[Any], None], argument: Any) -> None:
        """Calls the function on the event loop; no-op once the loop is closed, for then no caller waits any more."""
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(function, argument)

"""Work that no caller waits for, and what the object plane counts."""

from __future__ import annotations

import asyncio
import contextlib
import weakref
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any


@dataclass
class Counters:
    """Events since the process started; ``ObjectService.statistics`` returns a copy."""

    puts_inline: int = 0
    puts_small: int = 0
    puts_coded: int = 0
    gets: int = 0
    bytes_in: int = 0
    bytes_out: int = 0
    writes_failed: int = 0
    writes_late: int = 0
    blocks_fallback: int = 0
    blocks_rebuilt_at_barrier: int = 0
    reads_hedged: int = 0
    cells_reconstructed: int = 0
    cells_lied: int = 0
    background_dropped: int = 0
    uploads_unreadable: int = 0
    """Times that the row of an upload could not be used, and was skipped."""
    uploads_expired: int = 0
    lifecycle_rows: int = 0
    """Rows of the index that were written."""
    lifecycle_notes_lost: int = 0
    lifecycle_looks: int = 0
    lifecycle_expired: int = 0
    lifecycle_noncurrent: int = 0
    lifecycle_markers: int = 0
    inventory_reports: int = 0
    inventory_rows: int = 0


class Background:
    """Owns work that no caller waits for: retiring replaced data, cleaning up after failures. Work beyond the bound is
    dropped and counted; so only work that a sweep does as well belongs here.
    """

    def __init__(self, tasks_max: int, counters: Counters) -> None:
        self._tasks: set[asyncio.Task[None]] = set()
        self._tasks_max = tasks_max
        self._counters = counters
        self._closed = False

    def spawn(self, work: Coroutine[Any, Any, None]) -> bool:
        """False: it was dropped."""
        if self._closed or len(self._tasks) >= self._tasks_max:
            self.drop()
            work.close()
            return False
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return True

    def drop(self) -> None:
        """Counts work that was dropped."""
        self._counters.background_dropped += 1

    async def settle(self) -> None:
        """Returns when everything spawned so far has ended."""
        while self._tasks:
            await asyncio.wait(set(self._tasks))

    async def close(self, timeout_s: float = 5.0) -> None:
        self._closed = True
        if self._tasks:
            await asyncio.wait(set(self._tasks), timeout=timeout_s)
        await cancel_all(self._tasks)


def when_gone(thing: object, on_gone: Callable[[], None]) -> None:
    """Calls ``on_gone`` on this event loop soon after the last reference to ``thing`` is gone.

    The finalizer itself only schedules the call: it may run in any thread, or on the loop in the middle of a change to
    the same table that ``on_gone`` changes.
    """
    weakref.finalize(thing, _schedule, asyncio.get_running_loop(), on_gone).atexit = False


def _schedule(loop: asyncio.AbstractEventLoop, on_gone: Callable[[], None]) -> None:
    with contextlib.suppress(RuntimeError):  # the loop has ended, and its tables with it
        loop.call_soon_threadsafe(on_gone)


async def cancel_all(tasks: set[asyncio.Task[Any]] | list[asyncio.Task[Any]]) -> None:
    """Cancels the tasks and waits for them. Drops their results and exceptions."""
    pending = list(tasks)
    for task in pending:
        task.cancel()
    if pending:
        await asyncio.gather(*pending, return_exceptions=True)

"""The reads of one window that are under way together.

Theory of operation. The waiter is woken when there is something to decide: a read failed, all are done, none was done
for a while, or the oldest has taken as long as a read may. So a window whose disks all answer costs one wake-up and one
timer, however many fragments it has. The waiter gives up a read that takes too long; reads have no timers of their own.
A read's time runs from its beginning, whatever happens to other reads.

A read is a task (``begin``), or a call whose answer comes by a callback (``expect``, ``ended``), which costs no task.
Nothing ends such a call; its answer is not wanted any more when the reads are closed, or it was given up.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Coroutine
from typing import Any

from storaged.objects.background import cancel_all
from storaged.objects.hedge_delay import HedgeDelay


class Expected:
    """A read whose answer comes by a callback."""

    __slots__ = ()


class Reads:
    """Reads of fragments by position: coroutines that return whether every cell arrived. ``close`` ends the rest."""

    def __init__(self, hedge: HedgeDelay) -> None:
        self._loop = asyncio.get_running_loop()
        self._hedge = hedge
        self._pending: dict[asyncio.Task[bool] | Expected, tuple[float, int]] = {}
        self._given_up: list[asyncio.Task[bool]] = []
        self._error: BaseException | None = None
        self._failed = 0
        self._turn: asyncio.Future[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._patience_s = self._limit_s = math.inf
        self._heard_at = 0.0
        self.stalled = False
        """The last turn ended because no read was done for a while."""
        self.eager = False
        """More is read than needed: each read that is done may bring the last missing cell."""

    def __len__(self) -> int:
        return len(self._pending)

    def begin(self, position: int, reading: Coroutine[Any, Any, bool]) -> None:
        task = self._loop.create_task(reading)
        self._pending[task] = (self._loop.time(), position)
        task.add_done_callback(self._done)

    def expect(self, position: int) -> Expected:
        """A read is about to be asked for whose end will be reported."""
        expected = Expected()
        self._pending[expected] = (self._loop.time(), position)
        return expected

    def expects(self, expected: Expected) -> bool:
        """Whether its answer is still wanted."""
        return expected in self._pending

    def forget(self, expected: Expected) -> None:
        """It was not asked for."""
        self._pending.pop(expected, None)

    def ended(self, expected: Expected, whole: bool | Exception) -> None:
        """Whether every cell arrived; an exception is a mistake of ours, which the waiter gets."""
        asked = self._pending.pop(expected, None)
        if asked is not None:
            self._over(asked, whole)

    async def turn(self, limit_s: float, *, patience_s: float = math.inf) -> int:
        """Waits until a read failed, none is left, or one is done while ``eager``; until none was done for
        ``patience_s`` (``stalled``); or until the oldest has taken ``limit_s``, and must be given up. Returns how many
        failed. Raises what a read raised.
        """
        self.stalled = False
        if self._pending and not self._failed and self._error is None:
            self._turn = self._loop.create_future()
            self._patience_s, self._limit_s = patience_s, limit_s
            self._heard_at = self._loop.time()
            self._timer = self._loop.call_at(self._due(), self._look)
            try:
                await self._turn
            finally:
                self._turn = None
                self._timer.cancel()
        if self._error is not None:
            raise self._error
        failed, self._failed = self._failed, 0
        return failed

    def give_up(self, limit_s: float) -> list[int]:
        """Cancels reads that began at least ``limit_s`` ago. Returns their positions."""
        now = self._loop.time()
        late = [(task, position) for task, (began, position) in self._pending.items() if began + limit_s <= now]
        for task, _ in late:
            del self._pending[task]
            if isinstance(task, asyncio.Task):
                task.cancel()
                self._given_up.append(task)
        return [position for _, position in late]

    def overtaken(self) -> list[tuple[int, float]]:
        """The reads that are not needed any more, since others took their place: (position, seconds that it had), of
        those that had as long as a read is waited for.
        """
        now, hedge_s = self._loop.time(), self._hedge.seconds
        return [(position, now - began) for began, position in self._pending.values() if now - began >= hedge_s]

    async def close(self) -> None:
        left = [*[task for task in self._pending if isinstance(task, asyncio.Task)], *self._given_up]
        self._pending.clear()
        if left:
            await cancel_all(left)

    def _done(self, task: asyncio.Task[bool]) -> None:
        asked = self._pending.pop(task, None)
        if asked is not None:
            self._over(asked, False if task.cancelled() else task.exception() or task.result())

    def _over(self, asked: tuple[float, int], whole: bool | BaseException) -> None:
        self._heard_at = self._loop.time()
        if isinstance(whole, BaseException):
            self._error = whole
        elif not whole:
            self._failed += 1
        else:
            self._hedge.saw(self._heard_at - asked[0])
            if self._pending and not self.eager:
                return
        self._wake()

    def _due(self) -> float:
        """When the waiter must be woken if no further read is done."""
        return min(self._heard_at + self._patience_s, min(began for began, _ in self._pending.values()) + self._limit_s)

    def _look(self) -> None:
        if self._turn is None or self._turn.done():
            return
        now, due = self._loop.time(), self._due()
        if due > now:
            self._timer = self._loop.call_at(due, self._look)
        else:
            self.stalled = self._heard_at + self._patience_s <= now
            self._wake()

    def _wake(self) -> None:
        if self._turn is not None and not self._turn.done():
            self._turn.set_result(None)

"""The reads of one window that are under way together.

Theory of operation. Whoever waits for them is woken when there is something to decide: one failed, all have come, none
came for a while, or the oldest has taken
as long as any may. So a window whose disks all answer costs one wake-up and one timer, however many fragments it has. A
read that takes too long is given up by the
waiter, not by a timer of its own; its time runs from when it was begun, whatever comes meanwhile.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Coroutine
from typing import Any

from storaged.objects.background import cancel_all


class HedgeDelay:
    """How long a read may take before others are asked: about the 95th percentile of recent reads, never below the
    floor.

    Moves up by 19 steps for a read that took longer and down by one for each that did not, which settles where one in
    twenty is longer
    (stochastic quantile estimation, Robbins and Monro 1951).
    """

    STEP = 0.01

    def __init__(self, floor_s: float) -> None:
        self._floor_s = floor_s
        self.seconds = floor_s

    def saw(self, seconds: float) -> None:
        scale = self.seconds * self.STEP
        self.seconds = max(self._floor_s, self.seconds + (19 * scale if seconds > self.seconds else -scale))


class Reads:
    """Reads of ``position``s: coroutines that return whether all came whole. ``close`` ends those that are left."""

    def __init__(self, hedge: HedgeDelay) -> None:
        self._loop = asyncio.get_running_loop()
        self._hedge = hedge
        self._pending: dict[asyncio.Task[bool], tuple[float, int]] = {}
        self._given_up: list[asyncio.Task[bool]] = []
        self._error: BaseException | None = None
        self._failed = 0
        self._turn: asyncio.Future[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._patience_s = self._limit_s = math.inf
        self._heard_at = 0.0
        self.stalled = False
        """The last turn ended because none came."""
        self.eager = False
        """More is read than is needed: every read that comes may be the last one that was missing."""

    def __len__(self) -> int:
        return len(self._pending)

    def begin(self, position: int, reading: Coroutine[Any, Any, bool]) -> None:
        task = self._loop.create_task(reading)
        self._pending[task] = (self._loop.time(), position)
        task.add_done_callback(self._done)

    async def turn(self, limit_s: float, *, patience_s: float = math.inf) -> int:
        """Waits until a read failed, none is left, or (when ``eager``) one came; until none came for ``patience_s``
        (``stalled``); or until the oldest has taken
        ``limit_s``, and is to be given up. Returns how many failed. Raises what a read raised."""
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
        """Ends reads that began longer ago; their positions."""
        now = self._loop.time()
        late = [(task, position) for task, (began, position) in self._pending.items() if began + limit_s <= now]
        for task, _ in late:
            del self._pending[task]
            task.cancel()
            self._given_up.append(task)
        return [position for _, position in late]

    async def close(self) -> None:
        left = [*self._pending, *self._given_up]
        self._pending.clear()
        if left:
            await cancel_all(left)

    def _done(self, task: asyncio.Task[bool]) -> None:
        asked = self._pending.pop(task, None)
        if asked is None:
            return
        self._heard_at = self._loop.time()
        if not task.cancelled() and task.exception() is not None:
            self._error = task.exception()
        elif task.cancelled() or not task.result():
            self._failed += 1
        else:
            self._hedge.saw(self._heard_at - asked[0])
            if self._pending and not self.eager:
                return
        self._wake()

    def _due(self) -> float:
        """When there is something to decide if no more comes."""
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

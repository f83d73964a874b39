"""The reads of one window that are under way together.

Theory of operation. ``watch`` names a function that is called when there is something to decide: a read failed, all
are done, none was done for a while, or the oldest has taken as long as a read may. So a window whose disks all answer
costs one call and one entry in a list of deadlines, however many fragments it has. The one who decides gives up a read
that takes too long; reads have no deadlines of their own. A read's time runs from its beginning, whatever happens to
other reads.

A read is a task (``begin``), or a call whose answer comes by a callback (``expect``, ``ended``), which costs no task.
Nothing ends such a call. When the reads are closed, or it was given up, its answer is ignored, and the call does not
refer to the reader any more. Otherwise the calls to a disk that hangs would keep the cells of all these windows in
memory until they time out.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any

from storaged.deadlines import Deadlines
from storaged.errors import PeerError
from storaged.fragments.ports import CellRead
from storaged.objects.background import cancel_all
from storaged.objects.hedge_delay import HedgeDelay


class Expected:
    """A read that is under way. ``began_s``: in the loop's seconds."""

    __slots__ = ("_on_found", "began_s", "position", "task")

    def __init__(self, position: int, began_s: float, on_found: OnFound | None) -> None:
        self.position = position
        self.began_s = began_s
        self.task: asyncio.Task[bool] | None = None
        self._on_found = on_found

    def answer(self, found: CellRead | PeerError | None) -> None:
        """Passes on what a call found. No-op after ``ignore``."""
        on_found, self._on_found = self._on_found, None
        if on_found is not None:
            on_found(self, found)

    def ignore(self) -> None:
        """Its answer is not wanted any more."""
        self._on_found = None


OnFound = Callable[[Expected, CellRead | PeerError | None], None]
"""Gets the answer of a call, as ``fragments.read_batches.OnFound`` does."""


class Reads:
    """Reads of fragments by position: tasks that return whether every cell arrived, or calls. ``close`` ends the rest.
    A ``Waiting`` of the deadlines.
    """

    def __init__(self, hedge: HedgeDelay, deadlines: Deadlines) -> None:
        self._loop = asyncio.get_running_loop()
        self._hedge = hedge
        self._deadlines = deadlines
        self.pending: dict[Expected, None] = {}
        """In the order in which they began. Only this class changes it."""
        self._given_up: list[asyncio.Task[bool]] = []
        self._error: BaseException | None = None
        self._failed = 0
        self._on_turn: Callable[[], None] | None = None
        self._patience_s = self._limit_s = math.inf
        self._heard_at = 0.0
        self.stalled = False
        """The last turn came because no read was done for a while."""
        self.eager = False
        """More is read than needed: each read that is done may bring the last missing cell."""

    def __len__(self) -> int:
        return len(self.pending)

    def begin(self, position: int, reading: Coroutine[Any, Any, bool]) -> None:
        expected = self.expect(position)
        expected.task = self._loop.create_task(reading)
        expected.task.add_done_callback(lambda task: self._done(expected, task))

    def expect(self, position: int, on_found: OnFound | None = None) -> Expected:
        """A read is about to be asked for whose end will be reported. ``on_found`` gets what ``Expected.answer`` is
        called with, while that is wanted.
        """
        expected = Expected(position, self._loop.time(), on_found)
        self.pending[expected] = None
        return expected

    def forget(self, expected: Expected) -> None:
        """It was not asked for."""
        expected.ignore()
        self.pending.pop(expected, None)

    def ended(self, expected: Expected, whole: bool | BaseException) -> None:
        """Whether every cell arrived; an exception is a mistake of ours, which ``failures`` raises. No-op for a read
        that is not wanted any more.
        """
        pending = self.pending
        if expected not in pending:
            return
        del pending[expected]
        self._heard_at = self._loop.time()
        if whole is True:
            self._hedge.saw(self._heard_at - expected.began_s)
            if pending and not self.eager:
                return
        elif isinstance(whole, BaseException):
            self._error = whole
        else:
            self._failed += 1
        self._turn()

    def watch(self, on_turn: Callable[[], None], limit_s: float, patience_s: float) -> bool:
        """``on_turn`` is called once: when a read failed, none is left, or one is done while ``eager``; when none was
        done for ``patience_s`` (``stalled``); or when the oldest has taken ``limit_s``, and must be given up. False: a
        read failed already or none is left, and it is not called.
        """
        self.stalled = False
        if not self.pending or self._failed or self._error is not None:
            return False
        self._on_turn = on_turn
        self._patience_s, self._limit_s = patience_s, limit_s
        self._heard_at = self._loop.time()
        self._deadlines.begin(self, self._due() - self._heard_at)
        return True

    def failures(self) -> int:
        """How many reads failed since the last call. Raises what a read raised."""
        if self._error is not None:
            raise self._error
        failed, self._failed = self._failed, 0
        return failed

    async def turn(self, limit_s: float, *, patience_s: float = math.inf) -> int:
        """Waits until ``watch`` has something to decide; then as ``failures``."""
        turn: asyncio.Future[None] = self._loop.create_future()
        if self.watch(partial(_wake, turn), limit_s, patience_s):
            await turn
        return self.failures()

    def give_up(self, limit_s: float) -> list[int]:
        """Cancels reads that began at least ``limit_s`` ago. Returns their positions."""
        now = self._loop.time()
        first = next(iter(self.pending), None)
        if first is None or first.began_s + limit_s > now:
            return []
        late = [read for read in self.pending if read.began_s + limit_s <= now]
        for read in late:
            del self.pending[read]
            read.ignore()
            if read.task is not None:
                read.task.cancel()
                self._given_up.append(read.task)
        return [read.position for read in late]

    def overtaken(self) -> list[tuple[int, float]]:
        """The reads that are not needed any more, since others took their place: (position, seconds that it had), of
        those that had as long as a read is waited for.
        """
        now, hedge_s = self._loop.time(), self._hedge.seconds
        return [(read.position, now - read.began_s) for read in self.pending if now - read.began_s >= hedge_s]

    def abandon(self) -> list[asyncio.Task[bool]]:
        """No answer is wanted any more. Returns the tasks that are left."""
        left = [*[read.task for read in self.pending if read.task is not None], *self._given_up]
        self._on_turn = None
        self._deadlines.end(self)
        for read in self.pending:
            read.ignore()
        self.pending.clear()
        return left

    async def close(self) -> None:
        if left := self.abandon():
            await cancel_all(left)

    def on_time(self) -> None:
        """See ``Deadlines``."""
        now, due = self._loop.time(), self._due()
        if due > now:  # a read was done meanwhile
            self._deadlines.begin(self, due - now)
        else:
            self.stalled = self._heard_at + self._patience_s <= now
            self._turn()

    def _done(self, expected: Expected, task: asyncio.Task[bool]) -> None:
        if expected in self.pending:
            self.ended(expected, False if task.cancelled() else task.exception() or task.result())

    def _due(self) -> float:
        """When there is something to decide if no further read is done."""
        return min(self._heard_at + self._patience_s, next(iter(self.pending)).began_s + self._limit_s)

    def _turn(self) -> None:
        on_turn, self._on_turn = self._on_turn, None
        if on_turn is not None:
            self._deadlines.end(self)
            on_turn()


def _wake(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)

"""Deadlines of calls without tasks: one timer for all of them."""

from __future__ import annotations

import asyncio
from typing import Protocol

import structlog

log = structlog.get_logger(__name__)

FOREVER = float("inf")

LATE_S = 0.005
"""A timer that rings later than this shows that the process did not run: the machine is busy, or a turn was long."""
TURN_S = 0.001
"""Time for the event loop to read what has arrived."""


class Waiting(Protocol):
    def on_time(self) -> None:
        """Its time is over. It may ask for more with ``Deadlines.begin``."""


class Deadlines:
    """The deadlines of all that waits for replicas or disks, with one timer: it rings for the first of them, and most
    have ended by then.

    An event loop runs timers before it reads from sockets. So after a time in which this process did not run, all
    deadlines look missed, while the answers have arrived: they are read first.
    """

    def __init__(self) -> None:
        self._ends: dict[Waiting, float] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._rings_at = 0.0
        self._reading = False
        """The timer was late, and answers are being read."""

    def begin(self, waiting: Waiting, limit_s: float) -> None:
        """``waiting.on_time()`` is called after ``limit_s``, unless ``end`` was called before. Replaces an earlier
        limit."""
        loop = asyncio.get_running_loop()
        end = self._ends[waiting] = loop.time() + limit_s
        if (self._timer is None or end < self._rings_at) and end < FOREVER:
            self._ring_at(loop, end)

    def end(self, waiting: Waiting) -> None:
        """No-op if it does not wait."""
        self._ends.pop(waiting, None)

    def _ring_at(self, loop: asyncio.AbstractEventLoop, at: float) -> None:
        self.close()
        self._timer = loop.call_at(at, self._ring, loop)
        self._rings_at = at

    def _ring(self, loop: asyncio.AbstractEventLoop) -> None:
        self._timer = None
        now = loop.time()
        self._reading = now - self._rings_at > LATE_S and not self._reading
        if self._reading:
            self._ring_at(loop, now + TURN_S)
            return
        for waiting, end in list(self._ends.items()):
            if end <= now and self._ends.get(waiting) == end:  # else another one's ``on_time`` has ended it
                del self._ends[waiting]
                try:
                    waiting.on_time()
                except Exception:  # the other deadlines must ring all the same
                    log.exception("the end of a deadline failed")
        next_end = min(self._ends.values(), default=FOREVER)  # ``on_time`` may have added some
        if next_end < FOREVER:
            self._ring_at(loop, next_end)

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

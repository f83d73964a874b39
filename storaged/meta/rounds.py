"""What a proposer needs to talk to several replicas at once: answers in the order of arrival, turns at a register, who answered lately.

A round asks some replicas and goes on when enough have answered. The calls that are still out then are not abandoned: an accept is meant to reach every
replica. They belong to a ``TaskPool``, which bounds them and takes them down with the client.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable
from contextlib import asynccontextmanager
from typing import Any, Generic, TypeVar

from storaged.clock import Clock
from storaged.errors import PeerUnreachable, SlowDown, StoragedError
from storaged.meta.names import RegisterName
from storaged.meta.ports import Replica, Replicas

T = TypeVar("T")

CALLS_MAX = 16_384
"""Calls to replicas in flight from one client; beyond it the oldest are given up."""

TURNS_MAX = 1_024
"""Changes that wait for one register in one process; beyond it the client is told to slow down."""

SUSPECT_S = 5.0
"""For how long a replica that did not answer is asked last."""


class TaskPool:
    """Owns tasks. Insertion order is kept, so that whatever is done to all of them is done in the same order in every run."""

    def __init__(self, limit: int = CALLS_MAX) -> None:
        self._limit = limit
        self._tasks: dict[asyncio.Task[None], None] = {}

    def __len__(self) -> int:
        return len(self._tasks)

    def start(self, work: Coroutine[Any, Any, None]) -> None:
        if len(self._tasks) >= self._limit:
            next(iter(self._tasks)).cancel()
        task = asyncio.get_running_loop().create_task(work)
        self._tasks[task] = None
        task.add_done_callback(self._forget)

    def _forget(self, task: asyncio.Task[None]) -> None:
        self._tasks.pop(task, None)

    async def close(self) -> None:
        while self._tasks:
            tasks = tuple(self._tasks)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


class Suspects:
    """Replicas that did not answer lately: a hint for the order of asking."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._until: dict[str, float] = {}

    def add(self, disk: str) -> None:
        self._until[disk] = self._clock.monotonic() + SUSPECT_S

    def last(self, disks: Iterable[str]) -> list[str]:
        """``disks`` in their order, suspects behind the others."""
        if not self._until:
            return list(disks)
        now = self._clock.monotonic()
        self._until = {disk: until for disk, until in self._until.items() if until > now}
        return sorted(disks, key=self._until.__contains__)


class Answers(Generic[T]):
    """The answers to one round, or the errors in their place, as they arrive."""

    def __init__(self, replicas: Replicas, pool: TaskPool, suspects: Suspects) -> None:
        self._replicas = replicas
        self._pool = pool
        self._suspects = suspects
        self._inbox: deque[tuple[str, T | StoragedError]] = deque()
        self._waiter: asyncio.Future[None] | None = None
        self.pending = 0
        """Calls whose answer was not yet taken."""

    def ask(self, disk: str, call: Callable[[Replica], Awaitable[T]]) -> None:
        self.pending += 1
        self._pool.start(self._run(disk, call))

    async def _run(self, disk: str, call: Callable[[Replica], Awaitable[T]]) -> None:
        answer: T | StoragedError | None = None
        try:
            answer = await call(self._replicas.replica(disk))
        except PeerUnreachable as error:
            self._suspects.add(disk)
            answer = error
        except StoragedError as error:
            answer = error
        finally:
            self._inbox.append((disk, answer if answer is not None else PeerUnreachable(f"The call to disk {disk} was given up.")))
            if self._waiter is not None and not self._waiter.done():
                self._waiter.set_result(None)

    async def next(self, timeout_s: float) -> tuple[str, T | StoragedError] | None:
        """The next answer; None when none came in time or none is to come."""
        if not self._inbox and self.pending and timeout_s > 0:
            loop = asyncio.get_running_loop()
            waiter = self._waiter = loop.create_future()
            timer = loop.call_later(timeout_s, _wake, waiter)
            try:
                await waiter
            finally:
                timer.cancel()
                self._waiter = None
        if not self._inbox:
            return None
        self.pending -= 1
        return self._inbox.popleft()


def _wake(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)


class Turns:
    """Changes of one register in one process run one after the other, first come first served: a process never pre-empts itself."""

    def __init__(self, waiting_max: int = TURNS_MAX) -> None:
        self._waiting_max = waiting_max
        self._turns: dict[RegisterName, tuple[asyncio.Lock, list[int]]] = {}

    @asynccontextmanager
    async def turn(self, name: RegisterName, timeout_s: float) -> AsyncIterator[None]:
        """Raises SlowDown when too many wait for this register, or the turn did not come in time."""
        lock, users = self._turns.get(name) or self._turns.setdefault(name, (asyncio.Lock(), [0]))
        if users[0] >= self._waiting_max:
            raise SlowDown(f"{users[0]} changes of this key are waiting. Please reduce your request rate.")
        users[0] += 1
        try:
            try:
                if lock.locked():
                    async with asyncio.timeout(timeout_s):
                        await lock.acquire()
                else:
                    await lock.acquire()
            except TimeoutError:
                raise SlowDown("Other changes of this key took too long. Please reduce your request rate.") from None
            try:
                yield
            finally:
                lock.release()
        finally:
            users[0] -= 1
            if users[0] == 0:
                del self._turns[name]

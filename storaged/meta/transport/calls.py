"""Calls to several replicas at once: tasks, answers in the order of arrival, requests that are encoded once.

A round asks some replicas and goes on when enough have answered. The calls that are still out then are not abandoned:
an accept is meant to reach every replica. They belong to a ``TaskPool``, which bounds them and ends them with the
client.
"""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from functools import partial
from itertools import chain, repeat
from typing import Any, Generic, TypeVar

import msgspec

from storaged.cluster.disks_seen import DisksSeen
from storaged.cluster.ports import OnReply
from storaged.errors import PeerUnreachable, StoragedError
from storaged.meta.consensus.quorums import Quorum, met_by_all
from storaged.meta.messages import Accept, Create, Prepare, Read, ScanRequest
from storaged.meta.ports import OnAnswer, Replica, Replicas
from storaged.wire import Buffer, encode

T = TypeVar("T")
Request = Prepare | Accept | Read | ScanRequest
NO_BYTES = memoryview(b"")
NO_FRAGMENT: tuple[bytes, Sequence[Buffer]] = (b"", ())

CALLS_MAX = 16_384
"""Calls to replicas in flight from one client; beyond it the oldest are cancelled."""


# ``Fanout`` puts requests together from encoded pieces.
assert Prepare.__struct_fields__[0] == Accept.__struct_fields__[0] == "disk"
assert Accept.__struct_fields__[-2:] == Create.__struct_fields__[-2:] == ("header", "check")


class TaskPool:
    """Owns tasks, in the order in which they began: so what is done to all of them has the same order in every run."""

    def __init__(self, limit: int = CALLS_MAX) -> None:
        self._limit = limit
        self._tasks: dict[asyncio.Task[None], None] = {}

    def __len__(self) -> int:
        return len(self._tasks)

    def start(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        if len(self._tasks) >= self._limit:
            next(iter(self._tasks)).cancel()
        task = asyncio.get_running_loop().create_task(work)
        self._tasks[task] = None
        task.add_done_callback(self._forget)
        return task

    def _forget(self, task: asyncio.Task[None]) -> None:
        self._tasks.pop(task, None)

    async def close(self) -> None:
        while self._tasks:
            tasks = tuple(self._tasks)
            await asyncio.sleep(0)  # a task that has not begun would end without calling the callback that waits for it
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


class Answers(Generic[T]):
    """The answers to one round, or the errors in their place, as they arrive."""

    def __init__(self, replicas: Replicas, pool: TaskPool, unresponsive: DisksSeen) -> None:
        self._replicas = replicas
        self._pool = pool
        self._unresponsive = unresponsive
        self._inbox: deque[tuple[str, T | StoragedError]] = deque()
        self._waiter: asyncio.Future[None] | None = None
        self.pending = 0
        """Calls whose answer was not yet taken."""

    def ask(self, disk: str, call: Callable[[Replica], Awaitable[T]]) -> None:
        self.pending += 1
        self._pool.start(self._run(disk, call))

    def ask_read(self, request: Read, *, timeout_s: float) -> None:
        """As ``ask``, of a request that may need no task. The answer is (reply, payload)."""
        self.pending += 1
        on_reply = partial(self._on_reply, request.disk)
        try:
            replica = self._replicas.replica(request.disk)
        except StoragedError as error:
            on_reply(error, NO_BYTES)
            return
        work = ask_one(replica, request, on_reply, (), timeout_s)
        if work is not None:
            self._pool.start(work)

    def _on_reply(self, disk: str, answer: Any, payload: memoryview) -> None:
        self._arrived(disk, answer if isinstance(answer, StoragedError) else (answer, payload))

    async def _run(self, disk: str, call: Callable[[Replica], Awaitable[T]]) -> None:
        answer: T | StoragedError | None = None
        try:
            answer = await call(self._replicas.replica(disk))
        except StoragedError as error:
            answer = error
        finally:
            cancelled = PeerUnreachable(f"The call to disk {disk} was given up.")
            self._arrived(disk, answer if answer is not None else cancelled)

    def _arrived(self, disk: str, answer: Any) -> None:
        if isinstance(answer, StoragedError):
            self._unresponsive.saw(disk, answer)
        self._inbox.append((disk, answer))
        if self._waiter is not None:
            _wake(self._waiter)

    async def next(self, timeout_s: float) -> tuple[str, T | StoragedError] | None:
        """The next answer; None when none came in time, or none is to come."""
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


class Calls:
    """Calls of one client to several replicas, with their deadlines."""

    def __init__(
        self,
        replicas: Replicas,
        pool: TaskPool,
        unresponsive: DisksSeen,
        deadline_s: float,
        call_timeout_s: float,
        hedge_s: float,
    ) -> None:
        self.replicas = replicas
        self.unresponsive = unresponsive
        self.clock = unresponsive.clock
        self.deadline_s = deadline_s
        self.call_timeout_s = call_timeout_s
        self.hedge_s = hedge_s
        self._pool = pool

    def deadline(self) -> float:
        """The deadline of a change or read that begins now."""
        return self.clock.monotonic() + self.deadline_s

    def remaining_s(self, deadline: float) -> float:
        return deadline - self.clock.monotonic()

    def timeout_s(self, deadline: float) -> float:
        """The timeout of one call: ``call_timeout_s``, or less before the deadline."""
        return max(0.001, min(self.call_timeout_s, deadline - self.clock.monotonic()))

    def answers(self) -> Answers[Any]:
        return Answers(self.replicas, self._pool, self.unresponsive)

    async def gather(
        self,
        quorums: Sequence[Quorum],
        call: Callable[[str, float], Callable[[Replica], Awaitable[T]]],
        good: Callable[[T], bool],
        deadline: float,
        *,
        linger: bool = False,
        patience_s: float = math.inf,
    ) -> set[str]:
        """Calls every disk of the quorums once. The disks that gave good answers: until every quorum is met, or with
        ``linger`` until all disks have answered, though no longer than ``patience_s`` after that.
        """
        answers: Answers[T] = self.answers()
        for disk in dict.fromkeys(disk for quorum in quorums for disk in quorum.disks):
            answers.ask(disk, call(disk, self.timeout_s(deadline)))
        done: set[str] = set()
        met = met_by_all(quorums, done)
        while linger or not met:
            answer = await answers.next(self.remaining_s(deadline))
            if answer is None:
                break
            disk, reply = answer
            if not isinstance(reply, StoragedError) and good(reply):
                done.add(disk)
                if not met and met_by_all(quorums, done):
                    met, deadline = True, min(deadline, self.clock.monotonic() + patience_s)
        return done


class Fanout:
    """Sends one request to several replicas, encoded once for those of other nodes, and gives their answers to a
    callback.
    """

    def __init__(self, replicas: Replicas, pool: TaskPool) -> None:
        self._replicas = replicas
        self._pool = pool

    def send(
        self,
        request: Prepare | Accept,
        disks: Sequence[str],
        on_answer: OnAnswer,
        *,
        timeout_s: float,
        fragments: Sequence[tuple[bytes, Sequence[Buffer]]] = (),
    ) -> None:
        """``request`` names no disk. ``on_answer(disk, answer, bulk)`` is called once for each disk, perhaps before
        this returns. ``fragments``: an accept's (header, body) for each disk, by its index.
        """
        kind, replica_of = type(request), self._replicas.replica
        first = tail = stem = check = b""
        for disk, (header, body) in zip(disks, chain(fragments, repeat(NO_FRAGMENT)), strict=False):
            try:
                replica: Any = replica_of(disk)
            except StoragedError as error:
                on_answer(disk, error, NO_BYTES)
                continue
            try_shared = getattr(replica, "try_call_shared", None)
            if try_shared is not None and try_shared(request, header, body, on_answer):
                continue
            on_reply = partial(on_answer, disk)
            try_encoded = getattr(replica, "try_call_encoded", None)
            if try_encoded is not None:
                if not first:
                    encoded = encode(request)
                    first, tail = encoded[:1], encoded[2:]  # the array's head, then the disk: an empty string here
                    check = encode(request.check) if isinstance(request, Accept) else b""
                    stem = tail[: -2 - len(check)]  # before an accept's check lies its header, empty here
                rest = stem + encode(header) + check if header else tail
                if try_encoded(kind, first, rest, on_reply, body, timeout_s):
                    continue
            changes = {"disk": disk, "header": header} if header else {"disk": disk}
            asked = msgspec.structs.replace(request, **changes)
            self._pool.start(_call(replica, asked, on_reply, body, timeout_s))

    def read(self, request: Read, disks: Sequence[str], on_answer: OnAnswer, *, timeout_s: float) -> None:
        """As ``send``, for a read."""
        for disk in disks:
            try:
                replica = self._replicas.replica(disk)
            except StoragedError as error:
                on_answer(disk, error, NO_BYTES)
                continue
            asked = msgspec.structs.replace(request, disk=disk)
            work = ask_one(replica, asked, partial(on_answer, disk), (), timeout_s)
            if work is not None:
                self._pool.start(work)


def ask_one(
    replica: Replica, request: Request, on_reply: OnReply, body: Sequence[Buffer], timeout_s: float
) -> Coroutine[Any, Any, None] | None:
    """Asks without a task where the replica can be asked so, and returns None; else the work that asks, for a task.
    ``on_reply`` is called once in either case.
    """
    try_call = getattr(replica, "try_call", None)
    if try_call is not None and try_call(request, on_reply, body=body, timeout_s=timeout_s):
        return None
    return _call(replica, request, on_reply, body, timeout_s)


async def _call(
    replica: Replica, request: Request, on_reply: OnReply, body: Sequence[Buffer], timeout_s: float
) -> None:
    answer: Any = PeerUnreachable(f"The call to disk {request.disk} was given up.")
    bulk = NO_BYTES
    try:
        if isinstance(request, Read):
            answer, bulk = await replica.read(request, timeout_s=timeout_s)
        elif isinstance(request, Accept):
            answer = await replica.accept(request, body, timeout_s=timeout_s)
        elif isinstance(request, Prepare):
            answer = await replica.prepare(request, timeout_s=timeout_s)
        else:
            answer = await replica.scan(request, timeout_s=timeout_s)
    except StoragedError as error:
        answer = error
    finally:
        on_reply(answer, bulk)


def _wake(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)

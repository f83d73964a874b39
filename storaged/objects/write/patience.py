"""How long a write waits for the last disks: until it is safe without them, and a little longer.

Theory of operation. Fragments go to all disks of a block at the same time. Most answer within a moment of each other.
One that hangs would hold up the request until the call's limit is over, and so would every request while it hangs. So
the others decide. When their fragments are safe without the rest, the rest gets ``late_grace_s``, or as long again as
the others took if that is more: when all disks are slow, none is given up. The rest gets twice as long when the write
is not safe yet but the caller can make it safe by placing blocks anew. A call that is given up is cancelled, but not
waited for: a thread that waits for a disk can't be interrupted. It may still write its fragment, which harms nothing.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Sequence
from functools import partial
from typing import Any, Generic, TypeVar

from storaged.errors import PeerError
from storaged.fragments.ports import FragmentHeader, TryWrite
from storaged.objects.background import cancel_all
from storaged.objects.plane import ObjectPlane
from storaged.wire import Buffer

K = TypeVar("K")

OnResult = Callable[[bool | BaseException], None]
"""Gets the result of a call, or what it raised, once."""

GiveUp = Callable[[], object]
"""Ends a call: its ``OnResult`` is not called any more. It does not wait."""


async def until_safe(
    plane: ObjectPlane,
    keys: Iterable[K],
    begin: Callable[[K, OnResult], GiveUp],
    on_done: Callable[[K, bool], None],
    safe: Callable[[], bool],
    curable: Callable[[int], bool],
    limit_s: float,
) -> dict[K, float]:
    """Begins a call for each key, all at the same time, and waits for ``limit_s`` at most. ``on_done(key, result)`` is
    called for each that ends; ``safe()`` then says whether the others are not needed, and ``curable(count)`` whether
    the caller can do without ``count`` of them. Returns those that were given up, each with the seconds that it had.
    Raises what a call raises.
    """
    grace_s = plane.limits.late_grace_s
    calls = _Calls(keys)
    try:
        calls.begin(begin)
        await calls.wait(min(grace_s, limit_s))
        while True:
            for key, result in calls.take_ended():
                if isinstance(result, BaseException):
                    raise result
                on_done(key, result)
            if not calls.pending:
                break
            due, grace = calls.began_s + limit_s, max(grace_s, calls.heard_s - calls.began_s)
            if safe():
                due = min(due, calls.heard_s + grace)
            elif curable(len(calls.pending)):
                due = min(due, calls.heard_s + 2 * grace)
            left_s = due - calls.now_s()
            if left_s <= 0:
                break
            await calls.wait(left_s, each=True)
    finally:
        calls.give_up()
    return dict.fromkeys(calls.pending, calls.now_s() - calls.began_s)


class _Calls(Generic[K]):
    """Calls that are under way together, by key. Times are in the loop's seconds. ``heard_s``: when one ended last."""

    def __init__(self, keys: Iterable[K]) -> None:
        self._loop = asyncio.get_running_loop()
        self.began_s = self.heard_s = self.now_s()
        self.pending: dict[K, GiveUp | None] = dict.fromkeys(keys)
        self._ended: list[tuple[K, bool | BaseException]] = []
        self._turn: asyncio.Future[None] | None = None
        self._each = False

    def now_s(self) -> float:
        return self._loop.time()

    def begin(self, begin: Callable[[K, OnResult], GiveUp]) -> None:
        for key in list(self.pending):
            give_up = begin(key, partial(self._hear, key))
            if key in self.pending:
                self.pending[key] = give_up

    async def wait(self, limit_s: float, *, each: bool = False) -> None:
        """Until all have ended, or one of them has (``each``), for ``limit_s`` at most. Returns at once when there are
        ended ones that were not taken.
        """
        if self._ended or not self.pending:
            return
        self._each = each
        turn = self._turn = self._loop.create_future()
        timer = self._loop.call_later(limit_s, _wake, turn)
        try:
            await turn
        finally:
            timer.cancel()
            self._turn = None

    def take_ended(self) -> list[tuple[K, bool | BaseException]]:
        ended, self._ended = self._ended, []
        return ended

    def give_up(self) -> None:
        """Those that are pending."""
        for give_up in self.pending.values():
            if give_up is not None:
                give_up()

    def _hear(self, key: K, result: bool | BaseException) -> None:
        self.heard_s = self.now_s()
        del self.pending[key]
        self._ended.append((key, result))
        if self._turn is not None and (self._each or not self.pending):
            _wake(self._turn)


def _wake(turn: asyncio.Future[None]) -> None:
    if not turn.done():
        turn.set_result(None)


def begin_write(
    plane: ObjectPlane,
    disk: str,
    header: FragmentHeader,
    payload: Sequence[Buffer],
    sync: bool,
    check: bytes,
    on_result: OnResult,
) -> GiveUp:
    """Begins to write a fragment, without a task where its store can do that. The result: whether the disk has it."""
    try:
        store = plane.stores.store(disk)
    except PeerError:
        on_result(False)
        return _nothing
    try_write: TryWrite | None = getattr(store, "try_write", None)
    if try_write is not None:
        give_up = try_write(header, payload, lambda error: on_result(error is None), sync=sync, check=check)
        if give_up is not None:
            return give_up
    return in_task(plane, _written(store.write(header, payload, sync=sync, check=check)), on_result)


async def _written(writing: Awaitable[None]) -> bool:
    try:
        await writing
    except PeerError:
        return False
    return True


def _nothing() -> None:
    """Gives up a call that was not begun."""


def in_task(plane: ObjectPlane, call: Coroutine[Any, Any, bool], on_result: OnResult) -> GiveUp:
    """Begins a call in a task."""
    task = asyncio.create_task(call)
    report: OnResult | None = on_result

    def end(_task: object) -> None:
        if report is not None:
            error = asyncio.CancelledError() if task.cancelled() else task.exception()
            report(task.result() if error is None else error)

    def give_up() -> None:
        nonlocal report
        report = None
        task.cancel()
        plane.background.spawn(cancel_all([task]))

    task.add_done_callback(end)
    return give_up


def note_late(plane: ObjectPlane, disk: str, for_s: float) -> None:
    """A call to the disk was given up."""
    plane.liveness.disk_late(disk, for_s)
    plane.counters.writes_late += 1

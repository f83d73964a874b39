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
from typing import Any, TypeVar

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
    loop = asyncio.get_running_loop()
    began = heard = loop.time()
    pending: dict[K, GiveUp | None] = dict.fromkeys(keys)
    ended: list[tuple[K, bool | BaseException]] = []
    turn: asyncio.Future[None] | None = None
    each = False
    """Each may be the last one that is needed."""

    def hear(key: K, result: bool | BaseException) -> None:
        nonlocal heard
        heard = loop.time()
        del pending[key]
        ended.append((key, result))
        if turn is not None and (each or not pending):
            _wake(turn)

    try:
        for key in list(pending):
            give_up = begin(key, partial(hear, key))
            if key in pending:
                pending[key] = give_up
        turn_s = min(grace_s, limit_s)
        while pending or ended:
            if pending and not ended:
                turn = loop.create_future()
                timer = loop.call_later(turn_s, _wake, turn)
                try:
                    await turn
                finally:
                    timer.cancel()
                    turn = None
            for key, result in ended:
                if isinstance(result, BaseException):
                    raise result
                on_done(key, result)
            ended.clear()
            if not pending:
                break
            each = True
            now = loop.time()
            due, grace = began + limit_s, max(grace_s, heard - began)
            if safe():
                due = min(due, heard + grace)
            elif curable(len(pending)):
                due = min(due, heard + 2 * grace)
            if now >= due:
                break
            turn_s = due - now
    finally:
        for waiting in pending.values():
            if waiting is not None:
                waiting()
    return {key: loop.time() - began for key in pending}


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

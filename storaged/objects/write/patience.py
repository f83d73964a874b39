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
from collections.abc import Callable, Coroutine, Mapping
from typing import Any, TypeVar

from storaged.objects.background import cancel_all
from storaged.objects.plane import ObjectPlane

K = TypeVar("K")


async def until_safe(
    plane: ObjectPlane,
    calls: Mapping[K, Coroutine[Any, Any, bool]],
    on_done: Callable[[K, bool], None],
    safe: Callable[[], bool],
    curable: Callable[[int], bool],
    limit_s: float,
) -> dict[K, float]:
    """Runs the calls at the same time, for ``limit_s`` at most. ``on_done(key, result)`` is called for each that ends;
    ``safe()`` then says whether the others are not needed, and ``curable(count)`` whether the caller can do without
    ``count`` of them. Returns those that were given up, each with the seconds that it had.
    """
    grace_s = plane.limits.late_grace_s
    loop = asyncio.get_running_loop()
    began = heard = loop.time()

    def hear(_task: object) -> None:
        nonlocal heard
        heard = loop.time()

    tasks = {loop.create_task(call): key for key, call in calls.items()}
    for task in tasks:
        task.add_done_callback(hear)
    pending, turn_s, when = set(tasks), min(grace_s, limit_s), asyncio.ALL_COMPLETED
    try:
        while pending:
            done, pending = await asyncio.wait(pending, timeout=turn_s, return_when=when)
            for task in done:
                on_done(tasks[task], task.result())
            if not pending:
                break
            when = asyncio.FIRST_COMPLETED  # from now on each may be the last one that is needed
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
        for task in pending:
            task.cancel()
        if pending:
            plane.background.spawn(cancel_all(pending))
    return {tasks[task]: loop.time() - began for task in pending}


def note_late(plane: ObjectPlane, disk: str, for_s: float) -> None:
    """A call to the disk was given up."""
    plane.liveness.disk_late(disk, for_s)
    plane.counters.writes_late += 1

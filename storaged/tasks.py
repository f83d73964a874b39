"""Tasks that run together: a group that leaves the task which waits for it as it found it, and ``gather_bounded``.

Before Python 3.13 a group that fails makes two mistakes with the task that waits for it:

* It cancels that task when one of its own tasks fails, and takes that back only if the waiting task was still in the
  body of the group. Otherwise the task counts as cancelled for the rest of its life. Then an ``asyncio.timeout`` that
  runs out raises CancelledError in it, not TimeoutError, and a task that was meant to run for ever ends, with no error.
* When somebody else cancels that task while the group fails, the failure is raised and the cancellation is lost. A task
  that survives the failure then goes on for ever, and its process does not end.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Coroutine, Sequence
from types import TracebackType
from typing import Any, TypeVar

T = TypeVar("T")

_FORGETS = sys.version_info < (3, 13)


class TaskGroup(asyncio.TaskGroup):
    """As ``asyncio.TaskGroup`` of Python 3.13, for groups whose failure the caller survives."""

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        before = self._cancelled_parent()
        task = asyncio.current_task()
        failed = False
        try:
            await super().__aexit__(kind, error, trace)
        except BaseExceptionGroup:
            failed = True
            raise
        finally:
            if _FORGETS and task is not None:
                if self._cancelled_parent() and not before:
                    task.uncancel()
                if failed and task.cancelling():
                    task.uncancel()
                    task.cancel()  # raised where the task waits next

    def _cancelled_parent(self) -> bool:
        return bool(getattr(self, "_parent_cancel_requested", False))


async def gather_bounded(work: Sequence[Coroutine[Any, Any, T]], limit: int) -> list[T]:
    """The results in order, at most ``limit`` running at once. The first failure cancels the rest and is raised."""
    if not work:
        return []
    gate = asyncio.Semaphore(limit)

    async def one(coroutine: Coroutine[Any, Any, T]) -> T:
        async with gate:
            return await coroutine

    try:
        async with TaskGroup() as group:
            tasks = [group.create_task(one(coroutine)) for coroutine in work]
    except BaseExceptionGroup as failures:
        raise failures.exceptions[0] from None
    finally:
        for coroutine in work:  # those that were not started
            coroutine.close()
    return [task.result() for task in tasks]

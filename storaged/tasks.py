"""A group of tasks that leaves the task which waits for it as it found it.

Before Python 3.13 a group cancels the waiting task when one of its own tasks fails, and takes that back only if the
waiting task was still in the body of the group. Otherwise the task counts as cancelled for the rest of its life. Then
an ``asyncio.timeout`` that runs out raises CancelledError in it, not TimeoutError, and a task that was meant to run for
ever ends, with no error.
"""

from __future__ import annotations

import asyncio
import sys
from types import TracebackType

_FORGETS = sys.version_info < (3, 13)


class TaskGroup(asyncio.TaskGroup):
    """As ``asyncio.TaskGroup`` of Python 3.13, for groups whose failure the caller survives."""

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        before = self._cancelled_parent()
        try:
            await super().__aexit__(kind, error, trace)
        finally:
            task = asyncio.current_task()
            if _FORGETS and task is not None and self._cancelled_parent() and not before:
                task.uncancel()

    def _cancelled_parent(self) -> bool:
        return bool(getattr(self, "_parent_cancel_requested", False))

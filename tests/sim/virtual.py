"""An asyncio event loop whose time is a number: it jumps to the next timer when nothing else is to be done. No sockets,
no threads.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")

TIME_MAX_S = 600.0
"""A run is over in a few virtual seconds; one that is not waits for what never comes."""

EPOCH_MS = 1_750_000_000_000


class _Selector:
    """Waiting is moving the clock."""

    def __init__(self, loop: VirtualLoop) -> None:
        self._loop = loop

    def select(self, timeout: float | None) -> list[Any]:
        if timeout is None:
            raise RuntimeError("nothing is left that could happen: everybody waits for somebody")
        self._loop.advance(timeout)
        return []

    def close(self) -> None:
        pass


class VirtualLoop(asyncio.BaseEventLoop):
    def __init__(self) -> None:
        super().__init__()
        self._now = 0.0
        self._selector = _Selector(self)
        self.troubles: list[str] = []
        self.set_exception_handler(self._trouble)

    def _trouble(self, _loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        self.troubles.append(f"{context.get('message')}: {context.get('exception')!r}")

    def time(self) -> float:
        return self._now

    def advance(self, seconds: float) -> None:
        self._now += max(seconds, 0.0)
        if self._now > TIME_MAX_S:
            raise RuntimeError("a task waits for something that never comes")

    def _process_events(self, events: list[Any]) -> None:
        pass

    def _write_to_self(self) -> None:
        pass

    def run_in_executor(self, _executor: Any, work: Callable[..., Any], *arguments: Any) -> Any:
        """What is meant for a thread of a pool is done at once, by this thread."""
        done = self.create_future()
        try:
            done.set_result(work(*arguments))
        except Exception as error:
            done.set_exception(error)
        return done


class OneThreadLoop(VirtualLoop):
    """For tests that are marked ``virtual_time``. Threads are refused, because virtual time goes on while they work."""

    def __init__(self) -> None:
        super().__init__()
        self.began_ms = time.time_ns() // 1_000_000

    def call_soon_threadsafe(self, *arguments: Any, **options: Any) -> asyncio.Handle:
        if threading.current_thread() is not threading.main_thread():
            raise RuntimeError("a test on virtual time needs a thread: mark it virtual_time(False)")
        return super().call_soon_threadsafe(*arguments, **options)


class VirtualClock:
    """``clock.Clock`` of one process: its wall clock may be wrong, and jump (``skew_ms``)."""

    def __init__(self, loop: VirtualLoop, skew_ms: int = 0) -> None:
        self._loop = loop
        self.skew_ms = skew_ms

    def monotonic(self) -> float:
        return self._loop.time()

    def wall_ms(self) -> int:
        return EPOCH_MS + self.skew_ms + int(self._loop.time() * 1000)


def run(loop: VirtualLoop, main: Coroutine[Any, Any, T]) -> T:
    try:
        return loop.run_until_complete(main)
    finally:
        loop.run_until_complete(_end_all(loop))
        loop.close()


async def _end_all(loop: VirtualLoop) -> None:
    """What is still under way ends while there is a loop: in the order in which it began, since
    ``all_tasks`` is a set.
    """
    current = asyncio.current_task()
    tasks = sorted(
        (task for task in asyncio.all_tasks(loop) if task is not current),
        key=lambda task: (len(task.get_name()), task.get_name()),
    )
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)

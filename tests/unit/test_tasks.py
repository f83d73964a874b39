"""Groups of tasks that fail leave the task that waits for them as it was."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Coroutine

import pytest

from storaged.errors import ServiceUnavailable
from storaged.maintain.context import concurrently, wait_for
from storaged.tasks import TaskGroup, gather_bounded
from tests.patience import GUARD_S


async def _fails() -> None:
    await asyncio.sleep(0)
    raise ServiceUnavailable("no majority")


async def _bounded() -> None:
    await gather_bounded([_fails(), asyncio.sleep(GUARD_S)], 2)


async def _workers() -> None:
    await concurrently(iter([_fails(), asyncio.sleep(GUARD_S)]), 2)


async def _group() -> None:
    async with TaskGroup() as group:
        group.create_task(_fails())


async def _group_in_its_body() -> None:
    async with TaskGroup() as group:
        group.create_task(_fails())
        await asyncio.sleep(GUARD_S)


@pytest.mark.parametrize("work", [_bounded, _workers, _group, _group_in_its_body])
async def test_a_task_can_wait_with_a_limit_after_a_group_of_it_has_failed(work: Callable[[], Awaitable[None]]) -> None:
    for _ in range(2):
        with pytest.raises((ServiceUnavailable, ExceptionGroup)):
            await work()
        task = asyncio.current_task()
        assert task is not None
        assert task.cancelling() == 0
        assert not await wait_for(asyncio.Event(), 0.001)


async def _ends_slowly(began: asyncio.Event) -> None:
    try:
        began.set()
        await asyncio.sleep(GUARD_S)
    finally:
        await asyncio.sleep(0.01)


async def _fails_when_cancelled(began: asyncio.Event) -> None:
    try:
        began.set()
        await asyncio.sleep(GUARD_S)
    finally:
        raise ServiceUnavailable("no majority")


async def _survives(
    began: asyncio.Event, work: Callable[[asyncio.Event], Coroutine[None, None, None]], *, fails: bool
) -> int:
    """How often it counts as cancelled after the failure; the next wait raises the cancellation."""
    try:
        async with TaskGroup() as group:
            group.create_task(work(began))
            if fails:
                group.create_task(_fails())
    except ExceptionGroup:
        task = asyncio.current_task()
        assert task is not None
        count = task.cancelling()
        with pytest.raises(asyncio.CancelledError):
            await asyncio.sleep(0)
        return count
    return -1


async def test_a_task_that_is_cancelled_while_its_group_fails_stays_cancelled() -> None:
    began = asyncio.Event()
    task = asyncio.create_task(_survives(began, _ends_slowly, fails=True))
    await began.wait()
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    task.cancel()
    assert await task == 1


async def test_a_task_stays_cancelled_if_its_group_fails_because_of_that() -> None:
    began = asyncio.Event()
    task = asyncio.create_task(_survives(began, _fails_when_cancelled, fails=False))
    await began.wait()
    task.cancel()
    assert await task == 1


async def test_a_loop_that_survives_failures_ends_when_it_is_cancelled_during_one() -> None:
    began = asyncio.Event()
    rounds = 0

    async def loop() -> None:
        nonlocal rounds
        while True:
            rounds += 1
            with contextlib.suppress(ServiceUnavailable):
                await gather_bounded([_fails_when_cancelled(began) if rounds == 1 else asyncio.sleep(GUARD_S)], 1)

    task = asyncio.create_task(loop())
    await began.wait()
    task.cancel()
    done, _ = await asyncio.wait([task], timeout=10)
    assert done, "it goes on"
    assert task.cancelled()

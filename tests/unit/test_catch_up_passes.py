"""When a pass of catch-up begins, and how long a walk may go on in between."""

from __future__ import annotations

import asyncio
from collections.abc import Container, Sequence
from types import SimpleNamespace
from typing import Any, cast

import pytest

from storaged.maintain.catch_up import REST_S_MAX, TRIES, CatchUp
from storaged.maintain.context import MaintainContext, MaintainLimits
from storaged.maintain.walk import Range, Walker
from tests.doubles.clock import LoopClock

pytestmark = pytest.mark.virtual_time

RANGE = Range("disk", 1, bytes(16), 0)


class Walk:
    """A walker with one range that differs. ``passes``: when each looked at it, and how patiently."""

    def __init__(self, takes_s: Sequence[float], fail: Container[int] = ()) -> None:
        """The n-th pass takes so long; these (the first is 0) fail."""
        self._takes_s = list(takes_s)
        self._fail = fail
        self.passes: list[tuple[float, float]] = []
        self.settled = 0
        self.buckets = self

    async def refresh(self, _context: object) -> None:
        await asyncio.sleep(0)

    def led_ranges(self) -> list[Range]:
        return [RANGE]

    async def differing(self, ranges: Sequence[Range]) -> list[Range]:
        await asyncio.sleep(0)
        return list(ranges)

    async def settle_range(self, _where: Range, *, quick: bool, patience: float) -> bool:
        assert quick
        number = len(self.passes)
        self.passes.append((asyncio.get_running_loop().time(), patience))
        await asyncio.sleep(self._takes_s[number])
        return number not in self._fail


async def began_at(walk: Walk, requests: Sequence[float]) -> list[float]:
    """When passes began, where they are requested at these times."""
    loop = asyncio.get_running_loop()
    context = SimpleNamespace(clock=LoopClock(ahead_s=1e6), limits=MaintainLimits(), log=lambda line: None)
    catch_up = CatchUp(cast(MaintainContext, context), cast(Walker, cast(Any, walk)))
    began = loop.time()
    for at in requests:
        loop.call_later(at, catch_up.request)
    task = asyncio.ensure_future(catch_up.run())
    await asyncio.sleep(300.0)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert not catch_up.busy
    return [at - began for at, _ in walk.passes]


async def test_a_pass_that_failed_is_followed_by_another_at_once_when_more_disks_came() -> None:
    """However long it took, and however soon after another one it began."""
    walk = Walk([0.0, 60.0, 0.0], fail=(1,))
    assert await began_at(walk, [0.0, 5.0, 30.0]) == pytest.approx([0.0, 5.0, 65.0], abs=0.1)


async def test_passes_that_fail_are_more_and_more_patient_and_end() -> None:
    walk = Walk([1.0] * 20, fail=range(20))
    await began_at(walk, [0.0])
    assert [patience for _, patience in walk.passes] == [2**number for number in range(TRIES)]


@pytest.mark.parametrize(("takes_s", "rest_s"), [(2.0, 2.0), (60.0, REST_S_MAX)])
async def test_passes_that_follow_one_another_leave_some_time_to_the_walk_and_not_more(
    takes_s: float, rest_s: float
) -> None:
    walk = Walk([takes_s] * 3)
    began = await began_at(walk, [0.0, takes_s / 2, 1.5 * takes_s])
    assert began == pytest.approx([0.0, takes_s, 2 * takes_s + rest_s], abs=0.1)

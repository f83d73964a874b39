"""Collection follows its pause and its pace in about a second, whatever it waits for."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from types import SimpleNamespace
from typing import Any

import pytest

from storaged.cluster.move_settings import MoveSettings
from storaged.maintain.collection_pace import CollectionPace
from storaged.maintain.context import MaintainLimits
from tests.sim.virtual import VirtualClock, VirtualLoop
from tests.sim.virtual import run as run_virtual

POLL_S = MaintainLimits().poll_s


class World:
    """``settings`` may change at any time."""

    def __init__(self, loop: VirtualLoop) -> None:
        self.clock = VirtualClock(loop)
        self.settings = MoveSettings()
        context: Any = SimpleNamespace(clock=self.clock, limits=MaintainLimits(), settings=lambda: self.settings)
        self.pace = CollectionPace(context)

    async def took_s(self, *counts: int) -> float:
        began = self.clock.monotonic()
        for count in counts:
            await self.pace.spend(count)
        return self.clock.monotonic() - began

    def begin(self, *counts: int) -> asyncio.Task[float]:
        return asyncio.get_running_loop().create_task(self.took_s(*counts))


def run(scenario: Callable[[World], Coroutine[Any, Any, None]]) -> None:
    loop = VirtualLoop()
    run_virtual(loop, scenario(World(loop)))


@pytest.mark.parametrize(("pace", "rest_s"), [(0, 0.0), (1000, 10.0)])
def test_another_pace_counts_at_once_for_what_is_waited_for(pace: int, rest_s: float) -> None:
    async def scenario(world: World) -> None:
        world.settings = MoveSettings(revision=1, collection_per_s=1)
        spending = world.begin(10_000)
        await asyncio.sleep(50)
        assert not spending.done()
        world.settings = MoveSettings(revision=2, collection_per_s=pace)
        assert await spending <= 50 + rest_s + POLL_S

    run(scenario)


def test_a_pause_counts_at_once_for_what_is_waited_for_and_so_does_its_end() -> None:
    async def scenario(world: World) -> None:
        world.settings = MoveSettings(revision=1, collection_per_s=1)
        spending = world.begin(10)
        await asyncio.sleep(3)
        world.settings = MoveSettings(revision=2, collection_paused=True, collection_per_s=1)
        await asyncio.sleep(100)
        assert not spending.done()
        world.settings = MoveSettings(revision=3)
        await asyncio.sleep(POLL_S + 0.1)
        assert spending.done()

    run(scenario)


def test_who_waits_for_less_waits_for_the_end_of_a_pause_too() -> None:
    async def scenario(world: World) -> None:
        world.settings = MoveSettings(collection_paused=True)
        spending = world.begin(0)
        await asyncio.sleep(100)
        assert not spending.done()
        world.settings = MoveSettings()
        assert await spending <= 100 + POLL_S

    run(scenario)


def test_all_who_spend_share_one_pace_and_save_up_for_a_second() -> None:
    async def scenario(world: World) -> None:
        world.settings = MoveSettings(collection_per_s=100)
        await asyncio.sleep(100)
        assert await world.took_s(100) == 0
        took = await asyncio.gather(*(world.begin(*[10] * 50) for _ in range(4)))
        assert max(took) == pytest.approx(20)
        assert min(took) > 19
        await asyncio.sleep(100)
        assert await world.took_s(1100) == pytest.approx(10)

    run(scenario)


def test_without_a_pace_nothing_is_owed_or_saved_up() -> None:
    async def scenario(world: World) -> None:
        assert await world.took_s(1_000_000) == 0
        world.settings = MoveSettings(collection_per_s=10)
        assert await world.took_s(10) == pytest.approx(1)

    run(scenario)

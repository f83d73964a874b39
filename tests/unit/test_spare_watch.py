"""How often a storage node asks the others whether there is room for what disks that are away had."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

from storaged.maintain.spare_room import Counts
from storaged.maintain.spare_watch import LOOK_S, SpareWatch
from tests.doubles.layouts import layout_of


async def test_repair_gets_its_turn_while_a_node_does_not_answer() -> None:
    """To ask it takes as long as the pause between two looks."""
    now, asked = 0.0, 0

    async def statuses() -> Sequence[Counts]:
        nonlocal now, asked
        asked += 1
        now += LOOK_S
        return []

    context: Any = SimpleNamespace(
        layouts=SimpleNamespace(current=layout_of((1, 1, 1))),
        reports=dict,
        liveness=SimpleNamespace(disk_readable=lambda disk: disk != "a0", disk_writable=lambda disk: disk != "a0"),
        clock=SimpleNamespace(monotonic=lambda: now),
    )
    watch = SpareWatch(context, statuses)
    for _ in range(10):
        await watch.look(needed=True)
    assert asked == 1
    now += LOOK_S
    await watch.look(needed=True)
    assert asked == 2

"""When a node says that the system partition may settle on its new seed disk."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import pytest
from msgspec.structs import replace

from storaged.cluster.layout import SYSTEM_PARTITION, Layout
from storaged.cluster.sparing import UNREACHABLE, DisksOut, OutDisk
from storaged.errors import ServiceUnavailable
from storaged.meta.listing.comparing import CatchUp
from storaged.meta.messages import EpochFence
from storaged.node.system_move import SystemMove
from tests.doubles.layouts import KnownLayouts, layout_of

JOINT = replace(layout_of(), epoch=100, base=1, seeds=("a0", "b0", "c0"), seeds_next=("a0", "b0", "c1"), seeds_step=1)


class Seeds:
    """The disks of node ``na`` and a scanner of all seed disks, of which ``away`` do not answer."""

    def __init__(self, layout: Layout, used: Collection[str] = ("a0", "a1"), away: Collection[str] = ()) -> None:
        self.fenced: list[EpochFence] = []
        self._away = set(away)
        self.differs = False
        self.layouts = KnownLayouts(layout)
        self.move = SystemMove(
            self.layouts,
            "na",
            dict.fromkeys(used, self),  # type: ignore[arg-type]  # only ``fence_epoch`` is asked for
            self,  # type: ignore[arg-type]  # only ``catch_up`` is asked for
        )

    async def fence_epoch(self, request: EpochFence) -> None:
        self.fenced.append(request)

    async def catch_up(self, *_range: Any, **_options: Any) -> CatchUp:
        assert self.fenced, "a disk that is compared before it refuses earlier steps may still take a value"
        if self.differs:
            raise ServiceUnavailable("the seed disks differ")
        return CatchUp(away=self._away)

    async def reason(self) -> str:
        return await self.move.may_settle(JOINT)


async def test_a_node_fences_its_own_seed_disks_and_compares_all() -> None:
    seeds = Seeds(JOINT)
    assert await seeds.reason() == ""
    assert [(fence.disk, fence.partition) for fence in seeds.fenced] == [("a0", SYSTEM_PARTITION)]
    assert seeds.fenced[0].epoch == 1 << 32 | 100
    seeds.differs = True
    assert "differ" in await seeds.reason()
    assert "does not move" in await Seeds(layout_of()).reason()


@pytest.mark.parametrize(
    ("away", "said"), [({"c0"}, ""), ({"b0"}, ""), ({"c1"}, "c1, which comes"), ({"b0", "c0"}, "only 2 of 4")]
)
async def test_a_majority_of_both_sets_and_the_disk_that_comes_answer(away: set[str], said: str) -> None:
    found = await Seeds(JOINT, away=away).reason()
    assert said in found
    assert bool(said) == bool(found)


async def test_the_exchange_ends_without_the_disk_that_comes_where_that_is_out_itself() -> None:
    """Then the next one replaces it. A majority of the set that comes has everything without it."""
    for away, said in (({"c1"}, ""), ({"c0", "c1"}, ""), ({"b0", "c1"}, "only 2 of 4")):
        seeds = Seeds(JOINT, away=away)
        assert "c1, which comes" in await seeds.reason()
        seeds.layouts.partitions.note_out(DisksOut(1, (OutDisk("c1", 1, UNREACHABLE),), ()))
        assert said in await seeds.reason()
        assert bool(said) == bool(await seeds.reason())


async def test_a_disk_of_this_node_that_does_not_answer_is_not_counted_as_compared() -> None:
    """It may hold a value of the step before. Disk c0 may take the same value later, and would choose it."""
    assert await Seeds(JOINT, away={"a0"}).reason() == "disk a0 of na does not answer"


async def test_a_disk_of_this_node_that_is_not_in_use_is_not_counted_as_fenced() -> None:
    assert await Seeds(JOINT, used=["a1"]).reason() == "disk a0 of na is not in use"

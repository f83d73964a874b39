"""What would be lost with disks, as a gateway counts it at those that are left."""

from __future__ import annotations

import asyncio
from typing import cast

import pytest

from storaged.cluster.partitions import PartitionState
from storaged.meta.proposer.moving import PartitionMoves
from storaged.node import losses
from tests.doubles.layouts import KnownLayouts
from tests.worlds.layouts import first


class NoEnd:
    async def count_keys(self, _state: PartitionState, _disk: str, _at_most: int) -> int:
        await asyncio.Event().wait()
        raise AssertionError

    async def system_keys(self, _state: PartitionState, _disk: str, _at_most: int) -> list[bytes]:
        await asyncio.Event().wait()
        raise AssertionError


async def test_a_disk_that_never_ends_counting_counts_as_one_that_does_not_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "COUNT_S", 0.001)
    layout = first()
    lost = [disk.id for disk in layout.disks if disk.node != "n3"]
    counting = losses.Losses(KnownLayouts(layout), cast(PartitionMoves, NoEnd()), lambda _disk: False)
    async with asyncio.timeout(60):
        found = await counting.of(lost)
    assert len(found["partitions"]) == 1024
    assert {row["keys"] for row in found["partitions"]} == {None}
    assert found["system"]["registers"] is None

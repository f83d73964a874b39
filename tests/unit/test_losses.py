"""What would be lost with disks, as a gateway counts it at those that are left."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path
from typing import cast

import pytest

import storaged
from storaged.cluster import move_settings, partitions, sparing
from storaged.cluster.partitions import PartitionState
from storaged.meta.proposer.moving import PartitionMoves
from storaged.node import losses
from storaged.objects.system import accounts, bucket_records, claims, users
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


PATHS = re.findall(
    r"`([a-z-]+/?)",
    re.findall(r"^\| system \| (.*)", (Path(storaged.__file__).parent / "FORMATS.md").read_text(), re.M)[0],
)
"""How the keys of system registers begin, as FORMATS.md has them."""


@pytest.mark.parametrize("path", PATHS)
def test_each_kind_of_system_register_is_counted_under_a_name_of_its_own(path: str) -> None:
    assert losses.KINDS.get(path.encode())


def test_the_document_names_the_paths_that_the_program_writes() -> None:
    written = accounts.PREFIX, bucket_records.PREFIX, claims.PREFIX, users.PREFIX
    assert {*written, partitions.PATH_PREFIX, move_settings.PATH, sparing.PATH} <= set(PATHS)

"""Disks that refuse writes for reasons of the machine: a quota, a file system that was mounted read-only, a clock that
jumps. Each is named, and the node and its other disks go on.

The disk refuses in the kernel (``hanging_disk``). Needs root and /dev/fuse, and is skipped elsewhere.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from storaged.errors import DiskUnusable
from storaged.fragments import disk_state
from storaged.meta.consensus.register import Verdict
from storaged.node import disk_watch
from tests.integration.test_hung_disks import Node, accept
from tests.worlds.authority import until
from tests.worlds.fragments import Made, make
from tests.worlds.hanging_disk import WRITES, HangingDisk, available, hanging_disk

RNG = random.Random(5)


@pytest.fixture
def hanging() -> Iterator[HangingDisk]:
    if not available():
        pytest.skip("needs root and /dev/fuse")
    with hanging_disk() as disk:
        yield disk


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk_watch, "LOOK_S", 0.1)


async def write(node: Node, size: int = 50_000) -> Made:
    made = make(RNG, size)
    await node.bad.fragments.write(made.header, [made.payload], sync=True)
    return made


async def reason(node: Node) -> str:
    return next(status.reason for status in await node.disks.statuses() if status.id == node.bad.id)


@pytest.mark.parametrize(("error", "said"), [("EDQUOT", "quota"), ("ENOSPC", "No space")])
async def test_a_quota_makes_a_disk_full_although_there_is_space_and_it_ends_by_itself(
    tmp_path: Path, hanging: HangingDisk, monkeypatch: pytest.MonkeyPatch, error: str, said: str
) -> None:
    node = Node(tmp_path, hanging)
    await node.open()
    before = await write(node)
    hanging.refuse(error, WRITES, name="segments")
    with pytest.raises(DiskUnusable, match=said) as refused:
        await write(node)
    assert refused.value.details["state"] == "full"
    assert await node.states() == ["full", "ok"]
    assert said.lower() in (await reason(node)).lower()
    assert (await node.bad.fragments.read(before.id, 0, 9)).whole is not None
    assert (await accept(node.bad, b"k")).verdict == Verdict.OK, "rows have room"
    assert (await accept(node.good, b"k")).verdict == Verdict.OK
    hanging.release()
    monkeypatch.setattr(node.bad.fragments._engine.state, "_refused_until_s", time.monotonic())
    assert await node.states() == ["ok", "ok"]
    await write(node)
    await node.disks.close()
    assert disk_state.REFUSED_S > 1


async def test_a_file_system_that_is_mounted_read_only_makes_its_disk_read_only(
    tmp_path: Path, hanging: HangingDisk
) -> None:
    node = Node(tmp_path, hanging)
    await node.open()
    before = await write(node)
    hanging.refuse("EROFS", WRITES, name="fragments")
    with pytest.raises(DiskUnusable, match="Read-only file system"):
        await write(node)
    assert await node.states() == ["read-only", "ok"]
    assert "Read-only file system" in await reason(node)
    assert (await node.bad.fragments.read(before.id, 0, 9)).whole is not None
    assert (await accept(node.good, b"k")).verdict == Verdict.OK
    await node.disks.close()


async def test_a_disk_whose_redo_log_can_not_be_written_is_out_and_its_node_goes_on(
    tmp_path: Path, hanging: HangingDisk
) -> None:
    node = Node(tmp_path, hanging)
    await node.open()
    assert (await accept(node.bad, b"k")).verdict == Verdict.OK
    hanging.refuse("EROFS", WRITES)
    with pytest.raises(DiskUnusable):
        await accept(node.bad, b"k2")
    await until(lambda: node.bad.health.finding().state == "failed")
    assert await node.states() == ["failed", "ok"]
    assert "metadata" in await reason(node)
    assert (await accept(node.good, b"k")).verdict == Verdict.OK
    await node.disks.close()


async def test_a_clock_that_jumps_changes_the_state_of_no_disk(
    tmp_path: Path, hanging: HangingDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = Node(tmp_path, hanging)
    await node.open()
    real = time.time
    for jump_s in (3 * 86_400, -3 * 86_400):
        monkeypatch.setattr(time, "time", lambda jump_s=jump_s: real() + jump_s)
        await write(node)
        for disk in (node.bad, node.good):
            disk.health.look()
            assert (disk.health.state, disk.health.late) == ("ok", False)
        assert await node.states() == ["ok", "ok"]
    await node.disks.close()

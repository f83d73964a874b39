"""What is replaced goes to the garbage lists: gathered, bounded, and not lost at an orderly end."""

from __future__ import annotations

import asyncio
import os

import pytest
from msgspec.structs import replace

from storaged.fragments.ports import Retirement
from storaged.meta.names import Table
from storaged.objects import garbage
from storaged.objects.api import BodyChecks, NewMeta
from storaged.objects.service import ObjectService
from tests.worlds.objects import OWNER, World, bucket_of, pieces, put

pytestmark = pytest.mark.virtual_time


class Rig:
    """One bucket on doubles; ``calls`` are those of ``retire``: (disk, entries)."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **limits: object) -> None:
        self.world = World(**limits)  # type: ignore[arg-type]
        self.objects = ObjectService(self.world.plane())
        self.bucket = bucket_of(self.world)

    async def put(self, key: bytes, size: int = 5000) -> None:
        await put(self.objects, self.bucket, os.urandom(size), key=key)

    @property
    def calls(self) -> list[tuple[str, int]]:
        return [(disk.name, len(entries)) for disk in self.world.disks.disks.values() for entries in disk.retirements]

    def listed(self) -> int:
        return sum(len(disk.garbage) for disk in self.world.disks.disks.values())


async def test_what_many_overwrites_replace_within_a_moment_goes_to_each_disk_in_one_call(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rig = Rig(monkeypatch)
    keys = [b"%d" % n for n in range(40)]
    for _ in range(2):
        await asyncio.gather(*(rig.put(key) for key in keys))
    await rig.objects.delete(rig.bucket, keys[0])
    await rig.objects.plane.background.settle()
    assert len(rig.calls) == len({disk for disk, _ in rig.calls}) == 6
    assert rig.listed() == 41 * 3
    await rig.put(keys[1])
    await rig.objects.plane.background.settle()
    assert len(rig.calls) == 9
    await rig.objects.close()


async def test_the_parts_of_an_aborted_upload_go_to_each_disk_in_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig(monkeypatch)
    upload = (await rig.objects.create_upload(rig.bucket, b"key", NewMeta(), owner=OWNER)).upload_id
    for number in range(1, 41):
        await rig.objects.put_part(rig.bucket, b"key", upload, number, pieces(os.urandom(5000)), BodyChecks(5000))
    await rig.objects.abort(rig.bucket, b"key", upload)
    await rig.objects.plane.background.settle()
    assert len(rig.calls) == len({disk for disk, _ in rig.calls}) == 6
    assert rig.listed() == 40 * 6
    assert not [name for name, value in rig.world.ring.values.items() if name.table == Table.PART and value.body]
    await rig.objects.close()


async def test_a_part_row_that_is_damaged_keeps_no_part_before_it_off_the_lists(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rig = Rig(monkeypatch)
    upload = (await rig.objects.create_upload(rig.bucket, b"key", NewMeta(), owner=OWNER)).upload_id
    for number in range(1, 4):
        await rig.objects.put_part(rig.bucket, b"key", upload, number, pieces(os.urandom(5000)), BodyChecks(5000))
    last = max(name for name in rig.world.ring.values if name.table == Table.PART)
    rig.world.ring.values[last] = replace(rig.world.ring.values[last], body=b"damaged")
    await rig.objects.abort(rig.bucket, b"key", upload)
    await rig.objects.plane.background.settle()
    assert rig.listed() == 2 * 6
    await rig.objects.close()


async def test_objects_in_their_record_leave_no_garbage(monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig(monkeypatch)
    for _ in range(3):
        await rig.put(b"key", 100)
    await rig.objects.delete(rig.bucket, b"key")
    await rig.objects.plane.background.settle()
    assert not rig.calls
    await rig.objects.close()


async def test_what_waits_is_sent_when_the_plane_is_closed_and_what_comes_later_is_counted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rig = Rig(monkeypatch)
    for _ in range(2):
        await rig.put(b"key")
    await rig.objects.close()
    assert rig.listed() == 3
    rig.objects.plane.garbage.add("a0", Retirement(bytes(16), b"owner", 0))
    assert (rig.listed(), rig.objects.statistics().background_dropped) == (3, 1)


async def test_no_more_wait_than_there_is_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(garbage, "WAITING_MAX", 10)
    rig = Rig(monkeypatch)
    for n in range(15):
        rig.objects.plane.garbage.add("a0", Retirement(n.to_bytes(16, "big"), b"owner", 0))
    rig.world.disks.disks["a0"].down = True
    rig.objects.plane.garbage.add("b0", Retirement(bytes(16), b"owner", 0))
    await rig.objects.plane.background.settle()
    assert rig.calls == [("a0", 10)]
    assert rig.objects.statistics().background_dropped == 6
    assert rig.listed() == 0
    rig.objects.plane.garbage.add("b0", Retirement(bytes(16), b"owner", 0))
    await rig.objects.plane.background.settle()
    assert rig.listed() == 1
    await rig.objects.close()


async def test_a_disk_that_hangs_has_one_batch_on_its_way_and_what_comes_meanwhile_is_bounded_with_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(garbage, "WAITING_MAX", 10)
    monkeypatch.setattr(garbage, "GATHER_S", 0.01)
    rig = Rig(monkeypatch, write_timeout_s=30.0)
    hang = rig.world.disks.disks["a0"].hang = asyncio.Event()
    plane = rig.objects.plane
    for n in range(20):
        plane.garbage.add("a0", Retirement(n.to_bytes(16, "big"), b"owner", 0))
        if n % 4 == 3:
            await asyncio.sleep(0.05)
            assert len(plane.background._tasks) == 1
    assert rig.calls == [("a0", 4)]
    assert rig.objects.statistics().background_dropped == 10
    hang.set()
    await plane.background.settle()
    assert (rig.calls, rig.listed()) == ([("a0", 4), ("a0", 6)], 10)
    plane.garbage.add("b0", Retirement(bytes(16), b"owner", 0))
    await plane.background.settle()
    assert (rig.calls[2:], rig.objects.statistics().background_dropped) == ([("b0", 1)], 10)
    await rig.objects.close()

"""The store in memory: the port's suite, and the power cuts that simulations need."""

from __future__ import annotations

import asyncio

import pytest

from storaged.errors import DiskUnusable
from storaged.meta.store_ports import RowDamaged, StoreBatch
from tests.doubles.meta_store import MemoryMetaStore
from tests.suites.meta_store import *  # noqa: F403
from tests.suites.meta_store import name_of, slot_of


@pytest.fixture
async def store() -> MemoryMetaStore:
    return MemoryMetaStore()


class Gate:
    """A disk whose syncs return when the test lets them."""

    def __init__(self) -> None:
        self.syncs = 0
        self.open = asyncio.Event()

    async def sync(self) -> None:
        self.syncs += 1
        await self.open.wait()


async def start(store: MemoryMetaStore, *keys: bytes) -> list[asyncio.Task[None]]:
    tasks = [asyncio.create_task(store.commit(StoreBatch(slots=[slot_of(name_of(key))]))) for key in keys]
    for _ in range(5):  # each gets as far as the gate, or into the queue for the next sync
        await asyncio.sleep(0)
    return tasks


async def test_nothing_is_visible_before_it_is_synced() -> None:
    gate = Gate()
    store = MemoryMetaStore(sync=gate.sync)
    [task] = await start(store, b"k")
    assert store.get(name_of(b"k")) is None
    assert not task.done()
    gate.open.set()
    await task
    assert store.get(name_of(b"k")) is not None


async def test_commits_that_arrive_during_a_sync_share_the_next_one() -> None:
    gate = Gate()
    store = MemoryMetaStore(sync=gate.sync)
    tasks = await start(store, b"first")
    tasks += await start(store, *(b"%d" % number for number in range(10)))
    gate.open.set()
    await asyncio.gather(*tasks)
    assert gate.syncs == 2


@pytest.mark.parametrize("reached", [0, 1, 2, 5])
async def test_a_crash_fails_every_commit_on_its_way_and_keeps_only_a_prefix(reached: int) -> None:
    gate = Gate()
    store = MemoryMetaStore(sync=gate.sync)
    keys = [b"a", b"b", b"c"]
    tasks = await start(store, *keys)
    store.crash(reached)
    gate.open.set()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert [type(result) for result in results] == [DiskUnusable] * 3
    assert [store.get(name_of(key)) is not None for key in keys] == [index < reached for index in range(3)]
    await store.commit(StoreBatch(slots=[slot_of(name_of(b"after"))]))
    assert store.get(name_of(b"after")) is not None


async def test_a_sync_from_before_the_crash_does_not_make_later_commits_durable() -> None:
    gate = Gate()
    store = MemoryMetaStore(sync=gate.sync)
    [before] = await start(store, b"before")
    store.crash()
    gate.open.set()
    gate.open = asyncio.Event()
    [after] = await start(store, b"after")
    assert store.get(name_of(b"after")) is None
    with pytest.raises(DiskUnusable):
        await before
    gate.open.set()
    await after


async def test_a_failed_disk_refuses_commits_on_their_way_and_later_ones_but_can_be_read() -> None:
    gate = Gate()
    store = MemoryMetaStore(sync=gate.sync)
    gate.open.set()
    await store.commit(StoreBatch(slots=[slot_of(name_of(b"kept"))]))
    gate.open.clear()
    [task] = await start(store, b"k")
    store.fail("EIO")
    gate.open.set()
    with pytest.raises(DiskUnusable, match="EIO"):
        await task
    with pytest.raises(DiskUnusable, match="EIO"):
        await store.commit(StoreBatch())
    assert store.get(name_of(b"k")) is None
    assert store.get(name_of(b"kept")) is not None


async def test_a_damaged_row_is_refused() -> None:
    store = MemoryMetaStore()
    await store.commit(StoreBatch(slots=[slot_of(name_of(b"k"))]))
    store.damage(name_of(b"k"))
    with pytest.raises(RowDamaged):
        store.get(name_of(b"k"))
    assert store.rows([name_of(b"k").pack()]) == [None]


async def test_a_cancelled_commit_is_written_with_the_next() -> None:
    gate = Gate()
    store = MemoryMetaStore(sync=gate.sync)
    [first] = await start(store, b"first")
    first.cancel()
    [second] = await start(store, b"second")
    gate.open.set()
    await second
    assert store.get(name_of(b"first")) is not None

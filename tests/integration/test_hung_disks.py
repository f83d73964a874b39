"""Disks that hang, or are slow, at each kind of operation: the node's other disks go on, what was acknowledged stays,
and the disk takes part again when it answers.

The disk hangs in the kernel (``hanging_disk``). Needs root and /dev/fuse, and is skipped elsewhere.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from storaged import config, disk_health, lmdb_file
from storaged.errors import DiskUnusable, StoragedError
from storaged.meta import messages
from storaged.meta.consensus.register import Verdict
from storaged.meta.names import Ballot, RegisterName, Table, Value, Visibility
from storaged.node import disk_watch
from storaged.node.disks import LOGGED_BYTES_MAX, Disks, LocalDisk
from storaged.wire import encode
from tests.integration.test_node import storage_config
from tests.integration.test_node_disks import opener
from tests.patience import GUARD_S
from tests.worlds.authority import until
from tests.worlds.fragments import make
from tests.worlds.hanging_disk import OPENS, READS, SPACE, SYNCS, WRITES, HangingDisk, available, hanging_disk

RNG = random.Random(11)
SCOPE = b"s" * 16
GAP_S_MAX = 10.0
"""The event loop may be late by so much on a busy machine. A loop that waits for the disk waits until the disk is
released by itself (``hanging_disk.HANG_S_MAX``), since it is the loop that ends the hang.
"""

HANG_S = 2.0
LARGE = LOGGED_BYTES_MAX + 1


@pytest.fixture
def hanging() -> Iterator[HangingDisk]:
    if not available():
        pytest.skip("needs root and /dev/fuse")
    with hanging_disk() as disk:
        yield disk


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk counts as hung a second after it stopped to answer, and is looked at often."""
    for limit in ("HUNG_S", "HUNG_LONG_S"):
        monkeypatch.setattr(disk_health, limit, 1.0)
    monkeypatch.setattr(disk_watch, "LOOK_S", 0.1)


class Node:
    """A node with the disks ``bad``, which may hang, and ``good``."""

    def __init__(self, place: Path, hanging: HangingDisk) -> None:
        self.config: config.Config = storage_config(place)
        self.hanging = hanging
        (hanging.directory / "d1").mkdir()
        (place / "d1").symlink_to(hanging.directory / "d1")
        self.disks = Disks()

    async def open(self, **settings: Any) -> None:
        self.disks = await opener(self.config, **settings).open()

    @property
    def bad(self) -> LocalDisk:
        return self.disks.used[self.config.disks[0].id]

    @property
    def good(self) -> LocalDisk:
        return self.disks.used[self.config.disks[1].id]

    async def states(self) -> list[str]:
        found = {status.id: status.state for status in await self.disks.statuses()}
        return [found[section.id] for section in self.config.disks]

    async def evict(self) -> None:
        """LMDB's pages of the bad disk leave memory, and the node knows it."""
        await self.bad.meta.checkpoint()
        self.bad.meta._residency._kept_bytes_max = 0
        self.bad.meta._residency._look_at_s = 0.0
        self.hanging.drop_cache(self.hanging.directory / "d1" / "meta" / "data.mdb")
        await until(lambda: not self.bad.meta.in_memory)


@pytest.fixture
async def node(tmp_path: Path, hanging: HangingDisk) -> AsyncIterator[Node]:
    node = Node(tmp_path, hanging)
    await node.open()
    yield node
    hanging.release()
    await node.disks.close()


def name_of(key: bytes) -> RegisterName:
    return RegisterName(Table.OBJECT, SCOPE, 0, key)


def ballot() -> Ballot:
    return Ballot(1, int(time.time() * 1e6), "gw", b"i" * 8)


async def accept(disk: LocalDisk, key: bytes, body: bytes = b"body", at: Ballot | None = None) -> messages.AcceptReply:
    value = Value(1, b"o" * 16, Visibility.LIVE, body)
    return await disk.replica.accept(messages.Accept(disk.id, name_of(key), at or ballot(), value))


async def accept_copy(disk: LocalDisk, key: bytes, at: Ballot | None = None) -> messages.AcceptReply:
    """Of an object whose copy is synced in its segment before its record is written."""
    made = make(random.Random(key), LARGE, k=1, m=2)
    value = Value(1, b"o" * 16, Visibility.LIVE, b"body", made.id.data_id)
    request = messages.Accept(disk.id, name_of(key), at or ballot(), value, header=encode(made.header))
    return await disk.replica.accept(request, [made.payload])


async def prepare(disk: LocalDisk, key: bytes, at: Ballot | None = None) -> messages.PrepareReply:
    return await disk.replica.prepare(messages.Prepare(disk.id, name_of(key), at or ballot()))


async def read(disk: LocalDisk, key: bytes) -> Value | None:
    reply, _ = await disk.replica.read(messages.Read(disk.id, name_of(key), 1))
    assert reply.verdict == Verdict.OK
    return reply.value


async def fill(disk: LocalDisk, count: int = 300) -> None:
    await asyncio.gather(*(accept(disk, b"k%03d" % number, b"v%03d" % number * 100) for number in range(count)))


class Others:
    """Uses a disk, and the event loop, all the time. ``latest_s``: how late the loop was at worst."""

    def __init__(self, disk: LocalDisk) -> None:
        self.latest_s = 0.0
        self.done = 0
        self._disk = disk
        self._tasks = [asyncio.create_task(work()) for work in (self._tick, self._use)]

    async def _tick(self) -> None:
        while True:
            due = time.monotonic() + 0.01
            await asyncio.sleep(0.01)
            self.latest_s = max(self.latest_s, time.monotonic() - due)

    async def _use(self) -> None:
        while True:
            key = b"%d" % self.done
            assert (await accept(self._disk, key)).verdict == Verdict.OK
            assert (await prepare(self._disk, key)).verdict == Verdict.OK
            made = make(RNG)
            await self._disk.fragments.write(made.header, [made.payload], sync=True)
            assert (await self._disk.fragments.read(made.id, 0, 9)).cells
            self.done += 1

    async def end(self) -> None:
        """Asserts that they went on."""
        for task in self._tasks:
            task.cancel()
        results = await asyncio.gather(*self._tasks, return_exceptions=True)
        assert all(isinstance(result, asyncio.CancelledError) for result in results), results
        assert self.latest_s < GAP_S_MAX
        assert self.done > 3


async def hung(node: Node) -> None:
    await until(lambda: node.bad.health.hung)
    assert await node.states() == ["hung", "ok"]


# --- opening and closing


async def test_a_disk_that_hangs_when_it_is_opened_is_left_out_and_joins_later(
    tmp_path: Path, hanging: HangingDisk
) -> None:
    node = Node(tmp_path, hanging)
    await node.open()
    await fill(node.bad, 20)
    await node.disks.close()
    hanging.drop_cache(hanging.directory / "d1" / "meta" / "data.mdb")
    hanging.hang(OPENS, READS, WRITES, SYNCS)
    began = time.monotonic()
    await node.open(open_s=HANG_S)
    assert time.monotonic() - began < HANG_S + GAP_S_MAX * 5
    assert await node.states() == ["hung", "ok"]
    assert (await accept(node.good, b"k")).verdict == Verdict.OK
    hanging.release()
    await until(lambda: len(node.disks.used) == 2)
    assert await node.states() == ["ok", "ok"]
    assert await read(node.bad, b"k007") is not None
    await node.disks.close()


async def test_a_node_ends_while_a_disk_hangs_and_what_it_acknowledged_is_there_at_the_next_start(
    node: Node, tmp_path: Path
) -> None:
    await fill(node.bad, 20)
    node.hanging.hang(WRITES, SYNCS, SPACE)
    late = asyncio.create_task(accept(node.bad, b"late"))
    await asyncio.sleep(0.05)
    began = time.monotonic()
    await node.disks.close()
    assert time.monotonic() - began < 1.0 + GAP_S_MAX * 5
    assert not late.done()
    node.hanging.release()
    await asyncio.wait((late,), timeout=GUARD_S)
    await asyncio.sleep(0.5)  # its threads give the files back, as they would when the process ends
    late.cancel()


async def test_a_process_ends_while_a_disk_hangs_in_the_write_of_a_large_copy(node: Node) -> None:
    """What is left is cancelled, as ``asyncio.Runner`` does it, and waits for no disk."""
    await fill(node.bad, 20)
    node.hanging.hang(SYNCS, name=".seg")
    before = asyncio.all_tasks()
    accepting = asyncio.create_task(accept_copy(node.bad, b"large"))
    await until(lambda: node.hanging.waiting() > 0)
    await node.disks.close()
    left = asyncio.all_tasks() - before
    assert accepting in left
    for task in left:
        task.cancel()
    _ended, waiting = await asyncio.wait(left, timeout=1.0 + GAP_S_MAX)
    node.hanging.release()
    assert not waiting
    assert not node.bad.replica.pending.by_name
    await asyncio.sleep(0.5)  # its threads give the files back, as they would when the process ends


# --- one kind of operation


async def test_a_read_that_hangs_delays_no_other_disk_and_is_answered_rightly_later(node: Node) -> None:
    await fill(node.bad)
    promised = ballot()
    assert (await prepare(node.bad, b"k001", promised)).verdict == Verdict.OK
    await node.evict()
    others = Others(node.good)
    node.hanging.hang(READS, SPACE)
    asked = asyncio.create_task(prepare(node.bad, b"k001"))
    reading = asyncio.create_task(read(node.bad, b"k002"))
    await hung(node)
    for call in (prepare(node.bad, b"k001"), accept(node.bad, b"k001"), read(node.bad, b"k001")):
        began = time.monotonic()
        with pytest.raises(DiskUnusable, match="hangs"):
            await call
        assert time.monotonic() - began < GAP_S_MAX
    with pytest.raises(DiskUnusable, match="hangs"):
        await asked
    with pytest.raises(DiskUnusable, match="hangs"):
        await reading
    await others.end()
    node.hanging.release()
    await until(lambda: not node.bad.health.hung)
    assert await read(node.bad, b"k002") == Value(1, b"o" * 16, Visibility.LIVE, b"v002" * 100)
    low = promised._replace(counter=promised.counter - 1)
    assert (await prepare(node.bad, b"k001", low)).verdict == Verdict.PREEMPTED, "the promise stands"
    assert (await prepare(node.bad, b"k001")).accepted is not None


async def test_a_write_of_the_redo_log_that_hangs_is_acknowledged_when_it_is_durable(node: Node) -> None:
    await fill(node.bad, 10)
    others = Others(node.good)
    node.hanging.hang(WRITES, SYNCS, name="redo")
    first = asyncio.create_task(accept(node.bad, b"new", b"first"))
    await hung(node)
    assert not first.done()
    with pytest.raises(DiskUnusable, match="redo log"):
        await accept(node.bad, b"other")
    await others.end()
    node.hanging.release()
    assert (await asyncio.wait_for(first, GUARD_S)).verdict == Verdict.OK
    await until(lambda: not node.bad.health.hung)
    found = await read(node.bad, b"new")
    assert found is not None
    assert found.body == b"first"
    assert await node.states() == ["ok", "ok"]
    assert node.bad.health.hung_count == 1


async def test_a_sync_of_fragments_that_hangs_ends_its_barrier_and_refuses_the_next(node: Node) -> None:
    others = Others(node.good)
    made = [make(RNG) for _ in range(3)]
    await node.bad.fragments.write(made[0].header, [made[0].payload], sync=True)
    node.hanging.hang(SYNCS, name=".seg")
    await node.bad.fragments.write(made[1].header, [made[1].payload])
    began = time.monotonic()
    with pytest.raises(DiskUnusable, match="hangs"):
        await node.bad.fragments.sync([made[1].id])
    assert time.monotonic() - began < HANG_S + GAP_S_MAX * 5
    await hung(node)
    with pytest.raises(DiskUnusable, match="hangs"):
        await node.bad.fragments.write(made[2].header, [made[2].payload])
    await others.end()
    node.hanging.release()
    await until(lambda: not node.bad.health.hung)
    await node.bad.fragments.sync([made[1].id])
    assert (await node.bad.fragments.read(made[1].id, 0, 9)).whole == made[1].payload


async def test_a_large_copy_that_hangs_in_its_segment_is_acknowledged_when_it_and_its_record_are_durable(
    node: Node,
) -> None:
    await fill(node.bad, 10)
    node.hanging.hang(SYNCS, name=".seg")
    at = ballot()
    first, again = [asyncio.create_task(accept_copy(node.bad, b"large", at)) for _ in range(2)]
    later = asyncio.create_task(prepare(node.bad, b"large"))
    await hung(node)
    assert not first.done()
    assert not again.done()
    with pytest.raises(DiskUnusable, match="hangs"):
        await accept_copy(node.bad, b"other")
    node.hanging.release()
    assert [reply.copy_synced for reply in await asyncio.wait_for(asyncio.gather(first, again), GUARD_S)] == [True] * 2
    promised = (await asyncio.gather(later, return_exceptions=True))[0]
    assert isinstance(promised, DiskUnusable) or promised.accepted == at
    await until(lambda: not node.bad.health.hung)
    reply, payload = await node.bad.replica.read(messages.Read(node.bad.id, name_of(b"large"), 1, want_payload=True))
    assert (reply.accepted, len(payload)) == (at, LARGE)
    assert await read(node.bad, b"other") is None


async def test_a_checkpoint_that_hangs_loses_nothing_and_delays_no_other_disk(node: Node) -> None:
    await fill(node.bad, 10)
    others = Others(node.good)
    node.hanging.hang(WRITES, SYNCS, name="data.mdb")
    for number in range(10):
        assert (await accept(node.bad, b"n%d" % number)).verdict == Verdict.OK, "the redo log is well"
    await hung(node)
    await others.end()
    node.hanging.release()
    await until(lambda: not node.bad.health.hung)
    await node.bad.meta.checkpoint()
    assert [await read(node.bad, b"n%d" % number) is not None for number in range(10)] == [True] * 10


async def test_a_file_system_that_does_not_say_how_much_is_free_delays_no_status(node: Node) -> None:
    others = Others(node.good)
    node.hanging.hang(SPACE)
    await hung(node)
    for _ in range(3):
        began = time.monotonic()
        assert await node.states() == ["hung", "ok"]
        assert time.monotonic() - began < GAP_S_MAX
    await others.end()
    node.hanging.release()
    await until(lambda: not node.bad.health.hung)


# --- all of it


async def test_a_disk_that_hangs_for_longer_than_all_patience_fills_no_queue(node: Node) -> None:
    await fill(node.bad)
    await node.evict()
    others = Others(node.good)
    node.hanging.hang()
    calls: tuple[Callable[[LocalDisk, bytes], Any], ...] = (prepare, accept, read)
    asked = [asyncio.create_task(calls[number % 3](node.bad, b"k%03d" % (number % 300))) for number in range(600)]
    results = await asyncio.wait_for(asyncio.gather(*asked, return_exceptions=True), GUARD_S)
    assert all(isinstance(result, StoragedError) for result in results)
    await hung(node)
    await asyncio.sleep(HANG_S)
    assert node.bad.meta._threads._jobs.qsize() <= disk_health.JOBS_MAX
    await others.end()
    node.hanging.release()
    await until(lambda: not node.bad.health.hung)
    assert (await accept(node.bad, b"k001", b"again")).verdict == Verdict.OK


async def test_two_disks_that_hang_stop_neither_the_loop_nor_the_status(tmp_path: Path, hanging: HangingDisk) -> None:
    loaded = storage_config(tmp_path)
    for place in ("d1", "d2"):
        (hanging.directory / place).mkdir()
        (tmp_path / place).symlink_to(hanging.directory / place)
    disks = await opener(loaded).open()
    bad = list(disks.used.values())
    hanging.hang()
    writing = [asyncio.create_task(accept(disk, b"k")) for disk in bad]
    latest_s = 0.0
    while not all(disk.health.hung for disk in bad):
        due = time.monotonic() + 0.01
        await asyncio.sleep(0.01)
        latest_s = max(latest_s, time.monotonic() - due)
    assert latest_s < GAP_S_MAX
    assert [status.state for status in await disks.statuses()] == ["hung", "hung"]
    hanging.release()
    assert [reply.verdict for reply in await asyncio.gather(*writing)] == [Verdict.OK] * 2
    await until(lambda: not any(disk.health.hung for disk in bad))
    await disks.close()


async def test_a_slow_disk_is_not_hung_and_delays_no_other(node: Node) -> None:
    await fill(node.bad, 50)
    await node.evict()
    others = Others(node.good)
    node.hanging.slow(0.2)
    assert (await prepare(node.bad, b"k001")).verdict == Verdict.OK
    assert (await accept(node.bad, b"k002")).verdict == Verdict.OK
    found = await read(node.bad, b"k003")
    assert found is not None
    assert found.body == b"v003" * 100
    await until(lambda: node.bad.health.state == disk_health.SLOW)
    assert await node.states() == ["ok", "ok"]
    await others.end()
    node.hanging.release()


async def test_the_kernel_may_drop_pages_and_they_are_read_again_by_a_thread(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A small store is kept in memory."""
    await fill(node.bad)
    await node.bad.meta.checkpoint()
    residency = node.bad.meta._residency
    residency._look_at_s = residency._read_at_s = 0.0
    monkeypatch.setattr(lmdb_file, "REST_S", 0.0)
    node.hanging.drop_cache(node.hanging.directory / "d1" / "meta" / "data.mdb")
    await until(lambda: not residency._missing())
    await until(lambda: node.bad.meta.in_memory)

"""Copies that are durable elsewhere when they come: found at once, appended later, by the event loop or the writer
thread, and durable when ``sync_apart`` says so.
"""

from __future__ import annotations

import asyncio
import copy
import random
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path

import msgspec
import pytest

from storaged.durable import RestartNeeded
from storaged.errors import DiskUnusable, FragmentDamaged, FragmentMissing
from storaged.fragments import deferred as deferred_module
from storaged.fragments import writer_thread
from storaged.fragments.format import KEY_BYTES
from storaged.fragments.limits import StoreLimits
from storaged.fragments.payloads import HEADER_BYTES_MAX, copy_write
from storaged.fragments.ports import FragmentHeader, FragmentId, Health
from storaged.fragments.store import LocalFragmentStore
from storaged.fragments.write import Write
from storaged.fragments.write_queue import Drain
from storaged.meta.names import RegisterName, Table
from storaged.meta.store_ports import StoreBatch
from storaged.node.disks import _own, restore_copies
from storaged.units import GIB, KIB, MIB
from storaged.wire import encode
from tests.doubles.files import SimulatedFiles
from tests.patience import GUARD_S
from tests.suites.meta_store import BUCKET, slot_of
from tests.worlds.disk import LogDisk
from tests.worlds.fragments import DISK, Made, make

RNG = random.Random(23)


class HeldFiles(SimulatedFiles):
    """``hold(kind)``: whatever thread but the event loop's begins with that waits for ``go_on``."""

    def __init__(self) -> None:
        super().__init__()
        self.held = threading.Event()
        self.threads: list[bool] = []
        """Of each write: whether a thread made it."""
        self._kind = ""
        self._open = threading.Event()

    def hold(self, kind: str) -> None:
        self._open.clear()
        self._kind = kind

    def go_on(self) -> None:
        self._kind = ""
        self.held.clear()
        self._open.set()

    def step(self, kind: str) -> None:
        super().step(kind)
        apart = threading.current_thread() is not threading.main_thread()
        if kind == "write":
            self.threads.append(apart)
        if kind == self._kind and apart:
            self.held.set()
            assert self._open.wait(GUARD_S)


@pytest.fixture(autouse=True)
def in_no_hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    """The loop goes on to append although an append takes long: the machine may be busy with something else."""
    monkeypatch.setattr(deferred_module, "SLOW_S", GUARD_S)


@pytest.fixture
def much_later(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is appended but when somebody asks for it, or much has come."""
    monkeypatch.setattr(deferred_module, "DEFER_S", 60.0)


async def opened(directory: Path, files: SimulatedFiles | None = None, **limits: int) -> LocalFragmentStore:
    await asyncio.to_thread(directory.mkdir, exist_ok=True)
    return await LocalFragmentStore.open(
        directory, DISK, files=files, limits=StoreLimits(**{"reserve_bytes": 1, **limits})
    )


def small(length: int = 500, *, created_ms: int = 1000, fragment: FragmentId | None = None) -> Made:
    return make(RNG, length, k=1, m=2, created_ms=created_ms, fragment=fragment)


def keep(store: LocalFragmentStore, *made: Made) -> None:
    writes = [Write.of(one.header, [one.payload]) for one in made]
    assert [store.admit(write) for write in writes] == [None] * len(writes)
    store.keep(writes)


async def append_all(store: LocalFragmentStore) -> None:
    await store._append_deferred()
    assert store._deferred.empty


async def content(store: LocalFragmentStore, made: Made) -> bytes:
    return b"".join(cell for cell in (await store.read(made.id, 0, 1000)).cells if cell is not None)


async def is_there(store: LocalFragmentStore, made: Made) -> bool:
    """Every way to ask says the same."""
    [stat] = await store.stat([made.id])
    if store.find_copy(made.id.data_id) is None:
        assert stat.health == Health.MISSING
        assert store.try_read_copy(made.id.data_id) is None
        with pytest.raises(FragmentMissing):
            await content(store, made)
        return False
    assert store.find_copy(made.id.data_id) == made.id
    assert (stat.health, stat.length) == (Health.OK, len(made.payload))
    assert await content(store, made) == made.payload
    return True


async def eventually(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(GUARD_S):
        while not condition():  # noqa: ASYNC110  (threads, which set no event)
            await asyncio.sleep(0.005)


async def with_a_segment(directory: Path, files: SimulatedFiles, **limits: int) -> LocalFragmentStore:
    """The first one is the thread's to begin; it has, and has nothing to do any more."""
    store = await opened(directory, files, **limits)
    first = small()
    await store.write(first.header, [first.payload])
    with store._engine_lock:
        return store


def durable(files: SimulatedFiles, made: Made) -> bool:
    return any(made.payload in disk.durable for disk in list(files.disks.values()))


# --- found at once

Look = Callable[[LocalFragmentStore, Made], Awaitable[None]]


async def find(store: LocalFragmentStore, made: Made) -> None:
    assert store.find_copy(made.id.data_id) == made.id


async def try_read_copy(store: LocalFragmentStore, made: Made) -> None:
    found = store.try_read_copy(made.id.data_id)
    if found is None:
        assert store._deferred.empty
        if made.payload:
            pytest.skip("this file system can't tell what is in memory")
        return
    assert isinstance(found, memoryview)
    assert found == made.payload


async def peek(store: LocalFragmentStore, made: Made) -> None:
    found = store.try_read(made.id)
    assert found is None or b"".join(cell for cell in found.cells if cell is not None) == made.payload


async def read(store: LocalFragmentStore, made: Made) -> None:
    found = await store.read(made.id, 0, 10)
    assert found.header == made.header
    assert [bytes(cell or b"") for cell in found.cells] == made.cells


async def stat(store: LocalFragmentStore, made: Made) -> None:
    [found] = await store.stat([made.id])
    assert (found.id, found.health, found.length, found.created_ms) == (
        made.id.pack(),
        Health.OK,
        len(made.payload),
        1000,
    )


async def scan(store: LocalFragmentStore, made: Made) -> None:
    assert [header async for header in store.scan()] == [made.header]


async def verify(store: LocalFragmentStore, made: Made) -> None:
    assert (await store.verify(made.id)).health == Health.OK


async def sync(store: LocalFragmentStore, made: Made) -> None:
    await store.sync([made.id])


async def touch(store: LocalFragmentStore, made: Made) -> None:
    [found] = await store.touch([made.id], 7777)
    assert (found.health, found.created_ms) == (Health.OK, 7777)


async def delete(store: LocalFragmentStore, made: Made) -> None:
    assert await store.delete([made.id], created_ms=[999]) == 0
    assert await is_there(store, made)
    assert await store.delete([made.id], created_ms=[1000]) == 1
    assert not await is_there(store, made)
    assert [header async for header in store.scan()] == []


@pytest.mark.parametrize("appended", [False, True])
@pytest.mark.parametrize("length", [0, 500, 9000])
@pytest.mark.parametrize(
    "look", [find, try_read_copy, peek, read, stat, scan, verify, sync, touch, delete], ids=lambda look: look.__name__
)
async def test_a_kept_copy_is_found_at_once_and_after_it_was_appended(
    tmp_path: Path, much_later: None, look: Look, length: int, appended: bool
) -> None:
    store = await opened(tmp_path)
    made = small(length)
    keep(store, made)
    if appended:
        await append_all(store)
    await look(store, made)
    await store.close()
    store = await opened(tmp_path)
    assert await is_there(store, made) == (look is not delete)
    await store.close()


async def test_what_was_deleted_after_it_was_kept_stays_deleted(tmp_path: Path, much_later: None) -> None:
    """In whatever moment: just kept, on its way, appended; alone and among others."""
    files = HeldFiles()
    store = await opened(tmp_path, files)
    gone, stays = [small() for _ in range(6)], [small() for _ in range(6)]
    keep(store, gone[0], stays[0])
    deletes = [asyncio.ensure_future(store.delete([gone[0].id]))]
    keep(store, gone[1], stays[1])
    deletes.append(asyncio.ensure_future(store.delete([gone[1].id, bytes_id()])))
    assert await asyncio.gather(*deletes) == [1, 1]
    files.hold("write")
    keep(store, gone[2], gone[3], stays[2])
    store._deferred.append_in_thread()
    await asyncio.to_thread(files.held.wait, GUARD_S)
    keep(store, stays[3], gone[4])
    late = asyncio.ensure_future(store.delete([made.id for made in gone[2:5]]))
    keep(store, stays[4])
    await asyncio.sleep(0.01)
    assert not late.done()
    files.go_on()
    assert await late == 3
    keep(store, gone[5], stays[5])
    await append_all(store)
    assert await store.delete([gone[5].id]) == 1
    for _ in range(2):
        assert [await is_there(store, made) for made in gone] == [False] * 6
        assert [await is_there(store, made) for made in stays] == [True] * 6
        await store.close()
        store = await opened(tmp_path, files)
    await store.close()


def bytes_id() -> FragmentId:
    """One that the disk never had."""
    return small().id


async def test_what_is_kept_again_after_it_was_deleted_is_there(tmp_path: Path, much_later: None) -> None:
    store = await opened(tmp_path)
    made = small()
    for _ in range(3):
        keep(store, made)
        assert await store.delete([made.id]) == 1
        keep(store, made)
        assert await is_there(store, made)
        assert await store.delete([made.id]) == 1
    keep(store, made)
    await store.close()
    store = await opened(tmp_path)
    assert await is_there(store, made)
    await store.close()


async def test_of_one_fragment_that_is_kept_twice_or_also_written_the_last_counts(
    tmp_path: Path, much_later: None
) -> None:
    store = await opened(tmp_path)
    first = small(created_ms=1)
    second, third = small(700, created_ms=2, fragment=first.id), small(900, created_ms=3, fragment=first.id)
    keep(store, first, second)
    found = store.try_read_copy(first.id.data_id)
    assert found == second.payload
    assert await content(store, second) == second.payload
    keep(store, first)
    await store.write(third.header, [third.payload])
    assert await is_there(store, third)
    assert [header.created_ms async for header in store.scan()] == [3]
    await store.close()


async def test_one_fragment_twice_among_what_is_appended_at_once_counts_once(tmp_path: Path, much_later: None) -> None:
    store = await opened(tmp_path)
    keep(store, small())
    await append_all(store)  # there is room for more after it
    first = small(created_ms=1)
    second = small(700, created_ms=2, fragment=first.id)
    keep(store, first, second)
    await append_all(store)
    assert await is_there(store, second)
    usage = await store.usage()
    assert usage.fragments == 2
    assert usage.garbage_bytes >= len(first.payload)
    await store.close()


async def test_a_copy_in_pieces_is_told_as_one(tmp_path: Path, much_later: None) -> None:
    store = await opened(tmp_path)
    made = small(9000)
    store.keep([Write.of(made.header, [made.payload[:10], made.payload[10:5000], b"", made.payload[5000:]])])
    assert store.try_read_copy(made.id.data_id) == made.payload
    assert await is_there(store, made)
    await store.close()


async def test_what_is_no_whole_copy_is_found_as_what_it_is(tmp_path: Path, much_later: None) -> None:
    store = await opened(tmp_path)
    made = make(RNG, 4112)
    keep(store, made)
    assert store.find_copy(made.id.data_id) is None
    assert store.try_read_copy(made.id.data_id) is None
    assert await content(store, made) == made.payload
    await store.close()


# --- appended later


async def test_what_was_kept_is_appended_by_itself_and_its_bytes_are_given_back(tmp_path: Path) -> None:
    files = HeldFiles()
    store = await opened(tmp_path, files)
    made = [small() for _ in range(3)]
    keep(store, *made)
    assert store.statistics().writes == 0
    await eventually(lambda: store._deferred.empty and not store._deferred.copies)
    assert store.statistics().writes == 3
    assert [await is_there(store, one) for one in made] == [True] * 3
    await store.close()


async def test_many_are_appended_by_the_loop_at_once(tmp_path: Path, much_later: None) -> None:
    files = HeldFiles()
    store = await with_a_segment(tmp_path, files)
    files.threads.clear()
    made = [small() for _ in range(deferred_module.DEFER_WRITES_MAX * 3)]
    for one in made:
        keep(store, one)
    assert files.threads == [False] * 3
    assert store._deferred.empty
    large = [small(200 * KIB) for _ in range(3)]
    keep(store, *large[:2])
    assert len(files.threads) == 3
    keep(store, large[2])
    assert files.threads == [False] * 4
    assert [await is_there(store, one) for one in made + large] == [True] * len(made + large)
    await store.close()


async def test_the_thread_appends_what_would_hold_the_loop_up(
    tmp_path: Path, much_later: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where there is no segment, or it has no room for them: one has to be synced. For a while after a write to the
    page cache was slow.
    """
    monkeypatch.setattr(deferred_module, "DEFER_WRITES_MAX", 2)
    files = HeldFiles()
    store = await opened(tmp_path, files, segment_bytes=64 * KIB)

    async def two(length: int = 500) -> list[bool]:
        """Of each write: whether the thread made it."""
        with store._engine_lock:
            files.threads.clear()
        made = [small(length), small(length)]
        keep(store, *made)
        await eventually(lambda: store._deferred.empty)
        assert [await is_there(store, one) for one in made] == [True, True]
        return files.threads

    assert await two() == [True, True], "a segment, and what is in it"
    assert await two(15_000) == [False]
    assert await two(15_000) == [False]
    assert await two(15_000) == [True, True], "the next segment"
    monkeypatch.setattr(deferred_module, "SLOW_S", -1.0)
    assert await two() == [False]
    monkeypatch.setattr(deferred_module, "SLOW_S", GUARD_S)
    assert await two() == [True], "for a while"
    store._deferred._slow_until_s = 0.0
    assert await two() == [False]
    await store.close()


async def test_while_the_thread_is_busy_the_loop_waits_for_nothing_and_what_came_is_appended_afterwards(
    tmp_path: Path, much_later: None
) -> None:
    """A large write is being synced; the disk takes its time."""
    files = HeldFiles()
    store, large = await with_a_segment(tmp_path, files), make(RNG, 4 * MIB, cell_bytes=64 * KIB)
    files.hold("sync")
    writing = asyncio.ensure_future(store.write(large.header, [large.payload], sync=True))
    await asyncio.to_thread(files.held.wait, GUARD_S)
    made = []
    for number in range(5 * deferred_module.DEFER_WRITES_MAX):
        made.append(small())
        keep(store, made[-1])
        assert store.try_read_copy(made[-1].id.data_id) == made[-1].payload
        if number % 7 == 0:
            await asyncio.sleep(0)
    assert files.held.is_set(), "it is still at it"
    assert not writing.done()
    assert [store.find_copy(one.id.data_id) for one in made] == [one.id for one in made]
    files.go_on()
    await asyncio.wait_for(writing, GUARD_S)
    await eventually(lambda: store._deferred.empty)
    assert [await is_there(store, one) for one in made] == [True] * len(made)
    assert await content(store, large) == large.payload
    await store.close()


@pytest.mark.parametrize("by", ["what was written", "time"])
async def test_the_overlay_of_the_index_is_checkpointed_also_where_the_loop_appends_everything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by: str
) -> None:
    monkeypatch.setattr(deferred_module, "DEFER_WRITES_MAX", 4)
    monkeypatch.setattr(deferred_module, "DEFER_S", 0.01 if by == "time" else 60)
    files = HeldFiles()
    writeback_bytes = GIB if by == "time" else 8 * KIB
    store = await with_a_segment(
        tmp_path, files, overlay_entries_max=32, writeback_bytes=writeback_bytes, replay_bytes_max=GIB
    )
    files.threads.clear()
    made = [small() for _ in range(400)]
    for number, one in enumerate(made):
        keep(store, one)
        if number % 4 == 3:
            await asyncio.sleep(0.001)
    await eventually(lambda: store.statistics().overlay_entries < 32 and store._writer._checkpoint is None)
    assert store.statistics().checkpoints >= 2
    assert files.threads.count(False) >= 50, "mostly the loop"
    assert [await is_there(store, one) for one in made[::17]] == [True] * len(made[::17])
    await store.close()


@pytest.mark.parametrize("where", ["just kept", "many", "on its way"])
async def test_close_appends_what_was_kept(tmp_path: Path, much_later: None, where: str) -> None:
    files = HeldFiles()
    store = await opened(tmp_path, files)
    made = [small() for _ in range(100 if where == "many" else 3)]
    if where == "on its way":
        files.hold("write")
    keep(store, *made)
    if where == "on its way":
        store._deferred.append_in_thread()
        await asyncio.to_thread(files.held.wait, GUARD_S)
        made.append(small())
        keep(store, made[-1])
    closing = asyncio.ensure_future(store.close())
    await asyncio.sleep(0)
    files.go_on()
    await asyncio.wait_for(closing, GUARD_S)
    files.crash()
    store = await opened(tmp_path, files)
    assert store.report.records == 0
    assert [await is_there(store, one) for one in made] == [True] * len(made)
    await store.close()


# --- durable when it is said


async def after_power(files: SimulatedFiles, place: Path, seed: int) -> LocalFragmentStore:
    """The disk as it comes back when the power fails now: with any of what was not synced."""
    left = SimulatedFiles(seed)
    left.disks = copy.deepcopy(files.disks)
    left.crash()
    return await opened(place, left)


@pytest.mark.parametrize("by", ["nobody yet", "the loop", "the thread"])
async def test_what_was_kept_is_durable_when_it_was_synced_apart(tmp_path: Path, much_later: None, by: str) -> None:
    files = HeldFiles()
    (tmp_path / "before").mkdir()
    store = await with_a_segment(tmp_path / "before", files)
    made = [small() for _ in range(40 if by == "the loop" else 5)]
    for one in made:
        keep(store, one)
    if by == "the thread":
        await append_all(store)
    await asyncio.to_thread(store.sync_apart)
    for seed in range(4):
        found = await after_power(files, tmp_path / f"{seed}", seed)
        assert [await is_there(found, one) for one in made] == [True] * len(made)
        assert found.report.gaps == []
        await found.close()
    await store.close()


async def test_a_sync_apart_waits_for_what_the_thread_is_appending(tmp_path: Path, much_later: None) -> None:
    """It has taken them, and the segment does not have them yet."""
    files = HeldFiles()
    store, made = await with_a_segment(tmp_path, files), small()
    files.hold("write")
    keep(store, made)
    store._deferred.append_in_thread()
    await asyncio.to_thread(files.held.wait, GUARD_S)
    syncing = asyncio.ensure_future(asyncio.to_thread(store.sync_apart))
    await asyncio.sleep(0.1)
    assert not syncing.done()
    files.go_on()
    await asyncio.wait_for(syncing, GUARD_S)
    assert durable(files, made)
    await store.close()


async def test_a_sync_apart_waits_for_what_the_loop_is_appending(
    tmp_path: Path, much_later: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deferred_module, "DEFER_WRITES_MAX", 1)
    files = HeldFiles()
    store, made = await with_a_segment(tmp_path, files), small()
    syncing: list[threading.Thread] = []
    step = files.step

    def begun(kind: str) -> None:
        if kind == "write" and not syncing:
            syncing.append(threading.Thread(target=store.sync_apart))
            syncing[0].start()
            syncing[0].join(0.1)
            assert syncing[0].is_alive()
        step(kind)

    monkeypatch.setattr(files, "step", begun)
    keep(store, made)
    assert store._deferred.empty
    await asyncio.to_thread(syncing[0].join, GUARD_S)
    assert durable(files, made)
    await store.close()


async def test_a_sync_apart_of_nothing_does_not_wait_for_a_store_that_is_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = HeldFiles()
    store = await opened(tmp_path, files)
    made = small()
    keep(store, made)
    await store.close()
    waits: list[float] = []
    wait = threading.Event.wait

    def noted(event: threading.Event, timeout: float = GUARD_S) -> bool:
        waits.append(timeout)
        return wait(event, timeout)

    with monkeypatch.context() as patched:
        patched.setattr(threading.Event, "wait", noted)
        store.sync_apart()  # in this thread, where nothing else waits meanwhile
        assert not waits
        store._writer.drain()  # as when something was pending until just now
    assert waits
    assert not any(waits)
    assert durable(files, made)


async def test_a_sync_apart_that_meets_the_end_of_the_store_is_answered(tmp_path: Path, much_later: None) -> None:
    files = HeldFiles()
    store = await opened(tmp_path, files)
    made = small()
    keep(store, made)
    files.hold("sync")
    syncing = [asyncio.ensure_future(asyncio.to_thread(store.sync_apart)) for _ in range(3)]
    await asyncio.to_thread(files.held.wait, GUARD_S)
    closing = asyncio.ensure_future(store.close())
    await asyncio.sleep(0.02)
    syncing.append(asyncio.ensure_future(asyncio.to_thread(store.sync_apart)))
    files.go_on()
    async with asyncio.timeout(GUARD_S):
        await asyncio.gather(closing, *syncing)
    assert durable(files, made)


# --- no room, and disks that fail


async def test_what_was_kept_and_finds_no_room_is_an_error_of_the_sync_until_there_is_room(
    tmp_path: Path, much_later: None
) -> None:
    files = SimulatedFiles()
    store = await opened(tmp_path, files)
    first, made = small(), [small(3000) for _ in range(3)]
    await store.write(first.header, [first.payload], sync=True)
    keep(store, *made)
    files.limit = files.used + 4000  # for one of them
    for _ in range(2):
        with pytest.raises(RestartNeeded, match="no room"):
            await asyncio.to_thread(store.sync_apart)
        assert [store.try_read_copy(one.id.data_id) for one in made if not durable(files, one)] == [
            one.payload for one in made if not durable(files, one)
        ]
    assert (await store.usage()).state == "full", "not read-only"
    files.limit = 0
    await asyncio.to_thread(store.sync_apart)
    assert [durable(files, one) for one in made] == [True] * 3
    assert [await is_there(store, one) for one in made] == [True] * 3
    assert store._deferred.empty
    await store.close()


def name_of(number: int) -> RegisterName:
    return RegisterName(Table.OBJECT, BUCKET, 0, b"%d" % number)


async def accept(disk: LogDisk, number: int, made: Made) -> bool:
    """A record with its copy; whether both were acknowledged."""
    told: asyncio.Future[bool] = asyncio.get_running_loop().create_future()

    def done(refusal: Exception | None, error: Exception | None) -> None:
        told.set_result(refusal is None and error is None)

    disk.copies.keep(encode(made.header), [made.payload], StoreBatch([slot_of(name_of(number), number)]), done)
    async with asyncio.timeout(GUARD_S):
        return await told


async def all_there(disk: LogDisk, made: list[Made]) -> None:
    for number, one in enumerate(made):
        assert disk.meta.get(name_of(number)) == slot_of(name_of(number), number)
        assert await is_there(disk.fragments, one)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "fragments").mkdir()
    return tmp_path


async def reopened(disk: LogDisk, place: Path, *, close: bool = True) -> LogDisk:
    if close:
        await disk.close()
    found = await LogDisk.opened(place, files=disk.files)
    await restore_copies(found.meta, found.fragments)
    return found


@pytest.mark.parametrize("noticed", ["by a checkpoint", "when it is closed"])
async def test_copies_without_room_end_the_records_store_until_it_is_opened_again_with_room_and_none_is_lost(
    place: Path, much_later: None, noticed: str
) -> None:
    disk = await LogDisk.opened(place)
    assert disk.files is not None
    made = [small(3000) for _ in range(4)]
    assert await accept(disk, 0, made[0])
    await disk.meta.checkpoint()
    for number in (1, 2, 3):
        assert await accept(disk, number, made[number])
    disk.files.limit = disk.files.used + 4000
    if noticed == "by a checkpoint":
        await disk.meta.checkpoint()
        statistics = disk.meta.statistics()
        assert (statistics.state, statistics.checkpoints) == ("read-only", 1)
        assert "no room" in statistics.reason
        assert not await accept(disk, 4, small())
        assert [disk.copies.peek(one.id.data_id) for one in made[2:]] == [one.payload for one in made[2:]]
    await disk.close()
    assert not await asyncio.to_thread((place / "meta" / "failed").exists)
    disk.files.limit = 0
    disk = await reopened(disk, place, close=False)
    await all_there(disk, made)
    await disk.meta.checkpoint()
    assert disk.meta.statistics().state == "ok"
    assert disk.meta.restorable() == []
    disk = await reopened(disk, place)
    assert disk.meta.restorable() == []
    await all_there(disk, made)
    await disk.close()


async def test_copies_without_room_are_appended_as_soon_as_there_is_some(place: Path, much_later: None) -> None:
    disk = await LogDisk.opened(place)
    assert disk.files is not None
    made = [small(3000) for _ in range(4)]
    for number, one in enumerate(made):
        assert await accept(disk, number, one)
    disk.files.limit = disk.files.used + 4000
    await disk.meta.checkpoint()
    assert disk.meta.statistics().state == "read-only"
    disk.files.limit = 0
    await disk.meta.checkpoint()
    assert disk.meta.statistics().state == "ok"
    assert await accept(disk, 4, small())
    await all_there(disk, made)
    disk = await reopened(disk, place)
    await all_there(disk, made)
    await disk.close()


async def test_what_a_disk_holds_counts_for_nothing_once_a_sync_failed_and_can_be_read(
    place: Path, much_later: None
) -> None:
    disk = await LogDisk.opened(place)
    one = small(3000)
    assert await accept(disk, 0, one)
    await disk.meta.checkpoint()
    (stat,) = await disk.fragments.stat([one.id])
    assert stat.health == Health.OK
    disk.fragments._engine.state.fail("fdatasync of segment 1: Input/output error")
    (stat,) = await disk.fragments.stat([one.id])
    assert stat.health == Health.DAMAGED
    assert (await disk.fragments.read(one.id, 0, 10)).whole is not None
    disk = await reopened(disk, place)
    (stat,) = await disk.fragments.stat([one.id])
    assert stat.health == Health.DAMAGED, "no restart ends that"
    await disk.close()


async def test_copies_that_a_disk_did_not_take_any_more_come_back_where_a_restart_ends_its_trouble(
    place: Path, much_later: None
) -> None:
    """It became read-only between the acknowledgement and the append, and what it holds is believed after a restart."""
    disk = await LogDisk.opened(place)
    made = [small() for _ in range(3)]
    assert await accept(disk, 0, made[0])
    await disk.meta.checkpoint()
    for number in (1, 2):
        assert await accept(disk, number, made[number])
    disk.fragments._engine.state.fail("checkpoint of the fragment index: its map is full", lasting=False)
    await disk.meta.checkpoint()
    assert [disk.copies.peek(one.id.data_id) for one in made[1:]] == [one.payload for one in made[1:]]
    assert disk.meta.statistics().state == "read-only"
    await disk.close()
    assert not await asyncio.to_thread((place / "meta" / "failed").exists)
    disk = await reopened(disk, place, close=False)
    await all_there(disk, made)
    await disk.meta.checkpoint()
    assert disk.meta.statistics().state == "ok"
    await disk.close()


async def test_a_mistake_while_copies_are_appended_loses_none(
    place: Path, much_later: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = await LogDisk.opened(place)
    made = [small() for _ in range(3)]
    for number, one in enumerate(made):
        assert await accept(disk, number, one)

    def mistaken(*_arguments: object, **_named: object) -> None:
        raise RuntimeError("a mistake")

    with monkeypatch.context() as patch:
        patch.setattr(disk.fragments._engine, "append", mistaken)
        await disk.meta.checkpoint()
    assert (await disk.fragments.usage()).state == "read-only"
    assert disk.meta.statistics().state == "read-only"
    disk = await reopened(disk, place)
    await all_there(disk, made)
    await disk.close()


@pytest.mark.parametrize("when", ["before", "then"])
async def test_copies_on_a_disk_that_failed_for_good_count_as_lost_there(
    place: Path, much_later: None, when: str
) -> None:
    """Its fragments are no longer asked for; the records are: they must not fail with it."""
    disk = await LogDisk.opened(place)
    assert disk.files is not None
    made = [small(), small()]
    assert await accept(disk, 0, made[0])
    await disk.meta.checkpoint()
    assert await accept(disk, 1, made[1])
    if when == "before":
        disk.fragments._engine.state.fail("fdatasync: Input/output error")
    else:
        disk.files.fail["write"] = 0
    await disk.meta.checkpoint()
    await asyncio.sleep(0)
    statistics = disk.meta.statistics()
    assert (statistics.state, statistics.checkpoints) == ("ok", 2)
    assert disk.fragments.find_copy(made[1].id.data_id) is None
    assert disk.files.failed
    await disk.close()


async def test_nothing_is_written_to_a_store_that_is_closed(tmp_path: Path, much_later: None) -> None:
    """However much comes: its segment may be another process's by then. Who has it keeps it."""
    files = HeldFiles()
    store = await with_a_segment(tmp_path, files)
    await store.close()
    left = copy.deepcopy(files.disks)
    store.keep([write_of(small()) for _ in range(2 * deferred_module.DEFER_WRITES_MAX)])
    with pytest.raises(RestartNeeded):
        await asyncio.to_thread(store.sync_apart)
    assert files.disks == left


async def test_who_syncs_a_store_that_is_closed_is_answered_without_a_wait(
    tmp_path: Path, much_later: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that was full when its node stopped asks more than once, and waited a second each time."""
    waits: list[float] = []

    class Waiting(Drain):
        def __init__(self) -> None:
            super().__init__()
            wait = self.event.wait
            self.event.wait = lambda timeout: waits.append(timeout) or wait(timeout)  # type: ignore[assignment]

    store = await opened(tmp_path, SimulatedFiles())
    await store.close()
    store.keep([write_of(small())])
    monkeypatch.setattr(writer_thread, "Drain", Waiting)
    with pytest.raises(RestartNeeded):
        await asyncio.to_thread(store.sync_apart)
    assert not any(waits)


async def test_what_comes_after_the_fragment_store_was_closed_stays_in_the_redo_log(
    place: Path, much_later: None
) -> None:
    """A group that was under way while a node closed its disk."""
    disk = await LogDisk.opened(place)
    made = [small(), small()]
    assert await accept(disk, 0, made[0])
    disk.hold()
    accepting = asyncio.ensure_future(accept(disk, 1, made[1]))
    await disk.held.wait()
    await disk.fragments.close()
    disk.go_on()
    assert await accepting
    disk = await reopened(disk, place)
    await all_there(disk, made)
    await disk.close()


# --- refused


def write_of(made: Made) -> Write:
    return Write.of(made.header, [made.payload])


async def test_a_copy_that_is_not_what_its_hash_says_is_refused(tmp_path: Path) -> None:
    store = await opened(tmp_path)
    made = small()
    refusal = store.admit(Write.of(made.header, [bytes(len(made.payload))]))
    assert isinstance(refusal, FragmentDamaged)
    assert store.admit(write_of(made)) is None
    await store.close()


async def test_a_closed_store_refuses_copies(tmp_path: Path) -> None:
    store = await opened(tmp_path)
    assert store.admit(write_of(small())) is None
    closing = asyncio.ensure_future(store.close())
    await asyncio.sleep(0)
    refusal = store.admit(write_of(small()))
    assert isinstance(refusal, DiskUnusable)
    assert "closed" in refusal.message
    await closing
    assert isinstance(store.admit(write_of(small())), DiskUnusable)


async def test_a_read_only_disk_refuses_copies_at_once(tmp_path: Path) -> None:
    store = await opened(tmp_path)
    assert store.admit(write_of(small())) is None
    store._engine.state.fail("a reason", lasting=False)
    refusal = store.admit(write_of(small()))
    assert isinstance(refusal, DiskUnusable)
    assert (refusal.details["state"], "a reason" in refusal.message) == ("read-only", True)
    await store.close()


async def test_a_full_disk_refuses_copies_and_counts_those_that_are_not_appended_yet(
    tmp_path: Path, much_later: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A later look would count as free what is not appended yet.
    monkeypatch.setattr(deferred_module, "SPACE_LOOK_S", 1e9)
    files = SimulatedFiles()
    files.limit = 2 * MIB
    store = await opened(tmp_path, files, reserve_bytes=MIB, note_reserve_bytes=64 * KIB)
    first = small()
    await store.write(first.header, [first.payload])  # a segment, and the reserve for notes
    spare = files.free - MIB
    made: list[Made] = []
    with store._engine_lock:  # nothing is appended meanwhile
        while True:
            one = small(spare // 20)
            refusal = store.admit(write_of(one))
            if refusal is not None:
                break
            store.keep([write_of(one)])
            made.append(one)
    assert 18 <= len(made) <= 20
    assert not store._deferred.empty, "not all is appended"
    assert isinstance(refusal, DiskUnusable)
    assert refusal.details["state"] == "full"
    assert (await store.usage()).state == "full"
    await append_all(store)
    assert await store.delete([one.id for one in made]) == len(made)
    files.used -= len(made) * (spare // 20)  # the holes
    assert store.admit(write_of(small())) is None
    await store.close()


async def test_how_much_is_free_is_asked_now_and_then_and_when_much_has_come(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = SimulatedFiles()
    files.limit = 64 * MIB
    store = await opened(tmp_path, files, reserve_bytes=0, note_reserve_bytes=0)
    looks, space = 0, files.space

    def asked() -> object:
        nonlocal looks
        looks += 1
        return space()

    monkeypatch.setattr(files, "space", asked)
    monkeypatch.setattr(deferred_module, "SPACE_LOOK_S", 60)
    for _ in range(64):
        assert store.admit(write_of(small(8 * KIB))) is None
    assert looks == 1
    for _ in range(64 * 3):
        assert store.admit(write_of(small(8 * KIB))) is None
    assert 2 <= looks <= 4, "a MiB each: the 64th part of what is free"
    files.limit = files.used + 1
    store._deferred._space_due_s = 0.0  # as when the time has come
    refusal = store.admit(write_of(small()))
    assert isinstance(refusal, DiskUnusable)
    assert refusal.details["state"] == "full"
    await store.close()


def test_a_copy_is_kept_in_bytes_of_its_own_unless_they_are() -> None:
    whole = bytes(100)
    assert _own(whole) is whole
    alone = memoryview(whole)
    assert _own(alone) is alone
    part = _own(memoryview(b"a message with several copies")[10:14])
    assert part == b"with"
    assert isinstance(part, bytes)
    assert isinstance(_own(memoryview(bytearray(whole))), bytes)


def test_a_header_that_is_not_encoded_as_ours_is_encoded_anew() -> None:
    header = FragmentHeader(bytes(KEY_BYTES), b"owner", b"", (), 4096, 4, 1)
    ours = encode(header)
    assert copy_write(ours, [b"data"]).message is ours
    other = ours[:1] + b"\xc5" + KEY_BYTES.to_bytes(2, "big") + ours[3:]
    assert copy_write(other, [b"data"]).message == ours
    longer = msgspec.msgpack.encode([*msgspec.msgpack.decode(ours), bytes(HEADER_BYTES_MAX)])
    assert copy_write(longer, [b"data"]).message == ours

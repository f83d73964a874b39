"""A disk's records and small copies, at every kind of moment: none that was acknowledged is lost while its record is
there, and no record comes without its copy.

A seed makes a history of one disk: copies that come with their records, some of them deleted or touched, fragments
beside them, checkpoints that are held up in the middle, a disk that has no room for a while, one that takes no writes
until it is opened again; and its ends: it is closed, or the process is killed (then what is in the page cache stays),
or the power fails (then sectors that were not synced are there or are not). STORAGED_SIM_SEEDS=N runs more of them; a
failure names its seed.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import os
import random
import shutil
import threading
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from storaged.errors import DiskUnusable, StoragedError
from storaged.fragments import deferred as deferred_module
from storaged.fragments.deferred import DeferredCopies
from storaged.fragments.log import SegmentLog
from storaged.fragments.ports import Health
from storaged.fragments.store import LocalFragmentStore
from storaged.meta.names import RegisterName, Table
from storaged.meta.storage import redo
from storaged.meta.storage import write_queue as record_queue
from storaged.meta.storage.lmdb_store import LmdbMetaStore
from storaged.meta.storage.redo import PAGE_BYTES
from storaged.meta.store_ports import StoreBatch
from storaged.node import disks
from storaged.units import KIB
from storaged.wire import encode
from tests.doubles.files import SimulatedFiles
from tests.suites.meta_store import BUCKET, slot_of
from tests.worlds.disk import LogDisk
from tests.worlds.fragments import Made, in_memory, make

SEEDS = int(os.environ.get("STORAGED_SIM_SEEDS", "40"))
LIMITS = {
    "segment_bytes": 64 * KIB,
    "overlay_entries_max": 12,
    "replay_bytes_max": 160 * KIB,
    "reserve_bytes": 0,
    "note_reserve_bytes": 0,
    "writeback_bytes": 8 * KIB,
}
STEPS, LIVES = 25, 4


@contextlib.contextmanager
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Everything that is bounded meets its bound: halves of 16 pages, groups and appends of a few copies."""
    with monkeypatch.context() as patch:
        patch.setattr(redo, "HALF_BYTES", 16 * PAGE_BYTES)
        patch.setattr(record_queue, "GROUP_BYTES_MAX", 4 * PAGE_BYTES)
        patch.setattr(deferred_module, "DEFER_S", 0.004)
        patch.setattr(deferred_module, "DEFER_WRITES_MAX", 5)
        patch.setattr(deferred_module, "DEFER_BYTES_MAX", 8 * KIB)
        yield


class HeldCheckpoint:
    """What a checkpoint does about copies, held up ``before`` or after it until ``go_on``."""

    def __init__(self, sync_copies: Callable[[], None], *, before: bool) -> None:
        self.reached = threading.Event()
        self._go_on = threading.Event()
        self._sync_copies = sync_copies
        self._before = before

    def __call__(self) -> None:
        if self._before:
            self._wait()
        self._sync_copies()
        if not self._before:
            self._wait()

    def _wait(self) -> None:
        self.reached.set()
        assert self._go_on.wait(10)

    def go_on(self) -> None:
        self._go_on.set()


class World:
    def __init__(self, seed: int, directory: Path) -> None:
        self.rng = random.Random(seed)
        self.directory = directory
        self.files = SimulatedFiles(seed)
        self.lives = 0
        self.count = 0
        self.acknowledged: dict[int, Made] = {}
        """By the number of their register, those that were not deleted."""
        self.asked: dict[int, Made] = {}
        """What may be there or not."""
        self.deleted: set[int] = set()
        self.held: HeldCheckpoint | None = None
        self.seen: Counter[str] = Counter()

    @property
    def place(self) -> Path:
        return self.directory / str(self.lives)

    async def start(self) -> None:
        self.held = None
        (self.place / "fragments").mkdir(parents=True, exist_ok=True)
        self.disk = await LogDisk.opened(self.place, files=self.files, direct=self.rng.random() < 0.5, **LIMITS)
        self.seen["restored"] += len(self.disk.meta.restorable())
        await disks.restore_copies(self.disk.meta, self.disk.fragments)
        assert not self.disk.fragments.report.gaps, "damage on a sound disk"

    # --- what may happen

    async def keep(self) -> None:
        for _ in range(self.rng.randint(1, 7)):
            made = make(self.rng, self.rng.choice([1, 40, 700, 3000]), k=1, m=2)
            number = self.count = self.count + 1
            self.asked[number] = made
            slot = slot_of(RegisterName(Table.OBJECT, BUCKET, 0, b"%d" % number), number)
            self.disk.copies.keep(
                encode(made.header), [made.payload], StoreBatch([slot]), partial(self.told, self.lives, number)
            )
            if self.rng.random() < 0.3:
                await asyncio.sleep(0)

    def told(self, life: int, number: int, refusal: StoragedError | None, error: StoragedError | None) -> None:
        if life == self.lives and refusal is None and error is None:
            self.acknowledged[number] = self.asked.pop(number)

    async def a_while(self) -> None:
        await asyncio.sleep(self.rng.choice([0, 0, 0.001, 0.003, 0.01]))

    async def write(self) -> None:
        made = make(self.rng, self.rng.choice([700, 20_000]))
        with contextlib.suppress(DiskUnusable):
            await self.disk.fragments.write(made.header, [made.payload], sync=self.rng.random() < 0.5)

    async def delete(self) -> None:
        if not self.acknowledged:
            return
        number = self.rng.choice(list(self.acknowledged))
        made = self.acknowledged.pop(number)
        self.deleted.add(number)
        with contextlib.suppress(DiskUnusable):
            if await self.disk.fragments.delete([made.id]):
                assert self.disk.fragments.find_copy(made.id.data_id) is None
                self.seen["deleted"] += 1

    async def touch(self) -> None:
        chosen = self.rng.sample(list(self.acknowledged.values()), min(2, len(self.acknowledged)))
        with contextlib.suppress(DiskUnusable):
            await self.disk.fragments.touch([made.id for made in chosen], self.rng.randint(1, 9999))

    async def checkpoint(self) -> None:
        if self.held is not None:
            self.go_on()
        await self.disk.meta.checkpoint()

    async def begin_checkpoint(self) -> None:
        if self.held is not None:
            self.go_on()
            return
        meta = self.disk.meta
        self.held = HeldCheckpoint(meta.hooks.sync_copies, before=self.rng.random() < 0.5)
        meta.hooks.sync_copies = self.held
        running = asyncio.ensure_future(meta.checkpoint())
        while not (self.held.reached.is_set() or running.done()):
            await asyncio.wait([running], timeout=0.001)
        self.seen["held"] += self.held.reached.is_set()

    def go_on(self) -> None:
        if self.held is not None:
            self.disk.meta.hooks.sync_copies = self.disk.fragments.sync_apart
            self.held.go_on()
            self.held = None

    async def full(self) -> None:
        self.files.limit = self.files.used + self.rng.choice([1, 400, 5000])

    async def room(self) -> None:
        self.files.limit = 0

    async def trouble(self) -> None:
        self.disk.fragments._engine.state.fail("the index could not be checkpointed", lasting=False)

    async def look(self) -> None:
        """Each is found; one is read as a replica reads it."""
        for made in self.acknowledged.values():
            assert self.disk.fragments.find_copy(made.id.data_id) == made.id
        if self.acknowledged:
            await self.is_there(self.rng.choice(list(self.acknowledged)))

    async def act(self) -> None:
        acts: dict[Callable[[], Awaitable[None]], int] = {
            self.keep: 12, self.a_while: 8, self.write: 3, self.delete: 3, self.touch: 1, self.checkpoint: 2, self.begin_checkpoint: 3,  # noqa: E501
            self.full: 1, self.room: 1, self.trouble: 1 if self.rng.random() < 0.2 else 0, self.look: 4,
        }  # fmt: skip
        [act] = self.rng.choices(list(acts), list(acts.values()))
        await act()

    # --- ends

    async def end(self) -> None:
        how = self.rng.choice(["close", "kill", "power"])
        meta, fragments = self.disk.meta, self.disk.fragments
        self.seen[how] += 1
        self.seen["read-only"] += meta.statistics().state != "ok"
        self.seen["on their way"] += len(self.asked)
        self.seen["not appended"] += len(fragments._deferred._by_key)
        if how == "close":
            self.go_on()
            await self.disk.close()
            await asyncio.to_thread(self.place.rename, self.directory / str(self.lives + 1))
            self.lives += 1
        else:
            files = self.left(meta, fragments)
            if how == "power":
                files.crash()
            self.lives += 1  # whatever comes of what is under way, no caller gets it
            self.go_on()
            await self.disk.close()
            self.files = files
        self.files.limit = 0
        await self.start()
        await self.check()

    def left(self, meta: LmdbMetaStore, fragments: LocalFragmentStore) -> SimulatedFiles:
        """What is on the disk now, without waiting for anything but a commit of LMDB. First the records: what comes to
        be later, the copies may know.
        """
        after = self.directory / str(self.lives + 1)
        with meta._state.lmdb_lock:
            shutil.copytree(meta.directory, after / "meta")
        with fragments._engine_lock:
            if fragments._writer._checkpoint is not None:
                fragments._writer._checkpoint.exception()
            shutil.copytree(self.place / "fragments", after / "fragments")
            files = SimulatedFiles(self.rng.randrange(1 << 30))
            files.disks = copy.deepcopy(self.files.disks)
            files.used = sum(len(disk.now) for disk in files.disks.values())
        return files

    # --- what must hold

    async def check(self) -> None:
        for number in list(self.asked):
            made = self.asked.pop(number)  # refused, or it was under way
            if self.disk.meta.get(RegisterName(Table.OBJECT, BUCKET, 0, b"%d" % number)) is not None:
                self.acknowledged[number] = made  # as good as that: every reader gets the error
        for number, made in self.acknowledged.items():
            await self.is_there(number)
            [stat] = await self.disk.fragments.stat([made.id])
            assert stat.health == Health.OK, f"copy {number} is {stat.health}"
        for number in self.deleted:
            assert self.disk.meta.get(RegisterName(Table.OBJECT, BUCKET, 0, b"%d" % number)) is not None, (
                f"record {number} is lost"
            )

    async def is_there(self, number: int) -> None:
        made, name = self.acknowledged[number], RegisterName(Table.OBJECT, BUCKET, 0, b"%d" % number)
        assert self.disk.meta.get(name) == slot_of(name, number), f"record {number} is lost"
        found = self.disk.copies.peek(made.id.data_id)
        if found is None:
            loaded = await self.disk.copies.load(made.id.data_id)
            assert loaded is not None, f"copy {number} is lost"
            found = loaded.payload
        assert found == made.payload, f"copy {number} is another"


async def run(seed: int, directory: Path) -> Counter[str]:
    world = World(seed, directory)
    await world.start()
    try:
        for _ in range(LIVES):
            for _ in range(world.rng.randint(1, STEPS)):
                await world.act()
            await world.end()
    finally:
        world.go_on()
        await world.disk.close()
    shutil.rmtree(directory)
    return world.seen


@pytest.fixture
def quick_path(tmp_path: Path) -> Iterator[Path]:
    with in_memory(tmp_path) as path:
        yield path


@pytest.mark.slow
async def test_no_copy_that_was_acknowledged_is_lost_while_its_record_is_there(
    quick_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: Counter[str] = Counter()
    with small(monkeypatch):
        for seed in range(SEEDS):
            try:
                async with asyncio.timeout(60):
                    seen += await run(seed, quick_path / str(seed))
            except Exception as error:
                raise AssertionError(f"seed {seed}: {type(error).__name__}: {error}") from error
    for what in ("close", "kill", "power", "held", "deleted", "restored", "read-only", "on their way", "not appended"):
        assert seen[what], f"no history ever had {what!r}: the test would not show what it says"


def nothing_is_appended_for_a_checkpoint(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(LocalFragmentStore, "sync_apart", lambda self: self._engine.log.sync_apart())


def nothing_is_synced_for_a_checkpoint(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(SegmentLog, "sync_apart", lambda _self: None)


def copies_without_room_are_forgotten(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(DeferredCopies, "unfinished", lambda _self, *, ended: None)


def nothing_comes_back_from_the_redo_log(patch: pytest.MonkeyPatch) -> None:
    async def restored(meta: LmdbMetaStore, _fragments: LocalFragmentStore) -> None:
        meta.copies_restored()

    patch.setattr(disks, "restore_copies", restored)


@pytest.mark.slow
@pytest.mark.parametrize(
    "mistake",
    [
        nothing_is_appended_for_a_checkpoint,
        nothing_is_synced_for_a_checkpoint,
        copies_without_room_are_forgotten,
        nothing_comes_back_from_the_redo_log,
    ],
    ids=lambda mistake: mistake.__name__,
)
async def test_the_histories_find_a_planted_mistake(
    quick_path: Path, monkeypatch: pytest.MonkeyPatch, mistake: Callable[[pytest.MonkeyPatch], None]
) -> None:
    mistake(monkeypatch)
    with small(monkeypatch):
        for seed in range(60):
            try:
                await run(seed, quick_path / str(seed))
            except (AssertionError, StoragedError):  # the test without a mistake fails for either
                return
    pytest.fail(f"60 seeds did not notice: {mistake.__name__}")

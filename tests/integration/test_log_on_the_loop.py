"""Small copies between a disk's redo log and its segments: whatever happens in between, none leaves the log before it
is safe where it belongs.
"""

from __future__ import annotations

import asyncio
import errno
import random
import threading
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from storaged import aio
from storaged.aio import DirectFile
from storaged.durable import RestartNeeded
from storaged.errors import DiskUnusable, StoragedError
from storaged.fragments import deferred as deferred_module
from storaged.fragments.limits import StoreLimits
from storaged.fragments.ports import Health
from storaged.fragments.store import LocalFragmentStore
from storaged.fragments.write import Write
from storaged.meta import messages
from storaged.meta.acceptor.replica import LocalReplica
from storaged.meta.consensus.register import Verdict
from storaged.meta.names import Ballot, RegisterName, Table, Value, Visibility
from storaged.meta.storage import state as store_module
from storaged.meta.storage.lmdb_store import LmdbMetaStore
from storaged.meta.store_ports import StoreBatch
from storaged.node.disks import DiskCopies, restore_copies
from storaged.uring import RingFile
from storaged.wire import encode
from tests.doubles.files import SimulatedFiles
from tests.patience import GUARD_S
from tests.suites.meta_store import page_of
from tests.worlds.fragments import DISK, Made, make
from tests.worlds.frozen_disk import frozen_disk

RNG = random.Random(23)
NAME = RegisterName(Table.OBJECT, b"s" * 16, 3, b"key")
BALLOT = Ballot(1, 10, "gw", b"incarnat")


def copy_of(length: int = 100) -> tuple[Made, Write]:
    made = make(RNG, length, k=1, m=2)
    return made, Write.of(made.header, [made.payload])


def durable(files: SimulatedFiles, made: Made) -> bool:
    return any(made.payload in bytes(disk.durable) for disk in files.disks.values())


@pytest.fixture
def files() -> SimulatedFiles:
    return SimulatedFiles()


@pytest.fixture
async def store(tmp_path: Path, files: SimulatedFiles) -> AsyncIterator[LocalFragmentStore]:
    opened = await LocalFragmentStore.open(
        tmp_path / "fragments", DISK, files=files, limits=StoreLimits(reserve_bytes=1)
    )
    yield opened
    await opened.close()


class Held:
    """Calls of a function wait until they are released. ``reached``: one waits."""

    def __init__(self, call: Callable[..., Any]) -> None:
        self._call = call
        self.reached, self.let_go = threading.Event(), threading.Event()

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        self.reached.set()
        assert self.let_go.wait(GUARD_S)
        return self._call(*arguments, **named)


# --- what a checkpoint of the log relies on


async def test_copies_that_are_being_appended_are_waited_for(store: LocalFragmentStore, files: SimulatedFiles) -> None:
    made, write = copy_of()
    append = store._engine.append = Held(store._engine.append)  # type: ignore[method-assign]
    store.keep([write])
    assert await asyncio.to_thread(append.reached.wait, GUARD_S)
    syncing = asyncio.create_task(asyncio.to_thread(store.sync_apart))
    await asyncio.sleep(0.1)
    assert not syncing.done()
    append.let_go.set()
    await syncing
    assert durable(files, made)


@pytest.mark.parametrize("closed", [False, True])
@pytest.mark.parametrize(("reason", "lost"), [("no room", False), ("ends with a restart", False), ("lasts", True)])
async def test_the_log_keeps_copies_that_could_not_be_appended_unless_a_start_knows_them_to_be_lost(
    store: LocalFragmentStore, files: SimulatedFiles, reason: str, lost: bool, closed: bool
) -> None:
    _, write = copy_of()
    if reason == "no room":
        files.limit = 1
    else:
        store._engine.state.fail(reason, lasting=reason == "lasts")
    store.keep([write])
    if closed:
        await store.close()
    if lost:
        await asyncio.to_thread(store.sync_apart)
    else:
        with pytest.raises(RestartNeeded, match="room" if reason == "no room" else reason):
            await asyncio.to_thread(store.sync_apart)
        assert store.try_read_copy(write.key[:16]) if not closed else True


async def test_copies_for_which_there_is_room_again_are_appended(
    store: LocalFragmentStore, files: SimulatedFiles
) -> None:
    made, write = copy_of()
    files.limit = 1
    store.keep([write])
    with pytest.raises(RestartNeeded):
        await asyncio.to_thread(store.sync_apart)
    files.limit = 0
    await asyncio.to_thread(store.sync_apart)
    assert durable(files, made)
    assert (await store.read(made.id, 0, 1)).whole == made.payload


async def test_a_store_that_closes_appends_what_it_kept_before_it_says_so(
    store: LocalFragmentStore, files: SimulatedFiles
) -> None:
    """The thread has ended, and the copy is not appended yet."""
    made, write = copy_of()
    checkpoints = store._writer._checkpoints
    shutdown = checkpoints.shutdown = Held(checkpoints.shutdown)  # type: ignore[method-assign]
    closing = asyncio.create_task(store.close())
    assert await asyncio.to_thread(shutdown.reached.wait, GUARD_S)
    store.keep([write])
    syncing = asyncio.create_task(asyncio.to_thread(store.sync_apart))
    await asyncio.sleep(1.2)  # it looks once a second whether the thread lives
    assert not syncing.done()
    shutdown.let_go.set()
    await syncing
    assert durable(files, made)
    await closing


async def test_copies_that_come_when_the_store_is_closed_stay_in_the_log(store: LocalFragmentStore) -> None:
    await store.close()
    store.keep([copy_of()[1]] * 50)
    with pytest.raises(RestartNeeded):
        await asyncio.to_thread(store.sync_apart)


async def test_only_who_asks_for_a_copy_that_is_not_appended_yet_waits_for_the_thread(
    store: LocalFragmentStore,
) -> None:
    made, write = copy_of()
    large = make(RNG)
    await store.write(large.header, [large.payload], sync=True)
    groups = store.statistics().groups
    store.keep([write])
    await store.sync([large.id])
    assert [found.health for found in await store.stat([large.id])] == [Health.OK]
    assert (await store.verify(large.id)).health is Health.OK
    assert store.statistics().groups == groups
    assert [found.health for found in await store.stat([large.id, made.id])] == [Health.OK] * 2
    assert store.statistics().groups == groups + 1


async def test_a_copy_of_a_million_cells_is_no_work_for_the_loop(store: LocalFragmentStore) -> None:
    made = make(RNG, 1 << 20, cell_bytes=1, k=1, m=2)
    append, threads = store._engine.append, []

    def seen(*arguments: Any, **named: Any) -> Any:
        threads.append(threading.current_thread())
        return append(*arguments, **named)

    store._engine.append = seen  # type: ignore[method-assign]
    store.keep([Write.of(made.header, [made.payload])])
    assert (await store.read(made.id, 0, 10)).cells[0] == made.payload[:1]
    assert threads[0] is store._writer.thread


async def test_copies_on_their_way_count_as_if_they_lay_on_the_disk(
    tmp_path: Path, files: SimulatedFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Many come before the first of them is durable anywhere."""
    monkeypatch.setattr(deferred_module, "SPACE_LOOK_S", 1e9)  # a second look would find the first of them appended
    files.limit = 1 << 30
    limits = StoreLimits(reserve_bytes=(1 << 30) - (4 << 20), note_reserve_bytes=0)
    store = await LocalFragmentStore.open(tmp_path / "fragments", DISK, files=files, limits=limits)
    coming: list[Write] = []
    while len(coming) < 1000 and store.admit(write := copy_of(16_384)[1]) is None:
        coming.append(write)
    assert 200 < len(coming) < 260
    store.withdraw(coming.pop())
    store.keep(coming[:31])  # one more, and the thread would append some before the next look
    assert store.admit(copy_of(16_384)[1]) is None
    refusal = store.admit(copy_of(64_000)[1])
    assert refusal is not None
    assert "full" in str(refusal)
    await store.close()


class Disk:
    """Both stores of a disk, as a node opens them."""

    def __init__(self, meta: LmdbMetaStore, fragments: LocalFragmentStore) -> None:
        self.meta, self.fragments = meta, fragments
        self.copies = DiskCopies(meta, fragments)
        self.replica = LocalReplica("d", meta, copies=self.copies)

    @classmethod
    async def opened(cls, directory: Path) -> Disk:
        (directory / "fragments").mkdir(exist_ok=True)
        meta = LmdbMetaStore(directory / "meta", map_bytes=1 << 26)
        fragments = await LocalFragmentStore.open(directory / "fragments", DISK, limits=StoreLimits(reserve_bytes=1))
        await restore_copies(meta, fragments)
        return cls(meta, fragments)

    async def close(self) -> None:
        await self.replica.close()
        await self.fragments.close()
        await self.meta.close()


def accept_of(made: Made, name: RegisterName = NAME) -> messages.Accept:
    value = Value(1, b"o" * 16, Visibility.LIVE, b"v", made.id.data_id)
    return messages.Accept("d", name, BALLOT, value, b"", False, encode(made.header))


async def test_a_disk_whose_index_fails_for_now_has_every_acknowledged_copy_after_a_restart(tmp_path: Path) -> None:
    made, _ = copy_of()
    disk = await Disk.opened(tmp_path)
    assert (await disk.replica.accept(accept_of(made), [made.payload])).verdict is Verdict.OK
    disk.fragments._engine.state.fail("checkpoint of the fragment index: MDB_MAP_FULL", lasting=False)
    await disk.meta.checkpoint()
    assert "MDB_MAP_FULL" in disk.meta.statistics().reason
    await disk.close()
    disk = await Disk.opened(tmp_path)
    assert disk.meta.get(NAME) is not None
    copy = await disk.copies.load(made.id.data_id)
    assert copy is not None
    assert copy.payload == made.payload
    await disk.meta.checkpoint()
    assert disk.meta.statistics().state == "ok"
    await disk.close()


# --- the log written without a thread


@pytest.fixture
async def meta(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[LmdbMetaStore]:
    """One that writes as where io_uring is forbidden."""
    monkeypatch.setattr(RingFile, "open", lambda _path, _bytes_max: None)
    opened = LmdbMetaStore(tmp_path / "meta", map_bytes=1 << 26)
    yield opened
    await opened.close()


def direct_of(meta: LmdbMetaStore) -> DirectFile:
    direct = meta._state.redo._direct
    if not isinstance(direct, DirectFile):
        pytest.skip("no direct writes here")
    return direct


@pytest.mark.parametrize("refused", ["when it is asked", "when it tries"])
async def test_what_the_kernel_refuses_to_write_a_thread_writes_and_the_disk_is_no_worse(
    meta: LmdbMetaStore, refused: str
) -> None:
    direct = direct_of(meta)
    if refused == "when it is asked":
        direct._request.fd = 0xFFFF  # EBADF
    else:
        direct._request.buffer += 1  # EINVAL
    for number in range(12):
        await meta.commit(StoreBatch(meta={"a": b"%d" % number}))
    assert direct.blocks_loop
    assert (meta.get_meta("a"), meta.statistics().state) == (b"11", "ok")
    await meta.close()
    again = LmdbMetaStore(meta.directory, map_bytes=1 << 26)
    assert again.get_meta("a") == b"11"
    await again.close()


async def test_a_request_that_is_refused_now_and_then_is_no_reason_to_use_a_thread_for_all(meta: LmdbMetaStore) -> None:
    direct, right = direct_of(meta), direct_of(meta)._request.buffer
    for number in range(30):
        direct._request.buffer = right + (number % 3 == 0)
        await meta.commit(StoreBatch(meta={"a": b"%d" % number}))
    assert not direct.blocks_loop


async def test_a_log_where_nobody_knows_that_direct_writes_keep_their_promise_has_none(
    meta: LmdbMetaStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    direct_of(meta)
    monkeypatch.setattr(aio, "FILE_SYSTEMS", (0x9123683E,))
    assert DirectFile.open(meta.directory / "redo", 4096) is None


async def test_a_disk_that_does_not_take_the_note_of_its_failure_holds_up_no_other(
    meta: LmdbMetaStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is written to the log failed, and the file system hangs."""
    direct = direct_of(meta)
    noting = Held(store_module.replace_file)
    monkeypatch.setattr(store_module, "replace_file", noting)
    await meta.commit(StoreBatch(meta={"a": b"1"}))
    monkeypatch.setattr(
        direct,
        "write",
        lambda _loop, _pieces, _at, done: asyncio.get_running_loop().call_soon(done, OSError(errno.EIO, "EIO")),
    )
    committing = asyncio.create_task(meta.commit(StoreBatch(meta={"a": b"2"})))
    assert await asyncio.to_thread(noting.reached.wait, GUARD_S)  # so the loop goes on
    assert not committing.done()
    noting.let_go.set()
    with pytest.raises(DiskUnusable, match="EIO"):
        await committing
    assert (meta.directory / "failed").read_text() == "[Errno 5] EIO\n"


async def test_a_group_that_cannot_be_laid_out_is_told_of_and_so_is_all_that_waits(meta: LmdbMetaStore) -> None:
    told: list[StoragedError | None] = []
    entry = meta.pack(StoreBatch(meta={"a": b"1"}), told.append)
    entry.copy = (b"header", [memoryview(b"abcdef")[::2]])
    meta.post_packed(entry)
    meta.post(StoreBatch(meta={"b": b"1"}), told.append)
    async with asyncio.timeout(GUARD_S):
        await meta.close()
    assert [isinstance(error, DiskUnusable) for error in told] == [True, True]


# --- the order of batches


async def test_what_comes_after_pages_and_rows_in_one_batch_is_applied_after_them(meta: LmdbMetaStore) -> None:
    meta._state.lmdb_lock.acquire()  # pages are slow
    commits = [
        asyncio.create_task(meta.commit(batch))
        for batch in (
            StoreBatch(pages=[page_of(b"page")]),
            StoreBatch(pages=[page_of(b"p")], meta={"a": b"1"}),
            StoreBatch(meta={"a": b"2"}),
        )
    ]
    await asyncio.sleep(0.05)
    commits.append(asyncio.create_task(meta.commit(StoreBatch(meta={"a": b"3"}))))
    await asyncio.sleep(0.05)
    meta._state.lmdb_lock.release()
    await asyncio.gather(*commits)
    assert meta.get_meta("a") == b"3"


@pytest.mark.parametrize("pages_begun", [False, True])
async def test_an_empty_batch_is_answered_when_all_before_it_are_durable(
    meta: LmdbMetaStore, pages_begun: bool
) -> None:
    begun: list[Callable[[None], None]] = []
    meta._state.redo.try_write = lambda _loop, _body, done: begun.append(done) is None  # type: ignore[method-assign]
    told: list[str] = []
    meta._state.lmdb_lock.acquire()
    meta.post(StoreBatch(pages=[page_of(b"page")]), lambda _error: told.append("page"))
    if pages_begun:
        await asyncio.sleep(0.05)
    meta.post(StoreBatch(meta={"a": b"1"}), lambda _error: told.append("row"))
    meta.post(StoreBatch(), lambda _error: told.append("barrier"))
    await asyncio.sleep(0.05)
    steps: list[Callable[[], None]] = [meta._state.lmdb_lock.release, lambda: begun.pop()(None)]
    expected = [["page"], ["page", "row", "barrier"]] if pages_begun else [["row"], ["row", "page", "barrier"]]
    for step, after in zip(steps if pages_begun else reversed(steps), expected, strict=True):
        step()
        async with asyncio.timeout(GUARD_S):
            while len(told) < len(after):  # noqa: ASYNC110  # callbacks, which set no event
                await asyncio.sleep(0.01)
        await asyncio.sleep(0.1)
        assert told == after


# --- a file system that is frozen


async def test_a_frozen_file_system_does_not_stop_the_loop_and_what_was_written_arrives_later() -> None:
    with frozen_disk() as disk:
        opened = LmdbMetaStore(disk.directory / "meta", map_bytes=1 << 26)
        if not isinstance(opened._state.redo._direct, RingFile):
            await opened.close()
            pytest.skip("no io_uring here")
        await opened.commit(StoreBatch(meta={"a": b"1"}))
        await opened.checkpoint()
        disk.freeze()
        began = time.monotonic()
        committing = asyncio.ensure_future(opened.commit(StoreBatch(meta={"a": b"2"})))
        await asyncio.sleep(0)
        assert opened.get_meta("a") == b"1"
        await asyncio.sleep(0.2)
        assert time.monotonic() - began < GUARD_S
        assert not committing.done()
        disk.thaw()
        await asyncio.wait_for(committing, GUARD_S)
        assert opened.get_meta("a") == b"2"
        await opened.close()

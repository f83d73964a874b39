"""The redo log, and the store over it: what is acknowledged is there after any end of the process, and is read the same
wherever it lies.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import errno
import os
import random
import re
import shutil
import tempfile
import threading
import tracemalloc
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import lmdb
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from storaged import uring
from storaged.aio import FAILING_IN_A_ROW_MAX, DirectFile, OnDone
from storaged.errors import DiskDamaged, DiskForeign, DiskUnusable, StoragedError
from storaged.meta.names import Table
from storaged.meta.storage import batch, overlay, redo, write_queue
from storaged.meta.storage.identity import IDENTITY, Mark
from storaged.meta.storage.lmdb_store import LmdbMetaStore
from storaged.meta.storage.redo import PAGE_BYTES, RedoLog
from storaged.meta.storage.rowvalue import open_small, pack_row, seal_small
from storaged.meta.store_ports import Fence, RowDamaged, RowRange, Slot, StoreBatch
from storaged.units import MIB
from storaged.uring import RingFile
from tests.examples import examples
from tests.patience import GUARD_S
from tests.suites.meta_store import BUCKET, OTHER, name_of, page_of, slot_of, slots_in
from tests.worlds.authority import until
from tests.worlds.disk import HeldLog

STORE_ID = bytes(range(16))
HALF = 16 * PAGE_BYTES


@pytest.fixture
def small_log(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Halves of 16 pages."""
    with small():
        yield


@contextlib.contextmanager
def small() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(redo, "HALF_BYTES", HALF)
        patch.setattr(redo, "READ_BYTES", 5 * PAGE_BYTES)  # no part of a half, so groups lie across two pieces
        patch.setattr(write_queue, "GROUP_BYTES_MAX", HALF // 2)
        yield


UNCLOSED = Mark(0, 0, 1, closed=False)


def opened(directory: Path, mark: Mark | None = UNCLOSED) -> RedoLog:
    return RedoLog(directory, STORE_ID, mark)


def fresh(directory: Path) -> RedoLog:
    return opened(directory, None)


def append(log: RedoLog, body: bytes) -> None:
    """As a store without a loop would."""
    log.write(body)
    log.advance(len(body))


def body_of(number: int, length: int = 100) -> bytes:
    return random.Random(number).randbytes(length)


# --- the log alone


def test_groups_come_back_in_order_and_those_that_lmdb_has_do_not(tmp_path: Path, small_log: None) -> None:
    log = fresh(tmp_path)
    bodies = [body_of(number, number * 700) for number in range(10)]
    for body in bodies:
        append(log, body)
    log.close()
    for applied in range(11):
        again = opened(tmp_path, Mark(applied, 10, 1, closed=False))
        assert again.bodies == bodies[applied:]
        assert again.sequence == 10
        again.close()


def test_a_half_is_written_over_only_when_lmdb_has_what_is_in_it(tmp_path: Path, small_log: None) -> None:
    log = fresh(tmp_path)
    written = 0
    for _ in range(7):
        while log.fits(5000):
            append(log, body_of(written := written + 1, 5000))
        if not log.try_switch_half():
            assert written == 2 * (HALF // 8192)
            break
    log.mark_applied(3)
    assert not log.try_switch_half()
    log.mark_applied(HALF // 8192)
    assert log.try_switch_half()
    append(log, b"new")
    assert not log.try_switch_half()
    log.close()
    again = opened(tmp_path, Mark(HALF // 8192, written, 1, closed=False))
    assert again.bodies == [body_of(number, 5000) for number in range(HALF // 8192 + 1, written + 1)] + [b"new"]
    again.close()


def test_what_does_not_fit_its_half_is_refused_and_nothing_of_the_other_is_written_over(
    tmp_path: Path, small_log: None
) -> None:
    log = fresh(tmp_path)
    append(log, body_of(1, HALF - 2 * PAGE_BYTES))
    assert log.try_switch_half()
    append(log, b"in the other half")
    log.mark_applied(1)
    assert log.try_switch_half()
    with pytest.raises(ValueError, match="does not fit"):
        append(log, bytes(HALF))
    log.close()
    again = opened(tmp_path, Mark(1, 2, 1, closed=False))
    assert again.bodies == [b"in the other half"]
    again.close()


@settings(deadline=None, max_examples=examples(150))
@given(
    sizes=st.lists(st.integers(0, 3 * PAGE_BYTES), min_size=1, max_size=40),
    applied_every=st.integers(1, 9),
    torn=st.randoms(use_true_random=False),
    restarts=st.sets(st.integers(0, 39)),
)
def test_whatever_a_crash_leaves_of_the_last_write_all_before_it_is_there(
    memory: Path,
    sizes: list[int],
    applied_every: int,
    torn: random.Random,
    restarts: set[int],
) -> None:
    """The last write reaches the disk as any of its sectors; the next goes on from there. A group that was written
    whole may come back though it was not acknowledged.
    """
    directory = Path(tempfile.mkdtemp(dir=memory))
    with small():
        log, applied = fresh(directory), 0
        bodies: dict[int, bytes] = {}
        for number, size in enumerate(sizes):
            body = body_of(number, size)
            if number and number % applied_every == 0:
                applied = log.sequence
                log.mark_applied(applied)
            if not log.fits(size) and not log.try_switch_half():
                applied = log.sequence
                log.mark_applied(applied)
                assert log.try_switch_half()
            before = (directory / redo.FILE_NAME).read_bytes()
            append(log, body)
            bodies[log.sequence] = body
            if number in restarts:
                after = bytearray((directory / redo.FILE_NAME).read_bytes())
                for at in range(0, len(after), 512):
                    if torn.random() < 0.5:
                        after[at : at + 512] = before[at : at + 512]
                (directory / redo.FILE_NAME).write_bytes(after)
                acknowledged = log.sequence - 1
                log.close()
                log = opened(directory, Mark(min(applied, acknowledged), min(applied, acknowledged), 1, closed=False))
                assert log.sequence in (acknowledged, acknowledged + 1)
                assert log.bodies == [
                    bodies[sequence] for sequence in range(min(applied, acknowledged) + 1, log.sequence + 1)
                ]
        log.close()
    shutil.rmtree(directory)


@pytest.mark.parametrize("where", ["head", "body"])
def test_damage_before_the_last_group_refuses_the_disk(tmp_path: Path, small_log: None, where: str) -> None:
    log = fresh(tmp_path)
    for number in range(5):
        append(log, body_of(number, 5000))
    log.close()
    whole = (tmp_path / redo.FILE_NAME).read_bytes()
    for group in range(5):
        data = bytearray(whole)
        data[PAGE_BYTES + group * 8192 + (9 if where == "head" else 4000)] ^= 1
        (tmp_path / redo.FILE_NAME).write_bytes(data)
        if group < 4:
            with pytest.raises(DiskDamaged, match=f"damaged at group {group + 1}"):
                opened(tmp_path)
            opened(tmp_path, Mark(group + 1, 5, 1, closed=False)).close()  # LMDB has it
        else:
            assert len(opened(tmp_path).bodies) == 4  # as a torn write
            with pytest.raises(DiskDamaged, match="acknowledged group 5"):
                opened(tmp_path, Mark(0, 5, 1, closed=False))


def test_to_open_a_log_takes_little_memory(tmp_path: Path) -> None:
    log = fresh(tmp_path)
    append(log, b"group")
    log.close()
    tracemalloc.start()
    try:
        log = opened(tmp_path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert [bytes(body) for body in log.bodies] == [b"group"]
    log.close()
    assert peak < 3 * redo.READ_BYTES < redo.HALF_BYTES


def test_a_log_that_is_gone_or_another_or_shorter_is_refused(tmp_path: Path, small_log: None) -> None:
    log = fresh(tmp_path)
    append(log, b"group")
    log.close()
    with pytest.raises(DiskForeign, match="not the redo log") as foreign:
        RedoLog(tmp_path, bytes(16), Mark(0, 0, 1, closed=False))
    assert not isinstance(foreign.value, DiskDamaged)
    file = tmp_path / redo.FILE_NAME
    whole = file.read_bytes()
    for byte in range(40):
        file.write_bytes(whole[:byte] + bytes([whole[byte] ^ 1]) + whole[byte + 1 :])
        with pytest.raises(DiskDamaged, match="does not begin as a redo log"):
            opened(tmp_path)
    file.write_bytes(whole)
    os.truncate(file, PAGE_BYTES + HALF)
    with pytest.raises(DiskDamaged, match="cut short"):
        opened(tmp_path)
    os.truncate(file, 0)
    with pytest.raises(DiskDamaged, match="does not begin as a redo log"):
        opened(tmp_path)
    file.unlink()
    with pytest.raises(DiskDamaged, match="gone"):
        opened(tmp_path)
    with pytest.raises(DiskDamaged, match="gone"):
        opened(tmp_path, Mark(1, 1, 1, closed=False))
    again = opened(tmp_path, Mark(1, 1, 1, closed=True))  # it was closed: nothing of it is missed
    append(again, b"next")
    again.close()
    assert opened(tmp_path, Mark(1, 1, 1, closed=False)).bodies == [b"next"]


def test_a_log_whose_disk_refuses_to_read_is_unusable_and_not_foreign(tmp_path: Path, small_log: None) -> None:
    (tmp_path / redo.FILE_NAME).mkdir()
    with pytest.raises(DiskUnusable):
        opened(tmp_path)


def test_what_a_start_reads_is_on_the_drive(tmp_path: Path, small_log: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that was killed in a write may leave it in the page cache only; what follows must not outlive it."""
    log = fresh(tmp_path)
    append(log, b"group")
    log.close()
    calls: list[str] = []

    def noted(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *arguments: (calls.append(name), call(*arguments))[1]

    for name in ("fdatasync", "posix_fadvise", "pread"):
        monkeypatch.setattr(os, name, noted(name, getattr(os, name)))
    opened(tmp_path).close()
    assert calls == ["fdatasync", "posix_fadvise", "pread", "pread"]


async def begun(log: RedoLog, body: bytes) -> None:
    """The group was written without a thread."""
    loop = asyncio.get_running_loop()
    ended: asyncio.Future[OSError | None] = loop.create_future()
    if not log.try_write(loop, body, ended.set_result):
        pytest.skip("this machine, or this file system, has no asynchronous direct writes")
    assert not ended.done()
    assert await asyncio.wait_for(ended, GUARD_S) is None
    log.advance(len(body))


async def test_what_was_written_without_a_thread_is_what_a_thread_writes(tmp_path: Path, small_log: None) -> None:
    """Byte for byte; and one may go on where the other was."""
    logs = []
    for place in ("begun", "appended", "mixed"):
        (tmp_path / place).mkdir()
        logs.append(fresh(tmp_path / place))
    for number in range(40):
        body = body_of(number, number * 300)
        for log in logs:
            if not log.fits(len(body)):
                log.mark_applied(log.sequence)
                assert log.try_switch_half()
        await begun(logs[0], body)
        append(logs[1], body)
        if number % 3:
            await begun(logs[2], body)
        else:
            append(logs[2], body)
    sequence = {log.sequence for log in logs}
    assert sequence == {40}
    for log in logs:
        log.detach()
        log.close()
    first, *others = [(tmp_path / place / redo.FILE_NAME).read_bytes() for place in ("begun", "appended", "mixed")]
    assert [other == first for other in others] == [True, True]
    again = opened(tmp_path / "begun", Mark(30, 40, 1, closed=False))
    assert again.bodies == [body_of(number, number * 300) for number in range(30, 40)]
    again.close()


async def test_nothing_is_begun_that_is_for_a_thread(tmp_path: Path) -> None:
    """A large group; any, where there are no asynchronous writes, or they are not asynchronous."""
    loop, told = asyncio.get_running_loop(), []
    log = fresh(tmp_path)
    assert not log.try_write(loop, bytes(redo.DIRECT_BODY_BYTES_MAX + 1), told.append)
    await begun(log, bytes(redo.DIRECT_BODY_BYTES_MAX))
    assert log._direct is not None
    log._direct._failing_in_a_row = FAILING_IN_A_ROW_MAX
    assert not log.try_write(loop, b"group", told.append)
    log.detach()
    log.close()
    without = RedoLog(tmp_path, STORE_ID, UNCLOSED, direct=False)
    assert not without.try_write(loop, b"group", told.append)
    without.detach()
    without.close()
    assert told == []


# --- the store over it


@pytest.fixture(params=["io_uring", "aio", "by a thread"])
async def store(
    request: pytest.FixtureRequest, tmp_path: Path, small_log: None, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[LmdbMetaStore]:
    if request.param == "aio":
        without_rings(monkeypatch)
    made = LmdbMetaStore(tmp_path / "meta", map_bytes=1 << 26, direct=request.param != "by a thread")
    yield made
    await made.close()


def without_rings(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine that forbids io_uring."""
    monkeypatch.setattr(RingFile, "open", lambda _path, _bytes_max: None)


def killed(store: LmdbMetaStore, place: Path) -> LmdbMetaStore:
    """The store as a process finds it whose predecessor was killed now."""
    shutil.copytree(store.directory, place)
    return LmdbMetaStore.open_or_refuse(place, store.identity, map_bytes=1 << 26)


async def test_what_was_acknowledged_is_there_after_a_kill_and_after_another(
    store: LmdbMetaStore, tmp_path: Path
) -> None:
    slots = [slot_of(name_of(b"key%04d" % number * (1 + 100 * (number % 2))), number) for number in range(300)]
    for slot in slots:
        await store.commit(
            StoreBatch([slot], fences=[Fence(BUCKET, b"%d" % slot.ballot.counter, final=False)], meta={"high": b"1"})
        )
    await store.commit(StoreBatch(unfence=[BUCKET], fences=[Fence(OTHER, b"n", final=True)]))
    assert store.statistics().checkpoints >= 1
    for place in ("first", "second", "third"):
        after = killed(store, tmp_path / place)
        assert [after.get(slot.name) for slot in slots] == slots
        assert (after.get_fence(BUCKET), after.get_fence(OTHER), after.get_meta("high")) == (
            None,
            Fence(OTHER, b"n", True),
            b"1",
        )
        late = slot_of(name_of(place.encode()), 7)
        await after.commit(StoreBatch([late]))
        slots.append(late)
        store = after
    await store.close()


async def test_writers_wait_for_the_checkpoint_when_both_halves_are_full_and_for_nothing_else(
    store: LmdbMetaStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_, begun = threading.Event(), threading.Event()

    def held_up() -> None:
        begun.set()
        assert open_.wait(GUARD_S)

    store.hooks.sync_copies = held_up
    written: list[int] = []

    async def write() -> None:
        for number in range(60):
            await store.commit(StoreBatch([slot_of(name_of(b"%d" % number), body=bytes(3000))]))
            written.append(number)

    writing = asyncio.create_task(write())
    assert await asyncio.to_thread(begun.wait, GUARD_S)
    await until(lambda: len(written) >= 16)
    await asyncio.sleep(0.2)
    assert 16 <= len(written) < 40, "what fits two halves of 16 pages"
    assert [store.get(name_of(b"%d" % number)) is not None for number in written] == [True] * len(written)
    page = page_of(b"page")
    store.hooks.sync_copies = lambda: None
    open_.set()
    async with asyncio.timeout(GUARD_S):
        await writing
        await store.commit(StoreBatch(pages=[page]))
    assert store.get_page(page.page_hash) == b"page"
    await store.checkpoint()
    assert store.statistics().rows == 60


async def test_a_checkpoint_that_fails_wakes_writers_that_wait_for_it_and_keeps_what_was_acknowledged(
    store: LmdbMetaStore, tmp_path: Path
) -> None:
    go_on = threading.Event()

    def fail() -> None:
        assert go_on.wait(GUARD_S)
        raise RowDamaged("a link is damaged")

    store.hooks.sync_copies = fail
    slots = [slot_of(name_of(b"%d" % number), body=bytes(3000)) for number in range(60)]
    writing = [asyncio.create_task(store.commit(StoreBatch([slot]))) for slot in slots]
    await asyncio.sleep(0.2)
    go_on.set()
    async with asyncio.timeout(GUARD_S):
        results = await asyncio.gather(*writing, return_exceptions=True)
    kept = [slot for slot, result in zip(slots, results, strict=True) if result is None]
    assert all(isinstance(result, DiskUnusable) for result in results if result is not None)
    assert store.statistics().state == "read-only"
    assert [store.get(slot.name) for slot in kept] == kept
    await store.close()  # what failed is noted by then
    with pytest.raises(DiskForeign, match="a link is damaged"):
        killed(store, tmp_path / "again")


async def test_a_store_from_before_there_were_logs_gets_one(tmp_path: Path) -> None:
    store = LmdbMetaStore(tmp_path / "meta", map_bytes=1 << 26)
    slot = slot_of(name_of(b"k"))
    await store.commit(StoreBatch([slot]))
    await store.checkpoint()
    with store._environment.begin(write=True, db=store._databases[b"meta"]) as transaction:
        transaction.delete(b"\0redo")
    (tmp_path / "meta" / redo.FILE_NAME).unlink()
    after = killed(store, tmp_path / "old")
    assert after.get(slot.name) == slot
    await after.commit(StoreBatch([slot_of(name_of(b"new"))]))
    assert (tmp_path / "old" / redo.FILE_NAME).exists()
    await after.close()
    await store.close()


async def test_a_disk_that_has_no_room_for_a_log_is_unusable_until_it_has(
    tmp_path: Path, small_log: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    pwrite = os.pwrite
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", lambda fd, data, at: pwrite(fd, data[: len(data) // 2], at))
        with pytest.raises(DiskUnusable, match="No space"):
            LmdbMetaStore(tmp_path / "meta", map_bytes=1 << 26)
    assert not list((tmp_path / "meta").glob("redo*"))
    store = LmdbMetaStore(tmp_path / "meta", map_bytes=1 << 26)
    await store.commit(StoreBatch([slot_of(name_of(b"k"))]))
    await store.close()


async def test_a_write_to_the_log_that_finds_no_space_ends_the_writer_until_the_next_start(
    store: LmdbMetaStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = slot_of(name_of(b"first")), slot_of(name_of(b"second"))
    await store.commit(StoreBatch([first]))

    def full(*_arguments: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    def full_later(_file: object, loop: asyncio.AbstractEventLoop, _pieces: object, _at: int, done: OnDone) -> None:
        loop.call_soon(done, OSError(errno.ENOSPC, "No space left on device"))

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwritev", full)
        for kind in (DirectFile, RingFile):
            patch.setattr(kind, "write", full_later)
        with pytest.raises(DiskUnusable, match="No space"):
            await store.commit(StoreBatch([second]))
    with pytest.raises(DiskUnusable, match="takes no writes"):
        await store.commit(StoreBatch([second]))
    assert (store.get(first.name), store.get(second.name)) == (first, None)
    after = killed(store, tmp_path / "again")
    assert after.get(first.name) == first
    await after.commit(StoreBatch([second]))
    await after.close()


async def test_a_log_put_back_from_before_is_refused(store: LmdbMetaStore, tmp_path: Path) -> None:
    """As far as LMDB knows: by the last checkpoint or start."""
    await store.commit(StoreBatch([slot_of(name_of(b"a"))]))
    old = (store.directory / redo.FILE_NAME).read_bytes()
    hold, reached = threading.Event(), threading.Event()
    store.hooks.sync_copies = lambda: (reached.set(), hold.wait(GUARD_S))[0]  # type: ignore[misc]
    running = asyncio.ensure_future(store.checkpoint())
    await asyncio.to_thread(reached.wait, GUARD_S)
    await store.commit(StoreBatch([slot_of(name_of(b"b"))]))
    hold.set()
    await running
    after = killed(store, tmp_path / "sound")
    assert after.get(name_of(b"b")) is not None
    await after.close()
    (store.directory / redo.FILE_NAME).write_bytes(old)
    with pytest.raises(DiskForeign, match="acknowledged group 2"):
        killed(store, tmp_path / "again")


async def test_a_store_that_an_older_version_opened_over_an_unfinished_log_is_refused(
    store: LmdbMetaStore, tmp_path: Path
) -> None:
    """It knows of no log: what it then wrote would be replaced by what lies there."""
    await store.commit(StoreBatch([slot_of(name_of(b"a"))]))
    shutil.copytree(store.directory, tmp_path / "killed")
    await store.checkpoint()
    await store.close()
    for place, refused in ((tmp_path / "killed", True), (store.directory, False)):
        with lmdb.open(str(place), max_dbs=5, map_size=1 << 26) as environment:
            meta = environment.open_db(b"meta", create=False)
            with environment.begin(write=True, db=meta) as transaction:
                known = open_small(IDENTITY, transaction.get(IDENTITY))
                transaction.put(IDENTITY, seal_small(IDENTITY, known[:16] + (known[23] + 1).to_bytes(8, "big")))
        if refused:
            with pytest.raises(DiskForeign, match="older version"):
                LmdbMetaStore(place, map_bytes=1 << 26)
        else:
            again = LmdbMetaStore(place, map_bytes=1 << 26)
            assert again.get(name_of(b"a")) is not None
            await again.close()


async def test_a_page_does_not_wait_for_the_copies_of_a_checkpoint(store: LmdbMetaStore) -> None:
    hold, reached = threading.Event(), threading.Event()
    store.hooks.sync_copies = lambda: (reached.set(), hold.wait(GUARD_S))[0]  # type: ignore[misc]
    running = asyncio.ensure_future(store.checkpoint())
    await asyncio.to_thread(reached.wait, GUARD_S)
    page = page_of(b"page")
    async with asyncio.timeout(GUARD_S):
        await store.commit(StoreBatch(pages=[page]))
    assert store.get_page(page.page_hash) == b"page"
    hold.set()
    await running


async def test_a_batch_that_no_group_takes_is_refused_before_anything_is_stored(store: LmdbMetaStore) -> None:
    with pytest.raises(ValueError, match="redo log takes"):
        await store.commit(StoreBatch([slot_of(name_of(b"%d" % number), body=bytes(1 << 20)) for number in range(9)]))
    assert store.get(name_of(b"1")) is None
    await store.commit(StoreBatch([slot_of(name_of(b"k"))]))


@settings(deadline=None, max_examples=examples(200))
@given(
    stored=st.sets(st.binary(min_size=1, max_size=2)),
    added=st.lists(
        st.lists(st.tuples(st.integers(0, 1), st.binary(min_size=1, max_size=2), st.booleans()), max_size=5),
        min_size=1,
        max_size=5,
    ),
    after=st.binary(max_size=2),
    prefix=st.binary(max_size=1),
    limit=st.integers(1, 5),
)
def test_tables_that_grow_between_looks_are_merged_in_the_order_of_their_keys(
    stored: set[bytes], added: list[list[tuple[int, bytes, bool]]], after: bytes, prefix: bytes, limit: int
) -> None:
    below = {key: b"stored" for key in stored if key > after and key.startswith(prefix)}
    tables = [overlay.Table(), overlay.Table()]
    for step, rows in enumerate(added):
        for which, key, gone in rows:
            tables[which][key] = b"" if gone else b"%d of %d" % (step, which)
        everything = {**below, **tables[0], **tables[1]}
        expected = [
            (key, row) for key, row in sorted(everything.items()) if row and key > after and key.startswith(prefix)
        ]
        found: list[tuple[bytes, bytes]] = []
        through: bytes | None = after
        while through is not None:
            entries = [entry for entry in sorted(below.items()) if entry[0] > through][:limit]
            some, through = overlay.merge(entries, tables, RowRange(0, b"", 0, through, prefix, limit))
            assert len(some) <= limit
            found += some
        assert found == expected


KEYS = [b"a", b"a/1", b"a/2", b"b" * 480, b"b" * 481, b"b" * 700, b"b" * 961, b"c", b"c/1", b"\xff" * 500]


@settings(deadline=None, max_examples=examples(40))
@given(
    steps=st.lists(
        st.tuples(
            st.sampled_from(["put", "put", "put", "checkpoint", "begin", "kill", "close"]),
            st.sampled_from(KEYS),
            st.integers(0, 1),
        ),
        min_size=3,
        max_size=30,
    )
)
async def test_wherever_rows_lie_they_are_read_as_one(memory: Path, steps: list[tuple[str, bytes, int]]) -> None:
    """In LMDB, on the way there (a checkpoint that has begun and not ended), above that, or in any number of them."""
    directory = Path(tempfile.mkdtemp(dir=memory))
    with small():
        store = LmdbMetaStore(directory / "0", map_bytes=1 << 26)
        model: dict[tuple[int, bytes], Slot] = {}
        hold: threading.Event | None = None
        running: asyncio.Future[None] | None = None
        for count, (step, key, shard) in enumerate(steps):
            if step == "put":
                slot = slot_of(name_of(key, shard=shard), count + 1, bytes(count % 3 * 90))
                await store.commit(StoreBatch([slot]))
                model[shard, key] = slot
            elif step == "begin" and running is None:
                hold, reached = threading.Event(), threading.Event()
                store.hooks.sync_copies = lambda hold=hold, reached=reached: (reached.set(), hold.wait(GUARD_S))[0]  # type: ignore[misc]
                running = asyncio.ensure_future(store.checkpoint())
                await asyncio.to_thread(reached.wait, GUARD_S)
            elif step == "kill":
                after = killed(store, directory / str(count + 1))
                if hold is not None:
                    hold.set()
                await store.close()
                store, hold, running = after, None, None
            elif step in ("checkpoint", "close") and hold is not None:
                hold.set()
                assert running is not None
                await running
                store.hooks.sync_copies = lambda: None
                hold = running = None
            elif step == "checkpoint":
                await store.checkpoint()
            elif step == "close":
                await store.close()
                store = LmdbMetaStore.open_or_refuse(store.directory, store.identity, map_bytes=1 << 26)
            _compare(store, model)
        if hold is not None:
            hold.set()
        await store.close()
    shutil.rmtree(directory)


def _compare(store: LmdbMetaStore, model: dict[tuple[int, bytes], Slot]) -> None:
    for shard in (0, 1):
        rows = {key: slot for (where, key), slot in model.items() if where == shard}
        for key in KEYS:
            assert store.get(name_of(key, shard=shard)) == rows.get(key)
        for after, prefix, limit in (
            (b"", b"", 99),
            (b"", b"", 3),
            (b"a/1", b"", 4),
            (b"", b"b", 2),
            (b"b" * 480, b"b", 9),
            (b"", b"c/", 1),
        ):
            expected = [rows[key] for key in sorted(rows) if key > after and key.startswith(prefix)]
            where = {"after": after, "prefix": prefix, "limit": limit}
            assert slots_in(store, Table.OBJECT, BUCKET, shard, **where) == expected[:limit]
            keys, columns, more = store.columns(RowRange(Table.OBJECT, BUCKET, shard, **where))
            assert (keys, more) == ([slot.name.key for slot in expected[:limit]], len(expected) > limit)
            stamps = store.stamps(RowRange(Table.OBJECT, BUCKET, shard, **where))
            assert (stamps.rows, stamps.more, stamps.row_bytes) == (len(keys), more, sum(map(len, columns)))
        checks = [int.from_bytes(pack_row(slot)[1:9], "big") for slot in rows.values()]
        assert store.shard_sum(name_of(b"k", shard=shard).prefix) == sum(checks) % 2**64
    assert store.scopes() == sorted({(Table.OBJECT, BUCKET, shard) for shard, _ in model})


async def test_nobody_reaches_a_store_that_is_closed(store: LmdbMetaStore) -> None:
    """Neither who had a record ready with its copy, nor who asks for a checkpoint: what they would write to is somebody
    else's by then.
    """
    told: list[StoragedError | None] = []
    late = store.pack(StoreBatch([slot_of(name_of(b"late"))]), told.append)
    await store.commit(StoreBatch([slot_of(name_of(b"k"))]))
    await store.close()
    with pytest.raises(DiskUnusable, match="closed"):
        store.post_packed(late)
    await store.checkpoint()
    assert told == []
    again = LmdbMetaStore.open_or_refuse(store.directory, store.identity, map_bytes=1 << 26)
    assert (again.get(name_of(b"k")) is not None, again.get(name_of(b"late"))) == (True, None)
    await again.close()


def writes_of_threads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The threads that wrote to a log, from now on."""
    names: list[str] = []
    pwritev = os.pwritev

    def noted(*arguments: Any) -> int:
        names.append(threading.current_thread().name)
        return pwritev(*arguments)

    monkeypatch.setattr(os, "pwritev", noted)
    return names


async def test_a_store_goes_on_by_its_thread_where_the_file_system_turns_out_to_block(
    store: LmdbMetaStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slots = [slot_of(name_of(b"%d" % number)) for number in range(3)]
    threads = writes_of_threads(monkeypatch)
    await store.commit(StoreBatch([slots[0]]))
    direct = store._state.redo._direct
    assert threads == ([] if direct is not None else ["meta-writer meta"])
    if direct is not None:
        direct._failing_in_a_row = FAILING_IN_A_ROW_MAX
    await store.commit(StoreBatch([slots[1]]))
    await store.commit(StoreBatch([slots[2]]))
    assert threads[-2:] == ["meta-writer meta"] * 2
    after = killed(store, tmp_path / "after")
    assert [after.get(slot.name) for slot in slots] == slots
    await after.close()


@pytest.mark.parametrize("ring", [True, False])
@pytest.mark.parametrize("code", [errno.EAGAIN, errno.EINVAL])
async def test_a_write_that_the_kernel_does_not_begin_is_the_threads_and_no_failure_of_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, ring: bool
) -> None:
    """It has no memory for a request, or knows no durable ones."""
    if not ring:
        without_rings(monkeypatch)
    store = LmdbMetaStore(tmp_path / "meta", map_bytes=1 << 26)
    direct = store._state.redo._direct
    if direct is None:
        pytest.skip("this machine, or this file system, has no asynchronous direct writes")
    slots, call = [slot_of(name_of(b"%d" % number)) for number in range(3)], direct._call
    submit = direct._submit if isinstance(direct, DirectFile) else uring._ENTER

    def refused(number: ctypes.c_long, *arguments: Any) -> int:
        if number.value == submit:
            ctypes.set_errno(code)
            return -1
        return call(number, *arguments)

    threads = writes_of_threads(monkeypatch)
    await store.commit(StoreBatch([slots[0]]))
    with monkeypatch.context() as patch:
        patch.setattr(direct, "_call", refused)
        await store.commit(StoreBatch([slots[1]]))
    await store.commit(StoreBatch([slots[2]]))
    assert (threads, store.statistics().state) == (["meta-writer meta"], "ok")
    after = killed(store, tmp_path / "after")
    assert [after.get(slot.name) for slot in slots] == slots
    await after.close()
    await store.close()


async def test_a_large_group_is_written_by_the_thread_and_small_ones_before_and_behind_it_keep_their_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = LmdbMetaStore(tmp_path / "meta", map_bytes=1 << 26)
    threads = writes_of_threads(monkeypatch)
    names = [name_of(b"small"), name_of(b"large"), name_of(b"small")]
    bodies = [b"first", bytes(redo.DIRECT_BODY_BYTES_MAX + 1), b"second"]
    slots = [slot_of(name, number, body) for number, (name, body) in enumerate(zip(names, bodies, strict=True))]
    await asyncio.gather(*(store.commit(StoreBatch([slot])) for slot in slots))
    assert "meta-writer meta" in threads
    after = killed(store, tmp_path / "after")
    for found in (store, after):
        assert [found.get(slot.name) for slot in slots[1:]] == slots[1:]
    await after.close()
    await store.close()


async def test_what_comes_while_a_group_is_written_is_the_next_group(store: LmdbMetaStore) -> None:
    """In the order in which it came, whatever a turn of the loop brings; and is not read before it is durable."""
    log = HeldLog(store)
    log.hold()
    told: list[int] = []
    for number in range(20):
        slot = slot_of(name_of(b"k"), number)
        store.post(StoreBatch([slot]), lambda error, number=number: told.append(number) if error is None else None)
        if not number:
            await log.held.wait()
        await asyncio.sleep(0)
    assert (told, store.get(name_of(b"k")), log.groups) == ([], None, 1)
    log.go_on()
    await store.commit(StoreBatch())
    assert told == list(range(20))
    assert log.groups == 2
    assert store.get(name_of(b"k")) == slot_of(name_of(b"k"), 19)


async def test_a_store_that_is_closed_writes_first_what_it_has_in_hand(store: LmdbMetaStore, tmp_path: Path) -> None:
    """Also when one group is being written, another collects, and neither is acknowledged."""
    log = HeldLog(store)
    log.hold()
    slots = [slot_of(name_of(b"%d" % number)) for number in range(5)]
    writing = [asyncio.ensure_future(store.commit(StoreBatch([slot]))) for slot in slots]
    await log.held.wait()
    closing = asyncio.ensure_future(store.close())
    await asyncio.sleep(0.02)
    assert not closing.done()
    log.go_on()
    async with asyncio.timeout(GUARD_S):
        await asyncio.gather(*writing)
        await closing
    again = killed(store, tmp_path / "again")
    assert [again.get(slot.name) for slot in slots] == slots
    await again.close()


async def test_a_slice_of_no_rows_is_empty_also_while_rows_are_on_their_way(store: LmdbMetaStore) -> None:
    slot = slot_of(name_of(b"k"))
    await store.commit(StoreBatch([slot]))
    assert store.slice(RowRange(*slot.name[:3], after=b"", prefix=b"", limit=0)) == []


# --- the bytes


def documented() -> list[bytes]:
    """The file's header, and the first group of FORMATS.md's example."""
    text = (Path(redo.__file__).parents[2] / "FORMATS.md").read_text()
    block = re.search(r"<!-- redo vector -->\s*```\n(.*?)```", text, re.DOTALL)
    assert block is not None
    return [bytes.fromhex(line.split("  ")[0]) for line in block[1].splitlines()]


def example() -> batch.PackedBatch:
    made = batch.pack_batch(StoreBatch(meta={"epoch": (2).to_bytes(8, "big")}), lambda _error: None)
    made.rows.append((bytes([1]) + STORE_ID + bytes([3]), b"photos/1.jpg", b"the row"))
    made.copy = b"a header", [b"the ", b"copy"]
    return made


def test_the_documented_log_is_what_the_code_writes_and_what_its_text_says(tmp_path: Path) -> None:
    header, head, *body = documented()
    log = fresh(tmp_path)
    append(log, batch.encode_group([example()]))
    log.close()
    written = (tmp_path / redo.FILE_NAME).read_bytes()
    assert len(written) == (1 + 2 * 4096) * 4096
    assert written[:4096] == header + bytes(4056)
    group = head + b"".join(body)
    assert written[4096 : 4096 + len(group) + 1] == group + b"\0"
    seed = xxhash.xxh3_64_intdigest(STORE_ID + b"SOVREDO\n")
    assert header[32:] == xxhash.xxh3_64_digest(header[:32])
    assert head[16:24] == xxhash.xxh3_64_digest(b"".join(body), seed)
    assert head[24:] == xxhash.xxh3_64_digest(head[:24], (seed + 4096) % 2**64)


def test_the_documented_group_is_read_back() -> None:
    [logged] = batch.decode_group(b"".join(documented()[2:]))
    made = example()
    assert (logged.rows, logged.others, logged.copy) == (made.rows, made.others, (b"a header", b"the copy"))


def test_a_log_with_smaller_halves_is_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As disks have it that were made before."""
    with monkeypatch.context() as patch:
        patch.setattr(redo, "HALF_BYTES", 8 * MIB)
        log = opened(tmp_path, None)
        assert log.half_bytes == 8 * MIB
        append(log, b"first")
        log.close()
    log = opened(tmp_path)
    assert (log.half_bytes, log.bodies) == (8 * MIB, [b"first"])
    large = bytes(3 * MIB)
    for _ in range(2):
        append(log, large)
    assert not log.fits(len(large))
    assert log.try_switch_half()
    append(log, large)
    log.close()
    assert (tmp_path / redo.FILE_NAME).stat().st_size == PAGE_BYTES + 16 * MIB
    log = opened(tmp_path)
    assert [len(body) for body in log.bodies] == [5, len(large), len(large), len(large)]
    log.close()


@pytest.mark.parametrize("pages", [0, 1, 2047, 16_385, 2**32 - 1])
def test_a_log_whose_halves_are_of_no_size_is_refused(tmp_path: Path, pages: int) -> None:
    opened(tmp_path, None).close()
    with (tmp_path / redo.FILE_NAME).open("r+b") as file:
        file.write(redo._file_header(STORE_ID, pages * PAGE_BYTES))
    with pytest.raises(DiskForeign):
        opened(tmp_path)


async def test_a_store_goes_on_with_a_log_that_has_smaller_halves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Round and round in it, and through a start."""
    with monkeypatch.context() as patch:
        patch.setattr(redo, "HALF_BYTES", 8 * MIB)
        store = LmdbMetaStore(tmp_path)
        await store.commit(StoreBatch([slot_of(name_of(b"0"))]))
        await store.close()
    store = LmdbMetaStore(tmp_path)
    for number in range(1, 41):
        await store.commit(StoreBatch([slot_of(name_of(b"%d" % number), body=bytes(MIB))]))
    assert store.statistics().checkpoints >= 40 // 8
    await store.close()
    assert (tmp_path / redo.FILE_NAME).stat().st_size == PAGE_BYTES + 16 * MIB
    store = LmdbMetaStore(tmp_path)
    assert all(store.get(name_of(b"%d" % number)) is not None for number in range(41))
    await store.close()

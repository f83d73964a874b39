"""The LMDB store: the port's suite, and what only a disk can do."""

from __future__ import annotations

import asyncio
import errno
import os
import resource
import shutil
import struct
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lmdb
import pytest

from storaged.errors import DirectoryInUse, DiskForeign, DiskUnusable, SlowDown, StoragedError
from storaged.meta.names import Table
from storaged.meta.storage import checkpoint, write_queue
from storaged.meta.storage.lmdb_store import LmdbMetaStore
from storaged.meta.storage.rowvalue import pack_row
from storaged.meta.store_ports import Fence, RowDamaged, StoreBatch, StoreFull
from tests.patience import GUARD_S
from tests.suites.meta_store import *  # noqa: F403
from tests.suites.meta_store import BUCKET, ROW_KEYS, check_columns_and_stamps, name_of, page_of, slot_of, slots_in
from tests.worlds.disk import HeldLog


@pytest.fixture(params=[True, False], ids=["direct", "by a thread"])
async def store(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[LmdbMetaStore]:
    opened = LmdbMetaStore(tmp_path / "meta", direct=request.param)
    yield opened
    await opened.close()


@contextmanager
def raw(directory: Path, database: bytes) -> Iterator[Any]:
    """The closed store's own LMDB, to do to it what a bad disk does."""
    with lmdb.open(str(directory), max_dbs=6, map_size=1 << 30) as environment:
        opened = environment.open_db(database, create=False)
        with environment.begin(write=True, db=opened) as transaction:
            yield transaction


async def reopened(store: LmdbMetaStore) -> LmdbMetaStore:
    await store.close()
    return LmdbMetaStore.open_or_refuse(store.directory, store.identity)


@pytest.mark.parametrize("late", [1, 2, 3, 5, 13])
async def test_columns_and_stamps_are_those_of_a_slice_wherever_rows_lie_in_the_log(
    store: LmdbMetaStore, late: int
) -> None:
    stored = [
        slot_of(name_of(key), body=b"of " + key[:9]) for index, key in enumerate(ROW_KEYS) if index % late or index % 2
    ]
    await store.commit(StoreBatch(slots=stored))
    await store.checkpoint()
    check_columns_and_stamps(store)
    logged = [
        slot_of(name_of(key), 2, body=b"of " + key[:5], visibility=index % 3)
        for index, key in enumerate(ROW_KEYS)
        if not index % late
    ]
    await store.commit(StoreBatch(slots=logged))
    check_columns_and_stamps(store)


async def test_everything_is_there_after_a_restart(tmp_path: Path) -> None:
    store = LmdbMetaStore(tmp_path / "meta")
    page = page_of(b"page" * 100)
    slots = [slot_of(name_of(b"k" * length)) for length in (1, 480, 481, 1041)]
    await store.commit(StoreBatch(slots=slots, fences=[Fence(BUCKET, b"n", True)], pages=[page], meta={"floor": b"9"}))
    store = await reopened(store)
    assert [store.get(slot.name) for slot in slots] == slots
    assert store.get_fence(BUCKET) == Fence(BUCKET, b"n", True)
    assert store.get_page(page.page_hash) == page.body
    assert store.pages(after=b"", limit=9) == [(page.page_hash, page.created_ms)]
    assert store.get_meta("floor") == b"9"
    late = slot_of(name_of(b"k" * 1040))
    await store.commit(StoreBatch(slots=[late]))
    assert slots_in(store, Table.OBJECT, BUCKET, 0, after=b"", prefix=b"", limit=9) == [*slots[:3], late, slots[3]]
    await store.close()


async def test_commits_that_arrive_while_one_is_synced_share_the_next(store: LmdbMetaStore) -> None:
    await asyncio.gather(*(store.commit(StoreBatch(slots=[slot_of(name_of(b"%d" % number))])) for number in range(500)))
    await store.checkpoint()
    seen = store.statistics()
    assert (seen.operations, seen.rows, seen.queued_batches) == (500, 500, 0)
    assert seen.commits <= 100
    assert seen.largest_group <= 128


async def test_close_writes_what_was_queued(store: LmdbMetaStore) -> None:
    waiting = [
        asyncio.ensure_future(store.commit(StoreBatch(slots=[slot_of(name_of(b"%d" % number))])))
        for number in range(20)
    ]
    await asyncio.sleep(0)
    await store.close()
    await asyncio.gather(*waiting)
    with pytest.raises(DiskUnusable):
        await store.commit(StoreBatch())
    with pytest.raises(DiskUnusable):
        store.get(name_of(b"1"))
    await store.close()


async def test_a_cancelled_commit_holds_nobody_up(store: LmdbMetaStore) -> None:
    tasks = [
        asyncio.ensure_future(store.commit(StoreBatch(slots=[slot_of(name_of(b"%d" % number))])))
        for number in range(10)
    ]
    await asyncio.sleep(0)
    for task in tasks[::2]:
        task.cancel()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert [isinstance(result, asyncio.CancelledError) for result in results] == [True, False] * 5
    assert store.statistics().queued_batches == 0


async def test_two_stores_on_one_directory_are_refused(store: LmdbMetaStore) -> None:
    with pytest.raises(DirectoryInUse):
        LmdbMetaStore(store.directory)
    with pytest.raises(DirectoryInUse):
        LmdbMetaStore.open_or_refuse(store.directory, store.identity)


async def test_a_disk_whose_store_is_gone_is_refused_and_nothing_is_made(tmp_path: Path) -> None:
    store = LmdbMetaStore(tmp_path / "meta")
    await store.close()
    shutil.rmtree(store.directory)
    with pytest.raises(DiskForeign, match="gone"):
        LmdbMetaStore.open_or_refuse(store.directory, store.identity)
    assert not store.directory.exists()


async def test_a_disk_with_another_store_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    mine, other = LmdbMetaStore(tmp_path / "mine"), LmdbMetaStore(tmp_path / "other")
    await mine.close()
    await other.close()
    with pytest.raises(DiskForeign, match="another"):
        LmdbMetaStore.open_or_refuse(other.directory, mine.identity)
    again = LmdbMetaStore.open_or_refuse(other.directory, other.identity)
    assert again.store_id == other.store_id
    assert again.identity == other.store_id + (2).to_bytes(8, "big")
    await again.close()


async def test_an_older_copy_of_the_same_store_is_refused(tmp_path: Path) -> None:
    store = LmdbMetaStore(tmp_path / "meta")
    await store.close()
    shutil.copytree(store.directory, tmp_path / "snapshot")
    store = await reopened(store)
    await store.close()
    with pytest.raises(DiskForeign, match="put back to an older state"):
        LmdbMetaStore.open_or_refuse(tmp_path / "snapshot", store.identity)


async def test_a_start_whose_identity_was_not_noted_does_not_lock_the_owner_out(tmp_path: Path) -> None:
    store = LmdbMetaStore(tmp_path / "meta")
    noted = store.identity
    store = await reopened(store)
    await store.close()
    again = LmdbMetaStore.open_or_refuse(store.directory, noted)
    assert again.store_id == store.store_id
    await again.close()


async def test_what_is_no_store_is_refused(tmp_path: Path) -> None:
    (tmp_path / "data.mdb").write_bytes(b"no database" * 1000)
    with pytest.raises(DiskForeign):
        LmdbMetaStore(tmp_path)
    with pytest.raises(DiskForeign):
        LmdbMetaStore.open_or_refuse(tmp_path, bytes(24))


async def test_a_directory_that_cannot_be_made_is_unusable(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DiskUnusable):
        LmdbMetaStore(tmp_path / "file" / "meta")


async def test_a_flipped_bit_in_a_row_is_found_and_counted(tmp_path: Path) -> None:
    store = LmdbMetaStore(tmp_path / "meta")
    names = [name_of(b"a"), name_of(b"b")]
    await store.commit(
        StoreBatch(slots=[slot_of(name) for name in names], meta={"floor": b"9"}, fences=[Fence(BUCKET, b"n", False)])
    )
    await store.close()
    for database in (b"rows", b"meta", b"fences"):
        with raw(store.directory, database) as transaction:
            for key, value in list(transaction.cursor()):
                if key in (b"floor", BUCKET) or key.endswith(b"a"):
                    transaction.put(key, value[:-1] + bytes([value[-1] ^ 4]))
    store = LmdbMetaStore(store.directory)
    for read in (lambda: store.get(names[0]), lambda: store.get_meta("floor"), lambda: store.get_fence(BUCKET)):
        with pytest.raises(RowDamaged):
            read()
    assert store.get(names[1]) == slot_of(names[1])
    assert store.rows([name.pack() for name in names]) == [None, pack_row(slot_of(names[1]))]
    with pytest.raises(RowDamaged):
        slots_in(store, Table.OBJECT, BUCKET, 0, after=b"", prefix=b"", limit=9)
    assert store.statistics().damaged_rows == 4
    assert [store.row(name.pack()) for name in names] == [None, pack_row(slot_of(names[1]))]
    await store.commit(StoreBatch(slots=[slot_of(names[0], 2)]))
    assert store.get(names[0]) == slot_of(names[0], 2)
    await store.close()


async def test_a_flipped_bit_in_a_page_is_found_and_a_new_put_mends_it(tmp_path: Path) -> None:
    store = LmdbMetaStore(tmp_path / "meta")
    page = page_of(b"page" * 100)
    await store.commit(StoreBatch(pages=[page]))
    await store.close()
    with raw(store.directory, b"pages") as transaction:
        value = transaction.get(page.page_hash)
        transaction.put(page.page_hash, value[:-1] + bytes([value[-1] ^ 1]))
    store = LmdbMetaStore(store.directory)
    with pytest.raises(RowDamaged):
        store.get_page(page.page_hash)
    assert store.pages(after=b"", limit=9) == [(page.page_hash, page.created_ms)]
    await store.commit(StoreBatch(pages=[page]))
    assert store.get_page(page.page_hash) == page.body
    await store.close()


async def test_a_row_under_another_key_is_found(tmp_path: Path) -> None:
    store = LmdbMetaStore(tmp_path / "meta")
    await store.commit(StoreBatch(slots=[slot_of(name_of(b"a")), slot_of(name_of(b"b"))]))
    await store.close()
    with raw(store.directory, b"rows") as transaction:
        first, second = list(transaction.cursor())
        transaction.put(first[0], second[1])
    store = LmdbMetaStore(store.directory)
    with pytest.raises(RowDamaged):
        store.get(name_of(b"a"))
    await store.close()


async def test_a_damaged_link_refuses_the_keys_behind_it_and_no_others(tmp_path: Path) -> None:
    store = LmdbMetaStore(tmp_path / "meta")
    short, long = name_of(b"a"), name_of(b"b" * 600)
    await store.commit(StoreBatch(slots=[slot_of(short), slot_of(long)]))
    await store.close()
    with raw(store.directory, b"rows") as transaction:
        [link] = [key for key, _ in transaction.cursor() if len(key) == 489]
        transaction.put(link, bytes(16))
    store = LmdbMetaStore(store.directory)
    assert store.get(short) == slot_of(short)
    with pytest.raises(RowDamaged):
        store.get(long)
    assert store.rows([long.pack(), short.pack()]) == [None, pack_row(slot_of(short))]
    assert store.statistics().damaged_rows == 2
    assert [store.row(long.pack()), store.row(short.pack())] == [None, pack_row(slot_of(short))]
    await store.close()


async def test_a_full_map_makes_it_read_only_but_readable_and_loses_nothing_that_was_acknowledged(
    tmp_path: Path,
) -> None:
    store = LmdbMetaStore(tmp_path / "meta", map_bytes=1 << 20)
    slots = [slot_of(name_of(b"%d" % number), body=b"x" * 4000) for number in range(1000)]
    await store.commit(StoreBatch(slots=slots, meta={"floor": b"1"}))
    await store.checkpoint()
    with pytest.raises(DiskUnusable, match="MDB_MAP_FULL"):
        await store.commit(StoreBatch(slots=[slot_of(name_of(b"late"))]))
    for map_bytes in (1 << 20, 1 << 20, 1 << 26):
        assert [store.get(slot.name) for slot in slots] == slots
        assert store.get_meta("floor") == b"1"
        assert store.get(name_of(b"late")) is None
        await store.close()
        store = LmdbMetaStore.open_or_refuse(store.directory, store.identity, map_bytes=map_bytes)
        await store.checkpoint()  # or its own, at once
        assert store.statistics().state == ("ok" if map_bytes > 1 << 20 else "read-only")
    await store.commit(StoreBatch(slots=[slot_of(name_of(b"late"))]))
    assert [store.get(slot.name) for slot in slots] == slots
    await store.close()


async def test_a_store_without_room_goes_on_by_itself_when_there_is_some(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "CHECKPOINT_S", 60)
    monkeypatch.setattr(checkpoint, "RETRY_S", 0.05)
    store = LmdbMetaStore(tmp_path / "meta")
    failed: list[str] = []
    store.hooks.on_failed = failed.append
    slots = [slot_of(name_of(b"%03d" % number), body=b"x" * 4000) for number in range(300)]
    await store.commit(StoreBatch(slots=slots))
    full = OSError(errno.ENOSPC, "No space left on device")
    lacking = True
    apply = checkpoint.Applier.apply

    def apply_when_there_is_room(applier: checkpoint.Applier, transaction: Any, overlay: Any) -> None:
        apply(applier, transaction, overlay)
        if lacking:
            raise full

    monkeypatch.setattr(checkpoint.Applier, "apply", apply_when_there_is_room)
    await store.checkpoint()
    late = slot_of(name_of(b"late"))
    for _ in range(2):
        with pytest.raises(StoreFull, match="no space is left"):
            await store.commit(StoreBatch(slots=[late]))
    assert store.statistics().state == "read-only"
    assert [store.get(slot.name) for slot in slots] == slots
    lacking = False
    await store.checkpoint()
    assert not store.refusal
    await store.commit(StoreBatch(slots=[late]))
    await store.checkpoint()
    await store.close()
    store = LmdbMetaStore.open_or_refuse(store.directory, store.identity)
    assert [store.get(slot.name) for slot in [*slots, late]] == [*slots, late]
    await store.close()
    assert failed == []


async def test_a_store_whose_write_failed_stays_readable_and_is_never_opened_again(store: LmdbMetaStore) -> None:
    kept = slot_of(name_of(b"kept"))
    await store.commit(StoreBatch(slots=[kept]))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (128 << 10, hard))
    try:
        with pytest.raises(DiskUnusable, match="failed"):
            await store.commit(
                StoreBatch(slots=[slot_of(name_of(b"%d" % number), body=b"x" * 4000) for number in range(100)])
            )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    with pytest.raises(DiskUnusable):
        await store.commit(StoreBatch())
    assert store.get(kept.name) == kept
    assert store.get(name_of(b"1")) is None
    await store.close()
    with pytest.raises(DiskForeign, match="failed before"):
        LmdbMetaStore.open_or_refuse(store.directory, store.identity)


@pytest.mark.parametrize("free", [0, 1 << 30])
async def test_a_checkpoint_that_is_cut_short_is_lack_of_space_where_none_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: int
) -> None:
    """LMDB calls both EIO. A disk that was full goes on when it is opened again; one that has room and does not write
    is given up.
    """
    store = LmdbMetaStore(tmp_path / "meta")
    slots = [slot_of(name_of(b"%02d" % number), body=b"x" * 100_000) for number in range(10)]
    monkeypatch.setattr(checkpoint, "CHECKPOINT_S", 60)
    monkeypatch.setattr(os, "statvfs", lambda _path: os.statvfs_result((1, 1, free, free, free, 0, 0, 0, 0, 255)))
    for slot in slots:
        await store.commit(StoreBatch(slots=[slot]))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, hard))
    try:
        await store.checkpoint()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert store.statistics().reason.endswith("Input/output error" if free else "Input/output error (no space is left)")
    assert [store.get(slot.name) for slot in slots] == slots
    await store.close()
    if free:
        with pytest.raises(DiskForeign, match="failed before"):
            LmdbMetaStore.open_or_refuse(store.directory, store.identity)
        return
    store = LmdbMetaStore.open_or_refuse(store.directory, store.identity)
    await store.checkpoint()
    assert store.statistics().state == "ok"
    assert [store.get(slot.name) for slot in slots] == slots
    await store.close()


async def test_a_page_that_is_none_any_more_is_damage_and_other_rows_are_read(tmp_path: Path) -> None:
    store = LmdbMetaStore(tmp_path / "meta", map_bytes=1 << 26)
    names = [name_of(b"key%04d" % number) for number in range(1000)]
    await store.commit(StoreBatch(slots=[slot_of(name) for name in names]))
    await store.close()
    path, leaf = tmp_path / "meta" / "data.mdb", struct.Struct("<QHH")
    data = bytearray(path.read_bytes())
    for at in range(0, len(data), 4096):
        number, pad, flags = leaf.unpack_from(data, at)
        if flags == 2 and names[500].key in data[at : at + 4096]:
            leaf.pack_into(data, at, number, pad, 4)
    path.write_bytes(data)
    store = LmdbMetaStore(tmp_path / "meta", map_bytes=1 << 26)
    with pytest.raises(RowDamaged):
        store.get(names[500])
    assert store.get(names[0]) == slot_of(names[0])
    assert store.get(names[999]) == slot_of(names[999])
    assert store.rows([name.pack() for name in names[499:1000:250]]) == [
        None,
        pack_row(slot_of(names[749])),
        pack_row(slot_of(names[999])),
    ]
    assert store.statistics().damaged_rows == 2
    await store.close()


async def test_a_file_that_was_cut_off_is_refused_or_read_where_it_is_whole_and_ends_no_process(tmp_path: Path) -> None:
    store = LmdbMetaStore(tmp_path / "meta", map_bytes=1 << 26)
    slots = [slot_of(name_of(b"key%04d" % number)) for number in range(1000)]
    await store.commit(StoreBatch(slots=slots))
    await store.close()
    whole = (tmp_path / "meta" / "data.mdb").read_bytes()
    for size in (0, 100, 5000, 8192, 20_000, len(whole) // 2, len(whole) - 4096):
        (tmp_path / "meta" / "data.mdb").write_bytes(whole[:size])
        try:
            store = LmdbMetaStore.open_or_refuse(tmp_path / "meta", store.identity, map_bytes=1 << 26)
        except (DiskForeign, DiskUnusable):
            continue
        outcomes = set()
        for slot in slots:
            try:
                assert store.get(slot.name) == slot
                outcomes.add("read")
            except (RowDamaged, DiskUnusable):
                outcomes.add("refused")
        assert size < len(whole) // 2 or outcomes == {"read", "refused"}
        await store.close()


async def test_a_callback_that_raises_keeps_its_news_from_no_other_commit(tmp_path: Path) -> None:
    told, troubles = asyncio.Event(), []
    asyncio.get_running_loop().set_exception_handler(lambda _loop, context: troubles.append(context["exception"]))

    def mistaken(_error: StoragedError | None) -> None:
        raise RuntimeError("a mistake")

    store = LmdbMetaStore(tmp_path)
    store.post(StoreBatch(meta={"one": b"1"}), mistaken)
    store.post(StoreBatch(meta={"two": b"2"}), lambda _error: told.set())
    await asyncio.wait_for(told.wait(), GUARD_S)
    await store.close()
    assert [str(error) for error in troubles] == ["a mistake"]


async def test_posts_beyond_the_bound_are_refused_while_the_disk_hangs_and_harm_nothing(
    store: LmdbMetaStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(write_queue, "QUEUED_BATCHES_MAX", 3)
    log = HeldLog(store)
    told: list[StoragedError | None] = []
    log.hold()
    for number in range(3):
        store.post(StoreBatch(meta={f"m{number}": b"1"}), told.append)
        await asyncio.sleep(0)
    await log.held.wait()
    with pytest.raises(SlowDown):
        store.post(StoreBatch(meta={"beyond": b"1"}), told.append)
    assert told == []
    log.go_on()
    await store.commit(StoreBatch(meta={"after": b"1"}))
    assert told == [None] * 3
    assert (store.get_meta("m2"), store.get_meta("beyond"), store.get_meta("after")) == (b"1", None, b"1")

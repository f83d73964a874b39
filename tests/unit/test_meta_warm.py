"""Ranges of a store that may not be in memory are read by a thread first; what is answered is the same."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import lmdb
import msgspec
import pytest

from storaged.cluster.ports import Call, PeerIdentity
from storaged.errors import DiskUnusable
from storaged.meta.acceptor.replica import LocalReplica
from storaged.meta.messages import ScanReply, ScanRequest, ShardAsk
from storaged.meta.storage import readahead
from storaged.meta.storage.lmdb_store import LmdbMetaStore
from storaged.meta.storage.scan import Want
from storaged.meta.store_ports import RowRange, StoreBatch
from storaged.meta.transport.replicas import ReplicaHost
from tests.patience import GUARD_S
from tests.suites.meta_store import name_of, slot_of
from tests.worlds.authority import until

CALL = Call(PeerIdentity("gw", "FR", "paris", "r1", ("gateway",)), memoryview(b""), 0.0)


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[LmdbMetaStore]:
    store = LmdbMetaStore(tmp_path, map_bytes=1 << 26)
    await store.commit(StoreBatch([slot_of(name_of(b"k%03d" % number), body=b"x" * 600) for number in range(300)]))
    await store.checkpoint()
    yield store
    await store.close()


def request(want: Want) -> ScanRequest:
    name = name_of(b"")
    ask = ShardAsk(name.shard, b"", 1000, want, 8000, 1 << 20)
    return ScanRequest("d", 1, name.table, name.scope, (ask,))


async def answer(host: ReplicaHost, asked: ScanRequest) -> tuple[ScanReply, bool]:
    """And whether it was given at once."""
    method = host.methods()["meta.scan"]
    assert method.try_answer is not None
    found: Any = method.try_answer(asked, CALL)
    if found is not None:
        return found, True
    found = await method.handler(asked, CALL)
    return found, False


@pytest.mark.parametrize("want", list(Want))
async def test_a_large_stores_ranges_are_read_by_a_thread_first_and_told_as_a_small_ones(
    store: LmdbMetaStore, want: Want, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = ReplicaHost({"d": LocalReplica("d", store)}, lambda: 1_000)
    expected, at_once = await answer(small, request(want))
    assert at_once
    assert store._readahead.reads == 0
    monkeypatch.setattr(readahead, "LARGE_BYTES", 0)
    large = ReplicaHost({"d": LocalReplica("d", store)}, lambda: 1_000)
    assert await answer(large, request(want)) == (expected, False)
    assert store._readahead.reads == 1
    again, at_once = await answer(large, request(want))
    assert again == expected
    assert at_once == (want in (Want.STAMPS, Want.HEADS_HASH)), "what a range came to is kept; its rows are read again"


async def test_what_cannot_be_read_is_found_by_who_reads_it(
    store: LmdbMetaStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_arguments: Any) -> None:
        raise lmdb.CorruptedError("a page")

    name = name_of(b"")
    assert store.slice(RowRange(*name[:3], after=b"", prefix=b"", limit=1))
    monkeypatch.setattr(readahead, "rows_of", broken)
    store.read_ahead(RowRange(*name[:3], after=b"", prefix=b"", limit=9), whole=True)
    assert store._readahead.reads == 1


async def test_a_store_closes_when_nothing_is_read_any_more_and_nothing_is_after_that(
    store: LmdbMetaStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    reading, may_end, rows = threading.Event(), threading.Event(), 0

    def slow(_transaction: Any, _heap: Any, values: Sequence[bytes]) -> None:
        nonlocal rows
        rows += len(values)
        reading.set()
        may_end.wait(GUARD_S)

    name = name_of(b"")
    assert store.slice(RowRange(*name[:3], after=b"", prefix=b"", limit=1))
    monkeypatch.setattr(readahead, "rows_of", slow)
    looking = asyncio.create_task(
        asyncio.to_thread(store.read_ahead, RowRange(*name[:3], after=b"", prefix=b"", limit=300), whole=True)
    )
    await asyncio.to_thread(reading.wait, GUARD_S)
    closing = asyncio.create_task(store.close())
    await until(lambda: store._readahead._closed)
    assert not closing.done()
    may_end.set()
    await asyncio.gather(looking, closing)
    assert 0 < rows < 300, "the rest of a long look is not waited for"
    store.read_ahead(RowRange(*name[:3], after=b"", prefix=b"", limit=9), whole=True)
    assert store._readahead.reads == 1


async def test_scans_that_are_given_up_hold_one_thread_for_a_disk_and_no_more(
    store: LmdbMetaStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    reading, may_end, begun = threading.Event(), threading.Event(), 0
    replica = LocalReplica("d", store)
    await replica.scan(request(Want.ALL))
    warmed = store.read_ahead

    def slow(*_arguments: Any) -> None:
        reading.set()
        may_end.wait(GUARD_S)

    def counted(*place: Any, **bounds: Any) -> None:
        nonlocal begun
        begun += 1
        warmed(*place, **bounds)

    monkeypatch.setattr(readahead, "LARGE_BYTES", 0)
    monkeypatch.setattr(readahead, "rows_of", slow)
    monkeypatch.setattr(store, "read_ahead", counted)
    for _ in range(3):
        scanning = asyncio.create_task(replica.scan(request(Want.ALL)))
        await until(reading.is_set)
        await asyncio.sleep(0.05)
        scanning.cancel()
        await asyncio.gather(scanning, return_exceptions=True)
    assert reading.is_set()
    assert begun == 1
    may_end.set()
    assert len((await replica.scan(request(Want.ALL))).slices) == 1
    assert begun == 2


async def test_a_replica_that_answers_nothing_says_so_of_a_scan_whatever_became_of_its_store(
    store: LmdbMetaStore,
) -> None:
    replica = LocalReplica("d", store)
    await replica.close()
    await store.close()
    with pytest.raises(DiskUnusable):
        replica.try_scan(request(Want.STAMPS))
    with pytest.raises(DiskUnusable):
        await replica.scan(request(Want.STAMPS))


async def test_a_scan_for_no_entries_is_answered_by_a_large_store_as_by_a_small_one(
    store: LmdbMetaStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    replica, name = LocalReplica("d", store), name_of(b"")
    asked = ScanRequest("d", 1, name.table, name.scope, (ShardAsk(name.shard, b"", 0, Want.ALL, 8000, 1 << 20),))
    expected = await replica.scan(asked)
    monkeypatch.setattr(readahead, "LARGE_BYTES", 0)
    assert await replica.scan(asked) == expected


async def test_reading_ahead_takes_no_thread_from_those_who_hash_and_log(
    store: LmdbMetaStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(1))
    reading, may_end = threading.Event(), threading.Event()
    replica = LocalReplica("d", store)
    await replica.scan(request(Want.ALL))

    def slow(*_arguments: Any) -> None:
        reading.set()
        may_end.wait(GUARD_S)

    monkeypatch.setattr(readahead, "LARGE_BYTES", 0)
    monkeypatch.setattr(readahead, "rows_of", slow)
    scanning = asyncio.create_task(replica.scan(request(Want.ALL)))
    await until(reading.is_set)
    try:
        async with asyncio.timeout(GUARD_S / 2):
            await asyncio.to_thread(lambda: None)
    finally:
        may_end.set()
    await scanning


async def test_what_is_read_for_the_first_time_since_a_start_is_read_by_a_thread_first_too(
    tmp_path: Path, store: LmdbMetaStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing of it is in memory then."""
    monkeypatch.setattr(readahead, "LARGE_BYTES", 0)
    touched: list[int] = []
    rows_of = readahead.rows_of
    monkeypatch.setattr(readahead, "rows_of", lambda *where: touched.append(len(where[2])) or rows_of(*where))
    await LocalReplica("d", store).scan(request(Want.ALL))
    assert sum(touched) == 300
    await store.close()
    started = LmdbMetaStore(tmp_path, map_bytes=1 << 26)
    await LocalReplica("d", started).scan(request(Want.ALL))
    await started.close()
    assert sum(touched) == 600


@pytest.mark.parametrize(("delimiter", "touched"), [(b"", 0), (b"/", 300)])
async def test_where_a_scan_with_a_delimiter_reads_whole_rows_so_does_the_thread(
    store: LmdbMetaStore, monkeypatch: pytest.MonkeyPatch, delimiter: bytes, touched: int
) -> None:
    """Also for what otherwise comes from the tree alone."""
    monkeypatch.setattr(readahead, "LARGE_BYTES", 0)
    found: list[int] = []
    monkeypatch.setattr(readahead, "rows_of", lambda _transaction, _heap, values: found.append(len(values)))
    await LocalReplica("d", store).scan(msgspec.structs.replace(request(Want.STAMPS), delimiter=delimiter))
    assert sum(found) == touched


async def test_a_store_that_is_closed_is_not_large(store: LmdbMetaStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader that goes through its rows meanwhile gets the error from its read: the disk is out of use."""
    monkeypatch.setattr(readahead, "LARGE_BYTES", 0)
    assert store.large
    await store.close()
    assert not store.large
    with pytest.raises(DiskUnusable):
        store.slice(RowRange(*name_of(b"")[:3], after=b"", prefix=b"", limit=1))

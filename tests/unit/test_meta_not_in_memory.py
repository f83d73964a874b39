"""A store whose pages are not all in memory answers as any other: its threads read what the event loop must not."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from storaged.meta import messages
from storaged.meta.acceptor.replica import LocalReplica
from storaged.meta.consensus.register import Verdict
from storaged.meta.messages import ScanRequest, ShardAsk
from storaged.meta.names import Ballot, Value, Visibility
from storaged.meta.storage import reader as reader_module
from storaged.meta.storage.lmdb_store import LmdbMetaStore
from storaged.meta.storage.scan import Want
from storaged.meta.store_ports import Fence, NotInMemory, RowRange, StoreBatch
from tests.patience import GUARD_S
from tests.suites.meta_store import BUCKET, name_of, page_of, slot_of

ROWS = 100


def name(number: int) -> Any:
    return name_of(b"k%03d" % number)


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[LmdbMetaStore]:
    opened = LmdbMetaStore(tmp_path / "meta", map_bytes=1 << 26)
    slots = [slot_of(name(number), body=b"x" * 600) for number in range(ROWS)]
    await opened.commit(StoreBatch(slots, fences=[Fence(b"f" * 16, b"nonce", final=False)], meta={"note": b"n"}))
    await opened.commit(StoreBatch(pages=[page_of(b"page")]))
    await opened.checkpoint()
    await opened.close()
    again = LmdbMetaStore(tmp_path / "meta", map_bytes=1 << 26)
    again.in_memory = False
    yield again
    again.in_memory = True
    await again.close()


def at(counter: int) -> Ballot:
    return Ballot(3, counter, "gw", b"incarnat")


def value_of(body: bytes) -> Value:
    return Value(5, b"p" * 16, Visibility.LIVE, body)


async def test_the_loop_reads_nothing_that_may_wait(store: LmdbMetaStore) -> None:
    shard = RowRange(*name(0)[:3], after=b"", prefix=b"", limit=10)
    for read in (
        lambda: store.get(name(1)),
        lambda: store.get_fence(b"f" * 16),
        lambda: store.get_meta("note"),
        lambda: store.get_page(page_of(b"page").page_hash),
        lambda: store.pages(after=b"", limit=9),
        lambda: store.slice(shard),
        lambda: store.columns(shard),
        lambda: store.stamps(shard),
        store.scopes,
    ):
        with pytest.raises(NotInMemory):
            read()
        assert await store.read(read)  # type: ignore[arg-type]
    assert store.row(name(1).pack()) is None
    assert store.rows([name(1).pack(), name(2).pack()]) == [None, None]


async def test_what_a_thread_has_read_the_loop_has(store: LmdbMetaStore) -> None:
    for number, there in ((1, True), (ROWS + 1, False)):
        with pytest.raises(NotInMemory) as missing:
            store.get(name(number))
        await store.load(missing.value)
        assert (store.get(name(number)) is not None) == there
        assert (store.row(name(number).pack()) != b"") == there
    with pytest.raises(NotInMemory) as missing:
        store.get_meta("note")
    await store.load(missing.value)
    assert store.get_meta("note") == b"n"


async def test_a_write_takes_the_place_of_what_was_read_before_it(store: LmdbMetaStore) -> None:
    await store.load(NotInMemory((name(1).prefix, name(1).key)))
    assert len(store._state.remembered) == 1
    await store.commit(StoreBatch([slot_of(name(1), 9, body=b"new")]))
    await store.checkpoint()
    with pytest.raises(NotInMemory):
        store.get(name(1))
    assert (await store.read(lambda: store.get(name(1)))).value.body == b"new"  # type: ignore[union-attr]


async def test_a_write_during_a_read_is_not_hidden_by_what_the_read_found(
    store: LmdbMetaStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    reading, may_end = threading.Event(), threading.Event()
    plain = reader_module.stored_row

    def held(*given: Any) -> bytes:
        found = plain(*given)
        reading.set()
        may_end.wait(GUARD_S)
        return found

    monkeypatch.setattr(reader_module, "stored_row", held)
    loading = asyncio.create_task(store.load(NotInMemory((name(1).prefix, name(1).key))))
    await asyncio.to_thread(reading.wait, GUARD_S)
    await store.commit(StoreBatch([slot_of(name(1), 9, body=b"new")]))
    await store.checkpoint()
    may_end.set()
    await loading
    assert len(store._state.remembered) == 0
    with pytest.raises(NotInMemory) as missing:
        store.get(name(1))
    await store.load(missing.value)
    assert store.get(name(1)).value.body == b"new"  # type: ignore[union-attr]


async def test_so_much_is_remembered_and_no_more(store: LmdbMetaStore) -> None:
    store._state.remembered._bytes_max = 5_000
    for number in range(ROWS):
        await store.load(NotInMemory((name(number).prefix, name(number).key)))
    assert 3 <= len(store._state.remembered) <= 6
    assert store.get(name(ROWS - 1)) is not None


async def test_an_acceptor_over_it_answers_as_over_any_other(store: LmdbMetaStore) -> None:
    store.in_memory = True
    replica = LocalReplica("d", store)
    store.in_memory = False
    prepare = messages.Prepare("d", name(1), at(10))
    assert replica.try_prepare(prepare) is None
    promise = await replica.prepare(prepare)
    assert (promise.verdict, promise.value.body) == (Verdict.OK, b"x" * 600)  # type: ignore[union-attr]
    assert (await replica.prepare(messages.Prepare("d", name(1), at(9)))).verdict == Verdict.PREEMPTED
    told: list[object] = []
    accept = messages.Accept("d", name(2), at(12), value_of(b"new"))
    assert not replica.try_accept(accept, (), told.append)
    assert (await replica.accept(accept)).verdict == Verdict.OK
    create = messages.Create("d", name(3), at(13), value_of(b"new"))
    assert (await replica.accept(create)).verdict != Verdict.OK, "there is a row"
    reply, _ = await replica.read(messages.Read("d", name(2), 3))
    assert reply.value is not None
    assert reply.value.body == b"new"
    absent, _ = await replica.read(messages.Read("d", name(ROWS), 3))
    assert (absent.verdict, absent.value) == (Verdict.OK, None)
    assert replica.statistics().accepts == 2
    assert told == []


@pytest.mark.parametrize("want", list(Want))
async def test_a_scan_finds_the_same(store: LmdbMetaStore, want: Want) -> None:
    store.in_memory = True
    replica = LocalReplica("d", store)
    ask = ShardAsk(name(0).shard, b"", 50, want, 8000, 1 << 20)
    request = ScanRequest("d", 3, name(0).table, BUCKET, (ask,))
    expected = await replica.scan(request)
    store.in_memory = False
    other = LocalReplica.__new__(LocalReplica)
    other.__dict__.update(replica.__dict__)
    replica._rows._digests._digests.clear()
    assert replica.try_scan(request) is None
    assert await replica.scan(request) == expected

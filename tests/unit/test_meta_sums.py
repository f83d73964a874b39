"""The sum of a shard's rows: always that of the rows that are there, or none."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lmdb
import pytest

from storaged.meta.messages import ScanRequest, ShardAsk, ShardSlice
from storaged.meta.names import RegisterName, Table
from storaged.meta.storage import reader, scan, sums
from storaged.meta.storage.identity import IDENTITY
from storaged.meta.storage.lmdb_store import LmdbMetaStore
from storaged.meta.storage.rowvalue import check_number, open_small, seal_small
from storaged.meta.storage.scan import Want, scan_store
from storaged.meta.store_ports import MetaStore, RowRange, StoreBatch
from tests.suites.meta_store import BUCKET, name_of, slot_of

PREFIX = name_of(b"k").prefix
STARTS, SUM_KEY = b"\0sums", PREFIX + b"sum"
GUARD_S = 20.0


def open_store(directory: Path) -> LmdbMetaStore:
    return LmdbMetaStore(directory, map_bytes=1 << 26)


@contextmanager
def raw(directory: Path) -> Iterator[tuple[Any, Any, Any]]:
    """A transaction of the closed store's own LMDB, its ``nodes`` and its ``meta``."""
    with lmdb.open(str(directory), max_dbs=6, map_size=1 << 26) as environment:
        nodes, meta = environment.open_db(b"nodes", create=False), environment.open_db(b"meta", create=False)
        with environment.begin(write=True) as transaction:
            yield transaction, nodes, meta


async def put(store: LmdbMetaStore, numbers: range, counter: int = 1, body: bytes = b"x" * 200) -> None:
    await store.commit(StoreBatch([slot_of(name_of(b"k%05d" % number), counter, body) for number in numbers]))


def sum_of(store: MetaStore, prefix: bytes = PREFIX) -> int:
    """As the rows say."""
    wanted = RowRange(prefix[0], prefix[1:17], prefix[17], b"", b"", 10_000)
    return sum(check_number(row) for _, row in store.slice(wanted)) % 2**64


async def built(store: LmdbMetaStore, prefix: bytes = PREFIX) -> int:
    async with asyncio.timeout(GUARD_S):
        while (found := store.shard_sum(prefix)) is None:  # noqa: ASYNC110  # a thread builds it, and sets no event
            await asyncio.sleep(0.01)
    return found


async def without_sums(directory: Path, rows: int) -> None:
    """A closed store as a program leaves it that knows no sums."""
    store = open_store(directory)
    await put(store, range(rows))
    await store.close()
    with raw(directory) as (transaction, nodes, meta):
        assert transaction.delete(SUM_KEY, db=nodes)
        assert transaction.delete(STARTS, db=meta)


async def test_a_sum_is_kept_from_the_first_row_on_whatever_becomes_of_the_rows(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    assert store.shard_sum(PREFIX) == 0
    for counter, body in enumerate([b"", b"x" * 200, b"", b"x" * 3000]):
        await put(store, range(5 * counter, 5 * counter + 20), counter + 1, body)
        assert store.shard_sum(PREFIX) == sum_of(store) != 0
        await store.checkpoint()
        assert store.shard_sum(PREFIX) == sum_of(store)
    long = [name_of(b"l" * length) for length in (480, 481, 1041)]
    await store.commit(StoreBatch([slot_of(name) for name in long]))
    await store.checkpoint()
    assert store.shard_sum(PREFIX) == sum_of(store)
    await store.commit(StoreBatch(gone=[long[1], name_of(b"k00003"), name_of(b"never there")]))
    assert store.shard_sum(PREFIX) == sum_of(store)
    await store.close()
    store = open_store(tmp_path)
    assert store.shard_sum(PREFIX) == sum_of(store)
    await store.commit(StoreBatch(gone=[name_of(b"k%05d" % number) for number in range(40)]))
    await store.commit(StoreBatch(gone=long))
    assert store.shard_sum(PREFIX) == 0
    await store.checkpoint()
    assert store.shard_sum(PREFIX) == 0
    await store.close()


async def test_rows_of_other_shards_are_not_in_it(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    names = [name_of(b"k"), name_of(b"k", shard=1), name_of(b"k", table=Table.PART), name_of(b"k", bytes(16))]
    await store.commit(StoreBatch([slot_of(name) for name in names]))
    for _ in range(2):
        found = [store.shard_sum(name.prefix) for name in names]
        assert found == [sum_of(store, name.prefix) for name in names]
        assert len(set(found)) == 4
        await store.checkpoint()
    await store.close()


async def test_a_store_without_sums_gets_one_when_it_is_asked_for_while_rows_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await without_sums(tmp_path, 300)
    monkeypatch.setattr(sums, "SLICE_ROWS", 7)
    store = open_store(tmp_path)
    assert store.shard_sum(PREFIX) is None
    for counter in range(2, 12):  # before, in and behind what was read
        await put(store, range(0, 400, counter), counter)
        await store.commit(StoreBatch(gone=[name_of(b"k%05d" % (counter * 11))]))
        await store.checkpoint()
    assert await built(store) == sum_of(store)
    await store.checkpoint()
    assert store.shard_sum(PREFIX) == sum_of(store)
    await store.close()
    store = open_store(tmp_path)
    assert store.shard_sum(PREFIX) == sum_of(store)
    await store.close()


async def test_each_checkpoint_in_the_middle_of_the_reading_counts_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same, one step after the other."""
    await without_sums(tmp_path, 30)
    monkeypatch.setattr(sums, "SLICE_ROWS", 10)
    store = open_store(tmp_path)
    applier, state = store._checkpointer.applier, store._state
    assert not applier.build_sum(state, PREFIX)  # rows 0 to 9
    await put(store, range(5, 15), 2)
    await put(store, range(30, 33), 2)
    await store.commit(StoreBatch(gone=[name_of(b"k00009"), name_of(b"k00010")]))
    await store.checkpoint()
    assert not applier.build_sum(state, PREFIX)
    await put(store, range(40), 3)
    await store.checkpoint()
    while not applier.build_sum(state, PREFIX):
        pass
    assert store.shard_sum(PREFIX) == sum_of(store)
    await store.close()


async def test_a_checkpoint_that_was_not_committed_does_not_count_in_a_sum_that_is_being_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await without_sums(tmp_path, 30)
    monkeypatch.setattr(sums, "SLICE_ROWS", 10)
    store = open_store(tmp_path)
    state, checkpointer = store._state, store._checkpointer
    assert not checkpointer.applier.build_sum(state, PREFIX)
    put_mark = state.put_mark

    def full(*_arguments: Any, **_options: Any) -> None:
        raise lmdb.MapFullError("no room")

    monkeypatch.setattr(state, "put_mark", full)
    await put(store, range(20), 2)
    await store.checkpoint()
    assert state.starved
    monkeypatch.setattr(state, "put_mark", put_mark)
    await store.checkpoint()
    assert not state.starved
    while not checkpointer.applier.build_sum(state, PREFIX):
        pass
    assert store.shard_sum(PREFIX) == sum_of(store)
    await store.close()


async def test_what_a_program_without_sums_has_changed_is_not_believed(tmp_path: Path) -> None:
    """It opens the store and writes, and this program opens it again."""
    last = RegisterName(Table.OBJECT, BUCKET[:14] + b"su", ord("m"), b"k")
    assert last.prefix.endswith(b"sum")
    store = open_store(tmp_path)
    await put(store, range(20))
    await store.commit(StoreBatch([slot_of(last)]))
    await store.close()
    with raw(tmp_path) as (transaction, nodes, meta):
        before, noted = transaction.get(SUM_KEY, db=nodes), transaction.get(STARTS, db=meta)
    store = open_store(tmp_path)
    await put(store, range(10), 2)
    await store.close()
    with raw(tmp_path) as (transaction, nodes, meta):
        assert transaction.get(SUM_KEY, db=nodes) != before
        transaction.put(SUM_KEY, before, db=nodes)
        transaction.put(STARTS, noted, db=meta)
    store = open_store(tmp_path)
    assert store.get(last) == slot_of(last), "its shard's name looks like a sum's"
    assert store.shard_sum(PREFIX) is None
    assert await built(store) == sum_of(store)
    await store.close()


async def test_starts_of_this_program_keep_the_sums(tmp_path: Path) -> None:
    for _ in range(3):
        store = open_store(tmp_path)
        await put(store, range(3), store.starts)
        await store.close()
        with raw(tmp_path) as (transaction, _nodes, meta):
            starts = open_small(IDENTITY, transaction.get(IDENTITY, db=meta))[16:]
            assert open_small(STARTS, transaction.get(STARTS, db=meta)) == starts
    store = open_store(tmp_path)
    assert store.shard_sum(PREFIX) == sum_of(store)
    await store.close()


async def test_a_damaged_sum_is_none_and_is_built_again(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    await put(store, range(20))
    await store.close()
    with raw(tmp_path) as (transaction, nodes, _meta):
        sealed = transaction.get(SUM_KEY, db=nodes)
        transaction.put(SUM_KEY, sealed[:-1] + bytes([sealed[-1] ^ 1]), db=nodes)
    store = open_store(tmp_path)
    assert store.shard_sum(PREFIX) is None
    await put(store, range(30), 2)
    await store.checkpoint()
    assert await built(store) == sum_of(store)
    await store.close()


async def test_a_shard_that_can_not_be_read_stays_without_a_sum_and_keeps_nobody(tmp_path: Path) -> None:
    await without_sums(tmp_path, 20)
    with raw(tmp_path) as (transaction, nodes, _meta):
        transaction.put(PREFIX, seal_small(PREFIX + b"another", (1).to_bytes(8, "big")), db=nodes)
    store = open_store(tmp_path)
    other = name_of(b"k", shard=1)
    store._state.sums_wanted[PREFIX] = None
    await store.commit(StoreBatch([slot_of(other)]))
    async with asyncio.timeout(GUARD_S):
        while store._state.sums_wanted:  # noqa: ASYNC110  # as above
            await asyncio.sleep(0.01)
    await store.checkpoint()
    assert store.shard_sum(other.prefix) == sum_of(store, other.prefix)
    assert store.statistics().state == "ok"
    await store.close()


async def test_a_mistake_while_a_sum_is_built_does_not_end_the_thread_that_makes_checkpoints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await without_sums(tmp_path, 20)

    def mistake(*_arguments: Any) -> None:
        raise ValueError("a mistake")

    monkeypatch.setattr(sums.Sums, "read_slice", mistake)
    store = open_store(tmp_path)
    assert store.shard_sum(PREFIX) is None
    async with asyncio.timeout(GUARD_S):
        while store._state.sums_wanted:  # noqa: ASYNC110  # as above
            await asyncio.sleep(0.01)
    before = store.statistics().checkpoints
    await put(store, range(20), 2)
    async with asyncio.timeout(GUARD_S):
        while store.statistics().checkpoints == before:  # noqa: ASYNC110  # as above
            await asyncio.sleep(0.01)
    await store.close()


async def test_a_sum_with_too_much_that_is_not_in_lmdb_is_not_found_on_the_event_loop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reader, "SUMMED_MAX", 5)
    store = open_store(tmp_path)
    await put(store, range(5))
    assert store.shard_sum(PREFIX) == sum_of(store)
    await put(store, range(5, 6))
    assert store.shard_sum(PREFIX) is None
    assert not store._state.sums_wanted
    await store.checkpoint()
    assert store.shard_sum(PREFIX) == sum_of(store)
    await store.close()


async def test_after_a_kill_the_sum_is_that_of_what_was_acknowledged(tmp_path: Path) -> None:
    store = open_store(tmp_path / "first")
    await put(store, range(20))
    await store.checkpoint()
    await put(store, range(10, 30), 2)
    shutil.copytree(tmp_path / "first", tmp_path / "killed")
    await store.close()
    store = open_store(tmp_path / "killed")
    assert store.get(name_of(b"k00029")) is not None
    assert store.shard_sum(PREFIX) == sum_of(store)
    await store.close()


# --- what a replica answers


def asked(store: MetaStore, want: int, shard: int = 0) -> ShardSlice:
    request = ScanRequest("d", 1, Table.OBJECT, BUCKET, (ShardAsk(shard, b"", 0, want, 8192, 1 << 20),))
    return scan_store(store, request).slices[0]


async def test_a_scan_tells_the_sum_without_a_look_at_the_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store(tmp_path)
    await put(store, range(20))
    expected = sum_of(store)
    for read in ("slice", "columns", "stamps"):
        monkeypatch.setattr(store, read, None)
    assert asked(store, Want.SUM) == ShardSlice(0, b"", True, expected)
    assert asked(store, Want.SUM, 1) == ShardSlice(1, b"", True, 0)
    monkeypatch.setattr(store, "shard_sum", lambda _prefix: None)
    assert asked(store, Want.SUM).unreadable
    await store.close()


async def test_a_replica_that_knows_no_sums_never_says_that_it_has_looked_at_rows(tmp_path: Path) -> None:
    """An older one scans for what it does not know as for any rows."""
    store = open_store(tmp_path)
    await put(store, range(20))
    request = ScanRequest("d", 1, Table.OBJECT, BUCKET, ())
    for shard, done in ((0, False), (1, True)):
        ask = ShardAsk(shard, b"", 0, Want.SUM, 8192, 1 << 20)
        found, _ = scan._scan(store, request, ask, Want.SUM)
        assert (found.done, found.looked_at) == (done, 0)
    await store.close()

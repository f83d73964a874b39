"""Rows apart from their keys: a longer row lies in the heap, a short one in the tree; a reader sees no difference,
whichever it was before.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lmdb
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from storaged.errors import DiskForeign
from storaged.meta.names import RegisterName, Table, Visibility
from storaged.meta.storage import heap, identity
from storaged.meta.storage.lmdb_store import LmdbMetaStore
from storaged.meta.storage.rowkey import row_key
from storaged.meta.storage.rowvalue import open_small, pack_row, seal_small
from storaged.meta.store_ports import RowDamaged, RowRange, Slot, StoreBatch
from tests.examples import examples
from tests.suites.meta_store import BUCKET, name_of, slot_of, slots_in

LONG, SHORT = b"x" * 600, b""
KEYS = [b"a", b"b", b"c" * 480, b"c" * 481, b"c" * 1000, b"d"]
SIZES = [0, 60, 61, 62, 63, 64, 200, 600, 1990, 5000]


@contextmanager
def raw(directory: Path) -> Iterator[tuple[Any, Any, Any]]:
    """A transaction of the closed store's own LMDB, its ``rows`` and its ``heap``."""
    with lmdb.open(str(directory), max_dbs=6, map_size=1 << 26) as environment:
        rows, heap_ = environment.open_db(b"rows", create=False), environment.open_db(b"heap", create=False)
        with environment.begin(write=True) as transaction:
            yield transaction, rows, heap_


def open_store(directory: Path) -> LmdbMetaStore:
    return LmdbMetaStore(directory, map_bytes=1 << 26)


async def stored(directory: Path, *slots: Slot) -> None:
    store = open_store(directory)
    await store.commit(StoreBatch(list(slots)))
    await store.close()


async def assert_damaged(directory: Path, damaged: Slot, whole: Slot) -> None:
    """The one row is damaged to everyone who verifies, its neighbour is not, and a new value mends it."""
    store = open_store(directory)
    with pytest.raises(RowDamaged):
        store.get(damaged.name)
    assert store.rows([damaged.name.pack(), whole.name.pack()]) == [None, pack_row(whole)]
    with pytest.raises(RowDamaged):
        slots_in(store, *damaged.name[:3], after=b"", prefix=b"", limit=9)
    mended = slot_of(damaged.name, 7, LONG)
    await store.commit(StoreBatch([mended]))
    await store.checkpoint()
    assert (store.get(damaged.name), store.get(whole.name)) == (mended, whole)
    await store.close()


async def test_a_flipped_bit_in_the_heap_is_found(tmp_path: Path) -> None:
    slots = [slot_of(name_of(key), 1, LONG) for key in (b"a", b"b")]
    await stored(tmp_path, *slots)
    with raw(tmp_path) as (transaction, _rows, heap_):
        number, row = next(iter(transaction.cursor(db=heap_)))
        transaction.put(number, row[:-1] + bytes([row[-1] ^ 8]), db=heap_)
    await assert_damaged(tmp_path, slots[0], slots[1])


async def test_a_reference_to_another_row_is_found(tmp_path: Path) -> None:
    slots = [slot_of(name_of(key), 1, LONG) for key in (b"a", b"b")]
    await stored(tmp_path, *slots)
    with raw(tmp_path) as (transaction, rows, _heap):
        (first, _), (_, other) = list(transaction.cursor(db=rows))
        transaction.put(first, other, db=rows)
    await assert_damaged(tmp_path, slots[0], slots[1])


async def test_a_row_that_is_gone_from_the_heap_is_found(tmp_path: Path) -> None:
    slots = [slot_of(name_of(key), 1, LONG) for key in (b"a", b"b")]
    await stored(tmp_path, *slots)
    with raw(tmp_path) as (transaction, _rows, heap_):
        transaction.delete((1).to_bytes(8, "big"), db=heap_)
    await assert_damaged(tmp_path, slots[0], slots[1])


async def test_an_older_row_of_the_same_register_is_not_taken_for_the_one_that_was_accepted(tmp_path: Path) -> None:
    """It is whole, and its check holds: the reference knows that another one belongs there."""
    slots = [slot_of(name_of(key), 2, LONG) for key in (b"a", b"b")]
    await stored(tmp_path, *slots)
    with raw(tmp_path) as (transaction, _rows, heap_):
        transaction.put((1).to_bytes(8, "big"), pack_row(slot_of(name_of(b"a"), 1, LONG)), db=heap_)
    await assert_damaged(tmp_path, slots[0], slots[1])


async def test_numbers_go_on_after_a_restart_and_no_row_is_written_over(tmp_path: Path) -> None:
    slots = []
    for number in range(5):
        store = open_store(tmp_path)
        for part in range(3):
            slots.append(slot_of(name_of(b"%d %d" % (number, part)), 1, LONG))
            await store.commit(StoreBatch(slots[-1:]))
            await store.checkpoint()
        assert [store.get(slot.name) for slot in slots] == slots
        await store.close()
    with raw(tmp_path) as (transaction, _rows, heap_):
        assert [int.from_bytes(key, "big") for key, _ in transaction.cursor(db=heap_)] == list(range(1, 16))


async def test_numbers_go_on_behind_those_that_were_given_also_when_the_end_of_the_heap_is_damaged(
    tmp_path: Path,
) -> None:
    """One bit of the last key, flipped in the file: every row that came after the next start would take the number of
    another.
    """
    old = [slot_of(name_of(b"%03d" % number), 1, LONG) for number in range(200)]
    await stored(tmp_path, *old)
    data = (tmp_path / "data.mdb").read_bytes()
    entry = (200).to_bytes(8, "big") + pack_row(old[-1])
    assert entry in data
    (tmp_path / "data.mdb").write_bytes(data.replace(entry, (200 - 128).to_bytes(8, "big") + pack_row(old[-1])))
    store = open_store(tmp_path)
    fresh = [slot_of(name_of(b"fresh %03d" % number), 1, LONG) for number in range(200)]
    await store.commit(StoreBatch(fresh))
    await store.checkpoint()
    assert [store.get(slot.name) for slot in fresh] == fresh
    pages_before = 200 - 8  # what lies in the last one is hard to find there
    assert [store.get(slot.name) for slot in old[:pages_before]] == old[:pages_before]
    await store.close()


async def test_the_end_of_the_heap_tells_the_next_number_when_what_stands_beside_it_is_damaged(tmp_path: Path) -> None:
    slots = [slot_of(name_of(b"%d" % number), 1, LONG) for number in range(2)]
    await stored(tmp_path, slots[0])
    with lmdb.open(str(tmp_path), max_dbs=6, map_size=1 << 26) as environment:
        meta = environment.open_db(b"meta", create=False)
        with environment.begin(write=True, db=meta) as transaction:
            sealed = transaction.get(heap.NEXT_NUMBER)
            assert open_small(heap.NEXT_NUMBER, sealed) == (2).to_bytes(8, "big")
            transaction.put(heap.NEXT_NUMBER, sealed[:-1] + b"\0")
    await stored(tmp_path, slots[1])
    store = open_store(tmp_path)
    assert [store.get(slot.name) for slot in slots] == slots
    await store.close()


async def test_a_checkpoint_stops_at_a_heap_that_ends_behind_what_it_knows(tmp_path: Path) -> None:
    """It would write over somebody's row."""
    store = open_store(tmp_path)
    await store.commit(StoreBatch([slot_of(name_of(b"a"), 1, LONG)]))
    await store.checkpoint()
    with store._environment.begin(write=True) as transaction:
        transaction.put((9).to_bytes(8, "big"), b"a row", db=store._heap)
    await store.commit(StoreBatch([slot_of(name_of(b"b"), 1, LONG)]))
    await store.checkpoint()
    assert store.statistics().state == "read-only"
    assert store.get(name_of(b"b")) == slot_of(name_of(b"b"), 1, LONG)
    await store.close()


async def as_before_there_was_a_heap(directory: Path, slots: list[Slot]) -> None:
    """A closed store with all rows in the tree, however long, and a mark that ends before the layout."""
    await stored(directory, *[slot_of(slot.name) for slot in slots])
    with raw(directory) as (transaction, rows, heap_):
        root = int.from_bytes(next(iter(transaction.cursor(db=rows)))[0][:8], "big")
        for slot in slots:
            transaction.put(row_key(root, slot.name.key), pack_row(slot), db=rows)
        assert transaction.stat(heap_)["entries"] == 0
    with lmdb.open(str(directory), max_dbs=6, map_size=1 << 26) as environment:
        meta = environment.open_db(b"meta", create=False)
        with environment.begin(write=True, db=meta) as transaction:
            mark = open_small(identity.REDO, transaction.get(identity.REDO))
            transaction.put(identity.REDO, seal_small(identity.REDO, mark[:25]))


async def test_a_store_from_before_there_was_a_heap_is_read_and_moves_row_by_row(tmp_path: Path) -> None:
    slots = [slot_of(name_of(b"%d" % number), 1, bytes(400 * number)) for number in range(6)]
    await as_before_there_was_a_heap(tmp_path, slots)
    for step in range(len(slots)):
        store = open_store(tmp_path)
        assert [store.get(slot.name) for slot in slots] == slots
        where = {"after": b"", "prefix": b"", "limit": 9}
        assert slots_in(store, *slots[0].name[:3], **where) == slots
        stamps = store.stamps(RowRange(*slots[0].name[:3], **where))
        assert stamps.stamps == b"".join(pack_row(slot)[:10] for slot in slots)
        assert stamps.row_bytes == sum(len(pack_row(slot)) for slot in slots)
        slots[step] = slot_of(slots[step].name, 2, bytes(400 * step))
        await store.commit(StoreBatch([slots[step]]))
        await store.close()
    with raw(tmp_path) as (transaction, rows, heap_):
        assert transaction.stat(heap_)["entries"] == 5
        assert max(len(value) for _, value in transaction.cursor(db=rows)) < heap.INLINE_ROW_BYTES_MAX


async def test_a_store_of_a_later_layout_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    await stored(tmp_path, slot_of(name_of(b"a")))
    with lmdb.open(str(tmp_path), max_dbs=6, map_size=1 << 26) as environment:
        meta = environment.open_db(b"meta", create=False)
        with environment.begin(write=True, db=meta) as transaction:
            mark = open_small(identity.REDO, transaction.get(identity.REDO))
            assert (len(mark), mark[-1]) == (26, 1), "a program that knows of no heap refuses a mark of this length"
            transaction.put(identity.REDO, seal_small(identity.REDO, mark[:-1] + b"\2"))
    before = (tmp_path / "data.mdb").read_bytes()
    with pytest.raises(DiskForeign, match="later version: its layout is 2"):
        open_store(tmp_path)
    assert (tmp_path / "data.mdb").read_bytes() == before


@settings(deadline=None, max_examples=examples(60))
@given(
    checkpoints=st.lists(
        st.lists(
            st.tuples(st.sampled_from(KEYS), st.sampled_from(SIZES), st.sampled_from(list(Visibility))),
            min_size=1,
            max_size=8,
        ),
        min_size=1,
        max_size=8,
    )
)
async def test_however_rows_grow_and_shrink_they_are_read_as_they_are_and_the_heap_keeps_no_others(
    memory: Path, checkpoints: list[list[tuple[bytes, int, int]]]
) -> None:
    directory = Path(tempfile.mkdtemp(dir=memory))
    store = open_store(directory)
    model: dict[bytes, Slot] = {}
    counter = 0
    for puts in checkpoints:
        for key, size, visibility in puts:
            counter += 1
            model[key] = slot_of(name_of(key), counter, bytes(size), visibility)
            await store.commit(StoreBatch([model[key]]))
        await store.checkpoint()
        for key in KEYS:
            assert store.get(name_of(key)) == model.get(key)
        for after, limit in ((b"", 9), (b"a", 2), (b"c" * 480, 9)):
            expected = [pack_row(model[key]) for key in sorted(model) if key > after]
            where = {"after": after, "prefix": b"", "limit": limit}
            assert [row for _, row in store.slice(RowRange(Table.OBJECT, BUCKET, 0, **where))] == expected[:limit]
            assert store.columns(RowRange(Table.OBJECT, BUCKET, 0, **where))[1] == expected[:limit]
            stamps = store.stamps(RowRange(Table.OBJECT, BUCKET, 0, **where))
            assert stamps.stamps == b"".join(row[:10] for row in expected[:limit])
            assert stamps.row_bytes == sum(map(len, expected[:limit]))
    await store.close()
    with raw(directory) as (transaction, rows, heap_):
        referred = [value[14:] for _, value in transaction.cursor(db=rows) if len(value) == heap.REFERENCE_BYTES]
        assert sorted(referred) == [key for key, _ in transaction.cursor(db=heap_)]
        assert len(referred) == len(
            [slot for slot in model.values() if len(pack_row(slot)) > heap.INLINE_ROW_BYTES_MAX]
        )


def test_the_documented_reference_is_what_the_code_writes() -> None:
    text = (Path(heap.__file__).parents[2] / "FORMATS.md").read_text()
    block = re.search(r"<!-- reference vector -->\s*```\n(.*?)```", text, re.DOTALL)
    assert block is not None
    documented = b"".join(bytes.fromhex(line.split("  ")[0]) for line in block[1].splitlines())
    row = pack_row(slot_of(RegisterName(Table.OBJECT, bytes(range(16)), 3, b"photos/1.jpg"), 5, bytes(200)))
    assert heap.refer(row, (1).to_bytes(8, "big")) == documented
    assert heap.stamps_of([documented, row]) == (2 * row[:10], 2 * len(row))

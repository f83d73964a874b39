"""What every body of the MetaStore port does. A module that has one provides the fixture ``store`` and imports
everything from here.
"""

from __future__ import annotations

import asyncio
import itertools

import pytest

from storaged.cluster.layout import SYSTEM_PARTITION, partition_of
from storaged.hashes import page_hash
from storaged.meta.names import SYSTEM_SCOPE, Ballot, RegisterName, Table, Value, Visibility, system_name
from storaged.meta.storage.rowvalue import check_of, intact, pack_row, row_parts, stamps_in, unpack_row, value_of
from storaged.meta.store_ports import Fence, MetaStore, RowRange, Slot, StoreBatch, StoredPage

BUCKET = bytes(range(16))
OTHER = bytes(range(1, 17))


def name_of(key: bytes, scope: bytes = BUCKET, shard: int = 0, table: int = Table.OBJECT) -> RegisterName:
    return RegisterName(table, scope, shard, key)


def slot_of(
    name: RegisterName, counter: int = 1, body: bytes = b"body", visibility: int = Visibility.LIVE, payload: bytes = b""
) -> Slot:
    value = Value(sequence=counter, operation=b"o" * 16, visibility=visibility, body=body, payload=payload)
    return Slot(name, Ballot(3, counter, "n1", b"incarnat"), value, copied=bool(payload))


def slots_in(
    store: MetaStore, table: int, scope: bytes, shard: int, *, after: bytes, prefix: bytes, limit: int
) -> list[Slot]:
    """The rows of a slice, taken apart. Raises RowDamaged."""
    rows = store.slice(RowRange(table, scope, shard, after=after, prefix=prefix, limit=limit))
    return [unpack_row(RegisterName(table, scope, shard, key), row) for key, row in rows]


def page_of(body: bytes, created_ms: int = 7) -> StoredPage:
    return StoredPage(page_hash(body), body, created_ms)


async def test_what_was_never_written_is_absent(store: MetaStore) -> None:
    assert store.get(name_of(b"k")) is None
    assert store.get(name_of(b"k" * 1000)) is None
    assert store.get_fence(BUCKET) is None
    assert store.get_page(bytes(16)) is None
    assert store.pages(after=b"", limit=10) == []
    assert store.get_meta("floor") is None
    assert slots_in(store, Table.OBJECT, BUCKET, 0, after=b"", prefix=b"", limit=10) == []
    assert store.scopes() == []


@pytest.mark.parametrize(
    "key",
    [b"k", b"\0", b"\xff" * 480, b"a" * 481, b"a" * 960, b"a" * 961, b"\xff" * 1041],
    ids=lambda key: str(len(key)),
)
async def test_a_committed_slot_reads_back_as_it_was(store: MetaStore, key: bytes) -> None:
    slot = slot_of(name_of(key), body=b"x" * 700, payload=b"p" * 16)
    await store.commit(StoreBatch(slots=[slot]))
    assert store.get(slot.name) == slot


async def test_rows_are_told_by_their_packed_names_as_they_are_stored(store: MetaStore) -> None:
    keys = [b"k", b"\0", b"a" * 480, b"a" * 481, b"a" * 1041]
    slots = [slot_of(name_of(key, shard=number % 2), body=b"x" * 700) for number, key in enumerate(keys)]
    await store.commit(StoreBatch(slots=slots))
    absent = [name_of(b"no"), name_of(b"k", shard=1), name_of(b"k", OTHER), name_of(b"a" * 482)]
    found = store.rows([slot.name.pack() for slot in slots] + [name.pack() for name in absent])
    assert found == [pack_row(slot) for slot in slots] + [b""] * len(absent)
    assert [check_of(row) for row in found if row] == [pack_row(slot)[1:9] for slot in slots]
    assert [value_of(row) for row in found if row] == [slot.value for slot in slots]
    assert check_of(b"") == b""
    assert store.rows([]) == []
    assert [store.row(name.pack()) for name in (*[slot.name for slot in slots], *absent)] == found


async def test_the_same_key_in_another_table_scope_or_shard_is_another_register(store: MetaStore) -> None:
    names = [name_of(b"k"), name_of(b"k", OTHER), name_of(b"k", shard=1), name_of(b"k", table=Table.UPLOAD)]
    await store.commit(StoreBatch(slots=[slot_of(name, counter) for counter, name in enumerate(names)]))
    assert [store.get(name) for name in names] == [slot_of(name, counter) for counter, name in enumerate(names)]
    assert len(slots_in(store, Table.OBJECT, BUCKET, 0, after=b"", prefix=b"", limit=10)) == 1


async def test_the_later_of_two_commits_wins_even_when_nobody_waits_in_between(store: MetaStore) -> None:
    name = name_of(b"k")
    await asyncio.gather(*(store.commit(StoreBatch(slots=[slot_of(name, counter)])) for counter in range(50)))
    assert store.get(name) == slot_of(name, 49)


async def test_a_scan_goes_in_key_order_from_behind_after_within_the_prefix(store: MetaStore) -> None:
    keys = [
        b"a",
        b"a\0",
        b"b",
        b"b" * 480,
        b"b" * 480 + b"\0",
        b"b" * 481,
        b"b" * 960,
        b"b" * 961,
        b"b" * 479 + b"c",
        b"c",
        b"\xff" * 1041,
    ]
    await store.commit(StoreBatch(slots=[slot_of(name_of(key)) for key in reversed(keys)]))

    def scan(after: bytes = b"", prefix: bytes = b"", limit: int = 100) -> list[bytes]:
        return [
            slot.name.key for slot in slots_in(store, Table.OBJECT, BUCKET, 0, after=after, prefix=prefix, limit=limit)
        ]

    assert scan() == sorted(keys)
    assert scan(limit=4) == sorted(keys)[:4]
    assert scan(prefix=b"b" * 480) == sorted(key for key in keys if key.startswith(b"b" * 480))
    assert scan(prefix=b"b" * 700) == [b"b" * 960, b"b" * 961]
    assert scan(after=b"b" * 481, prefix=b"b") == [b"b" * 960, b"b" * 961, b"b" * 479 + b"c"]
    assert scan(after=b"c", prefix=b"b") == []
    assert scan(after=b"a", prefix=b"b", limit=1) == [b"b"]


ROW_KEYS = [
    b"a",
    b"a\0",
    b"ab",
    b"b",
    b"b" * 480,
    b"b" * 481,
    b"b" * 961,
    b"b" * 479 + b"c",
    b"ba",
    b"c",
    b"c/1",
    b"c/2",
    b"c/3",
    b"\xff" * 490,
]
"""Of one stretch of the tree, and such that only a link leads to."""


def check_columns_and_stamps(store: MetaStore) -> None:
    """They are those of a slice, of snapshots that end anywhere."""
    for after, prefix, limit in itertools.product(
        [b"", b"a", b"b" * 480, b"b" * 500, b"c", b"c/2"], [b"", b"a", b"b", b"b" * 480, b"c", b"c/"], range(1, 16)
    ):
        where = {"after": after, "prefix": prefix}
        entries = store.slice(RowRange(Table.OBJECT, BUCKET, 0, **where, limit=limit + 1))
        expected = [key for key, _ in entries[:limit]], [row for _, row in entries[:limit]], len(entries) > limit
        assert store.columns(RowRange(Table.OBJECT, BUCKET, 0, **where, limit=limit)) == expected
        wanted = RowRange(Table.OBJECT, BUCKET, 0, **where, limit=limit)
        assert store.stamps(wanted) == stamps_in(*expected)
        assert store.stamps(wanted, with_keys=True) == stamps_in(*expected)._replace(keys=expected[0])


async def test_columns_and_stamps_are_those_of_a_slice(store: MetaStore) -> None:
    """With other shards before and after."""
    slots = [slot_of(name_of(key), body=b"of " + key[:9], visibility=index % 3) for index, key in enumerate(ROW_KEYS)]
    others = [slot_of(name_of(key, shard=shard)) for shard in (1, 2) for key in (b"a", b"c/4", b"\xff")]
    await store.commit(StoreBatch(slots=[*others[:3], *slots, *others[3:]]))
    check_columns_and_stamps(store)
    assert store.columns(RowRange(Table.OBJECT, OTHER, 0, after=b"", prefix=b"", limit=5)) == ([], [], False)
    assert store.stamps(RowRange(Table.OBJECT, OTHER, 0, after=b"", prefix=b"", limit=5)) == stamps_in([], [], False)


async def test_a_scan_shows_tombstones(store: MetaStore) -> None:
    tombstone = slot_of(name_of(b"gone"), body=b"", visibility=Visibility.TOMBSTONE)
    await store.commit(StoreBatch(slots=[tombstone]))
    assert slots_in(store, Table.OBJECT, BUCKET, 0, after=b"", prefix=b"", limit=10) == [tombstone]


@pytest.mark.parametrize("body", [b"short", b"long" * 100])
async def test_a_row_that_is_gone_is_absent_for_every_read(store: MetaStore, body: bytes) -> None:
    keys = [b"key %02d" % number for number in range(20)] + [b"long " * 120 + b"%d" % number for number in range(3)]
    for key in keys:
        await store.commit(StoreBatch([slot_of(name_of(key), body=body)]))
    await put_into_the_tree(store)
    gone, left = keys[1::2], keys[0::2]
    await store.commit(StoreBatch(gone=[name_of(key) for key in gone[:5]]))
    await store.commit(StoreBatch(gone=[name_of(key) for key in gone[5:]]))
    check_gone(store, gone, left)
    await store.commit(StoreBatch([slot_of(name_of(gone[0]), body=b"again")]))
    check_gone(store, gone[1:], sorted([*left, gone[0]]))
    await store.commit(StoreBatch(gone=[name_of(gone[0])]))
    await put_into_the_tree(store)
    check_gone(store, gone, left)


def check_gone(store: MetaStore, gone: list[bytes], left: list[bytes]) -> None:
    left = sorted(left)
    for key in gone:
        assert store.get(name_of(key)) is None
        assert store.row(name_of(key).pack()) == b""
    assert store.rows([name_of(key).pack() for key in gone]) == [b""] * len(gone)
    for limit in (1, 2, 5, 100):
        found: list[bytes] = []
        while page := store.slice(RowRange(Table.OBJECT, BUCKET, 0, found[-1] if found else b"", b"", limit)):
            assert len(page) == limit or [key for key, _ in page] == left[len(found) :]
            found += [key for key, _ in page]
        assert found == left
    assert store.columns(RowRange(Table.OBJECT, BUCKET, 0, b"", b"", 100))[0] == left
    assert store.stamps(RowRange(Table.OBJECT, BUCKET, 0, b"", b"", 100)).rows == len(left)


async def test_a_slice_gives_rows_that_carry_their_own_check(store: MetaStore) -> None:
    slot = slot_of(name_of(b"k" * 500), visibility=Visibility.HIDDEN)
    await store.commit(StoreBatch(slots=[slot]))
    [(key, row)] = store.slice(RowRange(Table.OBJECT, BUCKET, 0, after=b"", prefix=b"k", limit=10))
    prefix = slot.name.pack()[:18]
    assert key == slot.name.key
    assert row_parts(row).visibility == Visibility.HIDDEN
    assert intact(prefix, key, row)
    assert not intact(prefix, key[:-1], row)
    assert not intact(name_of(key, shard=1).pack()[:18], key, row)
    assert not any(intact(prefix, key, row[:length]) for length in range(len(row)))
    assert not intact(prefix, key, row[:-1] + bytes([row[-1] ^ 1]))


async def test_a_slice_that_would_hold_a_snapshot_for_long_is_refused(store: MetaStore) -> None:
    with pytest.raises(ValueError, match="10000"):
        store.slice(RowRange(Table.OBJECT, BUCKET, 0, after=b"", prefix=b"", limit=10_001))


async def test_fences_pages_and_small_values_read_back_and_fences_can_be_lifted(store: MetaStore) -> None:
    page = page_of(b"manifest" * 500)
    fence = Fence(BUCKET, b"nonce", final=False)
    lends = Fence(BUCKET, b"nonce", final=False, lends=True)
    final = Fence(OTHER, b"", final=True)
    await store.commit(StoreBatch(fences=[fence, final], pages=[page], meta={"floor": b"123", "empty": b""}))
    assert (store.get_fence(BUCKET), store.get_fence(OTHER)) == (fence, final)
    assert store.get_page(page.page_hash) == page.body
    assert (store.get_meta("floor"), store.get_meta("empty")) == (b"123", b"")
    await store.commit(StoreBatch(fences=[lends]))
    assert store.get_fence(BUCKET) == lends
    await store.commit(StoreBatch(unfence=[BUCKET], meta={"floor": b"456"}))
    assert store.get_fence(BUCKET) is None
    assert store.get_fence(OTHER) == final
    assert store.get_meta("floor") == b"456"


async def put_into_the_tree(store: MetaStore) -> None:
    """Of a store that makes some."""
    make = getattr(store, "checkpoint", None)
    if make is not None:
        await make()


async def test_fences_and_small_values_are_listed_by_name_also_while_they_change(store: MetaStore) -> None:
    scopes = [bytes([number]) * 16 for number in range(7)]
    await store.commit(StoreBatch(fences=[Fence(scope, b"n", final=False) for scope in scopes]))
    await store.commit(StoreBatch(meta={f"lifted {number}": b"n" for number in range(7)} | {"lift": b"", "m": b""}))
    for _ in range(2):
        assert store.fenced_scopes(after=b"", limit=3) == scopes[:3]
        assert store.fenced_scopes(after=scopes[2], limit=9) == scopes[3:]
        assert store.meta_names("lifted ", after="", limit=2) == ["lifted 0", "lifted 1"]
        assert store.meta_names("lifted ", after="lifted 4", limit=9) == ["lifted 5", "lifted 6"]
        await put_into_the_tree(store)
    await store.commit(StoreBatch(unfence=scopes[:4], meta={"lifted 9": b"n"}))
    for _ in range(2):
        assert store.fenced_scopes(after=b"", limit=2) == scopes[4:6]
        assert store.meta_names("lifted ", after="lifted 5", limit=9) == ["lifted 6", "lifted 9"]
        await put_into_the_tree(store)


async def test_pages_are_listed_with_their_age_in_the_order_of_their_hashes(store: MetaStore) -> None:
    pages = sorted(page_of(b"%d" % number, created_ms=number) for number in range(20))
    await store.commit(StoreBatch(pages=pages))
    listed = [(page.page_hash, page.created_ms) for page in pages]
    assert store.pages(after=b"", limit=100) == listed
    assert store.pages(after=b"", limit=20) == listed
    assert store.pages(after=listed[4][0], limit=3) == listed[5:8]
    assert store.pages(after=listed[4][0][:-1], limit=1) == listed[4:5]
    assert store.pages(after=listed[19][0], limit=3) == []


async def test_a_page_that_is_put_again_is_as_young_as_a_new_one_and_is_not_deleted_by_its_old_age(
    store: MetaStore,
) -> None:
    first, second = page_of(b"first", created_ms=1), page_of(b"second", created_ms=1)
    await store.commit(StoreBatch(pages=[first, second]))
    await store.commit(StoreBatch(pages=[first._replace(created_ms=2)]))
    assert dict(store.pages(after=b"", limit=9)) == {first.page_hash: 2, second.page_hash: 1}
    assert await store.delete_pages([(first.page_hash, 1), (second.page_hash, 1), (bytes(16), 1)]) == 1
    assert store.pages(after=b"", limit=9) == [(first.page_hash, 2)]
    assert store.get_page(first.page_hash) == b"first"
    assert store.get_page(second.page_hash) is None
    assert await store.delete_pages([(first.page_hash, 2)]) == 1
    assert store.get_page(first.page_hash) is None


async def test_a_page_keeps_its_owner_and_every_put_changes_its_time(store: MetaStore) -> None:
    page, other = page_of(b"page", created_ms=9), page_of(b"other", created_ms=9)
    await store.commit(StoreBatch(pages=[page._replace(owner=b"the object"), other]))
    hashes = [page.page_hash, other.page_hash, bytes(20)]
    assert store.page_owners(hashes) == [b"the object", b"", b""]
    await store.commit(StoreBatch(pages=[page._replace(created_ms=5), other._replace(owner=b"another")]))
    assert store.page_owners(hashes) == [b"the object", b"another", b""]
    assert dict(store.pages(after=b"", limit=9)) == dict.fromkeys(hashes[:2], 10)
    assert (store.get_page(page.page_hash), store.get_page(other.page_hash)) == (b"page", b"other")
    assert await store.delete_pages([(page.page_hash, 9), (other.page_hash, 10)]) == 1
    assert store.page_owners(hashes) == [b"the object", b"", b""]


async def test_deletions_and_puts_of_one_page_keep_their_order(store: MetaStore) -> None:
    page = page_of(b"page", created_ms=1)
    await store.commit(StoreBatch(pages=[page]))
    again = asyncio.ensure_future(store.commit(StoreBatch(pages=[page._replace(created_ms=2)])))
    await asyncio.sleep(0)
    assert await store.delete_pages([(page.page_hash, 1)]) == 0
    await again
    assert store.get_page(page.page_hash) == b"page"


async def test_scopes_names_every_shard_that_has_rows_and_can_be_asked_by_partition(store: MetaStore) -> None:
    names = [
        system_name("bucket/a"),
        name_of(b"k", shard=1),
        name_of(b"k", shard=2),
        name_of(b"k", OTHER, table=Table.PART),
    ]
    await store.commit(StoreBatch(slots=[slot_of(name) for name in names]))
    assert sorted(store.scopes()) == sorted(name[:3] for name in names)
    assert store.scopes(SYSTEM_PARTITION) == [(Table.SYSTEM, SYSTEM_SCOPE, 0)]
    assert (Table.OBJECT, BUCKET, 2) in store.scopes(partition_of(BUCKET, 2))


@pytest.mark.parametrize("turns", [0, 1, 3])
@pytest.mark.parametrize("pages", [0, 1, 20])
async def test_an_empty_batch_waits_for_everything_before_it(store: MetaStore, pages: int, turns: int) -> None:
    page = page_of(b"page" * 1000)
    before = [
        asyncio.ensure_future(store.commit(StoreBatch(pages=[page_of(b"%d" % number)]))) for number in range(pages)
    ]
    before.append(
        asyncio.ensure_future(store.commit(StoreBatch(slots=[slot_of(name_of(b"k"))], pages=[page] if pages else [])))
    )
    await asyncio.sleep(0)
    for _ in range(turns):
        await asyncio.sleep(0)
    await store.commit(StoreBatch())
    assert store.get(name_of(b"k")) is not None
    assert not pages or store.get_page(page.page_hash) == page.body
    await asyncio.gather(*before)


@pytest.mark.parametrize("turns", [0, 1])
async def test_the_later_of_two_commits_wins_also_where_the_first_brings_a_page(store: MetaStore, turns: int) -> None:
    name, commits = name_of(b"k"), []
    for counter in range(30):
        pages = [page_of(b"%d" % counter)] if counter % 3 == 0 else []
        commits.append(asyncio.ensure_future(store.commit(StoreBatch(slots=[slot_of(name, counter)], pages=pages))))
        for _ in range(turns):
            await asyncio.sleep(0)
    await asyncio.gather(*commits)
    assert store.get(name) == slot_of(name, 29)


@pytest.mark.parametrize(
    "batch",
    [
        StoreBatch(slots=[slot_of(name_of(b"good")), slot_of(name_of(b"k" * 1042))]),
        StoreBatch(slots=[slot_of(name_of(b"good")), slot_of(name_of(b""))]),
        StoreBatch(slots=[slot_of(name_of(b"good")), slot_of(name_of(b"k", scope=b"short"))]),
        StoreBatch(slots=[slot_of(name_of(b"good")), slot_of(name_of(b"k"), counter=2**64)]),
        StoreBatch(slots=[slot_of(name_of(b"good"))], pages=[StoredPage(bytes(16), b"not its hash", 7)]),
        StoreBatch(slots=[slot_of(name_of(b"good"))], meta={"\0identity": b"forged"}),
    ],
    ids=["long key", "empty key", "short scope", "ballot out of range", "page under a wrong hash", "reserved name"],
)
async def test_a_batch_with_anything_that_cannot_be_stored_is_refused_whole(
    store: MetaStore, batch: StoreBatch
) -> None:
    with pytest.raises(ValueError):
        await store.commit(batch)
    await store.commit(StoreBatch())
    assert store.get(name_of(b"good")) is None


async def test_a_count_of_changes_moves_with_every_write_to_its_shard_and_stays_where_nothing_is_written(
    store: MetaStore,
) -> None:
    def counts() -> list[int]:
        return [
            store.dirty_ranges.count_of(name_of(b"", scope, shard).prefix)
            for scope, shard in ((BUCKET, 0), (BUCKET, 1), (OTHER, 0))
        ]

    await store.commit(StoreBatch(slots=[slot_of(name_of(b"k"))]))
    first = counts()
    await store.commit(StoreBatch(slots=[slot_of(name_of(b"k"), 2)]))
    second = counts()
    assert second[0] != first[0]
    assert second[1:] == first[1:]
    await store.commit(
        StoreBatch(pages=[page_of(b"page")], fences=[Fence(BUCKET, b"nonce", False)], meta={"name": b"value"})
    )
    assert counts() == second
    for after, through, changed in ((b"", None, True), (b"j", b"k", True), (b"k", None, False), (b"", b"j", False)):
        assert (
            store.dirty_ranges.changed_since(
                first[0], name_of(b"").prefix, after=after, key_prefix=b"", through=through
            )
            == changed
        )

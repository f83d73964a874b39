"""One replica's scan: where it stops, what it jumps over, and when two scans are the same."""

from __future__ import annotations

import pytest

from storaged.meta.names import KEY_BYTES_MAX, Ballot, RegisterName, Table, Value, Visibility
from storaged.meta.storage.scan import (
    DigestCache,
    ScanRequest,
    ShardAsk,
    ShardSlice,
    Want,
    common_prefix,
    decode_rows,
    list_after_prefix,
    scan_store,
)
from storaged.meta.store_ports import RowRange, Slot, StoreBatch
from tests.doubles.meta_store import MemoryMetaStore

SCOPE = b"bucket of a test"


async def store_of(rows: dict[bytes, int], counter: int = 1) -> MemoryMetaStore:
    store = MemoryMetaStore()
    slots = []
    for key, visibility in rows.items():
        value = Value(1, b"o" * 16, visibility, b"body of " + key)
        slots.append(Slot(RegisterName(Table.OBJECT, SCOPE, 0, key), Ballot(1, counter, "n", b"incarnat"), value))
    await store.commit(StoreBatch(slots=slots))
    return store


def scan(
    store: MemoryMetaStore,
    *,
    after: bytes = b"",
    limit: int = 100,
    want: Want = Want.VISIBLE,
    delimiter: bytes = b"",
    examine_max: int = 1000,
    bytes_max: int = 1 << 20,
    disk: str = "d",
    known: int = 0,
    kept: DigestCache | None = None,
) -> ShardSlice:
    ask = ShardAsk(0, after, limit, want, examine_max, bytes_max, known)
    [piece] = scan_store(
        store, ScanRequest(disk, 1, Table.OBJECT, SCOPE, (ask,), b"", delimiter, Visibility.LIVE), kept
    ).slices
    return piece


def keys(piece: ShardSlice) -> list[bytes]:
    return [row.key for row in decode_rows(piece.rows)]


LIVE, GONE = Visibility.LIVE, Visibility.TOMBSTONE


async def store_of_small_objects(*, versions: dict[bytes, int] | None = None) -> MemoryMetaStore:
    """Records that name copies. ``versions``: of which rows another program has written which version."""
    store = MemoryMetaStore()
    slots = []
    for key in (b"a", b"b", b"c"):
        value = Value(1, b"o" * 16, LIVE, b"body of " + key, b"p" * 16)
        slots.append(
            Slot(RegisterName(Table.OBJECT, SCOPE, 0, key), Ballot(1, 1, "n", b"incarnat"), value, copied=True)
        )
    await store.commit(StoreBatch(slots=slots))
    for key, version in (versions or {}).items():
        store.set_version(RegisterName(Table.OBJECT, SCOPE, 0, key), version)
    return store


@pytest.mark.parametrize("want", list(Want))
@pytest.mark.parametrize("visible", [LIVE, GONE])
@pytest.mark.parametrize("versions", [{b"a": 1}, {b"b": 1}, {b"a": 1, b"b": 1, b"c": 1}])
async def test_replicas_agree_on_rows_of_the_version_before(
    versions: dict[bytes, int], visible: Visibility, want: Want
) -> None:
    """While nodes are restarted into a new program, one after the other, replicas write different versions of a row."""
    new, mixed = await store_of_small_objects(), await store_of_small_objects(versions=versions)
    request = ScanRequest(
        "d", 1, Table.OBJECT, SCOPE, (ShardAsk(0, b"", 100, want, 1000, 1 << 20, 0),), b"", b"", visible
    )
    [its], [other] = scan_store(new, request).slices, scan_store(mixed, request).slices
    assert (its.digest, its.through, its.keys, its.heads) == (other.digest, other.through, other.keys, other.heads)
    assert its.looked_at == (0 if want == Want.SUM else 3)


async def test_it_shows_visible_rows_and_looks_at_all() -> None:
    store = await store_of({b"a": LIVE, b"b": GONE, b"c": Visibility.HIDDEN, b"d": LIVE})
    piece = scan(store)
    assert (keys(piece), piece.looked_at, piece.done) == ([b"a", b"d"], 4, True)
    assert keys(scan(store, want=Want.ALL)) == [b"a", b"b", b"c", b"d"]
    assert scan(store, want=Want.DIGEST).rows == b""
    [row, _] = decode_rows(piece.rows)
    assert row.value == Value(1, b"o" * 16, LIVE, b"body of a")


@pytest.mark.parametrize("rows", [{b"a": LIVE, b"b": GONE, b"c": LIVE}, {b"a": LIVE, b"b": LIVE, b"c": LIVE}, {}])
@pytest.mark.parametrize(
    "bounds",
    [
        {},
        {"limit": 2},
        {"limit": 3},
        {"limit": 0},
        {"examine_max": 2},
        {"bytes_max": 1},
        {"after": b"a"},
        {"delimiter": b"b"},
    ],
)
async def test_all_ways_of_asking_give_the_same_digest_and_stop_at_the_same_place(
    rows: dict[bytes, int], bounds: dict[str, int]
) -> None:
    store = await store_of(rows)
    pieces = [scan(store, want=want, **bounds) for want in Want if want not in (Want.SUM, Want.PIECES)]  # type: ignore[arg-type]
    assert len({(piece.digest, piece.through, piece.done, piece.looked_at) for piece in pieces}) == 1
    assert keys(pieces[Want.VISIBLE]) == list(pieces[Want.HEADS].keys)
    assert [row.value.body for row in decode_rows(pieces[Want.VISIBLE].rows) if row.value] == list(
        pieces[Want.HEADS].heads
    )


async def test_a_replica_of_which_stamps_are_wanted_need_not_verify_its_rows_but_one_that_ships_them_does() -> None:
    sound, damaged = [await store_of({b"a": LIVE, b"b": LIVE}) for _ in range(2)]
    damaged.damage(RegisterName(Table.OBJECT, SCOPE, 0, b"a"))
    assert scan(damaged, want=Want.STAMPS) == scan(sound, want=Want.STAMPS)
    for want in (Want.HEADS, Want.VISIBLE, Want.ALL, Want.DIGEST):
        assert scan(damaged, want=want).digest != scan(sound, want=want).digest
    assert list(scan(damaged, want=Want.HEADS).keys) == [b"b"]


async def test_a_tombstone_at_another_ballot_is_another_digest() -> None:
    assert scan(await store_of({b"b": GONE})).digest != scan(await store_of({b"b": GONE}, counter=2)).digest


@pytest.mark.parametrize(
    ("bounds", "shown", "through"),
    [
        ({"limit": 2}, [b"a", b"c"], b"c"),
        ({"examine_max": 2}, [b"a"], b"b"),
        ({"bytes_max": 1}, [b"a"], b"a"),
        ({"limit": 2, "after": b"a"}, [b"c", b"d"], b"d"),
    ],
)
async def test_it_stops_at_whichever_bound_comes_first(
    bounds: dict[str, int], shown: list[bytes], through: bytes
) -> None:
    store = await store_of({b"a": LIVE, b"b": GONE, b"c": LIVE, b"d": LIVE, b"e": LIVE})
    piece = scan(store, **bounds)  # type: ignore[arg-type]
    assert (keys(piece), piece.through, piece.done) == (shown, through, False)


async def test_a_bound_met_exactly_at_the_end_is_the_end() -> None:
    store = await store_of({b"a": LIVE, b"b": LIVE})
    assert scan(store, limit=2).done
    assert scan(store, examine_max=2).done
    assert not scan(store, limit=1).done


async def test_behind_the_first_visible_key_of_a_common_prefix_nothing_is_looked_at() -> None:
    rows: dict[bytes, int] = {b"p/%04d" % number: GONE if number < 3 else LIVE for number in range(500)}
    store = await store_of({**rows, b"q": LIVE, b"r/1": LIVE})
    piece = scan(store, delimiter=b"/")
    assert (keys(piece), piece.looked_at) == ([b"p/0003", b"q", b"r/1"], 6)
    assert scan(store, delimiter=b"/", limit=1).through == list_after_prefix(b"p/")


async def test_a_damaged_row_equals_no_other_replicas_even_when_that_is_damaged_too() -> None:
    stores = [await store_of({b"a": LIVE}) for _ in range(2)]
    sound = scan(stores[0]).digest
    for store in stores:
        store.damage(RegisterName(Table.OBJECT, SCOPE, 0, b"a"))
    damaged = [scan(store, disk=disk).digest for store, disk in zip(stores, ("d0", "d1"), strict=True)]
    assert len({sound, *damaged}) == 3
    assert list(scan(stores[0], want=Want.HEADS).keys) == []
    for want in (Want.VISIBLE, Want.ALL):  # nobody can tell whether it counts as an entry
        [row] = decode_rows(scan(stores[0], want=want).rows)
        assert (row.key, row.ballot, row.value) == (b"a", b"", None)


async def test_a_request_beyond_the_limits_is_refused() -> None:
    store = await store_of({b"a": LIVE})
    for bounds in ({"limit": 5000}, {"limit": -1}, {"examine_max": 0}, {"examine_max": 10_000}):
        with pytest.raises(ValueError, match="a scan looks at"):
            scan(store, **bounds)  # type: ignore[arg-type]
    ask = ShardAsk(0, b"", 1, Want.DIGEST, 1, 1)
    with pytest.raises(ValueError, match="at most 256"):
        scan_store(store, ScanRequest("d", 1, Table.OBJECT, SCOPE, (ask,) * 257))


def test_what_comes_after_a_prefix_lies_behind_all_of_its_keys_and_before_every_other() -> None:
    after = list_after_prefix(b"a/")
    assert len(after) == KEY_BYTES_MAX
    assert b"a/" + b"\xff" * (KEY_BYTES_MAX - 2) <= after < b"a0"


def test_a_common_prefix_ends_with_the_first_delimiter_behind_the_prefix() -> None:
    assert common_prefix(b"a/b/c", b"", b"/") == b"a/"
    assert common_prefix(b"a/b/c", b"a/", b"/") == b"a/b/"
    assert common_prefix(b"a/b/c", b"a", b"") == b""
    assert common_prefix(b"abc", b"", b"/") == b""
    assert common_prefix(b"a--b", b"", b"--") == b"a--"


# --- what is kept of ranges that were looked at


class Counting(MemoryMetaStore):
    """Counts how often its rows are looked at."""

    looks = 0

    def slice(self, wanted: RowRange) -> list[tuple[bytes, bytes]]:
        self.looks += 1
        return super().slice(wanted)


async def put(store: MemoryMetaStore, key: bytes, visibility: int = LIVE, counter: int = 1) -> None:
    value = Value(1, b"o" * 16, visibility, b"body of " + key)
    name = RegisterName(Table.OBJECT, SCOPE, 0, key)
    await store.commit(StoreBatch(slots=[Slot(name, Ballot(1, counter, "n", b"incarnat"), value)]))


async def test_a_range_is_looked_at_again_only_after_a_write_to_its_shard() -> None:
    store, kept = Counting(), DigestCache()
    for key in (b"a", b"b", b"c"):
        await put(store, key)
    first = scan(store, want=Want.STAMPS, limit=2, kept=kept)
    looks = store.looks
    assert scan(store, want=Want.STAMPS, limit=2, kept=kept) == first
    assert store.looks == looks
    await put(store, b"b", GONE, 2)
    assert scan(store, want=Want.STAMPS, limit=2, kept=kept) == scan(store, want=Want.STAMPS, limit=2) != first


async def test_rows_that_the_asker_has_are_not_sent_and_others_are() -> None:
    store, kept = await store_of({b"a": LIVE, b"b": LIVE}), DigestCache()
    first = scan(store, want=Want.HEADS, kept=kept)
    assert list(first.keys) == [b"a", b"b"]
    for again in (
        scan(store, want=Want.HEADS, known=first.digest, kept=kept),
        scan(store, want=Want.HEADS, known=first.digest, kept=DigestCache()),
    ):
        assert (list(again.keys), list(again.heads)) == ([], [])
        assert (again.digest, again.through, again.done, again.looked_at) == (
            first.digest,
            first.through,
            first.done,
            2,
        )
    assert scan(store, want=Want.HEADS, known=first.digest ^ 1, kept=kept) == first
    await put(store, b"c")
    assert list(scan(store, want=Want.HEADS, known=first.digest, kept=kept).keys) == [b"a", b"b", b"c"]


async def test_a_range_that_was_cut_short_is_looked_at_again_where_it_may_go_further() -> None:
    store, kept = await store_of({b"a": GONE, b"b": LIVE, b"c": LIVE}), DigestCache()
    for bounds in ({"bytes_max": 1}, {"examine_max": 2}, {}, {"bytes_max": 1}, {"examine_max": 2}):
        assert scan(store, want=Want.STAMPS, kept=kept, **bounds) == scan(store, want=Want.STAMPS, **bounds)  # type: ignore[arg-type]


async def test_what_is_kept_of_ranges_is_bounded_and_those_used_last_stay() -> None:
    store, kept = Counting(), DigestCache(bytes_max=10_000)
    await put(store, b"a" * 100)
    for number in range(100):
        scan(store, want=Want.STAMPS, after=b"%03d" % number, kept=kept)
        scan(store, want=Want.STAMPS, after=b"the same", kept=kept)
    assert store.looks == 101
    assert 5 < len(kept) < 25


async def test_rows_are_verified_whenever_they_are_sent_whatever_is_kept_of_them() -> None:
    store, kept = await store_of({b"a": LIVE, b"b": LIVE}), DigestCache()
    before = scan(store, want=Want.HEADS, kept=kept)
    store.damage(RegisterName(Table.OBJECT, SCOPE, 0, b"a"))
    after = scan(store, want=Want.HEADS, kept=kept)
    assert list(after.keys) == [b"b"]
    assert after.digest != before.digest

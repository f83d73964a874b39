"""What a scanner remembers of listings: pieces that are sent again only when they changed, and never believed by
themselves.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import partial

import pytest

from storaged.meta.listing.cache import CachedPiece, ListedShard, PieceCache
from storaged.meta.listing.query import PieceRead, Query
from storaged.meta.listing.shards import READS_MAX, ShardReader
from storaged.meta.names import RegisterName, Table, Value, Visibility
from storaged.meta.ports import HeadPage, PageQuery
from storaged.meta.storage.row_head import with_head
from storaged.meta.storage.scan import scan_store
from tests.patience import GUARD_S
from tests.worlds import listing as meta_ring
from tests.worlds.listing import BUCKET, Ring, value_of

SHARDS = range(4)
KEYS = [b"k%03d" % number for number in range(100)]
PLACE = ListedShard(Table.OBJECT, BUCKET, 0, b"", b"", Visibility.LIVE)


async def heads_of(
    ring: Ring, *, after: bytes = b"", limit: int = 1000, prefix: bytes = b"", delimiter: bytes = b""
) -> HeadPage:
    return await ring.scanner.list_heads(
        PageQuery(Table.OBJECT, BUCKET, SHARDS, after=after, limit=limit, prefix=prefix, delimiter=delimiter)
    )


async def filled() -> Ring:
    ring = Ring(hedge_s=GUARD_S)
    await ring.fill(KEYS)
    return ring


async def test_of_a_page_that_is_asked_for_again_no_row_is_sent_but_a_majority_is_asked() -> None:
    ring = await filled()
    first = await heads_of(ring)
    assert ring.sent == 100
    asks = len([ask for scan in ring.scans for ask in scan.shards])
    for _ in range(2):
        ring.scans.clear()
        assert (await heads_of(ring))[:-1] == first[:-1]
    assert ring.sent == 100
    assert len([ask for scan in ring.scans for ask in scan.shards]) == asks == 2 * len(SHARDS)


@pytest.mark.parametrize("visibility", [Visibility.LIVE, Visibility.TOMBSTONE])
async def test_a_write_to_one_shard_is_seen_and_that_shards_rows_alone_are_sent_in_the_same_round(
    visibility: int,
) -> None:
    ring = await filled()
    await heads_of(ring)
    ring.sent = 0
    ring.scans.clear()
    name = RegisterName(Table.OBJECT, BUCKET, 1, KEYS[41])
    await ring.put_everywhere(name, visibility, counter=2)
    page = await heads_of(ring)
    assert list(page.keys) == [key for key in KEYS if visibility == Visibility.LIVE or key != name.key]
    assert (value_of(2).body in page.heads) == (visibility == Visibility.LIVE)
    assert ring.sent == 25 - (visibility == Visibility.TOMBSTONE)
    assert len({scan.disk for scan in ring.scans}) == len(ring.scans), "one round was enough"


async def test_what_a_majority_does_not_confirm_is_not_listed_whoever_supplied_it_before() -> None:
    ring = await filled()
    await heads_of(ring)
    name = RegisterName(Table.OBJECT, BUCKET, 0, KEYS[0])
    for missed in range(3):
        for index, disk in enumerate(ring.replicas_of(name)):
            if index != missed:
                await ring.put(
                    disk,
                    name,
                    value_of(2 + missed, Visibility.TOMBSTONE if missed != 1 else Visibility.LIVE),
                    2 + missed,
                )
        assert (KEYS[0] in (await heads_of(ring)).keys) == (missed == 1)
    assert ring.reads == []


async def test_pages_in_order_have_every_row_sent_once_and_pages_from_anywhere_behind_none() -> None:
    ring = await filled()
    after: bytes | None = b""
    found: list[bytes] = []
    while after is not None:
        page = await heads_of(ring, after=after, limit=10)
        found += page.keys
        after = page.next_after
        assert not page.again
    assert found == KEYS
    assert ring.sent == 100
    assert (await heads_of(ring)).again
    for first in range(0, 99, 7):
        assert list((await heads_of(ring, after=KEYS[first], limit=30)).keys) == KEYS[first + 1 : first + 31]
    assert ring.sent == 100


async def scattered(ring: Ring, *, deleted: int, body: bytes) -> None:
    """``KEYS`` with large bodies in one shard, that many deleted keys before each."""
    for number, key in enumerate(KEYS):
        for gone in range(deleted):
            await ring.put_everywhere(
                RegisterName(Table.OBJECT, BUCKET, 0, b"%s-%d" % (key, gone)), Visibility.TOMBSTONE
            )
        value = Value(1, b"o" * 16, Visibility.LIVE, with_head(b"head %03d" % number + body, 0, 8))
        name = RegisterName(Table.OBJECT, BUCKET, 0, key)
        for disk in ring.replicas_of(name):
            await ring.put(disk, name, value, 1)


@pytest.mark.parametrize(("deleted", "body"), [(0, bytes(65_000)), (9, b"")])
async def test_pieces_that_lie_on_one_page_are_known_on_it_however_much_each_of_them_was_looked_through(
    deleted: int, body: bytes
) -> None:
    ring = Ring(hedge_s=GUARD_S, examine_max=500)
    await scattered(ring, deleted=deleted, body=body)
    for after in (b"", KEYS[29], KEYS[59]):
        page = await ring.scanner.list_heads(PageQuery(Table.OBJECT, BUCKET, [0], after=after, limit=30))
        assert len(page.keys) == 30
    ring.sent = 0
    ring.scans.clear()
    for first in (5, 40, 17, 29, 3, 55):
        page = await ring.scanner.list_heads(PageQuery(Table.OBJECT, BUCKET, [0], after=KEYS[first], limit=30))
        assert list(page.keys) == KEYS[first + 1 : first + 31]
    assert (ring.sent, len(ring.scans)) == (0, 2 * 6)


async def test_of_what_is_known_and_changed_a_reply_holds_as_much_as_a_message_takes_and_a_page_is_whole_all_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(meta_ring, "scan_store", partial(scan_store, changed_bytes_max=100))
    ring = await filled()
    for after in (b"", KEYS[29], KEYS[59]):
        await heads_of(ring, after=after, limit=30)
    changed = KEYS[5::10]
    for number in range(5, 100, 10):
        await ring.put_everywhere(RegisterName(Table.OBJECT, BUCKET, number % 4, KEYS[number]), counter=2)
    page = await heads_of(ring)
    assert list(page.keys) == KEYS
    assert [key for key, head in zip(page.keys, page.heads, strict=True) if head == value_of(2).body] == changed
    assert ring.reads == []


async def test_among_many_deleted_keys_a_round_asks_for_a_few_ranges_and_what_has_not_changed_is_not_sent_again() -> (
    None
):
    ring = Ring(hedge_s=GUARD_S, examine_max=200)
    keys = [b"k%04d" % number for number in range(1200)]
    await ring.fill(keys, visibility=Visibility.TOMBSTONE)
    shown = keys[::60]
    for index in range(0, 1200, 60):
        await ring.put_everywhere(RegisterName(Table.OBJECT, BUCKET, index % 4, keys[index]), counter=2)
    for _ in range(3):
        after: bytes | None = b""
        found: list[bytes] = []
        while after is not None:
            page = await heads_of(ring, after=after, limit=7)
            found += page.keys
            after = page.next_after
        assert found == shown
    ring.scans.clear()
    assert list((await heads_of(ring)).keys) == shown
    assert ring.sent == len(shown)
    assert max(Counter(ask.shard for ask in scan.shards).most_common(1)[0][1] for scan in ring.scans) == READS_MAX


async def test_what_is_appended_behind_the_last_piece_is_listed() -> None:
    ring = await filled()
    await heads_of(ring)
    for number, key in enumerate((b"l", b"m", b"n", b"o", b"k0505")):
        await ring.put_everywhere(RegisterName(Table.OBJECT, BUCKET, number % 4, key))
        assert list((await heads_of(ring)).keys) == sorted([*KEYS, *[b"l", b"m", b"n", b"o", b"k0505"][: number + 1]])


@pytest.mark.parametrize("lagging", [0, 1, 2])
async def test_whichever_replica_lags_a_page_over_what_is_remembered_and_what_is_not_is_whole(lagging: int) -> None:
    ring = await filled()
    await heads_of(ring, limit=40)
    for key in (b"k0001", b"k099a", b"l"):
        for index, disk in enumerate(ring.replicas_of(RegisterName(Table.OBJECT, BUCKET, 0, key))):
            if index != lagging:
                await ring.put(disk, RegisterName(Table.OBJECT, BUCKET, 0, key), value_of(1), 1)
    assert list((await heads_of(ring)).keys) == sorted([*KEYS, b"k0001", b"k099a", b"l"])


async def test_a_page_goes_on_behind_a_piece_that_its_replicas_keep_on_differing_about() -> None:
    ring = await filled()
    await heads_of(ring, limit=40)
    for missed, key in enumerate((b"k0001", b"k0002", b"k0003")):  # each on a majority, and no two replicas alike
        for index, disk in enumerate(ring.replicas_of(RegisterName(Table.OBJECT, BUCKET, 0, key))):
            if index != missed:
                await ring.put(disk, RegisterName(Table.OBJECT, BUCKET, 0, key), value_of(1), 1)
    assert list((await heads_of(ring, after=KEYS[30], limit=20)).keys) == KEYS[31:51]
    assert list((await heads_of(ring, limit=10)).keys) == sorted([*KEYS, b"k0001", b"k0002", b"k0003"])[:10]


async def test_behind_a_common_prefix_that_was_listed_from_its_beginning_a_page_may_begin_inside_of_it() -> None:
    ring = Ring(hedge_s=GUARD_S)
    await ring.fill([b"a/1", b"a/2", b"a/3", b"b"])
    assert (await heads_of(ring, delimiter=b"/")).prefixes == (b"a/",)
    assert (await heads_of(ring, delimiter=b"/", after=b"a/2")).prefixes == (b"a/",)
    assert (await heads_of(ring, delimiter=b"/", after=b"a/3")).prefixes == ()


async def test_a_common_prefix_stays_though_a_piece_ends_inside_of_it_and_the_next_one_was_told_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    share = 2
    ring = Ring(hedge_s=GUARD_S, share=lambda _entries, _feeds, _turn: share, examine_max=4)
    names = {key: RegisterName(Table.OBJECT, BUCKET, 0, key) for key in (b"a", b"b", b"c/0", b"c/1", b"c/2", b"d")}
    for key, name in names.items():
        await ring.put_everywhere(name, Visibility.TOMBSTONE if key == b"c/0" else Visibility.LIVE)
    await ring.scanner.list_heads(PageQuery(Table.OBJECT, BUCKET, [0], delimiter=b"/", limit=3))
    await ring.put_everywhere(names[b"a"], Visibility.TOMBSTONE, counter=2)
    for disk in ring.replicas_of(names[b"b"])[1:]:  # the first one lags, and so the first piece takes a second round
        await ring.put(disk, names[b"b"], value_of(2), 2)
    share, everybody = 4, ShardReader._ask_everybody

    async def first_deleted(reader: ShardReader, query: Query, spans: Sequence[PieceRead]) -> list[PieceRead]:
        assert len(spans) == 1
        await ring.put_everywhere(names[b"c/1"], Visibility.TOMBSTONE, counter=2)
        return await everybody(reader, query, spans)

    monkeypatch.setattr(ShardReader, "_ask_everybody", first_deleted)
    page = await ring.scanner.list_heads(PageQuery(Table.OBJECT, BUCKET, [0], delimiter=b"/", limit=3))
    assert (list(page.keys), page.prefixes) == ([b"b", b"d"], (b"c/",))


async def test_a_forgotten_bucket_is_sent_again_and_others_are_not() -> None:
    ring = await filled()
    await heads_of(ring)
    ring.scanner.forget(b"another bucket..")
    await heads_of(ring)
    assert ring.sent == 100
    ring.scanner.forget(BUCKET)
    await heads_of(ring)
    assert ring.sent == 200


# --- the memory by itself


def piece(after: bytes, keys: list[bytes], *, done: bool = False, place: ListedShard = PLACE) -> CachedPiece:
    return CachedPiece(
        place, after, len(keys), 1, keys, [b"head"] * len(keys), keys[-1] if keys else after, done, (1, 1)
    )


def test_pieces_are_found_along_from_inside_of_the_first_one_until_enough_is_known() -> None:
    memory = PieceCache()
    first, second, last = piece(b"", [b"a", b"c"]), piece(b"c", [b"e", b"g"]), piece(b"g", [b"i"], done=True)
    for each in (last, first, second):
        memory.put(each)
    assert memory.pieces_after(PLACE, b"", 2, 9) == [first]
    assert memory.pieces_after(PLACE, b"", 3, 9) == [first, second]
    assert memory.pieces_after(PLACE, b"b", 2, 9) == [first, second]
    assert memory.pieces_after(PLACE, b"c", 9, 9) == [second, last]
    assert memory.pieces_after(PLACE, b"z", 9, 9) == [last]
    assert memory.pieces_after(PLACE, b"", 9, 2) == [first, second]
    memory.drop(second)
    memory.drop(second)
    assert memory.pieces_after(PLACE, b"b", 9, 9) == [first]
    assert memory.pieces_after(PLACE, b"d", 9, 9) == []
    assert memory.pieces_after(PLACE._replace(prefix=b"a"), b"", 9, 9) == []


def test_with_a_delimiter_a_piece_serves_only_who_begins_where_it_begins() -> None:
    memory, place = PieceCache(), PLACE._replace(delimiter=b"/")
    first = piece(b"", [b"a", b"c"], place=place)
    memory.put(first)
    assert memory.pieces_after(place, b"", 1, 9) == [first]
    assert memory.pieces_after(place, b"b", 1, 9) == []


def test_a_piece_that_begins_where_another_did_takes_its_place() -> None:
    memory = PieceCache()
    memory.put(piece(b"", [b"a", b"c"]))
    second = piece(b"", [b"b"])
    memory.put(second)
    assert len(memory) == 1
    assert memory.pieces_after(PLACE, b"", 1, 9) == [second]


def test_the_memory_is_bounded_and_those_used_last_stay() -> None:
    memory = PieceCache(bytes_max=10 * piece(b"000", [b"000"]).cost)
    for number in range(1, 50):
        memory.put(piece(b"%03d" % number, [b"%03d~" % number]))
        assert len(memory.pieces_after(PLACE, b"001", 1, 9)) == 1
    assert len(memory) == 9 or len(memory) == 10
    assert memory.pieces_after(PLACE, b"002", 1, 9) == []
    memory.put(piece(b"", [b"a" * 100_000]))
    assert len(memory) == 0

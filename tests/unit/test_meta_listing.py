"""The scanner's promises one by one: what it asks, what it waits for, what it refuses."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from msgspec.structs import replace

from storaged.errors import ServiceUnavailable
from storaged.meta.consensus.register import Verdict
from storaged.meta.listing import comparing
from storaged.meta.listing.merge import ROUNDS_MAX, every_row
from storaged.meta.listing.round import share_of
from storaged.meta.messages import ScanReply, ScanRequest, ScanRow, ShardSlice
from storaged.meta.names import KEY_BYTES_MAX, RegisterName, Table, Visibility
from storaged.meta.ports import ListPage, PageQuery
from storaged.meta.storage.scan import Want, list_after_prefix
from storaged.wire import encode
from tests.patience import GUARD_S
from tests.sim.virtual import VirtualLoop, run
from tests.worlds.listing import BUCKET, Ring, value_of

SHARDS = range(4)


def name_of(key: bytes, shard: int = 0) -> RegisterName:
    return RegisterName(Table.OBJECT, BUCKET, shard, key)


async def page_of(
    ring: Ring,
    *,
    prefix: bytes = b"",
    after: bytes = b"",
    delimiter: bytes = b"",
    limit: int = 1000,
    shards: range = SHARDS,
) -> ListPage:
    return await ring.scanner.list_page(
        PageQuery(Table.OBJECT, BUCKET, shards, prefix=prefix, after=after, delimiter=delimiter, limit=limit)
    )


def keys_of(page: ListPage) -> list[bytes]:
    return [row.key for row in page.rows]


async def test_an_empty_bucket_is_an_empty_last_page() -> None:
    assert await page_of(Ring()) == ListPage()


async def test_a_limit_of_nothing_is_an_empty_last_page_that_asks_nobody() -> None:
    ring = Ring()
    await ring.fill([b"a"])
    assert await page_of(ring, limit=0) == ListPage()
    assert ring.scans == []


@pytest.mark.parametrize("limit", [-1, 4096])
async def test_a_limit_out_of_bounds_is_refused(limit: int) -> None:
    with pytest.raises(ValueError, match="4095"):
        await page_of(Ring(), limit=limit)


async def test_agreeing_replicas_cost_one_request_a_disk_and_no_settling() -> None:
    ring = Ring(hedge_s=GUARD_S)
    keys = [b"k%03d" % number for number in range(100)]
    await ring.fill(keys)
    page = await page_of(ring)
    assert keys_of(page) == keys
    assert page.next_after is None
    assert ring.reads == []
    assert len({scan.disk for scan in ring.scans}) == len(ring.scans)


async def test_rows_come_from_one_replica_and_digests_from_the_others() -> None:
    ring = Ring()
    await ring.fill([b"k%03d" % number for number in range(100)])
    await page_of(ring)
    wants = [ask.want for scan in ring.scans for ask in scan.shards]
    assert wants.count(Want.VISIBLE) == len(SHARDS)
    assert Want.ALL not in wants


async def test_a_page_of_agreeing_replicas_asks_no_more_than_a_bare_majority() -> None:
    ring = Ring(hedge_s=GUARD_S)
    await ring.fill([b"k%03d" % number for number in range(100)])
    await page_of(ring)
    asked = [ask.shard for scan in ring.scans for ask in scan.shards]
    assert sorted(asked) == sorted([*SHARDS, *SHARDS])


@pytest.mark.parametrize("position", [0, 1, 2])
async def test_whichever_replica_hangs_or_lags_the_page_is_the_same(position: int) -> None:
    for trouble in ("hangs", "lags"):
        ring = Ring()
        keys = [b"k%03d" % number for number in range(40)]
        await ring.fill(keys)
        late = name_of(b"late")
        disks = ring.replicas_of(late)
        if trouble == "hangs":
            ring.hung = {disks[position]}
        else:
            for disk in disks[:position] + disks[position + 1 :]:
                await ring.put(disk, late, value_of(2), 2)
            keys.append(b"late")
        assert keys_of(await page_of(ring)) == keys
        heads = await ring.scanner.list_heads(PageQuery(Table.OBJECT, BUCKET, SHARDS))
        assert list(heads.keys) == keys
        assert set(heads.heads) == {value_of(1).body} | ({value_of(2).body} if trouble == "lags" else set())


async def test_a_page_that_ends_with_the_last_key_is_the_last_page() -> None:
    ring = Ring()
    keys = [b"k%d" % number for number in range(8)]
    await ring.fill(keys)
    assert (await page_of(ring, limit=8)).next_after is None
    assert (await page_of(ring, limit=7)).next_after == keys[6]


async def test_the_next_page_after_a_common_prefix_lies_behind_all_of_its_keys() -> None:
    ring = Ring()
    await ring.fill([b"a/1", b"a/2", b"a/\xff\xff", b"b"])
    page = await page_of(ring, delimiter=b"/", limit=1)
    assert (page.rows, page.prefixes, page.next_after) == ((), (b"a/",), list_after_prefix(b"a/"))
    assert keys_of(await page_of(ring, delimiter=b"/", after=list_after_prefix(b"a/"))) == [b"b"]


async def test_after_a_key_inside_a_common_prefix_the_prefix_is_there_if_keys_are_left() -> None:
    ring = Ring()
    await ring.fill([b"a/1", b"a/2", b"b"])
    assert (await page_of(ring, delimiter=b"/", after=b"a/1")).prefixes == (b"a/",)
    assert (await page_of(ring, delimiter=b"/", after=b"a/2")).prefixes == ()


async def test_a_common_prefix_with_many_keys_is_jumped_over() -> None:
    ring = Ring(hedge_s=GUARD_S)  # a slow machine asks no other replica
    await ring.fill([b"a/%04d" % number for number in range(400)] + [b"b"])
    page = await page_of(ring, delimiter=b"/")
    assert (page.prefixes, keys_of(page)) == ((b"a/",), [b"b"])
    assert len({scan.disk for scan in ring.scans}) == len(ring.scans), "one round was enough"


async def test_with_a_replica_down_a_page_is_the_same() -> None:
    ring = Ring()
    keys = [b"k%d" % number for number in range(9)]
    await ring.fill(keys)
    for disk in ring.stores:
        ring.down = {disk}
        assert keys_of(await page_of(ring)) == keys
    assert ring.reads == []


async def test_without_a_majority_of_a_shard_there_is_no_page() -> None:
    ring = Ring()
    await ring.fill([b"a", b"b", b"c", b"d"])
    ring.down = set(ring.replicas_of(name_of(b"a"))[:2])
    with pytest.raises(ServiceUnavailable):
        await page_of(ring)


async def test_replicas_that_refuse_count_as_away() -> None:
    ring = Ring()
    await ring.fill([b"a"])
    first, second, _ = ring.replicas_of(name_of(b"a"))
    ring.verdicts = {first: 2}
    assert keys_of(await page_of(ring, shards=range(1))) == [b"a"]
    ring.verdicts[second] = 2
    with pytest.raises(ServiceUnavailable):
        await page_of(ring, shards=range(1))


async def test_a_replica_that_hangs_holds_no_page_up_and_is_not_asked_for_rows_again() -> None:
    ring = Ring()
    keys = [b"k%d" % number for number in range(9)]
    await ring.fill(keys)
    for disk in ring.stores:
        ring.hung = {disk}
        assert keys_of(await page_of(ring)) == keys


async def test_disks_thought_to_be_away_are_not_asked_while_a_majority_is_left() -> None:
    ring = Ring()
    await ring.fill([b"a"])
    away = ring.replicas_of(name_of(b"a"))
    ring.thought_down = {away[0]}
    assert keys_of(await page_of(ring, shards=range(1))) == [b"a"]
    assert {scan.disk for scan in ring.scans} == set(away[1:])
    ring.scans.clear()
    ring.thought_down = set(away[:2])
    assert keys_of(await page_of(ring, shards=range(1))) == [b"a"]
    assert {scan.disk for scan in ring.scans} == set(away)


async def test_a_lagging_replica_costs_no_settling_even_where_it_was_to_supply_the_rows() -> None:
    ring = Ring()
    name = name_of(b"a")
    for disk in ring.replicas_of(name):
        ring.reads.clear()
        await ring.put_everywhere(name)
        for other in set(ring.replicas_of(name)) - {disk}:
            await ring.put(other, name, value_of(2), 2)
        page = await page_of(ring, shards=range(1))
        assert [row.value for row in page.rows] == [value_of(2)]
        assert ring.reads == []


async def test_a_row_that_only_one_of_two_replicas_has_is_settled_before_it_is_shown() -> None:
    ring = Ring()
    name = name_of(b"a")
    disks = ring.replicas_of(name)
    await ring.put(disks[0], name, value_of(1), 1)
    ring.down = {disks[2]}
    assert keys_of(await page_of(ring, shards=range(1))) == [b"a"]
    assert ring.reads == [name]
    assert ring.stores[disks[1]].get(name) is not None


async def test_after_a_fence_only_replicas_that_hold_it_are_asked_and_a_doubtful_key_is_settled_and_not_read() -> None:
    ring = Ring()
    name = name_of(b"a")
    disks = ring.replicas_of(name)
    await ring.put(disks[0], name, value_of(1), 1)
    ring.verdicts = {disks[2]: Verdict.FENCED}  # its fence is not on disk yet
    wanted = PageQuery(Table.OBJECT, BUCKET, range(1), hidden=True, settling_nonce=b"nonce", after_fence=True)
    assert keys_of(await ring.scanner.list_page(wanted)) == [b"a"]
    assert (ring.settled, ring.reads) == ([name], [])
    assert {request.fence for request in ring.scans} == {b"nonce"}
    ring.verdicts[disks[1]] = Verdict.FENCED
    with pytest.raises(ServiceUnavailable):
        await ring.scanner.list_page(wanted)


AFTER_FENCE = PageQuery(Table.OBJECT, BUCKET, range(1), hidden=True, settling_nonce=b"nonce", after_fence=True)


@pytest.mark.parametrize("position", [0, 1, 2])
@pytest.mark.parametrize("others", [None, Visibility.TOMBSTONE])
async def test_after_a_fence_a_row_that_any_replica_has_is_settled(position: int, others: int | None) -> None:
    """Of the two others one may lie and the other lag; or the row is what one has missed to delete."""
    ring = Ring()
    name = name_of(b"a")
    disks = ring.replicas_of(name)
    await ring.put(disks[position], name, value_of(1), 1)
    for disk in disks[:position] + disks[position + 1 :]:
        if others is not None:
            await ring.put(disk, name, value_of(2, others), 2)
    assert keys_of(await ring.scanner.list_page(AFTER_FENCE)) == ([b"a"] if others is None else [])
    assert (ring.settled, ring.reads) == ([name], [])


async def test_after_a_fence_replicas_that_are_away_or_agree_cost_nothing() -> None:
    ring = Ring()
    name = name_of(b"a")
    assert keys_of(await ring.scanner.list_page(AFTER_FENCE)) == []
    await ring.put_everywhere(name)
    assert keys_of(await ring.scanner.list_page(AFTER_FENCE)) == [b"a"]
    ring.down = {ring.replicas_of(name)[0]}
    assert keys_of(await ring.scanner.list_page(AFTER_FENCE)) == [b"a"]
    assert ring.settled == []


@pytest.mark.parametrize("had_missed", ["all", "deletes of what it lacks"])
async def test_after_a_fence_deletes_that_a_replica_has_missed_are_not_settled_one_by_one(had_missed: str) -> None:
    """A replica that was away lacks the rows of millions of keys that were written and deleted meanwhile."""
    ring = Ring()
    lagging, *others = ring.replicas_of(name_of(b"a"))
    for number in range(100):
        name = name_of(b"k%04d" % number)
        for disk in others:
            await ring.put(disk, name, value_of(3, Visibility.TOMBSTONE), 3)
        if had_missed != "all":
            await ring.put(lagging, name, value_of(1, Visibility.TOMBSTONE), 1)
    page = await ring.scanner.list_page(AFTER_FENCE)
    assert (page.rows, page.next_after, ring.settled) == ((), None, [])


async def test_after_a_fence_a_damaged_row_of_one_replica_is_settled() -> None:
    ring = Ring()
    name = name_of(b"a")
    await ring.put_everywhere(name, Visibility.TOMBSTONE)
    ring.stores[ring.replicas_of(name)[2]].damage(name)
    assert keys_of(await ring.scanner.list_page(AFTER_FENCE)) == []
    assert ring.settled == [name]


async def test_after_a_fence_a_replica_that_is_slow_is_waited_for() -> None:
    ring = Ring(hedge_s=0.001)
    name = name_of(b"a")
    disks = ring.replicas_of(name)
    await ring.put(disks[2], name, value_of(1), 1)
    ring.slow_s = {disks[2]: 0.1}
    assert keys_of(await ring.scanner.list_page(AFTER_FENCE)) == [b"a"]


async def test_a_delete_that_only_one_of_two_replicas_has_is_settled_before_the_key_is_left_out() -> None:
    ring = Ring()
    name = name_of(b"a")
    await ring.put_everywhere(name)
    disks = ring.replicas_of(name)
    await ring.put(disks[0], name, value_of(2, Visibility.TOMBSTONE), 2)
    ring.down = {disks[2]}
    assert keys_of(await page_of(ring, shards=range(1))) == []
    assert ring.reads == [name]


async def test_a_tombstone_that_two_replicas_have_at_different_ballots_is_no_agreement() -> None:
    ring = Ring()
    name = name_of(b"a")
    disks = ring.replicas_of(name)
    await ring.put(disks[0], name, value_of(1, Visibility.TOMBSTONE), 1)
    await ring.put(disks[1], name, value_of(2), 2)
    await ring.put(disks[2], name, value_of(3, Visibility.TOMBSTONE), 3)
    await page_of(ring, shards=range(1))
    assert ring.reads == [name]


async def test_a_damaged_row_at_one_replica_changes_nothing_and_at_two_is_never_taken_for_absent() -> None:
    ring = Ring()
    name = name_of(b"a")
    await ring.put_everywhere(name)
    disks = ring.replicas_of(name)
    ring.stores[disks[0]].damage(name)
    assert keys_of(await page_of(ring, shards=range(1))) == [b"a"]
    assert ring.reads == []
    ring.stores[disks[1]].damage(name)
    with pytest.raises(ServiceUnavailable):
        await page_of(ring, shards=range(1))


async def test_where_a_common_prefix_stands_on_a_key_that_is_gone_the_scan_looks_behind_it() -> None:
    ring = Ring()
    gone, there = name_of(b"p/1"), name_of(b"p/2")
    disks = ring.replicas_of(gone)
    await ring.put_everywhere(there)
    await ring.put(disks[0], gone, value_of(1), 1)
    await ring.put(disks[1], gone, value_of(2, Visibility.TOMBSTONE), 2)
    ring.down = {disks[2]}
    page = await page_of(ring, shards=range(1), delimiter=b"/")
    assert page == ListPage(prefixes=(b"p/",))
    await ring.put(disks[0], there, value_of(1), 3)
    await ring.put(disks[1], there, value_of(4, Visibility.TOMBSTONE), 4)
    assert await page_of(ring, shards=range(1), delimiter=b"/") == ListPage()


async def test_a_lagging_replica_that_believes_it_is_done_does_not_end_the_list() -> None:
    ring = Ring(share=lambda _entries, _feeds, _turn: 2)
    for key in (b"a", b"b"):
        await ring.put_everywhere(name_of(key))
    for lagging in ring.replicas_of(name_of(b"c")):
        key = b"c after " + lagging.encode()
        for disk in set(ring.replicas_of(name_of(key))) - {lagging}:
            await ring.put(disk, name_of(key), value_of(1), 1)
        assert key in keys_of(await page_of(ring, shards=range(1)))


async def test_keys_behind_a_settled_one_in_a_common_prefix_are_not_settled() -> None:
    ring = Ring()
    first, second = name_of(b"p/1"), name_of(b"p/2")
    disks = ring.replicas_of(first)
    await ring.put(disks[0], first, value_of(2), 2)
    await ring.put(disks[1], first, value_of(1, Visibility.TOMBSTONE), 1)
    await ring.put(disks[0], second, value_of(2), 2)
    await ring.put(disks[1], second, value_of(1), 1)
    ring.down = {disks[2]}
    assert (await page_of(ring, shards=range(1), delimiter=b"/")).prefixes == (b"p/",)
    assert ring.reads == [first]


async def test_a_page_full_of_deleted_keys_is_cut_short_and_tells_where_to_go_on() -> None:
    ring = Ring(examine_max=2)
    keys = [b"k%04d" % number for number in range(4 * ROUNDS_MAX)]
    await ring.fill(keys, shards=1, visibility=Visibility.TOMBSTONE)
    await ring.put_everywhere(name_of(b"z"))
    page = await page_of(ring, shards=range(1), limit=1)
    assert (page.rows, page.prefixes) == ((), ())
    assert page.next_after is not None
    seen = []
    while page.next_after is not None:
        before = page.next_after
        page = await page_of(ring, shards=range(1), after=before, limit=1)
        seen += keys_of(page)
        assert page.next_after is None or page.next_after > before
    assert seen == [b"z"]


async def test_rows_of_any_replica_are_found_behind_very_many_deleted_keys() -> None:
    """A bucket that was emptied has millions of them for a day."""
    ring = Ring(examine_max=2)
    name = name_of(b"z")
    lagging, *others = ring.replicas_of(name)
    for number in range(4 * comparing.ROUNDS_MAX):
        for disk in others:
            await ring.put(disk, name_of(b"k%04d" % number), value_of(2, Visibility.TOMBSTONE), 2)
    await ring.put(lagging, name, value_of(1), 1)
    found = [row.key async for row in ring.scanner.rows_anywhere(PageQuery(Table.OBJECT, BUCKET, range(1)))]
    assert found == [b"z"]


async def test_a_damaged_row_of_one_replica_is_never_taken_for_absent_where_rows_of_any_replica_count() -> None:
    """Where the others have missed a row, the damaged one is all that is left of it."""
    ring = Ring()
    name = name_of(b"a")
    only = ring.replicas_of(name)[0]
    await ring.put(only, name, value_of(1), 1)
    ring.stores[only].damage(name)
    wanted = PageQuery(Table.OBJECT, BUCKET, range(1))
    for everyone in (True, False):
        with pytest.raises(ServiceUnavailable, match="damaged"):
            _ = [row async for row in ring.scanner.rows_anywhere(wanted, everyone=everyone)]


async def test_rows_of_any_replica_wait_for_one_that_hangs_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparing, "PATIENCE_S", 0.5)
    ring = Ring(examine_max=2)
    await ring.fill([b"k%04d" % number for number in range(10)], shards=1)
    ring.hung = {ring.replicas_of(name_of(b"k"))[0]}
    began = asyncio.get_running_loop().time()
    wanted = PageQuery(Table.OBJECT, BUCKET, range(1))
    assert len([row async for row in ring.scanner.rows_anywhere(wanted, everyone=False)]) == 10
    assert 0.5 <= asyncio.get_running_loop().time() - began < 1.0, "five slices or more"


@pytest.mark.parametrize("visibility", [Visibility.LIVE, Visibility.TOMBSTONE])
async def test_a_replica_that_names_rows_without_end_is_not_read_without_end(
    monkeypatch: pytest.MonkeyPatch, visibility: Visibility
) -> None:
    monkeypatch.setattr(comparing, "ROUNDS_MAX", 3)
    monkeypatch.setattr(comparing, "EMPTY_ROUNDS_MAX", 3)
    ring = Ring(examine_max=2)
    liar = ring.replicas_of(name_of(b"a"))[0]
    for number in range(20):
        await ring.put(liar, name_of(b"k%04d" % number), value_of(1, visibility), 1)
    with pytest.raises(ServiceUnavailable):
        _ = [row async for row in ring.scanner.rows_anywhere(PageQuery(Table.OBJECT, BUCKET, range(1)))]


async def test_rows_that_two_replicas_show_are_read_however_many_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the rows of a million deleted keys whose data copies use. A row that one replica alone shows may be a lie."""
    monkeypatch.setattr(comparing, "ROUNDS_MAX", 3)
    monkeypatch.setattr(comparing, "SHOWN_A_ROUND", 2, raising=False)
    ring = Ring(examine_max=2)
    keys = [b"k%04d" % number for number in range(40)]
    away, *others = ring.replicas_of(name_of(b"k"))
    for key in keys:
        for disk in others:
            await ring.put(disk, name_of(key), value_of(1), 1)
    await ring.put(away, name_of(b"l"), value_of(1), 1)
    wanted = PageQuery(Table.OBJECT, BUCKET, range(1))
    assert [row.key async for row in ring.scanner.rows_anywhere(wanted)] == [*keys, b"l"]


async def test_a_page_cut_short_inside_a_common_prefix_does_not_show_it_again() -> None:
    ring = Ring(examine_max=1, share=lambda _entries, _feeds, _turn: 1)
    await ring.put_everywhere(name_of(b"p/2", 1))
    for number in range(2 * ROUNDS_MAX):
        await ring.put_everywhere(name_of(b"a%04d" % number, 0), Visibility.TOMBSTONE)
        await ring.put_everywhere(name_of(b"p/1%04d" % number, 0), Visibility.TOMBSTONE)
    seen: list[bytes] = []
    after: bytes | None = b""
    while after is not None:
        page = await page_of(ring, shards=range(2), delimiter=b"/", after=after)
        seen += page.prefixes
        after = page.next_after
    assert seen == [b"p/"]


async def test_a_failure_to_settle_reaches_the_caller_as_it_is() -> None:
    ring = Ring()
    for number in range(40):
        name = name_of(b"k%d" % number)
        await ring.put(ring.replicas_of(name)[0], name, value_of(1), 1)
        await ring.put(ring.replicas_of(name)[1], name, value_of(2), 2)

    async def refuse(*_: object, **__: object) -> None:
        await asyncio.sleep(0)
        raise ServiceUnavailable("as it is")

    ring._repair = refuse  # type: ignore[method-assign]
    with pytest.raises(ServiceUnavailable, match="as it is"):
        await page_of(ring, shards=range(1))


async def test_a_walk_shows_hidden_rows_when_asked_and_goes_on_over_many_pages() -> None:
    ring = Ring()
    keys = [b"k%04d" % number for number in range(1100)]
    await ring.fill(keys, shards=1, visibility=Visibility.HIDDEN)
    for hidden, expected in ((True, keys), (False, [])):
        assert [
            row.key async for row in every_row(ring.scanner, PageQuery(Table.OBJECT, BUCKET, range(1), hidden=hidden))
        ] == expected
    behind = every_row(
        ring.scanner, PageQuery(Table.OBJECT, BUCKET, range(1), prefix=b"k00", after=keys[97], hidden=True)
    )
    assert [row.key async for row in behind] == keys[98:100]


@pytest.mark.parametrize("quick", [False, True])
async def test_catching_up_settles_exactly_what_a_returned_replica_missed_and_names_who_is_away(quick: bool) -> None:
    ring = Ring()
    keys = [b"k%04d" % number for number in range(1100)]
    await ring.fill(keys, shards=1)
    disks = ring.replicas_of(name_of(keys[0]))
    missed = [name_of(keys[3]), name_of(keys[700]), name_of(b"new")]
    for name in missed:
        for disk in disks[1:]:
            await ring.put(disk, name, value_of(2), 2)
    found = await ring.scanner.catch_up(Table.OBJECT, BUCKET, 0, quick=quick)
    assert (found.settled, found.away) == (3, set())
    assert ring.settled == missed
    assert all(ring.stores[disks[0]].get(name) == ring.stores[disks[1]].get(name) for name in missed)
    ring.down = {disks[1]}
    again = await ring.scanner.catch_up(Table.OBJECT, BUCKET, 0, quick=quick)
    assert (again.rows, again.settled, again.away) == (1101, 0, {disks[1]})
    ring.down = set(disks[1:])
    with pytest.raises(ServiceUnavailable):
        await ring.scanner.catch_up(Table.OBJECT, BUCKET, 0, quick=quick)


@pytest.mark.parametrize("quick", [False, True])
async def test_a_replica_that_differs_and_does_not_answer_with_its_rows_was_not_compared(
    monkeypatch: pytest.MonkeyPatch, quick: bool
) -> None:
    ring = Ring()
    await ring.fill([b"k1"], shards=1)
    disks = ring.replicas_of(name_of(b"k1"))
    for disk in disks[1:]:
        await ring.put(disk, name_of(b"missed"), value_of(2), 2)
    ask_all, asked = ring.scanner._reader.ask_all, 0

    async def away_meanwhile(*wanted: Any, **patience: Any) -> Any:
        nonlocal asked
        asked += 1
        ring.down = {disks[0]} if asked == 2 else set()
        return await ask_all(*wanted, **patience)

    monkeypatch.setattr(ring.scanner._reader, "ask_all", away_meanwhile)
    found = await ring.scanner.catch_up(Table.OBJECT, BUCKET, 0, quick=quick)
    assert (found.settled, found.away) == (0, {disks[0]})


@pytest.mark.parametrize("quick", [False, True])
async def test_a_comparison_waits_for_a_replica_that_is_slow_but_once_for_one_that_never_answers(
    monkeypatch: pytest.MonkeyPatch, quick: bool
) -> None:
    ring = Ring(hedge_s=0.0)
    keys = [b"k%04d" % number for number in range(4100)]
    await ring.fill(keys, shards=1)
    slow, *others = ring.replicas_of(name_of(keys[0]))
    for disk in others:
        await ring.put(disk, name_of(b"missed"), value_of(2), 2)
    replica = ring.replica

    class Slow:
        async def scan(self, request: ScanRequest, **options: Any) -> ScanReply:
            await asyncio.sleep(0.05)
            reply: ScanReply = await replica(slow).scan(request, **options)
            return reply

    monkeypatch.setattr(ring, "replica", lambda disk: Slow() if disk == slow else replica(disk))
    found = await ring.scanner.catch_up(Table.OBJECT, BUCKET, 0, quick=quick)
    assert (found.settled, found.away) == (1, set())
    ring.hung.add(slow)
    monkeypatch.setattr(comparing, "PATIENCE_S", 0.5)
    began = asyncio.get_running_loop().time()
    found = await ring.scanner.catch_up(Table.OBJECT, BUCKET, 0, quick=quick)
    assert 0.5 <= asyncio.get_running_loop().time() - began < 1.0, "three slices or more"
    assert found.away == {slow}


def asks_of(ring: Ring, want: Want) -> list[int]:
    """How many each request has that asks for this."""
    return [len(scan.shards) for scan in ring.scans if scan.shards[0].want == want]


async def test_a_quick_comparison_sends_few_messages_and_few_rows() -> None:
    ring = Ring()
    keys = [b"k%04d" % number for number in range(3000)]
    await ring.fill(keys, shards=1)
    away = ring.replicas_of(name_of(b"k"))[0]
    missed = [name_of(b"k%04d-new" % number) for number in range(0, 3000, 100)]
    for name in missed:
        for disk in ring.replicas_of(name):
            if disk != away:
                await ring.put(disk, name, value_of(2), 2)
    found = await ring.scanner.catch_up(Table.OBJECT, BUCKET, 0, quick=True)
    assert (found.settled, sorted(ring.settled)) == (30, missed)
    assert len(asks_of(ring, Want.PIECES)) <= 3 * 5
    assert len(asks_of(ring, Want.ALL)) <= 3 * 5
    limits = [ask.limit for scan in ring.scans for ask in scan.shards if ask.want == Want.ALL]
    assert sum(limits) < 3 * 30 * 60


async def test_a_replica_that_missed_nearly_all_gets_it_in_parts_that_a_message_takes() -> None:
    ring = Ring()
    keys = [b"k%04d" % number for number in range(1300)]
    await ring.fill(keys[:20], shards=1)
    away = ring.replicas_of(name_of(b"k"))[0]
    for key in keys[20:]:
        for disk in ring.replicas_of(name_of(key)):
            if disk != away:
                await ring.put(disk, name_of(key), value_of(2), 2)
    found = await ring.scanner.catch_up(Table.OBJECT, BUCKET, 0, quick=True)
    assert found.settled == 1280
    assert len(ring.settled) == 1280
    limits = [ask.limit for scan in ring.scans for ask in scan.shards if ask.want == Want.ALL]
    assert max(limits) == comparing.SPAN_ROWS_MAX


async def test_large_rows_that_differ_are_not_asked_for_together() -> None:
    ring = Ring()
    names = [name_of(b"k%03d" % number) for number in range(200)]
    large = replace(value_of(1), body=bytes(12_000))
    for name in names:
        for disk in ring.replicas_of(name):
            await ring.put(disk, name, large, 1)
    for name in (names[0], names[-1]):
        await ring.put(ring.replicas_of(name)[1], name, large, 2)
        await ring.put(ring.replicas_of(name)[2], name, large, 2)
    found = await ring.scanner.catch_up(Table.OBJECT, BUCKET, 0, quick=True)
    assert found.settled == 2
    assert asks_of(ring, Want.ALL) == [1] * 6


async def test_a_replica_without_pieces_is_compared_by_digests() -> None:
    """Version 0.1.0 answers what it does not know as it does a digest."""
    ring = Ring()
    await ring.fill([b"k%04d" % number for number in range(1100)], shards=1)
    old, other, _ = disks = ring.replicas_of(name_of(b"k"))
    for disk in disks[1:]:
        await ring.put(disk, name_of(b"missed"), value_of(2), 2)
    ring.lies[other] = lambda reply: replace(
        reply, slices=tuple(replace(each, keys=(), heads=()) for each in reply.slices)
    )
    found = await ring.scanner.catch_up(Table.OBJECT, BUCKET, 0, quick=True)
    assert (found.settled, found.away, found.rows) == (1, set(), 1101)
    assert ring.stores[old].get(name_of(b"missed")) is not None
    assert len(asks_of(ring, Want.PIECES)) == 3


@pytest.mark.parametrize(
    "lie",
    [
        {"heads": ()},
        {"heads": [b"too short"]},
        {"keys": [b"k1"]},
        {"keys": [b"k2", b"k2"], "heads": [bytes(12), bytes(12)]},
        {"keys": [b"k" * (KEY_BYTES_MAX + 1)], "through": b"k" * (KEY_BYTES_MAX + 1)},
    ],
    ids=["no marks", "no mark", "another end", "no order", "too long"],
)
async def test_a_replica_whose_pieces_can_not_be_counts_as_away(lie: Any) -> None:
    ring = Ring()
    await ring.fill([b"k1", b"k2"], shards=1)
    disks = ring.replicas_of(name_of(b"k1"))
    for disk in disks[1:]:
        await ring.put(disk, name_of(b"missed"), value_of(2), 2)
    ring.lies[disks[0]] = lambda reply: replace(
        reply, slices=tuple(replace(each, **lie) if each.keys else each for each in reply.slices)
    )
    found = await ring.scanner.catch_up(Table.OBJECT, BUCKET, 0, quick=True)
    assert (found.settled, found.away) == (0, {disks[0]})


@pytest.mark.parametrize(
    "lie",
    [
        {"rows": b"\xc1"},
        {"rows": encode([ScanRow(b"", b"", 0, None)])},
        {"rows": encode([ScanRow(b"k" * (KEY_BYTES_MAX + 1), b"", 0, None)])},
        {"through": b"", "done": False},
    ],
    ids=["not readable", "no key", "too long", "no end"],
)
@pytest.mark.parametrize("quick", [False, True])
async def test_a_replica_that_answers_what_can_not_be_compared_counts_as_away_and_ends_nothing(
    lie: Any, quick: bool
) -> None:
    ring = Ring()
    await ring.fill([b"k1", b"k2"], shards=1)
    disks = ring.replicas_of(name_of(b"k1"))
    for disk in disks[1:]:
        await ring.put(disk, name_of(b"missed"), value_of(2), 2)
    ring.lies[disks[0]] = lambda reply: replace(reply, slices=tuple(replace(each, **lie) for each in reply.slices))
    async with asyncio.timeout(GUARD_S):
        found = await ring.scanner.catch_up(Table.OBJECT, BUCKET, 0, quick=quick)
    assert (found.settled, found.away) == (0, {disks[0]})
    ring.down = {disks[1]}
    with pytest.raises(ServiceUnavailable):
        await ring.scanner.catch_up(Table.OBJECT, BUCKET, 0, quick=quick)


async def test_shards_with_the_same_rows_are_found_by_their_sums_without_a_look_at_rows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ring = Ring()
    await ring.fill([b"k%03d" % number for number in range(60)], shards=6)
    lagging = [RegisterName(Table.OBJECT, BUCKET, shard, b"new") for shard in (1, 4)]
    for name in lagging:
        for disk in ring.replicas_of(name)[1:]:
            await ring.put(disk, name, value_of(2), 2)
    older = RegisterName(Table.OBJECT, BUCKET, 3, b"k003")
    await ring.put(ring.replicas_of(older)[0], older, value_of(9), 9)
    for store in ring.stores.values():
        for read in ("slice", "columns", "stamps"):
            monkeypatch.setattr(store, read, None)
    shards = range(8)
    assert await ring.scanner.alike(Table.OBJECT, BUCKET, shards) == {0, 2, 5, 6, 7}
    assert await ring.scanner.alike(Table.OBJECT, BUCKET, [1, 3]) == set()
    assert await ring.scanner.alike(Table.OBJECT, BUCKET, []) == set()
    assert len({request.disk for request in ring.scans}) == 6, "one for all shards of a disk"
    assert all(ask.want == Want.SUM for request in ring.scans for ask in request.shards)


async def test_a_write_on_its_way_makes_no_shard_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    ring = Ring()
    await ring.fill([b"k1"], shards=1)
    ask_all, late = ring.scanner._reader.ask_all, name_of(b"late")
    first, *others = ring.replicas_of(late)
    for disk in others:
        await ring.put(disk, late, value_of(2), 2)

    async def and_then_it_arrives(*wanted: Any, **patience: Any) -> Any:
        found = await ask_all(*wanted, **patience)
        await ring.put(first, late, value_of(2), 2)
        return found

    monkeypatch.setattr(ring.scanner._reader, "ask_all", and_then_it_arrives)
    assert await ring.scanner.alike(Table.OBJECT, BUCKET, [0]) == {0}


@pytest.mark.parametrize("trouble", ["down", "hung", "moved", "without a sum", "old", "lies"])
async def test_a_shard_of_which_a_replica_tells_no_sum_is_not_taken_for_the_same(
    monkeypatch: pytest.MonkeyPatch, trouble: str
) -> None:
    """Unless that replica is thought to be away, and a majority is the same."""
    monkeypatch.setattr(comparing, "PATIENCE_S", 0.05)
    ring = Ring()
    await ring.fill([b"k1", b"k2"], shards=1)
    disk = ring.replicas_of(name_of(b"k1"))[2]
    if trouble == "down":
        ring.down.add(disk)
    elif trouble == "hung":
        ring.hung.add(disk)
    elif trouble == "moved":
        ring.verdicts[disk] = Verdict.EPOCH
    elif trouble == "without a sum":
        monkeypatch.setattr(ring.stores[disk], "shard_sum", lambda _prefix: None)
    elif trouble == "old":
        answer = replace(ShardSlice(0, b"", False, 0), digest=ring.stores[disk].shard_sum(name_of(b"k1").prefix) or 0)
        ring.lies[disk] = lambda _reply: ScanReply(slices=(answer,))
    else:
        ring.lies[disk] = lambda reply: replace(
            reply, slices=tuple(replace(each, digest=each.digest ^ 1) for each in reply.slices)
        )
    assert await ring.scanner.alike(Table.OBJECT, BUCKET, [0]) == set()
    ring.thought_down.add(disk)
    silent = trouble not in ("old", "lies")
    assert await ring.scanner.alike(Table.OBJECT, BUCKET, [0]) == ({0} if silent else set())
    ring.hung.clear()
    ring.down |= set(ring.replicas_of(name_of(b"k1"))[1:])
    ring.thought_down = set(ring.down)
    assert await ring.scanner.alike(Table.OBJECT, BUCKET, [0]) == set(), "without a majority"


async def test_replicas_of_which_none_knows_sums_are_not_taken_for_the_same() -> None:
    ring = Ring()
    await ring.fill([b"k1"], shards=1)
    for disk in ring.stores:
        ring.lies[disk] = lambda reply: replace(
            reply, slices=tuple(replace(each, done=False, digest=7) for each in reply.slices)
        )
    assert await ring.scanner.alike(Table.OBJECT, BUCKET, [0]) == set()


def test_a_share_is_a_little_more_than_the_mean_and_doubles_with_every_turn() -> None:
    assert 1001 / 16 < share_of(1001, 16, 0) < 90
    assert share_of(1001, 16, 1) == 2 * share_of(1001, 16, 0)
    assert share_of(1, 16, 0) == 8


def test_pages_beside_a_disk_that_never_answers_do_not_get_slower_and_slower() -> None:
    loop = VirtualLoop()

    async def pages() -> list[float]:
        ring = Ring()
        await ring.fill([b"k%03d" % number for number in range(20)])
        ring.hung = {ring.replicas_of(name_of(b"k"))[0]}
        took = []
        for _ in range(60):
            began = loop.time()
            assert len(keys_of(await page_of(ring))) == 20
            took.append(loop.time() - began)
        return took

    assert max(run(loop, pages())) < 1.0  # 40 hedges of 10 ms, and the round that asks everybody

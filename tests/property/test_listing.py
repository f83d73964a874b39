"""Pages from replicas that disagree are those of a sorted dict of what a majority holds, or the
newest where none does.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from storaged.meta.listing import comparing
from storaged.meta.listing.merge import every_row
from storaged.meta.names import KEY_BYTES_MAX, RegisterName, Table, Value, Visibility, shard_of
from storaged.meta.ports import PageQuery
from storaged.meta.storage.scan import common_prefix
from storaged.meta.store_ports import RowRange
from tests.examples import examples
from tests.worlds.listing import BUCKET, Ring, value_of

PIECES = st.sampled_from([b"a", b"b", b"/", b"//", b"\0", b"\xff", b"a" * 479, b"\xff" * 30, b"photos/2026/"])
KEYS = st.one_of(
    st.lists(PIECES, min_size=1, max_size=5).map(lambda pieces: b"".join(pieces)[:KEY_BYTES_MAX]),
    st.tuples(st.sampled_from([b"", b"a/", b"b/a/"]), st.binary(min_size=1, max_size=2)).map(b"".join),
)
VISIBILITIES = st.sampled_from([Visibility.LIVE, Visibility.LIVE, Visibility.HIDDEN, Visibility.TOMBSTONE])


@dataclass
class KeyState:
    """What each of the three replicas has: the counter of its ballot (0: nothing), and the visibility that goes with
    each ballot.
    """

    counters: tuple[int, int, int]
    visibilities: tuple[int, int, int, int]
    damaged: int | None

    def is_damaged(self, index: int) -> bool:
        """Only a row that another replica has too: nothing else could bring it back. And only while all replicas
        answer, and where it is all the same whether it
        counts: it does where its stamp alone is compared, and does not where it is read."""
        others = [counter for position, counter in enumerate(self.counters) if position != index]
        without = others[0] if others[0] == others[1] else max(others)
        agreed = [counter for counter in self.counters if self.counters.count(counter) >= 2]
        return (
            self.damaged == index and self.counters[index] > 0 and any(others) and (not agreed or agreed[0] == without)
        )


AGREED = st.integers(1, 3).map(lambda counter: (counter, counter, counter))
ANYHOW = st.tuples(st.integers(0, 3), st.integers(0, 3), st.integers(0, 3))
LAGGING = st.tuples(st.integers(0, 2), st.integers(1, 3)).map(
    lambda drawn: tuple(0 if i == drawn[0] else drawn[1] for i in range(3))
)
SHOWN = st.just((Visibility.TOMBSTONE, Visibility.LIVE, Visibility.LIVE, Visibility.LIVE))
MIXED = st.tuples(st.just(Visibility.TOMBSTONE), VISIBILITIES, VISIBILITIES, VISIBILITIES)
STATES = st.one_of(
    st.builds(KeyState, AGREED, SHOWN, st.none()),
    st.builds(KeyState, LAGGING, SHOWN, st.none()),
    st.builds(KeyState, AGREED, MIXED, st.one_of(st.none(), st.integers(0, 2))),
    st.builds(KeyState, ANYHOW, MIXED, st.one_of(st.none(), st.none(), st.integers(0, 2))),
)
KEY_STATES = st.one_of(
    st.dictionaries(KEYS, STATES, max_size=8),
    st.dictionaries(KEYS, STATES, min_size=9, max_size=30),
    st.dictionaries(KEYS, st.builds(KeyState, AGREED, SHOWN, st.none()), min_size=9, max_size=30),
)


@dataclass
class Case:
    keys: dict[bytes, KeyState]
    shards: int
    prefix: bytes
    after: bytes
    delimiter: bytes
    limit: int
    hidden: bool
    down: str = ""
    noticed: bool = True
    share: int = 8
    examine_max: int = 8192
    truth: dict[bytes, Value] = field(default_factory=dict)


CASES = st.builds(
    Case,
    keys=KEY_STATES,
    shards=st.integers(1, 5),
    prefix=st.one_of(st.just(b""), st.just(b""), st.sampled_from([b"a", b"b/"]), KEYS),
    after=st.one_of(st.just(b""), st.just(b""), KEYS),
    delimiter=st.sampled_from([b"", b"/", b"//", b"a", b"\0", b"\xff", b"/2026/"]),
    limit=st.integers(1, 12),
    hidden=st.booleans(),
    down=st.sampled_from(["", "", "d0", "d1", "d2", "d3", "d4", "d5"]),
    noticed=st.booleans(),
    share=st.integers(1, 4),
    examine_max=st.sampled_from([1, 2, 3, 8192]),
)


async def ring_of(case: Case) -> Ring:
    """The stores as the case has them; ``case.truth`` is what a list must show."""
    ring = Ring(share=lambda _entries, _feeds, _turn: case.share, examine_max=case.examine_max)
    if case.down:
        ring.down.add(case.down)
        if case.noticed:
            ring.thought_down.add(case.down)
    for key, state in case.keys.items():
        name = RegisterName(Table.OBJECT, BUCKET, shard_of(key, range(case.shards)), key)
        seen: list[int | None] = []
        for index, disk in enumerate(ring.replicas_of(name)):
            counter = state.counters[index]
            if counter:
                await ring.put(disk, name, value_of(counter, state.visibilities[counter]), counter)
            if not case.down and state.is_damaged(index):
                ring.stores[disk].damage(name)
            if disk not in ring.down:
                seen.append(None if not case.down and state.is_damaged(index) else counter)
        agreed = [counter for counter in seen if counter is not None and seen.count(counter) >= 2]
        winner = agreed[0] if agreed else max(counter or 0 for counter in seen)
        if winner:
            case.truth[key] = value_of(winner, state.visibilities[winner])
    return ring


def model(case: Case) -> list[tuple[bytes, Value | None]]:
    least = Visibility.HIDDEN if case.hidden else Visibility.LIVE
    entries: dict[bytes, Value | None] = {}
    for key, value in sorted(case.truth.items()):
        if key > case.after and key.startswith(case.prefix) and value.visibility >= least:
            group = common_prefix(key, case.prefix, case.delimiter)
            entries[group or key] = None if group else value
    return list(entries.items())


async def listed(case: Case, ring: Ring) -> list[list[tuple[bytes, Value | None]]]:
    """All pages, each as its entries in order."""
    pages = []
    after: bytes | None = case.after
    while after is not None:
        page = await ring.scanner.list_page(
            PageQuery(
                Table.OBJECT,
                BUCKET,
                range(case.shards),
                prefix=case.prefix,
                after=after,
                delimiter=case.delimiter,
                limit=case.limit,
                hidden=case.hidden,
            )
        )
        assert list(page.rows) == sorted(page.rows, key=lambda row: row.key)
        if not case.hidden:
            heads = await ring.scanner.list_heads(
                PageQuery(
                    Table.OBJECT,
                    BUCKET,
                    range(case.shards),
                    prefix=case.prefix,
                    after=after,
                    delimiter=case.delimiter,
                    limit=case.limit,
                )
            )
            assert [row.key for row in page.rows] == list(heads.keys)
            assert [row.value.body for row in page.rows] == list(heads.heads)
            assert (page.prefixes, page.next_after) == (heads.prefixes, heads.next_after)
        entries: list[tuple[bytes, Value | None]] = [(row.key, row.value) for row in page.rows]
        entries += [(prefix, None) for prefix in page.prefixes]
        pages.append(sorted(entries, key=lambda entry: entry[0]))
        assert page.next_after is None or page.next_after > after
        after = page.next_after
    return pages


@settings(max_examples=examples(200), deadline=None)
@given(CASES)
def test_the_pages_of_diverging_replicas_are_those_of_a_sorted_dict(case: Case) -> None:
    async def run() -> list[list[tuple[bytes, Value | None]]]:
        return await listed(case, await ring_of(case))

    pages = asyncio.run(run())
    assert [entry for page in pages for entry in page] == model(case)
    assert all(len(page) == case.limit for page in pages[:-1])
    assert len(pages[-1]) <= case.limit
    assert pages == [[]] or pages[-1]


@settings(max_examples=examples(40), deadline=None)
@given(CASES)
def test_a_walk_over_everything_gives_every_row_once_and_settles_no_more_than_it_must(case: Case) -> None:
    async def run() -> tuple[list[bytes], set[bytes]]:
        ring = await ring_of(case)
        rows = [
            row.key
            async for row in every_row(ring.scanner, PageQuery(Table.OBJECT, BUCKET, range(case.shards), hidden=True))
        ]
        return rows, {name.key for name in ring.reads}

    rows, read = asyncio.run(run())
    assert rows == [key for key, value in sorted(case.truth.items()) if value.visibility >= Visibility.HIDDEN]
    assert all(len(set(case.keys[key].counters)) > 1 or case.keys[key].damaged is not None for key in read)
    assert not any(set(case.keys[key].counters) == {0} for key in read)


@settings(max_examples=examples(40), deadline=None)
@given(CASES)
def test_after_catching_up_all_replicas_that_answer_hold_the_same_rows(case: Case) -> None:
    async def run() -> None:
        ring = await ring_of(case)
        for shard in range(case.shards):
            found = await ring.scanner.catch_up(Table.OBJECT, BUCKET, shard)
            disks = ring.replicas_of(RegisterName(Table.OBJECT, BUCKET, shard, b"k"))
            assert found.away == ring.down & set(disks)
            held = [
                ring.stores[disk].slice(RowRange(Table.OBJECT, BUCKET, shard, after=b"", prefix=b"", limit=1000))
                for disk in disks
                if disk not in ring.down
            ]
            assert all(rows == held[0] for rows in held)
            ring.settled.clear()
            again = await ring.scanner.catch_up(Table.OBJECT, BUCKET, shard)
            assert (again.settled, again.rows, ring.settled) == (0, len(held[0]), [])

    asyncio.run(run())


def stamps_of(ring: Ring, shard: int) -> set[bytes]:
    """What the replicas of a shard that answer say of their rows."""
    disks = ring.replicas_of(RegisterName(Table.OBJECT, BUCKET, shard, b"k"))
    wanted = RowRange(Table.OBJECT, BUCKET, shard, after=b"", prefix=b"", limit=1000)
    return {ring.stores[disk].stamps(wanted).stamps for disk in disks if disk not in ring.down}


@settings(max_examples=examples(40), deadline=None)
@given(CASES)
def test_what_a_quick_catch_up_skips_is_the_same_at_all_replicas_that_answer(case: Case) -> None:
    """And it skips all that is, where no other replica is thought to answer."""

    async def run() -> None:
        ring = await ring_of(case)
        for again in (False, True):
            skipped = await ring.scanner.alike(Table.OBJECT, BUCKET, range(case.shards))
            for shard in range(case.shards):
                disks = ring.replicas_of(RegisterName(Table.OBJECT, BUCKET, shard, b"k"))
                silent = ring.down & set(disks)
                same = len(stamps_of(ring, shard)) == 1
                assert not again or same
                if shard in skipped:
                    assert same
                    assert silent <= ring.thought_down
                else:
                    assert not same or silent - ring.thought_down
                    found = await ring.scanner.catch_up(Table.OBJECT, BUCKET, shard, quick=True)
                    assert found.away == silent

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(comparing, "PATIENCE_S", 0.01)
        asyncio.run(run())


@dataclass
class Step:
    """A write to at least a majority of a key's replicas, or a page."""

    key: bytes
    visibility: int
    missed: int
    page: tuple[bytes, bytes, int] | None
    """Prefix, delimiter, limit of a page after ``key``."""


STEPS = st.builds(
    Step,
    key=KEYS,
    visibility=VISIBILITIES,
    missed=st.sampled_from([0, 1, 2, 3, 3, 3]),
    page=st.one_of(
        st.none(),
        st.tuples(st.sampled_from([b"", b"", b"a"]), st.sampled_from([b"", b"", b"/", b"a"]), st.integers(1, 12)),
        st.just((b"", b"", 8)),
    ),
)


@settings(max_examples=examples(150), deadline=None)
@given(
    st.lists(STEPS, min_size=5, max_size=60), st.integers(1, 4), st.integers(1, 5), st.sampled_from([0, 3000, 1 << 20])
)
def test_pages_between_writes_are_those_of_a_sorted_dict_whatever_is_remembered(
    steps: list[Step], shards: int, share: int, memory: int
) -> None:
    async def run() -> None:
        ring = Ring(share=lambda _entries, _feeds, _turn: share, cache_bytes_max=memory)
        truth: dict[bytes, Value] = {}
        for counter, step in enumerate(steps, 1):
            if step.page is None:
                name = RegisterName(Table.OBJECT, BUCKET, shard_of(step.key, range(shards)), step.key)
                truth[step.key] = value_of(counter, step.visibility)
                for index, disk in enumerate(ring.replicas_of(name)):
                    if index != step.missed:
                        await ring.put(disk, name, truth[step.key], counter)
                continue
            prefix, delimiter, limit = step.page
            for after in (b"", step.key):
                entries: dict[bytes, bytes | None] = {}
                for key, value in sorted(truth.items()):
                    if key > after and key.startswith(prefix) and value.visibility == Visibility.LIVE:
                        group = common_prefix(key, prefix, delimiter)
                        entries[group or key] = None if group else value.body
                shown: dict[bytes, bytes | None] = {}
                following: bytes | None = after
                while following is not None and len(shown) < len(entries):
                    page = await ring.scanner.list_heads(
                        PageQuery(
                            Table.OBJECT,
                            BUCKET,
                            range(shards),
                            prefix=prefix,
                            after=following,
                            delimiter=delimiter,
                            limit=limit,
                        )
                    )
                    assert page.next_after is None or page.next_after > following
                    shown |= dict.fromkeys(page.prefixes) | dict(zip(page.keys, page.heads, strict=True))
                    following = page.next_after
                assert dict(sorted(shown.items())) == entries

    asyncio.run(run())

"""What every ring does: ``Registers``, ``Pages``, ``Fences`` and ``Scanner``.

A body's test module subclasses the suite and gives a ``ring`` fixture.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import NamedTuple

import pytest

from storaged.errors import DataDamaged, NoSuchBucket, OutcomeUnknown, PreconditionFailed, ServiceUnavailable
from storaged.hashes import page_hash
from storaged.meta.names import Change, RegisterName, Table, Value, Visibility
from storaged.meta.ports import Fences, ListPage, Outcome, PageQuery, Pages, Registers, Scanner
from storaged.meta.storage.row_head import head_of

SCOPE = b"scope of a suite"
OTHER_SCOPE = b"another scope..."
SHARDS = range(4)


class RingPorts(NamedTuple):
    """``rival``: the registers as another process has them."""

    registers: Registers
    rival: Registers
    pages: Pages
    fences: Fences
    scanner: Scanner


def name_of(key: bytes, *, shard: int = 0, scope: bytes = SCOPE, table: int = Table.OBJECT) -> RegisterName:
    return RegisterName(table, scope, shard, key)


NAME = name_of(b"key")


def becomes(body: bytes, visibility: int = Visibility.LIVE) -> Callable[[Value | None], Change]:
    return lambda _value: Change(body, visibility)


def appends(letter: bytes) -> Callable[[Value | None], Change]:
    return lambda value: Change((value.body if value else b"") + letter)


def refuses(_value: Value | None) -> Change:
    raise PreconditionFailed


class RingSuite:
    async def body(self, ring: RingPorts, name: RegisterName = NAME) -> bytes | None:
        value = (await ring.registers.read(name)).value
        return None if value is None else value.body

    async def fill(self, ring: RingPorts, *keys: bytes, visibility: int = Visibility.LIVE) -> None:
        for number, key in enumerate(keys):
            await ring.registers.change(name_of(key, shard=number % len(SHARDS)), becomes(b"of " + key, visibility))

    async def page(
        self,
        ring: RingPorts,
        *,
        prefix: bytes = b"",
        after: bytes = b"",
        delimiter: bytes = b"",
        limit: int = 1000,
        hidden: bool = False,
    ) -> ListPage:
        return await ring.scanner.list_page(
            PageQuery(
                Table.OBJECT, SCOPE, SHARDS, prefix=prefix, after=after, delimiter=delimiter, limit=limit, hidden=hidden
            )
        )

    # --- registers ----------------------------------------------------------------------------------------------------

    async def test_a_register_that_was_never_written_has_no_value(self, ring: RingPorts) -> None:
        assert (await ring.registers.read(NAME)).value is None
        assert await ring.registers.settle(NAME) is None

    async def test_a_change_is_read_back_and_says_what_was_before_and_after(self, ring: RingPorts) -> None:
        first = await ring.registers.change(NAME, becomes(b"one"))
        second = await ring.registers.change(NAME, becomes(b"two", Visibility.HIDDEN))
        assert first.before is None
        assert first.after is not None
        assert second.before == first.after
        assert second.after is not None
        assert (first.after.sequence, second.after.sequence) == (1, 2)
        assert (second.after.body, second.after.visibility) == (b"two", Visibility.HIDDEN)
        assert (await ring.registers.read(NAME)).value == second.after
        assert await self.body(ring, name_of(b"other")) is None

    async def test_an_update_that_leaves_the_value_changes_nothing(self, ring: RingPorts) -> None:
        before = (await ring.registers.change(NAME, becomes(b"one"))).after
        assert await ring.registers.change(NAME, lambda _value: None) == Outcome(before, before)
        assert (await ring.registers.read(NAME)).value == before

    async def test_what_an_update_raises_reaches_its_caller_and_nothing_changes(self, ring: RingPorts) -> None:
        await ring.registers.change(NAME, becomes(b"one"))
        with pytest.raises(PreconditionFailed):
            await ring.registers.change(NAME, refuses)
        assert await self.body(ring) == b"one"

    async def test_changes_at_the_same_time_all_take_effect_one_after_the_other(self, ring: RingPorts) -> None:
        letters = [b"%c" % letter for letter in b"abcdef"]
        outcomes = await asyncio.gather(*(ring.registers.change(NAME, appends(letter)) for letter in letters))
        body = await self.body(ring)
        assert body is not None
        assert sorted(body) == list(b"abcdef")
        assert sorted(outcome.after.sequence for outcome in outcomes if outcome.after) == [1, 2, 3, 4, 5, 6]

    async def test_a_change_that_is_not_ready_is_not_made(self, ring: RingPorts) -> None:
        async def fails() -> None:
            raise DataDamaged

        with pytest.raises(DataDamaged):
            await ring.registers.change(NAME, becomes(b"one"), ready=fails())
        assert await self.body(ring) is None

    async def test_a_change_that_is_overtaken_judges_the_newer_value(self, ring: RingPorts) -> None:
        seen: list[bytes | None] = []

        def update(value: Value | None) -> Change:
            seen.append(value.body if value else None)
            return Change(b"late")

        async def overtaken() -> None:
            await ring.rival.change(NAME, becomes(b"early"))

        outcome = await ring.registers.change(NAME, update, ready=overtaken())
        assert seen[0] is None
        assert seen[-1] == b"early"
        assert outcome.before is not None
        assert outcome.before.body == b"early"
        assert await self.body(ring) == b"late"

    async def test_a_change_whose_update_refuses_to_run_again_is_not_made(self, ring: RingPorts) -> None:
        runs = 0

        def once(_value: Value | None) -> Change:
            nonlocal runs
            runs += 1
            if runs > 1:
                raise DataDamaged
            return Change(b"late")

        async def overtaken() -> None:
            await ring.rival.change(NAME, becomes(b"early"))

        with pytest.raises((DataDamaged, OutcomeUnknown)):  # unknown, where an accept went out before
            await ring.registers.change(NAME, once, ready=overtaken())
        assert runs > 1
        assert await self.body(ring) == b"early"

    async def test_a_settling_round_overtakes_a_change_that_began_before_it(self, ring: RingPorts) -> None:
        await ring.registers.change(NAME, becomes(b"one"))
        runs = 0

        def two(_value: Value | None) -> Change:
            nonlocal runs
            runs += 1
            return Change(b"two")

        async def settled() -> None:
            value = await ring.rival.settle(NAME)
            assert value is not None
            assert value.body == b"one"

        await ring.registers.change(NAME, two, ready=settled())
        assert runs > 1
        assert await self.body(ring) == b"two"

    async def test_a_change_regardless_of_the_value_is_for_objects_alone(self, ring: RingPorts) -> None:
        await ring.registers.change(NAME, becomes(b"one"), regardless=True)
        await ring.registers.change(NAME, becomes(b"two"), regardless=True)
        assert await self.body(ring) == b"two"
        with pytest.raises(ValueError):
            await ring.registers.change(name_of(b"key", table=Table.UPLOAD), becomes(b"one"), regardless=True)

    async def test_a_change_and_a_read_without_a_task_answer_as_those_with_one(self, ring: RingPorts) -> None:
        told: asyncio.Queue[object] = asyncio.Queue()
        if not ring.registers.try_change(NAME, becomes(b"one"), told.put_nowait):
            await told.put(await ring.registers.change(NAME, becomes(b"one")))
        outcome = await told.get()
        assert isinstance(outcome, Outcome)
        assert outcome.after is not None
        assert outcome.after.body == b"one"
        ring.registers.try_read(NAME, False, told.put_nowait)
        assert await told.get() in (await ring.registers.read(NAME), None)
        if ring.registers.try_change(NAME, refuses, told.put_nowait):
            assert isinstance(await told.get(), PreconditionFailed)
        assert told.empty()

    async def test_every_replica_says_what_it_holds(self, ring: RingPorts) -> None:
        after = (await ring.registers.change(NAME, becomes(b"one"))).after
        await ring.registers.settle(NAME)
        states = await ring.registers.agreement(NAME)
        assert len({state.disk for state in states}) == 3
        assert {state.state for state in states} == {"current"}
        assert await ring.registers.held_by_quorum(NAME, lambda value: value.body == b"one") == after
        assert await ring.registers.held_by_quorum(NAME, lambda value: value.body == b"two") is None
        assert await ring.registers.held_by_quorum(name_of(b"other"), lambda value: True) is None
        assert not await ring.registers.outdated(NAME, lambda value: value.body == b"one")
        assert await ring.registers.outdated(NAME, lambda value: value.body == b"two")

    # --- pages --------------------------------------------------------------------------------------------------------

    async def test_a_page_is_found_under_the_name_that_it_was_given(self, ring: RingPorts) -> None:
        body = b"manifest" * 100
        name = await ring.pages.put_page(NAME, body)
        assert name == page_hash(body)
        assert await ring.pages.put_page(NAME, body, name) == name
        assert await ring.pages.get_page(NAME, name) == body
        with pytest.raises(DataDamaged):
            await ring.pages.get_page(NAME, page_hash(b"another"))

    # --- fences -------------------------------------------------------------------------------------------------------

    async def test_a_fence_refuses_changes_of_its_scope_until_it_is_lifted_with_its_nonce(
        self, ring: RingPorts
    ) -> None:
        other = name_of(b"key", scope=OTHER_SCOPE)
        await ring.registers.change(NAME, becomes(b"one"))
        await ring.fences.fence(SCOPE, SHARDS, b"nonce 2")
        for name in (NAME, name_of(b"new", shard=3)):
            with pytest.raises(NoSuchBucket):
                await ring.registers.change(name, becomes(b"two"))
        await ring.registers.change(other, becomes(b"two"))
        assert await self.body(ring) == b"one"
        with pytest.raises(ServiceUnavailable):
            await ring.fences.unfence(SCOPE, SHARDS, b"nonce 1")
        with pytest.raises(NoSuchBucket):
            await ring.registers.change(NAME, becomes(b"two"))
        assert await ring.fences.unfence(SCOPE, SHARDS, b"nonce 2")
        await ring.registers.change(NAME, becomes(b"two"))
        assert await self.body(ring) == b"two"

    async def test_a_register_behind_a_fence_settles_with_the_nonce_alone(self, ring: RingPorts) -> None:
        await ring.registers.change(NAME, becomes(b"one"))
        await ring.fences.fence(SCOPE, SHARDS, b"nonce")
        with pytest.raises(NoSuchBucket) as refused:
            await ring.registers.settle(NAME)
        assert "final" not in refused.value.details
        value = await ring.registers.settle(NAME, settling_nonce=b"nonce")
        assert value is not None
        assert value.body == b"one"

    async def test_a_final_fence_stays_and_says_so(self, ring: RingPorts) -> None:
        await ring.fences.fence(SCOPE, SHARDS, b"nonce", final=True)
        with pytest.raises(ServiceUnavailable):
            await ring.fences.unfence(SCOPE, SHARDS, b"nonce")
        with pytest.raises(NoSuchBucket):
            await ring.registers.change(NAME, becomes(b"one"))
        with pytest.raises(NoSuchBucket) as refused:
            await ring.registers.settle(NAME)
        assert refused.value.details["final"] == "true"

    async def test_behind_a_fence_that_lends_only_changes_with_its_nonce_pass(self, ring: RingPorts) -> None:
        await ring.registers.change(NAME, becomes(b"one"))
        await ring.fences.fence(SCOPE, SHARDS, b"nonce")
        with pytest.raises(OutcomeUnknown):
            await ring.registers.change(NAME, becomes(b"two"), settling_nonce=b"nonce")
        assert await ring.fences.fence(SCOPE, SHARDS, b"nonce", lends=True)
        await ring.fences.fence(SCOPE, SHARDS, b"nonce")
        for nonce in (b"", b"other"):
            for work in (
                ring.registers.change(NAME, becomes(b"three"), settling_nonce=nonce),
                ring.registers.settle(NAME, settling_nonce=nonce),
            ):
                with pytest.raises(NoSuchBucket) as refused:
                    await work
                assert refused.value.details == {"lends": "true"}
        value = (await ring.registers.change(NAME, becomes(b"two"), settling_nonce=b"nonce")).after
        assert await ring.registers.settle(NAME, settling_nonce=b"nonce") == value
        assert await self.body(ring) == b"two"

    async def test_a_final_fence_lends_no_more_and_a_lifted_one_never_again(self, ring: RingPorts) -> None:
        await ring.fences.fence(SCOPE, SHARDS, b"nonce", lends=True)
        await ring.fences.unfence(SCOPE, SHARDS, b"nonce")
        await ring.registers.change(NAME, becomes(b"one"))
        await ring.fences.fence(SCOPE, SHARDS, b"nonce 2", lends=True)
        await ring.registers.change(NAME, becomes(b"two"), settling_nonce=b"nonce 2")
        await ring.fences.fence(SCOPE, SHARDS, b"nonce 2", final=True)
        with pytest.raises(OutcomeUnknown):
            await ring.registers.change(NAME, becomes(b"three"), settling_nonce=b"nonce 2")
        with pytest.raises(NoSuchBucket) as refused:
            await ring.registers.settle(NAME)
        assert refused.value.details == {"final": "true"}

    # --- the scanner --------------------------------------------------------------------------------------------------

    async def test_an_empty_scope_is_an_empty_last_page(self, ring: RingPorts) -> None:
        assert await self.page(ring) == ListPage()

    async def test_a_page_has_the_live_rows_of_its_shards_in_the_order_of_their_keys(self, ring: RingPorts) -> None:
        await self.fill(ring, b"c", b"a", b"b", b"d")
        await self.fill(ring, b"hidden", visibility=Visibility.HIDDEN)
        await self.fill(ring, b"gone", visibility=Visibility.TOMBSTONE)
        await ring.registers.change(name_of(b"x", shard=9), becomes(b"of x"))
        await ring.registers.change(name_of(b"y", scope=OTHER_SCOPE), becomes(b"of y"))
        await ring.registers.change(name_of(b"z", table=Table.UPLOAD), becomes(b"of z"))
        page = await self.page(ring)
        assert [(row.key, row.value.body) for row in page.rows] == [
            (key, b"of " + key) for key in (b"a", b"b", b"c", b"d")
        ]
        assert (page.prefixes, page.next_after) == ((), None)
        assert [row.key for row in (await self.page(ring, hidden=True)).rows] == [b"a", b"b", b"c", b"d", b"hidden"]

    @pytest.mark.parametrize("delimiter", [b"", b"/", b"//"])
    @pytest.mark.parametrize("prefix", [b"", b"a", b"a/", b"b/c"])
    @pytest.mark.parametrize("limit", [1, 2, 3, 100])
    async def test_pages_one_after_the_other_have_everything_once(
        self, ring: RingPorts, limit: int, prefix: bytes, delimiter: bytes
    ) -> None:
        keys = [b"a", b"a/1", b"a/2", b"a//3", b"a/b/4", b"b", b"b/c/5", b"b/c/6", b"b/c7", b"c//8", b"c//9", b"d"]
        await self.fill(ring, *keys)
        wanted: list[bytes] = []
        for key in keys:
            if key.startswith(prefix):
                cut = key.find(delimiter, len(prefix)) if delimiter else -1
                entry = key[: cut + len(delimiter)] if cut >= 0 else key
                wanted += [entry] if entry not in wanted else []
        found: list[bytes] = []
        after: bytes | None = b""
        while after is not None:
            page = await self.page(ring, prefix=prefix, delimiter=delimiter, limit=limit, after=after)
            entries = sorted([*(row.key for row in page.rows), *page.prefixes])
            assert len(entries) <= limit
            assert all(entry.endswith(delimiter) for entry in page.prefixes)
            found += entries
            after = page.next_after
        assert found == sorted(wanted)

    async def test_a_page_begins_after_a_key_or_inside_a_common_prefix(self, ring: RingPorts) -> None:
        await self.fill(ring, b"a", b"b/1", b"b/2", b"b/3", b"c")
        page = await self.page(ring, after=b"b/1", delimiter=b"/")
        assert [row.key for row in page.rows] == [b"c"]
        assert page.prefixes == (b"b/",)
        assert [row.key for row in (await self.page(ring, after=b"b/1")).rows] == [b"b/2", b"b/3", b"c"]
        assert [row.key for row in (await self.page(ring, after=b"b/3", delimiter=b"/")).rows] == [b"c"]
        assert (await self.page(ring, after=b"c")) == ListPage()

    async def test_no_entries_asked_for_is_an_empty_last_page(self, ring: RingPorts) -> None:
        await self.fill(ring, b"a")
        assert await self.page(ring, limit=0) == ListPage()

    async def test_heads_are_of_the_rows_that_a_page_has(self, ring: RingPorts) -> None:
        await self.fill(ring, b"a", b"b/1", b"b/2", b"c")
        for bounds in ({}, {"delimiter": b"/"}, {"prefix": b"b/"}, {"after": b"a", "limit": 1}):
            page = await ring.scanner.list_page(PageQuery(Table.OBJECT, SCOPE, SHARDS, **bounds))  # type: ignore[arg-type]
            heads = await ring.scanner.list_heads(PageQuery(Table.OBJECT, SCOPE, SHARDS, **bounds))  # type: ignore[arg-type]
            assert list(heads.keys) == [row.key for row in page.rows]
            assert [bytes(head) for head in heads.heads] == [head_of(row.value.body) for row in page.rows]
            assert (tuple(heads.prefixes), heads.next_after) == (page.prefixes, page.next_after)

    async def test_what_was_listed_shows_what_was_changed_since(self, ring: RingPorts) -> None:
        await self.fill(ring, b"a", b"b", b"c")
        await ring.scanner.list_heads(PageQuery(Table.OBJECT, SCOPE, SHARDS))
        await ring.registers.change(name_of(b"b", shard=1), becomes(b"", Visibility.TOMBSTONE))
        assert list((await ring.scanner.list_heads(PageQuery(Table.OBJECT, SCOPE, SHARDS))).keys) == [b"a", b"c"]
        ring.scanner.forget(SCOPE)
        assert list((await ring.scanner.list_heads(PageQuery(Table.OBJECT, SCOPE, SHARDS))).keys) == [b"a", b"c"]

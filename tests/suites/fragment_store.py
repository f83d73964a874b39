"""What every body of the FragmentStore port must do. A body's test module subclasses the suite and gives a ``store``
fixture.
"""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable

import msgspec
import pytest

from storaged.errors import FragmentDamaged, FragmentMissing, PeerRefused
from storaged.fragments.ports import RETIREMENTS_MAX, FragmentId, FragmentStore, Health, Retirement
from storaged.hashes import transfer_checksum
from tests.worlds.fragments import Made, make

Damage = Callable[[Made, int], Awaitable[None]]
"""Damages a cell of a fragment that the store holds, where it lies."""


class FragmentStoreSuite:
    rng = random.Random(7)

    async def put(self, store: FragmentStore, length: int = 4112, **named: object) -> Made:
        made = make(self.rng, length, **named)  # type: ignore[arg-type]
        await store.write(made.header, [made.payload], sync=True)
        return made

    async def test_what_was_written_is_read_back_cell_by_cell(self, store: FragmentStore) -> None:
        for length in (1, 4096, 4097, 70_000, 300_001):
            made = await self.put(store, length)
            found = await store.read(made.id, 0, 1000)
            assert found.header == made.header
            assert [bytes(cell) for cell in found.cells if cell is not None] == made.cells

    async def test_a_range_of_cells_ends_with_the_fragment(self, store: FragmentStore) -> None:
        made = await self.put(store, 5 * 4096 + 10)
        found = await store.read(made.id, 4, 10)
        assert [bytes(cell) for cell in found.cells if cell is not None] == made.cells[4:]
        assert (await store.read(made.id, 6, 1)).cells == ()
        assert (await store.read(made.id, 0, 0)).cells == ()

    async def test_an_empty_fragment_is_a_fragment(self, store: FragmentStore) -> None:
        made = await self.put(store, 0)
        assert (await store.read(made.id, 0, 1)).cells == ()
        assert (await store.stat([made.id]))[0].health == Health.OK

    async def test_a_payload_may_come_in_pieces_that_are_no_cells(self, store: FragmentStore) -> None:
        made = make(self.rng, 20_000)
        pieces = [made.payload[:1], bytearray(made.payload[1:5000]), b"", memoryview(made.payload)[5000:]]
        await store.write(made.header, pieces)
        await store.sync([made.id])
        assert b"".join(cell for cell in (await store.read(made.id, 0, 99)).cells if cell is not None) == made.payload

    async def test_the_callers_buffers_may_be_reused_once_a_write_returned(self, store: FragmentStore) -> None:
        made = make(self.rng, 9000)
        buffer = bytearray(made.payload)
        await store.write(made.header, [buffer])
        buffer[:] = bytes(len(buffer))
        assert b"".join(cell for cell in (await store.read(made.id, 0, 99)).cells if cell is not None) == made.payload

    async def test_a_missing_fragment_is_said_to_be_missing(self, store: FragmentStore) -> None:
        absent = make(self.rng).id
        with pytest.raises(FragmentMissing):
            await store.read(absent, 0, 1)
        with pytest.raises(FragmentMissing):
            await store.sync([absent])
        assert [stat.health for stat in await store.stat([absent])] == [Health.MISSING]
        assert (await store.verify(absent)).health == Health.MISSING
        assert await store.delete([absent]) == 0

    async def test_stat_answers_in_the_order_of_the_question(self, store: FragmentStore) -> None:
        first, second, absent = await self.put(store, 10), await self.put(store, 20), make(self.rng)
        stats = await store.stat([second.id, absent.id, first.id])
        assert [stat.length for stat in stats] == [20, 0, 10]
        assert [stat.id for stat in stats] == [second.id.pack(), absent.id.pack(), first.id.pack()]

    async def test_headers_come_in_the_order_of_the_question_and_are_durable_then(self, store: FragmentStore) -> None:
        first, second, absent = make(self.rng, 10), make(self.rng, 20), make(self.rng)
        for made in (first, second):
            await store.write(made.header, [made.payload])
        assert await store.headers([second.id, absent.id, first.id]) == [second.header, None, first.header]
        await store.sync([first.id, second.id])
        assert await store.headers([]) == []

    async def test_a_fragment_that_is_known_to_be_damaged_has_no_header(
        self, store: FragmentStore, damage: Damage
    ) -> None:
        made = await self.put(store, 3 * 4096)
        await damage(made, 1)
        await store.verify(made.id)
        assert await store.headers([made.id]) == [None]

    async def test_a_payload_that_is_not_what_its_header_says_is_refused(self, store: FragmentStore) -> None:
        await self.put(store, 10)  # there is room for more after it
        made = make(self.rng)
        with pytest.raises(PeerRefused) as short:
            await store.write(made.header, [made.payload[:-1]])
        assert short.value.remote_code == "BAD_FRAGMENT"
        with pytest.raises(FragmentDamaged):
            await store.write(made.header, [bytes(len(made.payload))], sync=True)
        with pytest.raises(PeerRefused):
            await store.write(msgspec.structs.replace(made.header, cell_bytes=0), [made.payload])
        for created_ms in (-1, 2**64 - 1):
            with pytest.raises(PeerRefused):
                await store.write(
                    msgspec.structs.replace(made.header, created_ms=created_ms), [made.payload], sync=True
                )
        assert [stat.health for stat in await store.stat([made.id])] == [Health.MISSING]

    async def test_what_does_not_come_as_its_gateway_sent_it_is_refused(self, store: FragmentStore) -> None:
        made = make(self.rng)
        changed = made.payload[:-1] + bytes([made.payload[-1] ^ 1])
        for payload, check in (
            (changed, transfer_checksum([made.payload])),
            (made.payload, transfer_checksum([changed])),
            (made.payload, b"x"),
        ):
            with pytest.raises(FragmentDamaged):
                await store.write(made.header, [payload], sync=True, check=check)
        await store.write(made.header, [made.payload], sync=True, check=transfer_checksum([made.payload]))
        assert [stat.health for stat in await store.stat([made.id])] == [Health.OK]

    @pytest.mark.parametrize("time_ms", [-1, 2**64 - 1])
    async def test_a_touch_or_a_retirement_at_a_time_that_no_store_can_hold_is_refused(
        self, store: FragmentStore, time_ms: int
    ) -> None:
        made = await self.put(store)
        before = await store.stat([made.id])
        with pytest.raises(PeerRefused):
            await store.touch([made.id], time_ms)
        with pytest.raises(PeerRefused):
            await store.retire([Retirement(made.id.data_id, b"owner", time_ms)])
        assert await store.stat([made.id]) == before
        assert await store.retired(2**63, 10) == []

    async def test_the_newer_record_of_an_id_wins(self, store: FragmentStore) -> None:
        old = await self.put(store, 5000)
        new = make(self.rng, 6000, fragment=old.id)
        await store.write(new.header, [new.payload], sync=True)
        assert b"".join(cell for cell in (await store.read(old.id, 0, 99)).cells if cell is not None) == new.payload
        assert (await store.usage()).fragments == 1

    async def test_what_was_deleted_is_missing(self, store: FragmentStore) -> None:
        made, other = await self.put(store), await self.put(store)
        assert await store.delete([made.id, made.id]) == 1
        with pytest.raises(FragmentMissing):
            await store.read(made.id, 0, 1)
        assert (await store.read(other.id, 0, 1)).cells[0] == other.cells[0]
        await store.write(made.header, [made.payload], sync=True)
        assert (await store.read(made.id, 0, 1)).cells[0] == made.cells[0]

    async def test_touch_renews_the_age_and_never_sets_it_back(self, store: FragmentStore) -> None:
        made, absent = await self.put(store, created_ms=1000), make(self.rng)
        stats = await store.touch([made.id, absent.id], 5000)
        assert [(stat.health, stat.created_ms) for stat in stats] == [(Health.OK, 5000), (Health.MISSING, 0)]
        await store.touch([made.id], 4000)  # by a slow clock: the age moves all the same, for a deletion goes by it
        assert (await store.stat([made.id]))[0].created_ms == 5001
        assert (await store.read(made.id, 0, 1)).header == msgspec.structs.replace(made.header, created_ms=5001)

    async def test_a_deletion_that_names_ages_spares_what_was_touched_or_written_since(
        self, store: FragmentStore
    ) -> None:
        made = [await self.put(store, created_ms=1000) for _ in range(3)]
        seen = [stat.created_ms for stat in await store.stat([one.id for one in made])]
        await store.touch([made[0].id], 1000)
        await store.write(msgspec.structs.replace(made[1].header, created_ms=1700), [made[1].payload], sync=True)
        assert await store.delete([one.id for one in made], created_ms=seen) == 1
        assert [stat.health for stat in await store.stat([one.id for one in made])] == [
            Health.OK,
            Health.OK,
            Health.MISSING,
        ]

    async def test_garbage_is_listed_when_it_is_due_the_longest_due_first(self, store: FragmentStore) -> None:
        await store.retire([Retirement(b"b" * 16, b"owner-b", 200)])
        await store.retire([Retirement(b"a" * 16, b"owner-a", 300)])
        await store.retire([Retirement(b"c" * 16, b"owner-c", 100)])
        await store.retire([Retirement(b"c" * 16, b"owner-c", 999)])  # its delay began with the first
        assert await store.retired(250, 10) == [(b"c" * 16, b"owner-c"), (b"b" * 16, b"owner-b")]
        assert await store.retired(1000, 1) == [(b"c" * 16, b"owner-c")]
        await store.unretire(b"c" * 16)
        await store.unretire(b"z" * 16)
        assert await store.retired(1000, 10) == [(b"b" * 16, b"owner-b"), (b"a" * 16, b"owner-a")]

    async def test_many_go_on_the_garbage_list_at_once_each_with_its_own_delay(self, store: FragmentStore) -> None:
        await store.retire([])
        await store.retire([Retirement(b"a" * 16, b"owner-a", 300)])
        entries = [Retirement(n.to_bytes(16, "big"), b"owner", 400 + n) for n in range(RETIREMENTS_MAX - 2)]
        await store.retire([Retirement(b"a" * 16, b"other", 1), Retirement(b"b" * 16, b"owner-b", 200), *entries])
        assert await store.retired(399, 10) == [(b"b" * 16, b"owner-b"), (b"a" * 16, b"owner-a")]
        assert await store.retired(5000, 5000) == [
            (b"b" * 16, b"owner-b"),
            (b"a" * 16, b"owner-a"),
            *((one.data_id, one.owner) for one in entries),
        ]

    async def test_deleting_the_last_fragment_of_a_data_id_ends_its_garbage_entry(self, store: FragmentStore) -> None:
        first = await self.put(store, block=0)
        second = await self.put(store, data_id=first.id.data_id, block=1)
        await store.retire([Retirement(first.id.data_id, b"owner", 0)])
        await store.delete([first.id])
        assert await store.retired(1, 10) == [(first.id.data_id, b"owner")]
        await store.delete([second.id])
        assert await store.retired(1, 10) == []

    async def test_scan_goes_through_all_fragments_in_order(self, store: FragmentStore) -> None:
        made = sorted([await self.put(store, 100 + i) for i in range(25)], key=lambda one: one.id.pack())
        await store.delete([made[3].id])
        del made[3]
        assert [header async for header in store.scan()] == [one.header for one in made]
        page = [header async for header in store.scan(made[9].id.pack(), 5)]
        assert page == [one.header for one in made[10:15]]
        assert [header async for header in store.scan(b"\xff" * 23)] == []

    async def test_a_damaged_cell_is_not_served_and_stays_damaged_until_replaced(
        self, store: FragmentStore, damage: Damage
    ) -> None:
        made = await self.put(store, 5 * 4096)
        await damage(made, 2)
        found = await store.read(made.id, 0, 5)
        assert [None if cell is None else bytes(cell) for cell in found.cells] == [
            *made.cells[:2],
            None,
            *made.cells[3:],
        ]
        assert (await store.stat([made.id]))[0].health == Health.DAMAGED
        assert (await store.verify(made.id)).health == Health.DAMAGED
        await store.write(made.header, [made.payload], sync=True)
        assert (await store.verify(made.id)).health == Health.OK
        assert (await store.read(made.id, 2, 1)).cells[0] == made.cells[2]

    async def test_verify_finds_damage_that_nobody_has_read(self, store: FragmentStore, damage: Damage) -> None:
        made, sound = await self.put(store, 3 * 4096), await self.put(store, 3 * 4096)
        await damage(made, 1)
        assert (await store.stat([made.id]))[0].health == Health.OK
        assert (await store.verify(made.id)).health == Health.DAMAGED
        assert (await store.verify(sound.id)).health == Health.OK

    async def test_usage_counts_fragments(self, store: FragmentStore) -> None:
        before = (await store.usage()).fragments
        made = [await self.put(store) for _ in range(3)]
        await store.delete([made[0].id])
        usage = await store.usage()
        assert (usage.state, usage.fragments) == ("ok", before + 2)
        assert usage.bytes_used >= 2 * 4112

    async def test_every_id_is_its_own_fragment(self, store: FragmentStore) -> None:
        base = make(self.rng).id
        ids = [
            base,
            base._replace(block=1),
            base._replace(position=1),
            base._replace(k=2),
            base._replace(m=1),
            base._replace(k=1, m=2),
        ]
        made = [make(self.rng, 64, fragment=FragmentId(*one)) for one in ids]
        for one in made:
            await store.write(one.header, [one.payload])
        await store.sync([one.id for one in made])
        for one in made:
            assert (await store.read(one.id, 0, 1)).cells[0] == one.payload

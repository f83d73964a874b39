"""What every body of the NearStore port must do besides: what the collector of its disk asks for."""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable

import pytest

from storaged.errors import FragmentMissing
from storaged.fragments.ports import OF_UPLOAD, REPLACED, Health, NearStore, Retirement
from tests.worlds.fragments import Made, make

UPLOAD = OF_UPLOAD + bytes(16)


class NearStoreSuite:
    rng = random.Random(8)

    async def put_near(self, near: NearStore, **named: object) -> Made:
        made = make(self.rng, **named)  # type: ignore[arg-type]
        await near.write(made.header, [made.payload], sync=True)
        return made

    async def test_what_is_condemned_is_deleted_once(self, near: NearStore) -> None:
        made, other = await self.put_near(near), await self.put_near(near)
        await near.retire([Retirement(made.id.data_id, b"owner", 0)])
        assert await near.delete_condemned([made.id]) == 0
        near.condemn([made.id.data_id])
        assert await near.delete_condemned([made.id, other.id]) == 1
        assert [stat.health for stat in await near.stat([made.id, other.id])] == [Health.MISSING, Health.OK]
        assert await near.due(1, (0, b""), 9) == []
        again = await self.put_near(near, fragment=made.id)
        assert await near.delete_condemned([again.id]) == 0

    @pytest.mark.parametrize("pardon", ["write", "sync", "touch", "headers", "pardon"])
    async def test_whoever_still_wants_the_data_pardons_it(self, near: NearStore, pardon: str) -> None:
        made = await self.put_near(near)
        second = await self.put_near(near, data_id=made.id.data_id, block=1)
        calls: dict[str, Callable[[], Awaitable[object]]] = {
            "write": lambda: near.write(made.header, [made.payload]),
            "sync": lambda: near.sync([made.id]),
            "touch": lambda: near.touch([made.id], 5000),
            "headers": lambda: near.headers([made.id]),
        }
        near.condemn([made.id.data_id])
        if pardon == "pardon":
            near.pardon([made.id.data_id])
        else:
            await calls[pardon]()
        assert await near.delete_condemned([made.id, second.id]) == 0
        assert [stat.health for stat in await near.stat([made.id, second.id])] == [Health.OK, Health.OK]

    async def test_fragments_are_found_by_their_age_page_by_page(self, near: NearStore) -> None:
        made = sorted([await self.put_near(near) for _ in range(7)], key=lambda one: one.id.pack())
        await near.touch([made[1].id, made[5].id], 10**13)
        found, after, pages = [], b"", 0
        while True:
            page, after = await near.aged(after, 3, 10**13, 10**13 + 1)
            if not after:
                break
            found, pages = [*found, *page], pages + 1
        assert [header.id for header in found] == [made[1].id.pack(), made[5].id.pack()]
        assert {header.created_ms for header in found} == {10**13}
        assert pages == 3
        assert await near.aged(b"", 3, 10**13 + 1, 10**14) == ([], made[2].id.pack())

    async def test_the_log_is_gone_through_page_by_page_and_from_any_place_on(self, near: NearStore) -> None:
        made = {(one := await self.put_near(near)).id.pack(): one for _ in range(9)}
        gone = list(made)[3]
        await near.delete([made.pop(gone).id])
        found, after, places = [], b"", []
        while True:
            page, after = await near.in_log_order(after, 2)
            if not after:
                break
            assert len(page) <= 2
            found += [header for header, _ in page]
            places += [place for _, place in page]
        assert {header.id: header for header in found} == {key: one.header for key, one in made.items()}
        assert len(found) == len(made)
        for number, place in enumerate(places):
            rest, after = [], place
            while after:
                page, after = await near.in_log_order(after, 100)
                rest += [header.id for header, _ in page]
            assert rest == [header.id for header in found[number + 1 :]]
        page, _ = await near.in_log_order(b"a place of another version", 1000)
        assert not page or page[0][0].id in made

    async def test_who_only_looks_pardons_nothing(self, near: NearStore) -> None:
        made = await self.put_near(near)
        near.condemn([made.id.data_id])
        await near.stat([made.id])
        await near.read(made.id, 0, 1)
        assert [header async for header in near.scan()] == [made.header]
        assert await near.delete_condemned([made.id]) == 1

    async def test_who_comes_too_late_finds_that_the_data_is_gone(self, near: NearStore) -> None:
        made = await self.put_near(near)
        near.condemn([made.id.data_id])
        assert await near.delete_condemned([made.id]) == 1
        with pytest.raises(FragmentMissing):
            await near.sync([made.id])
        assert [stat.health for stat in await near.touch([made.id], 5000)] == [Health.MISSING]

    async def test_what_is_due_comes_page_by_page_with_its_origin(self, near: NearStore) -> None:
        entries = [Retirement(bytes([n]) * 16, b"owner", n // 2, (b"", REPLACED, UPLOAD)[n % 3]) for n in range(9)]
        await near.retire(entries)
        found, after = [], (0, b"")
        while page := await near.due(3, after, 3):
            found += page
            after = page[-1].due_ms, page[-1].data_id
        assert found == entries[:8]

    async def test_an_entry_learns_its_origin_and_keeps_its_delay(self, near: NearStore) -> None:
        data_id = b"d" * 16
        for entry in (
            Retirement(data_id, b"owner", 10),
            Retirement(data_id, b"another", 99, REPLACED),
            Retirement(data_id, b"owner", 99),
        ):
            await near.retire([entry])
            assert await near.due(10, (0, b""), 9) == [Retirement(data_id, b"owner", 10)]
        for origin in (REPLACED, UPLOAD, b""):
            await near.retire([Retirement(data_id, b"owner", 99, origin)])
            assert await near.due(10, (0, b""), 9) == [Retirement(data_id, b"owner", 10, REPLACED)]
        await near.unretire(data_id)
        assert await near.due(1000, (0, b""), 9) == []

    async def test_the_fragments_of_data_ids_are_found(self, near: NearStore) -> None:
        made = [await self.put_near(near, block=block, data_id=bytes([n]) * 16) for n in (1, 2) for block in (0, 1)]
        asked = [bytes([n]) * 16 for n in (2, 3, 1)]
        assert await near.fragments_of(asked) == [[made[2].id, made[3].id], [], [made[0].id, made[1].id]]

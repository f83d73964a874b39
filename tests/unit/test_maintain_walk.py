"""A walk over all rows leaves the event loop to others."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from storaged.maintain import walk
from storaged.maintain.walk import REST_S_MAX, ROWS_A_SLICE, Range, Walker
from storaged.meta.memory import MemoryMetaStore
from storaged.meta.names import RegisterName, Table, Value, Visibility
from storaged.meta.ports import Ballot, Slot, StoreBatch

SCOPE = b"s" * 16


@pytest.mark.parametrize(("took_s", "rested_s"), [(0.003, 0.003), (0.0, 0.0), (60.0, REST_S_MAX)])
async def test_a_walk_rests_as_long_as_each_slice_took_but_not_for_ever(
    monkeypatch: pytest.MonkeyPatch, took_s: float, rested_s: float
) -> None:
    store = MemoryMetaStore()
    names = [RegisterName(Table.OBJECT, SCOPE, 0, b"%05d" % number) for number in range(2 * ROWS_A_SLICE + 1)]
    value = Value(1, b"o" * 16, Visibility.LIVE, b"body")
    await store.commit(StoreBatch([Slot(name, Ballot(1, 1, "gw", b"incarnat"), value) for name in names]))
    now, rests = 0.0, list[float]()

    async def sleep(seconds: float) -> None:
        rests.append(seconds)

    monkeypatch.setattr(walk.asyncio, "sleep", sleep)
    context: Any = SimpleNamespace(clock=SimpleNamespace(monotonic=lambda: now), local_meta={"d": store})
    scanner: Any = None
    walked: list[RegisterName] = []
    async for rows in Walker(context, scanner).rows(Range("d", Table.OBJECT, SCOPE, 0)):
        assert len(rows) <= ROWS_A_SLICE
        walked += [name for name, _ in rows]
        now += took_s
    assert walked == names
    assert rests == [pytest.approx(rested_s)] * 3

"""A walk over all rows leaves the event loop to others."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from storaged.clock import SystemClock
from storaged.maintain import walk
from storaged.maintain.context import MaintainLimits
from storaged.maintain.manifest_gc import PageSweep
from storaged.maintain.scrub import Scrub
from storaged.maintain.walk import REST_S_MAX, ROWS_A_SLICE, Range, Walker
from storaged.meta.names import Ballot, RegisterName, Table, Value, Visibility
from storaged.meta.storage import readahead
from storaged.meta.storage.lmdb_store import LmdbMetaStore
from storaged.meta.store_ports import RowRange, Slot, StoreBatch
from tests.doubles.meta_store import MemoryMetaStore

SCOPE = b"s" * 16
WHERE = Range("d", Table.OBJECT, SCOPE, 0)
NO_SCANNER: Any = None
NO_RING: Any = SimpleNamespace(settle=None)


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
    clock = SimpleNamespace(monotonic=lambda: now)
    context: Any = SimpleNamespace(clock=clock, local_meta={"d": store}, registers=NO_RING)
    walked: list[RegisterName] = []
    async for rows in Walker(context, NO_SCANNER).rows(WHERE):
        assert len(rows) <= ROWS_A_SLICE
        walked += [name for name, _ in rows]
        now += took_s
    assert walked == names
    assert rests == [pytest.approx(rested_s)] * 3


async def by_walk(context: Any) -> None:
    async for _ in Walker(context, NO_SCANNER).rows(WHERE):
        pass


async def by_scrub(context: Any) -> None:
    await Scrub(context, lambda _name: None, lambda: None)._rows(WHERE.disk, context.local_meta[WHERE.disk])


async def by_sweep(context: Any) -> None:
    await PageSweep(context)._find_owners(context.local_meta[WHERE.disk], {b"a page": 0})


@pytest.mark.parametrize("go_through", [by_walk, by_scrub, by_sweep])
async def test_whoever_goes_through_all_rows_of_a_large_store_has_a_thread_read_them_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, go_through: Callable[[Any], Awaitable[None]]
) -> None:
    store = LmdbMetaStore(tmp_path, map_bytes=1 << 26)
    names = [RegisterName(*WHERE[1:], b"%05d" % number) for number in range(ROWS_A_SLICE + 1)]
    await store.commit(
        StoreBatch([Slot(name, Ballot(1, 1, "gw", b"incarnat"), Value(1, b"", Visibility.LIVE, b"")) for name in names])
    )
    await store.checkpoint()
    monkeypatch.setattr(readahead, "LARGE_BYTES", 0)
    read: list[tuple[str, bytes]] = []
    for what in ("read_ahead", "slice"):
        monkeypatch.setattr(store, what, noting(read, what, getattr(store, what)))
    context = SimpleNamespace(
        clock=SystemClock(), local_meta={WHERE.disk: store}, limits=MaintainLimits(), registers=NO_RING
    )
    await go_through(context)
    await store.close()
    places = (b"", names[ROWS_A_SLICE - 1].key, names[-1].key)
    assert read == [(what, after) for after in places for what in ("read_ahead", "slice")]


def noting(read: list[tuple[str, bytes]], what: str, real: Callable[..., Any]) -> Callable[..., Any]:
    def noted(wanted: RowRange, **options: Any) -> Any:
        read.append((what, wanted.after))
        return real(wanted, **options)

    return noted

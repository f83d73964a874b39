"""Going through all rows of a range of one disk, beside clients who have the same event loop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from functools import partial

from storaged.clock import Clock
from storaged.meta.ports import MetaStore, RowRange
from storaged.meta.storage.readahead import THREADS

ROWS_A_SLICE = 64
REST_S_MAX = 0.005
"""Whoever goes through many rows looks at so many, some 50 us each, and rests as long as that took: a node of one
process answers its clients meanwhile, and after
a start with a disk gone all rows are looked at. No longer than the work can have been: what a slice waits for other
nodes is a rest already."""


async def slices(
    clock: Clock, store: MetaStore, table: int, scope: bytes, shard: int
) -> AsyncIterator[list[tuple[bytes, bytes]]]:
    """Keys and rows as ``MetaStore.slice`` has them, none of them verified. Of a large store a thread reads them first.
    Raises RowDamaged, DiskUnusable.
    """
    after = b""
    while True:
        wanted = RowRange(table, scope, shard, after, b"", ROWS_A_SLICE)
        if store.large:
            read = partial(store.read_ahead, wanted, whole=True)
            await asyncio.get_running_loop().run_in_executor(THREADS, read)
        began = clock.monotonic()
        rows = store.slice(wanted)
        if not rows:
            return
        yield rows
        after = rows[-1][0]
        await asyncio.sleep(min(clock.monotonic() - began, REST_S_MAX))

"""Rounds of work over all buckets, for workers of which one gateway runs one at a time."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import structlog

from storaged.errors import StoragedError

TICK_S = 20.0
TICKS_A_DAY = 20
"""With short days a worker looks more often."""

log = structlog.get_logger("rounds")


async def run_rounds(
    name: str,
    day_ms: int,
    once: Callable[[], Awaitable[bool]],
    *,
    is_mine: Callable[[], bool],
    forget: Callable[[], None],
) -> None:
    """Runs for ever.

    ``once`` does one round, and returns whether there is work left that can be done now. ``is_mine`` says whether this
    gateway is the one that does it now; while it is not, ``forget`` drops what the worker knows. ``day_ms``: how long a
    day is. ``name``: for the log.
    """
    tick_s = min(TICK_S, day_ms / 1000 / TICKS_A_DAY)
    while True:
        more = False
        try:
            if is_mine():
                more = await once()
            else:
                forget()
        except (StoragedError, TimeoutError) as error:
            log.info("a worker goes on later", worker=name, reason=str(error))
        await asyncio.sleep(0 if more else tick_s)

"""Judges every few seconds, on a storage node, whether the disks that are left have room for the data of disks that are
away (``spare_room``). While they have not, repair does not begin to write that data anew, or pauses.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence

from storaged.maintain.context import MaintainContext
from storaged.maintain.health import BlockHealth
from storaged.maintain.spare_room import (
    ENOUGH,
    Counts,
    Shortage,
    free_for_spares,
    needed_bytes,
    shortage_of,
    takes_some,
)
from storaged.units import format_size

LOOK_S = 5.0


class SpareWatch:
    """``statuses()``: what each node has counted."""

    def __init__(self, context: MaintainContext, statuses: Callable[[], Awaitable[Sequence[Counts]]]) -> None:
        self._context = context
        self._statuses = statuses
        self._shortage = ENOUGH
        self._look_at = float("-inf")
        self.stuck = False
        """There was no room for anything at the last look."""

    @property
    def short(self) -> bool:
        """There was too little room at the last look."""
        return self._shortage.short_bytes > 0

    async def look(self, *, needed: bool) -> bool:
        """To be called again and again. ``needed``: repair waits no longer for some disk that is away, and this node
        has something to write anew. Returns whether there is more room than at the last look.
        """
        before = self.short, self.stuck
        now = self._context.clock.monotonic
        if not needed:
            self._shortage, self._look_at, self.stuck = ENOUGH, float("-inf"), False
        elif now() >= self._look_at:
            self._note(await self._judge())
            self._look_at = now() + LOOK_S  # from its end: a node that hangs may take longer than LOOK_S to ask
        return (self.short, self.stuck) < before

    async def _judge(self) -> Shortage:
        context = self._context
        layout, reports = context.layouts.current, context.reports()
        gone = frozenset(disk.id for disk in layout.disks if not context.liveness.disk_readable(disk.id))
        wanted = needed_bytes(layout, gone, reports, await self._statuses())
        free = free_for_spares(reports, context.liveness.disk_writable)
        found = await asyncio.to_thread(shortage_of, layout, gone, free, wanted)
        self.stuck = found.short_bytes > 0 and not await asyncio.to_thread(takes_some, layout, gone, free)
        return found

    def taking(self, size: int) -> frozenset[str]:
        """The disks that have room for so many bytes now; also those of which nothing was heard yet."""
        context = self._context
        free = free_for_spares(context.reports(), context.liveness.disk_writable)
        return frozenset(disk.id for disk in context.layouts.current.disks if free.get(disk.id, size) >= size)

    def for_all(self, blocks: Sequence[BlockHealth], k: int) -> frozenset[str]:
        """The disks that have room for a fragment of each of these blocks with ``k`` data fragments, or have one."""
        size = sum(block.place.shape.sealed_bytes // k for block in blocks)
        holders = (frozenset(block.place.disks[position] for position in block.present) for block in blocks)
        return self.taking(size) | frozenset.intersection(*holders)

    def _note(self, found: Shortage) -> None:
        if self.short != (found.short_bytes > 0):
            self._context.log(
                f"disks that are away are not replaced: of {format_size(found.needed_bytes)},"
                f" {format_size(found.short_bytes)} have no room"
                if found.short_bytes
                else "there is room again for what disks that are away had"
            )
        self._shortage = found

"""How fast this node collects garbage, and whether it does at all: the operator sets it (``cluster.move_settings``).

The garbage lists, the sweep of orphans and the sweep of pages share it. A pause stops them between two steps, while
nothing is condemned. It is safe at any time: data that is not deleted now is judged again later.
"""

from __future__ import annotations

import asyncio

from storaged.maintain.context import MaintainContext
from storaged.maintain.job import Pace


class CollectionPace:
    def __init__(self, context: MaintainContext) -> None:
        self._context = context
        self._pace = Pace(context.clock, 0)

    @property
    def paused(self) -> bool:
        return self._context.settings().collection_paused

    @property
    def per_s(self) -> int:
        """0: no bound."""
        return self._context.settings().collection_per_s

    async def spend(self, count: int) -> None:
        """Called before so many things are judged. Waits until the pace allows it and collection is not paused."""
        settings = self._context.settings()
        while settings.collection_paused:
            await asyncio.sleep(self._context.limits.poll_s)
            settings = self._context.settings()
        self._pace.bytes_per_s = settings.collection_per_s
        await self._pace.spend(count)

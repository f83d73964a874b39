"""Keeps garbage collection within the pace that the operator sets, or pauses it (``cluster.move_settings``).

The garbage lists, the sweep of orphans and the sweep of pages share it. They spend before they judge something, and
look at ``paused`` again before each deletion, so data that was judged before a pause stays. That is safe at any time:
data that is not deleted now is judged again later.

Theory of operation. Two sums grow: ``_spent`` with each item that is to be judged, and ``_allowed`` at the pace that is
set now. A caller waits until ``_allowed`` has reached the sum that it made of ``_spent``. It looks again at least
every ``poll_s``, so a new pace also counts for callers that wait already.
"""

from __future__ import annotations

import asyncio
from math import inf

from storaged.maintain.context import MaintainContext

BURST_S = 1.0
"""The allowance of this time may be saved up and spent at once."""
LEAST_S = 0.001
"""Shorter waits are skipped. They are not worth a turn of the event loop, and a wait that is too short for the clock to
show would never end."""


class CollectionPace:
    def __init__(self, context: MaintainContext) -> None:
        self._context = context
        self._spent = self._allowed = 0.0
        self._allowed_at = -inf

    @property
    def paused(self) -> bool:
        return self._context.settings().collection_paused

    @property
    def per_s(self) -> int:
        """0: no bound."""
        return self._context.settings().collection_per_s

    async def spend(self, count: int) -> None:
        """To be called before ``count`` items are judged. Waits for the pace, and while collection is paused; lets
        other tasks run in any case.
        """
        self._allow()  # before ``_spent`` grows: it limits how much of the time until now was saved up
        self._spent += count
        mine, wait_s = self._spent, 0.0
        while True:
            await asyncio.sleep(wait_s)
            left_s = self._left_s(mine)
            if not self.paused and left_s < LEAST_S:
                return
            wait_s = self._context.limits.poll_s if self.paused else min(left_s, self._context.limits.poll_s)

    def _left_s(self, mine: float) -> float:
        """Seconds until the pace allows the sum ``mine``."""
        self._allow()
        return max(0.0, mine - self._allowed) / self.per_s if self.per_s else 0.0

    def _allow(self) -> None:
        now, pace = self._context.clock.monotonic(), self.per_s
        if pace:
            self._allowed = min(self._allowed + (now - self._allowed_at) * pace, self._spent + BURST_S * pace)
        else:
            self._allowed = self._spent
        self._allowed_at = now

"""The replicas of the system partition, brought together by gateways: no storage node may write there
(``meta.authority``), so none can heal what lags.

A replica that missed a write is named by who made it (``hint``). When a disk of the partition comes back, at the
start, and every so often all rows are compared by digest, and what differs is settled on all replicas. Gateways that do
so at once do the same work twice, which is harmless; a pause drawn at random makes it rare.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable

import structlog

from storaged.cluster.layout import SYSTEM_PARTITION
from storaged.cluster.ports import Layouts, Liveness
from storaged.errors import StoragedError
from storaged.meta.listing.merge import RingScanner
from storaged.meta.names import SYSTEM_SCOPE, RegisterName, Table
from storaged.meta.ports import Registers

POLL_S = 1.0
WALK_EVERY_S = 300.0
"""Without any sign of trouble: for what a gateway that died did not tell of. Digests of some hundred rows."""
RETRY_S = 15.0
PAUSE_MAX_S = 2.0
HINTS_MAX = 10_000

log = structlog.get_logger("keeper")


class SystemKeeper:
    """``run`` is its task. ``walks``: False for a gateway's further processes, which only settle what their own writes
    missed."""

    def __init__(
        self,
        scanner: RingScanner,
        registers: Registers,
        layouts: Layouts,
        liveness: Liveness,
        *,
        walks: bool = True,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        self._scanner = scanner
        self._registers = registers
        self._layouts = layouts
        self._liveness = liveness
        self._walks = walks
        self._jitter = jitter
        self._hints: dict[RegisterName, None] = {}
        self._seen: frozenset[str] = frozenset()
        self._walked: frozenset[str] | None = None
        """Disks that were there when the last walk that succeeded began."""
        self._walk_at = float("-inf")
        self.settled = 0
        """Registers that were settled since the start, because replicas differed."""

    @property
    def current(self) -> bool:
        """Whether all replicas that can be read are known to be the same."""
        return not self._hints and self._walked is not None and self._readable() <= self._walked

    def _readable(self) -> frozenset[str]:
        return frozenset(filter(self._liveness.disk_readable, self._layouts.current.replicas_of(SYSTEM_PARTITION)))

    def hint(self, name: RegisterName) -> None:
        """A replica did not take a write of this register. Bounded: what does not fit, the next walk finds."""
        if len(self._hints) < HINTS_MAX:
            self._hints[name] = None

    async def run(self) -> None:
        """For ever. What fails (no majority, a replica away) is tried again."""
        while True:
            await self.once()
            await asyncio.sleep(POLL_S)

    async def once(self) -> None:
        """What is due now."""
        now = asyncio.get_running_loop().time()
        seen = self._readable()
        if self._walks and (seen - self._seen or now >= self._walk_at):
            self._seen = seen
            await asyncio.sleep(self._jitter() * PAUSE_MAX_S)
            whole = await self._walk()
            self._walked = seen if whole else None
            self._walk_at = now + (WALK_EVERY_S if whole else RETRY_S)
        self._seen &= seen
        if self._walked is not None:
            self._walked &= seen  # whoever goes away and comes back may have missed something
        for name in list(self._hints):
            try:
                await self._registers.settle(name)
                self.settled += 1
            except (StoragedError, TimeoutError):
                self._walked, self._walk_at = None, min(self._walk_at, now + RETRY_S)
            del self._hints[name]

    async def _walk(self) -> bool:
        """Whether all replicas answered, and are the same now."""
        try:
            found = await self._scanner.catch_up(Table.SYSTEM, SYSTEM_SCOPE, 0)
        except (StoragedError, TimeoutError) as error:
            log.info("the system partition is brought together later", reason=str(error))
            return False
        self.settled += found.settled
        if found.settled:
            log.info("replicas of the system partition differed", settled=found.settled, away=sorted(found.away))
        return not any(map(self._liveness.disk_readable, found.away))

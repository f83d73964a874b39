"""Brings the replicas of the system partition together, in gateways.

No storage node may write there (``meta.authority``), so none can repair a replica that lags. The writer reports a
replica that missed its write (``hint``). At the start, when a disk of the partition returns, and at intervals, all rows
are compared by digest, and rows that differ are settled on all replicas. Two gateways at once do the same work twice,
which is harmless; a random pause makes it rare.
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
"""The interval without any sign of trouble, for hints that were lost with a gateway. A walk compares digests of some
hundred rows.
"""
RETRY_S = 15.0
PAUSE_MAX_S = 2.0
HINTS_MAX = 10_000

log = structlog.get_logger("keeper")


class SystemKeeper:
    """``run`` is its task. ``walks`` is False in a gateway's further processes: they only settle what their own writes
    missed.
    """

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
        """The disks that were readable when the last successful walk began."""
        self._walk_at = float("-inf")
        self.settled = 0
        """How many registers were settled since the start, because replicas differed."""

    @property
    def current(self) -> bool:
        """Whether all readable replicas are known to be the same."""
        return not self._hints and self._walked is not None and self._readable() <= self._walked

    def _readable(self) -> frozenset[str]:
        return frozenset(filter(self._liveness.disk_readable, self._layouts.partition(SYSTEM_PARTITION).disks))

    def hint(self, name: RegisterName) -> None:
        """Notes that a replica missed a write of this register. The notes are bounded; the next walk finds the rest."""
        if len(self._hints) < HINTS_MAX:
            self._hints[name] = None

    async def run(self) -> None:
        """Runs for ever. It retries what fails (no majority, a replica away)."""
        while True:
            await self.once()
            await asyncio.sleep(POLL_S)

    async def once(self) -> None:
        """Does what is due now."""
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
            self._walked &= seen  # a replica that was away may have missed something
        for name in list(self._hints):
            try:
                await self._registers.settle(name)
                self.settled += 1
            except (StoragedError, TimeoutError):
                self._walked, self._walk_at = None, min(self._walk_at, now + RETRY_S)
            del self._hints[name]

    async def _walk(self) -> bool:
        """Compares all rows. Returns whether all replicas answered and are the same now."""
        try:
            found = await self._scanner.catch_up(Table.SYSTEM, SYSTEM_SCOPE, 0)
        except (StoragedError, TimeoutError) as error:
            log.info("the system partition is brought together later", reason=str(error))
            return False
        self.settled += found.settled
        if found.settled:
            log.info("replicas of the system partition differed", settled=found.settled, away=sorted(found.away))
        return not any(map(self._liveness.disk_readable, found.away))

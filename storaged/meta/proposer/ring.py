"""What all changes and reads of one client share."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from storaged.clock import Clock
from storaged.cluster.disks_seen import DisksSeen
from storaged.deadlines import Deadlines
from storaged.errors import StoragedError
from storaged.meta.consensus.change import Fragments, Shared
from storaged.meta.consensus.quorums import View
from storaged.meta.names import RegisterName, Value
from storaged.meta.proposer.contention import Contention
from storaged.meta.transport.calls import Fanout, TaskPool

REFRESH_S = 3.0
"""How long a request waits to learn where its partition is now."""
IN_VAIN_S = 0.5


class Refresher:
    """Learns where partitions are now: one reading of each at a time, and none for a while after one that has brought
    nothing. A replica that lies about steps must not have every request read the record.
    """

    def __init__(
        self,
        view: Callable[[RegisterName], View],
        refresh: Callable[[int], Awaitable[None]],
        pool: TaskPool,
        clock: Clock,
    ) -> None:
        """``refresh(partition)``: as ``client.RingHooks``."""
        self._view = view
        self._refresh = refresh
        self._pool = pool
        self._clock = clock
        self._reading: dict[int, asyncio.Task[None]] = {}
        self._in_vain: dict[int, float] = {}
        """When a reading brought nothing, by partition."""

    async def refresh(self, name: RegisterName, view: View, timeout_s: float) -> bool:
        """Whether the register has another view now than this one. Waits no longer than ``timeout_s``."""
        number, clock = name.partition, self._clock
        if self._is_newer(name, view):
            return True
        if clock.monotonic() < self._in_vain.get(number, float("-inf")) + IN_VAIN_S:
            return False
        reading = self._reading.get(number)
        if reading is None:
            reading = self._reading[number] = self._pool.start(self._read(number))
            reading.add_done_callback(lambda _done: self._reading.pop(number, None))
        await asyncio.wait((reading,), timeout=max(0.001, min(timeout_s, REFRESH_S)))
        newer = self._is_newer(name, view)
        if not newer:
            self._in_vain[number] = clock.monotonic()
        return newer

    def _is_newer(self, name: RegisterName, view: View) -> bool:
        try:
            return self._view(name) != view
        except StoragedError:  # it is newer, and not known yet
            return False

    async def _read(self, number: int) -> None:
        with contextlib.suppress(StoragedError, TimeoutError):
            await self._refresh(number)


@dataclass(frozen=True)
class Ring:
    """What all changes of one client share."""

    shared: Shared
    view: Callable[[RegisterName], View]
    refresher: Refresher
    clock: Clock
    jitter: Callable[[], float]
    pool: TaskPool
    unresponsive: DisksSeen
    fanout: Fanout
    deadlines: Deadlines
    contention: Contention
    call_timeout_s: float
    hedge_s: float
    carry: Callable[[View, RegisterName, Value, float], Awaitable[Fragments | None]]
    """``await carry(view, name, value, deadline)``: the small copy that the value names, from any replica that has it,
    for all of them; None when none gives it."""
    on_fenced: Callable[[bytes], None] = lambda scope: None
    """Gets the scope of a change that was refused by a fence."""
    on_missed: Callable[[RegisterName], None] = lambda name: None
    """Gets the register when a replica did not take a new value or a small copy that it should have: it lags, though a
    quorum may have confirmed the write. Settling rounds report copies alone: they are what follows for replicas that
    lag."""

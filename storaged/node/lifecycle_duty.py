"""What gateways do for the lifecycle of objects: one carries out the rules, each writes its notes."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable

import structlog

from storaged.cluster.agreed_time import AgreedTime, storage_clocks
from storaged.errors import StoragedError
from storaged.maintain.lifecycle import LifecycleWorker, keep_notes
from storaged.node.planes import NodePlanes
from storaged.node.unlock import LateKeys
from storaged.objects.code.lifecycle import DAY_MS
from storaged.objects.lifecycle.index import write_notes
from storaged.objects.plane import ObjectPlane
from storaged.objects.system.buckets import BucketService

CLOSE_S = 5.0

log = structlog.get_logger("lifecycle")


def agreed_time(node: NodePlanes) -> Callable[[], int | None]:
    """See ``ObjectPlane.agreed_ms``."""
    return AgreedTime(node.clock, lambda: storage_clocks(node.layouts.current, node.membership.status)).now_ms


class LifecycleDuty:
    """``keep_notes`` is a task of each process, ``run`` of a gateway's first one."""

    def __init__(
        self, keys: LateKeys, plane: ObjectPlane, buckets: BucketService, is_first: Callable[[], bool]
    ) -> None:
        self._keys = keys
        self._plane = plane
        self.worker = LifecycleWorker(plane, buckets, is_mine=is_first)

    async def run(self) -> None:
        """Runs for ever, once the keyring is open."""
        await self._keys.opened.wait()
        day_ms = self._plane.limits.lifecycle_day_ms
        if day_ms != DAY_MS:
            log.warning("a day of lifecycle rules is short: objects expire early", day_s=day_ms / 1000)
        await self.worker.run()

    async def keep_notes(self) -> None:
        """Runs for ever."""
        await keep_notes(self._plane)

    async def close(self) -> None:
        """Writes the notes. What is lost the next walk finds."""
        with contextlib.suppress(StoragedError, TimeoutError):
            async with asyncio.timeout(CLOSE_S):
                await write_notes(self._plane, self._plane.notes)

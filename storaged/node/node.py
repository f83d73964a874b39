"""One node: the planes of every node, and by role the gateway and the operator's reports over them."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Coroutine
from typing import TYPE_CHECKING, Any

import structlog

from storaged.admin.api import AdminServer
from storaged.clock import Clock
from storaged.cluster.identity import Identity
from storaged.config import Config
from storaged.errors import DiskUnusable, LayoutRefused, S3Error
from storaged.node.planes import NodePlanes
from storaged.node.reports import Reports
from storaged.node.system import exchange_layout

if TYPE_CHECKING:
    from storaged.node.gateway import Gateway
    from storaged.node.leader import Leader

LAYOUT_RETRY_S = 1.0
LAYOUT_EVERY_S = 60

log = structlog.get_logger("node")


class Node(NodePlanes):
    """A whole node. ``open`` builds and starts it, ``work`` returns its tasks, ``drain`` ends the front first."""

    gateway: Gateway | None
    reports: Reports

    def __init__(self, config: Config, own: Identity, clock: Clock, leader: Leader | None = None) -> None:
        """``leader``: the first process of a gateway, for a further worker of it."""
        super().__init__(config, own, clock, leader)
        self.gateway = None

    async def open(self, stack: contextlib.AsyncExitStack) -> None:
        """Raises as ``NodePlanes.open``; nothing stays open then."""
        await super().open(stack)
        if self.config.gateway:
            from storaged.node.gateway import Gateway  # a storage node imports neither the key plane nor S3

            self.gateway = Gateway(self)
            stack.push_async_callback(self.gateway.close)
            await self.gateway.open()
        if self.leader is not None:
            return
        self.reports = Reports(self, self.gateway)
        admin = AdminServer(self.reports.services(), self.metrics)
        stack.push_async_callback(admin.close)
        await admin.start(self.directory, self.config.admin.listen)

    def work(self) -> list[Coroutine[Any, Any, None]]:
        """The tasks that run until the node stops."""
        found = super().work()
        if self.gateway is not None:
            found.extend([*self.gateway.work(), self.keeper.run()])
            if self.leader is None:
                found.extend([self._keep_layout_register(), self.reports.watch()])
        return found

    async def drain(self) -> None:
        """Finishes requests in flight, for ``drain_s`` at most."""
        if self.gateway is not None:
            await self.gateway.drain()

    async def _keep_layout_register(self) -> None:
        """Keeps the layout in force in the register ``layout``, for nodes that reach the ring only."""
        while True:
            try:
                await exchange_layout(self.paths, self.layouts)
            except LayoutRefused as error:
                log.error("the register of the layout is not believed", reason=error.message)
            except (S3Error, DiskUnusable):
                # No majority, another change of the register that takes too long, or a full disk: the gateway goes on
                # with the layout that it has.
                await asyncio.sleep(LAYOUT_RETRY_S)
                continue
            exchanged = self.layouts.epoch
            for _ in range(LAYOUT_EVERY_S):
                await asyncio.sleep(1.0)
                if self.layouts.epoch != exchanged:
                    break

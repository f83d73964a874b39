"""Whether the system partition may go on without a majority of its seed disks: each node with a seed disk that is left
finds out for itself, before it accepts the layout that says so (``cluster.succession``: "Recovery").

The administrator says that the lost disks are powered off for ever. This node refuses as long as it sees that this is
not so: a lost disk answers, or the system partition still has a quorum. It can't see it when the network is cut between
it and disks that live: then the administrator's word is all that there is.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping

from storaged.cluster.layout import Layout
from storaged.cluster.ports import Layouts, Liveness
from storaged.errors import StoragedError
from storaged.meta.acceptor.replica import LocalReplica

READ_S = 2.0
"""How long the system partition has to show a quorum: less than a gateway waits for the acceptance."""


class SystemRecovery:
    """``may_recover`` is the check of ``accepting.LayoutAcceptor``. ``replicas``: of the disks of ``node``, this one.
    ``read(path)`` reads a system register with a quorum.
    """

    def __init__(
        self,
        layouts: Layouts,
        node: str,
        replicas: Mapping[str, LocalReplica],
        liveness: Liveness,
        read: Callable[[str], Awaitable[bytes | None]],
    ) -> None:
        self._layouts = layouts
        self._node = node
        self._replicas = replicas
        self._liveness = liveness
        self._read = read

    async def may_recover(self, layout: Layout) -> str:
        """Why the system partition may not be recovered by this layout; empty when it may."""
        current = self._layouts.current
        new = set(layout.lost) - set(current.lost)
        if answering := sorted(disk for disk in new if self._liveness.disk_readable(disk)):
            return f"disk {answering[0]}, which it calls lost, answers here"
        left = {*current.seeds, *current.seeds_next}.difference(layout.lost)
        for disk in sorted(disk for disk in left if current.node_of(disk) == self._node):
            replica = self._replicas.get(disk)
            if replica is None or replica.statistics().state != "ok":
                return f"its seed disk {disk} is not in use"
        if await self._has_quorum():
            return "the system partition still has a quorum of its seed disks"
        return ""

    async def _has_quorum(self) -> bool:
        try:
            async with asyncio.timeout(READ_S):
                await self._read("layout")
        except (StoragedError, TimeoutError):
            return False
        return True

"""When the system partition may settle on its new seed disk: each node with a seed disk finds out for itself.

Before it accepts the layout that ends the exchange, the node has its own disks refuse operations of the set that the
system partition had before, durably. Then it compares the rows of all seed disks. The acceptances come from a majority
of both sets; the last of these nodes compares when a majority refuses such operations. So nothing that was chosen can
be missing at a majority of the set that comes. Gateways settle rows that differ (``node.keeper``).

The disk that comes has to answer: else the exchange would end with a replica too few. Where it is out itself
(``cluster.sparing``) the exchange ends without it, so that the next one can replace it. That is as safe: a majority of
the set that comes has everything without it.
"""

from __future__ import annotations

from collections.abc import Mapping

from storaged.cluster.layout import SYSTEM_PARTITION, Layout
from storaged.cluster.ports import Layouts
from storaged.errors import ServiceUnavailable, StoragedError
from storaged.meta.acceptor.replica import LocalReplica
from storaged.meta.consensus.quorums import Quorum
from storaged.meta.listing.merge import RingScanner
from storaged.meta.messages import EpochFence
from storaged.meta.names import SYSTEM_SCOPE, RegisterName, Table


class SystemMove:
    """``may_settle`` is the check of ``accepting.LayoutAcceptor``. ``replicas``: of the disks of ``node``, this one."""

    def __init__(self, layouts: Layouts, node: str, replicas: Mapping[str, LocalReplica], scanner: RingScanner) -> None:
        self._layouts = layouts
        self._node = node
        self._replicas = replicas
        self._scanner = scanner

    async def may_settle(self, _layout: Layout) -> str:
        """Why it can't settle yet; empty when it can."""
        state = self._layouts.partition(SYSTEM_PARTITION)
        if not state.coming:
            return "the system partition does not move"
        voters = dict.fromkeys(disk for disks in state.voters for disk in disks)
        own = [disk for disk in voters if self._layouts.current.node_of(disk) == self._node]
        try:
            for disk in own:
                if (replica := self._replicas.get(disk)) is None:
                    return f"disk {disk} of {self._node} is not in use"
                await replica.fence_epoch(EpochFence(disk, state.epoch, SYSTEM_PARTITION))
            found = await self._scanner.catch_up(Table.SYSTEM, SYSTEM_SCOPE, 0, bring_up=_differs)
        except (StoragedError, TimeoutError) as error:
            return str(error)
        answered = [disk for disk in voters if disk not in found.away]
        if state.comes not in {*answered, *self._layouts.partitions.out.disks}:
            return f"disk {state.comes}, which comes, does not answer"
        if silent := [disk for disk in own if disk not in answered]:
            return f"disk {silent[0]} of {self._node} does not answer"
        if not Quorum(*state.voting).met(answered):
            return f"only {len(answered)} of {len(voters)} seed disks answer"
        return ""


async def _differs(name: RegisterName) -> None:
    raise ServiceUnavailable(f"the seed disks differ in {name.key.decode('utf-8', 'replace')[:80]!r}; gateways copy")

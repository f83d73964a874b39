"""The ring of the product, on replicas in memory, passes the suite of the ring."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from storaged.meta.acceptor.replica import LocalReplica
from storaged.meta.listing.merge import RingScanner
from storaged.meta.ports import Replica
from tests.doubles.disks import Disks
from tests.doubles.layouts import KnownLayouts, layout_of
from tests.doubles.meta_store import MemoryMetaStore
from tests.suites.ring import RingPorts, RingSuite
from tests.worlds.ring_client import ring_client


class _Replicas:
    def __init__(self, disks: Disks) -> None:
        self._replicas = {disk: LocalReplica(disk, MemoryMetaStore()) for disk in disks.disks}

    def replica(self, disk_id: str) -> Replica:
        return self._replicas[disk_id]


class TestReplicatedRing(RingSuite):
    @pytest.fixture
    async def ring(self) -> AsyncIterator[RingPorts]:
        layouts = KnownLayouts(layout_of())
        disks = Disks(layouts.current)
        replicas = _Replicas(disks)
        client, rival = (ring_client(layouts, replicas, node=node, jitter=lambda: 0.5) for node in ("gateway", "rival"))
        yield RingPorts(client, rival, client, client, RingScanner(layouts, replicas, client, disks))
        await client.close()
        await rival.close()

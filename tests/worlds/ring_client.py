"""A client of the ring for tests, from keywords, and replicas in memory for it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any

from storaged.clock import Clock, SystemClock
from storaged.cluster.ports import Layouts
from storaged.errors import PeerUnreachable
from storaged.meta.acceptor.replica import LocalReplica
from storaged.meta.client import RingClient, RingHooks, RingSettings
from storaged.meta.ports import Replica, Replicas
from tests.doubles.meta_store import MemoryMetaStore
from tests.sim.virtual import EPOCH_MS, OneThreadLoop, VirtualClock

_SETTINGS = frozenset(RingSettings.__dataclass_fields__)
_HOOKS = frozenset(RingHooks.__dataclass_fields__)


class MemoryReplicas:
    """``Replicas`` in memory, by disk. Those in ``away`` can't be reached."""

    def __init__(self, disks: Iterable[str]) -> None:
        self.stores: dict[str, MemoryMetaStore] = {}
        self.replicas: dict[str, Replica] = {}
        self.away: set[str] = set()
        for disk in disks:
            self.add(disk)

    def add(self, disk: str) -> None:
        """Blank; nothing is done where it is there."""
        if disk not in self.stores:
            self.stores[disk] = MemoryMetaStore()
            self.replicas[disk] = LocalReplica(disk, self.stores[disk])

    def replica(self, disk_id: str) -> Replica:
        if disk_id in self.away:
            raise PeerUnreachable(f"{disk_id} is away")
        return self.replicas[disk_id]


def clock_of(loop: asyncio.AbstractEventLoop) -> Clock:
    """The machine's; on virtual time both of its clocks move with the loop's."""
    if not isinstance(loop, OneThreadLoop):
        return SystemClock()
    return VirtualClock(loop, skew_ms=loop.began_ms - EPOCH_MS)


def ring_client(
    layouts: Layouts, replicas: Replicas, *, kind: type[RingClient] = RingClient, **options: Any
) -> RingClient:
    """``options``: the fields of RingSettings and RingHooks, and the other keywords of a client of this ``kind``."""
    options.setdefault("clock", clock_of(asyncio.get_running_loop()))
    settings = RingSettings(**{name: options.pop(name) for name in _SETTINGS & options.keys()})
    hooks = RingHooks(**{name: options.pop(name) for name in _HOOKS & options.keys()})
    return kind(layouts, replicas, settings, hooks, **options)

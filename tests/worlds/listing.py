"""Six disks in three racks with real stores and real scans, and registers that settle by taking the newest row of those
that can be read.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from storaged.cluster.layout import DiskEntry, Layout, NodeEntry
from storaged.errors import PeerUnreachable, ServiceUnavailable
from storaged.meta.listing.merge import RingScanner
from storaged.meta.listing.round import ScanSettings
from storaged.meta.messages import ScanReply, ScanRequest
from storaged.meta.names import Ballot, RegisterName, Table, Value, Visibility
from storaged.meta.ports import Reading
from storaged.meta.storage.scan import DigestCache, scan_store
from storaged.meta.store_ports import RowDamaged, Slot, StoreBatch
from tests.doubles.layouts import Places
from tests.doubles.meta_store import MemoryMetaStore

BUCKET = b"bucket of a test"


def layout_of_six() -> Layout:
    nodes = tuple(NodeEntry(f"n{index}", f"FR/site{index}/r", "", ("storage",)) for index in range(3))
    disks = tuple(DiskEntry(f"d{index}", f"n{index // 2}", 1) for index in range(6))
    return Layout("test", 7, nodes, disks, seeds=("d0", "d2", "d4"))


def value_of(counter: int, visibility: int = Visibility.LIVE) -> Value:
    return Value(counter, b"o" * 16, visibility, b"body %d" % counter)


class Ring(Places):
    """Layouts, Replicas, Registers and Liveness in one. ``scans`` and ``reads`` tell what the scanner asked, ``sent``
    how many heads it was sent.
    """

    def __init__(self, *, hedge_s: float = 0.01, **limits: Any) -> None:
        self.current = layout_of_six()
        self.stores = {disk.id: MemoryMetaStore() for disk in self.current.disks}
        self.digests = {disk.id: DigestCache() for disk in self.current.disks}
        self.down: set[str] = set()
        self.thought_down: set[str] = set()
        self.hung: set[str] = set()
        self.slow_s: dict[str, float] = {}
        self.verdicts: dict[str, int] = {}
        self.lies: dict[str, Callable[[ScanReply], ScanReply]] = {}
        self.scans: list[ScanRequest] = []
        self.sent = 0
        self.reads: list[RegisterName] = []
        self.settled: list[RegisterName] = []
        self.scanner = RingScanner(self, self, self, self, ScanSettings(hedge_s=hedge_s, **limits))  # type: ignore[arg-type]

    def at(self, epoch: int) -> Layout:
        assert epoch == self.current.epoch
        return self.current

    def replica(self, disk: str) -> Any:
        return _Disk(self, disk)

    def disk_readable(self, disk: str) -> bool:
        return disk not in self.thought_down

    disk_prompt = disk_readable

    def disk_writable(self, disk: str) -> bool:
        return self.disk_readable(disk)

    def replicas_of(self, name: RegisterName) -> tuple[str, ...]:
        return self.current.replicas_of(name.partition)

    def newest(self, name: RegisterName) -> Slot | None:
        found: list[Slot] = []
        answered = 0
        for disk in self.replicas_of(name):
            if disk in self.down:
                continue
            try:
                slot = self.stores[disk].get(name)
            except RowDamaged:
                continue  # counts for nothing
            answered += 1
            if slot is not None:
                found.append(slot)
        if answered < 2:
            raise ServiceUnavailable
        return max(found, key=lambda slot: slot.ballot, default=None)

    async def read(self, name: RegisterName, *, want_payload: bool = False, settling_nonce: bytes = b"") -> Reading:
        self.reads.append(name)
        await asyncio.sleep(0)
        return Reading(await self._repair(name))

    async def settle(self, name: RegisterName, *, settling_nonce: bytes = b"") -> Value | None:
        self.settled.append(name)
        return await self._repair(name)

    async def _repair(self, name: RegisterName) -> Value | None:
        slot = self.newest(name)
        if slot is None:
            return None
        for disk in self.replicas_of(name):
            if disk not in self.down:
                await self.put(disk, name, slot.value, slot.ballot.counter)
        return slot.value

    async def put(self, disk: str, name: RegisterName, value: Value, counter: int) -> None:
        await self.stores[disk].commit(StoreBatch(slots=[Slot(name, Ballot(7, counter, "g", b"incarnat"), value)]))

    async def put_everywhere(self, name: RegisterName, visibility: int = Visibility.LIVE, counter: int = 1) -> None:
        for disk in self.replicas_of(name):
            await self.put(disk, name, value_of(counter, visibility), counter)

    async def fill(self, keys: list[bytes], shards: int = 4, visibility: int = Visibility.LIVE) -> None:
        for index, key in enumerate(keys):
            await self.put_everywhere(RegisterName(Table.OBJECT, BUCKET, index % shards, key), visibility)


class _Disk:
    def __init__(self, ring: Ring, disk: str) -> None:
        self._ring = ring
        self._disk = disk

    async def scan(self, request: ScanRequest, *, timeout_s: float = 10.0) -> ScanReply:
        assert request.disk == self._disk
        assert request.epoch == self._ring.current.epoch
        self._ring.scans.append(request)
        if self._disk in self._ring.hung:
            await asyncio.Event().wait()
        await asyncio.sleep(self._ring.slow_s.get(self._disk, 0))
        if self._disk in self._ring.down:
            raise PeerUnreachable
        if self._disk in self._ring.verdicts:
            return ScanReply(verdict=self._ring.verdicts[self._disk])
        reply = scan_store(self._ring.stores[self._disk], request, self._ring.digests[self._disk])
        self._ring.sent += sum(len(piece.heads) for piece in reply.slices)
        return self._ring.lies.get(self._disk, _as_it_is)(reply)


def _as_it_is(reply: ScanReply) -> ScanReply:
    return reply

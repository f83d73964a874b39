"""Disks with faults: fragment stores that can be away, full, slow or hung, and what heartbeats say of them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from storaged.cluster.layout import Layout
from storaged.errors import DiskUnusable, FragmentDamaged, PeerError, PeerRefused, PeerUnreachable
from storaged.fragments.ports import CELLS_MAX, CellRead, FragmentHeader, FragmentId, FragmentStat, Retirement
from storaged.wire import Buffer
from tests.doubles.fragments import MemoryFragmentStore


class FaultyDisk(MemoryFragmentStore):
    """A store with faults: every call of the port meets them first.

    ``near``: it is a disk of this very node, so ``peek`` answers. ``trusting``: what the port would refuse is a mistake
    of the code under test, and fails the test.
    """

    def __init__(self, name: str = "disk", *, near: bool = False, trusting: bool = False) -> None:
        super().__init__()
        self.name = name
        self.near = near
        self.trusting = trusting
        self.down = False
        """Unreachable."""
        self.full = False
        """Refuses writes."""
        self.fail_sync = False
        self.hang: asyncio.Event | None = None
        """Every call waits for it."""
        self.slow_s = 0.0
        """How long every call takes."""
        self.scattered = False
        """Its cells do not lie one after the other in memory."""
        self.on_write: Callable[[int], None] | None = None
        """Called before each write with its number."""
        self.writes = self.syncs = self.reads = self.peeks = 0
        self._asking: set[asyncio.Task[None]] = set()
        self.retirements: list[list[Retirement]] = []
        """What each call of ``retire`` brought, also those that failed."""

    async def _enter(self) -> None:
        if self.hang is not None:
            await self.hang.wait()
        await asyncio.sleep(self.slow_s)
        if self.down:
            raise PeerUnreachable(f"{self.name} is down")

    async def write(
        self,
        header: FragmentHeader,
        payload: Sequence[Buffer],
        *,
        sync: bool = False,
        check: bytes = b"",
        spare_other: bool = False,
    ) -> None:
        self.writes += 1
        if self.on_write is not None:
            self.on_write(self.writes)
        await self._enter()
        if self.full:
            raise DiskUnusable(f"{self.name} is full", state="full")
        synced = sync and not self.fail_sync
        try:
            await super().write(header, payload, sync=synced, check=check, spare_other=spare_other)
        except (FragmentDamaged, PeerRefused) as error:
            if self.trusting:
                raise AssertionError(f"{self.name} was sent what is no fragment: {error}") from error
            raise
        if sync and not synced:
            raise DiskUnusable(f"{self.name}: fsync failed")

    async def sync(self, ids: Sequence[FragmentId]) -> None:
        self.syncs += 1
        await self._enter()
        if self.fail_sync:
            raise DiskUnusable(f"{self.name}: fsync failed")
        await super().sync(ids)

    async def read(self, fragment: FragmentId, first_cell: int, count: int) -> CellRead:
        self.reads += 1
        await self._enter()
        found = await super().read(fragment, first_cell, count)
        return found._replace(whole=None) if self.scattered else found

    def try_read(self, fragment: FragmentId, first_cell: int = 0, count: int = CELLS_MAX) -> CellRead | None:
        if not self.near:
            return None
        self.peeks += 1
        if self.hang is not None or self.slow_s:
            return None
        if self.down:
            raise DiskUnusable(f"{self.name} is not in use")
        found = self._cells(fragment, first_cell, count)
        return None if None in found.cells else found

    async def stat(self, ids: Sequence[FragmentId]) -> list[FragmentStat]:
        await self._enter()
        return await super().stat(ids)

    async def touch(self, ids: Sequence[FragmentId], now_ms: int) -> list[FragmentStat]:
        await self._enter()
        return await super().touch(ids, now_ms)

    async def retire(self, entries: Sequence[Retirement]) -> None:
        self.retirements.append(list(entries))
        await self._enter()
        await super().retire(entries)

    async def delete(self, ids: Sequence[FragmentId], *, created_ms: Sequence[int] = ()) -> int:
        await self._enter()
        return await super().delete(ids, created_ms=created_ms)

    def flip(self, fragment: FragmentId, cell: int, *, lie: bool = False) -> None:
        """Changes a bit in a cell; with ``lie`` its checksum holds all the same."""
        width = self.header(fragment).cell_bytes
        data = bytearray(self.payload(fragment))
        end = min((cell + 1) * width, len(data))
        data[(cell * width + end) // 2] ^= 0x40
        self.forge(fragment, bytes(data))
        if not lie:
            self.damage(fragment, cell)


class FarDisk(FaultyDisk):
    """A disk of another node, which can be asked and written without a task. ``connected``: False while it can't."""

    connected = True

    def try_ask_cells(
        self,
        fragment: FragmentId,
        first_cell: int,
        count: int,
        cell_bytes: int,
        on_found: Callable[[CellRead | PeerError | None], None],
    ) -> bool:
        if not self.connected:
            asyncio.get_running_loop().call_soon(on_found, None)
            return True

        async def run() -> None:
            try:
                found: CellRead | PeerError = await self.read(fragment, first_cell, count)
            except PeerError as error:
                found = error
            on_found(found)

        task = asyncio.create_task(run())
        self._asking.add(task)
        task.add_done_callback(self._asking.discard)
        return True

    def try_write(
        self,
        header: FragmentHeader,
        payload: Sequence[Buffer],
        on_done: Callable[[PeerError | None], None],
        *,
        sync: bool = False,
        check: bytes = b"",
    ) -> Callable[[], object] | None:
        """``ports.TryWrite``."""
        if not self.connected:
            return None

        async def run() -> None:
            error = None
            try:
                await self.write(header, payload, sync=sync, check=check)
            except PeerError as failed:
                error = failed
            on_done(error)

        task = asyncio.create_task(run())
        self._asking.add(task)
        task.add_done_callback(self._asking.discard)
        return task.cancel


class Disks:
    """``FragmentStores`` and ``Liveness`` of one layout. ``suspected``: disks that heartbeats call dead."""

    def __init__(self, layout: Layout, *, near: bool = False, far: bool = False) -> None:
        kind = FarDisk if far else FaultyDisk
        self.disks = {disk.id: kind(disk.id, near=near, trusting=True) for disk in layout.disks}
        self.suspected: set[str] = set()
        self.slow: set[str] = set()
        """Disks that are left out for being slow."""
        self.late: list[str] = []
        """What ``disk_late`` was called with."""
        self.known_full: frozenset[str] = frozenset()
        self.without_rows: frozenset[str] = frozenset()
        self.ample: frozenset[str] = frozenset()

    def store(self, disk_id: str) -> FaultyDisk:
        if disk_id not in self.disks:
            raise DiskUnusable(f"no layout names the disk {disk_id}")
        return self.disks[disk_id]

    def disk_writable(self, disk_id: str) -> bool:
        return disk_id not in self.suspected and not self.disks[disk_id].full

    def disks_full(self) -> frozenset[str]:
        return self.known_full

    def disk_takes_rows(self, disk_id: str, *, outside_reserve: bool = False) -> bool:
        return disk_id in self.ample if outside_reserve else disk_id not in self.without_rows

    def disk_readable(self, disk_id: str) -> bool:
        return disk_id not in self.suspected

    def disk_prompt(self, disk_id: str) -> bool:
        return self.disk_readable(disk_id) and disk_id not in self.slow

    def disk_late(self, disk_id: str, for_s: float) -> None:
        self.late.append(disk_id)

    def disk_answered(self, disk_id: str) -> None:
        pass

    def rack_down(self, rack: str, *, suspected: bool = True) -> None:
        """``rack``: the first letter of its disks' ids."""
        for name, disk in self.disks.items():
            if name.startswith(rack):
                disk.down = True
                if suspected:
                    self.suspected.add(name)

    def of(self, data_id: bytes) -> list[tuple[str, FragmentId]]:
        """(disk, fragment) of one data id, on all disks."""
        return sorted(
            (name, fragment)
            for name, disk in self.disks.items()
            for fragment in disk.fragments
            if fragment.data_id == data_id
        )

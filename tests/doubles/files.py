"""A disk in memory that loses what was not synced: ``Files`` for the fragment store's crash tests."""

from __future__ import annotations

import errno
import random
from collections.abc import Sequence
from dataclasses import dataclass, field

from storaged.fragments.files import Space
from storaged.units import GIB
from storaged.wire import Buffer

SECTOR = 512


class PowerCut(BaseException):
    """The machine stops here. Nothing may catch it."""


@dataclass
class _Disk:
    durable: bytearray = field(default_factory=bytearray)
    now: bytearray = field(default_factory=bytearray)
    written: list[tuple[int, bytes]] = field(default_factory=list)
    entry_durable: bool = False


class SimulatedFile:
    def __init__(self, files: SimulatedFiles, number: int) -> None:
        self._files = files
        self._number = number

    @property
    def _disk(self) -> _Disk:
        found = self._files.disks.get(self._number)
        if found is None:
            raise FileNotFoundError(errno.ENOENT, "removed")
        return found

    def size(self) -> int:
        return len(self._disk.now)

    def allocated(self) -> int:
        return len(self._disk.now)

    def read(self, offset: int, length: int) -> bytes:
        for number, first, last in self._files.unreadable:
            if number == self._number and offset < last and offset + length > first:
                raise OSError(self._files.media_error, "simulated bad sector")
        return bytes(self._disk.now[offset : offset + length])

    def try_read(self, offset: int, length: int) -> Buffer | None:
        return None

    def write(self, buffers: Sequence[Buffer], offset: int) -> None:
        data = b"".join(buffers)
        self._files.step("write")
        disk = self._disk
        room = self._files.free
        short = data[: max(0, room - max(0, len(disk.now) - offset))] if self._files.limit else data
        if len(disk.now) < offset + len(short):
            grown = offset + len(short) - len(disk.now)
            disk.now.extend(bytes(grown))
            self._files.used += grown
        disk.now[offset : offset + len(short)] = short
        disk.written.append((offset, short))
        if len(short) < len(data):
            raise OSError(errno.ENOSPC, "simulated full disk")

    def start_writeback(self, offset: int, length: int) -> None:
        return

    def sync(self) -> None:
        self._files.step("sync")
        if self._files.lying:
            return
        disk = self._disk
        disk.durable = bytearray(disk.now)
        disk.written.clear()
        self._files.step("synced")

    def sync_apart(self) -> None:
        self.sync()

    def drop_cache(self, offset: int, length: int = 0) -> None:
        return

    def truncate(self, size: int) -> None:
        self._files.step("truncate")
        disk = self._disk
        self._files.used -= max(0, len(disk.now) - size)
        del disk.now[size:]
        disk.written = [(at, data[: max(0, size - at)]) for at, data in disk.written if at < size]

    def punch(self, offset: int, length: int) -> bool:
        """A hole may reach the drive at once, whatever was synced: that is the worst it can do."""
        self._files.step("punch")
        disk = self._disk
        disk.now[offset : offset + length] = bytes(length)
        disk.durable[offset : offset + length] = bytes(len(disk.durable[offset : offset + length]))
        return True


class SimulatedFiles:
    """A disk in memory. ``cut_at`` counts down over its operations; at 0 the power fails, in the middle of one.

    ``crash`` then decides, sector by sector, which unsynced bytes reached the drive; directory entries that were not
    synced may be gone.
    """

    def __init__(self, seed: int = 0) -> None:
        self.rng = random.Random(seed)
        self.disks: dict[int, _Disk] = {}
        self.cut_at = -1
        self.fail: dict[str, int] = {}
        self.unreadable: list[tuple[int, int, int]] = []
        self.media_error = errno.EIO
        self.lying = False
        self.limit = 0
        self.used = 0
        self.reserved = 0
        self.failed = ""

    @property
    def free(self) -> int:
        return self.limit - self.used - self.reserved

    def step(self, kind: str) -> None:
        if self.cut_at == 0:
            raise PowerCut
        self.cut_at -= 1
        left = self.fail.get(kind)
        if left is not None:
            self.fail[kind] = left - 1
            if left <= 0:
                raise OSError(errno.EIO, f"simulated failure of {kind}")

    def crash(self) -> None:
        rng = self.rng
        self.cut_at = -1
        for number, disk in list(self.disks.items()):
            if not disk.entry_durable and rng.random() < 0.5:
                del self.disks[number]
                continue
            part = rng.choice([0.0, 0.5, 0.9, 1.0])
            for offset, data in disk.written:
                self._settle(disk, offset, data, part)
            disk.written.clear()
            disk.now = bytearray(disk.durable)
            disk.entry_durable = True

    def _settle(self, disk: _Disk, offset: int, data: bytes, part: float) -> None:
        at = 0
        while at < len(data):
            width = min(SECTOR - (offset + at) % SECTOR, len(data) - at)
            if self.rng.random() < part:
                end = offset + at + width
                if len(disk.durable) < end:
                    disk.durable.extend(bytes(end - len(disk.durable)))
                disk.durable[offset + at : end] = data[at : at + width]
            at += width

    # --- the port

    def segments(self) -> list[int]:
        return sorted(self.disks)

    def create(self, number: int) -> SimulatedFile:
        self.step("create")
        assert number not in self.disks
        self.disks[number] = _Disk()
        return self.open(number)

    def open(self, number: int) -> SimulatedFile:
        return SimulatedFile(self, number)

    def remove(self, number: int) -> None:
        self.step("remove")
        gone = self.disks.pop(number, None)
        self.used -= len(gone.now) if gone is not None else 0

    def sync_directory(self) -> None:
        self.step("sync_directory")
        for disk in self.disks.values():
            disk.entry_durable = True

    def space(self) -> Space:
        return Space(self.limit, self.free) if self.limit else Space(1024 * GIB, 1024 * GIB)

    def reserve(self, count: int) -> bool:
        if not count:
            had, self.reserved = self.reserved > 0, 0
            return had
        if self.limit and self.free + self.reserved < count:
            return False
        self.reserved = count
        return True

    def mark_failed(self, reason: str) -> bool:
        self.failed = reason
        return True

    def failure(self) -> str:
        return self.failed

    def close(self) -> None:
        return

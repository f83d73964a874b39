"""What the tests of the fragment plane share: fragments, a disk that can be cut, filled and broken, and a network of
one function call.
"""

from __future__ import annotations

import contextlib
import errno
import random
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from storaged.cluster.ports import Call, Methods, PeerIdentity, Reply
from storaged.fragments.files import Space
from storaged.fragments.ports import FragmentHeader, FragmentId
from storaged.hashes import HASH_BYTES, fragment_hash
from storaged.units import GIB
from storaged.wire import Buffer, Message, decode, encode

T = TypeVar("T", bound=Message)

DISK = "00112233445566aa"
SECTOR = 512


@contextlib.contextmanager
def in_memory(tmp_path: Path) -> Iterator[Path]:
    """A directory in memory where there is one: for indexes of simulated disks, whose own durability is not what is
    tested.
    """
    if not Path("/dev/shm").is_dir():
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir="/dev/shm") as name:
        yield Path(name)


@dataclass(frozen=True)
class Made:
    id: FragmentId
    header: FragmentHeader
    payload: bytes

    @property
    def cells(self) -> list[bytes]:
        width = self.header.cell_bytes
        return [self.payload[at : at + width] for at in range(0, len(self.payload), width)]


def make(
    rng: random.Random,
    length: int = 4112,
    *,
    cell_bytes: int = 4096,
    fragment: FragmentId | None = None,
    data_id: bytes | None = None,
    block: int = 0,
    k: int = 4,
    m: int = 2,
    position: int = 0,
    created_ms: int = 1000,
) -> Made:
    payload = rng.randbytes(length)
    found = fragment or FragmentId(data_id or rng.randbytes(16), block, k, m, position)
    own = fragment_hash((payload,))
    hashes = (
        (own,)
        if found.k == 1
        else tuple(own if i == found.position else rng.randbytes(HASH_BYTES) for i in range(found.k + found.m))
    )
    header = FragmentHeader(
        found.pack(), b"owner of " + found.data_id, rng.randbytes(64), hashes, cell_bytes, length, created_ms
    )
    return Made(found, header, payload)


def flip_on_disk(directory: Path, made: Made, cell: int) -> None:
    """Flips a bit in the middle of one cell, in the last record of it in the segments."""
    content = made.cells[cell]
    for path in sorted((directory / "segments").iterdir(), reverse=True):
        data = path.read_bytes()
        at = data.rfind(content)
        if at >= 0:
            with path.open("r+b") as file:
                file.seek(at + len(content) // 2)
                file.write(bytes([data[at + len(content) // 2] ^ 0x10]))
            return
    raise AssertionError("the cell is in no segment")


class Loopback:
    """A Caller whose network is a function call: everything is encoded and decoded on the way, as it would be."""

    def __init__(self, methods: Callable[[str], Methods], roles: tuple[str, ...] = ("gateway",)) -> None:
        self._methods = methods
        self._roles = roles

    async def call(
        self,
        node: str,
        method: str,
        request: Message,
        reply: type[T],
        *,
        body: Sequence[Buffer] = (),
        timeout_s: float = 10.0,
    ) -> tuple[T, memoryview]:
        found = self._methods(node)[method]
        received: Any = decode(encode(request), found.request)
        sent = memoryview(bytearray(b"".join(body)))
        answer = await found.handler(
            received, Call(PeerIdentity("test", "FR", "par1", "a", self._roles), sent, timeout_s)
        )
        sent[:] = bytes(len(sent))  # a request's body is valid until the handler returns, and not longer
        message, chunks = (answer.message, answer.body) if isinstance(answer, Reply) else (answer, ())
        return decode(encode(message), reply), memoryview(b"".join(chunks))


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
                raise OSError(errno.EIO, "simulated bad sector")
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

    def drop_cache(self, offset: int) -> None:
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

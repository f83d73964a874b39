"""Fragments of made-up content, and what tests do to them on the disk."""

from __future__ import annotations

import contextlib
import random
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from storaged.fragments.limits import StoreLimits
from storaged.fragments.ports import FragmentHeader, FragmentId
from storaged.hashes import HASH_BYTES, fragment_hash
from storaged.wire import Message

T = TypeVar("T", bound=Message)

DISK = "00112233445566aa"
ANY_SPACE = StoreLimits(reserve_bytes=1)
"""For stores on the machine's disk: how much of it is free must not matter."""


MEMORY_BYTES_MIN = 1 << 30


@contextlib.contextmanager
def in_memory(tmp_path: Path) -> Iterator[Path]:
    """A directory in memory where there is room: for indexes of simulated disks and the like, whose own durability is
    not what is tested.
    """
    memory = Path("/dev/shm")
    if not memory.is_dir() or shutil.disk_usage(memory).free < MEMORY_BYTES_MIN:
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=memory) as name:
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

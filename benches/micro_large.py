"""The parts of a large GET for ``benches.micro``: fragments from a storage node to the gateway, and their opening.

Everything is CPU of a MiB of plaintext, of all threads that work on it: the least of several repetitions, next to the
same bytes through the native calls alone.
"""

from __future__ import annotations

import asyncio
import os
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from benches.micro_world import Side
from storaged.cluster import issuing
from storaged.cluster.identity import Identity
from storaged.cluster.policy import Policy
from storaged.cluster.ports import PeerChecks
from storaged.cluster.rpc import RpcPool, RpcServer
from storaged.fragments.limits import StoreLimits
from storaged.fragments.ports import FragmentHeader, FragmentId
from storaged.fragments.remote import FragmentHost, RemoteFragmentStore
from storaged.fragments.store import LocalFragmentStore
from storaged.hashes import fragment_hash
from storaged.sov1 import TAG_BYTES, Opener, Sealer, stream_key
from storaged.units import KIB, MIB

CELL = 64 * KIB
ROWS, K = 12, 4
"""Cells of a fragment, and data fragments of a block: 3 MiB, as in the program."""
BLOCKS = 2
REPEATS = 30

MIB_EACH = BLOCKS * K * ROWS * CELL / MIB

Row = tuple[str, float, float, str]
"""Name, us a MiB, floor, what the floor is."""


class _Bulk:
    """A block's fragments on four disks of a storage node, which has a thread of its own, and the gateway's side."""

    def __init__(self, side: Side, stores: list[RemoteFragmentStore], data_id: bytes, opener: Opener) -> None:
        self._side = side
        self._stores = stores
        self._data_id = data_id
        self._opener = opener
        self._out = memoryview(bytearray(K * ROWS * opener.plain_bytes))

    async def fetch(self) -> list[list[memoryview]]:
        """The cells of each block, in the order of the stream."""
        found = []
        for block in range(BLOCKS):
            reads = [
                store.read(FragmentId(self._data_id, block, K, 2, position), 0, ROWS)
                for position, store in enumerate(self._stores)
            ]
            fragments = await asyncio.gather(*reads)
            found.append(
                [cell for row in zip(*(read.cells for read in fragments), strict=True) for cell in row if cell]
            )
        return found

    def open(self, blocks: list[list[memoryview]]) -> None:
        index = 0
        for cells in blocks:
            self._opener.open_chunks(index, cells, self._out, 0)
            index += len(cells)

    async def least_us(self) -> tuple[float, float]:
        """Of fetching, and of opening."""
        fetching = opening = float("inf")
        for _ in range(REPEATS):
            began, node = time.thread_time(), await self._side.cpu_s()
            blocks = await self.fetch()
            fetching = min(fetching, time.thread_time() - began + await self._side.cpu_s() - node)
            began = time.thread_time()
            self.open(blocks)
            opening = min(opening, time.thread_time() - began)
        return fetching * 1e6 / MIB_EACH, opening * 1e6 / MIB_EACH


@asynccontextmanager
async def _bulk(place: Path, gateway: Identity, node: Identity) -> AsyncIterator[_Bulk]:
    side, checks = Side(), PeerChecks(Policy().admit)
    sealer = Sealer(bytes(32), "micro", b"", CELL, os.urandom(24))
    plain, data_id = os.urandom(sealer.plain_bytes), os.urandom(16)
    disks: dict[str, LocalFragmentStore] = {}
    for position in range(K):
        (place / f"d{position}").mkdir()
        limits = StoreLimits(reserve_bytes=1)
        opened = LocalFragmentStore.open(place / f"d{position}", f"{position:016x}", limits=limits)
        disks[f"d{position}"] = await side.run(opened)
    for block in range(BLOCKS):
        cells = [sealer.seal(block * K * ROWS + index, plain) for index in range(K * ROWS)]
        for position in range(K):
            payload = b"".join(cells[position::K])
            name, hashes = FragmentId(data_id, block, K, 2, position).pack(), (fragment_hash([payload]),) * (K + 2)
            header = FragmentHeader(name, b"owner", sealer.header, hashes, CELL, len(payload), 1)
            await side.run(disks[f"d{position}"].write(header, [payload], sync=True))
    server = RpcServer(node, FragmentHost(disks).methods(), checks=checks)
    await side.run(server.start("127.0.0.1", 0))
    pool = RpcPool(gateway, addresses={node.name: f"127.0.0.1:{server.port}"}, checks=checks)
    await pool.start()
    try:
        stores = [RemoteFragmentStore(pool, node.name, disk) for disk in disks]
        yield _Bulk(side, stores, data_id, Opener(stream_key(bytes(32), "micro", b"", sealer.header)))
    finally:
        await pool.close()
        await side.run(server.close())
        for disk in disks.values():
            await side.run(disk.close())
        side.close()


def _packets_floor_us() -> float:
    """A MiB sealed and opened once more, as packets of one cell, in the processor's cache."""
    cipher, cell, length = AESGCM(bytes(32)), os.urandom(CELL), bytes(4)
    sealed, out = memoryview(bytearray(CELL + TAG_BYTES)), memoryview(bytearray(CELL))

    def once() -> None:
        for _ in range(MIB // CELL):
            cipher.encrypt_into(bytes(12), cell, length, sealed)
            cipher.decrypt_into(bytes(12), sealed, length, out)

    return _least_us(once)


def _opening_floor_us() -> float:
    cipher, cell, out = AESGCM(bytes(32)), os.urandom(CELL - TAG_BYTES), memoryview(bytearray(CELL))
    sealed = cipher.encrypt(bytes(12), cell, None)

    def once() -> None:
        for _ in range(MIB // CELL):
            cipher.decrypt_into(bytes(12), sealed, None, out[: len(cell)])

    return _least_us(once)


def _least_us(work: Callable[[], object]) -> float:
    best = float("inf")
    for _ in range(5 * REPEATS):
        began = time.thread_time()
        work()
        best = min(best, time.thread_time() - began)
    return best * 1e6


async def paths() -> list[Row]:
    with tempfile.TemporaryDirectory(prefix="storaged-micro-") as folder:
        place = Path(folder)
        authority = issuing.create_authority(place / "authority", "micro")
        gateway, node = (
            issuing.issue(authority, place / name, name=name, location="FR/par1/a", roles=(role,))
            for name, role in (("g", "gateway"), ("n", "storage"))
        )
        async with _bulk(place, gateway, node) as bulk:
            fetching, opening = await bulk.least_us()
        return [
            (
                "a MiB of fragments, node to gateway",
                fetching,
                _packets_floor_us(),
                "AES-256-GCM of 64 KiB, sealed and opened",
            ),
            ("a MiB opened", opening, _opening_floor_us(), "AES-256-GCM of 64 KiB in the processor's cache"),
        ]

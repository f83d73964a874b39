"""``python -m benches.micro [NAME ...]``: the cost of each hot path of the server on its own, next to its floor.

A floor is the lowest possible cost of the same work: its native calls alone, measured in the same run where that is
possible, or the measured cost of a building block (``FIGURES``). A CPU path shows microseconds of CPU, the least of
several repetitions, which is closest to the truth on a busy machine. A path that waits for a disk shows the median of
wall time.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import logging
import os
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast

import structlog
import uvloop
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from benches import micro_front, micro_large, micro_listing, micro_objects
from benches.micro_world import (
    ACCESS,
    REGION,
    SCOPE,
    SECRET,
    OneObject,
    Side,
    finished,
    list_request,
    signature_floor,
)
from benches.s3client import Connection, Target, connect, signed_head
from storaged.clock import SystemClock
from storaged.cluster import issuing
from storaged.cluster.layout import Profile
from storaged.cluster.policy import Policy
from storaged.cluster.ports import Call, Method, PeerChecks
from storaged.cluster.rpc import RpcPool, RpcServer
from storaged.fragments.limits import StoreLimits
from storaged.fragments.ports import FragmentHeader, FragmentId
from storaged.fragments.store import LocalFragmentStore
from storaged.ids import system_entropy
from storaged.meta import messages
from storaged.meta.acceptor.replica import LocalReplica
from storaged.meta.names import Ballot, RegisterName, Table, Value, Visibility
from storaged.meta.storage.lmdb_store import LmdbMetaStore
from storaged.meta.storage.scan import DigestCache
from storaged.meta.store_ports import Slot, StoreBatch
from storaged.objects.api import Buckets, Objects, Users
from storaged.objects.code import erasure
from storaged.objects.code.seal import seal_part
from storaged.objects.listing_types import Listing, Show
from storaged.objects.ports import pack_context
from storaged.objects.records import BucketRecord, SealedList
from storaged.s3.app import S3App
from storaged.s3.auth import sigv4
from storaged.s3.context import Endpoint, Front
from storaged.s3.ops import listing
from storaged.s3.request import parse_target
from storaged.sov1 import open_message, seal_message
from storaged.units import KIB, MIB
from storaged.wire import Message

T = TypeVar("T")

FIGURES = {
    "http": (31.4, "aiohttp's 1 KiB GET, a core: 31,800 a second"),
    "rpc": (7.5, "frames in records of TLS, both ends: 7.5 us at 64 in flight"),
    "rpc-lone": (23.0, "frames in records of TLS, both ends: 23 us alone"),
    "lmdb-16": (80.0, "synced LMDB commits of 16: 12,500 puts a second"),
    "lmdb-128": (36.0, "synced LMDB commits of 128: 27,800 puts a second"),
    "append": (278.0, "append of 4 KiB and fdatasync: 3,600 a second"),
    "append-64": (278 / 64 + 4096 / 340, "one fdatasync, and the disk's 0.34 GB/s"),
    "page": (200.0, "1,000 keys as XML by f-strings: 0.2 ms"),
    "md5": (4096 / 920, "MD5: 0.92 GB/s"),
}


class Measured(NamedTuple):
    """``us`` per operation, ``floor_us``, and what the floor is."""

    name: str
    us: float
    floor_us: float
    floor: str


def least_us(work: Callable[[], object], *, calls: int = 500, repeats: int = 15) -> float:
    """CPU time of one call, in us: the least of several repetitions."""
    best = float("inf")
    for _ in range(repeats):
        began = time.thread_time()
        for _ in range(calls):
            work()
        best = min(best, time.thread_time() - began)
    return best / calls * 1e6


def figure(name: str, us: float, of: str) -> Measured:
    return Measured(name, us, *FIGURES[of])


# --- paths that use only CPU


def signature_check() -> list[Measured]:
    head = signed_head(Target("http://127.0.0.1:9000", ACCESS, SECRET, REGION), "GET", "/bench/key").decode()
    headers = {
        name.lower(): value for name, _, value in (line.partition(": ") for line in head.split("\r\n")[1:] if line)
    }
    target = parse_target(b"/bench/key")
    now_ms = SystemClock().wall_ms()

    def check() -> None:
        claim = sigv4.claim_from_header(headers["authorization"], headers)
        sigv4.check_scope(claim, REGION)
        sigv4.check_time(claim, now_ms)
        payload = sigv4.payload_hash(claim, headers, target.query)
        sigv4.verify(claim, SECRET, "GET", target.raw_path, target.pairs, headers, payload)
        sigv4.check_signed_headers(claim, headers)

    return [Measured("signature check", least_us(check), least_us(signature_floor), "one SHA-256, one HMAC")]


def sealing() -> list[Measured]:
    key, plain, data_id = bytes(32), os.urandom(4 * KIB), bytes(16)
    context = pack_context(b"", (SCOPE, b"key", b"null", bytes(16)))
    cipher, nonce = AESGCM(key), bytes(12)
    message = seal_message(key, "sov.meta.v1", context, bytes(120), bytes(24))
    encrypt = least_us(lambda: cipher.encrypt(nonce, plain, None))
    encrypt_message = least_us(lambda: cipher.encrypt(nonce, plain[:120], None))
    part = least_us(lambda: seal_part(key, data_id, 1, plain, system_entropy(24)))
    sealed = least_us(lambda: seal_message(key, "sov.meta.v1", context, bytes(120), system_entropy(24)))
    opened = least_us(lambda: open_message(key, "sov.meta.v1", context, message))
    return [
        Measured("seal a part of 4 KiB", part, encrypt, "AES-GCM"),
        Measured("seal metadata", sealed, encrypt_message, "AES-GCM"),
        Measured("open metadata", opened, encrypt_message, "AES-GCM"),
        figure("MD5 of 4 KiB", least_us(lambda: hashlib.md5(plain, usedforsecurity=False).digest()), "md5"),
    ]


async def object_plane() -> list[Measured]:
    return [
        Measured(name, least_us(work), least_us(native), floor) for name, work, native, floor in micro_objects.paths()
    ]


async def front() -> list[Measured]:
    return [
        Measured(name, least_us(work), least_us(native), floor) for name, work, native, floor in micro_front.paths()
    ]


def coding() -> list[Measured]:
    profile, cell = Profile(4, 2), 64 * KIB
    sealed, parity = os.urandom(3 * MIB), [memoryview(bytearray(768 * KIB)) for _ in range(2)]
    us = least_us(lambda: erasure.encode_block(profile, cell, sealed, parity), calls=20)
    return [Measured("code a block of 3 MiB, 4+2", us, 3 * MIB / 20_000, "ISA-L on pooled buffers: 20 GB/s")]


class _Page:
    """The part of ``Objects`` that a listing uses."""

    def __init__(self) -> None:
        self._keys = [b"photos/2026/%06d.jpg" % n for n in range(1000)]
        self._columns = (
            [4096] * 1000,
            [1_700_000_000_000 + 7 * n for n in range(1000)],
            [SealedList("0" * 32)] * 1000,
            ["f" * 64] * 1000,
        )

    async def list_objects(self, bucket: BucketRecord, *, show: Show, **options: object) -> Listing:
        return Listing(self._keys, show(*self._columns))


def list_page() -> list[Measured]:
    front = Front(cast(Objects, _Page()), cast(Buckets, None), cast(Users, None), Endpoint(REGION), SystemClock())
    request = list_request("list-type=2")

    def render() -> None:
        finished(listing.list_objects_v2(front, request))

    return [figure("page of 1,000 keys as XML", least_us(render, calls=5), "page")]


# --- HTTP and RPC, over loopback


async def http() -> list[Measured]:
    """Parsing, signature and answer of a request, with an object plane that does nothing."""
    world, side = OneObject(), Side()
    app = S3App(
        cast(Objects, world),
        cast(Buckets, world),
        cast(Users, world),
        Endpoint(REGION),
        clock=SystemClock(),
        entropy=system_entropy,
    )
    port = await side.run(app.start("127.0.0.1", 0))
    target = Target(f"http://127.0.0.1:{port}", ACCESS, SECRET, REGION)
    connections = [await connect(target) for _ in range(16)]

    async def ask(connection: Connection, method: str, count: int) -> None:
        for _ in range(count):
            await connection.request(signed_head(target, method, "/bench/key"), head_only=method == "HEAD")

    found = []
    try:
        for method in ("HEAD", "GET"):
            costs = []
            for _ in range(8):
                before = await side.cpu_s()
                await asyncio.gather(*(ask(connection, method, 50) for connection in connections))
                costs.append((await side.cpu_s() - before) / (50 * len(connections)) * 1e6)
            found.append(figure(f"{method} parsed, signed, answered", min(costs), "http"))
    finally:
        for connection in connections:
            connection.close()
        await side.run(app.close(1.0))
        side.close()
    return found


class _Note(Message, frozen=True):
    text: bytes = b""


async def rpc() -> list[Measured]:
    """A call and its answer: CPU of both ends together."""

    async def echo(request: _Note, call: Call) -> _Note:
        return request

    with tempfile.TemporaryDirectory(prefix="storaged-micro-") as place:
        authority = issuing.create_authority(Path(place) / "authority", "micro")
        own = {
            name: issuing.issue(authority, Path(place) / name, name=name, location="FR/par1/a", roles=("storage",))
            for name in ("a", "b")
        }
        checks = PeerChecks(Policy().admit)
        both = frozenset({"storage", "gateway"})
        methods = {
            "t.task": Method(_Note, echo, both),
            "t.at_once": Method(_Note, echo, both, try_answer=lambda request, call: request),
        }
        side = Side()
        server = RpcServer(own["b"], methods, checks=checks)
        await side.run(server.start("127.0.0.1", 0))
        pool = RpcPool(own["a"], addresses={"b": f"127.0.0.1:{server.port}"}, checks=checks)
        await pool.start()

        async def ask(method: str, count: int) -> None:
            for _ in range(count):
                await pool.call("b", method, _Note(bytes(100)), _Note)

        async def measure(method: str, in_flight: int) -> float:
            costs = []
            for _ in range(8):
                before = time.thread_time() + await side.cpu_s()
                await asyncio.gather(*(ask(method, 1280 // in_flight) for _ in range(in_flight)))
                costs.append((time.thread_time() + await side.cpu_s() - before) / 1280 * 1e6)
            return min(costs)

        try:
            return [
                figure("RPC, 64 in flight, answered at once", await measure("t.at_once", 64), "rpc"),
                figure("RPC, 64 in flight, answered by a task", await measure("t.task", 64), "rpc"),
                figure("RPC, alone", await measure("t.at_once", 1), "rpc-lone"),
            ]
        finally:
            await pool.close()
            await side.run(server.close())
            side.close()


async def large() -> list[Measured]:
    return [Measured(*found) for found in await micro_large.paths()]


# --- disks


async def wall_us(work: Callable[[], Awaitable[object]], operations: int, *, repeats: int = 15) -> float:
    """Wall time of one of ``operations`` concurrent operations, in us: the median."""
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        await work()
        times.append(time.perf_counter() - began)
    return statistics.median(times) / operations * 1e6


@asynccontextmanager
async def _meta_store() -> AsyncIterator[LmdbMetaStore]:
    with tempfile.TemporaryDirectory(prefix="storaged-micro-") as place:
        store = LmdbMetaStore(Path(place) / "meta")
        try:
            yield store
        finally:
            await store.close()


def _name(number: int) -> RegisterName:
    return RegisterName(Table.OBJECT, SCOPE, 3, b"photos/2026/%08d.jpg" % number)


async def registers() -> list[Measured]:
    """An accept is a row in a group of the redo log. Concurrent accepts share the one synced write of a group."""
    async with _meta_store() as store:
        replica = LocalReplica("d0", store)
        numbers = iter(range(10**9))

        async def accept() -> None:
            number = next(numbers)
            name, ballot = _name(number), Ballot(1, number + 1, "g", b"incarnat")
            await replica.prepare(messages.Prepare("d0", name, ballot))
            await replica.accept(messages.Accept("d0", name, ballot, Value(1, bytes(16), Visibility.LIVE, bytes(500))))

        async def create() -> None:
            number = next(numbers)
            value = Value(1, bytes(16), Visibility.LIVE, bytes(500))
            await replica.accept(messages.Create("d0", _name(number), Ballot(1, number + 1, "g", b"incarnat"), value))

        async def many() -> None:
            await asyncio.gather(*(accept() for _ in range(64)))

        async def many_created() -> None:
            await asyncio.gather(*(create() for _ in range(64)))

        lone, together, created = await wall_us(accept, 1), await wall_us(many, 64), await wall_us(many_created, 64)
        await replica.close()
    return [
        Measured("register: promise and accept, alone", lone, 1e6 / 650, "one synced LMDB commit: 500 to 800 a second"),
        figure("register: promise and accept, 64 at once", together, "lmdb-16"),
        figure("register: create, 64 at once", created, "lmdb-16"),
    ]


async def lmdb_batch() -> list[Measured]:
    async with _meta_store() as store:
        numbers = iter(range(10**9))

        def batch(rows: int) -> StoreBatch:
            ballot, value = Ballot(1, 1, "g", b"incarnat"), Value(1, bytes(16), Visibility.LIVE, bytes(500))
            return StoreBatch([Slot(_name(next(numbers)), ballot, value) for _ in range(rows)])

        written = figure(
            "metadata: 128 rows in one commit", await wall_us(lambda: store.commit(batch(128)), 128), "lmdb-128"
        )
    return [written]


async def pages() -> list[Measured]:
    """A page of a listing: the cost at all replicas together, and in the gateway."""
    async with _meta_store() as store:
        rows = micro_listing.slots()
        for at in range(0, len(rows), 1000):
            await store.commit(StoreBatch(rows[at : at + 1000]))
        await store.checkpoint()  # nearly all rows of a bucket are in LMDB
        page = micro_listing.Page(store)
        assert page.gateway_at_first().count(b"<Key>") == page.gateway().count(b"<Key>") == 1000
        cipher, field = AESGCM(bytes(32)), AESGCM(bytes(32)).encrypt(bytes(12), bytes(60), bytes(110))
        opening = 1000 * least_us(lambda: cipher.decrypt(bytes(12), field, bytes(110)))
        digests, asks = DigestCache(), sum(len(request.shards) for request in page.ring.asked)
        again = [
            figure("page of 1,000 again: the gateway's part", least_us(page.gateway, calls=5), "page"),
            Measured(
                f"page of 1,000 again: {asks} digests at replicas",
                least_us(lambda: page.replicas(digests), calls=5),
                asks / 10,
                "looked up: 0.1 us",
            ),
        ]
        at_first = least_us(page.gateway_at_first, calls=5)
        rows_read = page.replicas()
        return [
            Measured(
                "page of 1,000: the gateway's part",
                at_first,
                opening + FIGURES["page"][0],
                "1,000 list fields opened, XML by f-strings",
            ),
            Measured(
                f"page of 1,000: {rows_read:,} rows at replicas",
                least_us(page.replicas, calls=5),
                rows_read / 3,
                "LMDB scan: 3 million rows a second",
            ),
            *again,
        ]


async def segments() -> list[Measured]:
    with tempfile.TemporaryDirectory(prefix="storaged-micro-") as place:
        (Path(place) / "disk").mkdir()
        store = await LocalFragmentStore.open(
            Path(place) / "disk", "0123456789abcdef", limits=StoreLimits(reserve_bytes=1)
        )
        payload = os.urandom(4 * KIB)

        async def append() -> None:
            identifier = FragmentId(system_entropy(16), 0, 1, 2, 0)
            header = FragmentHeader(identifier.pack(), b"owner", bytes(64), (), 8 * KIB, len(payload), 1)
            await store.write(header, [payload], sync=True)

        async def many() -> None:
            await asyncio.gather(*(append() for _ in range(64)))

        try:
            return [
                figure("segment: append 4 KiB and sync, alone", await wall_us(append, 1), "append"),
                figure("segment: append 4 KiB and sync, 64 at once", await wall_us(many, 64), "append-64"),
            ]
        finally:
            await store.close()


PATHS: dict[str, Callable[[], list[Measured] | Coroutine[Any, Any, list[Measured]]]] = {
    "signature": signature_check, "front": front, "http": http, "seal": sealing, "objects": object_plane,
    "code": coding, "rpc": rpc, "register": registers, "lmdb": lmdb_batch, "segment": segments,
    "list": list_page, "page": pages, "large": large,
}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benches.micro", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of: {', '.join(PATHS)}; all when none is named")
    names = parser.parse_args().names or list(PATHS)
    if unknown := [name for name in names if name not in PATHS]:
        parser.error(f"unknown: {', '.join(unknown)}; choose from {', '.join(PATHS)}")
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))
    print(f"{'':46} {'us':>9} {'floor':>9} {'ratio':>6}")
    for name in names:
        found = PATHS[name]()
        for row in found if isinstance(found, list) else uvloop.run(found):
            print(
                f"{row.name:46} {row.us:9.2f} {row.floor_us:9.2f} {row.us / row.floor_us:6.1f}  {row.floor}", flush=True
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Rows of work: what is done, how many at a time, and what came out."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import random
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field

from benches.s3client import SILENCE_S_MAX, Connection, Target, WrongAnswer, connect, path_of, signed_head, watch_silence

KIB, MIB = 1024, 1024 * 1024
ERRORS_MAX = 20
"""A row that has failed so often is given up."""

READ_BACK = 16
"""So many objects of a row of PUTs are read again and compared, so that a server which only says that it stored them is found out."""

Operation = Callable[[Connection, int], Awaitable[None]]


@dataclass(frozen=True)
class Row:
    """``total`` operations at scale 1, at least ``least``, ``in_flight`` at a time, each with ``size_bytes`` of body. ``writes``: the prefix of the keys it
    makes; ``reads``: the row whose objects it reads. ``degraded``: after a rack (cluster) or a disk (single) was taken away."""

    name: str
    kind: str
    in_flight: int
    total: int
    least: int
    size_bytes: int = 0
    reads: str = ""
    degraded: bool = False

    def count(self, scale: float) -> int:
        return max(int(self.total * scale), self.least)


ROWS = {
    row.name: row
    for row in (
        Row("put-4k-64", "put", 64, 8000, 1100, 4 * KIB),
        Row("put-4k-1", "put", 1, 600, 100, 4 * KIB),
        Row("get-4k-64", "get", 64, 16000, 2200, 4 * KIB, "put-4k-64"),
        Row("head-64", "head", 64, 16000, 2200, 0, "put-4k-64"),
        Row("list-1000-4", "list", 4, 400, 40, 0, "put-4k-64"),
        Row("put-64m-4", "put", 4, 12, 4, 64 * MIB),
        Row("get-64m-4", "get", 4, 24, 8, 64 * MIB, "put-64m-4"),
        Row("put-256m-64", "put", 64, 64, 64, 256 * MIB),
        Row("get-256m-64", "get", 64, 64, 64, 256 * MIB, "put-256m-64"),
        Row("get-4k-64-degraded", "get", 64, 16000, 2200, 4 * KIB, "put-4k-64", degraded=True),
        Row("get-64m-4-degraded", "get", 4, 24, 8, 64 * MIB, "put-64m-4", degraded=True),
    )
}
HEAVY = ("put-256m-64", "get-256m-64")
"""Only when asked for: 16 GiB each way, for the memory of 64 large transfers at once."""

DEFAULT_ROWS = tuple(name for name in ROWS if name not in HEAVY)


@dataclass
class Result:
    """``seconds`` of wall time for ``operations`` that succeeded; latencies in milliseconds; ``errors`` are never counted as done.

    ``cpu_s``, ``peak_bytes`` (highest resident memory) and ``own_bytes`` (highest without mapped files, as sampled) are by name of server process, empty for somebody else's endpoint; ``disk_bytes_per_byte`` 0 when not measured.
    """

    row: str
    operations: int = 0
    bytes: int = 0
    seconds: float = 0.0
    errors: int = 0
    first_error: str = ""
    p50_ms: float = 0.0
    p99_ms: float = 0.0
    max_ms: float = 0.0
    cpu_s: dict[str, float] = field(default_factory=dict)
    peak_bytes: dict[str, int] = field(default_factory=dict)
    own_bytes: dict[str, int] = field(default_factory=dict)
    disk_bytes_per_byte: float = 0.0

    @property
    def server_cpu_s(self) -> float:
        return sum(self.cpu_s.values())

    @property
    def per_second(self) -> float:
        return self.operations / self.seconds if self.seconds else 0.0

    @property
    def megabytes_per_second(self) -> float:
        return self.bytes / 1e6 / self.seconds if self.seconds else 0.0

    @property
    def cpu_us_per_operation(self) -> float:
        return 1e6 * self.server_cpu_s / self.operations if self.operations else 0.0

    def note_latencies(self, seconds: list[float]) -> None:
        ordered = sorted(seconds)
        if ordered:
            self.p50_ms = ordered[len(ordered) // 2] * 1e3
            self.p99_ms = ordered[min(len(ordered) - 1, int(len(ordered) * 0.99))] * 1e3
            self.max_ms = ordered[-1] * 1e3

    def failed(self, what: str) -> None:
        self.errors += 1
        self.first_error = self.first_error or f"{self.row} {what}"


class _Pool:
    """``in_flight`` connections; a broken one is replaced when its worker goes on."""

    def __init__(self, target: Target) -> None:
        self.target = target
        self.open: list[Connection] = []

    async def get(self, old: Connection | None = None) -> Connection:
        """Raises OSError."""
        if old is not None:
            old.close()
            self.open.remove(old)
        found = await connect(self.target)
        self.open.append(found)
        return found

    def close(self) -> None:
        for connection in self.open:
            connection.close()


async def drive(
    row: str,
    target: Target,
    operation: Operation,
    *,
    in_flight: int,
    total: int,
    bytes_each: int = 0,
    silence_s_max: float = SILENCE_S_MAX,
) -> Result:
    """``total`` operations by ``in_flight`` connections, each taking the next number as soon as it is free.

    Latency is per operation, from send to verified answer. What goes wrong is in the result; nothing is raised for it.
    """
    result, latencies, pool = Result(row), [], _Pool(target)
    numbers: Iterator[int] = iter(range(total))

    async def work(connection: Connection) -> None:
        for number in numbers:
            began = time.perf_counter()
            try:
                await operation(connection, number)
            except WrongAnswer as error:
                result.failed(f"#{number}: {error}")
                if result.errors > ERRORS_MAX:
                    return
                try:
                    connection = await pool.get(connection)
                except OSError as refused:
                    result.failed(f"#{number}: no new connection: {refused}")
                    return
                continue
            latencies.append(time.perf_counter() - began)
            result.operations += 1
            result.bytes += bytes_each

    began = time.perf_counter()
    try:
        for _ in range(min(in_flight, total)):
            await pool.get()
        watcher = asyncio.create_task(watch_silence(pool.open, silence_s_max))
        began = time.perf_counter()
        try:
            async with asyncio.TaskGroup() as group:
                for connection in list(pool.open):
                    group.create_task(work(connection))
        finally:
            watcher.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await watcher
    except OSError as error:
        result.failed(f"no connection: {error}")
    finally:
        result.seconds = time.perf_counter() - began
        pool.close()
    if not result.errors and result.operations != total:
        result.failed(f"{result.operations} operations of {total} came to an end")
    result.note_latencies(latencies)
    return result


class Bodies:
    """Contents that differ by key and cost nothing to make: slices of one random buffer."""

    def __init__(self, size: int, seed: int = 1) -> None:
        self._size = size
        source, length = random.Random(seed), size + 4096
        # a MiB at a time: randbytes counts bits in a C int, and ends below 256 MiB
        self._buffer = memoryview(b"".join(source.randbytes(min(MIB, length - start)) for start in range(0, length, MIB)))
        self._digests: dict[int, str] = {}

    def of(self, number: int) -> memoryview:
        start = number * 7 % 4096
        return self._buffer[start : start + self._size]

    def sha256(self, number: int) -> str:
        """Of the body; computed once for each of the 4,096 slices, so that it costs the client little."""
        start = number * 7 % 4096
        found = self._digests.get(start)
        if found is None:
            found = self._digests[start] = hashlib.sha256(self.of(number)).hexdigest()
        return found


async def once(target: Target, head: bytes, *, silence_s_max: float = SILENCE_S_MAX) -> bytes:
    """One request on a connection of its own. Raises WrongAnswer, OSError."""
    connection = await connect(target)
    watcher = asyncio.create_task(watch_silence([connection], silence_s_max))
    try:
        return await connection.request(head)
    finally:
        watcher.cancel()
        connection.close()


async def make_bucket(target: Target, bucket: str, *, silence_s_max: float = SILENCE_S_MAX) -> None:
    await once(target, signed_head(target, "PUT", path_of(bucket, "")), silence_s_max=silence_s_max)


def putting(target: Target, bucket: str, prefix: str, bodies: Bodies, size: int) -> Operation:
    async def put(connection: Connection, number: int) -> None:
        head = signed_head(target, "PUT", path_of(bucket, f"{prefix}{number:08d}"), sha256=bodies.sha256(number), length=size)
        await connection.request(head, bodies.of(number))

    return put


def overwriting(target: Target, bucket: str, key: str, bodies: Bodies, size: int) -> Operation:
    async def put(connection: Connection, number: int) -> None:
        head = signed_head(target, "PUT", path_of(bucket, key), sha256=bodies.sha256(number), length=size)
        await connection.request(head, bodies.of(number))

    return put


def making_buckets(target: Target, prefix: str) -> Operation:
    async def make(connection: Connection, number: int) -> None:
        await connection.request(signed_head(target, "PUT", path_of(f"{prefix}{number:05d}", "")))

    return make


def getting(target: Target, bucket: str, prefix: str, bodies: Bodies, count: int) -> Operation:
    async def get(connection: Connection, number: int) -> None:
        number = number * 7919 % count
        await connection.request(signed_head(target, "GET", path_of(bucket, f"{prefix}{number:08d}")), expect=bodies.of(number))

    return get


def heading(target: Target, bucket: str, prefix: str, count: int, size: int) -> Operation:
    async def head(connection: Connection, number: int) -> None:
        number = number * 7919 % count
        await connection.request(signed_head(target, "HEAD", path_of(bucket, f"{prefix}{number:08d}")), head_only=True)
        if connection.announced != size:
            raise WrongAnswer(f"HEAD tells {connection.announced} bytes of an object of {size}")

    return head


def listing(target: Target, bucket: str, prefix: str, count: int) -> Operation:
    """Pages of 1,000 from somewhere in the bucket; the keys of the page are checked."""

    async def page(connection: Connection, number: int) -> None:
        first = number * 1009 % max(count - 1001, 1)
        query = f"list-type=2&max-keys=1000&prefix={prefix}&start-after={prefix}{first:08d}"
        body = await connection.request(signed_head(target, "GET", f"/{bucket}", query))
        wanted = min(1000, count - first - 1)
        if body.count(b"<Key>") != wanted or f"{prefix}{first + 1:08d}".encode() not in body:
            raise WrongAnswer(f"a page of {body.count(b'<Key>')} keys instead of {wanted}")

    return page

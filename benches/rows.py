"""Rows of work: what is done, how many at a time, and what came out."""

from __future__ import annotations

import asyncio
import hashlib
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass, field

from benches.s3client import Connection, Target, WrongAnswer, connect, path_of, signed_head

KIB, MIB = 1024, 1024 * 1024
Operation = Callable[[Connection, int], Awaitable[None]]


@dataclass
class Result:
    """``seconds`` of wall time for ``operations`` that succeeded; latencies in milliseconds; ``errors`` are never counted as done."""

    row: str
    operations: int = 0
    bytes: int = 0
    seconds: float = 0.0
    errors: int = 0
    first_error: str = ""
    p50_ms: float = 0.0
    p99_ms: float = 0.0
    max_ms: float = 0.0
    server_cpu_s: float = 0.0
    peak_memory_bytes: int = 0
    disk_bytes_per_byte: float = 0.0
    latencies: list[float] = field(default_factory=list, repr=False)

    @property
    def per_second(self) -> float:
        return self.operations / self.seconds if self.seconds else 0.0

    @property
    def megabytes_per_second(self) -> float:
        return self.bytes / 1e6 / self.seconds if self.seconds else 0.0

    def finish(self) -> Result:
        ordered = sorted(self.latencies)
        if ordered:
            self.p50_ms = ordered[len(ordered) // 2] * 1e3
            self.p99_ms = ordered[min(len(ordered) - 1, int(len(ordered) * 0.99))] * 1e3
            self.max_ms = ordered[-1] * 1e3
        self.latencies = []
        return self

    def as_dict(self) -> dict[str, object]:
        values = asdict(self)
        del values["latencies"]
        return {**values, "per_second": round(self.per_second, 1), "megabytes_per_second": round(self.megabytes_per_second, 1)}


async def drive(row: str, target: Target, operation: Operation, *, in_flight: int, total: int, bytes_each: int = 0) -> Result:
    """``total`` operations by ``in_flight`` connections, each taking the next number as soon as it is free. Latency is per operation, from send to verified answer."""
    result = Result(row)
    connections = [await connect(target) for _ in range(in_flight)]
    numbers = iter(range(total))

    async def work(connection: Connection) -> None:
        for number in numbers:
            began = time.perf_counter()
            try:
                await operation(connection, number)
            except (WrongAnswer, OSError) as error:
                result.errors += 1
                result.first_error = result.first_error or f"{row} #{number}: {error}"
                connection.close()
                if result.errors > 20:
                    return
                connection = await connect(target)
                continue
            result.latencies.append(time.perf_counter() - began)
            result.operations += 1
            result.bytes += bytes_each

    began = time.perf_counter()
    try:
        async with asyncio.TaskGroup() as group:
            for connection in connections:
                group.create_task(work(connection))
    finally:
        result.seconds = time.perf_counter() - began
        for connection in connections:
            connection.close()
    return result.finish()


class Bodies:
    """Contents that differ by key and cost nothing to make: slices of one random buffer."""

    def __init__(self, size: int, seed: int = 1) -> None:
        self._size = size
        self._buffer = memoryview(random.Random(seed).randbytes(size + 4096))
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


async def make_bucket(target: Target, bucket: str) -> None:
    connection = await connect(target)
    try:
        await connection.request(signed_head(target, "PUT", path_of(bucket, "")))
    finally:
        connection.close()


def putting(target: Target, bucket: str, prefix: str, bodies: Bodies, size: int) -> Operation:
    async def put(connection: Connection, number: int) -> None:
        head = signed_head(target, "PUT", path_of(bucket, f"{prefix}{number:08d}"), sha256=bodies.sha256(number), length=size)
        await connection.request(head, bodies.of(number))

    return put


def getting(target: Target, bucket: str, prefix: str, bodies: Bodies, count: int) -> Operation:
    async def get(connection: Connection, number: int) -> None:
        number = number * 7919 % count
        await connection.request(signed_head(target, "GET", path_of(bucket, f"{prefix}{number:08d}")), expect=bodies.of(number))

    return get


def heading(target: Target, bucket: str, prefix: str, count: int) -> Operation:
    async def head(connection: Connection, number: int) -> None:
        number = number * 7919 % count
        await connection.request(signed_head(target, "HEAD", path_of(bucket, f"{prefix}{number:08d}")), head_only=True)

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

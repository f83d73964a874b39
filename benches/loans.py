"""``python -m benches.loans [--rounds 15] [--rows 1000,20000]``: copies that borrow their data (README.md, «Loans»).

A trial cluster. Objects of 1 MiB and 16 MiB are read in turns: the original, a copy in its bucket, one in another
bucket, and one whose owner's bucket was deleted and is a lender. Each GET, and ranges of 64 KiB, has its p50 and the
servers' CPU time, and the ratio of both to the copy in another bucket: medians over the rounds. Then the same while a
storage node is stopped, and after it was killed: errors, and the longest wait.

``--rows``: DeleteBucket of buckets with so many rows of which nothing is left but what copies use, and what the end of
these loans costs afterwards.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import functools
import hashlib
import os
import random
import re
import signal
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials

from benches.bursts import cpu_s
from benches.s3client import Ask, Connection, Signer, Target, WrongAnswer, connect, path_of
from benches.servers import Server, end_on_sigterm, storaged_cluster
from storaged.units import KIB, MIB

SIZES = {"1m": MIB, "16m": 16 * MIB}
COUNTS = {"1m": 24, "16m": 4}
"""Objects of each size, and GETs of a burst."""
RANGE_BYTES = 64 * KIB
RANGES = 48
KINDS = ("original", "copy in the bucket", "copy in another bucket", "copy of a lender's")
BASE = KINDS[2]
ROW_BYTES = 1100
"""A version of this size is coded."""
WRITERS = 32
REST_CPU_S = 0.1
"""Of all servers in a second: they have nothing to do."""
AWAY_S = 12.0
PATIENCE_S = 60.0
VERSIONED = (
    '<VersioningConfiguration xmlns="http://s3.amazonaws.com/doc/2006-03-01/"><Status>Enabled</Status>'
    "</VersioningConfiguration>"
)
_VERSION = re.compile(rb"<Version>.*?<Key>([^<]+)</Key><VersionId>([^<]+)</VersionId>", re.DOTALL)


class Client:
    """One connection."""

    def __init__(self, target: Target, connection: Connection) -> None:
        self._target = target
        self._connection = connection
        self._signer = Signer(target)

    async def ask(self, method: str, bucket: str, key: str = "", query: str = "", body: bytes = b"") -> bytes:
        """Raises WrongAnswer."""
        sha256 = hashlib.sha256(body).hexdigest()
        head = self._signer.head(method, path_of(bucket, key), query, sha256=sha256, length=len(body))
        return await self._connection.request(head + body)

    async def copy(self, source: str, bucket: str, key: str) -> None:
        """``source``: BUCKET/KEY. Raises WrongAnswer."""
        request = AWSRequest("PUT", f"{self._target.endpoint}{path_of(bucket, key)}")
        request.headers["x-amz-copy-source"] = source
        S3SigV4Auth(Credentials(self._target.access_key, self._target.secret_key), "s3", self._target.region).add_auth(
            request
        )
        lines = "".join(f"{name}: {value}\r\n" for name, value in request.headers.items())
        host = f"{self._target.host}:{self._target.port}"
        head = f"PUT {path_of(bucket, key)} HTTP/1.1\r\nHost: {host}\r\n{lines}Content-Length: 0\r\n\r\n"
        await self._connection.request(head.encode())

    async def get(self, bucket: str, key: str, expect: memoryview, first: int | None = None) -> None:
        """``first``: of a range of RANGE_BYTES. Raises WrongAnswer."""
        unsigned = ""
        if first is not None:
            unsigned, expect = f"Range: bytes={first}-{first + RANGE_BYTES - 1}\r\n", expect[first:][:RANGE_BYTES]
        answered: asyncio.Future[WrongAnswer | None] = asyncio.get_running_loop().create_future()
        ask = Ask(self._signer.head("GET", path_of(bucket, key), unsigned=unsigned), expect=expect)
        self._connection.begin(ask, lambda wrong: None if answered.done() else answered.set_result(wrong))
        if wrong := await answered:
            raise wrong

    def close(self) -> None:
        self._connection.close()


@contextlib.asynccontextmanager
async def client_of(target: Target) -> AsyncIterator[Client]:
    client = Client(target, await connect(target))
    try:
        yield client
    finally:
        client.close()


async def by_many(target: Target, work: Iterable[Callable[[Client], Awaitable[object]]]) -> None:
    jobs = iter(work)

    async def one() -> None:
        async with client_of(target) as client:
            for job in jobs:
                await job(client)

    await asyncio.gather(*(one() for _ in range(WRITERS)))


@dataclass
class Burst:
    """Of one kind of object in one round: CPU and wall time of one GET."""

    cpu_ms: float
    p50_ms: float


@dataclass
class Reads:
    """Where the objects are, and what is in them."""

    target: Target
    server: Server
    bodies: dict[str, memoryview] = field(default_factory=dict)

    async def write(self) -> None:
        async with client_of(self.target) as client:
            for bucket in ("own", "other", "left"):
                await client.ask("PUT", bucket)
            for size, length in SIZES.items():
                self.bodies[size] = memoryview(os.urandom(length))
                for number in range(COUNTS[size]):
                    key = f"{size}-{number}"
                    for bucket in ("own", "left"):
                        await client.ask("PUT", bucket, key, body=bytes(self.bodies[size]))
                    await client.copy(f"own/{key}", "own", f"copy-{key}")
                    await client.copy(f"own/{key}", "other", f"copy-{key}")
                    await client.copy(f"left/{key}", "other", f"lent-{key}")
                    await client.ask("DELETE", "left", key)
            await client.ask("DELETE", "left")

    def where(self, kind: str, size: str, number: int) -> tuple[str, str]:
        prefix = ("", "copy-", "copy-", "lent-")[KINDS.index(kind)]
        return ("own" if kind in KINDS[:2] else "other"), f"{prefix}{size}-{number}"

    async def burst(self, client: Client, kind: str, size: str, *, ranges: bool) -> Burst:
        took, body = [], self.bodies[size]
        before = servers_cpu_s(self.server)
        for number in range(RANGES if ranges else COUNTS[size]):
            first = random.randrange(len(body) - RANGE_BYTES) if ranges else None
            began = time.perf_counter()
            await client.get(*self.where(kind, size, number % COUNTS[size]), body, first)
            took.append(1e3 * (time.perf_counter() - began))
        return Burst(1e3 * (servers_cpu_s(self.server) - before) / len(took), statistics.median(took))

    async def compare(self, rounds: int) -> None:
        for size in SIZES:
            for ranges in (False, True):
                found: dict[str, list[Burst]] = {kind: [] for kind in KINDS}
                async with client_of(self.target) as client:
                    for number in range(-1, rounds):
                        for kind in random.sample(KINDS, len(KINDS)):
                            burst = await self.burst(client, kind, size, ranges=ranges)
                            if number >= 0:  # the first round fills caches
                                found[kind].append(burst)
                for kind, bursts in found.items():
                    print(
                        f"{'range of ' if ranges else ''}{size:4} {kind:24}", *_cells(bursts, found[BASE]), flush=True
                    )

    async def while_away(self, what: str) -> None:
        """Each kind on a connection of its own, all at once."""

        async def reader(kind: str) -> str:
            took, errors, end = list[float](), 0, time.monotonic() + AWAY_S
            async with client_of(self.target) as client:
                number = 0
                while time.monotonic() < end:
                    number += 1
                    began = time.perf_counter()
                    try:
                        async with asyncio.timeout(PATIENCE_S):
                            await client.get(*self.where(kind, "1m", number % COUNTS["1m"]), self.bodies["1m"])
                    except (WrongAnswer, TimeoutError) as error:
                        errors += 1
                        print(f"{what}: {kind}: {error}", flush=True)
                    took.append(1e3 * (time.perf_counter() - began))
            took.sort()
            middle, late = statistics.median(took), took[int(0.99 * (len(took) - 1))]
            return f"p50 {middle:.1f} ms, p99 {late:.1f} ms, max {took[-1]:.1f} ms, {len(took)} GETs, {errors} errors"

        for kind, line in zip(KINDS, await asyncio.gather(*map(reader, KINDS)), strict=True):
            print(f"{what:10} {kind:24} {line}", flush=True)


def _cells(bursts: list[Burst], base: list[Burst]) -> tuple[str, ...]:
    def ratio(of: Callable[[Burst], float]) -> float:
        return statistics.median(of(mine) / of(other) for mine, other in zip(bursts, base, strict=True))

    cpu_ms, p50_ms = (statistics.median(map(of, bursts)) for of in (_cpu_ms, _p50_ms))
    return f"CPU {cpu_ms:7.3f} ms ({ratio(_cpu_ms):.2f})", f"p50 {p50_ms:7.2f} ms ({ratio(_p50_ms):.2f})"


def _cpu_ms(burst: Burst) -> float:
    return burst.cpu_ms


def _p50_ms(burst: Burst) -> float:
    return burst.p50_ms


async def away(reads: Reads) -> None:
    """One storage node is stopped, goes on, and is killed with its rack."""
    server = reads.server
    stopped = next(pid for name, pid in server.processes.items() if not name.startswith("gateway"))
    os.kill(stopped, signal.SIGSTOP)
    try:
        await reads.while_away("stopped")
    finally:
        os.kill(stopped, signal.SIGCONT)
    await asyncio.sleep(5)
    assert server.lose is not None
    await asyncio.to_thread(server.lose)
    await reads.while_away("killed")


async def lend_all(server: Server, bucket: str, count: int) -> None:
    """The rows are of keys with a version that is coded, and copied into another bucket, and then deleted."""
    target = server.target
    async with client_of(target) as client:
        await client.ask("PUT", bucket)
        await client.ask("PUT", bucket, query="versioning=", body=VERSIONED.encode())
        await client.ask("PUT", f"{bucket}-copies")

    async def lend(client: Client, number: int) -> None:
        await client.ask("PUT", bucket, f"{number:08}", body=os.urandom(ROW_BYTES))
        await client.copy(f"{bucket}/{number:08}", f"{bucket}-copies", f"{number:08}")

    await by_many(target, (functools.partial(lend, number=number) for number in range(count)))
    async with client_of(target) as client:
        while found := _VERSION.findall(await client.ask("GET", bucket, query="versions=")):
            await by_many(
                target,
                [
                    functools.partial(_delete, bucket=bucket, key=key.decode(), query=f"versionId={version.decode()}")
                    for key, version in found
                ],
            )


async def delete_bucket(server: Server, count: int) -> None:
    """What it costs, and what the end of its loans does; and the end of as many of a bucket that stays."""
    target = server.target
    for bucket in (lender := f"left-{count}", f"kept-{count}"):
        await lend_all(server, bucket, count)
        if bucket == lender:
            before, began = servers_cpu_s(server), time.perf_counter()
            async with client_of(target) as client:
                await client.ask("DELETE", bucket)
            took, used = time.perf_counter() - began, servers_cpu_s(server) - before
            print(f"DeleteBucket of {count} rows that lend: {took:.2f} s, CPU {used:.2f} s", flush=True)
        before, keys = servers_cpu_s(server), (f"{number:08}" for number in range(count))
        await by_many(target, (functools.partial(_delete, bucket=f"{bucket}-copies", key=key) for key in keys))
        await at_rest(server)
        cpu_ms = 1e3 * (servers_cpu_s(server) - before) / count
        print(f"{bucket}: DELETE of a copy, and the end of its loan: CPU {cpu_ms:.2f} ms", flush=True)


def servers_cpu_s(server: Server) -> float:
    return sum(map(cpu_s, server.processes.values()))


async def at_rest(server: Server) -> None:
    """Waits until work in the background is done."""
    while True:
        before = servers_cpu_s(server)
        await asyncio.sleep(1)
        if servers_cpu_s(server) - before < REST_CPU_S:
            return


async def _delete(client: Client, *, bucket: str, key: str, query: str = "") -> None:
    await client.ask("DELETE", bucket, key, query)


async def measure(server: Server, rounds: int, rows: list[int]) -> None:
    if rounds:
        reads = Reads(server.target, server)
        await reads.write()
        await reads.compare(rounds)
    for count in rows:
        await delete_bucket(server, count)
    if rounds:
        await away(reads)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="benches.loans", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=15, help="of GETs; 0: none")
    parser.add_argument("--rows", default="", help="of buckets to delete, like 1000,20000")
    parser.add_argument("--dir", type=Path, default=Path(tempfile.gettempdir()), help="where the disks are")
    options = parser.parse_args(arguments)
    end_on_sigterm()
    with storaged_cluster(options.dir) as server:
        asyncio.run(measure(server, options.rounds, [int(count) for count in options.rows.split(",") if count]))


if __name__ == "__main__":
    main()

"""Rows of work: the operation, how many run at a time, and the result."""

from __future__ import annotations

import asyncio
import hashlib
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from benches.s3client import (
    SILENCE_S_MAX,
    Ask,
    Connection,
    Signer,
    Target,
    WrongAnswer,
    connect,
    path_of,
    signed_head,
    watch_silence,
)

KIB, MIB = 1024, 1024 * 1024
ERRORS_MAX = 20
"""A row ends after this number of errors."""

PROGRESS_S = 10.0

READ_BACK = 16
"""How many objects of a row of PUTs are read again and compared, to detect a server that does not store them."""

Operation = Callable[[int], Ask]
"""Makes the request of operation number n."""


@dataclass(frozen=True)
class Row:
    """``total`` operations at scale 1, at least ``least``, ``in_flight`` at a time, each with ``size_bytes`` of body.
    ``reads``: the row whose objects it reads. ``degraded``: runs after the loss of a rack (cluster) or a disk (single).
    ``pause_s``: how long a connection rests between two operations.
    """

    name: str
    kind: str
    in_flight: int
    total: int
    least: int
    size_bytes: int = 0
    reads: str = ""
    degraded: bool = False
    pause_s: float = 0.0

    def count(self, scale: float) -> int:
        return max(int(self.total * scale), self.least)

    @property
    def writes(self) -> bool:
        return self.kind in ("put", "list-written", "hot", "mix", "multipart")


SIZES = (
    ("1k", 1 * KIB, 6000, 12_000, 600),
    ("16k", 16 * KIB, 2400, 9600, 240),
    ("64k", 64 * KIB, 2400, 6400, 160),
    ("128k", 128 * KIB, 1200, 3200, 120),
    ("160k", 160 * KIB, 1200, 3200, 120),
    ("256k", 256 * KIB, 1200, 3200, 80),
    ("1m", 1 * MIB, 400, 1200, 32),
    ("4m", 4 * MIB, 128, 400, 32),
    ("16m", 16 * MIB, 32, 96, 16),
    ("64m", 64 * MIB, 16, 32, 16),
)
"""(name, bytes, PUTs, GETs, the least of both) of the rows of each size, with 16 in flight."""


def _sized() -> Iterator[Row]:
    for name, size, puts, gets, least in SIZES:
        yield Row(f"put-{name}-16", "put", 16, puts, least, size)
        yield Row(f"get-{name}-16", "get", 16, gets, least, size, f"put-{name}-16")
        if name in ("64k", "4m"):
            yield Row(f"mix-{name}-16", "mix", 16, gets, 2 * least, size, f"put-{name}-16")
    yield Row("range-64k-16", "range", 16, 4800, 160, 64 * KIB, "put-64m-16")
    yield Row("multipart-64m-4", "multipart", 4, 8, 4, 64 * MIB)
    yield Row("put-64k-idle", "put", 1, 12, 4, 64 * KIB, pause_s=3.0)
    yield Row("get-64k-idle", "get", 1, 12, 4, 64 * KIB, "put-64k-idle", pause_s=3.0)


ROWS = {
    row.name: row
    for row in (
        Row("put-4k-64", "put", 64, 8000, 1100, 4 * KIB),
        Row("put-4k-1", "put", 1, 600, 100, 4 * KIB),
        Row("get-4k-64", "get", 64, 16000, 2200, 4 * KIB, "put-4k-64"),
        Row("head-64", "head", 64, 16000, 2200, 0, "put-4k-64"),
        Row("list-1000-4", "list", 4, 400, 40, 0, "put-4k-64"),
        Row("list-written-4", "list-written", 4, 800, 80, 0, "put-4k-64"),
        Row("put-4k-many", "put", 64, 40_000, 4_000, 4 * KIB),
        Row("list-first-4", "list-first", 4, 40, 4, 0, "put-4k-many"),
        Row("hot-64", "hot", 64, 6400, 1280, 4 * KIB),
        Row("put-64m-4", "put", 4, 12, 4, 64 * MIB),
        Row("get-64m-4", "get", 4, 24, 8, 64 * MIB, "put-64m-4"),
        Row("put-256m-64", "put", 64, 64, 64, 256 * MIB),
        Row("get-256m-64", "get", 64, 64, 64, 256 * MIB, "put-256m-64"),
        *_sized(),
        Row("get-4k-64-degraded", "get", 64, 16000, 2200, 4 * KIB, "put-4k-64", degraded=True),
        Row("get-64m-4-degraded", "get", 4, 24, 8, 64 * MIB, "put-64m-4", degraded=True),
    )
}
HEAVY = ("put-256m-64", "get-256m-64", "list-written-4", "put-4k-many", "list-first-4", "hot-64")
"""Only on request: 16 GiB each way, to measure the memory of 64 concurrent large transfers; 40,000 objects, for pages
that were not listed before; one key that all write, which says most with several ``--workers``.
"""

GROUPS = {
    "sizes": tuple(row.name for row in _sized() if row.kind in ("put", "get", "mix") and not row.pause_s),
    "idle": tuple(row.name for row in _sized() if row.pause_s),
    "default": tuple(name for name in ROWS if name not in HEAVY and name not in {row.name for row in _sized()}),
}
"""What ``--rows`` takes in place of names."""

DEFAULT_ROWS = GROUPS["default"]


def rows_of(text: str) -> list[str]:
    """The names of rows in a list with commas, each once. Raises ValueError for what is neither row nor group."""
    names = [name for word in text.split(",") for name in GROUPS.get(word, (word,))]
    if unknown := [name for name in names if name not in ROWS]:
        raise ValueError(f"unknown rows: {', '.join(unknown)}; choose from {', '.join((*GROUPS, *ROWS))}")
    return list(dict.fromkeys(names))


@dataclass
class Result:
    """``seconds`` of wall time for ``operations`` that succeeded; latencies in milliseconds; ``errors`` do not count as
    operations.

    ``refused``: answers 503 in a row that counts them; ``unknown``: those whose write may have been applied.
    ``slowest``: the operations of the connection with the fewest, relative to the mean; 0 where it is not counted.

    ``cpu_s``, ``peak_bytes`` (highest resident memory) and ``own_bytes`` (highest memory without mapped files, sampled)
    have one entry for each server process, and are empty for an external endpoint. ``client_cpu_s`` is the load
    generator's own CPU time. ``disk_bytes_per_byte`` is 0 when it is not measured.
    """

    row: str
    operations: int = 0
    bytes: int = 0
    seconds: float = 0.0
    errors: int = 0
    first_error: str = ""
    refused: int = 0
    unknown: int = 0
    slowest: float = 0.0
    p50_ms: float = 0.0
    p99_ms: float = 0.0
    max_ms: float = 0.0
    cpu_s: dict[str, float] = field(default_factory=dict)
    client_cpu_s: float = 0.0
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


class _Drive:
    """A row while it runs. Each connection begins the next operation as soon as its answer is verified, without a task
    or a future, because the load generator shares the cores with the servers.
    """

    def __init__(
        self,
        result: Result,
        target: Target,
        operation: Operation,
        total: int,
        bytes_each: int,
        *,
        contended: bool,
        pause_s: float,
    ) -> None:
        self.result = result
        self._pause_s = pause_s
        self.target = target
        self.operation = operation
        self.latencies: list[float] = []
        self.open: list[Connection] = []
        self.out_of_time = False
        self.done_by: dict[Connection, int] | None = {} if contended else None
        self._total = total
        self._ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._numbers: Iterator[int] = iter(range(total))
        self._bytes_each = bytes_each
        self._working = 0
        self._replacing: set[asyncio.Task[None]] = set()

    def start(self) -> None:
        self._working = len(self.open)
        for connection in list(self.open):
            self.go_on(connection)

    def go_on(self, connection: Connection) -> None:
        """Begins the next operation on a connection."""
        number = next(self._numbers, None)
        if number is None or self.result.errors > ERRORS_MAX:
            self._stop_one()
            return
        ask = self.operation(number)
        began = time.perf_counter()

        def done(error: WrongAnswer | None) -> None:
            if error is not None:
                if error.status == 503 and self.done_by is not None:
                    self.result.refused += 1
                    self.result.unknown += "applied" in str(error)
                else:
                    self.result.failed(f"#{number}: {error}")
                replacing = asyncio.ensure_future(self._replace(connection))
                self._replacing.add(replacing)
                replacing.add_done_callback(self._replacing.discard)
                return
            if (following := connection.following()) is not None:
                connection.begin(following, done)
                return
            self.latencies.append(time.perf_counter() - began)
            self.result.operations += 1
            self.result.bytes += self._bytes_each
            if self.done_by is not None:
                self.done_by[connection] = self.done_by.get(connection, 0) + 1
            if self._pause_s:
                asyncio.get_running_loop().call_later(self._pause_s, self.go_on, connection)
            else:
                self.go_on(connection)

        connection.begin(ask, done)

    async def _replace(self, broken: Connection) -> None:
        broken.close()
        self.open.remove(broken)
        try:
            connection = await connect(self.target)
        except OSError as refused:
            self.result.failed(f"no new connection: {refused}")
            self._stop_one()
            return
        self.open.append(connection)
        if self.done_by is not None:
            self.done_by[connection] = self.done_by.pop(broken, 0)
        self.go_on(connection)

    def _stop_one(self) -> None:
        self._working -= 1
        if not self._working and not self._ended.done():
            self._ended.set_result(None)

    async def watch(self, seconds_max: float, say: Callable[[str], None] | None) -> None:
        """Waits until the last operation has ended."""
        began = time.perf_counter()
        while True:
            left_s = seconds_max - (time.perf_counter() - began) if seconds_max and not self.out_of_time else PROGRESS_S
            await asyncio.wait([self._ended], timeout=max(0.05, min(PROGRESS_S, left_s)))
            if self._ended.done():
                return
            spent_s, done = time.perf_counter() - began, self.result.operations
            if seconds_max and spent_s >= seconds_max:
                self.out_of_time, self._numbers = True, iter(())
            if say is not None:
                say(
                    f"   {self.result.row}: {done:,} of {self._total:,} after {spent_s:.0f} s, {done / spent_s:,.0f} /s"
                )

    def close(self) -> None:
        for replacing in self._replacing:
            replacing.cancel()
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
    seconds_max: float = 0.0,
    say: Callable[[str], None] | None = None,
    contended: bool = False,
    pause_s: float = 0.0,
) -> Result:
    """Runs ``total`` operations on ``in_flight`` connections; a free connection takes the next number.

    Latency is per operation, from the send to the verified answer. Errors are in the result; they are not raised. After
    ``seconds_max`` (0: never) no new operation begins, and the result has the ones that began. ``say`` gets a line of
    progress from time to time. ``contended``: answers 503 are counted apart, and so is what each connection did.
    ``pause_s``: how long a connection rests between two operations.
    """
    result = Result(row)
    work = _Drive(result, target, operation, total, bytes_each, contended=contended, pause_s=pause_s)
    watcher: asyncio.Task[None] | None = None
    began, cpu = time.perf_counter(), time.process_time()
    try:
        for _ in range(min(in_flight, total)):
            work.open.append(await connect(target))
        watcher = asyncio.create_task(watch_silence(work.open, silence_s_max))
        began, cpu = time.perf_counter(), time.process_time()
        work.start()
        await work.watch(seconds_max, say)
    except OSError as error:
        result.failed(f"no connection: {error}")
    finally:
        result.seconds, result.client_cpu_s = time.perf_counter() - began, time.process_time() - cpu
        if watcher is not None:
            watcher.cancel()
        work.close()
    if work.done_by is not None and result.operations:
        fewest = min(work.done_by.get(connection, 0) for connection in work.open)
        result.slowest = fewest * in_flight / result.operations
    if not result.errors and result.operations + result.refused != total and not work.out_of_time:
        result.failed(f"{result.operations} operations of {total} came to an end")
    result.note_latencies(work.latencies)
    return result


class Bodies:
    """Contents that differ by key and cost nothing to make: slices of one random buffer."""

    def __init__(self, size: int, seed: int = 1) -> None:
        self._size = size
        source, length = random.Random(seed), size + 4096
        # a MiB at a time: randbytes counts bits in a C int, so it has a limit of 256 MiB
        self._buffer = memoryview(
            b"".join(source.randbytes(min(MIB, length - start)) for start in range(0, length, MIB))
        )
        self._digests: dict[int, str] = {}

    def of(self, number: int) -> memoryview:
        start = number * 7 % 4096
        return self._buffer[start : start + self._size]

    def sha256(self, number: int) -> str:
        """The SHA-256 of a body, computed once for each of the 4,096 slices, so that it costs little."""
        start = number * 7 % 4096
        found = self._digests.get(start)
        if found is None:
            found = self._digests[start] = hashlib.sha256(self.of(number)).hexdigest()
        return found


async def once(target: Target, head: bytes, *, silence_s_max: float = SILENCE_S_MAX) -> bytes:
    """Makes one request on a new connection. Raises WrongAnswer, OSError."""
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
    sign, path = Signer(target), path_of(bucket, prefix)

    def put(number: int) -> Ask:
        head = sign.head("PUT", f"{path}{number:08d}", sha256=bodies.sha256(number), length=size)
        return Ask(head, bodies.of(number))

    return put


def overwriting(target: Target, bucket: str, key: str, bodies: Bodies, size: int) -> Operation:
    sign, path = Signer(target), path_of(bucket, key)

    def put(number: int) -> Ask:
        return Ask(sign.head("PUT", path, sha256=bodies.sha256(number), length=size), bodies.of(number))

    return put


def making_buckets(target: Target, prefix: str) -> Operation:
    sign = Signer(target)

    def make(number: int) -> Ask:
        return Ask(sign.head("PUT", path_of(f"{prefix}{number:05d}", "")))

    return make


def getting(target: Target, bucket: str, prefix: str, bodies: Bodies, count: int) -> Operation:
    sign, path = Signer(target), path_of(bucket, prefix)

    def get(number: int) -> Ask:
        number = number * 7919 % count
        return Ask(sign.head("GET", f"{path}{number:08d}"), expect=bodies.of(number))

    return get


def heading(target: Target, bucket: str, prefix: str, count: int, size: int) -> Operation:
    sign, path = Signer(target), path_of(bucket, prefix)

    def check(answered: Connection) -> None:
        if answered.announced != size:
            raise WrongAnswer(f"HEAD says {answered.announced} bytes for an object of {size}")

    def head(number: int) -> Ask:
        return Ask(sign.head("HEAD", f"{path}{number * 7919 % count:08d}"), head_only=True, check=check)

    return head


def listing(target: Target, bucket: str, prefix: str, count: int, *, in_order: bool = False) -> Operation:
    """Pages of 1,000 keys from random places in the bucket, or in order. Checks the keys of each page."""
    sign = Signer(target)

    def page(number: int) -> Ask:
        first = min(number * 1000, count - 2) if in_order else number * 1009 % max(count - 1001, 1)
        wanted, next_key = min(1000, count - first - 1), f"{prefix}{first + 1:08d}".encode()

        def check(answered: Connection) -> None:
            found = answered.kept.count(b"<Key>")
            if found != wanted or next_key not in answered.kept:
                raise WrongAnswer(f"a page of {found} keys instead of {wanted}")

        query = f"list-type=2&max-keys=1000&prefix={prefix}&start-after={prefix}{first:08d}"
        return Ask(sign.head("GET", f"/{bucket}", query), check=check)

    return page


def listing_written(target: Target, bucket: str, prefix: str, count: int, bodies: Bodies, size: int) -> Operation:
    """In turn a page of ``listing``, and an overwrite, with the same bytes, of a key on such a page."""
    page, sign, path = listing(target, bucket, prefix, count), Signer(target), path_of(bucket, prefix)

    def either(number: int) -> Ask:
        if number % 2:
            return page(number // 2)
        key = (number // 2 * 1009 + 500) % count
        return Ask(sign.head("PUT", f"{path}{key:08d}", sha256=bodies.sha256(key), length=size), bodies.of(key))

    return either

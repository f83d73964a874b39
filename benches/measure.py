"""Measures the rows of one server in their order. Later rows read what earlier rows wrote; the earlier rows run also
when only the later ones are wanted.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from secrets import token_hex
from typing import NamedTuple

from benches import mixed, rows
from benches.rows import KIB, READ_BACK, ROWS, Bodies, Operation, Result, Row, drive
from benches.s3client import SILENCE_S_MAX, connect
from benches.servers import Server

LATE_S = 1.5
"""Work that servers do after a write counts for the row or the burden that wrote: a storage node puts rows into LMDB
after a second.
"""

MEMORY_SAMPLE_S = 0.2

BUCKETS = 998
"""A user may have 1,000, as on AWS; one is the trial cluster's own, and one is the benchmark's."""

OVERWRITES_MAX = 100_000
IDLE_CONNECTIONS = 1000
BURDEN_S_MAX = 1800.0

OnResult = Callable[[Result], None]


class Stage:
    """One bucket of one server. ``scale``: the amount of work, relative to the rows."""

    def __init__(self, server: Server, scale: float, *, silence_s_max: float = SILENCE_S_MAX) -> None:
        self.server = server
        self.scale = scale
        self.bucket = f"bench-{token_hex(4)}"
        self._silence_s_max = silence_s_max
        self._bodies: dict[int, Bodies] = {}
        self.generation = 0
        """Part of the keys. It grows before a row is repeated, so that PUTs make new keys: overwriting costs more."""

    async def open(self) -> None:
        """Makes the bucket. Raises WrongAnswer, OSError."""
        await rows.make_bucket(self.server.target, self.bucket, silence_s_max=self._silence_s_max)

    def bodies(self, size: int) -> Bodies:
        if size not in self._bodies:
            self._bodies[size] = Bodies(size)
        return self._bodies[size]

    def prefix(self, row: Row) -> str:
        """The prefix of a row's keys. Each row of PUTs has its own."""
        return f"{row.name}-{self.generation}-"

    def operation(self, row: Row) -> Operation:
        target, bucket = self.server.target, self.bucket
        if row.kind == "put":
            return rows.putting(target, bucket, self.prefix(row), self.bodies(row.size_bytes), row.size_bytes)
        if row.kind == "hot":
            return rows.overwriting(target, bucket, self.prefix(row), self.bodies(row.size_bytes), row.size_bytes)
        if row.kind == "multipart":
            return mixed.uploading(target, bucket, self.prefix(row), self.bodies(row.size_bytes), row.size_bytes)
        source = ROWS[row.reads]
        prefix, count = self.prefix(source), source.count(self.scale)
        if row.kind == "get":
            return rows.getting(target, bucket, prefix, self.bodies(row.size_bytes), count)
        if row.kind == "range":
            bodies = self.bodies(source.size_bytes)
            return mixed.ranging(target, bucket, prefix, bodies, count, source.size_bytes, row.size_bytes)
        if row.kind == "mix":
            bodies = self.bodies(row.size_bytes)
            return mixed.mixing(target, bucket, self.prefix(row), prefix, bodies, count, row.size_bytes)
        if row.kind == "head":
            return rows.heading(target, bucket, prefix, count, source.size_bytes)
        if row.kind == "list-written":
            return rows.listing_written(
                target, bucket, prefix, count, self.bodies(source.size_bytes), source.size_bytes
            )
        return rows.listing(target, bucket, prefix, count, in_order=row.kind == "list-first")

    async def measure(self, row: Row) -> Result:
        """Runs a row. Reads some of the objects that it wrote and compares them."""
        result = await self.run(
            row.name,
            self.operation(row),
            in_flight=row.in_flight,
            total=row.count(self.scale),
            size=0 if row.kind == "mix" else row.size_bytes,
            writes=row.writes,
            contended=row.kind == "hot",
            pause_s=row.pause_s,
        )
        if row.kind in ("put", "multipart") and not result.errors:
            total = row.count(self.scale)
            read = rows.getting(self.server.target, self.bucket, self.prefix(row), self.bodies(row.size_bytes), total)
            again = await drive(
                row.name,
                self.server.target,
                read,
                in_flight=2,
                total=min(READ_BACK, total),
                silence_s_max=self._silence_s_max,
            )
            result.errors, result.first_error = again.errors, again.first_error
            if again.errors:
                result.operations = 0
        return result

    async def run(
        self,
        name: str,
        operation: Operation,
        *,
        in_flight: int,
        total: int,
        size: int = 0,
        writes: bool = False,
        seconds_max: float = 0.0,
        say: Callable[[str], None] | None = None,
        contended: bool = False,
        pause_s: float = 0.0,
    ) -> Result:
        """Runs any operation as a row, and adds the cost for the server's processes. See ``drive``."""
        server = self.server
        server.forget_peaks()
        cpu, disk = server.cpu_seconds(), server.disk_bytes() if writes and size else 0
        own = server.own_bytes()
        sampler = asyncio.create_task(_sample_memory(server, own))
        try:
            result = await drive(
                name,
                server.target,
                operation,
                in_flight=in_flight,
                total=total,
                bytes_each=size,
                silence_s_max=self._silence_s_max,
                seconds_max=seconds_max,
                say=say,
                contended=contended,
                pause_s=pause_s,
            )
            if writes:
                await asyncio.sleep(LATE_S)
        finally:
            sampler.cancel()
        result.cpu_s = {process: now - cpu.get(process, 0.0) for process, now in server.cpu_seconds().items()}
        result.peak_bytes, result.own_bytes = server.peak_bytes(), own
        if writes and result.bytes and server.folder is not None:
            result.disk_bytes_per_byte = (server.disk_bytes() - disk) / result.bytes
        return result


async def _sample_memory(server: Server, highest: dict[str, int]) -> None:
    """Runs until it is cancelled. It samples often enough for transfers of megabytes, and costs a few hundred
    microseconds a second.
    """
    while True:
        await asyncio.sleep(MEMORY_SAMPLE_S)
        for name, found in server.own_bytes().items():
            highest[name] = max(highest.get(name, 0), found)


async def measure(
    server: Server, wanted: Sequence[str], scale: float, on_result: OnResult, *, silence_s_max: float = SILENCE_S_MAX
) -> list[Result]:
    """Measures the wanted rows that this server supports. Ends after the first row that fails, because the server is
    broken then.

    Raises WrongAnswer or OSError when it cannot make a bucket.
    """
    stage = Stage(server, scale, silence_s_max=silence_s_max)
    await stage.open()
    chosen = [row for row in ROWS.values() if row.name in wanted and (server.lose is not None or not row.degraded)]
    needed = {row.reads for row in chosen if row.reads}
    results: list[Result] = []
    lost = False
    for row in [row for row in ROWS.values() if row in chosen or row.name in needed]:
        if row.degraded and not lost and server.lose is not None:
            await asyncio.to_thread(server.lose)
            lost = True
        result = await stage.measure(row)
        if row in chosen or result.errors:
            results.append(result)
            on_result(result)
        if result.errors:
            break
    return results


class _Burden(NamedTuple):
    """What fills a store between two measurements. ``what``: is more in the store than before."""

    name: str
    what: str
    operation: Operation
    in_flight: int
    total: int
    size: int


def _burdens(stage: Stage, objects: int) -> tuple[_Burden, ...]:
    target, bucket, size = stage.server.target, stage.bucket, 4 * KIB
    fill = rows.putting(target, bucket, "fill-", stage.bodies(size), size)
    overwrite = rows.overwriting(target, bucket, "again", stage.bodies(size), size)
    make_buckets = rows.making_buckets(target, f"many-{token_hex(3)}-")
    overwrites = min(max(objects, 1000), OVERWRITES_MAX)
    return (
        _Burden("fill-4k-64", "more objects in the bucket", fill, 64, objects, size),
        _Burden("overwrite-4", "overwrites of one key", overwrite, 4, overwrites, size),
        _Burden("bucket-4", "more buckets", make_buckets, 4, BUCKETS, 0),
    )


class _Flat:
    """What ``flat`` measures: the small rows, again and again. ``stages``: (contents of the store, its rows)."""

    def __init__(self, stage: Stage, on_result: OnResult, say: Callable[[str], None], seconds_max: float) -> None:
        self.stages: list[tuple[str, list[Result]]] = []
        self._stage = stage
        self._on_result = on_result
        self._say = say
        self._seconds_max = seconds_max

    async def warm_up(self) -> bool:
        """Returns False after a failure, as all of these do."""
        warm = await self._stage.measure(ROWS["put-4k-64"])
        if warm.errors:
            self._on_result(warm)
            self.stages.append(("warm-up", [warm]))
        return not warm.errors

    async def measure(self, after: str) -> bool:
        self._say(f"-- {after}")
        self._stage.generation += 1
        found: list[Result] = []
        self.stages.append((after, found))
        for name in ("put-4k-64", "get-4k-64", "head-64", "list-1000-4"):
            result = await self._stage.measure(ROWS[name])
            found.append(result)
            self._on_result(result)
            if result.errors:
                return False
        return True

    async def bear(self, burden: _Burden) -> bool:
        result = await self._stage.run(
            burden.name,
            burden.operation,
            in_flight=burden.in_flight,
            total=burden.total,
            size=burden.size,
            writes=True,
            seconds_max=self._seconds_max,
            say=self._say,
        )
        self._on_result(result)
        self.stages[-1][1].append(result)
        if result.errors or not result.operations:
            return False
        return await self.measure(f"{result.operations:,} {burden.what}")


async def flat(
    server: Server,
    objects: int,
    scale: float,
    on_result: OnResult,
    say: Callable[[str], None],
    *,
    silence_s_max: float = SILENCE_S_MAX,
    seconds_max: float = BURDEN_S_MAX,
) -> list[tuple[str, list[Result]]]:
    """Measures the small rows in an empty, warm store, and again after each burden: (contents of the store, its rows).
    Ends after a failure.

    A burden stops growing after ``seconds_max``; the name of its stage says how large it is.
    """
    stage = Stage(server, scale, silence_s_max=silence_s_max)
    await stage.open()
    rows = _Flat(stage, on_result, say, seconds_max)
    fine = await rows.warm_up() and await rows.measure("empty")
    for burden in _burdens(stage, objects):
        fine = fine and await rows.bear(burden)
    if fine:
        async with contextlib.AsyncExitStack() as open_connections:
            for _ in range(IDLE_CONNECTIONS):
                connection = await connect(server.target)
                open_connections.callback(connection.close)
            await rows.measure(f"{IDLE_CONNECTIONS:,} idle connections")
    return rows.stages

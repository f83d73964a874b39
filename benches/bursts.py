"""``benches/compare REV-A REV-B --bursts``: the servers of two revisions run at once, and get bursts of a row in turn.

The speed of a virtual machine may double within minutes, so two whole runs that follow each other do not compare. A
burst lasts about half a second, and its neighbour has nearly the same machine. Each pair of bursts gives a ratio; the
medians of the ratios count, with their confidence intervals. CPU time is what the processes of a server used during its
burst, in nanoseconds. It includes threads that have ended.

The server that gets no burst does its idle work meanwhile, on the same cores. Rows of PUTs write new keys in each
burst, so disks fill by ``pairs`` bursts.
"""

from __future__ import annotations

import asyncio
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from benches.measure import LATE_S, Stage
from benches.report import is_large
from benches.rows import ROWS, Result, Row, drive
from benches.servers import Server

KINDS = ("put", "get", "head", "list", "range", "multipart")
"""Rows of other kinds change what the next burst finds."""

SURE = 0.95
"""Confidence of the interval that is shown."""


def check(names: Sequence[str]) -> None:
    """Raises ValueError for a row that has no bursts."""
    unfit = [name for name in names if ROWS[name].kind not in KINDS or ROWS[name].degraded or ROWS[name].pause_s]
    if unfit:
        raise ValueError(f"no bursts of {', '.join(unfit)}: they change what the next burst finds, or rest")


def cpu_s(pid: int) -> float:
    """User and system time of a process since its start, with the threads that have ended. Raises OSError."""
    return time.clock_gettime(~pid << 3 | 2)  # as clock_getcpuclockid(3) makes it


def interval(values: Sequence[float]) -> tuple[float, float]:
    """The confidence interval of the median, from the order of the values (Conover, "Practical Nonparametric
    Statistics", 3.2). Of fewer than six values: lowest and highest.
    """
    ordered, count, below = sorted(values), len(values), 0.0
    for rank in range(count // 2):
        below += math.comb(count, rank) / 2**count
        if below > (1 - SURE) / 2:
            return ordered[max(rank - 1, 0)], ordered[count - max(rank, 1)]
    return ordered[0], ordered[-1]


class Burst(NamedTuple):
    """One burst of one server, without errors."""

    seconds: float
    cpu_s: float
    client_cpu_s: float
    operations: int
    bytes: int


class Pair(NamedTuple):
    """Bursts of both servers, one right after the other."""

    first: Burst
    second: Burst

    @property
    def speed(self) -> float:
        return self.first.seconds / self.second.seconds

    @property
    def cpu(self) -> float:
        return self.second.cpu_s / self.first.cpu_s


class Failed(Exception):
    """An operation failed, or a byte was wrong."""


class Side:
    """One server and its bucket. ``scale``: the work of a burst, relative to the row."""

    def __init__(self, server: Server, scale: float) -> None:
        self._server = server
        self._stage = Stage(server, scale)
        self._bursts = 0

    async def open(self, rows: Sequence[Row]) -> None:
        """Makes the bucket, and the objects that the rows read. Raises Failed, WrongAnswer, OSError."""
        await self._stage.open()
        for name in dict.fromkeys(row.reads for row in rows if row.reads):
            _checked(await self._stage.measure(ROWS[name]))

    async def burst(self, row: Row, count: int) -> Burst:
        """``count`` operations of a row. Raises Failed."""
        server, stage = self._server, self._stage
        if row.writes:  # under keys of its own: overwriting costs more
            self._bursts += 1
            stage.generation = self._bursts
        operation = stage.operation(row)
        stage.generation = 0
        before = self._cpu()
        result = await drive(
            row.name, server.target, operation, in_flight=row.in_flight, total=count, bytes_each=row.size_bytes
        )
        if row.writes:
            await asyncio.sleep(LATE_S)
        used = sum(after - before[name] for name, after in self._cpu().items())
        _checked(result)
        return Burst(result.seconds, used, result.client_cpu_s, result.operations, result.bytes)

    def _cpu(self) -> dict[str, float]:
        return {name: cpu_s(pid) for name, pid in self._server.processes.items()}


def _checked(result: Result) -> None:
    if result.errors:
        raise Failed(result.first_error)


def count_of(row: Row, scale: float) -> int:
    """The operations of a burst."""
    return max(int(row.total * scale), row.in_flight)


async def measured(
    servers: tuple[Server, Server],
    names: Sequence[str],
    *,
    pairs: int,
    scale: float,
    say: Callable[[str], None],
) -> dict[str, list[Pair]]:
    """``pairs`` pairs of bursts of each row, after one pair to warm up. Raises Failed, WrongAnswer, OSError."""
    rows = [ROWS[name] for name in names]
    first, second = (Side(server, scale) for server in servers)
    for side in (first, second):
        await side.open(rows)
    found: dict[str, list[Pair]] = {}
    for row in rows:
        count = count_of(row, scale)
        kept = found[row.name] = []
        for number in range(-1, pairs):
            if number % 2:
                late = await second.burst(row, count)
                pair = Pair(await first.burst(row, count), late)
            else:
                pair = Pair(await first.burst(row, count), await second.burst(row, count))
            if number >= 0:
                kept.append(pair)
        say(line(row.name, kept))
    return found


def shown(ratios: Sequence[float]) -> str:
    """``0.968 (0.961 to 0.975)``: the median and its confidence interval."""
    low, high = interval(ratios)
    return f"{statistics.median(ratios):.3f} ({low:.3f} to {high:.3f})"


def _cells(row: str, pairs: Sequence[Pair]) -> list[str]:
    cells = [row]
    large = is_large(Result(row, operations=pairs[0].first.operations, bytes=pairs[0].first.bytes))
    for bursts in zip(*pairs, strict=True):
        speed = statistics.median(
            burst.bytes / 1e6 / burst.seconds if large else burst.operations / burst.seconds for burst in bursts
        )
        cpu_us = statistics.median(1e6 * burst.cpu_s / burst.operations for burst in bursts)
        cells.append(f"{speed:,.0f} {'MB/s' if large else '/s'}, {cpu_us:,.0f} us")
    return [*cells, shown([pair.speed for pair in pairs]), shown([pair.cpu for pair in pairs])]


def line(row: str, pairs: Sequence[Pair]) -> str:
    name, first, second, speed, cpu = _cells(row, pairs)
    return f"{name:20} {first:>24} | {second:>24} | speed {speed} | CPU {cpu}"


def table(names: tuple[str, str], found: Mapping[str, Sequence[Pair]]) -> str:
    """One line for each row, as Markdown."""
    head = (
        f"| row | {names[0]} | {names[1]} | speed, {names[1]} to {names[0]} | CPU an operation, {names[1]} to"
        f" {names[0]} |"
    )
    return "\n".join(
        [head, "|---|---|---|---|---|", *("| " + " | ".join(_cells(*item)) + " |" for item in found.items())]
    )

"""Results of several runs as one table: medians with their spread, as Markdown and as JSON."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from benches.rows import MIB, ROWS, Result

LARGE_BYTES = MIB
"""The speed of a row is in MB/s when its operations have this size or more, otherwise in operations per second."""


def speed(result: Result) -> float:
    """MB/s or operations per second, by the size of the row's operations."""
    return result.megabytes_per_second if is_large(result) else result.per_second


def is_large(result: Result) -> bool:
    return result.operations > 0 and result.bytes / result.operations >= LARGE_BYTES


@dataclass(frozen=True)
class Summary:
    """One row of one server over all runs. ``low`` and ``high``: the speed of the slowest and the fastest run.
    ``peak_bytes`` and ``own_bytes``: the highest of all runs. The others are medians.
    """

    server: str
    row: str
    runs: int
    unit: str
    speed: float
    low: float
    high: float
    p50_ms: float
    p99_ms: float
    max_ms: float
    cpu_us: dict[str, float]
    client_cpu_us: float
    peak_bytes: dict[str, int]
    own_bytes: dict[str, int]
    disk_bytes_per_byte: float
    errors: int
    first_error: str

    def as_dict(self) -> dict[str, Any]:
        return {name: _rounded(getattr(self, name)) for name in self.__dataclass_fields__}


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _rounded(one) for name, one in value.items()}
    return round(value, 3) if isinstance(value, float) else value


def summarize(server: str, results: Sequence[Result]) -> Summary:
    """``results`` of one row, one for each run. Of a run with errors only the errors count."""
    good = [result for result in results if not result.errors]
    speeds = [speed(result) for result in good] or [0.0]
    names = {name for result in good for name in result.cpu_s}

    def median(values: Iterable[float]) -> float:
        listed = list(values)
        return statistics.median(listed) if listed else 0.0

    return Summary(
        server=server,
        row=results[0].row,
        runs=len(good),
        unit="MB/s" if good and is_large(good[0]) else "/s",
        speed=statistics.median(speeds),
        low=min(speeds),
        high=max(speeds),
        p50_ms=median(result.p50_ms for result in good),
        p99_ms=median(result.p99_ms for result in good),
        max_ms=median(result.max_ms for result in good),
        cpu_us={
            name: median(1e6 * result.cpu_s.get(name, 0.0) / result.operations for result in good)
            for name in sorted(names)
        },
        client_cpu_us=median(1e6 * result.client_cpu_s / result.operations for result in good),
        peak_bytes={name: max(result.peak_bytes.get(name, 0) for result in good) for name in sorted(names)},
        own_bytes={name: max(result.own_bytes.get(name, 0) for result in good) for name in sorted(names)},
        disk_bytes_per_byte=median(result.disk_bytes_per_byte for result in good),
        errors=sum(result.errors for result in results),
        first_error=next((result.first_error for result in results if result.first_error), ""),
    )


def line(server: str, result: Result) -> str:
    """One result as a line, for the output during a run."""
    unit = "MB/s" if is_large(result) else "/s"
    words = [f"{server:28} {result.row:20} {speed(result):9.1f} {unit:4}"]
    words.append(f"p50 {result.p50_ms:.2f}  p99 {result.p99_ms:.2f}  max {result.max_ms:.1f} ms")
    if result.cpu_s:
        words.append(
            f"cpu {result.cpu_us_per_operation:.0f} us/op, client"
            f" {1e6 * result.client_cpu_s / max(result.operations, 1):.0f}"
        )
    if result.peak_bytes:
        words.append(f"peak {max((result.own_bytes or result.peak_bytes).values()) / MIB:.0f} MiB")
    if result.disk_bytes_per_byte:
        words.append(f"disk x{result.disk_bytes_per_byte:.2f}")
    if result.refused or result.slowest:
        words.append(
            f"refused {result.refused}, unknown {result.unknown}, slowest client {result.slowest:.2f} of the mean"
        )
    if result.errors:
        words.append(f"ERRORS {result.errors}: {result.first_error}")
    return "  ".join(words)


def markdown(summaries: Sequence[Summary]) -> str:
    """A table with one line for each row and server, ordered by row. CPU is in microseconds per operation, for each
    process, with the load generator's own next to it. Memory is the peak of each process: allocated (resident, with
    mapped files).
    """
    several = any(summary.runs > 1 for summary in summaries)
    lines = [
        "| row | server | speed |"
        + (" slowest to fastest run |" if several else "")
        + " p50, p99, max ms | server CPU us an operation | client's | peak memory MiB | disk |",
        "|---|---|---|" + ("---|" if several else "") + "---|---|---|---|---|",
    ]
    order = {row: number for number, row in enumerate(dict.fromkeys(summary.row for summary in summaries))}
    for summary in sorted(summaries, key=lambda one: order[one.row]):
        if not summary.runs:
            lines.append(
                f"| {summary.row} | {summary.server} | failed: {summary.first_error} |"
                + (" |" if several else "")
                + " | | | | |"
            )
            continue
        total = sum(summary.cpu_us.values())
        by_name = ", ".join(f"{name} {value:,.0f}" for name, value in summary.cpu_us.items())
        memory = ", ".join(
            f"{name} {value / MIB:.0f} ({summary.peak_bytes[name] / MIB:.0f})"
            for name, value in summary.own_bytes.items()
        )
        cells = [summary.row, summary.server, f"{summary.speed:,.1f} {summary.unit}"]
        cells += [f"{summary.low:,.1f} to {summary.high:,.1f}"] if several else []
        cells += [f"{summary.p50_ms:.2f}, {summary.p99_ms:.2f}, {summary.max_ms:.1f}"]
        cells += [f"{total:,.0f} ({by_name})" if by_name else "", f"{summary.client_cpu_us:,.0f}", memory]
        cells += [f"x{summary.disk_bytes_per_byte:.2f}" if summary.disk_bytes_per_byte else ""]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def flat_markdown(stages: Sequence[tuple[str, Sequence[Result]]]) -> str:
    """The cost of each row after each burden, relative to the empty store: CPU of all server processes per operation,
    and time per operation.
    """
    empty = {result.row: result for result in stages[0][1]}
    rows = [result.row for result in stages[0][1] if result.row in ROWS and not result.errors]
    lines = [
        "| the store holds | " + " | ".join(f"{row}: CPU, time" for row in rows) + " |",
        "|---|" + "---|" * len(rows),
    ]
    for number, (after, results) in enumerate(stages):
        found = {result.row: result for result in results if not result.errors}
        cells = []
        for row in rows:
            one, base = found.get(row), empty[row]
            if one is None:
                cells.append("failed")
            elif number == 0:
                cells.append(f"{one.cpu_us_per_operation:,.0f} us, {1e6 / one.per_second:,.0f} us")
            else:
                cpu = one.cpu_us_per_operation / base.cpu_us_per_operation if base.cpu_us_per_operation else 0.0
                cells.append(f"x {cpu:.2f}, x {base.per_second / one.per_second:.2f}")
        lines.append(f"| {after} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"

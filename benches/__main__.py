"""``benches/run``: rows of S3 work against storaged, a peer, or any endpoint. Exit 1 when a single operation failed or a byte was wrong."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from secrets import token_hex

import uvloop

from benches import rows
from benches.rows import KIB, MIB, Bodies, Result, drive
from benches.servers import Server, endpoint, seaweedfs_default, seaweedfs_durable, storaged_cluster

ROWS = ("put-4k-64", "put-4k-1", "get-4k-64", "head-64", "put-64m-4", "get-64m-4", "list-1000-4")
HEAVY_ROWS = ("put-256m-64", "get-256m-64")
"""Only when asked for: 16 GiB each way, for the memory of 64 large transfers at once."""


async def measure(server: Server, wanted: list[str], scale: float) -> list[Result]:
    """The rows in order: later ones read what earlier ones wrote, which is written anyway when only they are asked for."""
    bucket = f"bench-{token_hex(4)}"
    target = server.target
    await rows.make_bucket(target, bucket)
    small, large = Bodies(4 * KIB), Bodies(64 * MIB)
    small_count, large_count = max(int(8000 * scale), 1100), max(int(12 * scale), 4)
    results: list[Result] = []

    async def row(name: str, operation: rows.Operation, in_flight: int, total: int, size: int = 0, *, needed: bool = False) -> None:
        if name not in wanted and not needed:
            return
        server.forget_peaks()
        cpu, disk = server.cpu_seconds(), server.disk_bytes()
        result = await drive(name, target, operation, in_flight=in_flight, total=total, bytes_each=size)
        result.server_cpu_s = server.cpu_seconds() - cpu
        result.peak_memory_bytes = server.peak_memory_bytes()
        if name.startswith("put") and result.bytes and server.folder is not None:
            result.disk_bytes_per_byte = (server.disk_bytes() - disk) / result.bytes
        if name in wanted or result.errors:
            results.append(result)
            show(server.name, result)

    reads = {"get-4k-64", "head-64", "list-1000-4"} & set(wanted)
    await row("put-4k-64", rows.putting(target, bucket, "s", small, 4 * KIB), 64, small_count, 4 * KIB, needed=bool(reads))
    await row("put-4k-1", rows.putting(target, bucket, "o", small, 4 * KIB), 1, max(int(600 * scale), 100), 4 * KIB)
    await row("get-4k-64", rows.getting(target, bucket, "s", small, small_count), 64, small_count * 2, 4 * KIB)
    await row("head-64", rows.heading(target, bucket, "s", small_count), 64, small_count * 2)
    await row("put-64m-4", rows.putting(target, bucket, "l", large, 64 * MIB), 4, large_count, 64 * MIB, needed="get-64m-4" in wanted)
    await row("get-64m-4", rows.getting(target, bucket, "l", large, large_count), 4, large_count * 2, 64 * MIB)
    await row("list-1000-4", rows.listing(target, bucket, "s", small_count), 4, max(int(400 * scale), 40))
    if {"put-256m-64", "get-256m-64"} & set(wanted):
        huge = Bodies(256 * MIB)
        await row("put-256m-64", rows.putting(target, bucket, "h", huge, 256 * MIB), 64, 64, 256 * MIB, needed="get-256m-64" in wanted)
        await row("get-256m-64", rows.getting(target, bucket, "h", huge, 64), 64, 64, 256 * MIB)
    return results


def show(server: str, result: Result) -> None:
    speed = f"{result.megabytes_per_second:8.1f} MB/s" if result.bytes > 64 * MIB else f"{result.per_second:8.1f} /s  "
    space = f"  disk x{result.disk_bytes_per_byte:.2f}" if result.disk_bytes_per_byte else ""
    cpu = f"  cpu {1e6 * result.server_cpu_s / max(result.operations, 1):.0f} us/op" if result.server_cpu_s else ""
    memory = f"  peak {result.peak_memory_bytes / MIB:.0f} MiB" if result.peak_memory_bytes else ""
    errors = f"  ERRORS {result.errors}: {result.first_error}" if result.errors else ""
    print(
        f"{server:32} {result.row:12} {speed}  p50 {result.p50_ms:.2f}  p99 {result.p99_ms:.2f}  max {result.max_ms:.1f} ms{cpu}{memory}{space}{errors}",
        flush=True,
    )


def main() -> int:
    parser = argparse.ArgumentParser(prog="benches/run", description=__doc__)
    parser.add_argument("--rows", default=",".join(ROWS), help=f"comma separated: {', '.join(ROWS + HEAVY_ROWS)}")
    parser.add_argument("--scale", type=float, default=1.0, help="how much work, relative to the default")
    parser.add_argument("--peer", choices=["seaweedfs"], help="the same rows against this peer too, default and durable, in the same run")
    parser.add_argument("--endpoint", help="measure this endpoint instead (http://127.0.0.1:8333)")
    parser.add_argument("--access")
    parser.add_argument("--secret")
    parser.add_argument("--region", default="us-east-1")
    parser.add_argument("--dir", type=Path, help="where the servers keep their data (default: the temporary folder)")
    parser.add_argument("--json", type=Path, help="write all results to this file too")
    arguments = parser.parse_args()
    wanted = arguments.rows.split(",")
    if unknown := [name for name in wanted if name not in ROWS + HEAVY_ROWS]:
        parser.error(f"unknown rows: {', '.join(unknown)}; there are {', '.join(ROWS + HEAVY_ROWS)}")
    servers: list[Callable[[], AbstractContextManager[Server]]] = []
    if arguments.endpoint:
        if not (arguments.access and arguments.secret):
            parser.error("--endpoint wants --access and --secret")
        servers.append(lambda: endpoint(arguments.endpoint, arguments.access, arguments.secret, arguments.region))
    else:
        servers.append(lambda: storaged_cluster(arguments.dir))
    if arguments.peer:
        servers += [lambda: seaweedfs_durable(arguments.dir), lambda: seaweedfs_default(arguments.dir)]
    report: dict[str, list[dict[str, object]]] = {}
    failed = False
    for make in servers:
        with make() as server:
            try:
                results = uvloop.run(measure(server, wanted, arguments.scale))
            except Exception as error:
                print(f"{server.name}: {error}", file=sys.stderr)
                failed = True
                continue
            failed = failed or any(result.errors for result in results)
            report[server.name] = [result.as_dict() for result in results]
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")
    return 1 if failed else 0


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        sys.exit(main())
    sys.exit(130)

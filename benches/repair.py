"""``python -m benches.repair``: how fast work in the background goes, and what clients notice of it.

Rows, each on fresh servers:

    recode   a trial cluster. Objects are written while a rack is away, under a weaker profile; the rack returns, and
             repair recodes them all to their target
    move     one process with eight disks. A disk is lost, and repair rebuilds its fragments on the other disks
    catchup  a trial cluster. Ten times as many objects of 4 KiB are written while a rack is away; it returns, and gets
             their rows and copies (of each tenth object)
    restart  as ``catchup``, in a cluster that holds ``--stored`` objects before. Says too when the rack's node serves
             again. Only on request
    collect  one process with eight disks. All objects are deleted, and garbage collection gives their room back

While that work goes on, one connection reads a small object again and again. ``--revisions A,B`` measures two revisions
in turn and prints the ratios of B to A.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import hashlib
import json
import os
import shutil
import socket
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benches.compare import worktree
from benches.s3client import Connection, Signer, Target, connect, path_of
from benches.servers import (
    RACKS,
    Installation,
    Server,
    end_on_sigterm,
    free_port,
    make_single,
    stop,
    storaged_installation,
)

BUCKET = "repair"
SMALL = os.urandom(4096)
WRITERS, WRITERS_BEFORE = 8, 64
REPAIR_TIMEOUT_S = 600.0
RECODE_DELAY_S = 10
RETIRE_DELAY_S = 10
DONE = 0.95
"""Share of the bytes that has to be copied or given back: a segment with a live block keeps what the block needs."""
SMALL_FACTOR = 10


@dataclass
class Outcome:
    """``mb_s``, ``objects_s``: of objects brought back to their target, or of garbage. ``cpu_ms_mb``: CPU time of all
    servers together for a megabyte. ``get_ms``: p50 and p99 of the reads meanwhile; ``calm_ms``: before it, where that
    was measured. ``up_s``: from the start of the node until its disks serve.
    """

    mb_s: float
    objects_s: float
    cpu_ms_mb: float
    get_ms: tuple[float, float]
    calm_ms: tuple[float, float] | None = None
    up_s: float | None = None


class Admin:
    """The admin API of a node, on its Unix socket: a command of ``storaged`` would take half a second of a core."""

    def __init__(self, folder: Path) -> None:
        self._path = min(folder.rglob("admin.sock"), key=lambda path: ("gateway" not in str(path), len(str(path))))

    def get(self, path: str) -> dict[str, Any]:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(str(self._path))
            connection.sendall(f"GET {path} HTTP/1.1\r\nHost: storaged\r\nConnection: close\r\n\r\n".encode())
            answer = b""
            while piece := connection.recv(65536):
                answer += piece
        found: dict[str, Any] = json.loads(answer[answer.index(b"{") : answer.rindex(b"}") + 1])
        return found

    def serves(self, node: str) -> bool:
        """True when a node is up, and all of its disks are well."""
        (found,) = [each for each in self.get("/v1/status")["nodes"] if each["name"] == node]
        return found["state"] == "up" and all(disk["state"] == "ok" for disk in found["disks"])

    def jobs(self) -> dict[str, Any]:
        return self.get("/v1/jobs")

    def whole(self, key: str) -> bool:
        """True when each replica has the object's row, and each disk its copy."""
        found = self.get(f"/v1/where?bucket={BUCKET}&key={key.encode().hex()}")
        return all(place["state"] == "ok" for place in (*found["fragments"], *found["replicas"]))


async def put(connection: Connection, signer: Signer, key: str, body: bytes) -> None:
    head = signer.head("PUT", path_of(BUCKET, key), sha256=hashlib.sha256(body).hexdigest(), length=len(body))
    await connection.request(head + body)


async def fill(target: Target, count: int, size: int, *, name: str = "large", writers: int = WRITERS) -> None:
    body, signer = os.urandom(size), Signer(target)
    keys = iter(range(count))

    async def writer() -> None:
        connection = await connect(target)
        for number in keys:
            await put(connection, signer, f"{name}-{number}", body)
        connection.close()

    await asyncio.gather(*(writer() for _ in range(writers)))


async def delete_all(target: Target, count: int) -> None:
    signer = Signer(target)
    keys = iter(range(count))

    async def deleter() -> None:
        connection = await connect(target)
        for number in keys:
            await connection.request(signer.head("DELETE", path_of(BUCKET, f"large-{number}")))
        connection.close()

    await asyncio.gather(*(deleter() for _ in range(WRITERS)))


class Reader:
    """Reads a small object again and again, and notes how long each read took."""

    def __init__(self, target: Target) -> None:
        self._target = target
        self.took_ms: list[float] = []

    async def run(self) -> None:
        connection, signer = await connect(self._target), Signer(self._target)
        while True:
            began = time.perf_counter()
            await connection.request(signer.head("GET", path_of(BUCKET, "small")))
            self.took_ms.append(1e3 * (time.perf_counter() - began))
            await asyncio.sleep(0.005)

    def take(self) -> tuple[float, float]:
        took, self.took_ms = sorted(self.took_ms), []
        return statistics.median(took), took[int(0.99 * (len(took) - 1))]


async def begin(target: Target) -> None:
    connection, signer = await connect(target), Signer(target)
    await connection.request(signer.head("PUT", path_of(BUCKET, "")))
    await put(connection, signer, "small", SMALL)
    connection.close()


async def repaired(admin: Admin, server: Server, count: int, size: int) -> Outcome:
    """Waits until repair has begun, and then until it is done."""
    target = server.target
    reader = Reader(target)
    cpu_before = sum(server.cpu_seconds().values())
    reading = asyncio.ensure_future(reader.run())
    end = time.monotonic() + REPAIR_TIMEOUT_S
    before = admin.jobs()["bytes_rebuilt"]
    await asyncio.sleep(1.0)
    while admin.jobs()["bytes_rebuilt"] == before:
        await asyncio.sleep(0.1)
        if time.monotonic() > end:
            raise SystemExit(f"repair does not begin: {admin.jobs()}")
    calm, began = reader.take(), time.monotonic()
    while True:
        found = admin.jobs()
        # a copy of the small object may be on the lost disk, and has to wait for it
        if found["objects_counted"] and not found["busy"] and found["objects_below_target"] <= 1:
            break
        await asyncio.sleep(0.2)
        if time.monotonic() > end:
            raise SystemExit(f"repair does not end: {found}")
    took = time.monotonic() - began
    busy = reader.take()
    reading.cancel()
    await asyncio.gather(reading, return_exceptions=True)
    megabytes = count * size / 1e6
    cpu_ms = 1e3 * (sum(server.cpu_seconds().values()) - cpu_before)
    return Outcome(megabytes / took, count / took, cpu_ms / megabytes, busy, calm)


@contextlib.contextmanager
def without_a_rack(
    tree: Path | None, parent: Path | None, count: int, size: int, stored: int = 0
) -> Iterator[tuple[Installation, Target]]:
    """A cluster in which objects were written while a rack was away, before its return. It held ``stored`` small
    objects before.
    """
    with storaged_installation(tree, parent, "s3") as storaged:
        ports = ("--s3-port", str(free_port()), "--admin-port", str(free_port()))
        storaged.start("dev", str(storaged.directory), *ports)
        storaged.status("HEALTHY")
        storaged.prepared()
        known = json.loads(storaged.run("env", "--json"))
        target = Target(known["endpoint"], known["access_key"], known["secret_key"], known["region"])
        asyncio.run(begin(target))
        asyncio.run(fill(target, stored, len(SMALL), name="stored", writers=WRITERS_BEFORE))
        storaged.run("dev", "kill", RACKS[2])
        storaged.status("DEGRADED", "AT_RISK")
        asyncio.run(fill(target, count, size))
        yield storaged, target


def start_rack(storaged: Installation, target: Target) -> Server:
    storaged.run("dev", "start", "n3")
    return Server("cluster", target, storaged.processes())


def recode(tree: Path | None, parent: Path | None, count: int, size: int) -> Outcome:
    with without_a_rack(tree, parent, count, size) as (storaged, target):
        server = start_rack(storaged, target)
        return asyncio.run(repaired(Admin(storaged.directory), server, count, size))


def catchup(tree: Path | None, parent: Path | None, count: int, _size: int) -> Outcome:
    return restart(tree, parent, count, 0)


def restart(tree: Path | None, parent: Path | None, count: int, stored: int) -> Outcome:
    count *= SMALL_FACTOR
    with without_a_rack(tree, parent, count, len(SMALL), stored) as (storaged, target):
        admin, left, began = Admin(storaged.directory), list(range(0, count, 10)), time.monotonic()
        server = start_rack(storaged, target)
        while not admin.serves("n3"):
            time.sleep(0.05)
        up_s = time.monotonic() - began

        def done() -> bool:
            while left and admin.whole(f"large-{left[-1]}"):
                left.pop()
            return not left

        outcome = asyncio.run(timed(server, count, count * len(SMALL) / 1e6, done))
        return replace(outcome, up_s=up_s)


@contextlib.contextmanager
def single(tree: Path | None, parent: Path | None, limits: str) -> Iterator[tuple[Installation, Path, Target]]:
    """One process with eight disks, its configuration, and how to reach it."""
    with storaged_installation(tree, parent, "state") as storaged:
        port = free_port()
        config = make_single(storaged.run, storaged.home, s3_port=port, disks=8)
        config.write_text(f"{config.read_text()}\n[limits]\n{limits}\n")
        storaged.start("run", str(config))
        storaged.status("HEALTHY")
        user = json.loads(storaged.run("user", "add", "bench", "--json"))
        yield storaged, config, Target(f"http://127.0.0.1:{port}", user["access_key"], user["secret_key"], "eu-fr-1")


def move(tree: Path | None, parent: Path | None, count: int, size: int) -> Outcome:
    with single(tree, parent, f"recode_delay_s = {RECODE_DELAY_S}") as (storaged, config, target):
        asyncio.run(begin(target))
        asyncio.run(fill(target, count, size))
        assert storaged.process is not None
        stop(storaged.process)
        shutil.rmtree(storaged.home / "disk8")
        storaged.start("run", str(config))
        storaged.status("DEGRADED", "AT_RISK")
        server = Server("single", target, storaged.processes())
        return asyncio.run(repaired(Admin(storaged.directory), server, count, size))


def allocated(home: Path) -> int:
    """Bytes that the file system allocated for the fragments of all disks."""
    return sum(512 * path.stat().st_blocks for path in home.rglob("segments/*"))


async def timed(server: Server, count: int, megabytes: float, done: Callable[[], bool]) -> Outcome:
    """The time from now until ``done``."""
    reader = Reader(server.target)
    cpu_before, began = sum(server.cpu_seconds().values()), time.monotonic()
    reading = asyncio.ensure_future(reader.run())
    while not done():
        await asyncio.sleep(0.05)
        if time.monotonic() > began + REPAIR_TIMEOUT_S:
            raise SystemExit("this work does not end")
    took = time.monotonic() - began
    cpu_ms = 1e3 * (sum(server.cpu_seconds().values()) - cpu_before)
    busy = reader.take()
    reading.cancel()
    await asyncio.gather(reading, return_exceptions=True)
    return Outcome(megabytes / took, count / took, cpu_ms / megabytes, busy)


async def collected(server: Server, home: Path, count: int, size: int) -> Outcome:
    """Deletes all objects, waits until collection has begun, and then until it is done."""
    await delete_all(server.target, count)
    full, end = allocated(home), time.monotonic() + REPAIR_TIMEOUT_S
    while allocated(home) >= full:
        await asyncio.sleep(0.05)
        if time.monotonic() > end:
            raise SystemExit("collection does not begin")
    return await timed(server, count, count * size / 1e6, lambda: allocated(home) < (1.0 - DONE) * full)


def collect(tree: Path | None, parent: Path | None, count: int, size: int) -> Outcome:
    with single(tree, parent, f"retire_delay_s = {RETIRE_DELAY_S}") as (storaged, _config, target):
        asyncio.run(begin(target))
        asyncio.run(fill(target, count, size))
        server = Server("single", target, storaged.processes())
        return asyncio.run(collected(server, storaged.home, count, size))


ROWS = {"recode": recode, "move": move, "catchup": catchup, "collect": collect, "restart": restart}


@contextlib.contextmanager
def trees(revisions: str) -> Iterator[list[tuple[str, Path | None]]]:
    """The source trees of the revisions; this one when none is named."""
    with contextlib.ExitStack() as stack:
        named = [name for name in revisions.split(",") if name]
        yield [stack.enter_context(worktree(name)) for name in named] or [("this tree", None)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="recode,move")
    parser.add_argument("--revisions", default="")
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument("--objects", type=int, default=200)
    parser.add_argument("--bytes", type=int, default=2_000_000)
    parser.add_argument("--stored", type=int, default=1_000_000, help="of restart: objects of 4 KiB")
    parser.add_argument("--dir", type=Path, default=Path(tempfile.gettempdir()))
    options = parser.parse_args()
    end_on_sigterm()
    found: dict[tuple[str, str], list[Outcome]] = {}
    with trees(options.revisions) as measured:
        for number in range(options.runs):
            for row in options.rows.split(","):
                for name, tree in measured if number % 2 == 0 else reversed(measured):
                    size = options.stored if row == "restart" else options.bytes
                    one = ROWS[row](tree, options.dir, options.objects, size)
                    found.setdefault((row, name), []).append(one)
                    calm = f" (before: {one.calm_ms[0]:.1f}, {one.calm_ms[1]:.1f})" if one.calm_ms else ""
                    up = f"; serves after {one.up_s:.1f} s" if one.up_s is not None else ""
                    print(
                        f"{row:7} {name:10} {one.mb_s:7.1f} MB/s {one.objects_s:7.1f} objects/s,"
                        f" {one.cpu_ms_mb:.1f} ms of CPU for a MB; GET of 4 KiB"
                        f" p50 {one.get_ms[0]:.1f}, p99 {one.get_ms[1]:.1f} ms{calm}{up}",
                        flush=True,
                    )
        for row in options.rows.split(","):
            if len(measured) == 2:
                pairs = list(zip(*(found[row, name] for name, _ in measured), strict=True))
                speed = ", ".join(f"{b.mb_s / a.mb_s:.2f}" for a, b in pairs)
                cpu = ", ".join(f"{b.cpu_ms_mb / a.cpu_ms_mb:.2f}" for a, b in pairs)
                print(f"{row}: ratios of speed {speed}; of CPU time {cpu}")


if __name__ == "__main__":
    main()

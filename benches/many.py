"""``python -m benches.many [--versions 100000] [--objects 1000000]``: a key with many versions, and a bucket with many
objects under lifecycle, over real disks.

One process of storaged with six disks. Versions of one key are written one after the other; at a hundredth, a tenth and
all of them, the table has what a PUT, a GET by version id, a HEAD and a page of the list cost. Then a bucket is filled,
gets a rule for which nothing is due (the walk that makes the index), and one whose date has come for a part of it (what
a due object costs). Costs are p50 and p99 as a client sees them, and CPU time of the server. The client keeps no list
of what it wrote, so its memory does not grow.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import functools
import hashlib
import itertools
import json
import os
import random
import re
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from benches.s3client import Connection, Signer, Target, connect, path_of
from benches.servers import Installation, Server, end_on_sigterm, free_port, make_single, storaged_installation

VERSIONS, OBJECTS = "versions", "objects"
KEY = "key"
BODY_BYTES = 1024
SAMPLES = 40
PAGES = 40
PAGE_VERSIONS = 1000
WRITERS = 8
DUE_SHARE = 10
"""One object in so many is due."""
LOOKS_PER_S = 10_000
POLL_S = 2.0
NAMESPACE = 'xmlns="http://s3.amazonaws.com/doc/2006-03-01/"'
VERSIONED = f"<VersioningConfiguration {NAMESPACE}><Status>Enabled</Status></VersioningConfiguration>"
_ID = re.compile(rb"<VersionId>([^<]+)</VersionId>")


def rule(prefix: str, expiration: str) -> str:
    return (
        f"<LifecycleConfiguration {NAMESPACE}><Rule><ID>r</ID>"
        f"<Filter><Prefix>{prefix}</Prefix></Filter><Status>Enabled</Status><Expiration>{expiration}</Expiration>"
        "</Rule></LifecycleConfiguration>"
    )


class Client:
    """One connection."""

    def __init__(self, connection: Connection, target: Target) -> None:
        self._connection = connection
        self._signer = Signer(target)

    @classmethod
    async def of(cls, target: Target) -> Client:
        return cls(await connect(target), target)

    async def ask(self, method: str, bucket: str, key: str = "", query: str = "", body: bytes = b"") -> bytes:
        md5 = base64.b64encode(hashlib.md5(body).digest()).decode()
        head = self._signer.head(
            method,
            path_of(bucket, key),
            query,
            sha256=hashlib.sha256(body).hexdigest(),
            length=len(body),
            unsigned=f"Content-MD5: {md5}\r\n" if body else "",
        )
        return await self._connection.request(head + body, head_only=method == "HEAD")

    def close(self) -> None:
        self._connection.close()


class Costs:
    """Lines of the table."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self.rows: list[dict[str, Any]] = []

    def cpu_s(self) -> float:
        return sum(self._server.cpu_seconds().values())

    async def measure(self, what: str, size: int, count: int, once: Callable[[], Awaitable[Any]]) -> None:
        took, cpu_s = [], self.cpu_s()
        for _ in range(count):
            began = time.perf_counter()
            await once()
            took.append(1e3 * (time.perf_counter() - began))
        took.sort()
        cpu_ms = 1e3 * (self.cpu_s() - cpu_s) / count
        self.note(what, size, p50_ms=statistics.median(took), p99_ms=took[int(0.99 * (len(took) - 1))], cpu_ms=cpu_ms)

    def note(self, what: str, size: int, **costs: float) -> None:
        memory = sum(self._server.own_bytes().values()) / 1e6
        row = {"what": what, "size": size, **{name: round(cost, 3) for name, cost in costs.items()}}
        self.rows.append({**row, "server_mb": round(memory)})
        print(", ".join(f"{name} {value}" for name, value in self.rows[-1].items()), flush=True)


# --- versions


async def versions(target: Target, costs: Costs, count: int) -> None:
    client, written = await Client.of(target), 0
    await client.ask("PUT", VERSIONS)
    await client.ask("PUT", VERSIONS, query="versioning=", body=VERSIONED.encode())
    for size in sorted({max(count // 100, 1), max(count // 10, 1), count}):
        while written < size:
            written += 1
            await client.ask("PUT", VERSIONS, KEY, body=os.urandom(BODY_BYTES))
        await costs_of_versions(client, costs, size)
        written += SAMPLES
    client.close()


async def costs_of_versions(client: Client, costs: Costs, size: int) -> None:
    """The pages that are measured are full ones: the newest, one in the middle, and the last full one."""
    markers, known = await full_pages(client)
    places = {"newest": markers[0], "middle": markers[len(markers) // 2], "oldest": markers[-1]}
    for place, marker in places.items():
        what = f"page of the {min(size, PAGE_VERSIONS)} {place} versions"
        await costs.measure(what, size, PAGES, functools.partial(_page, client, marker))
    await costs.measure(
        "GET by version id",
        size,
        SAMPLES,
        lambda: client.ask("GET", VERSIONS, KEY, f"versionId={random.choice(known)}"),
    )
    await costs.measure("HEAD", size, SAMPLES, lambda: client.ask("HEAD", VERSIONS, KEY))
    await costs.measure(
        "PUT of a version", size, SAMPLES, lambda: client.ask("PUT", VERSIONS, KEY, body=os.urandom(BODY_BYTES))
    )


async def full_pages(client: Client) -> tuple[list[str], list[str]]:
    """After which version each full page begins (empty: the first one), and a version id of every page."""
    markers, known, after = [""], [], ""
    while True:
        found = await _page(client, after)
        known += found[-1:]
        if len(found) < PAGE_VERSIONS:
            return markers if len(markers) == 1 else markers[:-1], known
        after = found[-1]
        markers.append(after)


async def _page(client: Client, after: str) -> list[str]:
    """The ids of the versions after this one; empty: of the newest."""
    marker = f"key-marker={KEY}&" if after else ""
    from_there = f"version-id-marker={after}&" if after else ""
    query = f"{marker}max-keys={PAGE_VERSIONS}&prefix={KEY}&{from_there}versions="
    return [found.decode() for found in _ID.findall(await client.ask("GET", VERSIONS, query=query))]


# --- lifecycle


async def lifecycle(target: Target, costs: Costs, count: int, state: Callable[[], dict[str, Any]]) -> None:
    await alone(target, OBJECTS)
    before = costs.cpu_s(), time.perf_counter()
    await fill(target, 0, count)
    _note_each(costs, "PUT without rules", count, before)
    began = costs.cpu_s(), time.perf_counter()
    await alone(target, OBJECTS, "lifecycle=", rule("", "<Days>3650</Days>").encode())
    await until(lambda: state()["walked_ms"] is not None)
    _note_each(costs, "walk, an object", count, began)
    more = max(count // 20, 1)
    before = costs.cpu_s(), time.perf_counter()
    await fill(target, count, more)
    _note_each(costs, "PUT with rules", more, before)
    due = -(-(count + more) // DUE_SHARE)
    before = costs.cpu_s(), time.perf_counter()
    date = "<Date>2020-01-01T00:00:00Z</Date>"
    await alone(target, OBJECTS, "lifecycle=", rule("0", date).encode())
    await until(lambda: state()["expired"] >= due)
    _note_each(costs, "due object, with its walk", due, before)


async def alone(target: Target, bucket: str, query: str = "", body: bytes = b"") -> None:
    """On a connection of its own: one that rests for minutes is closed."""
    client = await Client.of(target)
    await client.ask("PUT", bucket, query=query, body=body)
    client.close()


def _note_each(costs: Costs, what: str, count: int, before: tuple[float, float]) -> None:
    cpu_s, began = before
    took = time.perf_counter() - began
    costs.note(what, count, each_ms=1e3 * took / count, cpu_ms=1e3 * (costs.cpu_s() - cpu_s) / count, seconds=took)


async def until(holds: Callable[[], bool]) -> None:
    for _ in itertools.count():
        if await asyncio.to_thread(holds):
            return
        await asyncio.sleep(POLL_S)


async def fill(target: Target, first: int, count: int) -> None:
    """The key's first digit says whether an object will be due."""
    numbers = iter(range(first, first + count))

    async def writer() -> None:
        client = await Client.of(target)
        for number in numbers:
            await client.ask("PUT", OBJECTS, f"{number % DUE_SHARE}/{number:08}", body=os.urandom(BODY_BYTES))
        client.close()

    await asyncio.gather(*(writer() for _ in range(WRITERS)))


# --- the whole


def begin(storaged: Installation) -> Server:
    port = free_port()
    config = make_single(storaged.run, storaged.home, s3_port=port, disks=6)
    config.write_text(config.read_text() + f"\n[limits]\nlifecycle_per_s = {LOOKS_PER_S}\n")
    storaged.start("run", str(config))
    storaged.status("HEALTHY")
    user = json.loads(storaged.run("user", "add", "bench", "--json"))
    target = Target(f"http://127.0.0.1:{port}", user["access_key"], user["secret_key"], "eu-fr-1")
    return Server("single", target, storaged.processes(), storaged.home)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="benches.many", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--versions", type=int, default=100_000, help="of the key; 0: none")
    parser.add_argument("--objects", type=int, default=1_000_000, help="of the bucket with rules; 0: none")
    parser.add_argument("--dir", type=Path, default=Path(tempfile.gettempdir()), help="where the disks are")
    parser.add_argument("--json", type=Path, help="write the table to this file too")
    options = parser.parse_args(arguments)
    end_on_sigterm()
    with storaged_installation(None, options.dir, "state") as storaged:
        server = begin(storaged)
        costs = Costs(server)

        def state() -> dict[str, Any]:
            found: dict[str, Any] = json.loads(storaged.run("bucket", "lifecycle", OBJECTS, "--json"))
            return found

        if options.versions:
            asyncio.run(versions(server.target, costs, options.versions))
        if options.objects:
            asyncio.run(lifecycle(server.target, costs, options.objects, state))
        print(f"on disk: {server.disk_bytes() / 1e6:.0f} MB", flush=True)
    if options.json:
        options.json.write_text(json.dumps(costs.rows, indent=1))


if __name__ == "__main__":
    main()

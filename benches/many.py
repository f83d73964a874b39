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
import contextlib
import functools
import hashlib
import itertools
import json
import math
import os
import random
import re
import shutil
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path
from typing import Any

from benches.s3client import Connection, Signer, Target, WrongAnswer, connect, path_of
from benches.servers import Installation, Server, end_on_sigterm, free_port, make_single, storaged_installation

VERSIONS, OBJECTS = "versions", "objects"
KEY = "key"
BODY_BYTES = 1024
PUTS = {"in the record": 1000, "coded": 1024}
"""Bytes of a version, sealed, lie in the record up to 1 KiB, and else on six disks."""
SAMPLES = 40
PAGES = 40
PAGE_VERSIONS = 1000
WRITERS = 8
DUE_SHARE = 10
"""One object in so many is due."""
FREE_BYTES_MIN = 15 * 10**9
"""With less free space than this the run ends: others may need it."""
WRITES_A_LOOK = 1000
"""The free space is looked at once in so many PUTs."""
TRIES = 20
TRY_AGAIN_S = 5.0
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
    """One connection. Like other clients it asks again after an answer 503, which ``refused`` counts in all."""

    refused = 0

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
        for _ in range(TRIES):
            try:
                return await self._connection.request(head + body, head_only=method == "HEAD")
            except WrongAnswer as error:
                if "status 503" not in str(error):
                    raise
                Client.refused += 1
                await asyncio.sleep(TRY_AGAIN_S)
        raise SystemExit(f"{method} {bucket}/{key} was refused {TRIES} times")

    def close(self) -> None:
        self._connection.close()


class Costs:
    """Lines of the table."""

    def __init__(self, server: Server, fill_s: float = math.inf) -> None:
        self._server = server
        self._fill_s = fill_s
        self._ends = math.inf
        self.rows: list[dict[str, Any]] = []

    def cpu_s(self) -> float:
        return sum(self._server.cpu_seconds().values())

    def begin_fill(self) -> None:
        """From now on the time counts. Versions and objects have ``fill_s`` each."""
        self._ends = time.monotonic() + self._fill_s

    @property
    def late(self) -> bool:
        """Whether the time to fill the bucket is over."""
        return time.monotonic() >= self._ends

    def check_free(self) -> None:
        """Raises SystemExit when the file system is nearly full."""
        folder = self._server.folder
        free = shutil.disk_usage(folder).free if folder is not None else FREE_BYTES_MIN
        if free < FREE_BYTES_MIN:
            raise SystemExit(f"only {free / 1e9:.0f} GB are free in {folder}: the run ends")

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
        disk = {f"{kind}_mb": round(count / 1e6, 1) for kind, count in disk_bytes(self._server.folder).items()}
        self.rows.append({**row, "server_mb": round(memory), **disk})
        print(", ".join(f"{name} {value}" for name, value in self.rows[-1].items()), flush=True)


def disk_bytes(folder: Path | None) -> dict[str, int]:
    """Blocks that the files in the folder use, by kind."""
    found = dict.fromkeys(("segments", "index", "rows", "fixed", "other"), 0)
    for path in folder.rglob("*") if folder is not None else ():
        with contextlib.suppress(OSError):
            if path.is_file():
                found[_kind(path)] += path.stat().st_blocks * 512
    return found


def _kind(path: Path) -> str:
    if path.name == "data.mdb":
        return "index" if path.parent.name == "index" else "rows"
    return "segments" if path.suffix == ".seg" else "fixed" if path.name in ("redo", "reserve") else "other"


# --- versions


async def versions(target: Target, costs: Costs, count: int, body_bytes: int) -> None:
    client, written = await Client.of(target), 0
    await client.ask("PUT", VERSIONS)
    await client.ask("PUT", VERSIONS, query="versioning=", body=VERSIONED.encode())
    costs.begin_fill()
    for size in sorted({max(count // 100, 1), max(count // 10, 1), count}):
        before, first = (costs.cpu_s(), time.perf_counter()), written
        while written < size and not costs.late:
            if written % WRITES_A_LOOK == 0:
                costs.check_free()
            written += 1
            await client.ask("PUT", VERSIONS, KEY, body=os.urandom(body_bytes))
        _note_each(costs, "PUTs of versions, one after the other", written, before, written - first)
        await costs_of_versions(client, costs, written)
        written += SAMPLES * len(PUTS)
        if costs.late:
            break
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
    for where, count in PUTS.items():
        await costs.measure(
            f"PUT of a version of {count} bytes ({where})",
            size,
            SAMPLES,
            lambda count=count: client.ask("PUT", VERSIONS, KEY, body=os.urandom(count)),
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


async def lifecycle(
    target: Target, costs: Costs, count: int, writers: int, state: Callable[[], dict[str, Any]]
) -> None:
    await alone(target, OBJECTS)
    filled = 0
    costs.begin_fill()
    for size in sorted({max(count // 100, 1), max(count // 10, 1), count}):
        before, first = (costs.cpu_s(), time.perf_counter()), filled
        filled += await fill(target, costs, range(filled, size), writers)
        _note_each(costs, "PUT without rules", filled, before, filled - first)
        if costs.late:
            break
    count = filled
    began = costs.cpu_s(), time.perf_counter()
    await alone(target, OBJECTS, "lifecycle=", rule("", "<Days>3650</Days>").encode())
    await until(lambda: state()["walked_ms"] is not None)
    _note_each(costs, "walk, an object", count, began)
    more = max(count // 20, 1)
    before = costs.cpu_s(), time.perf_counter()
    await fill(target, costs, range(count, count + more), writers, even_late=True)
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


def _note_each(costs: Costs, what: str, size: int, before: tuple[float, float], count: int | None = None) -> None:
    """``count``: how many there were, if not ``size``. No line if there was none."""
    cpu_s, began = before
    took, count = time.perf_counter() - began, size if count is None else count
    if not count:
        return
    costs.note(what, size, each_ms=1e3 * took / count, cpu_ms=1e3 * (costs.cpu_s() - cpu_s) / count, seconds=took)


async def until(holds: Callable[[], bool]) -> None:
    for _ in itertools.count():
        if await asyncio.to_thread(holds):
            return
        await asyncio.sleep(POLL_S)


async def fill(target: Target, costs: Costs, wanted: Iterable[int], writers: int, *, even_late: bool = False) -> int:
    """The key's first digit says whether an object will be due. Returns how many were written."""
    numbers, written = iter(wanted), 0

    async def writer() -> None:
        nonlocal written
        client = await Client.of(target)
        while (even_late or not costs.late) and (number := next(numbers, None)) is not None:
            if number % WRITES_A_LOOK == 0:
                costs.check_free()
            await client.ask("PUT", OBJECTS, f"{number % DUE_SHARE}/{number:08}", body=os.urandom(BODY_BYTES))
            written += 1
        client.close()

    await asyncio.gather(*(writer() for _ in range(writers)))
    return written


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
    parser.add_argument(
        "--body-bytes", type=int, default=BODY_BYTES, help="of a version; up to 1,008 stay in the record"
    )
    parser.add_argument("--writers", type=int, default=WRITERS, help="connections that fill the bucket")
    parser.add_argument(
        "--fill-s", type=float, default=math.inf, help="of each of the two: then it measures what there is"
    )
    parser.add_argument("--dir", type=Path, default=Path(tempfile.gettempdir()), help="where the disks are")
    parser.add_argument("--json", type=Path, help="write the table to this file too")
    options = parser.parse_args(arguments)
    end_on_sigterm()
    with storaged_installation(None, options.dir, "state") as storaged:
        server = begin(storaged)
        costs = Costs(server, options.fill_s)

        def state() -> dict[str, Any]:
            found: dict[str, Any] = json.loads(storaged.run("bucket", "lifecycle", OBJECTS, "--json"))
            return found

        if options.versions:
            asyncio.run(versions(server.target, costs, options.versions, options.body_bytes))
        if options.objects:
            asyncio.run(lifecycle(server.target, costs, options.objects, options.writers, state))
        print(f"on disk: {server.disk_bytes() / 1e6:.0f} MB; answers 503: {Client.refused}", flush=True)
    if options.json:
        options.json.write_text(json.dumps(costs.rows, indent=1))


if __name__ == "__main__":
    main()

"""``python -m benches.hung_cluster [--seconds 20] [--size 262144] [--how hung syncs slow ...]``: a faulty disk of six.

A cluster of three servers with two disks each, as real processes. The first disk of n1 is on a file system that does
what this program says (``tests.worlds.hanging_disk``: FUSE, so all numbers are slower than on a drive). Clients PUT and
GET all the time; each fault follows a healthy phase, in one run. The table has what the clients saw, and what
``storaged status`` said at the end of the fault. Needs root and /dev/fuse.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import os
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benches.s3client import Ask, Connection, Signer, Target, WrongAnswer, connect, path_of
from tests.servers import Servers
from tests.worlds.hanging_disk import SYNCS, WRITES, HangingDisk, hanging_disk

CLIENTS = 8
BODIES = 16
WARM_S = 5.0
SETTLE_S = 1.0
"""The first second of a fault is shown by itself: then the cluster finds out."""

WELL_S = 60.0

FAULTS: dict[str, Callable[[HangingDisk], None]] = {
    "hung": lambda disk: disk.hang(),
    "syncs": lambda disk: disk.hang(SYNCS),
    "slow": lambda disk: disk.slow(0.2),
    "unreadable": lambda disk: disk.unreadable(".seg"),
    "full": lambda disk: disk.refuse("ENOSPC", WRITES, name="segments"),
    "quota": lambda disk: disk.refuse("EDQUOT", WRITES, name="segments"),
    "read-only": lambda disk: disk.refuse("EROFS", WRITES),
    "none": lambda disk: None,
}
"""``read-only`` is the last fault: the disk stays out of use after it, since the kernel may have dropped what it could
not write.
"""


class FaultyServers(Servers):
    """``bad``: the file system of the first disk of n1."""

    def __init__(self, root: Path, bad: HangingDisk) -> None:
        super().__init__(root)
        self._bad = bad

    def install(self, name: str) -> None:
        super().install(name)
        if name == "n1":
            (self._bad.directory / "d1").mkdir()
            (self.servers[name].folder / "d1").symlink_to(self._bad.directory / "d1")


class Load:
    """Clients that PUT and GET in turns, and how long each request took: (kind, when it began, seconds, error)."""

    def __init__(self, target: Target, bucket: str, size: int) -> None:
        self.done: list[tuple[str, float, float, str]] = []
        self.running: dict[int, tuple[str, float]] = {}
        self._target, self._bucket = target, bucket
        self._bodies = [os.urandom(size) for _ in range(BODIES)]
        self._sums = [hashlib.sha256(body).hexdigest() for body in self._bodies]
        self._written: list[tuple[str, int]] = []
        self._signer = Signer(target)
        self._next = 0

    async def client(self, number: int) -> None:
        connection: Connection | None = None
        chance = random.Random(number)
        while True:
            kind = "PUT" if not self._written or chance.random() < 0.5 else "GET"
            began, error = time.monotonic(), ""
            self.running[number] = kind, began
            try:
                if connection is None:
                    connection = await connect(self._target)
                await self._request(connection, kind, chance)
            except (WrongAnswer, OSError) as wrong:
                error, connection = str(wrong)[:200], None
                await asyncio.sleep(0.05)
            del self.running[number]
            self.done.append((kind, began, time.monotonic() - began, error))

    async def _request(self, connection: Connection, kind: str, chance: random.Random) -> None:
        answered: asyncio.Future[WrongAnswer | None] = asyncio.get_running_loop().create_future()
        if kind == "PUT":
            self._next += 1
            key, body = f"o{self._next % 500:04}-{chance.random()}", self._next % BODIES
            head = self._signer.head(
                "PUT", path_of(self._bucket, key), sha256=self._sums[body], length=len(self._bodies[body])
            )
            ask = Ask(head, self._bodies[body])
        else:
            key, body = chance.choice(self._written)
            ask = Ask(self._signer.head("GET", path_of(self._bucket, key)), expect=memoryview(self._bodies[body]))
        connection.begin(ask, lambda wrong: None if answered.done() else answered.set_result(wrong))
        if wrong := await answered:
            raise wrong
        if kind == "PUT":
            self._written.append((key, body))
            del self._written[:-2000]

    def table(self, since: float, until: float) -> str:
        """Requests that began then; those that have not ended yet count with the time that they have had."""
        cells, now = [], time.monotonic()
        for kind in ("PUT", "GET"):
            ended = [entry for entry in self.done if entry[0] == kind and since <= entry[1] < until]
            found = sorted(
                [entry[2] for entry in ended]
                + [now - began for what, began in self.running.values() if what == kind and since <= began < until]
            )
            parts = [found[min(len(found) - 1, int(part * len(found)))] for part in (0.5, 0.99, 1)] if found else []
            cells += [" / ".join(f"{took * 1000:.0f}" for took in parts), str(len(ended))]
            cells.append(str(sum(bool(entry[3]) for entry in ended)))
        return " | ".join(cells)

    def errors(self, since: float) -> set[str]:
        return {error for _, began, _, error in self.done if error and began >= since}


def said(status: dict[str, Any]) -> str:
    entries = [*status["problems"], *status.get("warnings", ())]
    codes = sorted(
        {entry["code"] for entry in entries if entry["code"].startswith(("DISK", "NODE", "QUORUM", "INDEX"))}
    )
    return f"{status['verdict']} {', '.join(codes)}"


async def measure(servers: Servers, bad: HangingDisk, given: argparse.Namespace) -> None:
    settings = servers.settings
    target = Target(settings["endpoint"], settings["access_key"], settings["secret_key"], settings["region"])
    load = Load(target, settings["bucket"], given.size)
    clients = [asyncio.create_task(load.client(number)) for number in range(CLIENTS)]
    print(f"{CLIENTS} clients, {given.size} bytes; ms: p50 / p99 / max")
    print("| phase | PUT | PUTs | errors | GET | GETs | errors | status |\n|---|---|---|---|---|---|---|---|")

    async def status() -> str:
        return said(await asyncio.to_thread(servers.status))

    def show(name: str, since: float, until: float, line: str) -> None:
        print(f"| {name} | {load.table(since, until)} | {line} |", flush=True)

    async def phase(name: str, for_s: float) -> None:
        since = time.monotonic()
        await asyncio.sleep(for_s)
        show(name, since, since + for_s, await status())

    await asyncio.sleep(WARM_S)
    for how in given.how:
        await phase("healthy", given.seconds)
        began = time.monotonic()
        FAULTS[how](bad)
        await asyncio.sleep(SETTLE_S)
        first, line = time.monotonic(), await status()
        await asyncio.sleep(max(0.0, first + given.seconds - time.monotonic()))
        show(f"{how}, first second", began, first, line)
        show(how, first, first + given.seconds, await status())
        for error in sorted(load.errors(began))[:3]:
            print(f"  {how}: {error}")
        bad.release()
        while time.monotonic() - began < given.seconds + SETTLE_S + WELL_S:
            if "DISK_" not in (line := await status()):
                break
            await asyncio.sleep(0.5)
        print(f"  well again {time.monotonic() - began - given.seconds - SETTLE_S:.1f} s after the end: {line}")
    for client in clients:
        client.cancel()
    await asyncio.gather(*clients, return_exceptions=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=20.0, help="of each phase")
    parser.add_argument("--size", type=int, default=256 * 1024)
    parser.add_argument("--how", nargs="+", choices=FAULTS, default=["hung", "syncs", "slow", "unreadable", "full"])
    given = parser.parse_args()
    with hanging_disk() as bad, tempfile.TemporaryDirectory(prefix="hung-cluster-") as place:
        servers = FaultyServers(Path(place) / "servers", bad)
        try:
            servers.create()
            asyncio.run(measure(servers, bad, given))
        finally:
            bad.release()
            servers.stop()


if __name__ == "__main__":
    main()

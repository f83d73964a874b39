"""``python -m benches.hung_disk [--hang 3] [--how evicted] [--tree DIR]``: what a disk that hangs costs the others.

Opens two disks in one process, as a node does: *x* on a file system that hangs on demand (FUSE), *y* beside it. Eight
clients use x all the time. Each kind of operation of y is timed before, while and after x hangs. Needs root and
/dev/fuse.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib
import os
import random
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

HOW = {
    "evicted": "LMDB's pages of x left memory a second before; all hangs",
    "large": "LMDB's file of x is too large to be kept in memory, and is not there; all hangs",
    "resident": "LMDB's pages of x are in memory; all else hangs",
    "syncs": "only syncs of x hang",
    "slow": "each operation of x takes 0.2 s",
}
ROWS = 20_000
CLIENTS = 8
PAUSE_S = 0.002


class Disk:
    """One disk's stores and its acceptor, with what watches it where the tree has that."""

    def __init__(self, name: str, directory: Path) -> None:
        self.name = name
        self._directory = directory
        self._tasks: list[asyncio.Task[None]] = []
        self.health: Any = None

    async def open(self) -> None:
        from storaged.fragments.store import LocalFragmentStore
        from storaged.meta.acceptor.replica import LocalReplica
        from storaged.meta.storage.lmdb_store import LmdbMetaStore

        self.meta = LmdbMetaStore(self._directory / "meta", map_bytes=1 << 30)
        more: dict[str, Any] = {}
        with suppress(ImportError):
            from storaged.fragments.store import DiskOwner

            if hasattr(self.meta, "health"):
                self.health = self.meta.health
                more["owner"] = DiskOwner(health=self.health)
        self.fragments = await LocalFragmentStore.open(self._directory / "fragments", self.name, **more)
        self.replica = LocalReplica(self.name, self.meta)
        if self.health is not None:
            watch = importlib.import_module("storaged.node.disk_watch")
            self.health.disk = self.name
            self._watch = watch.DiskWatch(self.health, (self.meta.look, self.fragments.look))
            self._tasks.append(asyncio.create_task(watch.watch_health({self.name: self.health})))


class World:
    def __init__(self, x: Disk, y: Disk) -> None:
        self.x, self.y = x, y
        self._rng = random.Random(1)
        self._base = int(time.time() * 1e6)
        self._made: list[Any] = []

    def name(self, number: int) -> Any:
        from storaged.meta.names import RegisterName

        return RegisterName(0, b"s" * 16, number % 16, b"key%08d" % number)

    def ballot(self) -> Any:
        from storaged.meta.names import Ballot

        return Ballot(1, int(time.time() * 1e6), "gw", b"i" * 8)

    async def fill(self, disk: Disk) -> None:
        from storaged.meta.names import Value, Visibility
        from storaged.meta.store_ports import Slot, StoreBatch

        for first in range(0, ROWS, 500):
            rows = [
                Slot(self.name(number), self.ballot(), Value(1, b"o" * 16, Visibility.LIVE, b"v" * 400))
                for number in range(first, first + 500)
            ]
            await disk.meta.commit(StoreBatch(rows))
        await disk.meta.checkpoint()

    async def prepare(self, disk: Disk) -> None:
        from storaged.meta import messages

        await disk.replica.prepare(messages.Prepare(disk.name, self.name(self._rng.randrange(ROWS)), self.ballot()))

    async def accept(self, disk: Disk) -> None:
        from storaged.meta import messages
        from storaged.meta.names import Value, Visibility

        value = Value(9, self._rng.randbytes(16), Visibility.LIVE, b"w" * 400)
        await disk.replica.accept(
            messages.Accept(disk.name, self.name(self._rng.randrange(2 * ROWS)), self.ballot(), value)
        )

    async def read(self, disk: Disk) -> None:
        from storaged.meta import messages

        await disk.replica.read(messages.Read(disk.name, self.name(self._rng.randrange(ROWS)), 1))

    async def scan(self, disk: Disk) -> None:
        from storaged.meta.messages import ScanRequest, ShardAsk

        ask = ShardAsk(self._rng.randrange(16), b"", 100, 1, 1000, 1 << 20)
        await disk.replica.scan(ScanRequest(disk.name, 1, 0, b"s" * 16, (ask,)))

    async def write(self, disk: Disk) -> None:
        from tests.worlds.fragments import make

        made = make(self._rng, 64 * 1024, cell_bytes=16 * 1024)
        await disk.fragments.write(made.header, [made.payload], sync=True)
        self._made = [*self._made[-50:], (disk.name, made)]

    async def fetch(self, disk: Disk) -> None:
        mine = [made for name, made in self._made if name == disk.name]
        if mine:
            await disk.fragments.read(self._rng.choice(mine).id, 0, 100)

    async def ping(self, _disk: Disk) -> None:
        await asyncio.sleep(0)

    async def use(self, disk: Disk) -> None:
        """A client of the disk, as patient as a node's callers."""
        while True:
            work = self._rng.choice((self.prepare, self.accept, self.read, self.scan, self.write, self.fetch))
            with suppress(Exception):
                await asyncio.wait_for(work(disk), 10)
            await asyncio.sleep(PAUSE_S)


async def timed(
    kinds: dict[str, Callable[[Disk], Awaitable[None]]], disk: Disk, for_s: float, into: dict[str, list[float]]
) -> None:
    """One client for each kind; a delay is counted from when the operation was due."""

    async def client(kind: str) -> None:
        ends = time.monotonic() + for_s
        due = time.monotonic()
        while due < ends:
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            await kinds[kind](disk)
            into[kind].append(time.monotonic() - due)
            due += 0.005
            if time.monotonic() - due > 0.005:
                due = time.monotonic()

    await asyncio.gather(*(client(kind) for kind in kinds))


def line(values: list[float]) -> str:
    ordered = sorted(values) or [0.0]
    return " / ".join(
        f"{ordered[min(len(ordered) - 1, int(part * len(ordered)))] * 1000:.1f}" for part in (0.5, 0.99, 1)
    )


async def measure(hang_s: float, how: str) -> None:
    from tests.worlds.hanging_disk import hanging_disk

    with hanging_disk() as hanging, tempfile.TemporaryDirectory() as place:
        x, y = Disk("x", hanging.directory), Disk("y", Path(place))
        world = World(x, y)
        lmdb_file = importlib.import_module("storaged.lmdb_file")
        for disk in (x, y):
            if how == "large" and hasattr(lmdb_file, "KEPT_BYTES_MAX"):
                lmdb_file.KEPT_BYTES_MAX = 0 if disk is x else 1 << 30
            await disk.open()
            await world.fill(disk)
        kinds: dict[str, Any] = {
            "prepare": world.prepare,
            "accept": world.accept,
            "point read": world.read,
            "listing (100 rows)": world.scan,
            "fragment write 64 KiB": world.write,
            "fragment read": world.fetch,
            "ping": world.ping,
        }
        phases: dict[str, dict[str, list[float]]] = {}
        clients = [asyncio.create_task(world.use(x)) for _ in range(CLIENTS)]

        async def phase(name: str, for_s: float) -> None:
            phases[name] = {kind: [] for kind in kinds}
            await timed(kinds, y, for_s, phases[name])

        await phase("before", 3)
        if how in ("evicted", "large"):
            hanging.drop_cache(x._directory / "meta" / "data.mdb")
            if x.health is not None:
                await asyncio.sleep(1.2)  # the look of each second
                print(f"x is in memory, as far as its node knows: {x.meta.in_memory}")
        release = Releases(hanging, hang_s)
        begin(hanging, how)
        notice(x)
        release.begin()
        await phase("while it hangs", hang_s)
        await phase("after", 3)
        print(f"x hangs for {hang_s:.0f} s: {HOW[how]}. Delays of y in ms: p50 / p99 / max")
        show(phases, x)
        for client in clients:
            client.cancel()
        sys.stdout.flush()
        hanging.release()
        await asyncio.sleep(1)
        hanging.close()
        os._exit(0)


def begin(hanging: Any, how: str) -> None:
    """Has the disk hang, or be slow, in one of the ways of ``HOW``."""
    from tests.worlds.hanging_disk import READS, SYNCS

    if how == "slow":
        hanging.slow(0.2)
    elif how == "syncs":
        hanging.hang(SYNCS)
    elif how == "resident":
        hanging.hang(*(kind for kind in ("writes", "syncs", "opens", "space") if kind != READS))
    else:
        hanging.hang()


def show(phases: dict[str, dict[str, list[float]]], x: Disk) -> None:
    """Prints the table: a row for each operation, a column for each phase."""
    print("| operation of y | " + " | ".join(phases) + " |\n|---|" + "---|" * len(phases))
    for kind in next(iter(phases.values())):
        print(f"| {kind} | " + " | ".join(line(found[kind]) for found in phases.values()) + " |")
    if x.health is not None:
        print(f"x: {x.health.state}; hung {x.health.hung_count} times; longest operation {x.health.longest_s:.1f} s")


def notice(x: Disk) -> None:
    """Prints when x counts as hung."""
    began = time.monotonic()

    def changed(health: Any, before: str) -> None:
        print(f"x: {before} to {health.state} after {time.monotonic() - began:.1f} s. {health.reason}")

    if x.health is not None:
        x.health.on_change = changed


class Releases:
    """Ends the hang from a thread: the event loop may hang too."""

    def __init__(self, hanging: Any, after_s: float) -> None:
        import threading

        self._timer = threading.Timer(after_s, hanging.release)
        self._timer.daemon = True

    def begin(self) -> None:
        self._timer.start()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hang", type=float, default=3.0, help="seconds")
    parser.add_argument("--how", choices=HOW, default="evicted")
    parser.add_argument("--tree", help="another source tree to measure")
    given = parser.parse_args()
    if given.tree:
        sys.path.insert(0, given.tree)
    asyncio.run(measure(given.hang, given.how))


if __name__ == "__main__":
    main()

"""``python -m benches.hops``: how many calls and modules a request passes in the gateway and in a storage node.

It starts the trial cluster with a probe in each process (``benches.hops_probe``), makes requests of ``--size`` bytes
that run alone, and counts calls of storaged's Python functions while one is under way. Timers of the servers run too,
so each kind of request is made several times, and the one with the fewest calls counts. Of the nodes, the one with the
median of calls counts.

``hot``: after other requests on the same connection. ``fresh``: the first request of a new connection. ``idle``: after
IDLE_S seconds without any request, when what the gateway has cached of users and buckets has expired.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import os
import shutil
import socket
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import uvloop

from benches import hops_probe, rows
from benches.rows import KIB, Bodies
from benches.s3client import Ask, Connection, WrongAnswer, connect
from benches.servers import Server, end_on_sigterm, storaged_cluster

IDLE_S = 2.2
WARM_REQUESTS = 40
SEEDS = 64
BUCKET = "hops"
AFTER_S = 0.06
"""Counting goes on for so long after an answer: replicas that were not waited for still work."""

Call = tuple[str, str, str, int]
"""Module of the caller, module, name of the function, and how often."""


class Hops(NamedTuple):
    """What one request costs one process."""

    calls: int
    across: int
    """Calls from another module, or from the event loop."""
    modules: frozenset[str]

    @classmethod
    def of(cls, calls: Sequence[Call]) -> Hops:
        return cls(
            sum(count for _, _, _, count in calls),
            sum(count for caller, module, _, count in calls if caller != module),
            frozenset(module for _, module, _, _ in calls),
        )


class Probes:
    """The probes of a cluster's processes."""

    def __init__(self, folder: Path, server: Server) -> None:
        self._folder = folder
        self._pids = dict(server.processes)
        self._own = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._own.bind(str(folder / "own"))
        self._own.settimeout(10)
        self._own.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)

    def ask(self, what: bytes) -> dict[str, list[Call]]:
        """The answer of each process, by its name."""
        found = {}
        for name, pid in self._pids.items():
            self._own.sendto(what, str(self._folder / str(pid)))
            found[name] = [(str(a), str(b), str(c), int(d)) for a, b, c, d in json.loads(self._own.recv(1 << 20))]
        return found


async def make(connection: Connection, ask: Ask) -> None:
    """One request. Raises WrongAnswer."""
    answered: asyncio.Future[WrongAnswer | None] = asyncio.get_running_loop().create_future()
    connection.begin(ask, answered.set_result)
    if (error := await answered) is not None:
        raise error


async def counted(
    server: Server, probes: Probes, verb: str, kind: str, size: int, repeats: int
) -> tuple[list[Call], list[Call]]:
    """The calls of one request in the gateway and in a node, each of the repetition with the fewest."""
    target, bodies, found = server.target, Bodies(size), []
    connection = await connect(target)
    asks = {
        "PUT": rows.putting(target, BUCKET, f"{kind}-", bodies, size),
        "GET": rows.getting(target, BUCKET, "seed-", bodies, SEEDS),
    }[verb]
    numbers = itertools.count()
    for _ in range(repeats):
        for _ in range(WARM_REQUESTS):
            await make(connection, asks(next(numbers)))
        await asyncio.sleep(IDLE_S if kind == "idle" else AFTER_S)
        probes.ask(b"start")
        if kind == "fresh":
            connection.close()
            connection = await connect(target)
        await make(connection, asks(next(numbers)))
        await asyncio.sleep(AFTER_S)
        found.append(probes.ask(b"stop"))
    connection.close()
    return min((calls["gateway"] for calls in found), key=calls_of), min(map(node_of, found), key=calls_of)


def calls_of(calls: Sequence[Call]) -> int:
    return Hops.of(calls).calls


def node_of(calls: dict[str, list[Call]]) -> list[Call]:
    """The calls of the storage node with the median of calls."""
    nodes = sorted((found for name, found in calls.items() if name != "gateway"), key=calls_of)
    return nodes[len(nodes) // 2]


def drawn(title: str, process: str, calls: Sequence[Call], show: bool) -> str:
    """One line of the table, and below it every call when ``show``."""
    hops = Hops.of(calls)
    lines = [f"{title:10} {process:8} {hops.calls:6} {hops.across:14} {len(hops.modules):8}"]
    if show:
        lines += [f"    {count:3} {caller} > {module}.{function}" for caller, module, function, count in calls]
    return "\n".join(lines)


async def measure(server: Server, probes: Probes, size: int, repeats: int, show: bool) -> None:
    """Prints the table. Raises WrongAnswer when a request fails."""
    await rows.make_bucket(server.target, BUCKET)
    seeding = rows.putting(server.target, BUCKET, "seed-", Bodies(size), size)
    connection = await connect(server.target)
    for number in range(SEEDS):
        await make(connection, seeding(number))
    connection.close()
    print(f"{f'{size / KIB:g} KiB':10} {'process':8} {'calls':>6} {'across modules':>14} {'modules':>8}")
    for verb in ("PUT", "GET"):
        for kind in ("hot", "fresh", "idle"):
            found = await counted(server, probes, verb, kind, size, repeats)
            for process, calls in zip(("gateway", "node"), found, strict=True):
                print(drawn(f"{verb} {kind}", process, calls, show), flush=True)


@contextlib.contextmanager
def probed(parent: Path | None, tree: Path) -> Iterator[tuple[Server, Probes]]:
    """The trial cluster of a source tree, with probes."""
    with tempfile.TemporaryDirectory(prefix="storaged-hops-", dir=parent) as place:
        folder = Path(place)
        shutil.copy(hops_probe.__file__, folder / "sitecustomize.py")
        os.environ["HOPS_DIR"] = place
        with storaged_cluster(parent, tree=Path(f"{place}{os.pathsep}{tree}"), workers=1) as server:
            yield server, Probes(folder, server)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="benches.hops", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tree", type=Path, default=Path(__file__).parents[1], help="whose servers to count")
    parser.add_argument("--size", type=int, default=4 * KIB, help="bytes of the objects")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--show", action="store_true", help="print every call")
    parser.add_argument("--dir", type=Path)
    wanted = parser.parse_args()
    end_on_sigterm()
    with probed(wanted.dir, wanted.tree.resolve()) as (server, probes):
        try:
            uvloop.run(measure(server, probes, wanted.size, wanted.repeats, wanted.show))
        except (WrongAnswer, OSError) as error:
            print(f"{server.name}: {error}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        sys.exit(main())
    sys.exit(130)

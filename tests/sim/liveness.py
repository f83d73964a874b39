"""How many operations get through, and how long the slowest waits, with at most one fault at a time.

``python -m tests.sim --liveness`` prints a table, and one of ``liveness_moving``. Each row is one kind of fault,
which comes and goes while gateways with the program's own patience read and write a few keys. Time is virtual, so the
figures are the same on every machine, and ``BOUNDS`` can be tight.
"""

from __future__ import annotations

import argparse
import asyncio
import random
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import structlog.testing

from storaged.errors import OutcomeUnknown, StoragedError
from storaged.meta.client import CALL_TIMEOUT_S, DEADLINE_S, HEDGE_S
from storaged.meta.consensus.register import RULES, Rules
from storaged.meta.names import RegisterName, Table
from tests.sim.changing import resolve
from tests.sim.cluster import DISKS, FIRST_SEEDS, Gateway, StorageNode, Weather, World, make_layout
from tests.sim.virtual import VirtualLoop, run
from tests.sim.workload import ObjectName, put

SECONDS = 8.0
"""Of virtual time, for each row."""
FAULT_S = 1.0
QUIET_S = 0.5
GATEWAY_STILL_S = 0.5
"""After each fault."""
GATEWAYS = 3
WRITERS = 2
"""Of each gateway."""
KEYS = 16
FINE = Weather(sync_ms=4.0, refuse=0.0)


@dataclass
class Measured:
    """``longest_s``: of a call, whatever became of it. ``refused``: calls that failed and changed nothing."""

    done: int = 0
    unknown: int = 0
    refused: int = 0
    longest_s: float = 0.0
    trace: str = ""
    waits: list[float] = field(default_factory=list)

    @property
    def a_minute(self) -> int:
        return round(self.done * 60 / SECONDS)


class Bound(NamedTuple):
    """``a_minute``: at least so many operations done. ``longest_s``: no call waits longer. ``failed``: at most so many
    of a thousand calls fail, or end with an unknown outcome.
    """

    a_minute: int
    longest_s: float
    failed: int


class Liveness:
    def __init__(self, fault: str, seed: int, loop: VirtualLoop, rules: Rules) -> None:
        self.random = random.Random(f"{fault} {seed}")
        self.world = World(loop, self.random, rules, weather=FINE, promises_max=1000, skew_ms_max=200)
        self.fault = FAULTS[fault]
        self.measured = Measured()
        self.layout = make_layout(1, FIRST_SEEDS)
        self.gateways: list[Gateway] = []
        self.names: list[RegisterName] = [ObjectName(Table.OBJECT, bytes(16), 0, b"%d" % at) for at in range(KEYS)]
        self._end = 0.0
        self._writers: dict[str, list[asyncio.Task[None]]] = {}

    async def writer(self, gateway: Gateway) -> None:
        loop, measured = self.world.loop, self.measured
        while loop.time() < self._end:
            await asyncio.sleep(self.random.expovariate(1 / 0.02))
            name, began = self.random.choice(self.names), loop.time()
            try:
                if self.random.random() < 0.5:
                    await gateway.client.read(name)
                else:
                    await gateway.client.change(name, put(b"value", b""), regardless=self.random.random() < 0.7)
                measured.done += 1
            except OutcomeUnknown:
                measured.unknown += 1
            except StoragedError:
                measured.refused += 1
            measured.waits.append(loop.time() - began)

    def begin_writers(self, gateway: Gateway) -> None:
        create = self.world.loop.create_task
        self._writers[gateway.name] = [create(self.writer(gateway)) for _ in range(WRITERS)]

    def writers(self) -> list[asyncio.Task[None]]:
        return [task for tasks in self._writers.values() for task in tasks]

    async def kill(self, gateway: Gateway) -> None:
        """What its callers wait for never comes."""
        for task in self._writers[gateway.name]:
            task.cancel()
        await gateway.crash()

    async def faults(self) -> None:
        while True:
            await asyncio.sleep(QUIET_S)
            await self.fault(self)

    def replica_node(self) -> StorageNode:
        return self.world.nodes["n" + self.random.choice(FIRST_SEEDS)[1:]]

    async def play(self) -> Measured:
        for disk in DISKS:
            StorageNode(self.world, "n" + disk[1:], disk)
        patience: dict[str, Any] = {"deadline_s": DEADLINE_S, "call_timeout_s": CALL_TIMEOUT_S, "hedge_s": HEDGE_S}
        self.gateways = [Gateway(self.world, f"g{index}", self.layout, **patience) for index in range(GATEWAYS)]
        self._end = self.world.loop.time() + SECONDS
        faults = self.world.loop.create_task(self.faults())
        for gateway in self.gateways:
            self.begin_writers(gateway)
        await asyncio.sleep(SECONDS)
        faults.cancel()
        await asyncio.gather(faults, *self.writers(), return_exceptions=True)
        for gateway in self.gateways:
            await gateway.client.close()
        self.measured.longest_s = max(self.measured.waits)
        self.measured.trace = self.world.trace()
        return self.measured


# --- one fault at a time; each is over when it returns ----------------------------------------------------------------


async def _none(play: Liveness) -> None:
    await asyncio.sleep(FAULT_S)


async def _node_dies(play: Liveness) -> None:
    node = play.replica_node()
    node.crash()
    try:
        await asyncio.sleep(FAULT_S)
    finally:
        node.start()


async def _node_cut_off(play: Liveness) -> None:
    play.world.cut = frozenset((play.replica_node().name,))
    try:
        await asyncio.sleep(FAULT_S)
    finally:
        play.world.cut = frozenset()


async def _node_stands_still(play: Liveness) -> None:
    await _stand_still(play, play.replica_node().name, FAULT_S)


async def _stand_still(play: Liveness, process: str, seconds: float) -> None:
    play.world.stop(process)
    try:
        await asyncio.sleep(seconds)
    finally:
        play.world.go_on(process)


async def _disk_hangs(play: Liveness) -> None:
    medium, event = play.replica_node().medium, asyncio.Event()
    medium.hung = event
    try:
        await asyncio.sleep(FAULT_S)
    finally:
        medium.hung = None
        event.set()


async def _disk_is_swapped(play: Liveness) -> None:
    """It is refused, for good: one disk of three is away."""
    node = play.world.nodes["n1"]
    if not node.foreign:
        node.crash()
        node.blank_disk()
        node.start()
    await asyncio.sleep(FAULT_S)


async def _gateway_dies(play: Liveness) -> None:
    gateway = play.random.choice(play.gateways)
    await play.kill(gateway)
    try:
        await asyncio.sleep(0.1)
    finally:
        gateway.start()
        play.begin_writers(gateway)


async def _gateway_stands_still(play: Liveness) -> None:
    await _stand_still(play, play.random.choice(play.gateways).name, GATEWAY_STILL_S)


async def _messages_lost(play: Liveness) -> None:
    play.world.weather = Weather(lose=0.02, duplicate=0.02, slow=0.02, refuse=0.0)
    try:
        await asyncio.sleep(FAULT_S)
    finally:
        play.world.weather = FINE


async def _clock_jumps(play: Liveness) -> None:
    play.random.choice(play.gateways).clock.skew_ms = play.random.choice((-50_000, 50_000, 0))
    await asyncio.sleep(FAULT_S)


FAULTS: dict[str, Callable[[Liveness], Coroutine[Any, Any, None]]] = {
    "none": _none,
    "a storage node dies": _node_dies,
    "a storage node is cut off": _node_cut_off,
    "a storage node stands still": _node_stands_still,
    "a disk hangs": _disk_hangs,
    "a disk is refused": _disk_is_swapped,
    "a gateway dies": _gateway_dies,
    "a gateway stands still": _gateway_stands_still,
    "messages are lost": _messages_lost,
    "a gateway's clock jumps": _clock_jumps,
}

BOUNDS = {
    "none": Bound(9_000, 0.15, 60),
    "a storage node dies": Bound(7_000, 1.0, 60),
    "a storage node is cut off": Bound(6_000, 1.0, 80),
    "a storage node stands still": Bound(6_000, 1.0, 80),
    "a disk hangs": Bound(7_500, 0.5, 80),
    "a disk is refused": Bound(7_500, 0.5, 100),
    "a gateway dies": Bound(6_500, 1.5, 80),
    "a gateway stands still": Bound(6_500, 1.5, 80),
    "messages are lost": Bound(4_000, 6.5, 60),
    "a gateway's clock jumps": Bound(8_000, 0.3, 60),
}
"""What was measured, with a third to spare. A lost message costs the call its time-out, of 5 s. A proposer that waits
for its turn at a node that dies waits for half a second.
"""


def run_liveness(fault: str, seed: int = 1, rules: Rules = RULES) -> Measured:
    loop = VirtualLoop()
    play = Liveness(fault, seed, loop, rules)
    with structlog.testing.capture_logs():
        try:
            return run(loop, play.play())
        finally:
            play.world.close()


def broken(fault: str, measured: Measured) -> str:
    """Which bound does not hold; empty: all do."""
    bound, calls = BOUNDS[fault], len(measured.waits)
    failed = (measured.unknown + measured.refused) * 1000 / calls
    if measured.a_minute < bound.a_minute:
        return f"{measured.a_minute} operations a minute, fewer than {bound.a_minute}"
    if measured.longest_s > bound.longest_s:
        return f"a call waited for {measured.longest_s:.2f} s, longer than {bound.longest_s} s"
    if failed > bound.failed:
        return f"{failed:.0f} of a thousand calls failed, more than {bound.failed}"
    return ""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.sim --liveness", description=__doc__)
    parser.add_argument("--first", type=int, default=1, metavar="SEED")
    options = parser.parse_args(arguments)
    missed = 0
    print("fault | done a minute | longest wait s | unknown | refused | bound broken")
    for fault in FAULTS:
        found = run_liveness(fault, options.first)
        wrong = broken(fault, found) if fault in BOUNDS else ""
        missed += bool(wrong)
        print(f"{fault} | {found.a_minute} | {found.longest_s:.3f} | {found.unknown} | {found.refused} | {wrong}")
    missed += resolve("tests.sim.liveness_moving:show")(options.first)
    return 1 if missed else 0

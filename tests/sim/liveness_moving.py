"""As ``liveness``, while partitions move: one fault at a time comes and goes, and the program's own mover has to end.

Each row says how many operations were done a virtual minute meanwhile, and after how many virtual seconds the last
partition had settled. A mover that has not ended after ``ENDS_S`` makes no progress.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any, NamedTuple

import msgspec
import structlog.testing

from storaged.cluster.partitions import PartitionRecord, is_settled
from storaged.cluster.ports import Method
from storaged.errors import StoragedError
from storaged.maintain.partition_mover import MoverPorts
from storaged.meta.client import CALL_TIMEOUT_S, DEADLINE_S, HEDGE_S
from storaged.meta.consensus.register import RULES, Rules
from storaged.meta.listing.merge import RingScanner
from storaged.meta.names import object_name
from tests.sim.cluster import DISKS, FIRST_SEEDS, StorageNode, World, make_layout
from tests.sim.liveness import FAULTS, Liveness, Measured
from tests.sim.partitions import Mover, Node, Process
from tests.sim.virtual import VirtualLoop, run

ENDS_S = 180.0
NAMES = [object_name(b"bucket %d of test" % (at % 4), range(2), b"%d" % at) for at in range(12)]
NUMBERS = sorted({name.partition for name in NAMES})
MOVER = "m0"


@dataclass
class Moved(Measured):
    settled_s: float = ENDS_S
    steps: int = 0
    seconds: float = 0.0

    @property
    def a_minute(self) -> int:
        return round(self.done * 60 / self.seconds)


class Bound(NamedTuple):
    """``a_minute``: at least so many operations done. ``settled_s``: all partitions have settled by then."""

    a_minute: int
    settled_s: float


class Sound:
    """Liveness that is right: a disk whose node is down is away."""

    def __init__(self, world: World) -> None:
        self._world = world

    def disk_readable(self, disk_id: str) -> bool:
        return self._world.nodes["n" + disk_id[1:]].up

    disk_prompt = disk_readable

    def disk_writable(self, disk_id: str) -> bool:
        return self.disk_readable(disk_id)


class LivenessOfMoves(Liveness):
    def __init__(self, fault: str, seed: int, loop: VirtualLoop, rules: Rules) -> None:
        super().__init__("none", seed, loop, rules)
        self.fault = MOVING_FAULTS[fault]
        self.measured: Moved = Moved()
        whole = make_layout(1, FIRST_SEEDS)
        # Two disks leave, of which each partition has one at least; three are left.
        before = tuple(msgspec.structs.replace(disk, state=_state(disk.id, "d3 d4")) for disk in whole.disks)
        after = tuple(msgspec.structs.replace(disk, state=_state(disk.id, "d0 d1")) for disk in whole.disks)
        self.layouts = [
            msgspec.structs.replace(whole, disks=before),
            msgspec.structs.replace(whole, disks=after, epoch=2, base=1),
        ]
        self.layout = self.layouts[-1]
        self.known = dict.fromkeys(("g0", "g1", "g2", MOVER), self.layout)
        self.world.epochs = 2
        self.names = list(NAMES)
        self.mover: Process | None = None
        self._moving: asyncio.Task[None] | None = None
        Node.scenario = self  # type: ignore[assignment]  # it asks for the layouts alone

    def replica_node(self) -> StorageNode:
        return self.world.nodes["n" + self.random.choice(DISKS)[1:]]

    def methods_of(self, _node: str) -> dict[str, Method]:
        """As ``partitions.Moving``."""
        return {}

    def note_record(self, record: PartitionRecord) -> None:
        """It has no rule of operators."""

    def begin_mover(self) -> None:
        process = self.mover = Process(self, MOVER, skew_ms=0)  # type: ignore[arg-type]
        sound = Sound(self.world)
        scanner = RingScanner(process.layouts, process.directory, process.client, sound, refresh=process.refresh)
        ports = MoverPorts(
            process.layouts,
            process.client,
            scanner,
            process.client,
            process.client.moves,
            sound,
            process.clock,
            lambda record: record,
            process.refresh,
        )
        mover = Mover(ports, partitions=NUMBERS)

        async def move() -> None:
            try:
                await mover.run()
            finally:
                self.measured.steps += mover.progress.steps

        self._moving = self.world.loop.create_task(move())

    async def end_mover(self) -> None:
        if self._moving is not None and self.mover is not None:
            self._moving.cancel()
            await asyncio.gather(self._moving, return_exceptions=True)
            await self.mover.crash()

    async def _refreshed(self) -> bool:
        """Whether everything has settled, as another process reads it."""
        looker = Process(self, "looker", skew_ms=0)  # type: ignore[arg-type]
        looker.layouts.learn(self.layout)
        try:
            for number in NUMBERS:
                await looker.refresh(number)
        except StoragedError:
            return False
        finally:
            await looker.client.close()
        return all(is_settled(looker.layouts.partition(number), self.layout) for number in NUMBERS)

    async def play(self) -> Moved:
        loop, measured = self.world.loop, self.measured
        for disk in DISKS:
            Node(self.world, "n" + disk[1:], disk)
        patience: dict[str, Any] = {"deadline_s": DEADLINE_S, "call_timeout_s": CALL_TIMEOUT_S, "hedge_s": HEDGE_S}
        self.gateways = [Process(self, f"g{index}", **patience) for index in range(3)]  # type: ignore[arg-type]
        self._end = ENDS_S
        for gateway in self.gateways:
            self.begin_writers(gateway)
        await asyncio.sleep(2.0)
        began = loop.time()
        self.begin_mover()
        faults = loop.create_task(self.faults())
        while loop.time() < ENDS_S and measured.settled_s == ENDS_S:
            await asyncio.sleep(0.5)
            if await self._refreshed():
                measured.settled_s = loop.time() - began
        self._end = measured.seconds = loop.time()
        faults.cancel()
        await asyncio.gather(faults, *self.writers(), return_exceptions=True)
        await self.end_mover()
        for gateway in self.gateways:
            await gateway.client.close()
        measured.longest_s = max(measured.waits)
        measured.trace = self.world.trace()
        return measured


def _state(disk: str, going: str) -> str:
    return "draining" if disk in going else "active"


async def _mover_dies(play: Liveness) -> None:
    assert isinstance(play, LivenessOfMoves)
    await play.end_mover()
    await asyncio.sleep(0.1)
    play.begin_mover()
    await asyncio.sleep(play.random.uniform(0.2, 4.0))


async def _mover_stands_still(play: Liveness) -> None:
    play.world.stop(MOVER)
    try:
        await asyncio.sleep(1.0)
    finally:
        play.world.go_on(MOVER)


async def _new_disk_hangs(play: Liveness) -> None:
    medium, event = play.world.nodes["n" + play.random.choice("34")].medium, asyncio.Event()
    medium.hung = event
    try:
        await asyncio.sleep(3.0)
    finally:
        medium.hung = None
        event.set()


MOVING_FAULTS: dict[str, Callable[[Liveness], Coroutine[Any, Any, None]]] = {
    **{name: fault for name, fault in FAULTS.items() if name != "a disk is refused"},
    "the mover dies": _mover_dies,
    "the mover stands still": _mover_stands_still,
    "a new disk hangs for longer": _new_disk_hangs,
}
"""Not a disk that is refused for good: while the layout wants it, its partitions wait for it."""


def run_moving_liveness(fault: str, seed: int = 1, rules: Rules = RULES) -> Moved:
    loop = VirtualLoop()
    play = LivenessOfMoves(fault, seed, loop, rules)
    with structlog.testing.capture_logs():
        try:
            return run(loop, play.play())
        finally:
            play.world.close()


def show(seed: int) -> int:
    """Prints the table. Returns how many bounds do not hold."""
    missed = 0
    print("fault, while partitions move | done a minute | longest wait s | unknown | refused | settled after s | steps")
    for fault in MOVING_FAULTS:
        found = run_moving_liveness(fault, seed)
        wrong = broken(fault, found)
        missed += bool(wrong)
        print(
            f"{fault} | {found.a_minute} | {found.longest_s:.3f} | {found.unknown} | {found.refused}"
            f" | {found.settled_s:.1f} | {found.steps} | {wrong}"
        )
    return missed


def broken(fault: str, measured: Moved) -> str:
    bound = BOUNDS[fault]
    if measured.settled_s >= bound.settled_s:
        return f"partitions had not settled after {measured.settled_s:.0f} s, later than {bound.settled_s} s"
    if measured.a_minute < bound.a_minute:
        return f"{measured.a_minute} operations a minute, fewer than {bound.a_minute}"
    return ""


BOUNDS = {
    "none": Bound(8_000, 12.0),
    "a storage node dies": Bound(6_500, 25.0),
    "a storage node is cut off": Bound(5_000, 30.0),
    "a storage node stands still": Bound(6_000, 25.0),
    "a disk hangs": Bound(7_000, 20.0),
    "a gateway dies": Bound(6_500, 12.0),
    "a gateway stands still": Bound(6_000, 12.0),
    "messages are lost": Bound(4_000, 40.0),
    "a gateway's clock jumps": Bound(7_500, 12.0),
    "the mover dies": Bound(7_500, 40.0),
    "the mover stands still": Bound(7_500, 20.0),
    "a new disk hangs for longer": Bound(7_500, 45.0),
}
"""What was measured, with something to spare: a round of the mover that waits for a dead disk takes 5 s."""

"""As ``collecting``, while the partition of all objects moves from disks to disks, back and forth.

The program's own mover takes it there, and dies and begins again; gateways and collectors learn of each step at another
time. What a record names stays where it is, whichever set the record is in, and small copies follow the record. When
all is well the partition is where the last layout wants it, and what no record names goes from all disks.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Coroutine, Sequence
from typing import Any

import msgspec

from storaged.cluster.layout import Layout
from storaged.cluster.partitions import PartitionRecord, is_settled
from storaged.cluster.ports import Method
from storaged.errors import StoragedError
from storaged.fragments.payloads import header_at_position
from storaged.maintain.partition_mover import MoverPorts, PartitionMover
from storaged.meta.consensus.register import RULES, Rules
from tests.sim.cluster import DISKS, Gateway, make_layout
from tests.sim.collecting import Collecting, CollectingNode
from tests.sim.hostile import Reachable
from tests.sim.partitions import Node, Process
from tests.sim.scenario import play_out
from tests.sim.virtual import VirtualLoop
from tests.sim.workload import Verdicts

PATIENCE_S = 60.0


class MovingNode(CollectingNode, Node):
    """It collects, and learns where the partition is."""


def layouts_of(chance: random.Random, number: int) -> list[Layout]:
    """The first one places the partition; each of the others moves it."""
    found: list[Layout] = []
    while len(found) < 4:
        active = chance.sample(DISKS, chance.choice((3, 4)))
        whole = make_layout(len(found) + 1, DISKS[:3])
        disks = tuple(
            disk if disk.id in active else msgspec.structs.replace(disk, state="draining") for disk in whole.disks
        )
        layout = msgspec.structs.replace(whole, disks=disks, base=1 if found else 0)
        if not found or {*layout.replicas_of(number)} != {*found[-1].replicas_of(number)}:
            found.append(layout)
    return found


class CollectingMoves(Collecting):
    node_kind = MovingNode

    def __init__(self, seed: int, loop: VirtualLoop, rules: Rules) -> None:
        super().__init__(seed, loop, rules)
        self.chance = random.Random(f"moves {seed}")
        self.number = self.name(b"").partition
        self.numbers: Sequence[int] = (self.number,)
        """Of the partitions that move."""
        self.layouts = layouts_of(self.chance, self.number)
        self.layout = self.layouts[-1]
        self.world.epochs = self.layout.epoch
        self.known: dict[str, Layout] = {}
        """Of processes that know more than the first layout."""
        self.newest: PartitionRecord | None = None
        """The record of the partition when all is well: every process has read it by then."""
        Node.scenario = self  # type: ignore[assignment]  # it asks for the layouts alone

    def methods_of(self, _node: str) -> dict[str, Method]:
        """As ``partitions.Moving``, and so is ``note_record``."""
        return {}

    def note_record(self, record: PartitionRecord) -> None:
        """It has no rule of operators."""

    def process(self, name: str, **options: Any) -> Gateway:
        process = Process(self, name, **options)  # type: ignore[arg-type]
        if self.newest is not None:
            process.layouts.partitions.learn(self.newest)
        return process

    def more(self) -> Sequence[Coroutine[Any, Any, None]]:
        return self._announce(), self._move()

    async def _announce(self) -> None:
        """Each process learns of each layout at another time."""
        for layout in self.layouts[1:]:
            await asyncio.sleep(self.chance.uniform(0, 1.5))
            for name in ("m0", *(f"g{index}" for index in range(3)), *self.world.nodes):
                self.world.loop.call_later(self.chance.uniform(0, 1.0), self._learn, name, layout)

    def _learn(self, name: str, layout: Layout) -> None:
        if name not in self.known or self.known[name].epoch < layout.epoch:
            self.known[name] = layout
        for gateway in self.gateways:
            if gateway.name == name:
                gateway.layouts.learn(self.known[name])

    def _mover(self) -> tuple[Process, PartitionMover]:
        process = Process(self, "m0", skew_ms=0, copy_at=header_at_position)  # type: ignore[arg-type]
        alive = Reachable(self.world)
        ports = MoverPorts(
            process.layouts,
            process.client,
            self.scanner(process),
            process.client,
            process.client.moves,
            alive,  # type: ignore[arg-type]
            process.clock,
            lambda record: record,
            process.refresh,
        )
        return process, PartitionMover(ports, lost_s=self.chance.choice((1.0, 20.0)), partitions=self.numbers)

    async def _move(self) -> None:
        """One life of a mover after the other, until it is cancelled."""
        while True:
            process, mover = self._mover()
            try:
                async with asyncio.timeout(self.chance.uniform(0.3, 6.0)):
                    while True:
                        await self._round(process, mover)
            except TimeoutError:
                self.found.faults.append("m0 died")
            finally:
                self.found.done["steps"] += mover.progress.steps
                await process.crash()

    async def _round(self, process: Process, mover: PartitionMover) -> None:
        process.layouts.learn(self.known.get("m0", self.layouts[0]))
        with contextlib.suppress(StoragedError):
            await process.refresh(self.number)
        await mover.round()
        await asyncio.sleep(self.chance.uniform(0.02, 0.3))

    async def make_reader(self) -> Gateway:
        """The mover ends first."""
        self.known = dict.fromkeys(("m0", "reader", *(gateway.name for gateway in self.gateways)), self.layout)
        self.known |= dict.fromkeys(self.world.nodes, self.layout)
        for gateway in self.gateways:
            gateway.layouts.learn(self.layout)
        process, mover = self._mover()
        gone = {node.disk for node in self.world.nodes.values() if node.foreign}
        try:
            async with asyncio.timeout(PATIENCE_S):
                while not self._ended(process, gone):
                    await self._round(process, mover)
        except TimeoutError:
            self.complain(f"the partition does not reach its place: {mover.progress.reason}")
        self.found.done["steps"] += mover.progress.steps
        await process.crash()
        reader = Process(self, "reader", skew_ms=0, copy_at=header_at_position)  # type: ignore[arg-type]
        await reader.refresh(self.number)
        for gateway in self.gateways:
            await gateway.refresh(self.number)  # type: ignore[attr-defined]
        self.newest = reader.layouts.partitions.record(self.number)
        return reader

    def _ended(self, process: Process, gone: set[str]) -> bool:
        """A partition waits for a disk that is gone while the layout wants it."""
        state = process.layouts.partition(self.number)
        waits = gone & {*self.layout.replicas_of(self.number)} - {*state.present}
        return is_settled(state, self.layout) or (not state.coming and bool(waits))


def run_collecting_moves(seed: int, rules: Rules = RULES) -> Verdicts:
    """As ``scenario.run_seed``, of these."""
    return play_out(lambda loop: CollectingMoves(seed, loop, rules))  # type: ignore[arg-type,return-value]

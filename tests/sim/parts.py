"""What goes wrong in a run, in parts: each is a nemesis that joins some of the runs.

``registry.PARTS`` lists them. A part decides by itself, from a source of randomness of its own, whether it joins a run:
a new part changes nothing in the runs that it does not join.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import random
from typing import TYPE_CHECKING

from storaged.disk_room import UNKNOWN_BYTES
from storaged.errors import StoragedError
from storaged.meta import messages
from storaged.meta.consensus.register import COUNTER_MAX
from storaged.meta.names import Ballot
from tests.sim.cluster import Gateway, StorageNode, Weather

if TYPE_CHECKING:
    from tests.sim.scenario import Scenario


class Part:
    """``run`` begins with the workload and is cancelled when that has ended, unless ``finishes``: then it ends by
    itself, and the run waits for it. ``chance`` decides what it does; ``self.scenario.found.faults`` should name it.
    """

    finishes = False

    def __init__(self, scenario: Scenario, chance: random.Random) -> None:
        self.scenario = scenario
        self.world = scenario.world
        self.chance = chance

    @classmethod
    def joins(cls, scenario: Scenario, chance: random.Random) -> bool:
        """Whether it joins this run. Parts that come later in the list see it in ``scenario.parts``."""
        return True

    async def run(self) -> None:
        """Does its worst."""

    async def heal(self) -> None:
        """Everything that it broke is whole again, as far as that can be."""

    async def judge(self, reader: Gateway) -> None:
        """Everything is whole and quiet. Calls ``scenario.complain`` for what must not be."""

    # --- for its use

    def fault(self, text: str) -> None:
        self.scenario.found.faults.append(text)

    def replica_node(self) -> StorageNode:
        return self.world.nodes["n" + self.chance.choice(self.scenario.first_seeds)[1:]]


class Trouble(Part):
    """Crashes, partitions and bad weather; sometimes, once, a disk is swapped for a blank one while its node is
    down."""

    async def run(self) -> None:
        chance, world = self.chance, self.world
        wipe = self.scenario.disks_may_be_swapped
        while True:
            await asyncio.sleep(chance.expovariate(1 / 0.08))
            choice, node = chance.random(), self.replica_node()
            if choice < 0.5 and node is self.scenario.dies_with_its_gateway:
                continue
            if choice < 0.5 and node.up:
                node.crash()
                self.fault(f"{node.name} died")
                if wipe and chance.random() < 0.3:
                    wipe = False
                    node.blank_disk()
                    self.fault(f"{node.name} got a blank disk")
                world.loop.call_later(chance.choice((0.0, 0.005, 0.02, 0.2)), self.scenario.restart, node)
            elif choice < 0.75:
                names = [*world.nodes, *(gateway.name for gateway in self.scenario.gateways)]
                world.cut = frozenset(name for name in names if chance.random() < 0.4)
                world.note("cut", sorted(world.cut))
                world.loop.call_later(chance.choice((0.02, 0.1, 0.5)), self._mend)
            else:
                world.weather = self.scenario.weather()

    def _mend(self) -> None:
        self.world.cut = frozenset()

    async def heal(self) -> None:
        self.world.note("heal")
        self.world.cut = frozenset()
        self.world.weather = Weather()
        for node in self.world.nodes.values():
            if node.silent and not node.foreign:
                node.crash()
            self.scenario.restart(node)


class Stray(Part):
    """A gateway whose clock is at the end of all time asks every replica for a promise above all others, and gets no
    further."""

    finishes = True

    @classmethod
    def joins(cls, scenario: Scenario, chance: random.Random) -> bool:
        return chance.random() < 0.15

    async def run(self) -> None:
        await asyncio.sleep(self.chance.uniform(0, 0.4))
        self.fault("a clock at the end of time")
        scenario = self.scenario
        stray = Gateway(self.world, "stray", scenario.layout)
        ballot = Ballot(scenario.layout.epoch, COUNTER_MAX, "stray", bytes(8))
        for name in scenario.names.values():
            for disk in scenario.layout.seeds:
                with contextlib.suppress(StoragedError):
                    await stray.directory.replica(disk).prepare(messages.Prepare(disk, name, ballot), timeout_s=0.2)
        await stray.client.close()


class HungDisks(Part):
    """Now and then one disk writes nothing for a while, or its node stops for a while."""

    @classmethod
    def joins(cls, scenario: Scenario, chance: random.Random) -> bool:
        return chance.random() < 0.25

    async def run(self) -> None:
        chance = self.chance
        while True:
            await asyncio.sleep(chance.expovariate(1 / 0.15))
            node, seconds = self.replica_node(), chance.choice((0.05, 0.3, 1.0))
            if chance.random() < 0.5:
                self.fault(f"the disk of {node.name} hung")
                self.world.note("hung", node.name)
                medium, event = node.medium, asyncio.Event()
                medium.hung = event
                try:
                    await asyncio.sleep(seconds)
                finally:
                    medium.hung = None
                    event.set()
            else:
                self.fault(f"{node.name} stood still")
                self.world.stop(node.name)
                try:
                    await asyncio.sleep(seconds)
                finally:
                    self.world.go_on(node.name)


class Suspensions(Part):
    """Now and then a gateway stops for a while, and so do its messages that are under way."""

    @classmethod
    def joins(cls, scenario: Scenario, chance: random.Random) -> bool:
        return chance.random() < 0.2

    async def run(self) -> None:
        chance = self.chance
        while True:
            await asyncio.sleep(chance.expovariate(1 / 0.2))
            gateway = chance.choice(self.scenario.gateways)
            self.fault(f"{gateway.name} stood still")
            self.world.stop(gateway.name)
            try:
                await asyncio.sleep(chance.choice((0.05, 0.5, 1.5)))
            finally:
                self.world.go_on(gateway.name)


class ClockJumps(Part):
    """Clocks of nodes and gateways are set forward and back."""

    @classmethod
    def joins(cls, scenario: Scenario, chance: random.Random) -> bool:
        return chance.random() < 0.25

    async def run(self) -> None:
        chance = self.chance
        self.fault("clocks jump")
        while True:
            await asyncio.sleep(chance.expovariate(1 / 0.1))
            process = chance.choice([*self.world.nodes.values(), *self.scenario.gateways])
            process.clock.skew_ms = chance.choice((0, -90_000, 80_000, -3_000, 50_000)) + self.world.skew_ms()
            self.world.note("clock", process.name, process.clock.skew_ms)


class DiskFaults(Part):
    """One disk refuses a write, or has no room for it. Only on files."""

    @classmethod
    def joins(cls, scenario: Scenario, chance: random.Random) -> bool:
        alone = not scenario.disks_may_be_swapped and not scenario.moves
        return scenario.world.on_files and alone and chance.random() < 0.5

    async def run(self) -> None:
        chance, node = self.chance, self.replica_node()
        while True:
            await asyncio.sleep(chance.expovariate(1 / 0.2))
            faults = node.medium.faults if node.up else None
            code = chance.choice((errno.ENOSPC, errno.ENOSPC, errno.EIO, -1))
            if faults is None:
                continue
            self.fault(f"a write at {node.name} fails ({errno.errorcode.get(code, 'short')})")
            if chance.random() < 0.6:
                faults.write = code
            else:
                faults.checkpoint = abs(code) if code > 0 else errno.EIO


class FullDisks(Part):
    """Now and then a disk has no room for longer rows, sometimes not for those of settling rounds either. Rows that get
    no longer, and deletes, it always takes.
    """

    @classmethod
    def joins(cls, scenario: Scenario, chance: random.Random) -> bool:
        return chance.random() < 0.25

    async def run(self) -> None:
        chance = self.chance
        while True:
            await asyncio.sleep(chance.expovariate(1 / 0.1))
            node = self.replica_node()
            room = node.store.health.room
            if room.left_bytes < 0 and chance.random() < 0.7:
                room.left_bytes = UNKNOWN_BYTES
            else:
                room.left_bytes, room.settling_bytes = -1, chance.choice((0, UNKNOWN_BYTES, UNKNOWN_BYTES))
                self.fault(f"the disk of {node.name} is full")
                self.world.note("full", node.name, room.settling_bytes)

    async def heal(self) -> None:
        for node in self.world.nodes.values():
            node.store.health.room.left_bytes = UNKNOWN_BYTES


class BitFlips(Part):
    """Bits of rows flip at one disk."""

    @classmethod
    def joins(cls, scenario: Scenario, chance: random.Random) -> bool:
        alone = (
            not scenario.disks_may_be_swapped
            and not scenario.moves
            and not any(isinstance(part, DiskFaults) for part in scenario.parts)
        )
        return alone and chance.random() < 0.3

    async def run(self) -> None:
        chance, node = self.chance, self.replica_node()
        while True:
            await asyncio.sleep(chance.expovariate(1 / 0.1))
            name = chance.choice(list(self.scenario.names.values()))
            if node.up and node.store.damage(name):
                self.world.note("bit flip", node.name, name)
                self.fault(f"a bit flipped at {node.name}")

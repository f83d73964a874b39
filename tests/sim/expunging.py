"""Floors replace the rows of deleted keys, while gateways write, delete and list, and while partitions move.

The expunger is the program's own (``maintain.expunger``): two of its processes run, die and begin again anywhere, with
floors of today or of the future. At the end all is sound: then no tombstone is left that could go, and what was deleted
is still deleted.
"""

from __future__ import annotations

import asyncio
import contextlib
import random

from storaged.errors import StoragedError
from storaged.maintain.expunger import Expunger, ExpungerPorts
from storaged.meta.consensus.register import RULES, Rules
from storaged.meta.listing.merge import RingScanner
from storaged.meta.listing.round import ScanSettings
from storaged.meta.proposer.floors import PartitionFloors
from tests.sim.cluster import Gateway, Weather
from tests.sim.linear import Kind
from tests.sim.listing import Everybody, Listing
from tests.sim.partitions import NUMBERS, PATIENCE_S, Movers, Moving, Process, Wiped
from tests.sim.parts import HungDisks, Part, Trouble
from tests.sim.scenario import play_out
from tests.sim.virtual import VirtualLoop
from tests.sim.workload import Verdicts

EXPUNGERS = 2
OPERATIONS = 14
DELAYS_S = (-60.0, -25.0, -12.0, -1.0)
"""Floors lie in the future: restarts raise ballots by 10 s each."""
END_DELAY_S = -3_000.0


class Expungers(Part):
    def __init__(self, scenario: Moving, chance: random.Random) -> None:
        super().__init__(scenario, chance)
        self.of: Moving = scenario
        self.rows = self.ranges = 0
        self.waiting = ""

    async def run(self) -> None:
        await asyncio.gather(*(self._live(f"x{number}") for number in range(EXPUNGERS)))

    async def _live(self, name: str) -> None:
        chance = self.chance
        while True:
            await asyncio.sleep(chance.uniform(0, 0.1))
            process = Process(self.of, name)
            try:
                async with asyncio.timeout(chance.uniform(0.1, 1.5)):
                    while True:
                        await self._pass(process, chance.choice(DELAYS_S))
                        await asyncio.sleep(chance.uniform(0, 0.05))
            except TimeoutError:
                self.fault(f"{name} died")
            finally:
                await process.crash()

    async def _pass(self, process: Process, delay_s: float) -> Expunger:
        process.layouts.learn(self.of.known.get(process.name, self.of.layouts[-1]))
        for number in NUMBERS:
            with contextlib.suppress(StoragedError):
                await process.refresh(number)
        settings = ScanSettings(timeout_s=0.3, hedge_s=0.02)
        scanner = RingScanner(process.layouts, process.directory, process.client, Everybody(), settings)
        client = process.client
        floors = PartitionFloors(client._calls, timeout_s=0.3)
        ports = ExpungerPorts(process.layouts, scanner, client.moves, floors, Everybody(), process.clock)
        expunger = Expunger(ports, delay_s=delay_s, worthwhile=1, rest_ratio=0.0, partitions=NUMBERS)
        try:
            await expunger.once()
        finally:
            self.rows += expunger.done.rows
            self.ranges += expunger.done.ranges
        return expunger

    async def _all_gone(self, process: Process) -> bool:
        done = (await self._pass(process, END_DELAY_S)).done
        self.waiting = done.waiting
        return not done.left and not done.rows

    async def heal(self) -> None:
        """All tombstones go."""
        process = Process(self.of, "x9", skew_ms=0)
        try:
            async with asyncio.timeout(PATIENCE_S):
                while not await self._all_gone(process):  # noqa: ASYNC110 - nothing tells when
                    await asyncio.sleep(0.1)
        except TimeoutError:
            self.of.complain(f"rows of deleted keys stay for ever: {self.waiting}")
        finally:
            await process.client.close()
            self.of.found.done["expunged"] = self.rows


class Calm(Trouble):
    """All replicas are there most of the time."""

    async def run(self) -> None:
        chance = self.chance
        while True:
            await asyncio.sleep(chance.expovariate(1 / 0.4))
            node = self.replica_node()
            if node.up:
                node.crash()
                self.fault(f"{node.name} died")
                self.world.loop.call_later(chance.choice((0.0, 0.005, 0.02)), self.scenario.restart, node)


class Expunging(Moving):
    """Half of the runs move no partition."""

    def __init__(self, seed: int, loop: VirtualLoop, rules: Rules) -> None:
        super().__init__(seed, loop, rules)
        if self.aside.random() < 0.5:
            self.layouts = self.layouts[:1]
            self.layout = self.layouts[0]
        self.expungers: Expungers

    def join_parts(self) -> None:
        super().join_parts()
        self.expungers = Expungers(self, random.Random(f"Expungers {self.found.seed}"))
        self.parts.append(self.expungers)
        if len(self.layouts) == 1:
            self.parts = [part for part in self.parts if not isinstance(part, Movers)]
        if self.aside.random() < 0.6:
            self.parts = [
                Calm(self, part.chance) if isinstance(part, Trouble) else part
                for part in self.parts
                if not isinstance(part, HungDisks | Wiped)
            ]
            self.world.weather = Weather(0.0, 0.02, 0.02)

    async def worker(self, gateway: Gateway) -> None:
        """Half of them list, the others delete what they write."""
        if self.random.random() < 0.4:
            await Listing.worker(self, gateway)
            return
        for _ in range(OPERATIONS):
            await asyncio.sleep(self.random.uniform(0, 0.06))
            await self.operate(gateway, self.random.choices(tuple(Kind), (20, 30, 15, 35))[0], self._choose_key())


def run_expunging(seed: int, rules: Rules = RULES) -> Verdicts:
    """As ``scenario.run_seed``, of these."""
    return play_out(lambda loop: Expunging(seed, loop, rules))

"""One seeded run: gateways work on a few keys while parts of the run (``parts``) do their worst; then everything heals,
and the history is judged.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable

import structlog.testing

from storaged.errors import StoragedError
from storaged.meta.client import DEADLINE_S
from storaged.meta.consensus.register import RULES, Rules
from storaged.meta.names import RegisterName, Table
from tests.sim import registry
from tests.sim.cluster import (
    DISKS,
    FIRST_SEEDS,
    SKEW_MS_MAX,
    WIDE_SKEW_MS_MAX,
    Gateway,
    StorageNode,
    Weather,
    World,
    make_layout,
)
from tests.sim.linear import Kind, Operation
from tests.sim.parts import Part
from tests.sim.virtual import VirtualLoop, run
from tests.sim.workload import ObjectName, Verdicts, Workload, content_of, put

KEYS = ("x", "y", "z", "w")
FRESH_KEYS = tuple(f"fresh{index}-" for index in range(12))
GATEWAYS = 3


class Scenario(Workload):
    """``aside`` is a source of its own for what kind of run this is, so that what is drawn from it changes nothing in
    the runs without.
    """

    node_kind = StorageNode

    def __init__(self, seed: int, loop: VirtualLoop, rules: Rules) -> None:
        aside = self.aside = random.Random(f"aside {seed}")
        wide = aside.random() < 0.2
        world = World(loop, random.Random(seed), rules, skew_ms_max=WIDE_SKEW_MS_MAX if wide else SKEW_MS_MAX)
        world.promises_max = aside.choice((1, 2, 3, 1000))
        world.on_files = aside.random() < 0.25
        self.first_seeds = DISKS if aside.random() < 0.15 else FIRST_SEEDS
        super().__init__(seed, world, make_layout(1, self.first_seeds))
        self.of_objects = aside.random() < 0.7
        self.fresh = self.of_objects and aside.random() < 0.3
        keys = FRESH_KEYS if self.fresh else KEYS[: aside.choice((2, 2, 4))]
        self.names = {key: self.name(b"sim/" + key.encode()) for key in keys}
        self.last_seen = dict.fromkeys(self.names)
        self.gateways: list[Gateway] = []
        self.dies_with_its_gateway: StorageNode | None = None
        special = aside.random()
        self.disks_may_be_swapped = special < 0.2
        self.moves = special > 0.7 and self.first_seeds == FIRST_SEEDS
        self.disks_may_be_full = special >= 0.9
        self.parts: list[Part] = []
        self.chosen_may_fall = False
        """Disks are lost for good, and what they alone had with them."""

    def join_parts(self) -> None:
        for kind in registry.PARTS:
            chance = random.Random(f"{kind.__name__} {self.found.seed}")
            if kind.joins(self, chance):
                self.parts.append(kind(self, chance))

    def name(self, key: bytes) -> RegisterName:
        return (
            ObjectName(Table.OBJECT, bytes(16), 0, key)
            if self.of_objects
            else RegisterName(Table.SYSTEM, bytes(16), 0, key)
        )

    def restart(self, node: StorageNode) -> None:
        if not node.up and not node.foreign:
            node.start()

    def weather(self) -> Weather:
        level = self.random.choice((0.0, 0.02, 0.1, 0.25))
        full = self.random.choice((0.0, 0.1, 0.5)) if self.disks_may_be_full or self.disks_may_be_swapped else 0.0
        if self.disks_may_be_swapped:
            # the one disk that had room for a copy could be the one that is swapped, and the copy be lost rightly
            full = 0.0
        return Weather(
            level * self.random.random(),
            level * self.random.random(),
            level,
            full,
            self.random.choice((1.0, 4.0, 15.0)),
        )

    # --- the whole

    def begin_gateways(self) -> None:
        """In some runs the first one dies with a storage node, and in some it has two processes."""
        nodes, chance = self.world.nodes, self.aside
        shared = nodes["n0"] if chance.random() < 0.3 else None
        names = [f"g{index}" for index in range(GATEWAYS)] + (["g1.1"] if chance.random() < 0.25 else [])
        self.gateways = [Gateway(self.world, name, self.layout, shared if name == "g0" else None) for name in names]
        self.dies_with_its_gateway = shared

    async def nodes_begin(self) -> None:
        """Returns when gateways may begin."""

    async def play(self) -> None:
        for disk in DISKS:
            self.node_kind(self.world, "n" + disk[1:], disk)
        await self.nodes_begin()
        self.begin_gateways()
        self.world.weather = self.weather()
        self.join_parts()
        tasks = {part: self.world.loop.create_task(part.run()) for part in self.parts}
        await asyncio.gather(*(self.gateway_life(gateway) for gateway in self.gateways))
        self.found.seconds = self.world.loop.time()
        endless = [task for part, task in tasks.items() if not part.finishes]
        for task in endless:
            task.cancel()
        for outcome in await asyncio.gather(*endless, return_exceptions=True):
            if isinstance(outcome, Exception):
                raise outcome
        for part in self.parts:
            await part.heal()
        await asyncio.gather(*(task for part, task in tasks.items() if part.finishes))
        self.tell_gateways()
        reader = await self.make_reader()
        await self.look_at_the_end(reader)
        for part in self.parts:
            await part.judge(reader)
        for gateway in (*self.gateways, reader):
            if gateway.client.chosen_falls[0] and not self.chosen_may_fall:
                self.complain(f"what was chosen fell back: {gateway.client.chosen_falls[1]}")
            await gateway.client.close()

    def tell_gateways(self) -> None:
        """All of them know the last layout."""
        for gateway in self.gateways:
            gateway.layouts.current = self.layout

    async def make_reader(self) -> Gateway:
        """Who looks at the end."""
        return Gateway(self.world, "reader", self.layout, deadline_s=DEADLINE_S)

    async def look_at_the_end(self, reader: Gateway) -> None:
        """Healed, every key can be read and written, and the small copies are still there."""
        await asyncio.sleep(1.0)
        for key in self.names:
            operation = Operation(Kind.READ, key, self.moment())
            try:
                reading = await reader.client.read(self.names[key], want_payload=True)
            except StoragedError as error:
                if not self.copies_may_be_lost:
                    self.complain(f"{key} cannot be read after everything healed: {error!r}")
                continue
            operation.observed, operation.returned = content_of(reading.value), self.moment()
            self.history.append(operation)
            named = reading.value.payload if reading.value is not None else b""
            if named and reading.payload is None and not self.copies_may_be_lost:
                self.complain(f"the small copy of {reading.value.body!r} is lost")
        for key in self.names:
            try:
                await reader.client.change(self.names[key], put(b"the last", b""))
            except StoragedError as error:
                self.complain(f"{key} cannot be written after everything healed: {error!r}")


def run_seed(seed: int, rules: Rules = RULES) -> Verdicts:
    """Plays one seed and judges it. The same seed and rules give the same trace, in every process."""
    return play_out(lambda loop: Scenario(seed, loop, rules))


def run_on_files(seed: int, rules: Rules = RULES) -> Verdicts:
    """As ``run_seed``, always on the program's own store."""

    def begin(loop: VirtualLoop) -> Scenario:
        scenario = Scenario(seed, loop, rules)
        scenario.world.on_files = True
        return scenario

    return play_out(begin)


def play_out(begin: Callable[[VirtualLoop], Scenario]) -> Verdicts:
    loop = VirtualLoop()
    scenario = begin(loop)
    with structlog.testing.capture_logs():
        try:
            run(loop, scenario.play())
            return scenario.judge()
        finally:
            scenario.world.close()

"""Seeds in which the three replicas of a register hear different parts of each round: cuts of one or two disks come and
go within milliseconds, nodes die between a promise and its accept, and come back at once; rows of one disk are damaged.

``scenario`` has everything at once, over longer times. Here the steps of one round are what is torn apart: half of the
writes wait between their promise and their accept, and one gateway's clock is far ahead, so that what it is promised
lies above the high-water ballots on disk. Some small copies have to be on all three disks.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable

from storaged.errors import StoragedError
from storaged.meta.consensus.register import RULES, Rules
from storaged.meta.names import Change, Value
from storaged.meta.ports import SmallCopies
from tests.sim.cluster import FIRST_SEEDS, Gateway, Weather, make_layout
from tests.sim.linear import Kind
from tests.sim.parts import Part, Trouble
from tests.sim.scenario import FRESH_KEYS, Scenario, play_out
from tests.sim.virtual import VirtualLoop
from tests.sim.workload import Verdicts

KEYS = ("x", "y")
AHEAD_MS = (0, 20_000, 60_000, 90_000)


class Flicker(Trouble):
    """Cuts, deaths and damage, every few milliseconds. ``heal`` is that of ``Trouble``."""

    async def run(self) -> None:
        chance, world = self.chance, self.world
        damaged = world.nodes["n" + chance.choice(FIRST_SEEDS)[1:]] if chance.random() < 0.4 else None
        while True:
            await asyncio.sleep(chance.expovariate(1 / 0.012))
            choice, node = chance.random(), self.replica_node()
            if choice < 0.6:
                cut = chance.sample(FIRST_SEEDS, chance.choice((0, 1, 1, 2)))
                world.cut = frozenset("n" + disk[1:] for disk in cut)
                world.note("cut", sorted(world.cut))
            elif choice < 0.85 and node.up:
                node.crash()
                self.fault(f"{node.name} died")
                world.loop.call_later(chance.choice((0.0, 0.001, 0.01)), self.scenario.restart, node)
            elif damaged is not None and damaged.up:
                name = chance.choice(list(self.scenario.names.values()))
                if damaged.store.damage(name):
                    self.fault(f"a bit flipped at {damaged.name}")


class Flickering(Scenario):
    def __init__(self, seed: int, loop: VirtualLoop, rules: Rules) -> None:
        super().__init__(seed, loop, rules)
        aside = self.aside = random.Random(f"flicker {seed}")
        self.world.random = self.random = random.Random(f"flickering {seed}")
        self.world.on_files = False
        self.world.promises_max = aside.choice((3, 1000))
        self.first_seeds, self.layout = FIRST_SEEDS, make_layout(1, FIRST_SEEDS)
        self.of_objects = aside.random() < 0.8
        self.fresh = self.of_objects and aside.random() < 0.6
        self.names = {key: self.name(b"sim/" + key.encode()) for key in (FRESH_KEYS if self.fresh else KEYS)}
        self.last_seen = dict.fromkeys(self.names)
        self.disks_may_be_full = self.disks_may_be_swapped = self.moves = False
        self._least: dict[bytes, int] = {}
        """On how many disks a small copy has to be, by the content of its record."""

    def join_parts(self) -> None:
        self.parts: list[Part] = [Flicker(self, random.Random(f"flickers {self.found.seed}"))]
        ahead = self.aside.choice(self.gateways)
        ahead.clock.skew_ms += self.aside.choice(AHEAD_MS)

    def weather(self) -> Weather:
        return Weather(0.0, 0.05, 0.02, 0.0, 2.0)

    def _barrier(self) -> Awaitable[None] | None:
        if self.random.random() < 0.5:
            return None
        return asyncio.sleep(self.random.choice((0.003, 0.01, 0.03)))

    def _small_copies(self, content: bytes) -> tuple[SmallCopies | None, bytes]:
        small, data_id = super()._small_copies(content)
        if small is None:
            return None, b""
        least = self._least[content] = self.random.choice((2, 3))
        return SmallCopies(data_id, small.fragments, lambda disks: len(disks) >= least), data_id

    async def operate(self, gateway: Gateway, kind: Kind, key: str) -> None:
        before = len(self.history)
        await super().operate(gateway, kind, key)
        for operation in self.history[before:]:
            done = operation.kind is Kind.PUT or (
                operation.kind is Kind.CAS and operation.observed == operation.expected
            )
            least = self._least.get(operation.new or b"", 0)
            if operation.returned >= 0 and done and least:
                self._look_for(operation.new or b"", least)

    def _look_for(self, content: bytes, least: int) -> None:
        (data_id,) = [data_id for data_id, copied in self.copied.items() if copied == content]
        holders = [node.name for node in self.world.nodes.values() if data_id in node.payloads.synced]
        if len(holders) < least:
            self.complain(f"a small object that has to be on {least} disks was acknowledged on {holders}")

    async def look_at_the_end(self, reader: Gateway) -> None:
        """First of all, every record can be changed so that it keeps its copy."""
        await asyncio.sleep(1.0)
        for key, name in self.names.items():
            try:
                await reader.client.change(name, _keep)
            except StoragedError as error:
                self.complain(f"{key} cannot be changed after everything healed: {error!r}")
        await super().look_at_the_end(reader)


def _keep(value: Value | None) -> Change | None:
    return None if value is None else Change(value.body, value.visibility, value.payload)


def run_flicker(seed: int, rules: Rules = RULES) -> Verdicts:
    """As ``scenario.run_seed``, of these."""
    return play_out(lambda loop: Flickering(seed, loop, rules))

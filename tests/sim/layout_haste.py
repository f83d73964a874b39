"""Two more nemeses of ``layouts``: who makes nodes choose between rivals, and who ends exchanges too early."""

from __future__ import annotations

import asyncio
import contextlib
import random

from msgspec.structs import replace

from storaged.cluster.certificates import is_enough, seed_nodes
from storaged.cluster.layout import Layout
from storaged.cluster.messages import AcceptAnswer, OfferAnswer
from storaged.cluster.signed_layout import Acceptance, SignedLayout
from storaged.cluster.succession import base_after, exchanged_seeds, next_epoch
from storaged.errors import LayoutRefused, StoragedError
from storaged.meta.names import system_name
from storaged.wire import encode
from tests.sim.cluster import Weather
from tests.sim.layout_parts import LayoutPart, LostDisk, Register, active
from tests.sim.layouts import Process
from tests.sim.scenario import Scenario

MORE_KEYS = ("s", "t", "u", "v")


class Rivals(LayoutPart):
    """A gateway puts two layouts into the register in turn, has nodes accept both, and gives each to other nodes."""

    @classmethod
    def joins(cls, scenario: Scenario, chance: random.Random) -> bool:
        return chance.random() < 0.1

    async def run(self) -> None:
        self.of.register_lies = True
        self.fault("two layouts are in the register in turn")
        process = self.of.process("l1")
        while True:
            await asyncio.sleep(self.chance.expovariate(1 / 0.1))
            with contextlib.suppress(StoragedError):
                await self._once(process)

    async def _once(self, process: Process) -> None:
        rivals = [signed for signed in (self.next_layout(process), self.next_layout(process)) if signed is not None]
        rivals = [signed for signed in rivals if self.of.by_hash[signed.hash].epoch % 100 == 0]
        if len({signed.hash for signed in rivals}) < 2:
            return
        certified = []
        for signed in rivals:
            await process.paths.write("layout", encode(signed))
            found = await self._acceptances(process, signed)
            layout = self.of.by_hash[signed.hash]
            if is_enough(self.of.by_hash[layout.predecessor], layout, found):
                certified.append(replace(signed, certificate=tuple(found[name] for name in sorted(found))))
        for signed, node in zip(certified, self.chance.sample(sorted(self.world.nodes), 2), strict=False):
            with contextlib.suppress(StoragedError):
                await process.caller.call(node, "cluster.offer", signed, OfferAnswer, timeout_s=0.5)

    async def _acceptances(self, process: Process, signed: SignedLayout) -> dict[str, Acceptance]:
        layout = self.of.by_hash[signed.hash]
        found = {}
        for node in sorted(seed_nodes(self.of.by_hash[layout.predecessor], layout)):
            with contextlib.suppress(StoragedError):
                answer, _ = await process.caller.call(node, "cluster.accept", signed, AcceptAnswer, timeout_s=0.5)
                found[node] = answer.acceptance
        return found


class Haste(LayoutPart):
    """While a node with a seed disk is down another seed is exchanged, and the exchange is ended at once, before any
    gateway has copied something. Then the node is back, and the other one that has everything is down.
    """

    @classmethod
    def joins(cls, scenario: Scenario, chance: random.Random) -> bool:
        others = Register, Rivals, LostDisk
        return chance.random() < 0.25 and not any(isinstance(part, others) for part in scenario.parts)

    def __init__(self, scenario: Scenario, chance: random.Random) -> None:
        """Nothing else fails, so that it gets far; there are more system registers, so that some are not written."""
        super().__init__(scenario, chance)
        self.of.calm = True
        self.of.operations *= 3
        self.of.names |= {key: system_name(key) for key in MORE_KEYS}
        self.of.last_seen |= dict.fromkeys(MORE_KEYS)

    async def run(self) -> None:
        self.world.weather = Weather()
        process, mine = self.of.process("h0"), set[str]()
        while True:
            await asyncio.sleep(self.chance.uniform(0, 0.2))
            self.of.resting = True
            try:
                async with asyncio.timeout(10):
                    await self._once(process, mine)
            except (StoragedError, TimeoutError):
                pass
            finally:
                self.of.resting = False
                for name in sorted(mine):
                    self.of.restart(self.world.nodes[name])
                mine.clear()

    async def _once(self, process: Process, mine: set[str]) -> None:
        current = process.book.current
        newest, in_force = await process.application().newest()
        if not in_force:
            await process.application(collect_s=0.3).apply(newest)
            return
        if current.seeds_next:
            await process.application(collect_s=0.3).apply(self._settled(process))
            return
        goes, stays, misses = self.chance.sample(current.seeds, 3)
        with contextlib.suppress(LayoutRefused):
            seeds = exchanged_seeds(current, goes, active(self, current))
            self._down(misses, mine)
            await asyncio.sleep(self.chance.uniform(0.1, 0.3))
            await self._until_applied(process, self._joint(process, seeds), 3.0)
            if process.book.current.seeds_next != seeds:
                return
            await self._until_applied(process, self._settled(process), 2.0)
            self._up(misses, mine)
            if not process.book.current.seeds_next:
                self._down(stays, mine)
                await asyncio.sleep(1.0)
                self._up(stays, mine)

    async def _until_applied(self, process: Process, signed: SignedLayout, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while not process.book.has(signed):
                    with contextlib.suppress(StoragedError):
                        await process.application(collect_s=0.6).apply(signed)
                    await asyncio.sleep(0.01)
                await asyncio.gather(*(self._offer(process, node) for node in sorted(self.world.nodes)))

    async def _offer(self, process: Process, node: str) -> None:
        signed = process.book.signed(process.book.epoch)
        with contextlib.suppress(StoragedError):
            await process.caller.call(node, "cluster.offer", signed, OfferAnswer, timeout_s=0.3)

    def _joint(self, process: Process, seeds: tuple[str, ...]) -> SignedLayout:
        before = process.book.current
        return self._sign(process, replace(before, seeds_next=seeds, seeds_step=before.seeds_step + 1))

    def _settled(self, process: Process) -> SignedLayout:
        before = process.book.current
        return self._sign(
            process, replace(before, seeds=before.seeds_next, seeds_next=(), seeds_step=before.seeds_step + 1)
        )

    def _sign(self, process: Process, wanted: Layout) -> SignedLayout:
        before = process.book.current
        numbered = replace(wanted, epoch=next_epoch(before.epoch, moving=True), base=base_after(before))
        return self.of.sign(replace(numbered, predecessor=process.book.signed(before.epoch).hash))

    def _down(self, disk: str, mine: set[str]) -> None:
        node = self.world.nodes["n" + disk[1:]]
        if node.up:
            node.crash()
            mine.add(node.name)
            self.fault(f"{node.name} went down")

    def _up(self, disk: str, mine: set[str]) -> None:
        mine.discard("n" + disk[1:])
        self.of.restart(self.world.nodes["n" + disk[1:]])


HASTY_PARTS: tuple[type[LayoutPart], ...] = (Rivals, Haste)

"""A layout change with a pause, as it could be made: the register moves to other disks."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING

import msgspec

from storaged.errors import PeerUnreachable, StoragedError
from storaged.meta import messages
from storaged.meta.consensus.overtaking import overtaken
from storaged.meta.consensus.register import Verdict
from storaged.meta.names import Ballot, RegisterName, Value
from tests.sim.cluster import DISKS, Gateway, make_layout
from tests.sim.parts import Part

if TYPE_CHECKING:
    from tests.sim.scenario import Scenario

NEW_SEEDS = ("d2", "d3", "d4")


class Moving(Part):
    """Fences a majority of the old replicas, copies every register, lets the new layout be known. Until then the old
    one writes no more.
    """

    finishes = True

    @classmethod
    def joins(cls, scenario: Scenario, chance: random.Random) -> bool:
        return scenario.moves

    async def run(self) -> None:
        scenario, chance = self.scenario, self.chance
        await asyncio.sleep(chance.uniform(0.02, 0.3))
        self.fault("the ring moved")
        mover = Gateway(self.world, "mover", scenario.layout)
        fenced = await self._until_majority(scenario.first_seeds, self._fence_epoch)
        for name in scenario.names.values():
            await self._copy(mover, name, fenced)
        layout = make_layout(2, NEW_SEEDS)
        await self._until_majority(NEW_SEEDS, self._fence_epoch)
        for gateway in scenario.gateways:
            self.world.loop.call_later(chance.uniform(0, 0.3), setattr, gateway.layouts, "current", layout)
        scenario.layout = layout
        await mover.client.close()

    async def _fence_epoch(self, disk: str) -> bool:
        """Of the whole disk: its own node does it."""
        node = self.world.nodes["n" + disk[1:]]
        if not node.up:
            raise PeerUnreachable(f"{node.name} is down")
        life = node.life
        reply = await node.replica.fence_epoch(messages.EpochFence(disk, 2))
        return reply.epoch >= 2 and node.up and node.life == life

    async def _copy(self, mover: Gateway, name: RegisterName, fenced: list[str]) -> None:
        told: list[tuple[Ballot, Value | None]] = []
        heard: list[str] = []
        while len(heard) < 2:
            for disk in fenced:
                try:
                    reply, _ = await mover.directory.replica(disk).read(messages.Read(disk, name, 2), timeout_s=0.2)
                except StoragedError:
                    await asyncio.sleep(0.02)
                    continue
                if disk not in heard and reply.verdict == Verdict.OK:
                    heard.append(disk)
                    told.append((reply.accepted, reply.value))
        ballot, value = max(told, key=lambda pair: pair[0])
        if value is None:
            return
        beneath = overtaken(told, ballot, value, self.world.rules)
        if beneath is not None:
            value = msgspec.structs.replace(value, sequence=beneath.sequence + 1)
        if value.payload:
            self._carry_copies(value.payload)
        target = Ballot(2, ballot.counter, "mover", b"\0" * 8)

        async def accept(disk: str) -> bool:
            request = messages.Accept(disk, name, target, value, identity=True)
            return (await mover.directory.replica(disk).accept(request, timeout_s=0.2)).verdict == Verdict.OK

        await self._until_majority(NEW_SEEDS, accept)

    def _carry_copies(self, data_id: bytes) -> None:
        """A layout change takes small copies along, before the registers: the new replicas are other disks."""
        stores = {disk: self.world.nodes["n" + disk[1:]].payloads.synced for disk in DISKS}
        held = next((stores[disk][data_id] for disk in self.scenario.first_seeds if data_id in stores[disk]), None)
        for disk in NEW_SEEDS if held is not None else ():
            stores[disk].setdefault(data_id, held)

    async def _until_majority(self, disks: Sequence[str], call: Callable[[str], Awaitable[bool]]) -> list[str]:
        done: list[str] = []
        while 2 * len(done) <= len(disks):
            for disk in disks:
                try:
                    if disk not in done and await call(disk):
                        done.append(disk)
                except StoragedError:
                    await asyncio.sleep(0.02)
        return done

"""Seeds with a replica that lies about objects: what README «Limits» says of one hostile node of three must hold.

The liar puts other records on its own disk, older ones and forged ones, under ballots of its choice; it promises
counters that are far off, loses small copies, and asks the others what only gateways may. Where both other replicas
answer and agree, nothing that it says counts. So in these runs both answer, within the time that a gateway waits for
them, and no write meets another at the same key: of two writes that meet, one replica may miss one, and then the liar
decides. Each key is written once before the first lie: a key that was never written the liar may show.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Coroutine
from typing import Any

from storaged.errors import StoragedError
from storaged.meta.consensus.register import RULES, Rules
from storaged.meta.names import Ballot, RegisterName, Value, Visibility
from storaged.meta.ports import SmallCopies
from tests.sim.cluster import DISKS, FIRST_SEEDS, Gateway, StorageNode, Weather
from tests.sim.hostile import KEYS, Hostile
from tests.sim.linear import Content, Kind
from tests.sim.scenario import GATEWAYS, Scenario, play_out
from tests.sim.virtual import VirtualLoop
from tests.sim.workload import Verdicts

QUIET_S = 0.08
"""Between two operations on a key: what was accepted by two replicas reaches the third, which may still have to sync
its promise. One that has missed a write agrees with a liar that shows the record before.
"""


class ObjectLies(Hostile):
    def __init__(self, seed: int, loop: VirtualLoop, rules: Rules) -> None:
        super().__init__(seed, loop, rules)
        self.random = self.world.random = random.Random(f"object lies {seed}")
        self._lies, self._blank, self.of_objects = True, False, True
        self.world.promises_max = 1_000  # an honest replica that evicts a promise refuses the write of another key
        self._liar = self.random.choice(FIRST_SEEDS)
        self.names = {key: self.name(b"sim/" + key.encode()) for key in KEYS}
        self._turns = {key: asyncio.Lock() for key in KEYS}

    def _small_copies(self, content: bytes) -> tuple[SmallCopies | None, bytes]:
        return Scenario._small_copies(self, content)

    def weather(self) -> Weather:
        """Nothing is lost; a message takes at most 10 ms, a sync 20 ms."""
        return Weather(0.0, self.random.choice((0.0, 0.2)), 0.1, 0.0, 4.0, 0.01, 5, 0.0)

    async def operate(self, gateway: Gateway, kind: Kind, key: str) -> None:
        async with self._turns[key]:
            await super().operate(gateway, kind, key)
            await asyncio.sleep(QUIET_S)

    async def _unless_it_leaves(self, work: Coroutine[Any, Any, Content]) -> Content:
        return await work

    async def settle(self) -> None:
        """Gateways settle registers, as storage nodes ask them to. Until it is cancelled."""
        while True:
            await asyncio.sleep(self.random.expovariate(1 / 0.1))
            key = self.random.choice(KEYS)
            async with self._turns[key]:
                with contextlib.suppress(StoragedError):
                    await self.random.choice(self.gateways).client.settle(self.names[key])
                await asyncio.sleep(QUIET_S)

    # --- what the liar does

    async def lies(self) -> None:
        """Until it is cancelled."""
        node = self.world.nodes["n" + self._liar[1:]]
        seen: dict[RegisterName, list[tuple[Ballot, Value]]] = {}
        self._overhear(node, seen)
        while True:
            await asyncio.sleep(self.random.expovariate(1 / 0.02))
            if self.random.random() < 0.05 and node.up:
                node.crash()
                self.world.loop.call_later(self.random.choice((0.0, 0.02, 0.1)), self.restart, node)
                self.world.loop.call_later(0.11, self._overhear, node, seen)
                continue
            name = self.names[self.random.choice(KEYS)]
            if node.up:
                lie = (self._forge, self._forge, self._forge, self._promise_far, self._ask_others, self._lose_copies)
                await self.random.choice(lie)(node, name, seen.get(name, []))

    async def _forge(self, node: StorageNode, name: RegisterName, seen: list[tuple[Ballot, Value]]) -> None:
        """Any record, under a ballot above that of the others, or under theirs."""
        slot = self.world.nodes["n" + self._honest[0][1:]].store.get(name)
        ballot = Ballot(1, self._high(node), node.name, self.random.randbytes(8))
        if slot is not None and self.random.random() < 0.3:
            ballot = slot.ballot
        if seen and self.random.random() < 0.6:
            value = self.random.choice(seen)[1]
        else:
            visibility = self.random.choice((Visibility.LIVE, Visibility.TOMBSTONE))
            body = b"forged " + self.random.randbytes(4) if visibility else b""
            value = Value(self.random.choice((0, 1, 5, 1000, 1 << 62)), self.random.randbytes(16), visibility, body)
        await self._overwrite(node, name, ballot, value)

    @property
    def _honest(self) -> list[str]:
        return [disk for disk in FIRST_SEEDS if disk != self._liar]

    async def _lose_copies(self, node: StorageNode, _name: RegisterName, _seen: object) -> None:
        """Those that both others have."""
        others = [self.world.nodes["n" + disk[1:]].payloads.synced for disk in self._honest]
        for data_id in list(node.payloads.synced):
            if all(data_id in synced for synced in others) and self.random.random() < 0.5:
                del node.payloads.synced[data_id]

    # --- the whole

    async def play(self) -> None:
        for disk in DISKS:
            StorageNode(self.world, "n" + disk[1:], disk)
        self.gateways = [self._gateway(f"g{index}") for index in range(GATEWAYS)]
        self.world.weather = self.weather()
        for key in KEYS:
            await self.operate(self.gateways[0], Kind.PUT, key)
        self.found.faults.append(f"{self._liar} lies about objects")
        background = [self.world.loop.create_task(work) for work in (self.lies(), self.settle())]
        await asyncio.gather(*(self.worker(gateway) for gateway in self.gateways for _ in range(2)))
        for task in background:
            task.cancel()
        for outcome in await asyncio.gather(*background, return_exceptions=True):
            if isinstance(outcome, Exception):
                raise outcome
        self.restart(self.world.nodes["n" + self._liar[1:]])
        reader = self._gateway("reader", skew_ms=0, deadline_s=10.0)
        await self.look_at_the_end(reader)
        for gateway in (*self.gateways, reader):
            await gateway.client.close()


def run_object_lies(seed: int, rules: Rules = RULES) -> Verdicts:
    """As ``scenario.run_seed``, of these."""
    return play_out(lambda loop: ObjectLies(seed, loop, rules))

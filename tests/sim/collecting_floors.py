"""As ``collecting``, while rows of deleted keys are expunged: floors take their place.

A collector has a round made of a register before it deletes what the register does not name, so that a row is
everywhere, which refuses every create. That row may be expunged. A gateway that has written fragments, and slept since,
must not create their key then (rule 39). So here gateways sleep for hours after their fragments are durable, keys come
and go, and the program's own expunger sets floors of the past, of today and of the future. It dies and begins again.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Coroutine, Sequence
from typing import Any

from storaged.maintain.expunger import Expunger, ExpungerPorts
from storaged.meta.consensus.register import RULES, Rules
from storaged.meta.proposer.floors import PartitionFloors
from tests.sim.cluster import Gateway
from tests.sim.collecting import HOUR_S, Collecting
from tests.sim.listing import Everybody
from tests.sim.scenario import play_out
from tests.sim.virtual import VirtualLoop
from tests.sim.workload import Verdicts

DELAYS_S = (-60.0, -25.0, -12.0, -1.0, 0.5)
"""Some floors lie in the future: restarts raise ballots by 10 s each."""


class CollectingFloors(Collecting):
    def __init__(self, seed: int, loop: VirtualLoop, rules: Rules) -> None:
        super().__init__(seed, loop, rules)
        self.floors = random.Random(f"floors {seed}")
        self.creates = self.floors.choice((0.7, 1.0))

    def more(self) -> Sequence[Coroutine[Any, Any, None]]:
        return (self._expunge("x0"), self._expunge("x1"))

    async def _expunge(self, name: str) -> None:
        """One life of an expunger after the other, until it is cancelled."""
        chance = self.floors
        while True:
            await asyncio.sleep(chance.uniform(0, 1.0))
            process = self.process(name)
            try:
                async with asyncio.timeout(chance.uniform(1.0, HOUR_S)):
                    while True:
                        await self._pass(process, chance.choice(DELAYS_S))
                        await asyncio.sleep(chance.uniform(0, 1.5))
            except TimeoutError:
                self.found.faults.append(f"{name} died")
            finally:
                await process.crash()

    async def _pass(self, process: Gateway, delay_s: float) -> None:
        client, everybody = process.client, Everybody()
        floors = PartitionFloors(client._calls, timeout_s=0.5)
        ports = ExpungerPorts(process.layouts, self.scanner(process), client.moves, floors, everybody, process.clock)
        numbers = [self.name(b"").partition]
        expunger = Expunger(ports, delay_s=delay_s, worthwhile=1, rest_ratio=0.0, partitions=numbers)
        try:
            await expunger.once()
        finally:
            self.found.done["expunged"] += expunger.done.rows


def run_collecting_floors(seed: int, rules: Rules = RULES) -> Verdicts:
    """As ``scenario.run_seed``, of these."""
    return play_out(lambda loop: CollectingFloors(seed, loop, rules))  # type: ignore[arg-type,return-value]

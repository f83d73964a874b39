"""Runs in which many keys are changed in the same turn of the loop, so that messages carry many accepts and creates.

Each worker works on several keys at once, and messages arrive on a grid of time: so the promises for these keys come in
one turn, and the accepts that follow leave together.
"""

from __future__ import annotations

import asyncio
import math
import random
from typing import Any

from storaged.meta import messages
from storaged.meta.consensus.register import RULES, Rules
from storaged.wire import decode
from tests.sim.cluster import Gateway, StorageNode
from tests.sim.linear import Kind
from tests.sim.parts import Suspensions, Trouble
from tests.sim.scenario import Scenario, play_out
from tests.sim.virtual import VirtualLoop
from tests.sim.workload import Verdicts

KEYS = tuple(f"burst{index}" for index in range(24))
BURSTS = 2
KEYS_A_BURST = 8
GRID_S = 0.01
USUAL_S = 0.004
"""The longest delay of a message that is not slow."""


class _Counting(StorageNode):
    """Counts how many accepts each message has."""

    sizes: dict[int, int]

    def deliver(self, source: str, method: str, request: bytes, body: bytes, answer: Any) -> None:
        if method == "meta.accepts":
            count = len(decode(request, messages.Accepts).accepts)
            self.sizes[count] = self.sizes.get(count, 0) + 1
        elif method in ("meta.accept", "meta.create"):
            self.sizes[1] = self.sizes.get(1, 0) + 1
        super().deliver(source, method, request, body, answer)


class Bursts(Scenario):
    """As ``Scenario``."""

    def __init__(self, seed: int, loop: VirtualLoop, rules: Rules) -> None:
        super().__init__(seed, loop, rules)
        self.fresh = False
        self.names = {key: self.name(b"sim/" + key.encode()) for key in KEYS}
        self.last_seen = dict.fromkeys(self.names)
        self.disks_may_be_swapped = self.moves = False
        self.node_kind = type("Counting", (_Counting,), {"sizes": self.found.accepts_a_message})
        self.world.gathering = 0.9
        delay_s = self.world.delay_s

        def on_grid() -> float:
            now = loop.time()
            return math.ceil((now + max(USUAL_S, delay_s())) / GRID_S) * GRID_S - now

        self.world.delay_s = on_grid  # type: ignore[method-assign]

    def join_parts(self) -> None:
        for kind in (Trouble, Suspensions):
            self.parts.append(kind(self, random.Random(f"{kind.__name__} {self.found.seed}")))

    async def worker(self, gateway: Gateway) -> None:
        for _ in range(BURSTS):
            await asyncio.sleep(self.random.uniform(0, 0.05))
            keys = self.random.sample(KEYS, KEYS_A_BURST)
            kinds = self.random.choices(tuple(Kind), (10, 40, 40, 10), k=len(keys))
            tasks = [
                self.world.loop.create_task(self.operate(gateway, kind, key))
                for kind, key in zip(kinds, keys, strict=True)
            ]
            try:
                await asyncio.gather(*tasks)
            finally:
                for task in tasks:
                    task.cancel()


def run_bursts(seed: int, rules: Rules = RULES) -> Verdicts:
    """As ``scenario.run_seed``, of these."""
    return play_out(lambda loop: Bursts(seed, loop, rules))

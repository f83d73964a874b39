"""Runs of small objects alone, two keys, with many writes that are cut short, and copies that are lost, unreadable or
late."""

from __future__ import annotations

import random

from storaged.meta.consensus.register import RULES, Rules
from storaged.meta.names import Change, Value
from tests.sim.cluster import DISKS, FIRST_SEEDS, Gateway, make_layout
from tests.sim.copies import HalfWrites, LostCopies
from tests.sim.linear import Content, Kind, Operation
from tests.sim.parts import Suspensions, Trouble
from tests.sim.scenario import KEYS, Scenario, play_out
from tests.sim.virtual import VirtualLoop
from tests.sim.workload import Verdicts, content_of


class SmallObjects(Scenario):
    """As ``Scenario``."""

    def __init__(self, seed: int, loop: VirtualLoop, rules: Rules) -> None:
        super().__init__(seed, loop, rules)
        self.first_seeds = DISKS if self.aside.random() < 0.1 else FIRST_SEEDS
        self.layout = make_layout(1, self.first_seeds)
        self.world.on_files = False
        self.of_objects = True
        self.names = {key: self.name(b"sim/" + key.encode()) for key in KEYS[:2]}
        self.last_seen = dict.fromkeys(self.names)
        self.disks_may_be_swapped = self.moves = self.disks_may_be_full = False

    def join_parts(self) -> None:
        for kind in (Trouble, Suspensions, LostCopies, HalfWrites):
            self.parts.append(kind(self, random.Random(f"{kind.__name__} {self.found.seed}")))

    async def carry_out(self, gateway: Gateway, operation: Operation) -> Content:
        if operation.kind is not Kind.READ or self.random.random() < 0.5:
            return await super().carry_out(gateway, operation)
        outcome = await gateway.client.change(self.names[operation.key], _keep)
        if outcome.after is not None:
            self.look_for_copies(outcome.after.payload)
        return content_of(outcome.before)


def _keep(value: Value | None) -> Change | None:
    """As a change of tags: the content stays."""
    return None if value is None else Change(value.body, value.visibility, value.payload)


def run_small(seed: int, rules: Rules = RULES) -> Verdicts:
    """As ``scenario.run_seed``, of these."""
    return play_out(lambda loop: SmallObjects(seed, loop, rules))

"""Gateways that do not know yet that a bucket has versioning, and one replica after the other that is away.

As ``races``, on a few new keys, one after the other. Most writes of the null version come from a gateway with the
former configuration: its PUT is a create wherever it takes the key for new. A replica that was away takes such a
create, above the versions that the two others hold; then another replica is away. No version may be lost by that.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Coroutine, Sequence
from typing import Any

from storaged.meta.consensus.register import RULES, Rules
from storaged.meta.names import RegisterName, object_name
from storaged.objects.api import BodyChecks, NewMeta
from storaged.objects.write import versioned
from tests.sim.cluster import DISKS, Gateway
from tests.sim.parts import Trouble
from tests.sim.races import FEW, OWNER, PlanePort, Races, answered, bucket_of, pieces
from tests.sim.racing import SUSPENDED
from tests.sim.scenario import play_out
from tests.sim.version_histories import NULL, Adds, Lock
from tests.sim.versions import HasHistory, Versions
from tests.sim.virtual import VirtualLoop
from tests.sim.workload import Verdicts

KEYS = 6
CALLS = 12
"""Of each worker."""


class StalePort(PlanePort):
    """Writes null versions, when they have no condition, as where the bucket has no versioning."""

    async def put(self, bucket: str, key: str, body: bytes, how: Adds, lock: Lock) -> tuple[str, str]:
        if how.id != NULL or how.if_match or how.if_absent:
            return await super().put(bucket, key, body, how, lock)
        with answered():
            result = await self.objects.put(
                bucket_of(bucket), key.encode(), pieces(body), NewMeta(), BodyChecks(size=len(body)), owner=OWNER
            )
        return result.version_id, result.etag


class Away(Trouble):
    """One node after the other is away."""

    async def run(self) -> None:
        chance, world = self.chance, self.world
        self.fault("one node after the other was away")
        while True:
            await asyncio.sleep(chance.uniform(0, 0.02))
            world.cut = frozenset(["n" + chance.choice(DISKS)[1:]])
            await asyncio.sleep(chance.expovariate(1 / 0.15))
            world.cut = frozenset()


class Stale(Races):
    def __init__(self, seed: int, loop: VirtualLoop, rules: Rules) -> None:
        super().__init__(seed, loop, rules)
        self.places = [(SUSPENDED, f"new {number}") for number in range(KEYS)]
        bucket = bucket_of(SUSPENDED)
        self.names = {key: object_name(bucket.id, bucket.shard_numbers, key.encode()) for _, key in self.places}
        self.last_seen = dict.fromkeys(self.names)
        self._pauses, self._expires = 0.0, False

    def join_parts(self) -> None:
        super().join_parts()
        self.parts = [part for part in self.parts if not isinstance(part, Trouble) and self._chance.random() < 0.3]
        self.parts.insert(0, Away(self, random.Random(f"away {self.found.seed}")))

    def make_port(self, gateway: Gateway) -> PlanePort:
        return StalePort(self.make_plane(gateway))

    async def worker(self, gateway: Gateway) -> None:
        chance, race = self._chance, self.race
        for number in range(CALLS):
            await asyncio.sleep(chance.uniform(0, 0.1))
            self.found.operations += 1
            first = number * KEYS // CALLS
            kind, key = self.places[min(first + chance.randrange(2), KEYS - 1)]
            port, what = self._ports.of(gateway), chance.random()
            if what < 0.35:
                await race.put_named(port, kind, key)
            elif what < 0.6:
                await race.put_unasked(port, kind, key)
            elif what < 0.8:
                await race.list(port, kind, key)
            else:
                await race.step(port, kind, key)


def run_stale(seed: int, rules: Rules = RULES) -> Verdicts:
    """As ``scenario.run_seed``, of these."""
    bounds, versioned.BOUNDS = versioned.BOUNDS, FEW
    try:
        return play_out(lambda loop: Stale(seed, loop, rules))
    finally:
        versioned.BOUNDS = bounds


class StaleVersions(Versions):
    """The same, while every disk collects: as ``versions``."""

    def __init__(self, seed: int, loop: VirtualLoop, rules: Rules) -> None:
        super().__init__(seed, loop, rules)
        self.objects = tuple(b"new %d" % number for number in range(KEYS))
        self._luck = random.Random(f"stale {seed}")

    def more(self) -> Sequence[Coroutine[Any, Any, None]]:
        return (self._away_in_turn(),)

    async def _away_in_turn(self) -> None:
        while True:
            await asyncio.sleep(self._luck.uniform(0, 0.2))
            self.world.cut = frozenset(["n" + self._luck.choice(DISKS[:3])[1:]])
            await asyncio.sleep(self._luck.expovariate(1 / 0.5))
            self.world.cut = frozenset()

    async def worker(self, gateway: Gateway) -> None:
        luck = self._luck
        for number in range(CALLS):
            await asyncio.sleep(luck.uniform(0, 0.5))
            self.found.operations += 1
            name = self.name(self.objects[min(number * KEYS // CALLS + luck.randrange(2), KEYS - 1)])
            what = luck.random()
            if what < 0.3:
                await self._note(self._put(gateway, name, null=False))
            elif what < 0.6:
                await self._note(self._put_stale(gateway, name))
            elif what < 0.65:
                await self._note(self._mark(gateway, name, null=luck.random() < 0.5))
            elif what < 0.75:
                await self._note(self._remove(gateway, name))
            else:
                await self._note(self._list(gateway, name))

    async def _put_stale(self, gateway: Gateway, name: RegisterName) -> None:
        try:
            await self._put_unasked(gateway, name)
        except HasHistory:
            await self._put_small(gateway, name)


def run_stale_versions(seed: int, rules: Rules = RULES) -> Verdicts:
    """As ``scenario.run_seed``, of these."""
    bounds, versioned.BOUNDS = versioned.BOUNDS, FEW
    try:
        return play_out(lambda loop: StaleVersions(seed, loop, rules))  # type: ignore[arg-type,return-value]
    finally:
        versioned.BOUNDS = bounds

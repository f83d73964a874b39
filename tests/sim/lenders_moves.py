"""As ``lenders``, while the partitions of all buckets move from disks to disks, as in ``collecting_moves``.

A disk that comes to a partition takes over its fences, and gets rows that only rounds with the nonce of a lender
settle. It may have rows and fences from before. And it may take a create that slept before it has the fence.

Rows of a bucket that was deleted for good do not move. A disk that comes keeps those that it has from before, and may
have them at most replicas of a key. Data and pages that such rows alone name have to go all the same.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Coroutine, Iterator, Sequence
from typing import Any

from storaged.cluster.layout import partition_of
from storaged.cluster.partitions import PartitionRecord, is_settled
from storaged.errors import StoragedError
from storaged.ids import BUCKET_ID_BYTES
from storaged.maintain.partition_mover import PartitionMover
from storaged.meta.consensus.register import RULES, Rules
from storaged.objects.plane import ObjectPlane
from storaged.objects.system import buckets as program
from storaged.objects.system.shards import Drawn
from tests.sim.cluster import Gateway
from tests.sim.collecting_moves import CollectingMoves, MovingNode, layouts_of
from tests.sim.hiding import HidingNode
from tests.sim.lenders import Lenders
from tests.sim.lending import few
from tests.sim.partitions import Process
from tests.sim.scenario import play_out
from tests.sim.virtual import VirtualLoop
from tests.sim.workload import Verdicts

NUMBERS = (1, 300, 513, 1000)
"""Of the partitions that have buckets."""


class HidingMovingNode(HidingNode, MovingNode):
    """Both."""


class LendersMoves(Lenders, CollectingMoves):
    node_kind = HidingMovingNode

    def __init__(self, seed: int, loop: VirtualLoop, rules: Rules) -> None:
        super().__init__(seed, loop, rules)
        self.layouts = layouts_of(self.chance, NUMBERS[0])
        self.layout = self.layouts[-1]
        self.world.epochs = self.layout.epoch
        self.numbers = NUMBERS
        self.records: list[PartitionRecord] = []
        """Of the partitions when all is well: every process has read them by then."""

    def process(self, name: str, **options: Any) -> Gateway:
        process = Process(self, name, **options)  # type: ignore[arg-type]
        for record in self.records:
            process.layouts.partitions.learn(record)
        return process

    def _make_plane(self, gateway: Gateway) -> ObjectPlane:
        plane = super()._make_plane(gateway)
        scanner: Any = plane.scanner
        scanner._refresh = gateway.refresh  # type: ignore[attr-defined]
        return plane

    def more(self) -> Sequence[Coroutine[Any, Any, None]]:
        return *Lenders.more(self), self._announce(), CollectingMoves._move(self)

    async def _announce(self) -> None:
        """This play takes longer than ``collecting_moves``."""
        for layout in self.layouts[1:]:
            await asyncio.sleep(self.chance.uniform(2.0, 14.0))
            for name in ("m0", *(gateway.name for gateway in self.gateways), *self.world.nodes):
                self.world.loop.call_later(self.chance.uniform(0, 3.0), self._learn, name, layout)

    async def _round(self, process: Process, mover: PartitionMover) -> None:
        for number in NUMBERS:
            with contextlib.suppress(StoragedError):
                await process.refresh(number)
        if self._healed:  # a bucket that is being deleted keeps its partition from moving
            with contextlib.suppress(StoragedError):
                await self._housekeep(self.gateways[0])
        await super()._round(process, mover)

    def _ended(self, process: Process, gone: set[str]) -> bool:
        """As there, of each."""
        states = [process.layouts.partition(number) for number in NUMBERS]
        wanted = [gone & {*self.layout.replicas_of(state.partition)} - {*state.present} for state in states]
        return all(
            is_settled(state, self.layout) or (not state.coming and bool(waits))
            for state, waits in zip(states, wanted, strict=True)
        )

    async def make_reader(self) -> Gateway:
        """A gateway may have died at the end of the workload."""
        for gateway in self.gateways:
            if not gateway.caller.alive:
                gateway.start()
        reader: Any = await super().make_reader()
        self.newest = None
        for number in NUMBERS:
            await reader.refresh(number)
            for gateway in self.gateways:
                await gateway.refresh(number)  # type: ignore[attr-defined]
            record = reader.layouts.partitions.record(number)
            if record is not None:
                self.records.append(record)
        return reader  # type: ignore[no-any-return]


@contextlib.contextmanager
def in_few_partitions(seed: int) -> Iterator[None]:
    """Buckets have one shard, in one of these partitions."""
    before, luck = program.draw, random.Random(f"ids {seed}")

    def draw(*_what: Any) -> Drawn:
        while True:
            bucket_id = luck.randbytes(BUCKET_ID_BYTES)
            if partition_of(bucket_id, 0) in NUMBERS:
                return Drawn(bucket_id, 1, b"")

    program.draw = draw
    try:
        yield
    finally:
        program.draw = before


def run_lenders_moves(seed: int, rules: Rules = RULES) -> Verdicts:
    """As ``scenario.run_seed``, of these."""
    with few(seed), in_few_partitions(seed):
        return play_out(lambda loop: LendersMoves(seed, loop, rules))  # type: ignore[arg-type,return-value]

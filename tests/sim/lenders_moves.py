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
from storaged.cluster.partitions import PartitionRecord, PartitionState, is_settled
from storaged.errors import StoragedError
from storaged.ids import BUCKET_ID_BYTES
from storaged.maintain.expunger import Expunger, ExpungerPorts
from storaged.maintain.partition_mover import PartitionMover
from storaged.meta.consensus.floors import FLOORED_TABLES
from storaged.meta.consensus.register import RULES, Rules
from storaged.meta.proposer.floors import PartitionFloors
from storaged.meta.store_ports import RowRange
from storaged.objects.plane import ObjectPlane
from storaged.objects.system import buckets as program
from storaged.objects.system.shards import Drawn
from tests.sim.cluster import Gateway
from tests.sim.collecting_moves import CollectingMoves, MovingNode, layouts_of
from tests.sim.hiding import HidingNode
from tests.sim.lenders import Lenders
from tests.sim.lending import few
from tests.sim.listing import Everybody
from tests.sim.partitions import Process
from tests.sim.scenario import play_out
from tests.sim.virtual import VirtualLoop
from tests.sim.workload import Verdicts

NUMBERS = (1, 300, 513, 1000)
"""Of the partitions that have buckets."""
NO_DELAY_S = -60.0
"""Of floors at the end: they lie in the future, as ballots do after restarts."""
PASSES_MAX = 30


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

    async def _nothing_else_stays(self, nodes: Any, live: set[bytes]) -> None:
        await super()._nothing_else_stays(nodes, live)
        if not any(node.foreign for node in nodes):
            await self._no_rows_stay()

    async def _no_rows_stay(self) -> None:
        """All buckets are deleted. Of a range of which the replica that is asked has a row, all rows go everywhere. A
        mover that has read no record may take a partition that moves for one that is in its place: there they stay.
        """
        process: Any = self.process("expunger", skew_ms=0)
        process.layouts.learn(self.layout)
        client = process.client
        floors, scanner = PartitionFloors(client._calls), self.scanner(process)
        ports = ExpungerPorts(process.layouts, scanner, client.moves, floors, Everybody(), process.clock)
        try:
            for number in NUMBERS:
                await process.refresh(number)
            settled = [number for number in NUMBERS if not process.layouts.partition(number).coming]
            expunger = Expunger(ports, delay_s=NO_DELAY_S, worthwhile=1, rest_ratio=0.0, partitions=settled)
            for _ in range(PASSES_MAX):
                if not await expunger.once() and not expunger.done.left:
                    break
                await asyncio.sleep(1.0)
            else:
                self.complain(f"rows of deleted buckets stay: {expunger.done.waiting}")
            self.found.done["rows expunged"] += expunger.done.rows
            for number in settled:
                self._see_no_rows(process.layouts.partition(number))
        finally:
            await client.close()

    def _see_no_rows(self, state: PartitionState) -> None:
        stores: dict[str, Any] = {node.disk: node.store for node in self.world.nodes.values()}
        asked: Any = stores[state.present[0]]
        for range_ in asked.scopes(state.partition):
            for disk in state.present:
                if range_[0] in FLOORED_TABLES and stores[disk].slice(RowRange(*range_, b"", b"", 1)):
                    self.complain(f"a row of a deleted bucket stays on {disk}")

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

"""As ``collecting``, while one storage node hides what there is, and a bucket is to be deleted that is not empty.

Gateways fence the bucket, find an object in it or not, and lift the fence, again and again. Meanwhile the bucket is
missing in the directories of all collectors. One replica of every key, the *liar*, answers reads and listings: it says
of each fence that it stays for ever, and has no upload and no part. Others lag, since messages are lost and nodes die.

Judged is what ``collecting`` judges: what a register holds in the end, the parts of uploads that were completed among
them, is where its writer saw it durable.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Coroutine, Sequence
from typing import Any, ClassVar

import msgspec

from storaged.errors import StoragedError
from storaged.fragments.payloads import header_at_position
from storaged.maintain.gc import Collector
from storaged.meta.acceptor.rows import DiskRows
from storaged.meta.consensus.register import RULES, Rules
from storaged.meta.messages import Read, ReadReply, ScanReply, ScanRequest
from storaged.meta.names import Table
from storaged.objects.write.commit import ProposedAgain
from tests.doubles.meta_store import MemoryMetaStore
from tests.sim.cluster import Gateway
from tests.sim.collecting import KEYS, SCOPE, Collecting, CollectingNode, GatewayAsks, _delete
from tests.sim.scenario import play_out
from tests.sim.virtual import VirtualLoop
from tests.sim.workload import Verdicts

SHARD = 3
OPERATIONS = 4
HIDDEN = frozenset((Table.UPLOAD, Table.PART))


class LyingRows:
    """What the liar answers, while it lies."""

    def __init__(self, run: Hiding, replica: Any) -> None:
        self._run = run
        self.honest = replica._rows
        parts = [replica._writes, self.honest._copies, self.honest._rules]
        self.blank = DiskRows(MemoryMetaStore(), replica.state, replica._fences, replica.pending, *parts)

    def _of(self, table: int) -> DiskRows:
        return self.blank if self._run.lies and table in HIDDEN else self.honest  # type: ignore[no-any-return]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.honest, name)

    async def read(self, request: Read) -> tuple[ReadReply, memoryview]:
        reply, payload = await self._of(request.name.table).read(request)
        return self._fenced(reply), payload

    def try_read(self, request: Read) -> tuple[ReadReply, memoryview] | None:
        found = self._of(request.name.table).try_read(request)
        return None if found is None else (self._fenced(found[0]), found[1])

    def _fenced(self, reply: ReadReply) -> ReadReply:
        return msgspec.structs.replace(reply, final=True) if reply.fenced and self._run.lies else reply

    def try_rows(self, epoch: int, names: Sequence[bytes]) -> list[bytes | None]:
        return [self._of(name[0]).try_rows(epoch, [name])[0] for name in names]

    def try_row(self, epoch: int, name: bytes) -> bytes | None:
        return self._of(name[0]).try_row(epoch, name)

    async def scan(self, request: ScanRequest) -> ScanReply:
        return await self._of(request.table).scan(request)

    def try_scan(self, request: ScanRequest) -> ScanReply | None:
        return self._of(request.table).try_scan(request)


class HidingNode(CollectingNode):
    play: ClassVar[Hiding]

    def start(self) -> None:
        super().start()
        if self.up and self.disk == self.play.liar:
            self.replica._rows = LyingRows(self.play, self.replica)  # type: ignore[assignment]


class HiddenBucket:
    """``maintain.directory.Buckets``: a liar of the system partition leaves the bucket out, now and then."""

    complete = True

    def __init__(self, run: Hiding) -> None:
        self._run = run

    @property
    def by_id(self) -> dict[bytes, None]:
        return {} if self._run.lies and self._run.chance.random() < self._run.hides else {SCOPE: None}

    async def refresh(self, context: object) -> None:
        pass

    def countries_of(self, scope: bytes) -> tuple[str, ...]:
        return ()


class Hiding(Collecting):
    node_kind = HidingNode

    def __init__(self, seed: int, loop: VirtualLoop, rules: Rules) -> None:
        super().__init__(seed, loop, rules)
        self.chance = random.Random(f"hiding {seed}")
        self.lies = True
        self.hides = self.chance.choice((0.3, 0.9, 1.0))
        """How often the directory leaves out the bucket."""
        self.liar = self.chance.choice(self.layout.replicas_of(self.name(b"").partition))
        self._nonce = 0
        self._is_open = asyncio.Event()
        self._is_open.set()
        HidingNode.play = self

    async def worker(self, gateway: Gateway) -> None:
        for _ in range(OPERATIONS):
            await asyncio.sleep(self.random.uniform(0, 0.6))
            await self._is_open.wait()
            name = self.name(self.random.choice(KEYS))
            self.found.operations += 1
            kind = self.random.random()
            try:
                if kind < 0.6:
                    await self.uploads.upload(gateway, name)
                elif kind < 0.8:
                    await self._put_coded(gateway, name)
                else:
                    self.retire_replaced(gateway, name, await gateway.client.change(name, _delete))
            except (StoragedError, ProposedAgain):
                self.found.refused += 1

    def _collector(self, node: CollectingNode, asks: GatewayAsks) -> tuple[Collector, Gateway]:
        collector, client = super()._collector(node, asks)
        collector._judge.buckets = collector._sweep._buckets = HiddenBucket(self)  # type: ignore[assignment]
        return collector, client

    # --- deletions that are refused

    def more(self) -> Sequence[Coroutine[Any, Any, None]]:
        return (self._try_to_delete(),)

    async def _try_to_delete(self) -> None:
        """Until it is cancelled."""
        while True:
            await asyncio.sleep(self.chance.uniform(0.5, 8.0))
            gateway = self.chance.choice(self.gateways)
            self._nonce += 1
            self._is_open.clear()
            try:
                await gateway.client.fence(SCOPE, [SHARD], self._nonce.to_bytes(8, "big"))
                self.found.done["fences"] += 1
                await asyncio.sleep(self.chance.choice((0.2, 1.0, 3.0)))
            except StoragedError:
                self.found.faults.append("a fence was not set everywhere")
            await self._open(gateway)

    async def _open(self, gateway: Gateway) -> None:
        """Returns when a majority has lifted the fence. The others do so after the next one, or in the end."""
        self._is_open.clear()
        while not self._is_open.is_set():
            try:
                await gateway.client.unfence(SCOPE, [SHARD], self._nonce.to_bytes(8, "big"))
                self._is_open.set()
            except StoragedError:
                await asyncio.sleep(0.2)

    # --- the end

    async def _heal(self, nodes: Sequence[CollectingNode]) -> None:
        self.lies = False
        await super()._heal(nodes)
        opener = self.process("opener", skew_ms=0, copy_at=header_at_position)
        await self._open(opener)
        await opener.client.close()


def run_hiding(seed: int, rules: Rules = RULES) -> Verdicts:
    """As ``scenario.run_seed``, of these."""
    return play_out(lambda loop: Hiding(seed, loop, rules))  # type: ignore[arg-type,return-value]

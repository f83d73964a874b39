"""Lists while gateways write, messages are lost and nodes die: each page is a read of every key it spans, and the
history of each key is linearizable.
"""

from __future__ import annotations

import asyncio
import os
import random

import structlog.testing

from storaged.errors import OutcomeUnknown, S3Error
from storaged.meta.listing.merge import RingScanner
from storaged.meta.listing.round import ScanSettings
from storaged.meta.names import Change, Table, Value, Visibility, object_name
from storaged.meta.ports import HeadPage, PageQuery
from storaged.meta.storage.row_head import head_of, with_head
from storaged.meta.storage.scan import common_prefix
from tests.sim.cluster import DISKS, Gateway, StorageNode, Weather, World, make_layout
from tests.sim.linear import Kind, Operation, linearizable
from tests.sim.virtual import VirtualLoop, run

SEEDS = int(os.environ.get("STORAGED_SIM_SEEDS", "60"))
BUCKET = b"bucket of a test"
SHARDS = 2
KEYS = [b"a/1", b"a/2", b"b", b"c", b"d"]


class Everybody:
    """Liveness that hopes for the best, so that dead replicas are asked, too."""

    def disk_readable(self, disk_id: str) -> bool:
        return True

    def disk_writable(self, disk_id: str) -> bool:
        return True


def delete(value: Value | None) -> Change | None:
    return None if value is None or value.visibility == Visibility.TOMBSTONE else Change(b"", Visibility.TOMBSTONE)


class Run:
    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.loop = VirtualLoop()
        self.world = World(self.loop, self.random)
        self.layout = make_layout(1, DISKS[:3])
        self.history: list[Operation] = []
        self.pages = 0
        self._moments = 0

    def moment(self) -> int:
        self._moments += 1
        return self._moments

    async def write(self, gateway: Gateway, key: bytes) -> None:
        kind = self.random.choice((Kind.PUT, Kind.PUT, Kind.DELETE))
        operation = Operation(kind, key.decode(), self.moment(), new=b"%d" % self._moments)
        self.history.append(operation)
        content = operation.new or b""
        if self.random.random() < 0.7:
            content = with_head(content + bytes(self.random.choice((0, 300))), 0, len(content))
        try:
            outcome = await gateway.client.change(
                object_name(BUCKET, range(SHARDS), key), (lambda _: Change(content)) if kind is Kind.PUT else delete
            )
        except OutcomeUnknown:
            return
        except S3Error:
            self.history.remove(operation)
            return
        before = outcome.before
        operation.observed = (
            None if before is None or before.visibility == Visibility.TOMBSTONE else head_of(before.body)
        )
        operation.returned = self.moment()

    async def list(self, scanner: RingScanner) -> None:
        delimiter, limit = self.random.choice((b"", b"/")), self.random.choice((1, 2, 100))
        after: bytes | None = b""
        while after is not None:
            invoked = self.moment()
            try:
                page = await self.page(scanner, after, delimiter, limit)
            except S3Error:
                return
            returned = self.moment()
            self.pages += 1
            seen = dict(zip(page.keys, page.heads, strict=True))
            for key in KEYS:
                covered = key > after and (page.next_after is None or key <= page.next_after)
                if covered and common_prefix(key, b"", delimiter) not in page.prefixes:
                    self.history.append(
                        Operation(Kind.READ, key.decode(), invoked, returned=returned, observed=seen.get(key))
                    )
            after = page.next_after

    async def page(self, scanner: RingScanner, after: bytes, delimiter: bytes, limit: int) -> HeadPage:
        """From whole rows, or from heads alone: all of a body, or all but its end."""
        if self.random.random() < 0.5:
            return await scanner.list_heads(
                PageQuery(Table.OBJECT, BUCKET, range(SHARDS), after=after, delimiter=delimiter, limit=limit)
            )
        page = await scanner.list_page(
            PageQuery(Table.OBJECT, BUCKET, range(SHARDS), after=after, delimiter=delimiter, limit=limit)
        )
        return HeadPage(
            [row.key for row in page.rows],
            [head_of(row.value.body) for row in page.rows],
            page.prefixes,
            page.next_after,
        )

    async def work(self, gateway: Gateway, scanner: RingScanner) -> None:
        for _ in range(8):
            await asyncio.sleep(self.random.uniform(0, 0.02))
            if self.random.random() < 0.5:
                await self.write(gateway, self.random.choice(KEYS))
            else:
                await self.list(scanner)

    async def trouble(self) -> None:
        while True:
            await asyncio.sleep(self.random.expovariate(1 / 0.05))
            node = self.world.nodes["n" + self.random.choice(DISKS)[1:]]
            if node.up and self.random.random() < 0.6:
                node.crash()
                self.loop.call_later(self.random.choice((0.005, 0.05, 0.3)), node.start)
            level = self.random.choice((0.0, 0.05, 0.2))
            self.world.weather = Weather(level / 2, level, level, sync_ms=self.random.choice((1.0, 10.0)))

    async def play(self) -> None:
        for disk in DISKS:
            StorageNode(self.world, "n" + disk[1:], disk)
        gateways = [Gateway(self.world, f"g{index}", self.layout) for index in range(3)]
        scanners = [
            RingScanner(
                gateway.layouts,
                gateway.directory,
                gateway.client,
                Everybody(),
                ScanSettings(timeout_s=0.3, hedge_s=0.02),
            )
            for gateway in gateways
        ]
        trouble = asyncio.ensure_future(self.trouble())
        await asyncio.gather(
            *(self.work(gateway, scanner) for gateway, scanner in zip(gateways * 2, scanners * 2, strict=True))
        )
        trouble.cancel()
        await asyncio.gather(trouble, return_exceptions=True)
        await asyncio.gather(*(gateway.client.close() for gateway in gateways))


def test_every_page_is_a_linearizable_read_of_the_keys_it_spans() -> None:
    pages = 0
    for seed in range(SEEDS):
        played = Run(seed)
        with structlog.testing.capture_logs():
            run(played.loop, played.play())
        assert linearizable(played.history), f"seed {seed}"
        assert not played.loop.troubles, f"seed {seed}: {played.loop.troubles}"
        pages += played.pages
    assert pages > 10 * SEEDS

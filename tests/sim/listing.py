"""Lists while gateways write: each page is a read of every key that it spans, and the history of each key is
linearizable.

Keys lie in several common prefixes and shards. Writes create, replace and delete, so that prefixes come and go. Pages
are short, and some come from the scanner's cache. A common prefix on a page must have had a key.

At the end the replicas of each shard are compared quickly, as after an absence, until they have the same rows.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import NamedTuple

from storaged.cluster.layout import partition_of
from storaged.errors import OutcomeUnknown, S3Error, ServiceUnavailable
from storaged.meta.consensus.register import FLOOR_SEQUENCES, RULES, Rules
from storaged.meta.listing.merge import RingScanner
from storaged.meta.listing.round import ScanSettings
from storaged.meta.names import Change, Table, Value, object_name
from storaged.meta.ports import HeadPage, PageQuery, Update
from storaged.meta.storage.row_head import head_of, with_head
from storaged.meta.storage.rowvalue import check_number
from storaged.meta.storage.scan import common_prefix
from storaged.meta.store_ports import RowRange
from tests.sim.cluster import DISKS, Gateway
from tests.sim.linear import Content, Kind, Operation, linearizable
from tests.sim.parts import BitFlips
from tests.sim.scenario import Scenario, play_out
from tests.sim.virtual import VirtualLoop
from tests.sim.workload import Verdicts, content_of, delete

BUCKET = b"bucket of a test"
SHARDS = 2
LISTED_KEYS = ("a/1", "a/2", "a/3", "b", "c/x", "c/y", "d", "e/1")
CALLS = 7
"""Of each worker."""
BRING_UP_TRIES = 12


class Everybody:
    """Liveness that hopes for the best, so that dead replicas are asked, too."""

    def disk_readable(self, disk_id: str) -> bool:
        return True

    disk_prompt = disk_readable

    def disk_writable(self, disk_id: str) -> bool:
        return True

    def disks_full(self) -> frozenset[str]:
        return frozenset()


class SeenPrefix(NamedTuple):
    """A page named it."""

    prefix: str
    invoked: int
    returned: int


class Listing(Scenario):
    def __init__(self, seed: int, loop: VirtualLoop, rules: Rules) -> None:
        super().__init__(seed, loop, rules)
        self.moves = self.disks_may_be_swapped = self.disks_may_be_full = False
        self.of_objects = True
        self.first_seeds = DISKS  # all disks have shards
        self.world.on_files = self.aside.random() < 0.35
        self.names = {key: object_name(BUCKET, range(SHARDS), key.encode()) for key in LISTED_KEYS}
        self.last_seen = dict.fromkeys(self.names)
        self.prefixes: list[SeenPrefix] = []
        self.pages = 0
        self._scanners: dict[tuple[str, int], RingScanner] = {}

    def _scanner(self, gateway: Gateway) -> RingScanner:
        """One for each life of a gateway: it remembers what was listed."""
        place = gateway.name, gateway.life
        if place not in self._scanners:
            settings = ScanSettings(
                timeout_s=0.3,
                hedge_s=0.02,
                examine_max=self.random.choice((2, 3, 8192)),
                cache_bytes_max=self.random.choice((2_000, 5_000, 1 << 20)),
                share=self.random.choice((lambda *_: 1, lambda *_: 2, ScanSettings.share)),
            )
            self._scanners[place] = RingScanner(
                gateway.layouts, gateway.directory, gateway.client, Everybody(), settings
            )
        return self._scanners[place]

    async def worker(self, gateway: Gateway) -> None:
        for _ in range(CALLS):
            await asyncio.sleep(self.random.uniform(0, 0.03))
            self.found.operations += 1
            if self.random.random() < 0.5:
                await self._write(gateway, self.random.choice(LISTED_KEYS))
            else:
                await self._list(gateway)

    async def _write(self, gateway: Gateway, key: str) -> None:
        kind = self.random.choice((Kind.PUT, Kind.PUT, Kind.DELETE))
        operation = Operation(kind, key, self.moment(), new=b"%d" % self._moments)
        self.history.append(operation)
        content = operation.new or b""
        if self.random.random() < 0.7:
            content = with_head(content + bytes(self.random.choice((0, 300))), 0, len(content))
        update: Update = delete if kind is Kind.DELETE else lambda _: Change(content)
        creates = kind is Kind.PUT and self.random.random() < 0.6
        try:
            outcome = await self._change(gateway.client, self.names[key], update, regardless=creates)
        except OutcomeUnknown:
            self.found.unknown += 1
            return
        except S3Error:
            self.found.refused += 1
            self.history.remove(operation)
            return
        operation.observed = listed_as(outcome.before)
        operation.blind = (
            outcome.before is None and outcome.after is not None and outcome.after.sequence % FLOOR_SEQUENCES > 1
        )
        operation.returned = self.moment()

    async def _list(self, gateway: Gateway) -> None:
        delimiter, limit = self.random.choice((b"", b"/", b"/")), self.random.choice((1, 2, 100))
        prefix = self.random.choice((b"", b"", b"a/", b"c"))
        heads = self.random.random() < 0.6
        after: bytes | None = b""
        while after is not None:
            query = PageQuery(
                Table.OBJECT, BUCKET, range(SHARDS), prefix=prefix, after=after, delimiter=delimiter, limit=limit
            )
            invoked = self.moment()
            try:
                page = await self._page(gateway, query, heads=heads)
            except S3Error:
                self.found.refused += 1
                return
            self._judge_page(query, page, invoked, self.moment())
            after = page.next_after

    async def _page(self, gateway: Gateway, query: PageQuery, *, heads: bool) -> HeadPage:
        scanner = self._scanner(gateway)
        if heads:
            return await scanner.list_heads(query)
        page = await scanner.list_page(query)
        rows = page.rows
        return HeadPage(
            [row.key for row in rows], [head_of(row.value.body) for row in rows], page.prefixes, page.next_after
        )

    def _judge_page(self, query: PageQuery, page: HeadPage, invoked: int, returned: int) -> None:
        self.pages += 1
        seen = dict(zip(page.keys, page.heads, strict=True))
        if page.next_after is not None and page.next_after <= query.after:
            self.complain("a page ends where it began")
        for key in LISTED_KEYS:
            packed = key.encode()
            covered = packed > query.after and (page.next_after is None or packed <= page.next_after)
            if not covered or not packed.startswith(query.prefix):
                continue
            if common_prefix(packed, query.prefix, query.delimiter) not in page.prefixes:
                found = seen.get(packed)
                self.history.append(Operation(Kind.READ, key, invoked, returned=returned, observed=found))
        self.prefixes += [SeenPrefix(prefix.decode(), invoked, returned) for prefix in page.prefixes]

    def judge(self) -> Verdicts:
        found = super().judge()
        for seen in dict.fromkeys(self.prefixes) if not found.violation else ():
            if not any(self._may_have_been(key, seen) for key in LISTED_KEYS if key.startswith(seen.prefix)):
                self.complain(f"a page shows the common prefix {seen.prefix}, and none of its keys was there")
        return found

    def _may_have_been(self, key: str, seen: SeenPrefix) -> bool:
        history = [operation for operation in self.history if operation.key == key]
        written = {operation.new for operation in history if operation.kind is Kind.PUT}
        return any(
            linearizable([*history, Operation(Kind.READ, key, seen.invoked, returned=seen.returned, observed=content)])
            for content in sorted(content for content in written if content is not None)
        )

    async def look_at_the_end(self, reader: Gateway) -> None:
        await asyncio.sleep(1.0)
        before = self.found.refused
        for _ in range(2):
            await self._list(reader)
        await self._bring_up(reader)
        await self._list(reader)
        if self.found.refused > before:
            self.complain("the bucket cannot be listed after everything healed")

    async def _bring_up(self, reader: Gateway) -> None:
        """As after an absence: replicas that missed writes get them. In the end sound disks have the same rows.

        A replica that has started often has promised more than the others, and refuses a round. The next one is above
        that promise. A replica with a damaged row may refuse more of them.
        """
        settings = ScanSettings(examine_max=self.aside.choice((1, 2, 3, 8192)))
        scanner = RingScanner(reader.layouts, reader.directory, reader.client, Everybody(), settings)
        left = set(range(SHARDS))
        for _ in range(BRING_UP_TRIES):
            alike = await scanner.alike(Table.OBJECT, BUCKET, sorted(left))
            if not all(self._are_the_same(reader, shard) for shard in alike):
                self.complain("replicas with other rows have the same sum")
            left -= alike
            if not left:
                return
            for shard in sorted(left):
                with contextlib.suppress(ServiceUnavailable):
                    await scanner.catch_up(Table.OBJECT, BUCKET, shard, quick=True)
            await asyncio.sleep(1.0)  # a round ends with a majority: the last replica has its row a little later
        flipped = any(isinstance(part, BitFlips) for part in self.parts)
        if not flipped and all(node.takes_writes for node in self.world.nodes.values()):
            self.complain(f"replicas of shards {sorted(left)} have other rows after they were compared")

    def _are_the_same(self, reader: Gateway, shard: int) -> bool:
        """Whether all replicas have the same keys with the same checks: a quick comparison finds no damage."""
        wanted = RowRange(Table.OBJECT, BUCKET, shard, b"", b"", 1_000)
        disks = reader.layouts.partition(partition_of(BUCKET, shard)).present
        stores = [self.world.nodes["n" + disk[1:]].store for disk in disks]
        first, *others = ([(key, check_number(row)) for key, row in store.slice(wanted)] for store in stores)
        return all(rows == first for rows in others)


def listed_as(value: Value | None) -> Content:
    return None if content_of(value) is None or value is None else head_of(value.body)


def run_listing(seed: int, rules: Rules = RULES) -> Verdicts:
    """As ``scenario.run_seed``, of these."""
    return play_out(lambda loop: Listing(seed, loop, rules))

"""Somebody has the certificates of storage nodes, and calls whatever their role may, for an hour beside honest traffic.

``DRIVERS`` has one driver for each method of the table: a method without one fails here. A driver asks for the worst
that it can think of. The thief sees what a storage node sees: rows, fragments, the layout. The nodes whose
certificates it has work on, honestly: what a node may do to its own disks no table prevents.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Awaitable, Callable, Sequence

import msgspec
import pytest

from storaged.cluster.messages import LayoutAfter, Ping
from storaged.cluster.rpc import authority
from storaged.errors import FragmentDamaged, FragmentOther, NoSuchKey, PeerRefused, StoragedError
from storaged.fragments import messages as of_fragments
from storaged.fragments.ports import FragmentId, Retirement
from storaged.hashes import fragment_hash
from storaged.maintain.asks import SETTLED, Answered, SettledNames, TakeAsks
from storaged.maintain.holds import Hold
from storaged.maintain.pull import Behind
from storaged.maintain.service import Ask
from storaged.meta import messages
from storaged.meta.consensus.register import COUNTER_MAX, NEVER
from storaged.meta.names import Ballot, RegisterName, Table, Value, Visibility
from storaged.meta.store_ports import RowRange, Slot
from storaged.objects.records import BucketRecord
from storaged.wire import Message, encode
from tests.integration.memory_cluster import Cluster, LocalCaller, run

HOUR_S = 3600
KEYS = [b"small %d" % number for number in range(4)] + [b"large %d" % number for number in range(3)]


class Thief:
    """With the certificates of these storage nodes. ``refused``: by method and code."""

    def __init__(self, cluster: Cluster, nodes: Sequence[str], seed: int) -> None:
        self.cluster = cluster
        self.random = random.Random(seed)
        self.callers = {node: LocalCaller(cluster, node, "storage") for node in nodes}
        self.old: dict[RegisterName, list[Value]] = {}
        self.refused: dict[tuple[str, str], int] = {}
        self.answered: dict[str, int] = {}
        self.bucket_id = bytes(16)

    async def call(self, method: str, request: Message, body: bytes = b"") -> None:
        """Asks each node but the one whose certificate it uses."""
        name = self.random.choice(list(self.callers))
        for node in self.cluster.nodes:
            if node == name or method not in self.cluster.nodes[node].methods:
                continue
            named = "disk" in request.__struct_fields__
            for disk in self.cluster.nodes[node].meta if named else ("",):
                asked = msgspec.structs.replace(request, disk=disk) if named else request
                await self._call(name, node, method, asked, body)

    async def _call(self, name: str, node: str, method: str, request: Message, body: bytes) -> None:
        try:
            await self.callers[name].call(node, method, request, Message, body=[body])
        except StoragedError as error:
            code = getattr(error, "remote_code", "") or error.code
            self.refused[method, code] = self.refused.get((method, code), 0) + 1
        except msgspec.MsgspecError:  # the reply has another type than the bare one
            self.answered[method] = self.answered.get(method, 0) + 1
        else:
            self.answered[method] = self.answered.get(method, 0) + 1

    # --- what it sees

    def slot(self) -> Slot:
        """Any row of any disk; it remembers what it saw."""
        found: list[Slot] = []
        while not found:
            node = self.cluster.nodes[self.random.choice(list(self.cluster.nodes))]
            store = node.meta[self.random.choice(list(node.meta))]
            table, scope, shard = self.random.choice([*store.scopes()] or [(Table.SYSTEM, bytes(16), 0)])
            names = [RegisterName(table, scope, shard, key) for key, _ in store.slice(_range(table, scope, shard))]
            found = [slot for name in names if (slot := store.get(name)) is not None]
        slot = self.random.choice(found)
        self.old.setdefault(slot.name, []).append(slot.value)
        return slot

    async def fragment(self) -> tuple[str, FragmentId]:
        found = await self.cluster.fragments()
        return self.random.choice(found)

    def ballot(self) -> Ballot:
        now_us = self.cluster.clock.wall_ms() * 1000
        ahead = self.random.choice((1, 1_000_000, 3_000_000_000, COUNTER_MAX - now_us))
        node = self.random.choice((*self.callers, "g"))
        return Ballot(self.random.choice((1, 1, 99)), now_us + ahead, node, self.random.randbytes(8))

    def accept(self) -> messages.Accept:
        slot = self.slot()
        older = self.random.choice(self.old[slot.name])
        deleted = Value(slot.value.sequence + 1, self.random.randbytes(16), Visibility.TOMBSTONE, b"")
        value = self.random.choice((older, deleted, NEVER, slot.value))
        return messages.Accept("", slot.name, self.ballot(), value, b"", self.random.random() < 0.5)


def _range(table: int, scope: bytes, shard: int) -> RowRange:
    return RowRange(table, scope, shard, b"", b"", 1000)


Driver = Callable[[Thief], Awaitable[tuple[Message, bytes] | Message]]


async def accepts(thief: Thief) -> Message:
    several = [thief.accept() for _ in range(3)]
    several = [
        msgspec.structs.replace(each, disk=thief.random.choice(list(thief.cluster.nodes["nb"].meta)))
        for each in several
    ]
    return messages.Accepts(several, [0] * 3, [thief.random.random() < 0.3 for _ in several])


async def write(thief: Thief) -> tuple[Message, bytes]:
    """Over a fragment that is there: other bytes, under its header or a forged one; or into the void."""
    disk, fragment = await thief.fragment()
    [header] = await thief.cluster.store(disk).headers([fragment])
    if header is None:
        return of_fragments.IdsRequest("", ()), b""
    payload = thief.random.randbytes(header.length)
    kind = thief.random.random()
    if kind < 0.5:
        hashes = list(header.hashes)
        hashes[0 if fragment.k == 1 else fragment.position] = fragment_hash((payload,))
        header = msgspec.structs.replace(header, hashes=tuple(hashes))
    elif kind < 0.6:
        header = msgspec.structs.replace(header, id=fragment._replace(data_id=thief.random.randbytes(16)).pack())
    return of_fragments.WriteRequest("", header), payload


async def touch(thief: Thief) -> Message:
    _, fragment = await thief.fragment()
    return of_fragments.TouchRequest("", (fragment.pack(),), 0)


async def delete(thief: Thief) -> Message:
    found = await thief.cluster.fragments()
    return of_fragments.DeleteRequest("", tuple({fragment.pack() for _, fragment in found}))


async def retire(thief: Thief) -> Message:
    _, fragment = await thief.fragment()
    return of_fragments.RetireRequest("", fragment.data_id, thief.slot().name.pack(), 0)


async def ids(thief: Thief) -> Message:
    _, fragment = await thief.fragment()
    return of_fragments.IdsRequest("", (fragment.pack(),))


async def hint(thief: Thief) -> Message:
    _, fragment = await thief.fragment()
    name = thief.slot().name.pack()
    return Ask((name, b"no name"[:2] if thief.random.random() < 0.1 else name), ((name, fragment.pack()),))


async def take(thief: Thief) -> Message:
    return TakeAsks((Answered(1, encode(SettledNames((SETTLED,), ("",)))),), (), 100, 0)


async def _of(request: Message) -> Message:
    return request


FAR = Ballot(1, 1 << 55, "", b"")
"""A floor above all ballots."""

DRIVERS: dict[str, Driver] = {
    "cluster.ping": lambda thief: _of(Ping("na", b"12345678", 1, 99)),
    "cluster.layout": lambda thief: _of(LayoutAfter(0)),
    "cluster.offer": lambda thief: _of(LayoutAfter(99)),
    "cluster.claims": lambda thief: _of(LayoutAfter(99)),
    "cluster.accept": lambda thief: _of(LayoutAfter(99)),
    "cluster.vote": lambda thief: _of(LayoutAfter(99)),
    "audit.witness": lambda thief: _of(LayoutAfter(0)),
    "audit.witnessed": lambda thief: _of(LayoutAfter(0)),
    "meta.prepare": lambda thief: _of(messages.Prepare("", thief.slot().name, thief.ballot())),
    "meta.accept": lambda thief: _of(thief.accept()),
    "meta.accepts": accepts,
    "meta.create": lambda thief: _of(messages.Create("", thief.slot().name, thief.ballot(), NEVER)),
    "meta.turn": lambda thief: _of(LayoutAfter(0)),
    "meta.read": lambda thief: _of(messages.Read("", thief.slot().name, thief.random.choice((0, 1, 99)))),
    "meta.reads": lambda thief: _of(messages.Reads(1, ["b0"], [[b"\0" + thief.slot().name.pack()]])),
    "meta.scan": lambda thief: _of(
        messages.ScanRequest("", 1, Table.OBJECT, thief.bucket_id, (messages.ShardAsk(0, b"", 1000, 0, 1000, 10**6),))
    ),
    "meta.page_put": lambda thief: _of(messages.PagePut("", thief.random.randbytes(16), b"another page")),
    "meta.page_get": lambda thief: _of(messages.PageGet("", thief.random.randbytes(16))),
    "meta.page_check": lambda thief: _of(messages.PageCheck("", (bytes(16),))),
    "meta.fence": lambda thief: _of(messages.FenceSet("", thief.bucket_id, b"\xff" * 16, True)),
    "meta.unfence": lambda thief: _of(messages.FenceLift("", thief.bucket_id, b"\xff" * 16)),
    "meta.fences": lambda thief: _of(messages.FencesAsk("", b"")),
    "meta.take_fences": lambda thief: _of(
        messages.FencesTake("", (messages.ScopeFence(thief.bucket_id, b"\xff" * 16, True, b""),))
    ),
    "meta.ranges": lambda thief: _of(messages.RangesAsk("", 0)),
    "meta.floor": lambda thief: _of(messages.FloorSet("", thief.slot().name.prefix, FAR, True)),
    "meta.expunge": lambda thief: _of(messages.Expunge("", thief.slot().name.prefix, FAR)),
    "meta.floors": lambda thief: _of(messages.FloorsAsk("", 0)),
    "meta.take_floors": lambda thief: _of(
        messages.FloorsTake(
            "", thief.slot().name.partition, 1 << 33, (messages.RangeFloor(thief.slot().name.prefix, FAR),)
        )
    ),
    "meta.fence_epoch": lambda thief: _of(messages.EpochFence("", 99)),
    "fragment.write": write,
    "fragment.sync": ids,
    "fragment.read": lambda thief: _of(of_fragments.ReadRequest("", bytes(23), 0, 1000)),
    "fragment.reads": lambda thief: _of(of_fragments.ReadsRequest((of_fragments.ReadRequest("", bytes(23), 0, 1000),))),
    "fragment.stat": ids,
    "fragment.headers": ids,
    "fragment.touch": touch,
    "fragment.retire": retire,
    "fragment.retired": lambda thief: _of(of_fragments.RetiredRequest("", 2**60, 1000)),
    "fragment.unretire": lambda thief: _of(of_fragments.UnretireRequest("", bytes(16))),
    "fragment.delete": delete,
    "fragment.scan": lambda thief: _of(of_fragments.ScanRequest("", b"", 1000)),
    "fragment.verify": ids,
    "fragment.usage": lambda thief: _of(of_fragments.UsageRequest("")),
    "maintain.status": lambda thief: _of(Ask()),
    "maintain.scrub": lambda thief: _of(Ask()),
    "maintain.hint": hint,
    "maintain.hold": lambda thief: _of(Hold((thief.random.randbytes(16),))),
    "maintain.asks": take,
    "maintain.behind": lambda thief: _of(Behind((thief.slot().name.pack(),))),
    "maintain.wake": lambda thief: _of(Ask()),
}
"""A request of another type stands in where the method is served elsewhere, or is refused by its role."""

SERVED_ELSEWHERE = {
    "cluster.ping",
    "cluster.layout",
    "cluster.offer",
    "cluster.claims",
    "cluster.accept",
    "cluster.vote",
    "audit.witness",
    "audit.witnessed",
}
"""Not by the cluster in memory: ``test_layouts``, ``test_audit_witness`` and others have their hostile callers."""


def test_every_method_of_the_table_has_a_hostile_driver() -> None:
    assert set(DRIVERS) == set(authority.METHODS)


async def _honest(cluster: Cluster, bucket: BucketRecord, held: dict[bytes, bytes | None], draw: random.Random) -> None:
    key = draw.choice(KEYS)
    kind = draw.random()
    if kind < 0.4:
        data = draw.randbytes(draw.choice((300, 8_000)) if key.startswith(b"small") else 700_000)
        await cluster.put(bucket, key, data)
        held[key] = data
    elif kind < 0.5:
        await cluster.objects.delete(bucket, key)
        held[key] = None
    else:
        await _check(cluster, bucket, key, held.get(key))


async def _check(cluster: Cluster, bucket: BucketRecord, key: bytes, wanted: bytes | None) -> None:
    found: bytes | None = None
    with contextlib.suppress(NoSuchKey):
        found = await cluster.get(bucket, key)
    assert found == wanted, key


@pytest.mark.timeout(0)
@pytest.mark.parametrize("nodes", [("na",), ("na", "nb")], ids=["one certificate", "two of three"])
def test_an_hour_with_stolen_certificates_changes_deletes_and_hides_nothing(nodes: tuple[str, ...]) -> None:
    async def scenario(cluster: Cluster) -> None:
        draw, thief = random.Random(7), Thief(cluster, nodes, 11)
        bucket, held = await cluster.bucket("demo"), dict[bytes, bytes | None]()
        thief.bucket_id = bucket.id
        for key in KEYS:
            held[key] = draw.randbytes(700_000 if key.startswith(b"large") else 5_000)
            await cluster.put(bucket, key, held[key] or b"")
        cluster.maintain()
        methods = [name for name in DRIVERS if name not in SERVED_ELSEWHERE]
        end, turn = cluster.loop.time() + HOUR_S, 0
        while cluster.loop.time() < end:
            method = methods[turn % len(methods)]
            turn += 1
            driven = await DRIVERS[method](thief)
            await thief.call(method, *(driven if isinstance(driven, tuple) else (driven,)))
            await asyncio.sleep(draw.uniform(0, 10))
            if turn % 4 == 0:
                await _honest(cluster, bucket, held, draw)
        assert turn > 5 * len(methods)
        await cluster.pass_s(60)
        for key, wanted in held.items():
            await _check(cluster, bucket, key, wanted)
            assert wanted is None or await cluster.is_whole(bucket, key), key
        for node in cluster.nodes.values():
            for disk, replica in node.replicas.items():
                assert replica.statistics().state == "ok", disk
                assert cluster.meta(disk).get_fence(bucket.id) is None, "no fence was set"
        held[b"after"] = b"and the ring still takes writes"
        await cluster.put(bucket, b"after", held[b"after"] or b"")
        assert cluster.differing_registers() == []
        for name in authority.METHODS:
            if name not in SERVED_ELSEWHERE and "storage" not in authority.METHODS[name].callers:
                assert {code for method, code in thief.refused if method == name} == {"ROLE_REFUSED"}, name
                assert name not in thief.answered

    run(scenario)


def replaced(hashes: tuple[bytes, ...], position: int, payload: bytes) -> tuple[bytes, ...]:
    return (*hashes[:position], fragment_hash((payload,)), *hashes[position + 1 :])


async def first_on(cluster: Cluster, rack: str, least: int) -> tuple[str, FragmentId]:
    """A fragment on a disk of the rack."""
    await cluster.pass_s(1)
    found = await cluster.fragments()
    return next((disk, each) for disk, each in found if disk[0] == rack and each.position >= least)


def test_a_storage_node_writes_over_an_undamaged_fragment_only_what_it_is() -> None:
    async def scenario(cluster: Cluster) -> None:
        bucket = await cluster.bucket("demo")
        await cluster.put(bucket, b"large", random.Random(1).randbytes(700_000))
        thief = Thief(cluster, ("na",), 3)
        disk, fragment = await first_on(cluster, "b", 0)
        [header] = await cluster.store(disk).headers([fragment])
        assert header is not None
        good = bytes(cluster.store(disk).kept(fragment).payload)
        bad = bytes([good[0] ^ 1]) + good[1:]
        forged = msgspec.structs.replace(header, hashes=replaced(header.hashes, fragment.position, bad))

        async def attempt(header: object, payload: bytes) -> str:
            try:
                await thief.callers["na"].call(
                    "nb",
                    "fragment.write",
                    of_fragments.WriteRequest(disk, header),
                    of_fragments.Done,
                    body=[payload],  # type: ignore[arg-type]
                )
            except FragmentOther:
                return "OTHER"
            except FragmentDamaged:
                return "DAMAGED"
            return "OK"

        assert await attempt(header, bad) == "DAMAGED"
        assert await attempt(forged, bad) == "OTHER"
        assert await attempt(msgspec.structs.replace(header, owner=b"x" * 20), good) == "OTHER"
        assert await attempt(msgspec.structs.replace(header, hashes=()), good) in ("DAMAGED", "OTHER")
        assert await attempt(header, good) == "OK"
        assert bytes(cluster.store(disk).kept(fragment).payload) == good
        await cluster.store(disk).delete([fragment])
        assert await attempt(header, good) == "OK", "repair may"

    run(scenario)


def test_false_bytes_where_a_fragment_was_lost_are_found_and_replaced_by_the_disks_own_node() -> None:
    async def scenario(cluster: Cluster) -> None:
        bucket = await cluster.bucket("demo")
        data = random.Random(2).randbytes(700_000)
        await cluster.put(bucket, b"large", data)
        thief = Thief(cluster, ("na",), 3)
        disk, fragment = await first_on(cluster, "b", 1)
        [header] = await cluster.store(disk).headers([fragment])
        assert header is not None
        good = bytes(cluster.store(disk).kept(fragment).payload)
        await cluster.store(disk).delete([fragment])
        bad = bytes([good[0] ^ 1]) + good[1:]
        hashes = replaced(header.hashes, fragment.position, bad)
        await thief.callers["na"].call(
            "nb",
            "fragment.write",
            of_fragments.WriteRequest(disk, msgspec.structs.replace(header, hashes=hashes)),
            of_fragments.Done,
            body=[bad],
        )
        cluster.maintain()
        await cluster.settled()
        assert await cluster.get(bucket, b"large") == data
        with contextlib.suppress(StoragedError):  # what honest repair of another node does when a reader told it
            await cluster.nodes["nc"].context.stores.store(disk).write(header, [good])
        await cluster.pass_s(120)
        assert bytes(cluster.store(disk).kept(fragment).payload) == good

    run(scenario)


def test_of_what_the_thief_puts_into_the_void_nothing_is_referred_to() -> None:
    """Fragments under data ids of its own, and entries of garbage lists: the roles refuse the latter."""

    async def scenario(cluster: Cluster) -> None:
        thief = Thief(cluster, ("na",), 5)
        with pytest.raises(PeerRefused) as refused:
            await thief.callers["na"].call(
                "nb",
                "fragment.retire",
                of_fragments.RetireRequest("b0", bytes(16), Retirement(bytes(16), b"o" * 20, 0).owner, 0),
                of_fragments.Done,
            )
        assert refused.value.remote_code == "ROLE_REFUSED"

    run(scenario)

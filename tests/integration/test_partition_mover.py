"""The mover takes partitions to the places of a new layout, with the ring of the product on replicas in memory."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import dataclass
from dataclasses import replace as replace_ports
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from msgspec.structs import replace

from storaged.clock import SystemClock
from storaged.cluster.layout import Layout
from storaged.cluster.partitions import PartitionRecord, PartitionState, is_settled, path_of, signed_bytes
from storaged.cluster.sparing import UNREACHABLE, DisksOut, OutDisk
from storaged.errors import NoSuchBucket, ServiceUnavailable, SlowDown
from storaged.maintain.expunger import Expunger, ExpungerPorts
from storaged.maintain.partition_mover import FAILURES_SHOWN, MoverPorts, PartitionMover
from storaged.meta.acceptor.replica import LocalReplica
from storaged.meta.consensus.register import FLOOR_SEQUENCES
from storaged.meta.listing.merge import RingScanner, every_row
from storaged.meta.messages import Accept, FencesAsk, FenceSet, FencesReply, FloorsAsk, ScopeFence
from storaged.meta.names import Change, RegisterName, Table, Visibility, system_name
from storaged.meta.ports import PageQuery
from storaged.node.partition_follower import PartitionFollower
from storaged.units import MIB
from storaged.wire import encode
from tests.doubles.layouts import KnownLayouts, layout_of
from tests.worlds.ring_client import MemoryReplicas, ring_client

pytestmark = pytest.mark.virtual_time

KEY = Ed25519PrivateKey.generate()
SIGNER = bytes(16)
BUCKETS = [number.to_bytes(16, "big") for number in range(1, 9)]


def signed(record: PartitionRecord) -> PartitionRecord:
    return replace(record, signer=SIGNER, signature=KEY.sign(signed_bytes("test", record)))


async def key_of(_signer: bytes) -> Ed25519PublicKey:
    return KEY.public_key()


def names() -> list[RegisterName]:
    return [RegisterName(Table.OBJECT, scope, shard, b"key %d" % shard) for scope in BUCKETS for shard in range(3)]


MOVED = sorted({name.partition for name in names()})
"""The partitions of the tests' registers: moving all of them takes long."""


class Disks(MemoryReplicas):
    """And what the mover asks of ``Liveness``: some may be full."""

    def __init__(self, disks: Iterable[str]) -> None:
        super().__init__(disks)
        self.full: set[str] = set()

    def disk_readable(self, disk_id: str) -> bool:
        return disk_id in self.replicas and disk_id not in self.away

    disk_prompt = disk_readable

    def disk_writable(self, disk_id: str) -> bool:
        return self.disk_readable(disk_id) and disk_id not in self.full


class Gateway:
    """A process: what it believes of the layout and of partitions is its own."""

    def __init__(self, name: str, disks: Disks, before: Layout) -> None:
        self.layouts = KnownLayouts(before)
        self.client = ring_client(self.layouts, disks, node=name, refresh=self._refresh, jitter=lambda: 0.5)
        self.scanner = RingScanner(self.layouts, disks, self.client, disks)  # type: ignore[arg-type]
        self.follower = PartitionFollower(self.layouts, self.client, self.scanner, key_of, "test")
        self.ports = ports = MoverPorts(
            self.layouts,
            self.client,
            self.scanner,
            self.client,
            self.client.moves,
            disks,  # type: ignore[arg-type]
            SystemClock(),
            signed,
            self.follower.refresh,
        )
        self.mover = PartitionMover(ports, at_once=16, lost_s=0, partitions=MOVED)

    async def _refresh(self, partition: int) -> None:
        await self.follower.refresh(partition)

    async def put(self, name: RegisterName, body: bytes) -> None:
        outcome = await self.client.change(name, lambda _before: Change(body))
        assert outcome.after is not None

    async def get(self, name: RegisterName) -> bytes | None:
        value = (await self.client.read(name)).value
        return value.body if value is not None and value.visibility == Visibility.LIVE else None

    async def listed(self, scope: bytes) -> list[bytes]:
        return [row.key async for row in every_row(self.scanner, PageQuery(Table.OBJECT, scope, (0, 1, 2)))]


@dataclass
class World:
    before: Layout
    after: Layout
    disks: Disks
    gateway: Gateway
    other: Gateway
    """It hears of partitions that move only when a replica refuses it."""

    async def learn(self) -> None:
        """Both know the new layout, and that no partition has moved yet. The other does not hear of what moves then."""
        for gateway in (self.gateway, self.other):
            gateway.layouts.learn(self.after)
            await gateway.follower.read_all()

    async def move(self) -> None:
        """Until everything is where the layout wants it."""
        async with asyncio.timeout(120):
            while await self.gateway.mover.round():
                pass


@pytest.fixture
async def world() -> AsyncIterator[World]:
    before = layout_of((1, 1, 1))
    after = replace(layout_of((1, 1, 1, 1), epoch=2), seeds=before.seeds, base=1)
    disks = Disks(disk.id for disk in after.disks)
    gateways = Gateway("g1", disks, before), Gateway("g2", disks, before)
    yield World(before, after, disks, *gateways)
    for gateway in gateways:
        await gateway.client.close()


def by_partition() -> list[RegisterName]:
    """One name of each partition."""
    return list({name.partition: name for name in names()}.values())


def moved(layout: Layout, name: RegisterName) -> bool:
    return "d0" in layout.replicas_of(name.partition)


async def test_the_disk_that_comes_gets_the_floors_of_deleted_keys(world: World) -> None:
    """A key that was deleted and expunged begins above the floor at every replica, also at the new one."""
    gateway, disks = world.gateway, world.disks
    [*some] = [name for name in by_partition() if moved(world.after, name)][:3]
    for name in some:
        await gateway.put(name, b"gone")
        await gateway.client.change(name, lambda _before: Change(b"", Visibility.TOMBSTONE))
    await asyncio.sleep(0.01)
    ports = ExpungerPorts(
        gateway.layouts, gateway.scanner, gateway.client.moves, gateway.client.floors, disks, SystemClock()
    )
    partitions = [name.partition for name in some]
    assert await Expunger(ports, delay_s=0, worthwhile=1, partitions=partitions).once() == len(some)
    await world.learn()
    await world.move()
    for name in some:
        assert gateway.layouts.partition(name.partition).step
        for disk in gateway.layouts.partition(name.partition).present:
            found = await disks.replicas[disk].floors.floors(FloorsAsk(disk, name.partition))  # type: ignore[attr-defined]
            assert [floor.prefix for floor in found.floors] == [name.prefix], disk
        outcome = await gateway.client.change(name, lambda _before: Change(b"again"))
        assert outcome.after is not None
        assert outcome.after.sequence > FLOOR_SEQUENCES
        assert await world.other.get(name) == b"again"


async def test_every_partition_moves_and_nothing_is_lost(world: World) -> None:
    for name in names():
        await world.gateway.put(name, name.pack())
    await world.learn()
    await world.move()
    layouts = world.gateway.layouts
    assert all(is_settled(layouts.partition(number), world.after) for number in MOVED)
    assert any(moved(world.after, name) for name in names())
    for name in names():
        assert await world.gateway.get(name) == name.pack()
        for disk in world.after.replicas_of(name.partition):
            assert world.disks.stores[disk].get(name) is not None, "a replica of the new set lacks a row"


async def test_a_mover_knows_its_own_steps_and_reads_those_of_others(world: World) -> None:
    """A quorum has just accepted a step of its own, which it signed itself."""
    await world.learn()
    read: dict[str, list[int]] = {"own": [], "others": []}
    movers = {}
    for whose, gateway in (("own", world.gateway), ("others", world.other)):

        async def refresh(partition: int, whose: str = whose, gateway: Gateway = gateway) -> None:
            read[whose].append(partition)
            await gateway.follower.refresh(partition)

        ports = replace_ports(gateway.ports, refresh=refresh)
        mover = movers[whose] = PartitionMover(ports, at_once=16, lost_s=0, partitions=MOVED)
        async with asyncio.timeout(120):
            while await mover.round():
                pass
    assert movers["own"].progress.steps > 0
    assert read["own"] == []
    own, others = world.gateway.layouts.partitions, world.other.layouts.partitions
    stepped = [number for number in MOVED if own.record(number) is not None]
    assert movers["others"].progress.steps == 0
    assert sorted(set(read["others"])) == stepped
    assert [own.record(number) for number in stepped] == [others.record(number) for number in stepped]


async def test_nothing_comes_to_a_disk_without_room_for_what_an_out_disk_had_until_it_has_room(world: World) -> None:
    """A layout that was signed moves all the same: its administrator was asked."""
    for name in names():
        await world.gateway.put(name, b"body")
    await world.learn()
    asked: list[int] = []
    lacks: dict[str, int] = {}

    async def room(layout: Layout, states: Sequence[PartitionState]) -> dict[str, int]:
        asked.append(len(states))
        return lacks

    layouts = world.gateway.layouts
    mover = PartitionMover(replace_ports(world.gateway.ports, room=room), lost_s=0, partitions=MOVED)
    while await mover.round():
        assert not asked
    steps = mover.progress.steps
    assert steps > 0
    layouts.partitions.note_out(DisksOut(1, (OutDisk("a0", 0, UNREACHABLE),), ()))
    lacks |= {"b0": 2 * MIB, "c0": MIB}  # and d0 has room
    wanted = layouts.partitions.target(layouts.current)

    def waiting() -> set[str]:
        """The disks that partitions with a replica on the disk that is out wait for."""
        states = [layouts.partition(number) for number in MOVED]
        there = [state for state in states if "a0" in state.present]
        return {disk for state in there for disk in wanted.replicas_of(state.partition) if disk not in state.present}

    before = waiting()
    assert before == {"b0", "c0", "d0"}
    async with asyncio.timeout(120):
        while "d0" in waiting():
            await mover.round()
    for _ in range(FAILURES_SHOWN):
        await mover.round()
    assert waiting() == {"b0", "c0"}
    assert re.fullmatch(r"partition \d+: disk (b0 lacks 2|c0 lacks 1)\.0 MiB for what .*", mover.progress.reason)
    lacks.clear()
    async with asyncio.timeout(120):
        while await mover.round():
            pass
    assert waiting() == set()
    for name in names():
        assert await world.gateway.get(name) == b"body"


async def test_a_gateway_that_knows_nothing_of_it_finds_its_way(world: World) -> None:
    for name in names():
        await world.other.put(name, b"before")
    await world.learn()
    await world.move()
    for name in names():
        assert await world.other.get(name) == b"before"
        await world.other.put(name, b"after")
        assert await world.gateway.get(name) == b"after"
    for scope in BUCKETS:
        assert len(await world.other.listed(scope)) == 3


async def test_the_disk_that_went_can_be_lost_and_others_after_it(world: World) -> None:
    for name in names():
        await world.gateway.put(name, b"body")
    await world.learn()
    await world.move()
    for away in ("a0", "b0", "c0", "d0"):
        world.disks.away = {away}
        for name in names():
            if away not in world.after.replicas_of(name.partition) or away not in world.before.seeds:
                assert await world.other.get(name) == b"body"


async def test_deleted_keys_stay_deleted(world: World) -> None:
    for name in names():
        await world.gateway.put(name, b"body")
    for name in names():
        await world.gateway.client.change(name, lambda _before: Change(b"", Visibility.TOMBSTONE))
    await world.learn()
    await world.move()
    for name in names():
        assert await world.other.get(name) is None
        rows = [world.disks.stores[disk].get(name) for disk in world.after.replicas_of(name.partition)]
        assert sum(row is not None for row in rows) >= 2


async def test_a_row_that_only_two_replicas_have_is_whole_at_the_new_set(world: World) -> None:
    for number, name in enumerate(names()):
        world.disks.away = {world.before.replicas_of(name.partition)[number % 3]}
        await world.gateway.put(name, b"two of three")
    world.disks.away = set()
    await world.learn()
    await world.move()
    for name in names():
        assert await world.other.get(name) == b"two of three"
        values = [world.disks.stores[disk].get(name) for disk in world.after.replicas_of(name.partition)]
        assert sum(value is not None for value in values) >= 2


async def test_the_disk_that_comes_gets_rows_that_it_was_too_busy_for(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in names():
        await world.gateway.put(name, b"body")
    await world.learn()
    busy: set[RegisterName] = set()
    accept = LocalReplica.try_accept

    def busy_once(self: LocalReplica, request: Accept, *more: Any, **options: Any) -> bool:
        if self is world.disks.replicas["d0"] and request.name.table == Table.OBJECT and request.name not in busy:
            busy.add(request.name)
            raise SlowDown("Too much is on its way to this disk.")
        return accept(self, request, *more, **options)

    monkeypatch.setattr(LocalReplica, "try_accept", busy_once)
    await world.move()
    coming = [name for name in names() if moved(world.after, name)]
    assert busy == set(coming)
    assert [name for name in coming if world.disks.stores["d0"].get(name) is None] == []


async def test_writes_go_on_while_partitions_move(world: World) -> None:
    for name in names():
        await world.gateway.put(name, b"0")
    await world.learn()
    acknowledged: dict[RegisterName, bytes] = {}
    done = asyncio.Event()

    async def write(gateway: Gateway, mine: list[RegisterName]) -> None:
        number = 0
        while not done.is_set():
            for name in mine:
                number += 1
                body = b"%d" % number
                await gateway.put(name, body)
                acknowledged[name] = body
                assert await gateway.get(name) == body
            await asyncio.sleep(0)

    tasks = [
        asyncio.create_task(write(world.gateway, names()[::2])),
        asyncio.create_task(write(world.other, names()[1::2])),
    ]
    await world.move()
    done.set()
    await asyncio.gather(*tasks)
    for name, body in acknowledged.items():
        assert await world.gateway.get(name) == body
        assert await world.other.get(name) == body


async def test_a_fence_of_a_deleted_bucket_moves_along(world: World) -> None:
    name = next(name for name in names() if moved(world.after, name))
    await world.gateway.client.fence(name.scope, range(3), b"nonce", final=True)
    await world.learn()
    await world.move()
    reply = await world.disks.replicas["d0"].fence(FenceSet("d0", name.scope, b"zzz", False))
    assert not reply.done, "a final fence with another nonce is in force"


@pytest.mark.parametrize("lies", [False, True])
async def test_a_bucket_whose_fence_lends_moves_along_with_rows_that_differ(world: World, lies: bool) -> None:
    """Its rows settle with its nonce alone, and the new disk takes changes with it, as soon as it counts. One that lies
    names another nonce.
    """
    name = next(name for name in names() if moved(world.after, name))
    stays, lags = (disk for disk in world.after.replicas_of(name.partition) if disk != "d0")
    await world.gateway.put(name, b"one")
    world.disks.away = {lags}
    await world.gateway.put(name, b"two")
    world.disks.away = set()
    assert await world.gateway.client.fence(name.scope, range(3), b"nonce", lends=True)
    if lies:

        async def lie(request: FencesAsk, *, timeout_s: float = 10.0) -> FencesReply:
            return FencesReply((ScopeFence(name.scope, b"z", True, b""),) if not request.after else (), False)

        world.disks.replicas[stays].handover.fences = lie  # type: ignore[method-assign]
    await world.learn()
    await world.move()
    assert moved(world.gateway.layouts.current, name)
    world.disks.away = {stays}
    assert await world.gateway.get(name) == b"two"
    for nonce in (b"", b"z"):
        with pytest.raises(NoSuchBucket) as refused:
            await world.gateway.client.change(name, lambda _before: Change(b"late"), settling_nonce=nonce)
        assert refused.value.details == {"lends": "true"}
    await world.gateway.client.change(name, lambda _before: Change(b"three"), settling_nonce=b"nonce")
    assert await world.gateway.get(name) == b"three"


async def test_a_disk_that_calls_a_bucket_deleted_leaves_no_row_behind(world: World) -> None:
    """The row is at the disk that lies and at the one that goes. Left out of the move, it would be nowhere else."""
    name = next(name for name in names() if moved(world.after, name))
    liar, lags = (disk for disk in world.after.replicas_of(name.partition) if disk != "d0")
    world.disks.away = {lags}
    await world.gateway.put(name, b"body")
    world.disks.away = set()
    handover = world.disks.replicas[liar].handover

    async def lie(request: FencesAsk, *, timeout_s: float = 10.0) -> FencesReply:
        return FencesReply((ScopeFence(name.scope, b"nonce", True, b""),) if not request.after else (), False)

    handover.fences = lie  # type: ignore[method-assign]
    await world.learn()
    await world.move()
    world.disks.away = {liar}
    await world.gateway.follower.read_all()
    assert await world.gateway.get(name) == b"body"
    await world.gateway.put(name, b"later")


async def test_a_deleted_bucket_whose_fence_one_replica_of_two_has_holds_up_no_partition(world: World) -> None:
    """The third one is lost. It and one of the others were the majority that has the fence."""
    name = next(name for name in names() if moved(world.after, name))
    await world.gateway.put(name, b"body")
    before = world.before.replicas_of(name.partition)
    lost = next(disk for disk in before if disk not in world.after.replicas_of(name.partition))
    missed = next(disk for disk in before if disk != lost)
    world.disks.away = {missed}
    await world.gateway.client.fence(name.scope, range(3), b"nonce", final=True)
    world.disks.away = {lost}
    await world.learn()
    await world.move()
    with pytest.raises(NoSuchBucket):
        await world.gateway.put(name, b"late")


async def test_without_a_majority_nothing_moves_and_it_goes_on_later(world: World) -> None:
    for name in names():
        await world.gateway.put(name, b"body")
    await world.learn()
    world.disks.away = {"a0", "b0"}
    for _ in range(FAILURES_SHOWN):
        assert not world.gateway.mover.progress.reason
        assert await world.gateway.mover.round()
    assert world.gateway.mover.progress.steps == 0
    assert world.gateway.mover.progress.reason
    world.disks.away = set()
    await world.move()
    for name in names():
        assert await world.other.get(name) == b"body"


async def test_the_disk_that_comes_is_lost_and_the_partition_goes_back(world: World) -> None:
    for name in names():
        await world.gateway.put(name, b"body")
    await world.learn()
    await world.gateway.mover.round()  # all joint
    assert world.gateway.mover.progress.steps == sum(moved(world.after, name) for name in by_partition())
    world.disks.away = {"d0"}
    for _ in range(3):
        await world.gateway.mover.round()
    layouts = world.gateway.layouts
    assert not any(layouts.partition(number).coming for number in MOVED)
    assert not any("d0" in layouts.partition(number).present for number in MOVED)
    for name in names():
        assert await world.other.get(name) == b"body"
    world.disks.away = set()
    await world.move()
    for name in names():
        assert await world.other.get(name) == b"body"


async def test_a_disk_that_is_full_does_not_come_and_a_partition_that_waits_for_it_goes_back(world: World) -> None:
    for name in names():
        await world.gateway.put(name, b"body")
    await world.learn()
    await world.gateway.mover.round()  # all joint
    world.disks.full = {"d0"}
    for _ in range(3):
        await world.gateway.mover.round()
    states = [world.gateway.layouts.partition(number) for number in MOVED]
    assert not any("d0" in state.disks for state in states)
    world.disks.full = set()
    await world.move()


@pytest.mark.parametrize("what", ["away", "full"])
async def test_no_exchange_begins_while_the_disk_that_would_come_takes_no_writes(world: World, what: str) -> None:
    for name in names():
        await world.gateway.put(name, b"body")
    await world.learn()
    setattr(world.disks, what, {"d0"})
    mover = PartitionMover(world.gateway.ports, at_once=16, partitions=MOVED)
    for _ in range(FAILURES_SHOWN):
        assert await mover.round()
    assert not any(world.gateway.layouts.partition(number).coming for number in MOVED), "it spares one disk fewer"
    assert "until disk d0 takes writes" in mover.progress.reason
    setattr(world.disks, what, set())
    async with asyncio.timeout(120):
        while await mover.round():
            pass
    assert not mover.progress.reason


async def test_a_partition_that_does_not_get_whole_says_why(world: World) -> None:
    for name in names():
        await world.gateway.put(name, b"body")
    await world.learn()
    mover = PartitionMover(world.gateway.ports, at_once=16, partitions=MOVED)
    await mover.round()  # all joint
    world.disks.away = {"d0"}
    for _ in range(FAILURES_SHOWN):
        assert await mover.round()
    assert any(world.gateway.layouts.partition(number).coming for number in MOVED)
    assert mover.progress.reason


async def test_a_layout_with_a_base_that_is_not_known_yet_does_not_end_the_mover_in_the_middle_of_a_round(
    world: World,
) -> None:
    for name in names():
        await world.gateway.put(name, b"body")
    await world.learn()

    async def allowed() -> dict[int, frozenset[str]]:
        world.gateway.layouts.learn(replace(world.after, epoch=4, base=3))
        return {}

    mover = PartitionMover(replace_ports(world.gateway.ports, allowed=allowed), at_once=16, partitions=MOVED)
    assert await mover.round()
    assert mover.progress.steps == 0
    with pytest.raises(ServiceUnavailable):
        world.gateway.layouts.partition(MOVED[0])


async def test_a_disk_that_comes_and_is_away_is_named(world: World) -> None:
    await world.learn()
    mover = PartitionMover(world.gateway.ports, at_once=16, partitions=MOVED)
    await mover.round()  # all joint
    world.disks.away = {"d0"}
    for _ in range(FAILURES_SHOWN):
        await mover.round()
    assert "disk d0, which comes to it, does not answer" in mover.progress.reason


async def test_only_some_partitions_are_joint_at_the_same_time(world: World) -> None:
    await world.learn()
    mover = PartitionMover(world.gateway.ports, at_once=16, joint_max=3, partitions=MOVED)
    layouts, most = world.gateway.layouts, 0
    await mover.round()
    assert mover.progress.steps == 3
    async with asyncio.timeout(120):
        while await mover.round():
            joint = sum(bool(layouts.partition(number).coming) for number in MOVED)
            most = max(most, joint)
    assert most == 3
    assert all(is_settled(layouts.partition(number), world.after) for number in MOVED)


async def test_two_movers_at_once_end_where_one_does(world: World) -> None:
    for name in names():
        await world.gateway.put(name, b"body")
    await world.learn()
    async with asyncio.timeout(120):
        while any(await asyncio.gather(world.gateway.mover.round(), world.other.mover.round())):
            pass
    for name in names():
        assert await world.other.get(name) == b"body"


async def test_a_mover_with_an_older_layout_undoes_nothing(world: World) -> None:
    """Its ballots are lower than those of the records."""
    await world.learn()
    await world.move()
    world.gateway.layouts.learn(replace(world.before, epoch=3, base=1))
    await world.move()
    await world.other.follower.read_all()
    assert await world.other.mover.round(), "by its layout, partitions are elsewhere"
    assert world.other.mover.progress.steps == 0
    assert all(is_settled(world.gateway.layouts.partition(number), world.before) for number in MOVED)


async def test_what_another_mover_has_moved_meanwhile_is_no_failure(world: World) -> None:
    for name in names():
        await world.gateway.put(name, b"body")
    await world.learn()

    async def allowed() -> dict[int, frozenset[str]]:
        await world.move()
        return {}

    mover = PartitionMover(replace_ports(world.gateway.ports, allowed=allowed), at_once=16, partitions=MOVED)
    assert await mover.round()
    assert not mover._failures


async def test_a_partition_of_a_bucket_with_countries_does_not_leave_them(world: World) -> None:
    for name in names():
        await world.gateway.put(name, b"body")
    nodes = tuple(replace(node, location="DE/fra1/d") if node.name == "nd" else node for node in world.after.nodes)
    world.after = replace(world.after, nodes=nodes)
    french = {number for number in MOVED[::2] if "d0" in world.after.replicas_of(number)}
    assert french

    async def allowed() -> dict[int, frozenset[str]]:
        return dict.fromkeys(french, frozenset({"FR"}))

    await world.learn()
    mover = PartitionMover(replace_ports(world.gateway.ports, allowed=allowed), at_once=16, partitions=MOVED)
    for _ in range(3 * FAILURES_SHOWN):
        left = await mover.round()
    assert left == len(french)
    assert "that may lie in FR only" in mover.progress.reason
    assert not any("d0" in world.gateway.layouts.partition(number).disks for number in french)
    for name in names():
        assert await world.other.get(name) == b"body"


async def test_a_disk_outside_of_the_countries_is_not_in_the_way_of_one_inside(world: World) -> None:
    five = layout_of((1, 1, 1, 1, 1), epoch=2)
    nodes = tuple(replace(node, location="DE/fra1/d") if node.name == "nd" else node for node in five.nodes)
    disks = tuple(disk for disk in five.disks if disk.id not in ("a0", "b0"))
    after = replace(five, nodes=nodes, disks=disks, seeds=world.before.seeds, base=1)
    for disk in after.disk_by_id:
        world.disks.add(disk)
    for name in names():
        await world.gateway.put(name, b"body")
    world.gateway.layouts.learn(after)
    await world.gateway.follower.read_all()

    async def allowed() -> dict[int, frozenset[str]]:
        return dict.fromkeys(MOVED, frozenset({"FR"}))

    mover = PartitionMover(replace_ports(world.gateway.ports, allowed=allowed), at_once=16, partitions=MOVED)
    for _ in range(3 * FAILURES_SHOWN):
        await mover.round()
    for number in MOVED:
        present = set(world.gateway.layouts.partition(number).present)
        assert {"c0", "e0"} <= present, "the other exchange was possible"
        assert "d0" not in present
    assert "that may lie in FR only" in mover.progress.reason


async def test_a_record_that_no_gateway_signed_is_not_believed(world: World) -> None:
    forged = PartitionRecord(5, 1, ("a0", "b0", "c0"), ("a0", "b0", "d0"), 2, SIGNER, bytes(64))
    name = system_name(path_of(5))
    await world.gateway.put(name, encode(forged))
    await world.other.follower.read_all()
    assert world.other.follower.refused == 1
    assert world.other.layouts.partition(5).step == 0
    elsewhere = encode(signed(PartitionRecord(6, 1, ("a0", "b0", "c0"), ("a0", "b0", "d0"), 2)))
    await world.gateway.put(name, elsewhere)
    await world.other.follower.read_all()
    assert world.other.layouts.partition(5).step == 0


async def test_a_stale_map_that_reaches_no_majority_says_so(world: World) -> None:
    await world.gateway.put(names()[0], b"body")
    world.disks.away = {"a0", "b0"}
    with pytest.raises(ServiceUnavailable):
        await world.other.get(names()[0])


async def test_an_expunged_key_stays_deleted_when_disks_that_had_it_return_to_a_set_that_knows_nothing_of_it() -> None:
    """Two disks keep the same row of it. None of the others ever had a row in the range; they have its floor."""
    eight = layout_of((1,) * 8)
    disks = Disks(disk.id for disk in eight.disks)

    def layout(epoch: int, active: str) -> Layout:
        wanted = [replace(disk, state="active" if disk.id[0] in active else "draining") for disk in eight.disks]
        return replace(eight, epoch=epoch, disks=tuple(wanted), base=min(epoch - 1, 1))

    gateway, name = Gateway("g1", disks, layout(1, "abc")), names()[0]
    mover = PartitionMover(gateway.ports, lost_s=3600, partitions=[name.partition])

    async def move(wanted: Layout, steps: int = 100) -> set[str]:
        gateway.layouts.learn(wanted)
        await gateway.follower.read_all()
        until = mover.progress.steps + steps
        async with asyncio.timeout(60):
            while mover.progress.steps < until and await mover.round():
                pass
        return {*gateway.layouts.partition(name.partition).disks}

    await gateway.put(name, b"body")
    disks.away = await move(layout(2, "cde"), steps=2) & {"a0", "b0"}
    assert await move(layout(2, "cde")) == {"c0", "d0", "e0"}
    disks.away = set()
    assert disks.stores["a0"].get(name) == disks.stores["b0"].get(name) is not None
    await gateway.client.change(name, lambda _before: Change(b"", Visibility.TOMBSTONE))
    await asyncio.sleep(0.01)
    ports = ExpungerPorts(
        gateway.layouts, gateway.scanner, gateway.client.moves, gateway.client.floors, disks, SystemClock()
    )
    assert await Expunger(ports, delay_s=0, worthwhile=1, partitions=[name.partition]).once() == 1
    assert await move(layout(3, "fgh")) == {"f0", "g0", "h0"}
    [back] = await move(layout(4, "abh"), steps=2) & {"a0", "b0"}
    disks.away = {back}
    assert await move(layout(4, "abh")) == {"a0", "b0", "h0"}
    for away in ("", "a0", "b0", "h0"):
        disks.away = {away}
        assert await gateway.get(name) is None, away
    await gateway.client.close()

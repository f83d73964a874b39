"""Rows asked of many disks: one message a node and a turn of the loop, and what happens to rows that need more than one
answer.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any, TypeVar, cast

import pytest

from storaged.cluster.layout import DiskEntry, Layout, NodeEntry
from storaged.cluster.partitions import PartitionRecord, epoch_of
from storaged.cluster.ports import Call, EncodedCall, OnReply, PeerIdentity, Reply
from storaged.errors import DiskUnusable, InvalidRequest, PeerRefused, PeerUnreachable, StoragedError
from storaged.meta import messages
from storaged.meta.acceptor.replica import LocalReplica
from storaged.meta.client import RingClient
from storaged.meta.names import Ballot, RegisterName, Table, Value, Visibility
from storaged.meta.ports import Reading
from storaged.meta.storage.rowvalue import check_of, pack_row
from storaged.meta.storage.small_copies import PlainCopies
from storaged.meta.store_ports import Copy, Slot, StoreBatch
from storaged.meta.transport import read_batching
from storaged.meta.transport.read_batching import CHECK, COPY, HASH, READS_BYTES_MAX, READS_MAX, ROW
from storaged.meta.transport.replicas import RemoteReplica, ReplicaDirectory, ReplicaHost
from storaged.wire import Buffer, Message, decode, encode
from tests.doubles.layouts import Places
from tests.doubles.meta_store import MemoryMetaStore
from tests.worlds.ring_client import ring_client

pytestmark = pytest.mark.virtual_time

T = TypeVar("T", bound=Message)
SCOPE = b"s" * 16
NODES = ("na", "nb", "nc")
DISKS = tuple(f"{node}{number}" for node in NODES for number in (0, 1))
CALL = Call(PeerIdentity("gw", "FR", "s", "r", ("gateway",)), memoryview(b""), 0.0)


def name_of(number: int) -> RegisterName:
    return RegisterName(Table.OBJECT, SCOPE, number % 16, b"key %d" % number)


def slot_of(name: RegisterName, counter: int = 1, body: bytes = b"body", payload: bytes = b"") -> Slot:
    value = Value(counter, b"o" * 16, Visibility.LIVE, body, payload)
    return Slot(name, Ballot(1, counter, "gw", b"incarnat"), value, copied=bool(payload))


class World(Places):
    """Three nodes with two disks each, and a network to a gateway that counts messages and can lose them."""

    def __init__(self) -> None:
        nodes = tuple(NodeEntry(node, f"FR/par1/{node}", "", ("storage",)) for node in NODES)
        self.current = Layout("test", 1, nodes, tuple(DiskEntry(disk, disk[:2], 1) for disk in DISKS), DISKS[:3])
        self.gates = {disk: asyncio.Event() for disk in DISKS}
        for gate in self.gates.values():
            gate.set()
        self.stores = {disk: MemoryMetaStore(sync=gate.wait) for disk, gate in self.gates.items()}
        self.in_memory: dict[bytes, bytes] = {}
        self.on_disk: dict[bytes, bytes] = {}
        self.replicas = {
            disk: LocalReplica(disk, store, copies=self._copies(store)) for disk, store in self.stores.items()
        }
        self.hosts = {
            node: ReplicaHost({disk: self.replicas[disk] for disk in DISKS if disk[:2] == node}, lambda: 1_000)
            for node in NODES
        }
        self.away: set[str] = set()
        self.messages: list[tuple[str, str, Any]] = []
        self.tasks: set[asyncio.Task[None]] = set()
        self.client = ring_client(self, ReplicaDirectory(self, self), node="gw", hedge_s=5.0, deadline_s=5.0)

    def _copies(self, store: MemoryMetaStore) -> PlainCopies:
        async def load(data_id: bytes) -> Copy | None:
            found = self.on_disk.get(data_id)
            return None if found is None else Copy(b"header", memoryview(found))

        async def refuse(header: bytes, body: Sequence[Buffer]) -> None:
            raise AssertionError

        def peek(data_id: bytes) -> memoryview | None:
            found = self.in_memory.get(data_id)
            return None if found is None else memoryview(found)

        return PlainCopies(store, refuse, load, peek)

    def at(self, epoch: int) -> Layout:
        return self.current

    async def write(self, *slots: Slot) -> None:
        for slot in slots:
            for disk in self.current.replicas_of(slot.name.partition):
                await self.stores[disk].commit(StoreBatch([slot]))

    # As ``cluster.ports.Caller`` and ``TryCaller``.

    async def call(self, node: str, method: str, request: Message, reply: type[T], **more: Any) -> tuple[T, memoryview]:
        answered: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        if not self.try_call(
            node, method, request, reply, lambda answer, bulk: answered.set_result((answer, bulk)), **more
        ):
            raise PeerUnreachable(f"{node} is away")
        answer, bulk = await answered
        if isinstance(answer, StoragedError):
            raise answer
        return answer, bulk

    def try_call(
        self, node: str, method: str, request: Message, reply: type[Message], then: OnReply, **more: Any
    ) -> bool:
        if node in self.away:
            return False
        self.messages.append((node, method, request))
        task = asyncio.get_running_loop().create_task(self._serve(node, method, encode(request), reply, then))
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)
        return True

    def encoded_call(self, *_args: Any, **_options: Any) -> EncodedCall:
        def try_call(*_: Any) -> bool:
            raise AssertionError("this is about reads")

        return try_call

    async def _serve(self, node: str, method: str, encoded: bytes, reply: type[Message], then: OnReply) -> None:
        entry = self.hosts[node].methods()[method]
        request = decode(encoded, entry.request)
        try:
            answer = entry.try_answer(request, CALL) if entry.try_answer is not None else None
            if answer is None:
                answer = await entry.handler(request, CALL)
        except DiskUnusable as error:
            then(error, memoryview(b""))
            return
        except StoragedError as error:
            then(PeerRefused(error.message, error.code), memoryview(b""))
            return
        message, body = answer if isinstance(answer, Reply) else (answer, ())
        then(decode(encode(message), reply), memoryview(b"".join(bytes(piece) for piece in body)))


@pytest.fixture
async def world() -> Any:
    made = World()
    yield made
    await made.client.close()


def of(world: World, name: RegisterName) -> tuple[str, ...]:
    return world.current.replicas_of(name.partition)


async def test_what_is_read_in_one_turn_of_the_loop_travels_in_one_message_a_node(world: World) -> None:
    slots = [slot_of(name_of(number)) for number in range(40)]
    await world.write(*slots)
    found = await asyncio.gather(*(world.client.read(slot.name) for slot in slots))
    assert [reading.value for reading in found] == [slot.value for slot in slots]
    assert sorted(node for node, _, _ in world.messages) == list(NODES)
    asks = [ask for _, _, request in world.messages for asks in request.asks for ask in asks]
    assert sorted(ask[:1] for ask in asks) == [ROW] * 40 + [HASH] * 40


async def test_partitions_that_have_moved_equally_often_are_read_in_one_message(world: World) -> None:
    slots = [slot_of(name_of(number)._replace(shard=number % 8)) for number in range(40)]
    await world.write(*slots)
    for shard in range(4):
        name = name_of(0)._replace(shard=shard)
        world.partitions.learn(PartitionRecord(name.partition, 2, of(world, name), (), 1))
    found = await asyncio.gather(*(world.client.read(slot.name) for slot in slots))
    assert [reading.value for reading in found] == [slot.value for slot in slots]
    sent = [(node, request.epoch) for node, _, request in world.messages]
    assert len(set(sent)) == len(sent) <= 2 * len(NODES)
    assert {epoch for _, epoch in sent} == {1, epoch_of(2, 1)}


async def test_reads_of_a_fenced_bucket_go_straight_to_what_says_so(world: World) -> None:
    """A replica does not answer for a row alone there. So it is not asked for that again and again."""
    slot, other = slot_of(name_of(1)), slot_of(name_of(1)._replace(scope=b"t" * 16))
    await world.write(slot, other)

    async def methods_of(name: RegisterName, value: Value) -> list[str]:
        world.messages.clear()
        tried: asyncio.Future[Reading | None] = asyncio.get_running_loop().create_future()
        world.client.try_read(name, False, tried.set_result)
        assert (await tried or await world.client.read(name)).value == value
        return [method for _, method, _ in world.messages]

    quick, fenced = ["meta.reads"] * 2, ["meta.read"] * 3
    assert await methods_of(slot.name, slot.value) == quick
    for lends in (False, True):
        await world.client.fence(SCOPE, range(16), b"nonce", lends=lends)
        found = [await methods_of(slot.name, slot.value) for _ in range(3)]
        assert found[1:] == [fenced, fenced]
        assert await methods_of(other.name, other.value) == quick
    await world.client.unfence(SCOPE, range(16), b"nonce")
    assert await methods_of(slot.name, slot.value) == fenced
    assert await methods_of(slot.name, slot.value) == quick


async def test_what_was_never_written_is_read_in_one_round_trip(world: World) -> None:
    assert (await world.client.read(name_of(1), want_payload=True)) == (None, None)
    assert [method for _, method, _ in world.messages] == ["meta.reads"] * 2


async def test_copies_come_along_each_with_its_row(world: World) -> None:
    plain = {bytes([65 + number]) * 16: bytes([number]) * (number * 100) for number in range(5)}
    world.in_memory = {data_id: copy for data_id, copy in plain.items() if copy}
    slots = [slot_of(name_of(number), payload=data_id) for number, data_id in enumerate(plain)]
    slots[0] = slot_of(name_of(0), body=b"inline")
    await world.write(*slots)
    found = await asyncio.gather(
        *(world.client.read(slot.name, want_payload=True) for slot in slots), world.client.read(slots[3].name)
    )
    assert [bytes(reading.payload or b"") for reading in found] == [*plain.values(), b""]
    assert all(reading.value == slot.value for reading, slot in zip(found, [*slots, slots[3]], strict=True))


async def test_a_copy_that_is_not_in_memory_is_waited_for_in_a_message_of_its_own(world: World) -> None:
    data_id = b"D" * 16
    world.on_disk[data_id] = b"sealed"
    slot, other = slot_of(name_of(1), payload=data_id), slot_of(name_of(2))
    await world.write(slot, other)
    found, beside = await asyncio.gather(world.client.read(slot.name, want_payload=True), world.client.read(other.name))
    assert found == (slot.value, b"sealed")
    assert beside.value == other.value
    assert [
        [[ask[:1] for ask in asks] for asks in request.asks] for _, _, request in world.messages if request.wait
    ] == [[[COPY]]]


async def test_replicas_of_this_process_tell_what_they_have_in_memory_before_the_question_returns(world: World) -> None:
    slot = slot_of(name_of(1), payload=b"D" * 16)
    await world.write(slot)
    client = ring_client(world, ReplicaDirectory(world, world, world.replicas), node="gw", deadline_s=5.0)
    found: list[Reading | None] = []
    client.try_read(name_of(2), True, found.append)
    client.try_read(slot.name, False, found.append)
    world.in_memory[b"D" * 16] = b"sealed"
    client.try_read(slot.name, True, found.append)
    assert found == [Reading(None), Reading(slot.value), Reading(slot.value, memoryview(b"sealed"))]
    del world.in_memory[b"D" * 16]
    world.on_disk[b"D" * 16] = b"sealed"
    assert await client.read(slot.name, want_payload=True) == Reading(slot.value, memoryview(b"sealed"))
    assert not world.messages
    await client.close()


async def test_an_accept_on_its_way_to_the_disk_is_waited_for(world: World) -> None:
    name = name_of(1)
    await world.write(slot_of(name))
    disk = of(world, name)[1]
    world.gates[disk].clear()
    newer = slot_of(name, 2)
    accepting = asyncio.create_task(world.replicas[disk].accept(messages.Accept(disk, name, newer.ballot, newer.value)))
    await asyncio.sleep(0)
    reading = asyncio.create_task(world.client.read(name))
    for _ in range(10):
        await asyncio.sleep(0)
    assert not reading.done()
    world.gates[disk].set()
    await accepting
    assert (await reading).value == slot_of(name).value  # two of three never had the newer one, so no client got it


@pytest.mark.parametrize("which", [0, 1])
async def test_a_damaged_row_or_one_that_differs_or_a_node_that_is_away_costs_another_round(
    world: World, which: int
) -> None:
    damaged, differs, away = name_of(1), name_of(2), name_of(3)
    slots = [slot_of(name) for name in (damaged, differs, away)]
    await world.write(*slots)
    world.stores[of(world, damaged)[which]].damage(damaged)
    assert (await world.client.read(damaged)).value == slots[0].value
    newer = slot_of(differs, 2)
    for disk in (of(world, differs)[which], of(world, differs)[2]):
        await world.stores[disk].commit(StoreBatch([newer]))
    assert (await world.client.read(differs)).value == newer.value
    world.away = {of(world, away)[which][:2]}
    assert (await world.client.read(away)).value == slots[2].value


@pytest.mark.parametrize("end", [b"", b"\xff" * 60])
async def test_a_node_that_tells_a_right_check_and_no_row_ends_nobodys_wait(
    world: World, monkeypatch: pytest.MonkeyPatch, end: bytes
) -> None:
    slot = slot_of(name_of(1))
    await world.write(slot)
    monkeypatch.setattr(MemoryMetaStore, "rows", lambda self, names: [pack_row(slot)[:9] + end] * len(names))
    soon: asyncio.Future[Reading | None] = asyncio.get_running_loop().create_future()
    world.client.try_read(slot.name, False, soon.set_result)
    assert await asyncio.wait_for(soon, 2) is None
    assert (await world.client.read(slot.name)).value == slot.value


@pytest.mark.parametrize("liar", range(3))
@pytest.mark.parametrize("gone", [False, True])
async def test_a_lone_replica_does_not_change_a_row_that_it_sends(world: World, liar: int, gone: bool) -> None:
    """Its row has the check of the true one: a check is no proof, as a row can be made that has it."""
    slot = slot_of(name_of(1), body=b"true")
    await world.write(slot)
    lie = slot._replace(value=Value(1, b"o" * 16, Visibility.TOMBSTONE if gone else Visibility.LIVE, b"lie"))
    store = world.stores[of(world, slot.name)[liar]]
    row = pack_row(slot)[:9] + pack_row(lie)[9:]
    store.rows = lambda names: [row] * len(names)  # type: ignore[method-assign]
    assert (await world.client.read(slot.name)).value == slot.value


async def test_nodes_of_the_version_before_answer_with_the_row_where_its_hash_is_asked_for(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    slot = slot_of(name_of(1))
    await world.write(slot)
    monkeypatch.setattr(read_batching, "hash_of", lambda row: row)
    assert (await world.client.read(slot.name)).value == slot.value
    assert world.client.statistics().reads == 1
    assert len(world.messages) == 2


async def test_rows_that_do_not_fit_into_one_answer_are_asked_for_alone(world: World) -> None:
    slots = [slot_of(name_of(number), body=bytes([number]) * (READS_BYTES_MAX // 3)) for number in range(12)]
    await world.write(*slots)
    found = await asyncio.gather(*(world.client.read(slot.name) for slot in slots))
    assert [reading.value for reading in found] == [slot.value for slot in slots]
    assert any(request.wait for _, _, request in world.messages)


async def test_no_message_has_more_registers_than_a_node_takes(world: World) -> None:
    slots = [slot_of(name_of(number)) for number in range(3 * READS_MAX)]
    for slot in slots:
        await world.write(slot)
    await asyncio.gather(*(world.client.read(slot.name) for slot in slots))
    assert max(sum(map(len, request.asks)) for _, _, request in world.messages) == READS_MAX


def test_what_is_no_request_for_rows_is_refused() -> None:
    at_once = ReplicaHost({}, lambda: 1).methods()["meta.reads"].try_answer
    assert at_once is not None
    ask = ROW + name_of(1).pack()
    for disks, asks, wait in (
        ([], [], False),
        ([], [], True),
        (["d"], [], False),
        (["d"], [[ask], [ask]], False),
        (["d"], [[ask] * (READS_MAX + 1)], False),
        (["d"], [[ask, ask]], True),
    ):
        with pytest.raises(InvalidRequest):
            at_once(messages.Reads(1, disks, asks, wait), CALL)
    replica = LocalReplica("d", MemoryMetaStore())
    at_once = ReplicaHost({"d": replica}, lambda: 1_000).methods()["meta.reads"].try_answer
    assert at_once is not None
    for short in (b"", ROW, ROW + bytes(18)):
        with pytest.raises(InvalidRequest):
            at_once(messages.Reads(1, ["d"], [[ask, short]]), CALL)


async def test_disks_that_follow_a_newer_layout_or_are_not_in_use_tell_nothing(world: World) -> None:
    slot = slot_of(name_of(1))
    await world.write(slot)
    disk = of(world, slot.name)[0]
    at_once = world.hosts[disk[:2]].methods()["meta.reads"].try_answer
    assert at_once is not None
    ask = CHECK + slot.name.pack()
    assert at_once(messages.Reads(1, [disk, "other"], [[ask], [ask]]), CALL) == Reply(
        messages.ReadsReply([[check_of(pack_row(slot))], [None]], []), []
    )
    await world.replicas[disk].fence_epoch(messages.EpochFence(disk, 2))
    assert at_once(messages.Reads(1, [disk], [[ask]]), CALL) == Reply(messages.ReadsReply([[None]], []), [])
    await world.replicas[disk].close()
    assert at_once(messages.Reads(2, [disk], [[ask]]), CALL) == Reply(messages.ReadsReply([[None]], []), [])


@pytest.mark.parametrize("broken", [0, 1])
async def test_a_disk_that_cannot_be_read_costs_the_others_of_its_node_nothing(
    world: World, monkeypatch: pytest.MonkeyPatch, broken: int
) -> None:
    slots = [slot_of(name_of(number)) for number in range(40)]
    await world.write(*slots)

    def fail(names: Sequence[bytes]) -> list[bytes | None]:
        raise DiskUnusable

    bad = f"na{broken}"
    monkeypatch.setattr(world.stores[bad], "rows", fail)
    found = await asyncio.gather(*(world.client.read(slot.name) for slot in slots))
    assert [reading.value for reading in found] == [slot.value for slot in slots]
    assert {method for _, method, _ in world.messages} == {"meta.reads"}
    assert {disk for _, _, request in world.messages if request.wait for disk in request.disks} == {bad}


@pytest.mark.parametrize("bad", ["na0", "na1"])
async def test_of_a_disk_that_cannot_tell_all_its_copies_none_is_taken_for_one_of_another_disk(
    world: World, monkeypatch: pytest.MonkeyPatch, bad: str
) -> None:
    slots = [slot_of(name_of(number), payload=b"%016d" % number) for number in range(40)]
    await world.write(*slots)
    world.in_memory = {slot.value.payload: slot.value.payload * number for number, slot in enumerate(slots, 1)}
    broken = [slot for slot in slots if of(world, slot.name)[0] == bad][-1]
    peek = world.replicas[bad].peek

    def fail(data_id: bytes) -> memoryview | None:
        if data_id == broken.value.payload:
            raise DiskUnusable
        return peek(data_id)

    monkeypatch.setattr(world.replicas[bad], "peek", fail)
    world.on_disk = world.in_memory
    found = await asyncio.gather(*(world.client.read(slot.name, want_payload=True) for slot in slots))
    assert [bytes(reading.payload or b"") for reading in found] == [
        world.in_memory[slot.value.payload] for slot in slots
    ]


async def test_a_read_is_counted_once_whichever_way_it_ends(world: World) -> None:
    name = name_of(1)
    for which in (2, 0):  # of the two that are asked at first none, then one, differs
        await world.stores[of(world, name)[which]].commit(StoreBatch([slot_of(name)]))
        before = world.client.statistics().reads
        soon: asyncio.Future[Reading | None] = asyncio.get_running_loop().create_future()
        world.client.try_read(name, False, soon.set_result)
        agreed = await soon is not None
        assert agreed == (which == 2)
        if not agreed:
            await world.client.read(name)
        assert world.client.statistics().reads == before + 1


def hang(world: World, node: str) -> RingClient:
    """The node takes what it is sent, and answers nothing. A client that hedges."""
    try_call = world.try_call

    def posted(to: str, method: str, request: Message, reply: type[Message], then: OnReply, **more: Any) -> bool:
        if to != node:
            return try_call(to, method, request, reply, then, **more)
        world.messages.append((to, method, request))
        return True

    world.try_call = posted  # type: ignore[method-assign]
    return ring_client(world, ReplicaDirectory(world, world), node="gw", hedge_s=0.05, deadline_s=5.0)


@pytest.mark.parametrize("which", [0, 1])
async def test_a_node_that_does_not_answer_is_waited_for_once(world: World, which: int) -> None:
    slot = slot_of(name_of(1))
    await world.write(slot)
    hung = of(world, slot.name)[which][:2]
    client = hang(world, hung)
    soon: asyncio.Future[Reading | None] = asyncio.get_running_loop().create_future()
    client.try_read(slot.name, False, soon.set_result)
    assert await asyncio.wait_for(soon, 2) is None
    for _ in range(3):
        assert (await client.read(slot.name)).value == slot.value
    assert [to for to, _, _ in world.messages].count(hung) == 1
    await client.close()


async def test_who_was_waited_for_last_is_asked_last(world: World) -> None:
    slot = slot_of(name_of(1))
    await world.write(slot)
    first, second, third = of(world, slot.name)
    for hung, comes_back in ((first, second), (second, first)):
        client = hang(world, hung[:2])
        client._ring.unresponsive.add(comes_back)
        await asyncio.sleep(0.01)
        assert (await client.read(slot.name)).value == slot.value
        world.messages.clear()
        assert (await client.read(slot.name)).value == slot.value
        assert sorted(to for to, _, _ in world.messages) == sorted((comes_back[:2], third[:2]))
        await client.close()
        del world.try_call  # type: ignore[attr-defined]


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("how", ["refused by its node", "away with its node"])
async def test_a_disk_that_is_out_of_use_is_noticed_by_the_first_read_and_asked_last_by_those_behind_it(
    world: World, which: int, how: str
) -> None:
    slot = slot_of(name_of(1))
    await world.write(slot)
    gone = of(world, slot.name)[which]
    if how == "refused by its node":
        del cast(dict[str, LocalReplica], world.hosts[gone[:2]].replicas)[gone]
    else:
        world.away.add(gone[:2])
    assert (await world.client.read(slot.name)).value == slot.value
    world.messages.clear()
    soon: asyncio.Future[Reading | None] = asyncio.get_running_loop().create_future()
    world.client.try_read(slot.name, False, soon.set_result)
    found = await asyncio.wait_for(soon, 2)
    assert found is not None
    assert found.value == slot.value
    assert sorted(to for to, _, _ in world.messages) == sorted(
        disk[:2] for disk in of(world, slot.name) if disk != gone
    )


async def test_a_disk_of_this_node_that_is_out_of_use_is_asked_nothing(world: World) -> None:
    slot = slot_of(name_of(1))
    await world.write(slot)
    gone = of(world, slot.name)[0]
    node = gone[:2]
    used = {disk: replica for disk, replica in world.replicas.items() if disk != gone}
    directory = ReplicaDirectory(
        world, world, {disk: replica for disk, replica in used.items() if disk[:2] == node}, node=node
    )
    with pytest.raises(DiskUnusable, match="not in use on this node"):
        directory.replica(gone)
    assert isinstance(directory.replica(next(disk for disk in DISKS if disk[:2] != node)), RemoteReplica)
    client = ring_client(world, directory, node=node, deadline_s=5.0)
    assert (await client.read(slot.name)).value == slot.value
    assert node not in {to for to, _, _ in world.messages}
    await client.close()


async def test_what_two_replicas_tell_differently_is_settled_without_a_third_that_does_not_answer(world: World) -> None:
    old, new = slot_of(name_of(1)), slot_of(name_of(1), 2)
    await world.write(old)
    first, second, third = of(world, old.name)
    await world.stores[second].commit(StoreBatch([new]))
    client = hang(world, third[:2])
    world.encoded_call = lambda *_args, **_options: lambda *_posted: False  # type: ignore[assignment,method-assign,return-value]
    assert (await asyncio.wait_for(client.read(old.name), 2)).value == new.value
    settled = world.stores[first].get(old.name)
    assert settled is not None
    assert settled.value == new.value
    assert settled.ballot > new.ballot, "a ballot is its proposer's alone"
    await client.close()


async def test_when_nobody_answers_nobody_is_asked_last(world: World) -> None:
    slot = slot_of(name_of(1))
    await world.write(slot)
    first, second, _ = of(world, slot.name)
    hang(world, first[:2])
    client = hang(world, second[:2])
    soon: asyncio.Future[Reading | None] = asyncio.get_running_loop().create_future()
    client.try_read(slot.name, False, soon.set_result)
    assert await asyncio.wait_for(soon, 2) is None
    assert client._ring.unresponsive.last((first, second, "other")) == [first, second, "other"]
    await client.close()

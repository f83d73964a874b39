"""What other nodes may write to registers: by role, by whose ballot it is, and how far ahead that lies. And the attacks
of one storage certificate that this ends.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Awaitable
from dataclasses import replace

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from storaged.cluster.partitions import epoch_of
from storaged.cluster.ports import Call, PeerIdentity
from storaged.cluster.rpc import authority
from storaged.errors import InvalidAccessKeyId, InvalidRequest, PeerRefused, ServiceUnavailable
from storaged.fragments.remote import StoreDirectory
from storaged.meta import messages
from storaged.meta.acceptor.replica import LocalReplica
from storaged.meta.authority import CONTENTS, Gate, KnownSteps
from storaged.meta.client import RingClient
from storaged.meta.consensus.quorums import Quorum
from storaged.meta.consensus.register import (
    COUNTER_AHEAD_MAX_US,
    COUNTER_MAX,
    NEVER,
    RULES,
    Ballots,
    Rules,
    Verdict,
    credible,
)
from storaged.meta.names import (
    SYSTEM_SCOPE,
    ZERO_BALLOT,
    Ballot,
    Change,
    RegisterName,
    Table,
    Value,
    Visibility,
    object_name,
    system_name,
)
from storaged.meta.store_ports import Slot, StoreBatch
from storaged.meta.transport.replicas import ReplicaDirectory, ReplicaHost
from storaged.objects.records import BucketRecord
from storaged.objects.system.users import UserService
from storaged.wire import decode, encode
from tests.doubles.meta_store import MemoryMetaStore
from tests.integration.memory_cluster import Cluster, LocalCaller, run

GATEWAY = PeerIdentity("gw", "FR", "par1", "a", ("gateway",))
STORAGE = PeerIdentity("n1", "FR", "par1", "a", ("storage",))
BOTH = PeerIdentity("n1", "FR", "par1", "a", ("gateway", "storage"))
NO_ROLE = PeerIdentity("n1", "FR", "par1", "a", ())
OBJECT = RegisterName(Table.OBJECT, b"bucket of a test", 3, b"key")
PRIVILEGED = [
    system_name(path)
    for path in (
        "key/00ff",
        "user/AK",
        "username/ann",
        "bucket/b",
        "cluster",
        "layout",
        "signer/00",
        "audit/n1/c0",
        "new/",
    )
]
NOW_MS = 1_800_000_000_000
NOW_US = NOW_MS * 1000
VALUE = Value(1, b"o" * 16, Visibility.LIVE, b"body")


def ballot(node: str, counter: int = NOW_US, epoch: int = 1) -> Ballot:
    return Ballot(epoch, counter, node, b"incarnat")


def gate() -> Gate:
    return Gate(lambda: 1)


def accept(
    name: RegisterName, node: str, *, identity: bool = False, counter: int = NOW_US, epoch: int = 1
) -> messages.Accept:
    return messages.Accept("d", name, ballot(node, counter, epoch), VALUE, identity=identity)


# --- the gate

NAMES = [*PRIVILEGED, OBJECT, OBJECT._replace(table=Table.UPLOAD), OBJECT._replace(table=Table.PART)]


def asks(name: RegisterName, at: Ballot) -> list[messages.Prepare | messages.Accept]:
    """Every kind of request that acceptors get, whatever it carries."""
    values = (VALUE, NEVER)
    return [
        messages.Prepare("d", name, at),
        *(messages.Accept("d", name, at, value, identity=identity) for value in values for identity in (False, True)),
        *(messages.Create("d", name, at, value) for value in values),
    ]


def refusal(request: messages.Prepare | messages.Accept, peer: PeerIdentity) -> str:
    try:
        return gate().judge(request, peer).name
    except PeerRefused as error:
        return error.remote_code


@pytest.mark.parametrize("peer", [GATEWAY, STORAGE, BOTH, NO_ROLE], ids=lambda peer: "+".join(peer.roles) or "none")
def test_each_rule_of_the_table_against_every_kind_of_request(peer: PeerIdentity) -> None:
    """The first rule that is broken answers: role, ballot, layout."""
    is_gateway = "gateway" in peer.roles
    for name in NAMES:
        for node in (peer.name, "another", peer.name[:-1], ""):
            for epoch in (0, 1, 2, 2**62):
                wanted = "OK" if epoch <= 1 else "NEWER"
                wanted = wanted if node == peer.name else "BALLOT_REFUSED"
                wanted = wanted if is_gateway else "ROLE_REFUSED"
                for request in asks(name, ballot(node, epoch=epoch)):
                    assert refusal(request, peer) == wanted, (name, node, epoch, type(request))


def test_every_row_of_the_table_is_a_rule_that_a_simulation_can_switch_off() -> None:
    assert {row.rule for row in CONTENTS} <= set(Rules.__dataclass_fields__)
    far = ballot("another", epoch=9)
    for row in CONTENTS:
        rules = replace(RULES, **{other.rule: other is row for other in CONTENTS})
        only = Gate(lambda: 1, rules)
        if row.code:
            with pytest.raises(PeerRefused) as refused:
                only.judge(messages.Prepare("d", OBJECT, far), STORAGE)
            assert refused.value.remote_code == row.code
        else:
            assert only.judge(messages.Prepare("d", OBJECT, far), STORAGE) is Verdict.NEWER
        without = Gate(lambda: 1, replace(RULES, **{row.rule: False}))
        assert (
            row.rule != "known_epochs"
            or without.judge(messages.Prepare("d", OBJECT, ballot("gw", epoch=9)), GATEWAY) is Verdict.OK
        ), "the common case judges no epochs either, then"


def test_what_no_honest_node_asks_is_told_with_the_peers_name() -> None:
    told: list[tuple[str, str]] = []
    watched = Gate(lambda: 1, on_refusal=lambda peer, error: told.append((peer, getattr(error, "remote_code", ""))))
    for request, peer in (
        (messages.Prepare("d", system_name("user/AK"), ballot("n1")), STORAGE),
        (accept(OBJECT, "n1"), GATEWAY),
        (accept(OBJECT, "gw", epoch=2), GATEWAY),
        (accept(OBJECT, "gw"), GATEWAY),
    ):
        with contextlib.suppress(PeerRefused):
            watched.judge(request, peer)
    assert told == [("n1", "ROLE_REFUSED"), ("gw", "BALLOT_REFUSED")]


# --- a proposer that one replica would lead astray


def test_what_one_replica_says_of_counters_beyond_the_hour_is_not_believed_and_a_majority_is() -> None:
    ballots = Ballots("gw", lambda: os.urandom(8))
    far = COUNTER_MAX - 1
    assert ballots.next(1, far, NOW_US).counter == NOW_US
    assert ballots.next(1, NOW_US + COUNTER_AHEAD_MAX_US, NOW_US).counter == NOW_US + COUNTER_AHEAD_MAX_US + 1
    assert ballots.next(1, far, NOW_US, confirmed=True).counter == far + 1
    assert ballots.next(1, 0, NOW_US).counter == far + 2, "what a majority vouched for stays known"


@given(
    steps=st.lists(st.tuples(st.integers(0, 2**61), st.integers(0, 2**61), st.booleans()), max_size=40),
)
def test_no_ballot_comes_twice_however_the_clock_jumps_and_whoever_lies(steps: list[tuple[int, int, bool]]) -> None:
    lives = iter(range(1, 1000))
    ballots = Ballots("gw", lambda: next(lives).to_bytes(8, "big"))
    drawn = [ballots.next(1, above, now_us, confirmed=confirmed) for above, now_us, confirmed in steps]
    assert len(set(drawn)) == len(drawn)


def test_after_a_clock_was_set_right_ballots_begin_anew_in_another_life() -> None:
    lives = iter((b"life one", b"life two"))
    ballots = Ballots("gw", lambda: next(lives))
    ahead = ballots.next(1, 0, NOW_US + 3 * COUNTER_AHEAD_MAX_US)
    right = ballots.next(1, 0, NOW_US)
    assert (ahead.incarnation, right.incarnation, right.counter) == (b"life one", b"life two", NOW_US)


@pytest.mark.parametrize(
    ("far", "replicas", "above"),
    [
        ([], 3, 0),
        ([9], 3, 0),
        ([5, 9], 3, 5),
        ([5, 9, 7], 3, 7),
        ([9, 9], 5, 0),
        ([1, 2, 3], 5, 1),
        ([1, 2, 3, 4, 5], 5, 3),
        ([9], 1, 9),
    ],
)
def test_a_majority_vouches_for_no_more_than_its_lowest(far: list[int], replicas: int, above: int) -> None:
    disks = [f"d{index}" for index in range(replicas)]
    assert Quorum(disks).vouched(dict(zip(disks, far, strict=False))) == above


# --- one storage certificate against a cluster


class Attacker:
    """Has the name and the certificate of the storage node ``na``, and asks other nodes; its own
    disks it has anyway.
    """

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.caller = LocalCaller(cluster, "na", "storage")
        self.replicas = ReplicaDirectory(cluster.layouts, self.caller)
        self.stores = StoreDirectory(cluster.layouts, self.caller, {})

    def others(self, name: RegisterName) -> list[str]:
        """Replicas on other nodes: two of three, a majority."""
        layout = self.cluster.layouts.current
        return [disk for disk in layout.replicas_of(name.partition) if layout.node_of(disk) != "na"]

    async def force(self, name: RegisterName, value: Value, node: str = "na", *, identity: bool = False) -> list[str]:
        """As keys/att.py did: prepare and accept at every replica. What each other node said."""
        at = Ballot(
            self.cluster.layouts.current.epoch, self.cluster.clock.wall_ms() * 1000 + 5_000_000, node, os.urandom(8)
        )
        told = []
        for disk in self.others(name):
            replica, accept = self.replicas.replica(disk), messages.Accept(disk, name, at, value, identity=identity)
            told.append(await _told(replica.prepare(messages.Prepare(disk, name, at))))
            told.append(await _told(replica.accept(accept)))
        return told


async def _told(asking: Awaitable[messages.PrepareReply | messages.AcceptReply]) -> str:
    try:
        return Verdict((await asking).verdict).name
    except PeerRefused as error:
        return error.remote_code


async def value_of(cluster: Cluster, path: str) -> Value:
    found = (await cluster.gateway.ring.read(system_name(path))).value
    assert found is not None
    return found


def test_a_removed_user_does_not_come_back_and_a_record_is_not_forged() -> None:
    async def scenario(cluster: Cluster) -> None:
        users, attacker = UserService(cluster.gateway.plane), Attacker(cluster)
        ann, _ = await users.add("ann")
        path = "user/" + ann.access_key
        before = await value_of(cluster, path)
        await users.remove("ann")
        after = (await cluster.gateway.ring.read(system_name(path))).value
        for forged in (before, msgspec.structs.replace(before, sequence=before.sequence + 5)):
            for identity in (False, True):
                assert set(await attacker.force(system_name(path), forged, identity=identity)) == {"ROLE_REFUSED"}
        assert (await cluster.gateway.ring.read(system_name(path))).value == after
        users.forget(ann.access_key)
        with pytest.raises(InvalidAccessKeyId):
            await users.lookup(ann.access_key)

    run(scenario)


def test_a_buckets_countries_and_its_key_are_not_overwritten() -> None:
    async def scenario(cluster: Cluster) -> None:
        attacker, bucket = Attacker(cluster), await cluster.bucket("demo")
        before = await value_of(cluster, "bucket/demo")
        record = decode(before.body, BucketRecord)
        forged = msgspec.structs.replace(
            before, sequence=before.sequence + 1, body=encode(msgspec.structs.replace(record, countries=("DE",)))
        )
        assert set(await attacker.force(system_name("bucket/demo"), forged)) == {"ROLE_REFUSED"}
        assert await value_of(cluster, "bucket/demo") == before
        assert set(await attacker.force(system_name("key/" + bucket.id.hex()), VALUE)) == {"ROLE_REFUSED"}

    run(scenario)


def test_not_even_what_a_replica_holds_already_is_accepted_anew() -> None:
    """A replica that lags would then have the newest ballot, and lead the next gateway to an old record."""

    async def scenario(cluster: Cluster) -> None:
        await cluster.bucket("demo")
        before = await value_of(cluster, "bucket/demo")
        assert set(await Attacker(cluster).force(system_name("bucket/demo"), before, identity=True)) == {"ROLE_REFUSED"}

    run(scenario)


def test_an_objects_record_is_changed_under_the_callers_own_ballots_alone() -> None:
    async def scenario(cluster: Cluster) -> None:
        bucket = await cluster.bucket("demo")
        await cluster.put(bucket, b"contract", b"version one")
        name = object_name(bucket.id, bucket.shard_numbers, b"contract")
        first = (await cluster.gateway.ring.read(name)).value
        assert first is not None
        assert set(await Attacker(cluster).force(name, first, "g")) == {"ROLE_REFUSED"}

    run(scenario)


def test_an_objects_older_record_is_not_put_back_nor_is_it_deleted_or_forged() -> None:
    async def scenario(cluster: Cluster) -> None:
        bucket, attacker = await cluster.bucket("demo"), Attacker(cluster)
        name = object_name(bucket.id, bucket.shard_numbers, b"contract")
        await cluster.put(bucket, b"contract", b"version one")
        first = (await cluster.gateway.ring.read(name)).value
        assert first is not None
        await cluster.put(bucket, b"contract", b"version two")
        deleted = Value(first.sequence + 9, os.urandom(16), Visibility.TOMBSTONE, b"")
        for value in (first, deleted, NEVER):
            for identity in (False, True):
                assert set(await attacker.force(name, value, identity=identity)) == {"ROLE_REFUSED"}
        assert await cluster.get(bucket, b"contract") == b"version two"

    run(scenario)


def test_one_storage_certificate_changes_nothing_privileged_by_any_method_of_the_table() -> None:
    """Every row that is not for storage nodes is refused by its role; of the others, what could touch a privileged
    register is refused by its contents.
    """

    async def scenario(cluster: Cluster) -> None:
        attacker, bucket = Attacker(cluster), await cluster.bucket("demo")
        rows = {disk: cluster.rows(disk) for disk in ("a0", "b0", "c0")}
        fence = messages.FenceSet("b0", bucket.id, b"\xff" * 16, True)
        lift = messages.FenceLift("b0", bucket.id, b"\xff" * 16)
        for method, row in authority.METHODS.items():
            if "storage" in row.callers:
                continue
            with pytest.raises(PeerRefused) as refused:
                await attacker.caller.call("nb", method, fence, messages.FenceReply)
            assert refused.value.remote_code == "ROLE_REFUSED", method
        for request in (fence, lift):
            assert (await _refusal(attacker, request)) == "ROLE_REFUSED"
        for path in (
            "user/AK",
            "username/ann",
            "bucket/demo",
            "key/" + bucket.id.hex(),
            "cluster",
            "layout",
            "audit/nb/chain",
        ):
            name = system_name(path)
            assert set(await attacker.force(name, VALUE)) == {"ROLE_REFUSED"}
        assert {disk: cluster.rows(disk) for disk in rows} == rows
        assert all(cluster.meta(disk).get_fence(bucket.id) is None for disk in rows)
        await cluster.put(bucket, b"key", b"still open")

    run(scenario)


async def _refusal(attacker: Attacker, request: messages.FenceSet | messages.FenceLift) -> str:
    method = "meta.fence" if isinstance(request, messages.FenceSet) else "meta.unfence"
    try:
        await attacker.caller.call("nb", method, request, messages.FenceReply)
    except PeerRefused as error:
        return error.remote_code
    return ""


# --- healing without storage nodes


def test_a_system_replica_that_was_away_is_caught_up_by_a_gateway() -> None:
    async def scenario(cluster: Cluster) -> None:
        cluster.maintain()
        await cluster.settled()
        await cluster.kill("nb")
        await cluster.bucket("made-meanwhile")
        await cluster.pass_s(5)
        assert system_name("bucket/made-meanwhile").pack() not in cluster.rows("b0")
        cluster.start("nb")
        assert not cluster.gateway.keeper.current, "nothing looks whole before it is"
        await cluster.settled()
        assert (
            cluster.rows("b0")[system_name("bucket/made-meanwhile").pack()]
            == cluster.rows("a0")[system_name("bucket/made-meanwhile").pack()]
        )
        assert cluster.differing_registers() == []
        assert cluster.gateway.keeper.current

    run(scenario)


def test_a_write_that_a_system_replica_missed_is_settled_at_once() -> None:
    async def scenario(cluster: Cluster) -> None:
        await cluster.pass_s(10)
        walked = cluster.gateway.keeper._walk_at

        async def lose(_source: str, node: str, method: str, _request: object) -> None:
            if node == "nc" and method.startswith("meta.a"):
                raise PeerRefused("not now")

        cluster.intercept = lose
        await cluster.bucket("demo")
        cluster.intercept = None
        await cluster.pass_s(5)
        assert cluster.gateway.keeper._walk_at == walked, "no walk was needed"
        assert cluster.differing_registers() == []

    run(scenario)


def test_a_storage_node_reads_what_a_majority_agrees_on_and_leaves_the_rest_to_gateways() -> None:
    async def scenario(cluster: Cluster) -> None:
        await cluster.bucket("demo")
        await cluster.pass_s(1)
        own: RingClient = cluster.nodes["na"].ring
        name = system_name("bucket/demo")
        assert (await own.read(name)).value is not None
        with pytest.raises(ServiceUnavailable, match="A gateway will bring them together"):
            await own.settle(name)
        lagging = RegisterName(Table.SYSTEM, SYSTEM_SCOPE, 0, b"layout")
        half = Value(1, b"o" * 16, Visibility.LIVE, b"half")
        at = Ballot(1, cluster.clock.wall_ms() * 1000, "g", bytes(8))
        await cluster.nodes["nb"].replicas["b0"].accept(messages.Accept("b0", lagging, at, half))
        await cluster.kill("nc")
        with pytest.raises(ServiceUnavailable, match="A gateway will bring them together"):
            await own.read(lagging)
        assert (await cluster.gateway.ring.read(lagging)).value is not None
        assert (await own.read(lagging)).value is not None

    run(scenario)


# --- a storage node that lies about its own disk


async def put_back(cluster: Cluster, path: str, old: Value) -> None:
    """The node ``na`` writes to its own disk what it likes: an older record, under a ballot above all others."""
    at = Ballot(1, cluster.clock.wall_ms() * 1000 + 1_800_000_000, "g", os.urandom(8))
    await cluster.meta("a0").commit(StoreBatch(slots=[Slot(system_name(path), at, old)]))


@pytest.mark.parametrize("by", ["the walk", "a change"])
def test_one_replica_that_puts_an_old_record_back_brings_no_removed_user_back(by: str) -> None:
    """Gateways settle what differs: they must not carry the liar's record to the others."""

    async def scenario(cluster: Cluster) -> None:
        users = UserService(cluster.gateway.plane)
        ann, _ = await users.add("ann", access_key="AK-ann")
        path = "user/" + ann.access_key
        old = await value_of(cluster, path)
        await users.remove("ann")
        removed = (await cluster.gateway.ring.read(system_name(path))).value
        assert removed is not None
        await put_back(cluster, path, old)
        if by == "the walk":
            cluster.gateway.keeper._walk_at = 0.0
            await cluster.pass_s(10)
            assert cluster.differing_registers() == []
            assert (await cluster.gateway.ring.read(system_name(path))).value == removed
        else:
            again, _ = await users.add("another", access_key="AK-ann")
            assert again.user_id != ann.user_id
            after = await value_of(cluster, path)
            assert after.sequence == removed.sequence + 1

    run(scenario)


def test_two_replicas_that_put_an_old_record_back_are_noticed_by_the_gateway_that_wrote_it() -> None:
    async def scenario(cluster: Cluster) -> None:
        name = RegisterName(Table.OBJECT, b"bucket of a test", 3, b"key")
        ring = cluster.gateway.ring
        first = (await ring.change(name, lambda _: Change(b"one", Visibility.LIVE))).after
        assert first is not None
        await ring.change(name, lambda _: Change(b"two", Visibility.LIVE))
        assert ring.chosen_falls == (0, "")
        at = Ballot(1, cluster.clock.wall_ms() * 1000 + 1_800_000_000, "g", os.urandom(8))
        for disk in cluster.layouts.current.replicas_of(name.partition)[:2]:
            await cluster.meta(disk).commit(StoreBatch(slots=[Slot(name, at, first)]))
        await ring.change(name, lambda _: Change(b"three", Visibility.LIVE))
        falls, where = ring.chosen_falls
        assert falls == 1
        assert "from sequence 2 back to 1" in where

    run(scenario)


def test_what_a_majority_holds_counts_against_a_lone_higher_ballot_only_where_all_have_promised() -> None:
    none, low, high = (ZERO_BALLOT, None), (ballot("a", 1), record(5)), (ballot("b", 2), record(3))
    quorum = Quorum(("x", "y", "z"))
    assert credible(quorum, {"x": high, "y": low, "z": low}) == (*low, True)
    assert credible(quorum, {"x": high, "y": none, "z": none}) == (*none, True)
    assert credible(quorum, {"x": high, "y": low}) is None, "the third may have the higher one too"
    assert credible(quorum, {"x": high, "y": high, "z": low}) == (*high, True)


def test_where_no_two_replicas_agree_a_lone_higher_ballot_leads_to_no_older_record() -> None:
    quorum = Quorum(("x", "y", "z"))
    settled, cut_short, lie = (ballot("a", 1), record(5)), (ballot("b", 2), record(6)), (ballot("l", 3), record(2))
    assert credible(quorum, {"x": cut_short, "y": settled, "z": lie}) == (*cut_short, False)
    lie = ballot("l", 0), record(9)
    assert credible(quorum, {"x": cut_short, "y": settled, "z": lie}) == (*cut_short, False), (
        "what a majority exceeds was not chosen"
    )
    same = ballot("c", 3), record(6)
    assert credible(quorum, {"x": cut_short, "y": settled, "z": same}) == (*same, False)


def record(sequence: int) -> Value:
    return Value(sequence, bytes(16), Visibility.LIVE, b"")


def test_a_request_with_an_unknown_step_gets_newer_and_the_node_refreshes() -> None:
    told: list[int] = []
    moved, other = OBJECT.partition, next(name for name in NAMES if name.partition != OBJECT.partition)
    known = KnownSteps(lambda partition: 3 if partition == moved else 0, told.append)
    watched = Gate(lambda: 2, steps=known)
    for name, epoch, wanted in (
        (OBJECT, epoch_of(3, 2), Verdict.OK),
        (OBJECT, epoch_of(1, 1), Verdict.OK),
        (OBJECT, epoch_of(3, 3), Verdict.NEWER),
        (OBJECT, epoch_of(4, 1), Verdict.NEWER),
        (other, epoch_of(1, 1), Verdict.NEWER),
        (other, 2, Verdict.OK),
    ):
        assert watched.judge(messages.Prepare("d", name, ballot("gw", epoch=epoch)), GATEWAY) is wanted, (name, epoch)
    assert told == [moved, other.partition], "a layout that is not known says nothing about steps"


async def test_a_disk_is_fenced_for_steps_that_its_node_knows_and_never_as_a_whole() -> None:
    replica = LocalReplica("d", MemoryMetaStore())
    host = ReplicaHost({"d": replica}, lambda: 1, steps=KnownSteps(lambda _partition: 1))
    fence_epoch = host.methods()["meta.fence_epoch"].handler
    call = Call(GATEWAY, memoryview(b""), 0.0)
    with pytest.raises(InvalidRequest):
        await fence_epoch(messages.EpochFence("d", 1), call)
    for step, wanted in ((3, 0), (1, epoch_of(1, 1)), (0, epoch_of(1, 0))):
        assert await fence_epoch(messages.EpochFence("d", epoch_of(step, 1 if step else 0), 7), call) == (
            messages.EpochReply(wanted)
        )

"""What other nodes may write to registers: by role, by whose ballot it is, and how far ahead that lies. And the attacks
of one storage certificate that this ends.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Awaitable, Callable

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from storaged.cluster.ports import PeerIdentity
from storaged.cluster.rpc import authority
from storaged.errors import InvalidAccessKeyId, PeerRefused, ServiceUnavailable
from storaged.fragments.remote import StoreDirectory
from storaged.meta import messages
from storaged.meta.authority import Gate, may_use, may_write
from storaged.meta.client import RingClient
from storaged.meta.consensus.quorums import Quorum
from storaged.meta.consensus.register import (
    COUNTER_AHEAD_MAX_US,
    COUNTER_MAX,
    Ballots,
    Verdict,
    credible,
)
from storaged.meta.names import (
    SYSTEM_SCOPE,
    ZERO_BALLOT,
    Ballot,
    RegisterName,
    Table,
    Value,
    Visibility,
    object_name,
    system_name,
)
from storaged.meta.store_ports import Slot, StoreBatch
from storaged.meta.transport.replicas import ReplicaDirectory
from storaged.objects.records import BucketRecord
from storaged.objects.system.users import UserService
from storaged.wire import decode, encode
from tests.integration.memory_cluster import Cluster, LocalCaller, run
from tests.unit.test_replica import FixedClock

GATEWAY = PeerIdentity("gw", "FR", "par1", "a", ("gateway",))
STORAGE = PeerIdentity("n1", "FR", "par1", "a", ("storage",))
BOTH = PeerIdentity("n1", "FR", "par1", "a", ("gateway", "storage"))
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
    return Gate(lambda: 1, clock=FixedClock(NOW_MS))


def accept(
    name: RegisterName, node: str, *, identity: bool = False, counter: int = NOW_US, epoch: int = 1
) -> messages.Accept:
    return messages.Accept("d", name, ballot(node, counter, epoch), VALUE, identity=identity)


# --- the gate


@pytest.mark.parametrize("name", PRIVILEGED, ids=lambda name: name.key.decode())
def test_registers_of_the_system_table_are_written_by_gateways_alone(name: RegisterName) -> None:
    for peer in (GATEWAY, BOTH):
        assert gate().prepare(messages.Prepare("d", name, ballot(peer.name)), peer) is Verdict.OK
        assert gate().accept(accept(name, peer.name), peer) is Verdict.OK
    with pytest.raises(PeerRefused) as refused:
        gate().prepare(messages.Prepare("d", name, ballot("n1")), STORAGE)
    assert refused.value.remote_code == "VALUE_REFUSED"
    for identity in (False, True):
        with pytest.raises(PeerRefused) as refused:
            gate().accept(accept(name, "n1", identity=identity), STORAGE)
        assert refused.value.remote_code == "VALUE_REFUSED"


def test_a_storage_node_writes_registers_of_buckets() -> None:
    for name in (OBJECT, OBJECT._replace(table=Table.UPLOAD), OBJECT._replace(table=Table.PART)):
        assert gate().prepare(messages.Prepare("d", name, ballot("n1")), STORAGE) is Verdict.OK
        assert gate().accept(accept(name, "n1"), STORAGE) is Verdict.OK


@given(
    key=st.binary(min_size=1, max_size=40),
    table=st.integers(0, 255),
    shard=st.integers(0, 255),
    scope=st.binary(min_size=16, max_size=16),
)
def test_whatever_the_name_no_register_of_table_0_is_a_storage_nodes(
    key: bytes, table: int, shard: int, scope: bytes
) -> None:
    name = RegisterName(table, scope, shard, key)
    assert may_write(name, STORAGE) == (table != 0)
    assert may_write(name, GATEWAY)


@pytest.mark.parametrize("peer", [GATEWAY, STORAGE, BOTH], ids=lambda peer: "+".join(peer.roles))
def test_each_node_speaks_under_its_own_ballots_and_gateways_help_others_on(peer: PeerIdentity) -> None:
    own, others = ballot(peer.name), ballot("another")
    assert may_use(own, peer, helping=False)
    assert not may_use(others, peer, helping=False)
    assert may_use(others, peer, helping=True) == ("gateway" in peer.roles)
    with pytest.raises(PeerRefused) as refused:
        gate().prepare(messages.Prepare("d", OBJECT, others), peer)
    assert refused.value.remote_code == "BALLOT_REFUSED"


def test_a_node_whose_name_begins_like_anothers_is_another() -> None:
    with pytest.raises(PeerRefused):
        gate().accept(accept(OBJECT, "n"), STORAGE)


def test_what_no_honest_node_asks_is_told_with_the_peers_name() -> None:
    told: list[tuple[str, str]] = []
    watched = Gate(lambda: 1, on_refusal=lambda peer, error: told.append((peer, getattr(error, "remote_code", ""))))
    attempts: list[Callable[[], object]] = [
        lambda: watched.prepare(messages.Prepare("d", system_name("user/AK"), ballot("n1")), STORAGE),
        lambda: watched.accept(accept(OBJECT, "gw"), STORAGE),
        lambda: watched.accept(accept(OBJECT, "n1"), STORAGE, create=True),
        lambda: watched.accept(accept(OBJECT, "n1"), STORAGE),
    ]
    for attempt in attempts:
        with contextlib.suppress(PeerRefused):
            attempt()
    assert told == [("n1", "VALUE_REFUSED"), ("n1", "BALLOT_REFUSED"), ("n1", "ROLE_REFUSED")]


def test_creates_are_for_gateways_by_themselves_and_among_many() -> None:
    created = messages.Create("d", OBJECT, ballot("n1"), VALUE)
    for request, create in ((created, False), (accept(OBJECT, "n1"), True)):
        with pytest.raises(PeerRefused) as refused:
            gate().accept(request, STORAGE, create=create)
        assert refused.value.remote_code == "ROLE_REFUSED"
        assert (
            gate().accept(msgspec.structs.replace(request, ballot=ballot("gw")), GATEWAY, create=create) is Verdict.OK
        )


def test_a_ballot_of_a_layout_that_this_node_does_not_know_is_put_off() -> None:
    assert gate().prepare(messages.Prepare("d", OBJECT, ballot("gw", epoch=2)), GATEWAY) is Verdict.NEWER
    assert gate().accept(accept(OBJECT, "gw", epoch=2**62), GATEWAY) is Verdict.NEWER


def test_a_storage_nodes_counter_is_bounded_by_the_clock_alone() -> None:
    """Above what was promised before, by an hour at a time, one could walk to the end of all counters."""
    highest = NOW_US + COUNTER_AHEAD_MAX_US
    assert gate().prepare(messages.Prepare("d", OBJECT, ballot("n1", highest)), STORAGE) is Verdict.OK
    assert gate().prepare(messages.Prepare("d", OBJECT, ballot("n1", highest + 1)), STORAGE) is Verdict.AHEAD
    assert gate().accept(accept(OBJECT, "n1", counter=highest + 1), STORAGE) is Verdict.AHEAD
    assert gate().accept(accept(OBJECT, "gw", counter=highest + 1), GATEWAY) is Verdict.OK  # the acceptor judges those


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
                assert set(await attacker.force(system_name(path), forged, identity=identity)) == {"VALUE_REFUSED"}
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
        assert set(await attacker.force(system_name("bucket/demo"), forged)) == {"VALUE_REFUSED"}
        assert await value_of(cluster, "bucket/demo") == before
        assert set(await attacker.force(system_name("key/" + bucket.id.hex()), VALUE)) == {"VALUE_REFUSED"}

    run(scenario)


def test_not_even_what_a_replica_holds_already_is_accepted_anew() -> None:
    """A replica that lags would then have the newest ballot, and lead the next gateway to an old record."""

    async def scenario(cluster: Cluster) -> None:
        await cluster.bucket("demo")
        before = await value_of(cluster, "bucket/demo")
        assert set(await Attacker(cluster).force(system_name("bucket/demo"), before, identity=True)) == {
            "VALUE_REFUSED"
        }

    run(scenario)


def test_an_objects_record_is_changed_under_the_callers_own_ballots_alone() -> None:
    async def scenario(cluster: Cluster) -> None:
        bucket = await cluster.bucket("demo")
        await cluster.put(bucket, b"contract", b"version one")
        name = object_name(bucket.id, bucket.shard_numbers, b"contract")
        first = (await cluster.gateway.ring.read(name)).value
        assert first is not None
        assert set(await Attacker(cluster).force(name, first, "g")) == {"BALLOT_REFUSED"}

    run(scenario)


def test_putting_an_objects_older_record_back_is_still_possible_and_raises_an_alarm() -> None:
    """What README says of a storage certificate. A test that fails here is good news, and README is to be changed."""

    async def scenario(cluster: Cluster) -> None:
        bucket, attacker = await cluster.bucket("demo"), Attacker(cluster)
        name = object_name(bucket.id, bucket.shard_numbers, b"contract")
        await cluster.put(bucket, b"contract", b"version one")
        first = (await cluster.gateway.ring.read(name)).value
        assert first is not None
        await cluster.put(bucket, b"contract", b"version two")
        assert set(await attacker.force(name, first)) == {"OK"}
        assert await cluster.get(bucket, b"contract") == b"version one"
        falls = {
            disk: node.replicas[disk].statistics().sequence_falls
            for node in cluster.nodes.values()
            for disk in node.replicas
        }
        assert [falls[disk] for disk in attacker.others(name)] == [1, 1]

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
        at = Ballot(1, cluster.clock.wall_ms() * 1000, "na", bytes(8))
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
            each = messages.Accept("b0", name, at, VALUE)
            many = messages.Accepts(
                [each, msgspec.structs.replace(each, identity=True), each], [0, 0, 0], [False, False, True]
            )
            answer, _ = await attacker.caller.call("nb", "meta.accepts", many, messages.AcceptsReply)
            assert [answer.errors[index].remote_code for index in range(3)] == [
                "VALUE_REFUSED",
                "VALUE_REFUSED",
                "ROLE_REFUSED",
            ]
            assert set(await attacker.force(name, VALUE)) == {"VALUE_REFUSED"}
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

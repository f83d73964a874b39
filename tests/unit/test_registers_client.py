"""Registers over three replicas that can be away, slow, deaf or stale: what callers are promised."""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections import defaultdict
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest

from storaged.clock import SystemClock
from storaged.cluster.layout import DiskEntry, Layout, NodeEntry
from storaged.errors import (
    DataDamaged,
    DiskUnusable,
    FragmentMissing,
    NoSuchBucket,
    OutcomeUnknown,
    PeerUnreachable,
    PreconditionFailed,
    ServiceUnavailable,
    SlowDown,
)
from storaged.meta import messages
from storaged.meta.acceptor.high_water import META_HIGH_WATER
from storaged.meta.acceptor.replica import LocalReplica
from storaged.meta.client import RingClient
from storaged.meta.consensus.acceptor import HIGH_WATER_BLOCK_US
from storaged.meta.consensus.register import COUNTER_AHEAD_MAX_US, COUNTER_MAX, Verdict
from storaged.meta.messages import ScanReply, ScanRequest
from storaged.meta.names import Ballot, Change, RegisterName, Table, Value, Visibility
from storaged.meta.ports import Replica, SmallCopies
from storaged.meta.proposer.fences import LIFT_PATIENCE_S
from storaged.meta.proposer.queue import Turns
from storaged.meta.storage.lmdb_store import LmdbMetaStore
from storaged.meta.storage.small_copies import PlainCopies
from storaged.meta.store_ports import Copy, StoreBatch
from storaged.wire import Buffer, encode
from tests.doubles.layouts import Places
from tests.doubles.meta_store import MemoryMetaStore
from tests.patience import GUARD_S
from tests.worlds.authority import until
from tests.worlds.ring_client import ring_client

pytestmark = pytest.mark.virtual_time

DISKS = ("d0", "d1", "d2")
SCOPE = b"b" * 16
NAME = RegisterName(Table.OBJECT, SCOPE, 0, b"key")
OTHER = RegisterName(Table.OBJECT, SCOPE, 0, b"other")


def later_us() -> int:
    """A counter some minutes ahead of every clock here: what a proposer whose clock is fast uses."""
    return SystemClock().wall_ms() * 1000 + 600_000_000


class Unreliable:
    """A replica in front of which calls are lost: ``away`` loses the call, ``deaf`` methods are carried out and their
    answers lost, ``stuck`` ones never end.
    """

    def __init__(self, inner: LocalReplica) -> None:
        self.inner = inner
        self.away = False
        self.deaf: set[str] = set()
        self.stuck: set[str] = set()
        self.calls: list[str] = []
        self.prepares: list[messages.Prepare] = []
        self.accepts: list[messages.Accept] = []
        self.gate: asyncio.Event | None = None
        self.carried_out: defaultdict[str, asyncio.Event] = defaultdict(asyncio.Event)

    async def _pass(self, method: str, call: Callable[[], Awaitable[object]]) -> object:
        self.calls.append(method)
        if self.away:
            raise PeerUnreachable("away")
        if self.gate is not None:
            await self.gate.wait()
        if method in self.stuck:  # as a replica of this process whose disk hangs: no timeout of a call ends that
            await asyncio.Event().wait()
        answer = await call()
        self.carried_out[method].set()
        if method in self.deaf:
            raise PeerUnreachable("the answer was lost")
        return answer

    async def prepare(self, request: messages.Prepare, *, timeout_s: float = 10.0) -> messages.PrepareReply:
        self.prepares.append(request)
        return await self._pass("prepare", lambda: self.inner.prepare(request))  # type: ignore[return-value]

    async def accept(
        self, request: messages.Accept, body: Sequence[Buffer] = (), *, timeout_s: float = 10.0
    ) -> messages.AcceptReply:
        self.accepts.append(request)
        return await self._pass("accept", lambda: self.inner.accept(request, body))  # type: ignore[return-value]

    async def read(self, request: messages.Read, *, timeout_s: float = 10.0) -> tuple[messages.ReadReply, memoryview]:
        return await self._pass("read", lambda: self.inner.read(request))  # type: ignore[return-value]

    async def page_put(self, request: messages.PagePut, *, timeout_s: float = 10.0) -> messages.PageReply:
        return await self._pass("page_put", lambda: self.inner.page_put(request))  # type: ignore[return-value]

    async def page_get(self, request: messages.PageGet, *, timeout_s: float = 10.0) -> messages.PageReply:
        return await self._pass("page_get", lambda: self.inner.page_get(request))  # type: ignore[return-value]

    async def page_check(self, request: messages.PageCheck, *, timeout_s: float = 10.0) -> messages.PagesMissing:
        return await self._pass("page_check", lambda: self.inner.page_check(request))  # type: ignore[return-value]

    async def fence(self, request: messages.FenceSet, *, timeout_s: float = 10.0) -> messages.FenceReply:
        return await self._pass("fence", lambda: self.inner.fence(request))  # type: ignore[return-value]

    async def unfence(self, request: messages.FenceLift, *, timeout_s: float = 10.0) -> messages.FenceReply:
        return await self._pass("unfence", lambda: self.inner.unfence(request))  # type: ignore[return-value]

    async def fence_epoch(self, request: messages.EpochFence, *, timeout_s: float = 10.0) -> messages.EpochReply:
        return await self._pass("fence_epoch", lambda: self.inner.fence_epoch(request))  # type: ignore[return-value]

    async def scan(self, request: ScanRequest, *, timeout_s: float = 10.0) -> ScanReply:
        return await self._pass("scan", lambda: self.inner.scan(request))  # type: ignore[return-value]


class Layouts(Places):
    def __init__(self, epoch: int = 1) -> None:
        self.current = self.make(epoch)

    @staticmethod
    def make(epoch: int) -> Layout:
        nodes = tuple(NodeEntry("n" + disk, f"FR/par1/{disk}", "", ("storage",)) for disk in DISKS)
        return Layout("test", epoch, nodes, tuple(DiskEntry(disk, "n" + disk, 1) for disk in DISKS), DISKS)

    def at(self, epoch: int) -> Layout:
        return self.current


class Ring:
    """Three replicas in ring order (``first``, ``second``, ``third`` of NAME), and clients that share them."""

    def __init__(self) -> None:
        self.layouts = Layouts()
        self.copies: dict[str, dict[bytes, bytes]] = {disk: {} for disk in DISKS}
        self.full: set[str] = set()
        self.stores = {disk: MemoryMetaStore() for disk in DISKS}
        self.replicas = {disk: Unreliable(self._replica(disk)) for disk in DISKS}
        self.order = self.layouts.current.replicas_of(NAME.partition)
        self.first, self.second, self.third = (self.replicas[disk] for disk in self.order)
        self.clients: list[RingClient] = []

    def _replica(self, disk: str) -> LocalReplica:
        copies = self.copies[disk]

        async def store(header: bytes, body: Sequence[Buffer], _check: bytes) -> None:
            if disk in self.full:
                raise DiskUnusable("full")
            copies[header] = b"".join(bytes(piece) for piece in body)

        async def load(data_id: bytes) -> Copy | None:
            return Copy(data_id, memoryview(copies[data_id])) if data_id in copies else None

        return LocalReplica(
            disk,
            self.stores[disk],
            copies=PlainCopies(self.stores[disk], store, load, holds=lambda data_id, _: data_id in copies),
        )

    def replica(self, disk_id: str) -> Replica:
        return self.replicas[disk_id]

    def client(self, node: str = "gw", deadline_s: float = 5.0, hedge_s: float = 0.01, **options: Any) -> RingClient:
        made = ring_client(
            self.layouts, self, node=node, deadline_s=deadline_s, hedge_s=hedge_s, jitter=lambda: 0.9, **options
        )
        self.clients.append(made)
        return made

    def held(self, replica: Unreliable) -> Value | None:
        slot = self.stores[replica.inner.disk].get(NAME)
        return None if slot is None else slot.value

    async def accept_at(self, replica: Unreliable, body: bytes, counter: int, sequence: int = 1) -> None:
        """What a proposer leaves that died half-way."""
        value = Value(sequence, body.ljust(16), Visibility.LIVE, body)
        await replica.inner.accept(
            messages.Accept(replica.inner.disk, NAME, Ballot(1, counter, "dead", b"12345678"), value)
        )


@pytest.fixture
async def ring() -> object:
    made = Ring()
    yield made
    for client in made.clients:
        await client.close()


def put(body: bytes) -> Callable[[Value | None], Change]:
    return lambda _: Change(body)


def fail_with(error: Exception) -> Callable[[Value | None], Change]:
    def update(_: Value | None) -> Change:
        raise error

    return update


class Refused(Exception):
    """What an update raises."""


async def test_a_change_is_read_back_with_its_sequence(ring: Ring) -> None:
    client = ring.client()
    assert (await client.read(NAME)).value is None
    first = await client.change(NAME, put(b"one"))
    second = await client.change(NAME, put(b"two"))
    assert first.before is None
    assert second.before == first.after
    assert second.after is not None
    assert second.after.sequence == 2
    assert (await client.read(NAME)).value == second.after


async def test_a_read_costs_one_round_trip_to_a_bare_majority_when_it_agrees(ring: Ring) -> None:
    client = ring.client()
    await client.change(NAME, put(b"one"))
    await asyncio.sleep(0.01)
    for replica in ring.replicas.values():
        replica.calls.clear()
    await client.read(NAME)
    assert sorted(len(replica.calls) for replica in ring.replicas.values()) == [0, 1, 1]
    assert client.statistics().identity_rounds == 0


async def test_one_replica_away_is_not_noticed_and_two_are_refused_without_a_change(ring: Ring) -> None:
    client = ring.client()
    ring.first.away = True
    await client.change(NAME, put(b"one"))
    assert (await client.read(NAME)).value is not None
    ring.second.away = True
    with pytest.raises(ServiceUnavailable) as refused:
        await client.change(NAME, put(b"two"))
    assert not isinstance(refused.value, OutcomeUnknown)
    with pytest.raises(ServiceUnavailable):
        await client.read(NAME)
    ring.second.away = False
    found = (await client.read(NAME)).value
    assert found is not None
    assert found.body == b"one"


async def test_a_read_is_refused_while_it_is_not_known_where_the_replicas_are(ring: Ring) -> None:
    """The node has not read yet which partitions have moved."""
    ring.layouts.current = msgspec.structs.replace(ring.layouts.current, base=1)
    with pytest.raises(ServiceUnavailable, match="has not read yet which partitions have moved"):
        await ring.client().read(NAME, want_payload=True)


async def test_a_slow_replica_is_replaced_by_the_next_one_for_a_read(ring: Ring) -> None:
    client = ring.client()
    await client.change(NAME, put(b"one"))
    ring.first.gate = asyncio.Event()
    found = (await client.read(NAME)).value
    assert found is not None
    assert found.body == b"one"


async def test_a_replica_that_lags_is_outvoted_without_a_write(ring: Ring) -> None:
    client = ring.client()
    ring.first.away = True
    await client.change(NAME, put(b"one"))
    ring.first.away = False
    found = (await ring.client().read(NAME)).value
    assert found is not None
    assert found.body == b"one"
    assert ring.held(ring.first) is None


async def test_a_value_on_a_minority_is_accepted_by_a_majority_before_it_is_told(ring: Ring) -> None:
    await ring.accept_at(ring.first, b"half", 10)
    ring.third.away = True
    client = ring.client()
    found = (await client.read(NAME)).value
    assert found is not None
    assert found.body == b"half"
    assert ring.held(ring.second) == found
    assert client.statistics().identity_rounds == 1


async def test_a_value_on_a_minority_is_settled_above_another_promise(ring: Ring) -> None:
    await ring.accept_at(ring.first, b"half", 10)
    for replica in (ring.second, ring.third):
        await replica.inner.prepare(messages.Prepare(replica.inner.disk, NAME, Ballot(1, 50, "other", b"12345678")))
    ring.third.away = True
    client = ring.client()
    found = (await client.read(NAME)).value
    assert found is not None
    assert found.body == b"half"
    assert client.statistics().identity_rounds == 1


async def test_a_change_writes_one_more_than_the_highest_sequence_that_promises_report(ring: Ring) -> None:
    """A value that lost may have a higher sequence than the one that the change is made on."""
    await ring.accept_at(ring.first, b"lost", 10, sequence=7)
    await ring.accept_at(ring.second, b"newer", 20, sequence=3)
    ring.third.away = True
    outcome = await ring.client().change(NAME, put(b"next"))
    assert outcome.before is not None
    assert outcome.before.body == b"newer"
    assert outcome.after is not None
    assert outcome.after.sequence == 8


async def test_a_failed_condition_settles_what_it_judged(ring: Ring) -> None:
    await ring.accept_at(ring.first, b"half", 10)
    ring.third.away = True
    with pytest.raises(Refused):
        await ring.client().change(NAME, fail_with(Refused()))
    settled = ring.held(ring.second)
    assert settled is not None
    assert settled.body == b"half"


async def test_an_update_that_declines_changes_nothing(ring: Ring) -> None:
    client = ring.client()
    written = (await client.change(NAME, put(b"one"))).after
    outcome = await client.change(NAME, lambda _: None)
    assert outcome.before == outcome.after == written


async def test_the_barrier_runs_beside_the_prepare_and_its_failure_accepts_nothing(ring: Ring) -> None:
    client = ring.client()
    prepared_first = asyncio.Event()

    async def barrier() -> None:
        await ring.first.carried_out["prepare"].wait()
        prepared_first.set()
        raise Refused

    with pytest.raises(Refused):
        await client.change(NAME, put(b"one"), ready=barrier())
    assert prepared_first.is_set()
    assert all(ring.held(replica) is None for replica in ring.replicas.values())
    assert (await client.read(NAME)).value is None


async def test_a_change_that_was_preempted_behind_its_barrier_prepares_and_judges_again(ring: Ring) -> None:
    client, collector = ring.client("gw"), ring.client("collector")
    steps: list[str] = []

    async def barrier() -> None:
        await ring.first.carried_out["prepare"].wait()
        await collector.settle(NAME)
        steps.append("collected")

    def prepares() -> int:
        return sum(request.ballot.node == "gw" for request in ring.first.prepares)

    def update(value: Value | None) -> Change:
        steps.append(f"judged after {prepares()} prepares")
        return Change(b"one")

    outcome = await client.change(NAME, update, ready=barrier())
    assert outcome.after is not None
    assert sorted(steps) == ["collected", "judged after 1 prepares", "judged after 2 prepares"]
    assert prepares() == 2


async def test_a_change_that_refuses_to_run_again_is_not_applied(ring: Ring) -> None:
    client, collector = ring.client("gw"), ring.client("collector")
    ran = False

    def once(value: Value | None) -> Change:
        nonlocal ran
        if ran:
            raise FragmentMissing
        ran = True
        return Change(b"dangling")

    async def barrier() -> None:
        await ring.first.carried_out["prepare"].wait()
        assert await collector.settle(NAME) is None

    with pytest.raises(FragmentMissing):
        await client.change(NAME, once, ready=barrier())
    assert (await client.read(NAME)).value is None


async def test_a_condition_that_fails_ends_the_barrier(ring: Ring) -> None:
    ended = asyncio.Event()

    async def barrier() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            ended.set()

    async def slow_update_then_refuse() -> None:
        await ring.client().change(NAME, fail_with(Refused()), ready=barrier())

    with pytest.raises(Refused):
        await slow_update_then_refuse()
    assert ended.is_set()


async def test_a_change_that_is_cancelled_before_it_proposed_anything_proposes_nothing(ring: Ring) -> None:
    client = ring.client()
    gate = asyncio.Event()
    for replica in ring.replicas.values():
        replica.gate = gate
    change = asyncio.create_task(client.change(NAME, put(b"nobody waits for this")))
    await asyncio.sleep(0.01)
    change.cancel()
    await asyncio.wait((change,))
    gate.set()
    await asyncio.sleep(0.01)
    assert [replica.calls for replica in ring.replicas.values()] == [["prepare"]] * 3
    assert (await client.read(NAME)).value is None


@pytest.mark.parametrize("stuck", ["prepare", "accept"])
async def test_a_change_whose_replicas_never_answer_ends_at_its_deadline_and_gives_its_turn_back(
    ring: Ring, stuck: str
) -> None:
    client = ring.client(deadline_s=0.2)
    for replica in (ring.first, ring.second):
        replica.stuck.add(stuck)
    async with asyncio.timeout(GUARD_S):
        with pytest.raises(ServiceUnavailable if stuck == "prepare" else OutcomeUnknown):
            await client.change(NAME, put(b"one"))
        for replica in (ring.first, ring.second):
            replica.stuck.clear()
        assert (await client.change(NAME, put(b"two"))).after is not None


async def test_a_change_that_waited_for_its_turn_has_no_more_time_than_any_other(ring: Ring) -> None:
    client, loop = ring.client(deadline_s=1.0), asyncio.get_running_loop()

    async def barrier() -> None:
        await asyncio.sleep(0.8)

    before = asyncio.create_task(client.change(NAME, put(b"one"), ready=barrier()))
    await asyncio.sleep(0)
    began = loop.time()
    waiting = asyncio.create_task(client.change(NAME, put(b"two")))
    await ring.first.carried_out["prepare"].wait()
    for replica in (ring.first, ring.second):
        replica.stuck.add("prepare")
    with pytest.raises(ServiceUnavailable):
        await waiting
    assert loop.time() - began < 1.4
    assert (await before).after is not None


async def test_a_lost_answer_is_found_again_and_the_change_applied_once(ring: Ring) -> None:
    client = ring.client()
    for replica in (ring.first, ring.second):
        replica.deaf.add("accept")
    ring.third.away = True

    async def come_back() -> None:
        await asyncio.gather(*(replica.carried_out["accept"].wait() for replica in (ring.first, ring.second)))
        ring.first.deaf.clear()
        ring.second.deaf.clear()

    _, outcome = await asyncio.gather(come_back(), client.change(NAME, put(b"once")))
    assert outcome.before is None
    assert outcome.after is not None
    assert outcome.after.sequence == 1


async def test_when_nothing_can_be_learned_of_a_sent_accept_the_outcome_is_unknown(ring: Ring) -> None:
    client = ring.client(deadline_s=0.2)
    for replica in ring.replicas.values():
        replica.deaf.add("accept")

    async def go_away() -> None:
        await asyncio.gather(*(replica.carried_out["accept"].wait() for replica in (ring.first, ring.second)))
        for replica in ring.replicas.values():
            replica.away = True

    with pytest.raises(OutcomeUnknown):
        await asyncio.gather(go_away(), client.change(NAME, put(b"perhaps")))


async def test_a_lineage_that_moved_on_after_a_lost_answer_is_an_unknown_outcome(ring: Ring) -> None:
    client, other = ring.client("gw1"), ring.client("gw2")
    for replica in ring.replicas.values():
        replica.deaf.add("accept")

    async def overtake() -> None:
        await asyncio.gather(*(replica.carried_out["accept"].wait() for replica in ring.replicas.values()))
        for replica in ring.replicas.values():
            replica.deaf.clear()
            replica.gate = asyncio.Event()
        inner = ring_client(
            ring.layouts, _Directory({disk: each.inner for disk, each in ring.replicas.items()}), node="gw3"
        )
        await inner.change(NAME, put(b"later"))
        await inner.close()
        for replica in ring.replicas.values():
            replica.gate.set()  # type: ignore[union-attr]

    with pytest.raises(OutcomeUnknown):
        await asyncio.gather(overtake(), client.change(NAME, put(b"mine")))
    found = (await other.read(NAME)).value
    assert found is not None
    assert (found.body, found.sequence) == (b"later", 2)


class _Directory:
    def __init__(self, replicas: dict[str, LocalReplica]) -> None:
        self._replicas = replicas

    def replica(self, disk_id: str) -> Replica:
        return self._replicas[disk_id]


def increment(value: Value | None) -> Change:
    return Change(str(int(value.body if value is not None else b"0") + 1).encode())


async def test_changes_of_one_process_wait_for_their_turn_and_never_preempt_each_other(ring: Ring) -> None:
    client = ring.client()
    await asyncio.gather(*(client.change(NAME, increment) for _ in range(40)))
    found = (await client.read(NAME)).value
    assert found is not None
    assert found.body == b"40"
    assert client.statistics().preempted == 0


@pytest.mark.parametrize("stage", ["prepare", "accept"])
async def test_a_first_attempt_that_others_were_in_the_way_of_is_counted_as_preempted(ring: Ring, stage: str) -> None:
    client, other = ring.client(), Ballot(1, later_us(), "other", b"12345678")

    def between(_: Value | None) -> Change:
        """The accepts of the first attempt meet a promise that came after its own."""
        if client.statistics().preempted == 0 and stage == "accept":
            for replica in ring.replicas.values():
                assert replica.inner.try_prepare(messages.Prepare(replica.inner.disk, NAME, other)) is not None
        return Change(b"one")

    for (
        replica
    ) in ring.replicas.values():  # of the other register: so that a promise so high does not wait for the disk
        await replica.inner.prepare(messages.Prepare(replica.inner.disk, NAME if stage == "prepare" else OTHER, other))
    await client.change(NAME, between)
    assert client.statistics().preempted > 0
    assert len(ring.first.prepares) == 2


async def test_gateways_that_compete_apply_every_acknowledged_change_exactly_once(ring: Ring) -> None:
    clients = [ring.client(f"gw{index}") for index in range(3)]

    async def work(client: RingClient) -> tuple[int, int]:
        done = unknown = 0
        for _ in range(10):
            try:
                await client.change(NAME, increment)
                done += 1
            except OutcomeUnknown:
                unknown += 1
        return done, unknown

    results = await asyncio.gather(*map(work, clients))
    found = (await clients[0].read(NAME)).value
    assert found is not None
    done, unknown = (sum(column) for column in zip(*results, strict=True))
    assert done <= int(found.body) <= done + unknown
    assert done > 0


async def test_too_many_waiters_for_one_register_are_told_to_slow_down() -> None:
    turns = Turns(waiting_max=2)
    async with turns.turn(NAME, 1.0):
        waiting = asyncio.create_task(_take(turns))
        await asyncio.sleep(0)
        with pytest.raises(SlowDown):
            await _take(turns)
    await waiting


async def test_a_turn_goes_past_a_waiter_that_was_cancelled_in_the_moment_of_its_release() -> None:
    turns = Turns()
    await turns.take(NAME, 1.0)
    gone = [asyncio.create_task(_take(turns)) for _ in range(2)]
    stays = asyncio.create_task(_take(turns))
    await asyncio.sleep(0)
    for waiter in gone:
        waiter.cancel()
    turns.release(NAME)
    await stays
    assert all(
        isinstance(result, asyncio.CancelledError) for result in await asyncio.gather(*gone, return_exceptions=True)
    )
    async with asyncio.timeout(1):
        await _take(turns)


async def _take(turns: Turns) -> None:
    async with turns.turn(NAME, 1.0):
        pass


async def test_settling_commits_a_new_ballot_that_no_earlier_promise_survives(ring: Ring) -> None:
    client = ring.client()
    written = (await client.change(NAME, put(b"one"))).after
    early = Ballot(1, client._ring.shared.ballots.next(1, 0, 0).counter + 1, "early", b"12345678")
    for replica in ring.replicas.values():
        await replica.inner.prepare(messages.Prepare(replica.inner.disk, NAME, early))
    assert await client.settle(NAME) == written
    for replica in ring.replicas.values():
        late = await replica.inner.accept(
            messages.Accept(replica.inner.disk, NAME, early, Value(2, b"l" * 16, 2, b"late"))
        )
        assert late.verdict == Verdict.PREEMPTED


async def test_settling_goes_above_a_ballot_that_a_single_replica_has_promised(ring: Ring) -> None:
    """A replica that has restarted refuses everything below its high-water ballot, and is the one that lags."""
    client = ring.client()
    ring.third.away = True
    written = (await client.change(NAME, put(b"one"))).after
    ring.third.away = False
    promised = Ballot(1, later_us(), "early", b"12345678")
    await ring.third.inner.prepare(messages.Prepare(ring.third.inner.disk, NAME, promised))
    assert await client.settle(NAME) == written
    await until(lambda: ring.held(ring.third) == written)


async def test_settling_a_register_that_was_never_written_leaves_it_so_for_its_users(ring: Ring) -> None:
    client = ring.client()
    assert await client.settle(NAME) is None
    assert (await client.read(NAME)).value is None
    outcome = await client.change(NAME, put(b"one"))
    assert outcome.before is None
    assert outcome.after is not None
    assert outcome.after.sequence == 1


async def test_settling_replaces_a_damaged_row(ring: Ring) -> None:
    client = ring.client()
    written = (await client.change(NAME, put(b"one"))).after
    await asyncio.sleep(0.01)
    ring.stores[ring.third.inner.disk].damage(NAME)
    assert [state.state for state in await client.agreement(NAME)] == ["current", "current", "damaged"]
    assert (await client.read(NAME)).value == written
    assert await client.settle(NAME) == written
    await asyncio.sleep(0.01)
    assert [state.state for state in await client.agreement(NAME)] == ["current"] * 3


async def test_two_values_under_one_ballot_are_not_believed(ring: Ring) -> None:
    await ring.accept_at(ring.first, b"one", 10)
    await ring.accept_at(ring.second, b"two", 10)
    client = ring.client()
    with pytest.raises(DataDamaged):
        await client.read(NAME)
    assert client.statistics().digest_conflicts == 1


# --- small copies


def small_copies(content: bytes, needed: int = 2) -> SmallCopies:
    return SmallCopies(b"D" * 16, [(b"D" * 16, [content])] * 3, lambda disks: len(disks) >= needed)


def put_small(_: Value | None) -> Change:
    return Change(b"record", Visibility.LIVE, b"D" * 16)


async def test_a_small_object_is_written_with_the_accept_and_read_with_the_record(ring: Ring) -> None:
    client = ring.client()
    await client.change(NAME, put_small, small=small_copies(b"payload"))
    reading = await client.read(NAME, want_payload=True)
    assert reading.payload is not None
    assert bytes(reading.payload) == b"payload"
    await asyncio.sleep(0.01)
    replicas = (ring.first, ring.second, ring.third)
    assert [(replica.calls.count("prepare"), replica.calls.count("accept")) for replica in replicas] == [
        (1, 1),
        (1, 1),
        (0, 1),
    ]
    assert all(ring.copies.values())


@pytest.mark.parametrize("how", ["stuck", "away"])
async def test_the_third_replica_is_asked_for_a_promise_when_one_of_two_is_slow_or_gone(ring: Ring, how: str) -> None:
    client = ring.client()
    ring.first.away = how == "away"
    if how == "stuck":
        ring.first.stuck.add("prepare")
    async with asyncio.timeout(2):
        await client.change(NAME, put(b"one"))
        assert (await client.read(NAME)).value == (await client.change(NAME, lambda _: None)).after
    assert ring.third.calls.count("prepare") >= 1
    await client.change(NAME, put(b"two"))
    assert ring.first.calls.count("prepare") == 1  # it is asked last for a while


async def test_a_replica_with_the_record_and_without_the_copy_is_passed_over(ring: Ring) -> None:
    client = ring.client()
    await client.change(NAME, put_small, small=small_copies(b"payload"))
    await asyncio.sleep(0.01)
    ring.copies[ring.first.inner.disk].clear()
    ring.copies[ring.second.inner.disk].clear()
    reading = await client.read(NAME, want_payload=True)
    assert reading.payload is not None
    assert bytes(reading.payload) == b"payload"
    assert [state.has_payload for state in await client.agreement(NAME)] == [False, False, True]
    ring.copies[ring.third.inner.disk].clear()
    assert (await client.read(NAME, want_payload=True)).payload is None


async def test_without_enough_synced_copies_a_change_is_not_confirmed(ring: Ring) -> None:
    client = ring.client()
    ring.third.away = True
    with pytest.raises(OutcomeUnknown):
        await client.change(NAME, put_small, small=small_copies(b"payload", needed=3))


async def test_a_replica_that_cannot_store_its_copy_accepts_nothing(ring: Ring) -> None:
    missed: list[RegisterName] = []
    client = ring_client(ring.layouts, ring, node="gw", hedge_s=0.01, on_missed=missed.append)
    ring.full.add(ring.third.inner.disk)
    await client.change(NAME, put_small, small=small_copies(b"payload"))
    await asyncio.sleep(0.01)
    assert ring.held(ring.third) is None
    assert [bool(ring.copies[disk]) for disk in ring.order] == [True, True, False]
    assert missed == [NAME]
    await client.close()


async def test_a_failed_condition_stores_no_copy(ring: Ring) -> None:
    def refuse(_: Value | None) -> Change:
        raise FragmentMissing("the condition failed")

    with pytest.raises(FragmentMissing):
        await ring.client().change(NAME, refuse, small=small_copies(b"payload"))
    assert not any(ring.copies.values())


async def test_a_record_that_reached_one_replica_is_settled_together_with_its_copy(ring: Ring) -> None:
    await alone_on_the_first(ring)
    ring.second.away = True
    reading = await ring.client("gw2").read(NAME, want_payload=True)
    assert reading.value is not None
    assert [bool(ring.copies[disk]) for disk in ring.order] == [True, False, True]


async def test_a_change_that_keeps_the_copy_of_an_unconfirmed_record_carries_it_along(ring: Ring) -> None:
    await alone_on_the_first(ring)
    ring.second.away = True  # else two that know nothing outvote it
    await ring.client("gw2").change(NAME, lambda value: Change(b"tagged", Visibility.LIVE, b"D" * 16))
    assert ring.copies[ring.order[0]]
    assert ring.copies[ring.order[2]]


@pytest.mark.parametrize("how", ["settle", "read"])
async def test_a_settling_round_writes_no_record_where_a_disk_does_not_take_its_copy(ring: Ring, how: str) -> None:
    await alone_on_the_first(ring)
    ring.full.update(ring.order[1:])
    ring.second.away = True  # else two that know nothing outvote it
    missed: list[RegisterName] = []
    client = ring.client("gw2", deadline_s=0.2, on_missed=missed.append)
    with pytest.raises(ServiceUnavailable):
        await (client.settle(NAME) if how == "settle" else client.read(NAME))
    assert [bool(ring.copies[disk]) for disk in ring.order] == [True, False, False]
    assert ring.held(ring.second) is ring.held(ring.third) is None
    ring.full.clear()
    settled = await client.settle(NAME) if how == "settle" else (await client.read(NAME)).value
    assert settled is not None
    assert settled.payload == b"D" * 16
    assert [bool(ring.copies[disk]) for disk in ring.order] == [True, False, True]
    async with asyncio.timeout(GUARD_S):
        while len(missed) < 2:  # noqa: ASYNC110  (the last answer may come after the round)
            await asyncio.sleep(0.001)
    assert set(missed) == {NAME}


async def test_a_change_that_is_refused_leaves_no_garbage_and_its_copies_with_it(ring: Ring) -> None:
    client, refusals = ring.client(), list[weakref.ref[Exception]]()

    def noted(refusal: Exception) -> Exception:
        refusals.append(weakref.ref(refusal))
        return refusal

    def refuse(_value: Value | None) -> Change:
        raise noted(PreconditionFailed())  # no variable of this frame has it

    copies = SmallCopies(b"D" * 16, [(b"D" * 16, [b"payload"])] * 3, lambda _disks: True)
    gc.disable()
    try:
        refused = False
        try:
            await client.change(NAME, refuse, small=copies)
        except PreconditionFailed:
            refused = True
        assert refused
        assert [refusal() for refusal in refusals] == [None]
    finally:
        gc.enable()


async def test_a_read_that_fails_leaves_no_garbage_and_the_values_with_it(ring: Ring) -> None:
    client, failures = ring.client(), list[weakref.ref[Exception]]()
    await client.change(NAME, put(b"one"))
    ring.first.away = ring.second.away = True
    gc.disable()
    try:
        try:
            await client.read(NAME)
        except ServiceUnavailable as failure:
            failures.append(weakref.ref(failure))
        assert [failure() for failure in failures] == [None]
    finally:
        gc.enable()


async def test_a_mistake_in_what_judges_a_change_ends_it_at_once_and_gives_its_turn_back(ring: Ring) -> None:
    def mistaken(_disks: frozenset[str]) -> bool:
        raise RuntimeError("a mistake")

    client = ring.client()
    copies = SmallCopies(b"D" * 16, [(b"D" * 16, [b"payload"])] * 3, mistaken)
    async with asyncio.timeout(2):  # less than the change's own deadline
        with pytest.raises(RuntimeError, match="a mistake"):
            await client.change(NAME, lambda _: Change(b"one", payload=b"D" * 16), small=copies)
        await client.change(NAME, put(b"two"))


async def test_a_mistake_in_asking_the_others_ends_a_change_at_once(
    ring: Ring, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, replica = ring.client(), ring.replica

    def mistaken(disk_id: str) -> Replica:
        if disk_id == ring.third.inner.disk:
            raise RuntimeError("a mistake")
        return replica(disk_id)

    monkeypatch.setattr(ring, "replica", mistaken)
    ring.first.stuck.add("prepare")
    async with asyncio.timeout(2):  # less than the change's own deadline
        with pytest.raises(RuntimeError, match="a mistake"):
            await client.change(NAME, put(b"one"))


async def alone_on_the_first(ring: Ring) -> None:
    """A writer died when its accept had reached one replica."""
    at = Ballot(1, 10, "dead", b"12345678")
    value = Value(1, b"o" * 16, Visibility.LIVE, b"record", b"D" * 16)
    accept = messages.Accept(ring.first.inner.disk, NAME, at, value, header=b"D" * 16)
    assert (await ring.first.inner.accept(accept, [b"payload"])).copy_synced


async def test_a_preempted_change_sends_its_copies_again(ring: Ring) -> None:
    client = ring.client()
    ahead = Ballot(1, later_us(), "other", b"12345678")

    def update(value: Value | None) -> Change:
        if not ring.first.accepts:
            for replica in ring.replicas.values():
                assert replica.inner.try_prepare(messages.Prepare(replica.inner.disk, NAME, ahead)) is not None
        return put_small(value)

    for replica in ring.replicas.values():  # so that the promise above costs no high-water ballot
        await replica.inner.prepare(messages.Prepare(replica.inner.disk, OTHER, ahead))
    await client.change(NAME, update, small=small_copies(b"payload"))
    assert [bool(request.header) for request in ring.first.accepts] == [True, True]


# --- fences, layouts, pages


async def test_a_fenced_bucket_can_be_read_and_settled_with_its_nonce_but_not_changed(ring: Ring) -> None:
    client = ring.client(deadline_s=1.0)
    written = (await client.change(NAME, put(b"one"))).after
    await client.fence(SCOPE, range(16), b"nonce")
    with pytest.raises(NoSuchBucket):
        await client.change(NAME, put(b"two"))
    with pytest.raises(NoSuchBucket):
        await client.settle(NAME)
    with pytest.raises(ServiceUnavailable):
        await client.change(NAME, put(b"two"), settling_nonce=b"nonce")
    assert await client.settle(NAME, settling_nonce=b"nonce") == written
    assert (await client.read(NAME)).value == written
    await client.unfence(SCOPE, range(16), b"nonce")
    assert (await client.change(NAME, put(b"two"))).before == written


async def test_a_fence_waits_for_every_replica_that_answers(ring: Ring) -> None:
    """The scan that follows counts only those that have it."""
    slow, away, *_ = ring.replicas.values()
    slow.gate, away.away = asyncio.Event(), True
    fencing = asyncio.create_task(ring.client().fence(SCOPE, range(16), b"nonce"))
    await asyncio.sleep(0.05)
    assert not fencing.done()
    slow.gate.set()
    await asyncio.wait_for(fencing, GUARD_S)
    assert [replica.inner._fences.of(SCOPE) is None for replica in ring.replicas.values()] == [False, True, False]


async def test_a_final_fence_stays_and_says_so(ring: Ring) -> None:
    client = ring.client()
    await client.fence(SCOPE, range(16), b"nonce", final=True)
    with pytest.raises(ServiceUnavailable):
        await client.unfence(SCOPE, range(16), b"nonce")
    with pytest.raises(NoSuchBucket) as refused:
        await client.settle(NAME)
    assert refused.value.details == {"final": "true"}


async def test_lifting_a_fence_tells_when_a_replica_that_is_away_still_has_it(ring: Ring) -> None:
    client = ring.client()
    await client.fence(SCOPE, range(16), b"nonce")
    await asyncio.sleep(0.01)
    ring.replicas["d2"].away = True
    assert not await client.unfence(SCOPE, range(16), b"nonce")
    ring.replicas["d2"].away = False
    assert await client.unfence(SCOPE, range(16), b"nonce")
    assert all(replica.inner._fences.of(SCOPE) is None for replica in ring.replicas.values())


async def test_lifting_a_fence_waits_shortly_for_a_replica_that_hangs(ring: Ring) -> None:
    """The bucket is in use, and each load of its record lifts the fence again until no replica has it."""
    client, loop = ring.client(), asyncio.get_running_loop()
    await client.fence(SCOPE, range(16), b"nonce")
    slow, hung = ring.replicas["d1"], ring.replicas["d2"]
    slow.gate = asyncio.Event()
    hung.stuck = {"unfence"}
    began = loop.time()
    lifting = asyncio.create_task(client.unfence(SCOPE, range(16), b"nonce"))
    await asyncio.sleep(2 * LIFT_PATIENCE_S)
    assert not lifting.done(), "there is no majority yet"
    slow.gate.set()
    assert not await lifting
    assert LIFT_PATIENCE_S <= loop.time() - began <= 4 * LIFT_PATIENCE_S
    hung.stuck = set()
    assert await client.unfence(SCOPE, range(16), b"nonce")


async def test_a_fence_needs_a_majority_of_every_shards_replicas(ring: Ring) -> None:
    ring.first.away = ring.second.away = True
    with pytest.raises(ServiceUnavailable):
        await ring.client().fence(SCOPE, range(16), b"nonce")


async def test_a_client_behind_the_layout_tries_again_when_it_has_learned_of_the_new_one(ring: Ring) -> None:
    client = ring.client()
    await client.change(NAME, put(b"one"))
    for replica in ring.replicas.values():
        await replica.inner.fence_epoch(messages.EpochFence(replica.inner.disk, 2))
        replica.carried_out.clear()

    async def learn() -> None:
        await asyncio.gather(ring.first.carried_out["prepare"].wait(), ring.first.carried_out["read"].wait())
        ring.layouts.current = Layouts.make(2)

    _, outcome, reading = await asyncio.gather(learn(), client.change(NAME, put(b"two")), client.read(NAME))
    assert outcome.after is not None
    assert outcome.after.body == b"two"
    assert reading.value is not None


async def test_a_client_that_never_learns_of_the_new_layout_is_unavailable(ring: Ring) -> None:
    client = ring.client(deadline_s=0.1)
    for replica in ring.replicas.values():
        await replica.inner.fence_epoch(messages.EpochFence(replica.inner.disk, 2))
    with pytest.raises(ServiceUnavailable):
        await client.read(NAME)
    with pytest.raises(ServiceUnavailable):
        await client.change(NAME, put(b"one"))


async def test_pages_are_found_on_any_replica_and_a_missing_page_is_damage(ring: Ring) -> None:
    client = ring.client()
    ring.first.away = True
    page_hash = await client.put_page(NAME, b"a page")
    ring.first.away, ring.second.away = False, True
    assert await ring.client().get_page(NAME, page_hash) == b"a page"
    with pytest.raises(DataDamaged):
        await client.get_page(NAME, b"\0" * 16)
    ring.first.away = True
    with pytest.raises(ServiceUnavailable):
        await client.put_page(NAME, b"another")


async def test_a_page_that_a_replica_lacks_is_told_and_can_be_copied_there(ring: Ring) -> None:
    missed: list[RegisterName] = []
    client = ring.client()
    told = ring_client(ring.layouts, ring, node="gw2", jitter=lambda: 0.9, on_missed=missed.append)
    ring.clients.append(told)
    ring.first.away = True
    page_hash = await told.put_page(NAME, b"a page")
    assert missed == [NAME]
    with pytest.raises(PeerUnreachable):
        await client.pages_missing("d0", [page_hash])
    ring.first.away = False
    absent = bytes(16)
    assert await client.pages_missing("d0", [page_hash, absent]) == (page_hash, absent)
    assert await client.pages_missing("d1", [page_hash, absent]) == (absent,)
    await client.copy_page(NAME, page_hash, "d0")
    assert await client.pages_missing("d0", [page_hash]) == ()
    with pytest.raises(DataDamaged):
        await client.copy_page(NAME, absent, "d0")


@pytest.mark.virtual_time(False)
async def test_the_ring_keeps_its_word_on_lmdb_across_a_restart(tmp_path: Path) -> None:
    layouts = Layouts()
    names = [RegisterName(Table.OBJECT, SCOPE, shard % 16, f"key {shard}".encode()) for shard in range(48)]
    for life in range(2):
        stores = {disk: LmdbMetaStore(tmp_path / disk, map_bytes=1 << 26) for disk in DISKS}
        client = ring_client(
            layouts, _Directory({disk: LocalReplica(disk, store) for disk, store in stores.items()}), node="gw"
        )
        outcomes = await asyncio.gather(*(client.change(name, increment) for name in names))
        assert {outcome.after.body for outcome in outcomes if outcome.after is not None} == {str(life + 1).encode()}
        readings = await asyncio.gather(*(client.read(name) for name in names))
        assert [reading.value for reading in readings] == [outcome.after for outcome in outcomes]
        await client.close()
        for store in stores.values():
            await store.close()


# --- counters beyond the hour


class Ahead(SystemClock):
    """Its wall clock is two hours fast."""

    def wall_ms(self) -> int:
        return super().wall_ms() + 7_200_000


def lie(replica: Unreliable, verdict: Verdict) -> None:
    """From now on it says that the end of all counters is in the way."""
    told = messages.PrepareReply(verdict, Ballot(1, COUNTER_MAX - 1, "liar", b""))
    replica.inner.try_prepare = lambda _request: told  # type: ignore[method-assign]


@pytest.mark.parametrize("verdict", [Verdict.PREEMPTED, Verdict.DAMAGED, Verdict.AHEAD])
async def test_one_replica_that_lies_about_counters_leads_no_proposer_to_where_the_others_refuse_it(
    ring: Ring, verdict: Verdict
) -> None:
    client = ring.client()
    for replica in (ring.first, ring.second, ring.third):
        honest = replica.inner.try_prepare
        lie(replica, verdict)
        for body in (b"one", b"two"):
            assert (await client.change(NAME, put(body))).after is not None
        assert (await client.settle(NAME)) is not None
        replica.inner.try_prepare = honest  # type: ignore[method-assign]
    now_us = SystemClock().wall_ms() * 1000
    assert client._ring.shared.ballots.next(1, 0, now_us).counter < now_us + 60_000_000


async def test_where_a_majority_is_beyond_the_hour_a_proposer_follows(ring: Ring) -> None:
    """A cluster whose clocks once ran ahead, from before there was a bound: its high-water ballots lie there."""
    far = SystemClock().wall_ms() * 1000 + 24 * COUNTER_AHEAD_MAX_US
    for disk in ring.order[:2]:
        await ring.stores[disk].commit(StoreBatch(meta={META_HIGH_WATER: encode(Ballot(1, far, "", b""))}))
        ring.replicas[disk].inner = ring._replica(disk)
    client = ring.client()
    after = (await client.change(NAME, put(b"one"))).after
    assert (await client.read(NAME)).value == after
    assert client._ring.shared.ballots.next(1, 0, SystemClock().wall_ms() * 1000).counter > far


async def test_beyond_the_hour_a_proposer_follows_a_replica_that_was_restarted_too(ring: Ring) -> None:
    """What it has promised is a block above the others' promises then. The third one is away."""
    far = SystemClock().wall_ms() * 1000 + 24 * COUNTER_AHEAD_MAX_US
    for number, disk in enumerate(ring.order[:2]):
        high_water = Ballot(1, far + number * HIGH_WATER_BLOCK_US, "", b"")
        await ring.stores[disk].commit(StoreBatch(meta={META_HIGH_WATER: encode(high_water)}))
        ring.replicas[disk].inner = ring._replica(disk)
    ring.third.away = True
    assert (await ring.client().change(NAME, put(b"one"))).after is not None


async def test_a_node_whose_clock_is_hours_ahead_is_told_so_and_goes_on_when_it_is_set_right(ring: Ring) -> None:
    clock = Ahead()
    client = ring.client(clock=clock)
    with pytest.raises(ServiceUnavailable, match=r"more than an hour ahead of their clocks"):
        await client.change(NAME, put(b"one"))
    clock.wall_ms = SystemClock().wall_ms  # type: ignore[method-assign]
    assert (await client.change(NAME, put(b"one"))).after is not None


async def test_a_layout_that_replicas_are_about_to_learn_costs_a_retry(ring: Ring) -> None:
    client, answered = ring.client(), 0
    for replica in ring.replicas.values():
        honest = replica.inner.try_prepare

        def newer(request: messages.Prepare, honest: Any = honest) -> messages.PrepareReply:
            nonlocal answered
            answered += 1
            return messages.PrepareReply(Verdict.NEWER) if answered <= 3 else honest(request)

        replica.inner.try_prepare = newer  # type: ignore[method-assign]
    assert (await client.change(NAME, put(b"one"))).after is not None
    assert answered > 3


# --- fences are believed of a majority


async def test_what_one_replica_says_of_a_fence_ends_no_bucket_while_another_is_away(ring: Ring) -> None:
    """With the detail ``final`` collection would delete what the bucket's records refer to."""
    client = ring.client(deadline_s=0.5)
    await client.change(NAME, put(b"one"))
    told = messages.PrepareReply(Verdict.FENCED, final=True)
    ring.first.inner.try_prepare = lambda _request: told  # type: ignore[method-assign]
    assert (await client.settle(NAME)) is not None, "two promise"
    ring.second.away = True
    for work in (client.settle(NAME), client.change(NAME, put(b"two"))):
        with pytest.raises(ServiceUnavailable):
            await work
    ring.second.away = False
    ring.second.inner.try_prepare = lambda _request: told  # type: ignore[method-assign]
    with pytest.raises(NoSuchBucket) as refused:
        await client.settle(NAME)
    assert refused.value.details == {"final": "true"}


async def test_a_fence_that_a_majority_has_is_final_only_where_a_majority_says_so(ring: Ring) -> None:
    client = ring.client(deadline_s=0.5)
    for replica, final in ((ring.first, True), (ring.second, False)):
        told = messages.PrepareReply(Verdict.FENCED, final=final)
        replica.inner.try_prepare = lambda _request, told=told: told  # type: ignore[method-assign,misc]
    with pytest.raises(NoSuchBucket) as refused:
        await client.settle(NAME)
    assert refused.value.details == {}

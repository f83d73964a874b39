"""Fences that lend: what passes them, how they begin and end, and what replicas and proposers say of them."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest
from msgspec.structs import replace

from storaged.errors import NoSuchBucket, OutcomeUnknown, ServiceUnavailable
from storaged.meta import messages
from storaged.meta.acceptor.replica import LocalReplica
from storaged.meta.consensus.acceptor import Acceptor, judge_accept, judge_create, judge_prepare
from storaged.meta.consensus.quorums import Quorum, View
from storaged.meta.consensus.register import RULES, Rules, Verdict
from storaged.meta.messages import AcceptReply, FenceReply, FenceSet, PrepareReply
from storaged.meta.names import ZERO_BALLOT, RegisterName
from storaged.meta.proposer.fences import RingFences
from storaged.meta.storage.batch import FINAL, LENDS, fence_of
from storaged.meta.store_ports import Fence
from tests.doubles.meta_store import MemoryMetaStore
from tests.unit.test_change_ends import PROMISE, Machine, _promise
from tests.unit.test_registers_client import NAME, Ring, put, ring
from tests.unit.test_replica import SCOPE, SlowDisk, accept, ballot, prepare, read, settle_tasks, value

__all__ = ["ring"]
pytestmark = pytest.mark.virtual_time

NONCE = b"nonce"
RING_SCOPE = NAME.scope
PLAIN = Fence(SCOPE, NONCE, final=False)
LENDING = Fence(SCOPE, NONCE, final=False, lends=True)
ENDED = Fence(SCOPE, NONCE, final=True)
LENT = PrepareReply(Verdict.FENCED, lends=True)
CLOSED = PrepareReply(Verdict.FENCED)


def held(fence: Fence | None) -> Acceptor:
    return Acceptor(ballot(5), ballot(5), value(), 1, fence)


# --- the acceptor


@pytest.mark.parametrize(
    ("fence", "nonce", "settles", "changes"),
    [
        (None, b"", True, True),
        (PLAIN, NONCE, True, False),
        (PLAIN, b"", False, False),
        (LENDING, NONCE, True, True),
        (LENDING, b"", False, False),
        (LENDING, b"other", False, False),
        (ENDED, NONCE, True, False),
    ],
)
def test_a_fence_that_lends_takes_changes_with_its_nonce_alone(
    fence: Fence | None, nonce: bytes, settles: bool, changes: bool
) -> None:
    def passes(verdict: Verdict) -> bool:
        assert verdict in (Verdict.OK, Verdict.FENCED)
        return verdict is Verdict.OK

    assert passes(judge_prepare(held(fence), ballot(9), nonce)) is settles
    assert passes(judge_accept(held(fence), ballot(9), value(), nonce, True)) is settles
    assert passes(judge_accept(held(fence), ballot(9), value(b"new", 2), nonce, False)) is changes


@pytest.mark.parametrize("fence", [PLAIN, LENDING, ENDED])
@pytest.mark.parametrize("identity", [False, True])
def test_no_create_passes_a_fence_whatever_its_nonce(fence: Fence, identity: bool) -> None:
    empty = Acceptor(ZERO_BALLOT, ZERO_BALLOT, None, 1, fence)
    for nonce in (b"", NONCE):
        assert judge_create(empty, ballot(9), value(), nonce, identity) is Verdict.FENCED


def test_without_rule_40_a_fence_that_lends_takes_everything_and_others_nothing_more() -> None:
    broken = Rules(lends_by_nonce=False)
    for fence, verdict in ((LENDING, Verdict.OK), (PLAIN, Verdict.FENCED), (ENDED, Verdict.FENCED)):
        empty = Acceptor(ZERO_BALLOT, ZERO_BALLOT, None, 1, fence)
        assert judge_prepare(held(fence), ballot(9), b"", broken) is verdict
        assert judge_accept(held(fence), ballot(9), value(b"new", 2), b"", False, broken) is verdict
        assert judge_create(empty, ballot(9), value(), b"", False, broken) is verdict
    assert RULES.lends_by_nonce


@pytest.mark.parametrize(
    ("flags", "final", "lends"),
    [(0, False, False), (FINAL, True, False), (LENDS, False, True), (FINAL | LENDS, True, False)],
)
def test_a_stored_fence_that_is_final_never_lends(flags: int, final: bool, lends: bool) -> None:
    assert fence_of(SCOPE, bytes([flags]) + NONCE) == Fence(SCOPE, NONCE, final, lends)


async def changes(replica: LocalReplica, counter: int, nonce: bytes = NONCE) -> tuple[int, int]:
    """The verdicts of a prepare and of the accept that follows."""
    promised = await replica.prepare(prepare(ballot(counter), nonce=nonce))
    accepted = await replica.accept(accept(ballot(counter), value(b"%d" % counter, counter), nonce=nonce))
    return promised.verdict, accepted.verdict


PASSES, SETTLES, REFUSED = (Verdict.OK, Verdict.OK), (Verdict.OK, Verdict.FENCED), (Verdict.FENCED, Verdict.FENCED)


async def test_a_plain_fence_begins_to_lend_and_no_late_request_takes_that_back() -> None:
    store = MemoryMetaStore()
    replica = LocalReplica("d", store)
    assert await replica.fence(FenceSet("d", SCOPE, NONCE)) == FenceReply(True)
    assert await changes(replica, 10) == SETTLES
    assert await replica.fence(FenceSet("d", SCOPE, NONCE, lends=True)) == FenceReply(True, lends=True)
    assert await changes(replica, 11) == PASSES
    assert await replica.fence(FenceSet("d", SCOPE, NONCE)) == FenceReply(True, lends=True), "it is late"
    now = 10**15
    for its in (replica, LocalReplica("d", store)):
        now += 10
        assert await changes(its, now) == PASSES
        assert await changes(its, now + 1, b"") == REFUSED
        assert await changes(its, now + 2, b"another") == REFUSED
    assert not (await replica.fence(FenceSet("d", SCOPE, b"m", lends=True))).done, "nonces grow"
    assert (await read(replica)).value == value(b"%d" % now, now)


async def test_a_fence_that_was_made_final_never_lends_again() -> None:
    store = MemoryMetaStore()
    replica = LocalReplica("d", store)
    await replica.fence(FenceSet("d", SCOPE, NONCE, lends=True))
    assert await replica.fence(FenceSet("d", SCOPE, NONCE, final=True)) == FenceReply(True)
    assert not (await replica.fence(FenceSet("d", SCOPE, NONCE, lends=True))).lends
    assert not (await replica.fence(FenceSet("d", SCOPE, NONCE, True, lends=True))).lends
    for its in (replica, LocalReplica("d", store)):
        assert (await changes(its, 10**15))[1] == Verdict.FENCED
    assert store.get_fence(SCOPE) == ENDED


async def test_a_fence_that_lends_is_lifted_by_its_nonce_and_never_lends_again() -> None:
    store = MemoryMetaStore()
    replica = LocalReplica("d", store)
    await replica.fence(FenceSet("d", SCOPE, NONCE, lends=True))
    assert not (await replica.unfence(messages.FenceLift("d", SCOPE, b"m"))).done
    assert (await replica.unfence(messages.FenceLift("d", SCOPE, NONCE))).done
    assert await changes(replica, 10, b"") == PASSES
    for its in (replica, LocalReplica("d", store)):
        assert await its.fence(FenceSet("d", SCOPE, NONCE, lends=True)) == FenceReply(False)
    assert await replica.fence(FenceSet("d", SCOPE, b"nonce 2")) == FenceReply(True), "it does not lend itself"
    assert await changes(replica, 11, b"nonce 2") == SETTLES


async def test_the_final_fence_after_one_that_lends_is_answered_after_what_that_let_pass() -> None:
    disk = SlowDisk()
    replica = LocalReplica("d", MemoryMetaStore(sync=disk.sync))
    await replica.fence(FenceSet("d", SCOPE, NONCE, lends=True))
    await replica.prepare(prepare(ballot(10), nonce=NONCE))
    disk.open.clear()
    before = asyncio.create_task(replica.accept(accept(ballot(10), value(), nonce=NONCE)))
    await settle_tasks()
    ending = asyncio.create_task(replica.fence(FenceSet("d", SCOPE, NONCE, final=True)))
    await settle_tasks()
    assert not replica._fences.holds(SCOPE, NONCE), "a scan would miss what is on its way"
    assert not ending.done()
    disk.open.set()
    await ending
    assert (await before).verdict == Verdict.OK
    assert replica._fences.holds(SCOPE, NONCE)


async def test_refusals_and_reads_say_that_the_fence_lends() -> None:
    replica = LocalReplica("d", MemoryMetaStore())
    for request, lends, final in (
        (FenceSet("d", SCOPE, NONCE), False, False),
        (FenceSet("d", SCOPE, NONCE, lends=True), True, False),
        (FenceSet("d", SCOPE, NONCE, final=True), False, True),
    ):
        await replica.fence(request)
        promise = await replica.prepare(prepare(ballot(10)))
        assert (promise.verdict, promise.lends, promise.final) == (Verdict.FENCED, lends, final)
        refusal = await replica.accept(accept(ballot(10), value()))
        assert (refusal.verdict, refusal.lends, refusal.final) == (Verdict.FENCED, lends, final)
        reply = await read(replica)
        assert (reply.fenced, reply.lends, reply.final) == (True, lends, final)


# --- the proposer


def error_of(*replies: PrepareReply | None) -> Exception | None:
    machine = Machine(thorough=True)
    machine.prepares(*replies)
    return machine.error


def test_a_change_says_that_the_fence_lends_where_so_many_say_it_that_no_quorum_is_left() -> None:
    for replies in ((LENT, LENT), (LENT, LENT, PROMISE), (LENT, CLOSED, LENT), (PROMISE, LENT, LENT)):
        error = error_of(*replies)
        assert isinstance(error, NoSuchBucket)
        assert error.details == {"lends": "true"}
    final = PrepareReply(Verdict.FENCED, final=True, lends=True)
    error = error_of(final, final)
    assert isinstance(error, NoSuchBucket)
    assert error.details == {"final": "true"}, "a final fence does not lend"


def test_one_replica_alone_does_not_make_a_fence_lend_and_keeps_nobody_out_of_one_that_does() -> None:
    machine = Machine(thorough=True)
    assert not machine.prepares(LENT, CLOSED), "the third one says which of them is right"
    assert machine.promised(machine.turn, "c", CLOSED)
    assert isinstance(machine.error, NoSuchBucket)
    assert machine.error.details == {}
    for third in (None, PROMISE):
        machine = Machine(thorough=True)
        assert not machine.prepares(CLOSED, LENT)
        assert machine.promised(machine.turn, "c", third)
        assert isinstance(machine.error, NoSuchBucket)
        assert machine.error.details == {}
    machine = Machine(thorough=True)
    machine.prepares(LENT, PROMISE, PROMISE)
    assert machine.error is None
    preempted = PrepareReply(Verdict.PREEMPTED, lends=True)
    assert isinstance(error_of(CLOSED, CLOSED), NoSuchBucket)
    assert error_of(preempted, preempted) is None, "who has the nonce is preempted as ever"


def test_an_accept_that_is_refused_says_that_the_fence_lends() -> None:
    lent, closed = AcceptReply(Verdict.FENCED, lends=True), AcceptReply(Verdict.FENCED)
    for refusals, details in (((lent, lent), {"lends": "true"}), ((lent, closed), {}), ((closed, closed), {})):
        settling = Machine(settling=True, commit=True, thorough=True, change=None)
        settling.prepares(_promise(5, 1), _promise(5, 1), _promise(5, 1))
        settling.accepts(*refusals)
        assert isinstance(settling.error, NoSuchBucket)
        assert settling.error.details == details
    machine = Machine(thorough=True)
    machine.prepares(PROMISE, PROMISE)
    machine.accepts(lent, lent)
    assert isinstance(machine.error, OutcomeUnknown), "one of them may have accepted it before"


# --- the client


async def test_a_fence_lends_where_a_majority_says_so_and_everywhere_where_all_do(ring: Ring) -> None:
    client = ring.client(deadline_s=1.0)
    assert await client.fence(RING_SCOPE, range(16), NONCE)
    ring.third.away = True
    assert not await client.fence(RING_SCOPE, range(16), NONCE, lends=True)
    ring.third.away = False
    assert ring.third.inner._fences.of(RING_SCOPE) == Fence(RING_SCOPE, NONCE, final=False)
    assert await client.fence(RING_SCOPE, range(16), NONCE, lends=True)
    lending = Fence(RING_SCOPE, NONCE, final=False, lends=True)
    assert {replica.inner._fences.of(RING_SCOPE) for replica in ring.replicas.values()} == {lending}


async def test_a_program_that_knows_no_fence_that_lends_has_not_done_it(ring: Ring) -> None:
    client = ring.client(deadline_s=0.5)
    for replica in (ring.first, ring.second):

        async def fence(
            request: FenceSet, inner: LocalReplica = replica.inner, *, timeout_s: float = 1.0
        ) -> FenceReply:
            return await inner.fence(replace(request, lends=False))

        replica.fence = fence  # type: ignore[method-assign,assignment]
    with pytest.raises(ServiceUnavailable):
        await client.fence(RING_SCOPE, range(16), NONCE, lends=True)


async def test_a_look_tells_which_fences_lend(ring: Ring) -> None:
    client = ring.client()
    await client.change(NAME, put(b"one"))
    first, second, third = ring.order
    await ring.first.inner.fence(FenceSet(first, RING_SCOPE, NONCE, lends=True))
    await ring.second.inner.fence(FenceSet(second, RING_SCOPE, NONCE))
    look = await client.look(NAME)
    assert (look.fenced, look.lends, look.final) == ({first, second}, {first}, set())
    await ring.first.inner.fence(FenceSet(first, RING_SCOPE, NONCE, final=True))
    await ring.third.inner.fence(FenceSet(third, RING_SCOPE, NONCE, lends=True))
    look = await client.look(NAME)
    assert (look.fenced, look.lends, look.final) == ({first, second, third}, {third}, {first})


class Steps:
    """A partition that has moved from c to d, as this process learns when it asks. The disks of both sets, of which one
    knows the later step, and refuses who does not."""

    def __init__(self, *, learns: bool) -> None:
        self.views = [View.of(0, ("a", "b", "c")), View.of(2 << 32, ("a", "b", "d"))]
        self.learns = learns
        self.asked: list[list[str]] = []
        self.refreshed = 0

    def view(self, _name: RegisterName) -> View:
        return self.views[1 if self.learns and self.refreshed else 0]

    async def refresh(self, _name: RegisterName, view: View, _timeout_s: float) -> bool:
        self.refreshed += 1
        return self.view(NAME) != view

    def deadline(self) -> float:
        return 5.0

    def remaining_s(self, deadline: float) -> float:
        return deadline

    async def gather(self, quorums: Sequence[Quorum], _call: object, is_done: Any, _deadline: float, **_: bool) -> Any:
        disks = list(quorums[0].disks)
        self.asked.append(disks)
        old = FenceReply(False, Verdict.EPOCH)
        replies = {disk: old if disk == "b" and "c" in disks else FenceReply(True, lends=True) for disk in disks}
        return {disk for disk, reply in replies.items() if is_done(reply)}


@pytest.mark.parametrize("learns", [False, True])
@pytest.mark.parametrize("final", [False, True])
async def test_all_replicas_are_those_of_the_last_step_that_one_of_them_knows(learns: bool, final: bool) -> None:
    """One that lies about the step costs a look at the record."""
    steps: Any = Steps(learns=learns)
    fences = RingFences(steps, steps.view, steps)
    assert await fences.fence(RING_SCOPE, [0], NONCE, final=final) is (learns and not final)
    old, new = ["a", "b", "c"], ["a", "b", "d"]
    assert steps.asked == ([old, new] if learns and not final else [old])

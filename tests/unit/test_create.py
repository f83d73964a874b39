"""A change proposed before anybody was asked: who takes it, who refuses it, and what becomes of one that only some have
taken.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from msgspec.structs import replace

from storaged.errors import InvalidRequest, NoSuchBucket, OutcomeUnknown
from storaged.meta import messages
from storaged.meta.acceptor.replica import LocalReplica
from storaged.meta.client import RingClient
from storaged.meta.consensus.acceptor import Acceptor, judge_create
from storaged.meta.consensus.overtaking import overtaken
from storaged.meta.consensus.register import (
    CALL_BYTES,
    COUNTER_AHEAD_MAX_US,
    FLOOR_SEQUENCES,
    NEVER,
    Lineage,
    Standing,
    Verdict,
    created,
)
from storaged.meta.names import ZERO_BALLOT, Ballot, Change, RegisterName, Table, Value, Visibility
from storaged.meta.ports import Grounds, Outcome, SmallCopies, Unasked, Update
from storaged.meta.proposer.new_keys import NEW_OF_LATE, SCOPES_MAX, NewKeyRate
from storaged.meta.store_ports import Fence, RowDamaged
from tests.doubles.meta_store import MemoryMetaStore
from tests.patience import GUARD_S
from tests.unit.test_registers_client import NAME, SCOPE, Refused, Ring, Unreliable, fail_with, later_us, put
from tests.unit.test_registers_soon import COPIES
from tests.unit.test_registers_soon import begun as soon
from tests.unit.test_replica import FixedClock
from tests.worlds.authority import until

pytestmark = pytest.mark.virtual_time


def at(counter: int, epoch: int = 1) -> Ballot:
    return Ballot(epoch, counter, "gw", b"incarnat")


def written(sequence: int, body: bytes = b"other") -> Value:
    return Value(sequence, b"another call, so", Visibility.LIVE, body)


# --- pure


def lineage() -> Lineage:
    return Lineage(b"c" * CALL_BYTES)


NEW = lineage().create(Change(b"new"), at(10))
NOTHING = Acceptor(ZERO_BALLOT, ZERO_BALLOT, None, 1)


@pytest.mark.parametrize(
    ("acceptor", "verdict"),
    [
        (NOTHING, Verdict.OK),
        (NOTHING._replace(promised=at(10)), Verdict.OK),
        (NOTHING._replace(promised=at(11)), Verdict.PREEMPTED),
        (NOTHING._replace(promised=at(10), accepted=at(10), value=NEW), Verdict.OK),
        (NOTHING._replace(accepted=at(10), value=written(1)), Verdict.CONFLICT),
        (NOTHING._replace(accepted=at(9), value=written(1)), Verdict.HELD),
        (NOTHING._replace(accepted=at(9), value=NEVER), Verdict.HELD),
        (NOTHING._replace(accepted=at(11), value=written(1)), Verdict.PREEMPTED),
        (NOTHING._replace(epoch=2), Verdict.EPOCH),
        (NOTHING._replace(fence=Fence(b"s" * 16, b"nonce", False)), Verdict.FENCED),
        (NOTHING._replace(damaged=True), Verdict.DAMAGED),
        (NOTHING._replace(damaged=True, promised=at(99)), Verdict.PREEMPTED),
    ],
)
def test_a_create_is_taken_by_who_holds_nothing(acceptor: Acceptor, verdict: Verdict) -> None:
    assert judge_create(acceptor, at(10), NEW, b"", identity=False) is verdict


def test_only_a_create_makes_a_created_value() -> None:
    assert created(NEW)
    assert (NEW.sequence, len(NEW.operation)) == (1, 16)
    assert not created(NEVER)
    assert not created(lineage().attempt(None, Change(b"new")))
    assert not created(Value(2, NEW.operation, NEW.visibility, NEW.body))


def test_what_a_created_value_was_laid_over_is_known_by_its_sequence() -> None:
    below = [(at(3), written(4)), (at(5), written(7)), (ZERO_BALLOT, None)]
    assert overtaken([(at(10), NEW), *below], at(10), NEW) == written(7)
    assert overtaken([(at(10), NEW), (ZERO_BALLOT, None)], at(10), NEW) is None
    assert overtaken([(at(10), NEW), (at(9), NEVER)], at(10), NEW) is None
    assert overtaken([(at(12), NEW), (at(10), NEW)], at(12), NEW) is None, (
        "a settling round has carried it to one replica"
    )
    assert overtaken([(at(10), written(1)), *below], at(10), written(1)) is None


def test_what_lies_below_a_create_does_not_descend_from_it_and_does_not_end_it() -> None:
    own = lineage()
    own.create(Change(b"new"), at(10))
    for settled in (False, True):
        assert own.judge(written(7), at(9), settled) is Standing.CLEAR
        assert own.judge(written(1), at(9), settled) is Standing.CLEAR
        assert own.judge(None, ZERO_BALLOT, settled) is Standing.CLEAR
        assert own.open
    assert own.judge(NEW, at(10), settled=False) is Standing.APPLIED
    assert own.judge(Value(8, NEW.operation, NEW.visibility, NEW.body), at(20), settled=False) is Standing.APPLIED
    assert own.base_of(NEW) is None
    assert own.judge(written(8), at(11), settled=True) is Standing.UNKNOWN


def test_a_rival_that_was_created_above_is_clear_and_ends_it_once_it_is_settled() -> None:
    own = lineage()
    own.create(Change(b"new"), at(10))
    assert own.judge(written(1), at(11), settled=False) is Standing.CLEAR
    assert own.open
    assert own.judge(written(1), at(11), settled=True) is Standing.CLEAR
    assert not own.open


def test_an_attempt_after_a_create_is_judged_by_its_own_sequence() -> None:
    own = lineage()
    own.create(Change(b"new"), at(10))
    second = own.attempt(written(4), Change(b"new"))
    assert second.sequence == 5
    assert own.judge(written(6), at(9), settled=True) is Standing.UNKNOWN
    assert own.judge(written(4), at(9), settled=True) is Standing.CLEAR
    assert own.judge(second, at(20), settled=False) is Standing.APPLIED


def test_a_create_that_all_hold_something_against_is_over() -> None:
    own = lineage()
    own.create(Change(b"new"), at(10))
    own.create_held(everywhere=True)
    assert not own.open
    assert own.judge(written(8), at(11), settled=True) is Standing.CLEAR


def test_a_create_that_a_majority_holds_something_against_is_open_and_lost_where_it_was_taken() -> None:
    own = lineage()
    assert own.lost_at() is None
    own.create(Change(b"new"), at(10))
    assert own.lost_at() is None
    own.create_held(everywhere=False)
    assert own.open
    assert own.lost_at() == at(10)


def test_a_bucket_where_most_is_overwritten_is_asked_first_until_most_is_new_again() -> None:
    novelty, other = NewKeyRate(), NAME._replace(scope=b"o" * 16)
    assert novelty.likely(NAME)
    for _ in range(NEW_OF_LATE // 4 + 1):
        novelty.saw(NAME, False)
    assert not novelty.likely(NAME)
    assert novelty.likely(other)
    for _ in range(NEW_OF_LATE):
        novelty.saw(NAME, True)
    assert novelty.likely(NAME)


def test_what_is_remembered_of_buckets_is_bounded() -> None:
    novelty = NewKeyRate()
    for index in range(2 * SCOPES_MAX + 10):
        novelty.saw(NAME._replace(scope=index.to_bytes(16, "big")), False)
    assert len(novelty._rates) <= SCOPES_MAX


# --- an acceptor


def create(ballot: Ballot, value: Value = NEW) -> messages.Create:
    return messages.Create("d", NAME, ballot, value)


async def test_an_acceptor_takes_a_create_once_and_nothing_below_it_any_more() -> None:
    replica = LocalReplica("d", MemoryMetaStore())
    assert (await replica.accept(create(at(10)))).verdict == Verdict.OK
    assert (await replica.accept(create(at(10)))).verdict == Verdict.OK
    assert (await replica.accept(create(at(9)))).verdict == Verdict.PREEMPTED
    held = await replica.accept(create(at(11)))
    assert (held.verdict, held.promised) == (Verdict.HELD, at(10))
    reply = await replica.prepare(messages.Prepare("d", NAME, at(12)))
    assert (reply.accepted, reply.value) == (at(10), NEW)


async def test_an_acceptor_with_a_damaged_row_takes_no_create(monkeypatch: pytest.MonkeyPatch) -> None:
    store = MemoryMetaStore()
    replica = LocalReplica("d", store)

    def damaged(_name: RegisterName) -> None:
        raise RowDamaged

    monkeypatch.setattr(store, "get", damaged)
    verdict = (await replica.accept(create(at(10)))).verdict
    assert verdict not in (Verdict.OK, Verdict.HELD), "what it held is unknown: it may have been this"


async def test_a_create_may_be_as_far_ahead_of_an_acceptors_clock_as_any_ballot() -> None:
    clock = FixedClock(1_000_000)
    replica = LocalReplica("d", MemoryMetaStore(), clock=clock)
    limit = clock.now_ms * 1000 + COUNTER_AHEAD_MAX_US
    assert (await replica.accept(create(at(limit + 1)))).verdict == Verdict.AHEAD
    assert (await replica.accept(create(at(limit)))).verdict == Verdict.OK


async def test_an_acceptor_keeps_no_copy_of_a_create_that_it_refuses() -> None:
    ring = Ring()
    replica = ring.first.inner
    await ring.accept_at(ring.first, b"there", 5)
    request = messages.Create(replica.disk, NAME, at(10), NEW, b"", False, b"D" * 16)
    assert (await replica.accept(request, (b"payload",))).verdict == Verdict.HELD
    assert not ring.copies[replica.disk]


# --- a proposer


@pytest.fixture
async def ring() -> AsyncIterator[Ring]:
    made = Ring()
    yield made
    for client in made.clients:
        await client.close()


class Always(NewKeyRate):
    def likely(self, name: RegisterName) -> bool:
        return True


def begun(client: RingClient, update: Update, small: SmallCopies | None = None) -> asyncio.Future[Outcome | Exception]:
    return soon(client, update, small, regardless=True)


async def applied(client: RingClient, update: Update, small: SmallCopies | None = None) -> Outcome:
    outcome = await asyncio.wait_for(begun(client, update, small), GUARD_S)
    assert isinstance(outcome, Outcome), outcome
    return outcome


def prepares(ring: Ring) -> int:
    return sum(len(replica.prepares) for replica in ring.replicas.values())


async def test_a_new_register_is_written_in_one_round_trip(ring: Ring) -> None:
    client = ring.client()
    outcome = await applied(client, lambda _: Change(b"one", payload=b"D" * 16), COPIES)
    assert outcome.before is None
    assert outcome.after is not None
    assert created(outcome.after)
    assert prepares(ring) == 0
    assert (await client.read(NAME)).value == outcome.after
    assert sum(map(len, ring.copies.values())) >= 2
    assert client.statistics().changes == 1


async def test_a_register_that_is_there_is_asked_first_and_the_outcome_names_what_was_there(ring: Ring) -> None:
    client = ring.client()
    first = await client.change(NAME, put(b"one"))
    await asyncio.sleep(0.01)  # all three have it
    second = await applied(client, put(b"two"))
    await asyncio.sleep(0.01)
    assert second.before == first.after
    assert second.after is not None
    assert (second.after.sequence, second.after.body) == (2, b"two")
    third = await applied(ring.client("other"), put(b"three"))
    assert third.before == second.after
    assert (await client.read(NAME)).value == third.after
    assert client.statistics().unknown == 0


async def test_creates_are_given_up_for_a_bucket_that_is_overwritten(ring: Ring) -> None:
    client = ring.client()
    for _ in range(2 * NEW_OF_LATE):
        await applied(client, put(b"one"))
    before = sum(
        isinstance(request, messages.Create) for replica in ring.replicas.values() for request in replica.accepts
    )
    await applied(client, put(b"two"))
    assert before < 3 * NEW_OF_LATE
    assert (
        sum(isinstance(request, messages.Create) for replica in ring.replicas.values() for request in replica.accepts)
        == before
    )


async def test_a_change_that_says_nothing_of_what_is_there_creates_nothing(ring: Ring) -> None:
    client = ring.client()
    assert isinstance(await soon(client, put(b"one")), Outcome)
    assert prepares(ring) >= 2


async def test_what_the_update_raises_is_told_and_nothing_is_created(ring: Ring) -> None:
    client = ring.client()
    assert isinstance(await begun(client, fail_with(Refused())), Refused)
    assert not any(replica.accepts for replica in ring.replicas.values())


async def test_a_replica_that_is_away_is_not_waited_for_and_is_told_of(ring: Ring) -> None:
    missed: list[RegisterName] = []
    client = ring.client(on_missed=missed.append)
    ring.second.away = True
    assert (await applied(client, put(b"one"))).before is None
    await until(lambda: bool(missed))
    assert missed == [NAME]
    assert prepares(ring) == 0


async def test_a_replica_that_lags_behind_is_told_of(ring: Ring) -> None:
    """It holds what no majority has confirmed."""
    missed: list[RegisterName] = []
    client = ring.client(on_missed=missed.append)
    await ring.accept_at(ring.third, b"half", 5)
    assert (await applied(client, put(b"one"))).before is None
    await until(lambda: bool(missed))
    assert missed == [NAME]
    value = (await client.read(NAME)).value
    assert value is not None
    assert value.body == b"one"


@pytest.mark.parametrize("blank", [0, 1, 2])
async def test_who_was_behind_takes_what_the_others_refuse_and_the_chain_goes_on_behind_them(
    ring: Ring, blank: int
) -> None:
    """The create lies at one replica above what the others have chosen."""
    client = ring.client(new_keys=Always())
    behind = [ring.first, ring.second, ring.third][blank]
    for replica in ring.replicas.values():
        if replica is not behind:
            await ring.accept_at(replica, b"chosen", 5, sequence=7)
    outcome = await applied(client, put(b"one"))
    assert outcome.before is None or outcome.before.body == b"chosen", "what was overtaken unseen is not told of"
    assert outcome.after is not None
    assert (outcome.after.sequence, outcome.after.body) == (8, b"one")
    assert (await ring.client("other").read(NAME)).value == outcome.after


async def half_created(ring: Ring, replica: Unreliable) -> None:
    """The proposer died with its create at one replica; the others have chosen something else before."""
    for other in ring.replicas.values():
        if other is not replica:
            await ring.accept_at(other, b"chosen", 5, sequence=7)
    await replica.inner.accept(messages.Create(replica.inner.disk, NAME, at(10), NEW))


@pytest.mark.parametrize("way", ["read", "settle", "change", "quick"])
async def test_a_proposer_carries_a_create_on_after_the_chosen_value(ring: Ring, way: str) -> None:
    await half_created(ring, ring.first)
    client = ring.client()
    ring.third.away = True  # or the other two could agree without it
    if way == "read":
        value = (await client.read(NAME)).value
    elif way == "settle":
        value = await client.settle(NAME)
    elif way == "change":
        value = (await client.change(NAME, put(b"next"))).before
    else:
        outcome = await soon(client, put(b"next"))
        assert isinstance(outcome, Outcome)
        value = outcome.before
    assert value == Value(8, NEW.operation, NEW.visibility, NEW.body)
    settled = (await client.read(NAME)).value
    assert settled is not None
    assert settled.sequence == (8 if way in ("read", "settle") else 9)


async def test_a_create_at_one_replica_alone_is_settled_under_the_readers_own_ballot(ring: Ring) -> None:
    await ring.first.inner.accept(messages.Create(ring.first.inner.disk, NAME, at(10), NEW))
    client = ring.client()
    ring.third.away = True
    assert (await client.read(NAME)).value == NEW
    asked = [request for replica in ring.replicas.values() for request in replica.accepts]
    assert asked
    assert at(10) not in {request.ballot for request in asked}
    assert not any(isinstance(request, messages.Create) for request in asked)


async def test_a_create_whose_answers_are_lost_is_found_again(ring: Ring) -> None:
    client = ring.client()
    ring.first.deaf.add("accept")
    ring.second.deaf.add("accept")
    told = begun(client, put(b"one"))
    await asyncio.gather(*(replica.carried_out["accept"].wait() for replica in (ring.first, ring.second)))
    for replica in (ring.first, ring.second):
        replica.deaf.clear()
    outcome = await asyncio.wait_for(told, GUARD_S)
    assert isinstance(outcome, Outcome)
    assert outcome.before is None
    value = (await client.read(NAME)).value
    assert value is not None
    assert (value.sequence, value.body) == (1, b"one")


async def test_a_create_that_may_have_been_applied_is_of_unknown_outcome(ring: Ring) -> None:
    client = ring.client(deadline_s=0.1)
    for replica in ring.replicas.values():
        replica.deaf.add("accept")
        replica.stuck.add("prepare")
    assert isinstance(await asyncio.wait_for(begun(client, put(b"one")), GUARD_S), OutcomeUnknown)


async def test_a_replica_that_hangs_does_not_hold_up_who_was_refused_by_another(ring: Ring) -> None:
    client = ring.client(new_keys=Always())
    await client.change(NAME, put(b"one"))
    await asyncio.sleep(0.01)
    ring.first.stuck.update(("accept", "prepare"))
    ring.second.stuck.add("accept")
    told = begun(client, put(b"two"))
    await asyncio.sleep(0.005)
    ring.second.stuck.clear()
    outcome = await asyncio.wait_for(told, 2)
    assert isinstance(outcome, Outcome)
    assert outcome.before is not None


@pytest.mark.parametrize("final", [True, False])
async def test_a_bucket_that_is_being_deleted_takes_no_create(ring: Ring, final: bool) -> None:
    client = ring.client(deadline_s=0.5)
    for replica in ring.replicas.values():
        await replica.inner.fence(messages.FenceSet(replica.inner.disk, NAME.scope, b"nonce", final))
    outcome = await asyncio.wait_for(begun(client, put(b"one")), GUARD_S)
    assert type(outcome) is (NoSuchBucket if final else OutcomeUnknown), "it may yet be lifted"
    assert all(ring.held(replica) is None for replica in ring.replicas.values())


async def test_a_client_that_closes_tells_whoever_waits(ring: Ring) -> None:
    client = ring.client()
    for replica in ring.replicas.values():
        replica.stuck.add("accept")
    told = begun(client, put(b"one"))
    await asyncio.sleep(0)
    await client.close()
    assert isinstance(await asyncio.wait_for(told, GUARD_S), OutcomeUnknown)


def copies_on(ring: Ring) -> int:
    return sum(map(len, ring.copies.values()))


async def test_a_create_is_done_when_its_copies_are_where_they_must_be(ring: Ring) -> None:
    """The third replica hangs, and the two that have answered are not enough."""
    client = ring.client(deadline_s=0.3)
    ring.third.stuck.add("accept")
    small = replace(COPIES, enough=lambda disks: len(disks) >= 3)
    told = begun(client, lambda _: Change(b"one", payload=b"D" * 16), small)
    await asyncio.sleep(0.05)
    assert copies_on(ring) == 2
    assert not told.done()
    assert isinstance(await asyncio.wait_for(told, GUARD_S), OutcomeUnknown)


async def test_a_replica_that_cannot_keep_its_copy_has_not_taken_the_create(ring: Ring) -> None:
    missed: list[RegisterName] = []
    client = ring.client(hedge_s=GUARD_S, on_missed=missed.append)  # no create is slow here, on no machine
    ring.full.add(ring.first.inner.disk)
    assert (await applied(client, lambda _: Change(b"one", payload=b"D" * 16), COPIES)).before is None
    assert (prepares(ring), copies_on(ring)) == (0, 2)
    await asyncio.sleep(0.01)
    assert missed == [NAME]


async def test_a_replica_that_refuses_late_is_told_of(ring: Ring) -> None:
    missed: list[RegisterName] = []
    client = ring.client(on_missed=missed.append)
    ring.third.gate = asyncio.Event()
    await ring.accept_at(ring.third, b"half", 5)
    assert (await applied(client, put(b"one"))).before is None
    assert not missed
    ring.third.gate.set()
    await asyncio.sleep(0.01)
    assert missed == [NAME]


@pytest.mark.parametrize("blank", [0, 1, 2])
@pytest.mark.parametrize("refuses", [True, False])
async def test_no_create_that_one_replica_took_overturns_an_answer(ring: Ring, refuses: bool, blank: int) -> None:
    """The outcome has what was found; what one replica accepted before must not be found above it later."""
    client = ring.client(new_keys=Always())
    for index, replica in enumerate((ring.first, ring.second, ring.third)):
        if index != blank:
            await ring.accept_at(replica, b"chosen", 5, sequence=7)

    def change(value: Value | None) -> Change | None:
        if value is None:
            return Change(b"one")
        if refuses:
            raise Refused
        return None

    outcome = await asyncio.wait_for(begun(client, change), GUARD_S)
    if not isinstance(outcome, Refused):
        assert isinstance(outcome, Outcome)
        assert outcome.after is not None
        if outcome.after.body == b"one":
            return  # it was carried on
    for away in ring.replicas.values():
        away.away = True
        value = (await ring.client("reader").read(NAME)).value
        assert value is not None
        assert value.body == b"chosen"
        away.away = False


async def test_one_that_was_refused_at_its_deadlines_end_is_told_although_every_replica_hangs(ring: Ring) -> None:
    client = ring.client(deadline_s=0.1, new_keys=Always())
    for replica in ring.replicas.values():
        replica.stuck.update(("accept", "prepare"))
    told = begun(client, put(b"one"))
    assert isinstance(await asyncio.wait_for(told, 2), OutcomeUnknown)
    assert not client._ring.deadlines._ends
    assert isinstance(await asyncio.wait_for(begun(client, put(b"two")), 2), OutcomeUnknown), "the turn was given back"


async def test_nobody_is_patient_with_a_create_that_is_over(ring: Ring) -> None:
    client = ring.client(new_keys=Always())
    for body in (b"one", b"two"):
        await applied(client, put(body))
        assert not client._ring.deadlines._ends
        assert not client._queue._turns._waiting


async def test_creates_that_end_in_an_error_are_remembered_as_refused(ring: Ring) -> None:
    rate = NewKeyRate()
    client = ring.client(new_keys=rate)
    await client.fence(SCOPE, [0], b"nonce")
    for _ in range(NEW_OF_LATE // 4 + 1):
        with pytest.raises(OutcomeUnknown):
            await client.change(NAME, put(b"one"), regardless=True)
    assert not rate.likely(NAME)


@pytest.mark.parametrize("order", [(0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)])
@pytest.mark.parametrize("above", [False, True])
async def test_who_loses_against_another_create_goes_on_behind_it(
    ring: Ring, order: tuple[int, int, int], above: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One replica took the loser's first, the other two the winner's. Where that has the higher ballot, its replicas
    can't say that they never took the loser's.
    """
    client = ring.client(new_keys=Always())
    lost, *won = [(ring.first, ring.second, ring.third)[index] for index in order]
    rival = Lineage(b"r" * CALL_BYTES).create(Change(b"rival"), at(1))
    accept = Unreliable.accept

    async def rival_first(
        self: Unreliable, request: messages.Accept, *more: object, **options: object
    ) -> messages.AcceptReply:
        if isinstance(request, messages.Create) and self in won:
            its = request.ballot._replace(counter=request.ballot.counter + (1 if above else -1), node="rival")
            await self.inner.accept(messages.Create(self.inner.disk, NAME, its, rival))
        return await accept(self, request, *more, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(Unreliable, "accept", rival_first)
    outcome = await asyncio.wait_for(begun(client, put(b"one")), GUARD_S)
    assert lost.accepts
    value = (await client.read(NAME)).value
    assert value is not None
    if above and isinstance(outcome, OutcomeUnknown):
        assert value.body == b"rival"
    else:
        assert isinstance(outcome, Outcome)
        assert value == outcome.after
        assert (value.sequence, value.body) == (2, b"one")


@pytest.mark.parametrize("table", [table for table in Table if table != Table.OBJECT])
async def test_only_an_objects_register_is_changed_regardless_of_what_it_holds(ring: Ring, table: Table) -> None:
    client, name = ring.client(new_keys=Always()), NAME._replace(table=table)
    with pytest.raises(ValueError, match="regardless"):
        await client.change(name, put(b"one"), regardless=True)
    with pytest.raises(ValueError, match="regardless"):
        client.try_change(name, put(b"one"), lambda _outcome: None, regardless=True)
    replica = ring.first.inner
    ballot = Ballot(1, client._ring.clock.wall_ms() * 1000, "n", b"i" * 8)
    value = lineage().create(Change(b"one"), ballot)
    plain = Value(1, b"o" * 16, Visibility.LIVE, b"one")
    for refused in (
        messages.Create("", name, ballot, value),
        messages.Create("", name, ballot, plain),
        messages.Accept("", name, ballot, value),
        messages.Accept("", name, ballot, value, identity=True),
    ):
        with pytest.raises(InvalidRequest, match="created unasked"):
            await replica.accept(refused)
    assert (await replica.accept(messages.Accept("", name, ballot, plain))).verdict == Verdict.OK


async def test_a_ballot_minutes_ahead_of_the_clock_creates(ring: Ring) -> None:
    """No rule counts on the age of a create: whoever deletes data sees to it that every replica holds something."""
    client = ring.client(new_keys=Always())
    now_us = client._ring.clock.wall_ms() * 1000
    client._ring.shared.ballots.next(1, now_us + COUNTER_AHEAD_MAX_US // 2, now_us)
    outcome = await applied(client, put(b"one"))
    assert outcome.after is not None
    assert created(outcome.after)


async def test_where_a_clock_is_slow_changes_soon_ask_first_again(ring: Ring) -> None:
    """Its replica refuses creates, and each would make it lag."""
    client = ring.client()
    ring.third.inner._clock = FixedClock(1)
    for number in range(2 * NEW_OF_LATE):
        name = NAME._replace(key=b"key %d" % number)
        assert isinstance(await soon(client, put(b"one"), regardless=True, name=name), Outcome)
    creates = [request for request in ring.third.accepts if isinstance(request, messages.Create)]
    assert 0 < len(creates) < NEW_OF_LATE


async def test_a_task_creates_too(ring: Ring) -> None:
    client = ring.client()
    outcome = await client.change(NAME, put(b"one"), regardless=True)
    assert outcome.before is None
    assert prepares(ring) == 0
    await asyncio.sleep(0.01)
    second = await client.change(NAME, put(b"two"), regardless=True)
    assert second.before == outcome.after
    assert (await client.read(NAME)).value == second.after


# --- of data that is on disks already


class Coded:
    """A PUT of a coded object. ``seen``: how often its fragments were looked at after a promise."""

    def __init__(self, client: RingClient, grounds: Grounds | None, body: bytes = b"coded") -> None:
        self.client, self.grounds, self.change = client, grounds, Change(body)
        self.promised = asyncio.Event()
        self.seen = 0
        self.error: Exception | None = None

    def update(self, _value: Value | None) -> Change:
        self.promised.set()
        return self.change

    async def ready(self) -> None:
        await self.promised.wait()
        self.seen += 1
        if self.error is not None:
            raise self.error

    async def put(self) -> Outcome:
        unasked = Unasked(self.grounds, self.change) if self.grounds is not None else None
        return await self.client.change(NAME, self.update, ready=self.ready(), regardless=True, unasked=unasked)


async def test_a_coded_object_is_created_when_its_data_is_durable(ring: Ring) -> None:
    client = ring.client()
    coded = Coded(client, client.grounds(NAME))
    outcome = await coded.put()
    assert outcome.before is None
    assert outcome.after is not None
    assert created(outcome.after)
    assert (prepares(ring), coded.seen) == (0, 0)
    assert (await client.read(NAME)).value == outcome.after


async def test_where_a_create_of_coded_data_is_refused_the_data_is_seen_after_a_promise(ring: Ring) -> None:
    client = ring.client(new_keys=Always())
    first = await client.change(NAME, put(b"one"))
    await asyncio.sleep(0.01)
    coded = Coded(client, client.grounds(NAME))
    outcome = await coded.put()
    assert outcome.before == first.after
    assert coded.seen == 1
    assert prepares(ring) > 0


async def test_coded_data_has_no_grounds_where_a_create_would_be_in_vain(ring: Ring) -> None:
    client = ring.client()
    assert client.grounds(NAME._replace(table=Table.UPLOAD)) is None
    ring.first.stuck.add("accept")
    ring.second.stuck.add("accept")
    told = begun(client, put(b"one"))
    assert client.grounds(NAME) is None, "another change of this process is under way"
    ring.first.stuck.clear()
    ring.second.stuck.clear()
    assert isinstance(await told, Outcome)
    for number in range(NEW_OF_LATE):
        await applied(client, put(b"again %d" % number))
    assert client.grounds(NAME) is None, "keys are overwritten here"


async def test_coded_overwrites_soon_ask_for_a_promise_first(ring: Ring) -> None:
    client = ring.client()
    await client.change(NAME, put(b"one"))
    tried = 0
    for _ in range(NEW_OF_LATE):
        await asyncio.sleep(0.01)
        coded = Coded(client, client.grounds(NAME))
        tried += coded.grounds is not None
        assert (await coded.put()).before is not None
        assert coded.seen == 1
    assert 0 < tried < NEW_OF_LATE // 2


async def test_grounds_of_an_earlier_layout_create_nothing(ring: Ring) -> None:
    client = ring.client()
    grounds = client.grounds(NAME)
    assert grounds is not None
    earlier = grounds._replace(ballot=grounds.ballot._replace(epoch=grounds.ballot.epoch - 1))
    coded = Coded(client, earlier)
    outcome = await coded.put()
    assert outcome.after is not None
    assert not created(outcome.after)
    assert coded.seen == 1


async def test_a_create_of_coded_data_has_the_ballot_and_the_floor_of_its_grounds(ring: Ring) -> None:
    """What this process has learned since the data was written does not count (rule 39)."""
    client = ring.client()
    grounds = client.grounds(NAME)
    assert grounds is not None
    floor, now_us = 5 * FLOOR_SEQUENCES, client._ring.clock.wall_ms() * 1000
    for disk in ("a0", "b0", "c0"):
        client._ring.shared.floors.note(NAME, floor, now_us, disk, grounds.ballot.epoch)
    assert client._ring.shared.grounds(NAME, client._ring.view(NAME), now_us).floor == floor
    outcome = await Coded(client, grounds).put()
    assert outcome.after is not None
    assert outcome.after.sequence == 1
    request = next(request for request in ring.first.accepts if isinstance(request, messages.Create))
    assert request.ballot == grounds.ballot


async def test_a_create_that_one_replica_took_leaves_the_outcome_open_when_its_data_is_gone(ring: Ring) -> None:
    """Whatever is wrong with the data: the create may be carried on."""
    client = ring.client(new_keys=Always())
    await client.change(NAME, put(b"one"))
    await asyncio.sleep(0.01)
    ring.third.away = True
    coded = Coded(client, client.grounds(NAME))
    coded.error = RuntimeError("its blocks were moved")
    with pytest.raises(OutcomeUnknown):
        await coded.put()


async def test_a_task_that_goes_away_leaves_its_turn(ring: Ring) -> None:
    client = ring.client()
    ring.first.stuck.add("accept")
    ring.second.stuck.add("accept")
    task = asyncio.create_task(client.change(NAME, put(b"one"), regardless=True))
    await asyncio.sleep(0.005)
    task.cancel()
    await asyncio.wait((task,))
    assert task.cancelled()
    assert not client._ring.deadlines._ends
    ring.first.stuck.clear()
    ring.second.stuck.clear()
    assert isinstance(await client.change(NAME, put(b"two")), Outcome)


async def test_who_was_in_the_way_of_a_create_is_not_in_the_way_again(ring: Ring) -> None:
    client = ring.client()
    for replica in ring.replicas.values():
        await replica.inner.prepare(
            messages.Prepare(replica.inner.disk, NAME, Ballot(1, later_us(), "other", b"12345678"))
        )
    assert (await applied(client, put(b"one"))).before is None
    assert prepares(ring) == 2


async def test_replicas_of_this_process_are_all_asked_before_what_they_say_is_looked_at(
    ring: Ring, monkeypatch: pytest.MonkeyPatch
) -> None:
    ring.replica = lambda disk: ring.replicas[disk].inner  # type: ignore[method-assign]
    client = ring.client(new_keys=Always())
    first = await client.change(NAME, put(b"one"))
    await asyncio.sleep(0.01)
    asked: list[str] = []
    begin, promise = LocalReplica.try_accept, LocalReplica.try_prepare

    def accepting(self: LocalReplica, request: messages.Accept, *more: Any, **options: Any) -> bool:
        asked.append(type(request).__name__)
        return begin(self, request, *more, **options)

    def promising(self: LocalReplica, request: messages.Prepare) -> messages.PrepareReply | None:
        asked.append("Prepare")
        return promise(self, request)

    monkeypatch.setattr(LocalReplica, "try_accept", accepting)
    monkeypatch.setattr(LocalReplica, "try_prepare", promising)
    assert (await applied(client, put(b"two"))).before == first.after
    assert asked == ["Create"] * 3 + ["Prepare"] * 2 + ["Accept"] * 3


async def test_a_create_is_not_abandoned_because_disks_are_slow_while_a_node_is_away(ring: Ring) -> None:
    client = ring.client()
    ring.third.away = True
    ring.first.gate = ring.second.gate = asyncio.Event()
    told = begun(client, put(b"one"))
    await asyncio.sleep(0.05)  # well beyond the hedge
    ring.first.gate.set()
    outcome = await asyncio.wait_for(told, GUARD_S)
    assert isinstance(outcome, Outcome)
    assert outcome.before is None
    assert prepares(ring) == 0


async def test_a_refusal_that_comes_late_is_acted_upon_at_once(ring: Ring) -> None:
    client = ring.client(new_keys=Always())
    await client.change(NAME, put(b"one"))
    await asyncio.sleep(0.01)
    ring.first.stuck.add("accept")
    ring.second.stuck.add("accept")
    ring.third.gate = asyncio.Event()
    told = begun(client, put(b"two"))
    await asyncio.sleep(0.05)
    ring.first.stuck.clear()
    ring.second.stuck.clear()
    ring.third.gate.set()
    outcome = await asyncio.wait_for(told, 1)
    assert isinstance(outcome, Outcome)
    assert outcome.before is not None


async def test_a_mistake_is_told_to_who_waits(ring: Ring) -> None:
    client = ring.client()

    def mistaken(_disks: frozenset[str]) -> bool:
        raise RuntimeError("a mistake")

    small = replace(COPIES, enough=mistaken)
    assert isinstance(
        await asyncio.wait_for(begun(client, lambda _: Change(b"one", payload=b"D" * 16), small), 2), RuntimeError
    )
    assert not client._ring.deadlines._ends
    assert not client._queue._turns._waiting
    with pytest.raises(RuntimeError):
        await client.change(
            NAME._replace(key=b"another"), lambda _: Change(b"one", payload=b"D" * 16), small=small, regardless=True
        )

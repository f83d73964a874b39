"""What becomes of a create that lies above other values: what a proposer goes on from, and what the record of a key
with versions, events or loans becomes.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from msgspec.structs import replace

from storaged.errors import ServiceUnavailable
from storaged.meta import messages
from storaged.meta.client import RingClient
from storaged.meta.consensus.change import (
    STRAGGLERS_S,
    SYSTEM_STRAGGLERS_S,
    THIRD_REPLICA_TRIES,
    Shared,
    Wanted,
)
from storaged.meta.consensus.looks import Held, Look, moved_on
from storaged.meta.consensus.overtaking import Overtaking, Placed
from storaged.meta.consensus.proposer import HONEST_SEQUENCE_MAX, Proposer
from storaged.meta.consensus.quorums import Quorum, View
from storaged.meta.consensus.register import RULES, Ballots, Lineage, Standing, Verdict, created, taken_by_create
from storaged.meta.consensus.rounds import Found
from storaged.meta.consensus.states import ACCEPTING, CARRYING, GATHERING, REFRESHING, RETRYING
from storaged.meta.messages import PrepareReply
from storaged.meta.names import SEQUENCE_MAX, ZERO_BALLOT, Ballot, Change, RegisterName, Value, Visibility, object_name
from storaged.objects.code.adding import overtake
from storaged.objects.code.history import Bounds, Draft, Entry, Shelf
from storaged.objects.code.versions import decode_record, record_change
from storaged.objects.pending_events import PendingEvent
from storaged.objects.records import (
    Kept,
    Loan,
    Lock,
    ObjectRecord,
    PartEntry,
    Version,
    sharing_of,
)
from storaged.objects.sharing import Arrival, Borrower
from tests.doubles.layouts import KnownLayouts, layout_of
from tests.worlds.ring_client import MemoryReplicas, clock_of, ring_client

GROUP = Quorum(("a", "b", "c"))
NAME: RegisterName = object_name(b"b" * 16, b"\x03", b"key")


def at(counter: int) -> Ballot:
    return Ballot(1, counter, "n", b"incarnat")


def create(counter: int, body: bytes = b"new") -> Value:
    return Lineage(b"c" * 14).create(Change(body), at(counter))


def other(sequence: int, body: bytes = b"old") -> Value:
    return Value(sequence, b"%016d" % sequence, Visibility.LIVE, body)


def kept(create: Value, below: Value) -> Value | None:
    """Values that begin so have a history; to one in which it does not find its place a create can't be applied."""
    if below.body.startswith(b"full"):
        return None
    return replace(create, body=below.body + b"+" + create.body) if below.body.startswith(b"many") else create


def placed(reported: dict[str, tuple[int, Value | None]], lost_at: int = 0, **more: Any) -> Placed:
    promises = {disk: _promise(counter, value) for disk, (counter, value) in reported.items()}
    newest = max(promises.values(), key=lambda reply: reply.accepted)
    known = Overtaking(GROUP, promises, at(lost_at) if lost_at else None, RULES, kept)
    return known._replace(**more).placed(Found(newest.accepted, newest.value, False))


def _promise(counter: int, value: Value | None) -> PrepareReply:
    return PrepareReply(Verdict.OK, at(99), at(counter) if value is not None else ZERO_BALLOT, value)


# --- pure


def test_a_create_is_recognised_by_its_ballot() -> None:
    assert created(create(5))
    assert taken_by_create(at(5), create(5))
    assert not taken_by_create(at(6), create(5)), "a proposer has carried it on"
    assert not taken_by_create(at(5), other(1))
    assert not taken_by_create(at(5), replace(create(5), sequence=2))
    assert not taken_by_create(at(5), None)


def test_a_create_follows_what_has_no_history() -> None:
    assert placed({"a": (5, create(5)), "b": (4, other(7))}) == Placed(
        Found(at(5), replace(create(5), sequence=8), False)
    )


def test_a_create_is_applied_to_a_history_while_a_replica_is_silent() -> None:
    found, in_doubt = placed({"a": (5, create(5)), "b": (4, other(7, b"many"))})
    assert found == Found(at(5), replace(create(5, b"many+new"), sequence=8, operation=create(5).operation), False)
    assert in_doubt


def test_a_create_that_one_of_three_has_is_dropped_above_a_history() -> None:
    many = other(7, b"many")
    everyone = {"a": (5, create(5)), "b": (4, many), "c": (3, other(6, b"many"))}
    assert placed(everyone) == Placed(Found(at(4), many, False))
    assert placed(everyone, may_drop=False).in_doubt


def test_a_create_that_two_of_three_may_have_is_not_dropped() -> None:
    assert placed({"a": (5, create(5)), "b": (4, other(7, b"many")), "c": (5, create(5))}).in_doubt


def test_a_create_that_a_quorum_has_refused_is_dropped_by_its_own_proposer() -> None:
    many = other(7, b"many")
    assert placed({"a": (5, create(5)), "b": (4, many)}, lost_at=5) == Placed(Found(at(4), many, False))


def test_creates_between_are_dropped_or_overwritten_too() -> None:
    many = other(7, b"many")
    both: dict[str, tuple[int, Value | None]] = {"a": (6, create(6)), "b": (4, many), "c": (5, create(5, b"first"))}
    assert placed(both) == Placed(Found(at(4), many, False))
    found, in_doubt = placed(both, may_drop=False)
    assert found is not None
    assert found.value is not None
    assert (found.value.body, found.value.sequence, in_doubt) == (b"many+new", 8, True)


def test_nothing_is_concluded_where_a_create_cannot_be_applied() -> None:
    assert placed({"a": (5, create(5)), "b": (4, other(7, b"full"))}) == Placed(None, True)


def test_nothing_is_applied_to_what_lies_below_a_create_that_was_carried_on() -> None:
    """A quorum has promised its ballot, and had nothing newer: so what lies below was not chosen, and its data may be
    gone."""
    assert placed({"a": (6, create(5)), "b": (4, other(7, b"many"))}) == Placed(
        Found(at(6), replace(create(5), sequence=8), False)
    )


def test_a_create_above_a_floor_is_applied_with_a_sequence_above_it() -> None:
    above = Lineage(b"c" * 14).create(Change(b"new"), at(5), 1 << 20)
    found, _ = placed({"a": (5, above), "b": (4, other(7, b"many"))})
    assert found is not None
    assert found.value is not None
    assert found.value.sequence == (1 << 20) + 1
    assert not taken_by_create(at(6), found.value)


def test_the_newest_value_below_is_the_one_that_counts() -> None:
    """Not the one with the highest sequence: that may be one that was never chosen."""
    found, _ = placed({"a": (5, create(5)), "b": (4, other(7, b"many")), "c": (3, other(9, b"full"))}, may_drop=False)
    assert found is not None
    assert found.value is not None
    assert (found.value.body, found.value.sequence) == (b"many+new", 10)


def test_a_create_that_a_majority_has_taken_is_no_round() -> None:
    """A proposer may find it at one replica alone, and apply it to what a third one has from before."""
    nothing = Held(ZERO_BALLOT, None)
    first = Look(GROUP, {"a": nothing, "b": nothing, "c": Held(at(4), other(1))})
    taken, below = Held(at(5), create(5)), Held(at(4), other(1))
    assert moved_on(first, Look(GROUP, {"a": taken, "b": taken, "c": below})) is None
    carried = Held(at(6), create(5))
    assert moved_on(first, Look(GROUP, {"a": carried, "b": carried, "c": below})) == carried
    first = Look(GROUP, {"a": nothing, "b": nothing, "c": nothing})
    second = Look(GROUP, {"a": taken, "b": taken, "c": taken})
    assert moved_on(first, second, everywhere=True) == moved_on(first, second) == taken


def test_an_attempt_is_not_over_because_a_create_was_chosen_beside_it() -> None:
    """A proposer may still apply the create to it."""
    lineage = Lineage(b"w" * 14)
    attempt = lineage.attempt(None, Change(b"old"))
    assert attempt.sequence == create(5).sequence
    assert lineage.judge(create(5), at(5), True) is Standing.CLEAR
    assert lineage.open
    assert lineage.judge(create(5), at(6), True) is Standing.CLEAR
    assert not lineage.open, "a round has carried it on"


# --- the proposer


class Machine:
    """A change that appends a mark, at replicas whose answers the test gives."""

    def __init__(self, **wanted: Any) -> None:
        counts = dict.fromkeys(("preempted", "unknown", "unavailable", "identity_rounds"), 0)
        shared = Shared(
            Ballots("n", lambda: b"incarnat"), RULES, counts, overtake=lambda _name, create, below: kept(create, below)
        )
        update = (lambda _value: None) if wanted else _append
        self.machine = Proposer(shared, Wanted(NAME, update, **wanted), Lineage(b"m" * 14))
        self.begin()

    def begin(self) -> None:
        self.machine.begin(View.of(1, GROUP.disks), 1_000)

    def promise(self, disk: str, counter: int, value: Value | None) -> None:
        self.machine.promised(self.machine.turn, disk, _promise(counter, value))

    def refuse(self, disk: str) -> None:
        self.machine.promised(self.machine.turn, disk, PrepareReply(Verdict.PREEMPTED, at(2_000)))

    def create_above_versions(self) -> None:
        self.promise("a", 5, create(5))
        self.promise("b", 4, other(7, b"many"))

    @property
    def proposed(self) -> bytes:
        assert self.machine.state is ACCEPTING
        assert isinstance(self.machine.request, messages.Accept)
        return self.machine.request.value.body


def _append(value: Value | None) -> Change:
    assert value is not None
    return Change(value.body + b"!", payload=value.payload)


def test_a_proposer_waits_longer_for_the_third_replica_before_it_applies_a_create() -> None:
    change = Machine()
    change.create_above_versions()
    assert (change.machine.state, change.machine.gather_s) == (GATHERING, STRAGGLERS_S)
    change.machine.waited()
    assert (change.machine.state, change.machine.gather_s) == (GATHERING, SYSTEM_STRAGGLERS_S)
    change.machine.waited()
    assert change.proposed == b"many+new!"


def test_a_proposer_drops_a_create_when_the_third_replica_answers() -> None:
    change = Machine()
    change.create_above_versions()
    change.machine.waited()
    change.promise("c", 3, other(6, b"many"))
    assert change.proposed == b"many!"


def test_a_proposer_asks_a_third_replica_again_that_has_promised_more() -> None:
    change = Machine()
    tries = 0
    while change.machine.state is not ACCEPTING:
        change.create_above_versions()
        change.refuse("c")
        if change.machine.state is RETRYING:
            tries += 1
            change.begin()
    assert tries == THIRD_REPLICA_TRIES
    assert change.proposed == b"many+new!"


def test_a_create_is_not_dropped_for_a_record_whose_copy_is_missing() -> None:
    change = Machine()
    payload = b"c" * 16
    change.promise("a", 5, Lineage(b"c" * 14).create(Change(b"new", payload=payload), at(5)))
    change.promise("b", 4, replace(other(7, b"many"), payload=b"v" * 16))
    change.promise("c", 3, other(6, b"many"))
    assert (change.machine.state, change.machine.carry) == (CARRYING, b"v" * 16)
    change.machine.carried(())
    assert (change.machine.state, change.machine.carry) == (CARRYING, payload)
    change.machine.carried([(b"", ())] * 3)
    assert change.proposed == b"many+new!"


FAR = replace(other(6), sequence=HONEST_SEQUENCE_MAX + 1)
"""No number of writes comes near this sequence: a replica that reports it lies."""


@pytest.mark.parametrize("order", ["abc", "acb", "cab", "cba"])
@pytest.mark.parametrize("ballot", [3, 6])
def test_a_replica_that_lies_uses_up_no_sequences_beside_one_that_has_missed_a_write(order: str, ballot: int) -> None:
    for missed, body in (((5, create(5)), b"new!"), ((2, other(3)), b"old!")):
        held: dict[str, tuple[int, Value]] = {"a": missed, "b": (4, other(7)), "c": (ballot, FAR)}
        change = Machine()
        for disk in order:
            change.promise(disk, *held[disk])
        if change.machine.state is not ACCEPTING:
            change.machine.waited()
        assert change.proposed == body
        assert change.machine.request.value.sequence in (8, 9)  # type: ignore[union-attr]


def test_where_another_replica_is_away_nothing_goes_on_from_a_sequence_that_no_writes_reach() -> None:
    change = Machine()
    for _ in range(2):
        change.promise("c", 6, FAR)
        change.promise("b", 4, other(7))
        change.machine.promised(change.machine.turn, "a", None)
        assert change.machine.state in (RETRYING, REFRESHING)
        if change.machine.state is REFRESHING:
            change.machine.refreshed(False)
            break
        change.begin()
    assert isinstance(change.machine.error, ServiceUnavailable)


def test_what_a_quorum_reports_counts_whatever_its_sequence_and_a_third_one_leads_no_further() -> None:
    change = Machine()
    end = replace(FAR, sequence=SEQUENCE_MAX)
    change.promise("c", 3, end)
    change.promise("b", 4, FAR)
    change.machine.waited()
    assert change.machine.request.value.sequence == FAR.sequence + 1  # type: ignore[union-attr]
    change = Machine()
    change.promise("a", 4, replace(FAR, sequence=HONEST_SEQUENCE_MAX))
    change.promise("b", 3, other(7))
    change.machine.waited()
    assert change.machine.request.value.sequence == FAR.sequence  # type: ignore[union-attr]


def test_a_create_that_a_quorum_has_taken_goes_on_alone() -> None:
    change = Machine(settling=True, commit=True, thorough=True)
    change.promise("a", 5, create(5))
    change.promise("b", 5, create(5))
    change.promise("c", 4, other(7, b"many"))
    assert change.proposed == b"new"


# --- records


def version(name: str, data_id: bytes) -> Version:
    part = PartEntry(1, data_id, 5, b"h" * 64, 2, "2+1", ())
    return Version(name, 1, 5, "owner", 1, data_id, b"", False, b"", b"", (part,))


NEW = version("null", b"n" * 16)
CREATE = Value(1, b"o" * 16, Visibility.LIVE, record_change(ObjectRecord((NEW,))).body, b"n" * 16)


def draft(*entries: Entry, bounds: Bounds | None = None) -> Draft:
    made = Draft(ObjectRecord(()), Shelf(), bounds or Bounds())
    for entry in entries:
        made.add(entry)
    return made


def value_of(made: Draft, payload: bytes = b"") -> Value:
    change = record_change(made.record(), payload)
    return Value(9, b"v" * 16, change.visibility, change.body, change.payload)


def entry(ordinal: int, name: str = "v", lock: Lock | None = None) -> Entry:
    return Entry(Kept(ordinal, lock), version(name, b"%016d" % ordinal))


def names(value: Value | None) -> list[tuple[int, bytes]]:
    record = decode_record(value)
    assert record.history is not None
    return [(one.ordinal, its.context_id) for one, its in zip(record.history.kept, record.versions, strict=True)]


def test_versions_stay_and_the_null_version_is_replaced() -> None:
    below = value_of(draft(entry(3), entry(4, "null"), entry(5, lock=Lock("COMPLIANCE", 1 << 60))), b"%016d" % 4)
    after = overtake(NAME, CREATE, below)
    assert after is not None
    assert names(after) == [(10, NEW.context_id), (5, b"%016d" % 5), (3, b"%016d" % 3)]
    assert (after.operation, after.payload, after.visibility) == (CREATE.operation, CREATE.payload, Visibility.LIVE)


def test_a_key_whose_current_version_is_a_delete_marker_keeps_its_versions() -> None:
    marker = entry(5)._replace(version=replace(version("v", b"m" * 16), delete_marker=True, parts=()))
    below = value_of(draft(entry(3), marker))
    assert below.visibility == Visibility.HIDDEN
    assert names(overtake(NAME, CREATE, below)) == [(10, NEW.context_id), (5, b"m" * 16), (3, b"%016d" % 3)]


def test_a_full_record_gets_one_version_more_and_no_page() -> None:
    below = value_of(draft(*(entry(ordinal) for ordinal in range(1, 17))))
    assert len(names(overtake(NAME, CREATE, below))) == 17


def test_a_locked_null_version_is_not_replaced() -> None:
    for lock in (Lock(hold=True), Lock("GOVERNANCE", 1 << 60)):
        assert overtake(NAME, CREATE, value_of(draft(entry(3, "null", lock), entry(4)))) is None


def test_a_null_version_on_a_page_is_not_replaced() -> None:
    few = Bounds(versions_max=2, leaf_versions=1)
    below = value_of(draft(entry(3, "null"), entry(4), entry(5), bounds=few))
    assert overtake(NAME, CREATE, below) is None
    below = value_of(draft(entry(3), entry(4, "null"), entry(5), bounds=few))
    after = overtake(NAME, CREATE, below)
    assert names(after) == [(10, NEW.context_id), (5, b"%016d" % 5)]
    assert decode_record(after).history.levels == decode_record(below).history.levels  # type: ignore[union-attr]


def test_events_loans_and_arrivals_of_a_key_without_versioning_stay() -> None:
    made = draft(Entry(Kept(0), version("null", b"d" * 16)))
    made.outbox = (PendingEvent(b"e" * 16, 1, b"sealed"),)
    made.loans = (Loan(version("null", b"d" * 16).parts[0], (Borrower(b"i" * 16, b"b", 1),)),)
    made.arrivals = (Arrival(b"r" * 16, b"old"),)
    record = decode_record(overtake(NAME, CREATE, value_of(made)))
    assert [one.context_id for one in record.versions] == [NEW.context_id]
    assert record.history is not None
    assert record.history.outbox == made.outbox
    assert (sharing_of(record).loans, sharing_of(record).arrivals) == (made.loans, made.arrivals)


def test_what_has_no_history_is_replaced() -> None:
    for below in (
        Value(9, b"v" * 16, Visibility.TOMBSTONE, b""),
        value_of(draft(Entry(Kept(0), version("null", b"d" * 16)))),
    ):
        assert overtake(NAME, CREATE, below) is CREATE


def test_what_cannot_be_read_is_not_replaced() -> None:
    assert overtake(NAME, CREATE, Value(9, b"v" * 16, Visibility.LIVE, b"\xc1")) is None
    assert overtake(NAME, replace(CREATE, body=b"\xc1"), value_of(draft(entry(3), entry(4)))) is None
    assert overtake(NAME, value_of(draft(entry(3), entry(4))), value_of(draft(entry(3), entry(4)))) is None


# --- replicas


class World:
    """Three replicas. The last one has missed all, and has taken a create above the versions of the two others."""

    def __init__(self) -> None:
        layouts = KnownLayouts(layout_of((1, 1, 1, 1)))
        self.ring = MemoryReplicas(disk.id for disk in layouts.current.disks)
        self.client: RingClient = ring_client(layouts, self.ring, node="gw", jitter=lambda: 0.5, overtake=overtake)
        self.state = layouts.partition(NAME.partition)
        self.first, self.second, self.last = self.state.present

    async def store(self, made: Draft, at_first: Draft | None = None) -> None:
        """``at_first``: a further change that the first replica alone has taken."""
        change = record_change(made.record())
        self.ring.away = {self.last}
        await self.client.change(NAME, lambda _before: change)
        await asyncio.sleep(0.01)
        if at_first is not None:
            value = Value(2, b"interrupted".ljust(16), Visibility.LIVE, record_change(at_first.record()).body)
            await self.ask(self.first, messages.Accept(self.first, NAME, self.ballot(), value))
        await self.ask(self.last, messages.Create(self.last, NAME, self.ballot(1_000_000), self.create()))
        self.ring.away = set()

    def create(self) -> Value:
        change = record_change(ObjectRecord((NEW,)))
        return Lineage(b"c" * 14).create(change, self.ballot(1_000_000))

    async def ask(self, disk: str, request: messages.Accept) -> None:
        assert (await self.ring.replicas[disk].accept(request)).verdict == Verdict.OK

    def ballot(self, ahead_us: int = 0) -> Ballot:
        now_us = 1000 * clock_of(asyncio.get_running_loop()).wall_ms()
        return Ballot(self.state.epoch, now_us + ahead_us, "other", b"")

    async def read(self) -> list[bytes]:
        return [name for _, name in names((await self.client.read(NAME)).value)]


@pytest.fixture
async def world() -> AsyncIterator[World]:
    world = World()
    yield world
    await world.client.close()


VERSIONS = draft(entry(3), entry(4))
IDS = [b"%016d" % 4, b"%016d" % 3]


@pytest.mark.virtual_time
async def test_a_create_that_one_replica_took_leaves_the_versions_of_the_others(world: World) -> None:
    await world.store(VERSIONS)
    world.ring.away = {world.second}
    assert await world.read() == [NEW.context_id, *IDS]
    world.ring.away = {world.first}
    assert await world.read() == [NEW.context_id, *IDS]
    world.ring.away = {world.last}
    assert await world.read() == [NEW.context_id, *IDS]


@pytest.mark.virtual_time
async def test_where_all_replicas_answer_a_create_that_one_has_is_dropped(world: World) -> None:
    await world.store(VERSIONS, draft(entry(3), entry(4), entry(5)))
    assert await world.read() in (IDS, [b"%016d" % 5, *IDS])


@pytest.mark.virtual_time
async def test_where_a_create_cannot_be_applied_nothing_is_changed_until_the_third_replica_answers(
    world: World,
) -> None:
    locked = draft(entry(3, "null", Lock("COMPLIANCE", 1 << 60)), entry(4))
    await world.store(locked)
    world.ring.away = {world.second}
    before = [store.get(NAME) for store in world.ring.stores.values()]
    with pytest.raises(ServiceUnavailable, match="the third"):
        await world.read()
    with pytest.raises(ServiceUnavailable, match="the third"):
        await world.client.change(NAME, lambda _value: Change(b""))
    assert before == [store.get(NAME) for store in world.ring.stores.values()]
    world.ring.away = set()
    assert await world.read() == IDS
    await world.client.settle(NAME)  # as repair does, for the replica that lags
    await asyncio.sleep(0.01)
    world.ring.away = {world.second}
    assert await world.read() == IDS


@pytest.mark.virtual_time
async def test_a_put_that_was_a_create_adds_its_version(world: World) -> None:
    """Its gateway does not know of the versions, and learns of them from no replica."""

    class Always:
        def likely(self, _name: RegisterName) -> bool:
            return True

        def saw(self, _name: RegisterName, _new: bool) -> None:
            pass

    await world.store(VERSIONS)
    replica: Any = world.ring.stores[world.last]
    world.ring.stores.pop(world.last)
    world.ring.add(world.last)  # it has nothing again
    assert replica is not world.ring.stores[world.last]
    world.ring.away = {world.second}
    world.client._queue._new_keys = Always()  # type: ignore[assignment]
    change = record_change(ObjectRecord((NEW,)))
    outcome = await world.client.change(NAME, lambda _value: change, regardless=True)
    assert [name for _, name in names(outcome.after)] == [NEW.context_id, *IDS]
    assert await world.read() == [NEW.context_id, *IDS]


@pytest.mark.virtual_time
async def test_who_wrote_what_a_create_was_applied_to_learns_that_its_outcome_is_unknown(world: World) -> None:
    """Its change was interrupted, a create was chosen at the two other replicas, and was applied to it."""
    lineage = Lineage(b"w" * 14)
    attempt = lineage.attempt(None, record_change(VERSIONS.record()))
    lowest = world.ballot()
    await world.ask(world.first, messages.Accept(world.first, NAME, lowest, attempt))
    for disk in (world.second, world.last):
        await world.ask(disk, messages.Create(disk, NAME, world.ballot(1_000_000), world.create()))
    assert lineage.judge(world.create(), world.ballot(1_000_000), True) is Standing.CLEAR
    world.ring.away = {world.second}
    after = (await world.client.read(NAME)).value
    assert [name for _, name in names(after)] == [NEW.context_id, *IDS]
    assert lineage.judge(after, world.ballot(2_000_000), True) is Standing.UNKNOWN

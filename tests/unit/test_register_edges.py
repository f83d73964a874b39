"""Where the rules of the register turn: what one reply, one sequence or one counter more changes in a conclusion."""

from __future__ import annotations

from collections.abc import Sequence

from storaged.cluster.layout import SYSTEM_PARTITION
from storaged.cluster.partitions import epoch_of
from storaged.meta.consensus.acceptor import AcceptorState
from storaged.meta.consensus.change import Shared, Wanted
from storaged.meta.consensus.floors import sequence_of
from storaged.meta.consensus.overtaking import overtaken
from storaged.meta.consensus.proposer import Proposer
from storaged.meta.consensus.quorums import Quorum, View
from storaged.meta.consensus.reader import DONE, FAILED, HEARING, STALE, WAITING, Reader
from storaged.meta.consensus.register import (
    ATTEMPTS_MAX,
    CALL_BYTES,
    COUNTER_AHEAD_MAX_US,
    NEVER,
    RULES,
    Ballots,
    Lineage,
    Standing,
    Verdict,
    credible,
)
from storaged.meta.consensus.register import created as is_created
from storaged.meta.consensus.rounds import RESTARTS_US, CreateRound, Found, PrepareRound, Rivals
from storaged.meta.consensus.states import REFRESHING
from storaged.meta.messages import AcceptReply, PrepareReply, ReadReply
from storaged.meta.names import ZERO_BALLOT, Ballot, Change, RegisterName, Table, Value, Visibility

GROUP = Quorum(("a", "b", "c"))
FIVE = Quorum(("a", "b", "c", "d", "e"))
OBJECT = RegisterName(Table.OBJECT, b"s" * 16, 3, b"key")
SYSTEM = RegisterName(Table.SYSTEM, bytes(16), 0, b"key")
HOUR_US = COUNTER_AHEAD_MAX_US
NOW_US = 10**15


def made(counter: int, sequence: int, body: bytes = b"v") -> tuple[Ballot, Value]:
    return Ballot(1, counter, "n", b"incarnat"), Value(sequence, b"%016d" % counter, Visibility.LIVE, body)


def created(counter: int) -> tuple[Ballot, Value]:
    return Ballot(1, counter, "n", b"incarnat"), Value(1, b"c" * CALL_BYTES + bytes(2), Visibility.LIVE, b"new")


def test_verdicts_are_numbers_on_the_wire() -> None:
    """New ones come after them."""
    names = ["OK", "PREEMPTED", "EPOCH", "FENCED", "CONFLICT", "DAMAGED", "UNSTORED", "HELD", "AHEAD", "NEWER", "FULL"]
    assert {verdict.name: verdict.value for verdict in Verdict} == dict(zip(names, range(len(names)), strict=True))


def test_sequences_of_floors_and_creates_are_the_same_in_all_versions() -> None:
    """Replicas of one range work them out by themselves, and rows have them."""
    assert sequence_of(Ballot(0, (5 << 20) + 7, "", b"")) == 5 << 16
    operation = b"c" * CALL_BYTES + bytes(2)
    made_of = {sequence: Value(sequence, operation, Visibility.LIVE, b"") for sequence in (1, 2, 1 << 15, 65_537)}
    assert [sequence for sequence, value in made_of.items() if is_created(value)] == [1, 65_537]


def test_the_last_attempt_of_a_change_has_an_operation_id_too() -> None:
    own = Lineage(b"c" * CALL_BYTES, _count=ATTEMPTS_MAX - 1)
    assert not own.exhausted
    assert len(own.attempt(None, Change(b"x")).operation) == 16
    assert own.exhausted


def test_a_create_begins_at_one_where_no_floor_is_known() -> None:
    own = Lineage(b"c" * CALL_BYTES)
    assert own.create(Change(b"x"), Ballot(1, 5, "n", b"incarnat")).sequence == 1
    assert own.lost_at() is None


# --- what a change of the system table goes on from


def test_of_all_that_may_descend_from_the_chosen_the_highest_sequence_leads() -> None:
    reported = dict(zip("abc", (made(3, 6), made(2, 5), made(1, 9)), strict=True))
    assert credible(GROUP, reported) == (*made(3, 6), False), "what only one reports below the others was not chosen"
    reported = dict(zip("abcde", (made(5, 7), made(4, 8), made(3, 9), made(2, 20), made(1, 30)), strict=True))
    assert credible(FIVE, reported) == (*made(3, 9), False), "a majority reports this ballot or a higher one"


def test_of_two_with_one_sequence_the_higher_ballot_leads() -> None:
    reported = {"a": made(2, 7), "b": made(3, 7), "c": made(1, 7)}
    assert credible(GROUP, reported) == (*made(3, 7), False)


# --- what a created value has overtaken


def test_only_a_created_value_has_overtaken_something_and_only_what_is_below_it() -> None:
    ballot, value = created(5)
    older, same, later = made(4, 3), made(5, 8), made(6, 9)
    assert overtaken([older, same, later], ballot, value) == older[1]
    assert overtaken([same, later], ballot, value) is None
    assert overtaken([older], *made(5, 4)) is None
    assert overtaken([older], ballot, None) is None


# --- ballots


def drawn(*lives: bytes) -> Ballots:
    left = list(lives) or [b"12345678"]
    return Ballots("n", lambda: left.pop(0))


def test_a_counter_beyond_all_clocks_leads_only_when_a_majority_names_it() -> None:
    far = NOW_US + HOUR_US + 1
    ballots = drawn()
    assert ballots.next(1, far, NOW_US).counter == NOW_US
    assert ballots.next(1, far - 1, NOW_US).counter == far, "this much a clock may be ahead"
    ballots = drawn()
    assert ballots.next(1, far, NOW_US, confirmed=True).counter == far + 1


def test_above_a_confirmed_counter_a_single_replica_leads_by_an_hour_at_most() -> None:
    far = NOW_US + 10 * HOUR_US
    ballots = drawn()
    ballots.next(1, far, NOW_US, confirmed=True)
    assert ballots.next(1, far + HOUR_US, NOW_US).counter == far + HOUR_US + 1
    ballots = drawn()
    ballots.next(1, far, NOW_US, confirmed=True)
    assert ballots.next(1, far + HOUR_US + 1, NOW_US).counter == far + 2


def test_after_the_clock_was_set_back_by_hours_counters_begin_anew_under_another_incarnation() -> None:
    ballots = drawn(b"life one", b"life two")
    assert ballots.next(1, 0, NOW_US + 3 * HOUR_US).incarnation == b"life one"
    again = ballots.next(1, 0, NOW_US)
    assert (again.counter, again.incarnation) == (NOW_US, b"life two")


def test_a_counter_that_a_clock_explains_is_in_the_way_by_itself_and_another_one_with_a_majority() -> None:
    rivals = Rivals(RULES)
    assert rivals.note("a", NOW_US + HOUR_US, NOW_US)
    assert rivals.above_for(GROUP) == (NOW_US + HOUR_US, False)
    far = NOW_US + 9 * HOUR_US
    assert not rivals.note("b", far, NOW_US)
    assert rivals.above_for(GROUP) == (NOW_US + HOUR_US, False)
    assert not rivals.note("c", far, NOW_US)
    assert rivals.above_for(GROUP) == (far, True)


def test_a_replica_that_was_restarted_is_in_the_way_a_little_above_what_a_majority_names() -> None:
    far = NOW_US + 9 * HOUR_US
    for restarted, above in ((far + RESTARTS_US, far + RESTARTS_US), (far + RESTARTS_US + 1, far)):
        rivals = Rivals(RULES)
        for disk, counter in zip("abc", (far, far, restarted), strict=True):
            rivals.note(disk, counter, NOW_US)
        assert rivals.above_for(GROUP) == (above, True)


# --- what becomes of earlier attempts


def test_without_attempts_a_value_says_nothing_and_never_written_is_no_later_value() -> None:
    own = Lineage(b"c" * CALL_BYTES)
    own.attempt(None, Change(b"x"))
    assert own.judge(None, ZERO_BALLOT, settled=True) is Standing.CLEAR
    assert own.open, "nothing was found at the attempt's own sequence"
    assert own.judge(NEVER, Ballot(1, 3, "n", b""), settled=True) is Standing.CLEAR
    assert own.open


def test_a_value_at_the_ballot_of_a_create_is_not_below_it() -> None:
    own = Lineage(b"c" * CALL_BYTES)
    ballot = Ballot(1, 5, "n", b"incarnat")
    own.create(Change(b"x"), ballot)
    later = made(9, 4)[1]
    assert own.judge(later, ballot._replace(counter=4), settled=False) is Standing.CLEAR
    assert own.judge(later, ballot, settled=False) is Standing.UNKNOWN


# --- rounds


def test_a_create_that_one_replica_refuses_for_good_may_still_be_chosen() -> None:
    creates, own = CreateRound(View(1, GROUP, ()), None), Lineage(b"c" * CALL_BYTES)
    own.create(Change(b"x"), Ballot(1, 5, "n", b"incarnat"))
    creates.add("a", AcceptReply(Verdict.HELD))
    creates.note_held(own)
    assert own.lost_at() is None
    creates.add("b", AcceptReply(Verdict.HELD))
    creates.note_held(own)
    assert own.lost_at() is not None
    assert own.open
    creates.add("c", AcceptReply(Verdict.HELD))
    creates.note_held(own)
    assert not own.open


def test_a_create_says_which_disks_have_taken_it() -> None:
    creates = CreateRound(View(1, GROUP, ()), None)
    assert creates.add("a", AcceptReply(Verdict.OK))
    assert not creates.add("b", AcceptReply(Verdict.PREEMPTED))
    assert not creates.chosen
    assert creates.add("c", AcceptReply(Verdict.OK))
    assert creates.chosen


def promise(ballot: Ballot, value: Value | None, *, copied: bool = True) -> PrepareReply:
    return PrepareReply(Verdict.OK, ballot, ballot, value, copied=copied)


def prepared(*replies: PrepareReply) -> PrepareRound:
    found = PrepareRound(GROUP)
    for disk, reply in zip("abc", replies, strict=False):
        found.add_late(disk, reply, True)
    return found


def test_the_same_value_under_two_ballots_is_not_settled() -> None:
    """A settling round writes a value again, under a ballot of its own. That one may have been cut short."""
    (low, value), (high, _) = made(1, 4), made(2, 4)
    for replies in ((promise(low, value), promise(high, value)), (promise(high, value), promise(low, value))):
        assert prepared(*replies).newest() == Found(high, value, False)


def test_what_a_quorum_has_below_a_newer_record_is_not_the_newest() -> None:
    (low, older), (high, newer) = made(1, 4), made(2, 5)
    found = prepared(promise(low, older), promise(low, older), promise(high, newer))
    assert found.newest() == Found(high, newer, False)
    assert found.chosen() == Found(low, older, True)


def test_what_a_quorum_has_with_its_copy_is_settled_although_a_third_replica_lacks_the_copy() -> None:
    ballot, value = made(2, 5)
    found = prepared(promise(ballot, value), promise(ballot, value, copied=False), promise(ballot, value))
    assert found.newest() == Found(ballot, value, True)


def test_of_two_values_under_one_ballot_the_one_that_a_quorum_holds_goes_on_unsettled_under_its_highest_ballot() -> (
    None
):
    (low, value), (high, other) = made(1, 4), made(2, 4, b"a lie")
    found = prepared(promise(low, value), promise(high, value), promise(high, other))
    assert found.undisputed(Found(high, other, False)) == Found(high, value, False)
    assert found.undisputed(Found(low, value, True)) == Found(low, value, True)
    found = prepared(promise(low, older := made(1, 3, b"older")[1]), promise(high, value), promise(high, other))
    assert older != value
    assert found.undisputed(Found(high, other, False)) is None
    five = PrepareRound(FIVE)
    for disk, (ballot, held) in zip(
        "abcde", ((low, value), (low, value), (high, value), (high, other), made(3, 5)), strict=True
    ):
        five.add_late(disk, promise(ballot, held), True)
    assert five.undisputed(Found(high, other, False)) == Found(high, value, False)


def test_replies_of_which_neither_kind_is_a_quorum_of_both_sets_are_the_end_of_a_round() -> None:
    """The doubted ones are a majority of the first set, and the others are one of the second set."""
    found = PrepareRound(Quorum(("a", "b", "c"), ("a", "b", "d")))
    for disk in "acb":
        assert not found.add(disk, promise(*made(1, 1)), doubted=disk in "ac")
    assert not found.lost, "the last one may be doubted too, or not"
    assert not found.add("d", promise(*made(1, 1)), doubted=False)
    assert found.lost


def test_a_create_that_a_later_step_refuses_looks_where_the_replicas_are() -> None:
    shared = Shared(Ballots("gw", lambda: b"12345678"), RULES, {"preempted": 0, "unavailable": 0})
    machine = Proposer(shared, Wanted(OBJECT, lambda _: Change(b"new")), Lineage(bytes(CALL_BYTES), RULES))
    machine.create(View.of(1, ("a", "b", "c")), Change(b"new"), NOW_US)
    for disk in "abc":
        machine.created(disk, AcceptReply(Verdict.EPOCH))
    assert machine.state is REFRESHING


# --- quorums and views


def test_two_of_five_are_no_majority() -> None:
    assert not FIVE.may_have_chosen({"a", "b"})
    assert FIVE.may_have_chosen({"a", "b", "e"})
    assert FIVE.vouched({"a": 9, "b": 9, "c": 7}) == 7


def test_half_of_what_is_left_of_a_set_is_no_majority() -> None:
    half = Quorum(("a", "b"))
    assert not half.may_have_chosen({"a"})
    assert half.vouched({"a": 9}) == 0


def test_lost_disks_keep_their_positions_and_are_in_no_quorum() -> None:
    view = View.of(1, ("a", "b", "c"), lost=("b",))
    assert view.quorum == Quorum(("a", "c"))
    assert list(view.by_disk(("first", "second", "third"))) == ["first", "third"]


def test_a_packed_name_of_the_system_table_has_the_epoch_of_its_partition() -> None:
    state = AcceptorState(ZERO_BALLOT, 1)
    state.raise_epoch_at(SYSTEM_PARTITION, epoch_of(2, 1))
    for name in (SYSTEM, OBJECT, OBJECT._replace(scope=bytes(16))):
        assert state.epoch_at_packed(name.pack()) == state.epoch_at(name)
    assert state.epoch_at(SYSTEM) > state.epoch_at(OBJECT)


# --- reads


def reader(name: RegisterName, *, doubts: Sequence[str] = ()) -> Reader:
    shared = Shared(Ballots("gw", lambda: b"12345678"), RULES, {}, doubts=lambda _name, disk, _value: disk in doubts)
    found = Reader(shared, True, name)
    found.begin(View.of(1, ("a", "b", "c")))
    return found


def told(reader: Reader, disk: str, pair: tuple[Ballot, Value | None], verdict: Verdict = Verdict.OK) -> bool:
    return reader.replied(reader.turn, disk, ReadReply(verdict, pair[0], b"", pair[1]))


def test_replicas_that_can_not_read_their_rows_follow_no_newer_layout() -> None:
    found = reader(OBJECT)
    told(found, "a", (ZERO_BALLOT, None), Verdict.DAMAGED)
    told(found, "b", (ZERO_BALLOT, None), Verdict.DAMAGED)
    assert found.state is FAILED
    found = reader(OBJECT)
    told(found, "a", (ZERO_BALLOT, None), Verdict.EPOCH)
    assert told(found, "b", (ZERO_BALLOT, None), Verdict.DAMAGED)
    assert found.state is STALE


def test_a_read_says_when_it_begins_to_wait_for_the_third_replica() -> None:
    found = reader(OBJECT)
    assert not told(found, "a", made(1, 1))
    assert found.state is HEARING
    assert told(found, "b", made(2, 2))
    assert found.state is WAITING


def test_a_value_that_no_gateway_wrote_counts_only_beside_a_majority_of_such() -> None:
    found = reader(SYSTEM, doubts=("a",))
    told(found, "a", made(9, 9))
    told(found, "b", made(1, 1))
    assert set(found.replies) == {"b"}
    assert told(found, "c", made(1, 1))
    assert found.state is DONE
    assert found.value == made(1, 1)[1]
    found = reader(SYSTEM, doubts=("a", "b", "c"))
    told(found, "a", made(9, 9))
    told(found, "b", made(1, 1))
    assert set(found.replies) == {"a", "b"}, "nothing better is to be had"
    told(found, "c", made(9, 9))
    assert found.value == made(9, 9)[1], "nor of the third one"

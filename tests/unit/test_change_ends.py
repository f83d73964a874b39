"""How an attempt of a change ends, by the answers of its replicas alone: with an error at once, or with another attempt
after a pause; and what is counted.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from storaged.errors import NoSuchBucket, OutcomeUnknown, ServiceUnavailable, StoragedError
from storaged.meta.consensus.change import (
    ALL_REPLICAS_TRIES,
    BACKOFF_FIRST_S,
    BACKOFF_MAX_S,
    STRAGGLERS_S,
    SYSTEM_STRAGGLERS_S,
    THIRD_REPLICA_TRIES,
    Shared,
    Wanted,
)
from storaged.meta.consensus.copies import highest_sequence, lagging
from storaged.meta.consensus.proposer import Proposer
from storaged.meta.consensus.quorums import Quorum, View
from storaged.meta.consensus.register import CALL_BYTES, RULES, Ballots, Lineage, Verdict
from storaged.meta.consensus.states import (
    ACCEPTING,
    CARRYING,
    CREATING,
    DONE,
    FAILED,
    GATHERING,
    PREPARING,
    REFRESHING,
    RETRYING,
    SYNCING,
)
from storaged.meta.messages import AcceptReply, PrepareReply
from storaged.meta.names import Ballot, Change, RegisterName, Table, Value, Visibility

NAME = RegisterName(Table.OBJECT, b"s" * 16, 3, b"key")
VIEW = View.of(1, ("a", "b", "c"))
NOW_US = 10**15
ABOVE = Ballot(1, NOW_US + 1000, "other", b"87654321")
COUNTS = ("preempted", "unknown", "unavailable", "identity_rounds")


class Machine(Proposer):
    """A change of this process's own. ``thorough``: not sparing."""

    __slots__ = ("counts",)

    def __init__(self, name: RegisterName = NAME, change: Change | None = Change(b"new"), **wanted: bool) -> None:  # noqa: B008
        self.counts = dict.fromkeys(COUNTS, 0)
        shared = Shared(Ballots("gw", lambda: b"12345678"), RULES, self.counts)
        super().__init__(shared, Wanted(name, lambda _: change, **wanted), Lineage(bytes(CALL_BYTES), RULES))

    def prepares(self, *replies: PrepareReply | None) -> bool:
        self.begin(VIEW, NOW_US)
        entered = [self.promised(self.turn, disk, reply) for disk, reply in zip("abc", replies, strict=False)]
        return any(entered)

    def accepts(self, *replies: AcceptReply | None) -> bool:
        turn = self.turn
        entered = [self.accepted(turn, disk, reply) for disk, reply in zip("abc", replies, strict=False)]
        return any(entered)


PROMISE = PrepareReply(Verdict.OK)
REFUSED = PrepareReply(Verdict.PREEMPTED, ABOVE)


def test_a_new_change_is_nothing_yet() -> None:
    machine = Machine()
    assert (machine.turn, machine.pause_s, machine.fenced, machine.sparing) == (0, 0.0, False, False)
    assert (machine.ahead, machine.by_create, machine.outcome, machine.error) == (False, False, None, None)


def test_without_a_majority_a_change_that_proposed_nothing_fails_unless_the_replicas_are_others_by_now() -> None:
    machine = Machine(thorough=True)
    assert machine.prepares(PROMISE, None, None)
    assert machine.state is REFRESHING
    assert machine.refreshed(newer=True)
    assert (machine.state, machine.pause_s) == (RETRYING, 0.0)
    assert machine.prepares(PROMISE, None, None)
    assert machine.state is FAILED, "it has looked once"
    machine = Machine(thorough=True)
    assert machine.prepares(PROMISE, None, None)
    assert machine.refreshed(newer=False)
    assert machine.state is FAILED
    assert isinstance(machine.error, ServiceUnavailable)
    assert machine.counts == {**dict.fromkeys(COUNTS, 0), "unavailable": 1}


def test_without_a_majority_a_change_that_may_be_applied_tries_again() -> None:
    machine = Machine(thorough=True)
    machine.prepares(PROMISE, PROMISE)
    assert machine.state is ACCEPTING
    assert machine.accepts(None, None)
    assert machine.state is RETRYING
    assert machine.prepares(PROMISE, None, None)
    assert machine.state is REFRESHING
    assert machine.refreshed(newer=False)
    assert machine.state is RETRYING
    assert machine.prepares(PROMISE, None, None)
    assert machine.state is RETRYING
    assert machine.expire()
    assert isinstance(machine.error, OutcomeUnknown)
    assert machine.counts == {**dict.fromkeys(COUNTS, 0), "unknown": 1}


def test_a_change_that_is_refused_by_a_later_step_learns_it_and_tries_again() -> None:
    machine = Machine()
    assert machine.prepares(PrepareReply(Verdict.EPOCH))
    assert machine.state is REFRESHING
    assert machine.refreshed(newer=False)
    assert machine.state is RETRYING
    assert machine.pause_s > 0
    machine.prepares(PROMISE, PROMISE)
    assert machine.accepts(AcceptReply(Verdict.EPOCH), AcceptReply(Verdict.EPOCH))
    assert machine.state is REFRESHING
    assert machine.expire()
    assert isinstance(machine.error, OutcomeUnknown)


def test_a_change_that_met_a_fence_says_so() -> None:
    machine = Machine(thorough=True)
    assert machine.prepares(PrepareReply(Verdict.FENCED), PrepareReply(Verdict.FENCED, final=True), None)
    assert machine.fenced
    assert isinstance(machine.error, NoSuchBucket)
    assert not machine.error.details


def test_a_sparing_attempt_is_followed_at_once_and_others_after_growing_pauses() -> None:
    machine = Machine()
    assert machine.prepares(None, None)
    assert (machine.state, machine.pause_s) == (RETRYING, 0.0)
    pauses = []
    for _ in range(12):
        machine.prepares(REFUSED, REFUSED)
        assert machine.state is RETRYING
        pauses.append(machine.pause_s)
    assert pauses[:3] == [BACKOFF_FIRST_S, 2 * BACKOFF_FIRST_S, 4 * BACKOFF_FIRST_S]
    assert pauses[-1] == BACKOFF_MAX_S


def test_a_sparing_attempt_that_was_pre_empted_is_followed_after_a_pause() -> None:
    machine = Machine()
    assert machine.prepares(REFUSED)
    assert (machine.state, machine.pause_s) == (RETRYING, BACKOFF_FIRST_S)
    assert machine.counts["preempted"] == 1
    machine.begin(VIEW, NOW_US)
    assert machine.ballot > ABOVE


@pytest.mark.parametrize("settling", [False, True])
def test_a_round_waits_for_the_third_replica_and_goes_on_when_it_has_answered(settling: bool) -> None:
    machine = Machine(settling=settling, commit=True, thorough=True)
    assert machine.prepares(PROMISE, PROMISE)
    assert machine.state is GATHERING
    assert machine.promised(machine.turn, "c", PROMISE)
    assert machine.state is ACCEPTING
    assert not machine.promised(machine.turn - 1, "c", PROMISE)


def test_an_answer_that_comes_after_the_wait_is_over_enters_no_state() -> None:
    machine = Machine(commit=True, settling=True, thorough=True)
    machine.prepares(PROMISE, PROMISE)
    turn = machine.turn
    assert machine.waited()
    assert machine.state is ACCEPTING
    assert not machine.promised(turn, "c", PROMISE)


def test_when_answers_take_long_a_round_that_was_refused_begins_again() -> None:
    machine = Machine(thorough=True)
    machine.prepares(REFUSED)
    assert machine.state is PREPARING
    assert machine.on_slow()
    assert machine.state is RETRYING
    assert not machine.on_slow()
    machine.prepares(PROMISE, PROMISE)
    assert not machine.on_slow()
    machine.accepts(AcceptReply(Verdict.PREEMPTED, ABOVE))
    assert machine.state is ACCEPTING
    assert machine.on_slow()
    assert machine.state is RETRYING


@pytest.mark.parametrize(("verdict", "goes_above"), [(Verdict.DAMAGED, True), (Verdict.FENCED, False)])
def test_a_ballot_goes_above_what_a_damaged_row_may_have_held_and_not_above_every_refusal(
    verdict: Verdict, goes_above: bool
) -> None:
    machine = Machine(thorough=True)
    assert not machine.prepares(PrepareReply(verdict, ABOVE), PROMISE)
    machine.begin(VIEW, NOW_US)
    assert (machine.ballot > ABOVE) == goes_above


@pytest.mark.parametrize("table", [Table.OBJECT, Table.SYSTEM])
def test_where_replicas_differ_a_system_register_waits_longer_for_the_third(table: Table) -> None:
    machine = Machine(NAME._replace(table=table), thorough=True)
    assert machine.prepares(_promise(5, 1), _promise(6, 2))
    assert machine.state is GATHERING
    assert machine.gather_s == (SYSTEM_STRAGGLERS_S if table == Table.SYSTEM else STRAGGLERS_S)


def test_a_change_that_keeps_the_copy_of_a_settled_record_sends_none() -> None:
    value = Value(1, b"o" * 16, Visibility.LIVE, b"v", b"d" * 16)
    promise = PrepareReply(Verdict.OK, accepted=Ballot(1, 5, "gw", b"12345678"), value=value)
    machine = Machine(change=Change(b"new", Visibility.LIVE, b"d" * 16), thorough=True)
    machine.prepares(promise, promise)
    assert machine.state is ACCEPTING
    assert machine.fragments == ()
    machine.accepts(AcceptReply(Verdict.UNSTORED), AcceptReply(Verdict.UNSTORED))
    machine.prepares(promise, promise)
    assert machine.state is CARRYING


def test_a_create_is_a_state_of_its_own_and_counts_who_was_in_its_way_once() -> None:
    machine = Machine()
    assert machine.create(VIEW, Change(b"new"), NOW_US)
    assert (machine.state, machine.turn) == (CREATING, 1)
    assert not machine.created("a", AcceptReply(Verdict.HELD, ABOVE))
    assert machine.counts["preempted"] == 0
    assert machine.created("b", AcceptReply(Verdict.PREEMPTED, ABOVE))
    assert machine.state is RETRYING
    assert machine.counts["preempted"] == 1
    assert not machine.created("c", AcceptReply(Verdict.PREEMPTED, ABOVE))
    assert machine.counts["preempted"] == 1
    assert machine.begin(VIEW, NOW_US)
    assert machine.state is PREPARING


def _promise(counter: int, sequence: int) -> PrepareReply:
    value = Value(sequence, b"o" * 16, Visibility.LIVE, b"v")
    return PrepareReply(Verdict.OK, accepted=Ballot(1, counter, "gw", b"12345678"), value=value)


def test_replicas_lag_that_hold_another_ballot_or_have_not_promised() -> None:
    quorum, ballot = Quorum(("a", "b", "c")), Ballot(1, 5, "gw", b"12345678")
    assert lagging(quorum, {"a": _promise(5, 1), "b": _promise(4, 1)}, ballot) == ["b", "c"]
    assert lagging(quorum, {disk: _promise(5, 1) for disk in "abc"}, ballot) == []


def test_the_newest_record_goes_on_as_it_is_and_an_older_one_above_all_sequences() -> None:
    promises = {"a": _promise(5, 3), "b": _promise(7, 2), "c": PrepareReply(Verdict.OK)}
    assert highest_sequence(promises, Ballot(1, 7, "gw", b"12345678")) == 0
    assert highest_sequence(promises, Ballot(1, 5, "gw", b"12345678")) == 3


# --- fragments and copies ---------------------------------------------------------------------------------------------


class FragmentsGone(StoragedError):
    pass


def test_a_change_whose_fragments_cannot_be_made_durable_fails_with_that() -> None:
    machine = Machine(barrier=True, thorough=True)
    machine.prepares(PROMISE, PROMISE)
    assert machine.state is SYNCING
    assert machine.data_failed(FragmentsGone())
    assert isinstance(machine.error, FragmentsGone)
    assert not machine.data_failed(FragmentsGone())
    machine = Machine(barrier=True, thorough=True)
    machine.prepares(PROMISE, PROMISE)
    assert machine.synced()
    assert not machine.data_failed(FragmentsGone())
    machine.accepts(None, None)
    assert machine.state is RETRYING
    assert not machine.data_failed(FragmentsGone())


def test_fragments_are_waited_for_once() -> None:
    machine = Machine(barrier=True, thorough=True)
    machine.prepares(PROMISE, PROMISE)
    assert machine.state is SYNCING
    assert machine.synced()
    assert machine.state is ACCEPTING
    assert not machine.synced()
    machine.accepts(
        AcceptReply(Verdict.PREEMPTED, ABOVE, final=True), AcceptReply(Verdict.PREEMPTED, ABOVE, final=True)
    )
    assert machine.accepted(machine.turn - 1, "c", None) is False
    machine.prepares(PROMISE, PROMISE)
    assert machine.state is ACCEPTING


def _carrying(**wanted: bool) -> tuple[Machine, PrepareReply, PrepareReply]:
    """It has found a record of one replica that names a copy, and nothing at another."""
    value = Value(2, b"o" * 16, Visibility.LIVE, b"v", b"d" * 16)
    held = PrepareReply(Verdict.OK, accepted=Ballot(1, 5, "gw", b"12345678"), value=value)
    machine = Machine(settling=True, thorough=True, commit=True, change=None, **wanted)
    machine.prepares(held, PROMISE)
    while machine.state is GATHERING:
        machine.waited()
    return machine, held, PROMISE


def test_a_copy_is_looked_for_twice_and_then_an_older_record_takes_its_place() -> None:
    machine, held, nothing = _carrying()
    assert machine.state is CARRYING
    assert machine.carried(None)
    assert machine.state is RETRYING
    machine.prepares(held, nothing)
    while machine.state is GATHERING:
        machine.waited()
    assert machine.state is CARRYING
    assert machine.carried(None)
    assert machine.state is GATHERING  # for the third replica, before it decides
    machine.promised(machine.turn, "c", nothing)
    assert machine.state is ACCEPTING
    assert machine.request.value.sequence == 3  # type: ignore[union-attr]
    assert not machine.carried(None)


def test_the_third_replica_is_asked_again_before_an_older_record_takes_the_place_of_a_newer_one() -> None:
    machine, held, nothing = _carrying()
    above = Ballot(1, NOW_US + 10**7, "other", b"87654321")
    for attempt in range(THIRD_REPLICA_TRIES + 1):
        assert machine.state is CARRYING
        machine.carried(())  # each has said that it has none
        assert machine.state is GATHERING
        refusal = PrepareReply(Verdict.PREEMPTED, above._replace(counter=above.counter + attempt * 10**7))
        assert machine.promised(machine.turn, "c", refusal)
        if attempt < THIRD_REPLICA_TRIES:
            assert machine.state is RETRYING
            machine.prepares(held, nothing)
            while machine.state is GATHERING:
                machine.waited()
    assert machine.state is FAILED
    assert isinstance(machine.error, ServiceUnavailable)  # no quorum has accepted it with its copy, so it is no damage


def test_a_settled_record_goes_to_a_replica_that_lags_with_its_copy_or_not_at_all() -> None:
    value = Value(2, b"o" * 16, Visibility.LIVE, b"v", b"d" * 16)
    held = PrepareReply(Verdict.OK, accepted=Ballot(1, 5, "gw", b"12345678"), value=value)
    machine = Machine(settling=True, thorough=True, commit=True, change=None)
    machine.prepares(held, held, PROMISE)
    assert machine.state is CARRYING
    assert machine.carried(None)
    assert machine.state is ACCEPTING
    assert machine.fragments == ()
    machine.accepts(AcceptReply(Verdict.UNSTORED), AcceptReply(Verdict.UNSTORED))
    machine.prepares(held, held, PROMISE)
    assert machine.state is CARRYING
    assert machine.carried(None)
    assert machine.state is RETRYING  # now a quorum needs the copy


@pytest.mark.parametrize("commit", [False, True])
def test_a_settling_round_begins_again_for_a_third_replica_that_refuses_and_not_for_ever(commit: bool) -> None:
    machine = Machine(settling=True, commit=commit, thorough=True, change=None)
    found = (_promise(5, 1), _promise(6, 2)) if not commit else (_promise(5, 1), _promise(5, 1))
    above = Ballot(1, NOW_US + 10**7, "other", b"87654321")
    tries = 0
    machine.prepares(*found)
    while machine.state is GATHERING:
        refusal = PrepareReply(Verdict.PREEMPTED, above._replace(counter=above.counter + tries * 10**7))
        machine.promised(machine.turn, "c", refusal)
        if machine.state is RETRYING:
            tries += 1
            machine.prepares(*found)
    assert machine.state is ACCEPTING
    assert tries == (ALL_REPLICAS_TRIES if commit else THIRD_REPLICA_TRIES)
    assert not machine.waited()


SYSTEM = RegisterName(Table.SYSTEM, bytes(16), 0, b"key")


def _differing(**named: object) -> tuple[Machine, list[Ballot], tuple[PrepareReply, PrepareReply]]:
    """A change of a system record whose replicas differ; what it went on from without having heard all of them; and the
    promises of two.
    """
    machine, went_on = Machine(SYSTEM, thorough=True), list[Ballot]()
    machine._shared = replace(machine._shared, on_unheard=lambda _name, ballot: went_on.append(ballot))
    return machine, went_on, (_promise(5, 1), _promise(6, 2))


def test_a_system_record_asks_a_replica_that_refuses_again_and_then_goes_on_without_it_and_says_so() -> None:
    machine, went_on, found = _differing()
    above, tries = Ballot(1, NOW_US + 10**7, "other", b"87654321"), 0
    machine.prepares(*found)
    while machine.state is GATHERING:
        assert not went_on
        refusal = PrepareReply(Verdict.PREEMPTED, above._replace(counter=above.counter + tries * 10**7))
        assert machine.promised(machine.turn, "c", refusal)
        if machine.state is RETRYING:
            tries += 1
            machine.prepares(*found)
    assert machine.state is ACCEPTING
    assert tries == THIRD_REPLICA_TRIES
    assert went_on == [found[1].accepted]


def test_a_system_record_does_not_ask_a_replica_again_that_does_not_answer() -> None:
    machine, went_on, found = _differing()
    machine.prepares(*found)
    assert machine.state is GATHERING
    assert machine.promised(machine.turn, "c", None)
    assert machine.state is ACCEPTING
    assert went_on == [found[1].accepted]


def test_a_system_record_goes_on_from_what_all_replicas_report() -> None:
    machine, went_on, found = _differing()
    machine.prepares(*found)
    assert machine.promised(machine.turn, "c", found[0])
    assert machine.state is ACCEPTING
    assert machine.request.value.sequence == found[0].value.sequence + 1  # type: ignore[union-attr]
    assert went_on == []


# --- accepts ----------------------------------------------------------------------------------------------------------


def test_an_accept_says_whether_its_value_is_new_and_what_refuses_it_counts() -> None:
    machine = Machine(thorough=True)
    machine.prepares(PROMISE, PROMISE)
    assert not machine.request.identity  # type: ignore[union-attr]
    refusal = AcceptReply(Verdict.PREEMPTED, ABOVE)
    assert machine.accepts(refusal, refusal)
    machine.begin(VIEW, NOW_US)
    assert machine.ballot > ABOVE
    settling = Machine(settling=True, commit=True, thorough=True, change=None)
    settling.prepares(_promise(5, 1), _promise(5, 1), _promise(5, 1))
    assert settling.request.identity  # type: ignore[union-attr]
    assert settling.accepts(AcceptReply(Verdict.FENCED), AcceptReply(Verdict.FENCED))
    assert isinstance(settling.error, NoSuchBucket)
    assert not settling.error.details


def test_a_change_that_finds_its_own_value_settled_is_done_without_another_accept() -> None:
    machine = Machine(thorough=True)
    machine.prepares(PROMISE, PROMISE)
    value, ballot = machine.request.value, machine.ballot  # type: ignore[union-attr]
    machine.accepts(None, None)
    found = PrepareReply(Verdict.OK, accepted=ballot, value=value)
    assert machine.prepares(found, found)
    assert machine.state is DONE
    assert machine.outcome == (None, value)

"""An attempt that every replica has refused for good is over: its change may be tried again."""

from __future__ import annotations

from dataclasses import replace

import pytest

from storaged.errors import OutcomeUnknown
from storaged.meta.consensus.change import Shared, Wanted
from storaged.meta.consensus.proposer import Proposer
from storaged.meta.consensus.quorums import View
from storaged.meta.consensus.register import CALL_BYTES, RULES, Ballots, Lineage, Rules, Verdict
from storaged.meta.consensus.states import ACCEPTING, FAILED, RETRYING
from storaged.meta.messages import AcceptReply, PrepareReply
from storaged.meta.names import Ballot, Change, RegisterName, Table, Value, Visibility

NAME = RegisterName(Table.OBJECT, b"s" * 16, 3, b"key")
VIEW = View.of(1, ("a", "b", "c"))
NOW_US = 10**15
ABOVE = Ballot(1, NOW_US + 1000, "other", b"87654321")
LATER = Value(2, b"o" * 16, Visibility.LIVE, b"of others, two changes later")

FOR_GOOD = AcceptReply(Verdict.PREEMPTED, ABOVE, final=True)
PERHAPS = AcceptReply(Verdict.PREEMPTED, ABOVE)


def after_accepts(*replies: AcceptReply | None, rules: Rules = RULES) -> Proposer:
    """A change whose first accept got these answers, and that has found ``LATER`` then."""
    counts = dict.fromkeys(("preempted", "unknown", "unavailable", "identity_rounds"), 0)
    shared = Shared(Ballots("gw", lambda: b"12345678"), rules, counts)
    machine = Proposer(shared, Wanted(NAME, lambda _: Change(b"new")), Lineage(bytes(CALL_BYTES), rules))
    machine.begin(VIEW, NOW_US)
    for disk in "ab":
        machine.promised(machine.turn, disk, PrepareReply(Verdict.OK))
    assert machine.state is ACCEPTING
    turn = machine.turn
    for disk, reply in zip("abc", replies, strict=True):
        machine.accepted(turn, disk, reply)
    assert machine.state is RETRYING
    machine.begin(VIEW, NOW_US)
    for disk in "abc":
        machine.promised(machine.turn, disk, PrepareReply(Verdict.OK, ABOVE, ABOVE, LATER))
    return machine


def test_a_change_goes_on_when_every_replica_has_refused_it_for_good() -> None:
    machine = after_accepts(FOR_GOOD, FOR_GOOD, FOR_GOOD)  # the last of them comes when it begins again already
    assert machine.state is ACCEPTING
    assert machine.request.value.sequence == 3  # type: ignore[union-attr]


@pytest.mark.parametrize("third", [None, PERHAPS, AcceptReply(Verdict.OK), AcceptReply(Verdict.FENCED, final=True)])
def test_its_outcome_is_unknown_when_one_replica_may_have_taken_it(third: AcceptReply | None) -> None:
    machine = after_accepts(FOR_GOOD, FOR_GOOD, third)
    assert machine.state is FAILED
    assert isinstance(machine.error, OutcomeUnknown)


def test_without_the_rule_a_quorum_that_refuses_is_enough() -> None:
    machine = after_accepts(FOR_GOOD, FOR_GOOD, PERHAPS, rules=replace(RULES, refused_by_all=False))
    assert machine.state is ACCEPTING

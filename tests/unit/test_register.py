"""The tables of the register: what acceptors answer, what majorities prove, what a proposer may conclude of its own
attempts.
"""

from __future__ import annotations

import msgspec
import pytest

from storaged.meta.consensus.acceptor import (
    HIGH_WATER_BLOCK_US,
    Acceptor,
    high_water_for,
    judge_accept,
    judge_create,
    judge_prepare,
    judge_read,
    lowest_of,
    needs_high_water,
)
from storaged.meta.consensus.quorums import Quorum
from storaged.meta.consensus.register import (
    CALL_BYTES,
    NEVER,
    RULES,
    Ballots,
    Lineage,
    Standing,
    Verdict,
    settled_ballot,
    shown,
)
from storaged.meta.names import SEQUENCE_MAX, ZERO_BALLOT, Ballot, Change, Value, Visibility
from storaged.meta.store_ports import Fence
from storaged.wire import decode, encode


def ballot(counter: int, node: str = "a", epoch: int = 1) -> Ballot:
    return Ballot(epoch, counter, node, b"incarnat")


def value(sequence: int, operation: bytes = b"other", body: bytes = b"v") -> Value:
    return Value(sequence, operation, Visibility.LIVE, body)


FRESH = Acceptor(ZERO_BALLOT, ZERO_BALLOT, None, 1)
HOLDS = Acceptor(ballot(5), ballot(5), value(1), 1)
FENCED = HOLDS._replace(fence=Fence(b"s" * 16, b"nonce", False))
DAMAGED = Acceptor(ballot(50), ZERO_BALLOT, None, 1, damaged=True)

PREPARES = [
    (FRESH, ballot(1), b"", Verdict.OK),
    (HOLDS, ballot(6), b"", Verdict.OK),
    (HOLDS, ballot(5), b"", Verdict.OK),
    (HOLDS, ballot(4), b"", Verdict.PREEMPTED),
    (HOLDS, ballot(5, "A"), b"", Verdict.PREEMPTED),
    (HOLDS._replace(promised=ballot(9)), ballot(8), b"", Verdict.PREEMPTED),
    (HOLDS._replace(epoch=2), ballot(9), b"", Verdict.EPOCH),
    (HOLDS._replace(epoch=2), ballot(1, epoch=2), b"", Verdict.OK),
    (FENCED, ballot(9), b"", Verdict.FENCED),
    (FENCED, ballot(9), b"other", Verdict.FENCED),
    (FENCED, ballot(9), b"nonce", Verdict.OK),
    (DAMAGED, ballot(99), b"", Verdict.DAMAGED),
]

ACCEPTS = [
    (FRESH, ballot(1), b"", False, Verdict.OK),
    (HOLDS, ballot(6), b"", False, Verdict.OK),
    (HOLDS, ballot(4), b"", False, Verdict.PREEMPTED),
    (HOLDS._replace(promised=ballot(9)), ballot(8), b"", True, Verdict.PREEMPTED),
    (HOLDS._replace(epoch=2), ballot(9), b"", True, Verdict.EPOCH),
    (FENCED, ballot(9), b"", False, Verdict.FENCED),
    (FENCED, ballot(9), b"nonce", False, Verdict.FENCED),
    (FENCED, ballot(9), b"other", True, Verdict.FENCED),
    (FENCED, ballot(9), b"nonce", True, Verdict.OK),
    (DAMAGED, ballot(49), b"", True, Verdict.PREEMPTED),
    (DAMAGED, ballot(50), b"", False, Verdict.OK),
]


@pytest.mark.parametrize(("acceptor", "asked", "nonce", "verdict"), PREPARES)
def test_a_prepare_is_answered_by_the_table(acceptor: Acceptor, asked: Ballot, nonce: bytes, verdict: Verdict) -> None:
    assert judge_prepare(acceptor, asked, nonce) is verdict


@pytest.mark.parametrize(("acceptor", "asked", "nonce", "identity", "verdict"), ACCEPTS)
def test_an_accept_is_answered_by_the_table(
    acceptor: Acceptor, asked: Ballot, nonce: bytes, identity: bool, verdict: Verdict
) -> None:
    assert judge_accept(acceptor, asked, value(2), nonce, identity) is verdict


@pytest.mark.parametrize("identity", [False, True])
def test_a_row_whose_copy_is_not_on_the_disk_is_not_written_whatever_the_round(identity: bool) -> None:
    for acceptor in (FRESH, HOLDS, DAMAGED):
        assert judge_accept(acceptor, ballot(60), value(2), b"", identity, copied=False) is Verdict.UNSTORED
        assert judge_accept(acceptor, ballot(60), value(2), b"", identity, copied=True) is Verdict.OK
    assert judge_create(FRESH, ballot(60), value(1), b"", False, copied=False) is Verdict.UNSTORED
    assert judge_accept(HOLDS, ballot(5), value(1), b"", identity, copied=False) is Verdict.OK  # it is there already


def test_the_accept_of_what_was_accepted_is_confirmed_and_another_value_under_its_ballot_is_a_conflict() -> None:
    assert judge_accept(HOLDS, ballot(5), value(1), b"", False) is Verdict.OK
    assert judge_accept(HOLDS, ballot(5), value(1, body=b"w"), b"", False) is Verdict.CONFLICT


def test_a_settling_round_writes_nothing_that_no_change_can_have_written() -> None:
    held = value(1)
    for settled, verdict in (
        (held, Verdict.OK),
        (msgspec.structs.replace(held, sequence=7), Verdict.OK),
        (msgspec.structs.replace(held, body=b"other"), Verdict.OK),  # its own row may be the wrong one
        (msgspec.structs.replace(held, operation=b"another's", body=b"other"), Verdict.OK),
        (NEVER, Verdict.OK),
        (msgspec.structs.replace(held, operation=b"another's", sequence=0), Verdict.CONFLICT),
        (msgspec.structs.replace(held, sequence=0), Verdict.CONFLICT),
    ):
        assert judge_accept(HOLDS, ballot(9), settled, b"", True) is verdict, settled


def test_reads_are_refused_only_for_an_old_layout_or_a_damaged_row() -> None:
    assert judge_read(FENCED, 1) is Verdict.OK
    assert judge_read(HOLDS._replace(epoch=2), 1) is Verdict.EPOCH
    assert judge_read(DAMAGED, 1) is Verdict.DAMAGED


def test_the_high_water_ballot_lies_above_everything_promised_while_it_is_in_force() -> None:
    high_water = high_water_for(ballot(100))
    assert not needs_high_water(ballot(100 + HIGH_WATER_BLOCK_US - 1), high_water)
    assert needs_high_water(ballot(100 + HIGH_WATER_BLOCK_US), high_water)
    assert needs_high_water(ballot(1, epoch=2), high_water)
    assert ballot(100 + HIGH_WATER_BLOCK_US - 1, "zzz") < lowest_of(high_water)


GROUP = Quorum(("a", "b", "c"))
JOINT = Quorum(("a", "b", "c"), ("c", "d", "e"))


def test_a_value_is_settled_by_one_ballot_on_a_majority_never_by_the_highest() -> None:
    assert settled_ballot(GROUP, {"a": ballot(1), "b": ballot(1)}) == ballot(1)
    assert settled_ballot(GROUP, {"a": ballot(2), "b": ballot(1)}) is None
    assert settled_ballot(GROUP, {"a": ballot(2), "b": ballot(1), "c": ballot(1)}) == ballot(1)
    assert settled_ballot(GROUP, {"a": ballot(1)}) is None
    assert settled_ballot(GROUP, {"a": ZERO_BALLOT, "b": ZERO_BALLOT}) == ZERO_BALLOT
    assert settled_ballot(JOINT, {"a": ballot(1), "b": ballot(1), "c": ballot(1)}) is None
    assert settled_ballot(JOINT, {"a": ballot(1), "c": ballot(1), "d": ballot(1)}) == ballot(1)


def test_ballots_grow_whatever_the_clock_does() -> None:
    ballots = Ballots("n", lambda: b"12345678")
    drawn = [ballots.next(1, 0, 1000), ballots.next(1, 0, 1000), ballots.next(1, 5000, 10), ballots.next(1, 0, 10)]
    assert [each.counter for each in drawn] == [1000, 1001, 5001, 5002]
    assert all(each.node == "n" and each.incarnation == b"12345678" for each in drawn)


def lineage() -> Lineage:
    return Lineage(b"c" * CALL_BYTES)


def test_an_attempt_has_the_next_sequence_and_its_own_operation_id() -> None:
    own = lineage()
    first, second = own.attempt(None, Change(b"x")), own.attempt(value(7), Change(b"y"))
    assert (first.sequence, second.sequence) == (1, 8)
    assert len({first.operation, second.operation}) == 2
    assert len(first.operation) == 16


def test_without_attempts_every_value_is_clear() -> None:
    assert lineage().judge(value(9), ballot(1), settled=False) is Standing.CLEAR


def test_a_found_attempt_is_applied_and_knows_what_it_was_built_on() -> None:
    own = lineage()
    attempt = own.attempt(value(3), Change(b"x"))
    assert own.judge(attempt, ballot(1), settled=False) is Standing.APPLIED
    assert own.base_of(attempt) == value(3)


def test_the_base_or_a_rival_at_the_same_sequence_is_clear_and_anything_later_is_unknown() -> None:
    own = lineage()
    own.attempt(value(3), Change(b"x"))
    assert own.judge(value(3), ballot(1), settled=True) is Standing.CLEAR
    assert own.judge(value(4), ballot(1), settled=False) is Standing.CLEAR
    assert own.judge(value(5), ballot(1), settled=False) is Standing.UNKNOWN


def test_a_second_attempt_after_an_unsettled_rival_still_counts_the_first() -> None:
    own = lineage()
    own.attempt(value(3), Change(b"x"))
    rival = value(4)
    assert own.judge(rival, ballot(1), settled=False) is Standing.CLEAR
    own.attempt(rival, Change(b"x"))
    assert own.judge(value(5), ballot(1), settled=True) is Standing.UNKNOWN


def test_a_settled_rival_ends_the_attempts_at_its_sequence() -> None:
    own = lineage()
    own.attempt(value(3), Change(b"x"))
    rival = value(4)
    assert own.judge(rival, ballot(1), settled=True) is Standing.CLEAR
    assert not own.open
    own.attempt(rival, Change(b"x"))
    assert own.judge(value(5), ballot(1), settled=False) is Standing.CLEAR
    assert own.judge(value(6), ballot(1), settled=False) is Standing.UNKNOWN


def test_a_register_settled_as_never_written_shows_nothing() -> None:
    assert shown(NEVER) is None
    assert shown(None) is None
    assert shown(value(1)) == value(1)


def test_production_rules_are_all_on() -> None:
    assert all(getattr(RULES, name) for name in RULES.__dataclass_fields__)


@pytest.mark.parametrize("sequence", [SEQUENCE_MAX + 1, (1 << 64) - 1, -1])
def test_a_value_whose_sequence_can_not_be_does_not_decode(sequence: int) -> None:
    """Else one replica that lies leads a register to the end of all sequences, and nobody can write it any more."""
    with pytest.raises(msgspec.ValidationError):
        decode(encode(msgspec.structs.replace(value(1), sequence=sequence)), Value)
    assert decode(encode(value(SEQUENCE_MAX)), Value) == value(SEQUENCE_MAX)

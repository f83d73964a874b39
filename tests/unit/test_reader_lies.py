"""A read whose replicas tell different values under one ballot."""

from __future__ import annotations

from storaged.errors import DataDamaged
from storaged.meta.consensus.change import Shared
from storaged.meta.consensus.quorums import View
from storaged.meta.consensus.reader import DONE, FAILED, SETTLING, WAITING, Reader
from storaged.meta.consensus.register import RULES, Ballots, Verdict, digest_of
from storaged.meta.messages import ReadReply
from storaged.meta.names import Ballot, RegisterName, Table, Value, Visibility


def two_values() -> tuple[Reader, Value]:
    lie, truth = (Value(1, b"o" * 16, Visibility.LIVE, body) for body in (b"lie", b"truth"))
    shared = Shared(Ballots("n", lambda: b"incarnat"), RULES, {})
    reader = Reader(shared, True, RegisterName(Table.OBJECT, bytes(16), 0, b"key"))
    reader.begin(View.of(1, ("a", "b", "c")))
    for disk, value in (("a", lie), ("b", truth)):
        reader.replied(reader.turn, disk, ReadReply(Verdict.OK, Ballot(1, 1, "g", b""), digest_of(truth), value))
    assert reader.state is WAITING
    return reader, truth


def test_a_value_that_is_not_what_its_digest_says_is_not_reported() -> None:
    reader, _truth = two_values()
    reader.replied(reader.turn, "c", None)
    assert reader.state is FAILED
    assert isinstance(reader.take_error(), DataDamaged)


def test_the_third_replica_says_which_of_two_values_is_right() -> None:
    reader, truth = two_values()
    reader.replied(reader.turn, "c", ReadReply(Verdict.OK, Ballot(1, 1, "g", b""), digest_of(truth), truth))
    assert reader.state is DONE
    assert reader.value == truth
    assert reader.differing is not None


def test_two_replicas_that_hold_one_value_under_two_ballots_outvote_a_third_one() -> None:
    """A value that was proposed again has reached only one of them under the later ballot."""
    reader, truth = two_values()
    reader.replied(reader.turn, "c", ReadReply(Verdict.OK, Ballot(1, 0, "g", b""), digest_of(truth), truth))
    assert reader.state is SETTLING

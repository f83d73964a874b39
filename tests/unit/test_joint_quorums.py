"""What may be concluded while a register has two sets of replicas. The first one may have chosen alone, before."""

from __future__ import annotations

from dataclasses import replace

from storaged.cluster.partitions import epoch_of
from storaged.meta.consensus.copies import may_replace
from storaged.meta.consensus.quorums import Quorum, View
from storaged.meta.consensus.register import RULES, credible
from storaged.meta.listing.agreement import _agreed
from storaged.meta.messages import PrepareReply, ScanRow
from storaged.meta.names import ZERO_BALLOT, Ballot, RegisterName, Table, Value, Visibility
from storaged.meta.storage.rowvalue import pack_row, row_parts
from storaged.meta.store_ports import Slot

NAME = RegisterName(Table.OBJECT, b"s" * 16, 3, b"key")
JOINT = Quorum(("a", "b", "c"), ("a", "b", "d"))


def made(counter: int, sequence: int, body: bytes = b"v") -> tuple[Ballot, Value]:
    return Ballot(1, counter, "n", b"incarnat"), Value(sequence, body.ljust(16), Visibility.LIVE, body, b"copy of it")


def test_an_older_record_does_not_take_the_place_of_what_the_first_set_may_have_chosen() -> None:
    older, newer = made(1, 1), made(2, 2)
    held = {"a": newer, "b": older, "c": newer, "d": (ZERO_BALLOT, None)}
    promises = {disk: PrepareReply(0, ballot, ballot, value) for disk, (ballot, value) in held.items()}
    assert not JOINT.met(("a", "c"))
    assert not may_replace(JOINT, promises, older[0], RULES)
    assert may_replace(JOINT, promises, older[0], replace(RULES, first_set_may_have_chosen=False))
    one_of_them = {disk: promises[disk] for disk in ("a", "b", "d")}
    assert not may_replace(JOINT, one_of_them, older[0], RULES), "the one that has not promised may hold it too"
    lone = {**promises, "c": promises["b"]}
    assert may_replace(JOINT, lone, older[0], RULES)


def test_an_older_record_does_not_take_the_place_of_what_the_second_set_shows_when_it_is_alone() -> None:
    """The copy at ``a`` is lost, and ``d`` has not promised. Who knows the state after the joint one reads the newer
    record at both, and takes it for settled: a reader fences nothing, so that this round may still end after it.
    """
    older, newer = made(1, 1), made(2, 2)
    assert Quorum(("a", "b", "d")).agreed({"a": newer[0], "d": newer[0]}) == newer[0]
    held = {"a": newer, "b": older, "c": older}
    promises = {disk: PrepareReply(0, ballot, ballot, value) for disk, (ballot, value) in held.items()}
    assert JOINT.met(promises)
    assert not may_replace(JOINT, promises, older[0], RULES)
    everyone = {**promises, "d": PrepareReply(0, older[0], older[0], older[1])}
    assert may_replace(JOINT, everyone, older[0], RULES)


def test_what_the_first_set_chose_goes_on_before_what_lost_against_it() -> None:
    """``lost`` has the higher sequence and the lower ballot: no quorum ever took it."""
    lost, chosen = made(3, 6, b"lost"), made(4, 5, b"chosen")
    reported = {"a": chosen, "b": lost, "c": chosen, "d": (ZERO_BALLOT, None)}
    assert credible(JOINT, reported) == (*chosen, False)
    assert credible(JOINT, {disk: reported[disk] for disk in ("a", "b", "c")}) is None
    settled = {**reported, "b": chosen}
    assert credible(JOINT, settled) == (*chosen, True)
    after = made(5, 6, b"after it")
    assert credible(JOINT, {**reported, "d": after}) == (*after, False)


def test_what_the_second_set_shows_when_it_is_alone_goes_on_before_what_lost_against_it() -> None:
    lost, shown, before = made(3, 6, b"lost"), made(4, 5, b"shown"), made(2, 4, b"before")
    reported = {"a": shown, "b": lost, "c": before, "d": shown}
    assert Quorum(("a", "b", "d")).agreed({disk: reported[disk][0] for disk in "abd"}) == shown[0]
    assert credible(JOINT, reported) == (*shown, False)


def row(epoch: int, body: bytes = b"v", ballot: bytes | None = None) -> ScanRow:
    value = Value(2, b"o" * 16, Visibility.LIVE, body)
    stored = row_parts(pack_row(Slot(NAME, Ballot(epoch, 5, "n", b"incarnat"), value)))
    return ScanRow(b"key", stored.ballot if ballot is None else ballot, int(Visibility.LIVE), value)


def test_a_row_of_an_earlier_step_that_the_first_set_has_is_settled_in_a_list() -> None:
    view = View.of(epoch_of(1, 1), ("a", "b", "c"), ("a", "d", "c"))
    before, now = row(epoch_of(0, 1)), row(epoch_of(1, 1))
    assert _agreed(view, {"b": before, "c": before}) == (before.ballot, before.value)
    assert _agreed(view, {"b": now, "c": now}) is None, "that needs both sets"
    assert _agreed(view, {"b": before, "c": before, "d": now}) is None, "a later one was begun"
    assert _agreed(view, {"a": now, "c": now}) == (now.ballot, now.value)


def test_a_ballot_in_a_list_that_is_none_settles_nothing() -> None:
    view = View.of(epoch_of(1, 1), ("a", "b", "c"), ("a", "d", "c"))
    before = row(epoch_of(0, 1))
    assert _agreed(view, {"b": before, "c": before, "d": row(0, ballot=b"no ballot")}) is None

"""Books of claims, whatever order statements come in; and ledgers that are lost, whatever majority remains."""

from __future__ import annotations

from itertools import combinations

from hypothesis import given, settings
from hypothesis import strategies as st

from storaged.cluster.claims import ClaimBook, Claimed, DiskClaim, Ledgers, NodeClaims, SignedClaims, newest, outdates
from storaged.cluster.ports import LedgerReport
from storaged.node.admission import DiskFacts, OwnLedger, admission, may_begin_unclaimed
from storaged.wire import encode
from tests.examples import examples

DISKS = ("d1", "d2", "d3")
claims = st.builds(
    DiskClaim,
    st.sampled_from(DISKS),
    st.sampled_from([b"s" * 16, b"s" * 16, b"s" * 16, b"t" * 16]),
    st.integers(1, 4),
    st.integers(0, 4),
    st.sampled_from([False, False, False, True]),
)
statements = st.lists(
    st.lists(claims, min_size=1, max_size=3, unique_by=lambda claim: claim.disk), min_size=1, max_size=8
)


def signed(found: list[DiskClaim]) -> tuple[SignedClaims, NodeClaims]:
    statement = NodeClaims("c", "n1", tuple(found))
    return SignedClaims(encode(statement), b"", b""), statement


def known_to(book: ClaimBook) -> dict[str, frozenset[DiskClaim]]:
    return {disk: frozenset(book.of(disk).stores) for disk in DISKS}


@settings(max_examples=examples(300), deadline=None)
@given(statements, st.randoms(use_true_random=False))
def test_a_book_knows_the_same_in_whatever_order_statements_come_and_after_a_copy(found, order) -> None:
    book, shuffled, copied = ClaimBook(), ClaimBook(), ClaimBook()
    for one in found:
        book.add(*signed(one))
    again = list(found)
    order.shuffle(again)
    for one in again:
        shuffled.add(*signed(one))
    assert known_to(shuffled) == known_to(book)
    for kept in book.statements():
        copied.add(kept, next(statement for made, statement in map(signed, found) if made == kept))
    assert known_to(copied) == known_to(book), "what a book keeps says all that it knows"
    assert len(book.statements()) <= 2 * 4 * len(DISKS)


@settings(max_examples=examples(300), deadline=None)
@given(claims, claims)
def test_what_is_newest_outdates_all_that_is_less(one: DiskClaim, other: DiskClaim) -> None:
    if one.store != other.store or one.disk != other.disk:
        return
    both = newest(one, other)
    assert not outdates(one, both)
    assert not outdates(other, both)
    assert outdates(both, one) == (both != one)


@given(st.integers(1, 9), st.integers(0, 8))
def test_whatever_majority_had_a_claim_a_rebuilt_ledger_reads_it(count: int, lost: int) -> None:
    """One ledger is lost. A claim that a majority had is at one of the others that it reads."""
    lost %= count
    others = [number for number in range(count) if number != lost]
    whole = LedgerReport(b"l" * 16, True, b"", True)
    for size in range(count):
        for read in combinations(others, size) if count < 6 else [tuple(others[:size])]:
            ledgers = Ledgers(False, {str(number): whole if number in read else None for number in others})
            if not ledgers.may_rebuild:
                continue
            unread = [number for number in range(count) if number not in read]
            had_it_all = len(unread) >= ledgers.majority  # a majority that is the lost one and those not read
            assert not had_it_all or len(read) == len(others)


places = st.sampled_from([(True, False), (True, True), (False, False)])
facts = st.builds(
    lambda *seen: DiskFacts(*seen[:-1], *seen[-1]),
    st.just("d1"),
    st.booleans(),
    st.booleans(),
    st.lists(st.builds(DiskClaim, st.just("d1"), st.binary(min_size=16, max_size=16), st.just(2), st.just(3)),
             max_size=2, unique_by=lambda claim: claim.store).map(lambda found: Claimed(tuple(found))),
    st.sampled_from(["", "", "EIO"]),
    places,
)  # fmt: skip
owns = st.builds(OwnLedger, st.just(b"own"), st.sampled_from([True, False, None]), st.booleans())
reports = st.one_of(
    st.none(),
    st.builds(LedgerReport, st.just(b"other"), st.booleans(), st.sampled_from([b"", b"own", b"older"]), st.booleans()),
)
ledgers_of = st.builds(Ledgers, st.booleans(), st.dictionaries(st.sampled_from(["n2", "n3", "n4", "n5"]), reports))


@settings(max_examples=examples(1000), deadline=None)
@given(facts, owns, ledgers_of)
def test_no_disk_is_opened_without_a_majority_nor_a_blank_or_failed_one_that_was_claimed(
    disk: DiskFacts, own: OwnLedger, ledgers: Ledgers
) -> None:
    found = admission(disk, own, ledgers)
    assert found.opens == (not found.state)
    if found.opens:
        assert ledgers.whole
        assert 2 * ledgers.counting > len(ledgers.others) + 1
        assert not disk.failure
        assert len(disk.claimed.stores) < 2
        assert not (disk.blank and disk.claimed.stores)
        assert found.expected == disk.claimed.only
        if not disk.claimed.stores and not disk.listed:
            assert disk.blank, "a store that nothing knows"
            assert disk.joins or own.formed is False
            assert disk.named, "a disk that the layout in force gives to no node, or to another one"
            assert found.joins == disk.joins
            assert found.form != disk.joins
    else:
        assert found.reason
    begin = may_begin_unclaimed(own, ledgers, [disk])
    if begin:
        assert not ledgers.silent
        assert not any(report and report.formed and report.yours == b"older" for report in ledgers.others.values())

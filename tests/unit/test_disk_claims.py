"""What nodes claim of their disks: who may sign what, what a book keeps, and which ledgers make a majority."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from storaged.cluster.claims import (
    CLAIMS_LABEL,
    COUNT_MAX,
    DISKS_A_STATEMENT_MAX,
    STATEMENT_BYTES_MAX,
    STATEMENTS_A_NODE_MAX,
    ClaimBook,
    DiskClaim,
    Ledgers,
    NodeClaims,
    SignedClaims,
    state_claims,
    verify_claims,
)
from storaged.cluster.identity import NodeSigner
from storaged.cluster.layout import DiskEntry, Layout, NodeEntry
from storaged.cluster.ports import LedgerReport
from storaged.errors import ClaimRefused
from storaged.wire import encode
from tests.worlds.authority import World

STORE = b"s" * 16


def claim(disk: str = "d1", store: bytes = STORE, starts: int = 1, position: int = 0) -> DiskClaim:
    return DiskClaim(disk, store, starts, position)


def layout(cluster: str = "c1") -> Layout:
    nodes = tuple(NodeEntry(f"n{number}", "FR/par1/a", "", ("storage",)) for number in (1, 2))
    return Layout(cluster, 1, nodes, (DiskEntry("d1", "n1", 1), DiskEntry("d2", "n2", 1)), ("d1",))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("claims"))


def signer(world: World, name: str = "n1", roles: tuple[str, ...] = ("storage",)) -> NodeSigner:
    return NodeSigner(world.node(name, roles))


def refused(world: World, signed: SignedClaims) -> str:
    with pytest.raises(ClaimRefused) as found:
        verify_claims(signed, world.authority.certificate, layout())
    return found.value.message


def test_a_statement_of_the_disks_own_node_is_believed(world: World) -> None:
    signed = state_claims(signer(world), "c1", "n1", [claim()])
    assert verify_claims(signed, world.authority.certificate, layout()) == NodeClaims("c1", "n1", (claim(),))


@pytest.mark.parametrize(
    ("made", "word"),
    [
        (lambda n1, n2: state_claims(n2, "c1", "n1", [claim()]), "signed by 'n2'"),
        (lambda n1, n2: state_claims(n2, "c1", "n2", [claim()]), "does not give it disk 'd1'"),
        (lambda n1, n2: state_claims(n1, "c1", "n1", [claim(), claim("d2")]), "does not give it disk 'd2'"),
        (lambda n1, n2: state_claims(n1, "c1", "n1", [claim("d9")]), "does not give it disk 'd9'"),
        (lambda n1, n2: state_claims(n1, "c2", "n1", [claim()]), "is of cluster 'c2'"),
        (lambda n1, n2: state_claims(n1, "c1", "n1", []), "about 0 disks"),
        (lambda n1, n2: state_claims(n1, "c1", "n1", [claim(), claim()]), "a disk twice"),
        (lambda n1, n2: state_claims(n1, "c1", "n1", [claim(store=b"short")]), "an id of 5 bytes"),
        (lambda n1, n2: state_claims(n1, "c1", "n1", [claim(starts=0)]), "0 starts"),
        (lambda n1, n2: state_claims(n1, "c1", "n1", [claim(starts=COUNT_MAX + 1)]), "starts"),
        (lambda n1, n2: state_claims(n1, "c1", "n1", [claim(position=-1)]), "position -1"),
        (lambda n1, n2: state_claims(n1, "c1", "n1", [claim(f"d{n}") for n in range(DISKS_A_STATEMENT_MAX + 1)]),
         "about 1025 disks"),
        (lambda n1, n2: SignedClaims(b"garbage", n1.certificate, n1.sign(CLAIMS_LABEL + b"garbage")), "cannot be read"),
        (lambda n1, n2: SignedClaims(b"x" * STATEMENT_BYTES_MAX, n1.certificate, b""), "more than"),
    ],
)  # fmt: skip
def test_a_statement_by_another_node_or_of_what_no_node_writes_is_refused(
    world: World, made: Callable[[NodeSigner, NodeSigner], SignedClaims], word: str
) -> None:
    assert word in refused(world, made(signer(world), signer(world, "n2")))


def test_a_changed_statement_and_one_of_a_gateway_or_of_another_authority_are_refused(
    world: World, tmp_path: Path
) -> None:
    good = state_claims(signer(world), "c1", "n1", [claim()])
    later = encode(NodeClaims("c1", "n1", (claim(starts=9),)))
    assert "does not hold" in refused(world, SignedClaims(later, good.certificate, good.signature))
    assert "is not of this cluster" in refused(world, SignedClaims(good.payload, b"no certificate", good.signature))
    other = state_claims(signer(World(tmp_path)), "c1", "n1", [claim()])
    assert "refused" in refused(world, other), "of a cluster with the same id and another authority"
    gateway = state_claims(signer(world, "n1", ("gateway",)), "c1", "n1", [claim()])
    assert "(gateway)" in refused(world, gateway)


def test_a_signature_over_the_same_bytes_for_another_use_is_refused(world: World) -> None:
    n1 = signer(world)
    payload = encode(NodeClaims("c1", "n1", (claim(),)))
    assert "does not hold" in refused(world, SignedClaims(payload, n1.certificate, n1.sign(payload)))


# --- books


def unsigned(*claims: DiskClaim, node: str = "n1") -> tuple[SignedClaims, NodeClaims]:
    """A statement as a book sees it: verified before."""
    found = NodeClaims("c1", node, claims)
    return SignedClaims(encode(found), b"", b""), found


def test_a_book_keeps_the_newest_statement_and_objects_to_older_ones() -> None:
    book = ClaimBook()
    first, second = unsigned(claim(starts=3, position=7)), unsigned(claim(starts=4, position=9))
    assert book.add(*first)
    assert not book.add(*first)
    assert book.add(*second)
    assert not book.add(*first)
    assert book.statements() == (second[0],)
    assert book.of("d1").only == claim(starts=4, position=9)
    for older in (claim(starts=3, position=9), claim(starts=4, position=8), claim(store=b"t" * 16, starts=9)):
        assert book.objections(unsigned(older)[1]) == ["d1"]
    assert book.objections(unsigned(claim(starts=5, position=9))[1]) == []
    assert book.objections(unsigned(claim("d2"))[1]) == []


def test_a_failure_is_never_taken_back() -> None:
    book = ClaimBook()
    book.add(*unsigned(DiskClaim("d1", STORE, 3, 7, failed=True)))
    assert book.objections(unsigned(claim(starts=4, position=9))[1]) == ["d1"]
    book.add(*unsigned(claim(starts=4, position=9)))
    assert book.of("d1").only == DiskClaim("d1", STORE, 4, 9, failed=True)


def test_two_stores_of_one_disk_are_both_kept_so_that_neither_is_used() -> None:
    book = ClaimBook()
    book.add(*unsigned(claim(starts=3)))
    book.add(*unsigned(claim(store=b"t" * 16)))
    assert book.of("d1").only is None
    assert len(book.of("d1").stores) == len(book.statements()) == 2


def test_a_node_fills_no_more_than_its_share_of_a_book() -> None:
    book = ClaimBook()
    taken = [book.add(*unsigned(claim(store=bytes([number]) * 16))) for number in range(STATEMENTS_A_NODE_MAX + 9)]
    assert sum(taken) == len(book.statements()) == STATEMENTS_A_NODE_MAX
    assert book.add(*unsigned(claim("d2"), node="n2"))


def test_a_full_share_takes_a_statement_that_says_all_that_the_others_say() -> None:
    book = ClaimBook()
    for number in range(STATEMENTS_A_NODE_MAX):
        assert book.add(*unsigned(claim(f"disk {number}")))
    everything = [claim(f"disk {number}", starts=2) for number in range(STATEMENTS_A_NODE_MAX + 1)]
    assert book.add(*unsigned(*everything))
    assert len(book.statements()) == 1


# --- majorities


def report(*, whole: bool) -> LedgerReport:
    return LedgerReport(b"l" * 16, True, b"", whole)


@pytest.mark.parametrize(
    ("own", "others", "enough", "rebuilds", "word"),
    [
        (True, "", True, True, ""),
        (False, "", False, True, "is blank"),
        (True, "w?", True, False, ""),
        (True, "??", False, False, "2 of 3 nodes' ledgers are needed, 1 count now (no answer yet from n0, n1)"),
        (True, "b?", False, False, "no answer yet from n1; blank: that of n0"),
        (True, "bb", False, True, "blank: that of n0, n1"),
        (False, "ww", False, True, "the ledger of this node is blank"),
        (False, "w?", False, False, "counts when 2 of the 2 others"),
        (False, "wb", False, True, "all of them"),
        (True, "?", False, False, "2 of 2"),
        (True, "ww??", True, False, ""),
        (False, "ww??", False, False, "3 of the 4 others"),
        (False, "www?", False, True, "is blank"),
        (True, "wb??", False, False, "3 of 5"),
    ],
)
def test_which_ledgers_make_a_majority(own: bool, others: str, enough: bool, rebuilds: bool, word: str) -> None:
    reports = {"w": report(whole=True), "b": report(whole=False), "?": None}
    ledgers = Ledgers(own, {f"n{number}": reports[kind] for number, kind in enumerate(others)})
    assert (ledgers.enough, ledgers.may_rebuild) == (enough, rebuilds)
    assert word in ledgers.waits_for()
    assert bool(ledgers.waits_for()) != enough

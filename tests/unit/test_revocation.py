"""A revoked certificate is of no use: no connection, no acceptance, no key. Nothing brings it back."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from storaged.cli import create, joining, revoking
from storaged.cli.succeeding import REVOKED_LONGER_MS, layouts_after
from storaged.cluster.certificates import accept, accepted_by
from storaged.cluster.identity import NodeSigner
from storaged.cluster.issuing import load_authority
from storaged.cluster.layout import Layout, RevokedCertificate
from storaged.cluster.layouts import LayoutBook
from storaged.cluster.moves import changes_between, moves_between, places_digest
from storaged.cluster.policy import KeyHolder, Policy, release_refusal
from storaged.errors import CertificateRevoked, LayoutRefused, OperatorError
from storaged.node.peers import PeerRules
from tests.worlds.authority import World
from tests.worlds.authority_folder import SAID, answered, call, three_signed
from tests.worlds.layouts import History, first


@pytest.fixture
def history(tmp_path: Path) -> History:
    return History(World(tmp_path))


def book_of(history: History, **options: Any) -> LayoutBook:
    return LayoutBook(history.world.authority.administration.public_key(), "c1", **options)


def revoking_layout(history: History, *names: str) -> Layout:
    """The next layout, which revokes the certificates of these nodes and moves nothing."""
    entries = tuple(RevokedCertificate(history.identity(name).peer.fingerprint, name, 2**50) for name in names)
    return history.after(replace(history.layouts[-1], revoked=entries), moving=False)


async def test_what_any_layout_revokes_stays_revoked(history: History) -> None:
    """Also if a later layout does not name it, or if it comes from an administrator whose layout did not win."""
    lost = history.sign(revoking_layout(history, "n2"))
    revokes = revoking_layout(history, "n1")
    book, heard = book_of(history), list[str]()
    book.watch_revocations(lambda: heard.append("revoked"))
    await book.learn(history.signed[0], "test")
    n1, n2, n3 = (history.identity(name).peer.fingerprint for name in ("n1", "n2", "n3"))
    assert not any(map(book.is_revoked, (n1, n2, n3)))
    await book.learn(history.sign(replace(revokes, epoch=3)), "test")
    assert (book.is_revoked(n1), book.is_revoked(n2), len(heard)) == (True, False, 1)
    await book.learn(history.sign(replace(revokes, epoch=4, revoked=())), "test")
    assert (book.epoch, book.is_revoked(n1), len(heard)) == (4, True, 1)
    await book.learn(lost, "a peer that has it")
    assert (book.epoch, book.is_revoked(n2), book.is_revoked(n3), len(heard)) == (4, True, False, 2)
    again = book_of(history, known=[book.signed(epoch) for epoch in (1, 2, 3, 4)])
    assert (again.is_revoked(n1), again.is_revoked(n2), again.is_revoked(n3)) == (True, True, False)


def test_a_layout_that_only_revokes_moves_nothing(history: History) -> None:
    before, after = history.layouts[0], revoking_layout(history, "n1")
    assert not moves_between(before, after)
    assert places_digest(before) == places_digest(after)
    fingerprint = history.identity("n1").peer.fingerprint.hex()
    assert changes_between(before, after) == (f"certificate {fingerprint} of n1 is revoked",)
    assert not changes_between(after, after)


def test_a_revoked_certificate_accepts_no_layout(history: History) -> None:
    before = revoking_layout(history, "n1")
    layout = replace(first(), epoch=100, base=1, predecessor=history.sign(before).hash)
    signed = history.sign(layout)
    authority = history.world.authority.certificate
    signers = {name: NodeSigner(history.identity(name)) for name in ("n1", "n2")}
    assert accepted_by(accept(signers["n2"], signed, layout), signed, layout, before, authority) == "n2"
    with pytest.raises(LayoutRefused, match="revokes the certificate of n1"):
        accepted_by(accept(signers["n1"], signed, layout), signed, layout, before, authority)


async def test_a_node_knows_from_the_layout_that_it_is_revoked_until_it_has_another_certificate(
    history: History,
) -> None:
    book, own = book_of(history), history.identity("n1")
    await book.learn(history.signed[0], "test")
    rules = PeerRules(lambda: own.peer, book)
    await book.learn(history.sign(revoking_layout(history, "n1")), "test")
    assert rules.is_own_revoked
    assert "the layout revokes" in rules.own_revocation()
    with pytest.raises(CertificateRevoked):
        rules.admit(own.peer)
    del history.own["n1"]
    before, own = own.peer.fingerprint, history.identity("n1")
    assert (rules.is_own_revoked, rules.own_revocation()) == (False, "")
    rules.on_revoked("n2", before)
    assert rules.own_revocation() == ""  # a refusal that was on its way when the certificate was replaced
    rules.on_revoked("n2", own.peer.fingerprint)
    assert "n2 says" in rules.own_revocation()
    rules.on_attempt("n2", False)
    rules.on_attempt("n3", True)
    assert "n2 says" in rules.own_revocation()
    rules.on_attempt("n2", True)
    assert rules.own_revocation() == ""


def test_a_gateway_with_a_revoked_certificate_gets_no_key() -> None:
    holder = KeyHolder("FR", "FR", 0, 2**50)
    assert release_refusal(Policy(), holder, (), 1) is None
    refusal = release_refusal(Policy(), holder._replace(revoked=True), (), 1)
    assert refusal is not None
    assert "this gateway's certificate is revoked" in str(refusal)


# --- the command


@pytest.fixture
def authority(tmp_path: Path) -> Path:
    return three_signed(tmp_path / "authority")


def newest(place: Path) -> Layout:
    return create.read_layout(load_authority(place), place / create.LAYOUT_NAME)[1]


def renewed(capsys: SAID, place: Path, name: str, server: Path) -> None:
    ticket = answered(capsys, "cluster", "renew", str(place), name)["ticket"]
    call("node", "join", ticket, str(server))
    call("node", "sign", str(place), str(server / joining.REQUEST_NAME))


def test_a_node_is_revoked_with_all_its_certificates_or_with_one(authority: Path, tmp_path: Path, capsys: SAID) -> None:
    renewed(capsys, authority, "n1", tmp_path / "n1")
    known = [one for one in answered(capsys, "cluster", "certificates", str(authority)) if one["node"] == "n1"]
    assert [one["revoked"] for one in known] == [False, False]
    old = known[0]["fingerprint"]
    colons = ":".join(old[place : place + 2] for place in range(0, 64, 2)).upper()
    done = answered(capsys, "cluster", "revoke", str(authority), colons)
    assert [one["fingerprint"] for one in done["revoked"]] == [old]
    call("cluster", "layout", str(authority))
    before, after = (create.read_layout(load_authority(authority), create.layout_path(load_authority(authority), epoch))
                     for epoch in (1, 2))  # fmt: skip
    assert after[1].predecessor == before[0].hash
    assert [(one.fingerprint.hex(), one.node) for one in after[1].revoked] == [(old, "n1")]
    assert not moves_between(before[1], after[1])
    done = answered(capsys, "cluster", "revoke", str(authority), "n1")
    assert [one["fingerprint"] for one in done["revoked"]] == [known[1]["fingerprint"]]
    with pytest.raises(OperatorError, match="are revoked already"):
        call("cluster", "revoke", str(authority), "n1")
    call("cluster", "layout", str(authority))
    assert len(newest(authority).revoked) == 2
    shown = answered(capsys, "cluster", "certificates", str(authority))
    assert {one["node"] for one in shown if one["revoked"]} == {"n1"}
    call("cluster", "certificates", str(authority))
    assert capsys.readouterr().out.count("revoked ") == 2


def test_a_removed_node_is_revoked_too(authority: Path, capsys: SAID) -> None:
    call("node", "remove", str(authority), "gateway")
    call("cluster", "revoke", str(authority), "gateway")
    call("cluster", "layout", str(authority))
    assert [one.node for one in newest(authority).revoked] == ["gateway"]


def test_certificates_of_earlier_versions_are_revoked_by_their_fingerprint(authority: Path, capsys: SAID) -> None:
    for path in (authority / "issued").iterdir():
        path.unlink()
    assert len(answered(capsys, "cluster", "certificates", str(authority))) == 4, "those in the nodes' folders"
    with pytest.raises(OperatorError, match="openssl x509"):
        call("cluster", "revoke", str(authority), "n9")
    call("cluster", "revoke", str(authority), "ab" * 32)
    call("cluster", "layout", str(authority))
    (one,) = newest(authority).revoked
    assert (one.fingerprint.hex(), one.node) == ("ab" * 32, "")
    assert one.until_ms > time.time() * 1000


def test_a_revocation_stays_until_the_certificate_has_expired(authority: Path) -> None:
    """Also where the list was put back from a backup."""
    backup = create.load_plan(authority)
    call("cluster", "revoke", str(authority), "n1")
    call("cluster", "layout", str(authority))
    loaded = load_authority(authority)
    last = create.last_signed(loaded, backup)
    assert last is not None
    (revoked,) = last[1].revoked
    for now_ms, named in (
        (0, 1),
        (revoked.until_ms + REVOKED_LONGER_MS - 1, 1),
        (revoked.until_ms + REVOKED_LONGER_MS, 0),
    ):
        (layout,) = layouts_after(backup, last, now_ms)
        assert len(layout.revoked) == named


def test_a_file_that_is_no_certificate_is_named(authority: Path) -> None:
    (authority / "issued" / "x.crt").write_text("x")
    with pytest.raises(OperatorError, match=r"issued/x\.crt is no certificate"):
        revoking.issued(authority)

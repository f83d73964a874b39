"""A revoked certificate ends its connections, on sockets. The other tests of revocation are in tests/unit."""

from __future__ import annotations

from pathlib import Path

from storaged.cluster.ports import PeerIdentity
from storaged.errors import CertificateRevoked
from storaged.node.peers import PeerRules
from tests.unit.test_revocation import book_of, revoking_layout
from tests.worlds.authority import Note, Service, World, pooled, serving, until
from tests.worlds.layouts import History


async def test_connections_with_a_revoked_certificate_end_and_no_new_one_is_made(tmp_path: Path) -> None:
    """On both sides; the revoked node is told, and the other nodes' connections stay."""
    history = History(World(tmp_path))
    n1, n2, n3 = (history.identity(name) for name in ("n1", "n2", "n3"))
    book = book_of(history)
    await book.learn(history.signed[0], "test")
    rules = PeerRules(lambda: n2.peer, book)
    own = PeerRules(lambda: n1.peer, book_of(history, known=[history.signed[0]]))
    service = Service()
    async with (
        serving(n2, service, admission=rules.admit) as server,
        serving(n1, service) as leaked,
        pooled(n1, {"n2": f"127.0.0.1:{server.port}"}, on_revoked=own.on_revoked) as dials,
        pooled(n3, {"n2": f"127.0.0.1:{server.port}"}) as other,
        pooled(n2, {"n1": f"127.0.0.1:{leaked.port}"}, admission=rules.admit) as pool,
    ):
        book.watch_revocations(server.recheck_peers)
        book.watch_revocations(lambda: pool.recheck_peers(rules.check_revoked))
        for caller, node in ((dials, "n2"), (other, "n2"), (pool, "n1")):
            await caller.call(node, "t.echo", Note("x"), Note)
        assert own.own_revocation() == ""
        await book.learn(history.sign(revoking_layout(history, "n1")), "test")
        await until(lambda: not dials.connected("n2") and not pool.connected("n1"))
        await until(lambda: "n2 says that the certificate of n1 is revoked" in own.own_revocation())
        assert "is revoked" in dials.away_reason("n2")
        await until(lambda: "is revoked" in pool.away_reason("n1"))
        await other.call("n2", "t.echo", Note("x"), Note)
        assert server.statistics().peers == ("n3",)


async def test_a_refusal_is_of_the_certificate_that_was_presented(tmp_path: Path) -> None:
    """Also when this node gets another one while it is being refused."""
    history = History(World(tmp_path))
    n1, n2 = history.identity("n1"), history.identity("n2")
    refused: list[bytes] = []

    def admit(peer: PeerIdentity) -> None:
        if peer.fingerprint == n1.peer.fingerprint:
            del history.own["n1"]
            dials.renew(history.identity("n1"))
            raise CertificateRevoked("revoked")

    async with (
        serving(n2, Service(), admission=admit) as server,
        pooled(
            n1,
            {"n2": f"127.0.0.1:{server.port}"},
            on_revoked=lambda _peer, fingerprint: refused.append(fingerprint),
        ) as dials,
    ):
        await until(lambda: dials.connected("n2"))
    assert refused == [n1.peer.fingerprint]

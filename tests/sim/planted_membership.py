"""Bugs in how servers join, certificates are revoked and racks renamed. Plain data: imports nothing of the program."""

from __future__ import annotations

from tests.sim.planted import Planted

_JOINING = "storaged/cli/joining.py"
_TICKETS = "storaged/cluster/tickets.py"
_BOOK = "storaged/cluster/layouts.py"
_CERTIFICATES = "storaged/cluster/certificates.py"
_LAYOUT = "storaged/cluster/layout.py"
_SERVER = "storaged/cluster/rpc/server.py"
_LINK = "storaged/cluster/rpc/link.py"
_JOIN_TESTS = "tests/unit/test_cli_joining.py"
_REVOCATION_TESTS = "tests/unit/test_revocation.py"
_CONNECTION_TESTS = "tests/integration/test_revocation_served.py"

MEMBERSHIP_BUGS = (
    Planted(
        "ticket_used_twice",
        "a ticket signs as many certificates as are asked for",
        1,
        path=_JOINING,
        old='.with_suffix(".used")',
        new='.with_suffix(f".{time.time_ns()}")',
        tests=_JOIN_TESTS,
    ),
    Planted(
        "used_after_the_certificate",
        "a ticket counts as used only after its certificate was written",
        1,
        path=_JOINING,
        old="""    try:
        _create(used, request.csr)
    except FileExistsError:
        raise _used(ticket) from None
    files.keep_certificate(authority, certificate)
""",
        new="""    files.keep_certificate(authority, certificate)
    _create(used, request.csr)
""",
        tests=_JOIN_TESTS,
    ),
    Planted(
        "request_not_authenticated",
        "a request is signed that was not made with the ticket's secret",
        1,
        path=_TICKETS,
        old="    if request.ticket != ticket.id or not _is_authentic(ticket, _REQUEST_LABEL, request):\n",
        new="    if request.ticket != ticket.id:\n",
        tests=_JOIN_TESTS,
    ),
    Planted(
        "late_ticket_signs",
        "a ticket is valid for ever",
        1,
        path=_TICKETS,
        old="    if ticket.until_ms <= now_ms:\n",
        new="    if False:\n",
        tests=_JOIN_TESTS,
    ),
    Planted(
        "altered_ticket_signs",
        "a ticket whose text was altered signs a certificate",
        1,
        path=_TICKETS,
        old="    if request.ticket_hash != ticket.hash:\n",
        new="    if False:\n",
        tests=_JOIN_TESTS,
    ),
    Planted(
        "answer_not_authenticated",
        "a server takes an answer that was altered on its way",
        1,
        path=_TICKETS,
        old="    if answer.version != VERSION or not _is_authentic(ticket, _ANSWER_LABEL, answer):\n",
        new="    if answer.version != VERSION:\n",
        tests=_JOIN_TESTS,
    ),
    Planted(
        "revocation_undone",
        "a later layout that does not name a revocation undoes it",
        1,
        path=_BOOK,
        old="        return fingerprint in self._revoked\n",
        new="        return any(fingerprint == one.fingerprint for one in self.current.revoked)\n",
        tests=_REVOCATION_TESTS,
    ),
    Planted(
        "revoked_node_accepts",
        "an acceptance with a revoked certificate counts",
        1,
        path=_CERTIFICATES,
        old="    if before.revokes(peer.fingerprint):\n",
        new="    if False:\n",
        tests=_REVOCATION_TESTS,
    ),
    Planted(
        "revoked_peer_stays",
        "a server ends no connection whose certificate is revoked",
        1,
        path=_SERVER,
        old="                self._expel(connection, peer.name, error)\n",
        new="                pass\n",
        tests=_CONNECTION_TESTS,
    ),
    Planted(
        "revoked_link_stays",
        "a node keeps its own connections to a node whose certificate is revoked",
        1,
        path=_LINK,
        old="""                admission(connection.peer)
            except StoragedError as error:
                connection.abort(error.message)
""",
        new="""                admission(connection.peer)
            except StoragedError:
                pass
""",
        tests=_CONNECTION_TESTS,
    ),
    Planted(
        "divided_rack_is_a_rename",
        "a rack whose servers get two names passes for a rename, and moves nothing",
        1,
        path=_LAYOUT,
        old="        if shared[first] == 1 and location",
        new="        if location",
        tests="tests/unit/test_rack_rename.py",
    ),
)

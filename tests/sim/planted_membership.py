"""Bugs in how servers join, certificates are revoked, racks renamed and disks put out. Plain data: imports nothing of
the program.
"""

from __future__ import annotations

from tests.sim.planted import Planted

_JOINING = "storaged/cli/joining.py"
_TICKETS = "storaged/cluster/tickets.py"
_BOOK = "storaged/cluster/layouts.py"
_CERTIFICATES = "storaged/cluster/certificates.py"
_LAYOUT = "storaged/cluster/layout.py"
_SERVER = "storaged/cluster/rpc/server.py"
_LINK = "storaged/cluster/rpc/link.py"
_DUTY = "storaged/node/sparing_duty.py"
_SPARING = "storaged/cluster/sparing.py"
_SPARING_TESTS = "tests/unit/test_sparing.py"
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
    Planted(
        "votes_pile_up",
        "the record of the disks that are out keeps all votes, until nobody believes it",
        1,
        path=_DUTY,
        old="        asked = (*disks, *sorted(known.disks.difference(disks)))[:DISKS_MAX]\n",
        new="        asked = disks\n",
        tests=_SPARING_TESTS,
        why="a run has too few disks for a record that is too long",
    ),
    Planted(
        "record_longer_than_believed",
        "a gateway writes more votes than a record may have",
        1,
        path=_SPARING,
        old="    return record if len(record.votes) <= VOTES_MAX else None\n",
        new="    return record if record.votes is not None else None\n",
        tests=_SPARING_TESTS,
        why="a run has too few disks for a record that is too long",
    ),
    Planted(
        "vote_with_disks_not_asked_for",
        "a node adds disks to its vote, and the other nodes repeat them",
        1,
        path=_DUTY,
        old="                if {opinion.disk for opinion in vote.opinions}.difference(disks):\n",
        new="                if False:\n",
        tests=_SPARING_TESTS,
        why="no play has a node that lies in its vote",
    ),
    Planted(
        "vote_of_any_length",
        "a state in a vote may be as long as its node likes",
        1,
        path="storaged/cluster/votes.py",
        old="    if any(len(opinion.state) > STATE_CHARS_MAX for opinion in vote.opinions):\n",
        new="    if False:\n",
        tests=_SPARING_TESTS,
        why="no play has a node that lies in its vote",
    ),
    Planted(
        "votes_repeat_any_text",
        "a node makes the votes of all others too long by what it says of its own disks",
        1,
        path="storaged/cluster/disk_view.py",
        old='            return "" if disk_id in self._readable else disk.state if disk.state in STATES else FAILED\n',
        new='            return "" if disk_id in self._readable else disk.state\n',
        tests="tests/unit/test_cluster_membership.py",
        why="no play has a node that lies about its disks",
    ),
)

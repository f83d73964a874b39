"""What a caller may write to registers, judged where its request comes in from another node. Pure, but for ``Gate``,
which raises.

``cluster.rpc.authority`` opens methods to roles; this is about contents:

    registers of the system table    gateways alone: keys, users, names, buckets, the cluster, the layout. A storage
                                     node prepares and accepts nothing there, not even a value that is there already:
                                     under a higher ballot the value of one replica that lags would count as the newest
    a ballot's node                  is the caller. A gateway may replay under another's ballot what it has read (an
                                     identity accept): it may write anything anyway
    creates                          gateways alone
    a storage node's counter         lies no more than an hour ahead of this node's clock. Of gateways an acceptor takes
                                     also an hour above its high-water ballot (rule 15 of ``register``): in many steps
                                     that leads to the end of all counters
    the layout epoch of a ballot     is one that this node knows: a higher one would outlive every ballot of the layouts
                                     to come. The node may be about to learn it, so the proposer tries again

Replicas of the caller's own process are not asked here: a node is master of its own disks.
"""

from __future__ import annotations

from collections.abc import Callable

from storaged.clock import Clock, SystemClock
from storaged.cluster.ports import PeerIdentity
from storaged.cluster.rpc import faults
from storaged.errors import PeerRefused, StoragedError
from storaged.meta.consensus.register import COUNTER_AHEAD_MAX_US, RULES, Rules, Verdict
from storaged.meta.messages import Accept, Create, Prepare
from storaged.meta.names import Ballot, RegisterName, Table

OnRefusal = Callable[[str, StoragedError], None]

OK, NEWER, AHEAD = Verdict.OK, Verdict.NEWER, Verdict.AHEAD
"""Globals: every accept asks for one, and a member is found through its enum's class at twice the price."""


def may_write(name: RegisterName, peer: PeerIdentity) -> bool:
    """Whether values of this register are taken from the peer."""
    return name.table != Table.SYSTEM or "gateway" in peer.roles


def may_use(ballot: Ballot, peer: PeerIdentity, *, helping: bool) -> bool:
    """Whether the peer may speak under this ballot. ``helping``: it accepts a value that it has read, and changes
    nothing."""
    return ballot.node == peer.name or (helping and "gateway" in peer.roles)


class Gate:
    """``newest_epoch``: of the layouts that this node knows. ``on_refusal(peer, error)`` gets what no honest node of
    this cluster asks. ``rules``: only simulations turn one off.
    """

    def __init__(
        self,
        newest_epoch: Callable[[], int],
        rules: Rules = RULES,
        clock: Clock | None = None,
        on_refusal: OnRefusal = lambda peer, error: None,
    ) -> None:
        self._newest_epoch = newest_epoch
        self._named = rules.ballots_unique and rules.own_ballots
        self._rules = rules
        self._clock = clock if clock is not None else SystemClock()
        self._on_refusal = on_refusal

    def prepare(self, request: Prepare, peer: PeerIdentity) -> Verdict:
        """OK, NEWER or AHEAD. Raises PeerRefused for what this peer may never do."""
        ballot = request.ballot
        if ballot.node == peer.name and "gateway" in peer.roles:  # the common case: it may all that there is
            return OK if ballot.epoch <= self._newest_epoch() else NEWER
        return self._judge(request.name, ballot, peer, helping=False)

    def accept(self, request: Accept, peer: PeerIdentity, create: bool = False) -> Verdict:
        """As ``prepare``. ``create``: it is one, whatever its type."""
        ballot = request.ballot
        if ballot.node == peer.name and "gateway" in peer.roles:
            return OK if ballot.epoch <= self._newest_epoch() else NEWER
        if (create or isinstance(request, Create)) and "gateway" not in peer.roles:
            raise self._refused(faults.ROLE_REFUSED, peer, "creates are for gateways")
        return self._judge(request.name, ballot, peer, helping=request.identity)

    def _judge(self, name: RegisterName, ballot: Ballot, peer: PeerIdentity, *, helping: bool) -> Verdict:
        if self._named and not may_use(ballot, peer, helping=helping):
            raise self._refused(
                faults.BALLOT_REFUSED, peer, f"a ballot of {ballot.node!r}, and each node speaks under its own"
            )
        if not may_write(name, peer) and self._rules.system_by_gateways:
            raise self._refused(faults.VALUE_REFUSED, peer, "registers of the system table are written by gateways")
        if "gateway" not in peer.roles and ballot.counter > self._clock.wall_ms() * 1000 + COUNTER_AHEAD_MAX_US:
            return AHEAD
        return OK if ballot.epoch <= self._newest_epoch() or not self._rules.known_epochs else NEWER

    def _refused(self, code: str, peer: PeerIdentity, reason: str) -> PeerRefused:
        error = faults.refused(code, f"{peer.name} ({', '.join(peer.roles)}) is refused: {reason}.")
        self._on_refusal(peer.name, error)
        return error

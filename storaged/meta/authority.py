"""What a caller may ask of an acceptor, judged where its request comes in from another node: one table. Pure, but for
``Gate``, which raises.

``cluster.rpc.authority`` opens methods to roles. ``CONTENTS`` is about what is in the requests. The two tables say the
same about roles: a method that is opened by mistake opens no register.

Storage nodes change no register, and are given no promise either. What their background work needs, a gateway does for
them (``maintain.asks``): it verifies what it is asked. They were once allowed to write NEVER (``register``) where the
acceptor has accepted nothing. But an acceptor that lags has accepted nothing of what the others have chosen. There a
NEVER under a high ballot leads the next settling round, and the object is gone.

Replicas of the caller's own process are not asked here: a node is master of its own disks. A node with both roles is a
gateway in every respect.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Final, NamedTuple

from storaged.cluster.partitions import layout_epoch_of, step_of
from storaged.cluster.ports import PeerIdentity
from storaged.cluster.rpc import faults
from storaged.errors import PeerRefused, StoragedError
from storaged.meta.consensus.register import RULES, Rules, Verdict
from storaged.meta.messages import Accept, Prepare
from storaged.meta.names import Ballot

OnRefusal = Callable[[str, StoragedError], None]

OK, NEWER = Verdict.OK, Verdict.NEWER
"""Globals: every accept asks for one, and a member is found through its enum's class at twice the price."""


class Content(NamedTuple):
    """A row of the table, of prepares, accepts and creates alike.

    ``rule``: its switch (``Rules``). ``broken(ballot, peer, known)``: whether a request breaks it; ``known``: this node
    knows the layout and the step. ``code``: with which it is refused, and noted in the audit log, for no honest node
    asks this; empty: the answer is NEWER.
    """

    rule: str
    broken: Callable[[Ballot, PeerIdentity, bool], bool]
    code: str
    what: str
    why: str


CONTENTS: Final = (
    Content(
        "values_by_gateways",
        lambda _ballot, peer, _known: "gateway" not in peer.roles,
        faults.ROLE_REFUSED,
        "promises and values are for gateways",
        "a storage node's certificate changes, hides and deletes nothing",
    ),
    Content(
        "own_ballots",
        lambda ballot, peer, _known: ballot.node != peer.name,
        faults.BALLOT_REFUSED,
        "each node speaks under its own ballots",
        "no value is accepted under a ballot that was another's",
    ),
    Content(
        "known_epochs",
        lambda _ballot, _peer, known: not known,
        "",
        "the layout of a ballot is known here, and the step of the register's partition",
        "a ballot of a later layout or step would outlive all of those to come; the node may be about to learn it",
    ),
)
"""Tried from top to bottom. The acceptor judges what breaks none (``consensus.acceptor``, ``consensus.bounds``)."""


def document() -> list[str]:
    """The table as FORMATS.md has it, line by line."""
    lines = ["| in every prepare, accept and create | else | why |", "|---|---|---|"]
    return lines + [f"| {row.what} | `{row.code or 'NEWER'}` | {row.why} |" for row in CONTENTS]


async def nothing_newer(_partition: int) -> None:
    """A ``refresh`` where partitions do not move."""


class KnownSteps(NamedTuple):
    """``of(partition)``: the step that this node knows for it, 0 while it never moved. ``on_newer(partition)``: another
    node names a later one, so that this node should refresh what it knows. It may lie. ``refresh(partition)``: the
    same; it returns when that is done, or has failed.
    """

    of: Callable[[int], int] = lambda partition: 0
    on_newer: Callable[[int], None] = lambda partition: None
    refresh: Callable[[int], Awaitable[None]] = nothing_newer


class Gate:
    """``newest_epoch``: of the layouts that this node knows. ``on_refusal(peer, error)`` gets what no honest node of
    this cluster asks. ``rules``: only simulations turn one off.
    """

    def __init__(
        self,
        newest_epoch: Callable[[], int],
        rules: Rules = RULES,
        on_refusal: OnRefusal = lambda peer, error: None,
        steps: KnownSteps = KnownSteps(),  # noqa: B008
    ) -> None:
        self._newest_epoch = newest_epoch
        self._steps = steps
        self._knows_all = not rules.known_epochs
        self._contents = [row for row in CONTENTS if getattr(rules, row.rule)]
        if not rules.ballots_unique:  # ballots without a name
            self._contents = [row for row in self._contents if row.rule != "own_ballots"]
        self._on_refusal = on_refusal

    def judge(self, request: Prepare | Accept, peer: PeerIdentity) -> Verdict:
        """Of a prepare, an accept or a create: OK or NEWER. Raises PeerRefused for what this peer may never ask."""
        ballot = request.ballot
        if ballot.node == peer.name and "gateway" in peer.roles and ballot.epoch <= self._newest_epoch():
            return OK  # the common case breaks no rule
        known = ballot.epoch <= self._newest_epoch() or self.knows(request.name.partition, ballot.epoch)
        for row in self._contents:
            if row.broken(ballot, peer, known):
                if not row.code:
                    return NEWER
                raise self._refused(row, ballot, peer)
        return OK

    def knows(self, partition: int, epoch: int) -> bool:
        """Whether this node knows the layout and the step of an epoch. If not, it is asked to refresh them."""
        if self._knows_all:
            return True
        if layout_epoch_of(epoch) > self._newest_epoch():
            return False
        known = step_of(epoch) <= self._steps.of(partition)
        if not known:
            self._steps.on_newer(partition)
        return known

    def _refused(self, row: Content, ballot: Ballot, peer: PeerIdentity) -> PeerRefused:
        roles = ", ".join(peer.roles)
        asked = f"{peer.name} ({roles}) asks under a ballot of {ballot.node!r}"
        error = faults.refused(row.code, f"{asked} and is refused: {row.what}.")
        self._on_refusal(peer.name, error)
        return error

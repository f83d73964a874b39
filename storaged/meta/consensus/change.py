"""What a proposer is given: the change that is wanted, what all proposers of a process share, and how patient they are.
Pure.

Small copies
    The copy of a small object goes with the accept, and a replica that can't store its copy accepts nothing; nor does
    one that gets no copy and has none. So from the moment that a record is chosen, a quorum of its replicas has had its
    copy. A value that a prepare found, and that no quorum has confirmed yet, is accepted again only together with its
    copy, which some replica has to give first (CARRYING). So it is where a settling round finds a replica that lags,
    and where a quorum refuses a change that keeps the copy. ``copies`` says what happens when no replica gives it.

    A change with a small copy succeeds when the acknowledge rule (``SmallCopies.enough``) holds for the replicas that
    have synced their copy, besides the quorum. Where it can't hold any more the outcome is unknown: the record is
    chosen, on fewer copies than it should have.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from msgspec import Struct

from storaged.meta.consensus.floors import KnownFloors
from storaged.meta.consensus.quorums import View
from storaged.meta.consensus.register import Ballots, Rules
from storaged.meta.names import Ballot, RegisterName, Value
from storaged.meta.ports import Grounds, SmallCopies, Update
from storaged.wire import Buffer

Fragments = Sequence[tuple[bytes, Sequence[Buffer]]]
"""(encoded fragment header, payload) of a small copy for each position of a replica, as in ``SmallCopies``. Empty: no
copy.
"""

BACKOFF_FIRST_S = 0.005
BACKOFF_MAX_S = 0.5

STRAGGLERS_S = 0.05
"""How long a settling round waits for the replicas beyond the quorum, to learn of damaged rows and of higher
promises."""

SYSTEM_STRAGGLERS_S = 1.0
"""The same wait for a register of the system table whose replicas differ: one of them may lie, and the
answer of the third keeps the lie from counting, so a slow disk gets time. A replica that hangs costs this much, and
only where a write was cut short."""

THIRD_REPLICA_TRIES = 4
"""How often an attempt begins again for a third replica that has promised a higher ballot. Two proposers in turn need
fewer, and a liar that always refuses leaves the two others alone."""

CARRY_TRIES = 2
"""How many attempts look for the copy of an unconfirmed record, where some replica may yet have it; then an older
record takes its place, or nothing can be concluded."""

ALL_REPLICAS_TRIES = 2
"""How often a settling round begins again, with a higher ballot, for a replica that refuses although a quorum has
promised. A replica that has restarted refuses everything below its high-water ballot, and is the one that lags."""


@dataclass(frozen=True)
class Shared:
    """What the proposers of one process share. ``counts`` has at least ``preempted``, ``unknown``, ``unavailable`` and
    ``identity_rounds``. ``doubts(name, disk, value)``: whether no gateway wrote the value that a disk reports; asked of
    registers of the system table alone. ``on_unheard(name, ballot)``: a change of such a register goes on from what was
    accepted under that ballot, although replicas differ and not all of them promised.

    ``overtake(name, create, below)``: what becomes of a create that is found above the value ``below``. ``create``
    itself, if ``below`` may be replaced; what its change makes of ``below``, if that has a history, with the operation
    and the payload of the create; None if that can't be known. Pure."""

    ballots: Ballots
    rules: Rules
    counts: dict[str, int]
    doubts: Callable[[RegisterName, str, Value | None], bool] = lambda name, disk, value: False
    on_unheard: Callable[[RegisterName, Ballot], None] = lambda name, ballot: None
    floors: KnownFloors = field(default_factory=KnownFloors)
    overtake: Callable[[RegisterName, Value, Value], Value | None] = lambda name, create, below: create

    def grounds(self, name: RegisterName, view: View, now_us: int, *, vouched: bool = False) -> Grounds:
        """Of a create that is proposed now. ``vouched``: of one whose data will be on disks before it is proposed."""
        floors = self.floors
        floor = floors.vouched(name, view) if vouched else floors.of(name)
        return Grounds(self.ballots.next(view.epoch, 0, now_us), floor)


class Wanted(Struct, frozen=True):
    """What a proposer is to do. ``nonce`` of the scope's fence. ``barrier``: the change names fragments that are not
    durable yet. ``grounds`` of a create whose fragments are durable already. ``settling``: there is no change, the
    register is to be settled; ``commit``: by an identity round in any case. ``thorough``: no attempt is sparing.
    """

    name: RegisterName
    update: Update
    small: SmallCopies | None = None
    nonce: bytes = b""
    barrier: bool = False
    grounds: Grounds | None = None
    settling: bool = False
    commit: bool = False
    thorough: bool = False

"""Floors: what counts in place of the rows of deleted keys when these are gone. Pure.

A deleted key leaves a row, its *tombstone*, and so does a key that was settled and never written (``register.NEVER``).
A row has a ballot and a sequence: with them a retry learns that its change is over. Rows can go only when something
else says the same. That is a floor, one for all keys of a *range*: the (table, scope, shard) of a partition.

Theory of operation. A floor is a ballot B that no proposer draws (it names no node), some time in the past. The
sequence of a floor, S, follows from B (``sequence_of``), and is above that of every row that goes. To expunge the rows
of a range below B is, for each of its keys, a change of CASPaxos under the ballot B::

    prepare(B)     all replicas of the settled set refuse ballots below B, durably, and what they have accepted before
                   can be read
    read           all of them are compared. A key in which two of them differ is settled by a committed round, which
                   has a ballot above B
    accept(B, v)   v is a tombstone with the sequence S. No replica writes it for each key: from now on a missing row
                   reports (B, v). A row that is there stays in force, until it is deleted
    delete         each replica deletes its own tombstones below B

Why nothing is lost and nothing comes back
    After the comparison every key belongs to one of three groups.

    * All replicas have the same row, with a ballot below B. When it is a tombstone, v is what an honest proposer would
      propose under B: still deleted, with a higher sequence. When it is not, nothing happens: the row is in force.
    * No replica has a row. Then v says "deleted", and no caller sees a difference to "never written".
    * A quorum has rows above B. What a replica reports under B counts for nothing beside them, and no ballot below B is
      taken any more.

    One replica left out breaks this. If it lacks a chosen row and is not compared, the key is not settled. Then the
    floor would report "deleted" there, above the ballot of a live row. And while a partition is joint, its two sets
    have no comparison of all in common. So floors are set in a settled state, by all of its replicas.

    A replica that has promised a ballot above B for a key reports v all the same. It has reported that key's tombstone
    with its promise, or "nothing"; a proposer that bases a change on these bases it on what v says too. Only the
    sequence of that change lies below S. It lies above those of all changes before it, which is what ``Lineage`` needs.

Why no retry re-applies
    An attempt that was applied and deleted again had a sequence below S: a proposer that tries again finds S, and says
    UNKNOWN (``Lineage.judge``). A create asks nothing. So a replica takes a create into a missing row only if its
    sequence is above S. It then comes from a proposer that knew the floor, so it is none from before. A proposer that
    does not know the floor yet is refused (HELD), and learns S.

    ``looks`` concludes that a replica with a row refuses every create for ever. So it does with the floor that has
    taken the row's place: creates from before do not know S.

Why the sequence of a floor never falls (rule 38)
    A floor of a later step, or of a newer layout, has a higher ballot than all earlier ones. Its counter may be lower:
    another gateway's clock is slow, or the delay was made longer. Its sequence would be lower too. A retry whose
    sequence lies between the two would find "deleted" below itself, and apply again what was deleted.

    So a replica takes no floor beside an active one with a lower ballot and a higher sequence, or the other way round,
    or with the same sequence. Nor does a floor become active below another one.
    And a replica that has promised a floor B takes no floor of an earlier step or layout any more: the common promise
    has B's step and layout, also after a restart. What was on its way to the disk arrives before the promise is
    answered. So let F be a floor with a lower ballot than B and a higher sequence. A replica that has promised B has no
    active F, nor will it have. All replicas promise B before one activates it. So no set of replicas has both. Floors
    of one step and layout have the order of their counters, and their sequences have it too.

    A floor that a quorum has is copied to the replica that comes. So the next set refuses B as well.

Why a create finds its fragments (rule 39)
    A create of a coded object refers to fragments that were durable before it. Between their first write and the create
    its gateway may sleep, and a collector may take them for orphans. Such a collector has a round made first, which
    every replica accepts, and deletes only then (``maintain.disuse``). The create has no promise. These rows keep it
    from being taken afterwards, and when they have gone, floors do.

    So the create has *grounds* from before the first write: a ballot, which has the step of the partition, and the
    sequence s of a floor. At that moment a replica X of this step had a floor F with a sequence of s or more; or s is
    0, which every floor exceeds. Let R be the ballot of the collector's round, which all replicas of its view accept
    after that moment.

    * R is of the grounds' step or a later one: a quorum has refused the earlier ones since the grounds' step was
      settled. Where R, or a floor that its rows went below, is of a later step, every replica of that step refuses the
      create by its epoch.
    * Else X has accepted R while F was active there, so R lies above F. Rows of R go below a floor B above R, and only
      after B has become active at all replicas, so at X, after F. At one replica each floor that becomes active has a
      higher ballot and a higher sequence than the one before (``in_order``). So B's sequence is above s, and that of
      each later floor. The create's is s + 1: where the row of R has gone, it is refused.
    * As long as a replica has a row it refuses the create.

    No clock is asked, and it does not matter how long the gateway slept. A lie about floors misleads no gateway:
    s is what a quorum of replicas has named in this step (``KnownFloors.vouched``). When the create is refused, the
    change goes on with a promise, and sees its fragments again.

    A node of version 0.1.0 takes such a create as any other one, and never expunges. But it collects by ages, after a
    round at a majority. Then the third replica may take the create. The grounds' ballot lies below that round's unless
    clocks are off by more than an hour, so the create is not carried on. Version 0.1.0 trusted clocks so far anyway.

A replica that comes to a partition gets the floors of the others when it has all rows, and before the new set counts
alone. Before that it must not report them: v would lie above the rows that it does not have yet. Its promises and rows
are of later steps, so a floor there is in the way of no other operation.

Of a bucket that was deleted for good all rows go, those of objects too. Its fence stays for ever, at a majority of each
shard's replicas, and lets no change pass. So whatever the replicas hold is read by nobody, and no proof rests on it
(``maintain.disuse``). Such rows are there: when a partition moves they are neither settled nor copied, and a disk that
had it before keeps its own. Each replica goes by its own fence, which a gateway has set, or a majority has handed on.

A range of the system table has no floor: bodies of its records are bound to their sequences.
"""

from __future__ import annotations

from storaged.cluster.partitions import step_of
from storaged.meta.consensus.quorums import View
from storaged.meta.consensus.register import COUNTER_AHEAD_MAX_US, FLOOR_SEQUENCES
from storaged.meta.names import Ballot, RegisterName, Table, Value, Visibility
from storaged.meta.store_ports import Slot

FLOORED_TABLES = frozenset(
    map(int, (Table.OBJECT, Table.UPLOAD, Table.PART, Table.EVENT, Table.LIFECYCLE, Table.INVENTORY))
)

_US_A_FLOOR = 1 << 20
"""Floors of one range that lie so many microseconds apart have other sequences."""

RANGES_KNOWN_MAX = 65_536

Range = tuple[int, bytes, int]
"""Table, scope, shard."""


def sequence_of(floor: Ballot) -> int:
    """The sequence of a floor. Creates begin one above it, and are recognised by that (``register.created``)."""
    return floor.counter // _US_A_FLOOR * FLOOR_SEQUENCES


def value_of(floor: Ballot) -> Value:
    """What a missing row of the range reports, under the ballot ``floor``."""
    return Value(sequence_of(floor), b"", Visibility.TOMBSTONE, b"")


def may_go(slot: Slot, floor: Ballot) -> bool:
    """Whether a row may be deleted where this floor is in force. A row that was written later than the floor's counter
    stays, also where a newer layout has put the floor's ballot above it.
    """
    return (
        slot.value.visibility == Visibility.TOMBSTONE
        and not slot.value.payload
        and slot.ballot < floor
        and slot.ballot.counter < floor.counter
        and slot.value.sequence < sequence_of(floor)
    )


def may_go_when_closed(slot: Slot, floor: Ballot) -> bool:
    """As ``may_go``, of a bucket whose fence stays for ever on this disk: it was deleted, and no row of it counts."""
    return slot.ballot < floor and slot.ballot.counter < floor.counter


def in_order(floor: Ballot, active: Ballot) -> bool:
    """Whether the one of two floors of a range that has the higher ballot has the higher sequence (rule 38)."""
    lower, higher = sorted((floor, active))
    return lower == higher or sequence_of(lower) < sequence_of(higher)


class KnownFloors:
    """The sequences of floors that the proposers of one process know. A hint: with a lower one than a replica has, a
    create is refused. A higher one than replicas had may be named by no create of data that is on disks already
    (``vouched``).
    """

    __slots__ = ("_seen", "_sequences")

    def __init__(self) -> None:
        self._sequences: dict[Range, int] = {}
        self._seen: dict[Range, tuple[int, dict[str, int]]] = {}
        """The step in which replicas have reported sequences, and which, by disk."""

    def of(self, name: RegisterName) -> int:
        """The sequence that a create has to exceed; 0 where no floor is known."""
        return self._sequences.get(name[:3], 0) if self._sequences else 0

    def vouched(self, name: RegisterName, view: View) -> int:
        """The highest sequence of a floor that a quorum of the register's replicas has had in this step; 0 where none
        is known. So one that does not lie had a floor with it, or a higher one.
        """
        if not self._seen:
            return 0
        step, seen = self._seen.get(name[:3], (0, {}))
        return view.quorum.vouched(seen) if step == step_of(view.epoch) else 0

    def note(self, name: RegisterName, sequence: int, now_us: int, disk: str = "", epoch: int = 0) -> None:
        """A replica has refused a create with it; 0: not for a floor. One that lies uses up no sequences: no floor lies
        far ahead. ``disk``, ``epoch``: of the replica, and of the create.
        """
        if not sequence or sequence > sequence_of(Ballot(0, now_us + COUNTER_AHEAD_MAX_US, "", b"")):
            return
        if sequence % FLOOR_SEQUENCES:
            return  # no floor has it, and no create above it would be known for one
        if len(self._sequences) >= RANGES_KNOWN_MAX:
            self._sequences.clear()
            self._seen.clear()
        range_, step = name[:3], step_of(epoch)
        self._sequences[range_] = max(sequence, self._sequences.get(range_, 0))
        of_step, seen = self._seen.get(range_, (step, {}))
        if of_step != step:
            seen = {}
        seen[disk] = max(sequence, seen.get(disk, 0))
        self._seen[range_] = step, seen

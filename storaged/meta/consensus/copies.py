"""Records whose small copy can't be had: what may be proposed in their place, and what may be concluded. Pure.

Theory of operation
    A row is written only where the small copy that it names is durable (``acceptor.judge_accept``), and the row says
    so (``Slot.copied``). So when a record is chosen, a quorum has had its copy, and it stays chosen whatever becomes of
    the copy. A record that an attempt finds, and that no quorum has confirmed, may be chosen or not; the attempt
    accepts it again together with its copy.

    When no replica gives that copy, an older record may take the place: the *candidate* C, the newest one whose copy
    can be read. (A record without a copy can be read, and so can "never written".) That must not undo what was chosen.
    Let S be the replicas that have not promised, those whose row is damaged, and those that hold something newer than C
    which was accepted with its copy. Anything newer than C that was chosen, or can still be, was accepted by a quorum
    of replicas that all belong to S. So C is proposed again only if S contains no quorum (``may_replace``). While there
    are two sets, S must not even contain a majority of one of them: before the second one came, that of the first was a
    quorum; when the joint state has ended, that of the second is one, and readers that know it show its value at once.
    S is judged by what was accepted with its copy, never by what can be read now: a copy that can't be read now may be
    that of an acknowledged object.

    All that is newer than C counts, not only what is one step above it: C lies below each of them.

    C is proposed as a new change, with an operation id of its own and the sequence after the highest one seen
    (``Lineage.restate``). The proposer of C, or of something newer, then finds a value that may descend from its own,
    and does not propose its change once more.

    Where S contains a quorum nothing can be concluded: ServiceUnavailable. But when a quorum has accepted the newest
    record with its copy, and every replica says that it has no whole copy, the record is damaged until a disk or
    repair brings the copy back: DataDamaged. A read that fails or takes too long does not say so.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from storaged.meta.consensus.quorums import Quorum
from storaged.meta.consensus.register import Rules
from storaged.meta.messages import PrepareReply
from storaged.meta.names import Ballot, Value

Promises = Mapping[str, PrepareReply]
"""By disk, of those that have promised."""


class MissingCopies:
    """The copies that one attempt has looked for in vain, by data id."""

    __slots__ = ("_absent", "_missing")

    def __init__(self) -> None:
        self._missing: set[bytes] = set()
        self._absent: set[bytes] = set()

    def add(self, data_id: bytes, *, absent: bool) -> None:
        """``absent``: every replica has said that it has no whole copy."""
        self._missing.add(data_id)
        if absent:
            self._absent.add(data_id)

    def candidate(self, promises: Promises) -> tuple[Ballot, Value | None] | None:
        """The newest record whose copy may still be had; None when there is none."""
        found = [
            (reply.accepted, reply.value)
            for reply in promises.values()
            if reply.value is None or reply.value.payload not in self._missing
        ]
        return max(found, key=lambda pair: pair[0], default=None)

    def damaged(self, quorum: Quorum, promises: Promises) -> bool:
        """Whether the newest record was accepted with its copy by a quorum, and the copy is nowhere."""
        value = max(promises.values(), key=lambda reply: reply.accepted).value
        if value is None or value.payload not in self._absent:
            return False
        values = {disk: reply.value for disk, reply in promises.items() if reply.copied}
        return quorum.met([disk for disk, held in values.items() if held and held.operation == value.operation])


def may_replace(quorum: Quorum, promises: Promises, candidate: Ballot, rules: Rules) -> bool:
    """Whether nothing newer than what was accepted at ``candidate`` is chosen, or can be."""
    newer = {disk: reply.accepted for disk, reply in promises.items() if reply.accepted > candidate}
    if not rules.chosen_by_bit:
        newer = {}
    if not rules.older_at_once:
        next_above = min(newer.values(), default=candidate)
        newer = {disk: accepted for disk, accepted in newer.items() if accepted == next_above}
    may_hold = [disk for disk in quorum.disks if disk not in promises or (disk in newer and promises[disk].copied)]
    chosen = quorum.may_have_chosen(may_hold) if rules.first_set_may_have_chosen else quorum.met(may_hold)
    return not chosen or not rules.older_needs_minority


def highest_sequence(promises: Promises, candidate: Ballot) -> int:
    """The sequence that a new change with what was accepted at ``candidate`` exceeds; 0 when that is the newest record
    after all, and goes on as it is.
    """
    if all(reply.accepted <= candidate for reply in promises.values()):
        return 0
    return max(reply.value.sequence for reply in promises.values() if reply.value is not None)


def lagging(quorum: Quorum, promises: Promises, ballot: Ballot) -> Collection[str]:
    """The replicas that are not known to hold what was accepted at ``ballot``."""
    return [disk for disk in quorum.disks if disk not in promises or promises[disk].accepted != ballot]

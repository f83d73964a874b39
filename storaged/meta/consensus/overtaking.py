"""What a proposer goes on from where it finds a create above other values (rules 14 and 37). Pure.

Theory of operation. A replica that has accepted nothing takes a create unasked (``register``). So the newest value that
a quorum reports may be a create C that is under its own ballot, and below it lies a value V of another replica. The
replica that has C has accepted nothing but C. Either C was chosen, or V, or neither: without the other replicas this
can't be known. A create overwrites what it does not know. So to propose C with a sequence after that of V loses nothing
that was confirmed: if V was chosen, C replaces it, as its request wanted.

*A history.* Some values must not be replaced: those that keep older versions of an object, events that are not
delivered, or data that other keys read. Only the planes above know them (``Shared.overtake``). There

1. C is dropped, if it can't be chosen under its ballot: a quorum has refused it for good, or all replicas have promised
   and too few of them have C. It was never confirmed. The proposer goes on from the newest of the other values, which
   is what was chosen, or descends from it.
2. Otherwise C is applied to V as its request would have been if it had found V: the result W keeps the history. If V
   was chosen, W is V with the change C. If C was chosen, then V was not: W shows a change of unknown outcome as if it
   had come before C. That is why a proposer waits for the third replica first.
3. Where C can't be applied (it needs a page, or V is locked) nothing is changed: ServiceUnavailable.

V is the newest of the values that no create has put there under its own ballot; such creates between V and C are
overwritten.

*C is recognised by its ballot* (``register.taken_by_create``). A create that a proposer has carried on has another
ballot. It was found newest by a quorum. So nothing that lies below that ballot was chosen or can be, and nothing is
applied to it. W has another ballot than C, too. So no proposer applies C to anything else once W is the newest value
that it finds.

Why V refers to nothing that was deleted
    Let a collector have deleted data after a round R (``looks``), whose value did not refer to it. A proposer of W was
    promised by a quorum, so by a replica that has accepted R. R is no create under its own ballot (``moved_on`` takes
    none for a round of a majority). So this replica had a row, and took no create since. It reports R or something
    newer, that is below C. V is the newest such value. So V was proposed at or above R's ballot, and descends from the
    value of R. The same holds for a settled read of replaced data: it finds the change that replaced the data, or what
    came after. That is no create under its own ballot, for a quorum had a row before. And where a round is at every
    replica no V lies below it.

    A row of a deleted key may be expunged, and the replica may take a create then. But floors are set when all replicas
    have the same row, or a quorum has newer ones (``floors``): what lies at the others is the tombstone, or newer.

What the request of V may conclude
    If C was chosen, V was not, but may yet come into effect by W. So the request of V does not count as over because a
    quorum holds C under its own ballot (``Lineage.judge``). A round after that ends it: then no proposer finds C newest
    any more. Once W is there the request finds a value that may descend from its own, and its outcome is unknown. The
    request of C finds its own operation in W.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import msgspec

from storaged.meta.consensus.quorums import Quorum
from storaged.meta.consensus.register import RULES, Rules, created, taken_by_create
from storaged.meta.consensus.rounds import Found
from storaged.meta.messages import PrepareReply
from storaged.meta.names import Ballot, Value

Overtake = Callable[[Value, Value], Value | None]
"""``overtake(create, below)``: see ``change.Shared``, of one register."""


class Placed(NamedTuple):
    """``found``: what to go on from; None: nothing can be concluded. ``in_doubt``: there is a history below a create,
    and it is not known whether the create was chosen. The promises of all replicas would show it.
    """

    found: Found | None
    in_doubt: bool = False


class Overtaking(NamedTuple):
    """What a proposer knows when it has found a create. ``promises``: of all that have promised. ``lost_at``: the
    ballot of a create that is not chosen (``Lineage.lost_at``). ``may_drop``: False where the copy of another value
    can't be had, so that only the create is left.
    """

    quorum: Quorum
    promises: Mapping[str, PrepareReply]
    lost_at: Ballot | None
    rules: Rules
    overtake: Overtake
    may_drop: bool = True
    dropped: frozenset[Ballot] = frozenset()
    """Ballots of creates that do not count any more."""

    def placed(self, found: Found) -> Placed:
        """A created value with the sequence after what it has overtaken (rule 14), and never with a lower one than it
        has: above a floor a create begins higher than a write that did not know the floor. Other values as they are.
        """
        ballot, value, settled = found
        if value is None or not created(value):
            return Placed(found)
        reported = [(reply.accepted, reply.value) for reply in self._counted if reply.accepted != self.lost_at]
        highest = overtaken(reported, ballot, value, self.rules)
        below = self._below(ballot, value)
        after = value
        if below is not None and self.rules.creates_spare_history:
            applied = self.overtake(value, below)
            if applied is not value:
                if self.may_drop and not self._may_be_chosen(ballot):
                    return self._without(ballot)
                if applied is None:
                    return Placed(None, True)
                after = applied
        if highest is None:
            return Placed(found)
        sequence = max(value.sequence, highest.sequence + 1)
        return Placed(Found(ballot, msgspec.structs.replace(after, sequence=sequence), settled), after is not value)

    @property
    def _counted(self) -> list[PrepareReply]:
        return [reply for reply in self.promises.values() if reply.accepted not in self.dropped]

    def _below(self, newest: Ballot, value: Value) -> Value | None:
        """The newest value below a create that lies under its own ballot; None: there is none, or the create was
        carried on."""
        if not taken_by_create(newest, value):
            return None
        below = [
            (reply.accepted, reply.value)
            for reply in self._counted
            if reply.accepted < newest
            and reply.value is not None
            and reply.value.sequence
            and not taken_by_create(reply.accepted, reply.value)
        ]
        return max(below, key=lambda pair: pair[0])[1] if below else None

    def _may_be_chosen(self, ballot: Ballot) -> bool:
        """Whether a create may be chosen under its ballot. The replicas that have promised and do not have it never
        take it: they refuse its ballot now.
        """
        quorum = self.quorum
        if ballot == self.lost_at:
            return False
        has = [disk for disk in quorum.disks if disk not in self.promises or self.promises[disk].accepted == ballot]
        return quorum.may_have_chosen(has)

    def _without(self, ballot: Ballot) -> Placed:
        rest = self._replace(dropped=self.dropped | {ballot})
        newest = max(rest._counted, key=lambda reply: reply.accepted)
        return rest.placed(Found(newest.accepted, newest.value, False))


def overtaken(
    reported: Iterable[tuple[Ballot, Value | None]], newest: Ballot, value: Value | None, rules: Rules = RULES
) -> Value | None:
    """The value with the highest sequence below a created one that was found at ``newest`` (rule 14). None when
    ``value`` was not created, or nothing is below it.
    """
    if value is None or not created(value) or not rules.created_follows_overtaken:
        return None
    below = [
        other
        for ballot, other in reported
        if ballot < newest and other is not None and other.sequence and other.operation != value.operation
    ]
    return max(below, key=lambda other: other.sequence, default=None)

"""The answers to one round of requests, counted: a create, a prepare, an accept; and the ballots in their way. Pure.

Each counts with the quorum of the view that it was sent under. What follows from the counts is decided in ``proposer``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, NamedTuple

from storaged.meta.consensus.acceptor import HIGH_WATER_BLOCK_US
from storaged.meta.consensus.quorums import Quorum, View
from storaged.meta.consensus.register import COUNTER_AHEAD_MAX_US, Lineage, Rules, Verdict, credible
from storaged.meta.messages import AcceptReply, PrepareReply
from storaged.meta.names import Ballot, Value
from storaged.meta.ports import SmallCopies

OK: Final = int(Verdict.OK)
FENCED: Final = int(Verdict.FENCED)
HELD: Final = int(Verdict.HELD)
PREEMPTED: Final = int(Verdict.PREEMPTED)
AHEAD: Final = int(Verdict.AHEAD)
UNSTORED: Final = int(Verdict.UNSTORED)
FULL: Final = int(Verdict.FULL)
_OVERTAKEN: Final = frozenset((int(Verdict.PREEMPTED), int(Verdict.EPOCH), int(Verdict.NEWER)))
"""Where another ballot, or another layout, may help."""
RESTARTS_US = 60 * HIGH_WATER_BLOCK_US
"""So far above the others' promises sixty restarts can take what a replica has promised."""
NO_ANSWER: Final = -1
"""In place of a verdict: the call failed."""


class Found(NamedTuple):
    """The newest value of those who promised. ``settled``: a quorum reported it under this ballot."""

    ballot: Ballot
    value: Value | None
    settled: bool


class Rivals:
    """The counters of other proposers' ballots that replicas say are in the way."""

    __slots__ = ("_far", "_far_by_majority", "above")

    def __init__(self, rules: Rules) -> None:
        self._far_by_majority = rules.far_by_majority
        self._far: dict[str, int] | None = None
        """Counters that no clock near this one explains, by the replica that reports them."""
        self.above = 0
        """The highest of the others."""

    def note(self, disk: str, counter: int, now_us: int) -> bool:
        """Notes the counter that a replica reports. Returns False if it is so far ahead of this clock that it counts
        only when a quorum reports such counters. ``disk``: the replica; empty: not counted for that quorum.
        """
        if counter > now_us + COUNTER_AHEAD_MAX_US and self._far_by_majority:
            if disk:
                self._far = self._far or {}
                self._far[disk] = counter
            return False
        self.above = max(self.above, counter)
        return True

    def above_for(self, quorum: Quorum) -> tuple[int, bool]:
        """The counter that the next ballot has to exceed, and whether a quorum vouches for one that is far off. A
        replica that was restarted is somewhat above what the quorum vouches for.
        """
        if not self._far:
            return self.above, False
        far = quorum.vouched(self._far)
        restarted = [counter for counter in self._far.values() if counter <= far + RESTARTS_US]
        return max(self.above, far, *(restarted if far else ())), far > 0


class CreateRound:
    """The answers to a create."""

    __slots__ = ("_held", "_quorum", "_small", "epoch", "not_taken_by", "refused", "slow", "taken")

    def __init__(self, view: View, small: SmallCopies | None) -> None:
        self._quorum = view.quorum
        self.epoch = view.epoch
        self._small = small
        self._held: list[str] = []
        self.refused = self.slow = False
        self.taken: list[str] = []
        """Disks that have the value, and their small copy."""
        self.not_taken_by: list[str] = []
        """Disks that have not taken it, or do not answer."""

    def add(self, disk: str, reply: AcceptReply | None) -> bool:
        """Whether the disk has taken the value; None: the call failed."""
        if reply is not None and reply.verdict == OK and (reply.copy_synced or self._small is None):
            self.taken.append(disk)
            return True
        self.not_taken_by.append(disk)
        if reply is not None:
            self.refused = True
            if reply.verdict == HELD or reply.final:
                self._held.append(disk)
        return False

    @property
    def chosen(self) -> bool:
        taken, quorum, small = self.taken, self._quorum, self._small
        if len(taken) < quorum.fewest or not (quorum.single or quorum.met(taken)):
            return False
        return small is None or small.enough(frozenset(taken))

    @property
    def over(self) -> bool:
        """It can't be chosen any more, as far as answers go; or it takes long, and a replica has refused it."""
        not_taken_by, quorum = self.not_taken_by, self._quorum
        if len(self.taken) + len(not_taken_by) == len(quorum.disks):
            return True
        return bool(not_taken_by) and ((self.slow and self.refused) or quorum.lost(not_taken_by))

    def note_held(self, lineage: Lineage) -> None:
        """When a quorum has refused the create for good, it is not chosen at its ballot. Tells the lineage."""
        if self._held and self._quorum.met(self._held):
            lineage.create_held(everywhere=len(self._held) == len(self._quorum.disks))


class PrepareRound:
    """The answers to a prepare. A reply is *doubted* when it reports a value that no gateway wrote, or a sequence that
    no number of writes reaches."""

    __slots__ = (
        "_answered",
        "_doubted",
        "_finals",
        "_late",
        "_lenders",
        "_quorum",
        "damaged_below",
        "failed",
        "promised",
    )

    def __init__(self, quorum: Quorum) -> None:
        self._quorum = quorum
        self._answered = 0
        self._doubted: dict[str, PrepareReply] = {}
        self._finals: list[str] = []
        self._lenders: list[str] = []
        self._late: dict[str, PrepareReply] = {}
        self.promised: dict[str, PrepareReply] = {}
        self.failed: dict[str, int] = {}
        """Verdicts of the disks that have not promised."""
        self.damaged_below = 0
        """The highest counter that a replica with a damaged row may have promised."""

    def add(self, disk: str, reply: PrepareReply | None, doubted: bool) -> bool:
        """Whether a quorum has promised now. A quorum of doubted replies counts too: there is no better value, so it
        may be overwritten.
        """
        quorum, promised = self._quorum, self.promised
        self._answered += 1
        if reply is None or reply.verdict != OK:
            self.failed[disk] = NO_ANSWER if reply is None else reply.verdict
            if reply is not None and reply.final:
                self._finals.append(disk)
            elif reply is not None and reply.lends and reply.verdict == FENCED:
                self._lenders.append(disk)
        elif doubted:
            self._doubted[disk] = reply
        else:
            promised[disk] = reply
            if len(promised) >= quorum.fewest and (quorum.single or quorum.met(promised)):
                return True
        if self._doubted and quorum.met(self._doubted):
            self.promised = {**promised, **self._doubted}
            return True
        return False

    def add_late(self, disk: str, reply: PrepareReply | None, wanted: bool) -> None:
        """An answer after a quorum has promised. ``wanted``: a promise counts all the same."""
        self._answered += 1
        if reply is not None and reply.verdict == OK:
            (self.promised if wanted else self._late)[disk] = reply
        elif reply is not None:
            self.failed[disk] = reply.verdict

    @property
    def preempted(self) -> bool:
        """Some replica has promised a higher ballot: it answers, and a higher one may have its promise."""
        return PREEMPTED in self.failed.values()

    @property
    def all_promised(self) -> Mapping[str, PrepareReply]:
        """With those that came after a quorum had promised."""
        return {**self.promised, **self._late}

    @property
    def everyone(self) -> bool:
        """All replicas have answered."""
        return self._answered == len(self._quorum.disks)

    @property
    def lost(self) -> bool:
        """No quorum can promise any more. Where one replica alone says that its fence lends, the others are heard too:
        of two that differ one may lie, and the one that has the nonce of such a fence must not be kept out.
        """
        if not self.failed and not self._doubted:
            return False
        if (self._doubted or (self._lenders and not self.fence_lends)) and not self.everyone:
            return False
        return self._quorum.lost({**self.failed, **self._doubted})

    @property
    def overtaken(self) -> bool:
        """A higher ballot, or a newer layout, was in the way somewhere."""
        return not _OVERTAKEN.isdisjoint(self.failed.values())

    @property
    def ahead(self) -> bool:
        """Some replica refuses the ballot as too far ahead of its clock."""
        return AHEAD in self.failed.values()

    @property
    def fenced(self) -> bool:
        return self._quorum.lost([disk for disk, verdict in self.failed.items() if verdict == FENCED])

    @property
    def fenced_for_ever(self) -> bool:
        return self._quorum.lost(self._finals)

    @property
    def fence_lends(self) -> bool:
        """No quorum can promise, for fences that lend alone."""
        return self._quorum.lost(self._lenders)

    def newest(self) -> Found:
        replies = iter(self.promised.values())
        newest = next(replies)
        alike = newest.copied
        for reply in replies:
            if reply.accepted != newest.accepted or not reply.copied or reply.value != newest.value:
                alike = False
                if reply.accepted > newest.accepted:
                    newest = reply
        if alike:
            return Found(newest.accepted, newest.value, True)
        agreed = self._agreed(self.promised)
        if agreed is not None and agreed.ballot == newest.accepted:
            return agreed
        return Found(newest.accepted, newest.value, False)

    def chosen(self) -> Found | None:
        """What a quorum of all that have promised reports, although a lone replica reports a higher ballot, or another
        value under the same one. Nothing above it is chosen, nor can be: the quorum refuses all that is below this
        round's ballot. That holds for "never written" too. A record that only one replica has was never acknowledged:
        it is a first write that was cut short, or one that the replica has made up.
        """
        return self._agreed(self.all_promised)

    def undisputed(self, found: Found) -> Found | None:
        """``found``, unless another replica reports another value under the same ballot: one of them lies. Then the
        value that a quorum of all that have promised holds, under whatever ballots: a value that was proposed again may
        have reached one of the quorum alone under the later ballot. What was chosen before it is in its past, and
        nothing above it is chosen, nor can be, as in ``chosen``. None: there is no such value.
        """
        promises = self.all_promised
        if all(reply.accepted != found.ballot or reply.value == found.value for reply in promises.values()):
            return found
        agreed = self._quorum.agreed({disk: (reply.value,) for disk, reply in promises.items()})
        if agreed is None:
            return None
        (value,) = agreed
        return Found(max(reply.accepted for reply in promises.values() if reply.value == value), value, False)

    def credible(self) -> Found | None:
        """See ``register.credible``."""
        reported = {disk: (reply.accepted, reply.value) for disk, reply in self.promised.items()}
        found = credible(self._quorum, reported)
        return None if found is None else Found(*found)

    def _agreed(self, promises: Mapping[str, PrepareReply]) -> Found | None:
        """What a quorum accepted with its copy. Ballot and value both have to agree: a replica that lies may report
        another value under the ballot of the others.
        """
        copied = {disk: (reply.accepted, reply.value) for disk, reply in promises.items() if reply.copied}
        agreed = self._quorum.agreed(copied)
        return None if agreed is None else Found(*agreed, True)


class AcceptRound:
    """The answers to an accept. ``copies``: small copies of this change that have to be synced, too."""

    __slots__ = ("_accepted", "_copies", "_lenders", "_quorum", "_refused", "attempt", "failed", "turn")

    def __init__(self, quorum: Quorum, copies: SmallCopies | None, turn: int = 0, attempt: bytes = b"") -> None:
        """``turn`` of the proposer. ``attempt``: the operation id of the value, when it is new."""
        self.turn = turn
        self.attempt = attempt
        self._quorum = quorum
        self._copies = copies
        self._accepted: dict[str, bool] = {}
        """Whether each disk that accepted has synced its copy."""
        self.failed: dict[str, int] = {}
        """Verdicts of the disks that have not accepted."""
        self._lenders: list[str] = []
        self._refused = 0

    def add(self, disk: str, reply: AcceptReply | None) -> bool:
        """Whether the value is chosen now, and its copies are where they must be."""
        if reply is None or reply.verdict != OK:
            self.failed[disk] = NO_ANSWER if reply is None else reply.verdict
            if reply is not None and reply.lends and reply.verdict == FENCED:
                self._lenders.append(disk)
            return False
        accepted, quorum = self._accepted, self._quorum
        accepted[disk] = reply.copy_synced
        if len(accepted) < quorum.fewest or not (quorum.single or quorum.met(accepted)):
            return False
        return self._copies is None or self._copies.enough(self._synced())

    def note_refusal(self, turn: int, reply: AcceptReply, lineage: Lineage, rules: Rules) -> None:
        """Of a replica that has accepted nothing under the ballot, nor ever will. Tells the lineage when all have
        refused (rule 21).
        """
        if turn == self.turn and self.attempt and reply.verdict == PREEMPTED:
            self._refused += 1
            if self._refused == (len(self._quorum.disks) if rules.refused_by_all else self._quorum.fewest):
                lineage.refused(self.attempt)

    def _synced(self) -> frozenset[str]:
        return frozenset([disk for disk, copy_synced in self._accepted.items() if copy_synced])

    @property
    def overtaken(self) -> bool:
        """A higher ballot, or a newer layout, was in the way somewhere."""
        return not _OVERTAKEN.isdisjoint(self.failed.values())

    @property
    def copies_synced(self) -> int:
        return len(self._synced())

    @property
    def chosen(self) -> bool:
        """A quorum has accepted the value, wherever its copies are."""
        return self._quorum.met(self._accepted)

    @property
    def fenced(self) -> bool:
        return self._quorum.lost([disk for disk, verdict in self.failed.items() if verdict == FENCED])

    @property
    def fence_lends(self) -> bool:
        """No quorum can accept, for fences that lend alone."""
        return self._quorum.lost(self._lenders)

    @property
    def without_copy(self) -> bool:
        """Some replica does not have the small copy that the value names."""
        return UNSTORED in self.failed.values()

    @property
    def full(self) -> bool:
        """So many replicas have no room for the value that no quorum is left."""
        return self._quorum.lost([disk for disk, verdict in self.failed.items() if verdict == FULL])

    @property
    def lost(self) -> bool:
        return self._quorum.lost(self.failed)

    @property
    def everyone(self) -> bool:
        """All replicas have answered."""
        return len(self._accepted) + len(self.failed) == len(self._quorum.disks)

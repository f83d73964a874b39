"""One change of one register, from its first request to its outcome: the proposer as a state machine. Pure.

Events come in as calls, each returns whether a new state was entered, and the state says what the shell does next
(``State``). The machine does no I/O, reads no clock and draws nothing: times come with the events, ballots from
``Ballots``. Every decision about consensus is here: which value is adopted, when a value counts as chosen, which
answers count, when a higher ballot is tried, when the outcome is unknown.

Theory of operation
    An attempt draws a ballot and asks for promises. With a quorum of them it looks at the value with the highest
    accepted ballot, applies the change to it, and asks all replicas to accept the result. The change is chosen when a
    quorum has it on disk. What comes between (a higher ballot, a newer layout, replicas that do not answer) ends the
    attempt, and another begins after a pause that grows, until the deadline.

    A *create* comes first where the register was probably never written (``register`` says why that is safe). When it
    is refused, attempts follow, with its lineage and with the highest ballot that was in its way.

    The first attempt is *sparing*, unless the change is ``thorough``: the shell asks the disks of one quorum, and the
    others only when one of them fails or is slow. A refusal ends it at once, for then another proposer is at work.

    Once an accept was sent, only a later prepare can say what became of it. ``Lineage`` judges the value that it finds.
    Where it can't, the outcome is unknown.

    A value of the system table that no gateway wrote does not count (``Shared.doubts``), whatever ballot its replica
    reports: the replica is treated as one that does not answer. So the value of the others goes on, and is accepted
    there too.

    The copy of a small object goes with the accept, and a replica that can't store its copy accepts nothing. So from
    the moment that a record is chosen, a quorum of its replicas has had its copy. To keep that true, a value that a
    prepare found, and that no quorum has confirmed yet, is accepted again only together with its copy, which some
    replica has to give first (CARRYING). *The exception*: a copy that is lost does not block a register for ever. A
    settling round writes the row even where the replica can't store the copy. After ``CARRY_TRIES`` attempts that found
    no copy the record goes on without one, and ``uncarried`` says so, for repair. Such a record may be confirmed with
    its copy on fewer replicas, or on none that answers.

    A change with a small copy succeeds when the acknowledge rule (``SmallCopies.enough``) holds for the replicas that
    have synced their copy, besides the quorum. Where it can't hold any more the outcome is unknown: the record is
    chosen, on fewer copies than it should have.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

import msgspec

from storaged.errors import NoSuchBucket, OutcomeUnknown, ServiceUnavailable, StoragedError
from storaged.meta.consensus.quorums import View
from storaged.meta.consensus.register import (
    COUNTER_AHEAD_MAX_US,
    NEVER,
    Ballots,
    Lineage,
    Rules,
    Standing,
    Verdict,
    created,
    credible,
    may_create,
    overtaken,
    settled_ballot,
    shown,
)
from storaged.meta.messages import Accept, AcceptReply, Create, Prepare, PrepareReply
from storaged.meta.names import Ballot, Change, RegisterName, Table, Value
from storaged.meta.ports import Outcome, SmallCopies, Update
from storaged.wire import Buffer

Fragments = Sequence[tuple[bytes, Sequence[Buffer]]]
"""(encoded fragment header, payload) of a small copy for each replica index, as in ``SmallCopies``. Empty: no copy."""

BACKOFF_FIRST_S = 0.005
BACKOFF_MAX_S = 0.5

STRAGGLERS_S = 0.05
"""How long a settling round waits for the replicas beyond the quorum, to learn of damaged rows and of higher
promises."""

SYSTEM_STRAGGLERS_S = 1.0
"""As that, where two replicas of a register of the system table differ: one of them may lie, and only the answer of the
third keeps the lie from counting. A slow disk is no reason to go without it. A replica that hangs costs this much, and
only where a write was cut short."""

SOUGHT_MAX = 4
"""How often an attempt begins again for a third replica that has promised a higher ballot. Two proposers in turn need
fewer, and a liar that always refuses leaves the two others alone."""

CARRY_TRIES = 2
"""How many attempts may end because the copy of an unconfirmed record was not to be had; then the record is settled
without it."""

ALL_REPLICAS_TRIES = 2
"""How often a settling round begins again, with a higher ballot, for a replica that refuses although a quorum has
promised. A replica that has restarted refuses everything below its high-water ballot, and is the one that lags."""

CREATE_AHEAD_MAX_US = 10_000_000
"""With a ballot further ahead of this clock a change asks first: clocks refuse creates, but never promises."""


class State(IntEnum):
    """Where a change is, and what the shell does when the state is entered."""

    NEW = 0
    """Nothing was asked yet: call ``create`` or ``begin``."""
    CREATING = 1
    """Send ``request`` with ``fragments`` to all disks of ``view``; give each answer to ``created``. After a while:
    ``hurry``."""
    PREPARING = 2
    """Send ``request`` to all disks of ``view``, or when ``sparing`` to those of one quorum first; give each answer to
    ``promised``."""
    GATHERING = 3
    """A quorum has promised. Wait up to ``gather_s`` for the others, and see that all were asked; then ``waited``."""
    SYNCING = 4
    """Wait until the fragments that the change names are durable; then ``synced``, or ``data_failed``. The deadline
    waits too."""
    CARRYING = 5
    """Fetch the small copy with the data id ``carry`` from any replica; then ``carried``."""
    ACCEPTING = 6
    """Send ``request`` with ``fragments`` to all disks of ``view``; give each answer to ``accepted``."""
    RETRYING = 7
    """Pause up to ``pause_s``, renew the age of the fragments that the change names, or call ``data_failed``; then
    ``begin``."""
    DONE = 8
    """``outcome``."""
    FAILED = 9
    """``error``."""


class Event(IntEnum):
    """The calls that may change the state."""

    CREATE = 0
    BEGIN = 1
    CREATED = 2
    PROMISED = 3
    ACCEPTED = 4
    HURRY = 5
    WAITED = 6
    SYNCED = 7
    CARRIED = 8
    DATA_FAILED = 9
    EXPIRE = 10


NEW, CREATING, PREPARING, GATHERING, SYNCING, CARRYING, ACCEPTING, RETRYING, DONE, FAILED = State
"""Globals: a member is found through its enum's class at twice the price."""

_DECIDED: Final = (SYNCING, CARRYING, ACCEPTING, RETRYING, DONE, FAILED)

TRANSITIONS: Final[Mapping[State, Mapping[Event, Sequence[State]]]] = {
    NEW: {Event.CREATE: (CREATING, RETRYING), Event.BEGIN: (PREPARING,)},
    CREATING: {Event.CREATED: (RETRYING, DONE), Event.HURRY: (RETRYING,), Event.EXPIRE: (FAILED,)},
    PREPARING: {Event.PROMISED: (GATHERING, *_DECIDED), Event.EXPIRE: (FAILED,)},
    GATHERING: {Event.PROMISED: _DECIDED, Event.WAITED: (GATHERING, *_DECIDED), Event.EXPIRE: (FAILED,)},
    SYNCING: {Event.SYNCED: (CARRYING, ACCEPTING, FAILED), Event.DATA_FAILED: (FAILED,)},
    CARRYING: {Event.CARRIED: (ACCEPTING, RETRYING), Event.EXPIRE: (FAILED,)},
    ACCEPTING: {Event.ACCEPTED: (RETRYING, DONE, FAILED), Event.EXPIRE: (FAILED,)},
    RETRYING: {Event.BEGIN: (PREPARING,), Event.DATA_FAILED: (FAILED,), Event.EXPIRE: (FAILED,)},
    DONE: {},
    FAILED: {},
}
"""The states that each event may lead to. The diagram in README.md shows the same."""

OK: Final = int(Verdict.OK)
PREEMPTED: Final = int(Verdict.PREEMPTED)
FENCED: Final = int(Verdict.FENCED)
DAMAGED: Final = int(Verdict.DAMAGED)
HELD: Final = int(Verdict.HELD)
AHEAD: Final = int(Verdict.AHEAD)
_OVERTAKEN: Final = frozenset((int(Verdict.PREEMPTED), int(Verdict.EPOCH), int(Verdict.NEWER)))
"""Where another ballot, or another layout, may help."""


@dataclass(frozen=True)
class Shared:
    """What the proposers of one process share. ``counts`` has at least ``preempted``, ``unknown``, ``unavailable`` and
    ``identity_rounds``. ``doubts(name, disk, value)``: whether no gateway wrote the value that a disk reports; asked of
    registers of the system table alone."""

    ballots: Ballots
    rules: Rules
    counts: dict[str, int]
    doubts: Callable[[RegisterName, str, Value | None], bool] = lambda name, disk, value: False


class Proposer:
    """One change. ``state`` says what to do next; late answers and events of states that are over change nothing."""

    __slots__ = (
        "_accepted",
        "_answered",
        "_begun",
        "_change",
        "_conclusion",
        "_copies",
        "_creating",
        "_damaged_below",
        "_doubted",
        "_failed",
        "_far",
        "_finals",
        "_found",
        "_found_at",
        "_held",
        "_hurried",
        "_now_us",
        "_promised",
        "_refused",
        "_seeking",
        "_settled",
        "_shared",
        "_sought",
        "_taken",
        "_tries",
        "above",
        "ahead",
        "ballot",
        "barrier",
        "by_create",
        "carry",
        "commit",
        "error",
        "fenced",
        "fragments",
        "gather_s",
        "lineage",
        "name",
        "nonce",
        "outcome",
        "pause_s",
        "request",
        "settling",
        "small",
        "sparing",
        "state",
        "thorough",
        "turn",
        "uncarried",
        "untaken",
        "update",
        "view",
    )

    view: View
    ballot: Ballot
    request: Prepare | Accept

    def __init__(
        self,
        shared: Shared,
        name: RegisterName,
        update: Update,
        lineage: Lineage,
        *,
        small: SmallCopies | None = None,
        nonce: bytes = b"",
        barrier: bool = False,
        settling: bool = False,
        commit: bool = False,
        thorough: bool = False,
    ) -> None:
        """``nonce`` of the scope's fence. ``barrier``: the change names fragments that are not durable yet.
        ``settling``: there is no change, the register is to be settled; ``commit``: by an identity round in any case.
        ``thorough``: no attempt is sparing."""
        self._shared = shared
        self.name = name
        self.update = update
        self.lineage = lineage
        self.small = small
        self.nonce = nonce
        self.barrier = barrier
        self.settling = settling
        self.commit = commit
        self.thorough = thorough
        self.state = NEW
        self.turn = 0
        """Counts the requests that were sent to several disks: answers name the one that they belong to."""
        self.sparing = False
        self.above = 0
        """The counter of the highest ballot that was in the way."""
        self.ahead = False
        """The ballot of the create was too far ahead of a clock, here or at a replica."""
        self.by_create = False
        """The create was chosen."""
        self.fenced = False
        """It has failed for a fence on a quorum."""
        self.uncarried = False
        """The record found was accepted again without its copy, since no replica gives that."""
        self.fragments: Fragments = ()
        self.carry = b""
        self.gather_s = self.pause_s = 0.0
        self.outcome: Outcome | None = None
        self.error: Exception | None = None
        self._begun = False
        self._tries = self._sought = 0
        self._far: dict[str, int] | None = None
        """Counters in the way that no clock near this one explains, by the replica that reports them."""

    # --- create -------------------------------------------------------------------------------------------------------

    def create(self, view: View, change: Change, now_us: int) -> bool:
        """``change`` is what the update makes of nothing."""
        self.view, self._now_us = view, now_us
        ballot = self.ballot = self._shared.ballots.next(view.epoch, self.above, now_us)
        self.ahead = ballot.counter > now_us + CREATE_AHEAD_MAX_US
        self._creating = view.quorum
        self._taken: list[str] = []
        self.untaken: list[str] = []
        """Disks that have not taken the create."""
        self._held: list[str] = []
        self._refused = self._hurried = False
        if self.ahead:
            return self._retry()
        value = self.lineage.create(change, ballot)
        self.outcome = Outcome(None, value)
        self.request = Create("", self.name, ballot, value)
        if self.small is not None:
            self.fragments = self.small.fragments
        self.turn += 1
        self.state = CREATING
        return True

    def created(self, disk: str, reply: AcceptReply | None) -> bool:
        """An answer to the create; None: the call failed. Late ones still say whether the create may have been
        taken."""
        taken, quorum, small = self._taken, self._creating, self.small
        if reply is not None and reply.verdict == OK and (reply.copy_synced or small is None):
            taken.append(disk)
        else:
            self.untaken.append(disk)
            if reply is not None:
                self._note_refusal(disk, reply)
        if self.state is not CREATING:
            self._note_held()
            return False
        if (
            len(taken) >= quorum.fewest
            and (quorum.single or quorum.met(taken))
            and (small is None or small.enough(frozenset(taken)))
        ):
            self.by_create = True
            self.state = DONE
            return True
        untaken = self.untaken
        everyone = len(taken) + len(untaken) == len(quorum.disks)
        if everyone or (untaken and ((self._hurried and self._refused) or quorum.lost(untaken))):
            return self._not_created()
        return False

    def _note_refusal(self, disk: str, reply: AcceptReply) -> None:
        self._refused = True
        self._note_above("", reply.promised.counter)
        self.ahead = self.ahead or reply.verdict == AHEAD
        if reply.verdict == HELD or reply.final:
            self._held.append(disk)
        if reply.verdict == PREEMPTED and self.state is CREATING:
            self._shared.counts["preempted"] += 1

    def _not_created(self) -> bool:
        self._note_held()
        self.outcome = None
        return self._retry()

    def _note_held(self) -> None:
        """What refuses a create for good refuses it for ever: the attempts that follow need not fear it any more."""
        held, quorum = self._held, self._creating
        if quorum.met(held):
            self.lineage.create_held(everywhere=len(held) == len(quorum.disks))

    def hurry(self) -> bool:
        """The create takes long. With a refusal, or as soon as there is one, the change asks for promises instead:
        those of the other replicas suffice then."""
        if self.state is not CREATING:
            return False
        self._hurried = True
        return self._not_created() if self._refused else False

    # --- prepare ------------------------------------------------------------------------------------------------------

    def begin(self, view: View, now_us: int) -> bool:
        """An attempt, under a new ballot."""
        self.view, self._now_us = view, now_us
        above, far = self.above, 0
        if self._far:
            far = view.quorum.vouched(self._far)
            above = max(above, far)
        ballot = self.ballot = self._shared.ballots.next(view.epoch, above, now_us, confirmed=far > 0)
        self.sparing = not (self._begun or self.thorough)
        self._begun = True
        self._promised: dict[str, PrepareReply] = {}
        self._doubted: dict[str, PrepareReply] = {}
        self._failed: dict[str, int] = {}
        self._finals: set[str] = set()
        self._answered = self._damaged_below = 0
        self._seeking = False
        self.turn += 1
        self.request = Prepare("", self.name, ballot, self.nonce)
        self.fragments = ()
        self.state = PREPARING
        return True

    def promised(self, turn: int, disk: str, reply: PrepareReply | None) -> bool:
        """An answer to the prepare of this turn; None: the call failed."""
        if turn != self.turn:
            return False
        self._answered += 1
        if self.state is not PREPARING:
            return self._gather(disk, reply) if self.state is GATHERING else False
        if reply is not None and reply.verdict == OK:
            if self.name.table == Table.SYSTEM and self._shared.doubts(self.name, disk, reply.value):
                self._doubted[disk] = reply
            else:
                self._promised[disk] = reply
                quorum, promised = self.view.quorum, self._promised
                if len(promised) >= quorum.fewest and (quorum.single or quorum.met(promised)):
                    return self._wait_for_others(STRAGGLERS_S) if self.commit else self._look()
                if not (self._failed or self._doubted):
                    return False
        else:
            self._failed[disk] = -1 if reply is None else reply.verdict
            if reply is not None:
                self._note(disk, reply)
                if self.sparing:
                    self._shared.counts["preempted"] += reply.verdict == PREEMPTED
                    return self._retry()
        return self._look_for_other_ways()

    def _look_for_other_ways(self) -> bool:
        """No quorum has promised yet. With what is doubted as the only way the change goes on, for that may be written
        over."""
        quorum = self.view.quorum
        if self._doubted and quorum.met(self._doubted):
            self._promised |= self._doubted
            return self._wait_for_others(STRAGGLERS_S) if self.commit else self._look()
        if not quorum.lost({**self._failed, **self._doubted}) or (self._doubted and self._answered < len(quorum.disks)):
            return False
        return self._not_promised()

    def _note(self, disk: str, reply: PrepareReply) -> None:
        """What a refusal says about the ballots of others."""
        if reply.final:
            self._finals.add(disk)
        counter = reply.promised.counter
        if reply.verdict == PREEMPTED:
            self._note_above(disk, counter)
        elif reply.verdict == DAMAGED and self._note_above(disk, counter):
            self._damaged_below = max(self._damaged_below, counter)

    def _note_above(self, disk: str, counter: int) -> bool:
        """A counter that is in the way at a replica. False: it is so far off that it counts only with a quorum of
        such."""
        if counter > self._now_us + COUNTER_AHEAD_MAX_US and self._shared.rules.far_by_majority:
            if disk:
                self._far = self._far or {}
                self._far[disk] = counter
            return False
        self.above = max(self.above, counter)
        return True

    def _not_promised(self) -> bool:
        """No quorum can promise any more.

        A fence counts when a majority has it, as it had when it was set: acceptors have no keys that could vouch for
        it, and what one of them says alone must neither end a bucket nor have the data of one deleted."""
        if self.sparing:
            return self._retry()
        quorum, reasons = self.view.quorum, self._failed.values()
        if not _OVERTAKEN.isdisjoint(reasons):
            self._shared.counts["preempted"] += 1
            return self._retry()
        if quorum.lost([disk for disk, verdict in self._failed.items() if verdict == FENCED]):
            return self._fenced(quorum.lost(self._finals))
        if AHEAD in reasons:
            return self._give_up(
                "its replicas refuse ballots more than an hour ahead of their clocks: this node's clock is, or theirs "
                "are behind"
            )
        if not self.lineage.open:
            return self._give_up("no majority of its replicas answers")
        return self._retry()

    # --- gather -------------------------------------------------------------------------------------------------------

    def _wait_for_others(self, seconds: float) -> bool:
        if self._answered < len(self.view.quorum.disks):
            self.gather_s = seconds
            self.state = GATHERING
            return True
        return self._gathered()

    def _gather(self, disk: str, reply: PrepareReply | None) -> bool:
        if reply is not None:
            self._note(disk, reply)
            if reply.verdict == OK and self._asks_all and not self._shared.doubts(self.name, disk, reply.value):
                self._promised[disk] = reply
        return self._gathered() if self._answered == len(self.view.quorum.disks) else False

    @property
    def _asks_all(self) -> bool:
        """A register of the system table is led by what all replicas report, where they differ (rule 16)."""
        return self.name.table == Table.SYSTEM and self._shared.rules.lone_ballot_led_by_none

    def waited(self) -> bool:
        """``gather_s`` are over."""
        return self._gathered() if self.state is GATHERING else False

    def _gathered(self) -> bool:
        if self._seeking:
            return self._sought_out()
        if self._damaged_below > self.ballot.counter or (
            self.above >= self.ballot.counter and self._tries < ALL_REPLICAS_TRIES
        ):
            return self._retry()
        return self._look()

    def _look(self) -> bool:
        """At the newest value of those who promised."""
        self._look_at_newest()
        if not self._settled and self._asks_all:
            self._seeking = True
            return self._wait_for_others(SYSTEM_STRAGGLERS_S)
        return self._judge()

    def _look_at_newest(self) -> None:
        replies = iter(self._promised.values())
        newest = next(replies)
        alike = True
        for reply in replies:
            if reply.accepted != newest.accepted:
                alike = False
                if reply.accepted > newest.accepted:
                    newest = reply
        self._found_at: Ballot = newest.accepted
        self._found: Value | None = newest.value
        self._settled: bool = alike or self._settled_at() == newest.accepted

    def _settled_at(self) -> Ballot | None:
        return settled_ballot(self.view.quorum, {disk: reply.accepted for disk, reply in self._promised.items()})

    def _sought_out(self) -> bool:
        self._look_at_newest()
        found = credible(
            self.view.quorum, {disk: (reply.accepted, reply.value) for disk, reply in self._promised.items()}
        )
        if found is not None:
            self._found_at, self._found, self._settled = found
        elif self.above >= self.ballot.counter and self._sought < SOUGHT_MAX:
            self._sought += 1
            return self._retry()
        return self._judge()

    # --- decide -------------------------------------------------------------------------------------------------------

    def _judge(self) -> bool:
        """What became of earlier attempts, as the value found shows."""
        if not self._settled:
            self._put_created_in_place()
        lineage, found = self.lineage, self._found
        standing = lineage.judge(found, self._found_at, self._settled)
        if standing is Standing.CLEAR:
            return self._apply()
        if self.sparing:
            return self._retry()
        if standing is Standing.UNKNOWN or found is None:
            self._shared.counts["unknown"] += 1
            unknown = "The write met others at the same key and may have been applied before them. Read, or retry."
            return self._fail(OutcomeUnknown(unknown))
        self._conclusion: Outcome | Exception | None = Outcome(shown(lineage.base_of(found)), found)
        if self._settled and self.small is None:
            return self._conclude()
        self._change: Change | None = None
        self._copies = self.small
        return self._accept_with_copy()

    def _put_created_in_place(self) -> None:
        """A created value gets the sequence after what it has overtaken (rule 14)."""
        value = self._found
        if value is None or not created(value) or not may_create(self.name):
            return
        lost_at = self.lineage.lost_at()
        reported = [(reply.accepted, reply.value) for reply in self._promised.values() if reply.accepted != lost_at]
        beneath = overtaken(reported, self._found_at, value, self._shared.rules)
        if beneath is not None:
            self._found = msgspec.structs.replace(value, sequence=beneath.sequence + 1)

    def _apply(self) -> bool:
        value = shown(self._found)
        try:
            change = self.update(value)
        except Exception as error:
            return self._settle(error)
        if change is None:
            return self._settle(Outcome(value, value))
        self._change = change
        if self.barrier:
            self.state = SYNCING
            return True
        return self._propose()

    def synced(self) -> bool:
        """The fragments that the change names are durable."""
        if self.state is not SYNCING:
            return False
        self.barrier = False
        return self._propose()

    def data_failed(self, error: Exception) -> bool:
        """The fragments that the change names can't be made durable, or can't be seen again."""
        if self.state is not SYNCING and self.state is not RETRYING:
            return False
        if isinstance(error, StoragedError) and self.lineage.open:
            return self._give_up("its fragments could not be seen again")
        return self._fail(error)

    def _propose(self) -> bool:
        if self.lineage.exhausted:
            return self._give_up("too many attempts were pre-empted")
        self._copies = self.small
        found, change = self._found, self._change
        assert change is not None
        if self.small is None and (found is None or change.payload != found.payload):
            return self._accept(())
        return self._accept_with_copy()

    def _settle(self, conclusion: Outcome | Exception) -> bool:
        """Makes sure that the value found stays what this ballot saw, so that it may be reported (rules 4 and 5)."""
        self._conclusion = conclusion
        if not self.settling and not self._shared.rules.failed_condition_settles:
            return self._conclude()
        if self._settled and not self.commit and not self.lineage.open:
            return self._conclude()
        self._shared.counts["identity_rounds"] += 1
        self._change = self._copies = None
        return self._accept_with_copy()

    # --- accept -------------------------------------------------------------------------------------------------------

    def _accept_with_copy(self) -> bool:
        """With the copy that the value names: the change's own, or where no quorum has confirmed the value found, one
        of a replica."""
        if self._copies is not None:
            return self._accept(self._copies.fragments)
        found = self._found
        if self._settled or found is None or not found.payload or not self._shared.rules.copies_travel:
            return self._accept(())
        self.carry = found.payload
        self.state = CARRYING
        return True

    def carried(self, fragments: Fragments | None) -> bool:
        """The copy that was asked for; None: no replica gives it now."""
        if self.state is not CARRYING:
            return False
        if fragments is None:
            if self._tries < CARRY_TRIES:
                return self._retry()
            self.uncarried = True
        return self._accept(fragments or ())

    def _accept(self, fragments: Fragments) -> bool:
        found, change = self._found, self._change
        if change is not None:
            value = self.lineage.attempt(found, change)
            self._conclusion = Outcome(shown(found), value)
        else:
            value = found if found is not None else NEVER
        self.request = Accept("", self.name, self.ballot, value, self.nonce, change is None)
        self.fragments = fragments
        self._accepted: dict[str, bool] = {}
        self._failed = {}
        self._answered = 0
        self.turn += 1
        self.state = ACCEPTING
        return True

    def accepted(self, turn: int, disk: str, reply: AcceptReply | None) -> bool:
        """An answer to the accept of this turn; None: the call failed."""
        if turn != self.turn or self.state is not ACCEPTING:
            return False
        self._answered += 1
        quorum = self.view.quorum
        if reply is not None and reply.verdict == OK:
            accepted = self._accepted
            accepted[disk] = reply.copy_synced
            if (
                len(accepted) >= quorum.fewest
                and (quorum.single or quorum.met(accepted))
                and (self._copies is None or self._copies.enough(self._synced()))
            ):
                return self._conclude()
        else:
            self._failed[disk] = -1 if reply is None else reply.verdict
            if reply is not None and reply.verdict == PREEMPTED:
                self._shared.counts["preempted"] += 1
                self._note_above(disk, reply.promised.counter)
            if quorum.lost([disk for disk, verdict in self._failed.items() if verdict == FENCED]):
                return self._fenced(False)
            if quorum.lost(self._failed):
                return self._retry()
        if self._answered < len(quorum.disks):
            return False
        return self._retry() if self.sparing else self._too_few_copies()

    def _synced(self) -> frozenset[str]:
        return frozenset([disk for disk, copy_synced in self._accepted.items() if copy_synced])

    def _too_few_copies(self) -> bool:
        return self._give_up(f"only {len(self._synced())} of its replicas have synced the object's copy")

    # --- end ----------------------------------------------------------------------------------------------------------

    def expire(self) -> bool:
        """The deadline is over."""
        state = self.state
        if state in (SYNCING, DONE, FAILED):
            return False
        if state is ACCEPTING and self.view.quorum.met(self._accepted):
            return self._too_few_copies()
        if state is PREPARING or state is GATHERING:
            return self._give_up("no majority of its replicas answered in time")
        if state is RETRYING or state is CARRYING:
            return self._give_up("other proposers or a layout change were in the way until the deadline")
        return self._give_up("no majority of its replicas confirmed the write in time")

    def take_error(self) -> Exception | None:
        """``error``, once. The exception may refer to frames that refer to this machine: without the cycle, what they
        hold is freed at once.
        """
        error, self.error = self.error, None
        return error

    def _retry(self) -> bool:
        """Another attempt, after a pause where another proposer may be at work: the more attempts there were, the
        longer."""
        self.pause_s = 0.0
        if self._begun and (not self.sparing or self.lineage.open or self.above):
            self.pause_s = min(BACKOFF_MAX_S, BACKOFF_FIRST_S * 2.0 ** min(self._tries, 16))
            self._tries += 1
        self.turn += 1
        self.state = RETRYING
        return True

    def _conclude(self) -> bool:
        conclusion = self._conclusion
        if isinstance(conclusion, Exception):
            self._conclusion = None
            return self._fail(conclusion)
        self.outcome = conclusion
        self.state = DONE
        return True

    def _fenced(self, final: bool) -> bool:
        self.fenced = True
        if self.lineage.open:
            return self._give_up("its bucket is being deleted")
        return self._fail(NoSuchBucket("", **({"final": "true"} if final else {})))

    def _give_up(self, reason: str) -> bool:
        if self.lineage.open:
            self._shared.counts["unknown"] += 1
            return self._fail(OutcomeUnknown(f"The write may or may not have been applied: {reason}. Read, or retry."))
        self._shared.counts["unavailable"] += 1
        return self._fail(
            ServiceUnavailable(f"The key's register cannot be settled now: {reason}. Nothing was changed. Retry.")
        )

    def _fail(self, error: Exception) -> bool:
        self.error = error
        self.state = FAILED
        return True

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
    there too. Nor does a value count whose sequence no number of writes reaches: a change with a sequence above it
    would use up those of the register.

    Small copies travel with the accept: see ``change``. Where the copy of a record that no quorum has confirmed can't
    be had, ``copies`` says what may take its place.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Final

from storaged.errors import DataDamaged, OutcomeUnknown
from storaged.meta.consensus.change import (
    ALL_REPLICAS_TRIES,
    CARRY_TRIES,
    STRAGGLERS_S,
    SYSTEM_STRAGGLERS_S,
    THIRD_REPLICA_TRIES,
    Fragments,
    Shared,
    Wanted,
)
from storaged.meta.consensus.copies import MissingCopies, highest_sequence, lagging, may_replace
from storaged.meta.consensus.ending import Ending
from storaged.meta.consensus.overtaking import Overtaking, Placed
from storaged.meta.consensus.quorums import View
from storaged.meta.consensus.register import NEVER, Lineage, Standing, Verdict, may_create, shown
from storaged.meta.consensus.rounds import AcceptRound, CreateRound, Found, PrepareRound
from storaged.meta.consensus.states import (
    ACCEPTING,
    CARRYING,
    CREATING,
    DONE,
    GATHERING,
    PREPARING,
    SYNCING,
)
from storaged.meta.messages import Accept, AcceptReply, Create, Prepare, PrepareReply
from storaged.meta.names import SEQUENCE_MAX, Ballot, Change, Table, Value
from storaged.meta.ports import Outcome

OK: Final = int(Verdict.OK)
PREEMPTED: Final = int(Verdict.PREEMPTED)
DAMAGED: Final = int(Verdict.DAMAGED)
AHEAD: Final = int(Verdict.AHEAD)
EPOCH: Final = int(Verdict.EPOCH)
HONEST_SEQUENCE_MAX: Final = SEQUENCE_MAX // 2
"""A replica that lies must not use up the sequences of a register. No number of writes comes near this."""


class Proposer(Ending):
    """One change. ``state`` says what to do next; late answers and events of states that are over change nothing.

    It has many attributes: they are the state of the protocol, and what the shell reads of it.
    """

    # fmt: off
    __slots__ = (
        "_above", "_carries", "_change", "_copies", "_creates", "_doubtful", "_falling_back", "_found",
        "_missing", "_needs_copy", "_now_us", "_prepares", "_seeking", "_syncing", "_wanted",
        "ahead", "ballot", "by_create", "carried_by", "carry", "fragments", "gather_s", "name", "request", "view",
    )
    # fmt: on

    view: View
    ballot: Ballot
    request: Prepare | Accept
    _creates: CreateRound
    _prepares: PrepareRound
    _found: Found

    def __init__(self, shared: Shared, wanted: Wanted, lineage: Lineage) -> None:
        super().__init__(shared, lineage)
        self._wanted = wanted
        self.name = wanted.name
        self.ahead = False
        """The ballot of the create was too far ahead of a replica's clock."""
        self.by_create = False
        """The create was chosen."""
        self.fragments: Fragments = ()
        self.carry = b""
        self.carried_by: Value | None = None
        """Names the copy ``carry``."""
        self.gather_s = 0.0
        self._syncing = wanted.barrier
        self._carries = 0
        self._needs_copy = False
        """A quorum would not accept the record without its copy."""

    # --- create -------------------------------------------------------------------------------------------------------

    def create(self, view: View, change: Change, now_us: int) -> bool:
        """``change`` is what the update makes of nothing."""
        self.view, self._now_us = view, now_us
        small, grounds = self._wanted.small, self._wanted.grounds
        if grounds is None or not self._shared.rules.grounds_before_data:
            grounds = self._shared.grounds(self.name, view, now_us)
        ballot = self.ballot = grounds.ballot
        self._creates = CreateRound(view, small)
        value = self.lineage.create(change, ballot, grounds.floor)
        self.outcome = Outcome(None, value)
        self.request = Create("", self.name, ballot, value, check=small.check if small is not None else b"")
        if small is not None:
            self.fragments = small.fragments
        self.turn += 1
        self.state = CREATING
        return True

    def created(self, disk: str, reply: AcceptReply | None) -> bool:
        """An answer to the create; None: the call failed. Late ones still say whether the create may have been
        taken."""
        creates = self._creates
        if not creates.add(disk, reply) and reply is not None:
            self._rivals.note("", reply.promised.counter, self._now_us)
            self.ahead = self.ahead or reply.verdict == AHEAD
            self._shared.floors.note(self.name, reply.floor, self._now_us, disk, creates.epoch)
            self._stale = self._stale or reply.verdict == EPOCH
            if reply.verdict == PREEMPTED and self.state is CREATING:
                self._shared.counts["preempted"] += 1
        if self.state is not CREATING:
            creates.note_held(self.lineage)
            return False
        if creates.chosen:
            self.by_create = True
            self.state = DONE
            return True
        if creates.over:
            return self._not_created()
        return False

    def on_slow(self) -> bool:
        """The answers take long. Once a replica has refused, prepare (again): promises of the others suffice."""
        if self.state is CREATING:
            self._creates.slow = True
            return self._not_created() if self._creates.refused else False
        awaited = self._prepares if self.state is PREPARING else self._accepts if self.state is ACCEPTING else None
        return self._retry() if awaited is not None and awaited.overtaken else False

    def _not_created(self) -> bool:
        self._creates.note_held(self.lineage)
        self.outcome = None
        return self._retry()

    @property
    def not_taken_by(self) -> Sequence[str]:
        """Disks that have not taken the create."""
        return self._creates.not_taken_by

    # --- prepare ------------------------------------------------------------------------------------------------------

    def begin(self, view: View, now_us: int) -> bool:
        """An attempt, under a new ballot."""
        self.view, self._now_us = view, now_us
        above, confirmed = self._rivals.above_for(view.quorum)
        ballot = self.ballot = self._shared.ballots.next(view.epoch, above, now_us, confirmed=confirmed)
        self.sparing = not (self._attempts or self._wanted.thorough)
        self._attempts += 1
        self._prepares = PrepareRound(view.quorum)
        self._missing = MissingCopies()
        self._above = 0
        self._seeking = self._falling_back = self._doubtful = False
        self.turn += 1
        self.request = Prepare("", self.name, ballot, self._wanted.nonce)
        self.fragments = ()
        self.state = PREPARING
        return True

    def promised(self, turn: int, disk: str, reply: PrepareReply | None) -> bool:
        """An answer to the prepare of this turn; None: the call failed."""
        if turn != self.turn:
            return False
        if self.state is not PREPARING:
            return self._gather(disk, reply)
        prepares = self._prepares
        if prepares.add(disk, reply, self._doubts(disk, reply)):
            return self._wait_for_others(STRAGGLERS_S) if self._wanted.commit else self._judge_newest()
        if reply is not None and reply.verdict != OK:
            self._note(disk, reply)
            if self.sparing:
                self._shared.counts["preempted"] += reply.verdict == PREEMPTED
                return self._retry()
        return self._not_promised() if prepares.lost else False

    def _doubts(self, disk: str, reply: PrepareReply | None) -> bool:
        if reply is None or reply.verdict != OK:
            return False
        if reply.value is not None and reply.value.sequence > HONEST_SEQUENCE_MAX:
            return True
        return self.name.table == Table.SYSTEM and self._shared.doubts(self.name, disk, reply.value)

    def _note(self, disk: str, reply: PrepareReply) -> None:
        """What a refusal says about the ballots of others."""
        counter = reply.promised.counter
        self._stale = self._stale or reply.verdict == EPOCH
        if reply.verdict == PREEMPTED:
            self._rivals.note(disk, counter, self._now_us)
        elif reply.verdict == DAMAGED and self._rivals.note(disk, counter, self._now_us):
            self._prepares.damaged_below = max(self._prepares.damaged_below, counter)

    def _not_promised(self) -> bool:
        """No quorum can promise any more.

        A fence counts when a majority has it, as it had when it was set: acceptors have no keys that could vouch for
        it, and what one of them says alone must neither end a bucket nor have the data of one deleted.
        """
        if self.sparing:
            return self._retry()
        prepares = self._prepares
        if prepares.overtaken:
            self._shared.counts["preempted"] += 1
            return self._retry()
        if prepares.fenced:
            return self._fenced(final=prepares.fenced_for_ever, lends=prepares.fence_lends)
        if prepares.ahead:
            return self._give_up(
                "its replicas refuse ballots more than an hour ahead of their clocks: this node's clock is more "
                "than an hour fast, or theirs are slow"
            )
        return self._retry() if self.lineage.open and self._looked else self._not_reached()

    # --- gather -------------------------------------------------------------------------------------------------------

    def _wait_for_others(self, seconds: float) -> bool:
        if self._prepares.everyone:
            return self._gathered()
        self.gather_s = seconds
        self.state = GATHERING
        return True

    def _gather(self, disk: str, reply: PrepareReply | None) -> bool:
        if reply is not None and reply.verdict != OK:
            self._note(disk, reply)
        self._prepares.add_late(disk, None if self._doubts(disk, reply) else reply, self._asks_all)
        return self._gathered() if self._prepares.everyone and self.state is GATHERING else False

    @property
    def _asks_all(self) -> bool:
        """A register of the system table is led by what all replicas report, where they differ (rule 16)."""
        return self.name.table == Table.SYSTEM and self._shared.rules.lone_ballot_does_not_lead

    def waited(self) -> bool:
        """``gather_s`` are over."""
        return self._gathered() if self.state is GATHERING else False

    def _gathered(self) -> bool:
        if self._falling_back:
            return self._fall_back()
        if self._seeking:
            return self._judge_credible() if self._asks_all else self._judge_outvoted()
        refused = self._rivals.above >= self.ballot.counter and self._tries < ALL_REPLICAS_TRIES
        if self._prepares.damaged_below > self.ballot.counter or refused:
            return self._retry()
        return self._judge_newest()

    def _judge_newest(self) -> bool:
        """Takes the newest value that the promises report, and judges it."""
        self._found = self._prepares.newest()
        if not self._found.settled and self._shared.rules.lone_ballot_does_not_lead:
            self._seeking = True
            return self._wait_for_others(SYSTEM_STRAGGLERS_S if self._asks_all else STRAGGLERS_S)
        return self._judge()

    def _judge_outvoted(self) -> bool:
        """Replicas differ: what a quorum agrees on goes on, whatever a lone one reports."""
        refused = self._prepares.preempted
        chosen = self._prepares.chosen()
        if chosen is None and refused and self._wanted.settling and self._third_replica_tries < THIRD_REPLICA_TRIES:
            return self._retry_for_third()
        self._found = chosen or self._found
        return self._judge() if chosen is not None else self._judge_unsettled()

    def _judge_unsettled(self) -> bool:
        if (found := self._prepares.undisputed(self._found)) is None:
            return self._give_up("two of its replicas hold different values under one ballot, and no third one decides")
        self._found = found
        return self._judge()

    def _placed(self) -> Placed:
        """See ``overtaking``. Where the copy of the newest value was not found, no create is dropped: a value below it
        may be the one whose copy is missing."""
        shared, promises = self._shared, self._prepares.all_promised
        overtake = partial(shared.overtake, self.name)
        known = Overtaking(self.view.quorum, promises, self.lineage.lost_at(), shared.rules, overtake)
        return known._replace(may_drop=not self._falling_back).placed(self._found)

    def _judge_credible(self) -> bool:
        found = self._prepares.credible()
        if found is None and self._prepares.preempted and self._third_replica_tries < THIRD_REPLICA_TRIES:
            return self._retry_for_third()
        self._found = found or self._unheard(self._prepares.newest())
        return self._judge() if self._found.settled else self._judge_unsettled()

    # --- decide -------------------------------------------------------------------------------------------------------

    def _judge(self) -> bool:
        """What became of earlier attempts, as the value found shows."""
        if not self._found.settled and may_create(self.name):
            placed, in_doubt = self._placed()
            if in_doubt and not self._prepares.everyone and not self._doubtful:
                self._doubtful = True
                return self._wait_for_others(SYSTEM_STRAGGLERS_S)
            if in_doubt and self._prepares.preempted and self._third_replica_tries < THIRD_REPLICA_TRIES:
                return self._retry_for_third()
            if placed is None:
                return self._give_up("one replica has a later write, and without the third it cannot be put in order")
            self._found = placed
        lineage, small = self.lineage, self._wanted.small
        ballot, found, settled = self._found
        standing = lineage.judge(found, ballot, settled)
        if standing is Standing.CLEAR:
            return self._apply()
        if self.sparing:
            return self._retry()
        if standing is Standing.UNKNOWN or found is None:
            self._shared.counts["unknown"] += 1
            unknown = "The write met others at the same key and may have been applied before them. Read, or retry."
            return self._fail(OutcomeUnknown(unknown))
        self._conclusion = Outcome(shown(lineage.base_of(found)), found)
        if settled and small is None:
            return self._conclude()
        self._change: Change | None = None
        self._copies = small
        return self._accept_with_copy()

    def _apply(self) -> bool:
        value = shown(self._found.value)
        try:
            change = self._wanted.update(value)
        except Exception as error:
            return self._settle(error)
        if change is None:
            return self._settle(Outcome(value, value))
        self._change = change
        if self._syncing:
            self.state = SYNCING
            return True
        return self._propose()

    def synced(self) -> bool:
        """The fragments that the change names are durable."""
        if self.state is not SYNCING:
            return False
        self._syncing = False
        return self._propose()

    def data_failed(self, error: Exception) -> bool:
        """The fragments that the change names can't be made durable."""
        if self.state is not SYNCING:
            return False
        if self.lineage.open:
            return self._give_up("its fragments could not be made durable")
        return self._fail(error)

    def _propose(self) -> bool:
        if self.lineage.exhausted:
            return self._give_up("too many attempts were pre-empted")
        found, change = self._found.value, self._change
        copies = self._copies = self._wanted.small
        assert change is not None
        if copies is None and (found is None or change.payload != found.payload):
            return self._accept(())
        return self._accept_with_copy()

    def _settle(self, conclusion: Outcome | Exception) -> bool:
        """Makes sure that the value found stays what this ballot saw, so that it may be reported (rules 4 and 5)."""
        self._conclusion = conclusion
        if not self._wanted.settling and not self._shared.rules.failed_condition_settles:
            return self._conclude()
        if self._found.settled and not self._wanted.commit and not self.lineage.open:
            return self._conclude()
        self._shared.counts["identity_rounds"] += 1
        self._change = self._copies = None
        return self._accept_with_copy()

    # --- accept -------------------------------------------------------------------------------------------------------

    def _accept_with_copy(self) -> bool:
        """Sends the accept with a small copy: the change's own, or a replica's, if no quorum has confirmed the value
        found, or some replica needs it to accept."""
        if self._copies is not None:
            return self._accept(self._copies.fragments)
        ballot, found, settled = self._found
        if found is None or not found.payload or not self._shared.rules.copies_travel:
            return self._accept(())
        behind = self._wanted.commit and lagging(self.view.quorum, self._prepares.all_promised, ballot)
        if settled and not self._needs_copy and not behind:
            return self._accept(())
        self.carry, self.carried_by = found.payload, found
        self.state = CARRYING
        return True

    def carried(self, fragments: Fragments | None) -> bool:
        """The copy that was asked for. None: no replica gives it now; empty: each has said that it has none."""
        if self.state is not CARRYING:
            return False
        if fragments or (self._found.settled and not self._needs_copy):
            return self._accept(fragments or ())  # without: by those that have it
        self._missing.add(self.carry, absent=fragments is not None)
        self._carries += 1
        if fragments is None and self._carries < CARRY_TRIES:
            return self._retry()
        self._falling_back = True
        return self._wait_for_others(SYSTEM_STRAGGLERS_S)

    def _fall_back(self) -> bool:
        """An older record takes the place of the one whose copy can't be had, if it may (``copies``)."""
        quorum, promises, lineage = self.view.quorum, self._prepares.all_promised, self.lineage
        candidate = self._missing.candidate(promises)
        chosen = self._found.settled or candidate is None or lineage.exhausted
        if candidate is None or chosen or not may_replace(quorum, promises, candidate[0], self._shared.rules):
            if self._rivals.above >= self.ballot.counter and self._third_replica_tries < THIRD_REPLICA_TRIES:
                return self._retry_for_third()
            if not lineage.open and self._missing.damaged(quorum, promises):
                return self._fail(DataDamaged("The copies of this object are missing or damaged on all of its disks."))
            return self._copy_unreadable()
        self._found = Found(*candidate, False)
        self._above = highest_sequence(promises, candidate[0])
        return self._judge()

    def _highest_seen(self) -> int:
        """The highest sequence in the promises, which a new value exceeds. Bodies of other tables than the objects' are
        bound to the sequence after that of the value found.
        """
        promised = self._prepares.promised
        if (self._found.settled and len(promised) <= self.view.quorum.fewest) or not may_create(self.name):
            return self._above
        values = [reply.value for reply in promised.values() if reply.value is not None]
        return max(self._above, *(value.sequence for value in values if value.sequence <= HONEST_SEQUENCE_MAX), 0)

    def _accept(self, fragments: Fragments) -> bool:
        found, change = self._found.value, self._change
        if change is not None:
            value = self.lineage.attempt(found, change, self._highest_seen())
            self._conclusion = Outcome(shown(found), value)
        elif self._above:
            value = self.lineage.restate(found, self._above, self.ballot)
            if isinstance(self._conclusion, Outcome):
                before, after = self._conclusion
                self._conclusion = Outcome(value if before is after else before, value)
        else:
            value = found if found is not None else NEVER
        check = self._copies.check if self._copies is not None else b""
        self.request = Accept("", self.name, self.ballot, value, self._wanted.nonce, change is None, check=check)
        self.fragments = fragments
        self.turn += 1
        attempt = value.operation if change is not None else b""
        self._accepts = AcceptRound(self.view.quorum, self._copies, self.turn, attempt)
        self.state = ACCEPTING
        return True

    def accepted(self, turn: int, disk: str, reply: AcceptReply | None) -> bool:
        """An answer to the accept of this turn; None: the call failed. Late refusals still count."""
        if reply is not None and reply.final:
            self._accepts.note_refusal(turn, reply, self.lineage, self._shared.rules)
        if turn != self.turn or self.state is not ACCEPTING:
            return False
        accepts = self._accepts
        if accepts.add(disk, reply):
            return self._conclude()
        self._stale = self._stale or (reply is not None and reply.verdict == EPOCH)
        if reply is not None and reply.verdict == PREEMPTED:
            self._shared.counts["preempted"] += 1
            self._rivals.note(disk, reply.promised.counter, self._now_us)
        if accepts.failed and accepts.fenced:
            return self._fenced(lends=accepts.fence_lends)
        if accepts.failed and accepts.lost:
            if accepts.full:
                return self._give_up("disks of its replicas have no room for it")
            self._needs_copy = self._needs_copy or accepts.without_copy
            return self._retry()
        if not accepts.everyone:
            return False
        return self._retry() if self.sparing else self._too_few_copies()

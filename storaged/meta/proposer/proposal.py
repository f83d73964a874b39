"""One change of one register from its first prepare to its outcome: the proposer's half of ``meta.consensus.register``,
with time and network.

Theory of operation
    An attempt takes a new ballot, prepares it at all replicas and goes on when a majority has promised. The value with
    the highest accepted ballot among
    the promises is what the update is asked about; its answer is accepted at all replicas, and done when a majority has
    it on disk. Whatever comes between
    (a higher ballot, a newer layout, replicas that do not answer) begins a new attempt, after a pause that grows and is
    drawn at random, until the deadline.
    Once an accept has been sent, nothing but a later prepare can tell what became of it: ``Lineage`` judges that, and
    where it cannot the outcome is
    unknown and the caller is told so.

    What no gateway wrote does not count (``Surroundings.doubts``): a value of the system table that one replica reports
    alone, under whatever ballot, was never
    proposed. Its replica is treated as one that does not answer, so that the others' value is what goes on, and is
    accepted there too.

    The copies of a small object go with the accept, and a replica that cannot store its copy accepts nothing: from the
    moment that a record is chosen, a majority
    of its replicas have had its copy. What keeps that true is that nobody helps a record on without its copy: a value
    that a prepare found, which no majority has
    confirmed yet, is accepted anew together with the copy of the replica that told of it. *The exception*: a copy that
    can't be had holds up no register for ever.
    A settling round writes the row also where the replica can't store the copy, and a round for which nobody gives the
    copy, ``CARRY_TRIES`` times over, goes on
    without it; such a record may be confirmed with its copy on fewer replicas, or on none that answers, and repair is
    told (``on_missed``). The change succeeds when the acknowledge rule holds for those that
    have synced their copy, besides the majority; where it cannot hold any more the outcome is unknown: the record
    stands, on fewer copies than it should have.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import msgspec

from storaged import trace
from storaged.clock import Clock
from storaged.errors import NoSuchBucket, OutcomeUnknown, ServiceUnavailable, StoragedError
from storaged.meta import messages
from storaged.meta.consensus.register import (
    COUNTER_AHEAD_MAX_US,
    NEVER,
    Ballots,
    Groups,
    Lineage,
    Rules,
    Standing,
    Verdict,
    confirmed_above,
    credible,
    has_majority,
    may_create,
    out_of_reach,
    overtaken,
    settled_ballot,
    short_of_majority,
    shown,
)
from storaged.meta.names import RegisterName, Table, Value
from storaged.meta.ports import ZERO_BALLOT, Ballot, Outcome, Replicas, SmallCopies, Update
from storaged.meta.transport.quorum import Answers, Suspects, TaskPool
from storaged.wire import Buffer

BACKOFF_FIRST_S = 0.005
BACKOFF_MAX_S = 0.5

STRAGGLERS_S = 0.05
"""How long a settling round waits for the replicas beyond the majority, to learn of damaged rows and of higher
promises.
"""

SYSTEM_STRAGGLERS_S = 1.0
"""As that, where two replicas of a register of the system table differ: one of them may lie, and only the third one's
answer keeps the lie from counting. A slow disk is
no reason to go without it; a replica that hangs costs so much, and only where a write was cut short."""

SOUGHT_MAX = 4
"""How often it begins again then, with a higher ballot, for a third one that has promised a higher one: more than two
proposers in turn need, and a liar that always
refuses leaves the two others alone."""

CARRY_TRIES = 2
"""So often a round begins again because the copy of an unconfirmed record was not to be had; then the record is settled
without it.
"""

ALL_REPLICAS_TRIES = 2
"""How often a settling round begins again, with a higher ballot, for a replica that refuses although a majority has
promised: one that has restarted refuses
everything below its high-water ballot, and is the one that lags."""


class View(NamedTuple):
    """A register's replicas under one layout."""

    epoch: int
    groups: Groups
    disks: Sequence[str]


@dataclass(frozen=True)
class Surroundings:
    """What every proposal of one client shares."""

    view: Callable[[RegisterName], View]
    replicas: Replicas
    clock: Clock
    jitter: Callable[[], float]
    pool: TaskPool
    suspects: Suspects
    ballots: Ballots
    call_timeout_s: float
    rules: Rules
    counts: dict[str, int]
    carry: Callable[[View, RegisterName, bytes, float], Awaitable[Fragments | None]]
    """``await carry(view, name, data_id, deadline)``: the copy of a small object from whichever replica has it, for all
    of them; None when none gives it.
    """
    on_fenced: Callable[[bytes], None] = lambda scope: None
    """Told of the scope of a change that was refused by a fence."""
    doubts: Callable[[RegisterName, str, Value | None], bool] = lambda name, disk, value: False
    """Whether the value that a disk reports was written by no gateway (see ``client.RingClient``): of registers of the
    system table alone.
    """
    on_missed: Callable[[RegisterName], None] = lambda name: None
    """Told when a replica did not take a new value or a small copy that it should have: it lags, though a majority may
    have confirmed the write. Settling
    rounds tell of copies alone: for replicas that lag they are what follows."""


Fragments = Sequence[tuple[bytes, Sequence[Buffer]]]
"""(encoded fragment header, payload) of a small copy for each replica index, as in ``SmallCopies``."""


def post_accept(
    answers: Answers[messages.AcceptReply],
    request: messages.Accept,
    body: Sequence[Buffer],
    timeout_s: float,
    on_missed: Callable[[RegisterName], None],
) -> None:
    """Asks a replica to accept; ``on_missed`` is told as in ``Surroundings``."""

    def heard(answer: messages.AcceptReply | StoragedError) -> None:
        took = not isinstance(answer, StoragedError) and answer.verdict == Verdict.OK
        if not (took or request.identity) or (request.header and not (took and answer.copy_synced)):  # type: ignore[union-attr]
            on_missed(request.name)

    answers.post(
        request, body=body, timeout_s=timeout_s, heard=None if request.identity and not request.header else heard
    )


@dataclass
class _Promises:
    """What a prepare brought. ``value`` has the highest accepted ballot of the majority, ``ballot``; where it was
    created, its sequence lies behind what it has overtaken
    (rule 14). ``settled``: all of a majority reported that ballot."""

    answers: Answers[messages.PrepareReply]
    ballot: Ballot = ZERO_BALLOT
    value: Value | None = None
    settled: bool = False
    damaged_below: int = 0


@dataclass
class Proposal:
    """``await run()`` once. ``settling``: no change, the register is to be settled; ``commit``: by an identity round in
    any case.
    """

    around: Surroundings
    name: RegisterName
    lineage: Lineage
    deadline: float
    update: Update
    small: SmallCopies | None = None
    ready: asyncio.Future[None] | None = None
    renew: Callable[[], Awaitable[None]] | None = None
    nonce: bytes = b""
    settling: bool = False
    commit: bool = False
    _above: int = 0
    _tries: int = 0
    _sought: int = 0
    _far: dict[str, int] = field(default_factory=dict)
    """Counters in the way that no clock near this one's explains, by the replica that tells of them."""

    def remaining_s(self) -> float:
        return self.deadline - self.around.clock.monotonic()

    async def run(self, *, again: bool = False) -> Outcome:
        """Raises as ``Registers.change``. ``again``: an attempt was made already, and somebody was in its way."""
        while True:
            if again:
                await self._pause()
                if self.renew is not None and (self.ready is None or self.ready.done()):
                    await self._fragments_renewed(self.renew)
            outcome = await self._attempt()
            if outcome is not None:
                return outcome
            again = True

    async def _attempt(self) -> Outcome | None:
        """None: begin again, with a higher ballot."""
        around = self.around
        view = around.view(self.name)
        confirmed = confirmed_above(self._far.values(), len(view.disks))
        above = max(self._above, confirmed)
        ballot = around.ballots.next(view.epoch, above, around.clock.wall_ms() * 1000, confirmed=bool(confirmed))
        with trace.span("prepare"):
            promises = await self._prepare(view, ballot)
        if promises is None:
            return None
        found = promises.value
        standing = self.lineage.judge(found, promises.ballot, promises.settled)
        if standing is Standing.UNKNOWN:
            around.counts["unknown"] += 1
            raise OutcomeUnknown(
                "The write met others at the same key and may have been applied before them. Read, or retry."
            )
        if standing is Standing.APPLIED and found is not None:
            if not promises.settled or self.small is not None:
                again = self.small.fragments if self.small is not None else await self._carried(view, promises)
                if again is None or not await self._accept(view, ballot, found, again, identity=True):
                    return None
            return Outcome(shown(self.lineage.base_of(found)), found)
        value = shown(found)
        try:
            change = self.update(value)
        except Exception:
            if await self._settle(view, ballot, promises):
                raise
            return None
        if change is None:
            return Outcome(value, value) if await self._settle(view, ballot, promises) else None
        if self.ready is not None:
            await self._fragments_synced(self.ready)
        if self.lineage.exhausted:
            raise self._gave_up("too many attempts were pre-empted")
        fragments: Fragments | None = ()
        if self.small is not None:
            fragments = self.small.fragments
        elif found is not None and change.payload == found.payload:
            fragments = await self._carried(view, promises)
        if fragments is None:
            return None
        changed = self.lineage.attempt(found, change)
        with trace.span("accept"):
            accepted = await self._accept(view, ballot, changed, fragments, identity=False)
        return Outcome(value, changed) if accepted else None

    async def _carried(self, view: View, promises: _Promises) -> Fragments | None:
        """The copy that the value found names, when no majority has confirmed the value: its writer may have reached a
        single replica. None: who told of the value
        does not give its copy, and may be gone; the next attempt does without it, if it can. A copy that stays lost
        does not hold up the register for ever."""
        value = promises.value
        if promises.settled or value is None or not value.payload or not self.around.rules.copies_travel:
            return ()
        found = await self.around.carry(view, self.name, value.payload, self.deadline)
        if found is None and self._tries >= CARRY_TRIES:
            self.around.on_missed(self.name)
            return ()
        return found

    # --- prepare
    # -------------------------------------------------------------------------------------------------------

    async def _prepare(self, view: View, ballot: Ballot) -> _Promises | None:
        around = self.around
        answers: Answers[messages.PrepareReply] = Answers(around.replicas, around.pool, around.suspects)
        for disk in view.disks:
            self._ask_promise(answers, messages.Prepare(disk, self.name, ballot, self.nonce))
        promises = _Promises(answers)
        promised: dict[str, messages.PrepareReply] = {}
        doubted: dict[str, messages.PrepareReply] = {}
        failed: dict[str, Verdict | None] = {}
        finals: set[str] = set()
        while not has_majority(view.groups, promised):
            if has_majority(view.groups, doubted):
                promised |= doubted  # nothing better is to be had, and it may be written over
                break
            if out_of_reach(view.groups, {**failed, **doubted}) and not (doubted and answers.pending):
                self._not_promised(view, failed, finals)
                return None
            answer = await answers.next(self.remaining_s(), short_of_majority(view.groups, promised))
            if answer is None:
                raise self._gave_up("no majority of its replicas answered in time")
            disk, reply = answer
            if isinstance(reply, StoragedError):
                failed[disk] = None
                continue
            self._note(promises, disk, reply)
            if reply.final:
                finals.add(disk)
            if reply.verdict != Verdict.OK:
                failed[disk] = Verdict(reply.verdict)
            elif around.doubts(self.name, disk, reply.value):
                doubted[disk] = reply
            else:
                promised[disk] = reply
        others = promised if self.name.table == Table.SYSTEM and around.rules.lone_ballot_led_by_none else {}
        if self.commit:
            await self._hear_stragglers(promises, others)
            if promises.damaged_below > ballot.counter or (
                self._above >= ballot.counter and self._tries < ALL_REPLICAS_TRIES
            ):
                return None
        self._look_at(view, promises, promised)
        if not promises.settled and others is promised:
            await self._hear_stragglers(promises, others, SYSTEM_STRAGGLERS_S)
            self._look_at(view, promises, promised)
            found = credible(view.groups, {disk: (reply.accepted, reply.value) for disk, reply in promised.items()})
            if found is not None:
                promises.ballot, promises.value, promises.settled = found
            elif self._above >= ballot.counter and self._sought < SOUGHT_MAX:
                self._sought += 1
                return None
        if not promises.settled:
            lost_at = self.lineage.lost_at()
            told = [(reply.accepted, reply.value) for reply in promised.values() if reply.accepted != lost_at]
            beneath = overtaken(told, promises.ballot, promises.value, around.rules) if may_create(self.name) else None
            if beneath is not None and promises.value is not None:
                promises.value = msgspec.structs.replace(promises.value, sequence=beneath.sequence + 1)
        return promises

    def _look_at(self, view: View, promises: _Promises, promised: dict[str, messages.PrepareReply]) -> None:
        """Notes the newest of what those who promised have."""
        accepted = {disk: reply.accepted for disk, reply in promised.items()}
        highest = max(promised.values(), key=lambda reply: reply.accepted)
        promises.ballot, promises.value = highest.accepted, highest.value
        promises.settled = settled_ballot(view.groups, accepted) == highest.accepted

    def _ask_promise(self, answers: Answers[messages.PrepareReply], request: messages.Prepare) -> None:
        answers.post(request, timeout_s=self._call_timeout_s())

    def _note(self, promises: _Promises, disk: str, reply: messages.PrepareReply) -> None:
        """What is worth knowing of an answer, whether it promised or not."""
        counter = reply.promised.counter
        if reply.verdict == Verdict.PREEMPTED:
            self._note_above(disk, counter)
        elif reply.verdict == Verdict.DAMAGED and self._note_above(disk, counter):
            promises.damaged_below = max(promises.damaged_below, counter)

    def _note_above(self, disk: str, counter: int) -> bool:
        """A counter that is in the way at a replica. False: it is so far off that it counts only with a majority's."""
        if counter > self.around.clock.wall_ms() * 1000 + COUNTER_AHEAD_MAX_US and self.around.rules.far_by_majority:
            self._far[disk] = counter
            return False
        self._above = max(self._above, counter)
        return True

    def _not_promised(self, view: View, failed: dict[str, Verdict | None], finals: set[str]) -> None:
        """No majority promised: returns to try again where another ballot or layout may help, else raises.

        A fence counts when a majority has it, as it had when it was set: acceptors have no keys that could vouch for
        it, and
        what one of them says alone must neither end a bucket nor have the data of one deleted."""
        reasons = set(failed.values())
        if not reasons.isdisjoint((Verdict.PREEMPTED, Verdict.EPOCH, Verdict.NEWER)):
            self.around.counts["preempted"] += 1
            return
        if out_of_reach(view.groups, {disk for disk, verdict in failed.items() if verdict is Verdict.FENCED}):
            raise self._fenced(out_of_reach(view.groups, finals))
        if Verdict.AHEAD in reasons:
            raise self._gave_up(
                "its replicas refuse ballots more than an hour ahead of their clocks: this node's clock is, or theirs"
                " are behind"
            )
        if not self.lineage.open:
            raise self._gave_up("no majority of its replicas answers")

    async def _hear_stragglers(
        self, promises: _Promises, promised: dict[str, messages.PrepareReply], patience_s: float = STRAGGLERS_S
    ) -> None:
        """Waits a moment for the replicas beyond the majority, and adds those that promise."""
        while promises.answers.pending:
            answer = await promises.answers.next(min(patience_s, self.remaining_s()))
            if answer is None:
                return
            disk, reply = answer
            if not isinstance(reply, StoragedError):
                self._note(promises, disk, reply)
                if reply.verdict == Verdict.OK and not self.around.doubts(self.name, disk, reply.value):
                    promised[disk] = reply

    async def _fragments_synced(self, ready: asyncio.Future[None]) -> None:
        """The barrier; the time it takes is not the register's and does not count against the deadline."""
        if not ready.done():
            began = self.around.clock.monotonic()
            await asyncio.wait((ready,))
            self.deadline += self.around.clock.monotonic() - began
        ready.result()

    async def _fragments_renewed(self, renew: Callable[[], Awaitable[None]]) -> None:
        began = self.around.clock.monotonic()
        try:
            await renew()
        except StoragedError:
            if self.lineage.open:
                raise self._gave_up("its fragments could not be seen again") from None
            raise
        self.deadline += self.around.clock.monotonic() - began

    # --- accept
    # --------------------------------------------------------------------------------------------------------

    async def _settle(self, view: View, ballot: Ballot, promises: _Promises) -> bool:
        """Makes sure that the value found stays what this ballot saw, so that it may be told (rules 4 and 5)."""
        if not self.settling and not self.around.rules.failed_condition_settles:
            return True
        if promises.settled and not self.commit and not self.lineage.open:
            return True
        value = promises.value if promises.value is not None else NEVER
        self.around.counts["identity_rounds"] += 1
        fragments = await self._carried(view, promises)
        return fragments is not None and await self._accept(view, ballot, value, fragments, identity=True, own=False)

    async def _accept(
        self, view: View, ballot: Ballot, value: Value, fragments: Fragments, *, identity: bool, own: bool = True
    ) -> bool:
        """True: a majority has it on disk, and its copies are where they must be. False: it was refused, or too few
        answer; it may have been applied.
        ``own``: the value is of this change."""
        around, small = self.around, self.small if own else None
        answers: Answers[messages.AcceptReply] = Answers(around.replicas, around.pool, around.suspects)
        for index, disk in enumerate(view.disks):
            header, body = fragments[index] if index < len(fragments) else (b"", ())
            self._ask_accept(
                answers, messages.Accept(disk, self.name, ballot, value, self.nonce, identity, header), body
            )
        accepted: set[str] = set()
        synced: set[str] = set()
        failed: set[str] = set()
        fenced: set[str] = set()
        while not has_majority(view.groups, accepted) or (small is not None and not small.enough(frozenset(synced))):
            if out_of_reach(view.groups, fenced):
                raise self._fenced(final=False)
            if out_of_reach(view.groups, failed):
                return False
            answer = await answers.next(self.remaining_s(), max(short_of_majority(view.groups, accepted), 1))
            if answer is None:
                if has_majority(view.groups, accepted):
                    raise self._gave_up(f"only {len(synced)} of its replicas have synced the object's copy")
                raise self._gave_up("no majority of its replicas confirmed the write in time")
            disk, reply = answer
            if isinstance(reply, StoragedError):
                failed.add(disk)
            elif reply.verdict == Verdict.OK:
                accepted.add(disk)
                if reply.copy_synced:
                    synced.add(disk)
            else:
                failed.add(disk)
                if reply.verdict == Verdict.FENCED:
                    fenced.add(disk)
                if reply.verdict == Verdict.PREEMPTED:
                    around.counts["preempted"] += 1
                    self._note_above(disk, reply.promised.counter)
        return True

    def _ask_accept(
        self, answers: Answers[messages.AcceptReply], request: messages.Accept, body: Sequence[Buffer]
    ) -> None:
        post_accept(answers, request, body, self._call_timeout_s(), self.around.on_missed)

    # --- time
    # ----------------------------------------------------------------------------------------------------------

    def _call_timeout_s(self) -> float:
        return max(0.001, min(self.around.call_timeout_s, self.remaining_s()))

    async def _pause(self) -> None:
        limit_s = min(BACKOFF_MAX_S, BACKOFF_FIRST_S * 2 ** min(self._tries, 16))
        self._tries += 1
        pause_s = self.around.jitter() * limit_s
        if pause_s >= self.remaining_s():
            raise self._gave_up("other proposers or a layout change were in the way until the deadline")
        await asyncio.sleep(pause_s)

    def _fenced(self, final: bool) -> StoragedError:
        self.around.on_fenced(self.name.scope)
        if self.lineage.open:
            return self._gave_up("its bucket is being deleted")
        return NoSuchBucket("", **({"final": "true"} if final else {}))

    def _gave_up(self, reason: str) -> ServiceUnavailable:
        if self.lineage.open:
            self.around.counts["unknown"] += 1
            return OutcomeUnknown(f"The write may or may not have been applied: {reason}. Read, or retry.")
        self.around.counts["unavailable"] += 1
        return ServiceUnavailable(f"The key's register cannot be settled now: {reason}. Nothing was changed. Retry.")

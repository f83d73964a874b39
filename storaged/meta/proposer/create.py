"""A change that is the same whatever it finds, of a register that was probably never written: proposed before anybody
was asked. Callbacks that count answers, as in ``quick``.

Theory of operation
    What the change makes of nothing goes to all replicas at once, and is done when a majority takes it: one round trip
    in place of two, and no promises. ``register`` says why
    that is a change like any other. A replica that holds something refuses; then the change is made as one that asks
    first, with what this attempt has left
    behind: its lineage, and the highest ballot that was in its way. Such an attempt was for nothing, so it is made only
    where the latest changes found nothing (``Novelty``).
"""

from __future__ import annotations

from functools import partial

from storaged.errors import StoragedError
from storaged.meta.consensus.register import Verdict
from storaged.meta.messages import AcceptReply, Create
from storaged.meta.names import Change, RegisterName
from storaged.meta.ports import Outcome
from storaged.meta.proposer.quick import Attempt, Tried, told_by

NEW_AT_LEAST = 0.75
"""Of the latest changes of a bucket's registers: a create that is refused costs more than twice what one that is taken
spares.
"""

NEW_OF_LATE = 16
SCOPES_MAX = 1_024

OK = int(Verdict.OK)
PREEMPTED = int(Verdict.PREEMPTED)
HELD = int(Verdict.HELD)
AHEAD = int(Verdict.AHEAD)

AHEAD_MAX_US = 10_000_000
"""With a ballot further ahead of this clock a change asks first: creates are refused by clocks, promises never are."""


class Novelty:
    """How many of the latest changes of each bucket's registers found nothing."""

    def __init__(self) -> None:
        self._rates: dict[bytes, float] = {}

    def likely(self, name: RegisterName) -> bool:
        """Whether the register was probably never written."""
        return self._rates.get(name.scope, 1.0) >= NEW_AT_LEAST

    def saw(self, name: RegisterName, new: bool) -> None:
        rates, scope = self._rates, name.scope
        rate = rates.get(scope, 1.0)
        if rate == new:
            return  # as it was all the time
        if len(rates) >= SCOPES_MAX and scope not in rates:
            rates.clear()
        rates[scope] = rate + (new - rate) / NEW_OF_LATE


class QuickCreate(Attempt):
    """``begin`` once, or ``await run()``."""

    __slots__ = ("_asking", "_decisive", "_held", "_impatient", "_refused", "_taken", "_value", "ahead")

    def begin(self, change: Change, then: Tried) -> None:
        """``change`` is what ``update`` makes of nothing. ``then(outcome)`` is told once, perhaps before this returns,
        and must not raise. None: it was not taken, as far as is
        known. An exception: what went wrong here unforeseen."""
        view, small, now_us = self._view, self.small, self._around.clock.wall_ms() * 1000
        ballot = self._next_ballot(now_us)
        self._then = then
        self.ahead = ballot.counter > now_us + AHEAD_MAX_US
        """Its ballot was too far ahead of a clock, here or at a replica."""
        self._decisive = len(view.disks) + 1 - self._majority
        """With fewer answers nothing is decided."""
        self._refused = self._held = 0
        self._impatient = self._taken = False
        if self.ahead:
            self._end(None)
            return
        self._value = self.lineage.create(change, ballot)
        self._mark("")
        self._asking = True
        try:
            request = Create("", self.name, ballot, self._value)
            fragments = () if small is None else small.fragments
            self._courier.ask_each(request, view.disks, self._heard, timeout_s=self._timeout_s, fragments=fragments)
            self._asking = False
            if self._synced or self._failed:  # replicas of this process, and disks that are out of use
                self._look()
        except BaseException:  # a mistake of ours: who began it is told, and whoever was asked answers nobody
            self._then = None
            raise

    async def run(self, change: Change) -> Outcome | None:
        """What ``begin`` tells. Raises the exception that it tells."""
        return await told_by(partial(self.begin, change))

    def _heard(self, disk: str, answer: AcceptReply | StoragedError, _bulk: object = None) -> None:
        try:
            if (
                not isinstance(answer, StoragedError)
                and answer.verdict == OK
                and (answer.copy_synced or self.small is None)
            ):
                self._synced.append(disk)
            else:
                self._failed += 1
                self._note_failed(disk, answer)
            if self._then is None or self._asking:
                return
            if len(self._synced) + self._failed >= self._decisive or self._impatient:
                self._look()
        except Exception as mistake:  # of ours: who waits is told, not only who brought the answer
            if self._then is None:
                raise
            self._end(mistake)

    def _note_failed(self, disk: str, answer: AcceptReply | StoragedError) -> None:
        if isinstance(answer, StoragedError):
            self._around.suspects.saw(disk, answer)
        else:
            self._refused += 1
            self._note_above(answer.promised.counter)
            self.ahead = self.ahead or answer.verdict == AHEAD
            if answer.verdict == HELD or answer.final:
                self._held += 1
            if answer.verdict == PREEMPTED and self._then is not None:
                self._around.counts["preempted"] += 1
        if self._taken:
            self._around.on_missed(self.name)
        elif self._then is None:
            self._note_held()

    def _look(self) -> None:
        disks, small, taken = self._view.disks, self.small, len(self._synced)
        if taken >= self._majority and (small is None or small.enough(frozenset(self._synced))):
            self._taken = True
            if self._failed:
                self._around.on_missed(self.name)
            self._mark("create")
            self._end(Outcome(None, self._value))
        elif (
            self._failed + self._majority > len(disks)
            or self._failed + taken == len(disks)
            or (self._impatient and self._refused)
        ):
            self._note_held()
            self._end(None)

    def _note_held(self) -> None:
        """Also when it is over: the rest comes while the promises are asked for."""
        if self._held >= self._majority:
            self.lineage.create_held(everywhere=self._held == len(self._view.disks))

    def _end(self, outcome: Outcome | Exception | None) -> None:
        then, self._then = self._then, None
        if then is not None:
            then(outcome)

    def give_up(self) -> float:
        """The first time only where somebody has refused, or as soon as somebody does: with the promises of the others
        it goes on without whoever takes long.
        """
        more_s, self._limit_s = self._limit_s, 0.0
        self._impatient = True
        if not more_s or self._refused:
            self._note_held()
            self._end(None)
        return more_s if self._then is not None else 0.0

"""A change that is the same whatever it finds, of a register that was probably never written: proposed before anybody was asked. Callbacks that count answers, as in ``quick``.

Theory of operation
    What the change makes of nothing goes to all replicas at once, and is done when a majority takes it: one round trip in place of two, and no promises. ``register`` says why
    that is a change like any other. A replica that holds something refuses; then the change is made as one that asks first, with what this attempt has left
    behind: its lineage, and the highest ballot that was in its way. Such an attempt was for nothing, so it is made only where the latest changes found nothing (``Novelty``).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from functools import partial

from storaged import trace
from storaged.errors import StoragedError
from storaged.meta.messages import AcceptReply, Create
from storaged.meta.names import Change, RegisterName
from storaged.meta.ports import Outcome, SmallCopies, Update
from storaged.meta.proposal import Surroundings, View
from storaged.meta.register import Lineage, Verdict
from storaged.meta.rounds import Courier

NEW_AT_LEAST = 0.75
"""Of the latest changes of a bucket's registers: a create that is refused costs more than twice what one that is taken spares."""

NEW_OF_LATE = 16
SCOPES_MAX = 1_024

OK = int(Verdict.OK)
PREEMPTED = int(Verdict.PREEMPTED)
HELD = int(Verdict.HELD)
AHEAD = int(Verdict.AHEAD)

AHEAD_MAX_US = 10_000_000
"""With a ballot further ahead of this clock a change asks first: creates are refused by clocks, promises never are."""


Created = Callable[[Outcome | Exception | None], None]


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
        if len(rates) >= SCOPES_MAX and scope not in rates:
            rates.clear()
        rates[scope] = rate + (new - rate) / NEW_OF_LATE


class QuickCreate:
    """``begin`` once."""

    __slots__ = (
        "_around",
        "_asking",
        "_courier",
        "_decisive",
        "_failed",
        "_held",
        "_impatient",
        "_limit_s",
        "_majority",
        "_refused",
        "_synced",
        "_taken",
        "_then",
        "_timeout_s",
        "_trace_began",
        "_value",
        "_view",
        "above",
        "ahead",
        "lineage",
        "name",
        "small",
        "update",
    )

    def __init__(
        self,
        around: Surroundings,
        courier: Courier,
        view: View,
        name: RegisterName,
        update: Update,
        small: SmallCopies | None,
        lineage: Lineage,
        timeout_s: float,
        limit_s: float,
    ) -> None:
        """As ``QuickChange``."""
        self.lineage = lineage
        self.above = 0
        self.ahead = False
        """Its ballot was too far ahead of a clock, here or at a replica."""
        self.name = name
        self.update = update
        self.small = small
        self._around = around
        self._courier = courier
        self._view = view
        self._timeout_s = timeout_s
        self._limit_s = limit_s
        self._majority = len(view.disks) // 2 + 1
        self._decisive = len(view.disks) + 1 - self._majority
        """With fewer answers nothing is decided."""
        self._synced: list[str] = []
        self._failed = self._refused = self._held = 0
        self._impatient = False
        self._asking = False
        self._taken = False
        self._then: Created | None = None

    def begin(self, change: Change, then: Created) -> None:
        """``change`` is what ``update`` makes of nothing. ``then(outcome)`` is told once, perhaps before this returns, and must not raise. None: it was not taken, as far as is
        known. An exception: what went wrong here unforeseen."""
        around, view, small = self._around, self._view, self.small
        now_us = around.clock.wall_ms() * 1000
        ballot = around.ballots.next(view.epoch, 0, now_us)
        self._then = then
        if ballot.counter > now_us + AHEAD_MAX_US:
            self.ahead = True
            self._end(None)
            return
        self._value = self.lineage.create(change, ballot)
        self._trace_began = (trace.current(), time.perf_counter_ns()) if trace.on else None
        self._asking = True
        try:
            request = Create("", self.name, ballot, self._value)
            fragments = () if small is None else small.fragments
            self._courier.ask_each(request, view.disks, self._heard, timeout_s=self._timeout_s, fragments=fragments)
            self._asking = False
            self._look()
        except BaseException:  # a mistake of ours: who began it is told, and whoever was asked answers nobody
            self._then = None
            raise

    async def run(self, change: Change) -> Outcome | None:
        """What ``begin`` tells. Raises the exception that it tells."""
        told: list[Outcome | Exception | None] = []
        over: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.begin(change, partial(_wake, over, told))
        await over
        outcome = told.pop()
        try:
            if isinstance(outcome, Exception):
                raise outcome
            return outcome
        finally:
            del outcome  # an exception has this frame, and the frame may not have it

    def _heard(self, disk: str, answer: AcceptReply | StoragedError, _bulk: object = None) -> None:
        try:
            self._count(disk, answer)
        except Exception as mistake:  # of ours: who waits is told, not only who brought the answer
            if self._then is None:
                raise
            self._end(mistake)

    def _count(self, disk: str, answer: AcceptReply | StoragedError) -> None:
        synced = self._synced
        if not isinstance(answer, StoragedError) and answer.verdict == OK and (answer.copy_synced or self.small is None):
            synced.append(disk)
            if self._then is None:
                return
        else:
            self._failed += 1
            self._note_failed(disk, answer)
        if self._then is not None and not self._asking and (len(synced) + self._failed >= self._decisive or self._impatient):
            self._look()

    def _note_failed(self, disk: str, answer: AcceptReply | StoragedError) -> None:
        if isinstance(answer, StoragedError):
            self._around.suspects.saw(disk, answer)
        else:
            self._refused += 1
            self.above = max(self.above, answer.promised.counter)
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
            if self._trace_began is not None:
                current, began_ns = self._trace_began
                if current is not None:
                    current.note("create", began_ns, time.perf_counter_ns())
            self._end(Outcome(None, self._value))
        elif self._failed + self._majority > len(disks) or self._failed + taken == len(disks) or (self._impatient and self._refused):
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
        """The first time only where somebody has refused, or as soon as somebody does: with the promises of the others it goes on without whoever takes long."""
        more_s, self._limit_s = self._limit_s, 0.0
        self._impatient = True
        if not more_s or self._refused:
            self._note_held()
            self._end(None)
        return more_s if self._then is not None else 0.0


def _wake(over: asyncio.Future[None], told: list[Outcome | Exception | None], outcome: Outcome | Exception | None) -> None:
    if not over.done():  # it is, when who waited was cancelled
        told.append(outcome)
        over.set_result(None)

"""The common case of a change and of a read: everybody answers, nobody is in the way. Callbacks that count answers.

Theory of operation
    ``QuickChange`` is the first attempt of ``proposal.Proposal`` and ``QuickRead`` the first round of a read, written
    straight: the requests leave
    encoded once for all that are asked, each answer is a call of ``_promised``, ``_accepted`` or ``_told`` on the event
    loop, and the one that completes the
    majority does what comes next. No task, timer or future belongs to a call: whatever happens to it, its replica
    answers or the RPC layer does, or ``Patience``
    ends the change.

    A majority is asked for a promise, as for a read, and the rest only when one of them fails or takes long; what is
    then proposed goes to all, for it binds a replica that
    has promised nothing just as well.

    What is not the common case (a refusal, replicas that differ, too few that answer, a joint layout) is not decided
    here: the outcome is None, and the general
    code begins anew with what this attempt has left behind: its lineage, once an accept was sent, and the highest
    ballot that was in its way. A create (``meta.proposer.create``)
    may have come before; then what it has left behind is this one's to begin with.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, Protocol

from storaged import trace
from storaged.errors import StoragedError
from storaged.meta.consensus.register import COUNTER_AHEAD_MAX_US, Lineage, Standing, Verdict, created, shown
from storaged.meta.messages import Accept, AcceptReply, Prepare, PrepareReply
from storaged.meta.names import RegisterName, Table
from storaged.meta.ports import Ballot, Outcome, SmallCopies, Update
from storaged.meta.proposer.proposal import Surroundings, View
from storaged.meta.storage.rowvalue import check_of
from storaged.meta.transport.quorum import NO_BYTES, Courier, Suspects
from storaged.meta.transport.reads import CHECK, COPY, ROW, RowReader

Stage = Literal["prepare", "accept", "over"]
Tried = Callable[[Outcome | Exception | None], None]
OK = int(Verdict.OK)
SYSTEM = int(Table.SYSTEM)
PREEMPTED = int(Verdict.PREEMPTED)


class Attempt:
    """What every attempt at a change has, and is known by when it is over: what the next one goes on with."""

    __slots__ = (
        "_around",
        "_began_ns",
        "_courier",
        "_failed",
        "_limit_s",
        "_majority",
        "_synced",
        "_then",
        "_timeout_s",
        "_trace",
        "_view",
        "above",
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
        above: int = 0,
    ) -> None:
        """``limit_s``: how long it may go on when it has begun to take long."""
        self.lineage = lineage
        self.above = above
        """The counter of the highest ballot that was in the way."""
        self.name = name
        self.update = update
        self.small = small
        self._around = around
        self._courier = courier
        self._view = view
        self._timeout_s = timeout_s
        self._limit_s = limit_s
        self._majority = len(view.disks) // 2 + 1
        self._synced: list[str] = []
        self._failed = 0
        self._then: Tried | None = None
        self._trace = trace.current() if trace.on else None
        self._began_ns = 0

    def _note_above(self, counter: int) -> None:
        """A counter that is in the way at a replica. What lies far ahead of the clock one replica alone can't say:
        ``proposal`` asks a majority."""
        if self.above < counter <= self._around.clock.wall_ms() * 1000 + COUNTER_AHEAD_MAX_US:
            self.above = counter

    def _next_ballot(self, now_us: int) -> Ballot:
        return self._around.ballots.next(self._view.epoch, self.above, now_us)

    def _mark(self, name: str) -> None:
        if self._trace is not None:
            now_ns = time.perf_counter_ns()
            if name:
                self._trace.note(name, self._began_ns, now_ns)
            self._began_ns = now_ns


class QuickChange(Attempt):
    """``begin`` once, or ``await run()``."""

    __slots__ = (
        "_answers",
        "_asking",
        "_ballot",
        "_base",
        "_changed",
        "_early",
        "_promises",
        "_silent",
        "_stage",
        "_unasked",
    )

    def __init__(self, *given: Any) -> None:
        """As ``Attempt``."""
        super().__init__(*given)
        self._unasked: list[str] = []
        self._silent: list[str] = []
        """Whoever was asked for a promise first and has not answered."""
        self._stage: Stage = "prepare"
        self._promises: list[PrepareReply] = []
        self._answers = 0
        self._asking = False
        self._early: list[tuple[Any, str, Any]] = []

    def begin(self, then: Tried) -> None:
        """``then(outcome)`` is told once, perhaps before this returns, and must not raise. None: not the common case.
        An exception: what ``update`` raised, after the value
        that it judged was settled, or what else went wrong here unforeseen. What it raises is told to nobody else."""
        order = self._around.suspects.last(self._view.disks)
        order, self._unasked = order[: self._majority], order[self._majority :]
        self._silent = order.copy()
        self._ballot = self._next_ballot(self._around.clock.wall_ms() * 1000)
        self._mark("")
        self._then = then
        try:
            self._ask(Prepare("", self.name, self._ballot), self._promised, order, ())
        except BaseException:  # a mistake of ours: who began it is told, and whoever was asked answers nobody
            self._stage, self._then = "over", None
            raise

    async def run(self) -> Outcome | None:
        """What ``begin`` tells. Raises the exception that it tells."""
        try:
            return await told_by(self.begin)
        finally:
            self._stage = "over"  # who goes away before anything was proposed proposes nothing any more

    def _ask(self, request: Prepare | Accept, heard: Any, disks: Sequence[str], fragments: Any) -> None:
        """What answers at once (a replica of this process) is looked at when all have been asked."""
        self._asking = True
        try:
            self._courier.ask_each(request, disks, heard, timeout_s=self._timeout_s, fragments=fragments)
        finally:
            self._asking = False
        early, self._early = self._early, []
        for handle, disk, answer in early:
            handle(disk, answer)

    def _promised(self, disk: str, answer: PrepareReply | StoragedError, _bulk: object = None) -> None:
        if self._asking:
            self._early.append((self._promised, disk, answer))
            return
        if self._stage != "prepare":
            return  # it promised later than a majority did
        try:
            self._count_promise(disk, answer)
        except Exception as mistake:  # of ours: who waits is told, not only who brought the answer
            self._end(mistake)

    def _count_promise(self, disk: str, answer: PrepareReply | StoragedError) -> None:
        if disk in self._silent:
            self._silent.remove(disk)
        if isinstance(answer, StoragedError):
            self._lost(disk, answer)
            self._ask_the_rest()
        elif answer.verdict != OK:
            self._refused(answer)
            self._end(None)
            return
        else:
            self._promises.append(answer)
            if len(self._promises) == self._majority:
                self._decide()
                return
        if self._failed + self._majority > len(self._view.disks):
            self._end(None)

    def _ask_the_rest(self) -> None:
        rest, self._unasked = self._unasked, []
        if rest:
            self._ask(Prepare("", self.name, self._ballot), self._promised, rest, ())

    def _decide(self) -> None:
        """The change is applied to what a majority has told, and proposed."""
        self._mark("prepare")
        if self.name.table == SYSTEM and any(
            self._around.doubts(self.name, "", reply.value) for reply in self._promises
        ):
            self._end(None)  # the general code knows which of them to go by
            return
        best = self._promises[0]
        settled = True
        for reply in self._promises:
            if reply.accepted != best.accepted:
                settled = False
                if reply.accepted > best.accepted:
                    best = reply
        if not settled and self.name.table == Table.SYSTEM:
            self._end(None)  # all replicas are to be asked: one of them may lie (``register.credible``)
            return
        found = best.value
        lineage = self.lineage
        sure = settled and not lineage.open  # a create that is still out there may come above what was found
        if (lineage.open and lineage.judge(found, best.accepted, settled) is not Standing.CLEAR) or (
            not settled and found is not None and created(found)
        ):
            self._end(None)
            return
        value = shown(found)
        try:
            change = self.update(value)
        except Exception as error:
            self._end(error if sure else None)
            return
        if change is None:
            self._end(Outcome(value, value) if sure else None)
            return
        small = self.small
        if not settled and small is None and change.payload:
            self._end(None)  # it may have to carry a copy along
            return
        self._base = value
        self._changed = lineage.attempt(found, change)
        self._stage = "accept"
        self._answers = self._failed = 0
        accept = Accept("", self.name, self._ballot, self._changed)
        self._ask(accept, self._accepted, self._view.disks, () if small is None else small.fragments)

    def _accepted(self, disk: str, answer: AcceptReply | StoragedError, _bulk: object = None) -> None:
        if self._asking:
            self._early.append((self._accepted, disk, answer))
            return
        try:
            self._count_accept(disk, answer)
        except Exception as mistake:
            if self._stage == "over":
                raise
            self._end(mistake)

    def _count_accept(self, disk: str, answer: AcceptReply | StoragedError) -> None:
        small = self.small
        if isinstance(answer, StoragedError):
            self._lost(disk, answer)
            self._around.on_missed(self.name)
        elif answer.verdict != OK or (small is not None and not answer.copy_synced):
            self._failed += 1
            self._refused(answer)
            self._around.on_missed(self.name)
        else:
            self._answers += 1
            self._synced.append(disk)
            if (
                self._stage == "accept"
                and self._answers >= self._majority
                and (small is None or small.enough(frozenset(self._synced)))
            ):
                self._mark("accept")
                self._end(Outcome(self._base, self._changed))
                return
        if self._stage == "accept" and (
            self._failed + self._majority > len(self._view.disks)
            or self._failed + self._answers == len(self._view.disks)
        ):
            self._end(None)

    def _refused(self, answer: PrepareReply | AcceptReply) -> None:
        self._note_above(answer.promised.counter)
        if answer.verdict == PREEMPTED and self._stage != "over":
            self._around.counts["preempted"] += 1

    def _lost(self, disk: str, error: StoragedError) -> None:
        self._failed += 1
        self._around.suspects.saw(disk, error)

    def _end(self, outcome: Outcome | Exception | None) -> None:
        self._stage = "over"
        then, self._then = self._then, None
        if then is not None:
            then(outcome)

    def give_up(self) -> float:
        """The first time it only asks the rest, and whoever was waited for comes last for a while; then there is no
        time left.
        """
        more_s, self._limit_s = self._limit_s, 0.0
        if self._stage == "prepare" and more_s:
            if self._promises:  # when nobody has answered, it may be this process that is late
                for disk in self._silent:
                    self._around.suspects.add(disk)
            self._ask_the_rest()
        elif self._stage != "over" and not more_s:
            self._end(None)
        return more_s if self._stage != "over" else 0.0


async def told_by(begin: Callable[[Tried], None]) -> Outcome | None:
    """What ``begin(then)`` tells. Raises the exception that it tells."""
    told: list[Outcome | Exception | None] = []
    over: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    begin(partial(_wake, over, told))
    await over
    outcome = told.pop()
    try:
        if isinstance(outcome, Exception):
            raise outcome
        return outcome
    finally:
        del (
            outcome
        )  # an exception has this frame, and the frame may not have it: the copies would wait for the collector


def _wake(
    over: asyncio.Future[None], told: list[Outcome | Exception | None], outcome: Outcome | Exception | None
) -> None:
    if not over.done():  # it is, when who waited was cancelled
        told.append(outcome)
        over.set_result(None)


class Impatient(Protocol):
    def give_up(self) -> float:
        """It takes long. For how many seconds it goes on nevertheless: 0 when it has ended, now or before."""


class Patience:
    """Ends what waits too long, whatever its replicas do. One timer for all: it rings for the one whose time is over
    first, and most have ended by then.
    """

    def __init__(self) -> None:
        self._ends: dict[Impatient, float] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._rings_at = 0.0

    def begin(self, waiting: Impatient, limit_s: float) -> None:
        """``end`` is to be called when it is over, whatever comes of it."""
        loop = asyncio.get_running_loop()
        end = self._ends[waiting] = loop.time() + limit_s
        if self._timer is None or end < self._rings_at:
            self._ring_at(loop, end)

    def end(self, waiting: Impatient) -> None:
        """Also of who never began to wait."""
        self._ends.pop(waiting, None)

    def _ring_at(self, loop: asyncio.AbstractEventLoop, at: float) -> None:
        self.close()
        self._timer = loop.call_at(at, self._ring, loop)
        self._rings_at = at

    def _ring(self, loop: asyncio.AbstractEventLoop) -> None:
        self._timer = None
        now = loop.time()
        for waiting, end in list(self._ends.items()):  # who gives up calls ``end``, maybe at once
            if end <= now and (more_s := waiting.give_up()) > 0:
                self._ends[waiting] = now + more_s
        later = [end for end in self._ends.values() if end > now]  # also of what began meanwhile
        if later:
            self._ring_at(loop, min(later))

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


class QuickRead:
    """``ask`` once; ``then`` is told when it is over. ``give_up`` ends it when it takes long: others are to be asked
    then, and whoever was waited for
    comes last for a while, or each read would wait for them anew."""

    __slots__ = ("_check", "_first", "_silent", "_suspects", "_then", "agreed", "copy", "done", "row")

    def __init__(self, then: Callable[[QuickRead], None], suspects: Suspects) -> None:
        """``then`` must not raise."""
        self._then = then
        self._suspects = suspects
        self._first = ""
        self._silent: list[str] = []
        """Whoever was asked and has not answered."""
        self._check: bytes | None = None
        self.done = False
        self.agreed = False
        """A majority reports one ballot with one value, or none: ``row`` is settled."""
        self.row = b""
        """Empty: never written."""
        self.copy = NO_BYTES
        """The small copy that came along, if one did."""

    def ask(self, reader: RowReader, view: View, packed: bytes, want_copy: bool, timeout_s: float) -> None:
        """Of the register with this packed name. It may be over before this returns."""
        asked = self._suspects.last(view.disks)[: len(view.disks) // 2 + 1]
        self._first, self._silent = asked[0], asked.copy()
        reader.ask(self._first, (COPY if want_copy else ROW) + packed, view.epoch, self._told_row, timeout_s)
        for disk in asked[1:]:
            reader.ask(disk, CHECK + packed, view.epoch, partial(self._told_check, disk), timeout_s)

    def _told_row(self, found: bytes | StoragedError | None, copy: memoryview) -> None:
        if isinstance(found, bytes):
            self.row, self.copy = found, copy
            found = check_of(found)
        self._told_check(self._first, found, copy)

    def _told_check(self, disk: str, found: bytes | StoragedError | None, _copy: memoryview) -> None:
        if self.done:
            return
        if isinstance(found, StoragedError):
            self._suspects.saw(disk, found)
        check = self._check
        if not isinstance(found, bytes) or (check is not None and found != check):
            self._end()
            return
        self._check = found
        self._silent.remove(disk)
        if not self._silent:
            self.agreed = True
            self._end()

    def give_up(self) -> float:
        if not self.done:
            if self._check is not None:  # when nobody has answered, it may be this process that is late
                for disk in self._silent:
                    self._suspects.add(disk)
            self._end()
        return 0.0

    def _end(self) -> None:
        self.done = True
        self._then(self)

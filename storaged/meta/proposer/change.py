"""Drives one ``consensus.proposer.Proposer``: sends its requests, brings it the answers, and waits where it wants to
wait.

Theory of operation
    Everything happens in callbacks on the event loop. A request is encoded once for all replicas that are asked. Each
    answer is one call of ``_on_promise``, ``_on_accept`` or ``_on_create``, which gives it to the machine; when the
    machine has entered a state, ``_enter`` does what ``State`` says of it. So a change that meets no trouble costs
    neither a task nor a timer nor a future of its own: ``Deadlines`` has one timer for all changes. Pauses are timers.
    Only these are tasks: to fetch a small copy, to learn where the partition is, and to wait for a turn.

    ``begin`` reports by a callback. ``run`` is the same for a caller that has a task: it waits for that callback.

    A replica of this process may answer while the others are still being asked. Its answer is kept until all of them
    are.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Sequence
from functools import partial
from typing import Any

from storaged import trace
from storaged.deadlines import FOREVER
from storaged.errors import OutcomeUnknown, ServiceUnavailable, StoragedError
from storaged.meta.consensus.proposer import Proposer
from storaged.meta.consensus.quorums import View
from storaged.meta.consensus.register import Verdict
from storaged.meta.consensus.states import (
    ACCEPTING,
    CARRYING,
    CREATING,
    DONE,
    FAILED,
    GATHERING,
    PREPARING,
    REFRESHING,
    RETRYING,
    SYNCING,
)
from storaged.meta.messages import AcceptReply, PrepareReply
from storaged.meta.names import Change
from storaged.meta.ports import OnOutcome, Outcome
from storaged.meta.proposer.ring import Ring

OK = int(Verdict.OK)
STOPS = "This node stops. Nothing was changed. Retry."
STOPPED = "This node stops before it has learned what became of the change."


class ChangeShell:
    """``begin`` once, or ``await run()``."""

    __slots__ = (
        "_began_ns",
        "_deadline",
        "_early",
        "_more_s",
        "_on_done",
        "_ready",
        "_ring",
        "_sending",
        "_silent",
        "_timeout_s",
        "_trace",
        "_unasked",
        "_work",
        "machine",
    )

    def __init__(
        self,
        ring: Ring,
        machine: Proposer,
        deadline: float,
        ready: asyncio.Future[None] | None = None,
    ) -> None:
        """``deadline`` by ``ring.clock.monotonic()``. ``ready``: see ``ports.Registers.change``."""
        self.machine = machine
        self._ring = ring
        self._deadline = deadline
        self._ready = ready
        self._on_done: OnOutcome | None = None
        self._more_s = self._timeout_s = 0.0
        self._silent: Sequence[str] = ()
        """Disks that were asked for a promise first and have not answered."""
        self._unasked: Sequence[str] = ()
        self._sending = False
        self._early: list[tuple[Any, ...]] = []
        self._work: asyncio.Task[None] | asyncio.TimerHandle | None = None
        self._trace = trace.current() if trace.on else None
        self._began_ns = 0

    # --- begin and end ------------------------------------------------------------------------------------------------

    def begin(self, view: View, on_done: OnOutcome, create: Change | None = None) -> None:
        """``on_done(outcome)`` is called once, perhaps before this returns, and must not raise. Its argument is the
        outcome, or the exception that ``ports.Registers.change`` raises. ``create``: what the update makes of nothing,
        to be proposed at once. What this raises is a mistake of ours; ``on_done`` is not called then.
        """
        self._on_done = on_done
        if self._trace is not None:
            self._mark("")
        now_us = self._ring.clock.wall_ms() * 1000
        try:
            if create is None or (not view.quorum.single and self._ring.shared.rules.no_create_while_joint):
                self.machine.begin(view, now_us)
            else:
                self.machine.create(view, create, now_us)
            self._enter()
        except BaseException:  # a mistake of ours: the caller gets it
            self._on_done = None
            self._end(None)
            raise

    async def run(self, view: View, create: Change | None = None) -> Outcome:
        """As ``begin``; returns the outcome, or raises the exception."""
        outcomes: list[Outcome | Exception] = []
        over: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        try:
            self.begin(view, partial(_wake, over, outcomes), create)
            await over
        finally:
            self.stop()  # once the caller has gone away, the change proposes nothing any more
        outcome = outcomes.pop()
        try:
            if isinstance(outcome, Exception):
                raise outcome
            return outcome
        finally:
            del outcome  # the exception refers to this frame: without the cycle its copies are freed at once

    def stop(self) -> None:
        """Ends it where it is. A request that was sent may still be carried out."""
        if self._on_done is not None:
            self._end(OutcomeUnknown(STOPPED) if self.machine.lineage.open else ServiceUnavailable(STOPS))

    def _end(self, outcome: Outcome | Exception | None) -> None:
        self._ring.deadlines.end(self)
        self.machine.turn += 1  # whatever still comes is late
        if self._work is not None:
            self._stop_waiting()
        on_done, self._on_done = self._on_done, None
        if on_done is not None and outcome is not None:
            on_done(outcome)

    # --- what a state wants -------------------------------------------------------------------------------------------

    def _enter(self) -> None:
        """Does what the state wants that the machine has entered."""
        if self._work is not None:
            self._stop_waiting()
        if self._on_done is None:
            return
        machine, state = self.machine, self.machine.state
        if state is RETRYING and not machine.pause_s:
            self._begin_again()
            state = machine.state
        if state is DONE:
            if self._trace is not None:
                self._mark("create" if machine.by_create else "accept")
            self._end(machine.outcome)
        elif state is PREPARING:
            self._prepare()
        elif state is ACCEPTING:
            if self._trace is not None and self._ready is None:
                self._mark("prepare")
            asked = machine.request.identity, bool(machine.fragments)  # type: ignore[union-attr]
            self._send(partial(self._on_accept, machine.turn, *asked), machine.view.quorum.disks)
        elif state is CREATING:
            self._limit()
            self._send(self._on_create, machine.view.quorum.disks)
        elif state is FAILED:
            if machine.fenced:
                self._ring.on_fenced(machine.name.scope)
            self._end(machine.take_error())
        else:
            self._wait()

    def _wait(self) -> None:
        machine, state = self.machine, self.machine.state
        if state is GATHERING:
            self._ask_others()
            if machine.state is GATHERING:  # a replica of this process has not answered at once
                self._later(machine.gather_s, machine.waited)
        elif state is SYNCING:
            self._sync()
        elif state is CARRYING:
            self._start(self._carry())
        elif state is REFRESHING:
            self._start(self._refresh())
        elif state is RETRYING:
            contention = self._ring.contention
            if machine.pause_s and not contention.preempted(machine.name) and contention.enabled:
                self._start(self._take_turn())
            else:
                self._pause()

    def _pause(self) -> None:
        pause_s = self._ring.jitter() * self.machine.pause_s
        if pause_s >= self._remaining_s():
            self.machine.expire()
            self._enter()
        else:
            self._later(pause_s, self._begin_again)

    async def _take_turn(self) -> None:
        """Another proposer was in the way, or may have been."""
        taken = await self._ring.contention.take(self.machine.name, 1, self._remaining_s() / 2)
        self._work = None
        if taken:
            self._did(self._begin_again)
        else:
            self._pause()

    def _prepare(self) -> None:
        machine = self.machine
        disks: Sequence[str] = machine.view.quorum.disks
        if machine.sparing:
            order = self._ring.unresponsive.last(disks)
            disks = machine.view.quorum.prefix(order)
            self._unasked, self._silent = order[len(disks) :], list(disks)
        else:
            self._unasked = self._silent = ()
        self._limit()
        self._send(partial(self._on_promise, machine.turn), disks)

    def _ask_others(self) -> None:
        others, self._unasked = self._unasked, ()
        if others:
            self._send(partial(self._on_promise, self.machine.turn), others)

    def _send(self, on_reply: Any, disks: Sequence[str]) -> None:
        machine, ring = self.machine, self._ring
        fragments = machine.view.by_disk(machine.fragments)
        self._sending = True
        try:
            ring.fanout.send(machine.request, disks, on_reply, timeout_s=self._timeout_s, fragments=fragments)
        finally:
            self._sending = False
        early, self._early = self._early, []
        for on_answer, *answer in early:
            on_answer(*answer)

    # --- answers ------------------------------------------------------------------------------------------------------

    def _on_promise(self, turn: int, disk: str, answer: PrepareReply | StoragedError, _bulk: object = None) -> None:
        if self._sending:
            self._early.append((self._on_promise, turn, disk, answer))
            return
        machine = self.machine
        if isinstance(answer, StoragedError):
            self._ring.unresponsive.saw(disk, answer)
        elif answer.promised > answer.accepted and answer.promised.incarnation not in (b"", machine.ballot.incarnation):
            self._ring.contention.met(machine.name)
        if turn != machine.turn:
            return
        if disk in self._silent:
            self._silent.remove(disk)  # type: ignore[attr-defined]
        try:
            if machine.promised(turn, disk, None if isinstance(answer, StoragedError) else answer):
                self._enter()
            elif not isinstance(answer, StoragedError) and answer.verdict != OK:
                self._hurry()
            elif self._unasked and (isinstance(answer, StoragedError) or not self._silent):
                self._ask_others()
        except Exception as mistake:  # of ours: the caller gets it, not only the one that brought the answer
            self._fail(mistake)

    def _on_accept(
        self,
        turn: int,
        identity: bool,
        copies: bool,
        disk: str,
        answer: AcceptReply | StoragedError,
        _bulk: object = None,
    ) -> None:
        if self._sending:
            self._early.append((self._on_accept, turn, identity, copies, disk, answer))
            return
        machine = self.machine
        if isinstance(answer, StoragedError):
            self._ring.unresponsive.saw(disk, answer)
            reply = None
        else:
            reply = answer
        took = reply is not None and reply.verdict == OK
        if not (took or identity) or (copies and not (took and reply.copy_synced)):  # type: ignore[union-attr]
            self._ring.on_missed(machine.name)
        try:
            if machine.accepted(turn, disk, reply):
                self._enter()
            elif reply is not None and not took and machine.state is ACCEPTING:
                self._hurry()
        except Exception as mistake:
            self._fail(mistake)

    def _on_create(self, disk: str, answer: AcceptReply | StoragedError, _bulk: object = None) -> None:
        if self._sending:
            self._early.append((self._on_create, disk, answer))
            return
        machine = self.machine
        if isinstance(answer, StoragedError):
            self._ring.unresponsive.saw(disk, answer)
            reply = None
        else:
            reply = answer
        try:
            if machine.created(disk, reply):
                if machine.by_create and machine.not_taken_by:
                    self._ring.on_missed(machine.name)
                self._enter()
            elif machine.by_create and disk in machine.not_taken_by:
                self._ring.on_missed(machine.name)
        except Exception as mistake:
            self._fail(mistake)

    def _fail(self, mistake: Exception) -> None:
        if self._on_done is None:
            raise mistake
        self._end(mistake)

    # --- waiting ------------------------------------------------------------------------------------------------------

    def _later(self, seconds: float, event: Callable[[], bool]) -> None:
        self._stop_waiting()
        self._work = asyncio.get_running_loop().call_later(seconds, self._on_timer, event)

    def _on_timer(self, event: Callable[[], bool]) -> None:
        self._work = None
        self._did(event)

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        self._stop_waiting()
        task = self._work = self._ring.pool.start(work)
        task.add_done_callback(self._on_task_over)

    def _on_task_over(self, task: asyncio.Task[None]) -> None:
        if task is self._work:  # the pool gave it up, or closes
            self._work = None
            self.stop()

    def _stop_waiting(self) -> None:
        work, self._work = self._work, None
        if work is not None:
            work.cancel()

    def _did(self, event: Callable[[], bool]) -> None:
        """Something that was waited for has happened."""
        if self._on_done is None:
            return
        try:
            if event():
                self._enter()
        except Exception as mistake:
            self._fail(mistake)

    def _sync(self) -> None:
        """Waits for the fragments. The time that they take is not the register's, and does not count against the
        deadline."""
        ready = self._ready
        if self._trace is not None:
            self._mark("prepare")
        if ready is None or ready.done():
            self._did(partial(self._synced, 0.0))
            return
        self._ring.deadlines.begin(self, FOREVER)
        ready.add_done_callback(partial(self._on_ready, self._ring.clock.monotonic()))

    def _on_ready(self, began: float, _ready: asyncio.Future[None]) -> None:
        self._did(partial(self._synced, self._ring.clock.monotonic() - began))

    def _synced(self, seconds: float) -> bool:
        self._deadline += seconds
        self._limit()
        if self._trace is not None:
            self._mark("")
        ready = self._ready
        if ready is not None:
            if ready.cancelled():
                return self.machine.data_failed(ServiceUnavailable("The write was given up."))
            error = ready.exception()
            if error is not None:
                if not isinstance(error, Exception):
                    raise error
                return self.machine.data_failed(error)
        return self.machine.synced()

    async def _carry(self) -> None:
        machine = self.machine
        assert machine.carried_by is not None
        try:
            fragments = await self._ring.carry(machine.view, machine.name, machine.carried_by, self._deadline)
        except Exception as mistake:
            self._work = None
            self._fail(mistake)
        else:
            self._work = None
            if not fragments:
                self._ring.on_missed(machine.name)
            self._did(partial(machine.carried, fragments))

    async def _refresh(self) -> None:
        newer = await self._ring.refresher.refresh(self.machine.name, self.machine.view, self._remaining_s())
        self._work = None
        self._did(partial(self.machine.refreshed, newer))

    def _begin_again(self) -> bool:
        try:
            view = self._ring.view(self.machine.name)
        except ServiceUnavailable:  # a layout came without the one that says where the keys are
            return self.machine.expire()
        return self.machine.begin(view, self._ring.clock.wall_ms() * 1000)

    # --- time ---------------------------------------------------------------------------------------------------------

    def _remaining_s(self) -> float:
        return self._deadline - self._ring.clock.monotonic()

    def _limit(self) -> None:
        """Until the deadline; a create, and a sparing attempt, are looked at earlier."""
        machine, ring = self.machine, self._ring
        limit_s = max(0.001, self._remaining_s())
        self._timeout_s = ring.call_timeout_s if ring.call_timeout_s < limit_s else limit_s
        first_s = limit_s
        if machine.state is CREATING or (machine.state is PREPARING and machine.sparing):
            first_s = ring.hedge_s if ring.hedge_s < limit_s / 2 else limit_s / 2
        self._more_s = limit_s - first_s
        ring.deadlines.begin(self, first_s)

    def _hurry(self) -> None:
        """A replica has refused this round: what the others have to say must come soon."""
        ring, limit_s = self._ring, max(0.001, self._remaining_s())
        first_s = ring.hedge_s if ring.hedge_s < limit_s / 2 else limit_s / 2
        self._more_s = limit_s - first_s
        ring.deadlines.begin(self, first_s)

    def on_time(self) -> None:
        """See ``Waiting``. The first time it asks the other replicas too, and the slow ones come last for a while, or
        it begins again where a replica has refused. The last time the deadline is over."""
        more_s, self._more_s = self._more_s, 0.0
        machine = self.machine
        if not more_s:
            self._did(machine.expire)
            return
        self._ring.deadlines.begin(self, more_s)
        if machine.state is PREPARING and self._unasked:
            self._did(self._hedge)
        else:
            self._did(machine.on_slow)

    def _hedge(self) -> bool:
        if (
            len(self._silent) < self.machine.view.quorum.fewest
        ):  # when no replica has answered, this process may be late
            for disk in self._silent:
                self._ring.unresponsive.add(disk)
        self._ask_others()
        return False

    def _mark(self, name: str) -> None:
        """Notes a span that ends now, unless the name is empty; the next one begins."""
        assert self._trace is not None
        now_ns = time.perf_counter_ns()
        if name:
            self._trace.note(name, self._began_ns, now_ns)
        self._began_ns = now_ns


def _wake(over: asyncio.Future[None], outcomes: list[Outcome | Exception], outcome: Outcome | Exception) -> None:
    if not over.done():  # it is, when the caller was cancelled
        outcomes.append(outcome)
        over.set_result(None)

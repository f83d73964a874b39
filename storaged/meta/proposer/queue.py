"""Changes of registers by one process: in turn, first as the common case (``quick``), and from there, where it was
none, as ``proposal`` has it.

A process never pre-empts itself: changes of one register wait for each other (``rounds.Turns``). Who can wait has a
task and awaits ``change``; who has none calls
``change_soon``, and is told by a callback. It costs a task only where it has to wait for its turn, and where the common
case ends.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from functools import partial
from typing import TypeVar

from storaged.errors import OutcomeUnknown, ServiceUnavailable, StoragedError
from storaged.ids import Entropy
from storaged.meta.consensus.register import CALL_BYTES, Lineage, may_create
from storaged.meta.names import Change, RegisterName, Value
from storaged.meta.ports import Changed, Outcome, SmallCopies, Update
from storaged.meta.proposer.create import Novelty, QuickCreate
from storaged.meta.proposer.proposal import Proposal, Surroundings, View
from storaged.meta.proposer.quick import Patience, QuickChange
from storaged.meta.transport.quorum import Courier, Turns

Q = TypeVar("Q", QuickChange, QuickCreate)

STOPPED = "This node stops before it has learned what became of the change."


class Changing:
    """``ports.Registers`` as far as it changes something."""

    def __init__(
        self,
        around: Surroundings,
        courier: Courier,
        patience: Patience,
        entropy: Entropy,
        deadline_s: float,
        hedge_s: float,
        novelty: Novelty,
    ) -> None:
        self._around = around
        self._courier = courier
        self._patience = patience
        self._entropy = entropy
        self._deadline_s = deadline_s
        self._hedge_s = hedge_s
        self._turns = Turns()
        self._novelty = novelty
        self._closed = False

    def close(self) -> None:
        """Nothing is begun by callbacks any more, and what was begun goes on with no task."""
        self._closed = True

    async def change(
        self,
        name: RegisterName,
        update: Update,
        small: SmallCopies | None,
        ready: Awaitable[None] | None,
        renew: Callable[[], Awaitable[None]] | None,
        nonce: bytes,
        regardless: bool = False,
    ) -> Outcome:
        """See ``ports.Registers``."""
        _check_regardless(name, regardless)
        self._around.counts["changes"] += 1
        deadline = self._deadline()
        barrier = None if ready is None else asyncio.ensure_future(ready)
        try:
            await self._turns.take(name, self._deadline_s)
            try:
                return await self._in_turn(name, update, small, barrier, renew, nonce, regardless, deadline)
            finally:
                self._turns.release(name)
        finally:
            if barrier is not None and barrier is not ready:
                barrier.cancel()
                await asyncio.gather(barrier, return_exceptions=True)

    async def _in_turn(
        self,
        name: RegisterName,
        update: Update,
        small: SmallCopies | None,
        barrier: asyncio.Future[None] | None,
        renew: Callable[[], Awaitable[None]] | None,
        nonce: bytes,
        regardless: bool,
        deadline: float,
    ) -> Outcome:
        view = self._around.view(name)
        if barrier is not None or nonce or len(view.groups) > 1:
            asking = Lineage(self._entropy(CALL_BYTES), self._around.rules)
            return await Proposal(self._around, name, asking, deadline, update, small, barrier, renew, nonce).run()
        change = self._to_create(name, update, regardless)
        lineage: Lineage | None = None
        above = 0
        if change is not None:
            create = self._quick(QuickCreate, view, name, update, small, self._left_s(deadline))
            try:
                outcome = await create.run(change)
            finally:
                self._patience.end(create)
            self._saw(create, outcome)
            if outcome is not None:
                return outcome
            lineage, above = create.lineage, create.above
        quick = self._quick(QuickChange, view, name, update, small, self._left_s(deadline), lineage, above)
        try:
            outcome = await quick.run()
        finally:
            self._patience.end(quick)
        outcome = outcome if outcome is not None else await self._go_on(quick, deadline)
        if regardless and change is None:
            self._novelty.saw(name, outcome.before is None)
        return outcome

    def _to_create(self, name: RegisterName, update: Update, regardless: bool) -> Change | None:
        """What is to be created; None for what is to ask first."""
        if not regardless or not self._novelty.likely(name):
            return None
        try:
            return update(None)
        except Exception:  # it will say so again when it is asked with what is there
            return None

    def _saw(self, create: QuickCreate, outcome: Outcome | Exception | None) -> None:
        self._novelty.saw(create.name, isinstance(outcome, Outcome) and not create.ahead)

    def change_soon(
        self, name: RegisterName, update: Update, then: Changed, small: SmallCopies | None, regardless: bool
    ) -> bool:
        """See ``ports.Registers``."""
        _check_regardless(name, regardless)
        try:
            view = self._around.view(name)
        except StoragedError:  # ``change`` says so
            return False
        if self._closed:
            return False
        if len(view.groups) > 1 or not self._turns.take_soon(name):
            self._around.pool.start(self._change_for(name, update, small, regardless, then))
            return True
        self._around.counts["changes"] += 1
        deadline = self._deadline()
        change = self._to_create(name, update, regardless)
        begin: Callable[[], None]
        quick: QuickChange | QuickCreate
        if change is not None:
            quick = create = self._quick(QuickCreate, view, name, update, small, self._deadline_s)
            begin = partial(create.begin, change, partial(self._create_over, create, view, deadline, then))
        else:
            quick = asking = self._quick(QuickChange, view, name, update, small, self._deadline_s)
            begin = partial(asking.begin, partial(self._over, asking, deadline, then, regardless))
        try:
            begin()
        except BaseException:  # a mistake of ours
            self._patience.end(quick)
            self._turns.release(name)
            raise
        return True

    def _create_over(
        self, create: QuickCreate, view: View, deadline: float, then: Changed, outcome: Outcome | Exception | None
    ) -> None:
        self._patience.end(create)
        self._saw(create, outcome)
        if outcome is None and not self._closed:
            limit_s, lineage = self._left_s(deadline), create.lineage
            quick = self._quick(
                QuickChange, view, create.name, create.update, create.small, limit_s, lineage, create.above
            )
            try:
                quick.begin(partial(self._over, quick, deadline, then, False))
            except Exception as mistake:  # of ours: nobody else would tell who waits
                self._over(quick, deadline, then, False, mistake)
            return
        self._turns.release(create.name)
        then(_given_up(create) if outcome is None else outcome)

    async def _change_for(
        self, name: RegisterName, update: Update, small: SmallCopies | None, regardless: bool, then: Changed
    ) -> None:
        outcome: Outcome | Exception = OutcomeUnknown(STOPPED)
        try:
            outcome = await self.change(name, update, small, None, None, b"", regardless)
        except Exception as error:
            outcome = error
        finally:
            then(outcome)
            del outcome  # an exception has this frame, and the frame may not have it

    def _over(
        self, quick: QuickChange, deadline: float, then: Changed, regardless: bool, outcome: Outcome | Exception | None
    ) -> None:
        self._patience.end(quick)
        if regardless and isinstance(outcome, Outcome):
            self._novelty.saw(quick.name, outcome.before is None)
        if outcome is None and not self._closed:
            self._around.pool.start(self._go_on_for(quick, deadline, then))
            return
        self._turns.release(quick.name)
        then(_given_up(quick) if outcome is None else outcome)

    async def _go_on_for(self, quick: QuickChange, deadline: float, then: Changed) -> None:
        outcome: Outcome | Exception | None = None
        try:
            outcome = await self._go_on(quick, deadline)
        except Exception as error:
            outcome = error
        finally:
            self._turns.release(quick.name)
            then(_given_up(quick) if outcome is None else outcome)
            del outcome  # an exception has this frame, and the frame may not have it

    def _go_on(self, quick: QuickChange, deadline: float) -> Awaitable[Outcome]:
        """With what the first attempt has left behind."""
        lineage, above = quick.lineage, quick.above
        proposal = Proposal(self._around, quick.name, lineage, deadline, quick.update, quick.small, _above=above)
        return proposal.run(again=lineage.open or above > 0)

    def _quick(
        self,
        kind: Callable[..., Q],
        view: View,
        name: RegisterName,
        update: Update,
        small: SmallCopies | None,
        limit_s: float,
        lineage: Lineage | None = None,
        above: int = 0,
    ) -> Q:
        """An attempt of up to ``limit_s``, known to ``_patience``, which is to be told of its end."""
        around = self._around
        patience_s = self._hedge_s if self._hedge_s < limit_s / 2 else limit_s / 2
        lineage = lineage or Lineage(self._entropy(CALL_BYTES), around.rules)
        timeout_s = around.call_timeout_s if around.call_timeout_s < limit_s else max(0.001, limit_s)
        quick = kind(around, self._courier, view, name, update, small, lineage, timeout_s, limit_s - patience_s, above)
        self._patience.begin(quick, patience_s)
        return quick

    async def identity(self, name: RegisterName, nonce: bytes, deadline: float, *, commit: bool) -> Value | None:
        """A settling round; see ``ports.Registers.settle``."""
        async with self._turns.turn(name, self._deadline_s):
            lineage = Lineage(b"", self._around.rules)
            proposal = Proposal(self._around, name, lineage, deadline, _keep, nonce=nonce, settling=True, commit=commit)
            return (await proposal.run()).after

    def _left_s(self, deadline: float) -> float:
        return max(0.0, deadline - self._around.clock.monotonic())

    def _deadline(self) -> float:
        return self._around.clock.monotonic() + self._deadline_s


def _given_up(quick: QuickChange | QuickCreate) -> StoragedError:
    """What is told of a change with which this process does not go on."""
    if quick.lineage.open:
        return OutcomeUnknown(STOPPED)
    return ServiceUnavailable("This node stops. Nothing was changed. Retry.")


def _check_regardless(name: RegisterName, regardless: bool) -> None:
    """Raises ValueError for a mistake of ours that would break what the register's body is bound to
    (``register.may_create``).
    """
    if regardless and not may_create(name):
        raise ValueError(
            f"only an object's register may be changed regardless of what it holds, not one of table {name.table}"
        )


def _keep(_value: Value | None) -> None:
    """The update of a settling round."""

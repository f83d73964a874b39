"""The changes of this process: one after the other for each register, each driven by a ``ChangeShell``.

A process never pre-empts itself: changes of one register wait for each other (``Turns``). A caller with a task awaits
``change``. A caller without one calls ``try_change`` and gets the outcome by a callback; that costs a task only when
the change has to wait for its turn.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial

from storaged.errors import OutcomeUnknown, ServiceUnavailable, SlowDown, StoragedError
from storaged.ids import Entropy
from storaged.meta.consensus.change import Wanted
from storaged.meta.consensus.proposer import Proposer
from storaged.meta.consensus.register import CALL_BYTES, Lineage, may_create
from storaged.meta.consensus.states import DONE, FAILED
from storaged.meta.names import Change, RegisterName, Value
from storaged.meta.ports import Grounds, OnOutcome, Outcome, SmallCopies, Unasked, Update
from storaged.meta.proposer.change import STOPPED, STOPS, ChangeShell
from storaged.meta.proposer.chosen import ChosenWatch
from storaged.meta.proposer.new_keys import NewKeyRate
from storaged.meta.proposer.ring import Ring

TURNS_MAX = 1_024
"""Changes that wait for one register in one process; beyond it the client gets SlowDown."""

WAITING_PART = 0.9
"""How much of its time a change waits for its turn, before the client gets SlowDown: one with less time left would end
in the middle.
"""


class Turns:
    """Changes of one register in one process run one after the other, first come first served."""

    def __init__(
        self, waiting_max: int = TURNS_MAX, on_idle: Callable[[RegisterName], None] = lambda name: None
    ) -> None:
        """``on_idle`` gets a register for which no change waits any more."""
        self._waiting_max = waiting_max
        self._on_idle = on_idle
        self._waiting: dict[RegisterName, deque[asyncio.Future[None]] | None] = {}

    def try_take(self, name: RegisterName) -> bool:
        """Whether no other change has the turn: then ``release`` ends it."""
        if name in self._waiting:
            return False
        self._waiting[name] = None
        return True

    async def take(self, name: RegisterName, timeout_s: float) -> None:
        """``release`` ends the turn. Raises SlowDown when too many wait for this register, or the turn did not come in
        time.
        """
        if self.try_take(name):
            return
        waiting = self._waiting[name]
        if waiting is None:
            waiting = self._waiting[name] = deque()
        if len(waiting) + 1 >= self._waiting_max:
            raise SlowDown(f"{len(waiting) + 1} changes of this key are waiting. Please reduce your request rate.")
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        waiting.append(turn)
        try:
            async with asyncio.timeout(timeout_s):
                await turn
        except BaseException as error:
            if turn.done() and not turn.cancelled():
                self.release(name)  # it came too late
            elif turn in waiting:
                waiting.remove(turn)
            if isinstance(error, TimeoutError):
                raise SlowDown("Other changes of this key took too long. Please reduce your request rate.") from None
            raise

    def taken(self, name: RegisterName) -> bool:
        """Whether a change has the turn."""
        return name in self._waiting

    def release(self, name: RegisterName) -> None:
        waiting = self._waiting[name]
        while waiting:
            turn = waiting.popleft()
            if not turn.done():  # else its waiter was cancelled in this turn of the loop, and has not run since
                turn.set_result(None)
                return
        del self._waiting[name]
        self._on_idle(name)

    def waiting(self, name: RegisterName) -> int:
        """How many changes wait for the one that has the turn."""
        return len(self._waiting.get(name) or ())

    @asynccontextmanager
    async def turn(self, name: RegisterName, timeout_s: float) -> AsyncIterator[None]:
        """Raises as ``take``."""
        await self.take(name, timeout_s)
        try:
            yield
        finally:
            self.release(name)


class ChangeQueue:
    """The part of ``ports.Registers`` that changes something."""

    def __init__(self, ring: Ring, entropy: Entropy, deadline_s: float, new_keys: NewKeyRate) -> None:
        self._ring = ring
        self._entropy = entropy
        self._deadline_s = deadline_s
        self._new_keys = new_keys
        self._turns = Turns(on_idle=ring.contention.end)
        self._under_way: dict[ChangeShell, None] = {}
        self._closed = False
        self.watch = ChosenWatch()

    def close(self) -> None:
        """Ends the changes that are under way; none is begun any more."""
        self._closed = True
        while self._under_way:
            shell, _ = self._under_way.popitem()
            shell.stop()

    async def change(
        self,
        name: RegisterName,
        update: Update,
        small: SmallCopies | None,
        ready: Awaitable[None] | None,
        nonce: bytes,
        regardless: bool = False,
        unasked: Unasked | None = None,
    ) -> Outcome:
        """See ``ports.Registers``."""
        _check_regardless(name, regardless)
        self._ring.shared.counts["changes"] += 1
        contention = self._ring.contention
        barrier = None if ready is None else asyncio.ensure_future(ready)
        try:
            deadline = self._deadline()
            async with self._turns.turn(name, self._deadline_s * WAITING_PART):
                if contention.expected(name):
                    await self._take_turn(name, deadline)
                thorough = barrier is not None or bool(nonce)
                if thorough:
                    create = self._still_to_create(name, unasked)
                else:
                    create = self._to_create(name, update, regardless)
                grounds = unasked.grounds if unasked is not None else None
                wanted = Wanted(name, update, small, nonce, barrier is not None, grounds, thorough=thorough)
                machine = Proposer(self._ring.shared, wanted, self._lineage())
                shell = ChangeShell(self._ring, machine, deadline, barrier)
                return await self._run(shell, regardless and not nonce, create)
        finally:
            if barrier is not None and barrier is not ready:
                barrier.cancel()
                await asyncio.gather(barrier, return_exceptions=True)

    async def _take_turn(self, name: RegisterName, deadline: float) -> None:
        """Other processes compete for the register."""
        remaining_s = deadline - self._ring.clock.monotonic()
        await self._ring.contention.take(name, 1 + self._turns.waiting(name), remaining_s / 2)

    async def _run(self, shell: ChangeShell, regardless: bool, create: Change | None) -> Outcome:
        if self._closed:
            raise ServiceUnavailable(STOPS)
        self._under_way[shell] = None
        try:
            outcome = await shell.run(self._ring.view(shell.machine.name), create)
            self.watch.saw(shell.machine.name, outcome)
            return outcome
        finally:
            self._under_way.pop(shell, None)
            if regardless:
                self._learn(shell.machine, create)

    def try_change(
        self, name: RegisterName, update: Update, on_outcome: OnOutcome, small: SmallCopies | None, regardless: bool
    ) -> bool:
        """See ``ports.Registers``."""
        _check_regardless(name, regardless)
        try:
            view = self._ring.view(name)
        except StoragedError:  # ``change`` raises it
            return False
        if self._closed:
            return False
        if self._ring.contention.expected(name) or not self._turns.try_take(name):
            self._ring.pool.start(self._change_for(name, update, small, regardless, on_outcome))
            return True
        self._ring.shared.counts["changes"] += 1
        create = self._to_create(name, update, regardless)
        machine = Proposer(self._ring.shared, Wanted(name, update, small), self._lineage())
        shell = ChangeShell(self._ring, machine, self._deadline())
        self._under_way[shell] = None
        try:
            shell.begin(view, partial(self._over, shell, create, regardless, on_outcome), create)
        except BaseException:  # a mistake of ours
            self._under_way.pop(shell, None)
            self._turns.release(name)
            raise
        return True

    def _over(
        self,
        shell: ChangeShell,
        create: Change | None,
        regardless: bool,
        on_outcome: OnOutcome,
        outcome: Outcome | Exception,
    ) -> None:
        self._under_way.pop(shell, None)
        if regardless:
            self._learn(shell.machine, create)
        self._turns.release(shell.machine.name)
        if isinstance(outcome, Outcome):
            self.watch.saw(shell.machine.name, outcome)
        on_outcome(outcome)

    async def _change_for(
        self, name: RegisterName, update: Update, small: SmallCopies | None, regardless: bool, on_outcome: OnOutcome
    ) -> None:
        outcome: Outcome | Exception = OutcomeUnknown(STOPPED)
        try:
            outcome = await self.change(name, update, small, None, b"", regardless)
        except Exception as error:
            outcome = error
        finally:
            on_outcome(outcome)
            del outcome  # breaks the cycle of exception and frame

    def _to_create(self, name: RegisterName, update: Update, regardless: bool) -> Change | None:
        """What is to be created; None for a change that asks first."""
        if not regardless or not self._new_keys.likely(name):
            return None
        try:
            return update(None)
        except Exception:  # it will raise again when it is asked with what the register holds
            return None

    def grounds(self, name: RegisterName) -> Grounds | None:
        """See ``ports.Registers``."""
        ring = self._ring
        if not (may_create(name) and self._new_keys.likely(name)) or self._turns.taken(name):
            return None
        try:
            view = ring.view(name)
        except StoragedError:  # ``change`` raises it
            return None
        if not view.quorum.single or ring.contention.expected(name):
            return None
        return ring.shared.grounds(name, view, ring.clock.wall_ms() * 1000, vouched=True)

    def _still_to_create(self, name: RegisterName, unasked: Unasked | None) -> Change | None:
        """None, too, when the partition is in another step than when the data was written: floors of two steps do not
        compare."""
        if unasked is None or self._ring.contention.expected(name):
            return None
        return unasked.change if self._ring.view(name).epoch == unasked.grounds.ballot.epoch else None

    def _learn(self, machine: Proposer, create: Change | None) -> None:
        """Whether the register was new: changes of this bucket's registers are more likely creates then. A change that
        was ended where it was shows nothing.
        """
        if machine.state is not DONE and machine.state is not FAILED:
            return
        if create is not None:
            self._new_keys.saw(machine.name, machine.by_create and not machine.ahead)
        elif machine.outcome is not None:
            self._new_keys.saw(machine.name, machine.outcome.before is None)

    async def identity(self, name: RegisterName, nonce: bytes, deadline: float, *, commit: bool) -> Value | None:
        """A settling round; see ``ports.Registers.settle``."""
        async with self._turns.turn(name, self._deadline_s):
            if self._ring.contention.expected(name):
                await self._take_turn(name, deadline)
            lineage = Lineage(b"", self._ring.shared.rules)
            wanted = Wanted(name, _keep, nonce=nonce, settling=True, commit=commit, thorough=True)
            machine = Proposer(self._ring.shared, wanted, lineage)
            return (await self._run(ChangeShell(self._ring, machine, deadline), False, None)).after

    def _lineage(self) -> Lineage:
        return Lineage(self._entropy(CALL_BYTES), self._ring.shared.rules)

    def _deadline(self) -> float:
        return self._ring.clock.monotonic() + self._deadline_s


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

"""Registers for which several gateway processes compete: this process changes them in turns.

Theory of operation
    ``queue.Turns`` lets one change of a register run at a time in this process. Other processes may change the same
    register, and then proposers pre-empt each other. A change whose accept was pre-empted often cannot learn whether it
    was applied, because others have changed the register again before it can look.

    So a process that has met another proposer at a register asks one of its replicas for a turn (``acceptor.turns``)
    before it goes on, and asks before each further change of that register, until ``HOT_S`` after the last sign of
    others. In a turn it makes the changes that waited in this process when the turn came. A register without
    competition costs no message and no memory here.

    The replica that is asked is the first one that answers, in the order of the ring, so that all processes ask the
    same one. A replica that does not answer, is slow, or gives no turn for ``WAIT_S`` is not asked for a while.

    A replica keeps a request until the turn is free, but answers it soon in any case. When it is silent for longer
    (``SILENT_S``) the message may have been lost or be slow, so it is asked once more. The process keeps its place.
    When it is silent then, too, it is taken for dead.

    When changes are pre-empted in a turn, either the replica gives turns to several processes at once, or processes ask
    different replicas. Then this process is *careful*: for ``CAREFUL_S`` it takes the turns of a quorum of replicas, in
    the order of the ring. Any two quorums have a replica in common, so one that lies changes nothing, nor does it
    matter who finds which replica slow.

    A turn is a hint. Without one a change goes on all the same, and backs off when it is pre-empted.

    A process whose clock runs ahead of the others' is never pre-empted itself. It learns of them from the promises that
    its ballots override (``messages.PrepareReply``).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final

from msgspec import Struct

from storaged.clock import Clock
from storaged.errors import ServiceUnavailable, StoragedError
from storaged.ids import Entropy
from storaged.meta.consensus.quorums import Quorum, View
from storaged.meta.messages import TURN_GRANTED, TURN_QUEUED, Turn, TurnReply
from storaged.meta.names import RegisterName
from storaged.meta.ports import Replicas, TurnReplica
from storaged.meta.transport.calls import TaskPool

HOT_S = 2.0
REGISTERS_MAX = 4096
"""Registers that are remembered as contended."""

ANSWER_S = 1.5
"""Of the call that ends a turn."""

SILENT_S = 0.25
"""A replica answers a request for a turn within ``turns.POLL_S``, granted or not. After this time it is asked again."""

ASKS = 2
"""A replica that has answered none of this many requests is not asked for a while."""

WAIT_S = 4.0
"""How long one replica may let this process wait: twice as long as an honest one with many processes."""

AVOID_S = 20.0
"""How long a replica is not asked. After a vain wait of ``WAIT_S`` each further time is twice as long."""

AVOID_MAX_S = 3600.0

SLOW_S = 0.1
SLOW_ANSWERS = 3
"""A replica is slow when this many answers in a row took longer than ``SLOW_S``. A single slow answer, as in
``DisksSeen``, would divide the processes.
"""

PREEMPTED_MAX = 1
"""The first ballot in a turn may be too low because this clock is slow. When more are pre-empted, the turn is
useless."""

CAREFUL_S = 30.0

LATE_S = 0.2
RENEW_S = 0.3
"""How often a turn is renewed while a change takes long."""

PAUSE_S = 0.1
HOLD_MAX_MS = 1000
PROCESS_BYTES: Final = 8


class _Held(Struct):
    """The turn that this process has, of each of these disks. ``left``: changes that may still begin in it."""

    disks: list[str]
    number: int
    ends_at: float
    left: int
    timer: asyncio.TimerHandle | None = None
    """Renews it."""
    preempted: int = 0
    """How often a change met another proposer in this turn."""


class Contention:
    """Of one process. ``take`` is called by one change of a register at a time, ``queue.Turns`` sees to it."""

    def __init__(
        self,
        replicas: Replicas,
        view: Callable[[RegisterName], View],
        pool: TaskPool,
        clock: Clock,
        entropy: Entropy,
        *,
        enabled: bool = True,
    ) -> None:
        """``enabled``: False for a node that is no gateway; replicas give it no turns."""
        self._replicas = replicas
        self._view = view
        self._pool = pool
        self._clock = clock
        self.enabled = enabled
        self._process = entropy(PROCESS_BYTES)
        self._number = 0
        self._hot: dict[RegisterName, float] = {}
        """Until when, in the order of the last sign of others."""
        self._careful: dict[RegisterName, float] = {}
        self._held: dict[RegisterName, _Held] = {}
        self._avoided: dict[str, float] = {}
        """Disks that are not asked, and until when."""
        self._vain_waits: dict[str, int] = {}
        self._slow: dict[str, int] = {}
        """How many answers in a row took long."""

    def expected(self, name: RegisterName) -> bool:
        """Whether others compete for the register, as far as this process knows."""
        return bool(self._hot) and self._lasts(self._hot, name)

    def met(self, name: RegisterName) -> None:
        """Another process competes for the register."""
        if self.enabled:
            self._note(self._hot, name, HOT_S)

    def preempted(self, name: RegisterName) -> bool:
        """A change met another proposer. Returns whether this process has the turn, and so need not ask for one."""
        self.met(name)
        held = self._held.get(name)
        if held is None:
            return False
        held.preempted += 1
        return True

    async def take(self, name: RegisterName, changes: int, limit_s: float) -> bool:
        """Takes a turn, or goes on with the one that this process has. False: a change goes on without, and backs off.

        ``changes``: how many wait in this process, with this one; they may use the turn too.
        """
        if not self.enabled:
            return False
        held, now = self._held.get(name), self._clock.monotonic()
        if held is not None:
            if held.left > 0 and now < held.ends_at:
                held.left -= 1
                return True
            self._give_back(name, held)
            quorum = self._quorum(name)
            order = self._order(quorum.disks) if quorum is not None else []
            if held.disks != order[:1] or now > held.ends_at + LATE_S:  # else the next request ends it
                self._send_ends(name, held)
        turn = await self._take(name, changes, now + limit_s)
        if turn is None:
            return False
        self._held[name] = turn
        return True

    def end(self, name: RegisterName) -> None:
        """No change of this process waits for the register any more: another process may have the turn."""
        held = self._held.get(name)
        if held is not None:
            self._give_back(name, held)
            self._send_ends(name, held)

    def close(self) -> None:
        """Ends all turns. None is taken any more."""
        for name in list(self._held):
            self.end(name)
        self.enabled = False

    def _give_back(self, name: RegisterName, held: _Held) -> None:
        del self._held[name]
        if held.timer is not None:
            held.timer.cancel()
        if held.preempted > PREEMPTED_MAX:
            self._note(self._careful, name, CAREFUL_S)

    def _renew(self, name: RegisterName, held: _Held) -> None:
        """A change takes long: without this the replica would give the turn to another process."""
        for disk in held.disks:
            self._pool.start(self._tell(disk, Turn(disk, name, self._process, held.number)))
        held.timer = asyncio.get_running_loop().call_later(RENEW_S, self._renew, name, held)

    def _note(self, until: dict[RegisterName, float], name: RegisterName, seconds: float) -> None:
        until.pop(name, None)
        until[name] = self._clock.monotonic() + seconds
        if len(until) > REGISTERS_MAX:
            del until[next(iter(until))]

    def _lasts(self, until: dict[RegisterName, float], name: RegisterName) -> bool:
        end = until.get(name)
        if end is None:
            return False
        if end < self._clock.monotonic():
            del until[name]
            return False
        return True

    # --- replicas -----------------------------------------------------------------------------------------------------

    def _quorum(self, name: RegisterName) -> Quorum | None:
        """None: a layout came, and where the register is now is still to be learnt. The change finds that out."""
        try:
            return self._view(name).quorum
        except ServiceUnavailable:
            return None

    async def _take(self, name: RegisterName, changes: int, until: float) -> _Held | None:
        """The turn of one replica, or of a quorum. None: no replica gives one."""
        self._number += 1
        quorum = self._quorum(name)
        if quorum is None:
            return None
        careful = self._lasts(self._careful, name)
        turn, hold_ms, taken = _Held([], self._number, 0.0, changes - 1), HOLD_MAX_MS, False
        turn.timer = asyncio.get_running_loop().call_later(RENEW_S, self._renew, name, turn)
        try:
            for disk in self._order(quorum.disks):
                reply = await self._ask(name, disk, turn.number, until)
                if reply is not None:
                    turn.disks.append(disk)
                    hold_ms = min(hold_ms, reply.hold_ms)
                    if not careful or quorum.met(turn.disks):
                        break
            taken = bool(turn.disks)
        finally:
            if not taken:  # no replica gives one, or the change was given up
                turn.timer.cancel()
                self._send_ends(name, turn)
        turn.ends_at = self._clock.monotonic() + hold_ms / 1000
        return turn if taken else None

    async def _ask(self, name: RegisterName, disk: str, number: int, until: float) -> TurnReply | None:
        """None: this replica gives no turn."""
        reply = None
        try:
            reply = await self._granted(name, disk, number, until)
        finally:
            if reply is None:  # it may have given the turn, or may yet
                self._send_end(name, disk, number)
        if reply is not None and reply.shared:
            self.met(name)
        return reply

    async def _granted(self, name: RegisterName, disk: str, number: int, until: float) -> TurnReply | None:
        """Asks until the turn is granted."""
        patience_until = self._clock.monotonic() + WAIT_S
        while (now := self._clock.monotonic()) < until:
            if now >= patience_until:
                waits = self._vain_waits[disk] = self._vain_waits.get(disk, 0) + 1
                self._avoid(disk, min(AVOID_MAX_S, AVOID_S * 2 ** (waits - 1)))
                break
            reply = await self._ask_once(disk, Turn(disk, name, self._process, number))
            if reply is None or reply.state != TURN_QUEUED:
                return reply if reply is not None and reply.state == TURN_GRANTED else None
            self.met(name)
            if self._clock.monotonic() < now + PAUSE_S:  # an honest replica takes longer to say so
                await asyncio.sleep(PAUSE_S)
        return None

    async def _ask_once(self, disk: str, request: Turn) -> TurnReply | None:
        """None: it does not answer, or knows no turns."""
        try:
            replica = self._replicas.replica(disk)
            if not isinstance(replica, TurnReplica):
                return None
            began = self._clock.monotonic()
            reply = await self._first_answer(replica, request)
        except (TimeoutError, StoragedError):
            self._avoid(disk, AVOID_S)
            return None
        took_s = self._clock.monotonic() - began - reply.waited_ms / 1000
        slow = self._slow[disk] = self._slow.get(disk, 0) + 1 if took_s > SLOW_S else 0
        if slow >= SLOW_ANSWERS:
            self._slow[disk] = 0
            self._avoid(disk, AVOID_S)
        return reply

    async def _first_answer(self, replica: TurnReplica, request: Turn) -> TurnReply:
        """Of up to ``ASKS`` requests. Raises TimeoutError, StoragedError."""
        if request.end:
            async with asyncio.timeout(ANSWER_S):
                return await replica.turn(request, timeout_s=ANSWER_S)
        asked: list[asyncio.Task[TurnReply]] = []
        try:
            for _ in range(ASKS):
                asked.append(asyncio.ensure_future(replica.turn(request, timeout_s=ANSWER_S)))
                done, _silent = await asyncio.wait(asked, timeout=SILENT_S, return_when=asyncio.FIRST_COMPLETED)
                if done:
                    return await done.pop()
            raise TimeoutError
        finally:
            for task in asked:
                task.cancel()
            await asyncio.gather(*asked, return_exceptions=True)

    def _avoid(self, disk: str, seconds: float) -> None:
        self._avoided[disk] = self._clock.monotonic() + seconds

    def _order(self, disks: tuple[str, ...]) -> list[str]:
        """Those to be asked, one after the other."""
        if not self._avoided:
            return list(disks)
        now = self._clock.monotonic()
        for disk in disks:
            if self._avoided.get(disk, now) < now:
                del self._avoided[disk]
        return [disk for disk in disks if disk not in self._avoided]

    def _send_ends(self, name: RegisterName, held: _Held) -> None:
        for disk in held.disks:
            self._send_end(name, disk, held.number)

    def _send_end(self, name: RegisterName, disk: str, number: int) -> None:
        if self.enabled:
            self._pool.start(self._tell(disk, Turn(disk, name, self._process, number, end=True)))

    async def _tell(self, disk: str, request: Turn) -> None:
        await self._ask_once(disk, request)

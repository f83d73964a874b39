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
    same one. A turn is a hint. Without one (the replica hangs, refuses, or lies) a change goes on all the same, and
    backs off when it is pre-empted. A replica that gives no turn for ``WAIT_S``, or whose turns are pre-empted again
    and again since it gives them to several processes at once, is not asked for ``DISTRUST_S``.

    A process whose clock runs ahead of the others' is never pre-empted itself. It learns of them from the promises that
    its ballots override (``messages.PrepareReply``).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final

from msgspec import Struct

from storaged.clock import Clock
from storaged.errors import StoragedError
from storaged.ids import Entropy
from storaged.meta.consensus.quorums import View
from storaged.meta.messages import TURN_GRANTED, TURN_QUEUED, Turn, TurnReply
from storaged.meta.names import RegisterName
from storaged.meta.ports import Replicas, TurnReplica
from storaged.meta.transport.calls import TaskPool

HOT_S = 2.0
HOT_MAX = 4096
"""Registers that are remembered as contended."""

ANSWER_S = 1.5
"""A replica answers a request for a turn within half a second, granted or not."""

AVOID_S = 20.0
"""A replica that does not answer, or is slow, is not asked for this long. Other processes find the same, and ask the
same one then. What a single slow answer shows (``UnresponsiveDisks``) would divide them.
"""

SLOW_S = 0.1
SLOW_ANSWERS = 3
"""A replica is slow when so many answers in a row took longer than ``SLOW_S``."""

WAIT_S = 4.0
"""How long one replica may let this process wait: twice as long as an honest one with many processes."""

PAUSE_S = 0.1
HOLD_MAX_MS = 1000

DISTRUST_S = 30.0
"""The first time; each further time twice as long."""

DISTRUST_MAX_S = 3600.0
USELESS_MAX = 4
"""Turns in which changes were pre-empted, minus those without, before a replica is not trusted."""

PROCESS_BYTES: Final = 8


class _Held(Struct):
    """The turn that this process has. ``left``: changes that may still begin in it."""

    disk: str
    number: int
    ends_at: float
    left: int
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
        self._held: dict[RegisterName, _Held] = {}
        self._avoided: dict[str, float] = {}
        self._distrusted: dict[str, float] = {}
        """Disks that are not asked, and until when: they do not answer or are slow, or they give useless turns."""
        self._slow: dict[str, int] = {}
        """How many answers in a row took long."""
        self._distrusted_times: dict[str, int] = {}
        self._useless: dict[str, int] = {}
        """Turns of a disk that were useless, minus those that were not."""

    def expected(self, name: RegisterName) -> bool:
        """Whether others compete for the register, as far as this process knows."""
        if not self._hot:
            return False
        until = self._hot.get(name)
        if until is None:
            return False
        if until < self._clock.monotonic():
            del self._hot[name]
            return False
        return True

    def met(self, name: RegisterName) -> None:
        """Another process competes for the register."""
        if not self.enabled:
            return
        self._hot.pop(name, None)
        self._hot[name] = self._clock.monotonic() + HOT_S
        if len(self._hot) > HOT_MAX:
            del self._hot[next(iter(self._hot))]

    async def take(self, name: RegisterName, changes: int, limit_s: float) -> bool:
        """Takes a turn, or goes on with the one that this process has. False: a change goes on without, and backs off.

        ``changes``: how many wait in this process, with this one; they may use the turn too.
        """
        if not self.enabled:
            return False
        held = self._held.get(name)
        if held is not None:
            if held.left > 0 and self._clock.monotonic() < held.ends_at:
                held.left -= 1
                return True
            self._score(name, self._held.pop(name))
        until, order = self._clock.monotonic() + limit_s, self._order(name)
        if held is not None and held.disk not in order[:1]:  # else the request for the next turn ends it
            self._send_end(name, held.disk, held.number)
        for disk in order:
            turn = await self._ask(name, disk, changes, until)
            if turn is not None:
                self._held[name] = turn
                return True
        return False

    def preempted(self, name: RegisterName) -> bool:
        """A change met another proposer. Returns whether this process has the turn, and so need not ask for one."""
        self.met(name)
        held = self._held.get(name)
        if held is None:
            return False
        held.preempted += 1
        return True

    def end(self, name: RegisterName) -> None:
        """No change of this process waits for the register any more: another process may have the turn."""
        held = self._held.pop(name, None)
        if held is not None:
            self._score(name, held)
            self._send_end(name, held.disk, held.number)

    def _score(self, name: RegisterName, held: _Held) -> None:
        """Notes whether the turn was worth something. The first ballot in a turn may be too low because this clock is
        slow.
        """
        disk, useless = held.disk, held.preempted > 1
        score = self._useless[disk] = max(0, self._useless.get(disk, 0) + (1 if useless else -1))
        if score >= USELESS_MAX:
            self._distrust(disk)
        elif useless:  # the others may find the replicas before this one well
            disks = self._view(name).quorum.disks
            for earlier in disks[: disks.index(disk)] if disk in disks else ():
                self._avoided.pop(earlier, None)

    def _distrust(self, disk: str) -> None:
        self._useless.pop(disk, None)
        times = self._distrusted_times[disk] = self._distrusted_times.get(disk, 0) + 1
        self._distrusted[disk] = self._clock.monotonic() + min(DISTRUST_MAX_S, DISTRUST_S * 2 ** (times - 1))

    def _avoid(self, disk: str) -> None:
        self._avoided[disk] = self._clock.monotonic() + AVOID_S

    def _order(self, name: RegisterName) -> list[str]:
        disks = self._view(name).quorum.disks
        if not self._avoided and not self._distrusted:
            return list(disks)
        now = self._clock.monotonic()
        for disk in disks:
            for until in (self._avoided, self._distrusted):
                if until.get(disk, now) < now:
                    del until[disk]
        return [disk for disk in disks if disk not in self._avoided and disk not in self._distrusted]

    # --- one replica --------------------------------------------------------------------------------------------------

    async def _ask(self, name: RegisterName, disk: str, changes: int, until: float) -> _Held | None:
        """None: this replica gives no turn."""
        self._number += 1
        number = self._number
        reply = None
        try:
            reply = await self._granted(name, disk, number, until)
        finally:
            if reply is None:  # it may have given the turn, or may yet
                self._send_end(name, disk, number)
        if reply is None:
            return None
        if reply.shared:
            self.met(name)
        hold_s = min(reply.hold_ms, HOLD_MAX_MS) / 1000
        return _Held(disk, number, self._clock.monotonic() + hold_s, changes - 1)

    async def _granted(self, name: RegisterName, disk: str, number: int, until: float) -> TurnReply | None:
        """Asks until the turn is granted."""
        patience_until = self._clock.monotonic() + WAIT_S
        while (now := self._clock.monotonic()) < until:
            if now >= patience_until:
                self._distrust(disk)
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
            async with asyncio.timeout(ANSWER_S):
                reply = await replica.turn(request, timeout_s=ANSWER_S)
            self._note_latency(disk, self._clock.monotonic() - began - reply.waited_ms / 1000)
            return reply
        except (TimeoutError, StoragedError):
            self._avoid(disk)
        return None

    def _note_latency(self, disk: str, seconds: float) -> None:
        slow = self._slow[disk] = self._slow.get(disk, 0) + 1 if seconds > SLOW_S else 0
        if slow >= SLOW_ANSWERS:
            self._slow[disk] = 0
            self._avoid(disk)

    def _send_end(self, name: RegisterName, disk: str, number: int) -> None:
        self._pool.start(self._end(disk, Turn(disk, name, self._process, number, end=True)))

    async def _end(self, disk: str, request: Turn) -> None:
        await self._ask_once(disk, request)

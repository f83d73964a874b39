"""The ring as a gateway or a maintenance task uses it: registers, pages and fences, by quorums of their replicas.

Changes are queued and driven by ``proposer.queue``, reads by ``proposer.read``; what their answers mean is decided in
``consensus``. This module puts the parts together, and knows the layout.
"""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial

import structlog

from storaged.clock import Clock, SystemClock
from storaged.cluster.disks_seen import DisksSeen
from storaged.cluster.ports import Layouts
from storaged.deadlines import Deadlines
from storaged.errors import ServiceUnavailable
from storaged.ids import INCARNATION_BYTES, Entropy, system_entropy
from storaged.meta.consensus.change import Fragments, Shared
from storaged.meta.consensus.looks import Look
from storaged.meta.consensus.register import RULES, Ballots, Rules
from storaged.meta.names import Ballot, RegisterName, Table, Value
from storaged.meta.ports import (
    Grounds,
    OnOutcome,
    Outcome,
    Reading,
    Replicas,
    ReplicaState,
    SmallCopies,
    Unasked,
    Update,
)
from storaged.meta.proposer.contention import Contention
from storaged.meta.proposer.fences import RingFences
from storaged.meta.proposer.floors import PartitionFloors
from storaged.meta.proposer.moving import PartitionMoves
from storaged.meta.proposer.new_keys import NewKeyRate
from storaged.meta.proposer.pages import RingPages
from storaged.meta.proposer.queue import ChangeQueue
from storaged.meta.proposer.read import CopyReader, IsCopy, RegisterReader, Settle
from storaged.meta.proposer.ring import Refresher, Ring
from storaged.meta.proposer.survey import RingSurvey
from storaged.meta.transport.calls import Calls, Fanout, TaskPool
from storaged.meta.transport.read_batching import RowReader
from storaged.meta.views import Views
from storaged.wire import Buffer

DEADLINE_S = 10.0
CALL_TIMEOUT_S = 5.0

HEDGE_S = 0.05
"""A read asks the other replicas when those asked have not answered by then: well above a healthy fsync, well below
what a person notices.
"""

DOUBTED_MAX = 1000
"""How many disks and records that no gateway wrote are remembered, so that each is logged once."""

log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class ClientStatistics:
    """Counts since the start. ``digest_conflicts`` and ``doubted`` are alarms: two replicas hold different values under
    one ballot; a replica holds a system record that no gateway wrote. ``unheard``: changes of system records that went
    on although replicas differed and one did not answer; then a single lying replica may bring back an older record.
    """

    reads: int
    changes: int
    identity_rounds: int
    preempted: int
    unknown: int
    unavailable: int
    digest_conflicts: int
    doubted: int
    unheard: int
    calls_in_flight: int


_COUNTS = tuple(field for field in ClientStatistics.__dataclass_fields__ if field != "calls_in_flight")


@dataclass(frozen=True)
class RingSettings:
    """``node``: the name of this node. ``gateway``: it is one, as its certificate says. Replicas take values from
    gateways alone (``meta.authority``), so the client of another node has gateways settle registers.

    ``rules``: only simulations break one. ``new_keys``: which registers are probably new; None: the client learns it.
    """

    node: str
    gateway: bool = True
    deadline_s: float = DEADLINE_S
    call_timeout_s: float = CALL_TIMEOUT_S
    hedge_s: float = HEDGE_S
    rules: Rules = RULES
    new_keys: NewKeyRate | None = None


AskToSettle = Callable[[RegisterName, float], Awaitable[Value | None]]


async def no_gateway(_name: RegisterName, _timeout_s: float) -> Value | None:
    """An ``AskToSettle`` of a client that reaches no gateway."""
    raise ServiceUnavailable("Replicas of this key differ, and this node can't ask a gateway to settle it. Retry.")


def any_copy(_name: RegisterName, _value: Value, _header: bytes, _payload: Buffer) -> bool:
    """An ``IsCopy`` of a client whose replicas are trusted."""
    return True


async def nothing_newer(_partition: int) -> None:
    """The ``refresh`` of a client whose partitions do not move."""


@dataclass(frozen=True)
class RingHooks:
    """``overtake(name, create, below)``: as ``consensus.change.Shared``. Without it a create replaces whatever it finds
    below it.

    ``believes(name, value)``: False for a value of the system table that no gateway of this cluster wrote. When one
    replica reports such a value it does not count, however high its ballot.

    ``on_missed`` gets every register of which some replica did not take a write that it should have; repair brings it
    up. ``on_fenced`` gets the scope of a read or a change that met a fence: its bucket is, or was, being deleted.

    ``copy_at``: the fragment header of one replica's small copy, made to fit the replica of another index.
    ``is_copy(name, value, header, payload)``: whether what a replica offers is the small copy that the value names: one
    that lies must not have its own bytes carried to others.

    ``ask_to_settle(name, timeout_s)``, of a client that is no gateway's: has a gateway settle the register. Returns and
    raises as ``ports.Registers.settle``.

    ``refresh(partition)``: learns where the partition is now, from its record in the system partition, or where the
    system partition is, from other nodes. It may raise StoragedError. The client calls it when a replica knows a later
    step, or no quorum answers.
    """

    believes: Callable[[RegisterName, Value], bool] = lambda name, value: True
    on_missed: Callable[[RegisterName], None] = lambda name: None
    on_fenced: Callable[[bytes], None] = lambda scope: None
    copy_at: Callable[[bytes, int], bytes] = lambda header, index: header
    ask_to_settle: AskToSettle = no_gateway
    is_copy: IsCopy = any_copy
    refresh: Callable[[int], Awaitable[None]] = nothing_newer
    overtake: Callable[[RegisterName, Value, Value], Value | None] = lambda name, create, below: create


NO_HOOKS = RingHooks()


class RingClient:
    """Implements ``ports.Registers``, ``PageCopies`` and ``Fences``. One per process; ``close`` ends every call that is
    still out.
    """

    def __init__(
        self,
        layouts: Layouts,
        replicas: Replicas,
        settings: RingSettings,
        hooks: RingHooks = NO_HOOKS,
        *,
        clock: Clock | None = None,
        entropy: Entropy = system_entropy,
        jitter: Callable[[], float] = random.random,
        seen: DisksSeen | None = None,
    ) -> None:
        """``jitter()`` draws a number from 0 to 1: the part of a pause that is taken. ``seen``: what this process sees
        of disks, where it does not concern the ring alone.
        """
        self._settings = settings
        self._believes = hooks.believes
        self._doubted: dict[tuple[str, RegisterName], None] = {}
        """Which disks were seen to report what no gateway wrote."""
        self._view = Views(layouts).of
        self._counts = dict.fromkeys(_COUNTS, 0)
        self._pool = TaskPool()
        unresponsive = seen or DisksSeen(clock if clock is not None else SystemClock())
        limits = settings.deadline_s, settings.call_timeout_s, settings.hedge_s
        self._calls = Calls(replicas, self._pool, unresponsive, *limits)
        copies = CopyReader(self._calls, hooks.copy_at, hooks.is_copy)
        self._ring = self._make_ring(hooks, jitter, entropy, copies)
        new_keys = settings.new_keys if settings.new_keys is not None else NewKeyRate()
        self._queue = ChangeQueue(self._ring, entropy, settings.deadline_s, new_keys)
        self._ask_to_settle = hooks.ask_to_settle
        self._settle: Settle = self._queue.identity if settings.gateway else self._settled_by_gateway
        self._reader = RegisterReader(
            self._ring, RowReader(replicas, self._pool), copies, settings.gateway, settings.deadline_s, self._settle
        )
        self._survey = RingSurvey(self._calls, self._view)
        self._pages = RingPages(self._calls, self._view, hooks.on_missed)
        self._fences = RingFences(self._calls, self._view, self._ring.refresher)
        self.moves = PartitionMoves(self._calls)
        self.floors = PartitionFloors(self._calls)

    def _make_ring(self, hooks: RingHooks, jitter: Callable[[], float], entropy: Entropy, copies: CopyReader) -> Ring:
        settings, calls = self._settings, self._calls
        ballots = Ballots(settings.node, partial(entropy, INCARNATION_BYTES), settings.rules)
        return Ring(
            shared=Shared(
                ballots, settings.rules, self._counts, self._doubts, self._on_unheard, overtake=hooks.overtake
            ),
            view=self._view,
            refresher=Refresher(self._view, hooks.refresh, self._pool, calls.clock),
            clock=calls.clock,
            jitter=jitter,
            pool=self._pool,
            unresponsive=calls.unresponsive,
            fanout=Fanout(calls.replicas, self._pool),
            deadlines=Deadlines(),
            contention=Contention(
                calls.replicas, self._view, self._pool, calls.clock, entropy, enabled=settings.gateway
            ),
            call_timeout_s=settings.call_timeout_s,
            hedge_s=settings.hedge_s,
            carry=copies.carry,
            on_fenced=hooks.on_fenced,
            on_missed=hooks.on_missed,
        )

    async def close(self) -> None:
        self._queue.close()
        self._ring.contention.close()
        self._ring.deadlines.close()
        await self._pool.close()

    @property
    def chosen_falls(self) -> tuple[int, str]:
        """How often a chosen value was seen to be undone, and where the last time: an alarm."""
        return self._queue.watch.falls, self._queue.watch.last

    def statistics(self) -> ClientStatistics:
        return ClientStatistics(**self._counts, calls_in_flight=len(self._pool))

    def _on_unheard(self, name: RegisterName, ballot: Ballot) -> None:
        self._counts["unheard"] += 1

    def _doubts(self, name: RegisterName, disk: str, value: Value | None) -> bool:
        """Whether no gateway wrote the value that a disk reports for a register of the system table."""
        if (
            name.table != Table.SYSTEM
            or value is None
            or self._believes(name, value)
            or not self._settings.rules.unproved_set_aside
        ):
            return False
        self._counts["doubted"] += 1
        if (disk, name) not in self._doubted and len(self._doubted) < DOUBTED_MAX:
            self._doubted[disk, name] = None
            record = name.key[:128].decode("utf-8", "backslashreplace")
            log.error("a replica holds a system record that no gateway wrote", disk=disk, record=record)
        return True

    # --- registers ----------------------------------------------------------------------------------------------------

    async def read(self, name: RegisterName, *, want_payload: bool = False, settling_nonce: bytes = b"") -> Reading:
        return await self._reader.read(name, want_payload=want_payload, settling_nonce=settling_nonce)

    def try_read(self, name: RegisterName, want_payload: bool, on_done: Callable[[Reading | None], None]) -> None:
        self._reader.try_read(name, want_payload, on_done)

    async def change(
        self,
        name: RegisterName,
        update: Update,
        *,
        small: SmallCopies | None = None,
        ready: Awaitable[None] | None = None,
        settling_nonce: bytes = b"",
        regardless: bool = False,
        unasked: Unasked | None = None,
    ) -> Outcome:
        return await self._queue.change(name, update, small, ready, settling_nonce, regardless, unasked)

    def grounds(self, name: RegisterName) -> Grounds | None:
        return self._queue.grounds(name)

    def try_change(
        self,
        name: RegisterName,
        update: Update,
        on_outcome: OnOutcome,
        *,
        small: SmallCopies | None = None,
        regardless: bool = False,
    ) -> bool:
        return self._queue.try_change(name, update, on_outcome, small, regardless)

    async def settle(self, name: RegisterName, *, settling_nonce: bytes = b"") -> Value | None:
        return await self._settle(name, settling_nonce, self._calls.deadline(), commit=True)

    async def _settled_by_gateway(
        self, name: RegisterName, nonce: bytes, deadline: float, *, commit: bool
    ) -> Value | None:
        """A ``Settle``. Gateways look after the system table without being asked."""
        if name.table == Table.SYSTEM:
            raise ServiceUnavailable(
                "Replicas of the system partition differ. A gateway will bring them together. Retry."
            )
        return await self._ask_to_settle(name, self._calls.remaining_s(deadline))

    async def agreement(self, name: RegisterName) -> list[ReplicaState]:
        return await self._survey.agreement(name)

    async def accepted_everywhere(self, name: RegisterName, usable: Callable[[Value], bool]) -> bool | None:
        return await self._survey.accepted_everywhere(name, usable)

    async def outdated(self, name: RegisterName, usable: Callable[[Value], bool]) -> bool:
        return await self._survey.outdated(name, usable)

    async def held_by_quorum(self, name: RegisterName, usable: Callable[[Value], bool]) -> Value | None:
        return await self._survey.held_by_quorum(name, usable)

    async def look(self, name: RegisterName) -> Look:
        """What each replica that answers has accepted: a snapshot (``consensus.looks``)."""
        return await self._survey.look(name)

    async def small_copies(self, name: RegisterName, value: Value) -> Fragments | None:
        """The copy that the value names, as the replica of each position keeps it; None when none gives it now."""
        return await self._ring.carry(self._view(name), name, value, self._calls.deadline())

    # --- pages and fences ---------------------------------------------------------------------------------------------

    async def put_page(self, near: RegisterName, body: bytes, name: bytes = b"") -> bytes:
        return await self._pages.put_page(near, body, name)

    async def get_page(self, near: RegisterName, name: bytes) -> bytes:
        return await self._pages.get_page(near, name)

    async def pages_missing(self, disk: str, hashes: Sequence[bytes]) -> tuple[bytes, ...]:
        return await self._pages.pages_missing(disk, hashes)

    async def copy_page(self, near: RegisterName, page_hash: bytes, disk: str) -> None:
        await self._pages.copy_page(near, page_hash, disk)

    async def fence(
        self, scope: bytes, shards: Sequence[int], nonce: bytes, *, final: bool = False, lends: bool = False
    ) -> bool:
        return await self._fences.fence(scope, shards, nonce, final=final, lends=lends)

    async def unfence(self, scope: bytes, shards: Sequence[int], nonce: bytes) -> bool:
        return await self._fences.unfence(scope, shards, nonce)

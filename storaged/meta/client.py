"""The ring as a gateway or a maintenance task uses it: registers, pages and fences, by majorities of their replicas.

A read asks a bare majority, the row of one replica and the checks of others' rows (``meta.transport.reads``); a third
is asked when one is slow, away, or does not agree. When
a majority reports one ballot the value is settled and the read has cost one round trip. Where answers differ, the
newest value is first accepted by a
majority at its own ballot, which needs no promise; when that is refused, or this node is no gateway, by an identity
round (``meta.proposer.proposal``).
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

import msgspec
import structlog

from storaged.clock import Clock, SystemClock
from storaged.cluster.layout import Layout
from storaged.cluster.ports import Layouts
from storaged.errors import DataDamaged, ServiceUnavailable, StoragedError
from storaged.hashes import is_page, page_hash
from storaged.ids import INCARNATION_BYTES, Entropy, system_entropy
from storaged.meta import messages
from storaged.meta.consensus.quorums import Quorum
from storaged.meta.consensus.register import (
    RULES,
    Ballots,
    Groups,
    Rules,
    Verdict,
    created,
    has_majority,
    out_of_reach,
    settled_ballot,
    shown,
)
from storaged.meta.names import RegisterName, Table, Value
from storaged.meta.ports import (
    ZERO_BALLOT,
    Ballot,
    Changed,
    Copy,
    Outcome,
    Reading,
    Replica,
    Replicas,
    ReplicaState,
    SmallCopies,
    Update,
)
from storaged.meta.proposer.create import Novelty
from storaged.meta.proposer.proposal import Fragments, Surroundings, View, post_accept
from storaged.meta.proposer.queue import Changing
from storaged.meta.proposer.quick import Patience, QuickRead
from storaged.meta.storage.rowvalue import value_of
from storaged.meta.transport.quorum import Answers, Courier, Suspects, TaskPool
from storaged.meta.transport.reads import RowReader

DEADLINE_S = 10.0
CALL_TIMEOUT_S = 5.0

HEDGE_S = 0.05
"""A read asks one more replica when those asked have not answered by then: well above a healthy fsync, well below what
a person notices.
"""

CARRY_S = 1.0
"""So long a settling round looks for the copy of an unconfirmed small object; who has it has just answered."""

AGREEMENT_S = 2.0
DOUBTED_MAX = 1000
"""Who has not said by then what it holds counts as away."""

LAYOUT_PAUSE_S = 0.05
"""Between two tries of a read whose replicas follow a newer layout; drawn at random up to it."""

VIEWS_MAX = 16_384
"""Table, scope and shard whose replicas are remembered: a thousand buckets'."""

T = TypeVar("T")

log = structlog.get_logger(__name__)

_ReadAnswer = tuple[messages.ReadReply, memoryview]


@dataclass(frozen=True)
class ClientStatistics:
    """Counts since the start. ``digest_conflicts`` and ``doubted`` are alarms: two replicas hold different values under
    one ballot; a replica holds a system
    record that no gateway wrote."""

    reads: int
    changes: int
    replays: int
    identity_rounds: int
    preempted: int
    unknown: int
    unavailable: int
    digest_conflicts: int
    doubted: int
    calls_in_flight: int


@dataclass
class _Seen:
    """What a read has heard. ``stale``: some replica follows a newer layout. ``fenced``: at some replica the scope is
    fenced.
    """

    replies: dict[str, messages.ReadReply] = field(default_factory=dict)
    payloads: dict[bytes, memoryview] = field(default_factory=dict)
    failed: set[str] = field(default_factory=set)
    damaged: frozenset[str] = frozenset()
    doubted: dict[str, messages.ReadReply] = field(default_factory=dict)
    stale: bool = False
    fenced: bool = False

    @property
    def accepted(self) -> dict[str, Ballot]:
        return {disk: reply.accepted for disk, reply in self.replies.items()}


class RingClient:
    """Implements ``ports.Registers``, ``PageCopies`` and ``Fences``. One per process; ``close`` ends every call that is
    still out.
    """

    def __init__(
        self,
        layouts: Layouts,
        replicas: Replicas,
        *,
        node: str,
        clock: Clock | None = None,
        entropy: Entropy = system_entropy,
        jitter: Callable[[], float] = random.random,
        deadline_s: float = DEADLINE_S,
        call_timeout_s: float = CALL_TIMEOUT_S,
        hedge_s: float = HEDGE_S,
        rules: Rules = RULES,
        novelty: Novelty | None = None,
        gateway: bool = True,
        believes: Callable[[RegisterName, Value], bool] = lambda name, value: True,
        on_missed: Callable[[RegisterName], None] = lambda name: None,
        on_fenced: Callable[[bytes], None] = lambda scope: None,
        copy_at: Callable[[bytes, int], bytes] = lambda header, index: header,
    ) -> None:
        """``gateway``: this node is one, as its certificate says. Others settle no register of the system table, and
        help on nothing under another's ballot, for replicas refuse
        that (``meta.authority``). ``believes(name, value)``: False for a value of the system table that no gateway of
        this cluster wrote: what one replica reports so
        does not count, however high its ballot. ``on_missed``: told of every register of which some replica did not
        take a write that it should have; repair brings it up. ``on_fenced``: told of
        the scope of a read or a change that met a fence: whose bucket is, or was, being deleted. ``copy_at``: the
        fragment
        header of one replica's small copy, made to fit the replica of another index."""
        self._layouts = layouts
        self._replicas = replicas
        self._node = node
        self._gateway = gateway
        self._clock = clock if clock is not None else SystemClock()
        self._deadline_s = deadline_s
        self._call_timeout_s = call_timeout_s
        self._hedge_s = hedge_s
        self._rules = rules
        self._copy_at = copy_at
        self._pool = TaskPool()
        self._rows = RowReader(replicas, self._pool)
        self._patience = Patience()
        self._viewed: Layout | None = None
        self._views: dict[tuple[int, bytes, int], View] = {}
        """Of the layout ``_viewed``, by table, scope and shard."""
        self._suspects = Suspects(self._clock)
        self._counts = dict.fromkeys(
            (
                "reads",
                "changes",
                "replays",
                "identity_rounds",
                "preempted",
                "unknown",
                "unavailable",
                "digest_conflicts",
                "doubted",
            ),
            0,
        )
        self._believes = believes
        self._doubted: dict[tuple[str, RegisterName], None] = {}
        """Which disks were seen to report what no gateway wrote: each is logged once."""
        self._around = Surroundings(
            view=self._view,
            replicas=replicas,
            clock=self._clock,
            jitter=jitter,
            pool=self._pool,
            suspects=self._suspects,
            ballots=Ballots(node, partial(entropy, INCARNATION_BYTES), rules),
            call_timeout_s=call_timeout_s,
            rules=rules,
            counts=self._counts,
            carry=self._carry,
            doubts=self._doubts,
            on_missed=on_missed,
            on_fenced=on_fenced,
        )
        self._changing = Changing(
            self._around,
            Courier(replicas, self._pool),
            self._patience,
            entropy,
            deadline_s,
            hedge_s,
            novelty or Novelty(),
        )

    async def close(self) -> None:
        self._changing.close()
        self._patience.close()
        await self._pool.close()

    def statistics(self) -> ClientStatistics:
        return ClientStatistics(**self._counts, calls_in_flight=len(self._pool))

    def _view(self, name: RegisterName) -> View:
        layout = self._layouts.current
        if layout is not self._viewed or len(self._views) >= VIEWS_MAX:
            self._viewed, self._views = layout, {}
        where = name[:3]
        view = self._views.get(where)
        if view is None:
            disks = layout.replicas_of(name.partition)
            view = self._views[where] = View(layout.epoch, (disks,), disks)
        return view

    # --- registers
    # -----------------------------------------------------------------------------------------------------

    async def change(
        self,
        name: RegisterName,
        update: Update,
        *,
        small: SmallCopies | None = None,
        ready: Awaitable[None] | None = None,
        renew: Callable[[], Awaitable[None]] | None = None,
        settling_nonce: bytes = b"",
        regardless: bool = False,
    ) -> Outcome:
        return await self._changing.change(name, update, small, ready, renew, settling_nonce, regardless)

    def change_soon(
        self,
        name: RegisterName,
        update: Update,
        then: Changed,
        *,
        small: SmallCopies | None = None,
        regardless: bool = False,
    ) -> bool:
        return self._changing.change_soon(name, update, then, small, regardless)

    async def settle(self, name: RegisterName, *, settling_nonce: bytes = b"") -> Value | None:
        self._check_settles(name)
        return await self._changing.identity(name, settling_nonce, self._deadline(), commit=True)

    def _check_settles(self, name: RegisterName) -> None:
        """Raises ServiceUnavailable where that is for gateways alone."""
        if not self._gateway and name.table == Table.SYSTEM:
            raise ServiceUnavailable(
                "Replicas of the system partition differ. A gateway will bring them together. Retry."
            )

    async def read(self, name: RegisterName, *, want_payload: bool = False, settling_nonce: bytes = b"") -> Reading:
        self._counts["reads"] += 1
        deadline = self._deadline()
        view = self._view(name)
        if len(view.groups) == 1:
            over: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            quick = QuickRead(partial(_wake, over), self._suspects)
            quick.ask(self._rows, view, name.pack(), want_payload, self._call_timeout_s)
            if not quick.done:
                self._patience.begin(quick, self._hedge_s)
                try:
                    await over
                finally:
                    self._patience.end(quick)
            reading = _reading_of(quick, want_payload)
            if reading is not None:
                return reading
        seen = await self._hear(view, name, want_payload, deadline, everybody=True)
        while seen is None:
            await self._pause_for_layout(deadline)
            view = self._view(name)
            seen = await self._hear(view, name, want_payload, deadline)
        if seen.fenced:
            self._around.on_fenced(name.scope)
        ballot = settled_ballot(view.groups, seen.accepted, self._rules)
        if ballot is None:
            value = shown(await self._settle_seen(view, name, seen, settling_nonce, deadline))
        else:
            self._compare_digests(name, seen, ballot)
            value = shown(_value_at(seen, ballot))
        if not want_payload or value is None or not value.payload:
            return Reading(value)
        payload = seen.payloads.get(value.payload)
        if payload is None:
            asked = {disk for disk, reply in seen.replies.items() if reply.value is not None}
            copy = await self._fetch_copy(view, name, value.payload, asked, deadline)
            payload = None if copy is None else copy.payload
        return Reading(value, payload)

    def read_soon(self, name: RegisterName, want_payload: bool, then: Callable[[Reading | None], None]) -> None:
        """See ``ports.Registers``."""
        try:
            view = self._view(name)
        except StoragedError:  # ``read`` says so
            then(None)
            return
        if len(view.groups) > 1:
            then(None)
            return
        quick = QuickRead(partial(self._read_over, want_payload, then), self._suspects)
        quick.ask(self._rows, view, name.pack(), want_payload, self._call_timeout_s)
        if not quick.done:  # replicas of this process have answered by now
            self._patience.begin(quick, self._hedge_s)

    def _read_over(self, want_payload: bool, then: Callable[[Reading | None], None], quick: QuickRead) -> None:
        self._patience.end(quick)
        reading = _reading_of(quick, want_payload)
        if reading is not None:  # else it is ``read`` next, which counts
            self._counts["reads"] += 1
        then(reading)

    def _doubts(self, name: RegisterName, disk: str, value: Value | None) -> bool:
        """See ``Surroundings.doubts``. ``disk`` is empty where it is not known."""
        if (
            name.table != Table.SYSTEM
            or value is None
            or self._believes(name, value)
            or not self._rules.unproved_set_aside
        ):
            return False
        self._counts["doubted"] += 1
        if disk and (disk, name) not in self._doubted and len(self._doubted) < DOUBTED_MAX:
            self._doubted[disk, name] = None
            record = name.key[:128].decode("utf-8", "backslashreplace")
            log.error("a replica holds a system record that no gateway wrote", disk=disk, record=record)
        return True

    async def _pause_for_layout(self, deadline: float) -> None:
        """The replicas follow a newer layout than this node has heard of; it will."""
        if self._clock.monotonic() + LAYOUT_PAUSE_S >= deadline:
            raise ServiceUnavailable("The replicas of this key follow a newer layout than this node knows. Retry.")
        await asyncio.sleep(self._around.jitter() * LAYOUT_PAUSE_S)

    async def _hear(
        self, view: View, name: RegisterName, want_payload: bool, deadline: float, *, everybody: bool = False
    ) -> _Seen | None:
        """Asks until a majority agrees and its value is here, or all have answered that will; None when the layout is
        out of date. ``everybody`` is asked for
        the value at once, after a first round that did not find one, or took long.

        Raises ServiceUnavailable without a majority.
        """
        seen, believe = _Seen(), False
        answers: Answers[_ReadAnswer] = Answers(self._replicas, self._pool, self._suspects)
        order = self._suspects.last(view.disks)
        needed = len(order) // 2 + 1 if len(view.groups) == 1 else len(order)
        waiting = [] if everybody else order[needed:]

        def ask(disk: str, full: bool) -> None:
            self._ask_read(answers, messages.Read(disk, name, view.epoch, full, full and want_payload), deadline)

        for index, disk in enumerate(order[: len(order) - len(waiting)]):
            ask(disk, index == 0 or everybody)
        while True:
            if has_majority(view.groups, seen.doubted):
                seen.replies |= seen.doubted  # nothing better is to be had; who reads it says that it can't be used
                seen.doubted = {}
                believe = True
            if out_of_reach(view.groups, {*seen.failed, *seen.doubted}) and not (seen.doubted and answers.pending):
                if seen.stale:
                    return None
                raise ServiceUnavailable("No majority of the replicas of this key answers. Retry.")
            remaining_s = deadline - self._clock.monotonic()
            if remaining_s <= 0:
                raise ServiceUnavailable("No majority of the replicas of this key answered in time. Retry.")
            accepted = seen.accepted
            ballot = settled_ballot(view.groups, accepted, self._rules)
            if ballot is not None and (ballot == ZERO_BALLOT or _value_at(seen, ballot) is not None):
                return seen
            if not answers.pending and not waiting:
                newest = ballot if ballot is not None else max(accepted.values())
                if _value_at(seen, newest) is not None:
                    return seen
                ask(next(disk for disk, its in accepted.items() if its == newest), True)
            wanted = max(needed - len(accepted), 1)
            enough = not waiting and ballot is None and has_majority(view.groups, accepted)
            answer = await answers.next(min(self._hedge_s, remaining_s) if waiting or enough else remaining_s, wanted)
            if answer is not None:
                _note(seen, *answer)
                self._set_doubted_aside(seen, name, answer[0], believe)
            elif enough and _value_at(seen, max(accepted.values())) is not None:
                return seen  # it can be settled without whoever takes long
            if waiting and (answer is None or answer[0] in seen.failed or len(set(seen.accepted.values())) > 1):
                ask(waiting.pop(0), True)

    def _set_doubted_aside(self, seen: _Seen, name: RegisterName, disk: str, believe: bool) -> None:
        reply = seen.replies.get(disk)
        if reply is not None and not believe and self._doubts(name, disk, reply.value):
            seen.doubted[disk] = seen.replies.pop(disk)
            self._around.on_missed(name)

    async def _settle_seen(
        self, view: View, name: RegisterName, seen: _Seen, nonce: bytes, deadline: float
    ) -> Value | None:
        """Rule 4: the newest value is accepted by a majority before it is told; the small copy that it names goes
        along, for its writer may have reached one replica.
        """
        self._check_settles(name)
        self._counts["replays"] += 1
        newest = max(seen.accepted.values())
        value = _value_at(seen, newest)
        if value is None or newest.epoch != view.epoch or not self._may_replay(name, newest, value):
            return await self._changing.identity(name, nonce, deadline, commit=False)
        accepted = {disk for disk, ballot in seen.accepted.items() if ballot == newest}
        fragments: Fragments | None = ()
        if value.payload and self._rules.copies_travel:
            fragments = await self._carry(view, name, value.payload, deadline)
            if fragments is None:
                return await self._changing.identity(name, nonce, deadline, commit=False)
        answers: Answers[messages.AcceptReply] = Answers(self._replicas, self._pool, self._suspects)
        # what was created is helped on as it came: whoever holds something refuses, and then it is for another ballot
        accept_of = messages.Create if created(value) and self._rules.create_into_nothing else messages.Accept
        for index, disk in enumerate(view.disks):
            if disk not in accepted:
                header, body = fragments[index] if fragments else (b"", ())
                accept = accept_of(disk, name, newest, value, nonce, True, header)
                post_accept(answers, accept, body, self._call_timeout(deadline), self._around.on_missed)
        if not self._rules.replay_confirmed:
            return value
        while not has_majority(view.groups, accepted):
            answer = await answers.next(deadline - self._clock.monotonic())
            if answer is None:
                return await self._changing.identity(name, nonce, deadline, commit=False)
            disk, reply = answer
            if not isinstance(reply, StoragedError) and reply.verdict == Verdict.OK:
                accepted.add(disk)
        return value

    def _may_replay(self, name: RegisterName, ballot: Ballot, value: Value) -> bool:
        """A lone replica's lie must not be helped on under its own ballot: of system registers a settling round asks
        all (``register.credible``).
        What was created is helped on as a create, and those are refused from who is no gateway."""
        if name.table == Table.SYSTEM and self._rules.lone_ballot_led_by_none:
            return False
        return self._gateway or (ballot.node == self._node and not created(value)) or not self._rules.own_ballots

    def _compare_digests(self, name: RegisterName, seen: _Seen, ballot: Ballot) -> None:
        if len({reply.digest for reply in seen.replies.values() if reply.accepted == ballot}) > 1:
            self._counts["digest_conflicts"] += 1
            log.error("replicas differ under one ballot", register=name.pack().hex(), ballot=str(ballot))
            raise DataDamaged("Two replicas of this key hold different values under one ballot; neither is believed.")

    async def _carry(self, view: View, name: RegisterName, data_id: bytes, deadline: float) -> Fragments | None:
        """The small copy, for each replica; None when none gives it in time."""
        copy = await self._fetch_copy(view, name, data_id, set(), min(deadline, self._clock.monotonic() + CARRY_S))
        if copy is None:
            return None
        return [(self._copy_at(copy.header, index), (copy.payload,)) for index in range(len(view.disks))]

    async def _fetch_copy(
        self, view: View, name: RegisterName, data_id: bytes, asked: set[str], deadline: float
    ) -> Copy | None:
        """The small copy from any replica that has one; those that were ``asked`` and had none come last."""
        order = self._suspects.last(sorted(view.disks, key=asked.__contains__))
        answers: Answers[_ReadAnswer] = Answers(self._replicas, self._pool, self._suspects)
        while order or answers.pending:
            if order:
                self._ask_read(
                    answers, messages.Read(order.pop(0), name, view.epoch, full=False, data_id=data_id), deadline
                )
            remaining_s = deadline - self._clock.monotonic()
            if remaining_s <= 0:
                return None
            answer = await answers.next(min(self._hedge_s, remaining_s) if order else remaining_s)
            if answer is not None and not isinstance(answer[1], StoragedError) and answer[1][0].payload == data_id:
                return Copy(answer[1][0].header, answer[1][1])
        return None

    async def agreement(self, name: RegisterName) -> list[ReplicaState]:
        view = self._view(name)
        deadline = self._clock.monotonic() + min(self._deadline_s, AGREEMENT_S)
        seen, copies = _Seen(), _Seen()
        for request, heard in ((messages.Read("", name, view.epoch), seen), (None, copies)):
            if request is None:
                newest = max(seen.accepted.values(), default=ZERO_BALLOT)
                value = _value_at(seen, newest)
                if value is None or not value.payload:
                    break
                request = messages.Read("", name, view.epoch, full=False, data_id=value.payload)
            answers: Answers[_ReadAnswer] = Answers(self._replicas, self._pool, self._suspects)
            for disk in view.disks:
                self._ask_read(answers, msgspec.structs.replace(request, disk=disk), deadline)
            while (answer := await answers.next(deadline - self._clock.monotonic())) is not None:
                _note(heard, *answer)
        newest = max(seen.accepted.values(), default=ZERO_BALLOT)
        return [
            ReplicaState(
                disk, _state_of(seen, disk, newest), disk in copies.replies and bool(copies.replies[disk].payload)
            )
            for disk in view.disks
        ]

    async def held_by_quorum(self, name: RegisterName, usable: Callable[[Value], bool]) -> Value | None:
        view = self._view(name)
        deadline = self._clock.monotonic() + min(self._deadline_s, AGREEMENT_S)
        seen = _Seen()
        answers: Answers[_ReadAnswer] = Answers(self._replicas, self._pool, self._suspects)
        for disk in view.disks:
            self._ask_read(answers, messages.Read(disk, name, view.epoch), deadline)
        while (answer := await answers.next(deadline - self._clock.monotonic())) is not None:
            _note(seen, *answer)
        held = {disk: reply.value for disk, reply in seen.replies.items()}
        return Quorum(*view.groups).agreed({disk: value for disk, value in held.items() if value and usable(value)})

    # --- pages
    # ---------------------------------------------------------------------------------------------------------

    async def put_page(self, near: RegisterName, body: bytes, name: bytes = b"") -> bytes:
        page_name = name or page_hash(body)
        view, deadline = self._view(near), self._deadline()

        def put(disk: str, timeout_s: float) -> Callable[[Replica], Awaitable[messages.PageReply]]:
            async def page_put(replica: Replica) -> messages.PageReply:
                try:
                    return await replica.page_put(messages.PagePut(disk, page_name, body), timeout_s=timeout_s)
                except StoragedError:
                    self._around.on_missed(near)
                    raise

            return page_put

        if not await self._everywhere(view.disks, (view.groups,), put, lambda reply: True, deadline):
            raise ServiceUnavailable(
                "No majority of the replicas of this key has stored the manifest page. Nothing was changed. Retry."
            )
        return page_name

    async def get_page(self, near: RegisterName, name: bytes) -> bytes:
        view, deadline = self._view(near), self._deadline()
        order = self._suspects.last(view.disks)
        answers: Answers[messages.PageReply] = Answers(self._replicas, self._pool, self._suspects)
        while order or answers.pending:
            if order:
                self._ask_page(answers, messages.PageGet(order.pop(0), name), deadline)
            remaining_s = deadline - self._clock.monotonic()
            if remaining_s <= 0:
                break
            answer = await answers.next(min(self._hedge_s, remaining_s) if order else remaining_s)
            if answer is None or isinstance(answer[1], StoragedError):
                continue
            body = answer[1].body
            if body is not None and is_page(body, name):
                return body
        raise DataDamaged("A page of this object's manifest is on none of the replicas that answer.")

    async def pages_missing(self, disk: str, hashes: Sequence[bytes]) -> tuple[bytes, ...]:
        request = messages.PageCheck(disk, tuple(hashes))
        return (await self._replicas.replica(disk).page_check(request, timeout_s=self._call_timeout_s)).hashes

    async def copy_page(self, near: RegisterName, name: bytes, disk: str) -> None:
        body = await self.get_page(near, name)
        await self._replicas.replica(disk).page_put(messages.PagePut(disk, name, body), timeout_s=self._call_timeout_s)

    # --- fences
    # --------------------------------------------------------------------------------------------------------

    async def fence(self, scope: bytes, shards: Sequence[int], nonce: bytes, *, final: bool = False) -> None:
        def fence(disk: str, timeout_s: float) -> Callable[[Replica], Awaitable[messages.FenceReply]]:
            return lambda replica: replica.fence(messages.FenceSet(disk, scope, nonce, final), timeout_s=timeout_s)

        await self._fence_all(scope, shards, fence)

    async def unfence(self, scope: bytes, shards: Sequence[int], nonce: bytes) -> bool:
        def unfence(disk: str, timeout_s: float) -> Callable[[Replica], Awaitable[messages.FenceReply]]:
            return lambda replica: replica.unfence(messages.FenceLift(disk, scope, nonce), timeout_s=timeout_s)

        return await self._fence_all(scope, shards, unfence, linger=True)

    async def _fence_all(
        self,
        scope: bytes,
        shards: Sequence[int],
        call: Callable[[str, float], Callable[[Replica], Awaitable[messages.FenceReply]]],
        *,
        linger: bool = False,
    ) -> bool:
        """A fence is a disk's, for all rows of the scope: each disk is asked once, and every shard needs its majority.
        With ``linger`` the others are
        waited for too (those known to be away answer at once); whether all did is the answer."""
        views = [self._view(RegisterName(Table.OBJECT, scope, shard, b"")) for shard in shards]
        disks = tuple(dict.fromkeys(disk for view in views for disk in view.disks))
        quorums = [view.groups for view in views]
        done = await self._gather(disks, quorums, call, lambda reply: reply.done, self._deadline(), linger=linger)
        if not all(has_majority(groups, done) for groups in quorums):
            raise ServiceUnavailable(
                "The bucket's fence could not be changed on a majority of every shard's replicas. Retry."
            )
        return len(done) == len(disks)

    async def _everywhere(
        self,
        disks: Sequence[str],
        quorums: Sequence[Groups],
        call: Callable[[str, float], Callable[[Replica], Awaitable[T]]],
        good: Callable[[T], bool],
        deadline: float,
    ) -> bool:
        """Calls every disk; True as soon as each of ``quorums`` has its majority of good answers, the others go on."""
        done = await self._gather(disks, quorums, call, good, deadline)
        return all(has_majority(groups, done) for groups in quorums)

    async def _gather(
        self,
        disks: Sequence[str],
        quorums: Sequence[Groups],
        call: Callable[[str, float], Callable[[Replica], Awaitable[T]]],
        good: Callable[[T], bool],
        deadline: float,
        *,
        linger: bool = False,
    ) -> set[str]:
        """The disks that gave good answers: until every quorum has its majority, or with ``linger`` until all have
        answered.
        """
        answers: Answers[T] = Answers(self._replicas, self._pool, self._suspects)
        for disk in disks:
            answers.ask(disk, call(disk, self._call_timeout(deadline)))
        done: set[str] = set()
        while linger or not all(has_majority(groups, done) for groups in quorums):
            answer = await answers.next(deadline - self._clock.monotonic())
            if answer is None:
                break
            disk, reply = answer
            if not isinstance(reply, StoragedError) and good(reply):
                done.add(disk)
        return done

    # --- calls and time
    # ------------------------------------------------------------------------------------------------

    def _deadline(self) -> float:
        return self._clock.monotonic() + self._deadline_s

    def _call_timeout(self, deadline: float) -> float:
        return max(0.001, min(self._call_timeout_s, deadline - self._clock.monotonic()))

    def _ask_read(self, answers: Answers[_ReadAnswer], request: messages.Read, deadline: float) -> None:
        answers.post(request, timeout_s=self._call_timeout(deadline))

    def _ask_page(self, answers: Answers[messages.PageReply], request: messages.PageGet, deadline: float) -> None:
        timeout_s = self._call_timeout(deadline)
        answers.ask(request.disk, lambda replica: replica.page_get(request, timeout_s=timeout_s))


def _reading_of(quick: QuickRead, want_payload: bool) -> Reading | None:
    """What the common case has found; None: it was not one, or the copy is missing."""
    if not quick.agreed:
        return None
    try:
        value = shown(value_of(quick.row)) if quick.row else None
    except (msgspec.MsgspecError, IndexError):  # some node's mistake, with a check that is right: others are asked
        return None
    if not want_payload or value is None or not value.payload:
        return Reading(value)
    return Reading(value, quick.copy) if len(quick.copy) else None


def _wake(over: asyncio.Future[None], _quick: QuickRead) -> None:
    if not over.done():
        over.set_result(None)


def _value_at(seen: _Seen, ballot: Ballot) -> Value | None:
    return next(
        (reply.value for reply in seen.replies.values() if reply.accepted == ballot and reply.value is not None), None
    )


def _note(seen: _Seen, disk: str, answer: _ReadAnswer | StoragedError) -> None:
    if isinstance(answer, StoragedError):
        seen.replies.pop(disk, None)
        seen.failed.add(disk)
        return
    reply, payload = answer
    if reply.verdict != Verdict.OK:
        seen.failed.add(disk)
        seen.stale = seen.stale or reply.verdict == Verdict.EPOCH
        seen.damaged = seen.damaged | {disk} if reply.verdict == Verdict.DAMAGED else seen.damaged
        return
    seen.replies[disk] = reply
    seen.fenced = seen.fenced or reply.fenced
    if reply.payload:
        seen.payloads[reply.payload] = payload


def _state_of(seen: _Seen, disk: str, newest: Ballot) -> str:
    reply = seen.replies.get(disk)
    if reply is None:
        return "damaged" if disk in seen.damaged else "away"
    if reply.accepted == newest:
        return "current" if newest != ZERO_BALLOT else "empty"
    return "empty" if reply.accepted == ZERO_BALLOT else "behind"

"""All background work of one storage node, and what others may ask of it by RPC.

maintain.status   counts, jobs, and whether they tell of the disks as they are now
maintain.scrub    begin a scrub
maintain.hint     look at these registers soon
maintain.wake     walk again: somebody caught up a returned disk
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from storaged.cluster.ports import Call, Caller, Layouts, Liveness, Method, Methods
from storaged.errors import PeerError
from storaged.maintain.catchup import CatchUpWork
from storaged.maintain.collect import Collector, Referenced
from storaged.maintain.context import MaintainContext
from storaged.maintain.repair import Repair
from storaged.maintain.runner import JobReport
from storaged.maintain.scrub import Scrub
from storaged.meta.listing import RingScanner
from storaged.meta.names import RegisterName
from storaged.wire import Message

HINTS_A_CALL = 1000


class Ask(Message, frozen=True):
    """A request without contents, or with packed register names."""

    names: tuple[bytes, ...] = ()


class Done(Message, frozen=True):
    pass


class MaintainStatus(Message, frozen=True):
    """``current``: the counts come from a walk, and a catch-up, that knew the disks as this node sees them now. ``busy``: something is being done, or waits
    to be done, that could change the counts."""

    node: str
    below_target: int
    at_risk: int
    lost: int
    current: bool
    busy: bool
    jobs: tuple[JobReport, ...]
    fragments_rebuilt: int = 0
    bytes_rebuilt: int = 0
    blocks_recoded: int = 0
    fragments_deleted: int = 0
    damaged_found: int = 0
    registers_settled: int = 0


class Maintenance:
    """Owns repair, catch-up, scrub and collection. ``run`` until cancelled."""

    def __init__(self, context: MaintainContext, scanner: RingScanner, referenced: Referenced, caller: Caller) -> None:
        self._context = context
        self._caller = caller
        self.repair = Repair(context)
        self.catch_up = CatchUpWork(context, scanner)
        self.scrub = Scrub(context, self.repair.hint)
        self.collector = Collector(context, referenced)
        self._seen: frozenset[str] = frozenset()
        # At the start every other disk counts as returned: what this node's own disks know is compared with theirs, whoever was away.
        self._caught_up: frozenset[str] = frozenset(context.local_meta)

    async def run(self) -> None:
        async with asyncio.TaskGroup() as group:
            for work in (self.repair.run, self._watch, self.scrub.run, self.collector.run):
                group.create_task(work())

    async def _watch(self) -> None:
        """Disks that come or go: those that came are caught up first, then everything is counted anew, here and on the other nodes."""
        while True:
            readable = self._context.readable_disks()
            if readable != self._seen:
                returned = readable - self._caught_up
                self._seen = readable
                self._caught_up &= readable | frozenset(self._context.local_meta)
                self.repair.wake()
                if returned and await self.catch_up.bring_up(returned):
                    self._caught_up |= returned
                    self.repair.wake()
                    await self._wake_others()
                elif returned:
                    self._seen = frozenset()
            await asyncio.sleep(self._context.limits.poll_s)

    async def _wake_others(self) -> None:
        for node in {self._context.layouts.current.node_of(disk) for disk in self._seen} - {self._context.node}:
            try:
                await self._caller.call(node, "maintain.wake", Ask(), Done, timeout_s=self._context.limits.call_timeout_s)
            except PeerError:
                continue

    def status(self) -> MaintainStatus:
        """What this node knows of the objects it looks after."""
        repair, mender = self.repair, self.repair.mender
        current = repair.walked and self._seen == self._context.readable_disks() and self._seen <= self._caught_up
        jobs = [job for job in (repair.job, self.catch_up.job, self.scrub.job) if job.started or job.state == "running"]
        return MaintainStatus(
            self._context.node,
            repair.below_target,
            repair.at_risk,
            repair.lost,
            current,
            not (current and repair.idle and self.scrub.job.state != "running"),
            tuple(job.report(self._context.node) for job in jobs),
            mender.fragments_rebuilt,
            mender.bytes_rebuilt,
            mender.blocks_recoded,
            self.collector.deleted_fragments,
            self.scrub.damaged,
            self.catch_up.settled,
        )

    def methods(self) -> Methods:
        async def status(_request: Ask, _call: Call) -> MaintainStatus:
            return self.status()

        async def scrub(_request: Ask, _call: Call) -> Done:
            self.scrub.ask()
            return Done()

        async def hint(request: Ask, _call: Call) -> Done:
            for name in request.names[:HINTS_A_CALL]:
                self.repair.hint(name)
            return Done()

        async def wake(_request: Ask, _call: Call) -> Done:
            self.repair.wake()
            return Done()

        return {
            "maintain.status": Method(Ask, status),
            "maintain.scrub": Method(Ask, scrub),
            "maintain.hint": Method(Ask, hint),
            "maintain.wake": Method(Ask, wake),
        }


class MaintainClient:
    """The maintenance of all storage nodes, as a gateway (or the command line through it) sees it."""

    def __init__(self, caller: Caller, layouts: Layouts, liveness: Liveness, *, timeout_s: float = 5.0) -> None:
        self._caller = caller
        self._layouts = layouts
        self._liveness = liveness
        self._timeout_s = timeout_s
        self._hints: set[bytes] = set()

    def _nodes(self) -> list[str]:
        layout = self._layouts.current
        return sorted({disk.node for disk in layout.disks if self._liveness.disk_readable(disk.id)})

    async def statuses(self) -> list[MaintainStatus]:
        """Of every node that answers."""

        async def ask(node: str) -> MaintainStatus | None:
            try:
                return (await self._caller.call(node, "maintain.status", Ask(), MaintainStatus, timeout_s=self._timeout_s))[0]
            except PeerError:
                return None

        return [found for found in await asyncio.gather(*map(ask, self._nodes())) if found is not None]

    async def start_scrub(self) -> list[str]:
        """Asks all nodes; returns those that began."""
        began = []
        for node in self._nodes():
            try:
                await self._caller.call(node, "maintain.scrub", Ask(), Done, timeout_s=self._timeout_s)
            except PeerError:
                continue
            began.append(node)
        return began

    def hint(self, owner: RegisterName) -> None:
        """Remembers a register that a read or a write found wanting; ``run`` passes it on. Bounded: what does not fit, the next walk finds."""
        if len(self._hints) < 10 * HINTS_A_CALL:
            self._hints.add(owner.pack())

    async def run(self, interval_s: float = 0.5) -> None:
        """Passes hints on to the nodes that look after their partitions."""
        while True:
            await asyncio.sleep(interval_s)
            hints, self._hints = self._hints, set()
            by_node: dict[str, list[bytes]] = {}
            for packed in hints:
                replicas = self._layouts.current.replicas_of(RegisterName.unpack(packed).partition)
                first = next((disk for disk in replicas if self._liveness.disk_readable(disk)), None)
                if first is not None:
                    by_node.setdefault(self._layouts.current.node_of(first), []).append(packed)
            for node, names in by_node.items():
                await self._pass_on(node, names)

    async def _pass_on(self, node: str, names: Sequence[bytes]) -> None:
        for start in range(0, len(names), HINTS_A_CALL):
            try:
                await self._caller.call(
                    node, "maintain.hint", Ask(tuple(names[start : start + HINTS_A_CALL])), Done, timeout_s=self._timeout_s
                )
            except PeerError:
                return

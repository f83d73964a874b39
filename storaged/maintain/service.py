"""All background work of one storage node, and what others may ask of it by RPC.

maintain.status   counts, jobs, and whether they tell of the disks as they are now
maintain.scrub    begin a scrub
maintain.hint     look at these registers soon, and into these blocks
maintain.wake     walk again: a node has started, and may have been away without anybody noticing
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from storaged.cluster.ports import Call, Caller, Layouts, Liveness, Method, Methods
from storaged.cluster.rpc.authority import grant
from storaged.errors import PeerError, PeerRefused, StoragedError
from storaged.fragments.ports import FragmentId
from storaged.maintain.context import MaintainContext
from storaged.maintain.gc import Collector, Live
from storaged.maintain.job import JobReport
from storaged.maintain.manifest_gc import PageSweep
from storaged.maintain.repair import Repair, Waits
from storaged.maintain.scrub import Scrub
from storaged.meta.listing.merge import RingScanner
from storaged.meta.names import RegisterName
from storaged.wire import Message

HINTS_A_CALL = 1000
HINTS_WAITING_MAX = 10 * HINTS_A_CALL
DAMAGED_MAX = 1000


class Ask(Message, frozen=True):
    """A request without contents, or with packed register names. ``suspects``: packed register names and packed ids of
    fragments whose checksums hold
    although they are not what was sealed."""

    names: tuple[bytes, ...] = ()
    suspects: tuple[tuple[bytes, bytes], ...] = ()


class Done(Message, frozen=True):
    pass


class MaintainStatus(Message, frozen=True):
    """``current``: the counts come from a whole walk that began when the disks were as this node sees them now.
    ``busy``: something is being done, or waits
    to be done, that could change the counts. ``below_target``, ``at_risk`` and ``lost`` are objects;
    ``parts_below_target``: of uploads that are not complete."""

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
    parts_below_target: int = 0
    unreadable: int = 0
    waits: Waits = Waits()
    audit_alarms: tuple[tuple[str, str], ...] = ()
    records_refused: tuple[tuple[str, str], ...] = ()
    """Registers of buckets of which nothing is repaired or moved, since their records are not believed, each with the
    reason.
    """


class Maintenance:
    """Owns repair, scrub and collection. ``run`` until cancelled."""

    def __init__(self, context: MaintainContext, scanner: RingScanner, live: Live, caller: Caller) -> None:
        self._context = context
        self._caller = caller
        self._others = MaintainClient(caller, context.layouts, context.liveness)
        self.repair = Repair(context, scanner)
        self.scrub = Scrub(context, self.hint, self.repair.wake)
        self.collector = Collector(context, live)
        self.page_sweep = PageSweep(context, scanner)
        self._seen = (frozenset[str](), frozenset[str]())
        self._told: set[str] = {context.node}
        """Nodes that know that this one has started."""
        self._damaged: dict[tuple[str, FragmentId], None] = {}

    async def run(self) -> None:
        async with asyncio.TaskGroup() as group:
            for work in (
                self.repair.run,
                self._watch,
                self.scrub.run,
                self.collector.run,
                self.page_sweep.run,
                self._others.run,
            ):
                group.create_task(work())

    # --- hints ------------------------------------------------------------------------------------------------------

    def hint(self, name: bytes) -> None:
        """A register (packed name) of which something local is wanting: for whichever node looks after it."""
        try:
            register = RegisterName.unpack(name)
        except ValueError:  # a fragment's header says what its writer wanted
            self._context.log(f"damage belongs to no register: {name[:32].hex()}")
            return
        if self._context.leads(register.partition):
            self.repair.hint(name)
        else:
            self._others.hint(register)

    def cell_damaged(self, disk: str, fragment: FragmentId) -> None:
        """A local disk found a fragment damaged while it was read: its header says whom to tell. May be called at any
        time; bounded.
        """
        if len(self._damaged) < DAMAGED_MAX:
            self._damaged[disk, fragment] = None

    async def _tell_of_damage(self) -> None:
        damaged, self._damaged = self._damaged, {}
        for disk, fragment in damaged:
            try:
                owner = await self._owner_of(disk, fragment)
            except StoragedError as error:
                self._context.log(f"damage on disk {disk}: {error}")
                owner = b""
            if owner:
                self.hint(owner)
            else:
                self.repair.wake()

    async def _owner_of(self, disk: str, fragment: FragmentId) -> bytes:
        """Empty when the fragment is gone, or its header can't be read."""
        packed = fragment.pack()
        before = (int.from_bytes(packed, "big") - 1).to_bytes(len(packed), "big")
        async for header in self._context.local_fragments[disk].scan(before, 1):
            if header.id == packed:
                return header.owner
        return b""

    # --- disks that come and go -------------------------------------------------------------------------------------

    async def _watch(self) -> None:
        """When a disk comes or goes everything is looked at anew. A node that has just started says so: the others may
        not have seen it gone.
        """
        while True:
            self._look_around()
            await self._tell_others()
            await self._tell_of_damage()
            await asyncio.sleep(self._context.limits.poll_s)

    def _look_around(self) -> None:
        seen = self._context.usable_disks()
        if seen != self._seen:
            self._seen = seen
            self.repair.wake()

    async def _tell_others(self) -> None:
        nodes = {self._context.layouts.current.node_of(disk) for disk in self._seen[0]}
        for node in sorted(nodes - self._told):
            try:
                await self._caller.call(
                    node, "maintain.wake", Ask(), Done, timeout_s=self._context.limits.call_timeout_s
                )
            except PeerError:
                continue
            self._told.add(node)

    # --- status, methods --------------------------------------------------------------------------------------------

    def status(self) -> MaintainStatus:
        """What this node knows of the objects it looks after."""
        repair, mender, findings = self.repair, self.repair.mender, self.repair.findings
        current = (
            repair.counted
            and self._seen == self._context.usable_disks()
            and self._told >= {self._context.layouts.current.node_of(disk) for disk in self._seen[0]}
        )
        jobs = [job for job in (repair.walk_job, repair.job, self.scrub.job) if job.state != "waiting"]
        return MaintainStatus(
            self._context.node,
            findings.below_target,
            findings.at_risk,
            findings.lost,
            current,
            not current or repair.busy or self.scrub.busy,
            tuple(job.report(self._context.node) for job in jobs),
            mender.fragments_rebuilt,
            mender.bytes_rebuilt,
            mender.blocks_recoded,
            self.collector.deleted_fragments + repair.leavings.deleted,
            self.scrub.damaged,
            repair.walker.settled,
            findings.parts_below_target,
            findings.unreadable,
            repair.waits(),
            tuple(self._context.audit_alarms()),
            tuple(sorted(repair.walker.buckets.refused.items())),
        )

    def methods(self) -> Methods:
        async def status(_request: Ask, _call: Call) -> MaintainStatus:
            return self.status()

        async def scrub(_request: Ask, _call: Call) -> Done:
            self.scrub.ask()
            return Done()

        async def hint(request: Ask, _call: Call) -> Done:
            try:
                names = [RegisterName.unpack(name).pack() for name in request.names[:HINTS_A_CALL]]
                suspects = [
                    (RegisterName.unpack(owner).pack(), FragmentId.unpack(fragment))
                    for owner, fragment in request.suspects[:HINTS_A_CALL]
                ]
            except ValueError as error:
                raise PeerRefused(f"a hint that cannot be: {error}", remote_code="BAD_REQUEST") from None
            for name in names:
                self.repair.hint(name)
            for owner, lied in suspects:
                self.repair.suspect(owner, lied)
            return Done()

        async def wake(_request: Ask, _call: Call) -> Done:
            self.repair.wake()
            return Done()

        methods = {
            "maintain.status": Method(Ask, status),
            "maintain.scrub": Method(Ask, scrub),
            "maintain.hint": Method(Ask, hint),
            "maintain.wake": Method(Ask, wake),
        }
        return grant(methods)


class MaintainClient:
    """The maintenance of all storage nodes, as a gateway (or the command line through it) sees it."""

    def __init__(self, caller: Caller, layouts: Layouts, liveness: Liveness, *, timeout_s: float = 5.0) -> None:
        self._caller = caller
        self._layouts = layouts
        self._liveness = liveness
        self._timeout_s = timeout_s
        self._hints: dict[bytes, None] = {}
        self._suspects: dict[tuple[bytes, bytes], None] = {}

    def _nodes(self) -> list[str]:
        layout = self._layouts.current
        return sorted({disk.node for disk in layout.disks if self._liveness.disk_readable(disk.id)})

    async def statuses(self) -> list[MaintainStatus]:
        """Of every node that answers."""

        async def ask(node: str) -> MaintainStatus | None:
            try:
                return (
                    await self._caller.call(node, "maintain.status", Ask(), MaintainStatus, timeout_s=self._timeout_s)
                )[0]
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

    def hint(self, owner: RegisterName, lied: FragmentId | None = None) -> None:
        """Remembers a register that a read or a write found wanting; ``run`` passes it on. ``lied``: a fragment that
        was not what was sealed although its
        checksums hold, so that the disks can't find it. Bounded: what does not fit, the next walk finds."""
        if len(self._hints) < HINTS_WAITING_MAX:
            self._hints[owner.pack()] = None
        if lied is not None and len(self._suspects) < HINTS_WAITING_MAX:
            self._suspects[owner.pack(), lied.pack()] = None

    async def run(self, interval_s: float = 0.5) -> None:
        """Passes hints on to the nodes that look after their partitions."""
        while True:
            await asyncio.sleep(interval_s)
            if self._hints or self._suspects:
                await self._pass_on()

    async def _pass_on(self) -> None:
        hints, self._hints = self._hints, {}
        suspects, self._suspects = self._suspects, {}
        names: dict[str, list[bytes]] = {}
        lied: dict[str, list[tuple[bytes, bytes]]] = {}
        for owner in hints:
            names.setdefault(self._leader(owner), []).append(owner)
        for owner, fragment in suspects:
            lied.setdefault(self._leader(owner), []).append((owner, fragment))
        for node in sorted({*names, *lied} - {""}):
            await self._tell(node, names.get(node, []), lied.get(node, []))

    def _leader(self, owner: bytes) -> str:
        layout = self._layouts.current
        replicas = layout.replicas_of(RegisterName.unpack(owner).partition)
        return next((layout.node_of(disk) for disk in replicas if self._liveness.disk_readable(disk)), "")

    async def _tell(self, node: str, names: Sequence[bytes], suspects: Sequence[tuple[bytes, bytes]]) -> None:
        for start in range(0, max(len(names), len(suspects)), HINTS_A_CALL):
            end = start + HINTS_A_CALL
            try:
                ask = Ask(tuple(names[start:end]), tuple(suspects[start:end]))
                await self._caller.call(node, "maintain.hint", ask, Done, timeout_s=self._timeout_s)
            except PeerError:
                return

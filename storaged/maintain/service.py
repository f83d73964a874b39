"""All background work of one storage node, and its RPC methods.

maintain.status   counts, jobs, and whether the counts are those of the disks as they are now
maintain.scrub    begins a scrub
maintain.hold     keeps for a moment what these downloads read (``holds``)
maintain.hint     looks at these registers soon, and compares the fragments of these blocks
maintain.behind   brings these registers of this node's disks up (``pull``)
maintain.asks     what this node asks of gateways (``asks``)
maintain.wake     begins catch-up and a walk: a node has started, and may have been away unnoticed; or its scrub has
                  found damage of which it does not know the register
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeVar

from storaged.cluster.ports import Call, Caller, Layouts, Liveness, Method, Methods
from storaged.cluster.rpc.authority import grant
from storaged.errors import PeerError, PeerRefused, PeerUnreachable, ServiceUnavailable, StoragedError
from storaged.fragments.ports import FragmentId
from storaged.maintain.check import Check
from storaged.maintain.context import MaintainContext
from storaged.maintain.gc import Collector
from storaged.maintain.holds import KEY_BYTES_MAX, KEYS_A_CALL, RENEW_S, Hold, Holds
from storaged.maintain.job import JobReport
from storaged.maintain.manifest_gc import PageSweep
from storaged.maintain.pull import Pull
from storaged.maintain.repair import Repair
from storaged.maintain.scrub import Scrub
from storaged.maintain.spare_room import UNKNOWN_BYTES
from storaged.maintain.status import REASONS_MAX, MaintainStatus
from storaged.meta.listing.merge import RingScanner
from storaged.meta.names import RegisterName
from storaged.tasks import TaskGroup
from storaged.wire import Message

T = TypeVar("T")

HINTS_A_CALL = 1000
HINTS_WAITING_MAX = 10 * HINTS_A_CALL
HINT_TRIES = 20
"""A hint that no node takes is dropped after this many attempts, ten seconds or more: a walk finds its register."""

DAMAGED_MAX = 1000
MANY_FINDINGS = 10_000
STATUS_AGE_S = 2.0
"""With so many findings, a status may be this old. To look through 100,000 takes a tenth of a second, and nodes ask
each other every few seconds.
"""

RESTS_A_WALK = 4
"""The pause after a walk while partitions move, as a multiple of the walk's duration."""


class Ask(Message, frozen=True):
    """A request without contents, or with packed register names. ``suspects``: packed register name and packed id of
    each mismatched fragment: its checksums hold, but it is not what was sealed.
    """

    names: tuple[bytes, ...] = ()
    suspects: tuple[tuple[bytes, bytes], ...] = ()


class Done(Message, frozen=True):
    """The request was carried out."""


class Maintenance:
    """Owns repair, scrub and garbage collection. ``run`` until cancelled."""

    def __init__(self, context: MaintainContext, scanner: RingScanner, caller: Caller) -> None:
        self._context = context
        self._caller = caller
        self._others = MaintainClient(caller, context.layouts, context.liveness)
        self.check = Check(context, scanner)
        self.pull = Pull(context, caller)
        self.check.walker.bring_up = self.pull.bring_up
        self.repair = Repair(context, self.check, self._others.statuses)
        self.scrub = Scrub(context, self.hint, self._unowned_damage)
        self.holds = Holds(context.clock, context.limits.read_hold_s)
        self.collector = Collector(context, holds=self.holds)
        self.page_sweep = PageSweep(context, self.holds, self.collector.pace)
        self._seen = (frozenset[str](), frozenset[str]())
        """The usable disks when that was looked at last."""
        self._places = self._walked_places = (0, 0)
        """The layout's epoch and the steps of partitions, when that was looked at last, and when a walk was requested
        for them.
        """
        self._informed: set[str] = {context.node}
        """Nodes that know that this one has started."""
        self._damaged: dict[tuple[str, FragmentId], None] = {}
        self._status: tuple[float, MaintainStatus] | None = None
        """What ``status`` said last, and until when it says so again."""

    async def run(self) -> None:
        async with asyncio.TaskGroup() as group:
            for work in (
                self.repair.run,
                self.check.catch_up.run,
                self.repair.relocator.run,
                self._watch,
                self._tell,
                self.scrub.run,
                self.collector.run,
                self.page_sweep.run,
                self._others.run,
                self._context.asks.run,
            ):
                group.create_task(work())

    # --- hints ------------------------------------------------------------------------------------------------------

    def hint(self, name: bytes) -> None:
        """Something local of this register (packed name) is damaged or missing: the node that is responsible for the
        register should look at it soon.
        """
        try:
            register = RegisterName.unpack(name)
        except ValueError:  # it comes from a fragment's header, where its writer may have put anything
            self._context.log(f"damage belongs to no register: {name[:32].hex()}")
            return
        if self._context.leads(register.partition):
            self.check.hint(name)
        else:
            self._others.hint(register)

    def fragment_contested(self, owner: bytes, fragment: FragmentId) -> None:
        """Another node would write over an undamaged fragment of a local disk what its header does not say: the block
        is compared here. May be called at any time; bounded.
        """
        try:
            RegisterName.unpack(owner)
        except ValueError:
            return
        self.repair.hint_mismatch(owner, fragment)

    def cell_damaged(self, disk: str, fragment: FragmentId) -> None:
        """A read found a fragment of a local disk damaged; its header names the register. May be called at any time;
        bounded.
        """
        if len(self._damaged) < DAMAGED_MAX:
            self._damaged[disk, fragment] = None

    def _unowned_damage(self) -> None:
        """Something local is damaged, and any node may be responsible for its register: all of them walk."""
        self.check.request_walk()
        self._informed = {self._context.node}

    async def _hint_damage(self) -> None:
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
                self.check.request_walk()

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
        """When a disk comes or goes, a walk begins; when one comes, catch-up before."""
        while True:
            self._watch_disks()
            await asyncio.sleep(self._context.limits.poll_s)

    async def _tell(self) -> None:
        """A node that has just started announces itself, for the others may not have seen that it was gone. A node with
        damage of which it does not know the register does the same. Calls to other nodes may take long.
        """
        while True:
            await self._announce_start()
            await self._hint_damage()
            await asyncio.sleep(self._context.limits.poll_s)

    def _watch_disks(self) -> None:
        """A layout changes what has to move, and for a partition that moved another node may be responsible. While
        partitions move one after the other, the walk waits; and where they move for hours, walks leave most of the time
        to repair.
        """
        seen = self._context.usable_disks()
        places = self._context.layouts.current.epoch, self._context.steps()
        moving, self._places = places != self._places, places
        if seen[0] - self._seen[0]:
            self.check.catch_up.request()
        if seen != self._seen or (places != self._walked_places and not moving and self._has_rested()):
            self._seen, self._walked_places = seen, places
            self.check.request_walk()

    def _has_rested(self) -> bool:
        """Whether the last walk ended, some time ago."""
        walk = self.check.job
        rested_s = self._context.clock.monotonic() - walk.ended
        return walk.state != "running" and rested_s >= RESTS_A_WALK * (walk.ended - walk.started)

    def _nodes_seen(self) -> set[str]:
        """Of the disks that the layout in force still has."""
        known = self._context.layouts.current.disk_by_id
        return {known[disk].node for disk in self._seen[0] if disk in known}

    async def _announce_start(self) -> None:
        for node in sorted(self._nodes_seen() - self._informed):
            try:
                await self._caller.call(
                    node, "maintain.wake", Ask(), Done, timeout_s=self._context.limits.call_timeout_s
                )
            except PeerError:
                continue
            self._informed.add(node)

    # --- status, methods --------------------------------------------------------------------------------------------

    def status(self) -> MaintainStatus:
        """What this node knows of the objects that it is responsible for; with many findings, what it knew a moment
        ago, unless it was asked for work since then.
        """
        now = self._context.clock.monotonic()
        if self._status is None or now >= self._status[0]:
            age_s = STATUS_AGE_S if self.check.queue.listed > MANY_FINDINGS else 0.0
            self._status = now + age_s, self._look()
        return self._status[1]

    def _look(self) -> MaintainStatus:
        check, repair, queue = self.check, self.repair, self.check.queue
        seen_now = self._seen == self._context.usable_disks()
        current = check.current and seen_now and self._informed >= self._nodes_seen()
        jobs = [job for job in (check.catch_up.job, check.job, repair.job, self.scrub.job) if job.state != "waiting"]
        reports = [job.report(self._context.node) for job in jobs] + self._collection() + self._undecided()
        return MaintainStatus(
            node=self._context.node,
            below_target=queue.below_target,
            at_risk=queue.at_risk,
            lost=queue.lost,
            current=current,
            busy=not current or check.catch_up.busy or repair.busy or self.scrub.busy or self._others.busy,
            jobs=tuple(reports),
            fragments_rebuilt=repair.rebuilder.fragments_rebuilt,
            bytes_rebuilt=repair.rebuilder.bytes_rebuilt,
            blocks_recoded=repair.rebuilder.blocks_recoded,
            fragments_deleted=self.collector.deleted_fragments,
            damaged_found=self.scrub.damaged,
            registers_settled=check.walker.settled,
            parts_below_target=queue.parts_below_target,
            unreadable=queue.unreadable,
            waits=repair.waits(),
            audit_alarms=tuple(self._context.audit_alarms()),
            records_refused=tuple(sorted(check.walker.buckets.refused.items())),
            garbage_waiting=tuple(self.collector.waiting().most_common(REASONS_MAX)),
            misplaced=queue.misplaced,
            judged=check.judged,
            outdated=queue.outdated,
            layout=self._walked_places[0],
            unrepaired=tuple(repair.unrepaired().most_common(REASONS_MAX)),
            unmoved=tuple(queue.unmoved().most_common(REASONS_MAX)),
            away_bytes=queue.away_bytes if current else UNKNOWN_BYTES,
            partition_bytes=check.partition_bytes,
            unwritable=self._context.unwritable(),
        )

    def _collection(self) -> list[JobReport]:
        """As a job, when data waits to be collected, or collection is paused."""
        waiting, pace, details = self.collector.waiting(), self.collector.pace, list[str]()
        if waiting:
            reason, count = waiting.most_common(1)[0]
            details.append(
                f"{waiting.total()} data ids on garbage lists can't be deleted yet; {count} of them: {reason}"
            )
        if pace.paused and self._context.settings().revision >= 0:
            details.insert(0, "deleted data stays, and takes room; to go on: storaged job resume collection")
        if not details:
            return []
        state = "paused" if pace.paused else "waiting"
        rate = f"at most {pace.per_s}/s" if pace.per_s else ""
        return [JobReport("collection", self._context.node, state, 0, 0, rate, None, "; ".join(details))]

    def _undecided(self) -> list[JobReport]:
        """As a job, when sound fragments differ and repair can't tell which of them is false."""
        undecided = self.repair.rebuilder.undecided
        if not undecided:
            return []
        detail = (
            f"{len(undecided)} fragments are not what the others of their block say, and stay, since either may be"
            " right; they are compared again when fragments that are away come back"
        )
        return [JobReport("comparison", self._context.node, "waiting", 0, 0, "", None, detail)]

    def methods(self) -> Methods:
        async def status(_request: Ask, _call: Call) -> MaintainStatus:
            return self.status()

        async def scrub(_request: Ask, _call: Call) -> Done:
            self.scrub.request()
            self._status = None  # an older one would say that nothing is done: `scrub --wait` would end at once
            return Done()

        async def hint(request: Ask, _call: Call) -> Done:
            try:
                names = [RegisterName.unpack(name).pack() for name in request.names[:HINTS_A_CALL]]
                mismatches = [
                    (RegisterName.unpack(owner).pack(), FragmentId.unpack(fragment))
                    for owner, fragment in request.suspects[:HINTS_A_CALL]
                ]
            except ValueError as error:
                raise PeerRefused(f"a hint that cannot be: {error}", remote_code="BAD_REQUEST") from None
            for name in names:
                self.hint(name)
            for owner, fragment in mismatches:
                self.repair.hint_mismatch(owner, fragment)
            return Done()

        async def hold(request: Hold, _call: Call) -> Done:
            if len(request.keys) > KEYS_A_CALL or not all(0 < len(key) <= KEY_BYTES_MAX for key in request.keys):
                raise PeerRefused("what is to be held can't be names of data", remote_code="BAD_REQUEST")
            self.holds.hold(request.keys)
            return Done()

        async def wake(_request: Ask, _call: Call) -> Done:
            self.check.catch_up.request()
            self.check.request_walk()
            self._status = None
            return Done()

        methods = {
            "maintain.status": Method(Ask, status),
            "maintain.scrub": Method(Ask, scrub),
            "maintain.hint": Method(Ask, hint),
            "maintain.hold": Method(Hold, hold),
            "maintain.wake": Method(Ask, wake),
        }
        return {**grant(methods), **self._context.asks.methods(), **self.pull.methods()}


class MaintainClient:
    """The maintenance of all storage nodes, as a gateway (or the command line through it) sees it."""

    def __init__(self, caller: Caller, layouts: Layouts, liveness: Liveness, *, timeout_s: float = 5.0) -> None:
        self._caller = caller
        self._layouts = layouts
        self._liveness = liveness
        self._timeout_s = timeout_s
        self._hints: dict[bytes, int] = {}
        self._mismatches: dict[tuple[bytes, bytes], int] = {}
        """How often each hint was sent in vain."""
        self._sending = False

    def _nodes(self) -> list[str]:
        layout = self._layouts.current
        return sorted({disk.node for disk in layout.disks if self._liveness.disk_readable(disk.id)})

    async def statuses(self) -> list[MaintainStatus]:
        """The status of every node that answers."""

        async def ask(node: str) -> MaintainStatus | None:
            try:
                return (
                    await self._caller.call(node, "maintain.status", Ask(), MaintainStatus, timeout_s=self._timeout_s)
                )[0]
            except PeerError:
                return None

        return [found for found in await asyncio.gather(*map(ask, self._nodes())) if found is not None]

    async def start_scrub(self) -> list[str]:
        """Asks all nodes. Returns those that began a scrub."""
        began = []
        for node in self._nodes():
            try:
                await self._caller.call(node, "maintain.scrub", Ask(), Done, timeout_s=self._timeout_s)
            except PeerError:
                continue
            began.append(node)
        return began

    def hint(self, owner: RegisterName, mismatched: FragmentId | None = None) -> None:
        """Remembers a register of which a read or a write found something damaged or missing; ``run`` sends it.
        ``mismatched``: a fragment that is not what was sealed although its checksums hold, so that its disk can't find
        out. Bounded: the next walk finds what does not fit.
        """
        if len(self._hints) < HINTS_WAITING_MAX:
            self._hints[owner.pack()] = 0
        if mismatched is not None and len(self._mismatches) < HINTS_WAITING_MAX:
            self._mismatches[owner.pack(), mismatched.pack()] = 0

    @property
    def busy(self) -> bool:
        """Whether a node does not know yet of something that this one has found."""
        return bool(self._hints or self._mismatches) or self._sending

    async def run(self, interval_s: float = 0.5) -> None:
        """Sends hints to the nodes that are responsible for their partitions."""
        while True:
            await asyncio.sleep(interval_s)
            if self.busy:
                self._sending = True
                try:
                    await self._send_all()
                finally:
                    self._sending = False

    async def run_holds(self, keys_of: Callable[[], Sequence[bytes]]) -> None:
        """Asks all storage nodes to hold what long downloads of this process read. Runs until it is cancelled. When no
        download is long, it sends nothing. A node that does not answer delays no other: a hold ends soon unless it is
        renewed (``holds.LEASE_S``).
        """
        sending: dict[str, asyncio.Task[None]] = {}
        async with TaskGroup() as group:
            while True:
                await asyncio.sleep(RENEW_S)
                keys = keys_of()
                sending = {node: task for node, task in sending.items() if not task.done()}
                for node in self._nodes() if keys else ():
                    if node not in sending:
                        sending[node] = group.create_task(self._hold(node, keys))

    async def _hold(self, node: str, keys: Sequence[bytes]) -> None:
        with contextlib.suppress(PeerError):
            for start in range(0, len(keys), KEYS_A_CALL):
                request = Hold(tuple(keys[start : start + KEYS_A_CALL]))
                await self._caller.call(node, "maintain.hold", request, Done, timeout_s=RENEW_S)

    async def _send_all(self) -> None:
        hints, self._hints = self._hints, {}
        mismatches, self._mismatches = self._mismatches, {}
        names: dict[str, list[bytes]] = {}
        fragments: dict[str, list[tuple[bytes, bytes]]] = {}
        for owner in hints:
            names.setdefault(self._leader(owner), []).append(owner)
        for owner, fragment in mismatches:
            fragments.setdefault(self._leader(owner), []).append((owner, fragment))
        for node in sorted({*names, *fragments} - {""}):
            unsent, others = await self._send(node, names.get(node, []), fragments.get(node, []))
            _put_back(self._hints, hints, unsent)
            _put_back(self._mismatches, mismatches, others)

    def _leader(self, owner: bytes) -> str:
        """The node that is responsible for a register; empty when none of its replicas can be read."""
        try:
            replicas = self._layouts.partition(RegisterName.unpack(owner).partition).present
        except ServiceUnavailable:
            return ""
        known = self._layouts.current.disk_by_id
        return next((known[disk].node for disk in replicas if disk in known and self._liveness.disk_readable(disk)), "")

    async def _send(
        self, node: str, names: Sequence[bytes], mismatches: Sequence[tuple[bytes, bytes]]
    ) -> tuple[Sequence[bytes], Sequence[tuple[bytes, bytes]]]:
        """Returns the names that the node did not take: it may be starting, or another node becomes responsible."""
        for start in range(0, max(len(names), len(mismatches)), HINTS_A_CALL):
            end = start + HINTS_A_CALL
            try:
                ask = Ask(tuple(names[start:end]), tuple(mismatches[start:end]))
                await self._caller.call(node, "maintain.hint", ask, Done, timeout_s=self._timeout_s)
            except PeerUnreachable:
                return names[start:], mismatches[start:]
            except PeerError:
                break
        return (), ()


def _put_back(waiting: dict[T, int], tried: Mapping[T, int], unsent: Iterable[T]) -> None:
    for hint in unsent:
        if tried[hint] + 1 < HINT_TRIES and len(waiting) < HINTS_WAITING_MAX:
            waiting.setdefault(hint, tried[hint] + 1)

"""What all background work of a storage node uses. ``node`` fills it. It has no key, and nothing that could open a
sealed byte.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from math import inf
from typing import Protocol

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from storaged.clock import Clock
from storaged.cluster.move_settings import MoveSettings
from storaged.cluster.ports import DiskStatus, Layouts, Liveness, OnRefusal
from storaged.cluster.sparing import UNREACHABLE
from storaged.errors import DiskUnusable, ServiceUnavailable
from storaged.fragments.ports import FragmentStores, NearStore
from storaged.maintain.asks import Asks
from storaged.meta.consensus.looks import Look
from storaged.meta.messages import Accept, AcceptReply
from storaged.meta.names import RegisterName, Value
from storaged.meta.ports import PageCopies, Registers, Scanner
from storaged.meta.store_ports import MetaStore
from storaged.tasks import TaskGroup
from storaged.units import MIB
from storaged.wire import Buffer


@dataclass(frozen=True)
class MaintainLimits:
    """Bounds and intervals of background work: one attribute for each."""

    walk_interval_s: float = 3600.0
    """A full walk without any sign of trouble finds what vanished unnoticed."""
    poll_s: float = 1.0
    retry_s: float = 15.0
    """The pause after the first failed repair of a register. It doubles with every failure, up to ``retry_max_s``."""
    retry_max_s: float = 3600.0
    walk_retry_max_s: float = 60.0
    collect_interval_s: float = 20.0
    collect_batch: int = 256
    recode_delay_s: float = 600.0
    """How long disks may be away before blocks are recoded for the other disks; 0: as the layout says
    (``Layout.sparing``).
    """
    drop_delay_s: float = 3600.0
    """How long fragments of recoded blocks stay on their old disks, for readers that have begun with them."""
    read_hold_s: float = 86_400.0
    """How much longer data that is due stays at most, for downloads that still read it (``holds``)."""
    orphan_age_ms: int = 86_400_000
    """No request lives longer than half of this. So an older fragment that no record claims is garbage."""
    orphan_interval_s: float = 6 * 3600.0
    scrub_interval_s: float = 30 * 86_400.0
    scrub_bytes_per_s: int = 64 * MIB
    """The pace of a scrub that starts by itself. A requested one is as fast as the disk."""
    rebuilds_concurrent_max: int = 3
    """Blocks that are rebuilt at the same time. Each takes about four times its size, 12 MiB, meanwhile."""
    repair_batch: int = 256
    """Registers repaired before hints, returned disks and the order of urgency are looked at again."""
    hints_a_round: int = 500
    hints_concurrent_max: int = 16
    findings_max: int = 100_000
    hints_max: int = 100_000
    call_timeout_s: float = 20.0


class SignerKeys(Protocol):
    """The keys that sign the public parts of records. ``cluster.signers.Signers`` implements it."""

    async def key(self, signer: bytes) -> Ed25519PublicKey:
        """The key with this id. Raises CertificateRefused for one that no gateway of this cluster certified,
        ServiceUnavailable when that can't be found out now.
        """


Copies = Sequence[tuple[bytes, Sequence[Buffer]]]
"""(encoded fragment header, payload) of a small copy, for each position of its register's replicas."""


async def no_disk(disk: str, _request: Accept, _copy: Sequence[Buffer]) -> AcceptReply:
    raise DiskUnusable(f"this node has no disk {disk}", state="failed")


async def no_copies(_name: RegisterName, _value: Value) -> Copies | None:
    return None


@dataclass
class MaintainContext:
    """``signers``: verify the signatures on records. ``look``: asks each replica of a register what it has accepted
    (``meta.client``). ``local_meta``, ``local_fragments``: this node's disks by id. ``asks``: of gateways, who alone
    change registers. ``adopt(disk, request, copy)``: a local disk accepts what a quorum has; as ``Replica.accept``.
    ``small_copies(name, value)``: the small copy that the value names, for each position; None or empty when none gives
    it. ``on_refusal(peer, error)``: another node asked what no honest node asks; for the audit log. ``audit_alarms``:
    (node, what is wrong with its audit log) as this node knows; shown in its status.
    """

    node: str
    clock: Clock
    layouts: Layouts
    liveness: Liveness
    registers: Registers
    look: Callable[[RegisterName], Awaitable[Look]]
    pages: PageCopies
    scanner: Scanner
    stores: FragmentStores
    local_meta: Mapping[str, MetaStore]
    local_fragments: Mapping[str, NearStore]
    signers: SignerKeys
    asks: Asks
    limits: MaintainLimits = field(default_factory=MaintainLimits)
    log: Callable[[str], None] = lambda line: None
    audit_alarms: Callable[[], Sequence[tuple[str, str]]] = tuple
    unwritable: Callable[[], str] = str
    """Why this node can't write to its own directory; empty when it can."""
    on_refusal: OnRefusal = lambda peer, error: None
    adopt: Callable[[str, Accept, Sequence[Buffer]], Awaitable[AcceptReply]] = no_disk
    small_copies: Callable[[RegisterName, Value], Awaitable[Copies | None]] = no_copies
    steps: Callable[[], int] = lambda: 0
    """The sum of the steps of all partitions (``cluster.partition_map``): it grows when one has moved."""

    compared_at: Callable[[], float] = lambda: -inf
    """When another node (``catch_up``) last compared its rows with disks of this one, by the event loop's clock."""

    why_away: Callable[[str], str] = lambda _disk: UNREACHABLE
    """Why a disk can't be read (``cluster.sparing.Opinion``): UNREACHABLE when its node does not answer."""

    reports: Callable[[], Mapping[str, DiskStatus]] = dict
    """What each disk of the layout was said to be last, by disk (``Membership.reports``)."""

    settings: Callable[[], MoveSettings] = MoveSettings
    """Whether what is whole moves to where the layout wants it, and how fast."""

    def leader_of(self, partition: int) -> str:
        """The disk whose node is responsible for a partition: the first of its replicas that can be read now; empty
        when none can, or where they are is not known yet. Two nodes that disagree on which disks are alive do the same
        work twice, which is harmless.
        """
        try:
            replicas = self.layouts.partition(partition).present
        except ServiceUnavailable:
            return ""
        return self.leader_among(replicas)

    def leader_among(self, replicas: Iterable[str]) -> str:
        """The first that can be read now; empty when none can."""
        return next(filter(self.liveness.disk_readable, replicas), "")

    def leads(self, partition: int) -> bool:
        return self.leader_of(partition) in self.local_meta

    @property
    def recode_delay_s(self) -> float:
        return self.limits.recode_delay_s or float(self.layouts.current.sparing.fragments_s)

    def usable_disks(self) -> tuple[frozenset[str], frozenset[str]]:
        """(disks that can be read, disks that take writes too)."""
        layout, liveness = self.layouts.current, self.liveness
        readable = frozenset(disk.id for disk in layout.disks if liveness.disk_readable(disk.id))
        return readable, frozenset(disk for disk in readable if liveness.disk_writable(disk))


async def concurrently(work: Iterable[Awaitable[None]], workers: int) -> None:
    """Awaits all of it, so many at the same time. Takes the next from ``work`` when its turn comes."""
    queue = iter(work)

    async def worker(first: Awaitable[None]) -> None:
        await first
        for some in queue:
            await some

    async with TaskGroup() as group:
        for first in islice(queue, workers):
            group.create_task(worker(first))


async def wait_for(event: asyncio.Event, seconds: float) -> bool:
    """Whether the event was set within the time; clears it then."""
    try:
        async with asyncio.timeout(seconds):
            await event.wait()
    except TimeoutError:
        return False
    event.clear()
    return True

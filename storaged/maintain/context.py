"""What all background work of a storage node stands on. ``node.py`` fills it; no key is in it, nor anything that could open a sealed byte."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from storaged.clock import Clock
from storaged.cluster.layout import PARTITIONS, partition_of
from storaged.cluster.ports import Layouts, Liveness
from storaged.fragments.ports import FragmentStore, FragmentStores
from storaged.meta.names import RegisterName, Table
from storaged.meta.ports import MetaStore, Pages, Registers, Scanner
from storaged.units import MIB


@dataclass(frozen=True)
class MaintainLimits:
    """Bounds and intervals of background work."""

    walk_interval_s: float = 600.0
    """A full walk without any sign of trouble."""
    poll_s: float = 1.0
    collect_interval_s: float = 20.0
    collect_batch: int = 256
    recode_delay_s: float = 600.0
    """How long disks may be away before blocks without a spare are recoded for those that are there."""
    drop_delay_s: float = 120.0
    """Fragments that a recoded run left behind stay this long, for readers in the middle of them."""
    orphan_age_ms: int = 86_400_000
    """No request lives longer than half of this, so an older fragment that no record claims is garbage."""
    orphan_interval_s: float = 6 * 3600.0
    scrub_interval_s: float = 30 * 86_400.0
    scrub_bytes_per_s: int = 64 * MIB
    """The pace of the scrub that starts by itself; one that was asked for goes as fast as the disk."""
    mend_at_once: int = 3
    retry_s: float = 15.0
    """How long a register rests after its repair failed."""
    findings_max: int = 100_000
    hints_max: int = 100_000
    call_timeout_s: float = 20.0


@dataclass
class MaintainContext:
    """``local_meta`` and ``local_fragments``: this node's disks by id."""

    node: str
    clock: Clock
    layouts: Layouts
    liveness: Liveness
    registers: Registers
    pages: Pages
    scanner: Scanner
    stores: FragmentStores
    local_meta: Mapping[str, MetaStore]
    local_fragments: Mapping[str, FragmentStore]
    limits: MaintainLimits = field(default_factory=MaintainLimits)
    log: Callable[[str], None] = lambda line: None

    def replicas_of(self, name: RegisterName) -> tuple[str, ...]:
        return self.layouts.current.replicas_of(name.partition)

    def leads(self, partition: int) -> bool:
        """Whether this node looks after a partition: it has the first of its replicas that can be read now. Two nodes that disagree on
        who is alive do the same work twice, which is harmless."""
        for disk in self.layouts.current.replicas_of(partition):
            if self.liveness.disk_readable(disk):
                return disk in self.local_meta
        return False

    def led_ranges(self) -> list[tuple[str, int, bytes, int]]:
        """(disk, table, scope, shard) of every range of object and part rows that this node looks after."""
        found = []
        layout = self.layouts.current
        for disk, store in self.local_meta.items():
            for table, scope, shard in store.scopes():
                if table not in (Table.OBJECT, Table.PART):
                    continue
                partition = partition_of(scope, shard)
                assert 0 <= partition < PARTITIONS
                first = next((replica for replica in layout.replicas_of(partition) if self.liveness.disk_readable(replica)), "")
                if first == disk:
                    found.append((disk, int(table), scope, shard))
        return sorted(found)

    def readable_disks(self) -> frozenset[str]:
        return frozenset(disk.id for disk in self.layouts.current.disks if self.liveness.disk_readable(disk.id))


async def wait_for(event: asyncio.Event, seconds: float) -> bool:
    """True when the event was set within the time; clears it."""
    try:
        async with asyncio.timeout(seconds):
            await event.wait()
    except TimeoutError:
        return False
    event.clear()
    return True

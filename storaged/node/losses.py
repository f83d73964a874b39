"""What would be lost if disks were lost for good: for ``storaged cluster losses``, on a gateway.

It reads the map of partitions, and counts keys at the disks that are left. Nothing is decided by these counts: what
only the lost disks had, no other disk knows. Where the system partition has no quorum any more, a gateway that began
since does not know where partitions are; it says so.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from msgspec.structs import replace

from storaged.cluster.layout import PARTITIONS, SYSTEM_PARTITION, Layout
from storaged.cluster.partitions import PartitionState, recovery_of
from storaged.cluster.ports import Layouts
from storaged.errors import InvalidArgument, ServiceUnavailable, StoragedError
from storaged.meta.consensus.quorums import Quorum
from storaged.meta.proposer.moving import PartitionMoves

KINDS = {
    b"bucket/": "buckets",
    b"key/": "bucket keys",
    b"user/": "users",
    b"username/": "names of users",
    b"account/": "accounts with users, groups, roles and policies",
    b"signer/": "certified signing keys",
    b"partition/": "places of partitions",
    b"cluster": "the keyring's id",
    b"layout": "the decided layout",
    b"moves": "pauses and paces of moves",
    b"disks-out": "disks that are out",
    b"audit/": "checkpoints of audit logs",
    b"": "others",
}
"""Of system registers, by how their keys begin."""

AT_ONCE = 8
KEYS_MAX = 100_000
"""Keys of a partition that are counted."""
COUNT_S = 60.0
"""How long one disk may count the keys of one partition."""


class Losses:
    """``answers(disk)``: whether a disk can be read now."""

    def __init__(self, layouts: Layouts, moves: PartitionMoves, answers: Callable[[str], bool]) -> None:
        self._layouts = layouts
        self._moves = moves
        self._answers = answers

    async def of(self, disks: Sequence[str]) -> dict[str, Any]:
        """The document of ``storaged cluster losses``. Raises InvalidArgument for a disk that the layout does not have,
        ServiceUnavailable while it is not known where partitions are.
        """
        layout = self._layouts.current
        if unknown := [disk for disk in disks if disk not in layout.disk_by_id and disk not in layout.lost]:
            raise InvalidArgument(f"the layout in force has no disk {unknown[0]}")
        assumed = replace(layout, lost=tuple(dict.fromkeys((*layout.lost, *disks))))
        stopped: list[tuple[PartitionState, tuple[str, ...]]] = []
        nothing: list[int] = []
        unplaced: list[int] = []
        system = self._layouts.partition(SYSTEM_PARTITION)
        for number in range(PARTITIONS):
            try:
                state = self._layouts.partition(number)
            except ServiceUnavailable:
                if not Quorum(*system.voting).lost(assumed.lost):
                    raise
                unplaced.append(number)
                continue
            record = recovery_of(state, assumed)
            if record is not None:
                disks_after = dict.fromkeys(record.present + record.coming)
                stopped.append((state, tuple(disk for disk in disks_after if disk not in record.lost)))
            elif set(state.disks) <= set(assumed.lost):
                nothing.append(number)
            if number % 32 == 0:
                await asyncio.sleep(0)
        limit = asyncio.Semaphore(AT_ONCE)

        async def counted(state: PartitionState, left: tuple[str, ...]) -> dict[str, Any]:
            async with limit:
                keys = [await self._count(state, disk) for disk in left]
            known = max((one for one in keys if one is not None), default=None)
            return {"partition": state.partition, "left": list(left), "keys": known}

        rows = await asyncio.gather(*(counted(state, left) for state, left in stopped))
        return {
            "cluster": layout.cluster,
            "epoch": layout.epoch,
            "disks": list(disks),
            "answering": [disk for disk in disks if self._answers(disk)],
            "system_lost": Quorum(*system.voting).lost(assumed.lost),
            "system": await self._of_system(system, assumed),
            "unknown": unplaced,
            "silent": self._silent(layout, assumed),
            "nothing_left": nothing,
            "partitions": rows,
            "keys_max": KEYS_MAX,
        }

    def _silent(self, layout: Layout, assumed: Layout) -> list[str]:
        """The nodes with disks that are not lost, none of which answers. They may know a layout that this node has not
        seen.
        """
        disks = [disk for disk in layout.disks if disk.id not in assumed.lost]
        up = {disk.node for disk in disks if self._answers(disk.id)}
        return sorted({disk.node for disk in disks} - up)

    async def _of_system(self, state: PartitionState, assumed: Layout) -> dict[str, Any] | None:
        """What is left of the system partition; None while it has a quorum. ``registers``: how many of each kind one
        of the disks that are left has at least; None where none says it.
        """
        if not Quorum(*state.voting).lost(assumed.lost):
            return None
        left = [disk for disk in state.disks if disk not in assumed.lost]
        counts: Counter[str] | None = None
        for disk in left:
            try:
                async with asyncio.timeout(COUNT_S):
                    keys = await self._moves.system_keys(state, disk, KEYS_MAX)
            except (StoragedError, TimeoutError):
                continue
            counts = (counts or Counter()) | Counter(map(kind_of, keys))
        registers = None if counts is None else {kind: counts[kind] for kind in KINDS.values() if counts[kind]}
        return {
            "seeds": list(state.disks),
            "lost": [disk for disk in state.disks if disk in assumed.lost],
            "left": left,
            "registers": registers,
        }

    async def _count(self, state: PartitionState, disk: str) -> int | None:
        """None where the disk does not say. One that lies could go on for ever."""
        try:
            async with asyncio.timeout(COUNT_S):
                return await self._moves.count_keys(state, disk, KEYS_MAX)
        except (StoragedError, TimeoutError):
            return None


def kind_of(key: bytes) -> str:
    """Of a system register."""
    return next(kind for prefix, kind in KINDS.items() if key.startswith(prefix))

"""Layouts of small clusters, and the book that knows them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

from storaged.cluster.layout import DiskEntry, Layout, NodeEntry
from storaged.cluster.partition_map import PartitionMap
from storaged.cluster.partitions import PartitionState


def layout_of(racks: Sequence[int] = (2, 2, 2), profile: str = "4+2", epoch: int = 1) -> Layout:
    """``racks``: how many disks each has: ``a0``, ``a1``, ... in the first, ``b0``, ... in the second."""
    names = "abcdefgh"
    nodes = tuple(
        NodeEntry(f"n{names[r]}", f"FR/site{names[r]}/{names[r]}", "127.0.0.1:1", ("storage",))
        for r in range(len(racks))
    )
    disks = tuple(DiskEntry(f"{names[r]}{d}", f"n{names[r]}", 1) for r, count in enumerate(racks) for d in range(count))
    seeds = tuple(f"{names[r]}0" for r in range(min(3, len(racks))))
    return Layout("test", epoch, nodes, disks, seeds, profile)


class Places:
    """The rest of ``Layouts``, for a class that has ``current`` and ``at``."""

    @cached_property
    def partitions(self) -> PartitionMap:
        return PartitionMap()

    def earlier(self) -> list[Layout]:
        return []

    def partition(self: Any, number: int) -> PartitionState:
        return self.partitions.of(number, self.current, self.at)  # type: ignore[no-any-return]


class KnownLayouts(Places):
    """``Layouts``: the newest that was learnt is the current one."""

    def __init__(self, layout: Layout) -> None:
        self._known = {layout.epoch: layout}
        self.current = layout

    def learn(self, layout: Layout) -> None:
        self._known[layout.epoch] = layout
        self.current = layout

    def at(self, epoch: int) -> Layout:
        return self._known[epoch]

    def earlier(self) -> list[Layout]:
        return [self._known[epoch] for epoch in sorted(self._known, reverse=True) if epoch != self.current.epoch]

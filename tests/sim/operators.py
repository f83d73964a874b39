"""No operator is trusted alone: in some runs of ``moving`` the disks have three operators, and layouts are spread over
them (``cluster.spread``).

Whatever moves, is away, or is taken out, no operator may get a majority of one of a partition's sets, nor as many
fragments of a block as it can be read from. Operators are counted here again, apart from the program.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Collection

import msgspec

from storaged.cluster import spread
from storaged.cluster.layout import Layout
from storaged.cluster.partitions import PartitionRecord
from storaged.errors import StoragedError
from storaged.objects.code.place import choose
from tests.sim.cluster import DISKS

OPERATOR_OF = {"d0": "a", "d1": "b", "d2": "c", "d3": "a", "d4": "b"}
COUNT = 3
"""As many operators as a partition has replicas, and as a block of 2+1 has fragments: each has one of them."""


def suffice(disks: Collection[str]) -> bool:
    """Else the administrator would be told that the layout can't be signed."""
    return len({OPERATOR_OF[disk] for disk in disks}) == COUNT


def spread_layout(layout: Layout) -> Layout:
    racks = ((layout.node_by_name["n" + disk[1:]].location, name) for disk, name in OPERATOR_OF.items())
    return msgspec.structs.replace(
        layout, operators=tuple(sorted(racks)), spread=spread.OPERATORS, profile="2+1", replicas=COUNT
    )


class Spread:
    """``complain(violation)``. A run that does not ``join`` judges nothing."""

    def __init__(self, seed: int, share: float, complain: Callable[[str], None]) -> None:
        self._chance = random.Random(f"operators {seed}")
        self.joins = self._chance.random() < share
        self._complain = complain
        self.blocks = 0

    def judge_record(self, record: PartitionRecord) -> None:
        for disks in (record.present, record.coming):
            if disks:
                self._judge(f"partition {record.partition}, step {record.step}", disks)

    def judge_block(self, layout: Layout) -> None:
        """A writer chooses disks for a block, while some of them are away."""
        if not self.joins:
            return
        away = self._chance.sample(DISKS, self._chance.choice((0, 0, 1)))
        try:
            placement = choose(layout, self._chance.randbytes(16), layout.target, lambda disk: disk not in away)
        except StoragedError:
            return  # the writer is told that this can't be written now
        self.blocks += 1
        self._judge("a block", placement.disks)

    def _judge(self, what: str, disks: Collection[str]) -> None:
        if self.joins and not suffice(disks):
            self._complain(f"an operator has a majority of {what}: {disks}")

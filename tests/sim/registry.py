"""What runs consist of. A rule's own nemesis, and the bugs that prove it, are added here, one a line."""

from __future__ import annotations

from tests.sim.copies import LostCopies
from tests.sim.moving import Moving
from tests.sim.parts import BitFlips, ClockJumps, DiskFaults, FullDisks, HungDisks, Part, Stray, Suspensions, Trouble

PARTS: tuple[type[Part], ...] = (
    Trouble,
    Moving,
    Stray,
    HungDisks,
    Suspensions,
    ClockJumps,
    DiskFaults,
    BitFlips,
    LostCopies,
    FullDisks,
)
"""In the order in which they decide whether they join a run, begin, heal and judge."""

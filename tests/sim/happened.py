"""Whether plays did anything: a run in which hardly an operation gets through, or nothing moves, shows nothing.

The bounds are about a half of what is measured. They hold for the sum of some seeds: single ones may be unlucky.
"""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

from tests.sim.workload import Verdicts

SEEDS_MIN = 20
"""Fewer seeds are not judged."""


class Least(NamedTuple):
    """``a_minute``: operations that were acknowledged, a virtual minute; ``a_seed``: where a play does not say how long
    its workload was. ``done``: of what else, a seed.
    """

    a_minute: int = 0
    a_seed: float = 0.0
    done: tuple[tuple[str, float], ...] = ()


LEAST = {
    "ring": Least(350),
    "files": Least(250),
    "hostile": Least(a_seed=20),
    "listing": Least(350),
    "buckets": Least(300),
    "forgetful": Least(150),
    "small": Least(200),
    "bursts": Least(500),
    "flicker": Least(200),
    "moving": Least(300, done=(("steps", 6), ("lenders", 0.25), ("of lenders", 2.5))),
    "recovering": Least(200, done=(("recovered", 1.5), ("recovered joint", 0.5), ("steps", 10))),
    "layouts": Least(120, done=(("layouts", 1.5), ("steps", 0.1))),
    "recovering system": Least(50, done=(("layouts", 2.5), ("recovered", 0.7))),
    "sparing system": Least(100, done=(("layouts", 1), ("spared", 2))),
    "object lies": Least(a_seed=20),
    "stale": Least(200, done=(("answers", 5),)),
    "races": Least(300, done=(("answers", 7),)),
    "lifecycle": Least(100, done=(("expired", 2),)),
    "inventories": Least(a_seed=20, done=(("manifests", 20), ("rows", 60))),
    "events": Least(a_seed=15, done=(("events", 5),)),
    "renaming": Least(a_seed=20, done=(("renames", 1.8),)),
    "names": Least(a_seed=25, done=(("renames", 2), ("judged", 0.25))),
    "lenders": Least(a_seed=20, done=(("copies between buckets", 2), ("lenders ended", 0.4))),
    "lenders moves": Least(a_seed=15, done=(("copies between buckets", 1), ("lenders ended", 0.2), ("steps", 8))),
    "collecting": Least(a_seed=14, done=(("deleted", 30),)),
    "hiding": Least(a_seed=3, done=(("deleted", 20), ("fences", 3), ("open parts", 2))),
    "collecting moves": Least(a_seed=14, done=(("deleted", 35), ("steps", 2))),
}


class Happened:
    """The sum of seeds of one play."""

    def __init__(self) -> None:
        self.seeds = self.acknowledged = 0
        self.seconds = 0.0
        self.done: Counter[str] = Counter()

    def add(self, found: Verdicts) -> None:
        self.seeds += 1
        self.acknowledged += found.operations - found.unknown - found.refused
        self.seconds += found.seconds
        self.done.update(found.done)

    @property
    def a_minute(self) -> float:
        return self.acknowledged * 60 / self.seconds if self.seconds else 0.0

    def too_little(self, play: str) -> str:
        """Of what there was too little; empty: of nothing."""
        least = LEAST.get(play, Least())
        if self.seeds < SEEDS_MIN:
            return ""
        if self.a_minute < least.a_minute:
            return f"{self.a_minute:.0f} operations were acknowledged a virtual minute, fewer than {least.a_minute}"
        if self.acknowledged < least.a_seed * self.seeds:
            return f"{self.acknowledged} operations were acknowledged, fewer than {least.a_seed} a seed"
        for what, few in least.done:
            if self.done[what] < few * self.seeds:
                return f"{self.done[what]} {what} in {self.seeds} seeds, fewer than {few} a seed"
        return ""

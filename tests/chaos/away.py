"""Which disks may be away at once so that the cluster keeps its promises: no majority of a partition, and no more of a
block than can be rebuilt. Pure.

A harness that takes away too much finds false faults, and one that takes too little finds nothing. So every fault asks
``Away.may`` first, and refusals are counted too.

Theory of operation: while layouts change, a partition has its replicas in one of the layouts, or on the way between
them, and is joint with the neighbour of that state. The harness does not know in which of these states it is. The disks
that all layouts have in common (*kept*) are in each of these states. The other places can have any of the remaining
disks. So with a set of disks away, the worst state has all kept disks of the set, and as many of the others as there
are other places.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import NamedTuple


class Block(NamedTuple):
    """A block needs ``k`` of its fragments. ``disks``: those of the fragments that can be read, without this fault."""

    k: int
    disks: tuple[str, ...]


def worst_loss(states: Sequence[Collection[str]], away: Collection[str]) -> int:
    """The most replicas that a partition can miss. ``states``: its replicas in each layout from which, or to which, it
    may be moving.
    """
    kept = set(states[0]).intersection(*states[1:])
    others = set().union(*states) - kept
    places = max(len(state) for state in states) - len(kept)
    return len(kept & set(away)) + min(places, len(others & set(away)))


def majorities_stay(partitions: Iterable[Sequence[Collection[str]]], away: Collection[str]) -> bool:
    """Whether each partition keeps a majority, wherever it is on its way."""
    return all(2 * worst_loss(states, away) < min(len(state) for state in states) for states in partitions)


def blocks_stay(blocks: Iterable[Block], away: Collection[str]) -> bool:
    """Whether each block keeps as many fragments as it needs."""
    return all(sum(disk not in away for disk in block.disks) >= block.k for block in blocks)


class Away:
    """The ledger of a run. ``played`` and ``skipped`` count faults by name.

    ``partitions``: the states of each partition, as in ``worst_loss``; ``begin_move`` adds those of a layout,
    ``end_move`` says that everything is where the last one wants it.
    """

    def __init__(self, replicas: Sequence[Collection[str]]) -> None:
        self._layouts: list[Sequence[Collection[str]]] = [replicas]
        self._away: dict[str, frozenset[str]] = {}
        self.played: Counter[str] = Counter()
        self.skipped: Counter[str] = Counter()

    @property
    def disks(self) -> frozenset[str]:
        """Those that are away now."""
        return frozenset().union(*self._away.values())

    def begin_move(self, replicas: Sequence[Collection[str]]) -> None:
        self._layouts.append(replicas)

    def end_move(self) -> None:
        """Disks that the last layout does not name may stay away for ever."""
        del self._layouts[:-1]

    def allows(self, disks: Collection[str], blocks: Iterable[Block]) -> bool:
        """Whether ``disks`` may go away too."""
        away = self.disks | set(disks)
        states = zip(*self._layouts, strict=True)
        return majorities_stay(states, away) and blocks_stay(blocks, away)

    def may(self, fault: str, disks: Collection[str], blocks: Iterable[Block]) -> bool:
        """``allows``, and counts the fault as played or skipped."""
        allowed = self.allows(disks, blocks)
        (self.played if allowed else self.skipped)[fault] += 1
        return allowed

    def take(self, name: str, disks: Collection[str]) -> None:
        """What is called ``name`` is away from now on."""
        self._away[name] = frozenset(disks)

    def back(self, name: str) -> None:
        self._away.pop(name, None)

    def document(self) -> Mapping[str, Mapping[str, int]]:
        return {"played": dict(self.played), "skipped": dict(self.skipped)}

"""A quorum as a value: which disks suffice to agree on something. Pure.

A register lives on one set of disks, and a majority of them is a quorum. While a layout changes it lives on two sets,
the old and the new one, and a quorum needs a majority of both. Two quorums of one value always share a disk of every
set: that is all that the consensus asks of them. Everything that counts answers counts with this value, so that nothing
else has to know how many sets there are.

``fewest`` is what keeps one set cheap: with fewer disks there is no quorum, whatever they are, so that callers compare
a length first and ask ``met`` once.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from typing import TypeVar

from msgspec import Struct

from storaged.cluster.voters import voting_sets

T = TypeVar("T", bound=Hashable)
V = TypeVar("V")


class Quorum:
    """Immutable. Equal when the sets are."""

    __slots__ = ("_others", "_set", "disks", "fewest", "sets", "single")

    disks: tuple[str, ...]
    """The disks of all sets, each once, in the order of the sets."""
    sets: tuple[tuple[str, ...], ...]
    fewest: int
    """The fewest disks that can be a quorum: the majority of the largest set."""
    single: bool
    """There is one set: ``fewest`` of its disks are a quorum, whichever they are."""

    def __init__(self, *sets: Sequence[str]) -> None:
        """Raises ValueError without a set, or with one that is empty or names a disk twice."""
        if not sets or not all(sets):
            raise ValueError("a quorum needs at least one set of disks, none of them empty")
        if any(len(frozenset(disks)) != len(disks) for disks in sets):
            raise ValueError("a set of disks names one twice")
        self.sets = tuple(map(tuple, sets))
        self.disks = self.sets[0] if len(sets) == 1 else tuple(dict.fromkeys(disk for disks in sets for disk in disks))
        self.fewest = max(len(disks) for disks in sets) // 2 + 1
        self.single = len(sets) == 1
        self._set = frozenset(sets[0])
        self._others = tuple(map(frozenset, sets[1:]))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Quorum) and self.sets == other.sets

    def __hash__(self) -> int:
        return hash(self.sets)

    def __repr__(self) -> str:
        return f"Quorum({', '.join(map(repr, self.sets))})"

    def met(self, disks: Collection[str]) -> bool:
        """Whether a majority of every set is among the disks. Disks of no set do not count."""
        if len(disks) < self.fewest or 2 * len(self._set.intersection(disks)) <= len(self._set):
            return False
        if self.single:
            return True
        return all(2 * len(members.intersection(disks)) > len(members) for members in self._others)

    def may_have_chosen(self, disks: Collection[str]) -> bool:
        """Whether these disks alone may have chosen something for a process of some state: a majority of one set is
        among them. Before the second set came the first one has chosen alone. A process that knows already that the
        second one is alone now takes for settled what its majority has.
        """
        return any(2 * len(members.intersection(disks)) > len(members) for members in (self._set, *self._others))

    def lost(self, failed: Collection[str]) -> bool:
        """Whether no quorum is left without the failed disks."""
        if 2 * len(self._set.intersection(failed)) >= len(self._set):
            return True
        if self.single:
            return False
        return any(2 * len(members.intersection(failed)) >= len(members) for members in self._others)

    def spare(self, disks: Collection[str]) -> int:
        """How many of the disks may go, whichever they are, before they are no quorum any more; negative: how many are
        missing."""
        return min(len(members.intersection(disks)) - len(members) // 2 - 1 for members in (self._set, *self._others))

    def prefix(self, order: Sequence[str]) -> Sequence[str]:
        """The shortest beginning of ``order`` that is a quorum; all of it when none is. ``order`` names disks of the
        sets, each once.
        """
        if self.single:
            return order[: self.fewest]
        for count in range(self.fewest, len(order)):
            if self.met(order[:count]):
                return order[:count]
        return order

    def agreed(self, reports: Mapping[str, T]) -> T | None:
        """The value that a quorum reports; None if there is none. Reports are never None."""
        if len(reports) < self.fewest:
            return None
        for candidate in dict.fromkeys(reports.values()):
            if self.met([disk for disk, report in reports.items() if report == candidate]):
                return candidate
        return None

    def vouched(self, counters: Mapping[str, int]) -> int:
        """The highest number that a majority of some set reports or exceeds; 0 when there is none. One set suffices to
        be in the way of a proposer, and a single replica never does.
        """
        for candidate in sorted(set(counters.values()), reverse=True):
            named = [disk for disk, counter in counters.items() if counter >= candidate]
            if any(2 * len(members.intersection(named)) > len(members) for members in (self._set, *self._others)):
                return candidate
        return 0


def met_by_all(quorums: Iterable[Quorum], disks: Collection[str]) -> bool:
    """Whether the disks hold a quorum of each."""
    return all(quorum.met(disks) for quorum in quorums)


class View(Struct, frozen=True):
    """Where the replicas of a register are, in one state of its partition (``cluster.partitions``).

    ``epoch`` of the ballots. ``positions``: of each of ``quorum.disks``, its place in the set that has it. So while
    there are two sets, the disk that comes has the position of the one that goes. A lost disk has a position, and is
    not in the quorum.
    """

    epoch: int
    quorum: Quorum
    positions: tuple[int, ...]

    @classmethod
    def of(cls, epoch: int, *sets: Sequence[str], lost: Collection[str] = ()) -> View:
        """Raises ValueError as ``Quorum``. ``lost``: disks that count in no quorum."""
        quorum = Quorum(*(voting_sets(sets, lost) if lost else sets))
        place = {disk: position for disks in reversed(sets) for position, disk in enumerate(disks)}
        return cls(epoch, quorum, tuple(place[disk] for disk in quorum.disks))

    def by_disk(self, by_position: Sequence[V]) -> Sequence[V]:
        """What belongs to each of ``quorum.disks``, of what is given for each position."""
        if not by_position or (self.quorum.single and len(by_position) == len(self.positions)):
            return by_position
        return [by_position[at] for at in self.positions]

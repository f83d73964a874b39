"""What should be where, and how bad it is when it is not. Pure: records and stats in, findings out.

A record says, for every block of every part, which disk holds which fragment. Asking the disks gives, for each fragment, one of

    OK        the disk has it, undamaged as far as it knows
    MISSING   the disk answers and does not have it, or its bytes do not match their checksum
    AWAY      the disk does not answer, or does not have it and takes no writes: nothing is known, nothing is deleted, and it is rebuilt elsewhere only when the block has no spare left
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

from storaged.cluster.layout import Layout, Profile
from storaged.fragments.ports import FragmentId
from storaged.objects.geometry import BlockShape, PartShape
from storaged.objects.place import COPIES, disks_of
from storaged.objects.records import PartEntry


class Presence(IntEnum):
    OK = 0
    MISSING = 1
    AWAY = 2


class BlockPlace(NamedTuple):
    """One block of a part and the disks its fragments belong on, in position order. ``run``: index into the entry's runs."""

    entry: PartEntry
    block: int
    profile: Profile
    disks: tuple[str, ...]
    run: int

    def fragment(self, position: int) -> FragmentId:
        return FragmentId(self.entry.data_id, self.block, self.profile.k, self.profile.m, position)

    @property
    def fragments(self) -> Iterator[tuple[FragmentId, str]]:
        return ((self.fragment(position), disk) for position, disk in enumerate(self.disks))

    @property
    def shape(self) -> BlockShape:
        return PartShape.of(self.entry).block(self.block)


def blocks_of(entry: PartEntry, partition: int, layout_at: Callable[[int], Layout], countries: Sequence[str]) -> Iterator[BlockPlace]:
    """Every block of a part; nothing for one kept in the record. ``partition``: of the register that refers to it, whose replicas hold small copies.

    Raises KeyError for an unknown layout epoch, ValueError for a run that no layout explains: records that this node must not judge.
    """
    if entry.inline:
        return
    for index, run in enumerate(entry.runs):
        if entry.small:
            yield BlockPlace(entry, 0, COPIES, layout_at(run.epoch).replicas_of(partition)[: COPIES.n], index)
            continue
        disks = disks_of(run, layout_at(run.epoch), entry.data_id, countries)
        for block in range(run.first, run.first + run.count):
            yield BlockPlace(entry, block, run.profile, disks, index)


class BlockHealth(NamedTuple):
    """``present``: fragments that can be read now. ``missing``: positions to rebuild where they are (their disks answer)."""

    place: BlockPlace
    present: int
    missing: tuple[int, ...]
    away: tuple[int, ...]

    @property
    def on_target(self) -> bool:
        return self.place.entry.small or self.place.profile == Profile.parse(self.place.entry.target)

    @property
    def whole(self) -> bool:
        return not self.missing and not self.away and self.on_target

    @property
    def readable(self) -> bool:
        return self.present >= self.place.profile.k

    @property
    def spare(self) -> int:
        """How many more fragments may go before the block can't be read; negative when it can't be now."""
        return self.present - self.place.profile.k


def judge_block(place: BlockPlace, presence: Mapping[tuple[FragmentId, str], Presence]) -> BlockHealth:
    """A fragment that was not asked about counts as away."""
    found: dict[Presence, list[int]] = {kind: [] for kind in Presence}
    for position, where in enumerate(place.fragments):
        found[presence.get(where, Presence.AWAY)].append(position)
    return BlockHealth(place, len(found[Presence.OK]), tuple(found[Presence.MISSING]), tuple(found[Presence.AWAY]))


@dataclass(frozen=True)
class Finding:
    """What is wrong with one object or part. ``spare`` is that of its worst block: repair takes the smallest first.

    ``mendable``: something can be done with the disks that answer; otherwise repair waits for disks to return.
    """

    name: bytes
    spare: int
    mendable: bool
    lost: bool
    damaged_fragments: int


def judge(name: bytes, blocks: Iterable[BlockHealth], recodable: Callable[[BlockHealth], bool]) -> Finding | None:
    """None when everything is as it should be. ``recodable``: whether the living disks can hold the block better than it is held."""
    worst, mendable, lost, damaged, hurt = 1 << 30, False, False, 0, False
    for health in blocks:
        if health.whole:
            continue
        hurt = True
        worst = min(worst, health.spare)
        damaged += len(health.missing)
        if not health.readable:
            lost = True
        elif health.missing or recodable(health):
            mendable = True
    return Finding(name, worst, mendable, lost, damaged) if hurt else None

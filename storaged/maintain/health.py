"""What should be where, and how bad it is when it is not. Pure: records and stats in, findings out.

A record names, for every block of every part, the disk that holds each fragment. The disks' answers make each fragment
one of

    OK        the disk has it, undamaged as far as it knows
    MISSING   the disk answers and does not have it, or its bytes do not match their checksum
    AWAY      the disk does not answer, or it does not have the fragment and takes no writes. Nothing is known, so
              nothing is deleted. The fragment is rebuilt elsewhere only after a delay, and only when the block has no
              spare left or other disks can hold all of it
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import NamedTuple

from storaged.cluster.layout import Layout, Profile
from storaged.cluster.ports import Layouts
from storaged.fragments.ports import FragmentId
from storaged.objects.code.geometry import BlockShape, PartShape
from storaged.objects.code.place import disks_of, first_choice, is_placed, keeps_operators, largest_share
from storaged.objects.records import PartEntry, Run


class Presence(IntEnum):
    """Of a fragment on the disk that should have it."""

    OK = 0
    MISSING = 1
    AWAY = 2


class BlockPlace(NamedTuple):
    """One block of a part and the disks of its fragments, in position order. ``target``: the profile that the layout in
    force wants it to have. ``spread``: no failure domain holds more of them than it may, and all are inside
    ``countries``, those of the bucket (none named: any). ``placed``: the layout in force wants them on these disks.
    ``gone``: it does not name one of them, so nothing waits for that.
    """

    entry: PartEntry
    block: int
    run: Run
    disks: tuple[str, ...]
    target: Profile
    spread: bool = True
    countries: tuple[str, ...] = ()
    placed: bool = True
    gone: bool = False

    @property
    def profile(self) -> Profile:
        return self.run.profile

    @property
    def whole_copy(self) -> bool:
        """Copies, or in the record itself; not coded."""
        return self.entry.small or bool(self.entry.inline)

    def fragment(self, position: int) -> FragmentId:
        return FragmentId(self.entry.data_id, self.block, self.run.k, self.run.m, position)

    @property
    def fragments(self) -> Iterator[tuple[FragmentId, str]]:
        return ((self.fragment(position), disk) for position, disk in enumerate(self.disks))

    @property
    def shape(self) -> BlockShape:
        return PartShape.of(self.entry).block(self.block)


def run_disks(
    entry: PartEntry, run: Run, partition: int, layouts: Layouts, countries: Sequence[str]
) -> tuple[str, ...]:
    """The disks of a run's fragments in position order. ``partition``: of the register that refers to it. Small copies
    are where its replicas are now. While it moves they are at those that it has; the mover looks after the one that
    comes.

    Raises KeyError for an unknown layout epoch, ValueError for a run that no layout explains: this node must not judge
    such a record. Raises as ``Layouts.partition``.
    """
    if not entry.small:
        return disks_of(run, layouts.at(run.epoch), entry.data_id, countries)
    return _copies_at(layouts.partition(partition).present, run)


def _copies_at(replicas: tuple[str, ...], run: Run) -> tuple[str, ...]:
    if len(replicas) < run.profile.n:
        raise ValueError(f"{run.profile.n} copies beside a register of {len(replicas)} replicas")
    return replicas[: run.profile.n]


def blocks_of(entry: PartEntry, partition: int, layouts: Layouts, countries: Sequence[str]) -> Iterator[BlockPlace]:
    """Every block of a part. A part that is kept in the record has none, but where no operator is trusted alone: then
    it is one without disks that should not be so. Raises as ``run_disks``.
    """
    current = layouts.current
    if entry.inline:
        if current.spreads:
            yield BlockPlace(entry, 0, Run(0, 1, 1, 0, current.epoch), (), current.target, placed=False)
        return
    for run in entry.runs:
        disks = run_disks(entry, run, partition, layouts, countries)
        spread = True
        if run.moved and not entry.small:
            layout = layouts.at(run.epoch)
            spread = _is_spread(layout, entry.data_id, run, disks, countries) and all(
                is_allowed(layout, disk, countries) for disk in run.moved.values()
            )
        placed = not current.spreads if entry.small else _is_placed(layouts, entry, run, disks, countries)
        gone = not entry.small and any(disk not in layouts.current.disk_by_id for disk in disks)
        for block in range(run.first, run.first + run.count):
            yield BlockPlace(entry, block, run, disks, layouts.current.target, spread, tuple(countries), placed, gone)


def _is_placed(layouts: Layouts, entry: PartEntry, run: Run, disks: Sequence[str], countries: Sequence[str]) -> bool:
    """What was written under the layout in force stays where it is: a write takes other disks only where it must. The
    same holds for layouts that place fragments alike (only the system partition moved between them), and in a cluster
    whose data never moved.
    """
    current = layouts.current
    if run.epoch == current.epoch or not current.base or layouts.at(run.epoch).placing == current.placing:
        return True
    return is_placed(current, entry.data_id, run.profile, disks, countries)


def is_allowed(layout: Layout, disk: str, countries: Sequence[str]) -> bool:
    """Whether fragments of a bucket of these countries may lie on a disk. True for a disk that the layout does not
    know: it can't be reached.
    """
    country = layout.country_by_disk.get(disk)
    return country is None or (layout.allows(country) and (not countries or country in countries))


def _is_spread(layout: Layout, data_id: bytes, run: Run, disks: Sequence[str], countries: Sequence[str]) -> bool:
    """Whether at most m fragments are in one domain, or, in a layout with too few domains for that, no more than in the
    first choice.
    """
    if not keeps_operators(layout, run.profile, disks):
        return False
    share = largest_share(layout, disks)
    return share <= run.m or share <= largest_share(layout, first_choice(layout, data_id, run.profile, countries))


def claims(
    entry: PartEntry, fragment: FragmentId, disk: str, partition: int, layouts: Layouts, countries: Sequence[str]
) -> bool:
    """Whether a part names this very fragment on this disk. While a partition moves, small copies belong to the disk
    that goes and to the one that comes. Raises as ``run_disks``.
    """
    if entry.data_id != fragment.data_id or entry.inline:
        return False
    for run in entry.runs:
        if run.first <= fragment.block < run.first + run.count and (run.k, run.m) == (fragment.k, fragment.m):
            if entry.small:
                places = [_copies_at(replicas, run) for replicas in layouts.partition(partition).sets]
            else:
                places = [run_disks(entry, run, partition, layouts, countries)]
            return any(disks[fragment.position : fragment.position + 1] == (disk,) for disks in places)
    return False


class BlockHealth(NamedTuple):
    """Positions of a block's fragments. ``present``: can be read now. ``missing``: to be rebuilt in place, for their
    disks answer. ``away``: nothing is known; ``unheard`` are those of them whose disks did not answer.
    """

    place: BlockPlace
    present: tuple[int, ...]
    missing: tuple[int, ...]
    away: tuple[int, ...]
    unheard: tuple[int, ...] = ()

    @property
    def on_target(self) -> bool:
        place = self.place
        return place.placed if place.whole_copy else place.spread and place.profile == place.target

    @property
    def as_written(self) -> bool:
        """It has the target of the time when it was written: if that is another one now, only space or safety beyond
        the old target is to be gained.
        """
        place = self.place
        written = place.whole_copy or (place.spread and place.profile == Profile.parse(place.entry.target))
        return self.on_target or written

    @property
    def whole(self) -> bool:
        return not self.missing and not self.away and self.as_written

    @property
    def outdated(self) -> bool:
        """Nothing is wrong with it, but the target has changed since it was written."""
        return self.whole and not self.on_target

    @property
    def misplaced(self) -> bool:
        """Nothing is wrong with it, but the layout in force wants it elsewhere, or under another profile."""
        return self.whole and not (self.place.placed and self.on_target)

    @property
    def readable(self) -> bool:
        return self.spare >= 0

    @property
    def spare(self) -> int:
        """How many more fragments may be lost before the block can't be read; negative when it can't be read now. Data
        fragments that a short block does not reach need no disk.
        """
        return self._spare_with(self.present)

    @property
    def away_bytes(self) -> int:
        """Of the fragments whose disks are away."""
        if not self.away:
            return 0
        profile, shape = self.place.profile, self.place.shape
        return sum(shape.fragment_length(profile, position) for position in self.away)

    @property
    def spare_at_best(self) -> int:
        """The same, if every disk that is away came back with what it should have. Negative: the block is lost, not
        only unreadable for a time.
        """
        return self._spare_with((*self.present, *self.away))

    def _spare_with(self, present: Sequence[int]) -> int:
        if self.place.entry.inline:
            return self.place.target.m  # each replica of the record has it
        profile, count = self.place.profile, len(present)
        if profile.k > 1:
            shape = self.place.shape
            if shape.cells < profile.k:
                count += sum(position not in present for position in range(shape.cells, profile.k))
        return count - profile.k


def judge_block(place: BlockPlace, presence: Mapping[tuple[FragmentId, str], Presence]) -> BlockHealth:
    """A fragment without an answer counts as away."""
    found: dict[Presence, list[int]] = {kind: [] for kind in Presence}
    unheard: list[int] = []
    for position, where in enumerate(place.fragments):
        kind = presence.get(where)
        if kind is None:
            unheard.append(position)
            kind = Presence.AWAY
        found[kind].append(position)
    present, missing, away = found[Presence.OK], found[Presence.MISSING], found[Presence.AWAY]
    return BlockHealth(place, tuple(present), tuple(missing), tuple(away), tuple(unheard))


class DisksNow(NamedTuple):
    """Which disks can be used now. ``taking``: those of the ``writable`` ones that are not left out for being slow."""

    readable: frozenset[str]
    writable: frozenset[str]
    taking: frozenset[str]


Cause = tuple[str, str | frozenset[str]]
"""A change of disks, after which a register may be judged otherwise: its kind, and a disk or a set of them."""

_UNHEARD, _UNWRITABLE, _NO_ROOM = "unheard", "unwritable", "no room"


def is_met(cause: Cause, disks: DisksNow) -> bool:
    """Whether this change has happened, where these ``disks`` can be used now."""
    kind, by = cause
    if kind == _UNHEARD:
        return by in disks.readable
    if kind == _UNWRITABLE:
        return by in disks.writable
    return by != disks.taking


class Room(NamedTuple):
    """Whether the disks that new fragments go to now (``taking``) can hold a block at its target."""

    can_hold_target: bool
    taking: frozenset[str]


@dataclass(frozen=True, slots=True)
class Finding:
    """What is wrong with one object or part. ``spare``: of its worst block, or page of its manifest; repair takes the
    smallest first.

    ``repairable``: the disks that answer suffice to do something. ``recodable``: they do once the others have been away
    for long. Otherwise repair waits for disks to return. ``lost``: it can't be read even if all of them do.
    ``misplaced``: nothing is wrong, but the layout in force wants some of it elsewhere, or under another profile;
    ``outdated``: the latter. ``away_bytes``, ``copy_bytes``: of the fragments, and of the small copies, whose disks are
    away.

    What it was judged by: ``unheard`` disks did not answer; ``unwritable`` ones lack a fragment, and took no writes.
    ``no_room``: the disks that new fragments went to, where they could not hold the target; None where they could.
    """

    name: bytes
    spare: int
    repairable: bool
    recodable: bool
    lost: bool
    damaged_fragments: int
    misplaced: bool = False
    outdated: bool = False
    unheard: tuple[str, ...] = ()
    unwritable: tuple[str, ...] = ()
    no_room: frozenset[str] | None = None
    away_bytes: int = 0
    copy_bytes: int = 0

    def is_alike(self, before: Finding) -> bool:
        """Whether the same is wrong, whatever disks there are for new fragments."""
        return replace(self, no_room=None) == replace(before, no_room=None)

    def may_have_changed(self, disks: DisksNow) -> bool:
        """Whether it may be judged otherwise by the ``disks`` that can be used now. Disks may have been away for so
        short a time that no walk began when they came back.
        """
        return any(is_met(cause, disks) for cause in self.causes())

    def causes(self) -> tuple[Cause, ...]:
        """Changes of disks that call for another judgement: an ``unheard`` disk can be read, an ``unwritable`` one
        takes writes, other disks than those of ``no_room`` take new fragments.
        """
        found: list[Cause] = [(_UNHEARD, disk) for disk in self.unheard]
        found += [(_UNWRITABLE, disk) for disk in self.unwritable]
        if self.no_room is not None:
            found.append((_NO_ROOM, self.no_room))
        return tuple(found)


class Tally:
    """Adds up the blocks of one register, and makes the finding."""

    __slots__ = (
        "_away_bytes",
        "_below_target",
        "_copy_bytes",
        "_damaged",
        "_lost",
        "_misplaced",
        "_movable",
        "_no_room",
        "_outdated",
        "_recodable",
        "_repairable",
        "_unheard",
        "_unwritable",
        "_worst",
        "name",
    )

    def __init__(self, name: bytes) -> None:
        self.name = name
        self._worst = 1 << 30
        self._below_target = self._repairable = self._recodable = self._lost = False
        self._damaged = self._away_bytes = self._copy_bytes = 0
        self._misplaced = self._movable = self._outdated = False
        self._unheard: set[str] = set()
        self._unwritable: set[str] = set()
        self._no_room: frozenset[str] | None = None

    def add(self, health: BlockHealth, room: Room) -> None:
        """``room``: whether the disks that take writes can hold the block at its target."""
        can_hold_target = room.can_hold_target
        self._note_disks(health, room)
        if health.whole:
            if health.misplaced:
                self._misplaced = True
                self._outdated = self._outdated or health.outdated
                self._movable = self._movable or can_hold_target or not health.outdated
                self._worst = min(self._worst, health.spare)
            return
        self._below_target = True
        spare = health.spare
        self._worst = min(self._worst, spare)
        self._damaged += len(health.missing)
        if health.place.entry.small:
            self._copy_bytes += health.away_bytes
        else:
            self._away_bytes += health.away_bytes
        if spare < 0:
            self._lost = self._lost or health.spare_at_best < 0
        elif health.missing or (can_hold_target and not health.as_written):
            self._repairable = True
        elif health.away and not health.place.entry.small and (spare == 0 or can_hold_target):
            self._repairable = self._repairable or health.place.gone
            self._recodable = True

    def _note_disks(self, health: BlockHealth, room: Room) -> None:
        for position in health.away:
            (self._unheard if position in health.unheard else self._unwritable).add(health.place.disks[position])
        if not room.can_hold_target and not health.place.entry.small:
            # Where blocks were judged by different disks, it is certain that others can be used now.
            same = self._no_room is None or self._no_room == room.taking
            self._no_room = room.taking if same else frozenset()

    def add_page(self, have: int, lacking: int) -> None:
        """Adds a page of a manifest. ``have``: replicas that answer and have it; ``lacking``: that answer and do
        not.
        """
        if lacking:
            self._below_target = True
            self._worst = min(self._worst, have - 1)
            self._damaged += lacking
            self._repairable = self._repairable or have > 0
            self._lost = self._lost or not have

    def add_unreadable_record(self) -> None:
        """The record, or a page of its manifest, is itself lost."""
        self._below_target = self._lost = True
        self._worst = min(self._worst, -1)

    def finding(self) -> Finding | None:
        """None when everything is on target."""
        if not self._below_target:
            if not self._misplaced:
                return None
            return Finding(
                self.name,
                self._worst,
                self._movable,
                recodable=False,
                lost=False,
                damaged_fragments=0,
                misplaced=True,
                outdated=self._outdated,
                no_room=self._no_room,
            )
        return Finding(
            self.name,
            self._worst,
            self._repairable,
            self._recodable,
            self._lost,
            self._damaged,
            unheard=tuple(sorted(self._unheard)),
            unwritable=tuple(sorted(self._unwritable)),
            no_room=self._no_room,
            away_bytes=self._away_bytes,
            copy_bytes=self._copy_bytes,
        )

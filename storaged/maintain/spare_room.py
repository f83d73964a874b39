"""Whether the disks that are left have room for what the disks that are away had (``cluster.sparing``). Pure.

Theory of operation
    What has to be written anew is counted, not guessed from how full a disk was: the check sums the fragments that lie
    on disks that are away, and the rows and small copies of partitions, in the records that it walks
    (``MaintainStatus``). So the numbers get smaller as work goes on, and are right after a restart. While a node has
    not counted, what the disks that are away reported last is the bound.

    *Fragments.* They are laid out as placement would (``place.replaced``): under the profile of the layout, within the
    limits of failure domains and operators, on disks with room left; where one disk is full the next in rank comes.
    What finds no place is short. The groups in the sample stand for all. Where disks of any size would not hold the
    profile, as with two of three racks, blocks are written whole under a weaker one, and that is laid out.

    *Partitions.* The layout without the disks that are out names one disk for each, which takes it or not.

    A disk takes what is free outside of its reserve, but for a margin (``MARGIN_PART``) that stays for what clients
    write meanwhile. So sparing pauses before it fills a disk, also when clients have taken the room in the middle: the
    same judgement is made again every few seconds. Work that is done lowers what is needed and what is free alike, so
    it changes no verdict.

    This is judged for the whole cluster. Where only the disks in the countries of some buckets lack room, the data of
    these buckets is written as far as there is room there, and ``status`` says why the rest is not.

    Free room and counts come from other nodes: they are late, and may be false. A node can only keep others from using
    its own disks, or send them to disks that refuse. Its counts are bounded by what the disks that are away reported,
    and of the sizes of partitions the median counts. A wrong verdict costs moves, or delays them.

    Blocks without a spare are written anew all the same, as far as there is room: one more failure would lose them. The
    margin stays for them, too, so no disk gets full by that, and clients go on writing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from statistics import median
from typing import NamedTuple, Protocol

from storaged.cluster.layout import Layout, placement_group
from storaged.cluster.partitions import PartitionState
from storaged.cluster.ports import DiskStatus
from storaged.errors import ServiceUnavailable
from storaged.ids import DATA_ID_BYTES
from storaged.objects.code.place import Placement, choose, first_choice, replaced
from storaged.units import MIB

MARGIN_PART = 50
"""One part in this many of a disk stays free besides the reserve: 2%."""

MARGIN_BYTES_MIN = 8 * MIB
"""The margin of a small disk: several nodes may write to it before its next heartbeat."""

SAMPLES = 256
"""Fragments that are laid out, each for its share of all."""

UNKNOWN_BYTES = -1
"""Of a count that no complete walk has made yet."""

_GROUPS = placement_group(b"\xff\xff") + 1
_STRIDE = 1031
"""Odd, so that steps of it reach each group."""


class Counts(Protocol):
    """What a node has counted (``service.MaintainStatus``)."""

    @property
    def away_bytes(self) -> int: ...

    @property
    def partition_bytes(self) -> int: ...


class Shortage(NamedTuple):
    """``needed_bytes``: of fragments that have to be written anew. ``short_bytes``: of those that find no place; 0 when
    all do.
    """

    needed_bytes: int = 0
    short_bytes: int = 0


ENOUGH = Shortage()


def free_for_spares(reports: Mapping[str, DiskStatus], takes: Callable[[str], bool]) -> dict[str, int]:
    """Bytes that each disk may get. ``takes(disk)``: it takes new fragments now."""
    return {disk: max(0, found.bytes_free - _margin(found)) for disk, found in reports.items() if takes(disk)}


def _margin(disk: DiskStatus) -> int:
    return max((disk.bytes_used + disk.bytes_free) // MARGIN_PART, MARGIN_BYTES_MIN)


def needed_bytes(
    layout: Layout, gone: frozenset[str], reports: Mapping[str, DiskStatus], counts: Iterable[Counts]
) -> int:
    """Of the fragments that have to be written anew. ``gone``: the disks that can't be read; ``counts``: of all nodes
    that answer.
    """
    each = [found.away_bytes for found in counts]
    known = [found for found in each if found >= 0]  # not UNKNOWN_BYTES, nor a lie that hides what others have counted
    bound = sum(_used_by(disk, layout, gone, reports) for disk in gone)
    rest = bound * (len(each) - len(known)) // len(each) if each else bound
    return min(sum(known) + rest, bound)


def _used_by(disk: str, layout: Layout, gone: frozenset[str], reports: Mapping[str, DiskStatus]) -> int:
    """What a disk reported last. Where this process has not heard that, it had its share."""
    heard = reports.get(disk)
    if heard is not None and heard.bytes_used > 0:
        return heard.bytes_used
    known = layout.disk_by_id
    shares = [
        max(0, reports[one.id].bytes_used) / max(one.weight, 1)
        for one in layout.disks
        if one.id in reports and one.id not in gone
    ]
    return int(median(shares) * max(known[disk].weight, 1)) if shares and disk in known else 0


def shortage_of(layout: Layout, gone: Collection[str], free: Mapping[str, int], needed: int) -> Shortage:
    """Lays ``needed`` bytes of fragments of the disks that are ``gone`` out on those that have room."""
    if not needed or not gone:
        return ENOUGH
    cases = list(_cases(layout, gone, free))
    if not cases:
        return Shortage(needed, _short_of_weaker(layout, gone, free, needed))
    unit = max(1, needed // sum(count for _, count in cases))
    left, short = dict(free), 0
    for group, count in cases:
        found = replaced(layout, group, layout.target, lambda disk, first: _takes(disk, first, left, gone, unit))
        if found is None:
            short += count * unit
        for disk in found or ():
            left[disk] -= unit
    return Shortage(needed, short)


def _short_of_weaker(layout: Layout, gone: Collection[str], free: Mapping[str, int], needed: int) -> int:
    """How many of the bytes find no place, where blocks are written whole under what disks of any size can hold."""
    target, cases = layout.target, list[tuple[bytes, int]]()
    for number in range(SAMPLES):
        data_id = (number * _GROUPS // SAMPLES << 4).to_bytes(2, "big") + bytes(DATA_ID_BYTES - 2)
        found = _chosen(layout, data_id, free, 0)
        if found is not None and (lost := sum(disk in gone for disk in first_choice(layout, data_id, target))):
            cases.append((data_id, lost))
    unit = needed // max(1, sum(lost for _, lost in cases))
    left, short = dict(free), 0
    for data_id, lost in cases:
        found = _chosen(layout, data_id, left, unit * target.k)
        if found is None:
            short += lost * unit
        else:
            for disk in found.disks:
                left[disk] -= unit * target.k // found.profile.k
    return short


def _chosen(layout: Layout, data_id: bytes, left: Mapping[str, int], block: int) -> Placement | None:
    """Where a block goes, among disks that have room for all of it: its fragments may be copies."""
    try:
        return choose(layout, data_id, layout.target, lambda disk: left.get(disk, -1) >= block)
    except ServiceUnavailable:
        return None


def takes_some(layout: Layout, gone: Collection[str], free: Mapping[str, int]) -> bool:
    """Whether some blocks find places, though others don't."""
    if not any(True for _ in _cases(layout, gone, free)):
        return _chosen(layout, bytes(DATA_ID_BYTES), free, 1) is not None
    return any(
        replaced(layout, group, layout.target, lambda disk, first: _takes(disk, first, free, gone, 1)) is not None
        for group, _ in _cases(layout, gone, free)
    )


def _takes(disk: str, first: bool, left: Mapping[str, int], gone: Collection[str], unit: int) -> bool:
    """A first choice that answers keeps its fragment, however full it is."""
    return disk not in gone if first else left.get(disk, 0) >= unit


def _cases(layout: Layout, gone: Collection[str], free: Mapping[str, int]) -> Iterable[tuple[int, int]]:
    """(group, how many of its fragments have to be replaced), where disks of any size could replace them."""
    found = 0
    for number in range(_GROUPS):
        group = number * _STRIDE % _GROUPS
        places = replaced(layout, group, layout.target, lambda disk, first: disk not in gone if first else disk in free)
        if places:
            yield group, len(places)
            found += len(places)
            if found >= SAMPLES:
                return


# --- partitions


def bytes_of_partition(counts: Iterable[Counts]) -> int:
    """What one replica of a partition takes, about. 0 while no node has counted."""
    known = [found.partition_bytes for found in counts if found.partition_bytes >= 0]
    return int(median(known)) if known else 0


def disks_short(
    layout: Layout, states: Iterable[PartitionState], out: frozenset[str], free: Mapping[str, int], each: int
) -> dict[str, int]:
    """The disks that can't take all partitions that would come to them for those that are ``out``, and how many bytes
    each lacks. ``layout``: without these. ``each``: bytes of a partition.
    """
    gets = Counter[str]()
    for state in states:
        if not out.isdisjoint(state.present):
            gets.update(set(layout.replicas_of(state.partition)).difference(state.present))
    return {
        disk: count * each - free.get(disk, 0)
        for disk, count in sorted(gets.items())
        if disk in free and count * each > free[disk]
    }

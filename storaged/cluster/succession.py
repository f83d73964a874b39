"""Which layout may follow another: the rules of the history of layouts. Pure.

Theory of operation. A layout names its predecessor by hash. One that moves nothing (``cluster.moves``) is used for its
signature alone: so addresses can be mended while no quorum answers. One that moves data is used only when a majority of
the predecessor's seed disks accepted it (``cluster.certificates``). Two of them after the same predecessor can't both
be accepted.

Layouts that move data have epochs of their own: multiples of ``GENERATION``. Those that move nothing get the numbers
between. So a layout that was decided is never mistaken for one that two administrators signed at the same time and that
moved nothing, and it outranks that one. This matters because records name the epoch under which they were written.

The system partition can't keep its state in itself, so the layouts carry it: ``seeds``, ``seeds_next`` while it moves,
and ``seeds_step``. One seed is exchanged at a time, through a joint layout, as for every partition
(``cluster.partitions``).
"""

from __future__ import annotations

from storaged.cluster.layout import Layout, problems_of
from storaged.cluster.moves import Moves, moves_between
from storaged.cluster.spread import minority_of
from storaged.errors import LayoutRefused

GENERATION = 100


def next_epoch(after: int, *, moving: bool) -> int:
    """The epoch of the next layout. ``after``: the highest one that was signed."""
    if moving:
        return (after // GENERATION + 1) * GENERATION
    return after + 1 if (after + 1) % GENERATION else after + 2


def is_numbered_as_moving(layout: Layout) -> bool:
    """Whether its epoch and base say that it moves data. ``check_successor`` refuses a layout that moves data and does
    not say so.
    """
    return bool(layout.base) and layout.epoch % GENERATION == 0


def base_after(before: Layout) -> int:
    """``Layout.base`` of a layout that moves data and follows ``before``."""
    return before.base or before.epoch


def check_profile(before: Layout, after: Layout) -> None:
    """Raises LayoutRefused, with the numbers, for a change of the target profile to one that the layout can't hold. The
    signature alone is enough for such a layout: nothing moves, since records name the profile of what they refer to.
    """
    if after.profile != before.profile and (problems := problems_of(after)):
        raise LayoutRefused(f"Layout {after.epoch} can't work: {'; '.join(problems)}.")


def check_successor(before: Layout, before_hash: bytes, after: Layout) -> Moves:
    """Checks a layout against the one that it follows. Returns what it moves. Raises LayoutRefused, with the rule that
    it breaks.
    """
    name = f"Layout {after.epoch}"
    if after.epoch <= before.epoch:
        raise LayoutRefused(f"{name} does not follow layout {before.epoch}: its epoch must be higher.")
    moves = moves_between(before, after)
    if after.predecessor != before_hash and (moves or after.predecessor):
        raise LayoutRefused(f"{name} does not name layout {before.epoch} as the one that it follows.")
    if not moves:
        if is_numbered_as_moving(after):
            raise LayoutRefused(f"{name} is numbered like a layout that moves data, and moves none.")
        check_profile(before, after)
        return moves
    if after.epoch % GENERATION:
        raise LayoutRefused(f"{name} moves data. The epochs of such layouts are multiples of {GENERATION}.")
    if after.base != base_after(before):
        raise LayoutRefused(
            f"{name} places keys that never moved by layout {after.base or after.epoch}. They are where layout"
            f" {base_after(before)} placed them."
        )
    if after.replicas != before.replicas:
        raise LayoutRefused(
            f"{name} changes the replicas of a partition from {before.replicas} to {after.replicas}. This release can't"
            " do that."
        )
    if len(after.disk_by_id) != len(after.disks) or len(after.node_by_name) != len(after.nodes):
        raise LayoutRefused(f"{name} names a disk or a node twice.")
    _check_lost(name, before, after)
    _check_seeds(name, before, after)
    if problems := problems_of(after):
        raise LayoutRefused(f"{name} can't work: {'; '.join(problems)}.")
    return moves


def _check_lost(name: str, before: Layout, after: Layout) -> None:
    """Lost disks stay lost: partitions have gone on without them. Raises LayoutRefused."""
    if not set(before.lost) <= set(after.lost):
        raise LayoutRefused(f"{name} no longer says that disks are lost which layout {before.epoch} calls lost.")
    active = [disk.id for disk in after.disks if disk.id in after.lost and disk.state == "active"]
    if active:
        raise LayoutRefused(f"{name} gives data to disk {active[0]}, which it calls lost for good.")
    known = {disk.id for disk in before.disks} | set(before.lost)
    if unknown := [disk for disk in after.lost if disk not in known]:
        raise LayoutRefused(f"{name} calls disk {unknown[0]} lost, which layout {before.epoch} does not have.")


def _check_seeds(name: str, before: Layout, after: Layout) -> None:
    now = (after.seeds, after.seeds_next, after.seeds_step)
    if now == (before.seeds, before.seeds_next, before.seeds_step):
        return
    if after.seeds_step != before.seeds_step + 1:
        raise LayoutRefused(
            f"{name} has step {after.seeds_step} of the seed disks. Layout {before.epoch} has {before.seeds_step}; the"
            " next is one higher."
        )
    if before.seeds_next:
        if after.seeds not in (before.seeds, before.seeds_next) or after.seeds_next:
            raise LayoutRefused(f"{name}: the exchange of a seed disk ends in one of the two sets, before another one.")
        return
    exchanged = [pair for pair in zip(before.seeds, after.seeds_next, strict=False) if pair[0] != pair[1]]
    if after.seeds != before.seeds or len(after.seeds_next) != len(before.seeds) or len(exchanged) != 1:
        raise LayoutRefused(
            f"{name}: seed disks change one at a time. A layout names the old ones and those with one exchanged; the"
            " next layout names the new ones alone."
        )
    if len(set(after.seeds_next)) != len(after.seeds_next):
        raise LayoutRefused(f"{name} names a seed disk twice.")


def exchanged_seeds(before: Layout, old: str, after: Layout) -> tuple[str, ...]:
    """The seeds of ``before`` with ``old`` exchanged for a disk of ``after``: of the same failure domain where there is
    one, else of a domain without a seed. Raises LayoutRefused when there is none.
    """
    domains, seeds = after.domain_by_disk, before.seeds
    home = before.domain_by_disk.get(old)
    taken = {domains[seed] for seed in seeds if seed != old and seed in domains}
    free = [disk for disk in after.disks if disk.state == "active" and disk.id not in seeds]
    free = [disk for disk in free if domains[disk.id] not in taken]
    if after.spreads:  # no operator gets a majority, or more of one than it has
        stay = [seed for seed in seeds if seed != old]
        at_most = max(minority_of(len(seeds)), after.operator_share(seeds))
        free = [disk for disk in free if after.operator_share([*stay, disk.id]) <= at_most]
        free = [disk for disk in free if after.operator_share([*stay, disk.id]) <= after.operator_share(stay)] or free
    if not free:
        raise LayoutRefused(
            f"No disk can take the place of seed disk {old}: each {after.domain_kind} with another disk has a seed"
            f" already{', or its operator would have a majority of them' if after.spreads else ''}."
        )
    rank = {disk: place for place, disk in enumerate(after.preference(0))}
    new = min(free, key=lambda disk: (domains[disk.id] != home, rank[disk.id])).id
    return tuple(new if seed == old else seed for seed in seeds)

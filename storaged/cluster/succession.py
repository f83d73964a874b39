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

Recovery of the system partition: the majority of the seed disks is lost for good
    Nothing can be decided then: the register ``layout`` has no quorum, nor has a layout a majority of acceptances. The
    administrator says which disks are lost (``Layout.lost``), and signs a layout by which the system partition goes on
    from the seed disks that are left, at a later step (``cluster.partitions``: "Recovery"). It names the lost seed
    disks (``seeds_lost``), which count in no quorum any more. The next layouts exchange them one by one, as ever.

    1. *Its certificate* has the acceptances of all seed disks that are left. Each node signs one successor only, so no
       two such layouts have one. The register is not asked: it can't answer, and a node refuses to accept while it
       does (``node.recovering``). A gateway asks the nodes in the order of their names, one after the other. So two
       administrators do not each get a part of the acceptances: the first node decides.
    2. *A layout that was decided before*, and that lacks its certificate, is dead: a node that promised it may accept
       the recovery instead. Perhaps the lost nodes alone gave it a certificate, and a process uses it that no other one
       sees now. This process goes a way of its own, and can't come back: it refuses the recovery, and the others refuse
       what it has. It does no harm: a quorum of that layout has a lost disk, or all disks that are left, which the
       recovery asks, too. What was decided and not seen is lost.
    3. *A node dies while it recovers*: a node accepts another recovery instead only if that calls all disks lost that
       the first one does, and one of its seed disks more. If the first one has a certificate, its quorums have this
       disk, and it is off: nothing more happens by that layout. A process that uses it follows the other one.
    4. *No quorum of an earlier step is left*: it has a lost disk. So the lost disks are powered off for ever. If one
       comes back, no node that knows the recovery helps it: its ledger refuses what the lost disk claims, and a disk
       takes part only with a majority of the ledgers (``cluster.claims``). Its own node refuses it when it learns the
       layout, and its acceptances count no more.
    5. *Ledgers* of nodes whose disks are all lost do not count any more, or no disk could be opened again. What such
       ledgers alone knew of a disk is forgotten. So a disk that a layout before the recovery named does not begin
       blank (``node.opener``): the claims on it may be lost.
    6. *What is lost*: values of system registers that the lost seed disks alone had. For each register the newest value
       of the disks that are left counts, also where it was never chosen. Records of where partitions are fall back,
       too; a gateway that knows a later one writes it again (``node.partition_follower``).
"""

from __future__ import annotations

from collections.abc import Collection

from msgspec.structs import replace

from storaged.cluster.layout import SYSTEM_PARTITION, Layout, problems_of
from storaged.cluster.moves import Moves, moves_between
from storaged.cluster.partitions import PartitionRecord, recovery_of, state_of
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
    if after.if_out:
        _check_beforehand(name, before, after)
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


def _check_beforehand(name: str, before: Layout, after: Layout) -> None:
    """A layout that was signed beforehand exchanges the disk that it names, and nothing else (``cluster.presigned``).
    Raises LayoutRefused.
    """
    going = [old for old, new in zip(before.seeds, after.seeds_next, strict=False) if old != new]
    if before.seeds_next or going != [after.if_out]:
        raise LayoutRefused(f"{name} was signed for the loss of seed disk {after.if_out}, and does not exchange it.")
    own = {field: getattr(after, field) for field in ("epoch", "predecessor", "base", "seeds_next", "seeds_step")}
    if replace(before, **own, if_out=after.if_out) != after:
        raise LayoutRefused(f"{name} was signed for the loss of seed disk {after.if_out}, and changes more than that.")


def recovers(layout: Layout) -> bool:
    """Whether by this layout the system partition goes on without a quorum."""
    return bool(layout.epoch) and layout.seeds_recovered == layout.epoch


def recovered_seeds(before: Layout, lost: Collection[str]) -> PartitionRecord | None:
    """Where the system partition goes on when these disks are lost, too; None while it has a quorum, and where no seed
    disk is left.
    """
    assumed = replace(before, lost=tuple(dict.fromkeys((*before.lost, *lost))))
    return recovery_of(state_of(SYSTEM_PARTITION, None, before, before), assumed)


def outranks(after: Layout, seeds_lost: Collection[str]) -> bool:
    """Whether a node accepts the recovery ``after`` although it has promised another layout after the same predecessor:
    one that recovers nothing (no ``seeds_lost``), or a recovery that calls fewer seed disks lost.
    """
    return recovers(after) and set(seeds_lost) < set(after.seeds_lost)


def follows_instead(current: Layout, after: Layout) -> bool:
    """Whether a process that uses ``current`` uses ``after`` in its place: both recover the same predecessor."""
    same = recovers(current) and current.predecessor == after.predecessor and after.epoch > current.epoch
    return same and outranks(after, current.seeds_lost)


def _check_recovered(name: str, before: Layout, after: Layout) -> None:
    wanted = recovered_seeds(before, after.lost)
    if wanted is None:
        raise LayoutRefused(
            f"{name} recovers the system partition, and layout {before.epoch} has a quorum of its seed disks, or none"
            " of them is left. Exchange seed disks one at a time while there is a quorum."
        )
    found = PartitionRecord(
        SYSTEM_PARTITION, after.seeds_step, after.seeds, after.seeds_next, wanted.layout, lost=after.seeds_lost
    )
    if found != wanted:
        raise LayoutRefused(f"{name} does not recover the system partition as the rules say: {_said(wanted)}.")
    if after.seeds_recovered != after.epoch:
        raise LayoutRefused(f"{name} does not say that it recovers the system partition.")
    if named := [disk for disk in after.seeds_lost if disk in after.disk_by_id]:
        raise LayoutRefused(f"{name} still has disk {named[0]}, which it calls lost.")


def _said(wanted: PartitionRecord) -> str:
    sets = " and ".join(", ".join(disks) for disks in (wanted.present, wanted.coming) if disks)
    return f"step {wanted.step}, of {sets}, without {', '.join(wanted.lost)}"


def _check_seeds(name: str, before: Layout, after: Layout) -> None:
    if set(after.seeds_lost) - set(before.seeds_lost) or recovers(after):
        _check_recovered(name, before, after)
        return
    if after.seeds_recovered != before.seeds_recovered:
        raise LayoutRefused(f"{name} does not recover the system partition, and says that a layout did.")
    kept = tuple(disk for disk in before.seeds_lost if disk in (*after.seeds, *after.seeds_next))
    if after.seeds_lost != kept:
        raise LayoutRefused(f"{name}: lost seed disks are those of layout {before.epoch} that were not exchanged.")
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
    if exchanged[0][1] in after.lost:
        raise LayoutRefused(f"{name} makes disk {exchanged[0][1]} a seed disk, which it calls lost.")


def seed_candidates(before: Layout, old: str, after: Layout) -> list[str]:
    """The disks of ``after`` that may take the place of seed ``old`` of ``before``, best first: those of the same
    failure domain, then those of domains without a seed.
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
    rank = {disk: place for place, disk in enumerate(after.preference(0))}
    return [disk.id for disk in sorted(free, key=lambda disk: (domains[disk.id] != home, rank[disk.id]))]


def exchanged_seeds(before: Layout, old: str, after: Layout) -> tuple[str, ...]:
    """The seeds of ``before`` with ``old`` exchanged for the best disk of ``after``. Raises LayoutRefused when there is
    none.
    """
    found = seed_candidates(before, old, after)
    if not found:
        raise LayoutRefused(
            f"No disk can take the place of seed disk {old}: each {after.domain_kind} with another disk has a seed"
            f" already{', or its operator would have a majority of them' if after.spreads else ''}."
        )
    return tuple(found[0] if seed == old else seed for seed in before.seeds)

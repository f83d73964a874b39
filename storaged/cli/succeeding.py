"""Makes the layouts that follow the last one, from the list of nodes and disks (``cli.create``). Pure.

A change that moves nothing makes one layout. A change that moves data makes one, and two more for each seed disk that
goes: a joint layout, in which the seed is exchanged and its disk only gives up what it has, and one that settles
(``cluster.succession``). Where a majority of the seed disks is lost for good, one that goes on without them comes
first. They are applied one after the other.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence

from msgspec.structs import replace

from storaged.cli.create import ClusterPlan, layout_of, planned
from storaged.cluster.layout import DiskEntry, Layout, RevokedCertificate, problems_of
from storaged.cluster.moves import moves_between
from storaged.cluster.signed_layout import SignedLayout
from storaged.cluster.spread import minority_of
from storaged.cluster.succession import base_after, check_successor, exchanged_seeds, next_epoch, recovered_seeds
from storaged.errors import LayoutRefused, LayoutUnsafe
from storaged.wire import encode

NUMBERED_LATER = -1
"""``Layout.seeds_recovered`` of a layout that recovers the system partition, before it has its number."""

REVOKED_LONGER_MS = 7 * 86_400_000
"""A revocation outlasts its certificate by so much, for nodes whose clock is slow."""


def layouts_after(
    plan: ClusterPlan, last: tuple[SignedLayout, Layout] | None, now_ms: int = 0, lost: Sequence[str] = ()
) -> list[Layout]:
    """The layouts that bring the cluster from ``last`` to the nodes and disks of the plan, in their order. ``lost``:
    disks that are lost for good besides those that the last layout calls lost. New disks get the ranks of those
    that went (``inherited_ranks``).

    They name all that ``last`` revokes but certificates that have expired ``REVOKED_LONGER_MS`` before ``now_ms`` (wall
    clock, in milliseconds since 1970).

    Raises LayoutUnsafe with every reason why one cannot work, JurisdictionRefused for a node that the policy does not
    admit.
    """
    if last is None:
        return [layout_of(plan)]
    signed, before = last
    highest = max(plan.epoch, plan.signed, before.epoch)
    bare = replace(
        planned(plan, next_epoch(highest, moving=False)),
        replicas=before.replicas,
        base=before.base,
        seeds=before.seeds,
        seeds_next=before.seeds_next,
        seeds_step=before.seeds_step,
        seeds_lost=before.seeds_lost,
        seeds_recovered=before.seeds_recovered,
        predecessor=signed.hash,
        lost=(*before.lost, *(disk for disk in lost if disk not in before.lost)),
    )
    ranks = inherited_ranks(before, bare)
    disks = tuple(replace(disk, rank=ranks.get(disk.id, disk.rank)) for disk in bare.disks)
    bare = replace(bare, disks=disks, revoked=_still_revoked(before, bare, now_ms))
    moves = moves_between(before, bare)
    if not moves:
        _check_works(bare)
        return [bare]
    try:
        return _chained(signed.hash, before, _steps(before, bare), highest)
    except LayoutRefused as error:
        raise LayoutUnsafe(f"the list of nodes and disks can't be brought into force: {error.message}") from None


def inherited_ranks(before: Layout, after: Layout) -> dict[str, str]:
    """New disk -> the rank of one that goes in the same change: it gets what that one had, and less has to move. Disks
    of the same rack come first, and of those the ones of the most alike weight.
    """
    used = {disk.rank or disk.id for disk in after.disks if disk.rank or disk.id in before.disk_by_id}
    going = {
        disk.rank or disk.id: disk
        for disk in before.disks
        if disk.id not in after.disk_by_id and disk.state == "active" and (disk.rank or disk.id) not in used
    }
    new = [
        disk for disk in after.disks if disk.id not in before.disk_by_id and disk.state == "active" and not disk.rank
    ]
    found: dict[str, str] = {}
    for same_rack in (True, False):
        for disk in new:
            rack = _rack_of(after, disk)
            ranks = [rank for rank, old in going.items() if not same_rack or _rack_of(before, old) == rack]
            if ranks and disk.id not in found:
                rank = min(ranks, key=lambda rank: (abs(going[rank].weight - disk.weight), rank))
                found[disk.id] = rank
                del going[rank]
    return found


def _rack_of(layout: Layout, disk: DiskEntry) -> str:
    return layout.node_by_name[disk.node].location


def _still_revoked(before: Layout, after: Layout, now_ms: int) -> tuple[RevokedCertificate, ...]:
    found = {revoked.fingerprint: revoked for revoked in (*before.revoked, *after.revoked)}
    return tuple(revoked for revoked in found.values() if revoked.until_ms + REVOKED_LONGER_MS > now_ms)


def _check_works(layout: Layout) -> None:
    if problems := problems_of(layout):
        raise LayoutUnsafe("this layout cannot work:\n" + "\n".join(f"  {problem}" for problem in problems))


def _steps(before: Layout, wanted: Layout) -> list[Layout]:
    """Layouts without numbers. ``wanted``: the last of them, but for its seeds. Raises LayoutRefused."""
    seeds, coming, step, found = before.seeds, before.seeds_next, before.seeds_step, list[Layout]()
    if (recovered := recovered_seeds(before, wanted.lost)) is not None:
        seeds, coming, step = recovered.present, recovered.coming, recovered.step
        named = replace(wanted, seeds=seeds, seeds_next=coming, seeds_step=step, seeds_lost=recovered.lost)
        found.append(replace(named, seeds_recovered=NUMBERED_LATER))
        before = replace(before, seeds_lost=recovered.lost)
    if coming:  # the last one that was signed is joint: it settles first
        seeds, step = coming, step + 1
        kept = [seed for seed in seeds if seed not in wanted.disk_by_id]
        found.append(replace(_with_disks(wanted, before, kept), seeds=seeds, seeds_next=(), seeds_step=step))
    active = {disk.id for disk in wanted.disks if disk.state == "active"}
    going = [seed for seed in seeds if seed not in active]
    going += _surplus(wanted, [seed for seed in seeds if seed in active])
    for number, old in enumerate(going):
        if number < len(going) - 1:  # limits for operators begin with the last exchange
            wanted_now = replace(wanted, spread=before.spread, operators=before.operators)
        else:
            wanted_now = wanted
        target = _with_disks(
            wanted_now, before, [seed for seed in going[number + 1 :] if seed not in wanted.disk_by_id]
        )
        joint = target if old in wanted.disk_by_id else _with_disks(target, before, [old])
        following = exchanged_seeds(replace(before, seeds=seeds), old, wanted)
        found.append(replace(joint, seeds=seeds, seeds_next=following, seeds_step=step + 1))
        seeds, step = following, step + 2
        found.append(replace(target, seeds=seeds, seeds_next=(), seeds_step=step))
    return found or [wanted]


def _surplus(wanted: Layout, seeds: Sequence[str]) -> list[str]:
    """Seed disks of an operator that has a majority of them, where none may; as many as are too many."""
    found, kept = list[str](), list[str]()
    for seed in seeds:
        fits = not wanted.spreads or wanted.operator_share((*kept, seed)) <= minority_of(len(seeds))
        (kept if fits else found).append(seed)
    return found


def _with_disks(layout: Layout, before: Layout, disks: Collection[str]) -> Layout:
    """``layout`` and disks of ``before`` that only give up what they have, with their nodes. Disks that count in no
    quorum any more give up nothing.
    """
    disks = [disk for disk in disks if disk not in before.seeds_lost]
    kept = [replace(before.disk_by_id[disk], state="draining") for disk in disks]
    nodes = [before.node_by_name[name] for name in dict.fromkeys(disk.node for disk in kept)]
    nodes = [node for node in nodes if node.name not in layout.node_by_name]
    return replace(layout, disks=(*layout.disks, *kept), nodes=(*layout.nodes, *nodes))


def _chained(hash_: bytes, before: Layout, steps: list[Layout], highest: int) -> list[Layout]:
    """Numbers the layouts, lets each name the one before, and checks them. Raises LayoutRefused."""
    found = []
    for step in steps:
        highest = next_epoch(highest, moving=True)
        recovered = highest if step.seeds_recovered == NUMBERED_LATER else before.seeds_recovered
        kept = {*step.seeds, *step.seeds_next}
        lost = step.seeds_lost if recovered == highest else tuple(filter(kept.__contains__, before.seeds_lost))
        layout = replace(step, seeds_lost=lost, seeds_recovered=recovered)
        layout = replace(layout, epoch=highest, predecessor=hash_, base=base_after(before))
        check_successor(before, hash_, layout)
        before, hash_ = layout, hashlib.sha256(encode(layout)).digest()
        found.append(layout)
    return found

"""Compares a new layout with the one in force: what would move? Pure.

A layout moves data if it gives even one partition other replicas, or one disk another rank in placement. Nodes use such
a layout only with a certificate (``cluster.certificates``), and move the data afterwards (``maintain.partition_mover``,
repair). Addresses, roles and nodes without disks may change with the signature alone.

Places follow from the set of disks with their ids, weights, states, nodes and these nodes' racks, from the seed disks,
from the number of replicas (``Layout._ranked``), from the operators where data is spread over them, and from what a
layout says of partitions that have moved or have not (``cluster.partitions``). So two layouts that agree in all of
these agree in every rank, and the ranks need not be computed.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from storaged.cluster.layout import PARTITIONS, SYSTEM_PARTITION, Layout, Sparing, rack_labels
from storaged.wire import Message, encode

NAMED_MAX = 8
"""Differences that a message names before it counts the others."""


class RefusedLayout(Message, frozen=True):
    """A layout that a node refuses: its epoch (0 when unreadable), who offered it, and the reason."""

    epoch: int
    source: str
    reason: str


@dataclass(frozen=True)
class Moves:
    """What would move from ``before`` to ``after``. False when nothing would.

    ``disks``: how disks and their nodes differ, one phrase each.
    """

    before: Layout
    after: Layout
    disks: tuple[str, ...] = ()

    @cached_property
    def partitions(self) -> tuple[int, ...]:
        """Those whose replicas would differ, the system partition included. It ranks all disks for each: 0.2 s with
        100 disks.
        """
        if not self.disks:
            return ()
        return tuple(
            number
            for number in (*range(PARTITIONS), SYSTEM_PARTITION)
            if self.before.replicas_of(number) != self.after.replicas_of(number)
            or (number == SYSTEM_PARTITION and self.before.seeds_next != self.after.seeds_next)
        )

    def __bool__(self) -> bool:
        return bool(self.disks)

    def __str__(self) -> str:
        """``disk d7 of n4 is new; ... (765 of 1025 replica sets would change)``"""
        named = "; ".join(self.disks[:NAMED_MAX])
        more = f"; and {len(self.disks) - NAMED_MAX} more" if len(self.disks) > NAMED_MAX else ""
        return f"{named}{more} ({len(self.partitions)} of {PARTITIONS + 1} replica sets would change)"


def moves_between(before: Layout, after: Layout) -> Moves:
    """What ``after`` would move of the data written under ``before``."""
    return Moves(before, after, tuple(_differences(before, after)))


def changes_between(before: Layout, after: Layout) -> tuple[str, ...]:
    """All that differs, one phrase each, for an operator: what moves data, and what does not."""
    return (*_differences(before, after), *_harmless(before, after))


def _harmless(before: Layout, after: Layout) -> list[str]:
    old, new = before.node_by_name, after.node_by_name
    found = [f"node {name} is gone" for name in old if name not in new]
    found += [f"node {name} is new" for name in new if name not in old]
    for name in old.keys() & new.keys():
        for field in ("address", "location", "roles"):
            was, is_now = getattr(old[name], field), getattr(new[name], field)
            if was != is_now:
                texts = [value if isinstance(value, str) else ", ".join(value) for value in (was, is_now)]
                found.append(f"node {name} changes: {field} {texts[0] or 'none'} to {texts[1] or 'none'}")
    found += _operator_changes(before, after) if not before.spread and not after.spread else []
    for field in ("profile", "countries", "jurisdictions"):
        was, is_now = getattr(before, field), getattr(after, field)
        if was != is_now:
            texts = [value if isinstance(value, str) else ", ".join(value) or "all" for value in (was, is_now)]
            found.append(f"{field} {texts[0]} to {texts[1]}")
    known = {each.fingerprint for each in before.revoked}
    found += [
        f"certificate {each.fingerprint.hex()} of {each.node or 'an unknown node'} is revoked"
        for each in after.revoked
        if each.fingerprint not in known
    ]
    if before.sparing != after.sparing:
        found.append(f"disks that are away are replaced {sparing_text(after.sparing)}")
    return sorted(found)


def sparing_text(sparing: Sparing) -> str:
    if not sparing.domains_max:
        return "never by themselves"
    after = f"after {sparing.fragments_s} s (fragments) and {sparing.registers_s} s (registers)"
    return f"{after}, in {sparing.domains_max} failure domain{'s' if sparing.domains_max > 1 else ''} at a time"


def places_digest(layout: Layout) -> bytes:
    """SHA-256 of all that decides placement: equal for two layouts exactly when nothing moves between them."""
    # Disks have ranks only since they can be replaced: layouts without keep their digest.
    places = sorted((disk, *(place if place.rank else place[:-1])) for disk, place in _places(layout).items())
    facts = (places, layout.seeds, layout.replicas, len(layout.disks))
    moved: tuple[object, ...] = (layout.base, layout.seeds_next, layout.seeds_step)
    moved = (*moved, layout.lost) if layout.lost else moved
    moved = (*moved, layout.seeds_lost, layout.seeds_recovered) if layout.seeds_recovered else moved
    over = (layout.spread, sorted(_operators(layout).items())) if layout.spread else ()
    return hashlib.sha256(encode((*facts, *moved, *over) if any(moved) or over else facts)).digest()


class _Place(NamedTuple):
    """All facts about a disk that placement depends on."""

    node: str
    location: str
    weight: int
    state: str
    storage: bool
    rank: str


def _places(layout: Layout) -> dict[str, _Place]:
    found, racks = {}, rack_labels(layout)
    for disk in layout.disks:
        node = layout.node_by_name.get(disk.node)
        location, roles = (racks[node.location], node.roles) if node is not None else ("nowhere", ())
        found[disk.id] = _Place(disk.node, location, disk.weight, disk.state, "storage" in roles, disk.rank)
    return found


def _differences(before: Layout, after: Layout) -> list[str]:
    old, new = _places(before), _places(after)
    found = [f"disk {disk} of {old[disk].node} is gone" for disk in old if disk not in new]
    found += [f"disk {disk} of {new[disk].node} is new" for disk in new if disk not in old]
    for disk in old:
        if disk in new and old[disk] != new[disk]:
            found.append(f"disk {disk} changes: {_change(old[disk], new[disk])}")
    if len(old) != len(before.disks) or len(new) != len(after.disks):
        found.append("a disk is named twice")
    if before.seeds != after.seeds:
        found.append(f"the seed disks change from {', '.join(before.seeds)} to {', '.join(after.seeds)}")
    if before.seeds_next != after.seeds_next:
        found.append(
            f"the system partition moves to {', '.join(after.seeds_next)}"
            if after.seeds_next
            else "the system partition stops moving"
        )
    elif before.seeds_step != after.seeds_step:
        found.append(f"the step of the seed disks changes from {before.seeds_step} to {after.seeds_step}")
    if before.seeds_lost != after.seeds_lost:
        found.append(
            f"the system partition goes on without seed disks {', '.join(after.seeds_lost)}"
            if after.seeds_lost
            else "no seed disk is a lost one any more"
        )
    if before.seeds_recovered != after.seeds_recovered:
        found.append(f"the system partition was recovered by layout {after.seeds_recovered or 'none'}")
    if before.base != after.base:
        now = after.base or after.epoch
        found.append(
            f"keys stay where layout {now} placed them until they are moved"
            if now == (before.base or before.epoch)
            else f"keys that never moved are placed by layout {now}, not {before.base or before.epoch}"
        )
    found += [f"disk {disk} is lost for good" for disk in after.lost if disk not in before.lost]
    found += [f"disk {disk} is not lost any more" for disk in before.lost if disk not in after.lost]
    if before.spread != after.spread:
        names = [layout.spread or "failure domains alone" for layout in (before, after)]
        found.append(f"data was spread over {names[0]}, and is spread over {names[1]}")
    if before.spread or after.spread:
        found += _operator_changes(before, after)
    if before.replicas != after.replicas:
        found.append(f"the replicas of a partition change from {before.replicas} to {after.replicas}")
    return found


def _operators(layout: Layout) -> dict[str, str]:
    """Of the racks with disks, by names that a rename does not change."""
    named = layout.operator_by_rack
    return {label: named[rack] for rack, label in rack_labels(layout).items() if rack in named}


def _operator_changes(before: Layout, after: Layout) -> list[str]:
    old, new = _operators(before), _operators(after)
    return [
        f"the operator of rack {rack} changes from {old.get(rack, 'none')} to {new.get(rack, 'none')}"
        for rack in sorted(old.keys() | new.keys())
        if old.get(rack) != new.get(rack)
    ]


def _change(old: _Place, new: _Place) -> str:
    changed = []
    for field, is_now in new._asdict().items():
        if (was := getattr(old, field)) != is_now:
            changed.append(
                f"{field} {was} to {is_now}"
                if field != "storage"
                else f"{new.node} {'is' if is_now else 'is no longer'} a storage node"
            )
    return ", ".join(changed)

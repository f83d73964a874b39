"""What ``status`` says of disks that are away: which are out, what others have taken over, what is waited for. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

from storaged.cluster.layout import Layout
from storaged.cluster.partitions import PartitionState, is_settled
from storaged.cluster.ports import DiskStatus
from storaged.cluster.presigned import spares_for
from storaged.cluster.sparing import OUT, UNREACHABLE, DisksOut, Opinion
from storaged.cluster.spread import minority_of
from storaged.maintain.spare_room import (
    ENOUGH,
    MARGIN_PART,
    Counts,
    Shortage,
    bytes_of_partition,
    disks_short,
    needed_bytes,
    shortage_of,
)
from storaged.units import format_duration, format_size


class SparingFacts(NamedTuple):
    """``layout``: in force. ``target``: where data should be (``cluster.sparing``). ``record``: the disks out.
    ``seen``: what this node has seen of each disk. ``states``: of all partitions; None while they are not known.
    ``reason``: why a disk that is due does not go out, or come back. ``spares``: seed disk -> the disks that may take
    its place by layouts that were signed beforehand. ``seed_reason``: why none does. ``shortage``: of room for
    fragments of disks that are away for long; ``disks_short``: disks without room for partitions of disks that are out,
    and how many bytes each lacks.
    """

    layout: Layout
    target: Layout
    record: DisksOut
    seen: Mapping[str, Opinion]
    states: Sequence[PartitionState] | None
    reason: str = ""
    spares: Mapping[str, Sequence[str]] = MappingProxyType({})
    seed_reason: str = ""
    shortage: Shortage = ENOUGH
    disks_short: Mapping[str, int] = MappingProxyType({})


def document(facts: SparingFacts) -> dict[str, Any]:
    """``partitions``: how many still have the disk as a replica, None while that is not known. ``replaced``: whether
    there is another one for it. ``back_in_s``: None while it does not answer.
    """
    layout, policy = facts.layout, facts.layout.sparing
    held = Counter(disk for state in facts.states or () for disk in state.present)
    out = []
    for entry in facts.record.out:
        if entry.disk not in layout.disk_by_id:
            continue
        opinion = facts.seen.get(entry.disk)
        back = opinion is not None and not opinion.state
        out.append(
            {
                "disk": entry.disk,
                "node": layout.node_of(entry.disk),
                "rack": layout.node_by_name[layout.node_of(entry.disk)].location,
                "since": entry.since_ms,
                "state": entry.state,
                "replaced": facts.target.disk_by_id[entry.disk].state == OUT,
                "partitions": None if facts.states is None else held[entry.disk],
                "back_in_s": max(0, policy.fragments_s - opinion.for_s) if back and opinion is not None else None,
            }
        )
    known = facts.record.disks
    waiting = [
        {"disk": disk, "state": opinion.state, "away_s": opinion.for_s, "out_in_s": policy.registers_s - opinion.for_s}
        for disk, opinion in facts.seen.items()
        if opinion.state and disk not in known and policy.domains_max
    ]
    return {
        "fragments_s": policy.fragments_s,
        "registers_s": policy.registers_s,
        "domains_max": policy.domains_max,
        "out": out,
        "waiting": [{**one, "out_in_s": max(0, int(str(one["out_in_s"])))} for one in waiting],
        "reason": facts.reason,
        "seeds": [
            {"disk": seed, "node": _node_of(layout, seed), "spares": list(facts.spares.get(seed, ()))}
            for seed in layout.seeds
        ],
        "seed_moves": bool(layout.seeds_next and layout.if_out),
        "seed_reason": facts.seed_reason,
        "needed_bytes": facts.shortage.needed_bytes,
        "short_bytes": facts.shortage.short_bytes,
        "disks_short": dict(facts.disks_short),
    }


def _node_of(layout: Layout, disk: str) -> str:
    """Empty for a disk that the layout does not have any more."""
    return layout.node_of(disk) if disk in layout.disk_by_id else ""


def unspared(facts: SparingFacts) -> list[tuple[str, str]]:
    """(subject, detail) of each SEED_NOT_SPARED: a seed disk that another one could replace, and no layout was signed
    for it.
    """
    layout = facts.layout
    if layout.seeds_next or layout.seeds_lost or not layout.sparing.domains_max:
        return []
    found = []
    for seed in layout.seeds:
        if not facts.spares.get(seed) and (able := spares_for(layout, seed)):
            place = f"{layout.node_by_name[layout.node_of(seed)].location}/{layout.node_of(seed)}/{seed}"
            found.append((place, f"disk {able[0]} of {layout.node_of(able[0])} could take its place, and may not"))
    return found


def waited_for(layout: Layout, record: DisksOut, seen: Mapping[str, Opinion]) -> frozenset[str]:
    """Disks that can't be read now, if one of them is out, or was away for as long as fragments wait; else none."""
    away = {disk: opinion for disk, opinion in seen.items() if opinion.state}
    late = any(disk in record.disks or opinion.for_s >= layout.sparing.fragments_s for disk, opinion in away.items())
    return frozenset(away) if late else frozenset()


def may_be_the_network(layout: Layout, seen: Mapping[str, Opinion]) -> bool:
    """Whether more domains are silent for long than the layout's policy replaces. Then repair writes only fragments
    anew that have no spare left (``maintain.repair``), and not for want of room.
    """
    long = (disk for disk, opinion in seen.items() if opinion.says_away(layout.sparing.fragments_s))
    silent = {layout.domain_by_disk.get(disk, disk) for disk in long if seen[disk].state == UNREACHABLE}
    return len(silent) > layout.sparing.domains_max


def with_room_judged(
    facts: SparingFacts, reports: Mapping[str, DiskStatus], free: Mapping[str, int], counts: Sequence[Counts]
) -> SparingFacts:
    """As repair and the mover of partitions judge it (``maintain.spare_room``). ``reports``: what each disk said last;
    ``free``: of ``free_for_spares``; ``counts``: of all nodes that answer.
    """
    layout, target, out = facts.layout, facts.target, facts.record.disks
    gone, shortage = waited_for(layout, facts.record, facts.seen), ENOUGH
    if not may_be_the_network(layout, facts.seen):
        shortage = shortage_of(layout, gone, free, needed_bytes(layout, gone, reports, counts))
    moving = [state for state in facts.states or () if target is not layout and not is_settled(state, target)]
    short = disks_short(target, moving, out, free, bytes_of_partition(counts))
    return facts._replace(shortage=shortage, disks_short=short)


def short_details(facts: SparingFacts) -> list[tuple[str, str]]:
    """(subject, detail) of each SPARING_LACKS_ROOM."""
    needed, short = facts.shortage
    found = []
    if short:
        found.append(
            (
                "fragments",
                f"{format_size(needed)} that lie on disks which are away have to be written anew;"
                f" {format_size(short)} of them have no room on the disks that are left, with at most"
                f" {facts.layout.target.m} fragments of a block in a {facts.layout.domain_kind}. Each disk keeps its"
                f" reserve and {100 // MARGIN_PART}% free. What has no spare left is written as far as there is room",
            )
        )
    for disk, lacks in facts.disks_short.items():
        place = f"{facts.layout.node_by_name[facts.layout.node_of(disk)].location}/{facts.layout.node_of(disk)}/{disk}"
        found.append((place, f"it lacks {format_size(lacks)} for partitions that would come from disks that are out"))
    return found


def details(facts: SparingFacts, found: Mapping[str, Any]) -> list[tuple[str, int, str]]:
    """(subject, since, detail) of each DISK_OUT. ``found``: the document."""
    return [
        (f"{entry['rack']}/{entry['node']}/{entry['disk']}", entry["since"], _detail(facts, entry))
        for entry in found["out"]
    ]


def seed_details(facts: SparingFacts, found: Mapping[str, Any]) -> list[tuple[str, int, str]]:
    """(subject, since, detail) of each SEED_DISK_OUT. ``found``: the document."""
    layout = facts.layout
    seeds = [seed for seed in layout.seeds if seed not in layout.seeds_lost]
    left = [seed for seed in seeds if seed not in facts.record.disks]
    more = len(left) - len(seeds) // 2 - 1
    then = f"{max(more, 0)} more may fail before nothing can be changed any more"
    return [
        (
            f"{entry['rack']}/{entry['node']}/{entry['disk']}",
            entry["since"],
            f"{entry['state']}; {len(left)} of {len(seeds)} seed disks are left, {then}. {_seed_goes(facts, entry)}",
        )
        for entry in found["out"]
        if entry["disk"] in seeds and entry["back_in_s"] is None
    ]


def _answers(facts: SparingFacts, disk: str) -> bool:
    seen = facts.seen.get(disk)
    return disk not in facts.record.disks and not (seen is not None and seen.state)


def _seed_goes(facts: SparingFacts, entry: Mapping[str, Any]) -> str:
    """What replaces a seed disk that is out."""
    layout, seed = facts.layout, entry["disk"]
    waits = f" ({facts.seed_reason})" if facts.seed_reason else ""
    if layout.seeds_next and layout.if_out == seed:
        comes = next(disk for disk in layout.seeds_next if disk not in layout.seeds)
        return f"Disk {comes} of {_node_of(layout, comes)} takes its place: it gets what the others have{waits}"
    if spares := [disk for disk in facts.spares.get(seed, ()) if _answers(facts, disk)]:
        named = " or ".join(f"disk {disk} of {_node_of(layout, disk)}" for disk in spares)
        return f"By itself {named} takes its place{waits}"
    return (
        f"Only a layout that an administrator signs replaces it{waits}: `storaged disk remove AUTHORITY"
        f" {entry['node']} {seed}`, `storaged cluster layout AUTHORITY`, and `storaged cluster apply` for each file"
        " that this signs"
    )


def _why_not_replaced(layout: Layout, out: frozenset[str]) -> str:
    """As ``cluster.sparing.target`` decides."""
    left = {layout.domain_by_disk[disk.id] for disk in layout.disks if disk.state == "active" and disk.id not in out}
    if len(left) < layout.replicas:
        return f"a partition needs {layout.replicas} {layout.domain_kind}s, {len(left)} are left"
    return (
        f"an operator may have {minority_of(layout.replicas)} of a partition's {layout.replicas} replicas, and too few"
        " operators are left"
    )


def _detail(facts: SparingFacts, entry: Mapping[str, Any]) -> str:
    layout = facts.layout
    if entry["back_in_s"] is not None:
        return f"it answers again, and gets its share back in {format_duration(entry['back_in_s'])}"
    if not entry["replaced"]:
        kind = layout.domain_kind
        return (
            f"{entry['state']}; not replaced: {_why_not_replaced(layout, facts.record.disks)}. Its"
            f" partitions have {layout.replicas - 1} of {layout.replicas} replicas: keys are read and written, and stop"
            f" when one more {kind} fails. Objects are held as the living {kind}s can (see writes)"
        )
    seed = "; it is a seed disk (see SEED_DISK_OUT)" if entry["disk"] in layout.seeds else ""
    if entry["partitions"] is None:
        return f"{entry['state']}; how much others have taken over is not known yet"
    if entry["partitions"]:
        return f"{entry['state']}; {entry['partitions']} partitions still have to move to other disks{seed}"
    return f"{entry['state']}; other disks have taken over its partitions{seed}"

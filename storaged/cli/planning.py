"""What the next layouts would move, and what the cluster survives before, meanwhile and after. Pure.

It compares layouts. It assumes that everything is where the last one wants it: the folder with the authority's keys
does not know how far a running cluster has come.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterable, Mapping, Sequence
from typing import NamedTuple

from storaged.cli.forecast import Forecast, Label
from storaged.cluster.layout import PARTITIONS, Layout, Profile, problems_of
from storaged.cluster.moves import changes_between, moves_between
from storaged.cluster.partitions import PartitionState, next_step
from storaged.cluster.presigned import WIDTHS, spares_for
from storaged.cluster.voters import voting_sets
from storaged.errors import ServiceUnavailable
from storaged.objects.code.place import first_choice

GROUPS = range(0, 4096, 4)
"""Placement groups that are compared."""


class Movement(NamedTuple):
    """``moved`` of ``total`` parts get another disk; ``ideal``: the fewest that any placement with the same shares
    would have to move.
    """

    moved: int
    total: int
    ideal: int

    @property
    def share(self) -> float:
        return self.moved / self.total if self.total else 0.0

    def __str__(self) -> str:
        ideal = f"{self.moved / self.ideal:.2f} times the ideal" if self.ideal else "the ideal is none"
        return f"{self.moved} of {self.total} ({100 * self.share:.1f}%), {ideal}"


def stored_factor(profile: Profile) -> float:
    """Bytes on disks for each byte of an object that is not small."""
    return profile.n / profile.k


def stored_bytes(before: str, after: str) -> str:
    """What a change of the profile does to the space that objects take."""
    old, new = stored_factor(Profile.parse(before)), stored_factor(Profile.parse(after))
    return f"{old:.2f} to {new:.2f} bytes are stored for each byte ({100 * (new / old - 1):+.0f}%)"


def growth(before: Layout, after: Layout) -> float | None:
    """How many bytes a change of the profile makes of each byte on disks; None when the profile stays."""
    if before.target == after.target:
        return None
    return stored_factor(after.target) / stored_factor(before.target)


def seed_spares(layout: Layout) -> dict[str, list[str]]:
    """Seed disk -> the disks that take its place by themselves when it is lost, best first (``cluster.presigned``)."""
    if not layout.sparing.domains_max:
        return {}
    known = [seed for seed in layout.seeds if seed in layout.disk_by_id]
    return {seed: list(spares_for(layout, seed)[: WIDTHS[0][0]]) for seed in known}


class Outlook(NamedTuple):
    """What a list of layouts does. ``survives``: whether the cluster serves everything while any one failure domain is
    away, ``before``, ``meanwhile`` and ``after``.
    """

    changes: tuple[str, ...]
    moves: bool
    partitions: int
    replicas: Movement
    fragments: Movement
    domain: str
    survives: Mapping[str, bool]


def outlook(before: Layout, layouts: Sequence[Layout]) -> Outlook:
    """Of the change from ``before`` through ``layouts``, which are not empty."""
    after = layouts[-1]
    old = {number: before.replicas_of(number) for number in range(PARTITIONS)}
    new = {number: after.replicas_of(number) for number in range(PARTITIONS)}
    moves = moves_between(before, after)
    return Outlook(
        changes_between(before, after),
        bool(moves),
        sum(set(old[number]) != set(new[number]) for number in old) + (before.seeds != after.seeds),
        movement(old.values(), new.values()),
        movement(choices(before), choices(after)),
        after.domain_kind,
        {
            "before": _settled_survives(before),
            "meanwhile": not moves or _moving_survives(before, layouts),
            "after": _settled_survives(after),
        },
    )


def movement(before: Iterable[Sequence[str]], after: Iterable[Sequence[str]]) -> Movement:
    """Between two lists of sets of disks that belong together."""
    moved = total = 0
    shares: Counter[str] = Counter()
    for old, new in zip(before, after, strict=True):
        moved += len(set(new) - set(old))
        total += len(new)
        shares.update(new)
        shares.subtract(old)
    return Movement(moved, total, sum(count for count in shares.values() if count > 0))


def choices(layout: Layout) -> list[Sequence[str]]:
    """The disks of a block in each of ``GROUPS``."""
    profile = layout.target
    found: list[Sequence[str]] = []
    for group in GROUPS:
        try:
            found.append(first_choice(layout, (group << 4).to_bytes(2, "big") + bytes(14), profile))
        except ServiceUnavailable:
            found.append(())
    return found


def _survives(sets: Iterable[Sequence[str]], domains: Mapping[str, str], away: Container[str] = ()) -> bool:
    """Whether each set keeps a majority while any one domain is away, besides the disks ``away``."""
    for one in sets:
        there = Counter(domains[disk] for disk in one if disk not in away)
        if 2 * (there.total() - max(there.values(), default=0)) <= len(one):
            return False
    return True


def _seed_sets(layout: Layout) -> set[tuple[str, ...]]:
    sets = [seeds for seeds in (layout.seeds, layout.seeds_next) if seeds]
    return set(voting_sets(sets, layout.seeds_lost))


def _settled_survives(layout: Layout) -> bool:
    sets = {layout.replicas_of(number) for number in range(PARTITIONS)} | _seed_sets(layout)
    return not problems_of(layout) and _survives(sets, layout.domain_by_disk)


def _moving_survives(before: Layout, layouts: Sequence[Layout]) -> bool:
    """Follows every partition through its joint states (``partitions.next_step``), and the seeds through the layouts.

    A disk that the last layout does not name counts as away, so it is better drained before. That is true for a seed
    disk too, which the joint layout still names.
    """
    after = layouts[-1]
    domains = {
        disk.id: _domain(layout, disk.node, disk.id, after) for layout in (before, *layouts) for disk in layout.disks
    }
    sets: set[tuple[str, ...]] = set()
    for number in range(PARTITIONS):
        state = PartitionState(number, 0, 0, before.replicas_of(number))
        sets.update(state.sets)
        while (record := next_step(state, after, whole=True)) is not None:
            state = PartitionState(number, record.step, 0, record.present, record.coming, record.lost)
            sets.update(state.sets)
    for layout in layouts:
        sets |= _seed_sets(layout)
    gone = {disk.id for disk in before.disks if disk.id not in after.disk_by_id}
    return _survives(sets, domains, gone)


def _domain(layout: Layout, node: str, disk: str, after: Layout) -> str:
    """The failure domain of a disk, of the kind that ``after`` has."""
    if after.domain_kind == "rack":
        return layout.node_by_name[node].certified_location
    return node if after.domain_kind == "node" else disk


def document(
    before: Layout, layouts: Sequence[Layout], found: Outlook, labels: Sequence[Label], data: Forecast | None
) -> dict[str, object]:
    """The document of ``storaged cluster plan --json``. ``bytes`` is null where no cluster was asked."""
    return {
        "last": before.epoch,
        "layouts": [layout.epoch for layout in layouts],
        "changes": list(found.changes),
        "profile": {"before": before.profile, "after": layouts[-1].profile},
        "stored_factor": {"before": stored_factor(before.target), "after": stored_factor(layouts[-1].target)},
        "nodes": len(layouts[-1].nodes),
        "disks": len(layouts[-1].disks),
        "seeds": {"before": list(before.seeds), "after": list(layouts[-1].seeds)},
        "seed_spares": seed_spares(layouts[-1]),
        "moves_data": found.moves,
        "partitions": found.partitions,
        "replicas": {**found.replicas._asdict(), "share": found.replicas.share},
        "fragments": {**found.fragments._asdict(), "share": found.fragments.share},
        "domain": found.domain,
        "survives": dict(found.survives),
        "bytes": None if data is None else _of_data(data),
        "labels": [label._asdict() for label in labels],
    }


def _of_data(data: Forecast) -> dict[str, object]:
    durations = {job: found._asdict() for job, found in data.durations.items()}
    comes, unknown = dict(data.comes), list(data.unknown)
    return {"moved": data.moved, "total": data.total, "comes": comes, "unknown": unknown, "durations": durations}

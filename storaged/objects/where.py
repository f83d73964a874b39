"""Where an object is: every fragment with its disk, node, rack and state, and how many more failures it survives. For
``storaged where``.

There are two numbers. How many failures until data is *lost*: some block has too few fragments. And how many until the
object *stops*: its register needs a majority of its replicas. With one of three replicas away, the next failure loses
nothing, but the key waits until a replica returns.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from storaged.cluster.layout import Layout, Profile
from storaged.errors import PeerError
from storaged.fragments.ports import FragmentId, Health
from storaged.meta.consensus.quorums import Quorum
from storaged.meta.names import RegisterName
from storaged.objects.code import place
from storaged.objects.code.customer import CUSTOMERS
from storaged.objects.code.geometry import PartShape
from storaged.objects.code.lending import LENT
from storaged.objects.code.manifest import parts_of
from storaged.objects.code.versions import OpenedVersion
from storaged.objects.plane import ObjectPlane
from storaged.objects.read.borrowed import with_data
from storaged.objects.read.find import find
from storaged.objects.records import BucketRecord, PartEntry, Run

RUN_BLOCKS_MAX = 1024
"""Blocks of a run that are checked one by one. Of a longer run as many are sampled, evenly."""


@dataclass(frozen=True)
class FragmentPlace:
    """``state`` of the worst block of the run: ok, missing, damaged, unreachable. ``blocks_bad``: how many blocks are
    not ok on this disk.
    """

    position: int
    disk: str
    node: str
    rack: str
    state: str
    blocks_bad: int = 0
    operator: str = ""


@dataclass(frozen=True)
class RunPlace:
    """A run of blocks on the same disks. ``kind``: coded, copies. ``disks_may_fail`` and ``domains_may_fail`` are of
    the worst block; -1: it can't be read now.
    """

    part: int
    first: int
    count: int
    profile: str
    kind: str
    fragments: tuple[FragmentPlace, ...]
    disks_may_fail: int
    domains_may_fail: int


@dataclass(frozen=True)
class ReplicaPlace:
    """One replica of the object's register, and of data kept in the record. ``state``: ok, behind, empty, damaged,
    unreachable.
    """

    disk: str
    node: str
    rack: str
    state: str
    operator: str = ""


@dataclass(frozen=True)
class Whereabouts:
    """``disks_may_fail`` / ``domains_may_fail``: before data is lost. ``replicas_may_fail``: before the key can't be
    read or written; -1: it can't be now. ``domain_kind``: rack, node or disk.
    """

    key: bytes
    size: int
    domain_kind: str
    runs: tuple[RunPlace, ...]
    replicas: tuple[ReplicaPlace, ...]
    disks_may_fail: int
    domains_may_fail: int
    replicas_may_fail: int
    whole: int = 0
    """Bodies that lie whole, though the layout trusts no operator alone: they wait to be coded."""
    stays: str = ""
    """Why they are not coded before the object is written again; empty when they are."""


async def where(plane: ObjectPlane, bucket: BucketRecord, key: bytes, *, version_id: str = "") -> Whereabouts:
    """Asks every disk. Of a copy without data of its own, the runs are those of the key that lends them; both keys must
    be readable. Raises NoSuchKey, NoSuchVersion, ServiceUnavailable.
    """
    found = await find(plane, bucket, key, version_id)
    opened = found.opened
    layout = plane.layouts.current
    replicas = await _replicas(plane, found.name, layout)
    spares = [_spare(plane, found.name, layout, replicas)]
    if opened.borrowed is not None:
        found = await with_data(plane, bucket, found)
        spares.append(_spare(plane, found.name, layout, await _replicas(plane, found.name, layout)))
    parts = [part async for part in parts_of(plane.pages, found.name, found.opened.version)]
    whole = sum(part.small or bool(part.inline) for part in parts) if layout.spreads else 0
    runs = [await _run(plane, bucket, found.name, part, run, layout) for part in parts for run in part.runs]
    runs_spare = [_Spare(run.disks_may_fail, run.domains_may_fail) for run in runs]
    return Whereabouts(
        key,
        found.opened.version.size,
        layout.domain_kind,
        tuple(runs),
        replicas,
        min(least.disks for least in (*spares, *runs_spare)),
        min(least.domains for least in (*spares, *runs_spare)),
        min(spare.replicas for spare in spares),
        whole,
        _why_whole(opened) if whole else "",
    )


def _why_whole(opened: OpenedVersion) -> str:
    if opened.borrowed is not None:
        return LENT
    return CUSTOMERS if opened.has_customer_key else ""


class _Spare(NamedTuple):
    """How many disks and domains may fail before a record is lost, and how many replicas before it can't be read."""

    disks: int
    domains: int
    replicas: int = 0


def _spare(plane: ObjectPlane, name: RegisterName, layout: Layout, replicas: Sequence[ReplicaPlace]) -> _Spare:
    holders = {index: replica.disk for index, replica in enumerate(replicas) if replica.state == "ok"}
    quorum = Quorum(*plane.layouts.partition(name.partition).voting)
    answering = [replica.disk for replica in replicas if replica.state != "unreachable"]
    return _Spare(*place.spare(layout, Profile(1, len(replicas) - 1), holders), max(-1, quorum.spare(answering)))


async def _replicas(plane: ObjectPlane, name: RegisterName, layout: Layout) -> tuple[ReplicaPlace, ...]:
    states = {"current": "ok", "away": "unreachable"}
    return tuple(
        ReplicaPlace(
            replica.disk,
            _node_of(layout, replica.disk),
            _rack_of(layout, replica.disk),
            states.get(replica.state, replica.state),
            _operator_of(layout, replica.disk),
        )
        for replica in await plane.registers.agreement(name)
    )


async def _run(
    plane: ObjectPlane, bucket: BucketRecord, name: RegisterName, part: PartEntry, run: Run, layout: Layout
) -> RunPlace:
    places = _places(plane, bucket, name, part, run)
    step = -(-run.count // RUN_BLOCKS_MAX)
    blocks = range(run.first, run.first + run.count, step)
    health = await asyncio.gather(*(_health(plane, part, run, position, disk, blocks) for position, disk in places))
    shape = PartShape.of(part)
    spares = []
    for index, block in enumerate(blocks):
        alive = {at: disk for at, (_, disk) in enumerate(places) if health[at][index] == "ok"}
        if run.k > 1:  # data fragments after the end of a short block are zeros, and need no disk
            cells = shape.block(block).cells
            alive.update(
                {
                    position: places[position][1]
                    for position in range(cells, run.k)
                    if health[position][index] != "unreachable"
                }
            )
        spares.append(place.spare(layout, run.profile, alive))
    fragments = tuple(_fragment_place(layout, *place, health[at]) for at, place in enumerate(places))
    return RunPlace(
        part.number,
        run.first,
        run.count,
        str(run.profile),
        "copies" if run.k == 1 else "coded",
        fragments,
        min(disks_may for disks_may, _ in spares),
        min(domains_may for _, domains_may in spares),
    )


def _fragment_place(layout: Layout, position: int, disk: str, health: list[str]) -> FragmentPlace:
    worst = max(health, key=("ok", "damaged", "missing", "unreachable").index)
    bad = sum(state != "ok" for state in health)
    operator = _operator_of(layout, disk)
    return FragmentPlace(position, disk, _node_of(layout, disk), _rack_of(layout, disk), worst, bad, operator)


def _places(
    plane: ObjectPlane, bucket: BucketRecord, name: RegisterName, part: PartEntry, run: Run
) -> list[tuple[int, str]]:
    """(position, disk) of each fragment. While its partition moves, a small object has two copies of one position."""
    if part.small:
        state = plane.layouts.partition(name.partition)
        return [(position, disk) for disk in state.disks if (position := state.position_of(disk)) < run.k + run.m]
    return list(enumerate(place.disks_of(run, plane.layouts.at(run.epoch), part.data_id, bucket.countries)))


async def _health(plane: ObjectPlane, part: PartEntry, run: Run, position: int, disk: str, blocks: range) -> list[str]:
    ids = [FragmentId(part.data_id, block, run.k, run.m, position) for block in blocks]
    names = {Health.OK: "ok", Health.MISSING: "missing", Health.DAMAGED: "damaged"}
    try:
        async with asyncio.timeout(plane.limits.read_timeout_s):
            stats = await plane.stores.store(disk).stat(ids)
    except (PeerError, TimeoutError):
        return ["unreachable"] * len(ids)
    return [names[Health(stat.health)] for stat in stats]


def _node_of(layout: Layout, disk: str) -> str:
    return layout.node_of(disk) if disk in layout.disk_by_id else ""


def _operator_of(layout: Layout, disk: str) -> str:
    """Empty when its rack names none."""
    return layout.operator_by_rack.get(_rack_of(layout, disk), "")


def _rack_of(layout: Layout, disk: str) -> str:
    return layout.node_by_name[layout.node_of(disk)].location if disk in layout.disk_by_id else ""

"""What a running cluster adds to a plan: how many bytes move, how long that takes, and what can't work. Pure.

The folder with the authority's keys knows layouts only. The document of ``storaged status --json`` says which layout is
in force, how full the disks are, what still moves, and at which pace. Numbers of bytes are estimates: they assume that
the fragments of a disk have one size.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from storaged.cluster.layout import Layout, weaknesses
from storaged.disk_states import SOUND
from storaged.errors import (
    DiskNotDrained,
    LayoutOvertaken,
    LayoutWeak,
    MoveUnfinished,
    OperatorError,
    PlanTooLittleSpace,
    StoragedError,
)
from storaged.units import format_duration, format_size

DISKS_NAMED = 5


class DiskSpace(NamedTuple):
    """A disk as the cluster sees it. ``state``: as in ``status``; only a sound disk answers."""

    used: int
    free: int
    state: str

    @property
    def answers(self) -> bool:
        return self.state in SOUND


@dataclass(frozen=True)
class ClusterFacts:
    """``unfinished``: what still moves by the layout in force, as a phrase; empty when nothing does."""

    cluster: str
    epoch: int
    disks: Mapping[str, DiskSpace]
    unfinished: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Of moves, as in the document of status."""


class Label(NamedTuple):
    """Something about a plan that its operator has to know. ``refused``: the plan can't work."""

    code: str
    text: str
    refused: bool = False


class Duration(NamedTuple):
    """``seconds``: at the pace that is set; None when none is set, and while the job is ``paused``."""

    seconds: float | None
    paused: bool

    def __str__(self) -> str:
        if self.paused:
            return "is paused"
        if self.seconds is None:
            return "as fast as disks and network allow: no pace is set"
        return f"{format_duration(self.seconds)} at the pace that is set"


class Forecast(NamedTuple):
    """``moved``: bytes that leave their disks, or are written anew, of ``total``; ``comes``: bytes that each disk gets,
    about, beyond those that it has and that go from it when the profile changes. ``unknown``: disks whose space is not
    known, because they are not in use yet.
    """

    moved: int
    total: int
    comes: Mapping[str, int]
    unknown: tuple[str, ...]
    durations: Mapping[str, Duration]
    """By job."""


def facts_of(document: Any) -> ClusterFacts:
    """From the document of ``storaged status --json``. Raises OperatorError for one that says too little."""
    try:
        disks = {
            disk["id"]: DiskSpace(int(disk["bytes_used"]), int(disk["bytes_free"]), str(disk["state"]))
            for node in document["nodes"]
            for disk in node["disks"]
        }
        moving = document["moving"]
        settings = moving["settings"]
        _paces(settings)
        return ClusterFacts(document["cluster"], int(document["epoch"]), disks, _unfinished(moving), settings)
    except (KeyError, TypeError, ValueError):
        raise OperatorError(
            "this is no status of a running cluster: on a gateway, storaged status --json > FILE"
        ) from None


def _unfinished(moving: Mapping[str, Any]) -> str:
    found = []
    if moving["partitions"] is None:
        found.append("a number of partitions that is not known yet")
    elif moving["partitions"]:
        found.append(f"{moving['partitions']} partitions")
    if moving["objects"] is None:
        found.append("a number of objects that is not known yet")
    elif moving["objects"]:
        found.append(f"{moving['objects']} objects")
    if moving["system"]:
        found.append("the system partition")
    return ", ".join(found)


def _paces(settings: Mapping[str, Any]) -> dict[str, tuple[float, bool]]:
    """For each job its pace (0: none) and whether it is paused."""
    partitions, fragments = settings["partitions"], settings["fragments"]
    return {
        "partitions": (int(partitions["per_min"]) / 60, bool(partitions["paused"])),
        "fragments": (float(int(fragments["bytes_per_s"])), bool(fragments["paused"])),
    }


def durations(facts: ClusterFacts, replicas: int, moved: int, nodes: int) -> dict[str, Duration]:
    """Of both jobs. ``replicas``: how many are exchanged; ``moved``: bytes of fragments; ``nodes``: how many storage
    nodes move them, each within its pace.
    """
    found = {}
    for job, (pace, paused) in _paces(facts.settings).items():
        work = replicas if job == "partitions" else moved / max(1, nodes)
        found[job] = Duration(work / pace if pace and not paused else None, paused)
    return found


def check_last(facts: ClusterFacts, last: Layout) -> None:
    """Raises LayoutOvertaken when a newer layout is in force than the last one that is known here, OperatorError for
    another cluster.
    """
    if facts.cluster != last.cluster:
        raise OperatorError(f"this is the status of cluster {facts.cluster}, and the folder is of {last.cluster}")
    if facts.epoch > last.epoch:
        raise LayoutOvertaken(
            f"Layout {facts.epoch} is in force, and the last one in this folder is {last.epoch}. What was signed now"
            " would be refused."
        )


def forecast(
    facts: ClusterFacts,
    before: Sequence[Sequence[str]],
    after: Sequence[Sequence[str]],
    last: Layout,
    replicas: int,
    growth: float | None,
) -> Forecast:
    """``before`` and ``after``: the disks of samples of blocks that belong together. ``last``: the layout that is
    planned; ``replicas``: how many are exchanged. ``growth``: where the profile changes, so that everything is written
    anew, the bytes on disks for each of now.
    """
    space = facts.disks
    used = _used(space, before)
    total = sum(used.values())
    moved, comes = _moved(used, before, after) if growth is None else _recoded(space, int(total * growth), after)
    nodes = len({disk.node for disk in last.disks})
    return Forecast(
        moved,
        total,
        comes,
        tuple(disk.id for disk in last.disks if disk.id not in space or not space[disk.id].answers),
        durations(facts, replicas, moved, nodes),
    )


def _used(space: Mapping[str, DiskSpace], before: Iterable[Sequence[str]]) -> dict[str, int]:
    """Bytes on each disk. One that does not answer is known by its share: what it had is written anew elsewhere."""
    had = Counter(disk for block in before for disk in block if disk in space)
    answering = [disk for disk in had if space[disk].answers]
    each = sum(space[disk].used for disk in answering) / max(1, sum(had[disk] for disk in answering))
    return {disk: space[disk].used if space[disk].answers else int(count * each) for disk, count in had.items()}


def _moved(
    used: Mapping[str, int], before: Iterable[Sequence[str]], after: Iterable[Sequence[str]]
) -> tuple[int, dict[str, int]]:
    had, leaves, comes = Counter[str](), Counter[str](), Counter[str]()
    for old, new in zip(before, after, strict=True):
        had.update(old)
        leaves.update(set(old) - set(new))
        comes.update(set(new) - set(old))
    moved = sum(used[disk] * leaves[disk] / had[disk] for disk in leaves if disk in used)
    return int(moved), {disk: int(count * moved / comes.total()) for disk, count in comes.items()}


def _recoded(
    space: Mapping[str, DiskSpace], written: int, after: Iterable[Sequence[str]]
) -> tuple[int, dict[str, int]]:
    """Small objects stay, and count here like the others."""
    gets = Counter(disk for block in after for disk in block)
    comes = {
        disk: int(written * count / gets.total()) - (space[disk].used if disk in space else 0)
        for disk, count in gets.items()
    }
    return written, {disk: more for disk, more in comes.items() if more > 0}


def labels_of(
    last: Layout, layouts: Sequence[Layout], facts: ClusterFacts | None, found: Forecast | None
) -> list[Label]:
    """What is wrong, or bad to have, about the change from ``last`` through ``layouts``."""
    after = layouts[-1]
    labels = [_label(LayoutWeak, text) for text in weaknesses(after)]
    if facts is None or found is None:
        return labels
    if facts.epoch < last.epoch:
        labels.append(
            _label(MoveUnfinished, f"layout {last.epoch} was signed and is not in force yet: {facts.epoch} is")
        )
    if facts.unfinished:
        labels.append(_label(MoveUnfinished, f"what layout {facts.epoch} moves is not there yet: {facts.unfinished}"))
    going = [disk for disk in last.disks if disk.id not in after.disk_by_id and disk.state == "active"]
    labels += [
        _label(DiskNotDrained, f"disk {disk.id} of {disk.node} answers, and was not drained before it is removed")
        for disk in going
        if disk.id in facts.disks and facts.disks[disk.id].answers
    ]
    if short := _short(facts, found):
        labels.append(Label(PlanTooLittleSpace.code, "; ".join(short), refused=True))
    return labels


def _short(facts: ClusterFacts, found: Forecast) -> list[str]:
    """Disks that can't hold what comes, even when all that leaves them has left."""
    said = []
    for disk, comes in sorted(found.comes.items()):
        space = facts.disks.get(disk)
        if space is not None and space.answers and comes > space.free:
            said.append(f"disk {disk} gets about {format_size(comes)} and has {format_size(space.free)} free")
    return said[:DISKS_NAMED] + ([f"and {len(said) - DISKS_NAMED} more"] if len(said) > DISKS_NAMED else [])


def _label(kind: type[StoragedError], text: str) -> Label:
    return Label(kind.code, text)

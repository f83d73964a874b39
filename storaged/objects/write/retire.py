"""Data that a write replaced goes to the garbage lists of the disks that hold it. Garbage collection there compares it
with the register before it deletes; see ``references``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from storaged.errors import StoragedError
from storaged.fragments.ports import RETIREMENTS_MAX, Retirement
from storaged.meta.names import RegisterName
from storaged.objects.code import place
from storaged.objects.code.geometry import problem_of
from storaged.objects.code.manifest import parts_of
from storaged.objects.garbage import retire_all
from storaged.objects.plane import ObjectPlane
from storaged.objects.records import BucketRecord, ObjectRecord, PartEntry, Version


def replaced_versions(before: ObjectRecord, after: ObjectRecord) -> list[Version]:
    """Versions whose data ``after`` does not have. A change of tags keeps the data."""
    kept = {version.context_id for version in after.versions}
    return [version for version in before.versions if version.context_id not in kept]


def disks_holding(plane: ObjectPlane, bucket: BucketRecord, name: RegisterName, part: PartEntry) -> set[str]:
    """Every disk that a part's runs name. A run of a layout that this node does not know adds none: the sweep finds its
    fragments.
    """
    disks: set[str] = set()
    for run in part.runs:
        try:
            layout = plane.layouts.at(run.epoch)
            if part.small:
                disks.update(layout.replicas_of(name.partition))
                disks.update(run.moved.values())
            else:
                disks.update(place.disks_of(run, layout, part.data_id, bucket.countries))
        except (KeyError, ValueError):
            continue
    return disks


def retirements(
    plane: ObjectPlane, bucket: BucketRecord, name: RegisterName, parts: Iterable[PartEntry]
) -> Iterator[tuple[str, Retirement]]:
    """(disk, entry for its garbage list) of every disk that holds one of these parts. An entry is due after
    ``retire_delay_ms``, for readers in the middle of the data.
    """
    owner, due_ms = name.pack(), plane.clock.wall_ms() + plane.limits.retire_delay_ms
    first = plane.layouts.current.replicas_of(name.partition)[:1]
    for part in parts:
        entry = Retirement(part.data_id, owner, due_ms)
        later = entry._replace(due_ms=due_ms + plane.limits.retire_follow_ms) if part.small else entry
        for disk in disks_holding(plane, bucket, name, part):
            yield disk, entry if disk in first else later


async def retire_parts(
    plane: ObjectPlane, bucket: BucketRecord, name: RegisterName, parts: Iterable[PartEntry]
) -> None:
    """Puts parts on their disks' garbage lists. Best effort."""
    by_disk: dict[str, list[Retirement]] = {}
    for disk, entry in retirements(plane, bucket, name, parts):
        by_disk.setdefault(disk, []).append(entry)
    await retire_all(plane.stores, by_disk, plane.limits.write_timeout_s)


async def retire_versions(
    plane: ObjectPlane, bucket: BucketRecord, name: RegisterName, versions: list[Version]
) -> None:
    """Retires all parts of these versions. Best effort: the parts of a manifest that can't be read now are left to the
    sweep of orphans.
    """
    for version in versions:
        batch: list[PartEntry] = []
        try:
            async for part in parts_of(plane.pages, name, version):
                batch.append(part)
                if len(batch) == RETIREMENTS_MAX:
                    await retire_parts(plane, bucket, name, batch)
                    batch = []
        except StoragedError:
            continue
        finally:
            await retire_parts(plane, bucket, name, batch)


def retire_replaced(
    plane: ObjectPlane, bucket: BucketRecord, name: RegisterName, before: ObjectRecord, after: ObjectRecord
) -> None:
    """Retires in the background what a committed change replaced."""
    paged = []
    for version in replaced_versions(before, after):
        if version.manifest:
            paged.append(version)
        else:
            for disk, entry in retirements(
                plane, bucket, name, (part for part in version.parts if part.runs and not problem_of(part))
            ):
                plane.garbage.add(disk, entry)
    if paged:
        plane.background.spawn(retire_versions(plane, bucket, name, paged))

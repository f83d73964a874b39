"""Data that a write replaced goes to the garbage lists of the disks that hold it. Garbage collection there compares it
with the register before it deletes; see ``references``.

An entry says where the data comes from, and the collector relies on it. *Replaced* is said only after the change was
committed, of data that was no part of an upload: nothing can bring that back. Data of a part belongs to its upload, for
as long as that may still become the object.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Iterator

from storaged.errors import ServiceUnavailable, StoragedError
from storaged.fragments.ports import OF_UPLOAD, REPLACED, RETIREMENTS_MAX, Retirement
from storaged.meta.names import RegisterName
from storaged.objects.code import place
from storaged.objects.code.geometry import problem_of
from storaged.objects.code.manifest import parts_of
from storaged.objects.garbage import retire_all
from storaged.objects.plane import ObjectPlane
from storaged.objects.records import BucketRecord, Loan, PartEntry, Version


def disks_holding(plane: ObjectPlane, bucket: BucketRecord, name: RegisterName, part: PartEntry) -> set[str]:
    """Every disk that a part's runs name; small copies are on all replicas of the register. What this node can't tell,
    for it lacks a layout, adds none: the sweep finds these fragments.
    """
    disks: set[str] = set()
    for run in part.runs:
        try:
            if part.small:
                disks.update(plane.layouts.partition(name.partition).disks)
            else:
                disks.update(place.disks_of(run, plane.layouts.at(run.epoch), part.data_id, bucket.countries))
        except (KeyError, ValueError, ServiceUnavailable):
            continue
    return disks


def origin_of(version: Version) -> bytes:
    """The origin of the data of a version that a committed change replaced."""
    return OF_UPLOAD + version.context_id if version.multipart else REPLACED


def retirements(
    plane: ObjectPlane, bucket: BucketRecord, name: RegisterName, parts: Iterable[PartEntry], origin: bytes
) -> Iterator[tuple[str, Retirement]]:
    """(disk, entry for its garbage list) of every disk that holds one of these parts. An entry is due after
    ``retire_delay_ms``, for readers in the middle of the data.
    """
    owner, due_ms = name.pack(), plane.clock.wall_ms() + plane.limits.retire_delay_ms
    for part in parts:
        entry = Retirement(part.data_id, owner, due_ms, origin)
        for disk in sorted(disks_holding(plane, bucket, name, part)):
            yield disk, entry


async def retire_parts(
    plane: ObjectPlane, bucket: BucketRecord, name: RegisterName, parts: Iterable[PartEntry], origin: bytes
) -> None:
    """Puts parts on their disks' garbage lists. Best effort."""
    by_disk: dict[str, list[Retirement]] = {}
    for disk, entry in retirements(plane, bucket, name, parts, origin):
        by_disk.setdefault(disk, []).append(entry)
    await retire_all(plane.stores, by_disk, plane.limits.write_timeout_s)


async def retire_versions(
    plane: ObjectPlane, bucket: BucketRecord, name: RegisterName, versions: list[Version]
) -> None:
    """Retires all parts of these versions. Best effort."""
    for version in versions:
        await retire_paged(plane, bucket, name, version, origin_of(version))


async def retire_paged(
    plane: ObjectPlane, bucket: BucketRecord, name: RegisterName, having: Version | Loan, origin: bytes
) -> None:
    """Retires all parts of a version, or those that were lent. Best effort: the parts of a manifest that can't be read
    now are left to the sweep of orphans.
    """
    try:
        await retire_each(plane, bucket, name, parts_of(plane.pages, name, having), origin)
    except StoragedError:
        return


async def retire_each(
    plane: ObjectPlane, bucket: BucketRecord, name: RegisterName, parts: AsyncIterator[PartEntry], origin: bytes
) -> None:
    """As ``retire_parts``, many at a time. Raises what ``parts`` raises, after those before that."""
    batch: list[PartEntry] = []
    try:
        async for part in parts:
            batch.append(part)
            if len(batch) == RETIREMENTS_MAX:
                await retire_parts(plane, bucket, name, batch, origin)
                batch = []
    finally:
        await retire_parts(plane, bucket, name, batch, origin)


def retire_removed(plane: ObjectPlane, bucket: BucketRecord, name: RegisterName, removed: Iterable[Version]) -> None:
    """Retires in the background the versions that a committed change removed."""
    paged = []
    for version in removed:
        if version.manifest:
            paged.append(version)
        else:
            parts = (part for part in version.parts if part.runs and not problem_of(part))
            for disk, entry in retirements(plane, bucket, name, parts, origin_of(version)):
                plane.garbage.add(disk, entry)
    if paged:
        plane.background.spawn(retire_versions(plane, bucket, name, paged))

"""Versions without data of their own: the record of another key says where it is (``write.loans``)."""

from __future__ import annotations

from typing import NamedTuple

import msgspec

from storaged.errors import DataDamaged, NoSuchBucket, ServiceUnavailable
from storaged.meta.names import RegisterName
from storaged.objects.code.lending import find_borrower, name_of_owner
from storaged.objects.code.manifest import checked
from storaged.objects.plane import ObjectPlane, OnDamage
from storaged.objects.read.find import Found, find
from storaged.objects.records import BucketRecord


def owner_of(bucket: BucketRecord, found: Found) -> RegisterName:
    """The register that the data belongs to."""
    borrowed = found.opened.borrowed
    return found.name if borrowed is None else name_of_owner(bucket, borrowed)


async def with_data(plane: ObjectPlane, bucket: BucketRecord, found: Found) -> Found:
    """The found version with the parts that it borrows, under the name of the register that they belong to. Raises
    DataDamaged, ServiceUnavailable.
    """
    borrowed = found.opened.borrowed
    if borrowed is None:
        return found
    owner = owner_of(bucket, found)
    try:
        value = (await plane.lender_registers.read(owner)).value
    except NoSuchBucket:
        raise ServiceUnavailable("The bucket that has this object's data is being deleted now. Please retry.") from None
    lent = find_borrower(value, borrowed.id)
    if lent is None:
        raise DataDamaged("The record of another key, which keeps the data of this one, does not have it.")
    loan, version = lent[0], found.opened.version
    version = msgspec.structs.replace(
        version,
        parts=tuple(map(checked, loan.parts)),
        manifest=loan.manifest,
        pages=(*loan.pages, *version.pages),
    )
    opened = found.opened._replace(version=version)
    if found.cached is not None:
        found.cached.learn_data(owner, opened)
    return Found(owner, opened, found.version_id, None, None, found.lock)


class KnownData(NamedTuple):
    """``found``: the version with its data. ``on_damage``: what a stream of it does about damage."""

    found: Found
    on_damage: OnDamage


def with_known_data(found: Found) -> KnownData | None:
    """As ``with_data``, by what the last read of this very record has found. None: that is not known.

    The owner's record may be another one since, but it still lends these bytes: it does so as long as the borrower's
    record says that it borrows them, and the caller has just read that. Only where they are may have changed. So a
    fragment that is missed is no damage yet: the place is forgotten, and the next read asks the owner's record again.
    """
    cached = found.cached
    if cached is None or cached.with_data is None:
        return None
    owner, entry = cached.with_data
    known = Found(owner, entry.opened, found.version_id, None, entry, found.lock)
    return KnownData(known, lambda damage: cached.forget_data(entry))


async def find_data(plane: ObjectPlane, bucket: BucketRecord, key: bytes, version_id: str) -> Found:
    """As ``find``, with the data. Raises as that, and as ``with_data``."""
    return await with_data(plane, bucket, await find(plane, bucket, key, version_id))

"""Versions without data of their own: the record of another key says where it is (``write.loans``)."""

from __future__ import annotations

import msgspec

from storaged.errors import DataDamaged, NoSuchBucket, ServiceUnavailable
from storaged.meta.names import RegisterName
from storaged.objects.code.lending import find_borrower, name_of_owner
from storaged.objects.code.manifest import checked
from storaged.objects.plane import ObjectPlane
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
    return Found(owner, found.opened._replace(version=version), found.version_id, None, None, found.lock)


async def find_data(plane: ObjectPlane, bucket: BucketRecord, key: bytes, version_id: str) -> Found:
    """As ``find``, with the data. Raises as that, and as ``with_data``."""
    return await with_data(plane, bucket, await find(plane, bucket, key, version_id))

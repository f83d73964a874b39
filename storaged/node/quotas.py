"""Puts together what judges the quotas of a gateway's clients, and sets for the operator what a bucket or an account
may have, and how small objects of a bucket are kept.
"""

from __future__ import annotations

import functools

from msgspec import structs

from storaged.clock import Clock
from storaged.objects.accounts import StoredAccount
from storaged.objects.configuration.kinds import COPIES, QUOTA, Copies, Quota
from storaged.objects.quotas import Quotas, Sources
from storaged.objects.records import BucketRecord
from storaged.objects.service import ObjectService
from storaged.objects.system.buckets import BucketService
from storaged.objects.system.users import UserService
from storaged.objects.usage import open_uploads, usage_after


def quotas_of(objects: ObjectService, buckets: BucketService, users: UserService, clock: Clock) -> Quotas:
    sources = Sources(
        buckets.every_bucket,
        buckets.configuration_of,
        users.accounts.with_quota,
        functools.partial(usage_after, objects),
        functools.partial(open_uploads, objects),
    )
    return Quotas(sources, clock)


async def set_bucket_quota(buckets: BucketService, bucket: BucketRecord, bytes_max: int, objects_max: int) -> None:
    """0: no limit. Raises NoSuchBucket."""
    quota = Quota(bytes_max, objects_max) if bytes_max or objects_max else None
    await buckets.configure(bucket, QUOTA, lambda _: quota)


async def set_bucket_copies(buckets: BucketService, bucket: BucketRecord, bytes_max: int | None) -> None:
    """Objects of up to so many bytes are kept as whole copies from now on. None: as the gateways are configured.
    Raises NoSuchBucket.
    """
    copies = Copies(bytes_max) if bytes_max is not None else None
    await buckets.configure(bucket, COPIES, lambda _: copies)


async def set_account_quota(users: UserService, user_id: str, bytes_max: int, objects_max: int) -> None:
    """0: no limit."""

    def edit(account: StoredAccount) -> StoredAccount:
        return structs.replace(account, bytes_max=bytes_max, objects_max=objects_max)

    await users.accounts.change(user_id, edit, action="SetQuota", target=f"account:{user_id}")

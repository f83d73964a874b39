"""What every handler works with: the planes, the settings of the endpoint, and the check of a bucket's owner."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

from storaged.clock import Clock
from storaged.errors import AccessDenied, InvalidBucketName
from storaged.objects.api import Buckets, Objects, Principal, Users
from storaged.objects.names import bucket_name_possible
from storaged.objects.records import BucketRecord
from storaged.s3.auth.regions import ANY_REGION
from storaged.s3.http.limits import Limits
from storaged.s3.reply import Reply
from storaged.s3.request import Request


@dataclass(frozen=True, slots=True)
class Endpoint:
    """The settings of one S3 endpoint."""

    region: str
    strict_region: bool = False
    """Signatures and new buckets must be of ``region``."""
    domains: Sequence[str] = ()
    """Their subdomains are buckets (virtual-host style)."""
    proxies: Sequence[str] = ()
    """Networks whose clients have no limits before they authenticate."""
    limits: Limits = field(default_factory=Limits)

    @property
    def signed_region(self) -> str:
        """The region that signatures must name; ANY_REGION when they may name any."""
        return self.region if self.strict_region else ANY_REGION


@dataclass(frozen=True, slots=True)
class Front:
    """What handlers work on: the planes, and the settings of the endpoint."""

    objects: Objects
    buckets: Buckets
    users: Users
    endpoint: Endpoint
    clock: Clock


Handler = Callable[[Front, Request], Awaitable[Reply]]


async def owned_bucket(front: Front, who: Principal, name: str, expected_owner: str | None = None) -> BucketRecord:
    """The bucket, if ``who`` owns it. Raises NoSuchBucket, InvalidBucketName, AccessDenied."""
    bucket = await existing_bucket(front, name)
    check_owner(bucket, who, expected_owner)
    return bucket


async def existing_bucket(front: Front, name: str) -> BucketRecord:
    """Raises NoSuchBucket, InvalidBucketName."""
    if not bucket_name_possible(name):
        raise InvalidBucketName(BucketName=name)
    return front.buckets.try_get(name) or await front.buckets.get(name)


def check_owner(bucket: BucketRecord, who: Principal, expected_owner: str | None = None) -> None:
    """Raises AccessDenied unless ``who`` owns the bucket. ``expected_owner``: the value of x-amz-expected-bucket-owner,
    which must be the owner too."""
    if (
        not who.access_key
        or who.user_id != bucket.owner
        or (expected_owner is not None and expected_owner != bucket.owner)
    ):
        raise AccessDenied()

"""What every handler works with: the planes and the settings of the endpoint."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

from storaged.clock import Clock
from storaged.errors import InvalidBucketName
from storaged.objects.api import Buckets, Principal, Users
from storaged.objects.destinations import DeliveryFailed, Destinations
from storaged.objects.granted import GrantedObjects
from storaged.objects.names import bucket_name_possible
from storaged.objects.records import BucketRecord
from storaged.s3.auth.regions import ANY_REGION
from storaged.s3.http.limits import Limits
from storaged.s3.reply import Reply
from storaged.s3.request import Request
from storaged.units import MIB


@dataclass(frozen=True, slots=True)
class AccessLogSettings:
    """``interval_s``: how often access logs are delivered. ``bytes_max``: of lines in the memory of a process."""

    interval_s: float = 300.0
    bytes_max: int = 8 * MIB


@dataclass(frozen=True, slots=True)
class Endpoint:
    """The settings of one S3 endpoint."""

    region: str
    legacy_buckets: bool = False
    """New buckets have access control lists and no public access block, as on AWS before 2023."""
    strict_region: bool = False
    """Signatures and new buckets must be of ``region``."""
    domains: Sequence[str] = ()
    """Their subdomains are buckets (virtual-host style)."""
    website_domain: str = ""
    """Its subdomains are buckets as websites; empty: there are none."""
    proxies: Sequence[str] = ()
    """Networks whose clients have no limits before they authenticate."""
    limits: Limits = field(default_factory=Limits)
    access_logs: AccessLogSettings = AccessLogSettings()

    @property
    def signed_region(self) -> str:
        """The region that signatures must name; ANY_REGION when they may name any."""
        return self.region if self.strict_region else ANY_REGION


class NoDestinations:
    """Of a gateway whose operator has configured none."""

    def knows(self, arn: str) -> bool:
        return False

    async def send(self, arn: str, body: bytes) -> None:
        raise DeliveryFailed("there is no such destination")


NO_DESTINATIONS = NoDestinations()


@dataclass(frozen=True, slots=True)
class Front:
    """What handlers work on: the planes, and the settings of the endpoint."""

    objects: GrantedObjects
    buckets: Buckets
    users: Users
    endpoint: Endpoint
    clock: Clock
    destinations: Destinations = NO_DESTINATIONS
    """Of notifications."""


Handler = Callable[[Front, Request], Awaitable[Reply]]


async def user_of(front: Front, access_key: str, token: str) -> tuple[Principal, str]:
    """The user of a key, or of temporary credentials. Raises InvalidAccessKeyId, InvalidToken."""
    if token:
        return await front.users.lookup_session(access_key, token)
    return await front.users.lookup(access_key)


async def existing_bucket(front: Front, name: str) -> BucketRecord:
    """Raises NoSuchBucket, InvalidBucketName."""
    if not bucket_name_possible(name):
        raise InvalidBucketName(BucketName=name)
    return front.buckets.try_get(name) or await front.buckets.get(name)

"""Which regions a request may name. Pure.

A region is a label: a bucket's countries decide where its data lies. So a signature of any region is accepted, as long
as it is right for that region, and a bucket can be created in any: its record keeps the label, which GetBucketLocation
and HeadBucket return. ``strict_region`` (``[s3]``) refuses all but the configured one, as AWS does.

https://docs.aws.amazon.com/AmazonS3/latest/API/API_CreateBucketConfiguration.html,
https://docs.aws.amazon.com/AmazonS3/latest/API/API_GetBucketLocation.html
"""

from __future__ import annotations

import re

from storaged.errors import InvalidLocationConstraint

ANY_REGION = ""
"""For ``sigv4.check_scope``: whatever the signature was made for."""

FIRST_REGION = "us-east-1"
"""Its buckets have no LocationConstraint."""
_OLD_NAMES = {"EU": "eu-west-1"}
"""LocationConstraints of old that are no region's name: GetBucketLocation tells them as they were given, HeadBucket
tells the region."""

_REGION = re.compile(r"[a-z0-9-]{1,63}")


def region_of_new_bucket(constraint: str, configured: str, *, strict: bool) -> str:
    """What a bucket's record keeps. ``constraint``: LocationConstraint, empty for none: the gateway's own region.
    Raises InvalidLocationConstraint."""
    if constraint in ("", configured):
        return configured
    if strict or not (constraint in _OLD_NAMES or _REGION.fullmatch(constraint)):
        raise InvalidLocationConstraint(LocationConstraint=constraint)
    return constraint


def location_constraint(region: str) -> str:
    """What GetBucketLocation tells of a bucket's region: nothing for us-east-1."""
    return "" if region == FIRST_REGION else region


def region_name(region: str) -> str:
    """What HeadBucket and ListBuckets tell of it."""
    return _OLD_NAMES.get(region, region)

"""The regions that a request may name. Pure.

A region is only a label: a bucket's countries decide where its data is. So a signature for any region is accepted if it
is right for that region, and a bucket can be created in any region. Its record keeps the label, which GetBucketLocation
and HeadBucket return. ``strict_region`` (``[s3]``) refuses all but the configured region, as AWS does.

Sources: https://docs.aws.amazon.com/AmazonS3/latest/API/API_CreateBucketConfiguration.html, API_GetBucketLocation.html.
"""

from __future__ import annotations

import re

from storaged.errors import InvalidLocationConstraint

ANY_REGION = ""
"""For ``sigv4.check_scope``: a signature for any region is right."""

FIRST_REGION = "us-east-1"
"""Its buckets have no LocationConstraint."""
_OLD_NAMES = {"EU": "eu-west-1"}
"""Old LocationConstraints that are no region's name. GetBucketLocation returns them as they were given, HeadBucket
returns the region."""

_REGION = re.compile(r"[a-z0-9-]{1,63}")


def region_of_new_bucket(constraint: str, configured: str, *, strict: bool) -> str:
    """The region for a new bucket's record. ``constraint``: LocationConstraint; empty: the gateway's own region. Raises
    InvalidLocationConstraint."""
    if constraint in ("", configured):
        return configured
    if strict or not (constraint in _OLD_NAMES or _REGION.fullmatch(constraint)):
        raise InvalidLocationConstraint(LocationConstraint=constraint)
    return constraint


def location_constraint(region: str) -> str:
    """The LocationConstraint that GetBucketLocation returns: empty for us-east-1."""
    return "" if region == FIRST_REGION else region


def region_name(region: str) -> str:
    """The region that HeadBucket and ListBuckets return."""
    return _OLD_NAMES.get(region, region)

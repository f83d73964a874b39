"""Decides conditions of reads (RFC 9110, section 13.2.2) and of writes (as AWS documents them). Pure.

Source: https://docs.aws.amazon.com/AmazonS3/latest/userguide/conditional-requests.html
"""

from __future__ import annotations

from typing import Final

from msgspec import Struct

from storaged.errors import NoSuchKey, NotModified, PreconditionFailed, SlowDown
from storaged.objects.api import (
    ABSENT,
    NO_READ_CONDITIONS,
    NO_WRITE_CONDITIONS,
    ObjectAccess,
    ReadConditions,
    WriteConditions,
)
from storaged.objects.etags import Tags, matches_strongly, matches_weakly

OBJECT_CHANGED: Final = "The object changed while access to it was decided. Retry."


class Current(Struct, frozen=True):
    """The version that a write would replace: ETag (hex), size, time. ``access``: when conditions name it."""

    etag: str
    size: int
    modified_ms: int
    access: ObjectAccess | None = None


def check_read(conditions: ReadConditions, etag: str, modified_ms: int) -> None:
    """Raises PreconditionFailed or NotModified, in the order of RFC 9110. HTTP dates have whole seconds, so times are
    compared in them.
    """
    if conditions == NO_READ_CONDITIONS:
        return
    modified_s = modified_ms // 1000
    if conditions.if_match is not None:
        if not matches_strongly(conditions.if_match, etag):
            raise PreconditionFailed(Condition="If-Match")
    elif conditions.if_unmodified_since_ms is not None and modified_s > conditions.if_unmodified_since_ms // 1000:
        raise PreconditionFailed(Condition="If-Unmodified-Since")
    if conditions.if_none_match is not None:
        if matches_weakly(conditions.if_none_match, etag):
            raise NotModified(ETag=etag)
    elif conditions.if_modified_since_ms is not None and modified_s <= conditions.if_modified_since_ms // 1000:
        raise NotModified(ETag=etag)


def check_copy_source(
    conditions: ReadConditions, etag: str, modified_ms: int, prefix: str = "x-amz-copy-source-"
) -> None:
    """As check_read, but a copy answers 412 where a read answers 304. ``prefix``: of the headers' names in the
    answer."""
    try:
        check_read(conditions, etag, modified_ms)
    except NotModified:
        name = "If-None-Match" if conditions.if_none_match is not None else "If-Modified-Since"
        raise PreconditionFailed(Condition=prefix + name) from None
    except PreconditionFailed as error:
        raise PreconditionFailed(Condition=prefix + error.details["Condition"]) from None


def check_write(conditions: WriteConditions, current: Current | None) -> None:
    """``current`` None: there is no such object. Raises PreconditionFailed, NoSuchKey for If-Match on an object that
    does not exist, and SlowDown for another object than the write was allowed for: its sender may know nothing of it.

    What a deletion says of size or time holds when there is no object: AWS's documentation of DeleteObject says so.
    """
    if conditions == NO_WRITE_CONDITIONS:
        return
    if conditions.allowed is not None and (current.access if current is not None else ABSENT) != conditions.allowed:
        raise SlowDown(OBJECT_CHANGED)
    if current is None:
        if conditions.if_match is not None:
            raise NoSuchKey
        return
    if conditions.if_match is not None and not matches_strongly(conditions.if_match, current.etag):
        raise PreconditionFailed(Condition="If-Match")
    if conditions.if_none_match is not None and matches_weakly(conditions.if_none_match, current.etag):
        raise PreconditionFailed(Condition="If-None-Match")
    if conditions.if_match_size is not None and conditions.if_match_size != current.size:
        raise PreconditionFailed(Condition="x-amz-if-match-size")
    if (
        conditions.if_match_modified_ms is not None
        and conditions.if_match_modified_ms // 1000 != current.modified_ms // 1000
    ):
        raise PreconditionFailed(Condition="x-amz-if-match-last-modified-time")


def needs_etag(conditions: WriteConditions) -> bool:
    """Whether the decision needs the current ETag, which is sealed."""
    return isinstance(conditions.if_match, Tags) or isinstance(conditions.if_none_match, Tags)

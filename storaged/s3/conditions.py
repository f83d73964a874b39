"""Conditions of S3 requests: parses entity tags and dates, and says which of them each operation accepts. Pure.

A header that is present and names nothing is a condition that no object fulfils. It is never the same as no condition:
a write that asks for ``If-Match: ""`` must not overwrite.

| operation | accepts | refuses |
|---|---|---|
| GetObject, HeadObject, GetObjectAttributes | all four; invalid dates (RFC 9110, 13.1.3) and later ones are ignored | |
| PutObject, CopyObject, CompleteMultipartUpload | If-Match, If-None-Match of ``*`` or tags | 501: other, dates |
| copy sources | x-amz-copy-source-if-* | 400: invalid tags or dates |
| RenameObject | all four, and x-amz-rename-source-if-* for the old key | 400: invalid tags or dates |
| DeleteObject | If-Match, x-amz-if-match-size, -last-modified-time | 501: If-None-Match, dates; 400: invalid values |
| DeleteObject with a versionId | x-amz-if-match-size, -last-modified-time | 501: If-Match, too, as on AWS |
| DeleteObjects, each entry | ETag, Size, LastModifiedTime | 400 for the entry: invalid values |

On writes, AWS takes only ``If-None-Match: *``, and answers 501 to the rest. This server evaluates plain tags as RFC
9110 (13.1.2) says, because Ceph's conformance tests (s3-tests) write with them. Weak, empty or invalid ones are refused
as on AWS.

Source: https://docs.aws.amazon.com/AmazonS3/latest/userguide/conditional-requests.html
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime

from msgspec.structs import replace

from storaged.errors import InvalidArgument, NotImplemented
from storaged.objects.api import NO_READ_CONDITIONS, NO_WRITE_CONDITIONS, ReadConditions, WriteConditions
from storaged.objects.etags import ANY, NO_TAG, AnyTag, Condition, Tags
from storaged.s3.headers import integer

NAMES = frozenset({"if-match", "if-none-match", "if-modified-since", "if-unmodified-since"})
SOURCE_PREFIX = "x-amz-copy-source-"
RENAMED_PREFIX = "x-amz-rename-source-"

DATE_CHARS_MAX = 64
"""Longer than any date: the standard library's parser never sees hostile text of unbounded length."""

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_FIRST_MS = -62_135_596_800_000
_END_MS = 253_402_300_800_000
"""The years 1 to 9999."""

_ITEM = re.compile(r'[ \t]*(W/)?(?:"([^"]*)"|([^",\s]+))[ \t]*(?:,|$)')
"""An entity tag, in quotes as RFC 9110 wants it, or bare as many S3 clients send it."""
_EMPTY_ITEM = re.compile(r"[ \t]*(?:,|$)")


def parse_tags(text: str) -> AnyTag | Tags:
    """``*``, or a list of entity tags. Any other text is ``NO_TAG``, which is no object's tag."""
    if text.strip(" \t") == "*":
        return ANY
    strong: list[str] = []
    weak: list[str] = []
    position = 0
    while position < len(text):
        if empty := _EMPTY_ITEM.match(text, position):
            position = empty.end()
            continue
        item = _ITEM.match(text, position)
        if item is None or item[3] == "*":
            return NO_TAG
        (weak if item[1] else strong).append(item[2] if item[2] is not None else item[3])
        position = item.end()
    return Tags(tuple(strong), tuple(weak)) if strong or weak else NO_TAG


def parse_tag(text: str) -> str | None:
    """The opaque tag of a single strong entity tag; None for any other text."""
    found = parse_tags(text)
    return found.strong[0] if isinstance(found, Tags) and len(found.strong) == 1 and not found.weak else None


def parse_http_time(text: str) -> int | None:
    """Milliseconds since 1970 of an HTTP date (RFC 9110, section 5.6.7); None for any other text."""
    if len(text) > DATE_CHARS_MAX:
        return None
    try:
        return _ms_of(parsedate_to_datetime(text))
    except (ValueError, TypeError, IndexError, OverflowError):
        return None


def parse_time(text: str) -> int | None:
    """Milliseconds since 1970 of an HTTP date or of ISO 8601; None for any other text."""
    found = parse_http_time(text)
    if found is not None:
        return found
    try:
        return _ms_of(datetime.fromisoformat(text))
    except (ValueError, OverflowError):
        return None


def _ms_of(moment: datetime) -> int | None:
    """A date without a zone is in UTC. None for a year that does not have four digits: with its zone, a date may lie in
    the year 0 or 10000, and could not be printed again. Computed with whole numbers: floating-point ones lose a
    millisecond when a date is printed and read again."""
    ms = (moment.replace(tzinfo=moment.tzinfo or UTC) - _EPOCH) // timedelta(milliseconds=1)
    return ms if _FIRST_MS <= ms < _END_MS else None


def read_conditions(headers: Mapping[str, str], now_ms: int) -> ReadConditions:
    """Conditions of a read. An invalid If-Match fails; the others are ignored if invalid (RFC 9110, section 13), and so
    is If-Modified-Since that is later than ``now_ms``, as on AWS."""
    if NAMES.isdisjoint(headers):
        return NO_READ_CONDITIONS
    return ReadConditions(
        if_match=_tags(headers, "if-match"),
        if_none_match=_tags(headers, "if-none-match"),
        if_modified_since_ms=_past(parse_http_time(headers.get("if-modified-since", "")), now_ms),
        if_unmodified_since_ms=parse_http_time(headers.get("if-unmodified-since", "")),
    )


def _past(date_ms: int | None, now_ms: int) -> int | None:
    """None for a date that has not come yet."""
    return date_ms if date_ms is not None and date_ms <= now_ms else None


def copy_conditions(headers: Mapping[str, str], now_ms: int) -> ReadConditions:
    """As ``source_conditions``, of a copy: AWS ignores x-amz-copy-source-if-modified-since that is later than
    ``now_ms``. Raises InvalidArgument."""
    found = source_conditions(headers)
    return replace(found, if_modified_since_ms=_past(found.if_modified_since_ms, now_ms))


def source_conditions(headers: Mapping[str, str], prefix: str = SOURCE_PREFIX) -> ReadConditions:
    """Conditions of a copy's or a rename's source, whose headers begin with ``prefix``. Raises InvalidArgument for an
    invalid one: it must not let the copy happen.
    """
    none_match = _tags(headers, prefix + "if-none-match")
    if none_match == NO_TAG:
        raise _malformed(prefix + "if-none-match", headers[prefix + "if-none-match"], "is not an entity tag")
    return ReadConditions(
        if_match=_tags(headers, prefix + "if-match"),
        if_none_match=none_match,
        if_modified_since_ms=_date(headers, prefix + "if-modified-since"),
        if_unmodified_since_ms=_date(headers, prefix + "if-unmodified-since"),
    )


def write_conditions(headers: Mapping[str, str]) -> WriteConditions:
    """Conditions of PutObject, CompleteMultipartUpload, and copies' destinations.

    Raises NotImplemented for a date, and for If-None-Match with anything but ``*`` or plain tags.
    """
    if NAMES.isdisjoint(headers):
        return NO_WRITE_CONDITIONS
    _refuse(headers, "if-modified-since", "if-unmodified-since")
    none_match = _tags(headers, "if-none-match")
    if isinstance(none_match, Tags) and not _plain(none_match):
        raise unsupported("if-none-match")
    return WriteConditions(if_match=_tags(headers, "if-match"), if_none_match=none_match)


def delete_conditions(headers: Mapping[str, str], version: str) -> WriteConditions:
    """Conditions of DeleteObject. ``version``: the versionId of the request, or empty. Raises InvalidArgument,
    NotImplemented, as AWS for If-Match with a versionId: a version never changes."""
    _refuse(headers, "if-none-match", "if-modified-since", "if-unmodified-since", *(("if-match",) if version else ()))
    return deletion(
        headers.get("if-match"),
        headers.get("x-amz-if-match-size"),
        headers.get("x-amz-if-match-last-modified-time"),
        ("x-amz-if-match-size", "x-amz-if-match-last-modified-time"),
    )


def entry_conditions(entry: Mapping[str, str]) -> WriteConditions:
    """Conditions of one entry of DeleteObjects. Raises InvalidArgument."""
    etag = entry.get("ETag")
    return deletion(
        etag.strip() if etag is not None else None,
        entry.get("Size"),
        entry.get("LastModifiedTime"),
        ("Size", "LastModifiedTime"),
    )


def deletion(etag: str | None, size: str | None, modified: str | None, names: tuple[str, str]) -> WriteConditions:
    """Conditions of a deletion; None: there is no such condition. ``names``: of the size and the time, for errors.
    Raises InvalidArgument."""
    if etag is None and size is None and modified is None:
        return NO_WRITE_CONDITIONS
    modified_ms = parse_time(modified) if modified is not None else None
    if modified is not None and modified_ms is None:
        raise _malformed(names[1], modified, "is not a date")
    return WriteConditions(
        if_match=parse_tags(etag) if etag is not None else None,
        if_match_size=integer(names[0], size, 0, 2**63) if size is not None else None,
        if_match_modified_ms=modified_ms,
    )


def _plain(tags: Tags) -> bool:
    """Only strong tags, such as an object could have."""
    return bool(tags.strong) and not tags.weak and all(tag and "*" not in tag for tag in tags.strong)


def unsupported(name: str) -> NotImplemented:
    """AWS's answer to a header that an operation does not have."""
    return NotImplemented("A header you provided implies functionality that is not implemented", Header=name)


def _refuse(headers: Mapping[str, str], *names: str) -> None:
    for name in names:
        if name in headers:
            raise unsupported(name)


def _tags(headers: Mapping[str, str], name: str) -> Condition:
    return parse_tags(headers[name]) if name in headers else None


def _date(headers: Mapping[str, str], name: str) -> int | None:
    if name not in headers:
        return None
    found = parse_http_time(headers[name])
    if found is None:
        raise _malformed(name, headers[name], "is not a date")
    return found


def _malformed(name: str, value: str, why: str) -> InvalidArgument:
    return InvalidArgument(f"{name} {why}", ArgumentName=name, ArgumentValue=value)

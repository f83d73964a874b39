"""Headers and parameters of S3 requests, parsed strictly into the values that the object plane takes. Pure."""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Mapping
from email.utils import formatdate
from functools import lru_cache
from urllib.parse import parse_qsl

from storaged.errors import (
    BadDigest,
    InvalidArgument,
    InvalidDigest,
    InvalidRedirectLocation,
    InvalidRequest,
    InvalidStorageClass,
    InvalidTag,
    MetadataTooLarge,
)
from storaged.objects.api import (
    CHECKSUM_ALGORITHMS,
    BodyChecks,
    NewMeta,
    RangeSpec,
)
from storaged.objects.configuration.website import REDIRECT_LOCATION
from storaged.objects.write.checksums import CHECKSUM_BYTES

USER_PREFIX = "x-amz-meta-"
USER_BYTES_MAX = 2048
KEPT_HEADERS = (
    "content-type",
    "cache-control",
    "content-disposition",
    "content-encoding",
    "content-language",
    "expires",
)
REDIRECT_BYTES_MAX = 2048
STORAGE_CLASSES = frozenset(
    {
        "STANDARD", "REDUCED_REDUNDANCY", "STANDARD_IA", "ONEZONE_IA", "INTELLIGENT_TIERING", "GLACIER_IR",
    }
)  # fmt: skip
"""The classes of AWS whose objects can be read at once. All are kept as STANDARD is, which is no less than each of them
promises, and are returned as they were named. GLACIER and DEEP_ARCHIVE are refused: nothing is archived here, and
clients do not read objects that have such a class before they are restored."""

TAGS_PER_OBJECT_MAX = 10
TAGS_PER_BUCKET_MAX = 50
TAG_KEY_CHARS_MAX = 128
TAG_VALUE_CHARS_MAX = 256

CHECKSUM_HEADERS = {f"x-amz-checksum-{name.lower()}": name for name in CHECKSUM_ALGORITHMS}
_CHECKSUM_NAMES = frozenset(CHECKSUM_HEADERS)
CHECKSUM_ELEMENTS = {f"Checksum{name}": name for name in CHECKSUM_ALGORITHMS}

CANNED_ACLS = frozenset(
    {
        "private", "public-read", "public-read-write", "authenticated-read", "aws-exec-read", "bucket-owner-read",
        "bucket-owner-full-control", "log-delivery-write",
    }
)  # fmt: skip

_TAG_TEXT = re.compile(r"[\w\s+\-=.:/@]*")
_RANGE = re.compile(r"bytes=([0-9]*)-([0-9]*)")
_OFFSET_DIGITS_MAX = 18
_BEYOND = 10**_OFFSET_DIGITS_MAX
"""No object has so many bytes."""
INCIDENTAL = frozenset(
    {
        "accept", "accept-encoding", "accept-language", "amz-sdk-invocation-id", "amz-sdk-request", "authorization",
        "connection", "content-length", "content-type", "host", "user-agent", "x-amz-content-sha256", "x-amz-date",
        "x-amz-user-agent",
    }
)  # fmt: skip
"""Headers that say who asks, and with which program. About an object they say only its type and size."""
ORDINARY = INCIDENTAL | {
    "cache-control", "content-disposition", "content-encoding", "content-language", "content-md5", "date", "expect",
    "expires", "range",
}  # fmt: skip
"""Headers that most requests have, and that every operation honours or may ignore."""


def integer(name: str, text: str, low: int, high: int) -> int:
    """A decimal number. Raises InvalidArgument that names the parameter."""
    try:
        value = int(text) if text.lstrip("-").isascii() and text.lstrip("-").isdigit() else None
    except ValueError:
        value = None
    if value is None:
        raise InvalidArgument(
            f"Provided {name} not an integer or within integer range", ArgumentName=name, ArgumentValue=text
        )
    if not low <= value <= high:
        raise InvalidArgument(
            f"Argument {name} must be an integer between {low} and {high}", ArgumentName=name, ArgumentValue=text
        )
    return value


# --- dates ------------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=4096)
def http_time(seconds: int) -> str:
    """``Wed, 12 Oct 2009 17:50:00 GMT``"""
    return formatdate(seconds, usegmt=True)


# --- ranges -----------------------------------------------------------------------------------------------------------


def wants_checksums(headers: Mapping[str, str]) -> bool:
    return headers.get("x-amz-checksum-mode", "").upper() == "ENABLED"


def parse_range(text: str) -> RangeSpec | None:
    """None, so that the whole object is the answer: there is no range, there are several, or the range is invalid by
    RFC 9110."""
    match = _RANGE.fullmatch(text.strip()) if text else None
    if match is None or not (match[1] or match[2]):
        return None
    first = _offset(match[1]) if match[1] else None
    last = _offset(match[2]) if match[2] else None
    if first is not None and last is not None and first > last:
        return None
    return RangeSpec(first, last)


def _offset(digits: str) -> int:
    """A number of a range. One that is beyond every object counts as ``_BEYOND``, however long it is."""
    digits = digits.lstrip("0")
    return _BEYOND if len(digits) > _OFFSET_DIGITS_MAX else int(digits or "0")


def parse_copy_range(text: str) -> RangeSpec:
    """x-amz-copy-source-range, which needs both ends. Raises InvalidArgument."""
    span = parse_range(text)
    if span is None or span.first is None or span.last is None:
        raise InvalidArgument(
            "The x-amz-copy-source-range value must be of the form bytes=first-last where first and last are the"
            " zero-based offsets of the first and last bytes to copy",
            ArgumentName="x-amz-copy-source-range",
            ArgumentValue=text,
        )
    return span


# --- metadata of an object --------------------------------------------------------------------------------------------


def readable(name: str, value: str) -> str:
    """The value of a header that is stored. Raises InvalidArgument for bytes that are not UTF-8: they could not be
    returned."""
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            raise InvalidArgument(
                "A header that is stored with an object must be US-ASCII or UTF-8.", ArgumentName=name
            ) from None
    return value


def new_meta(headers: Mapping[str, str]) -> NewMeta:
    """The headers that are stored, x-amz-meta-*, tags, storage class. Raises MetadataTooLarge, InvalidTag,
    InvalidStorageClass, InvalidRedirectLocation."""
    kept = {name: readable(name, headers[name]) for name in KEPT_HEADERS if headers.get(name)}
    if "content-encoding" in kept:
        codings = [coding.strip() for coding in kept["content-encoding"].split(",")]
        codings = [coding for coding in codings if coding and coding.lower() != "aws-chunked"]
        if codings:
            kept["content-encoding"] = ", ".join(codings)
        else:
            del kept["content-encoding"]
    if REDIRECT_LOCATION in headers:
        kept[REDIRECT_LOCATION] = redirect_location(headers[REDIRECT_LOCATION])
    user = {
        name[len(USER_PREFIX) :]: readable(name, value)
        for name, value in headers.items()
        if name.startswith(USER_PREFIX)
    }
    if user:
        user_bytes = sum(len(name) + len(value.encode()) for name, value in user.items())
        if user_bytes > USER_BYTES_MAX:
            raise MetadataTooLarge(Size=str(user_bytes), MaxSizeAllowed=str(USER_BYTES_MAX))
    tagging = headers.get("x-amz-tagging", "")
    return NewMeta(
        headers=kept, user=user, tags=parse_tag_header(tagging) if tagging else {}, storage_class=storage_class(headers)
    )


def redirect_location(value: str) -> str:
    """Where a website sends who asks for the object. Raises InvalidRedirectLocation, InvalidArgument."""
    readable(REDIRECT_LOCATION, value)
    if not value.startswith(("/", "http://", "https://")):
        raise InvalidRedirectLocation()
    if len(value.encode()) > REDIRECT_BYTES_MAX:
        raise InvalidRedirectLocation(f"The length of website redirect location cannot exceed {REDIRECT_BYTES_MAX}.")
    return value


def storage_class(headers: Mapping[str, str]) -> str:
    value = headers.get("x-amz-storage-class", "STANDARD")
    if value not in STORAGE_CLASSES:
        raise InvalidStorageClass(StorageClassRequested=value[:100])
    return value


def parse_tag_header(text: str) -> dict[str, str]:
    """x-amz-tagging: ``a=1&b=2``."""
    try:
        pairs = parse_qsl(text, keep_blank_values=True, errors="strict", max_num_fields=TAGS_PER_OBJECT_MAX + 1)
    except ValueError:
        raise InvalidArgument(
            "The header 'x-amz-tagging' shall be encoded as UTF-8 then URLEncoded URL query parameters without tag name"
            " duplicates."
        ) from None
    return check_tags(pairs, TAGS_PER_OBJECT_MAX)


def check_tags(pairs: list[tuple[str, str]], count_max: int) -> dict[str, str]:
    """Raises InvalidTag, with the rule that the tags break."""
    if len(pairs) > count_max:
        kind = "Object" if count_max == TAGS_PER_OBJECT_MAX else "Bucket"
        raise InvalidTag(f"{kind} tags cannot be greater than {count_max}")
    tags: dict[str, str] = {}
    for name, value in pairs:
        if not name or len(name) > TAG_KEY_CHARS_MAX or not _TAG_TEXT.fullmatch(name):
            raise InvalidTag("The TagKey you have provided is invalid", TagKey=name[:TAG_KEY_CHARS_MAX])
        if len(value) > TAG_VALUE_CHARS_MAX or not _TAG_TEXT.fullmatch(value):
            raise InvalidTag(
                "The TagValue you have provided is invalid", TagKey=name, TagValue=value[:TAG_VALUE_CHARS_MAX]
            )
        if name.lower().startswith("aws:"):
            raise InvalidTag("System tags cannot be added or updated by the requester", TagKey=name)
        if name in tags:
            raise InvalidTag("Cannot provide multiple Tags with the same key", TagKey=name)
        tags[name] = value
    return tags


# --- digests ----------------------------------------------------------------------------------------------------------


def content_md5(headers: Mapping[str, str]) -> bytes | None:
    """The 16 bytes of Content-MD5; None without one. Raises InvalidDigest."""
    if "content-md5" not in headers:
        return None
    try:
        digest = base64.b64decode(headers["content-md5"], validate=True)
    except (binascii.Error, ValueError):
        digest = b""
    if len(digest) != 16:
        raise InvalidDigest("The Content-MD5 you specified was invalid.")
    return digest


def check_checksum(algorithm: str, value: str, where: str) -> str:
    """Base64 of the right length. Raises BadDigest that names ``where``. (AWS answers InvalidRequest; Ceph's
    conformance tests want this.)"""
    try:
        raw = base64.b64decode(value, validate=True)
    except (binascii.Error, ValueError):
        raw = b""
    if len(raw) != CHECKSUM_BYTES[algorithm]:
        raise BadDigest(f"Value for {where} header is invalid.")
    return value


def declared_checksums(headers: Mapping[str, str]) -> dict[str, str]:
    """Algorithm -> value of x-amz-checksum-*, of which there may be one. Raises BadDigest, InvalidRequest."""
    if _CHECKSUM_NAMES.isdisjoint(headers):
        return {}
    found = {name: algorithm for name, algorithm in CHECKSUM_HEADERS.items() if name in headers}
    if len(found) > 1:
        raise InvalidRequest("Expecting a single x-amz-checksum- header. Multiple checksum Types are not allowed.")
    ((name, algorithm),) = found.items()
    return {algorithm: check_checksum(algorithm, headers[name], name)}


def algorithm_named(headers: Mapping[str, str], *names: str) -> str:
    """The checksum algorithm that one of these headers names, in upper case; empty when there is none. Raises
    InvalidRequest."""
    for name in names:
        if name in headers:
            value = headers[name].upper()
            if value not in CHECKSUM_ALGORITHMS:
                raise InvalidRequest(
                    "Checksum algorithm provided is unsupported. Please try again with any of the valid types:"
                    f" [{', '.join(CHECKSUM_ALGORITHMS)}]"
                )
            return value
    return ""


def checksum_type(headers: Mapping[str, str]) -> str:
    """FULL_OBJECT, COMPOSITE, or empty without the header. Raises InvalidRequest."""
    if "x-amz-checksum-type" not in headers:
        return ""
    value = headers["x-amz-checksum-type"].upper()
    if value not in ("FULL_OBJECT", "COMPOSITE"):
        raise InvalidRequest("Value for x-amz-checksum-type header is invalid.")
    return value


def trailing_names(headers: Mapping[str, str]) -> tuple[str, ...]:
    """The names that x-amz-trailer announces. Raises InvalidRequest for anything but one checksum."""
    text = headers.get("x-amz-trailer", "")
    names = tuple(name.strip().lower() for name in text.split(",") if name.strip())
    if len(names) > 1 or any(name not in CHECKSUM_HEADERS for name in names):
        raise InvalidRequest("The value specified in the x-amz-trailer header is not supported")
    return names


def body_checks(
    headers: Mapping[str, str], size: int | None, trailing: tuple[str, ...], trailers: Mapping[str, str] | None
) -> BodyChecks:
    """``trailers``: a mapping that the decoder fills while the body is read; None when the body is not aws-chunked.
    Raises BadDigest, InvalidDigest, InvalidRequest."""
    declared = declared_checksums(headers)
    trailing_algorithms = tuple(CHECKSUM_HEADERS[name] for name in trailing) if trailers is not None else ()
    if declared and trailing_algorithms:
        raise InvalidRequest("Expecting a single x-amz-checksum- header. Multiple checksum Types are not allowed.")
    named = algorithm_named(headers, "x-amz-sdk-checksum-algorithm", "x-amz-checksum-algorithm")
    known = (*declared, *trailing_algorithms)
    if named and known and named not in known:
        raise InvalidRequest("Value for x-amz-sdk-checksum-algorithm header is invalid.")

    def from_trailer() -> dict[str, str]:
        assert trailers is not None
        return {
            CHECKSUM_HEADERS[name]: check_checksum(CHECKSUM_HEADERS[name], value, name)
            for name, value in trailers.items()
        }

    return BodyChecks(
        size=size,
        md5=content_md5(headers),
        checksums=declared,
        algorithms=known or ((named,) if named else ()),
        trailing=from_trailer if trailing_algorithms else None,
    )


# --- access ----------------------------------------------------------------------------------------------------------


def check_acl(headers: Mapping[str, str]) -> None:
    value = headers.get("x-amz-acl", "private")
    if value not in CANNED_ACLS:
        raise InvalidArgument(ArgumentName="x-amz-acl", ArgumentValue=value)

"""Answers, as values. ``send`` writes them to the connection."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Protocol

from msgspec import Struct, field

from storaged.errors import InvalidArgument, S3Error
from storaged.objects.api import ObjectInfo, PutResult
from storaged.s3.headers import http_time
from storaged.wire import Buffer

Headers = dict[str, str]

XML_TYPE = "application/xml"

REASONS = {
    100: "Continue", 200: "OK", 201: "Created", 204: "No Content", 206: "Partial Content",
    301: "Moved Permanently", 302: "Found", 303: "See Other", 304: "Not Modified", 307: "Temporary Redirect",
    308: "Permanent Redirect",
    400: "Bad Request", 403: "Forbidden", 404: "Not Found", 405: "Method Not Allowed", 409: "Conflict",
    411: "Length Required", 412: "Precondition Failed", 416: "Requested Range Not Satisfiable",
    500: "Internal Server Error", 501: "Not Implemented", 503: "Service Unavailable",
}  # fmt: skip

CONTROL = re.compile("[\x00-\x08\x0a-\x1f\x7f]")
"""What a header's value must not contain."""
TOKEN = re.compile(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")
"""What RFC 9110 lets a header be called. A name of other letters would return from GetObject as another header, or
break the answer."""


class Pieces(Protocol):
    """A body that is sent piece by piece: an opened object (``ObjectStream``), or an answer that begins early."""

    @property
    def length(self) -> int: ...

    def chunks(self) -> AsyncIterator[Buffer]: ...

    async def close(self) -> None: ...


class Reply(Struct):
    """An answer. ``stream`` has an object's bytes, instead of ``body``. ``length``: Content-Length if it is not that of
    ``body`` (HEAD). ``release``: called when the body was sent, or will not be; its memory is used again."""

    status: int = 200
    headers: Headers = field(default_factory=dict)
    body: Buffer = b""
    length: int | None = None
    stream: Pieces | None = None
    release: Callable[[], None] | None = None
    code: str = ""
    """The S3 error's, for the access log."""


def xml_reply(body: bytes, status: int = 200, headers: Headers | None = None) -> Reply:
    found = {"Content-Type": XML_TYPE}
    if headers:
        found.update(headers)
    return Reply(status, found, body)


def checked_header(name: str, value: str) -> str:
    """The value of a query parameter that the answer has as a header. Raises InvalidArgument for control characters
    (header injection)."""
    if CONTROL.search(value):
        raise InvalidArgument("Header values cannot contain control characters.", ArgumentName=name)
    return value


def version_header(version_id: str, headers: Headers) -> None:
    """``version_id`` is empty in a bucket that never had versioning: it names no version, as on AWS."""
    if version_id:
        headers["x-amz-version-id"] = version_id


MARKER_DETAILS = frozenset({"DeleteMarker", "MarkerVersionId", "ModifiedMs"})
"""Details of an error that its answer has as headers."""


def marker_headers(error: S3Error, headers: Headers) -> None:
    """What the answer says of a delete marker that was in the way."""
    details = error.details
    if "DeleteMarker" in details:
        headers["x-amz-delete-marker"] = details["DeleteMarker"]
        version_header(details.get("MarkerVersionId", ""), headers)
    if "ModifiedMs" in details:
        headers["Last-Modified"] = http_time(int(details["ModifiedMs"]) // 1000)


def checksum_headers(checksums: Mapping[str, str], checksum_type: str, headers: Headers) -> None:
    for algorithm, value in checksums.items():
        headers[f"x-amz-checksum-{algorithm.lower()}"] = value
    if checksums and checksum_type:
        headers["x-amz-checksum-type"] = checksum_type


def stored_headers(result: PutResult) -> Headers:
    """Headers of PutObject's and UploadPart's answers. They name SSE-S3; for another encryption
    ``encryption.written_headers`` changes them."""
    headers = {"ETag": f'"{result.etag}"', "x-amz-server-side-encryption": "AES256"}
    version_header(result.version_id, headers)
    checksum_headers(result.checksums, result.checksum_type, headers)
    return headers


_HEADER_NAMES = {
    "content-type": "Content-Type",
    "cache-control": "Cache-Control",
    "content-disposition": "Content-Disposition",
    "content-encoding": "Content-Encoding",
    "content-language": "Content-Language",
    "expires": "Expires",
}


def object_headers(info: ObjectInfo, *, checksums: bool) -> Headers:
    """Headers of GetObject's and HeadObject's answers. ``checksums``: the client asked for them, and the answer is the
    whole object. They name SSE-S3, as those of ``stored_headers``."""
    headers = {
        "Last-Modified": http_time(info.modified_ms // 1000),
        "ETag": f'"{info.etag}"',
        "Accept-Ranges": "bytes",
        "Content-Type": "binary/octet-stream",
        "x-amz-server-side-encryption": "AES256",
    }
    for name, value in info.headers.items():
        headers[_HEADER_NAMES.get(name, name)] = value
    for name, value in info.user.items():
        headers[f"x-amz-meta-{name}"] = value
    if info.tags:
        headers["x-amz-tagging-count"] = str(len(info.tags))
    if info.storage_class != "STANDARD":
        headers["x-amz-storage-class"] = info.storage_class
    version_header(info.version_id, headers)
    if checksums:
        checksum_headers(info.checksums, info.checksum_type, headers)
    return headers

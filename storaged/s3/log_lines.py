"""The lines of access logs, and the names of the objects that have them, as AWS writes them. Pure.

https://docs.aws.amazon.com/AmazonS3/latest/userguide/LogFormat.html
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import Final, NamedTuple
from urllib.parse import quote, quote_from_bytes

from storaged.objects.api import Principal
from storaged.objects.configuration.logging import DELIVERY_TIME, EVENT_TIME, BucketLogging
from storaged.objects.identity import account_of
from storaged.objects.records import BucketRecord
from storaged.s3.request import RequestDone

_MONTHS: Final = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")
_QUOTED_SAFE: Final = " !#$%&'()*+,-./:;<=>?@[]^_`{|}~"
"""Not the quotation mark, the backslash, control characters, and what is not ASCII."""

_SPECIAL: Final = {
    "CopyObject": "REST.COPY.OBJECT",
    "UploadPartCopy": "REST.COPY.PART",
}
_RESOURCES: Final = {
    **dict.fromkeys(("ListObjects", "ListObjectsV2", "HeadBucket", "CreateBucket", "DeleteBucket"), "BUCKET"),
    **dict.fromkeys(("GetObject", "HeadObject", "PutObject", "PostObject", "DeleteObject", "Website"), "OBJECT"),
    **dict.fromkeys(("CompleteMultipartUpload", "AbortMultipartUpload", "ListParts"), "UPLOAD"),
    **dict.fromkeys(("CreateMultipartUpload", "ListMultipartUploads"), "UPLOADS"),
    **dict.fromkeys(("GetBucketPolicy", "PutBucketPolicy", "DeleteBucketPolicy"), "BUCKETPOLICY"),
    **dict.fromkeys(("GetBucketLogging", "PutBucketLogging"), "LOGGING_STATUS"),
    **dict.fromkeys(("GetObjectAcl", "PutObjectAcl", "GetBucketAcl", "PutBucketAcl"), "ACL"),
    "DeleteObjects": "MULTI_OBJECT_DELETE",
    "ListObjectVersions": "BUCKETVERSIONS",
    "UploadPart": "PART",
}
_VERB: Final = re.compile(r"^(?:Get|Put|Delete|Create|List|Update|Head)(?:Bucket(?!Policy))?|Configuration$")
_WORD: Final = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")


class Spoken(NamedTuple):
    """What a connection knows and a request does not. ``host_id``: x-amz-id-2. Empty: not known."""

    host_id: str = ""
    cipher: str = ""
    tls: str = ""


def operation_of(name: str, method: str) -> str:
    """``REST.GET.OBJECT``. ``name``: of the operation here."""
    if name in _SPECIAL:
        return _SPECIAL[name]
    resource = _RESOURCES.get(name) or _WORD.sub("_", _VERB.sub("", name)).upper() or "UNKNOWN"
    return f"{'WEBSITE' if name == 'Website' else 'REST'}.{method or 'UNKNOWN'}.{resource}"


def lines_of(done: RequestDone, bucket: BucketRecord, began_ms: int, spoken: Spoken) -> Iterator[str]:
    """The line of a request to a bucket, with its end, and one for each key that it deletes beside its own: the keys of
    DeleteObjects, and the old one of RenameObject. ``began_ms``: when the request came."""
    request, reply = done.request, done.reply
    line = _line_of(done, bucket, began_ms, spoken)
    operation, sent = operation_of(request.operation, request.method), str(done.bytes_out or "-")
    yield line(operation, request.key, reply.status, reply.code, sent, _version(done))
    for one in request.batch or ():
        yield line("BATCH.DELETE.OBJECT", one.key, one.status, one.code, "-", one.version)


def _line_of(
    done: RequestDone, bucket: BucketRecord, began_ms: int, spoken: Spoken
) -> Callable[[str, bytes, int, str, str, str], str]:
    """Makes a line of its operation, key, status, error code, sent bytes and version id. What the lines of a request
    have in common is made once: there may be a thousand, and headers are long."""
    request, headers = done.request, done.request.headers
    signed = bool(request.who.access_key)
    by_header = "authorization" in headers
    first = (
        bucket.owner,
        bucket.name,
        _moment(began_ms),
        request.remote or "-",
        _requester(request.who),
        request.id,
    )
    middle = (
        _size(done),
        str(int(done.duration_s * 1000)),
        "-",
        _quoted(headers.get("referer", "-")),
        _quoted(headers.get("user-agent", "-")),
    )
    last = (
        spoken.host_id or "-",
        "SigV4" if signed else "-",
        spoken.cipher or "-",
        ("AuthHeader" if by_header else "QueryString") if signed else "-",
        quote(headers.get("host", ""), safe="/:[]") or "-",
        spoken.tls or "-",
        "-",
        "-",
    )
    asked = _quoted(f"{request.method} {done.target} HTTP/1.{1 if request.http11 else 0}")
    before, between, after = " ".join(first), " ".join(middle), " ".join(last)

    def line(operation: str, key: bytes, status: int, code: str, sent: str, version: str) -> str:
        named, its_version = quote_from_bytes(key) or "-", quote(version) or "-"
        return f"{before} {operation} {named} {asked} {status} {code or '-'} {sent} {between} {its_version} {after}\n"

    return line


def _version(done: RequestDone) -> str:
    return done.request.query.get("versionId", "") or done.reply.headers.get("x-amz-version-id", "")


def _requester(who: Principal) -> str:
    """The canonical id of an account's root, the ARN of another identity."""
    if not who.access_key:
        return "-"
    return who.identity.arn if who.identity is not None else who.user_id


def _moment(ms: int) -> str:
    found = datetime.fromtimestamp(ms / 1000, UTC)
    return f"[{found.day:02d}/{_MONTHS[found.month - 1]}/{found.year}:{found:%H:%M:%S} +0000]"


def _quoted(text: str) -> str:
    return f'"{quote(text.encode("utf-8", "surrogateescape"), safe=_QUOTED_SAFE)}"'


def _size(done: RequestDone) -> str:
    """The size of the object, as far as request or answer say it."""
    request, reply = done.request, done.reply
    if request.operation in ("PutObject", "UploadPart") and reply.status == 200:
        # only for a body in aws-chunked the first one counts, and was checked
        name = "content-length" if request.body.decoder is None else "x-amz-decoded-content-length"
        return request.headers.get(name) or "-"
    if request.operation not in ("GetObject", "HeadObject", "Website") or reply.code:
        return "-"
    whole = reply.headers.get("Content-Range", "").rpartition("/")[2]
    if whole or reply.status != 200:
        return whole or "-"
    return str(reply.length if reply.length is not None else len(reply.body))


def day_of(ms: int) -> int:
    return ms // 86_400_000


def key_of(
    setting: BucketLogging, source: BucketRecord, region: str, day: int, delivered_ms: int, unique: str
) -> bytes:
    """The key of an object with lines of one ``day``, by the format of the target. ``unique``: 16 hex digits."""
    moment = datetime.fromtimestamp(delivered_ms / 1000, UTC)
    if setting.format not in (EVENT_TIME, DELIVERY_TIME):
        return f"{setting.prefix}{moment:%Y-%m-%d-%H-%M-%S}-{unique}".encode()
    if setting.format == EVENT_TIME:
        moment = datetime.fromtimestamp(day * 86_400, UTC)
    place = f"{account_of(source.owner)}/{region}/{source.name}/{moment:%Y/%m/%d}"
    return f"{setting.prefix}{place}/{moment:%Y-%m-%d-%H-%M-%S}-{unique}".encode()

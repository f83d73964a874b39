"""Objects: put, get, head, delete (one and many), attributes, tags."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from functools import partial

from msgspec.structs import replace

from storaged import errors
from storaged.objects.api import (
    NO_WRITE_CONDITIONS,
    PART_BYTES_MAX,
    BodyChecks,
    NewMeta,
    ObjectInfo,
    ObjectStream,
    RangeSpec,
    ReadConditions,
    WriteConditions,
)
from storaged.objects.read.get import span_of
from storaged.objects.records import SealedPart
from storaged.s3 import conditions as c
from storaged.s3 import headers as h
from storaged.s3 import xml
from storaged.s3.context import Front
from storaged.s3.documents import parse_document
from storaged.s3.ops.acl import own_acl
from storaged.s3.ops.tags import read_tagging, write_tagging
from storaged.s3.reply import (
    Headers,
    Reply,
    checked_header,
    checksum_headers,
    object_headers,
    stored_headers,
    version_header,
    xml_reply,
)
from storaged.s3.request import Request, check_key, version_of

log = logging.getLogger("storaged.s3")

DELETE_KEYS_MAX = 1000
ATTRIBUTE_PARTS_MAX = 1000

_OVERRIDES = {
    "response-content-type": "Content-Type",
    "response-content-language": "Content-Language",
    "response-expires": "Expires",
    "response-cache-control": "Cache-Control",
    "response-content-disposition": "Content-Disposition",
    "response-content-encoding": "Content-Encoding",
}


# --- writing ----------------------------------------------------------------------------------------------------------


def upload_checks(request: Request, bytes_max: int) -> BodyChecks:
    """What PutObject's and UploadPart's bodies must be. Raises MissingContentLength, EntityTooLarge, InvalidDigest,
    InvalidRequest.
    """
    headers, body = request.headers, request.body
    size = body.length
    decoder = body.decoder
    if decoder is not None:
        declared = headers.get("x-amz-decoded-content-length", "")
        if not declared:
            raise errors.MissingContentLength("You must provide the x-amz-decoded-content-length HTTP header.")
        size = h.integer("x-amz-decoded-content-length", declared, 0, 2**63)
    elif not body.declared:
        raise errors.MissingContentLength()
    if size is not None and size > bytes_max:
        raise errors.EntityTooLarge(ProposedSize=str(size), MaxSizeAllowed=str(bytes_max))
    trailing = h.trailing_names(headers) if decoder is not None else ()
    checks = h.body_checks(headers, size, trailing, decoder.trailers if decoder is not None else None)
    return replace(checks, sha256=body.sha256) if body.sha256 else checks


_PLAIN = h.INCIDENTAL | {"expect"}
"""With these alone a PUT says nothing of its object but its type and size."""


def put_asked(
    request: Request, check: Callable[[Headers], None] | None = None
) -> tuple[NewMeta, BodyChecks, WriteConditions]:
    """What PutObject asks for. ``check``: of headers, unless they have been checked; common ones need none. Raises as
    ``upload_checks`` and ``check``, and for values that are wrong."""
    headers, body = request.headers, request.body
    if headers.keys() <= _PLAIN and body.declared and body.decoder is None and (body.length or 0) <= PART_BYTES_MAX:
        kind = headers.get("content-type")
        return (
            NewMeta({"content-type": h.readable("content-type", kind)} if kind else {}),
            BodyChecks(body.length, sha256=body.sha256),
            NO_WRITE_CONDITIONS,
        )
    if check is not None:
        check(headers)
    return h.new_meta(headers), upload_checks(request, PART_BYTES_MAX), c.write_conditions(headers)


async def put_object(front: Front, request: Request) -> Reply:
    meta, checks, conditions = put_asked(request)
    result = await front.objects.put(
        request.bucket_record, request.key, request.body, meta, checks, owner=request.who.user_id, conditions=conditions
    )
    return Reply(headers=stored_headers(result))


async def delete_object(front: Front, request: Request) -> Reply:
    """Deleting what is not there succeeds."""
    result = await front.objects.delete(
        request.bucket_record,
        request.key,
        version_id=version_of(request),
        conditions=c.delete_conditions(request.headers),
    )
    headers: Headers = {}
    version_header(result.version_id, headers)
    if result.delete_marker:
        headers["x-amz-delete-marker"] = "true"
    return Reply(204, headers)


async def delete_objects(front: Front, request: Request) -> Reply:
    """Up to 1,000 keys; each answers for itself."""
    body = request.document
    root = await parse_document(partial(xml.parse, root="Delete"), body)
    wanted = root.all("Object")
    others = [child for child in root.children if child.name != "Object"]
    if not wanted or len(wanted) > DELETE_KEYS_MAX or any(child.name != "Quiet" for child in others):
        raise errors.MalformedXML()
    quiet = bool(others) and others[0].text.strip().lower() == "true"
    entries = [node.fields({"Key", "VersionId", "ETag", "LastModifiedTime", "Size"}) for node in wanted]
    if any(not entry.get("Key") for entry in entries):
        raise errors.MalformedXML()
    lines = [""] * len(entries)
    following = iter(range(len(entries)))

    async def worker() -> None:
        for index in following:
            lines[index] = await _delete_entry(front, request, entries[index], quiet)

    async with asyncio.TaskGroup() as group:
        for _ in range(min(len(entries), front.limits.deletes_in_flight_max)):
            group.create_task(worker())
    return xml_reply(xml.document("DeleteResult", *lines))


async def _delete_entry(front: Front, request: Request, entry: dict[str, str], quiet: bool) -> str:
    key = entry["Key"].encode()
    version = entry.get("VersionId", "")
    named = f"<Key>{xml.escape(entry['Key'])}</Key>{xml.optional('VersionId', version)}"
    try:
        check_key(key)
        if "VersionId" in entry and not version:
            raise errors.InvalidArgument("Version id cannot be the empty string")
        result = await front.objects.delete(
            request.bucket_record, key, version_id=version, conditions=c.entry_conditions(entry)
        )
    except errors.S3Error as error:
        return f"<Error>{named}{xml.element('Code', error.code)}{xml.element('Message', error.message)}</Error>"
    except Exception:
        log.exception("DeleteObjects failed for one key, request %s", request.id)
        return (
            f"<Error>{named}<Code>InternalError</Code><Message>An internal error occurred. Try again.</Message></Error>"
        )
    if quiet:
        return ""
    marker = ""
    if result.delete_marker:
        marker = f"<DeleteMarker>true</DeleteMarker>{xml.optional('DeleteMarkerVersionId', result.version_id)}"
    return f"<Deleted>{named}{marker}</Deleted>"


# --- reading ----------------------------------------------------------------------------------------------------------


def _part_number(request: Request) -> int | None:
    if not request.query:
        return None
    text = request.query.get("partNumber")
    if text is None:
        return None
    if "range" in request.headers:
        raise errors.InvalidRequest("Cannot specify both Range header and partNumber query parameter")
    return h.integer("partNumber", text, 1, 10_000)


def _overrides(request: Request) -> Headers:
    """response-* parameters; anonymous requests may not have them."""
    headers: Headers = {}
    for name, header in _OVERRIDES.items() if request.query else ():
        if name in request.query:
            if not request.who.access_key:
                raise errors.InvalidRequest(
                    "Request specific response headers cannot be used for anonymous GET requests."
                )
            headers[header] = checked_header(name, request.query[name])
    return headers


async def get_object(front: Front, request: Request) -> Reply:
    headers = request.headers
    overrides = _overrides(request)
    part_number = _part_number(request)
    span = h.parse_range(headers["range"]) if "range" in headers else None
    conditions = c.read_conditions(headers)
    stream = await _open(front, request, conditions, span, part_number)
    if span is not None and "if-range" in headers and not _still_same(headers["if-range"], stream.info):
        await stream.close()
        stream = await _open(front, request, conditions, None, None)
    try:
        info = stream.info
        whole = not stream.partial and part_number is None
        answer = object_headers(info, checksums=whole and h.wants_checksums(headers))
        if overrides:
            answer.update(overrides)
        if part_number is not None:
            _describe_part(request, info, part_number, answer)
        partial = stream.partial and stream.length > 0  # a part may be empty, a range that HTTP can name is not
        if partial:
            answer["Content-Range"] = f"bytes {stream.first}-{stream.first + stream.length - 1}/{info.size}"
        status = 206 if partial else 200
        if stream.held is not None:
            return Reply(status, answer, stream.held)
        return Reply(status, answer, length=stream.length, stream=stream)
    except BaseException:
        await stream.close()
        raise


def _describe_part(request: Request, info: ObjectInfo, number: int, answer: Headers) -> None:
    """The n-th part of a multipart upload, with its own checksum; or all of an object that was not uploaded in parts,
    which is its part 1.
    """
    if info.part_count:
        answer["x-amz-mp-parts-count"] = str(info.part_count)
    if not h.wants_checksums(request.headers):
        return
    if not info.part_count:
        checksum_headers(info.checksums, info.checksum_type, answer)
        return
    algorithm = next(iter(info.checksums), "")
    if algorithm and number <= len(info.parts) and info.parts[number - 1].checksum:
        checksum_headers({algorithm: info.parts[number - 1].checksum}, info.checksum_type, answer)


async def _open(
    front: Front, request: Request, conditions: ReadConditions, span: RangeSpec | None, part_number: int | None
) -> ObjectStream:
    return await front.objects.get(
        request.bucket_record,
        request.key,
        version_id=version_of(request),
        conditions=conditions,
        span=span,
        part_number=part_number,
        reading=request.reading,
    )


def _still_same(if_range: str, info: ObjectInfo) -> bool:
    """If-Range: one strong entity tag, or the very date of Last-Modified (RFC 9110, section 13.1.5)."""
    if c.parse_tag(if_range) == info.etag:
        return True
    moment_ms = c.parse_http_time(if_range)
    return moment_ms is not None and moment_ms == info.modified_ms // 1000 * 1000


async def head_object(front: Front, request: Request) -> Reply:
    """As GetObject, range included; the length is the one that GET would send."""
    headers = request.headers
    overrides = _overrides(request)
    part_number = _part_number(request)
    info = await front.objects.head(
        request.bucket_record,
        request.key,
        version_id=version_of(request),
        conditions=c.read_conditions(headers),
        part_number=part_number,
        reading=request.reading,
    )
    span = h.parse_range(headers["range"]) if "range" in headers else None
    if span is not None and "if-range" in headers and not _still_same(headers["if-range"], info):
        span = None
    wanted = span_of(span, info.size)
    first, length = wanted.first, wanted.length
    if part_number is not None and info.part_count:
        first = sum(part.size for part in info.parts[: part_number - 1])
        length = info.parts[part_number - 1].size
    partial = (wanted.partial or part_number is not None) and length > 0
    answer = object_headers(info, checksums=not wanted.partial and part_number is None and h.wants_checksums(headers))
    if overrides:
        answer.update(overrides)
    if part_number is not None:
        _describe_part(request, info, part_number, answer)
    if partial:
        answer["Content-Range"] = f"bytes {first}-{first + length - 1}/{info.size}"
    return Reply(206 if partial else 200, answer, length=length)


async def get_attributes(front: Front, request: Request) -> Reply:
    wanted = {name.strip() for name in request.headers.get("x-amz-object-attributes", "").split(",") if name.strip()}
    known = {"ETag", "Checksum", "ObjectParts", "StorageClass", "ObjectSize"}
    if not wanted or wanted - known:
        raise errors.InvalidArgument("Invalid attribute name specified.", ArgumentName="x-amz-object-attributes")
    headers = request.headers
    limit = (
        h.integer("x-amz-max-parts", headers["x-amz-max-parts"], 0, 2**31 - 1)
        if headers.get("x-amz-max-parts")
        else ATTRIBUTE_PARTS_MAX
    )
    marker_text = headers.get("x-amz-part-number-marker", "")
    marker = h.integer("x-amz-part-number-marker", marker_text, 0, 2**31 - 1) if marker_text else 0
    info = await front.objects.head(
        request.bucket_record, request.key, version_id=version_of(request), conditions=c.read_conditions(headers)
    )
    content = []
    if "ETag" in wanted:
        content.append(xml.element("ETag", info.etag))
    if "Checksum" in wanted and info.checksums:
        values = "".join(xml.element(f"Checksum{name}", value) for name, value in info.checksums.items())
        content.append(f"<Checksum>{values}{xml.optional('ChecksumType', info.checksum_type)}</Checksum>")
    if "ObjectParts" in wanted and info.part_count:
        content.append(_object_parts(info, marker, min(limit, ATTRIBUTE_PARTS_MAX)))
    if "StorageClass" in wanted:
        content.append(xml.element("StorageClass", info.storage_class))
    if "ObjectSize" in wanted:
        content.append(xml.element("ObjectSize", info.size))
    answer: Headers = {"Last-Modified": h.http_time(info.modified_ms // 1000)}
    version_header(info.version_id, answer)
    return xml_reply(xml.document("GetObjectAttributesResponse", *content), headers=answer)


def _object_parts(info: ObjectInfo, marker: int, limit: int) -> str:
    """Parts are listed one by one only when the object was uploaded with checksums, as on AWS."""
    total = f"<PartsCount>{info.part_count}</PartsCount>"
    algorithm = next(iter(info.checksums), "")
    behind = [part for part in info.parts if part.number > marker]
    page = behind[:limit]

    def row(part: SealedPart) -> str:
        checksum = xml.element(f"Checksum{algorithm}", part.checksum) if algorithm and part.checksum else ""
        return f"<Part><PartNumber>{part.number}</PartNumber><Size>{part.size}</Size>{checksum}</Part>"

    last = page[-1].number if page else marker
    return (
        f"<ObjectParts>{total}<PartNumberMarker>{marker}</PartNumberMarker><NextPartNumberMarker>{last}</NextPartNumberMarker>"
        f"<MaxParts>{limit}</MaxParts>{xml.boolean('IsTruncated', len(behind) > len(page))}{''.join(row(part) for part in page)}</ObjectParts>"  # noqa: E501
    )


# --- tags and access
# ----------------------------------------------------------------------------------------------------


async def get_tagging(front: Front, request: Request) -> Reply:
    info = await front.objects.head(request.bucket_record, request.key, version_id=version_of(request))
    headers: Headers = {}
    version_header(info.version_id, headers)
    return xml_reply(write_tagging(info.tags), headers=headers)


async def put_tagging(front: Front, request: Request) -> Reply:
    tags = await read_tagging(request, h.TAGS_PER_OBJECT_MAX)
    version = await front.objects.set_tags(request.bucket_record, request.key, tags, version_id=version_of(request))
    headers: Headers = {}
    version_header(version, headers)
    return Reply(headers=headers)


async def delete_tagging(front: Front, request: Request) -> Reply:
    version = await front.objects.set_tags(request.bucket_record, request.key, {}, version_id=version_of(request))
    headers: Headers = {}
    version_header(version, headers)
    return Reply(204, headers)


async def get_acl(front: Front, request: Request) -> Reply:
    info = await front.objects.head(request.bucket_record, request.key, version_id=version_of(request))
    return xml_reply(own_acl(info.owner or request.bucket_record.owner, request.who))


async def get_torrent(front: Front, request: Request) -> Reply:
    """There are no torrents, so no object has one."""
    raise errors.NoSuchKey("The specified key has no torrent.", Key=request.key.decode())

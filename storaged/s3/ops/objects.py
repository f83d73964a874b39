"""Objects: put, get, head, delete (one and many), attributes, tags.

PutObject, GetObject and HeadObject also have an ``Attempt``: the same steps without a task. The decisions stand in
functions that both use: ``put_asked`` (what a PUT asks for), ``_described`` (status and headers of an object's answer).
"""

from __future__ import annotations

import asyncio
import logging
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
    PutResult,
    RangeSpec,
    ReadConditions,
    Reading,
    ReadResult,
    WriteConditions,
)
from storaged.objects.read.get import Span, span_of
from storaged.objects.records import SealedPart
from storaged.s3 import conditions as c
from storaged.s3 import headers as h
from storaged.s3 import xml
from storaged.s3.context import Front
from storaged.s3.documents import parse_document
from storaged.s3.operation import Attempt, OnReply
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


PutAsked = tuple[NewMeta, BodyChecks, WriteConditions]


def put_asked(request: Request) -> PutAsked:
    """What PutObject asks for, of a request whose headers have been checked. Raises as ``upload_checks``, and S3 errors
    for values that are wrong."""
    headers, body = request.headers, request.body
    if headers.keys() <= _PLAIN and body.declared and body.decoder is None and (body.length or 0) <= PART_BYTES_MAX:
        kind = headers.get("content-type")
        return (
            NewMeta({"content-type": h.readable("content-type", kind)} if kind else {}),
            BodyChecks(body.length, sha256=body.sha256),
            NO_WRITE_CONDITIONS,
        )
    return h.new_meta(headers), upload_checks(request, PART_BYTES_MAX), c.write_conditions(headers)


async def put_object(front: Front, request: Request) -> Reply:
    meta, checks, conditions = request.asked or put_asked(request)
    result = await front.objects.put(
        request.bucket_record, request.key, request.body, meta, checks, owner=request.who.user_id, conditions=conditions
    )
    return Reply(headers=stored_headers(result))


def _may_be_small(front: Front, request: Request) -> bool:
    """Whether the headers announce a small object. One in aws-chunked form has its size in a header of its own."""
    length = request.body.length
    if length is not None and length <= front.objects.small_bytes_max:
        return _names_no_parameter(request)
    return "x-amz-decoded-content-length" in request.headers and _names_no_parameter(request)


def _prepare_put(front: Front, request: Request) -> bool:
    request.asked = put_asked(request)
    size = request.asked[1].size
    return size is not None and size <= front.objects.small_bytes_max


def _try_put(front: Front, request: Request, on_reply: OnReply) -> bool:
    plain = request.body.try_whole()
    if plain is None or request.asked is None:
        return False
    meta, checks, conditions = request.asked
    on_stored = partial(_on_stored, front, request, on_reply)
    return front.objects.try_put(
        request.bucket_record,
        request.key,
        plain,
        meta,
        checks,
        on_stored,
        owner=request.who.user_id,
        conditions=conditions,
    )


def _on_stored(front: Front, request: Request, on_reply: OnReply, result: PutResult | Exception) -> None:
    if isinstance(result, PutResult):
        on_reply(Reply(headers=stored_headers(result)))
    elif isinstance(result, errors.NoSuchBucket) and front.buckets.gone(request.bucket_record):
        on_reply(None)  # nothing was stored; another bucket may have the name now
    else:
        on_reply(result)


PUT_ATTEMPT = Attempt(_may_be_small, _prepare_put, _try_put)


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
        wanted = Span(stream.first, stream.length, stream.partial)
        status, answer = _described(request, stream.info, wanted, part_number)
        answer.update(overrides)
        if stream.held is not None:
            return Reply(status, answer, stream.held)
        return Reply(status, answer, length=stream.length, stream=stream)
    except BaseException:
        await stream.close()
        raise


def _described(request: Request, info: ObjectInfo, wanted: Span, part_number: int | None = None) -> tuple[int, Headers]:
    """Status and headers of an answer with the bytes ``wanted`` of an object: all of it, a range, or a part."""
    answer = object_headers(info, checksums=not wanted.partial and h.wants_checksums(request.headers))
    if part_number is not None:
        _describe_part(request, info, part_number, answer)
    if not wanted.partial or not wanted.length:  # a part may be empty, a range that HTTP can name is not
        return 200, answer
    answer["Content-Range"] = f"bytes {wanted.first}-{wanted.first + wanted.length - 1}/{info.size}"
    return 206, answer


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
    if part_number is not None:
        wanted = wanted._replace(partial=True)
        if info.part_count:
            first = sum(part.size for part in info.parts[: part_number - 1])
            wanted = Span(first, info.parts[part_number - 1].size, True)
    status, answer = _described(request, info, wanted, part_number)
    answer.update(overrides)
    return Reply(status, answer, length=wanted.length)


_WHOLE = h.INCIDENTAL | {"x-amz-checksum-mode"}
"""With these headers alone, which SDKs send, a GET or HEAD asks for a whole object, and perhaps for its checksums."""


def _wants_whole(front: Front, request: Request) -> bool:
    return not request.body.length and request.headers.keys() <= _WHOLE and _names_no_parameter(request)


def _names_no_parameter(request: Request) -> bool:
    """``x-id`` repeats the operation's name; some SDKs send it."""
    return not request.query or request.query.keys() == {"x-id"}


def _nothing_to_prepare(front: Front, request: Request) -> bool:
    return True


def _try_get(front: Front, request: Request, on_reply: OnReply) -> bool:
    front.objects.try_read(request.bucket_record, request.key, True, partial(_on_read, request, on_reply))
    return True


def _try_head(front: Front, request: Request, on_reply: OnReply) -> bool:
    front.objects.try_read(request.bucket_record, request.key, False, partial(_on_read, request, on_reply))
    return True


def _on_read(request: Request, on_reply: OnReply, found: ReadResult) -> None:
    try:
        if isinstance(found, ObjectInfo):
            status, answer = _described(request, found, Span(0, found.size, False))
            reply = Reply(status, answer, length=found.size)
        elif found is None or isinstance(found, Reading | errors.StoragedError):
            request.reading = found if isinstance(found, Reading) else None
            on_reply(found if isinstance(found, errors.NoSuchKey) else None)
            return
        else:
            status, answer = _described(request, found.info, Span(found.first, found.length, found.partial))
            reply = Reply(status, answer, found.held or b"")
    except Exception as error:
        on_reply(error)
        return
    on_reply(reply)


GET_ATTEMPT = Attempt(_wants_whole, _nothing_to_prepare, _try_get)
HEAD_ATTEMPT = Attempt(_wants_whole, _nothing_to_prepare, _try_head)


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

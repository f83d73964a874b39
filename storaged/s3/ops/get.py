"""GetObject and HeadObject, with a task and without one (``operation.Attempt``).

Both ways share ``_describe``, which makes the status and headers of an answer.
"""

from __future__ import annotations

from functools import partial

from storaged import errors
from storaged.objects.api import FailedRead, ObjectInfo, ObjectStream, RangeSpec, ReadConditions, Reading, ReadResult
from storaged.objects.read.span import Span, span_of
from storaged.s3 import conditions as c
from storaged.s3 import headers as h
from storaged.s3.context import Front
from storaged.s3.encryption import customer_key, encryption_headers
from storaged.s3.lifecycle import read_expiration
from storaged.s3.locks import lock_headers
from storaged.s3.operation import Attempt, OnReply
from storaged.s3.reply import Headers, Reply, checked_header, checksum_headers, object_headers
from storaged.s3.request import Request, has_no_parameters, version_of

_OVERRIDES = {
    "response-content-type": "Content-Type",
    "response-content-language": "Content-Language",
    "response-expires": "Expires",
    "response-cache-control": "Cache-Control",
    "response-content-disposition": "Content-Disposition",
    "response-content-encoding": "Content-Encoding",
}


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
    conditions = c.read_conditions(headers, front.clock.wall_ms())
    stream = await _open(front, request, conditions, span, part_number)
    if span is not None and "if-range" in headers and not _still_same(headers["if-range"], stream.info):
        await stream.close()
        stream = await _open(front, request, conditions, None, None)
    try:
        wanted = Span(stream.first, stream.length, stream.partial)
        status, answer = _describe(front, request, stream.info, wanted, part_number)
        answer.update(overrides)
        if stream.held is not None:
            return Reply(status, answer, stream.held, release=stream.release)
        return Reply(status, answer, length=stream.length, stream=stream)
    except BaseException:
        await stream.close()
        raise


def _describe(
    front: Front, request: Request, info: ObjectInfo, wanted: Span | None = None, part_number: int | None = None
) -> tuple[int, Headers]:
    """Status and headers of an answer with the bytes ``wanted`` of an object: a range, a part, or all (None too)."""
    partial = wanted is not None and wanted.partial
    answer = object_headers(info, checksums=not partial and h.wants_checksums(request.headers))
    lock_headers(info.lock, answer)
    if not request.bucket_record.plain:
        read_expiration(front, request, info, answer)
    if info.encryption is not None:
        encryption_headers(info.encryption, request.headers, answer)
    if part_number is not None:
        _describe_part(request, info, part_number, answer)
    if wanted is None or not partial or not wanted.length:  # a part may be empty, a range that HTTP can name is not
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
        request.grant,
        request.key,
        version_id=version_of(request),
        conditions=conditions,
        span=span,
        part_number=part_number,
        reading=request.reading,
        failed=request.read_error,
        customer_key=customer_key(front, request),
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
        request.grant,
        request.key,
        version_id=version_of(request),
        conditions=c.read_conditions(headers, front.clock.wall_ms()),
        part_number=part_number,
        reading=request.reading,
        customer_key=customer_key(front, request),
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
    status, answer = _describe(front, request, info, wanted, part_number)
    answer.update(overrides)
    return Reply(status, answer, length=wanted.length)


# --- without a task ---------------------------------------------------------------------------------------------------

WHOLE_HEADERS = h.INCIDENTAL | {"x-amz-checksum-mode"}
"""With these headers alone, which SDKs send, a GET or HEAD asks for a whole object, and perhaps for its checksums."""


RANGE_HEADERS = WHOLE_HEADERS | {"range"}
"""The same of a GET that may ask for a range."""


def _wants_whole(front: Front, request: Request) -> bool:
    return not request.body.length and request.headers.keys() <= WHOLE_HEADERS and has_no_parameters(request)


def _wants_bytes(front: Front, request: Request) -> bool:
    return not request.body.length and request.headers.keys() <= RANGE_HEADERS and has_no_parameters(request)


def _try_get(front: Front, request: Request, on_reply: OnReply) -> bool:
    span = h.parse_range(request.headers["range"]) if "range" in request.headers else None
    front.objects.try_read(request.grant, request.key, True, partial(_on_read, front, request, on_reply), span)
    return True


def _try_head(front: Front, request: Request, on_reply: OnReply) -> bool:
    front.objects.try_read(request.grant, request.key, False, partial(_on_read, front, request, on_reply))
    return True


def _on_read(front: Front, request: Request, on_reply: OnReply, found: ReadResult) -> None:
    release = None
    try:
        if isinstance(found, ObjectInfo):
            status, answer = _describe(front, request, found)
            reply = Reply(status, answer, length=found.size)
        elif found is None or isinstance(found, Reading | FailedRead | errors.StoragedError):
            if isinstance(found, FailedRead):
                request.reading, request.read_error = found
            else:
                request.reading = found if isinstance(found, Reading) else None
            on_reply(found if isinstance(found, errors.NoSuchKey | errors.InvalidRange) else None)
            return
        else:
            release = found.release
            wanted = Span(found.first, found.length, found.partial)
            status, answer = _describe(front, request, found.info, wanted)
            reply = Reply(status, answer, found.held or b"", release=release)
    except Exception as error:
        if release is not None:
            release()
        on_reply(error)
        return
    on_reply(reply)


GET_ATTEMPT = Attempt(_wants_bytes, None, _try_get)
HEAD_ATTEMPT = Attempt(_wants_whole, None, _try_head)

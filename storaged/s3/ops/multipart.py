"""Multipart uploads: create, upload and list parts, complete, abort."""

from __future__ import annotations

from msgspec.structs import replace

from storaged import errors
from storaged.objects.api import PART_BYTES_MAX, PARTS_MAX, CompletedPart
from storaged.objects.write.checksums import can_be_composite, can_be_full_object, default_type
from storaged.s3 import conditions as c
from storaged.s3 import encryption as enc
from storaged.s3 import headers as h
from storaged.s3 import xml
from storaged.s3.context import Front
from storaged.s3.documents import parse_document
from storaged.s3.lifecycle import abort_headers, stored_expiration
from storaged.s3.locks import asked_lock
from storaged.s3.ops.acl import names_of, ownership
from storaged.s3.ops.put import upload_checks
from storaged.s3.origins import origin_of
from storaged.s3.reply import Headers, Reply, stored_headers, version_header, xml_reply
from storaged.s3.request import Request, origin

PARTS_PAGE_MAX = 1000
PART_NUMBER_CHARS_MAX = 32
"""With leading zeros. ``int`` refuses thousands of digits with another error."""


async def create(front: Front, request: Request) -> Reply:
    if not request.who.access_key:
        raise errors.AccessDenied("Anonymous users cannot initiate multipart uploads. Please authenticate.")
    headers = request.headers
    meta = replace(h.new_meta(headers), encryption=enc.asked(front, request, headers), lock=asked_lock(headers))
    algorithm, kind = _checksum_kind(headers)
    owner, acl = await ownership(front, request, headers)
    upload = await front.objects.create_upload(
        request.grant,
        request.key,
        replace(meta, acl=acl) if acl is not None else meta,
        owner=owner,
        initiator=request.who.user_id,
        algorithm=algorithm,
        checksum_type=kind,
    )
    answer = enc.written_headers(upload.encryption, request.headers, {enc.SSE: enc.S3})
    if algorithm:
        answer["x-amz-checksum-algorithm"] = algorithm
        answer["x-amz-checksum-type"] = kind
    abort_headers(front, request, upload, answer)
    body = xml.document(
        "InitiateMultipartUploadResult",
        xml.element("Bucket", request.bucket),
        f"<Key>{xml.escape_key(request.key)}</Key>{xml.element('UploadId', upload.upload_id)}",
    )
    return xml_reply(body, headers=answer)


def _checksum_kind(headers: dict[str, str]) -> tuple[str, str]:
    """(algorithm, FULL_OBJECT or COMPOSITE), both empty when the client asks for no checksum. Raises InvalidRequest."""
    algorithm = h.algorithm_named(headers, "x-amz-checksum-algorithm")
    kind = h.checksum_type(headers)
    if not algorithm:
        if kind:
            raise errors.InvalidRequest(
                "The x-amz-checksum-type header can only be used with the x-amz-checksum-algorithm header."
            )
        return "", ""
    kind = kind or default_type(algorithm)
    if not (can_be_full_object(algorithm) if kind == "FULL_OBJECT" else can_be_composite(algorithm)):
        raise errors.InvalidRequest(
            f"The {kind} checksum type cannot be used with the {algorithm.lower()} checksum algorithm."
        )
    return algorithm, kind


def part_number(request: Request) -> int:
    """partNumber of UploadPart and UploadPartCopy. Raises InvalidArgument, and MethodNotAllowed without one: such an
    operation does not exist."""
    if "partNumber" not in request.query:
        raise errors.MethodNotAllowed(Method=request.method, ResourceType="UPLOAD")
    return h.integer("partNumber", request.query["partNumber"], 1, PARTS_MAX)


async def put_part(front: Front, request: Request) -> Reply:
    number = part_number(request)
    checks = upload_checks(request, PART_BYTES_MAX)
    await enc.check_of_upload(front, request)
    result = await front.objects.put_part(
        request.grant,
        request.key,
        request.query["uploadId"],
        number,
        request.body,
        checks,
        customer_key=enc.customer_key(front, request),
    )
    answer = enc.written_headers(result.encryption, request.headers, stored_headers(result))
    answer.pop("x-amz-checksum-type", None)
    return Reply(headers=answer)


async def list_parts(front: Front, request: Request) -> Reply:
    query = request.query
    limit = (
        min(h.integer("max-parts", query["max-parts"], 0, 2**31 - 1), PARTS_PAGE_MAX)
        if query.get("max-parts")
        else PARTS_PAGE_MAX
    )
    marker = (
        h.integer("part-number-marker", query["part-number-marker"], 0, 2**31 - 1)
        if query.get("part-number-marker")
        else 0
    )
    upload, parts, following = await front.objects.list_parts(
        request.grant,
        request.key,
        query["uploadId"],
        after=min(marker, PARTS_MAX),
        limit=max(limit, 1),
        customer_key=enc.customer_key(front, request),
    )
    if limit == 0:
        parts, following = [], None
    names = await names_of(front, request.who, [upload.owner, upload.initiator])
    rows = "".join(
        f"<Part><PartNumber>{part.number}</PartNumber><LastModified>{xml.iso_time(part.modified_ms)}</LastModified>"
        f"<ETag>&quot;{part.etag}&quot;</ETag><Size>{part.size}</Size>"
        f"{xml.element(f'Checksum{part.checksum_algorithm}', part.checksum) if part.checksum else ''}</Part>"
        for part in parts
    )
    body = xml.document(
        "ListPartsResult",
        xml.element("Bucket", request.bucket),
        f"<Key>{xml.escape_key(request.key, query.get('encoding-type') == 'url')}</Key>",
        xml.element("UploadId", upload.upload_id),
        xml.owner(upload.initiator, names.get(upload.initiator, ""), "Initiator"),
        xml.owner(upload.owner, names.get(upload.owner, "")),
        f"<StorageClass>{upload.storage_class}</StorageClass><PartNumberMarker>{marker}</PartNumberMarker>",
        xml.element("NextPartNumberMarker", following if following is not None else parts[-1].number if parts else 0),
        f"<MaxParts>{limit}</MaxParts>{xml.boolean('IsTruncated', following is not None)}",
        xml.optional("ChecksumAlgorithm", upload.algorithm),
        xml.optional("ChecksumType", upload.checksum_type),
        rows,
    )
    answer: Headers = {}
    abort_headers(front, request, upload, answer)
    return xml_reply(body, headers=answer)


async def abort(front: Front, request: Request) -> Reply:
    await front.objects.abort(request.grant, request.key, request.query["uploadId"])
    return Reply(204)


async def complete(front: Front, request: Request) -> Reply:
    """A second, equal Complete gets the same answer as the first."""
    headers = request.headers
    conditions = c.write_conditions(headers)
    data = request.document
    if not data.strip():
        raise errors.MalformedXML("You must specify at least one part")
    parts = await parse_document(_completed_parts, data)
    size = headers.get("x-amz-mp-object-size")
    await enc.check_of_upload(front, request)
    result = await front.objects.complete(
        request.grant,
        request.key,
        request.query["uploadId"],
        parts,
        owner=request.who.user_id,
        checksums={algorithm: headers[name] for name, algorithm in h.CHECKSUM_HEADERS.items() if name in headers}
        or None,
        checksum_type=h.checksum_type(headers),
        declared_size=h.integer("x-amz-mp-object-size", size, 0, 2**63) if size is not None else None,
        conditions=conditions,
        customer_key=enc.customer_key(front, request),
        origin=origin_of(request, "ObjectCreated:CompleteMultipartUpload"),
    )
    answer = enc.written_headers(result.encryption, request.headers, {enc.SSE: enc.S3})
    version_header(result.version_id, answer)
    if not request.bucket_record.plain:
        stored_expiration(front, request, result, answer)
    body = xml.document(
        "CompleteMultipartUploadResult",
        xml.element("Location", f"{origin(request)}{request.resource}"),
        xml.element("Bucket", request.bucket),
        f"<Key>{xml.escape_key(request.key)}</Key><ETag>&quot;{result.etag}&quot;</ETag>",
        "".join(xml.element(f"Checksum{name}", value) for name, value in result.checksums.items()),
        xml.optional("ChecksumType", result.checksum_type if result.checksums else ""),
    )
    return xml_reply(body, headers=answer)


def _completed_parts(data: bytes) -> list[CompletedPart]:
    """Raises MalformedXML, InvalidPartOrder."""
    root = xml.parse(data, "CompleteMultipartUpload")
    if not root.children or len(root.children) > PARTS_MAX or any(node.name != "Part" for node in root.children):
        raise errors.MalformedXML()
    parts: list[CompletedPart] = []
    previous = 0
    for node in root.children:
        found = node.fields(_PART_FIELDS)
        text = found.get("PartNumber", "").strip()
        if "ETag" not in found or not text.isascii() or not text.isdigit() or len(text) > PART_NUMBER_CHARS_MAX:
            raise errors.MalformedXML()
        number = int(text)
        if not 1 <= number <= PARTS_MAX:
            raise errors.MalformedXML()
        if number < previous:
            raise errors.InvalidPartOrder()
        if number == previous:
            parts.pop()  # named twice, as after a part was sent again: the later line counts
        previous = number
        checksums = {
            h.CHECKSUM_ELEMENTS[name]: value for name, value in found.items() if name in h.CHECKSUM_ELEMENTS and value
        }
        parts.append(CompletedPart(number, c.parse_tag(found["ETag"].strip()) or "", checksums))
    return parts


_PART_FIELDS = frozenset({"PartNumber", "ETag", *h.CHECKSUM_ELEMENTS})

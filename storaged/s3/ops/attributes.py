"""The small properties of an object: GetObjectAttributes, tags, torrent."""

from __future__ import annotations

from storaged import errors
from storaged.objects.api import ObjectInfo
from storaged.objects.records import SealedPart
from storaged.s3 import conditions as c
from storaged.s3 import headers as h
from storaged.s3 import xml
from storaged.s3.context import Front
from storaged.s3.encryption import customer_key
from storaged.s3.ops.tags import read_tagging, write_tagging
from storaged.s3.reply import Headers, Reply, version_header, xml_reply
from storaged.s3.request import Request, version_of

ATTRIBUTE_PARTS_MAX = 1000


async def get_attributes(front: Front, request: Request) -> Reply:
    wanted = {name.strip() for name in request.headers.get("x-amz-object-attributes", "").split(",") if name.strip()}
    known = {"ETag", "Checksum", "ObjectParts", "StorageClass", "ObjectSize"}
    if not wanted:
        raise errors.InvalidRequest(
            "The x-amz-object-attributes header specifying the attributes to be retrieved is either missing or empty"
        )
    if wanted - known:
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
        request.grant,
        request.key,
        version_id=version_of(request),
        conditions=c.read_conditions(headers, front.clock.wall_ms()),
        customer_key=customer_key(front, request),
    )
    content = []
    if "ETag" in wanted:
        content.append(xml.element("ETag", info.etag))
    if "Checksum" in wanted and info.checksums:
        # without the number of parts, which ``ObjectParts`` says; headers and Complete's answer have it after a dash
        values = "".join(
            xml.element(f"Checksum{name}", value.partition("-")[0]) for name, value in info.checksums.items()
        )
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
    """Parts are listed one by one whatever checksum the object has, as Ceph's conformance tests want it; on AWS those
    of an upload that named an algorithm."""
    total = f"<PartsCount>{info.part_count}</PartsCount>"
    algorithm = next(iter(info.checksums), "")
    following = [part for part in info.parts if part.number > marker]
    page = following[:limit]

    def row(part: SealedPart) -> str:
        checksum = xml.element(f"Checksum{algorithm}", part.checksum) if algorithm and part.checksum else ""
        return f"<Part><PartNumber>{part.number}</PartNumber><Size>{part.size}</Size>{checksum}</Part>"

    last = page[-1].number if page else marker
    return (
        f"<ObjectParts>{total}<PartNumberMarker>{marker}</PartNumberMarker>"
        f"<NextPartNumberMarker>{last}</NextPartNumberMarker><MaxParts>{limit}</MaxParts>"
        f"{xml.boolean('IsTruncated', len(following) > len(page))}{''.join(row(part) for part in page)}</ObjectParts>"
    )


async def get_tagging(front: Front, request: Request) -> Reply:
    info = await front.objects.head(request.grant, request.key, version_id=version_of(request), customer_key=None)
    headers: Headers = {}
    version_header(info.version_id, headers)
    return xml_reply(write_tagging(info.tags), headers=headers)


async def put_tagging(front: Front, request: Request) -> Reply:
    tags = await read_tagging(request, h.TAGS_PER_OBJECT_MAX)
    version = await front.objects.set_tags(request.grant, request.key, tags, version_id=version_of(request))
    headers: Headers = {}
    version_header(version, headers)
    return Reply(headers=headers)


async def delete_tagging(front: Front, request: Request) -> Reply:
    version = await front.objects.set_tags(request.grant, request.key, {}, version_id=version_of(request))
    headers: Headers = {}
    version_header(version, headers)
    return Reply(204, headers)


async def get_torrent(front: Front, request: Request) -> Reply:
    """No object has a torrent."""
    raise errors.NoSuchKey("The specified key has no torrent.", Key=request.key.decode())

"""CopyObject and UploadPartCopy: finds the source, checks access to it, and decides what metadata the copy keeps."""

from __future__ import annotations

from collections.abc import Awaitable, Mapping
from functools import partial
from typing import TypeVar
from urllib.parse import unquote_to_bytes, urlencode

from msgspec.structs import replace

from storaged import errors
from storaged.objects.api import ABSENT, CopySource, Grant, NewMeta, PutResult
from storaged.objects.code.versions import check_allowed
from storaged.objects.configuration.website import REDIRECT_LOCATION
from storaged.objects.etags import tag
from storaged.s3 import conditions as c
from storaged.s3 import early, xml
from storaged.s3 import encryption as enc
from storaged.s3 import headers as h
from storaged.s3.auth.actions import action_of
from storaged.s3.auth.authorize import owns_plain
from storaged.s3.authorization import Ask, ask_of, check_expected_owner, hides_missing, may_list, permit
from storaged.s3.context import Front, existing_bucket
from storaged.s3.lifecycle import stored_expiration
from storaged.s3.locks import asked_lock
from storaged.s3.ops.acl import ownership
from storaged.s3.ops.multipart import part_number
from storaged.s3.origins import origin_of
from storaged.s3.reply import Headers, Reply, version_header
from storaged.s3.request import Request, check_key

T = TypeVar("T")

_SOURCE = "x-amz-copy-source"
_RANGE = "x-amz-copy-source-range"


async def _source(front: Front, request: Request) -> tuple[Grant, bytes, str]:
    """(grant to read it, key, version id) of x-amz-copy-source: ``/bucket/key?versionId=...``, percent-encoded. A plus
    is a space, as on AWS: Terraform's provider, and other clients in Go, encode the whole as a query does. A key with
    a plus has to say %2B (https://github.com/aws/aws-sdk-js/issues/1821). Raises InvalidArgument, AccessDenied,
    NoSuchBucket."""
    raw = request.headers[_SOURCE].encode("utf-8", "surrogateescape")
    path, mark, version = raw.partition(b"?versionId=")
    bucket_bytes, slash, key = unquote_to_bytes(path.replace(b"+", b" ")).removeprefix(b"/").partition(b"/")
    if not bucket_bytes or not slash or not key or (mark and not version):
        raise errors.InvalidArgument(
            "Copy Source must mention the source bucket and key: sourcebucket/sourcekey",
            ArgumentName=_SOURCE,
            ArgumentValue=raw.decode("utf-8", "replace"),
        )
    check_key(key)
    bucket = await existing_bucket(front, bucket_bytes.decode("utf-8", "replace"))
    check_expected_owner(bucket, request.headers.get("x-amz-source-expected-bucket-owner"))
    named = unquote_to_bytes(version).decode("utf-8", "replace")
    return await permit(front, request, Ask(action_of("GetObject"), bucket, key, named)), key, named


async def _read_from(front: Front, request: Request, grant: Grant, key: bytes, copying: Awaitable[T]) -> T:
    """The result of ``copying``. Raises what it raises, InvalidRequest for a source that is a delete marker, and
    AccessDenied in place of NoSuchKey when the sender may not know that the source does not exist."""
    try:
        return await copying
    except errors.MethodNotAllowed as error:
        if "DeleteMarker" not in error.details:
            raise
        raise errors.InvalidRequest(
            "The source of a copy request may not specifically refer to a delete marker by version id."
        ) from None
    except errors.NoSuchKey:
        if not may_list(front, request, Ask(action_of("GetObject"), grant.bucket, key)):
            raise errors.AccessDenied() from None
        raise


async def with_tags(front: Front, request: Request, grant: Grant, key: bytes, version: str) -> Grant:
    """The grant for a copy or a rename that keeps the tags of its source. Who may not read them may not copy what has
    some, and who may not put them on the new key may not either: the request is judged again as one that names them.
    Raises AccessDenied, SlowDown."""
    try:
        found = (await permit(front, request, Ask(action_of("GetObjectTagging"), grant.bucket, key, version))).found
    except (errors.AccessDenied, errors.NoSuchKey):
        found = await front.objects.look(grant.bucket, key, version) or ABSENT
        if found.tags:
            raise
    if found is None and not owns_plain(request.who, request.bucket_record):
        found = grant.found or await front.objects.look(grant.bucket, key, version) or ABSENT
    if found is not None and grant.found is not None:
        check_allowed(found, grant.found)
    if found is not None and found.tags:
        named = {"x-amz-tagging": urlencode(found.tags), "x-amz-tagging-directive": "REPLACE"}
        ask = ask_of(request, request.operation)
        again = await permit(front, request, ask._replace(headers=request.headers | named))
        if again.found is not None:  # both decisions are for the object that is there
            check_allowed(again.found, request.grant.found)
            request._grant = again
    return grant if found is None else replace(grant, found=found)


def _directive(headers: dict[str, str], name: str) -> bool:
    """Whether a directive is REPLACE, not COPY. Raises InvalidArgument."""
    value = headers.get(name, "COPY")
    if value not in ("COPY", "REPLACE"):
        raise errors.InvalidArgument(f"Unknown {name.removeprefix('x-amz-')}.", ArgumentName=name, ArgumentValue=value)
    return value == "REPLACE"


async def copy_object(front: Front, request: Request) -> Reply:
    headers = request.headers
    replace_meta = _directive(headers, "x-amz-metadata-directive")
    replace_tags = _directive(headers, "x-amz-tagging-directive")
    given = h.new_meta(headers)
    source, key, version = await _source(front, request)
    if not replace_tags:
        source = await with_tags(front, request, source, key, version)
    conditions = c.copy_conditions(headers, front.clock.wall_ms())
    itself = source.bucket.id == request.bucket_record.id and key == request.key
    if (
        itself
        and not version
        and not replace_meta
        and "x-amz-storage-class" not in headers
        and REDIRECT_LOCATION not in headers
        and not any(name.startswith(enc.SSE) for name in headers)
    ):
        raise errors.InvalidRequest(
            "This copy request is illegal because it is trying to copy an object to itself without changing the"
            " object's metadata, storage class, website redirect location or encryption attributes."
        )
    meta: NewMeta | None = given if replace_meta else None
    source_key = enc.customer_key(front, request, enc.CUSTOMER_KEY_SOURCE)
    if meta is None and ("x-amz-storage-class" in headers or REDIRECT_LOCATION in headers):
        reading = front.objects.head(source, key, version_id=version, conditions=conditions, customer_key=source_key)
        info = await _read_from(front, request, source, key, reading)
        # the copied object must be the one whose metadata was read
        conditions = replace(conditions, if_match=tag(info.etag))
        meta = NewMeta(_with_redirect(info.headers, given), info.user, storage_class=given.storage_class)
    owner, acl = await ownership(front, request, headers)
    copying = front.objects.copy(
        source,
        CopySource(source.bucket, key, version, conditions, customer_key=source_key),
        request.grant,
        request.key,
        owner=owner,
        meta=meta,
        tags=given.tags if replace_tags else None,
        acl=acl,
        algorithm=h.algorithm_named(headers, "x-amz-checksum-algorithm"),
        encryption=enc.asked(front, request, headers),
        lock=asked_lock(headers),
        conditions=c.write_conditions(headers),
        origin=origin_of(request, "ObjectCreated:Copy"),
    )

    async def copied() -> tuple[bytes, Headers]:
        result = await _read_from(front, request, source, key, copying)
        answer = _copied_headers(request, version, result)
        version_header(result.version_id, answer)
        if not request.bucket_record.plain:
            stored_expiration(front, request, result, answer)
        return _result("CopyObjectResult", result), answer

    # another bucket's answer names the version that was made, or when it expires
    begins_with = _of_source(version) if request.bucket_record.plain else None
    return await early.answer(request, copied(), begins_with, partial(hides_missing, front, request))


def _with_redirect(kept: Mapping[str, str], given: NewMeta) -> dict[str, str]:
    """The headers of a source with the redirection that the request asks for: that of the source is not copied."""
    found = {name: value for name, value in kept.items() if name != REDIRECT_LOCATION}
    if REDIRECT_LOCATION in given.headers:
        found[REDIRECT_LOCATION] = given.headers[REDIRECT_LOCATION]
    return found


async def upload_part_copy(front: Front, request: Request) -> Reply:
    headers = request.headers
    number = part_number(request)
    span = h.parse_copy_range(headers[_RANGE]) if _RANGE in headers else None
    await enc.check_of_upload(front, request)
    grant, key, version = await _source(front, request)
    source_key = enc.customer_key(front, request, enc.CUSTOMER_KEY_SOURCE)
    source = CopySource(grant.bucket, key, version, c.copy_conditions(headers, front.clock.wall_ms()), span, source_key)
    copying = front.objects.copy_part(
        grant,
        source,
        request.grant,
        request.key,
        request.query["uploadId"],
        number,
        customer_key=enc.customer_key(front, request),
    )

    async def copied() -> tuple[bytes, Headers]:
        result = await _read_from(front, request, grant, key, copying)
        return _result("CopyPartResult", result), _copied_headers(request, version, result)

    return await early.answer(request, copied(), _of_source(version), partial(hides_missing, front, request))


def _copied_headers(request: Request, source_version: str, result: PutResult) -> Headers:
    return enc.written_headers(result.encryption, request.headers, {enc.SSE: enc.S3}) | _of_source(source_version)


def _of_source(version: str) -> Headers:
    return {"x-amz-copy-source-version-id": version} if version else {}


def _result(root: str, result: PutResult) -> bytes:
    return xml.document(
        root,
        f"<LastModified>{xml.iso_time(result.modified_ms)}</LastModified><ETag>&quot;{result.etag}&quot;</ETag>",
        "".join(xml.element(f"Checksum{name}", value) for name, value in result.checksums.items()),
        xml.optional("ChecksumType", result.checksum_type if result.checksums else ""),
    )

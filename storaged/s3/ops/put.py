"""PutObject, with a task and without one (``operation.Attempt``).

Both ways share ``parse_put``, which parses what a PUT asks for.
"""

from __future__ import annotations

from functools import partial

from msgspec.structs import replace

from storaged import errors
from storaged.objects.api import NO_WRITE_CONDITIONS, PART_BYTES_MAX, BodyChecks, NewMeta, PutResult, WriteConditions
from storaged.s3 import conditions as c
from storaged.s3 import headers as h
from storaged.s3.context import Front
from storaged.s3.encryption import asked, default_encryption, written_headers
from storaged.s3.lifecycle import stored_expiration
from storaged.s3.locks import asked_lock
from storaged.s3.operation import Attempt, OnReply
from storaged.s3.ops.acl import ownership, try_ownership
from storaged.s3.origins import origin_of
from storaged.s3.reply import Reply, stored_headers
from storaged.s3.request import Request, has_no_parameters


def upload_checks(request: Request, bytes_max: int) -> BodyChecks:
    """What the body of a PutObject or an UploadPart must be.

    Raises MissingContentLength, EntityTooLarge, InvalidDigest, InvalidRequest.
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


PLAIN_HEADERS = h.INCIDENTAL | {"expect"}
"""With these headers alone a PUT says only the type and size of its object."""

PutArguments = tuple[NewMeta, BodyChecks, WriteConditions]


def parse_put(front: Front, request: Request) -> PutArguments:
    """What PutObject asks for, of a request whose headers have been checked. Raises as ``upload_checks``, and S3 errors
    for values that are wrong."""
    headers, body = request.headers, request.body
    if (
        headers.keys() <= PLAIN_HEADERS
        and body.declared
        and body.decoder is None
        and (body.length or 0) <= PART_BYTES_MAX
    ):
        kind = headers.get("content-type")
        kept = {"content-type": h.readable("content-type", kind)} if kind else {}
        return (
            NewMeta(kept, encryption=default_encryption(front, request)),
            BodyChecks(body.length, sha256=body.sha256),
            NO_WRITE_CONDITIONS,
        )
    meta = replace(h.new_meta(headers), lock=asked_lock(headers))
    encryption = asked(front, request, headers)
    if encryption is not None:
        meta = replace(meta, encryption=encryption)
    return meta, upload_checks(request, PART_BYTES_MAX), c.write_conditions(headers)


async def put_object(front: Front, request: Request) -> Reply:
    meta, checks, conditions = request.put_arguments or parse_put(front, request)
    owner, acl = await ownership(front, request, request.headers)
    if acl is not None:
        meta = replace(meta, acl=acl)
    if not request.bucket_record.plain:
        meta = replace(meta, origin=origin_of(request, "ObjectCreated:Put"))
    result = await front.objects.put(
        request.grant, request.key, request.body, meta, checks, owner=owner, conditions=conditions
    )
    answer = written_headers(result.encryption, request.headers, stored_headers(result))
    if not request.bucket_record.plain:
        stored_expiration(front, request, result, answer)
    return Reply(headers=answer)


# --- without a task ---------------------------------------------------------------------------------------------------


def _may_be_small(front: Front, request: Request) -> bool:
    """Whether the headers announce a small object. One in aws-chunked form has its size in a header of its own."""
    length = request.body.length
    small = length is not None and length <= front.objects.small_bytes_max
    return (small or "x-amz-decoded-content-length" in request.headers) and has_no_parameters(request)


def _prepare_put(front: Front, request: Request) -> bool:
    request.put_arguments = parse_put(front, request)
    found = try_ownership(front, request, request.headers)
    if found is None or found[1] is not None:
        return False
    request.new_owner = found[0]
    size = request.put_arguments[1].size
    if size is None or size > front.objects.small_bytes_max:
        return False
    return size <= front.endpoint.limits.read_buffer_bytes or request.body.bounded  # others are not kept whole


def _try_put(front: Front, request: Request, on_reply: OnReply) -> bool:
    plain = request.body.try_whole()
    if plain is None or request.put_arguments is None:
        return False
    meta, checks, conditions = request.put_arguments
    on_stored = partial(_on_stored, front, request, on_reply)
    return front.objects.try_put(
        request.grant,
        request.key,
        plain,
        meta,
        checks,
        on_stored,
        owner=request.new_owner,
        conditions=conditions,
    )


def _on_stored(front: Front, request: Request, on_reply: OnReply, result: PutResult | Exception) -> None:
    if isinstance(result, PutResult):
        headers = stored_headers(result)
        if result.encryption is not None:
            written_headers(result.encryption, request.headers, headers)
        if not request.bucket_record.plain:
            stored_expiration(front, request, result, headers)
        on_reply(Reply(headers=headers))
    elif isinstance(result, errors.NoSuchBucket) and front.buckets.gone(request.bucket_record):
        on_reply(None)  # nothing was stored; another bucket may have the name now
    else:
        on_reply(result)


PUT_ATTEMPT = Attempt(_may_be_small, _prepare_put, _try_put)

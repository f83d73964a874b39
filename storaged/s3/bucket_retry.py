"""Runs the handler of an operation. If its bucket was deleted and created again meanwhile, runs it once more, in the
bucket that has the name now (``objects.system.fenced``)."""

from __future__ import annotations

from typing import Final

from storaged.errors import S3Error, ServiceUnavailable
from storaged.s3.authorization import ask_of, check_expected_owner, permit
from storaged.s3.context import Front
from storaged.s3.operation import Operation
from storaged.s3.reply import Reply
from storaged.s3.request import Request

SUCCEED_ON_NOTHING: Final = frozenset(
    {"ListObjects", "ListObjectsV2", "ListObjectVersions", "ListMultipartUploads", "DeleteObject", "DeleteObjects"}
)
"""Operations that succeed when there is nothing."""

BUCKET_OPERATIONS: Final = frozenset({"CreateBucket", "DeleteBucket", "Website"})
"""Operations that look the bucket up themselves."""
COPIES: Final = frozenset({"CopyObject", "UploadPartCopy"})
BODY_CONSUMED: Final = frozenset({"PutObject", "PostObject", "UploadPart"})
"""Their body has been read, and is not kept."""


async def handle(front: Front, request: Request, operation: Operation) -> Reply:
    """The handler's answer. Raises what the handler raises."""
    seen = front.buckets.fences_seen()
    if (
        request._bucket_record is not None
        and front.buckets.gone(request._bucket_record)
        and operation.name not in BUCKET_OPERATIONS
    ):
        await _renew(front, request, operation)
    try:
        reply = await operation.handler(front, request)
    except S3Error:
        if front.buckets.fences_seen() == seen or not await _replaced(front, request, operation):
            raise
    else:
        if (
            operation.name not in SUCCEED_ON_NOTHING
            or front.buckets.fences_seen() == seen
            or not await _replaced(front, request, operation)
        ):
            return reply
    return await operation.handler(front, request)


async def _replaced(front: Front, request: Request, operation: Operation) -> bool:
    """Whether to run the handler again. Raises NoSuchBucket, AccessDenied, ServiceUnavailable."""
    if request._bucket_record is None or operation.name in BUCKET_OPERATIONS:
        return False
    renewed = front.buckets.gone(request._bucket_record) and await _renew(front, request, operation)
    if renewed and operation.name in BODY_CONSUMED:
        raise ServiceUnavailable(
            "The bucket was deleted and made again while the request was under way. Nothing was stored. Retry."
        )
    return renewed or operation.name in COPIES  # the source's bucket may be the replaced one


async def _renew(front: Front, request: Request, operation: Operation) -> bool:
    """Looks up the request's bucket again by its name. Returns whether it is another one now. Raises NoSuchBucket,
    AccessDenied."""
    before = request.bucket_record
    request.reading = request.read_error = None  # it was read from the old bucket
    request._bucket_record = await front.buckets.renewed(before.name)
    check_expected_owner(request._bucket_record, request.headers.get("x-amz-expected-bucket-owner"))
    request._grant = await permit(front, request, ask_of(request, operation.name))
    return request._bucket_record.id != before.id

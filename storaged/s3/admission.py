"""Admission of a request: its operation, who sends it, its bucket, and whether all that is allowed
(``authorization``).

A request is admitted in three steps, always in this order: ``locate``, the records of its user and its bucket,
``admit_request``. Only the records may have to be read. ``try_records`` takes them from memory, or returns
None; then ``load_records`` reads them, both at the same time. A record that can't be had is an error in the record's
place: ``admit_request`` raises it in its turn, so that a wrong signature is answered as such whatever the bucket is.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Sequence
from typing import TypeVar

from storaged.errors import AccessDenied
from storaged.objects.api import Grant, Principal
from storaged.objects.records import BucketRecord
from storaged.s3 import routes, website
from storaged.s3.auth.authenticate import admit, admit_anonymous, claim_of
from storaged.s3.auth.authorize import ObjectWanted, owns_plain
from storaged.s3.auth.regions import region_name
from storaged.s3.auth.sigv4 import Claim
from storaged.s3.authorization import ask_of, check_expected_owner, decide, permit
from storaged.s3.context import Front, existing_bucket, user_of
from storaged.s3.operation import Operation, adopt_query_headers
from storaged.s3.request import Request, parse_target, split_path, virtual_bucket

T = TypeVar("T")


Records = tuple[tuple[Principal, str] | BaseException | None, BucketRecord | BaseException | None]
"""Principal and secret of the user, and the bucket's record, or why there is none. None: the request needs none."""


def locate(request: Request, domains: Sequence[str], region: str, websites: str = "") -> tuple[Operation, Claim | None]:
    """Sets the target, bucket and key of a request. Returns its operation, and what it says about its signature: None
    when it is not signed, or its operation needs no signature. ``domains``, ``websites``: the domains of the endpoint.
    ``region``: that signatures must be for, see ``Endpoint.signed_region``.

    Raises InvalidURI, KeyTooLongError, and as ``routes.find`` and ``claim_of``.
    """
    if websites and (site := website.bucket_of(request, websites)) is not None:
        return website.begin(request, site), None
    target = request.target = parse_target(request.raw_target)
    bucket = virtual_bucket(request.headers.get("host", ""), domains) if domains else ""
    request.bucket, request.key = split_path(target.raw_path, bucket)
    operation = routes.find(
        request.method, request.bucket, request.key, target.query, request.headers, len(target.pairs)
    )
    request.operation = operation.name
    return operation, claim_of(request, region) if operation.signed else None


def try_records(front: Front, request: Request, operation: Operation, claim: Claim | None) -> Records | None:
    """The records that are in memory. None: one of them must be read."""
    user = None
    if claim is not None:
        key, token = claim.access_key, claim.token
        user = front.users.try_session(key, token) if token else front.users.try_get(key)
    bucket = front.buckets.try_get(request.bucket) if operation.needs_bucket else None
    if (user is None and claim is not None) or (bucket is None and operation.needs_bucket):
        return None
    return user, bucket


async def load_records(front: Front, request: Request, operation: Operation, claim: Claim | None) -> Records:
    """The records, read where they are not in memory. Raises nothing but for cancellation."""
    user = None if claim is None else user_of(front, claim.access_key, claim.token)
    bucket = existing_bucket(front, request.bucket) if operation.needs_bucket else None
    if user is not None and bucket is not None:
        found_user, found_bucket = await asyncio.gather(user, bucket, return_exceptions=True)
        return found_user, found_bucket
    return None if user is None else await _or_error(user), None if bucket is None else await _or_error(bucket)


async def _or_error(work: Awaitable[T]) -> T | Exception:
    try:
        return await work
    except Exception as error:
        return error


def admit_request(front: Front, request: Request, operation: Operation, claim: Claim | None, records: Records) -> None:
    """Sets who sends the request, its bucket, and its grant, when it may go on; prepares its body. The grant is missing
    when the decision depends on the object: ``complete_grant`` then reads it.

    Raises the error that stands in place of a record, and as ``admit``, ``adopt_query_headers``, ``decide`` and
    ``Operation.check_headers``.
    """
    user, bucket = records
    if operation.signed:
        if claim is None:
            admit_anonymous(request)
        else:
            if not isinstance(user, tuple):
                raise _missing(user)
            admit(request, claim, *user, front.clock.wall_ms())
        if request.target.query:
            adopt_query_headers(request)
    if operation.needs_bucket:
        if not isinstance(bucket, BucketRecord):
            raise _missing(bucket)
        request._bucket_record = bucket
        check_expected_owner(bucket, request.headers.get("x-amz-expected-bucket-owner"))
        try:
            if owns_plain(request.who, bucket):  # as ``decide`` says too: nearly all requests end here
                request._grant = Grant(bucket, request.key or None, operation.access)
            else:
                request._grant = decide(front, request, ask_of(request, operation.name))
        except ObjectWanted:
            pass
        except AccessDenied:
            if operation.name == "HeadBucket":
                raise AccessDenied(Region=region_name(bucket.region)) from None  # as on AWS: clients look for it so
            if bucket.plain:
                raise  # nothing of the bucket can say that the sender may know more
    if operation.signed:
        if operation.changes and not operation.needs_bucket and not request.who.access_key:
            raise AccessDenied()
        if request._grant is not None or not operation.needs_bucket:
            operation.check_headers(request.headers)


async def complete_grant(front: Front, request: Request, operation: Operation) -> None:
    """Decides what ``admit_request`` could not, and only then says what is wrong with the headers. Raises as ``permit``
    and ``Operation.check_headers``."""
    if operation.needs_bucket and request._grant is None:
        request._grant = await permit(front, request, ask_of(request, operation.name))
        if operation.signed:
            operation.check_headers(request.headers)


def _missing(record: BaseException | None) -> BaseException:
    return AssertionError("a record was not looked for") if record is None else record

"""Asks ``auth.authorize`` for a request: with the bucket's configuration and the facts of the request, and with the
object when the decision depends on it.

The pipeline asks once for each request (``admission``), and handlers ask again for everything else that a request
touches: the source of a copy, each key of DeleteObjects, the key of a form.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from types import MappingProxyType
from typing import Final, NamedTuple

from storaged.errors import AccessDenied, NoSuchKey, NoSuchUpload
from storaged.objects.api import READ, WRITE, Grant, ObjectAccess, Principal
from storaged.objects.identity import account_of
from storaged.objects.records import BucketRecord
from storaged.s3.auth.acl import BUCKET_OWNER_FULL, LOGGING_SERVICE, has_grants
from storaged.s3.auth.actions import LIST_BUCKET, Action, action_of
from storaged.s3.auth.authorize import (
    UNKNOWN,
    Context,
    ObjectWanted,
    Resource,
    Unknown,
    authorize,
    owns_plain,
    refuse_denied,
)
from storaged.s3.auth.facts import Facts
from storaged.s3.auth.identities import require
from storaged.s3.auth.policy import ARN_PREFIX
from storaged.s3.context import Front
from storaged.s3.request import Request

EXTRA: Final[dict[str, Action]] = {
    "x-amz-tagging": Action(("s3:PutObjectTagging",), acl="WRITE"),
    "tagging": Action(("s3:PutObjectTagging",), acl="WRITE"),
    "x-amz-object-lock-mode": Action(("s3:PutObjectRetention",)),
    "x-amz-object-lock-retain-until-date": Action(("s3:PutObjectRetention",)),
    "x-amz-object-lock-legal-hold": Action(("s3:PutObjectLegalHold",)),
    "x-amz-bypass-governance-retention": Action(("s3:BypassGovernanceRetention",)),
}
"""What a header, or the field of a form, needs beside the operation's own permission."""


class Ask(NamedTuple):
    """A permission that a request needs: ``action`` on ``bucket`` or on ``key`` in it. ``headers``, ``prefix``:
    in place of the request's, see ``Facts``.
    """

    action: Action
    bucket: BucketRecord
    key: bytes | None
    version: str = ""
    headers: Mapping[str, str] | None = None
    prefix: str | None = None


def ask_of(request: Request, operation: str) -> Ask:
    """What the request itself needs."""
    version = request.target.query.get("versionId", "") if request.target.query else ""
    return Ask(action_of(operation), request.bucket_record, request.key or None, version)


def decide(front: Front, request: Request, ask: Ask, found: ObjectAccess | Unknown | None = UNKNOWN) -> Grant:
    """Raises AccessDenied, MethodNotAllowed, ObjectWanted."""
    bucket, who = ask.bucket, request.who
    if owns_plain(who, bucket):
        return Grant(bucket, ask.key, ask.action.access)
    headers = request.headers if ask.headers is None else ask.headers
    if ask.key is None:
        found = None  # a bucket has no tags of an object
    facts = Facts(
        request,
        bucket.owner,
        front.clock.wall_ms(),
        headers=headers,
        found=found,
        version=ask.version,
        prefix=ask.prefix,
    )
    resource = Resource(bucket, front.buckets.configuration_of(bucket), ask.key, ask.version)
    context = Context(facts, found)
    grant = authorize(who, ask.action, resource, context)
    if ask.key is not None and not ask.action.of_object:
        for name, extra in EXTRA.items():
            if name in headers and headers[name].lower() != "false":
                authorize(who, extra, resource, context)
        if ask.action.access & WRITE and ("x-amz-acl" in headers or has_grants(headers)):
            # who writes an object owns it, and so may change its list, unless a policy denies that
            refuse_denied(who, "s3:PutObjectAcl", resource, context)
    return grant


def permit_on_account(front: Front, request: Request, action: str, arn: str = ARN_PREFIX + "*") -> None:
    """Asks for what concerns no bucket that exists: the root of an account always may, others need a policy. Raises
    AccessDenied."""
    if request.who.identity is not None:
        owner, now_ms = request.who.user_id, front.clock.wall_ms()
        require(request.who, action, arn, Facts(request, owner, now_ms, headers=request.headers, found=None))


async def permit(front: Front, request: Request, ask: Ask) -> Grant:
    """As ``decide``, and looks at the object when that is needed. Raises AccessDenied, MethodNotAllowed, and NoSuchKey
    for a read of what does not exist, when the sender may list and so may know that."""
    try:
        return decide(front, request, ask)
    except ObjectWanted:
        pass
    except AccessDenied:
        if not (ask.action.access & READ and may_list(front, request, ask)):
            raise
    assert ask.key is not None
    if ask.action.by_initiator:
        found = await front.objects.look_upload(ask.bucket, ask.key, request.query.get("uploadId", ""))
    else:
        found = await front.objects.look(ask.bucket, ask.key, ask.version)
    try:
        return decide(front, request, ask, found)
    except AccessDenied:
        if found is None and may_list(front, request, ask):
            if ask.action.by_initiator:
                raise NoSuchUpload() from None
            raise NoSuchKey(Key=ask.key.decode("utf-8", "replace")) from None
        raise


def may_list(front: Front, request: Request, ask: Ask) -> bool:
    """Whether the sender may list the key: then an answer may tell that it does not exist.
    https://docs.aws.amazon.com/AmazonS3/latest/API/API_HeadObject.html, «Permissions»"""
    if ask.key is None:
        return False
    prefix = ask.key.decode("utf-8", "replace")
    try:
        decide(front, request, Ask(LIST_BUCKET, ask.bucket, None, prefix=prefix))
    except (AccessDenied, ObjectWanted):
        return False
    return True


def hides_missing(front: Front, request: Request) -> bool:
    """Whether a NoSuchKey would tell the sender of a request more than it may know."""
    bucket, grant = request._bucket_record, request._grant
    if bucket is None or grant is None or grant.key is None or owns_plain(request.who, bucket):
        return False
    return not may_list(front, request, Ask(LIST_BUCKET, bucket, grant.key))


# --- access logs and inventories --------------------------------------------------------------------------------------

LOG_DELIVERY: Final = Principal("", "log delivery", service=LOGGING_SERVICE)
INVENTORIES: Final = Principal("", "inventories", service="s3.amazonaws.com")


def log_grant(front: Front, source: BucketRecord, target: BucketRecord, key: bytes) -> Grant:
    """Permission to put an access log of ``source`` into ``target``, for the service that AWS names so. Raises
    AccessDenied.
    https://docs.aws.amazon.com/AmazonS3/latest/userguide/enable-server-access-logging.html"""
    return _service_grant(front, LOG_DELIVERY, source, target, key)


def inventory_grant(
    front: Front, source: BucketRecord, target: BucketRecord, key: bytes, headers: Mapping[str, str]
) -> Grant:
    """The same for an object of an inventory. ``headers``: what a PUT of it says of encryption. AWS's example of a
    policy asks for a canned list, which the service sends. Raises AccessDenied.
    https://docs.aws.amazon.com/AmazonS3/latest/userguide/example-bucket-policies.html#example-bucket-policies-s3-inventory
    """
    sent = {"x-amz-acl": BUCKET_OWNER_FULL, **headers}
    more = {f"s3:{name}": value for name, value in sent.items()}
    return _service_grant(front, INVENTORIES, source, target, key, more)


def _service_grant(
    front: Front,
    service: Principal,
    source: BucketRecord,
    target: BucketRecord,
    key: bytes,
    more: Mapping[str, str] = MappingProxyType({}),
) -> Grant:
    """``more``: values of condition keys, beside those of every delivery."""
    now = datetime.fromtimestamp(front.clock.wall_ms() / 1000, UTC)
    facts = {
        "aws:sourcearn": ARN_PREFIX + source.name,
        "aws:sourceaccount": account_of(source.owner),
        "aws:resourceaccount": account_of(target.owner),
        "s3:resourceaccount": account_of(target.owner),
        "aws:securetransport": "true",
        "aws:principalisawsservice": "true",
        "aws:currenttime": now.strftime("%Y-%m-%dT%H:%M:%SZ"),
        "aws:epochtime": str(int(now.timestamp())),
        **more,
    }
    # not decided by the object that is there, which may be the same manifest, put before: so the grant is for any
    context = Context(lambda name: (facts[name],) if name in facts else None, UNKNOWN)
    resource = Resource(target, front.buckets.configuration_of(target), key)
    return authorize(service, action_of("PutObject"), resource, context)


def check_expected_owner(bucket: BucketRecord, expected: str | None) -> None:
    """``expected``: the value of x-amz-expected-bucket-owner: an account, or a canonical id. Raises AccessDenied."""
    if expected is not None and expected not in (account_of(bucket.owner), bucket.owner):
        raise AccessDenied()

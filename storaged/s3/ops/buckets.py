"""Operations on buckets: create, head, list, delete, location, versioning."""

from __future__ import annotations

import base64
import binascii
from functools import partial

from storaged import errors
from storaged.objects.configuration.access import ACL, OWNERSHIP
from storaged.objects.configuration.kinds import (
    ENABLED,
    LOCK,
    TAGGING,
    VERSIONING,
    ObjectLock,
    Tags,
    Versioning,
)
from storaged.objects.names import bucket_name_valid
from storaged.s3 import headers as h
from storaged.s3 import xml
from storaged.s3.auth.acl import PRIVATE, has_grants
from storaged.s3.auth.policy import ARN_PREFIX
from storaged.s3.auth.regions import location_constraint, region_name, region_of_new_bucket
from storaged.s3.authorization import permit_on_account
from storaged.s3.context import Front
from storaged.s3.documents import parse_document
from storaged.s3.ops.access import RULES, configuration_of_new
from storaged.s3.ops.acl import acl_of_new_bucket
from storaged.s3.ops.tags import tags_in
from storaged.s3.reply import XML_TYPE, Reply, xml_reply
from storaged.s3.request import Request

BUCKETS_PAGE_MAX = 10_000


async def list_buckets(front: Front, request: Request) -> Reply:
    """The requester's buckets, by name; in pages when max-buckets is given."""
    if not request.who.access_key:
        raise errors.AccessDenied()
    permit_on_account(front, request, "s3:ListAllMyBuckets")
    query = request.query
    limit = (
        h.integer("max-buckets", query["max-buckets"], 1, BUCKETS_PAGE_MAX)
        if query.get("max-buckets")
        else BUCKETS_PAGE_MAX
    )
    region = query.get("bucket-region", "")
    prefix = query.get("prefix", "")
    token = query.get("continuation-token", "")
    buckets, following = await front.buckets.list_buckets(
        request.who, prefix=prefix, after=_from_token(token), limit=limit
    )
    rows = "".join(
        f"<Bucket><Name>{xml.escape(bucket.name)}</Name><CreationDate>{xml.iso_time(bucket.created_ms)}</CreationDate>"
        f"{xml.element('BucketRegion', region_name(bucket.region))}</Bucket>"
        for bucket in buckets
        if not region or region_name(bucket.region) == region
    )
    return xml_reply(
        xml.document(
            "ListAllMyBucketsResult",
            xml.owner(request.who.user_id, request.who.display_name),
            f"<Buckets>{rows}</Buckets>",
            xml.optional("Prefix", prefix),
            xml.optional(
                "ContinuationToken", base64.urlsafe_b64encode(following.encode()).decode() if following else ""
            ),
        )
    )


def _from_token(token: str) -> str:
    try:
        return base64.b64decode(token, altchars=b"-_", validate=True).decode() if token else ""
    except (binascii.Error, ValueError):
        raise errors.InvalidArgument(
            "The continuation token provided is incorrect", ArgumentName="continuation-token"
        ) from None


async def create_bucket(front: Front, request: Request) -> Reply:
    """Creating one's own bucket again succeeds, as in AWS's first region and as most tools expect, unless the request
    asks for what the bucket is not (BucketAlreadyOwnedByYou): nothing of it is changed.

    ``x-storaged-countries`` (``FR,DE``) narrows where the bucket's data may be.
    """
    name = request.bucket
    if not bucket_name_valid(name):
        raise errors.InvalidBucketName(BucketName=name)
    lock = request.headers.get("x-amz-bucket-object-lock-enabled", "false")
    if lock.lower() not in ("true", "false"):
        raise errors.InvalidArgument(ArgumentName="x-amz-bucket-object-lock-enabled", ArgumentValue=lock)
    rule = request.headers.get("x-amz-object-ownership", "")
    if rule and rule not in RULES:
        raise errors.InvalidArgument(
            "Invalid x-amz-object-ownership header", ArgumentName="x-amz-object-ownership", ArgumentValue=rule
        )
    acl = await acl_of_new_bucket(front, request)
    region, tags = await parse_document(partial(_asked, front), request.document)
    _permit_creation(front, request, tagged=bool(tags))
    configuration = configuration_of_new(legacy=front.endpoint.legacy_buckets, rule=rule, acl=acl)
    if lock.lower() == "true":
        configuration = configuration.having(VERSIONING, Versioning(ENABLED)).having(LOCK, ObjectLock())
    if tags:
        configuration = configuration.having(TAGGING, Tags(tags))
    countries = _countries(request.headers.get("x-storaged-countries"))
    try:
        await front.buckets.create(
            request.who,
            name,
            region=region or front.endpoint.region,
            countries=countries,
            configuration=configuration,
        )
    except errors.BucketAlreadyOwnedByYou:
        existing = await front.buckets.get(name)
        found = front.buckets.configuration_of(existing)
        ownership = found.get(OWNERSHIP)
        if (
            tags
            or (countries and existing.countries != countries)
            or (region and existing.region != region)
            or (lock.lower() == "true" and found.get(LOCK) is None)
            or (rule and (ownership is None or ownership.rule != rule))
            or (("x-amz-acl" in request.headers or has_grants(request.headers)) and found.get(ACL) != acl)
        ):
            raise  # the client must not believe that what it asked for is in force
    return Reply(headers={"Location": f"/{name}"})


def _permit_creation(front: Front, request: Request, *, tagged: bool) -> None:
    """Asks for what CreateBucket needs, by its headers. Raises AccessDenied.
    https://docs.aws.amazon.com/AmazonS3/latest/API/API_CreateBucket.html, «Permissions»"""
    headers, arn = request.headers, ARN_PREFIX + request.bucket
    needed = ["s3:CreateBucket"]
    if headers.get("x-amz-acl", PRIVATE) != PRIVATE or has_grants(headers):
        needed.append("s3:PutBucketAcl")
    if headers.get("x-amz-object-ownership"):
        needed.append("s3:PutBucketOwnershipControls")
    if headers.get("x-amz-bucket-object-lock-enabled", "").lower() == "true":
        needed += ["s3:PutBucketObjectLockConfiguration", "s3:PutBucketVersioning"]
    if tagged:
        needed.append("s3:TagResource")
    for action in needed:
        permit_on_account(front, request, action, arn)


def _countries(text: str | None) -> tuple[str, ...]:
    """``FR, DE`` -> ("DE", "FR"). Raises InvalidArgument for a header without a country: it asks for something
    impossible, and must not count as no header."""
    if text is None:
        return ()
    codes = {code.strip() for code in text.split(",")}
    if "" in codes:
        raise errors.InvalidArgument(
            "x-storaged-countries is a list of country codes", ArgumentName="x-storaged-countries", ArgumentValue=text
        )
    return tuple(sorted(codes))


def _asked(front: Front, body: bytes) -> tuple[str, dict[str, str]]:
    """The region, or empty, and the tags that a CreateBucketConfiguration asks for. Raises InvalidLocationConstraint,
    InvalidTag, MalformedXML, NotImplemented."""
    if not body.strip():
        return "", {}
    root = xml.parse(body, "CreateBucketConfiguration")
    parts = {child.name: child for child in root.children}
    for name in ("Location", "Bucket"):
        if name in parts:
            raise errors.NotImplemented(f"{name} in CreateBucketConfiguration is not implemented.")
    if set(parts) - {"LocationConstraint", "Tags"} or len(parts) != len(root.children):
        raise errors.MalformedXML()
    if "LocationConstraint" in parts and parts["LocationConstraint"].children:
        raise errors.MalformedXML()
    location = parts["LocationConstraint"].text if "LocationConstraint" in parts else ""
    region = (
        region_of_new_bucket(location, front.endpoint.region, strict=front.endpoint.strict_region) if location else ""
    )
    return region, tags_in(parts["Tags"], h.TAGS_PER_BUCKET_MAX) if "Tags" in parts else {}


async def head_bucket(front: Front, request: Request) -> Reply:
    return Reply(
        headers={
            "x-amz-bucket-region": region_name(request.bucket_record.region),
            "x-amz-access-point-alias": "false",
            "Content-Type": XML_TYPE,
        }
    )


async def delete_bucket(front: Front, request: Request) -> Reply:
    await front.buckets.delete(request.bucket_record, who=request.who)
    return Reply(204)


async def get_location(front: Front, request: Request) -> Reply:
    return xml_reply(xml.document("LocationConstraint", xml.escape(location_constraint(request.bucket_record.region))))

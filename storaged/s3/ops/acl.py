"""Access control lists of buckets and objects, and who owns a new object.

Under BucketOwnerEnforced, which every bucket has unless its owner chose otherwise, lists mean nothing: a request that
sets one is refused, unless it only says that the owner has access.
https://docs.aws.amazon.com/AmazonS3/latest/userguide/about-object-ownership.html
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from storaged import errors
from storaged.objects.api import Principal
from storaged.objects.configuration.access import (
    ACL,
    ENFORCED,
    GROUPS,
    OWNERSHIP,
    PREFERRED,
    PUBLIC_ACCESS_BLOCK,
    Acl,
    AclEntry,
)
from storaged.objects.configuration.document import Configuration
from storaged.objects.identity import ANONYMOUS_ID
from storaged.s3 import xml
from storaged.s3.auth import acl as lists
from storaged.s3.auth.acl import FULL
from storaged.s3.context import Front
from storaged.s3.documents import parse_document
from storaged.s3.reply import Headers, Reply, version_header, xml_reply
from storaged.s3.request import Request, version_of

_TYPE = f"{xml.XSI} type"
_KINDS = {"CanonicalUser": "id", "Group": "uri", "AmazonCustomerByEmail": "emailaddress"}
_VALUES = {"id": "ID", "uri": "URI", "emailaddress": "EmailAddress"}

Wanted = Iterable[tuple[str, str, str]]
"""(kind of grantee, grantee, permission)."""


# --- who owns a new object, and who else has access to it -------------------------------------------------------------


def try_ownership(front: Front, request: Request, headers: Mapping[str, str]) -> tuple[str, Acl | None] | None:
    """Owner and list of a new object, as ``ownership``; None when users must be looked up."""
    bucket = request.bucket_record
    if bucket.plain and "x-amz-acl" not in headers and not lists.has_grants(headers):
        return bucket.owner, None
    configuration = front.buckets.configuration_of(bucket)
    found = configuration.get(OWNERSHIP)
    name = headers.get("x-amz-acl", "")
    if found is None or found.rule == ENFORCED:
        _refuse_list(configuration, name, lists.has_grants(headers))
        return bucket.owner, None
    if lists.has_grants(headers):
        return None
    if found.rule == PREFERRED and name == lists.BUCKET_OWNER_FULL:
        return bucket.owner, None
    owner = request.who.user_id or ANONYMOUS_ID
    if not name:
        return owner, None
    return owner, _checked(configuration, owner, lists.canned(name, owner, bucket.owner))


async def ownership(front: Front, request: Request, headers: Mapping[str, str]) -> tuple[str, Acl | None]:
    """The owner of a new object in the request's bucket, and its access control list, None for the owner's alone.
    ``headers``: the request's, or the fields of a form. Raises AccessControlListNotSupported, AccessDenied (a public
    list, which the public access block forbids), InvalidArgument, InvalidRequest."""
    found = try_ownership(front, request, headers)
    if found is not None:
        return found
    owner = request.who.user_id or ANONYMOUS_ID
    acl = await _granted(front, headers)
    return owner, _checked(front.buckets.configuration_of(request.bucket_record), owner, acl)


async def acl_of_new_bucket(front: Front, request: Request) -> Acl | None:
    """The list that CreateBucket asks for. None for the owner's alone. Raises InvalidArgument, InvalidRequest."""
    headers, owner = request.headers, request.who.user_id
    if lists.has_grants(headers):
        acl = await _granted(front, headers)
    else:
        acl = lists.canned(headers.get("x-amz-acl", lists.PRIVATE), owner)
    return None if acl.entries == (AclEntry(owner, FULL),) else acl


async def _granted(front: Front, headers: Mapping[str, str]) -> Acl:
    """The list that x-amz-grant-* headers make. Raises InvalidRequest, InvalidArgument."""
    if "x-amz-acl" in headers:
        raise errors.InvalidRequest("Specifying both Canned ACLs and Header Grants is not allowed")
    return await _resolved(front, lists.grants_in(headers))


def _checked(configuration: Configuration, owner: str, acl: Acl) -> Acl | None:
    """None for a list that says what no list says. Raises AccessDenied for what the public access block forbids."""
    block = configuration.get(PUBLIC_ACCESS_BLOCK)
    if block is not None and block.block_acls and lists.is_public(acl):
        raise errors.AccessDenied("A public access control list is prevented by the BlockPublicAcls setting.")
    return None if acl.entries == (AclEntry(owner, FULL),) else acl


def _refuse_list(configuration: Configuration, canned: str, has_grants: bool) -> None:
    """Of a bucket whose owner is enforced. Unless a client asked for that rule, ``private`` is accepted too: it says
    what is so, and clients send it by themselves (rclone)."""
    allowed = {"", lists.BUCKET_OWNER_FULL}
    found = configuration.get(OWNERSHIP)
    if found is None or not found.strict:
        allowed.add(lists.PRIVATE)
    if has_grants or canned not in allowed:
        raise errors.AccessControlListNotSupported()


async def _resolved(front: Front, wanted: Wanted) -> Acl:
    """Raises InvalidArgument, UnresolvableGrantByEmailAddress, MethodNotAllowed (grants by e-mail, as AWS since
    2025)."""
    found: list[AclEntry] = []
    users: Mapping[str, Principal] | None = None
    for kind, value, permission in wanted:
        if kind == "uri":
            found.append(AclEntry(lists.group_of(value), permission))
            continue
        if users is None:
            users = await front.users.directory()
        if kind == "id":
            if value not in users and value != ANONYMOUS_ID:
                raise errors.InvalidArgument("Invalid id", ArgumentName="id", ArgumentValue=value[:200])
            found.append(AclEntry(value, permission))
            continue
        if not front.endpoint.legacy_buckets:
            raise errors.MethodNotAllowed("Grants by e-mail address are not supported any more.")
        named = [user.user_id for user in users.values() if user.email and user.email == value]
        if len(set(named)) != 1:
            raise errors.UnresolvableGrantByEmailAddress()
        found.append(AclEntry(named[0], permission))
        if len(found) > lists.GRANTS_MAX:
            break
    if len(found) > lists.GRANTS_MAX:
        raise errors.InvalidArgument(f"An access control list has at most {lists.GRANTS_MAX} grants.")
    return Acl(tuple(sorted(found, key=lambda entry: entry.grantee not in GROUPS)))


# --- reading ----------------------------------------------------------------------------------------------------------


async def get_bucket_acl(front: Front, request: Request) -> Reply:
    bucket = request.bucket_record
    configuration = await front.buckets.configuration(bucket)
    return xml_reply(await _printed(front, request, bucket.owner, _effective(configuration, configuration.get(ACL))))


async def get_object_acl(front: Front, request: Request) -> Reply:
    bucket = request.bucket_record
    info = await front.objects.head(request.grant, request.key, version_id=version_of(request), customer_key=None)
    configuration = front.buckets.configuration_of(bucket)
    owner = bucket.owner if is_enforced(configuration) else info.owner or bucket.owner
    headers: Headers = {}
    version_header(info.version_id, headers)
    return xml_reply(await _printed(front, request, owner, _effective(configuration, info.acl)), headers=headers)


def is_enforced(configuration: Configuration) -> bool:
    """Whether the bucket's owner owns all objects in it."""
    found = configuration.get(OWNERSHIP)
    return found is None or found.rule == ENFORCED


def _effective(configuration: Configuration, acl: Acl | None) -> Acl | None:
    return None if is_enforced(configuration) else acl


async def _printed(front: Front, request: Request, owner: str, acl: Acl | None) -> bytes:
    entries = acl.entries if acl is not None else (AclEntry(owner, FULL),)
    names = await names_of(front, request.who, {owner, *(entry.grantee for entry in entries)})
    rows = "".join(_grant_row(entry, names) for entry in entries)
    return xml.document(
        "AccessControlPolicy",
        xml.owner(owner, names.get(owner, "")),
        f"<AccessControlList>{rows}</AccessControlList>",
    )


def _grant_row(entry: AclEntry, names: Mapping[str, str]) -> str:
    if entry.grantee in GROUPS:
        kind, content = "Group", xml.element("URI", lists.GROUP_URIS[entry.grantee])
    else:
        kind = "CanonicalUser"
        content = xml.owner(entry.grantee, names.get(entry.grantee, "")).removeprefix("<Owner>")
        content = content.removesuffix("</Owner>")
    return (
        f'<Grant><Grantee xmlns:xsi="{xml.XSI}" xsi:type="{kind}">{content}</Grantee>'
        f"<Permission>{entry.permission}</Permission></Grant>"
    )


async def names_of(front: Front, who: Principal, ids: Iterable[str]) -> Mapping[str, str]:
    """Canonical id -> the name that is printed. AWS prints none any more: other users' names are shown only where
    buckets are made as they were."""
    found = {who.user_id: who.display_name}
    if front.endpoint.legacy_buckets and any(id_ not in found and id_ not in GROUPS for id_ in ids):
        users = await front.users.directory()
        found |= {id_: users[id_].display_name for id_ in ids if id_ in users}
    return found


# --- writing ----------------------------------------------------------------------------------------------------------


async def put_bucket_acl(front: Front, request: Request) -> Reply:
    bucket = request.bucket_record
    acl = await _wanted(front, request, bucket.owner, "")

    def change(configuration: Configuration) -> Acl | None:
        if is_enforced(configuration):
            _refuse_change(configuration, request, bucket.owner, acl)
            return configuration.get(ACL)
        return _checked(configuration, bucket.owner, acl)

    await front.buckets.configure(bucket, ACL, change, who=request.who)
    return Reply()


async def put_object_acl(front: Front, request: Request) -> Reply:
    bucket, version = request.bucket_record, version_of(request)
    info = await front.objects.head(request.grant, request.key, version_id=version, customer_key=None)
    configuration = front.buckets.configuration_of(bucket)
    owner = info.owner or bucket.owner
    if is_enforced(configuration):
        owner = bucket.owner
    acl = await _wanted(front, request, owner, bucket.owner)
    headers: Headers = {}
    if is_enforced(configuration):
        _refuse_change(configuration, request, owner, acl)
        version_header(info.version_id, headers)
        return Reply(headers=headers)
    changed = _checked(configuration, owner, acl)
    found = await front.objects.set_acl(request.grant, request.key, changed, version_id=version)
    version_header(found, headers)
    return Reply(headers=headers)


def _refuse_change(configuration: Configuration, request: Request, owner: str, acl: Acl) -> None:
    """A document that gives the owner alone access says what is so anyway."""
    if "x-amz-acl" in request.headers or lists.has_grants(request.headers):
        _refuse_list(configuration, request.headers.get("x-amz-acl", ""), lists.has_grants(request.headers))
    elif acl.entries != (AclEntry(owner, FULL),):
        raise errors.AccessControlListNotSupported()


async def _wanted(front: Front, request: Request, owner: str, bucket_owner: str) -> Acl:
    """The list that PutBucketAcl or PutObjectAcl asks for: by a canned name, by headers, or by a document. Raises
    InvalidRequest, InvalidArgument, MalformedACLError, MissingSecurityHeader, AccessDenied (another owner)."""
    body, headers = request.document, request.headers
    if "x-amz-acl" in headers or lists.has_grants(headers):
        if body.strip():
            raise errors.InvalidRequest("This request does not support content")
        if lists.has_grants(headers):
            return await _granted(front, headers)
        return lists.canned(headers["x-amz-acl"], owner, bucket_owner)
    if not body.strip():
        raise errors.MissingSecurityHeader("Your request was missing a required header", MissingHeaderName="x-amz-acl")
    owner_named, wanted = await parse_document(_parse, body)
    if owner_named not in ("", owner):
        raise errors.AccessDenied()
    return await _resolved(front, wanted)


def _parse(body: bytes) -> tuple[str, list[tuple[str, str, str]]]:
    """The owner that a document names, or empty, and its grants. Raises MalformedACLError."""
    try:
        policy = xml.parse(body, "AccessControlPolicy")
        parts = {child.name: child for child in policy.children}
        if set(parts) - {"Owner", "AccessControlList"} or "AccessControlList" not in parts:
            raise errors.MalformedACLError()
        owner = parts["Owner"].fields({"ID", "DisplayName"}).get("ID", "") if "Owner" in parts else ""
        return owner, [_grant_in(node) for node in parts["AccessControlList"].children]
    except errors.MalformedXML:
        raise errors.MalformedACLError() from None


def _grant_in(node: xml.Node) -> tuple[str, str, str]:
    fields = {child.name: child for child in node.children}
    if node.name != "Grant" or set(fields) != {"Grantee", "Permission"} or len(node.children) != 2:
        raise errors.MalformedACLError()
    permission = fields["Permission"].text.strip()
    grantee = fields["Grantee"].fields({"ID", "DisplayName", "URI", "EmailAddress"})
    kind = _KINDS.get(fields["Grantee"].attributes.get(_TYPE, "CanonicalUser"), "")
    if permission not in lists.PERMISSIONS or not kind or _VALUES[kind] not in grantee:
        raise errors.MalformedACLError()
    return kind, grantee[_VALUES[kind]], permission

"""Access control lists, as far as this server has them: the owner has full control, and no other user has access."""

from __future__ import annotations

from storaged import errors
from storaged.objects.api import Principal
from storaged.s3 import xml
from storaged.s3.context import Front
from storaged.s3.documents import parse_document
from storaged.s3.reply import Reply
from storaged.s3.request import Request, version_of

_TYPE = f"{xml.XSI} type"


def own_acl(owner_id: str, who: Principal) -> bytes:
    """``owner_id``: the owner that the record names. ``who``: the requester."""
    owner = xml.owner_on_record(owner_id, who)
    grantee = owner.removeprefix("<Owner>").removesuffix("</Owner>")
    return xml.document(
        "AccessControlPolicy",
        owner,
        f'<AccessControlList><Grant><Grantee xmlns:xsi="{xml.XSI}" xsi:type="CanonicalUser">{grantee}</Grantee>'
        "<Permission>FULL_CONTROL</Permission></Grant></AccessControlList>",
    )


async def put_acl(front: Front, request: Request) -> Reply:
    """Accepts a list that changes nothing: the canned ``private`` and ``bucket-owner-full-control``, and a document
    that grants access to the owner alone. Raises NotImplemented for others."""
    if request.key:
        await front.objects.head(request.bucket_record, request.key, version_id=version_of(request), customer_key=None)
    body = request.document
    if "x-amz-acl" in request.headers:
        if body.strip():
            raise errors.InvalidRequest("This request does not support content")
        return Reply()
    if not body.strip():
        raise errors.MissingSecurityHeader("Your request was missing a required header", MissingHeaderName="x-amz-acl")
    if not _grants_owner_alone(await parse_document(xml_policy, body), request.who.user_id):
        raise errors.NotImplemented("Access control lists are not implemented: only a bucket's owner has access to it.")
    return Reply()


def xml_policy(body: bytes) -> xml.Node:
    try:
        return xml.parse(body, "AccessControlPolicy")
    except errors.MalformedXML:
        raise errors.MalformedACLError() from None


def _grants_owner_alone(policy: xml.Node, user_id: str) -> bool:
    """Raises MalformedACLError, and AccessDenied for another owner."""
    parts = {child.name: child for child in policy.children}
    if set(parts) - {"Owner", "AccessControlList"} or "AccessControlList" not in parts:
        raise errors.MalformedACLError()
    if "Owner" in parts and parts["Owner"].fields({"ID", "DisplayName"}).get("ID") != user_id:
        raise errors.AccessDenied()
    grants = parts["AccessControlList"].children
    found = []
    for grant in grants:
        fields = {child.name: child for child in grant.children}
        if grant.name != "Grant" or set(fields) != {"Grantee", "Permission"}:
            raise errors.MalformedACLError()
        if fields["Permission"].text not in ("FULL_CONTROL", "READ", "WRITE", "READ_ACP", "WRITE_ACP"):
            raise errors.MalformedACLError()
        grantee = fields["Grantee"].fields({"ID", "DisplayName", "URI", "EmailAddress"})
        found.append(
            (fields["Grantee"].attributes.get(_TYPE, "CanonicalUser"), grantee.get("ID", ""), fields["Permission"].text)
        )
    return found == [("CanonicalUser", user_id, "FULL_CONTROL")]

"""Configurations of access to a bucket: its policy and whether that is public, the public access block, ownership."""

from __future__ import annotations

from storaged import errors
from storaged.objects.configuration.access import (
    ACL,
    ENFORCED,
    OWNERSHIP,
    POLICY,
    PREFERRED,
    PUBLIC_ACCESS_BLOCK,
    WRITER,
    Acl,
    Ownership,
    PolicyText,
    PublicAccessBlock,
)
from storaged.objects.configuration.document import NOTHING, Configuration
from storaged.objects.configuration.kinds import ENCRYPTION, SSE_C, DefaultEncryption
from storaged.objects.encryption import S3
from storaged.s3 import xml
from storaged.s3.auth import policy as policies
from storaged.s3.auth.acl import is_public
from storaged.s3.auth.authorize import bucket_access
from storaged.s3.context import Front
from storaged.s3.ops.configuration import Row
from storaged.s3.ops.iam.principals import unknown_of
from storaged.s3.reply import Reply, xml_reply
from storaged.s3.request import Request

# --- policy -----------------------------------------------------------------------------------------------------------


def _policy(document: bytes) -> PolicyText:
    policies.parse(document)
    return PolicyText(document.decode())


def _check_policy(request: Request, value: PolicyText, configuration: Configuration) -> None:
    """Its resources are of this bucket; a public one is refused where the public access block says so."""
    parsed = policies.parse(value.text.encode(), request.bucket)
    block = configuration.get(PUBLIC_ACCESS_BLOCK)
    if block is not None and block.block_policy and parsed.public:
        raise errors.AccessDenied("A public policy is prevented by the BlockPublicPolicy setting.")


async def _verify_principals(front: Front, value: PolicyText) -> None:
    """Every account, canonical id and user that a policy names exists. Accounts of another form than AWS's name
    nobody here, and pass. Raises MalformedPolicy."""
    named = policies.principals_of(policies.policy_of(value.text).statements)
    if not named:
        return
    if unknown := await unknown_of(front.users, named):
        raise errors.MalformedPolicy("Invalid principal in policy", Detail=unknown[0][:200])


BUCKET_POLICY = Row(
    POLICY,
    _policy,
    lambda value: value.text.encode(),
    errors.NoSuchBucketPolicy,
    _check_policy,
    verify=_verify_principals,
    put_status=204,
    content_type="application/json",
)


async def get_policy_status(front: Front, request: Request) -> Reply:
    """Whether the bucket is public, by its policy or, where lists mean something, by its list. AWS answers 404 for a
    bucket without a policy; buckets that are made as they were say false."""
    configuration = await front.buckets.configuration(request.bucket_record)
    access = configuration.derive(bucket_access)
    if access.policy is None and not front.endpoint.legacy_buckets:
        raise errors.NoSuchBucketPolicy(BucketName=request.bucket)
    by_list = not access.enforced and not access.block.ignore_acls and is_public(access.acl)
    by_policy = access.policy is not None and access.policy.public and not access.block.restrict
    return xml_reply(xml.document("PolicyStatus", xml.boolean("IsPublic", by_list or by_policy)))


# --- public access block ----------------------------------------------------------------------------------------------

_SETTINGS = {
    "BlockPublicAcls": "block_acls",
    "IgnorePublicAcls": "ignore_acls",
    "BlockPublicPolicy": "block_policy",
    "RestrictPublicBuckets": "restrict",
}


def _block(document: bytes) -> PublicAccessBlock:
    found = xml.parse(document, "PublicAccessBlockConfiguration").fields(_SETTINGS)
    for text in found.values():
        if text.strip().lower() not in ("true", "false"):
            raise errors.MalformedXML()
    return PublicAccessBlock(**{_SETTINGS[name]: text.strip().lower() == "true" for name, text in found.items()})


def _print_block(value: PublicAccessBlock) -> bytes:
    return xml.document(
        "PublicAccessBlockConfiguration",
        "".join(xml.boolean(name, getattr(value, field)) for name, field in _SETTINGS.items()),
    )


BLOCK = Row(PUBLIC_ACCESS_BLOCK, _block, _print_block, errors.NoSuchPublicAccessBlockConfiguration)
ALL_BLOCKED = PublicAccessBlock(True, True, True, True)


# --- ownership --------------------------------------------------------------------------------------------------------

RULES = (ENFORCED, PREFERRED, WRITER)


def _ownership(document: bytes) -> Ownership:
    rules = xml.parse(document, "OwnershipControls").children
    if len(rules) != 1 or rules[0].name != "Rule":
        raise errors.MalformedXML()
    rule = rules[0].fields({"ObjectOwnership"}).get("ObjectOwnership", "")
    if rule not in RULES:
        raise errors.MalformedXML()
    return Ownership(rule, strict=True)


def check_ownership(rule: str, acl: Acl | None) -> None:
    """A list that gives others access can't stay where lists mean nothing. Raises
    InvalidBucketAclWithObjectOwnership."""
    if rule == ENFORCED and acl is not None:
        raise errors.InvalidBucketAclWithObjectOwnership()


def _print_ownership(value: Ownership) -> bytes:
    return xml.document("OwnershipControls", f"<Rule>{xml.element('ObjectOwnership', value.rule)}</Rule>")


CONTROLS = Row(
    OWNERSHIP,
    _ownership,
    _print_ownership,
    errors.OwnershipControlsNotFoundError,
    lambda request, value, configuration: check_ownership(value.rule, configuration.get(ACL)),
    shown=lambda value: value.shown,
    removed=Ownership(WRITER, shown=False),
)
"""A bucket whose controls are removed is like one that never had any: on AWS, the writer of an object owns it."""


# --- new buckets ------------------------------------------------------------------------------------------------------


def configuration_of_new(*, legacy: bool, rule: str, acl: Acl | None) -> Configuration:
    """``rule``: that the client asks for, or empty. ``acl``: None for the owner's alone. Raises
    InvalidBucketAclWithObjectOwnership, AccessDenied (a public list, of a bucket that blocks them)."""
    ownership = (
        Ownership(rule, strict=True) if rule else Ownership(WRITER, shown=False) if legacy else Ownership(ENFORCED)
    )
    check_ownership(ownership.rule, acl)
    found = NOTHING.having(OWNERSHIP, ownership)
    if not legacy:
        if is_public(acl):
            raise errors.AccessDenied("A public access control list is prevented by the BlockPublicAcls setting.")
        found = found.having(PUBLIC_ACCESS_BLOCK, ALL_BLOCKED)
        found = found.having(ENCRYPTION, DefaultEncryption(S3, blocked=(SSE_C,)))
    return found.having(ACL, acl)

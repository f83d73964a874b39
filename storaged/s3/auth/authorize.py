"""The one decision: may this principal do this to that resource? Pure; what nothing allows is denied.

Theory of operation. A decision has four voices, asked in AWS's order:

* The policies of who asks (``identities``), when it is a user of an account or a session. A statement that denies ends
  the decision, one that allows is needed. Then the three others say whether its account may; but within its account
  the bucket policy may name it itself, which is enough. The root of an account has no such policies.
* The bucket policy. A statement that denies ends it; one that allows permits, unless the public access block cuts a
  public policy off for all but the owner.
* The owner of the bucket, who may do all to the bucket, and to its objects when the bucket's owner owns them.
* Access control lists, while the bucket's ownership rule has them: of the bucket, or of the object.

Some decisions depend on the object: its owner, its list, its tags. They raise ``ObjectWanted`` when the caller has not
looked yet; it looks, and asks again. A request of the owner for a bucket whose configuration is plain needs none of
this.
"""

from __future__ import annotations

from typing import Final

from msgspec import Struct

from storaged.errors import AccessDenied, MethodNotAllowed
from storaged.objects.api import ABSENT, Grant, ObjectAccess, Principal
from storaged.objects.configuration.access import (
    ACL,
    ENFORCED,
    OWNERSHIP,
    POLICY,
    PUBLIC_ACCESS_BLOCK,
    Acl,
    PublicAccessBlock,
)
from storaged.objects.configuration.document import Configuration
from storaged.objects.grant_types import Identity
from storaged.objects.records import BucketRecord
from storaged.s3.auth import acl
from storaged.s3.auth.actions import POLICY_ACTIONS, Action
from storaged.s3.auth.conditions import Facts
from storaged.s3.auth.identities import Voice, asked
from storaged.s3.auth.policy import ARN_PREFIX, Policy, policy_of
from storaged.s3.auth.principals import SIGNED, own_names


class ObjectWanted(Exception):
    """The decision depends on the object, which was not looked at."""


class Unknown:
    """The object was not looked at."""


UNKNOWN: Final = Unknown()

FOR_GOOD: Final = "s3:DeleteObjectVersion"
"""WRITE in a bucket's list lets others than its owner hide an object, or overwrite it, but not delete a version.
https://docs.aws.amazon.com/AmazonS3/latest/userguide/acl-overview.html#permissions"""

NO_BLOCK: Final = PublicAccessBlock()


class BucketAccess(Struct, frozen=True):
    """What a bucket's configuration says about access."""

    policy: Policy | None
    block: PublicAccessBlock
    rule: str
    acl: Acl | None

    @property
    def enforced(self) -> bool:
        """Access control lists mean nothing, and the bucket's owner owns all objects."""
        return self.rule == ENFORCED


def bucket_access(configuration: Configuration) -> BucketAccess:
    policy, ownership = configuration.get(POLICY), configuration.get(OWNERSHIP)
    return BucketAccess(
        policy_of(policy.text) if policy is not None else None,
        configuration.get(PUBLIC_ACCESS_BLOCK) or NO_BLOCK,
        ownership.rule if ownership is not None else ENFORCED,
        configuration.get(ACL),
    )


class Resource(Struct, frozen=True):
    """``key``: None for the bucket itself. ``version``: the version id that the request names, or empty."""

    bucket: BucketRecord
    configuration: Configuration
    key: bytes | None = None
    version: str = ""

    @property
    def arn(self) -> str:
        if self.key is None:
            return ARN_PREFIX + self.bucket.name
        return f"{ARN_PREFIX}{self.bucket.name}/{self.key.decode('utf-8', 'surrogateescape')}"


class Context(Struct, frozen=True):
    """``facts``: the values of condition keys. ``found``: the object, None when there is none, UNKNOWN when the caller
    did not look."""

    facts: Facts
    found: ObjectAccess | Unknown | None = UNKNOWN


def owns_plain(who: Principal, bucket: BucketRecord) -> bool:
    """Whether this is the owner of a bucket whose configuration is plain: then nothing else decides."""
    return bucket.plain and who.user_id == bucket.owner and who.identity is None and bool(who.access_key)


def authorize(who: Principal, action: Action, resource: Resource, context: Context) -> Grant:
    """Raises AccessDenied, MethodNotAllowed (the policy of another's bucket), ObjectWanted."""
    bucket = resource.bucket
    if owns_plain(who, bucket):
        return Grant(bucket, resource.key, action.access)
    owns = who.user_id == bucket.owner and bool(who.access_key)
    access = resource.configuration.derive(bucket_access)
    for name in action.needed(resource.version):
        if not _permits(who, name, action, resource, context, access, owns):
            raise AccessDenied()
    if not owns and not POLICY_ACTIONS.isdisjoint(action.names):
        raise MethodNotAllowed()
    if isinstance(context.found, Unknown) or resource.key is None:
        return Grant(bucket, resource.key, action.access)
    return Grant(bucket, resource.key, action.access, ABSENT if context.found is None else context.found)


def refuse_denied(who: Principal, name: str, resource: Resource, context: Context) -> None:
    """Refuses what the bucket's policy denies, and what the sender's own policies do not allow; what nothing says
    anything about passes. Raises as ``authorize``."""
    identity = who.identity
    if identity is not None and not asked(who, identity, name, resource.arn, context.facts).permits:
        raise AccessDenied()
    policy = resource.configuration.derive(bucket_access).policy
    if policy is not None and policy.verdict(who, name, resource.arn, context.facts) is False:
        raise AccessDenied()


def _permits(
    who: Principal,
    name: str,
    action: Action,
    resource: Resource,
    context: Context,
    access: BucketAccess,
    owns: bool,
) -> bool:
    policy, identity = access.policy, who.identity
    voice = asked(who, identity, name, resource.arn, context.facts) if identity is not None else None
    if voice is not None and voice.denied:
        return False
    verdict = policy.verdict(who, name, resource.arn, context.facts) if policy is not None else None
    if verdict is False:
        return owns and (identity is None or identity.root) and name in POLICY_ACTIONS
    if voice is not None and identity is not None and not voice.permits:
        named = owns and verdict is True and policy is not None
        return named and _names_itself(policy, who, identity, voice, name, resource, context)
    if verdict and policy is not None and (owns or not (access.block.restrict and policy.public)):
        return True
    if owns and (access.enforced or not action.of_object):
        return True
    if action.by_initiator:
        return _initiated(who, context)
    if access.enforced or not action.acl or name == FOR_GOOD:
        return False
    if action.of_object:
        return _object_permits(who, action, resource, context, access, owns)
    ignore = access.block.ignore_acls
    return acl.allows(access.acl, resource.bucket.owner, who, action.acl, ignore_public=ignore)


def _names_itself(
    policy: Policy | None,
    who: Principal,
    identity: Identity,
    voice: Voice,
    name: str,
    resource: Resource,
    context: Context,
) -> bool:
    """Whether a bucket policy of the sender's own account allows it to the sender itself, not through the account: then
    its own policies need not allow it. What is given to a role, or to everybody, a session's policies narrow; what is
    given to the session they do not.
    https://docs.aws.amazon.com/IAM/latest/UserGuide/reference_policies_evaluation-logic_policy-eval-denyallow.html
    """
    assert policy is not None
    arn, facts = resource.arn, context.facts
    if policy.names_directly(frozenset((SIGNED + identity.arn,)), name, arn, facts):
        return voice.unbounded or bool(identity.role)
    if not voice.unbounded:
        return False
    return policy.names_directly(own_names(who), name, arn, facts) or policy.names_everybody(name, arn, facts)


def _initiated(who: Principal, context: Context) -> bool:
    """Whether this is who initiated the upload. A bucket's list does not count: WRITE in it is for one's own uploads.
    https://docs.aws.amazon.com/AmazonS3/latest/userguide/mpuoverview.html#mpuAndPermissions"""
    found = context.found
    if isinstance(found, Unknown):
        raise ObjectWanted
    return found is not None and bool(who.access_key) and found.owner == who.user_id


def _object_permits(
    who: Principal, action: Action, resource: Resource, context: Context, access: BucketAccess, owns: bool
) -> bool:
    """What the object itself allows. Its owner always reads and writes its access control list."""
    found = context.found
    if isinstance(found, Unknown):
        raise ObjectWanted
    if found is None:
        return owns  # there is nothing to be protected; the owner may know that
    if owns and found.owner == resource.bucket.owner:
        return True
    if action.acl in ("READ_ACP", "WRITE_ACP") and who.access_key and found.owner == who.user_id:
        return True
    return acl.allows(found.acl, found.owner, who, action.acl, ignore_public=access.block.ignore_acls)

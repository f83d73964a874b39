"""What is stored about access to a bucket: policy, access control list, public access block, ownership. Pure."""

from __future__ import annotations

from typing import Any, Final

from storaged.objects.configuration.document import Kind
from storaged.wire import Message


def _always(value: Any) -> bool:
    return True


class PolicyText(Message, frozen=True):
    """A bucket policy as the client sent it: JSON, checked."""

    text: str


class AclEntry(Message, frozen=True):
    """One grant of an access control list. ``grantee``: a canonical id, or one of the groups below. ``permission``:
    READ, WRITE, READ_ACP, WRITE_ACP, FULL_CONTROL.
    """

    grantee: str
    permission: str


EVERYBODY: Final = "AllUsers"
SIGNED: Final = "AuthenticatedUsers"
LOG_DELIVERY: Final = "LogDelivery"
GROUPS: Final = frozenset({EVERYBODY, SIGNED, LOG_DELIVERY})


class Acl(Message, frozen=True):
    """The grants of a bucket, or of an object. Who has none is an owner with FULL_CONTROL."""

    entries: tuple[AclEntry, ...]


class PublicAccessBlock(Message, frozen=True):
    block_acls: bool = False
    ignore_acls: bool = False
    block_policy: bool = False
    restrict: bool = False


ENFORCED: Final = "BucketOwnerEnforced"
PREFERRED: Final = "BucketOwnerPreferred"
WRITER: Final = "ObjectWriter"


class Ownership(Message, frozen=True):
    """``rule``: one of the above. ``shown``: GetBucketOwnershipControls returns it; else it is what a bucket without
    controls has. ``strict``: a client has asked for the rule, and so a request with the canned list ``private`` is
    refused where lists mean nothing. Many clients send that list always.
    """

    rule: str
    shown: bool = True
    strict: bool = False


def _is_enforced(value: Ownership) -> bool:
    return value.rule == ENFORCED


POLICY = Kind("policy", PolicyText)
ACL = Kind("acl", Acl)
PUBLIC_ACCESS_BLOCK = Kind("public_access_block", PublicAccessBlock, plain=_always)
OWNERSHIP = Kind("ownership", Ownership, plain=_is_enforced)
"""A bucket without this entry is BucketOwnerEnforced, as all buckets of version 0.1.0 were."""

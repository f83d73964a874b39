"""Who asks, and what a permission allows: part of the port of the object plane (``api``)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, NamedTuple

from msgspec import Struct

from storaged.objects.configuration.access import Acl
from storaged.objects.records import BucketRecord


class Identity(Struct, frozen=True):
    """Who of an account sends a request, when it is not its root with a key of its own, and what policies say.

    ``id``: of the user, ``ID:SESSION`` of a session of a role, the account's number of the root. ``arn``: of the user,
    the session, or the root. ``name``: of the user; empty for others. ``role``: the ARN of the role that was assumed.
    ``documents``: the texts of the policies of the user, its groups, or the role. ``session``: of those that narrow a
    session. ``root``: a session of the root: no policies but the session's. ``issuer``: of a session, the key that it
    was made with; empty: the key is a long-term one. ``issued_ms``, ``expires_ms``: of a session. ``tags``: of the user
    or role.
    """

    id: str
    arn: str
    name: str = ""
    role: str = ""
    documents: tuple[str, ...] = ()
    session: tuple[str, ...] = ()
    root: bool = False
    issuer: str = ""
    issued_ms: int = 0
    expires_ms: int = 0
    tags: Mapping[str, str] = {}

    @property
    def temporary(self) -> bool:
        return self.issuer != ""


class Principal(Struct, frozen=True):
    """The authenticated sender of a request. ``user_id``: the canonical id, which is the account's. ``display_name``:
    the account's. ``access_key``: empty when anonymous. ``email``: only of users that were listed. ``identity``: None
    for the account's root, whom no policy of its own limits, and for nobody. ``service``: the name of a
    service, which is no user.
    """

    user_id: str
    display_name: str
    access_key: str = ""
    email: str = ""
    identity: Identity | None = None
    service: str = ""


READ: Final = 1
WRITE: Final = 2
DELETE: Final = 4
LIST: Final = 8
AMEND: Final = 16
"""The calls that a Grant allows: bits. READ: get, head. WRITE: put, copies to the key, uploads. LIST: all lists. AMEND:
tags and access of an object."""


class ObjectAccess(NamedTuple):
    """What decides about access to an existing object."""

    owner: str
    acl: Acl | None
    tags: Mapping[str, str]
    etag: str = ""


ABSENT: Final = ObjectAccess("", None, {})
"""There is no such object, or it is a delete marker."""

Allowed = ObjectAccess | None
"""The object that a call was allowed for, as the decision saw it, or ABSENT; None: any. Another one: SlowDown."""


class Grant(Struct, frozen=True):
    """Permission for calls of the object plane (``objects.granted``): what one principal may do to one key, or to a
    bucket as a whole. ``s3.auth.authorize`` makes it, and nothing else does.

    ``key``: None for the bucket. ``access``: bits. ``found``: the decision depended on the object as it was, or on its
    absence; calls refuse when it is another one by then.
    """

    bucket: BucketRecord
    key: bytes | None
    access: int
    found: Allowed = None

"""Access control lists: canned ones, grant headers, and what a list allows. Pure.

https://docs.aws.amazon.com/AmazonS3/latest/userguide/acl-overview.html
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Final

from storaged.errors import InvalidArgument
from storaged.objects.api import Principal
from storaged.objects.configuration.access import EVERYBODY, LOG_DELIVERY, SIGNED, Acl, AclEntry

FULL: Final = "FULL_CONTROL"
PERMISSIONS: Final = frozenset({"READ", "WRITE", "READ_ACP", "WRITE_ACP", FULL})
GRANTS_MAX: Final = 100

LOGGING_SERVICE: Final = "logging.s3.amazonaws.com"
"""The only member of the group LogDelivery."""

GROUP_URIS: Final = {
    EVERYBODY: "http://acs.amazonaws.com/groups/global/AllUsers",
    SIGNED: "http://acs.amazonaws.com/groups/global/AuthenticatedUsers",
    LOG_DELIVERY: "http://acs.amazonaws.com/groups/s3/LogDelivery",
}
_GROUPS = {uri: group for group, uri in GROUP_URIS.items()}

GRANT_HEADERS: Final = {
    "x-amz-grant-read": "READ",
    "x-amz-grant-write": "WRITE",
    "x-amz-grant-read-acp": "READ_ACP",
    "x-amz-grant-write-acp": "WRITE_ACP",
    "x-amz-grant-full-control": FULL,
}
_GRANTEE = re.compile(r'\s*(id|uri|emailAddress)\s*=\s*(?:"([^"]*)"|([^",\s]+))\s*', re.IGNORECASE)

PRIVATE: Final = "private"
BUCKET_OWNER_FULL: Final = "bucket-owner-full-control"


def group_of(uri: str) -> str:
    """Raises InvalidArgument."""
    if uri not in _GROUPS:
        raise InvalidArgument("Invalid group uri", ArgumentName="uri", ArgumentValue=uri[:200])
    return _GROUPS[uri]


def canned(name: str, owner: str, bucket_owner: str = "") -> Acl:
    """``bucket_owner``: of an object's bucket; empty for a list of a bucket itself. Raises InvalidArgument."""
    full = AclEntry(owner, FULL)
    other = [AclEntry(bucket_owner, "")] if bucket_owner and bucket_owner != owner else []
    found = {
        "private": [],
        "public-read": [AclEntry(EVERYBODY, "READ")],
        "public-read-write": [AclEntry(EVERYBODY, "READ"), AclEntry(EVERYBODY, "WRITE")],
        "authenticated-read": [AclEntry(SIGNED, "READ")],
        "bucket-owner-read": [AclEntry(entry.grantee, "READ") for entry in other],
        "bucket-owner-full-control": [AclEntry(entry.grantee, FULL) for entry in other],
        "log-delivery-write": [AclEntry(LOG_DELIVERY, "WRITE"), AclEntry(LOG_DELIVERY, "READ_ACP")],
        "aws-exec-read": [],
    }.get(name)
    if found is None:
        raise InvalidArgument(ArgumentName="x-amz-acl", ArgumentValue=name[:200])
    return Acl((*found, full))


def has_grants(headers: Mapping[str, str]) -> bool:
    return any(name in headers for name in GRANT_HEADERS)


def grants_in(headers: Mapping[str, str]) -> Iterator[tuple[str, str, str]]:
    """(kind of grantee, grantee, permission) of x-amz-grant-*; the kind is id, uri or emailaddress. Raises
    InvalidArgument."""
    for name, permission in GRANT_HEADERS.items():
        if name in headers:
            for item in headers[name].split(","):
                match = _GRANTEE.fullmatch(item)
                if match is None:
                    raise InvalidArgument(
                        "Argument format not recognized", ArgumentName=name, ArgumentValue=headers[name][:200]
                    )
                yield match[1].lower(), match[2] or match[3] or "", permission


def is_public(acl: Acl | None) -> bool:
    """What BlockPublicAcls refuses: a grant to everybody, or to everybody who signs."""
    return acl is not None and any(entry.grantee in (EVERYBODY, SIGNED) for entry in acl.entries)


def allows(acl: Acl | None, owner: str, who: Principal, permission: str, *, ignore_public: bool) -> bool:
    """Whether a list gives a permission. ``acl`` None: to the owner alone."""
    if acl is None:
        return bool(who.access_key) and who.user_id == owner
    for entry in acl.entries:
        if entry.permission not in (permission, FULL):
            continue
        if entry.grantee == EVERYBODY or (entry.grantee == SIGNED and who.access_key):
            if not ignore_public:
                return True
        elif entry.grantee == LOG_DELIVERY:
            if who.service == LOGGING_SERVICE:
                return True
        elif who.access_key and entry.grantee == who.user_id:
            return True
    return False

"""Which of S3's condition keys each action has. Pure tables.

A request may carry parameters and headers that its action does not have: ``?prefix=`` with GetObject, ``x-amz-acl``
with DeleteObject. They change nothing that the action does, so they must not satisfy a condition either: an action
takes only the keys that AWS documents for it, and any other key of S3 has no value. Keys that begin with ``aws:`` are
there for all actions. Keys of IAM and STS are given with the calls that have them.

Source: the column «Condition keys» of
https://docs.aws.amazon.com/service-authorization/latest/reference/list_amazons3.html#amazons3-actions-as-permissions.
The tables leave out keys that ``conditions.KEYS`` does not know: no policy has them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from storaged.s3.auth.conditions import FAMILIES, Facts, like

_FAMILIES: Final = tuple(family for family in FAMILIES if family.startswith("s3:"))

_ALL: Final = frozenset(
    {
        "s3:authtype", "s3:resourceaccount", "s3:signatureage", "s3:signatureversion", "s3:x-amz-content-sha256",
        "s3:dataaccesspointarn", "s3:dataaccesspointaccount", "s3:accesspointnetworkorigin",
    }
)  # fmt: skip
"""Keys of every action of S3. The reference omits some of them for a few actions, and gives no reason. None of them
depends on what the action does."""

_LIST: Final = frozenset({"s3:prefix", "s3:delimiter", "s3:max-keys"})
_ACL: Final = frozenset(
    {
        "s3:x-amz-acl", "s3:x-amz-grant-full-control", "s3:x-amz-grant-read", "s3:x-amz-grant-read-acp",
        "s3:x-amz-grant-write", "s3:x-amz-grant-write-acp",
    }
)  # fmt: skip
_KMS: Final = frozenset({"s3:x-amz-server-side-encryption", "s3:x-amz-server-side-encryption-aws-kms-key-id"})
_EXISTING: Final = frozenset({"s3:existingobjecttag/"})
_TAGS: Final = frozenset({"s3:requestobjecttag/", "s3:requestobjecttagkeys"})
_VERSION: Final = frozenset({"s3:versionid"})
_RETENTION: Final = frozenset({"s3:object-lock-mode", "s3:object-lock-retain-until-date"})
_HOLD: Final = frozenset({"s3:object-lock-legal-hold"})
_STORAGE_CLASS: Final = frozenset({"s3:x-amz-storage-class"})
_WRITE: Final = (
    _ACL
    | _KMS
    | _TAGS
    | _STORAGE_CLASS
    | {
        "s3:x-amz-copy-source", "s3:x-amz-metadata-directive", "s3:x-amz-server-side-encryption-customer-algorithm",
        "s3:x-amz-website-redirect-location",
    }
)  # fmt: skip

KEYS: Final[dict[str, frozenset[str]]] = {
    "s3:CreateBucket": _ACL | {"s3:locationconstraint", "s3:x-amz-object-ownership"},
    "s3:PutBucketAcl": _ACL,
    "s3:PutInventoryConfiguration": frozenset({"s3:inventoryaccessibleoptionalfields"}),
    "s3:ListBucket": _LIST,
    "s3:ListBucketVersions": _LIST,
    "s3:GetObject": _EXISTING,
    "s3:GetObjectVersion": _EXISTING | _VERSION,
    "s3:GetObjectAttributes": _EXISTING,
    "s3:GetObjectVersionAttributes": _EXISTING | _VERSION,
    "s3:GetObjectVersionTorrent": _VERSION,
    "s3:GetObjectAcl": _EXISTING,
    "s3:GetObjectVersionAcl": _EXISTING | _VERSION,
    "s3:PutObjectAcl": _EXISTING | _ACL | _STORAGE_CLASS,
    "s3:PutObjectVersionAcl": _EXISTING | _ACL | _STORAGE_CLASS | _VERSION,
    "s3:GetObjectTagging": _EXISTING,
    "s3:GetObjectVersionTagging": _EXISTING | _VERSION,
    "s3:PutObjectTagging": _EXISTING | _TAGS,
    "s3:PutObjectVersionTagging": _EXISTING | _TAGS | _VERSION,
    "s3:DeleteObjectTagging": _EXISTING,
    "s3:DeleteObjectVersionTagging": _EXISTING | _VERSION,
    "s3:PutObject": _WRITE | _RETENTION | _HOLD | {"s3:if-match", "s3:if-none-match"},
    "s3:BypassGovernanceRetention": _WRITE,
    "s3:PutObjectRetention": _RETENTION,
    "s3:PutObjectLegalHold": _HOLD,
    "s3:UpdateObjectEncryption": _KMS,
    "s3:DeleteObject": frozenset({"s3:if-match"}),
    "s3:DeleteObjectVersion": _VERSION,
}
"""By action, beside those of ``_ALL``; an action without a row has no others. A family of keys is there for each of its
keys."""

_UNASKED: Final = frozenset({"s3:replicateobject"})
"""It has keys, but no request here needs it."""

_LOWER: Final = {action.lower(): keys for action, keys in KEYS.items()}


def has_key(action: str, key: str) -> bool:
    """``key``: in the form of ``conditions.key_named``."""
    if not key.startswith("s3:"):
        return True
    lower = action.lower()
    kind = next((family for family in _FAMILIES if key.startswith(family)), key)
    return lower.startswith("s3:") and (kind in _ALL or kind in _LOWER.get(lower, ()))


def facts_of_action(action: str, facts: Facts) -> Facts:
    """``facts``, without the keys that the action does not have."""
    return lambda name: facts(name) if has_key(action, name) else None


def key_without_action(actions: Sequence[str], keys: Sequence[str]) -> str | None:
    """A key that one of the actions does not have: a condition on it would allow or deny that action never, or always.
    ``actions``: of a statement, in lower case. One with wildcards must stand for an action that has the key."""
    return next((key for key in keys if not all(_may_have(text, key) for text in actions)), None)


def _may_have(text: str, key: str) -> bool:
    return text in _UNASKED or has_key(text, key) or any(has_key(name, key) for name in _LOWER if like(text, name))

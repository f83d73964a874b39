"""What an account has: users, groups, roles, policies; and the credentials of a session. Pure.

Theory of operation. An account is what ``storaged user add`` makes: a canonical id, whose own keys are those of its
root user. Everything else that IAM knows of it is one value, a ``StoredAccount``, in one register. So a change sees all
of it, and is one compare-and-set: a group that has members is not deleted while another gateway adds one.

A key of a user works only while the account lists it: the register of the key itself has the secret, and grants
nothing. So what is removed here, or set to inactive, stops with this one change.

Limits are those of AWS, and ``BYTES_MAX`` for all of an account.
https://docs.aws.amazon.com/IAM/latest/UserGuide/reference_iam-quotas.html
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Final, TypeVar

import msgspec

from storaged.errors import DataDamaged, LimitExceeded, ServiceUnavailable
from storaged.objects.identity import account_of
from storaged.units import KIB
from storaged.wire import Message, decode, encode

BYTES_MAX: Final = 512 * KIB
"""All of an account. It is read again every second while one of its users sends requests."""

USERS_MAX: Final = 5000
GROUPS_MAX: Final = 300
ROLES_MAX: Final = 1000
POLICIES_MAX: Final = 1500
KEYS_PER_USER_MAX: Final = 2
GROUPS_PER_USER_MAX: Final = 10
ATTACHED_MAX: Final = 10
VERSIONS_MAX: Final = 5

FORMAT: Final = 1
SESSION_FORMAT: Final = 1


class IamKey(Message, frozen=True):
    """An access key of a user. Its secret is in the register ``user/ACCESS_KEY``."""

    access_key: str
    created_ms: int
    active: bool = True


class IamUser(Message, frozen=True):
    """``inline``: name -> text of the policies in it. ``attached``: ARNs of managed policies. ``groups``: their ids."""

    name: str
    id: str
    path: str
    created_ms: int
    inline: dict[str, str] = msgspec.field(default_factory=dict)
    attached: tuple[str, ...] = ()
    keys: tuple[IamKey, ...] = ()
    groups: tuple[str, ...] = ()
    tags: dict[str, str] = msgspec.field(default_factory=dict)


class IamGroup(Message, frozen=True):
    name: str
    id: str
    path: str
    created_ms: int
    inline: dict[str, str] = msgspec.field(default_factory=dict)
    attached: tuple[str, ...] = ()


class IamRole(Message, frozen=True):
    """``trust``: the text of the policy that says who may assume it."""

    name: str
    id: str
    path: str
    created_ms: int
    trust: str
    inline: dict[str, str] = msgspec.field(default_factory=dict)
    attached: tuple[str, ...] = ()
    description: str = ""
    session_s_max: int = 3600
    tags: dict[str, str] = msgspec.field(default_factory=dict)


class PolicyVersion(Message, frozen=True):
    """``name``: v1, v2, ..."""

    name: str
    text: str
    created_ms: int


class ManagedPolicy(Message, frozen=True):
    """A policy of the account, which users, groups and roles attach. ``made``: how many versions there ever were."""

    name: str
    id: str
    path: str
    created_ms: int
    versions: tuple[PolicyVersion, ...]
    default: str
    made: int = 1
    description: str = ""
    updated_ms: int = 0

    @property
    def text(self) -> str:
        return next(version.text for version in self.versions if version.name == self.default)


class StoredAccount(Message, frozen=True):
    """Sealed in ``AccountRecord.sealed``. The entries are by name in lower case, for IAM's names differ by more than
    case. ``name``: of the account's own user. ``closed``: that user was removed, and no other one has its id.
    ``bytes_max``, ``objects_max``: of all its buckets together; 0: no limit.
    """

    format: int = FORMAT
    name: str = ""
    users: dict[str, IamUser] = msgspec.field(default_factory=dict)
    groups: dict[str, IamGroup] = msgspec.field(default_factory=dict)
    roles: dict[str, IamRole] = msgspec.field(default_factory=dict)
    policies: dict[str, ManagedPolicy] = msgspec.field(default_factory=dict)
    closed: bool = False
    bytes_max: int = 0
    objects_max: int = 0

    def user_of(self, user: str) -> IamUser | None:
        """By id."""
        return next((found for found in self.users.values() if found.id == user), None)

    def role_of(self, role: str) -> IamRole | None:
        """By id."""
        return next((found for found in self.roles.values() if found.id == role), None)

    def groups_of(self, user: IamUser) -> Iterator[IamGroup]:
        for group in self.groups.values():
            if group.id in user.groups:
                yield group


NO_ACCOUNT: Final = StoredAccount()


class AccountRecord(Message, frozen=True):
    """``account/USER_ID``: what IAM knows of an account, sealed and bound to the register's name. ``authenticator``: as
    in BucketRecord."""

    user_id: str
    changed_ms: int
    sealed: bytes
    authenticator: bytes = b""


class StoredSession(Message, frozen=True):
    """Temporary credentials: all that is known of them, sealed in the session's token.

    ``issuer``: the long-term key that they come from. With it they end. ``account``: whose rights they have, a
    canonical id. ``role``: the id of the role that was assumed; empty for the issuer's own rights. ``policies``: what
    narrows them, as texts.
    """

    format: int
    access_key: str
    secret_key: str
    issuer: str
    account: str
    issued_ms: int
    expires_ms: int
    role: str = ""
    name: str = ""
    policies: tuple[str, ...] = ()


Entity = TypeVar("Entity", IamUser, IamGroup, IamRole, ManagedPolicy)


def with_entry(entries: Mapping[str, Entity], entry: Entity, before: str = "") -> dict[str, Entity]:
    """``entries`` with another one, in place of the one that was called ``before``."""
    found = {name: each for name, each in entries.items() if name != before.lower()}
    found[entry.name.lower()] = entry
    return found


def without_entry(entries: Mapping[str, Entity], name: str) -> dict[str, Entity]:
    return {each: entry for each, entry in entries.items() if each != name.lower()}


def packed_account(account: StoredAccount) -> bytes:
    """The bytes to be sealed. Raises LimitExceeded."""
    data = encode(account)
    if len(data) > BYTES_MAX:
        raise LimitExceeded(
            f"An account may have {BYTES_MAX // KIB} KiB of users, groups, roles and policies in all; it would have"
            f" {len(data) // KIB + 1} KiB."
        )
    return data


def unpacked_account(data: bytes) -> StoredAccount:
    """Raises DataDamaged, and ServiceUnavailable for what a newer gateway wrote."""
    try:
        account = decode(data, StoredAccount)
    except msgspec.MsgspecError as error:
        raise DataDamaged(f"What IAM knows of an account cannot be read: {error}") from None
    if account.format != FORMAT:
        raise ServiceUnavailable(
            f"A newer version has written this account (format {account.format}): this gateway can't honour that, and"
            " must be upgraded."
        )
    return account


# --- names ------------------------------------------------------------------------------------------------------------


def iam_arn(user_id: str, kind: str, path: str, name: str) -> str:
    """``arn:aws:iam::123456789012:role/path/name``. ``kind``: user, group, role, policy. ``path`` has both its
    slashes."""
    return f"arn:aws:iam::{account_of(user_id)}:{kind}{path}{name}"


def root_arn(user_id: str) -> str:
    return f"arn:aws:iam::{account_of(user_id)}:root"


def session_arn(user_id: str, role: str, session: str) -> str:
    """Of a session of a role."""
    return f"arn:aws:sts::{account_of(user_id)}:assumed-role/{role}/{session}"

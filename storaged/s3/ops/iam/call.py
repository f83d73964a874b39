"""One call of IAM or STS: who calls, for which account, with which parameters; and how entities are found in an
account, and changed.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final, NamedTuple, TypeVar

from msgspec import structs

from storaged.errors import DeleteConflict, EntityAlreadyExists, LimitExceeded, NoSuchEntity, ValidationError
from storaged.objects.accounts import (
    GROUPS_MAX,
    POLICIES_MAX,
    ROLES_MAX,
    USERS_MAX,
    IamGroup,
    IamRole,
    IamUser,
    ManagedPolicy,
    StoredAccount,
    iam_arn,
    with_entry,
    without_entry,
)
from storaged.objects.api import Principal, Users

Result = Mapping[str, Any] | None
"""The fields of an answer: texts, numbers, booleans, mappings, and sequences of these; ``Entries`` for a map of AWS."""

Entity = IamUser | IamGroup | IamRole
Any_ = TypeVar("Any_", IamUser, IamGroup, IamRole, ManagedPolicy)

PAGE: Final = 100
PAGE_MAX: Final = 1000
TAGS_MAX: Final = 50

_NAME = re.compile(r"[\w+=,.@-]+", re.ASCII)
_PATH = re.compile(r"/|/[\x21-\x7e]+/")
_PATH_PREFIX = re.compile(r"/[\x21-\x7e]*")
_INTEGER = re.compile(r"\d{1,9}")
_TEXT = re.compile("[\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]*")


AUDITED: Final = (
    "UserName", "GroupName", "RoleName", "PolicyName", "PolicyArn", "AccessKeyId", "Status", "VersionId", "NewUserName",
    "NewGroupName", "NewPath", "Path",
)  # fmt: skip
"""Parameters that the audit log has. Policies are not among them: they are sealed."""


AUDITED_CHARS_MAX: Final = 512
"""Of each: an action that ignores a parameter has not looked at its length."""


class Entries(dict[str, Any]):
    """A map, which AWS prints as a list of entries."""


class Kind(NamedTuple):
    """``word``: in names of actions and parameters. ``field``: of StoredAccount. ``prefix``: of ids. ``inline_max``:
    characters of all policies in an entity."""

    word: str
    field: str
    prefix: str
    count_max: int
    name_max: int
    inline_max: int = 0

    @property
    def arn(self) -> str:
        return self.word.lower()

    @property
    def parameter(self) -> str:
        return f"{self.word}Name"


USER: Final = Kind("User", "users", "AIDA", USERS_MAX, 64, 2048)
GROUP: Final = Kind("Group", "groups", "AGPA", GROUPS_MAX, 128, 5120)
ROLE: Final = Kind("Role", "roles", "AROA", ROLES_MAX, 64, 10240)
POLICY: Final = Kind("Policy", "policies", "ANPA", POLICIES_MAX, 128)


class Parameters:
    """Of a call, by name. A list is ``Name.member.1``, and so on. Raises ValidationError."""

    def __init__(self, found: Mapping[str, str]) -> None:
        self.found = found

    def __contains__(self, name: str) -> bool:
        return name in self.found

    def text(self, name: str, default: str | None = None, *, chars_max: int = 1000, chars_min: int = 0) -> str:
        """Without a default it must be there."""
        value = self.found.get(name, default)
        if value is None:
            raise _invalid(name, "null", "Member must not be null")
        if not chars_min <= len(value) <= chars_max:
            raise _invalid(name, value, f"Member must have length between {chars_min} and {chars_max}")
        if not _TEXT.fullmatch(value):
            raise _invalid(name, "", "Member must not have control characters")
        return value

    def name(self, name: str, default: str | None = None, *, chars_max: int = 128, chars_min: int = 1) -> str:
        value = self.text(name, default, chars_max=chars_max, chars_min=chars_min)
        if not _NAME.fullmatch(value):
            raise _invalid(name, value, r"Member must satisfy regular expression pattern: [\w+=,.@-]+")
        return value

    def path(self, name: str = "Path", default: str | None = "/") -> str:
        value = self.text(name, default, chars_max=512, chars_min=1)
        if not _PATH.fullmatch(value):
            raise _invalid(name, value, r"Member must satisfy regular expression pattern: (/)|(/[\x21-\x7E]+/)")
        return value

    def path_prefix(self) -> str:
        value = self.text("PathPrefix", "/", chars_max=512)
        if not _PATH_PREFIX.fullmatch(value):
            raise _invalid("PathPrefix", value, r"Member must satisfy regular expression pattern: /[\x21-\x7E]*")
        return value

    def integer(self, name: str, default: int, least: int, most: int) -> int:
        value = self.found.get(name)
        if value is None:
            return default
        if not _INTEGER.fullmatch(value) or not least <= int(value) <= most:
            raise _invalid(name, value, f"Member must have value between {least} and {most}")
        return int(value)

    def choice(self, name: str, allowed: Sequence[str], default: str | None = None) -> str:
        value = self.text(name, default)
        if value not in allowed:
            raise _invalid(name, value, f"Member must satisfy enum value set: [{', '.join(allowed)}]")
        return value

    def truth(self, name: str) -> bool:
        return self.choice(name, ("true", "false"), "false") == "true"

    def members(self, name: str, suffix: str = "") -> list[str]:
        """``Name.member.1`` up to the first that is missing, with ``suffix`` after each."""
        found: list[str] = []
        while (value := self.found.get(f"{name}.member.{len(found) + 1}{suffix}")) is not None:
            found.append(value)
        return found

    def tags(self) -> dict[str, str]:
        keys = self.members("Tags", ".Key")
        found = dict(zip(keys, self.members("Tags", ".Value"), strict=False))
        if len(found) != len(keys) or len(found) > TAGS_MAX:
            raise _invalid("Tags", "", f"Member must have at most {TAGS_MAX} tags with different keys, each a value")
        for key, value in found.items():
            if not 1 <= len(key) <= 128 or len(value) > 256 or not _TEXT.fullmatch(key + value):
                raise _invalid("Tags", key, "Member must have keys of 1 to 128 and values of up to 256 characters")
        return found


def _invalid(name: str, value: str, what: str) -> ValidationError:
    member = name[:1].lower() + name[1:]
    return ValidationError(
        f"1 validation error detected: Value '{value[:200]}' at '{member}' failed to satisfy constraint: {what}"
    )


@dataclass(frozen=True)
class Call:
    """``user_id``: of the account that is called for, the caller's own. ``permit(action, arn)``: raises AccessDenied.
    ``who``: None for the operator. ``account_name``: of the account's own user."""

    action: str
    users: Users
    user_id: str
    account_name: str
    parameters: Parameters
    now_ms: int
    permit: Callable[[str, str], None]
    who: Principal | None = None

    async def account(self) -> StoredAccount:
        return await self.users.accounts.get(self.user_id)

    def arn(self, kind: Kind, entity: Entity | ManagedPolicy) -> str:
        return iam_arn(self.user_id, kind.arn, entity.path, entity.name)

    def name(self, kind: Kind, parameter: str = "") -> str:
        return self.parameters.name(parameter or kind.parameter, chars_max=kind.name_max)

    async def change(self, target: str, edit: Callable[[StoredAccount], StoredAccount], **more: str) -> StoredAccount:
        """``more``: for the audit log. Raises what ``edit`` raises."""

        def named(account: StoredAccount) -> StoredAccount:
            found = edit(account)
            return found if found.name or found == account else structs.replace(found, name=self.account_name)

        found = self.parameters.found
        facts = {name: found[name][:AUDITED_CHARS_MAX] for name in AUDITED if name in found} | more
        return await self.users.accounts.change(
            self.user_id, named, action=self.action, target=target, who=self.who, facts=facts
        )


# --- entities in an account -------------------------------------------------------------------------------------------


def entries_of(account: StoredAccount, kind: Kind) -> dict[str, Any]:
    found: dict[str, Any] = getattr(account, kind.field)
    return found


def tags_of(account: StoredAccount, arn: str) -> Mapping[str, str]:
    """The tags of the user or role of this ARN; none when there is none."""
    kind, _, rest = arn.split(":", 5)[-1].partition("/")
    name = rest.rpartition("/")[2].lower()
    found = account.users.get(name) if kind == "user" else account.roles.get(name) if kind == "role" else None
    return found.tags if found is not None and f"{found.path}{found.name}" == f"/{rest}" else {}


def missing(kind: Kind, name: str) -> NoSuchEntity:
    return NoSuchEntity(f"The {kind.arn} with name {name} cannot be found.")


def find(account: StoredAccount, kind: Kind, name: str) -> Any:
    """Raises NoSuchEntity."""
    found = entries_of(account, kind).get(name.lower())
    if found is None:
        raise missing(kind, name)
    return found


def refuse_taken(account: StoredAccount, kind: Kind, name: str, before: str = "") -> None:
    """``before``: what the entity is called that gets the name. Raises EntityAlreadyExists."""
    if name.lower() != before.lower() and name.lower() in entries_of(account, kind):
        raise EntityAlreadyExists(f"{kind.word} with name {name} already exists.")


def having(account: StoredAccount, kind: Kind, entity: Any, before: str = "") -> StoredAccount:
    """The account with this entity, in place of the one that was called ``before``."""
    entries = with_entry(entries_of(account, kind), entity, before)
    return structs.replace(account, **{kind.field: entries})


def added(account: StoredAccount, kind: Kind, entity: Any) -> StoredAccount:
    """The account with a new entity. Raises EntityAlreadyExists, LimitExceeded."""
    refuse_taken(account, kind, entity.name)
    if len(entries_of(account, kind)) >= kind.count_max:
        raise LimitExceeded(f"Cannot exceed quota for {kind.field.title()}PerAccount: {kind.count_max}")
    return having(account, kind, entity)


def lacking(account: StoredAccount, kind: Kind, name: str) -> StoredAccount:
    return structs.replace(account, **{kind.field: without_entry(entries_of(account, kind), name)})


async def rename(call: Call, kind: Kind, refuse: Callable[[Call, str], Awaitable[None]] | None = None) -> Result:
    """Gives a user or a group another name or path. ``refuse``: raises for a name that it may not have."""
    parameter = f"New{kind.parameter}"
    name = call.name(kind)
    new_name = call.name(kind, parameter) if parameter in call.parameters else ""
    new_path = call.parameters.path("NewPath") if "NewPath" in call.parameters else ""

    def changed(entity: Any) -> Any:
        return structs.replace(entity, name=new_name or entity.name, path=new_path or entity.path)

    before = find(await call.account(), kind, name)
    if new_name and refuse is not None:
        await refuse(call, new_name)
    call.permit(f"iam:Update{kind.word}", call.arn(kind, changed(before)))  # AWS wants it for both names

    def edit(account: StoredAccount) -> StoredAccount:
        entity = find(account, kind, name)
        if new_name:
            refuse_taken(account, kind, new_name, name)
        return having(account, kind, changed(entity), name)

    await call.change(call.arn(kind, before), edit)
    return None


async def delete(call: Call, kind: Kind, uses: Callable[[StoredAccount, Any], Iterable[tuple[bool, str]]]) -> Result:
    """Deletes a user, a group or a role. ``uses``: whether it is used in each way, and what AWS wants to be done first
    then. Raises NoSuchEntity, DeleteConflict.
    """
    name = call.name(kind)
    before = find(await call.account(), kind, name)

    def edit(account: StoredAccount) -> StoredAccount:
        for used, what in uses(account, find(account, kind, name)):
            if used:
                raise DeleteConflict(f"Cannot delete entity, must {what} first.")
        return lacking(account, kind, name)

    await call.change(call.arn(kind, before), edit)
    return None


def uses_of_policies(entity: Entity) -> tuple[tuple[bool, str], ...]:
    """As ``delete`` wants it: the policies that are in an entity, or attached to it."""
    return (bool(entity.inline), "delete policies"), (bool(entity.attached), "detach all policies")


def entity_fields(call: Call, kind: Kind, entity: Entity) -> dict[str, Any]:
    """The fields that users, groups and roles have in common."""
    return {
        "Path": entity.path,
        f"{kind.word}Name": entity.name,
        f"{kind.word}Id": entity.id,
        "Arn": call.arn(kind, entity),
        "CreateDate": moment(entity.created_ms),
    }


def with_prefix(entries: Mapping[str, Any], prefix: str) -> list[tuple[str, Any]]:
    """The rows of a list: the entities whose path begins with the prefix, by name."""
    return [(name, each) for name, each in entries.items() if each.path.startswith(prefix)]


# --- answers ----------------------------------------------------------------------------------------------------------


def moment(ms: int) -> str:
    return datetime.fromtimestamp(ms // 1000, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def tag_list(tags: Mapping[str, str]) -> list[dict[str, str]]:
    return [{"Key": key, "Value": value} for key, value in tags.items()]


def _itself(row: Any) -> Any:
    return row


def page(
    call: Call, name: str, rows: Iterable[tuple[str, Any]], shown: Callable[[Any], Any] = _itself
) -> dict[str, Any]:
    """The page of ``rows`` (sort key, row) that Marker and MaxItems ask for. Only its rows are made by ``shown``, for
    an account has thousands. Raises ValidationError."""
    limit = call.parameters.integer("MaxItems", PAGE, 1, PAGE_MAX)
    after = _from_marker(call.parameters.text("Marker", "", chars_max=2000))
    left = sorted((row for row in rows if row[0] > after), key=lambda row: row[0])
    found: dict[str, Any] = {name: [shown(row) for _, row in left[:limit]], "IsTruncated": len(left) > limit}
    if len(left) > limit:
        found["Marker"] = base64.urlsafe_b64encode(left[limit - 1][0].encode()).decode()
    return found


def _from_marker(text: str) -> str:
    try:
        return base64.b64decode(text, altchars=b"-_", validate=True).decode()
    except (binascii.Error, ValueError):
        raise _invalid("Marker", text, "Member must be the Marker of an answer") from None

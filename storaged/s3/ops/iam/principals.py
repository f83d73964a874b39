"""Whether the accounts, users and roles that a policy names exist."""

from __future__ import annotations

from collections.abc import Iterable

from storaged.objects.accounts import iam_arn
from storaged.objects.api import Users
from storaged.objects.identity import account_of, arn_of


async def user_id_of(users: Users, number: str) -> str:
    """The canonical id of an account; empty when there is none of this number."""
    return next((user_id for user_id in await users.directory() if account_of(user_id) == number), "")


async def unknown_of(users: Users, named: Iterable[str]) -> list[str]:
    """Those of ``named`` (``policy.principals_of``) that do not exist. A session exists when its role does."""
    directory = await users.directory()
    numbers = {account_of(user_id): user_id for user_id in directory}
    roots = {arn_of(user.user_id, user.display_name) for user in directory.values()}
    found = []
    for name in sorted(named):
        if name in directory or name in numbers or name in roots:
            continue
        parts = name.split(":", 5)
        user_id = numbers.get(parts[4]) if len(parts) == 6 else None
        if user_id is None or not await _has(users, user_id, name, parts[5]):
            found.append(name)
    return found


async def _has(users: Users, user_id: str, arn: str, resource: str) -> bool:
    account = await users.accounts.get(user_id)
    kind, _, rest = resource.partition("/")
    name = rest.rpartition("/")[2].lower()
    if kind == "user":
        user = account.users.get(name)
        return user is not None and iam_arn(user_id, "user", user.path, user.name) == arn
    if kind == "role":
        role = account.roles.get(name)
        return role is not None and iam_arn(user_id, "role", role.path, role.name) == arn
    if kind == "assumed-role":
        role = account.roles.get(rest.partition("/")[0].lower())
        return role is not None and role.name == rest.partition("/")[0]
    return False

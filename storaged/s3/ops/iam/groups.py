"""Groups of an account, and who is in them.

https://docs.aws.amazon.com/IAM/latest/APIReference/API_CreateGroup.html and the pages of the other actions.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

from msgspec import structs

from storaged.errors import LimitExceeded
from storaged.objects.accounts import GROUPS_PER_USER_MAX, IamGroup, StoredAccount
from storaged.s3.ops.iam.call import (
    GROUP,
    USER,
    Call,
    Result,
    added,
    delete,
    entity_fields,
    find,
    having,
    page,
    rename,
    uses_of_policies,
    with_prefix,
)


async def create_group(call: Call) -> Result:
    name = call.name(GROUP)
    group = IamGroup(name, call.users.accounts.new_id(GROUP.prefix), call.parameters.path(), call.now_ms)

    def edit(account: StoredAccount) -> StoredAccount:
        return added(account, GROUP, group)

    await call.change(call.arn(GROUP, group), edit)
    return {"Group": entity_fields(call, GROUP, group)}


async def get_group(call: Call) -> Result:
    account = await call.account()
    group = find(account, GROUP, call.name(GROUP))
    members = [(name, user) for name, user in account.users.items() if group.id in user.groups]
    shown = page(call, "Users", members, partial(entity_fields, call, USER))
    return {"Group": entity_fields(call, GROUP, group)} | shown


async def list_groups(call: Call) -> Result:
    prefix = call.parameters.path_prefix()
    return page(call, "Groups", with_prefix((await call.account()).groups, prefix), partial(entity_fields, call, GROUP))


async def update_group(call: Call) -> Result:
    return await rename(call, GROUP)


async def delete_group(call: Call) -> Result:
    def uses(account: StoredAccount, group: IamGroup) -> Iterable[tuple[bool, str]]:
        members = any(group.id in user.groups for user in account.users.values())
        return (members, "remove users from group"), *uses_of_policies(group)

    return await delete(call, GROUP, uses)


async def add_user_to_group(call: Call) -> Result:
    return await _member(call, joins=True)


async def remove_user_from_group(call: Call) -> Result:
    return await _member(call, joins=False)


async def _member(call: Call, *, joins: bool) -> Result:
    name, user_name = call.name(GROUP), call.name(USER)
    group = find(await call.account(), GROUP, name)

    def edit(account: StoredAccount) -> StoredAccount:
        found, user = find(account, GROUP, name), find(account, USER, user_name)
        groups = tuple(each for each in user.groups if each != found.id)
        if joins and len(groups) >= GROUPS_PER_USER_MAX:
            raise LimitExceeded(f"Cannot exceed quota for GroupsPerUser: {GROUPS_PER_USER_MAX}")
        if joins:
            groups = user.groups if found.id in user.groups else (*groups, found.id)
        return having(account, USER, structs.replace(user, groups=groups), user_name)

    await call.change(call.arn(GROUP, group), edit)
    return None


async def list_groups_for_user(call: Call) -> Result:
    account = await call.account()
    user = find(account, USER, call.name(USER))
    groups = [(group.name.lower(), entity_fields(call, GROUP, group)) for group in account.groups_of(user)]
    return page(call, "Groups", groups)

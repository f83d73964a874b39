"""Users of an account and their access keys.

https://docs.aws.amazon.com/IAM/latest/APIReference/API_CreateUser.html and the pages of the other actions.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

from msgspec import structs

from storaged.errors import (
    EntityAlreadyExists,
    LimitExceeded,
    NoSuchEntity,
    StoragedError,
    ValidationError,
)
from storaged.objects.accounts import KEYS_PER_USER_MAX, IamKey, IamUser, StoredAccount, root_arn
from storaged.objects.api import Principal
from storaged.objects.identity import account_of
from storaged.s3.ops.iam.call import (
    USER,
    Call,
    Result,
    added,
    delete,
    entity_fields,
    find,
    having,
    moment,
    page,
    rename,
    tag_list,
    uses_of_policies,
    with_prefix,
)


async def create_user(call: Call) -> Result:
    name, path, tags = call.name(USER), call.parameters.path(), call.parameters.tags()
    await _refuse_root_name(call, name)
    user = IamUser(name, call.users.accounts.new_id(USER.prefix), path, call.now_ms, tags=tags)

    def edit(account: StoredAccount) -> StoredAccount:
        return added(account, USER, user)

    await call.change(call.arn(USER, user), edit)
    return {"User": entity_fields(call, USER, user) | ({"Tags": tag_list(tags)} if tags else {})}


async def _refuse_root_name(call: Call, name: str) -> None:
    """The account's own user is known to policies as a user of its name. Raises EntityAlreadyExists."""
    roots = [root.display_name for root in await call.users.list_users() if root.user_id == call.user_id]
    if name.lower() in {root.lower() for root in roots}:
        raise EntityAlreadyExists(f"User with name {name} already exists: it is the account's own.")


def calling_user(call: Call, account: StoredAccount) -> IamUser | None:
    """The caller; None: the root of the account. Raises ValidationError for a session of a role."""
    who = call.who
    if who is None or who.identity is None or who.identity.root:
        return None
    user = account.user_of(who.identity.id)
    if user is None:
        raise ValidationError("Must specify userName when calling with non-User credentials")
    return user


def named_user(call: Call, account: StoredAccount) -> IamUser | None:
    """The user that a call names; without a name the caller (None: the root). Raises NoSuchEntity, ValidationError."""
    if "UserName" in call.parameters:
        found: IamUser = find(account, USER, call.name(USER))
        return found
    return calling_user(call, account)


async def get_user(call: Call) -> Result:
    user = named_user(call, await call.account())
    if user is not None:
        return {"User": entity_fields(call, USER, user) | ({"Tags": tag_list(user.tags)} if user.tags else {})}
    created = [key.created_ms for key in await call.users.root_keys(call.user_id)]
    root = {"Path": "/", "UserId": account_of(call.user_id), "Arn": root_arn(call.user_id)}
    return {"User": root | {"CreateDate": moment(min(created, default=0))}}


async def list_users(call: Call) -> Result:
    prefix = call.parameters.path_prefix()
    return page(call, "Users", with_prefix((await call.account()).users, prefix), partial(entity_fields, call, USER))


async def update_user(call: Call) -> Result:
    return await rename(call, USER, _refuse_root_name)


async def delete_user(call: Call) -> Result:
    def uses(_account: StoredAccount, user: IamUser) -> Iterable[tuple[bool, str]]:
        keys, groups = (bool(user.keys), "delete access keys"), (bool(user.groups), "remove users from group")
        return keys, *uses_of_policies(user), groups

    return await delete(call, USER, uses)


# --- access keys ------------------------------------------------------------------------------------------------------


def _limit(count: int) -> None:
    if count >= KEYS_PER_USER_MAX:
        raise LimitExceeded(f"Cannot exceed quota for AccessKeysPerUser: {KEYS_PER_USER_MAX}")


async def create_access_key(call: Call) -> Result:
    """The key grants nothing before the account lists it, so it is made first."""
    user = named_user(call, await call.account())
    if user is None:
        own = await call.users.root_keys(call.user_id)
        _limit(len(own))
        name = call.account_name
        access_key, secret = await call.users.add_key(call.user_id, name, "", who=call.who)
    else:
        name, iam_user = user.name, user.id
        _limit(len(user.keys))
        access_key, secret = await call.users.add_key(call.user_id, name, iam_user, who=call.who)

        def edit(account: StoredAccount) -> StoredAccount:
            found = account.user_of(iam_user)
            if found is None:
                raise NoSuchEntity(f"The user with name {name} cannot be found.")
            _limit(len(found.keys))
            key = IamKey(access_key, call.now_ms)
            return having(account, USER, structs.replace(found, keys=(*found.keys, key)), found.name)

        try:
            await call.change(call.arn(USER, user), edit, AccessKeyId=access_key)
        except StoragedError as error:
            if error.status < 500:  # else it may be listed: a key that is not grants nothing
                await call.users.remove_key(call.user_id, access_key, iam_user, who=call.who)
            raise
    found = {"UserName": name, "AccessKeyId": access_key, "Status": "Active", "SecretAccessKey": secret}
    return {"AccessKey": found | {"CreateDate": moment(call.now_ms)}}


async def list_access_keys(call: Call) -> Result:
    user = named_user(call, await call.account())
    keys = list(user.keys) if user is not None else await call.users.root_keys(call.user_id)
    name = user.name if user is not None else call.account_name
    rows = [
        (
            key.access_key,
            {
                "UserName": name,
                "AccessKeyId": key.access_key,
                "Status": "Active" if key.active else "Inactive",
                "CreateDate": moment(key.created_ms),
            },
        )
        for key in keys
    ]
    return page(call, "AccessKeyMetadata", rows)


def _missing_key(access_key: str) -> NoSuchEntity:
    return NoSuchEntity(f"The Access Key with id {access_key} cannot be found.")


async def update_access_key(call: Call) -> Result:
    access_key = call.parameters.name("AccessKeyId", chars_min=3)
    active = call.parameters.choice("Status", ("Active", "Inactive")) == "Active"
    user = named_user(call, await call.account())
    if user is None:
        await call.users.set_key_active(call.user_id, access_key, active, who=call.who)
        return None
    iam_user = user.id

    def edit(account: StoredAccount) -> StoredAccount:
        found = account.user_of(iam_user)
        if found is None or access_key not in {key.access_key for key in found.keys}:
            raise _missing_key(access_key)
        keys = tuple(structs.replace(key, active=active) if key.access_key == access_key else key for key in found.keys)
        return having(account, USER, structs.replace(found, keys=keys), found.name)

    await call.change(call.arn(USER, user), edit)
    return None


async def delete_access_key(call: Call) -> Result:
    """The account forgets the key first: from then on it grants nothing."""
    access_key = call.parameters.name("AccessKeyId", chars_min=3)
    user = named_user(call, await call.account())
    if user is None:
        await call.users.remove_key(call.user_id, access_key, "", who=call.who)
        return None
    iam_user = user.id

    def edit(account: StoredAccount) -> StoredAccount:
        found = account.user_of(iam_user)
        if found is None or access_key not in {key.access_key for key in found.keys}:
            raise _missing_key(access_key)
        keys = tuple(key for key in found.keys if key.access_key != access_key)
        return having(account, USER, structs.replace(found, keys=keys), found.name)

    await call.change(call.arn(USER, user), edit)
    await call.users.remove_key(call.user_id, access_key, iam_user, who=call.who)
    return None


def root_of(who: Principal) -> bool:
    """Whether the sender is the root of its account, with a key or in a session."""
    return who.identity is None or who.identity.root

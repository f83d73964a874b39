"""The table of IAM's actions: the resource that permission is asked for, and the function that performs it.

An action that is not in the table is refused (InvalidAction), and so is one that nothing permits.
https://docs.aws.amazon.com/service-authorization/latest/reference/list_awsidentityandaccessmanagementiam.html
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, Final, NamedTuple
from urllib.parse import unquote

from storaged.clock import Clock
from storaged.errors import InvalidAction
from storaged.objects.accounts import (
    GROUPS_PER_USER_MAX,
    KEYS_PER_USER_MAX,
    VERSIONS_MAX,
    StoredAccount,
    iam_arn,
    root_arn,
)
from storaged.objects.api import Principal, Users
from storaged.s3.ops.iam import groups, policies, roles, tags, users
from storaged.s3.ops.iam.call import (
    GROUP,
    POLICY,
    ROLE,
    USER,
    Call,
    Entries,
    Kind,
    Parameters,
    Result,
    entries_of,
)


class Action(NamedTuple):
    """``resource``: the ARN that permission is asked for. ``run``: performs a call that is permitted."""

    resource: Callable[[Call, StoredAccount], str]
    run: Callable[[Call], Awaitable[Result]]


def _named(kind: Kind) -> Callable[[Call, StoredAccount], str]:
    """The entity that the parameter of this kind names; one that is made has the path that the call gives it."""

    def resource(call: Call, account: StoredAccount) -> str:
        name = call.name(kind)
        found: Any = entries_of(account, kind).get(name.lower())
        if found is not None:
            return call.arn(kind, found)
        return iam_arn(call.user_id, kind.arn, call.parameters.path(), name)

    return resource


def _user_or_caller(call: Call, account: StoredAccount) -> str:
    if "UserName" in call.parameters:
        return _named(USER)(call, account)
    caller = users.calling_user(call, account)
    return root_arn(call.user_id) if caller is None else call.arn(USER, caller)


def _every(kind: Kind) -> Callable[[Call, StoredAccount], str]:
    return lambda call, account: iam_arn(call.user_id, kind.arn, call.parameters.path_prefix(), "*")


def _policy(call: Call, account: StoredAccount) -> str:
    return call.parameters.text("PolicyArn")


def _anything(call: Call, account: StoredAccount) -> str:
    return "*"


async def get_account_summary(call: Call) -> Result:
    account = await call.account()
    found = {
        "Users": len(account.users),
        "UsersQuota": USER.count_max,
        "Groups": len(account.groups),
        "GroupsQuota": GROUP.count_max,
        "Roles": len(account.roles),
        "RolesQuota": ROLE.count_max,
        "Policies": len(account.policies),
        "PoliciesQuota": POLICY.count_max,
        "AccessKeysPerUserQuota": KEYS_PER_USER_MAX,
        "GroupsPerUserQuota": GROUPS_PER_USER_MAX,
        "VersionsPerPolicyQuota": VERSIONS_MAX,
        "UserPolicySizeQuota": USER.inline_max,
        "GroupPolicySizeQuota": GROUP.inline_max,
        "PolicySizeQuota": policies.MANAGED_CHARS_MAX,
        "AccountMFAEnabled": 0,
        "AccountAccessKeysPresent": int(any(key.active for key in await call.users.root_keys(call.user_id))),
    }
    return {"SummaryMap": Entries(found)}


def _of_each(kind: Kind) -> dict[str, Action]:
    """The actions on policies in an entity, and on those that it attaches."""
    word, resource = kind.word, _named(kind)
    functions = {
        f"Put{word}Policy": policies.put_inline,
        f"Get{word}Policy": policies.get_inline,
        f"List{word}Policies": policies.list_inline,
        f"Delete{word}Policy": policies.delete_inline,
        f"Attach{word}Policy": policies.attach,
        f"Detach{word}Policy": policies.detach,
        f"ListAttached{word}Policies": policies.list_attached,
    }
    return {name: Action(resource, partial(function, kind=kind)) for name, function in functions.items()}


def _tags(kind: Kind) -> dict[str, Action]:
    functions = {f"Tag{kind.word}": tags.tag, f"Untag{kind.word}": tags.untag, f"List{kind.word}Tags": tags.list_tags}
    return {name: Action(_named(kind), partial(function, kind=kind)) for name, function in functions.items()}


NOT_THERE: Final = {
    "ListAccountAliases": "AccountAliases",
    "ListInstanceProfiles": "InstanceProfiles",
    "ListInstanceProfilesForRole": "InstanceProfiles",
    "ListMFADevices": "MFADevices",
    "ListOpenIDConnectProviders": "OpenIDConnectProviderList",
    "ListSAMLProviders": "SAMLProviderList",
    "ListServerCertificates": "ServerCertificateMetadataList",
    "ListServiceSpecificCredentials": "ServiceSpecificCredentials",
    "ListSigningCertificates": "Certificates",
    "ListSSHPublicKeys": "SSHPublicKeys",
    "ListVirtualMFADevices": "VirtualMFADevices",
}
"""Lists of what no account can have here: clients read them before they delete a user or a role. Name of the list."""


async def nothing(call: Call, field: str) -> Result:
    return {field: [], "IsTruncated": False}


ACTIONS: Final[dict[str, Action]] = {
    "CreateUser": Action(_named(USER), users.create_user),
    "GetUser": Action(_user_or_caller, users.get_user),
    "ListUsers": Action(_every(USER), users.list_users),
    "UpdateUser": Action(_named(USER), users.update_user),
    "DeleteUser": Action(_named(USER), users.delete_user),
    "CreateAccessKey": Action(_user_or_caller, users.create_access_key),
    "ListAccessKeys": Action(_user_or_caller, users.list_access_keys),
    "UpdateAccessKey": Action(_user_or_caller, users.update_access_key),
    "DeleteAccessKey": Action(_user_or_caller, users.delete_access_key),
    "CreateGroup": Action(_named(GROUP), groups.create_group),
    "GetGroup": Action(_named(GROUP), groups.get_group),
    "ListGroups": Action(_every(GROUP), groups.list_groups),
    "UpdateGroup": Action(_named(GROUP), groups.update_group),
    "DeleteGroup": Action(_named(GROUP), groups.delete_group),
    "AddUserToGroup": Action(_named(GROUP), groups.add_user_to_group),
    "RemoveUserFromGroup": Action(_named(GROUP), groups.remove_user_from_group),
    "ListGroupsForUser": Action(_named(USER), groups.list_groups_for_user),
    "CreateRole": Action(_named(ROLE), roles.create_role),
    "GetRole": Action(_named(ROLE), roles.get_role),
    "ListRoles": Action(_every(ROLE), roles.list_roles),
    "UpdateRole": Action(_named(ROLE), roles.update_role),
    "UpdateAssumeRolePolicy": Action(_named(ROLE), roles.update_assume_role_policy),
    "DeleteRole": Action(_named(ROLE), roles.delete_role),
    "CreatePolicy": Action(_named(POLICY), policies.create_policy),
    "GetPolicy": Action(_policy, policies.get_policy),
    "ListPolicies": Action(_anything, policies.list_policies),
    "DeletePolicy": Action(_policy, policies.delete_policy),
    "CreatePolicyVersion": Action(_policy, policies.create_policy_version),
    "GetPolicyVersion": Action(_policy, policies.get_policy_version),
    "ListPolicyVersions": Action(_policy, policies.list_policy_versions),
    "DeletePolicyVersion": Action(_policy, policies.delete_policy_version),
    "SetDefaultPolicyVersion": Action(_policy, policies.set_default_policy_version),
    "ListEntitiesForPolicy": Action(_policy, policies.list_entities_for_policy),
    "GetAccountSummary": Action(_anything, get_account_summary),
    **{name: Action(_anything, partial(nothing, field=field)) for name, field in NOT_THERE.items()},
    **_tags(USER),
    **_tags(ROLE),
    **_of_each(USER),
    **_of_each(GROUP),
    **_of_each(ROLE),
}


async def perform(call: Call) -> Result:
    """Raises InvalidAction, AccessDenied, and what the action raises."""
    action = ACTIONS.get(call.action)
    if action is None:
        raise InvalidAction(f"Could not find operation {call.action[:100]} for version 2010-05-08.")
    call.permit(f"iam:{call.action}", action.resource(call, await call.account()))
    return await action.run(call)


DOCUMENTS: Final = frozenset({"PolicyDocument", "AssumeRolePolicyDocument", "Document"})


async def perform_for_operator(
    users: Users, clock: Clock, root: Principal, action: str, parameters: dict[str, str]
) -> dict[str, Any]:
    """An action on an account, which the operator may always do. ``root``: the account's own user. Policies in the
    answer are documents. Raises as ``perform``."""

    def permit(action: str, arn: str) -> None:
        """The operator asks nobody."""

    now_ms, found = clock.wall_ms(), Parameters(parameters)
    answer = await perform(Call(action, users, root.user_id, root.display_name, found, now_ms, permit))
    return {name: _plain(name, value) for name, value in (answer or {}).items()}


def _plain(name: str, value: Any) -> Any:
    if name in DOCUMENTS:
        return json.loads(unquote(value))
    if isinstance(value, dict):
        return {key: _plain(key, each) for key, each in value.items()}
    return [_plain("", each) for each in value] if isinstance(value, list) else value

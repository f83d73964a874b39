"""Roles of an account.

https://docs.aws.amazon.com/IAM/latest/APIReference/API_CreateRole.html and the pages of the other actions.
"""

from __future__ import annotations

from functools import partial
from typing import Any
from urllib.parse import quote

from msgspec import structs

from storaged.errors import MalformedPolicyDocument, ValidationError
from storaged.objects.accounts import IamRole, StoredAccount
from storaged.s3.auth.policy import TRUST, check_document, principals_of
from storaged.s3.ops.iam.call import (
    ROLE,
    Call,
    Result,
    added,
    delete,
    entity_fields,
    find,
    having,
    page,
    tag_list,
    uses_of_policies,
    with_prefix,
)
from storaged.s3.ops.iam.principals import unknown_of

TRUST_CHARS_MAX = 2048
DOCUMENT_CHARS_MAX = 131_072
DESCRIPTION_CHARS_MAX = 1000


def role_fields(call: Call, role: IamRole) -> dict[str, Any]:
    return entity_fields(call, ROLE, role) | {"AssumeRolePolicyDocument": quote(role.trust, safe="")}


def _all_fields(call: Call, role: IamRole) -> dict[str, Any]:
    found = role_fields(call, role)
    if role.description:
        found["Description"] = role.description
    found["MaxSessionDuration"] = role.session_s_max
    if role.tags:
        found["Tags"] = tag_list(role.tags)
    return found


async def _trust(call: Call, parameter: str) -> str:
    """Raises LimitExceeded, MalformedPolicyDocument."""
    text = call.parameters.text(parameter, chars_max=DOCUMENT_CHARS_MAX, chars_min=1)
    policy = check_document(text, TRUST, TRUST_CHARS_MAX, "the role's trust policy")
    if unknown := await unknown_of(call.users, principals_of(policy.statements)):
        raise MalformedPolicyDocument(f'Invalid principal in policy: "AWS":"{unknown[0][:200]}"')
    return text


def _settings(call: Call, role: IamRole) -> IamRole:
    parameters = call.parameters
    return structs.replace(
        role,
        description=parameters.text("Description", role.description, chars_max=DESCRIPTION_CHARS_MAX),
        session_s_max=parameters.integer("MaxSessionDuration", role.session_s_max, 3600, 43_200),
    )


async def create_role(call: Call) -> Result:
    if "PermissionsBoundary" in call.parameters:
        raise ValidationError("Permissions boundaries are not supported.")
    name, path, tags = call.name(ROLE), call.parameters.path(), call.parameters.tags()
    trust = await _trust(call, "AssumeRolePolicyDocument")
    role = IamRole(name, call.users.accounts.new_id(ROLE.prefix), path, call.now_ms, trust, tags=tags)
    role = _settings(call, role)

    def edit(account: StoredAccount) -> StoredAccount:
        return added(account, ROLE, role)

    await call.change(call.arn(ROLE, role), edit)
    return {"Role": role_fields(call, role) | ({"Tags": tag_list(tags)} if tags else {})}


async def get_role(call: Call) -> Result:
    return {"Role": _all_fields(call, find(await call.account(), ROLE, call.name(ROLE)))}


async def list_roles(call: Call) -> Result:
    prefix = call.parameters.path_prefix()
    return page(call, "Roles", with_prefix((await call.account()).roles, prefix), partial(role_fields, call))


async def update_role(call: Call) -> Result:
    name = call.name(ROLE)
    role = find(await call.account(), ROLE, name)

    def edit(account: StoredAccount) -> StoredAccount:
        return having(account, ROLE, _settings(call, find(account, ROLE, name)), name)

    await call.change(call.arn(ROLE, role), edit)
    return {}


async def update_assume_role_policy(call: Call) -> Result:
    name = call.name(ROLE)
    role = find(await call.account(), ROLE, name)
    trust = await _trust(call, "PolicyDocument")

    def edit(account: StoredAccount) -> StoredAccount:
        return having(account, ROLE, structs.replace(find(account, ROLE, name), trust=trust), name)

    await call.change(call.arn(ROLE, role), edit)
    return None


async def delete_role(call: Call) -> Result:
    return await delete(call, ROLE, lambda _account, role: uses_of_policies(role))

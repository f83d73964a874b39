"""Policies: those in users, groups and roles, and managed ones, which these attach.

https://docs.aws.amazon.com/IAM/latest/APIReference/API_PutUserPolicy.html, API_AttachUserPolicy.html,
API_CreatePolicy.html, and the pages of the other actions.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any
from urllib.parse import quote

from msgspec import structs

from storaged.errors import DeleteConflict, LimitExceeded, NoSuchEntity, UnmodifiableEntity
from storaged.objects.accounts import ATTACHED_MAX, VERSIONS_MAX, ManagedPolicy, PolicyVersion, StoredAccount
from storaged.objects.identities import managed_text
from storaged.objects.managed_policies import AWS_POLICIES, PREFIX, name_of
from storaged.s3.auth.policy import IDENTITY, check_document
from storaged.s3.ops.iam.call import (
    GROUP,
    POLICY,
    ROLE,
    USER,
    Call,
    Kind,
    Result,
    added,
    entries_of,
    find,
    having,
    lacking,
    moment,
    page,
)

DOCUMENT_CHARS_MAX = 131_072
MANAGED_CHARS_MAX = 6144


def _document(call: Call, chars_max: int, what: str) -> str:
    """Raises LimitExceeded, MalformedPolicyDocument, ValidationError."""
    text = call.parameters.text("PolicyDocument", chars_max=DOCUMENT_CHARS_MAX, chars_min=1)
    check_document(text, IDENTITY, chars_max, what)
    return text


# --- policies in users, groups and roles ------------------------------------------------------------------------------


def _bare_size(texts: Iterable[str]) -> int:
    return sum(len("".join(text.split())) for text in texts)


async def put_inline(call: Call, kind: Kind) -> Result:
    name, policy = call.name(kind), call.parameters.name("PolicyName")
    entity = find(await call.account(), kind, name)
    text = _document(call, kind.inline_max, f"{kind.arn} {name}")

    def edit(account: StoredAccount) -> StoredAccount:
        found = find(account, kind, name)
        inline = found.inline | {policy: text}
        if _bare_size(inline.values()) > kind.inline_max:
            raise LimitExceeded(f"Maximum policy size of {kind.inline_max} bytes exceeded for {kind.arn} {name}")
        return having(account, kind, structs.replace(found, inline=inline), name)

    await call.change(call.arn(kind, entity), edit)
    return None


def _missing_inline(kind: Kind, policy: str) -> NoSuchEntity:
    return NoSuchEntity(f"The {kind.arn} policy with name {policy} cannot be found.")


async def get_inline(call: Call, kind: Kind) -> Result:
    entity = find(await call.account(), kind, call.name(kind))
    policy = call.parameters.name("PolicyName")
    if policy not in entity.inline:
        raise _missing_inline(kind, policy)
    text = quote(entity.inline[policy], safe="")
    return {kind.parameter: entity.name, "PolicyName": policy, "PolicyDocument": text}


async def list_inline(call: Call, kind: Kind) -> Result:
    entity = find(await call.account(), kind, call.name(kind))
    return page(call, "PolicyNames", [(policy, policy) for policy in entity.inline])


async def delete_inline(call: Call, kind: Kind) -> Result:
    name, policy = call.name(kind), call.parameters.name("PolicyName")
    entity = find(await call.account(), kind, name)

    def edit(account: StoredAccount) -> StoredAccount:
        found = find(account, kind, name)
        if policy not in found.inline:
            raise _missing_inline(kind, policy)
        inline = {each: text for each, text in found.inline.items() if each != policy}
        return having(account, kind, structs.replace(found, inline=inline), name)

    await call.change(call.arn(kind, entity), edit)
    return None


# --- attached policies ------------------------------------------------------------------------------------------------


def _arn(call: Call) -> str:
    return call.parameters.text("PolicyArn", chars_max=2048, chars_min=20)


def _missing_policy(arn: str) -> NoSuchEntity:
    return NoSuchEntity(f"Policy {arn} does not exist or is not attachable.")


async def attach(call: Call, kind: Kind) -> Result:
    name, arn = call.name(kind), _arn(call)
    entity = find(await call.account(), kind, name)

    def edit(account: StoredAccount) -> StoredAccount:
        found = find(account, kind, name)
        if managed_text(call.user_id, account, arn) is None:
            raise _missing_policy(arn)
        if arn in found.attached:
            return account
        if len(found.attached) >= ATTACHED_MAX:
            raise LimitExceeded(f"Cannot exceed quota for PoliciesPer{kind.word}: {ATTACHED_MAX}")
        return having(account, kind, structs.replace(found, attached=(*found.attached, arn)), name)

    await call.change(call.arn(kind, entity), edit)
    return None


async def detach(call: Call, kind: Kind) -> Result:
    name, arn = call.name(kind), _arn(call)
    entity = find(await call.account(), kind, name)

    def edit(account: StoredAccount) -> StoredAccount:
        found = find(account, kind, name)
        if arn not in found.attached:
            raise NoSuchEntity(f"Policy {arn} was not found.")
        attached = tuple(each for each in found.attached if each != arn)
        return having(account, kind, structs.replace(found, attached=attached), name)

    await call.change(call.arn(kind, entity), edit)
    return None


async def list_attached(call: Call, kind: Kind) -> Result:
    entity = find(await call.account(), kind, call.name(kind))
    prefix = call.parameters.path_prefix()
    rows = [(name_of(arn), arn) for arn in entity.attached if ("/" + arn.partition("/")[2]).startswith(prefix)]
    return page(call, "AttachedPolicies", [(arn, {"PolicyName": name, "PolicyArn": arn}) for name, arn in rows])


# --- managed policies -------------------------------------------------------------------------------------------------


def _attachments(account: StoredAccount, arn: str) -> list[tuple[Kind, Any]]:
    return [
        (kind, entity)
        for kind in (USER, GROUP, ROLE)
        for entity in entries_of(account, kind).values()
        if arn in entity.attached
    ]


def _attachment_counts(account: StoredAccount) -> Counter[str]:
    """By ARN. One look at all entities: there may be thousands of them, and of policies."""
    return Counter(
        arn for kind in (USER, GROUP, ROLE) for entity in entries_of(account, kind).values() for arn in entity.attached
    )


def _policy_fields(call: Call, counts: Mapping[str, int], policy: ManagedPolicy) -> dict[str, Any]:
    arn = call.arn(POLICY, policy)
    return {
        "PolicyName": policy.name,
        "PolicyId": policy.id,
        "Arn": arn,
        "Path": policy.path,
        "DefaultVersionId": policy.default,
        "AttachmentCount": counts.get(arn, 0),
        "PermissionsBoundaryUsageCount": 0,
        "IsAttachable": True,
        "CreateDate": moment(policy.created_ms),
        "UpdateDate": moment(policy.updated_ms or policy.created_ms),
    }


def _aws_fields(counts: Mapping[str, int], arn: str) -> dict[str, Any]:
    return {
        "PolicyName": name_of(arn),
        "Arn": arn,
        "Path": "/",
        "DefaultVersionId": "v1",
        "AttachmentCount": counts.get(arn, 0),
        "PermissionsBoundaryUsageCount": 0,
        "IsAttachable": True,
    }


def _managed(call: Call, account: StoredAccount, arn: str) -> ManagedPolicy:
    """A policy of the account. Raises NoSuchEntity, UnmodifiableEntity."""
    if arn.startswith(PREFIX):
        raise UnmodifiableEntity(f"Policy {arn} is AWS's.") if arn in AWS_POLICIES else _missing(arn)
    found = account.policies.get(name_of(arn).lower())
    if found is None or call.arn(POLICY, found) != arn:
        raise _missing(arn)
    return found


def _missing(arn: str) -> NoSuchEntity:
    return NoSuchEntity(f"Policy {arn} was not found.")


async def create_policy(call: Call) -> Result:
    name, path = call.name(POLICY), call.parameters.path()
    text = _document(call, MANAGED_CHARS_MAX, f"policy {name}")
    policy = ManagedPolicy(
        name,
        call.users.accounts.new_id(POLICY.prefix),
        path,
        call.now_ms,
        (PolicyVersion("v1", text, call.now_ms),),
        "v1",
        description=call.parameters.text("Description", "", chars_max=1000),
    )

    def edit(account: StoredAccount) -> StoredAccount:
        return added(account, POLICY, policy)

    account = await call.change(call.arn(POLICY, policy), edit)
    return {"Policy": _policy_fields(call, _attachment_counts(account), policy)}


async def get_policy(call: Call) -> Result:
    account, arn = await call.account(), _arn(call)
    if arn in AWS_POLICIES:
        return {"Policy": _aws_fields(_attachment_counts(account), arn)}
    policy = _managed(call, account, arn)
    more = {"Description": policy.description} if policy.description else {}
    return {"Policy": _policy_fields(call, _attachment_counts(account), policy) | more}


async def list_policies(call: Call) -> Result:
    account, prefix = await call.account(), call.parameters.path_prefix()
    scope = call.parameters.choice("Scope", ("All", "AWS", "Local"), "All")
    attached, counts = call.parameters.truth("OnlyAttached"), _attachment_counts(account)
    found: list[tuple[str, str, str | ManagedPolicy]] = []
    if scope != "AWS":
        found += [(call.arn(POLICY, policy), policy.path, policy) for policy in account.policies.values()]
    if scope != "Local":
        found += [(arn, "/", arn) for arn in AWS_POLICIES]
    rows = [
        (f"{name_of(arn).lower()} {arn}", policy)
        for arn, path, policy in found
        if path.startswith(prefix) and (not attached or arn in counts)
    ]

    def shown(policy: str | ManagedPolicy) -> dict[str, Any]:
        if isinstance(policy, str):
            return _aws_fields(counts, policy)
        return _policy_fields(call, counts, policy)

    return page(call, "Policies", rows, shown)


async def delete_policy(call: Call) -> Result:
    arn = _arn(call)
    policy = _managed(call, await call.account(), arn)

    def edit(account: StoredAccount) -> StoredAccount:
        found = _managed(call, account, arn)
        if _attachments(account, arn):
            raise DeleteConflict("Cannot delete a policy attached to entities.")
        if len(found.versions) > 1:
            raise DeleteConflict("This policy has more than one version. Before you delete a policy, you must delete"
                                 " the policy's versions. The default version is deleted with the policy.")  # fmt: skip
        return lacking(account, POLICY, policy.name)

    await call.change(arn, edit)
    return None


def _version_fields(policy: ManagedPolicy, version: PolicyVersion, *, whole: bool) -> dict[str, Any]:
    found: dict[str, Any] = {"Document": quote(version.text, safe="")} if whole else {}
    return found | {
        "VersionId": version.name,
        "IsDefaultVersion": version.name == policy.default,
        "CreateDate": moment(version.created_ms),
    }


async def create_policy_version(call: Call) -> Result:
    arn, as_default = _arn(call), call.parameters.truth("SetAsDefault")
    _managed(call, await call.account(), arn)
    text = _document(call, MANAGED_CHARS_MAX, f"policy {arn}")

    def edit(account: StoredAccount) -> StoredAccount:
        found = _managed(call, account, arn)
        if len(found.versions) >= VERSIONS_MAX:
            raise LimitExceeded("A managed policy can have up to 5 versions. Before you create a new version, you must"
                                " delete an existing version.")  # fmt: skip
        version = PolicyVersion(f"v{found.made + 1}", text, call.now_ms)
        changed = structs.replace(
            found,
            versions=(*found.versions, version),
            default=version.name if as_default else found.default,
            made=found.made + 1,
            updated_ms=call.now_ms,
        )
        return having(account, POLICY, changed, found.name)

    policy = _managed(call, await call.change(arn, edit), arn)
    return {"PolicyVersion": _version_fields(policy, policy.versions[-1], whole=False)}


def _version(policy: ManagedPolicy, name: str) -> PolicyVersion:
    """Raises NoSuchEntity."""
    found = next((version for version in policy.versions if version.name == name), None)
    if found is None:
        raise NoSuchEntity(f"Policy version {name} does not exist.")
    return found


async def get_policy_version(call: Call) -> Result:
    arn, name = _arn(call), call.parameters.text("VersionId")
    if arn in AWS_POLICIES and name == "v1":
        document = quote(AWS_POLICIES[arn], safe="")
        return {"PolicyVersion": {"Document": document, "VersionId": "v1", "IsDefaultVersion": True}}
    policy = _managed(call, await call.account(), arn)
    return {"PolicyVersion": _version_fields(policy, _version(policy, name), whole=True)}


async def list_policy_versions(call: Call) -> Result:
    arn = _arn(call)
    if arn in AWS_POLICIES:
        return page(call, "Versions", [("v1", {"VersionId": "v1", "IsDefaultVersion": True})])
    policy = _managed(call, await call.account(), arn)
    rows = [(each.name.zfill(9), _version_fields(policy, each, whole=False)) for each in policy.versions]
    return page(call, "Versions", rows)


async def delete_policy_version(call: Call) -> Result:
    arn, name = _arn(call), call.parameters.text("VersionId")

    def edit(account: StoredAccount) -> StoredAccount:
        found = _managed(call, account, arn)
        _version(found, name)
        if name == found.default:
            raise DeleteConflict("Cannot delete the default version of a policy.")
        versions = tuple(version for version in found.versions if version.name != name)
        return having(account, POLICY, structs.replace(found, versions=versions), found.name)

    await call.change(arn, edit)
    return None


async def set_default_policy_version(call: Call) -> Result:
    arn, name = _arn(call), call.parameters.text("VersionId")

    def edit(account: StoredAccount) -> StoredAccount:
        found = _managed(call, account, arn)
        _version(found, name)
        return having(account, POLICY, structs.replace(found, default=name, updated_ms=call.now_ms), found.name)

    await call.change(arn, edit)
    return None


async def list_entities_for_policy(call: Call) -> Result:
    """All in one answer: there are at most as many as an account has entities."""
    account, arn = await call.account(), _arn(call)
    if arn not in AWS_POLICIES:
        _managed(call, account, arn)
    found: dict[str, Any] = {"PolicyGroups": [], "PolicyUsers": [], "PolicyRoles": []}
    for kind, entity in _attachments(account, arn):
        found[f"Policy{kind.word}s"].append({kind.parameter: entity.name, f"{kind.word}Id": entity.id})
    return found | {"IsTruncated": False}

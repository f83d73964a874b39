"""Who sends a request, from what an account says: the identity of a user's key, and of a session. Pure."""

from __future__ import annotations

from collections.abc import Iterable

from storaged.objects.accounts import (
    IamGroup,
    IamRole,
    IamUser,
    StoredAccount,
    StoredSession,
    iam_arn,
    root_arn,
    session_arn,
)
from storaged.objects.grant_types import Identity
from storaged.objects.identity import account_of
from storaged.objects.managed_policies import AWS_POLICIES


def managed_text(user_id: str, account: StoredAccount, arn: str) -> str | None:
    """The text in force of a managed policy, of AWS or of the account; None: there is none of this ARN."""
    if arn in AWS_POLICIES:
        return AWS_POLICIES[arn]
    prefix = iam_arn(user_id, "policy", "/", "")
    found = account.policies.get(arn.rpartition("/")[2].lower()) if arn.startswith(prefix) else None
    if found is None or iam_arn(user_id, "policy", found.path, found.name) != arn:
        return None
    return found.text


def _documents(
    user_id: str, account: StoredAccount, entities: Iterable[IamUser | IamGroup | IamRole]
) -> tuple[str, ...]:
    """The texts of all their policies, each once: many groups may attach the same policy."""
    found: dict[str, None] = {}
    for entity in entities:
        found |= dict.fromkeys(entity.inline.values())
        for arn in entity.attached:
            text = managed_text(user_id, account, arn)
            if text is not None:  # a policy is not deleted while it is attached
                found[text] = None
    return tuple(found)


def identity_of_user(user_id: str, account: StoredAccount, user: IamUser) -> Identity:
    documents = _documents(user_id, account, (user, *account.groups_of(user)))
    arn = iam_arn(user_id, "user", user.path, user.name)
    return Identity(user.id, arn, user.name, documents=documents, tags=user.tags)


def identity_of_root(user_id: str) -> Identity:
    """Of a session of the root: it has all rights of the account."""
    return Identity(account_of(user_id), root_arn(user_id), root=True)


def identity_of_role(user_id: str, account: StoredAccount, role: IamRole, session: StoredSession) -> Identity:
    return Identity(
        f"{role.id}:{session.name}",
        session_arn(user_id, role.name, session.name),
        role=iam_arn(user_id, "role", role.path, role.name),
        documents=_documents(user_id, account, (role,)),
        tags=role.tags,
    )

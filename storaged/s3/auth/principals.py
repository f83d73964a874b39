"""The names by which policies know the sender of a request. Pure.

https://docs.aws.amazon.com/IAM/latest/UserGuide/reference_policies_elements_principal.html
"""

from __future__ import annotations

from typing import Final

from storaged.objects.accounts import root_arn
from storaged.objects.api import Principal
from storaged.objects.identity import account_of, arn_of

SIGNED: Final = "signed:"
"""Before an ARN in ``Statement.principals``."""


def account_names(who: Principal) -> frozenset[str]:
    """The account's number and its canonical id."""
    return frozenset((account_of(who.user_id), who.user_id))


def own_names(who: Principal) -> frozenset[str]:
    """The ARNs of the sender itself. A session of a role has two: the session's and the role's. The root of an account
    is also known as a user of its name."""
    identity = who.identity
    if identity is None or identity.root:
        return frozenset((SIGNED + arn_of(who.user_id, who.display_name),))
    return frozenset(SIGNED + arn for arn in (identity.arn, identity.role) if arn)


def principal_arn(who: Principal) -> str:
    """aws:PrincipalArn: of a session of a role it is the role's."""
    identity = who.identity
    if identity is None or identity.root:
        return arn_of(who.user_id, who.display_name)
    return identity.role or identity.arn


def caller_arn(who: Principal) -> str:
    """As GetCallerIdentity names the sender."""
    return root_arn(who.user_id) if who.identity is None else who.identity.arn


def caller_id(who: Principal) -> str:
    """aws:userid, and what GetCallerIdentity returns."""
    return account_of(who.user_id) if who.identity is None else who.identity.id

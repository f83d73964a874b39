"""What the policies of a user, of its groups, of a role, and of a session say. Pure.

A session's policies give nothing: they narrow what the user's or the role's give.
https://docs.aws.amazon.com/IAM/latest/UserGuide/reference_policies_evaluation-logic.html
"""

from __future__ import annotations

from typing import NamedTuple

from storaged.errors import AccessDenied
from storaged.objects.api import Identity, Principal
from storaged.s3.auth.conditions import Facts
from storaged.s3.auth.policy import identity_policy_of


class Voice(NamedTuple):
    """``denied``: a statement denies it, which ends the decision. ``allowed``: the identity's policies allow it.
    ``unbounded``: no session policy keeps it from the session."""

    denied: bool
    allowed: bool
    unbounded: bool

    @property
    def permits(self) -> bool:
        return self.allowed and self.unbounded and not self.denied


def asked(who: Principal, identity: Identity, action: str, resource: str, facts: Facts) -> Voice:
    """Raises what ``facts`` raises."""
    allowed, denied = identity.root, False
    for text in identity.documents:
        verdict = identity_policy_of(text).verdict(who, action, resource, facts)
        denied = denied or verdict is False
        allowed = allowed or verdict is True
    unbounded = not identity.session
    for text in identity.session:
        verdict = identity_policy_of(text).verdict(who, action, resource, facts)
        denied = denied or verdict is False
        unbounded = unbounded or verdict is True
    return Voice(denied, allowed, unbounded)


def require(who: Principal, action: str, resource: str, facts: Facts) -> None:
    """Of what no resource's policy speaks of. The root of the account may. Raises AccessDenied."""
    if who.identity is not None and not asked(who, who.identity, action, resource, facts).permits:
        raise AccessDenied(f"User: {who.identity.arn} is not authorized to perform: {action} on resource: {resource}")

"""Bucket policies: parsed with AWS's checks, and asked for a verdict. Pure.

Only what is understood is accepted: an unknown element, operator or condition key is refused when the policy is put, so
no policy is stored whose condition would never hold, or always.
https://docs.aws.amazon.com/IAM/latest/UserGuide/reference_policies_grammar.html
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Final, NamedTuple

from storaged.errors import MalformedPolicy
from storaged.objects.api import Principal
from storaged.objects.identity import account_of, arn_of
from storaged.s3.auth import conditions
from storaged.s3.auth.conditions import Condition, Facts
from storaged.units import KIB

BYTES_MAX: Final = 20 * KIB
"""https://docs.aws.amazon.com/AmazonS3/latest/userguide/bucket-policies.html"""

VERSIONS: Final = ("2012-10-17", "2008-10-17")
ARN_PREFIX: Final = "arn:aws:s3:::"

_ELEMENTS = frozenset(
    {
        "Sid", "Effect", "Principal", "NotPrincipal", "Action", "NotAction", "Resource", "NotResource", "Condition",
    }
)  # fmt: skip
_IAM_ARN = re.compile(r"arn:aws:(?:iam|sts)::([\w-]*):(root|(?:user|role|assumed-role|federated-user)/[^*?]+)")
"""AWS has no wildcards in a part of a principal: a statement that denies them would deny nobody."""
_ACCOUNT = re.compile(r"\d{12}")
_CANONICAL = re.compile(r"[0-9a-f]{64}")
_ACTION = re.compile(r"s3:[\w*?]+|\*")


class Statement(NamedTuple):
    """``principals``: None for everybody; otherwise texts of ``_principal``. ``resources`` keep their variables."""

    allows: bool
    principals: frozenset[str] | None
    other_principals: bool
    """NotPrincipal: all but ``principals``."""
    actions: tuple[str, ...]
    """In lower case."""
    other_actions: bool
    resources: tuple[str, ...]
    other_resources: bool
    conditions: tuple[Condition, ...]
    variables: bool
    """The policy's version knows ``${aws:username}``."""

    def names(self, who: Principal) -> bool:
        if self.principals is None:
            named = True
        elif not who.access_key:
            named = False
        else:
            account = account_of(who.user_id)
            named = not self.principals.isdisjoint(
                (account, who.user_id, f"signed:{arn_of(who.user_id, who.display_name)}")
            )
        return named != self.other_principals

    def covers(self, action: str, resource: str, facts: Facts) -> bool:
        if any(conditions.like(text, action.lower()) for text in self.actions) == self.other_actions:
            return False
        found = any(conditions.matches_text(text, resource, facts, self.variables) for text in self.resources)
        return found != self.other_resources

    def holds(self, facts: Facts) -> bool:
        return all(condition.holds(facts, self.variables) for condition in self.conditions)


class Policy(NamedTuple):
    statements: tuple[Statement, ...]
    public: bool
    """AWS's meaning of public: what RestrictPublicBuckets and BlockPublicPolicy ask."""

    def verdict(self, who: Principal, action: str, resource: str, facts: Facts) -> bool | None:
        """False: a statement denies it. True: one allows it, and none denies. None: no statement speaks of it. Raises
        what ``facts`` raises.
        """
        allowed: bool | None = None
        for statement in self.statements:
            if (statement.allows and allowed) or not statement.names(who):
                continue
            if statement.covers(action, resource, facts) and statement.holds(facts):
                if not statement.allows:
                    return False
                allowed = True
        return allowed


@lru_cache(maxsize=64)
def policy_of(text: str) -> Policy:
    """A policy that was stored. Raises MalformedPolicy."""
    return parse(text.encode())


def parse(document: bytes, bucket: str = "") -> Policy:
    """``bucket``: the bucket that the resources must be of; empty for any. Raises MalformedPolicy."""
    if len(document) > BYTES_MAX:
        raise MalformedPolicy("Policies must not be larger than 20 KB.")
    try:
        text = document.decode()
        found = json.loads(text, object_pairs_hook=_without_repeats, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        raise MalformedPolicy("Policies must be valid JSON and the first byte must be '{'") from None
    if not isinstance(found, dict) or not _is_text(found):
        raise MalformedPolicy("Policies must be valid JSON and the first byte must be '{'")
    for name in found:
        if name not in ("Version", "Id", "Statement"):
            raise MalformedPolicy(f"Unknown field {name[:100]}")
    version = found.get("Version", VERSIONS[1])
    if version not in VERSIONS:
        raise MalformedPolicy("The policy must contain a valid version string")
    statements = found.get("Statement")
    if isinstance(statements, dict):
        statements = [statements]
    if not isinstance(statements, list) or not statements:
        raise MalformedPolicy("Missing required field Statement")
    parsed = tuple(_statement(each, version == VERSIONS[0], bucket) for each in statements)
    sids = [each["Sid"] for each in statements if each.get("Sid")]
    if len(set(sids)) != len(sids):
        raise MalformedPolicy("Statement IDs (SID) in a single policy must be unique.")
    return Policy(parsed, any(_is_public(each) for each in parsed))


def _is_text(found: Any) -> bool:
    """Whether all of it can be encoded: the escapes of JSON can make halves of surrogate pairs."""
    try:
        json.dumps(found, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name is there twice")
    return found


def _refuse_constant(text: str) -> Any:
    raise ValueError(text)


def _statement(each: Any, variables: bool, bucket: str) -> Statement:
    if not isinstance(each, dict):
        raise MalformedPolicy("Statement is not valid")
    for name in each:
        if name not in _ELEMENTS:
            raise MalformedPolicy(f"Unknown field {name[:100]}")
    if not isinstance(each.get("Sid", ""), str):
        raise MalformedPolicy("Sid is not a string")
    if each.get("Effect") not in ("Allow", "Deny"):
        raise MalformedPolicy("Invalid effect")
    allows = each["Effect"] == "Allow"
    principal, other_principals = _one_of(each, "Principal", "NotPrincipal")
    if other_principals and allows:
        raise MalformedPolicy("Allow with NotPrincipal is not allowed.")
    actions, other_actions = _one_of(each, "Action", "NotAction")
    resources, other_resources = _one_of(each, "Resource", "NotResource")
    names = _texts(actions, "Action")
    for name in names:
        if not _ACTION.fullmatch(name):
            raise MalformedPolicy("Policy has invalid action")
    wanted = _texts(resources, "Resource")
    for text in wanted:
        _check_resource(text, bucket)
    return Statement(
        allows,
        _principals(principal),
        other_principals,
        tuple(name.lower() for name in names),
        other_actions,
        wanted,
        other_resources,
        conditions.parse(each.get("Condition", {})),
        variables,
    )


def _one_of(each: dict[str, Any], name: str, other: str) -> tuple[Any, bool]:
    """The value of the element, and whether it is the negated one."""
    if (name in each) == (other in each):
        what = "can't both be there" if name in each else "Missing required field"
        raise MalformedPolicy(f"{what} {name}" if name not in each else f"{name} and {other} {what}")
    return (each[other], True) if other in each else (each[name], False)


def _texts(value: Any, name: str) -> tuple[str, ...]:
    found = [value] if isinstance(value, str) else value
    if not isinstance(found, list) or not found or not all(isinstance(text, str) and text for text in found):
        raise MalformedPolicy(f"{name} is not valid")
    return tuple(found)


def _check_resource(text: str, bucket: str) -> None:
    """A resource must be able to name the policy's bucket or something in it."""
    if text == "*":
        return
    if not text.startswith(ARN_PREFIX) or len(text) == len(ARN_PREFIX):
        raise MalformedPolicy("Policy has invalid resource")
    name = text[len(ARN_PREFIX) :].partition("/")[0]
    if bucket and "$" not in name and not conditions.like(name, bucket):
        raise MalformedPolicy("Policy has invalid resource")


def _principals(value: Any) -> frozenset[str] | None:
    """None: everybody."""
    if value == "*":
        return None
    if not isinstance(value, dict) or not value:
        raise MalformedPolicy("Invalid policy syntax.")
    found: set[str] = set()
    for kind, texts in value.items():
        if kind not in ("AWS", "CanonicalUser", "Federated", "Service"):
            raise MalformedPolicy("Invalid policy syntax.")
        for text in _texts(texts, "Principal"):
            if kind == "AWS" and text == "*":
                return None
            found.add(_principal(kind, text))
    return frozenset(found)


def _principal(kind: str, text: str) -> str:
    """What ``Statement.names`` looks for: an account, a canonical id, or ``signed:ARN``."""
    if kind == "CanonicalUser":
        if not _CANONICAL.fullmatch(text):
            raise MalformedPolicy("Invalid principal in policy", Detail=f'"CanonicalUser" : "{text[:100]}"')
        return text
    if kind != "AWS":
        return f"{kind}:{text}"
    if _ACCOUNT.fullmatch(text):
        return text
    match = _IAM_ARN.fullmatch(text)
    if match is None:
        raise MalformedPolicy("Invalid principal in policy", Detail=f'"AWS" : "{text[:100]}"')
    return match[1] if match[2] == "root" else f"signed:{text}"


def _is_public(statement: Statement) -> bool:
    """Whether it allows everybody, and no condition narrows that to fixed values.
    https://docs.aws.amazon.com/AmazonS3/latest/userguide/access-control-block-public-access.html
    """
    return (
        statement.allows
        and statement.principals is None
        and not any(condition.narrows for condition in statement.conditions)
    )


def principals_of(statements: Sequence[Statement]) -> set[str]:
    """The accounts, canonical ids and ARNs of users that statements name, as far as they have AWS's form."""
    found: set[str] = set()
    for name in {name for each in statements for name in each.principals or ()}:
        arn = name.removeprefix("signed:")
        match = _IAM_ARN.fullmatch(arn)
        if _ACCOUNT.fullmatch(name) or _CANONICAL.fullmatch(name):
            found.add(name)
        elif match is not None and _ACCOUNT.fullmatch(match[1]):
            found.add(arn)
    return found

"""Policies of buckets, of identities, and of who may assume a role: parsed with AWS's checks, and asked for a verdict.
Pure.

Only what is understood is accepted: an unknown element, operator or condition key is refused when the policy is put, so
no policy is stored whose condition would never hold, or always. Policies of identities speak of all of AWS's services:
what they say of others passes, and matches no request here.
https://docs.aws.amazon.com/IAM/latest/UserGuide/reference_policies_grammar.html
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Final, NamedTuple

from storaged.errors import LimitExceeded, MalformedPolicy, MalformedPolicyDocument
from storaged.objects.api import Principal
from storaged.s3.auth import conditions
from storaged.s3.auth.action_keys import facts_of_action, key_without_action
from storaged.s3.auth.conditions import Condition, Facts
from storaged.s3.auth.principals import account_names, own_names
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
_ANY_ACTION = re.compile(r"[A-Za-z0-9*?-]+:[\w*?-]+|\*")
_TRUST_ACTION = re.compile(r"sts:[\w*?]+|\*")
_SID = re.compile(r"[A-Za-z0-9]*")


class Grammar(NamedTuple):
    """What differs between kinds of policies. ``principals``, ``resources``: a statement must have them, else it must
    not. ``of_bucket``: resources are of S3, and may be of one bucket alone. ``foreign``: condition keys of other
    services pass."""

    action: re.Pattern[str]
    principals: bool
    resources: bool
    of_bucket: bool = False
    foreign: bool = False


BUCKET: Final = Grammar(_ACTION, True, True, of_bucket=True)
IDENTITY: Final = Grammar(_ANY_ACTION, False, True, foreign=True)
TRUST: Final = Grammar(_TRUST_ACTION, True, False, foreign=True)


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
        """Whether it speaks of this sender, or of its account."""
        if self.principals is None:
            named = True
        elif who.service:
            named = f"Service:{who.service}" in self.principals
        elif not who.access_key:
            named = False
        elif self.other_principals and who.identity is not None:
            # as AWS: all names of the sender must be there, for one of them is not exempt without the others
            named = own_names(who) <= self.principals and not self.principals.isdisjoint(account_names(who))
        else:
            named = not self.principals.isdisjoint(account_names(who) | own_names(who))
        return named != self.other_principals

    def covers(self, action: str, resource: str, facts: Facts) -> bool:
        lower = action.lower()
        if any(conditions.like(text, lower) for text in self.actions) == self.other_actions:
            return False
        found = any(conditions.matches_text(text, resource, facts, self.variables) for text in self.resources)
        return found != self.other_resources

    def holds(self, facts: Facts) -> bool:
        return all(condition.holds(facts, self.variables) for condition in self.conditions)

    def applies(self, action: str, resource: str, facts: Facts) -> bool:
        """Whether it speaks of this action on this resource, and its conditions hold. Raises what ``facts`` raises."""
        taken = facts_of_action(action, facts)
        return self.covers(action, resource, taken) and self.holds(taken)


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
            if statement.applies(action, resource, facts):
                if not statement.allows:
                    return False
                allowed = True
        return allowed

    def names_directly(self, names: frozenset[str], action: str, resource: str, facts: Facts) -> bool:
        """Whether a statement allows it to one of ``names`` itself, not only to the account. Raises as ``verdict``."""
        return any(
            statement.allows
            and not statement.other_principals
            and statement.principals is not None
            and not statement.principals.isdisjoint(names)
            and statement.applies(action, resource, facts)
            for statement in self.statements
        )

    def names_everybody(self, action: str, resource: str, facts: Facts) -> bool:
        """Whether a statement allows it to everybody. Raises as ``verdict``."""
        return any(
            statement.allows and statement.principals is None and statement.applies(action, resource, facts)
            for statement in self.statements
        )


@lru_cache(maxsize=64)
def policy_of(text: str) -> Policy:
    """A policy of a bucket that was stored. Raises MalformedPolicy."""
    return parse(text.encode())


@lru_cache(maxsize=1024)
def identity_policy_of(text: str) -> Policy:
    """A policy of an identity that was stored. Raises MalformedPolicy."""
    return _parsed(text.encode(), "", IDENTITY)


@lru_cache(maxsize=256)
def trust_policy_of(text: str) -> Policy:
    """A policy of a role that was stored. Raises MalformedPolicy."""
    return _parsed(text.encode(), "", TRUST)


def check_document(text: str, grammar: Grammar, chars_max: int, what: str) -> Policy:
    """A policy that IAM is given: ``IDENTITY`` or ``TRUST``. White space does not count. ``what``: for the error.
    Raises LimitExceeded, MalformedPolicyDocument.
    https://docs.aws.amazon.com/IAM/latest/UserGuide/reference_iam-quotas.html
    """
    if len(text) - sum(map(text.count, " \t\r\n")) > chars_max:
        raise LimitExceeded(f"Maximum policy size of {chars_max} bytes exceeded for {what}")
    try:
        return _parsed(text.encode(), "", grammar)
    except MalformedPolicy as error:
        detail = error.details.get("Detail", "")
        raise MalformedPolicyDocument(error.message + (f" ({detail})" if detail else "")) from None
    except UnicodeEncodeError:
        raise MalformedPolicyDocument("The policy is not in the valid JSON format.") from None


def parse(document: bytes, bucket: str = "") -> Policy:
    """A policy of a bucket. ``bucket``: that the resources must be of; empty for any. Raises MalformedPolicy."""
    if len(document) > BYTES_MAX:
        raise MalformedPolicy("Policies must not be larger than 20 KB.")
    return _parsed(document, bucket, BUCKET)


def _parsed(document: bytes, bucket: str, grammar: Grammar) -> Policy:
    try:
        text = document.decode()
        found = json.loads(text, object_pairs_hook=_without_repeats, parse_constant=_refuse_constant)
        valid = isinstance(found, dict) and _is_text(found)
    except (ValueError, RecursionError):  # the parser may take one level more than the printer
        valid = False
    if not valid:
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
    parsed = tuple(_statement(each, version == VERSIONS[0], bucket, grammar) for each in statements)
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


def _statement(each: Any, variables: bool, bucket: str, grammar: Grammar) -> Statement:
    if not isinstance(each, dict):
        raise MalformedPolicy("Statement is not valid")
    for name in each:
        if name not in _ELEMENTS:
            raise MalformedPolicy(f"Unknown field {name[:100]}")
    sid = each.get("Sid", "")
    if not isinstance(sid, str):
        raise MalformedPolicy("Sid is not a string")
    if grammar is not BUCKET and not _SID.fullmatch(sid):
        raise MalformedPolicy("Statement IDs (SID) must be alpha-numeric.")
    if each.get("Effect") not in ("Allow", "Deny"):
        raise MalformedPolicy("Invalid effect")
    allows = each["Effect"] == "Allow"
    principals, other_principals = _named_in(each, allows, grammar)
    actions, other_actions = _one_of(each, "Action", "NotAction")
    names = _texts(actions, "Action")
    for name in names:
        if not grammar.action.fullmatch(name):
            raise MalformedPolicy("Policy has invalid action", Detail=name[:100])
    wanted, other_resources = _resources_in(each, bucket, grammar)
    held = conditions.parse(each.get("Condition", {}), foreign=grammar.foreign)
    if bucket and not other_actions:
        _check_conditions(names, held)
    return Statement(
        allows,
        principals,
        other_principals,
        tuple(name.lower() for name in names),
        other_actions,
        wanted,
        other_resources,
        held,
        variables,
    )


def _check_conditions(actions: Sequence[str], held: Sequence[Condition]) -> None:
    """Each action of the statement must have the key of each condition. Stored policies are not checked: a change of
    the table must not leave a bucket without its policy."""
    found = key_without_action([name.lower() for name in actions], [condition.key for condition in held])
    if found is not None:
        text = "Conditions do not apply to combination of actions and resources in statement"
        raise MalformedPolicy(text, Detail=found[:100])


def _named_in(each: dict[str, Any], allows: bool, grammar: Grammar) -> tuple[frozenset[str] | None, bool]:
    """The principals of a statement, and whether they are those that it does not speak of."""
    if not grammar.principals:
        if "Principal" in each or "NotPrincipal" in each:
            raise MalformedPolicy("Policy document should not specify a principal.")
        return None, False
    principal, others = _one_of(each, "Principal", "NotPrincipal")
    if others and allows:
        raise MalformedPolicy("Allow with NotPrincipal is not allowed.")
    return _principals(principal), others


def _resources_in(each: dict[str, Any], bucket: str, grammar: Grammar) -> tuple[tuple[str, ...], bool]:
    """The resources of a statement, and whether they are those that it does not speak of."""
    if not grammar.resources:
        if "Resource" in each or "NotResource" in each:
            raise MalformedPolicy("Has prohibited field Resource")
        return ("*",), False
    resources, others = _one_of(each, "Resource", "NotResource")
    wanted = _texts(resources, "Resource")
    for text in wanted:
        if grammar.of_bucket:
            _check_resource(text, bucket)
        elif text != "*" and (not text.startswith("arn:") or (text.count(":") < 5 and not text.endswith("*"))):
            raise MalformedPolicy(f'Resource {text[:200]} must be in ARN format or "*".')
    return wanted, others


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

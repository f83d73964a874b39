"""Conditions of policies: AWS's operators and the keys that a request has. Pure.

https://docs.aws.amazon.com/IAM/latest/UserGuide/reference_policies_elements_condition_operators.html
https://docs.aws.amazon.com/AmazonS3/latest/userguide/amazon-s3-policy-keys.html
"""

from __future__ import annotations

import base64
import binascii
import ipaddress
import re
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any, Final, NamedTuple

from storaged.errors import MalformedPolicy

Facts = Callable[[str], "Sequence[str] | None"]
"""The values of a condition key (in lower case) for a request; None: the request does not have it. May raise, when the
answer needs more than is known (``authorize.ObjectWanted``)."""

KEYS: Final = frozenset(
    {
        "aws:currenttime", "aws:epochtime", "aws:principalaccount", "aws:principalarn", "aws:principaltype",
        "aws:principalisawsservice", "aws:referer", "aws:resourceaccount", "aws:securetransport", "aws:sourceip",
        "aws:useragent", "aws:userid", "aws:username", "aws:sourceaccount", "aws:sourcearn", "aws:sourcevpc",
        "aws:sourcevpce", "aws:vpcsourceip", "aws:principalorgid", "aws:viaawsservice", "aws:calledvia",
        "aws:multifactorauthpresent", "aws:multifactorauthage", "aws:tokenissuetime", "aws:requestedregion",
        "s3:authtype", "s3:signatureage", "s3:signatureversion", "s3:resourceaccount",
        "s3:x-amz-content-sha256", "s3:prefix", "s3:delimiter", "s3:max-keys", "s3:versionid",
        "s3:locationconstraint", "s3:x-amz-acl", "s3:x-amz-copy-source", "s3:x-amz-metadata-directive",
        "s3:x-amz-grant-full-control", "s3:x-amz-grant-read", "s3:x-amz-grant-read-acp", "s3:x-amz-grant-write",
        "s3:x-amz-grant-write-acp", "s3:x-amz-object-ownership", "s3:x-amz-server-side-encryption",
        "s3:x-amz-server-side-encryption-aws-kms-key-id", "s3:x-amz-server-side-encryption-customer-algorithm",
        "s3:x-amz-storage-class", "s3:x-amz-website-redirect-location", "s3:requestobjecttagkeys", "s3:if-match",
        "s3:if-none-match", "s3:object-lock-mode", "s3:object-lock-retain-until-date", "s3:object-lock-legal-hold",
        "s3:dataaccesspointarn",
        "s3:dataaccesspointaccount", "s3:accesspointnetworkorigin",
    }
)  # fmt: skip
FAMILIES: Final = ("s3:existingobjecttag/", "s3:requestobjecttag/", "aws:principaltag/", "aws:resourcetag/",
                   "aws:requesttag/")  # fmt: skip

NARROWING: Final = frozenset(
    {
        "aws:sourcearn", "aws:sourcevpc", "aws:sourcevpce", "aws:sourceip", "aws:sourceaccount", "aws:userid",
        "aws:principalorgid", "aws:principalarn", "aws:principalaccount", "aws:vpcsourceip", "s3:dataaccesspointarn",
        "s3:dataaccesspointaccount", "s3:x-amz-server-side-encryption-aws-kms-key-id",
    }
)  # fmt: skip
"""Keys with which AWS does not call a statement public, when their values are fixed."""
_NETWORK_BITS_MIN = {4: 8, 6: 32}

_VARIABLE = re.compile(r"\$\{([^{}]*)\}")
_LITERALS = ("*", "?", "$")

STAR: Final = "**"
ANY: Final = "??"
"""Tokens of a pattern; the others are single characters."""


@lru_cache(maxsize=4096)
def _tokens(text: str) -> tuple[str, ...]:
    """A pattern without variables. A run of stars is one."""
    found: list[str] = []
    for letter in text:
        if letter != "*":
            found.append(ANY if letter == "?" else letter)
        elif not found or found[-1] != STAR:
            found.append(STAR)
    return tuple(found)


def like(text: str, value: str) -> bool:
    """Whether ``value`` matches ``text``, in which ``*`` is any text and ``?`` any character."""
    return _matches(_tokens(text), value)


def _matches(tokens: Sequence[str], value: str) -> bool:
    """In time of the product of the lengths: a regular expression would take exponential time for hostile patterns."""
    at = at_value = resume = 0
    star = -1
    while at_value < len(value):
        if at < len(tokens) and tokens[at] == STAR:
            star, resume = at, at_value
            at += 1
        elif at < len(tokens) and tokens[at] in (ANY, value[at_value]):
            at += 1
            at_value += 1
        elif star >= 0:
            resume += 1
            at, at_value = star + 1, resume
        else:
            return False
    return all(token == STAR for token in tokens[at:])


def matches_text(text: str, value: str, facts: Facts, variables: bool) -> bool:
    """As ``like``, with policy variables; what they stand for is literal. False when one of them has no value."""
    if not variables or "${" not in text:
        return like(text, value)
    tokens: list[str] = []
    end = 0
    for found in _VARIABLE.finditer(text):
        stands_for = _value_of(found[1], facts)
        if stands_for is None:
            return False
        tokens += _tokens(text[end : found.start()])
        tokens += stands_for
        end = found.end()
    tokens += _tokens(text[end:])
    return _matches(tokens, value)


def _value_of(variable: str, facts: Facts) -> str | None:
    if variable in _LITERALS:
        return variable
    name, comma, default = variable.partition(",")
    values = facts(name.strip().lower())
    if values is not None and len(values) == 1:
        return values[0]
    return default.strip().strip("'") if comma else None


def _expanded(text: str, facts: Facts, variables: bool) -> str | None:
    """A value that is compared as it is, with its policy variables replaced."""
    if not variables or "${" not in text:
        return text
    values = [_value_of(found[1], facts) for found in _VARIABLE.finditer(text)]
    if None in values:
        return None
    following = iter(values)
    return _VARIABLE.sub(lambda _: next(following) or "", text)


# --- operators --------------------------------------------------------------------------------------------------------


def _number(text: str) -> float:
    if not re.fullmatch(r"[+-]?\d{1,30}(\.\d{1,30})?", text):
        raise ValueError(text)
    return float(text)


def _moment(text: str) -> float:
    if re.fullmatch(r"\d{1,12}", text):
        return float(text)
    moment = datetime.fromisoformat(text.replace("Z", "+00:00"))
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


def _truth(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise ValueError(text)
    return text.lower() == "true"


def _network(text: str) -> ipaddress.IPv4Network | ipaddress.IPv6Network:
    return ipaddress.ip_network(text, strict=False)


def _binary(text: str) -> bytes:
    return base64.b64decode(text, validate=True)


def _within(wanted: str, value: str) -> bool:
    network, address = _network(wanted), ipaddress.ip_address(value)
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        address = address.ipv4_mapped
    return address.version == network.version and address in network


def _arn_like(wanted: str, value: str) -> bool:
    """Each of the six parts matches on its own, so that a star does not cross a colon."""
    parts, values = wanted.split(":", 5), value.split(":", 5)
    return len(parts) == len(values) == 6 and all(map(like, parts, values))


class Operator(NamedTuple):
    """``test(wanted, value)`` may raise ValueError for a ``value`` that is not of its kind: it does not match.
    ``check`` raises ValueError for a policy's value that can't be. ``negated``: it holds when no wanted value matches.
    ``pattern``: variables in the wanted value are literal parts of a pattern.
    """

    test: Callable[[str, str], bool]
    check: Callable[[str], object] = str
    negated: bool = False
    pattern: bool = False


OPERATORS: Final[dict[str, Operator]] = {
    "StringEquals": Operator(lambda wanted, value: wanted == value),
    "StringEqualsIgnoreCase": Operator(lambda wanted, value: wanted.lower() == value.lower()),
    "StringLike": Operator(like, pattern=True),
    "NumericEquals": Operator(lambda wanted, value: _number(value) == _number(wanted), _number),
    "NumericLessThan": Operator(lambda wanted, value: _number(value) < _number(wanted), _number),
    "NumericLessThanEquals": Operator(lambda wanted, value: _number(value) <= _number(wanted), _number),
    "NumericGreaterThan": Operator(lambda wanted, value: _number(value) > _number(wanted), _number),
    "NumericGreaterThanEquals": Operator(lambda wanted, value: _number(value) >= _number(wanted), _number),
    "DateEquals": Operator(lambda wanted, value: _moment(value) == _moment(wanted), _moment),
    "DateLessThan": Operator(lambda wanted, value: _moment(value) < _moment(wanted), _moment),
    "DateLessThanEquals": Operator(lambda wanted, value: _moment(value) <= _moment(wanted), _moment),
    "DateGreaterThan": Operator(lambda wanted, value: _moment(value) > _moment(wanted), _moment),
    "DateGreaterThanEquals": Operator(lambda wanted, value: _moment(value) >= _moment(wanted), _moment),
    "Bool": Operator(lambda wanted, value: _truth(wanted) == _truth(value), _truth),
    "BinaryEquals": Operator(lambda wanted, value: _binary(wanted) == _binary(value), _binary),
    "IpAddress": Operator(_within, _network),
    "ArnEquals": Operator(_arn_like),
    "ArnLike": Operator(_arn_like),
}
OPERATORS.update(
    {
        negation: OPERATORS[name]._replace(negated=True)
        for negation, name in {
            "StringNotEquals": "StringEquals",
            "StringNotEqualsIgnoreCase": "StringEqualsIgnoreCase",
            "StringNotLike": "StringLike",
            "NumericNotEquals": "NumericEquals",
            "DateNotEquals": "DateEquals",
            "NotIpAddress": "IpAddress",
            "ArnNotEquals": "ArnEquals",
            "ArnNotLike": "ArnLike",
        }.items()
    }
)
_NULL = Operator(lambda wanted, value: False, _truth)
_SETS = ("ForAllValues:", "ForAnyValue:")


class Condition(NamedTuple):
    """One operator and one key. ``quantifier``: ForAllValues:, ForAnyValue:, or empty."""

    operator: Operator
    key: str
    wanted: tuple[str, ...]
    quantifier: str
    if_exists: bool
    narrows: bool
    """With it a statement for everybody is not public."""

    def holds(self, facts: Facts, variables: bool) -> bool:
        values = facts(self.key)
        if self.operator is _NULL:
            return any(_truth(wanted) == (values is None) for wanted in self.wanted)
        if values is None:
            # a negated operator holds for a key that is not there, and so does ForAllValues
            return self.if_exists or self.quantifier == _SETS[0] or (self.operator.negated and not self.quantifier)
        wanted = self.wanted
        if variables and not self.operator.pattern:
            wanted = tuple(text for each in wanted if (text := _expanded(each, facts, True)) is not None)
        if self.quantifier == _SETS[1]:
            return any(self._holds_for(wanted, value, facts, variables) for value in values)
        return all(self._holds_for(wanted, value, facts, variables) for value in values)

    def _holds_for(self, wanted: Sequence[str], value: str, facts: Facts, variables: bool) -> bool:
        return any(self._matches(each, value, facts, variables) for each in wanted) != self.operator.negated

    def _matches(self, wanted: str, value: str, facts: Facts, variables: bool) -> bool:
        if self.operator.pattern and variables:
            return matches_text(wanted, value, facts, True)
        try:
            return self.operator.test(wanted, value)
        except (ValueError, OverflowError):
            return False


def parse(block: Any) -> tuple[Condition, ...]:
    """The Condition element of a statement. Raises MalformedPolicy."""
    if not isinstance(block, dict):
        raise MalformedPolicy("Conditions must be a map of operators")
    found = []
    for name, keys in block.items():
        quantifier = next((each for each in _SETS if name.startswith(each)), "")
        bare = name[len(quantifier) :]
        if_exists = bare.endswith("IfExists")
        bare = bare.removesuffix("IfExists")
        operator = _NULL if bare == "Null" and not if_exists else OPERATORS.get(bare)
        if operator is None:
            raise MalformedPolicy(f"Invalid Condition type : {name[:100]}")
        if not isinstance(keys, dict) or not keys:
            raise MalformedPolicy("Conditions must be a map of operators")
        for key, values in keys.items():
            found.append(_condition(operator, bare, key, values, quantifier, if_exists))
    return tuple(found)


def _condition(operator: Operator, bare: str, key: str, values: Any, quantifier: str, if_exists: bool) -> Condition:
    lower = key.lower()
    if lower not in KEYS and not any(lower.startswith(family) and len(lower) > len(family) for family in FAMILIES):
        raise MalformedPolicy("Policy has an invalid condition key", Detail=key[:100])
    family = next((family for family in FAMILIES if lower.startswith(family)), "")
    wanted = tuple(_text(value) for value in (values if isinstance(values, list) else [values]))
    if not wanted:
        raise MalformedPolicy("Policy has an invalid condition value")
    for text in wanted:
        if "${" not in text:
            try:
                operator.check(text)
            except (ValueError, OverflowError, binascii.Error):
                raise MalformedPolicy(f"Invalid value for a condition of type {bare}", Detail=text[:100]) from None
    name = family + key[len(family) :] if family else lower  # the names of tags keep their case
    return Condition(operator, name, wanted, quantifier, if_exists, _narrows(bare, if_exists, lower, wanted))


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return str(value)
    if not isinstance(value, str):
        raise MalformedPolicy("Policy has an invalid condition value")
    return value


def _narrows(bare: str, if_exists: bool, key: str, wanted: Sequence[str]) -> bool:
    if key not in NARROWING or if_exists or any(mark in text for text in wanted for mark in ("*", "?", "${")):
        return False
    if bare == "IpAddress":
        return all(_network(text).prefixlen >= _NETWORK_BITS_MIN[_network(text).version] for text in wanted)
    return bare in ("StringEquals", "StringEqualsIgnoreCase", "StringLike", "ArnEquals", "ArnLike")

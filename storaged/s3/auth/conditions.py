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
from storaged.units import KIB

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
        "s3:dataaccesspointarn", "s3:inventoryaccessibleoptionalfields",
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
_EXPANDED_CHARS_MAX = 64 * KIB
"""No value of a request is as long: nothing is equal to what is longer."""

_STAR = "\ud801"
_ANY = "\ud800"
"""``*`` and ``?`` of a pattern whose variables were replaced. No value has these halves of surrogate pairs."""


def _pattern(text: str) -> str:
    return text.replace("*", _STAR).replace("?", _ANY)


def like(text: str, value: str) -> bool:
    """Whether ``value`` matches ``text``, in which ``*`` is any text and ``?`` any character."""
    if "?" not in text:  # nearly all patterns end in their only star: a fifth of the time
        head, star, tail = text.partition("*")
        if not tail:
            return value.startswith(head) if star else value == head
    return _matches(_pattern(text), value)


def _matches(pattern: str, value: str) -> bool:
    """Looks for each piece between two stars once, from left to right: the first place is as good as any other.

    The loops over characters are C code. One of Python takes seconds for hostile patterns, in which all other requests
    wait; a regular expression with stars takes exponential time. All patterns of a policy of 20 KB together take up to
    0.5 ns for each of their characters and each character of a value: so values are short (``facts.CHARS_MAX``).
    """
    first, *middle = pattern.split(_STAR)
    if not middle:
        return len(first) == len(value) and _is_at(first, value, 0)
    last = middle.pop()
    at, end = len(first), len(value) - len(last)
    if at > end or not _is_at(first, value, 0) or not _is_at(last, value, end):
        return False
    for piece in middle:
        if piece:
            at = _find(piece, value, at, end)
            if at < 0:
                return False
            at += len(piece)
    return True


def _is_at(piece: str, value: str, at: int) -> bool:
    if _ANY not in piece:
        return value.startswith(piece, at)
    return _compiled(piece).match(value, at) is not None


def _find(piece: str, value: str, at: int, end: int) -> int:
    """Where ``piece`` begins in ``value[at:end]``; -1: nowhere."""
    if _ANY not in piece or len(piece) > end - at:
        return value.find(piece, at, end)
    found = _compiled(piece).search(value, at, end)
    return found.start() if found is not None else -1


@lru_cache(maxsize=4096)
def _compiled(piece: str) -> re.Pattern[str]:
    """It has no repetitions: a match at one place takes the time of its length."""
    return re.compile(".".join(map(re.escape, piece.split(_ANY))), re.DOTALL)


def matches_text(text: str, value: str, facts: Facts, variables: bool) -> bool:
    """As ``like``, with policy variables; what they stand for is literal. False when one of them has no value."""
    if not variables or "${" not in text:
        return like(text, value)
    found = ""
    end = 0
    for variable in _VARIABLE.finditer(text):
        stands_for = _value_of(variable[1], facts)
        if stands_for is None or len(found) > len(value) + len(text):
            return False  # a pattern is at most as long as what it matches, but for its stars
        found += _pattern(text[end : variable.start()]) + stands_for
        end = variable.end()
    return _matches(found + _pattern(text[end:]), value)


def key_named(text: str) -> str:
    """A condition key in the form in which facts are asked for: lower case, but for the name of a tag."""
    lower = text.lower()
    family = next((family for family in FAMILIES if lower.startswith(family)), "")
    return family + text[len(family) :] if family else lower


def _value_of(variable: str, facts: Facts) -> str | None:
    if variable in _LITERALS:
        return variable
    name, comma, default = variable.partition(",")
    values = facts(key_named(name.strip()))
    if values is not None and len(values) == 1:
        return values[0]
    return default.strip().strip("'") if comma else None


def _expanded(text: str, facts: Facts, variables: bool) -> str | None:
    """A value that is compared as it is, with its policy variables replaced."""
    if not variables or "${" not in text:
        return text
    values: list[str] = []
    size = len(text)
    for found in _VARIABLE.finditer(text):
        value = _value_of(found[1], facts)
        if value is None or size > _EXPANDED_CHARS_MAX:
            return None
        values.append(value)
        size += len(value)
    following = iter(values)
    return _VARIABLE.sub(lambda _: next(following), text)


# --- operators --------------------------------------------------------------------------------------------------------


_PARSED_MAX = 8192
"""A policy of 20 KB has at most so many values. They are parsed once, not for each request: 2,000 networks take 20 ms,
in which all other requests wait."""


@lru_cache(maxsize=_PARSED_MAX)
def _number(text: str) -> float:
    if not re.fullmatch(r"[+-]?\d{1,30}(\.\d{1,30})?", text):
        raise ValueError(text)
    return float(text)


@lru_cache(maxsize=_PARSED_MAX)
def _moment(text: str) -> float:
    if re.fullmatch(r"\d{1,12}", text):
        return float(text)
    moment = datetime.fromisoformat(text.replace("Z", "+00:00"))
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


def _truth(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise ValueError(text)
    return text.lower() == "true"


@lru_cache(maxsize=_PARSED_MAX)
def _network(text: str) -> ipaddress.IPv4Network | ipaddress.IPv6Network:
    return ipaddress.ip_network(text, strict=False)


def _binary(text: str) -> bytes:
    return base64.b64decode(text, validate=True)


@lru_cache(maxsize=256)
def _address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    """An IPv4 address that is mapped to IPv6 is itself."""
    address = ipaddress.ip_address(text)
    return (address.ipv4_mapped or address) if isinstance(address, ipaddress.IPv6Address) else address


def _within(wanted: str, value: str) -> bool:
    network, address = _network(wanted), _address(value)
    return address.version == network.version and address in network


class _Networks:
    """The networks of a condition, by their sizes. An address is looked up once for each size."""

    def __init__(self, texts: Sequence[str]) -> None:
        self._by_size: dict[tuple[int, int], set[int]] = {}
        for network in map(_network, texts):
            host_bits = network.max_prefixlen - network.prefixlen
            of_size = self._by_size.setdefault((network.version, host_bits), set())
            of_size.add(int(network.network_address) >> host_bits)

    def have(self, value: str) -> bool:
        """As ``_within`` any of them. Raises ValueError."""
        address = _address(value)
        number, ours = int(address), address.version
        return any(
            ours == version and number >> host_bits in of_size
            for (version, host_bits), of_size in self._by_size.items()
        )


def _arn_like(wanted: str, value: str) -> bool:
    """Each of the six parts matches on its own, so that a star does not cross a colon."""
    parts, values = wanted.split(":", 5), value.split(":", 5)
    return len(parts) == len(values) == 6 and all(map(like, parts, values))


class Operator(NamedTuple):
    """``test(wanted, value)`` may raise ValueError for a ``value`` that is not of its kind: it does not match.
    ``check`` raises ValueError for a policy's value that can't be. ``negated``: it holds when no wanted value matches.
    ``pattern``: variables in the wanted value are literal parts of a pattern. ``gather(wanted values)``: a test of all
    of them at once, for values without variables.
    """

    test: Callable[[str, str], bool]
    check: Callable[[str], object] = str
    negated: bool = False
    pattern: bool = False
    gather: Callable[[Sequence[str]], Callable[[str], bool]] | None = None


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
    "IpAddress": Operator(_within, _network, gather=lambda wanted: _Networks(wanted).have),
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
    matches_any: Callable[[str], bool] | None = None
    """Whether a value matches one of ``wanted``, where that can be said at once. Raises ValueError."""

    def holds(self, facts: Facts, variables: bool) -> bool:
        values = facts(self.key)
        if self.operator is _NULL:
            return any(_truth(wanted) == (values is None) for wanted in self.wanted)
        if values is None:
            # a negated operator holds for a key that is not there, and so does ForAllValues
            return self.if_exists or self.quantifier == _SETS[0] or (self.operator.negated and not self.quantifier)
        wanted = self.wanted
        if variables and not self.operator.pattern and self.matches_any is None:
            wanted = tuple(text for each in wanted if (text := _expanded(each, facts, True)) is not None)
        if self.quantifier == _SETS[1]:
            return any(self._holds_for(wanted, value, facts, variables) for value in values)
        return all(self._holds_for(wanted, value, facts, variables) for value in values)

    def _holds_for(self, wanted: Sequence[str], value: str, facts: Facts, variables: bool) -> bool:
        if self.matches_any is not None:
            return self._matches_any(value) != self.operator.negated
        return any(self._matches(each, value, facts, variables) for each in wanted) != self.operator.negated

    def _matches_any(self, value: str) -> bool:
        assert self.matches_any is not None
        try:
            return self.matches_any(value)
        except ValueError:
            return False

    def _matches(self, wanted: str, value: str, facts: Facts, variables: bool) -> bool:
        if self.operator.pattern and variables:
            return matches_text(wanted, value, facts, True)
        try:
            return self.operator.test(wanted, value)
        except (ValueError, OverflowError):
            return False


def parse(block: Any, *, foreign: bool = False) -> tuple[Condition, ...]:
    """The Condition element of a statement. ``foreign``: keys of services that are not here may be there; no request
    has them. Raises MalformedPolicy."""
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
            if not (_is_known(key.lower()) or (foreign and _is_foreign(key.lower()))):
                raise MalformedPolicy("Policy has an invalid condition key", Detail=key[:100])
            found.append(_condition(operator, bare, key, values, quantifier, if_exists))
    return tuple(found)


def _is_known(key: str) -> bool:
    return key in KEYS or any(key.startswith(family) and len(key) > len(family) for family in FAMILIES)


def _is_foreign(key: str) -> bool:
    """A key of another service, or of IAM or STS, whose requests have a few of them."""
    service, colon, name = key.partition(":")
    return bool(colon and name) and service not in ("aws", "s3")


def _condition(operator: Operator, bare: str, key: str, values: Any, quantifier: str, if_exists: bool) -> Condition:
    lower = key.lower()
    wanted = tuple(_text(value) for value in (values if isinstance(values, list) else [values]))
    if not wanted:
        raise MalformedPolicy("Policy has an invalid condition value")
    for text in wanted:
        if "${" not in text:
            try:
                operator.check(text)
            except (ValueError, OverflowError, binascii.Error):
                raise MalformedPolicy(f"Invalid value for a condition of type {bare}", Detail=text[:100]) from None
    narrows = _narrows(bare, if_exists, lower, wanted)
    gather = None if any("${" in text for text in wanted) else operator.gather
    matches_any = gather(wanted) if gather is not None else None
    return Condition(operator, key_named(key), wanted, quantifier, if_exists, narrows, matches_any)


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

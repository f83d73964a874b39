"""The policy document of a browser form: what the form may contain. Pure.

Source: https://docs.aws.amazon.com/AmazonS3/latest/API/sigv4-HTTPPOSTConstructPolicy.html
"""

from __future__ import annotations

import base64
import binascii
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from storaged.errors import AccessDenied, InvalidPolicyDocument

_EXPIRATION = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}(?:\.[0-9]{1,6})?Z")
_NUMBER = re.compile(r"[0-9]{1,18}")
_FREE_FIELDS = frozenset({"awsaccesskeyid", "signature", "policy", "file", "x-amz-signature", "bucket"})
"""Fields that need no condition."""
_FREE_PREFIXES = ("x-ignore-", "x-amz-checksum-")
"""Prefixes of more such fields: a checksum only narrows what is accepted."""


@dataclass(frozen=True, slots=True)
class Condition:
    """``field``: in lower case. ``prefix``: the field must start with ``value``, else be equal."""

    field: str
    value: str
    prefix: bool

    def __str__(self) -> str:
        return json.dumps(["starts-with" if self.prefix else "eq", f"${self.field}", self.value])


@dataclass(frozen=True, slots=True)
class Policy:
    expires_ms: int
    conditions: tuple[Condition, ...]
    size_min: int = 0
    size_max: int | None = None


def parse_policy(encoded: str) -> Policy:
    """Raises InvalidPolicyDocument that says where the document is wrong."""
    try:
        document = json.loads(base64.b64decode(encoded, validate=True).decode(), object_pairs_hook=_object)
    except (binascii.Error, ValueError, RecursionError):
        raise InvalidPolicyDocument("Invalid Policy: Invalid JSON.") from None
    if not isinstance(document, dict) or not isinstance(document.get("expiration"), str):
        raise InvalidPolicyDocument("Invalid Policy: Policy missing expiration.")
    if not _EXPIRATION.fullmatch(document["expiration"]):
        raise InvalidPolicyDocument(f"Invalid Policy: Invalid 'expiration' value: '{document['expiration']}'")
    if not isinstance(document.get("conditions"), list):
        raise InvalidPolicyDocument("Invalid Policy: Policy missing conditions.")
    try:
        expires = datetime.fromisoformat(document["expiration"]).replace(tzinfo=UTC)
    except ValueError:
        raise InvalidPolicyDocument(f"Invalid Policy: Invalid 'expiration' value: '{document['expiration']}'") from None
    conditions: list[Condition] = []
    size_min, size_max = 0, None
    for entry in document["conditions"]:
        if isinstance(entry, list) and entry and str(entry[0]).lower() == "content-length-range":
            low, high = _size_range(entry)
            size_min, size_max = max(size_min, low), high if size_max is None else min(size_max, high)
            if size_min > size_max:
                raise InvalidPolicyDocument("Invalid Policy: No size is in every content-length-range.")
        else:
            conditions.extend(_conditions(entry))
    # each once: a long Content-Type, split for each of hundreds of conditions, would keep other requests waiting
    return Policy(int(expires.timestamp() * 1000), tuple(dict.fromkeys(conditions)), size_min, size_max)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object. Raises ValueError for a name that comes twice: two parsers may disagree on which one counts."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError
    return found


def _size_range(entry: list[Any]) -> tuple[int, int]:
    """The bounds of a content-length-range: numbers, or strings of digits; AWS's examples have both."""
    bounds = [str(item) for item in entry[1:] if isinstance(item, str) or type(item) is int]
    if (
        len(entry) != 3
        or len(bounds) != 2
        or not all(map(_NUMBER.fullmatch, bounds))
        or int(bounds[0]) > int(bounds[1])
    ):
        raise InvalidPolicyDocument("Invalid Policy: Invalid content-length-range.")
    return int(bounds[0]), int(bounds[1])


def _name(text: str) -> str:
    """A field's name in lower case. Only ASCII letters are changed: letters of other scripts have lower cases that are
    ASCII."""
    return text.lower() if text.isascii() else text


def _conditions(entry: Any) -> list[Condition]:
    if isinstance(entry, dict) and entry and all(isinstance(value, str) for value in entry.values()):
        return [Condition(_name(name), value, prefix=False) for name, value in entry.items()]
    if isinstance(entry, list) and len(entry) == 3 and all(isinstance(item, str) for item in entry):
        operator, name, value = entry
        if operator.lower() in ("eq", "starts-with") and name.startswith("$"):
            return [Condition(_name(name[1:]), value, prefix=operator.lower() == "starts-with")]
    raise InvalidPolicyDocument(f"Invalid Policy: Invalid condition: {json.dumps(entry)[:200]}")


def check_policy(policy: Policy, fields: Mapping[str, str], bucket: str, now_ms: int) -> None:
    """Every condition must hold, and every field must have one. Raises AccessDenied that names the first that fails."""
    if now_ms >= policy.expires_ms:
        raise AccessDenied("Invalid according to Policy: Policy expired.")
    values = {**fields, "bucket": bucket}
    named = {condition.field for condition in policy.conditions}
    if "bucket" not in named:
        raise AccessDenied("Invalid according to Policy: Policy Condition failed: bucket is not named")
    for condition in policy.conditions:
        value = values.get(condition.field, "")
        if not (_starts(condition, value) if condition.prefix else value == condition.value):
            raise AccessDenied(f"Invalid according to Policy: Policy Condition failed: {condition}")
    extra = [
        name
        for name in fields
        if name not in named and name not in _FREE_FIELDS and not name.startswith(_FREE_PREFIXES)
    ]
    if extra:
        raise AccessDenied(f"Invalid according to Policy: Extra input fields: {extra[0]}")


def _starts(condition: Condition, value: str) -> bool:
    """A Content-Type may be a list: each item must have the prefix."""
    if condition.field == "content-type":
        return all(item.strip().startswith(condition.value) for item in value.split(","))
    return value.startswith(condition.value)

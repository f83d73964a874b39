"""Policies: of buckets, of identities, of roles, and of forms; their conditions and patterns."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from typing import Any

from storaged.errors import MalformedPolicyDocument, S3Error
from storaged.objects.api import Principal
from storaged.s3.auth import conditions, form_policy, policy
from tests.fuzz.reader import Choices
from tests.fuzz.target import Plant, Target, refused

OTHER = Principal("b" * 64, "ben", "AKB")
ANONYMOUS = Principal("", "anonymous")
ASKED = (
    (OTHER, "s3:GetObject", "arn:aws:s3:::bucket/k"),
    (ANONYMOUS, "s3:PutObject", "arn:aws:s3:::bucket/a*?${x}"),
    (OTHER, "s3:ListBucket", "arn:aws:s3:::bucket"),
)
_HARSH = (
    "",
    "true",
    "9" * 400,
    "1e999",
    "::ffff:10.0.0.1",
    "fe80::1%x",
    "\u0663",
    "a\ud800",
    "*",
    "${aws:username}",
    "9999-12-31T23:59:59-23:59",
)


def bucket_policy(data: bytes) -> None:
    """Each document gives a policy of one of the three grammars, or the error of AWS. A policy answers every question.
    Parsed again from its own printed form it is the same. With a statement that denies everything to everybody it
    allows nothing; without statements that allow it allows nothing."""
    choices = Choices(data)
    kind, value, text = choices.number(3), choices.pick(_HARSH), choices.rest()

    def facts(name: str) -> Sequence[str] | None:
        return None if name == "aws:referer" else (value, "x") if name == "s3:requestobjecttagkeys" else (value,)

    found = _parsed(text, kind)
    if isinstance(found, S3Error):
        return
    verdicts = [found.verdict(*asked, facts) for asked in ASKED]
    for asked in ASKED:
        found.names_everybody(*asked[1:], facts)
        found.names_directly(frozenset({"b" * 64}), *asked[1:], facts)
    policy.principals_of(found.statements)
    document = json.loads(text)
    again = _parsed(json.dumps(document).encode(), kind)
    assert again == found, "printed again it is another policy"
    statements = document["Statement"] if isinstance(document["Statement"], list) else [document["Statement"]]
    if not any(each["Effect"] == "Allow" for each in statements):
        assert True not in verdicts, "something is allowed that no statement allows"
    everything: dict[str, Any] = {"Effect": "Deny", "Action": "*"}
    everything |= {"Principal": "*"} if kind != 1 else {}
    everything |= {"Resource": "*"} if kind != 2 else {}
    denied = _parsed(json.dumps({**document, "Statement": [*statements, everything]}).encode(), kind)
    if not isinstance(denied, S3Error):
        assert not any(denied.verdict(*asked, facts) for asked in ASKED), "what is denied is allowed"


def _parsed(text: bytes, kind: int) -> policy.Policy | S3Error:
    if kind == 0:
        return refused(lambda: policy.parse(text, "bucket"))
    try:
        shown = text.decode()
    except UnicodeDecodeError:
        return MalformedPolicyDocument()
    return refused(lambda: policy.check_document(shown, (policy.IDENTITY, policy.TRUST)[kind - 1], 6144, "x"))


_OPERATORS = sorted(conditions.OPERATORS)
_NEGATED = {
    "StringNotEquals": "StringEquals",
    "StringNotEqualsIgnoreCase": "StringEqualsIgnoreCase",
    "StringNotLike": "StringLike",
    "NumericNotEquals": "NumericEquals",
    "DateNotEquals": "DateEquals",
    "NotIpAddress": "IpAddress",
    "ArnNotEquals": "ArnEquals",
    "ArnNotLike": "ArnLike",
}


def condition(data: bytes) -> None:
    """A condition is refused when it is put, or it holds or does not hold, for any value of a request: it never fails.
    A negated operator holds exactly when its operator does not. With IfExists it holds where there is no value. An
    operator for any of several values holds when it holds for one of them alone; for all, when for each."""
    choices = Choices(data)
    name, variables = choices.pick(_OPERATORS), choices.flag()
    wanted = choices.line().decode("utf-8", "surrogateescape")
    values = choices.rest().decode("utf-8", "surrogateescape").split("\n")[:4]
    held = _held(name, wanted, values[:1], variables)
    if held is None:
        return
    if name in _NEGATED:
        assert held != _held(_NEGATED[name], wanted, values[:1], variables), "it holds, and its contrary does"
    assert _held(f"{name}IfExists", wanted, None, variables) is True
    each = [_held(name, wanted, [value], variables) for value in values]
    assert _held(f"ForAnyValue:{name}", wanted, values, variables) == any(each)
    assert _held(f"ForAllValues:{name}", wanted, values, variables) == all(each)


def _held(name: str, wanted: str, values: list[str] | None, variables: bool) -> bool | None:
    """None: it is refused."""
    found = refused(lambda: conditions.parse({name: {"aws:UserAgent": wanted}}))
    if isinstance(found, S3Error):
        return None
    return found[0].holds(lambda key: values if key == "aws:useragent" else ("a*b",), variables)


def pattern(data: bytes) -> None:
    """A pattern matches as the simplest definition says: a star is any text, a question mark any character. The value
    of a variable is never a pattern."""
    choices = Choices(data)
    text, value = choices.line().decode("latin-1")[:60], choices.rest().decode("latin-1")[:60]
    assert conditions.like(text, value) == _simple(text, value)
    stands_for = value.replace("\n", "")
    literal = f"{text.replace('*', '').replace('?', '').replace('$', '')}/"
    assert conditions.matches_text(literal + "${aws:username}", literal + stands_for, lambda key: (stands_for,), True)
    if stands_for:
        other = literal + stands_for[:-1] + chr(ord(stands_for[-1]) ^ 1)
        assert not conditions.matches_text(literal + "${aws:username}", other, lambda key: (stands_for,), True)


def _simple(text: str, value: str) -> bool:
    """By a table: row by row of the pattern, the prefixes of the value that it matches."""
    reach = [True, *[False] * len(value)]
    for letter in text:
        if letter == "*":
            for at in range(len(value)):
                reach[at + 1] = reach[at + 1] or reach[at]
        else:
            reach = [False, *(reach[at] and letter in ("?", value[at]) for at in range(len(value)))]
    return reach[-1]


def posted_policy(data: bytes) -> None:
    """The policy of a form is parsed, or gives the error of AWS. Printed, it is the same. Fields that it does not name
    are refused, and so are all fields once it has expired."""
    found = refused(lambda: form_policy.parse_policy(base64.b64encode(data).decode()))
    refused(lambda: form_policy.parse_policy(data.decode("utf-8", "surrogateescape")))
    if isinstance(found, S3Error):
        return
    assert found.size_min >= 0
    assert found.size_max is None or found.size_min <= found.size_max
    fields = {each.field: each.value for each in found.conditions if each.field != "bucket"}
    bucket = next((each.value for each in found.conditions if each.field == "bucket"), "b")
    taken = refused(lambda: form_policy.check_policy(found, fields, bucket, found.expires_ms - 1))
    late = refused(lambda: form_policy.check_policy(found, fields, bucket, found.expires_ms))
    assert isinstance(late, S3Error), "it has expired"
    if taken is None:
        more = refused(lambda: form_policy.check_policy(found, fields | {"x-amz-nowhere": ""}, bucket, 0))
        assert isinstance(more, S3Error), "a field that the policy does not name is taken"
        for name, value in fields.items():
            if any(each.field == name and not each.prefix for each in found.conditions):
                other_fields = fields | {name: value + "x"}
                changed = refused(lambda: form_policy.check_policy(found, other_fields, bucket, 0))  # noqa: B023
                assert isinstance(changed, S3Error), "a field with another value than the policy's is taken"
        for each in found.conditions:
            if each.prefix and each.value and each.field in fields and each.field != "content-type":
                other = chr(ord(each.value[0]) ^ 1) + fields[each.field][1:]
                other_fields = fields | {each.field: other}
                changed = refused(lambda: form_policy.check_policy(found, other_fields, bucket, 0))  # noqa: B023
                assert isinstance(changed, S3Error), "a field that begins otherwise than the policy says is taken"
    shown = [json.loads(str(each)) for each in found.conditions]
    text = json.dumps({"expiration": json.loads(data)["expiration"], "conditions": shown})
    again = refused(lambda: form_policy.parse_policy(base64.b64encode(text.encode()).decode()))
    assert not isinstance(again, S3Error)
    assert (again.expires_ms, again.conditions) == (found.expires_ms, found.conditions)


_POLICY = {
    "Version": "2012-10-17",
    "Statement": [
        {
            "Sid": "a",
            "Effect": "Allow",
            "Principal": {"AWS": "*"},
            "Action": ["s3:GetObject", "s3:Put*"],
            "Resource": ["arn:aws:s3:::bucket/*", "arn:aws:s3:::bucket"],
            "Condition": {
                "StringLike": {"aws:Referer": ["x*", "${aws:username}"]},
                "IpAddress": {"aws:SourceIp": "10.0.0.0/8"},
                "NumericLessThanIfExists": {"s3:max-keys": "5"},
                "DateLessThan": {"aws:CurrentTime": "2030-01-01T00:00:00Z"},
                "Null": {"aws:TokenIssueTime": "true"},
                "ForAnyValue:StringEquals": {"s3:RequestObjectTagKeys": ["a"]},
            },
        },
        {"Effect": "Deny", "Principal": "*", "NotAction": "s3:*", "NotResource": "arn:aws:s3:::bucket/a"},
    ],
}
_IDENTITY = {"Version": "2012-10-17", "Statement": {"Effect": "Allow", "Action": "s3:*", "Resource": "*"}}
_TRUST = {
    "Version": "2012-10-17",
    "Statement": [
        {"Effect": "Allow", "Action": "sts:AssumeRole", "Principal": {"AWS": "arn:aws:iam::123456789012:root"}}
    ],
}
_FORM = {
    "expiration": "2030-01-01T00:00:00.000Z",
    "conditions": [
        {"bucket": "b"},
        ["starts-with", "$key", "user/"],
        ["eq", "$acl", "private"],
        ["content-length-range", 1, "10"],
    ],
}
_JSON = (
    b"{",
    b"}",
    b"[",
    b"]",
    b'":',
    b",",
    b'"\\ud800"',
    b"null",
    b"true",
    b"1e400",
    b"NaN",
    b'{"Version":' + b"[" * 990 + b"]" * 990 + b"}",
    b'"Effect":"Deny"',
    b'"NotPrincipal":"*"',
    b'"Action":"*"',
    b'"Resource":"*"',
    b'"Condition":{}',
    b'"Id":"x"',
)

TARGETS = (
    Target(
        "policy",
        bucket_policy,
        (
            b"\x00\x00" + json.dumps(_POLICY).encode(),
            b"\x01\x01" + json.dumps(_IDENTITY).encode(),
            b"\x02\x02" + json.dumps(_TRUST).encode(),
        ),
        Plant(policy, "_without_repeats", lambda _: lambda pairs: 1 / (len(dict(pairs)) == len(pairs)) and dict(pairs)),
        (*_JSON, *(b'"%b":{"aws:Referer":"x"}' % name.encode() for name in _OPERATORS)),
        steps_a_byte=80,
    ),
    Target(
        "condition",
        condition,
        (
            b"\x00\x00x\nx",
            b"\x0b\x01${aws:username}\na*b\nc",
            b"\x10\x0010.0.0.0/8\n10.1.2.3\n::1",
            b"\x05\x012030-01-01T00:00:00Z\n1",
        ),
        Plant(
            conditions.Condition,
            "_matches",
            lambda _: lambda self, wanted, value, facts, variables: self.operator.test(wanted, value),
        ),
        (
            b"10.0.0.0/8",
            b"::/0",
            b"::ffff:1.2.3.4",
            b"true",
            b"arn:aws:s3:::b",
            b"${aws:username}",
            b"${*}",
            b"${a, 'b'}",
            b"\xd9\xa3",
            b"2030-01-01",
        ),
        size_max=1024,
    ),
    Target(
        "pattern",
        pattern,
        (b"a*b?c\naxxbyc", b"*\n", b"*b?c*d\naxxbycd", b"a*a*a*b\n" + b"a" * 30),
        Plant(
            conditions,
            "_find",
            lambda _: lambda piece, value, at, end: value.find(piece.replace(conditions._ANY, "?"), at, end),
        ),
        (b"*", b"?", b"a", b"b", b"**", b"*?"),
        size_max=128,
        steps=4000,
        steps_a_byte=200,
    ),
    Target(
        "form_policy",
        posted_policy,
        (json.dumps(_FORM).encode(),),
        Plant(form_policy, "_starts", lambda _: lambda condition, value: True),
        (
            *_JSON,
            b'["starts-with","$content-type","a"]',
            b'["content-length-range",0,5]',
            b'{"x":"y"}',
            b'"expiration":"2030-01-01T00:00:00Z"',
        ),
    ),
)

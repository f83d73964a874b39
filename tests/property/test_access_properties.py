"""What holds for every decision about access, whatever the policy: nothing is allowed by accident, and no policy takes
longer than its length allows.
"""

from __future__ import annotations

import json
import time
from itertools import product
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from storaged.errors import AccessDenied, MalformedPolicy, MethodNotAllowed
from storaged.objects.api import Grant, ObjectAccess, Principal
from storaged.objects.configuration import kinds
from storaged.objects.configuration.access import (
    ACL,
    ENFORCED,
    EVERYBODY,
    OWNERSHIP,
    POLICY,
    PREFERRED,
    PUBLIC_ACCESS_BLOCK,
    SIGNED,
    WRITER,
    Acl,
    AclEntry,
    Ownership,
    PolicyText,
    PublicAccessBlock,
)
from storaged.objects.configuration.document import NOTHING, Configuration
from storaged.objects.identity import account_of
from storaged.objects.records import BucketRecord
from storaged.s3.auth.actions import ACTIONS, POLICY_ACTIONS, action_of
from storaged.s3.auth.authorize import Context, ObjectWanted, Resource, authorize
from storaged.s3.auth.conditions import like, matches_text
from storaged.s3.auth.policy import parse, policy_of
from storaged.s3.request import ANONYMOUS
from tests.examples import examples

OWNER, OTHER = Principal("a" * 64, "anne", "AKA"), Principal("b" * 64, "ben", "AKB")
WHO = st.sampled_from((OWNER, OTHER, ANONYMOUS))
OPERATIONS = st.sampled_from(
    (*sorted(ACTIONS), "GetBucketPolicy", "PutBucketPolicy", "DeleteBucket", "GetBucketLogging")
)


def one_to_two(*values: str) -> list[list[str]]:
    return [list(some) for count in (1, 2) for some in product(values, repeat=count)]


STATEMENTS = st.sampled_from(
    [
        {"Effect": effect, "Principal": principal, "Action": action, "Resource": resource, **condition}
        for effect, principal, action, resource, condition in product(
            ("Allow", "Deny"),
            ("*", {"AWS": account_of(OTHER.user_id)}, {"CanonicalUser": OTHER.user_id}),
            one_to_two("s3:*", "s3:GetObject", "s3:Put*", "s3:List*", "s3:DeleteObject"),
            one_to_two("arn:aws:s3:::bucket", "arn:aws:s3:::bucket/*", "arn:aws:s3:::bucket/a*"),
            (
                {},
                {"Condition": {"Bool": {"aws:SecureTransport": "true"}}},
                {"Condition": {"StringEquals": {"s3:ExistingObjectTag/a": "b"}}},
                {"Condition": {"StringNotLike": {"aws:Referer": "x*"}}},
            ),
        )
    ]
)
"""All there are. To draw each part of a statement for itself takes longer than the decision that is tested."""

POLICIES = st.one_of(*(st.tuples(*[STATEMENTS] * count) for count in range(4)))
BLOCKS = st.sampled_from([PublicAccessBlock(*some) for some in product((False, True), repeat=4)])
ENTRIES = [
    AclEntry(*some)
    for some in product(
        (EVERYBODY, SIGNED, OWNER.user_id, OTHER.user_id), ("READ", "WRITE", "READ_ACP", "WRITE_ACP", "FULL_CONTROL")
    )
]
LISTS = st.one_of(
    st.none(), *(st.sampled_from([Acl(some) for some in product(ENTRIES, repeat=count)]) for count in range(4))
)
OBJECTS = st.none() | st.builds(
    ObjectAccess, st.sampled_from((OWNER.user_id, OTHER.user_id)), LISTS, st.sampled_from(({}, {"a": "b"}))
)


@st.composite
def configurations(draw: Any) -> Configuration:
    found = NOTHING
    statements = draw(POLICIES)
    if statements:
        found = found.having(POLICY, PolicyText(json.dumps({"Version": "2012-10-17", "Statement": statements})))
    rule = draw(st.sampled_from((None, ENFORCED, PREFERRED, WRITER)))
    found = found.having(OWNERSHIP, Ownership(rule) if rule else None)
    found = found.having(ACL, draw(LISTS))
    return found.having(PUBLIC_ACCESS_BLOCK, draw(st.none() | BLOCKS))


def decided(
    who: Principal,
    operation: str,
    configuration: Configuration,
    found: ObjectAccess | None,
    key: bytes | None = b"abc",
) -> Grant | None:
    record = BucketRecord("bucket", b"B" * 16, OWNER.user_id, 1, "active", 16, "eu")
    record = msgspec.structs.replace(record, plain=configuration.is_plain(kinds.KINDS))

    def facts(name: str) -> tuple[str, ...] | None:
        if name == "s3:existingobjecttag/a":
            return (found.tags["a"],) if found is not None and "a" in found.tags else None
        return ("true",) if name == "aws:securetransport" else None

    try:
        return authorize(who, action_of(operation), Resource(record, configuration, key), Context(facts, found))
    except (AccessDenied, MethodNotAllowed):
        return None


@given(WHO, OPERATIONS, configurations(), OBJECTS)
@settings(max_examples=examples(600), deadline=None)
def test_without_what_allows_nobody_but_the_owner_gets_in(
    who: Principal, operation: str, configuration: Configuration, found: ObjectAccess | None
) -> None:
    """Neither a policy nor a list: then no block, no ownership rule and no object gives anything, but its own list."""
    bare = configuration.having(POLICY, None).having(ACL, None)
    if found is not None:
        found = found._replace(acl=None, owner=OWNER.user_id)
    grant = decided(who, operation, bare, found)
    assert (grant is not None) == (who == OWNER or not action_of(operation).names)


@given(WHO, OPERATIONS, configurations(), OBJECTS, st.sampled_from((None, b"abc")))
@settings(max_examples=examples(600), deadline=None)
def test_a_deny_of_everything_ends_all_but_the_owner_s_hold_on_the_policy(
    who: Principal, operation: str, configuration: Configuration, found: ObjectAccess | None, key: bytes | None
) -> None:
    deny = {
        "Effect": "Deny",
        "Principal": "*",
        "Action": "s3:*",
        "Resource": ["arn:aws:s3:::bucket", "arn:aws:s3:::bucket/*"],
    }
    old = configuration.get(POLICY)
    statements = json.loads(old.text)["Statement"] if old is not None else []
    denied = configuration.having(
        POLICY, PolicyText(json.dumps({"Version": "2012-10-17", "Statement": [*statements, deny]}))
    )
    grant = decided(who, operation, denied, found, key)
    names = action_of(operation).names
    assert grant is None or not names or (who == OWNER and set(names) <= POLICY_ACTIONS)


@given(OPERATIONS, configurations(), OBJECTS)
@settings(max_examples=examples(600), deadline=None)
def test_a_client_without_a_key_gets_no_more_than_any_user_does(
    operation: str, configuration: Configuration, found: ObjectAccess | None
) -> None:
    stranger = Principal("c" * 64, "carl", "AKC")
    policy = configuration.get(POLICY)
    if policy is not None and '"Deny"' in policy.text:
        return  # a deny can name users alone
    if decided(ANONYMOUS, operation, configuration, found) is not None:
        assert decided(stranger, operation, configuration, found) is not None


@given(WHO, OPERATIONS, configurations(), OBJECTS)
@settings(max_examples=examples(600), deadline=None)
def test_blocking_and_enforcing_only_take_away(
    who: Principal, operation: str, configuration: Configuration, found: ObjectAccess | None
) -> None:
    blocked = configuration.having(PUBLIC_ACCESS_BLOCK, PublicAccessBlock(True, True, True, True))
    if decided(who, operation, blocked, found) is not None:
        assert decided(who, operation, configuration.having(PUBLIC_ACCESS_BLOCK, None), found) is not None
    if who != OWNER:
        enforced = configuration.having(OWNERSHIP, Ownership(ENFORCED))
        if decided(who, operation, enforced, found) is not None:
            assert decided(who, operation, configuration.having(OWNERSHIP, Ownership(WRITER)), found) is not None


@given(OPERATIONS, configurations(), OBJECTS)
@settings(max_examples=examples(600), deadline=None)
def test_the_plain_bit_says_what_the_whole_decision_says(
    operation: str, configuration: Configuration, found: ObjectAccess | None
) -> None:
    if configuration.is_plain(kinds.KINDS):
        record = BucketRecord("bucket", b"B" * 16, OWNER.user_id, 1, "active", 16, "eu", plain=False)
        resource, context = Resource(record, configuration, b"k"), Context(lambda name: None, found)
        assert authorize(OWNER, action_of(operation), resource, context).access == action_of(operation).access


@given(st.text("ab*?", max_size=12), st.text("ab", max_size=12))
@settings(deadline=None)
def test_patterns_match_as_the_simplest_definition_says(text: str, value: str) -> None:
    def simple(text: str, value: str) -> bool:
        if not text:
            return not value
        if text[0] == "*":
            return simple(text[1:], value) or (bool(value) and simple(text, value[1:]))
        return bool(value) and text[0] in ("?", value[0]) and simple(text[1:], value[1:])

    assert like(text, value) == simple(text, value)


def test_the_networks_of_a_policy_are_parsed_once() -> None:
    """As many as a policy can have: for each request of a stranger they would take 16 ms."""
    networks = [f"{number // 250 + 1}.{number % 250}.1.0" for number in range(1700)]
    denied = {"Effect": "Deny", "Principal": "*", "Action": "s3:*", "Resource": "*"}
    denied["Condition"] = {"IpAddress": {"aws:SourceIp": networks}}  # type: ignore[assignment]
    found = parse(json.dumps({"Statement": [denied]}, separators=(",", ":")).encode())
    began_s = time.thread_time()
    for address, verdict in (("10.0.0.1", None), ("::ffff:1.1.1.0", False), ("3.3.1.0", False)) * 10:
        assert found.verdict(ANONYMOUS, "s3:GetObject", "arn:aws:s3:::b/k", lambda _: (address,)) is verdict  # noqa: B023
    assert time.thread_time() - began_s < 0.15


@given(st.text("ab*?${}", max_size=12))
@settings(deadline=None)
def test_what_a_variable_stands_for_is_never_a_pattern(name: str) -> None:
    assert matches_text("home/${aws:username}/x", f"home/{name}/x", lambda key: (name,), True)
    other = name.replace("*", "c").replace("?", "c")
    if other != name:
        assert not matches_text("home/${aws:username}/x", f"home/{other}/x", lambda key: (name,), True)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
ELEMENTS = ("Effect", "Principal", "NotPrincipal", "Action", "NotAction", "Resource", "NotResource", "Condition", "Sid")


@given(
    st.binary(max_size=64)
    | JSON.map(lambda value: json.dumps(value).encode())
    | st.dictionaries(st.sampled_from(ELEMENTS), JSON, max_size=5).map(
        lambda value: json.dumps({"Version": "2012-10-17", "Statement": [value]}).encode()
    )
)
@settings(max_examples=examples(800), deadline=None)
def test_no_document_gets_another_error_than_malformed_policy(document: bytes) -> None:
    try:
        found = parse(document, "bucket")
    except MalformedPolicy:
        return
    assert found.statements
    assert all(each.actions and each.resources for each in found.statements)
    assert found.verdict(OTHER, "s3:GetObject", "arn:aws:s3:::bucket/k", lambda name: None) in (True, False, None)


def test_a_hostile_pattern_takes_no_exponential_time() -> None:
    text = json.dumps(
        {
            "Statement": [
                {
                    "Effect": "Allow",
                    "Principal": "*",
                    "Action": "s3:GetObject",
                    "Resource": "arn:aws:s3:::bucket/" + "a*" * 4000 + "b",
                }
            ]
        }
    )
    began = time.monotonic()
    policy = policy_of(text)
    assert policy.verdict(OTHER, "s3:GetObject", "arn:aws:s3:::bucket/" + "a" * 1024, lambda name: None) is None
    assert time.monotonic() - began < 60, "a regular expression would not end"


def test_a_condition_on_the_object_is_asked_for_when_it_matters() -> None:
    record = BucketRecord("bucket", b"B" * 16, OWNER.user_id, 1, "active", 16, "eu", plain=False)
    statement = {
        "Effect": "Allow",
        "Principal": "*",
        "Action": "s3:GetObject",
        "Resource": "arn:aws:s3:::bucket/*",
        "Condition": {"StringEquals": {"s3:ExistingObjectTag/a": "b"}},
    }
    configuration = NOTHING.having(POLICY, PolicyText(json.dumps({"Statement": statement})))

    def wanted(name: str) -> None:
        raise ObjectWanted

    with pytest.raises(ObjectWanted):
        authorize(OTHER, action_of("GetObject"), Resource(record, configuration, b"k"), Context(wanted))

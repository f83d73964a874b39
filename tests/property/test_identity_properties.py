"""What holds for every decision about a user of an account or a session, whatever the policies are: it never has more
than its account, a deny ends it, and what narrows a session only takes away.
"""

from __future__ import annotations

import json
from typing import Any

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st

from storaged.objects.api import Identity, ObjectAccess, Principal
from storaged.objects.configuration.document import Configuration
from storaged.s3.auth.actions import POLICY_ACTIONS, action_of
from tests.examples import examples
from tests.property.test_access_properties import OBJECTS, OPERATIONS, OTHER, OWNER, configurations, decided

ACCOUNTS = st.sampled_from((OWNER, OTHER))
KEYS = st.sampled_from((None, b"abc"))
OWN = st.fixed_dictionaries(
    {
        "Effect": st.sampled_from(("Allow", "Allow", "Deny")),
        "Action": st.sampled_from(("*", "s3:*", "s3:Get*", ["s3:PutObject", "s3:ListBucket"], "iam:*")),
        "Resource": st.sampled_from(("*", "arn:aws:s3:::bucket", "arn:aws:s3:::bucket/*", "arn:aws:s3:::*/x")),
    },
    optional={"Condition": st.sampled_from(({"StringEquals": {"s3:ExistingObjectTag/a": "b"}},))},
)
POLICIES = st.lists(OWN, max_size=3)
EVERYTHING = {"Effect": "Allow", "Action": "*", "Resource": "*"}
NOTHING_AT_ALL = {"Effect": "Deny", "Action": "*", "Resource": "*"}


def text(statements: list[dict[str, Any]]) -> tuple[str, ...]:
    return (json.dumps({"Version": "2012-10-17", "Statement": statements}),) if statements else ()


def user(account: Principal, statements: list[dict[str, Any]]) -> Principal:
    identity = Identity("AIDA1", f"arn:aws:iam::1:user/{account.display_name}", "u", documents=text(statements))
    return msgspec.structs.replace(account, identity=identity)


def narrowed(who: Principal, statements: list[dict[str, Any]]) -> Principal:
    assert who.identity is not None
    identity = msgspec.structs.replace(who.identity, session=text(statements), issuer="AK")
    return msgspec.structs.replace(who, identity=identity)


@given(ACCOUNTS, POLICIES, OPERATIONS, configurations(), OBJECTS, KEYS)
@settings(max_examples=examples(150))
def test_a_user_never_has_more_than_its_account(
    account: Principal,
    own: list[dict[str, Any]],
    operation: str,
    configuration: Configuration,
    found: ObjectAccess | None,
    key: bytes | None,
) -> None:
    if decided(user(account, own), operation, configuration, found, key) is not None:
        assert decided(account, operation, configuration, found, key) is not None


@given(ACCOUNTS, OPERATIONS, configurations(), OBJECTS, KEYS)
@settings(max_examples=examples(150))
def test_a_user_who_may_everything_has_what_its_account_has_but_for_a_policy_that_locks_it_out(
    account: Principal, operation: str, configuration: Configuration, found: ObjectAccess | None, key: bytes | None
) -> None:
    given_to_user = decided(user(account, [EVERYTHING]), operation, configuration, found, key)
    given_to_root = decided(account, operation, configuration, found, key)
    same = (given_to_user is None) == (given_to_root is None)
    assert same or set(action_of(operation).names) <= POLICY_ACTIONS


@given(ACCOUNTS, POLICIES, OPERATIONS, configurations(), OBJECTS, KEYS)
@settings(max_examples=examples(150))
def test_a_deny_of_its_own_ends_every_decision(
    account: Principal,
    own: list[dict[str, Any]],
    operation: str,
    configuration: Configuration,
    found: ObjectAccess | None,
    key: bytes | None,
) -> None:
    denied = decided(user(account, [*own, NOTHING_AT_ALL]), operation, configuration, found, key)
    assert denied is None or not action_of(operation).names
    session = narrowed(user(account, [EVERYTHING]), [*own, NOTHING_AT_ALL])
    denied = decided(session, operation, configuration, found, key)
    assert denied is None or not action_of(operation).names


@given(ACCOUNTS, POLICIES, POLICIES, OPERATIONS, configurations(), OBJECTS, KEYS)
@settings(max_examples=examples(150))
def test_a_session_s_policies_only_take_away_and_an_allow_only_adds(
    account: Principal,
    own: list[dict[str, Any]],
    more: list[dict[str, Any]],
    operation: str,
    configuration: Configuration,
    found: ObjectAccess | None,
    key: bytes | None,
) -> None:
    who = user(account, own)
    if decided(narrowed(who, more), operation, configuration, found, key) is not None:
        assert decided(who, operation, configuration, found, key) is not None
    allows = [each for each in more if each["Effect"] == "Allow"]
    if decided(who, operation, configuration, found, key) is not None:
        assert decided(user(account, [*own, *allows]), operation, configuration, found, key) is not None

"""Calls of IAM with whatever parameters: each ends with an answer or with an error of AWS's, never with another one,
and what is refused changes nothing.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from storaged.errors import AccessDenied, MalformedPolicyDocument, S3Error, ValidationError
from storaged.objects.accounts import NO_ACCOUNT, IamKey, StoredAccount, packed_account, unpacked_account
from storaged.objects.api import Principal
from storaged.s3.auth.policy import IDENTITY, TRUST, check_document
from storaged.s3.ops.iam.actions import ACTIONS, perform
from storaged.s3.ops.iam.call import Call, Parameters, Result
from storaged.s3.ops.iam.query import _fields, _parameters
from storaged.s3.request import Request
from tests.examples import examples

ROOT = Principal("a" * 64, "anne", "AKA")


class Users:
    """As much of ``api.Users`` and ``api.Accounts`` as IAM uses."""

    def __init__(self) -> None:
        self.accounts = self
        self.held = NO_ACCOUNT
        self.keys = [IamKey("AKA", 1)]
        self.made = 0

    async def get(self, user_id: str) -> StoredAccount:
        return self.held

    async def change(self, user_id: str, edit: Callable[[StoredAccount], StoredAccount], **named: Any) -> StoredAccount:
        after = edit(self.held)
        self.held = unpacked_account(packed_account(after))
        assert self.held == after
        return after

    def new_id(self, prefix: str) -> str:
        self.made += 1
        return f"{prefix}{self.made}"

    async def list_users(self) -> list[Principal]:
        return [ROOT]

    async def directory(self) -> Mapping[str, Principal]:
        return {ROOT.user_id: ROOT}

    async def root_keys(self, user_id: str) -> list[IamKey]:
        return self.keys

    async def add_key(self, user_id: str, name: str, iam_user: str, **named: Any) -> tuple[str, str]:
        return self.new_id("AKIA"), "secret"

    async def set_key_active(self, *what: Any, **named: Any) -> None:
        pass

    async def remove_key(self, *what: Any, **named: Any) -> None:
        pass


TEXTS = st.text(max_size=20)
POLICY = json.dumps({"Version": "2012-10-17", "Statement": {"Effect": "Allow", "Action": "s3:*", "Resource": "*"}})
TRUSTS = json.dumps(
    {"Version": "2012-10-17", "Statement": {"Effect": "Allow", "Action": "sts:AssumeRole", "Principal": {"AWS": "*"}}}
)
NAMES = st.sampled_from(("u", "U", "v", "g", "r", "p"))
VALUES: dict[str, st.SearchStrategy[str]] = {
    "UserName": NAMES,
    "GroupName": NAMES,
    "RoleName": NAMES,
    "PolicyName": NAMES,
    "NewUserName": NAMES,
    "NewGroupName": NAMES,
    "Path": st.sampled_from(("/", "/a/", "a")),
    "NewPath": st.sampled_from(("/", "/a/", "//")),
    "PathPrefix": st.sampled_from(("/", "/a", "")),
    "PolicyDocument": st.sampled_from((POLICY, TRUSTS, "{}", "")),
    "AssumeRolePolicyDocument": st.sampled_from((TRUSTS, POLICY)),
    "PolicyArn": st.sampled_from(
        ("arn:aws:iam::aws:policy/IAMFullAccess", "arn:aws:iam::aws:policy/None", "arn:aws:iam::1:policy/p")
    ),
    "AccessKeyId": st.sampled_from(("AKIA1", "AKIA2", "AKIA3")),
    "Status": st.sampled_from(("Active", "Inactive", "x")),
    "VersionId": st.sampled_from(("v1", "v2", "")),
    "SetAsDefault": st.sampled_from(("true", "false", "1")),
    "Marker": st.sampled_from(("", "dQ==", "dQ", "\u00e9")),
    "MaxItems": st.sampled_from(("1", "0", "1001", "\u0663", "99999999999")),
    "MaxSessionDuration": st.sampled_from(("3600", "1")),
    "Description": TEXTS,
    "Tags.member.1.Key": TEXTS,
    "Tags.member.1.Value": TEXTS,
    "TagKeys.member.1": TEXTS,
    "Scope": st.sampled_from(("All", "AWS", "x")),
    "OnlyAttached": st.sampled_from(("true", "x")),
}
CALLS = st.lists(
    st.tuples(
        st.sampled_from(sorted(ACTIONS)),
        st.fixed_dictionaries({}, optional={name: values | TEXTS for name, values in VALUES.items()})
        | st.fixed_dictionaries(
            {name: VALUES[name] for name in ("UserName", "GroupName", "RoleName", "PolicyName", "PolicyDocument")},
            optional={
                name: VALUES[name] for name in ("PolicyArn", "AssumeRolePolicyDocument", "AccessKeyId", "Status")
            },
        ),
    ),
    min_size=1,
    max_size=6,
)


def call_of(users: Users, action: str, parameters: dict[str, str], permit: Callable[[str, str], None]) -> Call:
    return Call(action, users, ROOT.user_id, ROOT.display_name, Parameters(parameters), 1, permit, ROOT)  # type: ignore[arg-type]


async def tried(call: Call) -> tuple[Result, int]:
    """The answer, or the status of the error."""
    try:
        return await perform(call), 0
    except S3Error as error:
        return None, error.status


@given(CALLS)
@settings(max_examples=examples(60))
def test_every_call_ends_with_an_answer_or_an_error_of_aws(calls: list[tuple[str, dict[str, str]]]) -> None:
    async def run() -> None:
        users = Users()
        for action, parameters in calls:
            before = users.held
            asked: list[str] = []

            def permit(name: str, arn: str, asked: list[str] = asked) -> None:
                asked.append(name)

            answer, status = await tried(call_of(users, action, parameters, permit))
            if status:
                assert 400 <= status < 500, (action, parameters)
                assert users.held == before
                continue
            assert f"iam:{action}" in asked, "nothing is done without permission"
            _fields(answer or {}).encode()
            if action.startswith(("Get", "List")):
                assert users.held == before

    asyncio.run(run())


@given(CALLS)
@settings(max_examples=examples(40))
def test_what_is_not_permitted_changes_nothing_and_tells_nothing(calls: list[tuple[str, dict[str, str]]]) -> None:
    async def run() -> None:
        users = Users()

        def permit(name: str, arn: str) -> None:
            raise AccessDenied

        for action, parameters in calls:
            with pytest.raises((AccessDenied, ValidationError)):
                await perform(call_of(users, action, parameters, permit))
            assert users.held == NO_ACCOUNT

    asyncio.run(run())


@given(st.binary(max_size=300) | st.text(alphabet="Action=&%+.1\u00e9", max_size=60).map(str.encode))
@settings(max_examples=examples(150))
def test_a_body_is_a_form_or_is_refused(body: bytes) -> None:
    request = Request("1", "POST", b"/", "127.0.0.1", False, {"content-type": "application/x-www-form-urlencoded"})
    try:
        found = _parameters(request, body)
    except ValidationError:
        return
    assert all(isinstance(value, str) for value in found.found.values())


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.text(max_size=8)
    | st.sampled_from(("Allow", "s3:*", "*", "2012-10-17")),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ("Version", "Statement", "Effect", "Action", "Resource", "Condition", "Principal", "AWS", "Sid")
            )
            | st.text(max_size=5),
            inner,
            max_size=5,
        )
    ),
    max_leaves=20,
)


@given(JSON, st.sampled_from((IDENTITY, TRUST)))
@settings(max_examples=examples(150))
def test_a_document_is_a_policy_or_is_refused(document: Any, grammar: Any) -> None:
    try:
        check_document(json.dumps(document), grammar, 10_000, "x")
    except MalformedPolicyDocument:
        pass

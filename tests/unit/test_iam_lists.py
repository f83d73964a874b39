"""Lists of IAM look at each entity once, and make rows only of those that they show: an account has thousands, and the
event loop waits meanwhile."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import pytest

from storaged.objects.accounts import IamUser, ManagedPolicy, PolicyVersion, StoredAccount, iam_arn
from storaged.objects.api import Users
from storaged.s3.ops.iam import policies, users
from storaged.s3.ops.iam.actions import perform
from storaged.s3.ops.iam.call import Call, Parameters

USER_ID = "a" * 64
VERSIONS = (PolicyVersion("v1", "{}", 1),)
POLICIES = {f"p{n:03}": ManagedPolicy(f"p{n:03}", f"ANPA{n}", "/", 1, VERSIONS, "v1") for n in range(200)}
ATTACHED = iam_arn(USER_ID, "policy", "/", "p007")
ACCOUNT = StoredAccount(
    users={f"u{n:03}": IamUser(f"u{n:03}", f"AIDA{n}", "/", 1, attached=(ATTACHED,)) for n in range(300)},
    policies=POLICIES,
)


class OneAccount:
    @property
    def accounts(self) -> OneAccount:
        return self

    async def get(self, user_id: str) -> StoredAccount:
        return ACCOUNT


async def listed(action: str, **parameters: str) -> dict[str, Any]:
    below = cast(Users, OneAccount())
    call = Call(action, below, USER_ID, "anne", Parameters(parameters), 1, lambda name, arn: None)
    return dict(await perform(call) or {})


def counting(function: Callable[..., Any], calls: list[None]) -> Callable[..., Any]:
    def counted(*arguments: Any) -> Any:
        calls.append(None)
        return function(*arguments)

    return counted


async def test_only_the_rows_of_the_page_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[None] = []
    monkeypatch.setattr(users, "entity_fields", counting(users.entity_fields, made))
    found = await listed("ListUsers", MaxItems="3")
    assert [row["UserName"] for row in found["Users"]] == ["u000", "u001", "u002"]
    following = await listed("ListUsers", MaxItems="2", Marker=found["Marker"])
    assert [row["UserName"] for row in following["Users"]] == ["u003", "u004"]
    assert len(made) == 5


async def test_attachments_of_all_policies_are_counted_in_one_look(monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[None] = []
    monkeypatch.setattr(policies, "entries_of", counting(policies.entries_of, looks))
    found = await listed("ListPolicies", Scope="Local", MaxItems="1000")
    assert len(found["Policies"]) == len(POLICIES)
    assert {row["PolicyName"]: row["AttachmentCount"] for row in found["Policies"] if row["AttachmentCount"]} == {
        "p007": 300
    }
    attached = await listed("ListPolicies", OnlyAttached="true")
    assert [row["Arn"] for row in attached["Policies"]] == [ATTACHED]
    assert len(looks) <= 6

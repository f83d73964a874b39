"""IAM and STS on the S3 port, with botocore's own clients: users, keys, groups, policies, roles, sessions, and what
they may do with buckets.
"""

from __future__ import annotations

import asyncio
import json
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import boto3  # type: ignore[import-untyped]
import msgspec
import pytest
import pytest_asyncio
from botocore.auth import SigV4Auth  # type: ignore[import-untyped]
from botocore.awsrequest import AWSRequest  # type: ignore[import-untyped]
from botocore.config import Config  # type: ignore[import-untyped]
from botocore.credentials import Credentials  # type: ignore[import-untyped]
from botocore.exceptions import ClientError  # type: ignore[import-untyped]

from storaged.cluster.audit.format import parse_line
from storaged.cluster.audit.log import AuditLog
from storaged.errors import EntityAlreadyExists, InvalidAction, InvalidArgument, NoSuchEntity
from storaged.meta.names import system_name
from storaged.node.audited import AuditedUsers
from storaged.node.quotas import set_account_quota, set_bucket_quota
from storaged.objects import accounts
from storaged.objects.accounts import SESSION_FORMAT, AccountRecord, StoredSession
from storaged.objects.identity import account_of
from storaged.s3.ops import delete
from storaged.s3.ops.iam.actions import perform, perform_for_operator
from storaged.s3.ops.iam.call import Call, Parameters
from storaged.wire import decode, encode
from tests.integration.s3_front import ACCESS, ACCESS_ALT, SECRET, SECRET_ALT, World, s3_world

DENIED = (403, "AccessDenied")
READ_ONLY = "arn:aws:iam::aws:policy/AmazonS3ReadOnlyAccess"


@pytest_asyncio.fixture
async def world() -> AsyncIterator[World]:
    async with s3_world() as world:
        yield world


def refused(call: Callable[..., Any], **parameters: Any) -> tuple[int, str]:
    try:
        call(**parameters)
    except ClientError as error:
        return error.response["ResponseMetadata"]["HTTPStatusCode"], error.response["Error"]["Code"]
    raise AssertionError("it was not refused")


def client(world: World, service: str, access: str = ACCESS, secret: str = SECRET, token: str | None = None) -> Any:
    return boto3.client(
        service,
        endpoint_url=world.endpoint,
        region_name="eu-fr-1",
        aws_access_key_id=access,
        aws_secret_access_key=secret,
        aws_session_token=token,
        config=Config(retries={"total_max_attempts": 1}, s3={"addressing_style": "path"}),
    )


def with_key(world: World, service: str, key: dict[str, str]) -> Any:
    return client(world, service, key["AccessKeyId"], key["SecretAccessKey"], key.get("SessionToken"))


def document(*statements: dict[str, Any]) -> str:
    return json.dumps({"Version": "2012-10-17", "Statement": list(statements)})


def may(action: Any, resource: Any = "*", **more: Any) -> dict[str, Any]:
    return {"Effect": "Allow", "Action": action, "Resource": resource, **more}


def trust(*arns: str, **more: Any) -> str:
    return document({"Effect": "Allow", "Principal": {"AWS": list(arns)}, "Action": "sts:AssumeRole", **more})


def made_user(iam: Any, name: str, *statements: dict[str, Any]) -> dict[str, str]:
    """A user with a key, and these statements in a policy."""
    iam.create_user(UserName=name)
    if statements:
        iam.put_user_policy(UserName=name, PolicyName="own", PolicyDocument=document(*statements))
    key: dict[str, str] = iam.create_access_key(UserName=name)["AccessKey"]
    return key


def posted(url: str, fields: dict[str, str], file: bytes) -> int:
    """Sends a browser's form, and returns the status."""
    parts = [
        f'--x\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n' for name, value in fields.items()
    ]
    head = '--x\r\nContent-Disposition: form-data; name="file"; filename="f"\r\n\r\n'
    body = "".join(parts).encode() + head.encode() + file + b"\r\n--x--\r\n"
    asked = urllib.request.Request(url, body, {"Content-Type": "multipart/form-data; boundary=x"})
    try:
        with urllib.request.urlopen(asked) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


async def run(work: Callable[[World], None], world: World) -> None:
    await asyncio.to_thread(work, world)


async def test_a_user_of_an_account_may_what_its_policies_and_groups_allow(world: World) -> None:
    def work(world: World) -> None:
        iam, root = client(world, "iam"), client(world, "s3")
        root.create_bucket(Bucket="bucket")
        root.put_object(Bucket="bucket", Key="k", Body=b"data")
        bob = with_key(world, "s3", made_user(iam, "bob"))
        assert refused(bob.list_buckets) == DENIED
        assert refused(bob.get_object, Bucket="bucket", Key="k") == DENIED
        assert refused(bob.put_object, Bucket="bucket", Key="k", Body=b"x") == DENIED
        assert refused(bob.create_bucket, Bucket="other") == DENIED
        iam.create_group(GroupName="readers")
        iam.attach_group_policy(GroupName="readers", PolicyArn=READ_ONLY)
        iam.add_user_to_group(GroupName="readers", UserName="bob")
        assert [found["Name"] for found in bob.list_buckets()["Buckets"]] == ["bucket"]
        assert bob.get_object(Bucket="bucket", Key="k")["Body"].read() == b"data"
        assert refused(bob.put_object, Bucket="bucket", Key="k", Body=b"x") == DENIED
        policy = document(may("s3:PutObject", "arn:aws:s3:::bucket/${aws:username}/*"))
        iam.put_user_policy(UserName="bob", PolicyName="home", PolicyDocument=policy)
        bob.put_object(Bucket="bucket", Key="bob/x", Body=b"x")
        assert refused(bob.put_object, Bucket="bucket", Key="eve/x", Body=b"x") == DENIED
        answer = bob.delete_objects(Bucket="bucket", Delete={"Objects": [{"Key": "k"}]})
        assert [found["Code"] for found in answer["Errors"]] == ["AccessDenied"]
        iam.remove_user_from_group(GroupName="readers", UserName="bob")
        assert refused(bob.get_object, Bucket="bucket", Key="k") == DENIED
        iam.put_user_policy(UserName="bob", PolicyName="all", PolicyDocument=document(may("s3:*")))
        bob.create_bucket(Bucket="bobs")
        assert [found["Name"] for found in root.list_buckets()["Buckets"]] == ["bobs", "bucket"], "the account owns it"

    await run(work, world)


async def test_policies_know_the_tags_of_a_call_and_of_the_user_or_role_that_it_is_about(world: World) -> None:
    def work(world: World) -> None:
        iam = client(world, "iam")
        role = iam.create_role(
            RoleName="kept",
            AssumeRolePolicyDocument=document(
                {"Effect": "Allow", "Principal": "*", "Action": "sts:AssumeRole"},
            ),
            Tags=[{"Key": "Kept", "Value": "yes"}],
        )["Role"]["Arn"]
        iam.create_user(UserName="kept", Path="/a:b/", Tags=[{"Key": "Kept", "Value": "yes"}])
        iam.create_user(UserName="marked", Tags=[{"Key": "mark", "Value": ""}])
        iam.create_user(UserName="plain")
        denied = {
            "aws:RequestTag/Team": "admin",
            "aws:ResourceTag/Kept": "yes",
            "iam:ResourceTag/mark": "",
        }
        statements = [may("*")]
        for key, value in denied.items():
            statement = may("*", Condition={"StringEquals": {key: value}})
            statements.append(statement | {"Effect": "Deny"})
        key = made_user(iam, "bob", *statements)
        bob, sts = with_key(world, "iam", key), with_key(world, "sts", key)
        admin, other = [{"Key": "Team", "Value": "admin"}], [{"Key": "Team", "Value": "other"}]
        assert refused(bob.create_user, UserName="new", Tags=admin) == DENIED
        assert refused(bob.tag_user, UserName="plain", Tags=admin) == DENIED
        for name in ("kept", "marked"):
            assert refused(bob.delete_user, UserName=name) == DENIED
            assert refused(bob.tag_user, UserName=name, Tags=other) == DENIED
        assert refused(bob.delete_role, RoleName="kept") == DENIED
        assert refused(sts.assume_role, RoleArn=role, RoleSessionName="now") == DENIED
        bob.create_user(UserName="new", Tags=other)
        bob.tag_user(UserName="plain", Tags=other)
        bob.delete_user(UserName="plain")

    await run(work, world)


async def test_other_requests_have_a_turn_after_each_decision_about_many_keys(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A decision over long policies takes long, and one request asks for a thousand."""
    decided = most = 0
    permit = delete.permit

    async def counted(*asked: Any) -> Any:
        nonlocal decided
        decided += 1
        return await permit(*asked)

    async def others() -> None:
        nonlocal most
        before = 0
        while True:
            most, before = max(most, decided - before), decided
            await asyncio.sleep(0)

    def work(world: World) -> None:
        client(world, "s3").create_bucket(Bucket="bucket")
        bob = with_key(world, "s3", made_user(client(world, "iam"), "bob", may("s3:ListBucket")))
        keys = [{"Key": str(number)} for number in range(100)]
        answer = bob.delete_objects(Bucket="bucket", Delete={"Objects": keys})
        assert {error["Code"] for error in answer["Errors"]} == {"AccessDenied"}

    monkeypatch.setattr(delete, "permit", counted)
    ticking = asyncio.create_task(others())
    await run(work, world)
    ticking.cancel()
    assert (decided, most) == (100, 1)


async def test_keys_are_set_inactive_and_removed_and_there_are_two_at_most(world: World) -> None:
    def work(world: World) -> None:
        iam, root = client(world, "iam"), client(world, "s3")
        first = made_user(iam, "bob", may("s3:*"))
        second = iam.create_access_key(UserName="bob")["AccessKey"]
        assert refused(iam.create_access_key, UserName="bob") == (409, "LimitExceeded")
        bob = with_key(world, "s3", first)
        bob.list_buckets()
        iam.update_access_key(UserName="bob", AccessKeyId=first["AccessKeyId"], Status="Inactive")
        assert refused(bob.list_buckets) == (403, "InvalidAccessKeyId")
        with_key(world, "s3", second).list_buckets()
        iam.update_access_key(UserName="bob", AccessKeyId=first["AccessKeyId"], Status="Active")
        bob.list_buckets()
        iam.delete_access_key(UserName="bob", AccessKeyId=first["AccessKeyId"])
        assert refused(bob.list_buckets) == (403, "InvalidAccessKeyId")
        gone = {"UserName": "bob", "AccessKeyId": first["AccessKeyId"]}
        assert refused(iam.delete_access_key, **gone) == (404, "NoSuchEntity")
        listed = iam.list_access_keys(UserName="bob")["AccessKeyMetadata"]
        assert [(key["AccessKeyId"], key["Status"]) for key in listed] == [(second["AccessKeyId"], "Active")]
        own = iam.create_access_key()["AccessKey"]
        with_key(world, "s3", own).create_bucket(Bucket="roots")
        assert [found["Name"] for found in root.list_buckets()["Buckets"]] == ["roots"]
        iam.update_access_key(AccessKeyId=own["AccessKeyId"], Status="Inactive")
        assert refused(with_key(world, "s3", own).list_buckets) == (403, "InvalidAccessKeyId")
        iam.delete_access_key(AccessKeyId=own["AccessKeyId"])
        other = client(world, "iam", ACCESS_ALT, SECRET_ALT)
        assert refused(other.delete_access_key, AccessKeyId=second["AccessKeyId"]) == (404, "NoSuchEntity")
        assert refused(other.list_access_keys, UserName="bob") == (404, "NoSuchEntity")

    await run(work, world)


async def test_an_account_has_users_groups_roles_and_policies_with_aws_s_errors(world: World) -> None:
    def work(world: World) -> None:
        iam = client(world, "iam")
        assert iam.get_user()["User"]["Arn"].endswith(":root")
        made = iam.create_user(UserName="Bob", Path="/a/", Tags=[{"Key": "k", "Value": "v"}])["User"]
        assert iam.get_user(UserName="bob")["User"] == made
        assert refused(iam.create_user, UserName="bob") == (409, "EntityAlreadyExists")
        assert refused(iam.create_user, UserName="main") == (409, "EntityAlreadyExists"), "that is the root's own name"
        assert refused(iam.create_user, UserName="b b") == (400, "ValidationError")
        assert refused(iam.create_user, UserName="ben", Path="a") == (400, "ValidationError")
        assert refused(iam.get_user, UserName="nobody") == (404, "NoSuchEntity")
        iam.update_user(UserName="bob", NewUserName="Zoe", NewPath="/z/")
        assert iam.get_user(UserName="zoe")["User"]["UserId"] == made["UserId"]
        policy = {"UserName": "zoe", "PolicyName": "p", "PolicyDocument": document(may("s3:*"))}
        assert refused(iam.put_user_policy, **policy | {"PolicyDocument": "{}"}) == (400, "MalformedPolicyDocument")
        too_long = document(may("s3:*", "arn:aws:s3:::" + "x" * 2100))
        assert refused(iam.put_user_policy, **policy | {"PolicyDocument": too_long}) == (409, "LimitExceeded")
        assert iam.list_user_policies(UserName="zoe")["PolicyNames"] == []
        iam.put_user_policy(**policy)
        assert json.dumps(iam.get_user_policy(UserName="zoe", PolicyName="p")["PolicyDocument"]) == document(
            may("s3:*")
        )
        assert refused(iam.delete_user, UserName="zoe") == (409, "DeleteConflict")
        iam.delete_user_policy(UserName="zoe", PolicyName="p")
        assert refused(iam.delete_user_policy, UserName="zoe", PolicyName="p") == (404, "NoSuchEntity")
        iam.create_group(GroupName="g")
        iam.add_user_to_group(GroupName="g", UserName="zoe")
        assert [found["UserName"] for found in iam.get_group(GroupName="g")["Users"]] == ["Zoe"]
        assert refused(iam.delete_group, GroupName="g") == (409, "DeleteConflict")
        assert refused(iam.delete_user, UserName="zoe") == (409, "DeleteConflict")
        iam.remove_user_from_group(GroupName="g", UserName="zoe")
        iam.delete_group(GroupName="g")
        iam.delete_user(UserName="zoe")
        assert refused(iam.simulate_principal_policy, PolicySourceArn=made["Arn"], ActionNames=["s3:GetObject"]) == (
            400,
            "InvalidAction",
        )

    await run(work, world)


async def test_lists_come_in_pages_in_the_order_of_names_whatever_their_case(world: World) -> None:
    def work(world: World) -> None:
        iam = client(world, "iam")
        for name in ("Ad", "ac", "Ab", "aa"):
            iam.create_user(UserName=name, Path="/p/")
        iam.create_user(UserName="elsewhere")
        for size in (1, 2, 3, 100):
            pages = iam.get_paginator("list_users").paginate(PathPrefix="/p", PaginationConfig={"PageSize": size})
            assert [user["UserName"] for found in pages for user in found["Users"]] == ["aa", "Ab", "ac", "Ad"]
        assert refused(iam.list_users, Marker="not one") == (400, "ValidationError")
        assert client(world, "iam", ACCESS_ALT, SECRET_ALT).list_users()["Users"] == [], "another account's"

    await run(work, world)


async def test_a_managed_policy_has_versions_and_is_not_deleted_while_it_is_attached(world: World) -> None:
    def work(world: World) -> None:
        iam, root = client(world, "iam"), client(world, "s3")
        root.create_bucket(Bucket="bucket")
        key = made_user(iam, "bob")
        read = document(may(["s3:ListBucket"]))
        arn = iam.create_policy(PolicyName="lists", PolicyDocument=read)["Policy"]["Arn"]
        assert refused(iam.create_policy, PolicyName="Lists", PolicyDocument=read) == (409, "EntityAlreadyExists")
        iam.attach_user_policy(UserName="bob", PolicyArn=arn)
        with_key(world, "s3", key).list_objects_v2(Bucket="bucket")
        assert refused(iam.delete_policy, PolicyArn=arn) == (409, "DeleteConflict")
        assert iam.get_policy(PolicyArn=arn)["Policy"]["AttachmentCount"] == 1
        nothing = document(may("iam:*"))
        iam.create_policy_version(PolicyArn=arn, PolicyDocument=nothing, SetAsDefault=True)
        assert refused(with_key(world, "s3", key).list_objects_v2, Bucket="bucket") == DENIED
        assert refused(iam.delete_policy_version, PolicyArn=arn, VersionId="v2") == (409, "DeleteConflict")
        iam.set_default_policy_version(PolicyArn=arn, VersionId="v1")
        iam.delete_policy_version(PolicyArn=arn, VersionId="v2")
        with_key(world, "s3", key).list_objects_v2(Bucket="bucket")
        users = iam.list_entities_for_policy(PolicyArn=arn)["PolicyUsers"]
        assert [found["UserName"] for found in users] == ["bob"]
        other = client(world, "iam", ACCESS_ALT, SECRET_ALT)
        other.create_user(UserName="eve")
        assert refused(other.attach_user_policy, UserName="eve", PolicyArn=arn) == (404, "NoSuchEntity")
        assert refused(other.get_policy, PolicyArn=arn) == (404, "NoSuchEntity")
        iam.detach_user_policy(UserName="bob", PolicyArn=arn)
        assert refused(iam.detach_user_policy, UserName="bob", PolicyArn=arn) == (404, "NoSuchEntity")
        iam.delete_policy(PolicyArn=arn)
        assert refused(iam.delete_policy, PolicyArn=READ_ONLY) == (400, "UnmodifiableEntity")

    await run(work, world)


async def test_a_user_calls_iam_only_as_its_policies_allow(world: World) -> None:
    def work(world: World) -> None:
        iam = client(world, "iam")
        key = made_user(iam, "bob")
        bob = with_key(world, "iam", key)
        for call, parameters in (
            (bob.list_users, {}),
            (bob.get_user, {}),
            (bob.create_user, {"UserName": "eve"}),
            (bob.put_user_policy, {"UserName": "bob", "PolicyName": "p", "PolicyDocument": document(may("*"))}),
            (bob.attach_user_policy, {"UserName": "bob", "PolicyArn": "arn:aws:iam::aws:policy/AdministratorAccess"}),
            (bob.create_access_key, {"UserName": "bob"}),
        ):
            assert refused(call, **parameters) == DENIED
        own = "arn:aws:iam::*:user/${aws:username}"
        iam.put_user_policy(UserName="bob", PolicyName="self", PolicyDocument=document(may("iam:*AccessKey*", own)))
        assert [found["UserName"] for found in bob.list_access_keys()["AccessKeyMetadata"]] == ["bob"]
        iam.create_user(UserName="eve")
        assert refused(bob.create_access_key, UserName="eve") == DENIED
        assert refused(bob.delete_user, UserName="bob") == DENIED

    await run(work, world)


async def test_calls_that_are_not_signed_or_signed_wrongly_are_refused(world: World) -> None:
    def work(world: World) -> None:
        assert refused(client(world, "iam", "AKNOBODY", "x").list_users) == (403, "InvalidClientTokenId")
        assert refused(client(world, "iam", ACCESS, "wrong").list_users) == (403, "SignatureDoesNotMatch")
        assert refused(client(world, "iam", token="bm90IG9uZQ==").list_users) == (403, "InvalidClientTokenId")
        assert refused(client(world, "sts", token="%%%").get_caller_identity) == (403, "InvalidClientTokenId")

    await run(work, world)
    form = b"Action=ListUsers&Version=2010-05-08"
    head = b"POST / HTTP/1.1\r\nHost: h\r\nContent-Type: application/x-www-form-urlencoded\r\nConnection: close\r\n"
    answer = await world.raw(head + b"Content-Length: %d\r\n\r\n" % len(form) + form)
    assert b" 403 " in answer.split(b"\r\n")[0]
    assert b"<Code>MissingAuthenticationToken</Code>" in answer
    answer = await world.raw(head + b"Content-Length: 10000000\r\n\r\n" + b"x" * 300_000)
    assert b" 400 " in answer.split(b"\r\n")[0]


async def test_a_role_is_assumed_by_whom_its_trust_policy_names(world: World) -> None:
    def work(world: World) -> None:
        iam, root = client(world, "iam"), client(world, "s3")
        root.create_bucket(Bucket="bucket")
        root.put_object(Bucket="bucket", Key="k", Body=b"data")
        key = made_user(iam, "bob")
        user = iam.get_user(UserName="bob")["User"]
        missing = trust("arn:aws:iam::123456789012:root")
        create = {"RoleName": "reader", "AssumeRolePolicyDocument": trust(user["Arn"])}
        assert refused(iam.create_role, **create | {"AssumeRolePolicyDocument": missing}) == (
            400,
            "MalformedPolicyDocument",
        )
        role = iam.create_role(**create)["Role"]
        assert refused(iam.create_role, **create) == (409, "EntityAlreadyExists")
        sts = with_key(world, "sts", key)
        assert refused(client(world, "sts").assume_role, RoleArn=role["Arn"], RoleSessionName="now") == DENIED, "root"
        assert refused(sts.assume_role, RoleArn=role["Arn"] + "x", RoleSessionName="now") == DENIED
        assert refused(sts.assume_role, RoleArn=role["Arn"], RoleSessionName="now", DurationSeconds=43200) == (
            400,
            "ValidationError",
        )
        assumed = sts.assume_role(RoleArn=role["Arn"], RoleSessionName="now")
        caller = with_key(world, "sts", assumed["Credentials"])
        identity = caller.get_caller_identity()
        assert (identity["UserId"], identity["Arn"]) == (
            f"{role['RoleId']}:now",
            assumed["AssumedRoleUser"]["Arn"],
        )
        assert refused(caller.get_session_token) == DENIED
        session = with_key(world, "s3", assumed["Credentials"])
        assert refused(session.get_object, Bucket="bucket", Key="k") == DENIED
        iam.put_role_policy(RoleName="reader", PolicyName="p", PolicyDocument=document(may("s3:*")))
        assert session.get_object(Bucket="bucket", Key="k")["Body"].read() == b"data"
        session.put_object(Bucket="bucket", Key="k2", Body=b"more")
        url = session.generate_presigned_url("get_object", Params={"Bucket": "bucket", "Key": "k"})
        assert "X-Amz-Security-Token" in url
        with urllib.request.urlopen(url) as answer:
            assert answer.read() == b"data"
        form = session.generate_presigned_post("bucket", "posted")
        assert posted(form["url"], form["fields"], b"file") == 204
        assert posted(form["url"], form["fields"] | {"x-amz-security-token": "bm90IG9uZQ=="}, b"file") == 400
        assert session.get_object(Bucket="bucket", Key="posted")["Body"].read() == b"file"
        narrowed = sts.assume_role(RoleArn=role["Arn"], RoleSessionName="now", Policy=document(may("s3:GetObject")))
        less = with_key(world, "s3", narrowed["Credentials"])
        assert less.get_object(Bucket="bucket", Key="k")["Body"].read() == b"data"
        assert refused(less.put_object, Bucket="bucket", Key="k2", Body=b"x") == DENIED
        mixed = client(
            world, "s3", narrowed["Credentials"]["AccessKeyId"], narrowed["Credentials"]["SecretAccessKey"],
            assumed["Credentials"]["SessionToken"],
        )  # fmt: skip
        assert refused(mixed.list_buckets) == (400, "InvalidToken"), "a token of other credentials"
        iam.delete_role_policy(RoleName="reader", PolicyName="p")
        assert refused(session.get_object, Bucket="bucket", Key="k") == DENIED
        iam.delete_role(RoleName="reader")
        assert refused(session.get_object, Bucket="bucket", Key="k") == (400, "InvalidToken")

    await run(work, world)


async def test_across_accounts_a_role_needs_both_the_trust_and_the_caller_s_own_policy(world: World) -> None:
    def work(world: World) -> None:
        iam, other = client(world, "iam"), client(world, "iam", ACCESS_ALT, SECRET_ALT)
        key = made_user(other, "eve")
        eve = other.get_user(UserName="eve")["User"]["Arn"]
        condition = {"Condition": {"StringEquals": {"sts:ExternalId": "42"}}}
        arn = iam.create_role(RoleName="r", AssumeRolePolicyDocument=trust(eve, **condition))["Role"]["Arn"]
        sts, ask = with_key(world, "sts", key), {"RoleArn": arn, "RoleSessionName": "now"}
        assert refused(sts.assume_role, **ask, ExternalId="42") == DENIED
        other.put_user_policy(UserName="eve", PolicyName="p", PolicyDocument=document(may("sts:AssumeRole", arn)))
        assert refused(sts.assume_role, **ask) == DENIED
        sts.assume_role(**ask, ExternalId="42")

    await run(work, world)


async def test_a_session_of_a_user_ends_with_the_key_that_made_it(world: World) -> None:
    def work(world: World) -> None:
        iam = client(world, "iam")
        key = made_user(iam, "bob", may("s3:*"), may("iam:*"))
        credentials = with_key(world, "sts", key).get_session_token(DurationSeconds=900)["Credentials"]
        s3 = with_key(world, "s3", credentials)
        s3.create_bucket(Bucket="bucket")
        assert refused(with_key(world, "iam", credentials).list_users) == DENIED
        assert with_key(world, "sts", credentials).get_caller_identity()["Arn"].endswith(":user/bob")
        iam.update_access_key(UserName="bob", AccessKeyId=key["AccessKeyId"], Status="Inactive")
        assert refused(s3.list_buckets) == (400, "InvalidToken")
        root = client(world, "sts").get_session_token()["Credentials"]
        assert [found["Name"] for found in with_key(world, "s3", root).list_buckets()["Buckets"]] == ["bucket"]
        identity = client(world, "sts").get_caller_identity()
        assert identity["Arn"] == f"arn:aws:iam::{identity['Account']}:root"

    await run(work, world)


async def test_credentials_expire_and_forged_ones_open_nothing(world: World) -> None:
    who, _ = await world.users.lookup(ACCESS)
    now_ms = world.below.clock.wall_ms()
    made = StoredSession(SESSION_FORMAT, "ASIAOLD", "secret", ACCESS, who.user_id, now_ms - 2000, now_ms - 1000)
    expired = world.users.seal_session(made)
    stranger = world.users.seal_session(
        StoredSession(SESSION_FORMAT, "ASIABAD", "secret", ACCESS_ALT, who.user_id, now_ms, now_ms + 60_000)
    )

    def work(world: World) -> None:
        assert refused(client(world, "s3", "ASIAOLD", "secret", expired).list_buckets) == (400, "ExpiredToken")
        assert refused(client(world, "iam", "ASIAOLD", "secret", expired).list_users) == (400, "ExpiredToken")
        assert refused(client(world, "s3", "ASIABAD", "secret", stranger).list_buckets) == (400, "InvalidToken")
        assert refused(client(world, "s3", "ASIAOLD", "wrong", expired).list_buckets) == (400, "ExpiredToken")
        bad = expired[:-8] + "AAAAAAA="
        assert refused(client(world, "s3", "ASIAOLD", "secret", bad).list_buckets) == (400, "InvalidToken")
        assert refused(client(world, "s3", "ASIAOLD", "secret", "x" * 13_000).list_buckets) == (400, "InvalidToken")

    await run(work, world)


async def test_an_account_ends_with_its_root_and_comes_back_with_it(world: World) -> None:
    who, _ = await world.users.lookup(ACCESS_ALT)
    keys: dict[str, dict[str, str]] = {}

    def work(world: World) -> None:
        iam = client(world, "iam", ACCESS_ALT, SECRET_ALT)
        keys["eve"] = made_user(iam, "eve", may("s3:*"))
        keys["root"] = iam.create_access_key()["AccessKey"]
        with_key(world, "s3", keys["eve"]).list_buckets()

    def gone(world: World) -> None:
        for key in keys.values():
            assert refused(with_key(world, "s3", key).list_buckets) == (403, "InvalidAccessKeyId")

    def back(world: World) -> None:
        with_key(world, "s3", keys["eve"]).list_buckets()

    await run(work, world)
    await world.users.remove("alt")
    await run(gone, world)
    await world.users.add("new", user_id=who.user_id)
    await run(back, world)
    assert account_of(who.user_id) in {account_of(user.user_id) for user in await world.users.list_users()}


async def test_a_write_beyond_a_quota_is_403_quotaexceeded_and_what_is_there_stays_readable(world: World) -> None:
    def made(world: World) -> None:
        s3 = client(world, "s3")
        s3.create_bucket(Bucket="bucket")
        s3.create_bucket(Bucket="other")
        s3.put_object(Bucket="bucket", Key="k", Body=bytes(1000))

    def full(world: World) -> None:
        s3, beyond = client(world, "s3"), (403, "QuotaExceeded")
        s3.put_object(Bucket="bucket", Key="small", Body=b"x")
        assert refused(s3.put_object, Bucket="bucket", Key="k2", Body=bytes(1000)) == beyond
        assert refused(s3.copy_object, Bucket="bucket", Key="k3", CopySource="bucket/k") == beyond, (
            "three objects at most"
        )
        assert refused(s3.create_multipart_upload, Bucket="bucket", Key="k4") == beyond
        s3.put_object(Bucket="other", Key="k", Body=bytes(5000))
        assert len(s3.get_object(Bucket="bucket", Key="k")["Body"].read()) == 1000
        assert [row["Key"] for row in s3.list_objects_v2(Bucket="bucket")["Contents"]] == ["k", "small"]
        s3.delete_object(Bucket="bucket", Key="small")

    def again(world: World) -> None:
        client(world, "s3").put_object(Bucket="bucket", Key="k2", Body=b"x")

    await run(made, world)
    await set_bucket_quota(world.buckets, await world.buckets.get("bucket"), 1500, 2)
    await world.quotas.look()
    await run(full, world)
    await set_bucket_quota(world.buckets, await world.buckets.get("bucket"), 0, 0)
    await world.quotas.look()
    assert not world.quotas.watched
    await run(again, world)

    def copied(world: World) -> None:
        s3 = client(world, "s3")
        s3.copy_object(Bucket="bucket", Key="c1", CopySource="bucket/k")
        beyond = (403, "QuotaExceeded")
        assert refused(s3.copy_object, Bucket="bucket", Key="c2", CopySource="bucket/k") == beyond, "its size counts"
        upload = {"Bucket": "bucket", "Key": "parts"}
        upload["UploadId"] = s3.create_multipart_upload(**upload)["UploadId"]
        s3.upload_part(**upload, PartNumber=1, Body=bytes(400))
        assert refused(s3.put_object, Bucket="bucket", Key="c2", Body=bytes(400)) == beyond, "parts count"
        s3.abort_multipart_upload(**upload)

    await set_bucket_quota(world.buckets, await world.buckets.get("bucket"), 2500, 0)
    await world.quotas.look()
    await run(copied, world)
    await set_bucket_quota(world.buckets, await world.buckets.get("bucket"), 0, 0)
    who, _ = await world.users.lookup(ACCESS)
    await set_account_quota(world.users, who.user_id, 5500, 0)
    await world.quotas.look()

    def shared(world: World) -> None:
        s3 = client(world, "s3")
        assert refused(s3.put_object, Bucket="other", Key="k5", Body=b"x") == (403, "QuotaExceeded")

    await run(shared, world)


def lines_in(directory: Path) -> list[bytes]:
    return [line for path in sorted(directory.iterdir()) for line in path.read_bytes().splitlines()]


async def test_every_change_over_iam_is_in_the_audit_log_with_who_made_it(world: World, tmp_path: Path) -> None:
    log = AuditLog(tmp_path, "gw", bytes(8), clock=world.below.clock)
    await log.start()
    users = AuditedUsers(world.users, log, world.below.clock)
    who, _ = await world.users.lookup(ACCESS)

    def call(action: str, **parameters: str) -> Call:
        return Call(action, users, who.user_id, "main", Parameters(parameters), 1, lambda action, arn: None, who)

    await perform(call("CreateUser", UserName="bob"))
    key = await perform(call("CreateAccessKey", UserName="bob"))
    text = document(may("s3:*"))
    await perform(call("PutUserPolicy", UserName="bob", PolicyName="p", PolicyDocument=text))
    with pytest.raises(NoSuchEntity):
        await perform(call("DeleteUserPolicy", UserName="bob", PolicyName="q"))
    await perform(call("ListUsers"))
    own = await perform(call("CreateAccessKey"))
    await log.close()
    lines = lines_in(tmp_path)
    entries = [parse_line(line) for line in lines][1:]
    assert {entry.actor for entry in entries} == {f"s3:{ACCESS}"}
    assert key is not None
    assert own is not None
    bob = f"arn:aws:iam::{account_of(who.user_id)}:user/bob"
    told = [(entry.kind, entry.target, entry.outcome, entry.fields.get("action")) for entry in entries]
    assert told == [
        ("iam.change", bob, "intent", "CreateUser"),
        ("iam.change", bob, "done", None),
        ("iam.change", bob, "intent", "CreateAccessKey"),
        ("iam.change", bob, "done", None),
        ("iam.change", bob, "intent", "PutUserPolicy"),
        ("iam.change", bob, "done", None),
        ("iam.change", bob, "intent", "DeleteUserPolicy"),
        ("iam.change", bob, "refused NoSuchEntity", None),
        ("iam.key", "user:main", "intent", "CreateAccessKey"),
        ("iam.key", "user:main", "done", None),
    ]
    assert entries[2].fields["AccessKeyId"] == key["AccessKey"]["AccessKeyId"]
    assert entries[4].fields["PolicyName"] == "p"
    secrets = (key["AccessKey"]["SecretAccessKey"], own["AccessKey"]["SecretAccessKey"], "s3:*")
    assert not any(secret.encode() in line for secret in secrets for line in lines)


async def test_the_operator_s_actions_need_no_permission_and_print_policies_as_documents(world: World) -> None:
    who, _ = await world.users.lookup(ACCESS)

    async def operator(action: str, **parameters: str) -> dict[str, Any]:
        return await perform_for_operator(world.users, world.below.clock, who, action, parameters)

    await operator("CreateRole", RoleName="r", AssumeRolePolicyDocument=trust(account_of(who.user_id)))
    found = (await operator("GetRole", RoleName="r"))["Role"]
    assert found["AssumeRolePolicyDocument"] == json.loads(trust(account_of(who.user_id)))
    arn = (await operator("CreatePolicy", PolicyName="p", PolicyDocument=document(may("s3:*"))))["Policy"]["Arn"]
    version = await operator("GetPolicyVersion", PolicyArn=arn, VersionId="v1")
    assert version["PolicyVersion"]["Document"] == json.loads(document(may("s3:*")))
    with pytest.raises(InvalidAction):
        await operator("Nothing")


async def test_an_account_that_would_be_too_large_is_refused_and_stays_as_it_was(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(accounts, "BYTES_MAX", 1500)

    def work(world: World) -> None:
        iam = client(world, "iam")
        for number in range(5):
            iam.create_user(UserName=f"u{number}")
        policy = document(may("s3:GetObject", "arn:aws:s3:::" + "b" * 1500))
        iam.put_user_policy(UserName="u0", PolicyName="p", PolicyDocument=document(may("s3:*")))
        assert refused(iam.put_user_policy, UserName="u0", PolicyName="q", PolicyDocument=policy) == (
            409,
            "LimitExceeded",
        )
        assert iam.list_user_policies(UserName="u0")["PolicyNames"] == ["p"]

    await run(work, world)


async def test_a_forged_record_of_an_account_opens_nothing(world: World) -> None:
    who, _ = await world.users.lookup(ACCESS)
    keys: dict[str, dict[str, str]] = {}

    def work(world: World) -> None:
        keys["bob"] = made_user(client(world, "iam"), "bob", may("s3:*"))
        with_key(world, "s3", keys["bob"]).list_buckets()

    await run(work, world)
    name = system_name(f"account/{who.user_id}")
    held = world.below.ring.values[name]
    other = decode(held.body, AccountRecord)
    forged = encode(msgspec.structs.replace(other, user_id="f" * 64))
    world.below.ring.values[name] = msgspec.structs.replace(held, body=forged)
    world.users.accounts.forget(who.user_id)

    def refused_now(world: World) -> None:
        assert refused(with_key(world, "s3", keys["bob"]).list_buckets) == (503, "ServiceUnavailable")
        assert client(world, "s3").list_buckets()["Buckets"] == [], "the root needs no such record"

    await run(refused_now, world)


async def test_no_policy_of_a_session_is_overlooked(world: World) -> None:
    """A session without one of its policies could do more than was asked for."""

    def sent(world: World, keys: dict[str, str], **fields: str) -> int:
        """A call as botocore does not write it."""
        body = urllib.parse.urlencode({"Action": "AssumeRole", "Version": "2011-06-15", **fields})
        asked = AWSRequest("POST", world.endpoint + "/", {"Content-Type": "application/x-www-form-urlencoded"}, body)
        SigV4Auth(Credentials(keys["AccessKeyId"], keys["SecretAccessKey"]), "sts", "eu-fr-1").add_auth(asked)
        try:
            with urllib.request.urlopen(
                urllib.request.Request(asked.url, body.encode(), dict(asked.headers))
            ) as answer:
                return int(answer.status)
        except urllib.error.HTTPError as error:
            return error.code

    def work(world: World) -> None:
        iam, root = client(world, "iam"), client(world, "s3")
        root.create_bucket(Bucket="bucket")
        keys = made_user(iam, "bob")
        iam.create_role(RoleName="r", AssumeRolePolicyDocument=trust(iam.get_user(UserName="bob")["User"]["Arn"]))
        iam.put_role_policy(RoleName="r", PolicyName="p", PolicyDocument=document(may("s3:*")))
        reading = iam.create_policy(PolicyName="read", PolicyDocument=document(may("s3:ListBucket")))["Policy"]["Arn"]
        ask = {"RoleArn": iam.get_role(RoleName="r")["Role"]["Arn"], "RoleSessionName": "now"}
        session = with_key(world, "sts", keys).assume_role(**ask, PolicyArns=[{"arn": reading}])["Credentials"]
        s3 = client(world, "s3", session["AccessKeyId"], session["SecretAccessKey"], session["SessionToken"])
        assert s3.list_objects_v2(Bucket="bucket")["KeyCount"] == 0
        assert refused(s3.put_object, Bucket="bucket", Key="k") == DENIED
        assert sent(world, keys, **ask, **{"PolicyArns.member.1.arn": reading}) == 200
        for name in ("PolicyArns.member.2.arn", "PolicyArns.member.1.Arn", "PolicyArns.1.arn", "Tags.member.2.Key"):
            assert sent(world, keys, **ask, **{name: reading}) == 400, name

    await run(work, world)


async def test_a_root_exchanges_its_keys_and_keeps_its_name_and_one_key_at_least(world: World) -> None:
    keys: dict[str, dict[str, str]] = {}

    def exchange(world: World) -> None:
        iam = client(world, "iam", ACCESS_ALT, SECRET_ALT)
        made_user(iam, "eve", may("s3:*"))
        keys["new"] = iam.create_access_key()["AccessKey"]
        (old,) = (key for key in iam.list_access_keys()["AccessKeyMetadata"] if key["AccessKeyId"] == ACCESS_ALT)
        assert old["UserName"] == "alt"

    def only_new(world: World) -> None:
        iam = with_key(world, "iam", keys["new"])
        assert refused(iam.delete_access_key, AccessKeyId=keys["new"]["AccessKeyId"]) == (409, "DeleteConflict")
        iam.list_users()

    await run(exchange, world)
    who, _ = await world.users.lookup(ACCESS_ALT)
    await world.users.remove_key(who.user_id, ACCESS_ALT, "")
    await run(only_new, world)
    with pytest.raises(InvalidArgument):
        await world.users.add("alt")
    removed = await world.users.remove("alt")
    assert removed.access_key == keys["new"]["AccessKeyId"]
    assert (await world.users.accounts.get(who.user_id)).closed
    with pytest.raises(InvalidArgument):
        await world.users.add("main", user_id=who.user_id)
    assert (await world.users.accounts.get(who.user_id)).closed, "the name was taken: there is no root yet"
    with pytest.raises(InvalidArgument):
        await world.users.add("eve", user_id=who.user_id)
    await world.users.add("alt", user_id=who.user_id)
    assert not (await world.users.accounts.get(who.user_id)).closed


async def test_a_user_who_may_rename_under_one_path_can_not_move_itself_to_another(world: World) -> None:
    def work(world: World) -> None:
        iam = client(world, "iam")
        iam.create_user(UserName="bob", Path="/team/")
        own = document(may("iam:UpdateUser", "arn:aws:iam::*:user/team/*"))
        iam.put_user_policy(UserName="bob", PolicyName="own", PolicyDocument=own)
        bob = with_key(world, "iam", iam.create_access_key(UserName="bob")["AccessKey"])
        assert refused(bob.update_user, UserName="bob", NewPath="/admin/") == DENIED
        bob.update_user(UserName="bob", NewPath="/team/a/")

    await run(work, world)


async def test_many_changes_of_an_account_at_once_all_hold(world: World) -> None:
    who, _ = await world.users.lookup(ACCESS)

    async def make(name: str) -> None:
        await perform_for_operator(world.users, world.below.clock, who, "CreateUser", {"UserName": name})

    await asyncio.gather(*(make(f"u{number}") for number in range(20)))
    assert len((await world.users.accounts.get(who.user_id)).users) == 20
    results = await asyncio.gather(*(make("same") for _ in range(5)), return_exceptions=True)
    assert sum(isinstance(result, EntityAlreadyExists) for result in results) == 4

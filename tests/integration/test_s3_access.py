"""Access to buckets over HTTP: policies, lists, ownership, the public access block, clients without a key, other
origins.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
import pytest_asyncio
from botocore import UNSIGNED  # type: ignore[import-untyped]
from botocore.exceptions import ClientError  # type: ignore[import-untyped]

from storaged.objects.identity import account_of, arn_of
from tests.integration.s3_front import ACCESS, ACCESS_ALT, SECRET_ALT, World, s3_world
from tests.integration.test_s3_front import refused

DENIED = (403, "AccessDenied")
ITSELF, ALL = "arn:aws:s3:::bucket", "arn:aws:s3:::bucket/*"
PUBLIC = {
    "BlockPublicAcls": False,
    "IgnorePublicAcls": False,
    "BlockPublicPolicy": False,
    "RestrictPublicBuckets": False,
}


@pytest_asyncio.fixture
async def world() -> AsyncIterator[World]:
    async with s3_world() as world:
        yield world


@pytest_asyncio.fixture
async def legacy() -> AsyncIterator[World]:
    async with s3_world(legacy=True) as world:
        yield world


def clients(world: World) -> tuple[Any, Any, Any]:
    """Of the owner, of another user, and of nobody."""
    return world.client(), world.client(ACCESS_ALT, SECRET_ALT), world.client(signature_version=UNSIGNED)


async def in_thread(work: Callable[[World], None], world: World) -> None:
    await asyncio.to_thread(work, world)


def policy(*statements: dict[str, Any]) -> str:
    return json.dumps({"Version": "2012-10-17", "Statement": list(statements)})


def allow(action: Any, resource: Any = ALL, principal: Any = "*", **more: Any) -> dict[str, Any]:
    return {"Effect": "Allow", "Principal": principal, "Action": action, "Resource": resource, **more}


async def test_a_bucket_is_its_owner_s_until_a_policy_says_more(world: World) -> None:
    who = (await world.users.lookup(ACCESS_ALT))[0]
    named = {"AWS": [arn_of(who.user_id, who.display_name)]}

    def run(world: World) -> None:
        owner, other, nobody = clients(world)
        owner.create_bucket(Bucket="bucket")
        owner.put_object(Bucket="bucket", Key="k", Body=b"data")
        for client in (other, nobody):
            assert refused(client.get_object, Bucket="bucket", Key="k") == DENIED
            assert refused(client.put_object, Bucket="bucket", Key="k", Body=b"x") == DENIED
            assert refused(client.delete_object, Bucket="bucket", Key="k") == DENIED
            assert refused(client.list_objects_v2, Bucket="bucket") == DENIED
            assert refused(client.get_bucket_policy, Bucket="bucket") == DENIED
            assert refused(client.delete_bucket, Bucket="bucket") == DENIED
        owner.put_bucket_policy(Bucket="bucket", Policy=policy(allow("s3:GetObject", principal=named)))
        assert other.get_object(Bucket="bucket", Key="k")["Body"].read() == b"data"
        assert refused(nobody.get_object, Bucket="bucket", Key="k") == DENIED
        assert refused(other.get_object, Bucket="bucket", Key="missing") == DENIED, "who may not list is told no more"
        assert refused(owner.get_object, Bucket="bucket", Key="missing") == (404, "NoSuchKey")
        assert refused(other.put_object, Bucket="bucket", Key="k", Body=b"x") == DENIED
        more = policy(
            allow(["s3:GetObject", "s3:PutObject", "s3:DeleteObject"], ALL, named),
            allow("s3:ListBucket", ITSELF, named),
            {"Effect": "Deny", "Principal": "*", "Action": "s3:DeleteObject", "Resource": ITSELF + "/kept/*"},
        )
        owner.put_bucket_policy(Bucket="bucket", Policy=more)
        assert json.loads(owner.get_bucket_policy(Bucket="bucket")["Policy"]) == json.loads(more)
        assert refused(other.get_object, Bucket="bucket", Key="missing") == (404, "NoSuchKey")
        other.put_object(Bucket="bucket", Key="kept/a", Body=b"a")
        other.put_object(Bucket="bucket", Key="b", Body=b"b")
        wanted = {"Objects": [{"Key": "kept/a"}, {"Key": "b"}]}
        answer = other.delete_objects(Bucket="bucket", Delete=wanted)
        assert [found["Key"] for found in answer["Deleted"]] == ["b"]
        assert [(found["Key"], found["Code"]) for found in answer["Errors"]] == [("kept/a", "AccessDenied")]
        assert refused(owner.delete_object, Bucket="bucket", Key="kept/a") == DENIED
        assert refused(other.put_bucket_policy, Bucket="bucket", Policy=more) == DENIED
        owner.delete_bucket_policy(Bucket="bucket")
        owner.delete_object(Bucket="bucket", Key="kept/a")
        assert refused(other.get_object, Bucket="bucket", Key="k") == DENIED

    await in_thread(run, world)


async def test_a_copy_needs_the_right_to_read_its_source_and_the_tags_that_it_keeps(world: World) -> None:
    def run(world: World) -> None:
        owner, other, _ = clients(world)
        owner.create_bucket(Bucket="bucket")
        other.create_bucket(Bucket="others")
        owner.put_object(Bucket="bucket", Key="plain", Body=b"data")
        owner.put_object(Bucket="bucket", Key="tagged", Body=b"data", Tagging="a=b")
        source = {"Bucket": "bucket", "Key": "plain"}
        assert refused(other.copy_object, Bucket="others", Key="k", CopySource=source) == DENIED
        owner.put_public_access_block(Bucket="bucket", PublicAccessBlockConfiguration=PUBLIC)
        owner.put_bucket_policy(Bucket="bucket", Policy=policy(allow("s3:GetObject")))
        other.copy_object(Bucket="others", Key="k", CopySource=source)
        assert refused(other.copy_object, Bucket="bucket", Key="k", CopySource=source) == DENIED
        tagged = source | {"Key": "tagged"}
        assert refused(other.copy_object, Bucket="others", Key="k", CopySource=tagged) == DENIED
        other.copy_object(Bucket="others", Key="k", CopySource=tagged, TaggingDirective="REPLACE")
        assert refused(other.copy_object, Bucket="others", Key="k", CopySource=source | {"Key": "missing"}) == DENIED

    await in_thread(run, world)


async def test_a_copy_puts_tags_on_its_key_only_for_who_may_put_them_there(world: World) -> None:
    """Else who may only write objects gives them tags that others' rights depend on, by copying an object that has
    them from a bucket of its own."""

    def run(world: World) -> None:
        owner, other, _ = clients(world)
        owner.create_bucket(Bucket="bucket")
        other.create_bucket(Bucket="others")
        owner.put_public_access_block(Bucket="bucket", PublicAccessBlockConfiguration=PUBLIC)
        other.put_object(Bucket="others", Key="tagged", Body=b"data", Tagging="release=yes")
        other.put_object(Bucket="others", Key="plain", Body=b"data")
        source = {"Bucket": "others", "Key": "tagged"}
        where = {"Bucket": "bucket", "Key": "k"}
        owner.put_bucket_policy(Bucket="bucket", Policy=policy(allow("s3:PutObject")))
        assert refused(other.put_object, Body=b"data", Tagging="release=yes", **where) == DENIED
        assert refused(other.copy_object, CopySource=source, **where) == DENIED
        other.copy_object(CopySource=source, TaggingDirective="REPLACE", **where)
        other.copy_object(CopySource=source | {"Key": "plain"}, **where)
        assert owner.get_object_tagging(**where)["TagSet"] == []
        # a condition on tags of the request is about those that the copy gets
        given = {"Condition": {"StringEquals": {"s3:RequestObjectTag/release": "no"}}}
        owner.put_bucket_policy(
            Bucket="bucket", Policy=policy(allow("s3:PutObject"), allow("s3:PutObjectTagging", **given))
        )
        assert refused(other.copy_object, CopySource=source, **where) == DENIED
        assert refused(other.copy_object, CopySource=source, Tagging="release=no", **where) == DENIED
        other.put_object_tagging(**source, Tagging={"TagSet": [{"Key": "release", "Value": "no"}]})
        other.copy_object(CopySource=source, **where)
        assert owner.get_object_tagging(**where)["TagSet"] == [{"Key": "release", "Value": "no"}]

    await in_thread(run, world)


async def test_new_buckets_block_what_is_public_until_their_owner_opens_them(world: World) -> None:
    def run(world: World) -> None:
        owner, _, nobody = clients(world)
        owner.create_bucket(Bucket="bucket")
        owner.put_object(Bucket="bucket", Key="k", Body=b"data")
        assert set(owner.get_public_access_block(Bucket="bucket")["PublicAccessBlockConfiguration"].values()) == {True}
        controls = owner.get_bucket_ownership_controls(Bucket="bucket")["OwnershipControls"]
        assert controls == {"Rules": [{"ObjectOwnership": "BucketOwnerEnforced"}]}
        public = policy(allow("s3:GetObject"))
        assert refused(owner.put_bucket_policy, Bucket="bucket", Policy=public) == DENIED
        assert refused(owner.get_bucket_policy_status, Bucket="bucket") == (404, "NoSuchBucketPolicy")
        owner.put_object(Bucket="bucket", Key="k", Body=b"data", ACL="private")  # as rclone does
        refusal = (400, "AccessControlListNotSupported")
        assert refused(owner.put_object, Bucket="bucket", Key="k", Body=b"", ACL="public-read") == refusal
        owner.create_bucket(Bucket="strict", ObjectOwnership="BucketOwnerEnforced")
        assert refused(owner.put_object, Bucket="strict", Key="k", Body=b"", ACL="private") == refusal
        owner.delete_public_access_block(Bucket="bucket")
        assert refused(owner.get_public_access_block, Bucket="bucket")[0] == 404
        owner.put_bucket_policy(Bucket="bucket", Policy=public)
        assert owner.get_bucket_policy_status(Bucket="bucket")["PolicyStatus"]["IsPublic"]
        assert nobody.get_object(Bucket="bucket", Key="k")["Body"].read() == b"data"
        assert refused(nobody.get_object, Bucket="bucket", Key="missing") == DENIED
        owner.put_public_access_block(
            Bucket="bucket", PublicAccessBlockConfiguration=PUBLIC | {"RestrictPublicBuckets": True}
        )
        assert refused(nobody.get_object, Bucket="bucket", Key="k") == DENIED
        assert owner.get_object(Bucket="bucket", Key="k")["Body"].read() == b"data"

    await in_thread(run, world)


async def test_lists_give_what_they_say_where_the_owner_allows_lists(legacy: World) -> None:
    other_id = (await legacy.users.lookup(ACCESS_ALT))[0].user_id

    def run(world: World) -> None:
        owner, other, nobody = clients(world)
        owner.create_bucket(Bucket="bucket", ACL="public-read-write")
        owner.put_object(Bucket="bucket", Key="private", Body=b"data")
        owner.put_object(Bucket="bucket", Key="public", Body=b"data", ACL="public-read")
        assert nobody.get_object(Bucket="bucket", Key="public")["Body"].read() == b"data"
        assert refused(nobody.get_object, Bucket="bucket", Key="private") == DENIED
        assert refused(nobody.get_object, Bucket="bucket", Key="missing") == (404, "NoSuchKey"), "it may list"
        other.put_object(Bucket="bucket", Key="theirs", Body=b"data")
        assert other.get_object(Bucket="bucket", Key="theirs")["Body"].read() == b"data"
        assert refused(owner.get_object, Bucket="bucket", Key="theirs") == DENIED, "its writer owns it"
        assert refused(owner.get_object_acl, Bucket="bucket", Key="theirs") == DENIED
        assert other.get_object_acl(Bucket="bucket", Key="theirs")["Owner"]["ID"] == other_id
        other.put_object_acl(Bucket="bucket", Key="theirs", ACL="bucket-owner-read")
        assert owner.get_object(Bucket="bucket", Key="theirs")["Body"].read() == b"data"
        owner.put_object_acl(Bucket="bucket", Key="private", GrantRead=f'id="{other_id}"')
        assert other.get_object(Bucket="bucket", Key="private")["Body"].read() == b"data"
        answer = refused(owner.put_object_acl, Bucket="bucket", Key="private", GrantRead="id=nobody")
        assert answer == (400, "InvalidArgument")
        owner.put_object(Bucket="bucket", Key="private", Body=b"new")
        assert refused(other.get_object, Bucket="bucket", Key="private") == DENIED, "a list belongs to one version"
        owner.put_public_access_block(
            Bucket="bucket", PublicAccessBlockConfiguration=PUBLIC | {"BlockPublicAcls": True}
        )
        assert refused(owner.put_object_acl, Bucket="bucket", Key="private", ACL="public-read") == DENIED
        assert refused(owner.put_object, Bucket="bucket", Key="n", Body=b"", ACL="public-read") == DENIED
        rules = {"Rules": [{"ObjectOwnership": "BucketOwnerEnforced"}]}
        answer = refused(owner.put_bucket_ownership_controls, Bucket="bucket", OwnershipControls=rules)
        assert answer == (400, "InvalidBucketAclWithObjectOwnership")
        owner.put_bucket_acl(Bucket="bucket", ACL="private")
        owner.put_bucket_ownership_controls(Bucket="bucket", OwnershipControls=rules)
        assert owner.get_object(Bucket="bucket", Key="theirs")["Body"].read() == b"data"
        assert refused(other.get_object, Bucket="bucket", Key="theirs") == DENIED
        assert refused(nobody.get_object, Bucket="bucket", Key="public") == DENIED

    await in_thread(run, legacy)


async def test_an_owner_on_the_short_way_gets_no_object_of_another_owner(legacy: World) -> None:
    """GET and PUT of small objects without a task ask for the same grant."""

    def run(world: World) -> None:
        owner, other, _ = clients(world)
        owner.create_bucket(Bucket="bucket", ACL="public-read-write")
        for _ in range(3):
            other.put_object(Bucket="bucket", Key="theirs", Body=b"secret")
            assert refused(owner.get_object, Bucket="bucket", Key="theirs") == DENIED
            assert refused(owner.head_object, Bucket="bucket", Key="theirs")[0] == 403

    await in_thread(run, legacy)


async def test_a_policy_names_only_who_exists(world: World) -> None:
    other_id = (await world.users.lookup(ACCESS_ALT))[0].user_id
    account = account_of(other_id)

    def run(world: World) -> None:
        owner, _, _ = clients(world)
        owner.create_bucket(Bucket="bucket")
        for principal in (
            {"AWS": "123456789012"},
            {"AWS": "arn:aws:iam::123456789012:root"},
            {"AWS": f"arn:aws:iam::{account}:user/nobody"},
            {"CanonicalUser": "c" * 64},
        ):
            answer = refused(owner.put_bucket_policy, Bucket="bucket", Policy=policy(allow("s3:*", ALL, principal)))
            assert answer == (400, "MalformedPolicy")
        assert refused(owner.get_bucket_policy, Bucket="bucket")[0] == 404
        for principal in ({"AWS": account}, {"AWS": f"arn:aws:iam::{account}:user/alt"}, {"CanonicalUser": other_id}):
            owner.put_bucket_policy(Bucket="bucket", Policy=policy(allow("s3:*", ALL, principal)))

    await in_thread(run, world)


async def test_the_region_of_a_bucket_is_told_without_access(world: World) -> None:
    """https://docs.aws.amazon.com/AmazonS3/latest/API/API_HeadBucket.html"""

    def run(world: World) -> None:
        owner, other, nobody = clients(world)
        owner.create_bucket(Bucket="bucket")
        for client in (other, nobody):
            with pytest.raises(ClientError) as caught:
                client.head_bucket(Bucket="bucket")
            answer = caught.value.response["ResponseMetadata"]
            assert (answer["HTTPStatusCode"], answer["HTTPHeaders"]["x-amz-bucket-region"]) == (403, "eu-fr-1")

    await in_thread(run, world)


async def test_the_expected_owner_is_an_account(world: World) -> None:
    owner_id = (await world.users.lookup(ACCESS))[0].user_id

    def run(world: World) -> None:
        owner, _, _ = clients(world)
        owner.create_bucket(Bucket="bucket")
        owner.head_bucket(Bucket="bucket", ExpectedBucketOwner=account_of(owner_id))
        assert refused(owner.head_bucket, Bucket="bucket", ExpectedBucketOwner="123456789012")[0] == 403

    await in_thread(run, world)


RULES = [
    {
        "AllowedOrigins": ["https://*.example.org"],
        "AllowedMethods": ["GET", "PUT"],
        "AllowedHeaders": ["x-amz-*"],
        "ExposeHeaders": ["ETag"],
        "MaxAgeSeconds": 60,
        "ID": "one",
    },
    {"AllowedOrigins": ["*"], "AllowedMethods": ["HEAD"]},
]


async def test_pages_of_other_origins_are_told_what_the_rules_allow(world: World) -> None:
    def run(world: World) -> None:
        owner, _, _ = clients(world)
        owner.create_bucket(Bucket="bucket")
        assert refused(owner.get_bucket_cors, Bucket="bucket") == (404, "NoSuchCORSConfiguration")
        owner.put_bucket_cors(Bucket="bucket", CORSConfiguration={"CORSRules": RULES})
        assert owner.get_bucket_cors(Bucket="bucket")["CORSRules"] == RULES

    await in_thread(run, world)

    async def ask(method: str, target: str, **headers: str) -> tuple[int, dict[str, str]]:
        lines = [f"{method} {target} HTTP/1.1", f"Host: 127.0.0.1:{world.port}", "Connection: close"]
        lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
        head = (await world.raw("\r\n".join(lines).encode() + b"\r\n\r\n")).partition(b"\r\n\r\n")[0].decode()
        first, *rest = head.split("\r\n")
        return int(first.split()[1]), dict(line.split(": ", 1) for line in rest)

    page = "https://www.example.org"
    asked = {"Origin": page, "Access_Control_Request_Method": "PUT"}
    status, answer = await ask("OPTIONS", "/bucket/k", **asked, Access_Control_Request_Headers="X-Amz-Date, x-amz-acl")
    assert status == 200
    assert answer["Access-Control-Allow-Origin"] == page
    assert answer["Access-Control-Allow-Methods"] == "GET, PUT"
    assert answer["Access-Control-Allow-Headers"] == "x-amz-date, x-amz-acl"
    assert answer["Access-Control-Expose-Headers"] == "ETag"
    assert answer["Access-Control-Max-Age"] == "60"
    assert answer["Access-Control-Allow-Credentials"] == "true"
    assert "Origin" in answer["Vary"]
    assert (await ask("OPTIONS", "/bucket/k", **asked, Access_Control_Request_Headers="x-other"))[0] == 403
    assert (await ask("OPTIONS", "/bucket/k", Origin="https://example.com", Access_Control_Request_Method="GET"))[
        0
    ] == 403
    assert (await ask("OPTIONS", "/bucket/k", Origin=page))[0] == 400
    assert (await ask("OPTIONS", "/bucket/k", Origin=page, Access_Control_Request_Method="PATCH"))[0] == 400
    assert (await ask("OPTIONS", "/nowhere", **asked))[0] == 404
    status, answer = await ask("GET", "/bucket/k", Origin=page)
    assert (status, answer["Access-Control-Allow-Origin"]) == (403, page), "a refused request is readable too"
    status, answer = await ask("HEAD", "/bucket/k", Origin="https://example.com")
    assert answer["Access-Control-Allow-Origin"] == "*"
    assert "Access-Control-Allow-Credentials" not in answer
    assert "Access-Control-Allow-Origin" not in (await ask("GET", "/bucket/k", Origin="https://example.com"))[1]
    assert "Vary" not in (await ask("GET", "/bucket/k"))[1]


@pytest.mark.parametrize(
    ("rule", "code"),
    [
        ({"AllowedOrigins": ["*"], "AllowedMethods": ["PATCH"]}, "InvalidRequest"),
        ({"AllowedOrigins": ["https://*.*"], "AllowedMethods": ["GET"]}, "InvalidRequest"),
        ({"AllowedOrigins": ["*"], "AllowedMethods": ["GET"], "AllowedHeaders": ["*a*"]}, "InvalidRequest"),
        ({"AllowedOrigins": ["*"], "AllowedMethods": ["GET"], "ExposeHeaders": ["*"]}, "InvalidRequest"),
        ({"AllowedOrigins": ["*"], "AllowedMethods": ["GET"], "ExposeHeaders": ["a b"]}, "MalformedXML"),
        ({"AllowedOrigins": ["*"], "AllowedMethods": ["GET"], "MaxAgeSeconds": -1}, "MalformedXML"),
        ({"AllowedOrigins": ["a"], "AllowedMethods": []}, "MalformedXML"),
        ({"AllowedOrigins": [], "AllowedMethods": ["GET"]}, "MalformedXML"),
    ],
)
async def test_rules_that_can_t_be_are_refused_and_nothing_changes(
    world: World, rule: dict[str, Any], code: str
) -> None:
    def run(world: World) -> None:
        owner, _, _ = clients(world)
        owner.create_bucket(Bucket="bucket")
        answer = refused(owner.put_bucket_cors, Bucket="bucket", CORSConfiguration={"CORSRules": [rule]})
        assert answer == (400, code)
        assert refused(owner.get_bucket_cors, Bucket="bucket")[0] == 404

    await in_thread(run, world)

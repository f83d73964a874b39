"""Who tries to get what was not given: each way that once led around a decision about access."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from storaged.objects.api import ObjectAccess
from storaged.objects.granted import GrantedObjects
from storaged.objects.records import BucketRecord
from tests.integration.s3_front import ACCESS_ALT, SECRET_ALT, World, signed
from tests.integration.test_s3_access import (
    ALL,
    DENIED,
    ITSELF,
    allow,
    clients,
    in_thread,
    legacy,
    policy,
    world,
)
from tests.integration.test_s3_front import refused

__all__ = ["legacy", "world"]


def deny(action: Any, resource: Any = ALL, principal: Any = "*", **more: Any) -> dict[str, Any]:
    return allow(action, resource, principal, **more) | {"Effect": "Deny"}


async def test_a_policy_about_tags_of_objects_locks_no_owner_out(world: World) -> None:
    """A bucket has no tags of an object: such a condition is decided without one."""

    def run(world: World) -> None:
        owner, _, _ = clients(world)
        owner.create_bucket(Bucket="bucket")
        owner.put_object(Bucket="bucket", Key="k", Body=b"data")
        secret = {"StringEquals": {"s3:ExistingObjectTag/class": "secret"}}
        owner.put_object(Bucket="bucket", Key="secret", Body=b"data", Tagging="class=secret")
        denying = policy(deny("s3:*", [ITSELF, ALL], Condition=secret))
        owner.put_bucket_policy(Bucket="bucket", Policy=denying)
        assert [one["Key"] for one in owner.list_objects_v2(Bucket="bucket")["Contents"]] == ["k", "secret"]
        assert owner.get_object(Bucket="bucket", Key="k")["Body"].read() == b"data"
        assert refused(owner.get_object, Bucket="bucket", Key="secret") == DENIED
        assert json.loads(owner.get_bucket_policy(Bucket="bucket")["Policy"]) == json.loads(denying)
        owner.delete_bucket_policy(Bucket="bucket")
        assert owner.get_object(Bucket="bucket", Key="secret")["Body"].read() == b"data"

    await in_thread(run, world)


async def test_a_bucket_list_lets_nobody_delete_a_version_for_good(legacy: World) -> None:
    def run(world: World) -> None:
        owner, other, nobody = clients(world)
        owner.create_bucket(Bucket="bucket", ACL="public-read-write")
        owner.put_bucket_versioning(Bucket="bucket", VersioningConfiguration={"Status": "Enabled"})
        version = owner.put_object(Bucket="bucket", Key="k", Body=b"data")["VersionId"]
        for client in (other, nobody):
            assert refused(client.delete_object, Bucket="bucket", Key="k", VersionId=version) == DENIED
            answer = client.delete_objects(Bucket="bucket", Delete={"Objects": [{"Key": "k", "VersionId": version}]})
            assert [error["Code"] for error in answer["Errors"]] == ["AccessDenied"]
        nobody.delete_object(Bucket="bucket", Key="k")
        assert owner.get_object(Bucket="bucket", Key="k", VersionId=version)["Body"].read() == b"data"
        owner.delete_object(Bucket="bucket", Key="k", VersionId=version)

    await in_thread(run, legacy)


async def test_who_may_not_set_lists_sets_none_while_it_writes(legacy: World) -> None:
    def run(world: World) -> None:
        owner, other, nobody = clients(world)
        owner.create_bucket(Bucket="bucket")
        owner.put_bucket_policy(Bucket="bucket", Policy=policy(allow("s3:PutObject"), deny("s3:PutObjectAcl")))
        other.put_object(Bucket="bucket", Key="k", Body=b"data")
        assert refused(other.put_object_acl, Bucket="bucket", Key="k", ACL="public-read") == DENIED
        assert refused(other.put_object, Bucket="bucket", Key="k", Body=b"data", ACL="public-read") == DENIED
        assert (
            refused(
                other.put_object,
                Bucket="bucket",
                Key="k",
                Body=b"d",
                GrantRead="uri=http://acs.amazonaws.com/groups/global/AllUsers",
            )
            == DENIED
        )
        assert refused(other.create_multipart_upload, Bucket="bucket", Key="k", ACL="public-read") == DENIED
        assert refused(nobody.get_object, Bucket="bucket", Key="k") == DENIED

    await in_thread(run, legacy)


async def test_a_denied_source_of_copies_is_denied_however_it_is_written(world: World) -> None:
    def run(world: World) -> None:
        owner, _, _ = clients(world)
        owner.create_bucket(Bucket="bucket")
        owner.put_object(Bucket="bucket", Key="secret/k", Body=b"data")
        owner.put_bucket_policy(
            Bucket="bucket",
            Policy=policy(deny("s3:PutObject", Condition={"StringLike": {"s3:x-amz-copy-source": "bucket/secret/*"}})),
        )

    await in_thread(run, world)
    for source in ("bucket/secret/k", "/bucket/secret/k", "bucket/%73ecret/k", "bucket%2Fsecret%2Fk"):
        headers = {"x-amz-copy-source": source, "Connection": "close"}
        answer = await world.raw(signed(world, "PUT", "/bucket/c", headers=headers))
        assert b"AccessDenied" in answer, source


async def test_tags_that_a_copy_does_not_get_fulfil_no_condition(world: World) -> None:
    def run(world: World) -> None:
        owner, _, _ = clients(world)
        owner.create_bucket(Bucket="bucket")
        owner.put_object(Bucket="bucket", Key="k", Body=b"data", Tagging="class=secret")
        owner.put_bucket_policy(
            Bucket="bucket",
            Policy=policy(deny("s3:PutObject", Condition={"StringNotEquals": {"s3:RequestObjectTag/class": "public"}})),
        )
        source = {"Bucket": "bucket", "Key": "k"}
        answer = refused(owner.copy_object, Bucket="bucket", Key="c", CopySource=source, Tagging="class=public")
        assert answer == DENIED
        owner.copy_object(
            Bucket="bucket", Key="c", CopySource=source, Tagging="class=public", TaggingDirective="REPLACE"
        )

    await in_thread(run, world)


async def test_a_change_decided_by_an_object_s_tags_is_for_that_object_alone(world: World) -> None:
    """The request waits with its body until another object has the key."""

    def before(world: World) -> None:
        owner, _, _ = clients(world)
        owner.create_bucket(Bucket="bucket")
        owner.put_object(Bucket="bucket", Key="k", Body=b"data", Tagging="class=public")
        public = {"StringEquals": {"s3:ExistingObjectTag/class": "secret"}}
        owner.put_bucket_policy(Bucket="bucket", Policy=policy(deny("s3:PutObjectTagging", Condition=public)))

    await in_thread(before, world)
    document = b"<Tagging><TagSet><Tag><Key>class</Key><Value>public</Value></Tag></TagSet></Tagging>"
    request = signed(world, "PUT", "/bucket/k?tagging", body=document, send_body=True)
    head, body = request[: -len(document)], request[-len(document) :]
    reader, writer = await asyncio.open_connection("127.0.0.1", world.port)
    writer.write(head.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n") + body[:1])
    await asyncio.sleep(0.5)

    def between(world: World) -> None:
        owner, _, _ = clients(world)
        owner.put_object(Bucket="bucket", Key="k", Body=b"secret", Tagging="class=secret")

    await in_thread(between, world)
    writer.write(body[1:])
    answer = await asyncio.wait_for(reader.read(), 30)
    print(answer)

    def after(world: World) -> None:
        owner, _, _ = clients(world)
        assert owner.get_object_tagging(Bucket="bucket", Key="k")["TagSet"] == [{"Key": "class", "Value": "secret"}]

    await in_thread(after, world)


_POLICY = b"""{
    "Version": "2012-10-17",
    "Id": "%s",
    "Statement": [{"Effect": "Deny", "Principal": %s, "Action": "s3:*", "Resource": "arn:aws:s3:::bucket/*"}]
}"""


@pytest.mark.parametrize(
    "document",
    [
        (_POLICY % (b"", b'"*"')).decode().encode("utf-16"),
        _POLICY % (b"\xed\xa0\x80", b'"*"'),
        _POLICY % (b"\\ud800", b'"*"'),
        _POLICY % (b"", b'{"AWS": "\\ud800"}'),
    ],
    ids=["utf-16", "surrogate", "escape", "principal"],
)
async def test_a_policy_that_is_no_text_is_refused(world: World, document: bytes) -> None:
    def run(world: World) -> None:
        clients(world)[0].create_bucket(Bucket="bucket")

    await in_thread(run, world)
    answer = await world.raw(signed(world, "PUT", "/bucket?policy", body=document, headers={"Connection": "close"}))
    assert b"MalformedPolicy" in answer


async def test_headers_of_pages_split_no_answer(world: World) -> None:
    rule = {"AllowedOrigins": ["http*"], "AllowedMethods": ["GET"], "AllowedHeaders": ["*"]}

    def run(world: World) -> None:
        owner, _, _ = clients(world)
        owner.create_bucket(Bucket="bucket")
        owner.put_bucket_cors(Bucket="bucket", CORSConfiguration={"CORSRules": [rule]})

    await in_thread(run, world)
    for text in (b"x-\xc3\xa9", b"x-\xff", b"a b", b"x\x0bSet-Cookie: a", b"x\rSet-Cookie: a", b"x\nSet-Cookie: a"):
        head = b" /bucket/k HTTP/1.1\r\nHost: x\r\nConnection: close\r\nAccess-Control-Request-Method: GET\r\n"
        for request in (
            b"OPTIONS" + head + b"Origin: http://a\r\nAccess-Control-Request-Headers: " + text,
            b"GET" + head + b"Origin: http://" + text,
        ):
            answer = await world.raw(request + b"\r\n\r\n")
            assert answer.startswith(b"HTTP/1.1 ")
            assert b" 500 " not in answer.partition(b"\r\n")[0]
            assert b"\nSet-Cookie" not in answer
            assert b"\rSet-Cookie" not in answer


async def test_a_policy_that_asks_for_a_value_of_many_kilobytes_denies(world: World) -> None:
    """Patterns of a policy against a User-Agent of 16 KB keep all other requests waiting."""

    def run(world: World) -> None:
        owner, _, _ = clients(world)
        owner.create_bucket(Bucket="bucket")
        owner.put_object(Bucket="bucket", Key="k", Body=b"data")
        owner.put_bucket_policy(
            Bucket="bucket", Policy=policy(deny("s3:GetObject", Condition={"StringLike": {"aws:UserAgent": "*?bad?*"}}))
        )

    await in_thread(run, world)
    for agent, status in (("a" * 4096, b"200"), ("a bad one", b"403"), ("a" * 4097, b"403")):
        headers = {"User-Agent": agent, "Connection": "close"}
        assert (await world.raw(signed(world, "GET", "/bucket/k", headers=headers))).split()[1] == status, agent[:9]


async def test_a_page_asks_for_no_more_headers_than_a_request_may_have(world: World) -> None:
    """Each name is compared with each of a rule's patterns, of which there may be two thousand."""
    rule = {"AllowedOrigins": ["*"], "AllowedMethods": ["GET"], "AllowedHeaders": ["x-amz-*", "*-Match", "range"]}

    def run(world: World) -> None:
        owner, _, _ = clients(world)
        owner.create_bucket(Bucket="bucket")
        owner.put_bucket_cors(Bucket="bucket", CORSConfiguration={"CORSRules": [rule]})

    async def ask(names: str) -> bytes:
        head = f"OPTIONS /bucket/k HTTP/1.1\r\nHost: x\r\nConnection: close\r\nOrigin: {rule['AllowedOrigins'][0]}\r\n"
        head += f"Access-Control-Request-Method: GET\r\nAccess-Control-Request-Headers: {names}\r\n\r\n"
        return (await world.raw(head.encode())).split()[1]

    await in_thread(run, world)
    assert await ask("Range, If-Match, x-amz-date") == b"200"
    assert await ask("Range, If-Matches") == b"403"
    assert await ask(",".join(f"x-amz-{number}" for number in range(128))) == b"200"
    assert await ask(",".join(f"x-amz-{number}" for number in range(129))) == b"400"


async def test_a_policy_about_tags_holds_when_they_change_between_the_decision_and_the_change(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sender who may change an object without the tag does not change the one that has it a moment later."""
    look = GrantedObjects.look

    async def late(self: GrantedObjects, bucket: BucketRecord, key: bytes, version: str) -> ObjectAccess | None:
        found = await look(self, bucket, key, version)
        await world.objects.set_tags(bucket, key, {"class": "kept"})
        return found

    def run(world: World) -> None:
        owner = world.client()
        other = world.client(ACCESS_ALT, SECRET_ALT, retries={"max_attempts": 0})
        owner.create_bucket(Bucket="bucket")
        owner.delete_public_access_block(Bucket="bucket")
        kept = {"StringEquals": {"s3:ExistingObjectTag/class": "kept"}}
        owner.put_bucket_policy(
            Bucket="bucket",
            Policy=policy(
                allow("s3:*", [ITSELF, ALL]),
                deny(["s3:PutObjectTagging", "s3:DeleteObjectTagging"], Condition=kept),
            ),
        )
        which = {"Bucket": "bucket", "Key": "k"}
        changes = (
            lambda: other.put_object_tagging(**which, Tagging={"TagSet": [{"Key": "class", "Value": "free"}]}),
            lambda: other.delete_object_tagging(**which),
            lambda: other.put_object(**which, Body=b"x", Tagging="class=free"),
            lambda: other.copy_object(
                **which, CopySource="bucket/other", TaggingDirective="REPLACE", Tagging="class=free"
            ),
        )
        owner.put_object(Bucket="bucket", Key="other", Body=b"x")
        for change in changes:
            owner.put_object(**which, Body=b"data")
            with monkeypatch.context() as patched:
                patched.setattr(GrantedObjects, "look", late)
                assert refused(change) == (503, "SlowDown")
            assert refused(change) == DENIED
            assert owner.get_object_tagging(**which)["TagSet"] == [{"Key": "class", "Value": "kept"}]

    await in_thread(run, world)


async def test_an_upload_is_its_initiator_s_and_the_bucket_owner_s(legacy: World) -> None:
    """https://docs.aws.amazon.com/AmazonS3/latest/userguide/mpuoverview.html#mpuAndPermissions"""
    third = await legacy.users.add("third", access_key="AKTHIRD", secret_key="secret-of-third")
    await legacy.users.lookup(third[0].access_key)

    def run(world: World) -> None:
        owner, other, nobody = clients(world)
        stranger = world.client("AKTHIRD", "secret-of-third")
        owner.create_bucket(Bucket="bucket", ACL="public-read-write")
        where = {"Bucket": "bucket", "Key": "k"}
        made = [other.create_multipart_upload(**where)["UploadId"] for _ in range(2)]
        for upload in made:
            for client in (stranger, nobody):
                for call in (client.list_parts, client.abort_multipart_upload):
                    assert refused(call, **where, UploadId=upload) == DENIED
        mine, ids = owner.list_multipart_uploads(Bucket="bucket")["Uploads"], other.list_buckets()["Owner"]["ID"]
        assert {found["Initiator"]["ID"] for found in mine} == {ids}
        for client, upload in ((other, made[0]), (owner, made[1])):
            assert client.list_parts(**where, UploadId=upload)["Initiator"]["ID"] == ids
            client.abort_multipart_upload(**where, UploadId=upload)
        assert refused(owner.list_parts, **where, UploadId=made[0]) == (404, "NoSuchUpload")
        assert refused(nobody.create_multipart_upload, **where) == DENIED
        # an owner who is enforced owns the object; who began the upload stays its initiator
        owner.put_bucket_acl(Bucket="bucket", ACL="private")
        owner.put_bucket_ownership_controls(
            Bucket="bucket", OwnershipControls={"Rules": [{"ObjectOwnership": "BucketOwnerEnforced"}]}
        )
        owner.delete_public_access_block(Bucket="bucket")
        owner.put_bucket_policy(Bucket="bucket", Policy=policy(allow("s3:PutObject")))
        upload = other.create_multipart_upload(**where)["UploadId"]
        assert refused(stranger.list_parts, **where, UploadId=upload) == DENIED
        found = other.list_parts(**where, UploadId=upload)
        assert (found["Initiator"]["ID"], found["Owner"]["ID"]) == (ids, owner.list_buckets()["Owner"]["ID"])
        owner.put_bucket_policy(Bucket="bucket", Policy=policy(allow("s3:PutObject"), deny("s3:AbortMultipartUpload")))
        assert refused(other.abort_multipart_upload, **where, UploadId=upload) == DENIED
        owner.delete_bucket_policy(Bucket="bucket")
        other.abort_multipart_upload(**where, UploadId=upload)

    await in_thread(run, legacy)


async def test_lists_name_the_owner_of_each_object(legacy: World) -> None:
    def run(world: World) -> None:
        owner, other, _ = clients(world)
        owner.create_bucket(Bucket="bucket", ACL="public-read-write")
        owner.put_object(Bucket="bucket", Key="a", Body=b"data")
        other.put_object(Bucket="bucket", Key="b", Body=b"data")
        ids = [client.list_buckets()["Owner"]["ID"] for client in (owner, other)]

        def listed() -> list[list[str]]:
            pages = (
                owner.list_objects(Bucket="bucket")["Contents"],
                owner.list_objects_v2(Bucket="bucket", FetchOwner=True)["Contents"],
                owner.list_object_versions(Bucket="bucket")["Versions"],
            )
            return [[row["Owner"]["ID"] for row in page] for page in pages]

        assert listed() == [ids] * 3
        assert "Owner" not in owner.list_objects_v2(Bucket="bucket")["Contents"][0]
        owner.put_bucket_acl(Bucket="bucket", ACL="private")
        owner.put_bucket_ownership_controls(
            Bucket="bucket", OwnershipControls={"Rules": [{"ObjectOwnership": "BucketOwnerEnforced"}]}
        )
        assert listed() == [[ids[0]] * 2] * 3

    await in_thread(run, legacy)

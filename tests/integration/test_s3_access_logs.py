"""Access logs of buckets: where they may go, what their lines say, and what bounds them.

Sources: https://docs.aws.amazon.com/AmazonS3/latest/userguide/ServerLogs.html and the pages below it.
"""

from __future__ import annotations

import asyncio
import re
import time
import urllib.request
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
import pytest_asyncio
from botocore import UNSIGNED  # type: ignore[import-untyped]

from storaged.errors import MalformedXML, ServiceUnavailable
from storaged.objects.identity import account_of
from storaged.objects.records import BucketRecord
from storaged.s3.context import AccessLogSettings
from storaged.s3.log_lines import Spoken, lines_of
from storaged.s3.ops.bucket_logging import parse
from storaged.s3.reply import Reply
from storaged.s3.request import BatchKey, Request, RequestDone
from tests.integration.s3_front import ACCESS_ALT, SECRET_ALT, World, s3_world, signed
from tests.integration.test_s3_access import allow, policy
from tests.integration.test_s3_front import refused

BAD_TARGET = (400, "InvalidTargetBucketForLogging")
LINE = re.compile(
    r"(?P<owner>\S+) (?P<bucket>\S+) \[(?P<time>[^]]*)\] (?P<ip>\S+) (?P<requester>\S+) (?P<id>\S+) (?P<operation>\S+)"
    r' (?P<key>\S+) "(?P<uri>[^"]*)" (?P<status>\d+) (?P<error>\S+) (?P<sent>\S+) (?P<size>\S+) (?P<total>\d+)'
    r' (?P<turn>\S+) "(?P<referer>[^"]*)" "(?P<agent>[^"]*)" (?P<version>\S+) (?P<host_id>\S+) (?P<signature>\S+)'
    r" (?P<cipher>\S+) (?P<auth>\S+) (?P<host>\S+) (?P<tls>\S+) (?P<point>\S+) (?P<acl>\S+)"
)


@pytest_asyncio.fixture
async def world() -> AsyncIterator[World]:
    async with s3_world() as world:
        yield world


async def run(work: Callable[[World], None], world: World) -> None:
    await asyncio.to_thread(work, world)


def grants(prefix: str = "log/", **condition: Any) -> str:
    service = {"Service": "logging.s3.amazonaws.com"}
    more = {"Condition": condition} if condition else {}
    return policy(allow("s3:PutObject", f"arn:aws:s3:::target/{prefix}*", service, **more))


def status(prefix: str = "log/", target: str = "target", **more: Any) -> dict[str, Any]:
    return {"LoggingEnabled": {"TargetBucket": target, "TargetPrefix": prefix, **more}}


def buckets(world: World) -> Any:
    owner = world.client()
    for name in ("bucket", "target"):
        owner.create_bucket(Bucket=name)
    owner.put_bucket_policy(Bucket="target", Policy=grants())
    return owner


def lines_in(owner: Any) -> list[dict[str, str]]:
    """All lines in the target, oldest first."""
    found = []
    for row in owner.list_objects_v2(Bucket="target").get("Contents", []):
        text = owner.get_object(Bucket="target", Key=row["Key"])["Body"].read().decode()
        for line in text.splitlines():
            match = LINE.fullmatch(line)
            assert match, line
            found.append(match.groupdict())
    return found


async def test_a_target_must_be_the_owner_s_and_let_the_service_write(world: World) -> None:
    def work(world: World) -> None:
        owner, other = buckets(world), world.client(ACCESS_ALT, SECRET_ALT)
        other.create_bucket(Bucket="others")

        def put(wanted: dict[str, Any], bucket: str = "bucket") -> tuple[int, str]:
            return refused(owner.put_bucket_logging, Bucket=bucket, BucketLoggingStatus=wanted)

        account = account_of(owner.list_buckets()["Owner"]["ID"])
        assert put(status(target="missing")) == put(status(target="NO")) == put(status(target="others")) == BAD_TARGET
        assert put(status("elsewhere/")) == BAD_TARGET, "the policy is for another prefix"
        for condition in (
            {"ArnLike": {"aws:SourceArn": "arn:aws:s3:::another"}},
            {"StringEquals": {"aws:SourceAccount": "123456789012"}},
        ):
            owner.put_bucket_policy(Bucket="target", Policy=grants(**condition))
            assert put(status()) == BAD_TARGET
        owner.delete_bucket_policy(Bucket="target")
        assert put(status()) == BAD_TARGET
        assert "LoggingEnabled" not in owner.get_bucket_logging(Bucket="bucket")
        right = {
            "ArnLike": {"aws:SourceArn": "arn:aws:s3:::buck*"},
            "StringEquals": {"aws:SourceAccount": account},
        }
        owner.put_bucket_policy(Bucket="target", Policy=grants(**right))
        for wanted in (
            status(),
            status(TargetObjectKeyFormat={"SimplePrefix": {}}),
            status(TargetObjectKeyFormat={"PartitionedPrefix": {"PartitionDateSource": "DeliveryTime"}}),
        ):
            owner.put_bucket_logging(Bucket="bucket", BucketLoggingStatus=wanted)
            assert owner.get_bucket_logging(Bucket="bucket")["LoggingEnabled"] == wanted["LoggingEnabled"]
        bad = status(TargetObjectKeyFormat={"PartitionedPrefix": {"PartitionDateSource": "kaboom"}})
        assert put(bad) == (400, "MalformedXML")
        assert put(status("x" * 801)) == (400, "InvalidArgument")
        grant = {"Grantee": {"Type": "Group", "URI": "http://acs.amazonaws.com/groups/global/AllUsers"}}
        assert put(status(TargetGrants=[grant | {"Permission": "READ"}])) == (501, "NotImplemented")
        assert refused(other.put_bucket_logging, Bucket="bucket", BucketLoggingStatus={}) == (403, "AccessDenied")
        assert owner.get_bucket_logging(Bucket="bucket")["LoggingEnabled"] == wanted["LoggingEnabled"]
        owner.put_bucket_logging(Bucket="bucket", BucketLoggingStatus={})
        assert "LoggingEnabled" not in owner.get_bucket_logging(Bucket="bucket")

    await run(work, world)


async def test_where_lists_count_the_group_of_log_delivery_may_be_in_them() -> None:
    def work(world: World) -> None:
        owner = world.client()
        for name in ("bucket", "target"):
            owner.create_bucket(Bucket=name)
        assert refused(owner.put_bucket_logging, Bucket="bucket", BucketLoggingStatus=status()) == BAD_TARGET
        owner.put_bucket_acl(Bucket="target", ACL="log-delivery-write")
        owner.put_bucket_logging(Bucket="bucket", BucketLoggingStatus=status())
        owner.put_object(Bucket="bucket", Key="k", Body=b"x")

    def check(world: World) -> None:
        assert [line["operation"] for line in lines_in(world.client())] == ["REST.PUT.OBJECT"]

    async with s3_world(legacy=True) as world:
        await run(work, world)
        await world.app.access_logs.deliver()
        await run(check, world)


async def test_a_rename_has_a_line_for_the_key_that_it_removes(world: World) -> None:
    def ask(world: World) -> None:
        owner = buckets(world)
        owner.put_bucket_logging(Bucket="bucket", BucketLoggingStatus=status())
        owner.put_object(Bucket="bucket", Key="a b", Body=b"hello")
        owner.rename_object(Bucket="bucket", Key="new", RenameSource="a%20b")
        assert refused(owner.rename_object, Bucket="bucket", Key="new", RenameSource="a") == (404, "NoSuchKey")

    await run(ask, world)
    await world.app.access_logs.deliver()

    def read(world: World) -> None:
        lines = lines_in(world.client())[1:]
        assert [(line["operation"], line["key"], line["status"]) for line in lines] == [
            ("REST.PUT.RENAME_OBJECT", "new", "200"),
            ("BATCH.DELETE.OBJECT", "a%20b", "204"),
            ("REST.PUT.RENAME_OBJECT", "new", "404"),
        ]

    await run(read, world)


async def test_lines_say_who_asked_for_what_and_what_came_of_it(world: World) -> None:
    def ask(world: World) -> None:
        owner, nobody = buckets(world), world.client(signature_version=UNSIGNED)
        owner.put_bucket_logging(Bucket="bucket", BucketLoggingStatus=status())
        owner.put_object(Bucket="bucket", Key="a b/ü", Body=b"hello")
        owner.get_object(Bucket="bucket", Key="a b/ü", Range="bytes=1-2")["Body"].read()
        owner.head_object(Bucket="bucket", Key="a b/ü")
        owner.copy_object(Bucket="bucket", Key="copy", CopySource={"Bucket": "bucket", "Key": "a b/ü"})
        assert refused(nobody.get_object, Bucket="bucket", Key="k") == (403, "AccessDenied")
        assert refused(owner.get_object, Bucket="bucket", Key="k") == (404, "NoSuchKey")
        owner.delete_objects(Bucket="bucket", Delete={"Objects": [{"Key": "copy"}]})
        upload = owner.create_multipart_upload(Bucket="bucket", Key="u")["UploadId"]
        owner.upload_part(Bucket="bucket", Key="u", UploadId=upload, PartNumber=1, Body=b"x")
        owner.abort_multipart_upload(Bucket="bucket", Key="u", UploadId=upload)
        owner.list_objects_v2(Bucket="bucket")
        owner.get_object_tagging(Bucket="bucket", Key="a b/ü")
        owner.get_bucket_versioning(Bucket="bucket")

    await run(ask, world)
    await world.app.access_logs.deliver()

    def read(world: World) -> None:
        owner = world.client()
        lines = lines_in(owner)
        assert [line["key"] for line in lines if line["operation"].startswith("BATCH")] == ["copy"]
        assert [(line["operation"], line["status"]) for line in lines] == [
            ("REST.PUT.OBJECT", "200"),
            ("REST.GET.OBJECT", "206"),
            ("REST.HEAD.OBJECT", "200"),
            ("REST.COPY.OBJECT", "200"),
            ("REST.GET.OBJECT", "403"),
            ("REST.GET.OBJECT", "404"),
            ("REST.POST.MULTI_OBJECT_DELETE", "200"),
            ("BATCH.DELETE.OBJECT", "204"),
            ("REST.POST.UPLOADS", "200"),
            ("REST.PUT.PART", "200"),
            ("REST.DELETE.UPLOAD", "204"),
            ("REST.GET.BUCKET", "200"),
            ("REST.GET.OBJECT_TAGGING", "200"),
            ("REST.GET.VERSIONING", "200"),
        ]
        me = owner.list_buckets()["Owner"]["ID"]
        put, get, head = lines[:3]
        assert (put["owner"], put["bucket"], put["requester"], put["key"]) == (me, "bucket", me, "a%20b/%C3%BC")
        assert (put["uri"], put["size"]) == ("PUT /bucket/a%20b/%C3%BC HTTP/1.1", "5")
        assert (put["signature"], put["auth"], put["tls"]) == ("SigV4", "AuthHeader", "-")
        assert (get["sent"], get["size"], head["sent"], head["size"]) == ("2", "5", "-", "5")
        assert re.fullmatch(r"\d\d/[A-Z][a-z]{2}/20\d\d:\d\d:\d\d:\d\d \+0000", put["time"])
        assert (lines[4]["requester"], lines[4]["error"], lines[4]["auth"]) == ("-", "AccessDenied", "-")
        keys = [row["Key"] for row in owner.list_objects_v2(Bucket="target")["Contents"]]
        assert len(keys) <= 2, "one an object, or two at midnight"
        assert all(re.fullmatch(r"log/20\d\d-\d\d-\d\d-\d\d-\d\d-\d\d-[0-9A-F]{16}", key) for key in keys)
        assert owner.head_object(Bucket="target", Key=keys[0])["ContentType"] == "text/plain"

    await run(read, world)


async def test_what_a_client_sends_cannot_break_a_line_or_be_a_secret(world: World) -> None:
    def ask(world: World) -> None:
        owner = buckets(world)
        owner.put_bucket_logging(Bucket="bucket", BucketLoggingStatus=status())

        def add(request: Any, **_: Any) -> None:
            request.headers["Referer"] = 'x" 200 \\'
            request.headers["User-Agent"] = "ünder"

        owner.meta.events.register("before-sign.s3.HeadBucket", add)
        owner.head_bucket(Bucket="bucket")
        url = owner.generate_presigned_url("get_object", Params={"Bucket": "bucket", "Key": 'a"b\nc'})
        with pytest.raises(OSError, match="404"):
            urllib.request.urlopen(url, timeout=60)

    await run(ask, world)
    said = {"x-amz-decoded-content-length": '9 1 1 "forged" "agent"', "Connection": "close"}
    assert (await world.raw(signed(world, "PUT", "/bucket/k", body=b"data", headers=said))).startswith(b"HTTP/1.1 200")
    await world.app.access_logs.deliver()

    def read(world: World) -> None:
        head, get, put = lines_in(world.client())
        assert (put["size"], put["referer"]) == ("4", "-"), "the body is not in aws-chunked"
        assert head["referer"] == "x%22 200 %5C"
        assert get["key"] == "a%22b%0Ac"
        assert "X-Amz-Signature=-" in get["uri"]
        assert get["auth"] == "QueryString"

    await run(read, world)


async def test_partitioned_keys_name_account_region_bucket_and_day(world: World) -> None:
    partitioned = {"PartitionedPrefix": {"PartitionDateSource": "EventTime"}}

    def ask(world: World) -> None:
        owner = buckets(world)
        owner.put_bucket_logging(Bucket="bucket", BucketLoggingStatus=status(TargetObjectKeyFormat=partitioned))
        owner.head_bucket(Bucket="bucket")

    await run(ask, world)
    await world.app.access_logs.deliver()

    def read(world: World) -> None:
        owner = world.client()
        account = account_of(owner.list_buckets()["Owner"]["ID"])
        key = owner.list_objects_v2(Bucket="target")["Contents"][0]["Key"]
        place = rf"log/{account}/eu-fr-1/bucket/(20\d\d)/(\d\d)/(\d\d)/\1-\2-\3-00-00-00-[0-9A-F]{{16}}"
        assert re.fullmatch(place, key), key

    await run(read, world)


async def test_lines_without_room_are_dropped_and_counted() -> None:
    async with s3_world(access_logs=AccessLogSettings(3600, 8 * 1024)) as world:
        logs = world.app.access_logs

        def ask(world: World) -> None:
            owner = buckets(world)
            owner.put_bucket_logging(Bucket="bucket", BucketLoggingStatus=status())
            for _ in range(20):
                owner.head_bucket(Bucket="bucket")

        stalled = asyncio.Event()
        logs.deliver = stalled.wait  # type: ignore[method-assign,assignment] - the task that would deliver early
        await run(ask, world)
        del logs.deliver  # type: ignore[method-assign]
        assert logs.counts.dropped > 0
        assert 0 < logs.held_bytes <= 2 * 1024, "a quarter for one bucket"
        await logs.deliver()
        assert logs.held_bytes == 0
        assert logs.counts.delivered + logs.counts.dropped == logs.counts.lines == 20


async def test_lines_wait_for_a_target_that_is_away_and_go_where_it_refuses(world: World) -> None:
    logs = world.app.access_logs

    def ask(world: World) -> None:
        owner = buckets(world)
        owner.put_bucket_logging(Bucket="bucket", BucketLoggingStatus=status())
        owner.head_bucket(Bucket="bucket")

    await run(ask, world)
    put = world.objects.put

    async def away(*what: Any, **how: Any) -> Any:
        raise ServiceUnavailable

    world.objects.put = away  # type: ignore[assignment]
    await logs.deliver()
    assert (logs.counts.delivered, logs.counts.refused) == (0, 0)
    assert logs.held_bytes > 0
    world.objects.put = put
    await run(lambda world: world.client().head_bucket(Bucket="bucket"), world)
    await logs.deliver()
    assert (logs.counts.delivered, logs.held_bytes) == (2, 0)
    await run(lambda world: world.client().head_bucket(Bucket="bucket"), world)
    await run(lambda world: world.client().delete_bucket_policy(Bucket="target"), world)
    await logs.deliver()
    assert (logs.counts.refused, logs.held_bytes) == (1, 0)
    assert len(await world.stored("target")) == 1


@pytest.mark.parametrize(
    "document",
    [
        "<BucketLoggingStatus><Other/></BucketLoggingStatus>",
        "<BucketLoggingStatus><LoggingEnabled/></BucketLoggingStatus>",
        "<BucketLoggingStatus><LoggingEnabled><TargetBucket>target</TargetBucket></LoggingEnabled>"
        "</BucketLoggingStatus>",
        "<BucketLoggingStatus><LoggingEnabled><TargetBucket>target</TargetBucket><TargetPrefix/><TargetPrefix/>"
        "</LoggingEnabled></BucketLoggingStatus>",
        "<BucketLoggingStatus><LoggingEnabled><TargetBucket>target</TargetBucket><TargetPrefix/><Surprise/>"
        "</LoggingEnabled></BucketLoggingStatus>",
        "<BucketLoggingStatus><LoggingEnabled><TargetBucket>target</TargetBucket><TargetPrefix/>"
        "<TargetObjectKeyFormat/>"
        "</LoggingEnabled></BucketLoggingStatus>",
    ],
)
def test_a_bad_logging_document_is_refused(document: str) -> None:
    with pytest.raises(MalformedXML):
        parse(document.encode())


def test_what_the_lines_of_a_request_have_in_common_is_made_once() -> None:
    """A thousand keys and long headers would keep all other requests waiting for a second and more."""
    headers = {"user-agent": '"' * 10_000, "referer": '"' * 10_000}
    batch = [BatchKey(b"k%d" % number, "", 204) for number in range(1000)]
    request = Request(
        "1", "POST", b"/bucket?delete", "::1", False, headers=headers, operation="DeleteObjects", batch=batch
    )
    bucket = BucketRecord("bucket", bytes(16), "a" * 64, 1, "active", 16, "eu")
    began_s = time.thread_time()
    lines = list(lines_of(RequestDone(request, Reply(), 0, 0, 0.1, True), bucket, 0, Spoken("x")))
    assert time.thread_time() - began_s < 0.3
    assert len(lines) == 1001
    assert [line.split('"')[0].split()[-1] for line in lines] == ["-", *(f"k{number}" for number in range(1000))]
    assert all(line.endswith(lines[0][-20:]) for line in lines)

"""Lifecycle over HTTP, as boto3 sees it: configurations, and what answers say about expiration."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import pytest_asyncio
import urllib3

from tests.integration.s3_front import World, s3_world
from tests.integration.test_s3_front import refused

RULE = {"ID": "one day", "Status": "Enabled", "Filter": {"Prefix": "tmp/"}, "Expiration": {"Days": 1}}


@pytest_asyncio.fixture
async def world() -> AsyncIterator[World]:
    async with s3_world() as world:
        yield world


def set_rules(client: Any, *rules: dict[str, Any], **more: Any) -> Any:
    return client.put_bucket_lifecycle_configuration(
        Bucket="bucket", LifecycleConfiguration={"Rules": list(rules)}, **more
    )


async def test_a_configuration_is_stored_returned_and_removed(world: World) -> None:
    def play() -> None:
        client = world.client()
        client.create_bucket(Bucket="bucket")
        get = client.get_bucket_lifecycle_configuration
        none = (404, "NoSuchLifecycleConfiguration")
        assert refused(get, Bucket="bucket") == none
        client.delete_bucket_lifecycle(Bucket="bucket")
        rules = [
            RULE,
            {
                "ID": "all",
                "Status": "Disabled",
                "Filter": {"And": {"Prefix": "a", "Tags": [{"Key": "k", "Value": "v"}], "ObjectSizeGreaterThan": 5}},
                "Expiration": {"Date": datetime(2035, 1, 1, tzinfo=UTC)},
                "NoncurrentVersionExpiration": {"NoncurrentDays": 3, "NewerNoncurrentVersions": 2},
            },
            {
                "ID": "uploads",
                "Status": "Enabled",
                "Filter": {},
                "AbortIncompleteMultipartUpload": {"DaysAfterInitiation": 7},
                "Expiration": {"ExpiredObjectDeleteMarker": True},
            },
        ]
        set_rules(client, *rules)
        assert get(Bucket="bucket")["Rules"] == rules
        assert get(Bucket="bucket")["TransitionDefaultMinimumObjectSize"] == "all_storage_classes_128K"
        set_rules(client, RULE, TransitionDefaultMinimumObjectSize="varies_by_storage_class")
        assert get(Bucket="bucket")["TransitionDefaultMinimumObjectSize"] == "varies_by_storage_class"
        wrong = {**RULE, "Transitions": [{"Days": 30, "StorageClass": "GLACIER"}]}
        assert refused(lambda: set_rules(client, wrong)) == (400, "InvalidStorageClass")
        assert get(Bucket="bucket")["Rules"] == [RULE]
        client.delete_bucket_lifecycle(Bucket="bucket")
        assert refused(get, Bucket="bucket") == none

    await asyncio.to_thread(play)


@pytest.mark.parametrize("legacy", [False, True])
async def test_a_filter_has_one_condition_or_and(legacy: bool) -> None:
    """https://docs.aws.amazon.com/AmazonS3/latest/API/API_LifecycleRuleFilter.html. Ceph's suite wants otherwise."""

    def play(client: Any) -> None:
        client.create_bucket(Bucket="bucket")
        two = {**RULE, "Filter": {"Prefix": "a", "Tag": {"Key": "k", "Value": "v"}}}
        if legacy:
            set_rules(client, two)
        else:
            assert refused(lambda: set_rules(client, two)) == (400, "MalformedXML")

    async with s3_world(legacy=legacy) as world:
        await asyncio.to_thread(play, world.client())


def expiry_of(answer: dict[str, Any]) -> str:
    return str(answer["ResponseMetadata"]["HTTPHeaders"].get("x-amz-expiration", ""))


async def test_answers_name_the_day_and_the_rule(world: World) -> None:
    def play() -> None:
        client = world.client()
        client.create_bucket(Bucket="bucket")
        client.put_object(Bucket="bucket", Key="tmp/before", Body=b"x")
        tagged = {**RULE, "ID": "tagged", "Filter": {"Tag": {"Key": "k", "Value": "v"}}, "Expiration": {"Days": 9}}
        set_rules(client, RULE, tagged)
        midnight = datetime.now(UTC).replace(hour=0, minute=0, second=0, microsecond=0)
        days = [f"{midnight + timedelta(days=after):%a, %d %b %Y} 00:00:00 GMT" for after in (2, 3)]
        wanted = [f'expiry-date="{day}", rule-id="one%20day"' for day in days]  # midnight may pass meanwhile
        assert expiry_of(client.put_object(Bucket="bucket", Key="tmp/a", Body=b"x")) in wanted
        assert expiry_of(client.put_object(Bucket="bucket", Key="tmp/b", Body=b"x" * 100_000)) in wanted
        assert expiry_of(client.put_object(Bucket="bucket", Key="other", Body=b"x")) == ""
        for key in ("tmp/before", "tmp/a", "tmp/b"):
            assert expiry_of(client.head_object(Bucket="bucket", Key=key)) in wanted
            assert expiry_of(client.get_object(Bucket="bucket", Key=key)) in wanted
        assert expiry_of(client.get_object(Bucket="bucket", Key="tmp/b", Range="bytes=0-9")) in wanted
        assert expiry_of(client.head_object(Bucket="bucket", Key="other")) == ""
        put = client.put_object(Bucket="bucket", Key="t", Body=b"x", Tagging="k=v")
        assert 'rule-id="tagged"' in expiry_of(put)
        assert 'rule-id="tagged"' in expiry_of(client.head_object(Bucket="bucket", Key="t"))
        client.delete_object_tagging(Bucket="bucket", Key="t")
        assert expiry_of(client.head_object(Bucket="bucket", Key="t")) == ""
        copied = client.copy_object(Bucket="bucket", Key="tmp/c", CopySource="bucket/other")
        assert expiry_of(copied) in wanted
        form = client.generate_presigned_post("bucket", "tmp/form")
        fields = {**form["fields"], "file": ("name", b"x")}
        posted = urllib3.PoolManager().request("POST", form["url"], fields=fields)
        assert posted.headers["x-amz-expiration"] in wanted
        client.delete_bucket_lifecycle(Bucket="bucket")
        assert expiry_of(client.head_object(Bucket="bucket", Key="tmp/a")) == ""

    await asyncio.to_thread(play)


async def test_answers_about_uploads_name_the_day_of_the_abort(world: World) -> None:
    def play() -> None:
        client = world.client()
        client.create_bucket(Bucket="bucket")
        abort = {"DaysAfterInitiation": 7}
        rule = {"ID": "u", "Status": "Enabled", "Filter": {"Prefix": "u"}, "AbortIncompleteMultipartUpload": abort}
        set_rules(client, rule, {**RULE, "Filter": {}})
        upload = client.create_multipart_upload(Bucket="bucket", Key="u")
        assert upload["AbortRuleId"] == "u"
        now = datetime.now(UTC)
        assert now + timedelta(days=7) < upload["AbortDate"] <= now + timedelta(days=8)
        named = {"Bucket": "bucket", "Key": "u", "UploadId": upload["UploadId"]}
        assert client.list_parts(**named)["AbortDate"] == upload["AbortDate"]
        assert "AbortDate" not in client.create_multipart_upload(Bucket="bucket", Key="k")
        part = client.upload_part(**named, PartNumber=1, Body=b"x")
        parts = {"Parts": [{"PartNumber": 1, "ETag": part["ETag"]}]}
        done = client.complete_multipart_upload(**named, MultipartUpload=parts)
        assert 'rule-id="one%20day"' in done["Expiration"]

    await asyncio.to_thread(play)


async def test_a_day_beyond_the_calendar_is_its_last_one(world: World) -> None:
    def play() -> None:
        client = world.client()
        client.create_bucket(Bucket="bucket")
        days = 2**31 - 1
        abort = {"AbortIncompleteMultipartUpload": {"DaysAfterInitiation": days}}
        set_rules(client, {**RULE, "Filter": {}, "Expiration": {"Days": days}, **abort})
        assert "Fri, 31 Dec 9999" in expiry_of(client.put_object(Bucket="bucket", Key="k", Body=b"x"))
        assert "Fri, 31 Dec 9999" in expiry_of(client.get_object(Bucket="bucket", Key="k"))
        assert client.create_multipart_upload(Bucket="bucket", Key="k")["AbortDate"].year == 9999

    await asyncio.to_thread(play)

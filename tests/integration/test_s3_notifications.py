"""Notification configurations over HTTP, events of real requests, and the webhook.

Sources: https://docs.aws.amazon.com/AmazonS3/latest/userguide/EventNotifications.html and the pages below it.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from aiohttp import web

from storaged.config import NotificationSection
from storaged.errors import ConfigInvalid, InvalidArgument, MalformedXML, NotImplemented, S3Error
from storaged.node.destinations import ConfiguredDestinations
from storaged.objects.destinations import DeliveryFailed
from storaged.objects.event_delivery import EventDelivery
from storaged.s3.ops.notification import parse
from tests.integration.s3_front import ACCESS_ALT, SECRET_ALT, World, s3_world
from tests.integration.test_s3_front import refused

HOOK = "arn:storaged:sqs::hook:webhook"
EVENTS = ["s3:ObjectCreated:*", "s3:ObjectRemoved:*"]


class Receiver:
    """A webhook on loopback."""

    def __init__(self) -> None:
        self.got: list[tuple[str, dict[str, Any]]] = []
        """(Authorization, document)."""
        self.statuses: list[int] = []
        """Of the next answers; then 200."""
        self.url = ""

    async def answer(self, request: web.Request) -> web.Response:
        status = self.statuses.pop(0) if self.statuses else 200
        if status == 302:
            return web.Response(status=302, headers={"Location": self.url})
        document = await request.json()
        if status == 200:
            self.got.append((request.headers.get("Authorization", ""), document))
        return web.Response(status=status)

    @property
    def records(self) -> list[dict[str, Any]]:
        return [record for _, document in self.got for record in document.get("Records", ())]


@pytest_asyncio.fixture
async def receiver() -> AsyncIterator[Receiver]:
    found = Receiver()
    app = web.Application()
    app.router.add_post("/events", found.answer)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    port = runner.addresses[0][1]
    found.url = f"http://127.0.0.1:{port}/events"
    yield found
    await runner.cleanup()


@pytest_asyncio.fixture
async def destinations(receiver: Receiver, tmp_path: Path) -> AsyncIterator[ConfiguredDestinations]:
    (tmp_path / "secret").write_text("the secret\n")
    section = NotificationSection("hook", receiver.url, str(tmp_path / "secret"), timeout_s=10)
    found = ConfiguredDestinations([section])
    yield found
    await found.close()


@pytest_asyncio.fixture
async def world(destinations: ConfiguredDestinations) -> AsyncIterator[World]:
    async with s3_world(destinations=destinations) as world:
        yield world


def queue(events: list[str], arn: str = HOOK, *, prefix: str = "", suffix: str = "", **more: Any) -> dict[str, Any]:
    rules = [{"Name": name, "Value": text} for name, text in (("Prefix", prefix), ("Suffix", suffix)) if text]
    filters = {"Filter": {"Key": {"FilterRules": rules}}} if rules else {}
    return {"QueueArn": arn, "Events": events, **filters, **more}


def wanted(*queues: dict[str, Any]) -> dict[str, Any]:
    return {"QueueConfigurations": list(queues)}


async def run(work: Callable[[World], None], world: World) -> None:
    await asyncio.to_thread(work, world)


async def swept(world: World, destinations: ConfiguredDestinations) -> int:
    return await EventDelivery(world.objects.plane, world.buckets, destinations, "eu-fr-1").sweep(fresh_ms=0)


async def test_requests_become_events_at_the_webhook(
    world: World, receiver: Receiver, destinations: ConfiguredDestinations
) -> None:
    def work(world: World) -> None:
        owner = world.client()
        owner.create_bucket(Bucket="bucket")
        owner.put_bucket_notification_configuration(
            Bucket="bucket", NotificationConfiguration=wanted(queue(EVENTS, Id="all"))
        )
        owner.put_object(Bucket="bucket", Key="a b/ü", Body=b"hello")
        owner.copy_object(Bucket="bucket", Key="copy", CopySource={"Bucket": "bucket", "Key": "a b/ü"})
        owner.delete_object(Bucket="bucket", Key="a b/ü")
        owner.delete_objects(Bucket="bucket", Delete={"Objects": [{"Key": "copy"}, {"Key": "never was"}]})
        upload = owner.create_multipart_upload(Bucket="bucket", Key="u")["UploadId"]
        part = owner.upload_part(Bucket="bucket", Key="u", UploadId=upload, PartNumber=1, Body=b"x")
        parts = {"Parts": [{"PartNumber": 1, "ETag": part["ETag"]}]}
        owner.complete_multipart_upload(Bucket="bucket", Key="u", UploadId=upload, MultipartUpload=parts)

    await run(work, world)
    assert [document.get("Event") for _, document in receiver.got] == ["s3:TestEvent"]
    assert await swept(world, destinations) == 0
    assert {secret for secret, _ in receiver.got} == {"Bearer the secret"}
    found = sorted((record["eventName"], record["s3"]["object"]["key"]) for record in receiver.records)
    assert found == [
        ("ObjectCreated:CompleteMultipartUpload", "u"),
        ("ObjectCreated:Copy", "copy"),
        ("ObjectCreated:Put", "a+b%2F%C3%BC"),
        ("ObjectRemoved:Delete", "a+b%2F%C3%BC"),
        ("ObjectRemoved:Delete", "copy"),
    ]
    put = next(record for record in receiver.records if record["eventName"] == "ObjectCreated:Put")
    owner = (await world.buckets.get("bucket")).owner
    assert put["eventSource"] == "aws:s3"
    assert put["awsRegion"] == "eu-fr-1"
    assert put["userIdentity"] == {"principalId": owner}
    assert put["s3"]["bucket"] == {
        "name": "bucket",
        "ownerIdentity": {"principalId": owner},
        "arn": "arn:aws:s3:::bucket",
    }
    assert put["s3"]["object"]["size"] == 5
    assert put["s3"]["object"]["eTag"] == "5d41402abc4b2a76b9719d911017c592"


async def test_a_rename_is_a_copy_and_a_removal(
    world: World, receiver: Receiver, destinations: ConfiguredDestinations
) -> None:
    def work(world: World) -> None:
        owner = world.client()
        owner.create_bucket(Bucket="bucket")
        owner.put_object(Bucket="bucket", Key="a", Body=b"hello")
        owner.put_object(Bucket="bucket", Key="coded", Body=b"x" * 300_000)
        owner.put_bucket_notification_configuration(
            Bucket="bucket", NotificationConfiguration=wanted(queue(EVENTS, Id="all"))
        )
        for key in ("a", "coded"):
            owner.rename_object(Bucket="bucket", Key=f"new-{key}", RenameSource=key)

    await run(work, world)
    assert await swept(world, destinations) == 0
    found = sorted((record["eventName"], record["s3"]["object"]["key"]) for record in receiver.records)
    created, removed = "ObjectCreated:Copy", "ObjectRemoved:Delete"
    assert found == [(created, "new-a"), (created, "new-coded"), (removed, "a"), (removed, "coded")]
    sizes = {record["s3"]["object"].get("size") for record in receiver.records if record["eventName"] == created}
    assert sizes == {5, 300_000}


async def test_a_webhook_that_fails_gets_the_event_again_and_redirections_are_not_followed(
    world: World, receiver: Receiver, destinations: ConfiguredDestinations
) -> None:
    def work(world: World) -> None:
        owner = world.client()
        owner.create_bucket(Bucket="bucket")
        owner.put_bucket_notification_configuration(
            Bucket="bucket", NotificationConfiguration=wanted(queue(EVENTS)), SkipDestinationValidation=True
        )
        owner.put_object(Bucket="bucket", Key="k", Body=b"x")

    await run(work, world)
    receiver.statuses = [500, 302, 503]
    assert await swept(world, destinations) == 1
    assert receiver.got == []
    assert await swept(world, destinations) == 0
    assert len(receiver.records) == 1


async def test_a_configuration_returns_as_it_was_put_and_goes(world: World) -> None:
    def work(world: World) -> None:
        owner, other = world.client(), world.client(ACCESS_ALT, SECRET_ALT)
        owner.create_bucket(Bucket="bucket")

        def found() -> dict[str, Any]:
            answer = owner.get_bucket_notification_configuration(Bucket="bucket")
            return {name: value for name, value in answer.items() if name != "ResponseMetadata"}

        assert found() == {}
        two = wanted(
            queue(["s3:ObjectCreated:Put"], Id="one", prefix="in/", suffix=".png"),
            queue(["s3:ObjectCreated:Put"], Id="two", prefix="out/"),
        )
        put = owner.put_bucket_notification_configuration
        put(Bucket="bucket", NotificationConfiguration=two)
        assert found() == two
        unknown = wanted(queue(EVENTS, "arn:aws:sqs:eu-fr-1:123456789012:queue"))
        assert refused(put, Bucket="bucket", NotificationConfiguration=unknown) == (400, "InvalidArgument")
        hostile = wanted(queue(EVENTS, "http://169.254.169.254/latest"))
        assert refused(put, Bucket="bucket", NotificationConfiguration=hostile) == (400, "InvalidArgument")
        forbidden = refused(other.put_bucket_notification_configuration, Bucket="bucket", NotificationConfiguration=two)
        assert forbidden == (403, "AccessDenied")
        assert found() == two
        put(Bucket="bucket", NotificationConfiguration={})
        assert found() == {}

    await run(work, world)


async def test_a_destination_that_does_not_take_the_test_event_is_refused(world: World, receiver: Receiver) -> None:
    receiver.statuses = [500, 500, 500]

    def work(world: World) -> None:
        owner = world.client()
        owner.create_bucket(Bucket="bucket")
        put = owner.put_bucket_notification_configuration
        answer = refused(put, Bucket="bucket", NotificationConfiguration=wanted(queue(EVENTS)))
        assert answer == (400, "InvalidArgument")

    await run(work, world)


async def test_a_bucket_with_events_of_deleted_keys_goes_when_they_are_delivered(
    world: World, destinations: ConfiguredDestinations
) -> None:
    def work(world: World) -> None:
        owner = world.client()
        owner.create_bucket(Bucket="bucket")
        owner.put_bucket_notification_configuration(Bucket="bucket", NotificationConfiguration=wanted(queue(EVENTS)))
        owner.put_object(Bucket="bucket", Key="k", Body=b"x")
        assert refused(owner.delete_bucket, Bucket="bucket") == (409, "BucketNotEmpty")
        owner.delete_object(Bucket="bucket", Key="k")
        assert refused(owner.delete_bucket, Bucket="bucket") == (503, "SlowDown")

    await run(work, world)
    assert await swept(world, destinations) == 0
    await run(lambda world: world.client().delete_bucket(Bucket="bucket"), world)


def document(inner: str) -> bytes:
    return f"<NotificationConfiguration>{inner}</NotificationConfiguration>".encode()


def one(inner: str = "", event: str = "s3:ObjectCreated:*", target: str = f"<Queue>{HOOK}</Queue>") -> str:
    return f"<QueueConfiguration>{inner}{target}<Event>{event}</Event></QueueConfiguration>"


def key_filter(*rules: tuple[str, str]) -> str:
    found = "".join(f"<FilterRule><Name>{name}</Name><Value>{text}</Value></FilterRule>" for name, text in rules)
    return f"<Filter><S3Key>{found}</S3Key></Filter>"


@pytest.mark.parametrize(
    ("inner", "error"),
    [
        ("<Surprise/>", MalformedXML),
        ("<QueueConfiguration/>", MalformedXML),
        ("<EventBridgeConfiguration/>", NotImplemented),
        (one(target=""), MalformedXML),
        (one("<Surprise/>"), MalformedXML),
        (one("<Id>a</Id><Id>b</Id>"), MalformedXML),
        (one(f"<Id>{'i' * 256}</Id>"), MalformedXML),
        (one(event="s3:Nonsense"), InvalidArgument),
        (one(event="ObjectCreated:*"), InvalidArgument),
        (one(event="s3:ObjectRestore:*"), NotImplemented),
        (one("<Id>a</Id>") + one("<Id>a</Id>", "s3:ObjectRemoved:*"), InvalidArgument),
        (one() + one(event="s3:ObjectCreated:Put"), InvalidArgument),
        (one(key_filter(("prefix", "a"))) + one(key_filter(("prefix", "ab"))), InvalidArgument),
        (one(key_filter(("suffix", "a"))) + one(key_filter(("prefix", "ab"))), InvalidArgument),
        (one(key_filter(("infix", "a"))), InvalidArgument),
        (one(key_filter(("prefix", "a"), ("Prefix", "b"))), InvalidArgument),
        (one(key_filter(("prefix", "a" * 1025))), InvalidArgument),
        (one("<Filter/>"), MalformedXML),
    ],
)
def test_a_bad_notification_document_is_refused(inner: str, error: type[S3Error]) -> None:
    with pytest.raises(error):
        parse(document(inner))


def test_rules_that_no_key_fits_both_do_not_overlap() -> None:
    found = parse(document(one(key_filter(("prefix", "a"))) + one(key_filter(("prefix", "b"), ("suffix", ".c")))))
    assert [(rule.prefix, rule.suffix) for rule in found.rules] == [("a", ""), ("b", ".c")]


async def test_a_destination_without_an_answer_costs_its_time_and_no_more() -> None:
    server = await asyncio.start_server(lambda reader, writer: None, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    found = ConfiguredDestinations([NotificationSection("hook", f"http://127.0.0.1:{port}/", timeout_s=0.05)])
    with pytest.raises(DeliveryFailed):
        await found.send(HOOK, json.dumps({}).encode())
    await found.close()
    server.close()


def test_a_secret_that_cannot_be_read_is_a_mistake_of_the_configuration(tmp_path: Path) -> None:
    for secret in (tmp_path / "missing", tmp_path / "empty"):
        (tmp_path / "empty").write_text("\n")
        with pytest.raises(ConfigInvalid):
            ConfiguredDestinations([NotificationSection("hook", "https://example.eu/", str(secret))])
